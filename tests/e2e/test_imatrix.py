"""llama.cpp's importance matrix is that of the model as it is before it's rounded."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cases import Case, files_of, reload
from torch import Tensor, nn

from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.errors import ConfigError, ExportError
from llmc.prepare import prepare

SAVED = {"save_vllm": False, "save_fake": False, "save_trans": True, "save_imatrix": True}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read(run: Case) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and fields of the file."""
    reader = gguf.GGUFReader(run.save_path / "imatrix" / "imatrix.gguf")
    tensors = {one.name: torch.from_numpy(np.array(one.data)) for one in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def observed(folder: Path, batches: list[Tensor]) -> dict[str, Tensor]:
    """Sums of squares of every Linear's input by llama.cpp's names, in float64, of the whole model in Transformers."""
    model, found = reload(folder), {}

    def hook(name: str, linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].double().reshape(-1, linear.in_features)
        found[name] = found.get(name, 0) + inputs.square().sum(0)

    for index, block in enumerate(model.model.layers):
        for module, short in NAMES.items():
            name = f"blk.{index}.{short}.weight"
            block.get_submodule(module).register_forward_pre_hook(lambda m, args, name=name: hook(name, m, args))
    for batch in batches:
        model(batch)
    return found


@pytest.mark.parametrize(
    ("method", "saved", "tolerance"),
    [
        ("RTN", SAVED, 1e-5),
        ("GPTQ", SAVED, 1e-5),
        ("Awq", SAVED, 0.02),  # the transformed model is stored in bfloat16
        (["Quarot", "GPTQ"], SAVED, 0.02),
        ("GPTQ", {**SAVED, "save_vllm": True, "save_fake": True}, 1e-5),
    ],
    ids=["rtn", "gptq", "awq", "rotated", "with others"],
)
def test_it_holds_the_squares_of_the_transformed_models_inputs(case, pieced, method, saved, tolerance):
    run = case(pieced("llama"), method, save=saved, eval={"eval_pos": []})
    run.compress()
    prepared = prepare(load_config(run.content, ("save.on_existing=overwrite",), options_types()))
    batches = [batch.tokens for batch in prepared.calib]
    tensors, fields = read(run)
    expected = observed(run.save_path / "transformed_model", batches)
    assert len(tensors) == 2 * 7 * 4
    for name, total in expected.items():
        found = tensors[f"{name}.in_sum2"]
        assert found.shape == (1, len(total))
        assert float((found[0] - total).norm() / total.norm()) < tolerance, name
        assert tensors[f"{name}.counts"].tolist() == [[sum(batch.numel() for batch in batches)]]
    assert torch.equal(tensors["blk.0.attn_q.weight.in_sum2"], tensors["blk.0.attn_v.weight.in_sum2"])
    assert fields["general.type"] == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= fields.keys()


def test_the_rest_of_the_run_is_as_without_it(case, pieced):
    runs = [
        case(pieced("llama"), ["Awq", "GPTQ"], save={"save_imatrix": wanted, "save_fake": True})
        for wanted in (True, False)
    ]
    perplexities = [[one.value for one in run.compress().perplexities] for run in runs]
    assert perplexities[0] == perplexities[1]
    with_it, without = runs
    assert without.written() == with_it.written()
    assert sorted(path.name for path in (with_it.save_path / "imatrix").iterdir()) == ["imatrix.gguf"]


def test_an_interrupted_run_writes_the_same_file(case, pieced):
    class Stop(Exception):
        pass

    class Interrupt:
        def started(self, blocks, done): ...
        def phase(self, text): ...
        def block(self, index, row):
            if index == 2:
                raise Stop

    import llmc

    whole, broken = (case(pieced("llama"), "GPTQ", save={**SAVED, "save_trans": False}) for _ in range(2))
    whole.compress()
    with pytest.raises(Stop):
        llmc.compress(broken.content, listener=Interrupt())
    broken.compress()
    assert files_of(broken.save_path / "imatrix") == files_of(whole.save_path / "imatrix")


def test_it_is_part_of_the_numbers_and_of_the_summary(case, pieced, capsys):
    run = case(pieced("llama"), save=SAVED, eval={"eval_pos": []})
    assert main(run.arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "llama-quantize --imatrix" in said
    output = json.loads((run.save_path / "metrics.json").read_text())["outputs"]["save_imatrix"]
    assert output["bits_per_weight"] is None
    assert output["bytes"] == (run.save_path / "imatrix" / "imatrix.gguf").stat().st_size


def test_it_needs_calibration_text_and_an_architecture_of_llama_cpp(case, pieced, source_of):
    run = case(pieced("llama"), "RTN", save=SAVED)
    del run.content["calib"]
    with pytest.raises(ConfigError, match=r"save\.save_imatrix needs calibration text"):
        run.compress()
    with pytest.raises(ExportError, match=r"llama\.cpp"):
        case(source_of("opt"), save=SAVED).compress()


def test_a_finished_run_has_nothing_to_make_it_of(case, capsys):
    run = case(eval={"eval_pos": []})
    run.compress()
    assert main(["export", "--from", str(run.save_path), "--to", "imatrix"]) == 2
    assert "save_imatrix: True in the run itself" in " ".join(capsys.readouterr().err.split())
