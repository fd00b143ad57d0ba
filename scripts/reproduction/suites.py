"""A suite: which configurations are run on which models, and with which numbers each is compared.

A suite is a folder with a ``suite.toml``::

    title = "LLaMA-2-7B"
    set = ["base.seed=0"]                           # overrides of every cell

    [[cell]]
    id = "gptq-w4"
    config = "gptq_w4a16.yml"                       # in the suite's folder, or from the project's root
    model = "llama-2-7b"                            # a name in models.toml
    set = ["eval.eval_pos=[fake_quant]"]            # overrides, as those of llmc's --set
    note = "what differs from the published recipe"
    compare = [{published = "llama-2-7b/gptq/w4a16g128/wikitext2@llmc", tolerance = 0.01}]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmc.errors import ConfigError

SUITE = "suite.toml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(_Strict):
    """A measured number and what it should be.

    Attributes:
        published: the id of a published row.
        golden: compare with what llmc itself measured before, in the suite's ``golden.json``.
        tolerance: of the relative difference.
        both_sides: whether to be better by more than the tolerance is wrong too. It is for golden numbers and for
            the original model; a published number may be beaten.
        position: which model was measured, as in ``eval_pos``.
        text: which evaluation, by its name; needed where there are several.
        windows: only the first so many; None for all.
    """

    published: str | None = None
    golden: bool = False
    tolerance: float = Field(gt=0, lt=1)
    both_sides: bool | None = None
    position: str = "fake_quant"
    text: str | None = None
    windows: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.golden == (self.published is not None):
            raise ValueError("a comparison needs either golden = true or the id of a published row")
        return self

    @property
    def is_two_sided(self) -> bool:
        """Whether better is wrong too."""
        return (self.golden or self.position == "pretrain") if self.both_sides is None else self.both_sides


class Cell(_Strict):
    """One run.

    Attributes:
        id: unlike that of any other cell of the suite.
        config: the YAML file.
        model: a name in ``models.toml``.
        overrides: ``key=value`` each.
        note: in what it differs from the published recipe.
        compare: with what.
    """

    id: str = Field(pattern=r"^[\w.-]+$")
    config: Path
    model: str
    overrides: tuple[str, ...] = Field((), alias="set")
    note: str = ""
    compare: tuple[Comparison, ...] = Field(min_length=1)


class KnownModel(_Strict):
    """A model that suites run.

    Attributes:
        hub: its id on the Hugging Face hub; None if it isn't there.
        family: of its architecture, for the tests.
        gigabytes: its size.
        how: what to do to get it; empty if downloading it is all.
    """

    hub: str | None = None
    family: str
    gigabytes: float = Field(gt=0)
    how: str = ""

    def folders(self, name: str) -> tuple[str, ...]:
        """The names of folders that hold it."""
        return (name, *([self.hub.rpartition("/")[2]] if self.hub else []))


class _SuiteFile(_Strict):
    title: str
    about: str = ""
    overrides: tuple[str, ...] = Field((), alias="set")
    cell: tuple[Cell, ...] = Field(min_length=1)


class Suite(_Strict):
    """All cells, with paths that lead somewhere from anywhere."""

    name: str
    folder: Path
    title: str
    about: str
    cells: tuple[Cell, ...]


def read_suite(folder: Path, root: Path, models: Mapping[str, KnownModel], published: Mapping[str, Any]) -> Suite:
    """Read and check a suite.

    Args:
        folder: the one with ``suite.toml``.
        root: where paths of configurations start that aren't in the suite's folder.
        models: the known models by name.
        published: the published rows by id.

    Raises:
        ConfigError: names the cell and the key.
    """
    file = folder / SUITE
    content = _checked(_SuiteFile, _toml(file), file)
    cells = tuple(_located(cell, content.overrides, folder, root, file) for cell in content.cell)
    seen: set[str] = set()
    for cell in cells:
        where = f"{file}: cell {cell.id}"
        if cell.id in seen:
            raise ConfigError(f"{where} stands there twice", "give one of them another id")
        if cell.model not in models:
            raise ConfigError(f"{where}: there is no model {cell.model}", f"known are {', '.join(models)}")
        for one in cell.compare:
            if one.published is not None and one.published not in published:
                raise ConfigError(f"{where}: no published row has the id {one.published}", "see published.tsv")
        seen.add(cell.id)
    return Suite(name=folder.name, folder=folder, title=content.title, about=content.about, cells=cells)


def read_models(file: Path) -> Mapping[str, KnownModel]:
    """The known models by name.

    Raises:
        ConfigError: names the model and the key.
    """
    return {name: _checked(KnownModel, content, f"{file}: {name}") for name, content in _toml(file).items()}


def _located(cell: Cell, overrides: tuple[str, ...], folder: Path, root: Path, file: Path) -> Cell:
    found = next((path for path in (folder / cell.config, root / cell.config) if path.is_file()), None)
    if found is None:
        raise ConfigError(f"{file}: cell {cell.id}: there is no file {cell.config}", f"put it into {folder}")
    return cell.model_copy(update={"config": found, "overrides": overrides + cell.overrides})


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}", "give a suite's name or folder") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}", "mend it there") from error


_Model = TypeVar("_Model", bound=BaseModel)


def _checked(model: type[_Model], content: Any, where: Path | str) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}", "mend these keys") from error
