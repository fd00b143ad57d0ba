"""Where models and texts lie on this machine: the overrides that point a configuration at them, or what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmc.config import Config
from llmc.data.sampling import MIX, MIXED
from llmc.data.texts import split_for

from .suites import KnownModel


@dataclass(frozen=True)
class Found:
    """What was looked for.

    Attributes:
        overrides: ``key=value`` each.
        missing: a line for each thing that isn't there.
    """

    overrides: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.overrides + other.overrides, self.missing + other.missing)


@dataclass(frozen=True)
class Places:
    """Folders with models and data sets.

    Attributes:
        models: holds a folder for each model.
        data: holds a folder for each data set.
        download: fetch what isn't there from the Hugging Face hub.
    """

    models: Path
    data: Path
    download: bool = False

    def find(self, name: str, model: KnownModel, config: Config) -> Found:
        """Everything that a run needs."""
        return sum((self._text(*section) for section in _sections(config)), self._model(name, model))

    def _model(self, name: str, model: KnownModel) -> Found:
        wanted = {folder.lower() for folder in model.folders(name)}
        folders = sorted(self.models.iterdir()) if self.models.is_dir() else []
        for folder in folders:
            if folder.name.lower() in wanted and (folder / "config.json").is_file():
                return _set("model.path", str(folder))
        if self.download and model.hub:
            return _set("model.path", model.hub)
        remedy = model.how or f"--download fetches {model.hub}, {model.gigabytes:g} GB"
        return Found(missing=(f"model {name}: no {' or '.join(model.folders(name))} in {self.models}; {remedy}",))

    def _text(self, section: str, name: str, path: str | None, split: str) -> Found:
        if name == "text":
            file = self.data / (path or "")
            if file.exists():
                return _set(f"{section}.path", str(file))
            return Found(missing=(f"text {path}: not in {self.data}",))
        if name == MIX:
            return self._mixed(section)
        saved = self._saved(name, split)
        if saved is not None:
            return _set(f"{section}.path", str(saved)) + _set(f"{section}.download", False)
        if self.download:
            return _set(f"{section}.download", True)
        return Found(missing=(self._wanting(name, split),))

    def _mixed(self, section: str) -> Found:
        wanting = [name for name in MIXED if self._saved(name, "train") != self.data / name]
        if not wanting:
            return _set(f"{section}.path", str(self.data)) + _set(f"{section}.download", False)
        if self.download:
            return _set(f"{section}.download", True)
        return Found(missing=tuple(self._wanting(name, "train") for name in wanting))

    def _wanting(self, name: str, split: str) -> str:
        return f"data set {name}, split {split}: not in {self.data / name} as save_to_disk leaves it; or --download"

    def _saved(self, name: str, split: str) -> Path | None:
        """A data set with this split, or the split alone; other files in a folder of that name are something else."""
        folder = self.data / name
        if (folder / split / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
            return folder / split
        try:
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError):
            return None
        return folder if split in splits else None


def _sections(config: Config) -> Iterator[tuple[str, str, str | None, str]]:
    """Each section that reads a text: its key, the text's name, its path, the split."""
    if (calib := config.calib) is not None:
        yield "calib", calib.name, calib.path, split_for(calib.name, "calibration")
    for index, one in enumerate(config.eval):
        old = one.protocol == "gptq_old" and one.name == "ptb"
        split = "validation" if old else split_for(one.name, "evaluation")
        yield f"eval.{index}", one.name, one.path, split


def _set(key: str, value: str | bool) -> Found:
    return Found((f"{key}={json.dumps(value)}",))
