"""A learned block: what was learned is what is written and evaluated, and it's not worse than where it began."""
# ruff: noqa: F811  (pytest finds imported fixtures by name)

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_engine import Killed, Pass, close, equal, passes, quick, whole_model_losses  # noqa: F401

from llmc.export.dense import FakeQuant
from llmc.quant import ActSpec, PerChannel, PerGroup, PerToken, QuantSpec


def test_smoke(llama, passes):
    one = passes(llama, method="OmniQuant")
    losses = one.run().losses
    print([row["tuning"] for row in one.witness.rows])
    base = passes(llama, method="RTN").run().losses
    print({k: [float(t.mean()) for t in v] for k, v in losses.items()}, [float(t.mean()) for t in base["fake_quant"]])
    two = passes(llama, method="Awq+OmniQuant")
    two.run()
    print([row["tuning"] for row in two.witness.rows])
    assert 0
