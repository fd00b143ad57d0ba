"""Kills runs and looks at what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case, files_of

import llmc

OUTPUTS = ("vllm_quant_model", "fake_quant_model", "llamacpp_quant_model")


@contextmanager
def forked() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Makes what runs the command line in a child of a process that has imported everything; see forks.py."""
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    package = str(Path(llmc.__file__).parents[1])
    alone = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone) as process:

        def attempt(order: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield attempt
        process.stdin.close()


@dataclass
class Killer:
    """Starts one run again and again, and looks at what each kill leaves."""

    case: Case
    expected: dict[str, str]
    seconds: float
    attempt: Callable[[dict[str, Any]], dict[str, Any]]
    calm: Path = Path()  # what the run that was left alone wrote
    kills: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.case.save_path.with_suffix(".log")

    def start(self, **when: Any) -> bool:
        """One attempt; whether the run ended."""
        ended = self.attempt({"arguments": self.case.arguments, "log": str(self.log), **when})
        finished = "holds a finished run" in self.text  # killed behind its very last step
        assert ended["killed"] or ended["code"] == 0 or finished, self.text
        if not ended["killed"]:
            return True
        self.kills.append(self.state())
        self.check_that_nothing_half_done_can_be_loaded()
        return False

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> str:
        """How far the run had come."""
        if not (self.case.save_path / ".llmc/fingerprint.json").exists():
            return "finished" if (self.case.save_path / "metrics.json").exists() else "before"
        return "within"

    def check_that_nothing_half_done_can_be_loaded(self) -> None:
        for folder in OUTPUTS:
            left = files_of(self.case.save_path / folder) if (self.case.save_path / folder).exists() else {}
            wanted = {name: digest for name, digest in self.expected.items() if name.startswith(f"{folder}/")}
            there = {f"{folder}/{name}": digest for name, digest in left.items()}
            shards = {name for name in wanted if name.endswith((".safetensors", ".gguf"))}
            if f"{folder}/config.json" in there:
                assert there.items() >= wanted.items()
            if f"{folder}/model.safetensors.index.json" in there:
                assert shards <= there.keys()
            assert all(there[name] == wanted[name] for name in shards & there.keys())
