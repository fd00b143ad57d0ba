from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, IncompleteSnapshotError, RepositoryNotFoundError

from llmc.errors import CheckpointError
from llmc.models import locate
from llmc.models.locate import locate_checkpoint, wanted_files


def folder_with(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def converted(monkeypatch) -> list[Path]:
    """Conversions are tested elsewhere: here they only note what they were given."""
    given: list[Path] = []

    def note(source: Path, cache: Path | None) -> Path:
        given.append(source)
        return source

    monkeypatch.setattr(locate, "convert_bin", note)
    monkeypatch.setattr(locate, "convert_gguf", note)
    return given


@pytest.fixture
def hub(monkeypatch):
    """No hub is asked: the file list and the download are replaced by these, which note their calls."""
    state = SimpleNamespace(files=[], folder=None, list_error=None, fetch_error=None, cached=None, calls=[])

    def list_repo_files(self, repo, *, revision=None):
        if state.list_error:
            raise state.list_error
        return state.files

    def snapshot_download(repo, *, revision=None, allow_patterns=None, local_files_only=False):
        state.calls.append((repo, revision, allow_patterns, local_files_only))
        if local_files_only:
            if isinstance(state.cached, Exception):
                raise state.cached
            return str(state.cached)
        if state.fetch_error:
            raise state.fetch_error
        return str(state.folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def hub_error(kind: type[Exception]) -> Exception:
    """The hub's errors want an HTTP response; its message is all that matters here."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401")
    return error


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_that_is_right_is_taken_as_it_is(tmp_path, converted, weights):
    folder_with(tmp_path, "config.json", weights, "pytorch_model.bin", "extra.gguf")
    assert locate_checkpoint(str(tmp_path)) == tmp_path
    assert converted == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_with(tmp_path / "m", "config.json", "model.safetensors")
    assert locate_checkpoint("~/m") == tmp_path / "m"


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["config.json", "pytorch_model.bin"], ""),
        (["config.json", "pytorch_model.bin.index.json"], ""),
        (["a.gguf"], "a.gguf"),
        (["a.GGUF", "config.json"], "a.GGUF"),
    ],
)
def test_what_is_converted(tmp_path, converted, names, source):
    folder_with(tmp_path, *names)
    locate_checkpoint(str(tmp_path))
    assert converted == [tmp_path / source]


def test_a_gguf_file_itself(tmp_path, converted):
    folder_with(tmp_path, "a.gguf", "b.gguf")
    locate_checkpoint(str(tmp_path / "b.gguf"))
    assert converted == [tmp_path / "b.gguf"]


@pytest.mark.parametrize(
    ("names", "path", "says"),
    [
        (["model.safetensors"], ".", "no config.json"),
        (["config.json"], ".", r"no weights under a name that is known\n.*model.safetensors"),
        (["config.json", "weights.pt"], ".", r"only weights.pt"),
        (["a.gguf", "b.gguf"], ".", r"2 GGUF files: a.gguf, b.gguf"),
        (["a-00001-of-00002.gguf"], ".", "one part of a split GGUF"),
        (["model.safetensors"], "model.safetensors", "a file, not a folder"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, converted, names, path, says):
    folder_with(tmp_path, *names)
    with pytest.raises(CheckpointError, match=says):
        locate_checkpoint(str(tmp_path / path))


@pytest.mark.parametrize("path", ["/no/where", "./where", "~/no-such-model", "a/b/c", "model.gguf", "a b", "", "x@"])
def test_paths_that_do_not_exist_never_reach_the_hub(hub, path, tmp_path, monkeypatch):
    monkeypatch.chdir(folder_with(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"no such folder|no config.json"):
        locate_checkpoint(path)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("path", "revision"), [("org/name", None), ("org/name@v1.0", "v1.0"), ("org/name@refs/pr/1", "refs/pr/1")]
)
def test_a_hub_id_fetches_what_is_needed(hub, tmp_path, path, revision):
    hub.files = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "code.py", "onnx/model.onnx"]
    hub.folder = folder_with(tmp_path, "config.json", "model.safetensors")
    assert locate_checkpoint(path) == tmp_path
    assert hub.calls == [("org/name", revision, ["config.json", "model.safetensors"], False)]
    locate_checkpoint(path, trust_remote_code=True)
    assert "code.py" in hub.calls[-1][2]


def test_which_files_of_a_repository_are_wanted():
    side = ["config.json", "merges.txt", "spiece.model", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = ["model.safetensors.index.json"]
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    junk = ["original/params.json", "consolidated.safetensors", "training_args.bin", "tf_model.h5", "LICENSE"]
    assert set(wanted_files([*side, *shards, *index, *bins[:1], *junk], False)) == {*side, *shards, *index}
    assert sorted(wanted_files([*side, *bins, *junk[:1], *junk[2:]], False)) == sorted([*side, *bins])
    assert wanted_files(["config.json", "a.gguf"], False) == ["config.json", "a.gguf"]
    assert wanted_files(["config.json", "a.gguf", "b.gguf"], False) == ["config.json"]


@pytest.mark.parametrize(
    ("files", "says"), [(["config.json"], "no usable weights"), (["a.gguf", "b.gguf"], "only 2 GGUF files")]
)
def test_repositories_without_usable_weights(hub, files, says):
    hub.files = files
    with pytest.raises(CheckpointError, match=says):
        locate_checkpoint("org/name")


@pytest.mark.parametrize(
    ("kind", "says"),
    [(GatedRepoError, "gated, and this account"), (RepositoryNotFoundError, "no such repository, or it is private")],
)
def test_the_hub_refuses(hub, kind, says):
    hub.files = ["config.json", "model.safetensors"]
    hub.fetch_error = hub_error(kind)
    with pytest.raises(CheckpointError, match=rf"'org/name' is no local folder.*{says}.*\n.*local folder"):
        locate_checkpoint("org/name")


def test_offline_an_earlier_download_serves(hub, tmp_path):
    hub.list_error = ConnectionError("no route")
    folder_with(tmp_path, "config.json", "model.safetensors")
    for cached in (tmp_path, IncompleteSnapshotError("README.md is missing", snapshot_path=str(tmp_path))):
        hub.cached = cached
        assert locate_checkpoint("org/name") == tmp_path
    hub.cached = FileNotFoundError("nothing cached")
    with pytest.raises(CheckpointError, match=r"can't be reached, and no complete copy.*no route"):
        locate_checkpoint("org/name@main")


def test_without_weights_none_are_fetched(hub, tmp_path):
    hub.files = ["config.json", "mine.py", "model.safetensors", "pytorch_model.bin", "weights.gguf"]
    hub.folder = folder_with(tmp_path / "fetched", "config.json")
    assert locate_checkpoint("org/name", weights=False) == hub.folder
    assert locate_checkpoint("org/name", trust_remote_code=True, weights=False) == hub.folder
    assert [call[2] for call in hub.calls] == [["config.json"], ["config.json", "mine.py"]]
    hub.files = ["weights.gguf"]
    with pytest.raises(CheckpointError, match="no config"):
        locate_checkpoint("org/name", weights=False)


def test_without_weights_a_folder_with_a_configuration_will_do(tmp_path):
    assert locate_checkpoint(str(folder_with(tmp_path / "model", "config.json")), weights=False) == tmp_path / "model"
    with pytest.raises(CheckpointError, match="no config"):
        locate_checkpoint(str(folder_with(tmp_path / "empty")), weights=False)
