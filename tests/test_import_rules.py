"""Who may import whom. An algorithm that knows an exporter, or an engine that names a method, is found here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmc"

MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "quant": set(),
    "linalg": set(),
    "analysis": set(),
    "data": set(),
    "eval": {"quant", "linalg", "models", "data"},
    "models": {"quant", "linalg"},
    "algorithms": {"models", "quant", "linalg"},
    "export": {"quant"},
    "stream": {"models", "algorithms", "quant", "linalg", "analysis", "eval"},
    "verify": {"export", "eval", "quant", "stream"},
}
NO_TRANSFORMERS = {"quant", "linalg", "analysis", "algorithms", "export", "config"}
CONVERSION = {"transformers.core_model_loading", "transformers.conversion_mapping"}


def imports(file: Path) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, also inside functions."""
    package = file.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def files(room: str) -> list[Path]:
    found = sorted((PACKAGE / room).rglob("*.py"))
    assert found, f"llmc/{room} has no files"
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room):
    allowed = [f"llmc.{name}" for name in {room, "errors"} | MAY_IMPORT[room]]
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files(room)
        for name in imports(file)
        if within(name, "llmc") and not any(within(name, module) for module in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("room", sorted(NO_TRANSFORMERS))
def test_a_room_does_without_transformers(room):
    assert not [file for file in files(room) if any(within(name, "transformers") for name in imports(file))]


def test_one_file_knows_transformers_internal_loading():
    knowing = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(within(name, module) for name in imports(file) for module in CONVERSION)
    }
    assert knowing == {"stream/skeleton.py"}


def test_importing_llmc_imports_no_backend(tmp_path):
    for backend in ("vllm", "lm_eval", "matplotlib"):
        (tmp_path / f"{backend}.py").write_text("")  # there to be imported, also where it isn't installed
    asked = "{'vllm', 'lm_eval', 'matplotlib'}"
    code = f"import sys, llmc, llmc.stream.engine, llmc.export; print(*{asked} & sys.modules.keys())"
    environment = {"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
