"""Where text comes from: the public sets (from the hub or saved on disk) and local files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmc.data.fields import Render, Rows, choose_field
from llmc.data.files import Corpus, PathFraction, load_file, load_folder
from llmc.errors import DataError

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class PublicSet:
    """A public data set on the hub.

    Attributes:
        hub_id: its repository.
        config: the configuration's name, if it has several.
        files: split -> the only file(s) to fetch; a split that isn't here is fetched whole.
        revision: a branch other than the main one.
        text_field: the field with the text.
        calibration_split, evaluation_split: what each purpose reads; "" where the set isn't meant for it.
    """

    hub_id: str
    calibration_split: str
    evaluation_split: str
    text_field: str = "text"
    config: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


PUBLIC_SETS: Mapping[str, PublicSet] = {
    "wikitext2": PublicSet("Salesforce/wikitext", "train", "test", config="wikitext-2-raw-v1"),
    "c4": PublicSet(
        "allenai/c4",
        "train",
        "validation",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    # The main branch is a loading script, which datasets >= 4 refuses; this branch holds the same rows as parquet.
    "ptb": PublicSet(
        "ptb-text-only/ptb_text_only",
        "train",
        "test",
        text_field="sentence",
        files={split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")},
        revision="refs/convert/parquet",
    ),
    "pileval": PublicSet("mit-han-lab/pile-val-backup", "validation", ""),
    "ultrachat": PublicSet("HuggingFaceH4/ultrachat_200k", "train_sft", "", text_field="messages"),
}


@dataclass(frozen=True)
class Source:
    """What to read.

    Attributes:
        name: a public set's name, or any name for local text.
        path: a file, a folder, or either with ``#start:stop`` (see `PathFraction`); ignored when downloading.
        download: fetch the public set from the hub.
        split: the split to read from a set that has several.
        text_field: the field that holds the text; None to find it.
        render: applies the chat template to each document; None for plain text.
    """

    name: str
    path: str | None
    download: bool
    split: str
    text_field: str | None = None
    render: Render | None = None


def split_for(name: str, purpose: Purpose) -> str:
    """Return the split of a public set for this purpose; for local text "train" or "test".

    Raises:
        DataError: the set isn't meant for evaluation.
    """
    known = PUBLIC_SETS.get(name)
    if known is None:
        return "train" if purpose == "calibration" else "test"
    split = known.calibration_split if purpose == "calibration" else known.evaluation_split
    if not split:
        raise DataError(f"{name} is a set to calibrate with, not to evaluate on", "use wikitext2, c4, ptb or a file")
    return split


def load_corpus(source: Source) -> Corpus:
    """Read the text that `source` describes.

    Raises:
        DataError: see the message: unknown set, hub out of reach, missing or malformed file, no text field.
    """
    if source.download:
        return _from_dataset(_fetch(source), source, PathFraction(Path(source.name)), public=True)
    if not source.path:
        raise DataError(f"no path is given for the text set '{source.name}'", "set path, or download: true")
    fraction = PathFraction.parse(source.path)
    if fraction.path.is_file():
        return load_file(fraction, source.text_field, source.render)
    if not fraction.path.is_dir():
        raise DataError(f"there is no file or folder {fraction.path}", "check the path")
    if any((fraction.path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return _from_dataset(_saved(fraction.path, source.split), source, fraction, public=source.name in PUBLIC_SETS)
    return load_folder(fraction, source.text_field, source.render)


def _fetch(source: Source) -> Any:
    known = PUBLIC_SETS.get(source.name)
    if known is None:
        raise DataError(
            f"there is no public text set '{source.name}' to download",
            f"use one of {', '.join(PUBLIC_SETS)}, or download: false and a path",
        )
    import datasets

    options: dict[str, Any] = {"split": source.split}
    if known.config:
        options["name"] = known.config
    if source.split in known.files:
        options["data_files"] = {source.split: known.files[source.split]}
    if known.revision:
        options["revision"] = known.revision
    try:
        return datasets.load_dataset(known.hub_id, **options)
    except Exception as error:  # network, hub, cache and parser each raise their own kinds
        raise DataError(
            f"could not fetch '{source.name}' ({known.hub_id}, split {source.split}) from the hub: "
            f"{type(error).__name__}: {error}",
            "without a connection, set download: false and path to a saved data set or a text file",
        ) from error


def _saved(folder: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises whatever its parser does
        raise DataError(
            f"can't read the saved data set {folder}: {type(error).__name__}: {error}", "save it anew with save_to_disk"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split in loaded:
        return loaded[split]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DataError(
        f"the data set {folder} has no split '{split}', only {', '.join(loaded)}",
        f"give the split's own folder, as in {folder / next(iter(loaded), 'train')}",
    )


def _from_dataset(dataset: Any, source: Source, fraction: PathFraction, *, public: bool) -> Corpus:
    origin = f"{source.name} {source.split}" if public else fraction.label
    wanted = source.text_field
    if wanted is None and public and PUBLIC_SETS[source.name].text_field in dataset.column_names:
        wanted = PUBLIC_SETS[source.name].text_field
    if wanted == "messages" and source.render is None:
        wanted = None  # so that the error explains how a chat becomes text
    chosen = choose_field(dataset.column_names, wanted, source.render, origin)
    dataset = dataset.select_columns([name for name in chosen.columns if name in dataset.column_names])
    if (fraction.start, fraction.stop) != (0.0, 1.0):
        dataset = dataset.select(fraction.row_range(len(dataset)))
        origin = f"{origin}#{fraction.start:g}:{fraction.stop:g}" if public else origin
    rows = Rows(dataset, chosen, origin)
    return Corpus(rows, rows, origin, is_local=not public, is_rendered=source.render is not None)
