"""From what `model.path` says to a local folder with config.json and safetensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llmc.errors import CheckpointError
from llmc.models.convert import BIN_INDEX, BIN_SINGLE, SIDE_SUFFIXES, convert_bin, convert_gguf

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_BINS = (BIN_SINGLE, BIN_INDEX)
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?$")
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def locate_checkpoint(
    path: str, *, trust_remote_code: bool = False, cache: Path | None = None, weights: bool = True
) -> Path:
    """Find, fetch or convert a checkpoint.

    Args:
        path: a folder with config.json and safetensors or pytorch_model*.bin; a .gguf file, or a folder with one and
            no other weights; or a hub id, ``org/name`` or ``org/name@revision``.
        trust_remote_code: fetch the repository's Python files too.
        cache: where conversions are kept; see `convert_bin`.
        weights: whether they're wanted; if not, a folder with config.json will do, and a hub's weights aren't fetched.

    Returns:
        A local folder with config.json and safetensors: the given one where it is that already.

    Raises:
        CheckpointError: nothing there, nothing usable there, or the hub can't be reached or refuses.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _from_file(local, cache)
    if local.is_dir():
        return local if not weights and (local / "config.json").is_file() else _from_folder(local, cache)
    match = _HUB_ID.match(path)
    if match is None or _looks_local(path):
        raise CheckpointError(
            f"no such folder: {path}", "check model.path; it takes a folder, a .gguf file or a hub id (org/name)"
        )
    fetched = _from_hub(match["repo"], match["revision"], trust_remote_code, weights=weights)
    return _from_folder(fetched, cache) if weights else fetched


def wanted_files(names: Sequence[str], trust_remote_code: bool) -> list[str]:
    """Choose what to fetch of a repository.

    Args:
        names: all its files, as paths from its root.
        trust_remote_code: whether to take Python files.

    Returns:
        Config and tokenizer files, and one kind of weights: safetensors, else .bin, else the only .gguf.
    """
    top = [name for name in names if "/" not in name]
    chosen = [
        name
        for name in top
        if name.endswith(SIDE_SUFFIXES) and (trust_remote_code or not name.endswith(".py")) and name not in _BINS
    ]
    chosen += [name for name in names if name.startswith("additional_chat_templates/") and name.endswith(".jinja")]
    safetensors = [
        name for name in top if name.endswith(".safetensors") and not name.startswith(("consolidated", "adapter"))
    ]
    bins = [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    ggufs = [name for name in top if name.lower().endswith(".gguf")]
    if safetensors:
        return chosen + safetensors
    if bins:
        return chosen + bins + [name for name in top if name == BIN_INDEX]
    return chosen + (ggufs if len(ggufs) == 1 else [])


def _looks_local(path: str) -> bool:
    repo = path.split("@", 1)[0]
    return path.startswith((".", "/", "~")) or repo.count("/") > 1 or path.lower().endswith((".gguf", ".safetensors"))


def _from_file(file: Path, cache: Path | None) -> Path:
    if file.suffix.lower() != ".gguf":
        raise CheckpointError(f"{file} is a file, not a folder", "give the folder with config.json, or a .gguf file")
    if _GGUF_PART.search(file.name):
        raise CheckpointError(
            f"{file} is one part of a split GGUF, which can't be converted",
            "merge the parts with llama.cpp's gguf-split --merge",
        )
    return convert_gguf(file, cache)


def _from_folder(folder: Path, cache: Path | None) -> Path:
    has_safetensors = any((folder / name).is_file() for name in _SAFETENSORS)
    has_bin = any((folder / name).is_file() for name in _BINS)
    ggufs = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if not has_safetensors and not has_bin and ggufs:
        if len(ggufs) == 1:
            return _from_file(ggufs[0], cache)
        raise CheckpointError(
            f"{folder} holds {len(ggufs)} GGUF files: {', '.join(file.name for file in ggufs)}",
            "set model.path to one of them",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json", "give the folder that holds the model's config.json")
    if has_safetensors:
        return folder
    if has_bin:
        return convert_bin(folder, cache)
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    raise CheckpointError(
        f"{folder} holds no weights under a name that is known" + (f" (only {', '.join(others)})" if others else ""),
        f"it needs {', '.join((*_SAFETENSORS, *_BINS))} or one .gguf file",
    )


def _from_hub(repo: str, revision: str | None, trust_remote_code: bool, *, weights: bool) -> Path:
    """Fetch what is needed of a repository; without a connection, take what an earlier run fetched."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        chosen = wanted_files(names, trust_remote_code)
        if not weights:
            chosen = [name for name in chosen if not name.endswith(_WEIGHTS)]
            if "config.json" not in chosen:
                raise CheckpointError(f"{repo} has no config.json", "name another repository")
        elif not any(name.endswith(_WEIGHTS) for name in chosen):
            ggufs = [name for name in names if name.endswith(".gguf")]
            raise CheckpointError(
                f"{repo} holds no usable weights" + (f", only {len(ggufs)} GGUF files" if ggufs else ""),
                "fetch the .gguf file you want and set model.path to it" if ggufs else "name another repository",
            )
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=chosen))
    except CheckpointError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # a gated repository is a kind of not found
        raise _hub_error(repo, revision, error) from error
    except Exception as error:  # offline, time-outs, proxies, a full disk: each library below raises its own
        cached = _from_hub_cache(repo, revision)
        if cached is None:
            raise _hub_error(repo, revision, error) from error
        return cached


def _from_hub_cache(repo: str, revision: str | None) -> Path | None:
    """Return the folder that an earlier run fetched; whether its weights are whole shows when they are read."""
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # the usual case: not every file of the repository was wanted
        folder = Path(error.snapshot_path)
        return folder if (folder / "config.json").is_file() else None
    except Exception:  # nothing there; why the hub failed is what helps the user
        return None


def _hub_error(repo: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        cause = "the repository is gated, and this account has no access to it"
    elif isinstance(error, RevisionNotFoundError):
        cause = f"the repository has no revision '{revision}'"
    elif isinstance(error, RepositoryNotFoundError):
        cause = "there is no such repository, or it is private"
    else:
        cause = (
            f"the hub can't be reached, and no complete copy is in its local cache ({type(error).__name__}: {error})"
        )
    where = f"{repo}@{revision}" if revision else repo
    return CheckpointError(
        f"'{where}' is no local folder, and as a hub id it can't be fetched: {cause}",
        "check the spelling, log in with `hf auth login` if it is gated, or set model.path to a local folder",
    )
