"""A transform for some Linears only: it changes those, computes what it would have, and is refused where it can't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from safetensors.torch import load_file

from llmc.cli import main
from llmc.stream import blockwork

DOWN = {"Awq": {"layers": ["down_proj"]}}


def scales(case: Case) -> list[dict[str, list[float]]]:
    return [block["scales"] for block in case.compress().metrics["blocks"]]


@pytest.mark.parametrize("forward", ["staged", "replay"])
def test_awq_finds_for_one_linear_what_it_finds_for_it_among_all(case, forward):
    method, base = ["Awq", "GPTQ"], {"base": {"forward": forward}}
    everywhere = scales(case(method=method, **base))
    limited = scales(case(method=method, quant={"special": DOWN}, **base))
    assert limited == [{"mlp.down_proj": block["mlp.down_proj"]} for block in everywhere]


def test_only_what_is_named_is_looked_at(case, monkeypatch):
    """Statistics, held calls and searches of the other subsets are saved."""
    stages: list[int] = []
    real = blockwork.run_staged

    def counting(run: Any, found: Any, *rest: Any, **options: Any) -> None:
        stages.append(len(found))
        real(run, found, *rest, **options)

    monkeypatch.setattr(blockwork, "run_staged", counting)
    case(method="Awq", quant={"special": {"layers": "down_proj"}}).compress()
    case(method=["SmoothQuant"]).compress()
    assert stages == [1] * 4 + [2] * 4


def test_a_rotated_model_is_scaled_in_front_of_down_alone_and_stays_what_it_is(case, exact):
    changes: dict[str, Any] = {
        "save": {"save_trans": True},
        "eval": {"eval_pos": ["pretrain", "transformed", "fake_quant"]},
    }
    runs = {}
    for name, methods, special in (
        ("plain", ["Quarot", "GPTQ"], {}),
        ("limited", ["Quarot", "Awq", "GPTQ"], {"special": DOWN}),
    ):
        runs[name] = case(exact("llama-tied"), methods, quant=special, **changes)
        result = runs[name].compress()
        found = {one.position: one.value for one in result.perplexities}
        assert found["transformed"] == pytest.approx(found["pretrain"], rel=1e-5)
        assert all(list(b["scales"]) == (["mlp.down_proj"] if special else []) for b in result.metrics["blocks"])
    plain, limited = (
        {
            name: tensor
            for file in sorted((run.save_path / "transformed_model").glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for run in runs.values()
    )
    differing = {name.partition(".mlp.")[2] for name in plain if not torch.equal(plain[name], limited[name])}
    assert differing == {"up_proj.weight", "down_proj.weight"}


@pytest.mark.parametrize(
    ("methods", "special", "said"),
    [
        (["Quarot", "Awq"], {"Awq": {"layers": ["down_prj"]}}, ["no Linear 'down_prj'", "did you mean 'down_proj'?"]),
        (["Awq"], {"layers": ["nothing"]}, ["layers of Awq", "'nothing'", "its Linears are self_attn.q_proj"]),
        (["Awq"], {"layers": ["q_proj", "v_proj"]}, ["q_proj is named without self_attn.k_proj", "name all of them"]),
        (
            ["SmoothQuant"],
            {"layers": ["down_proj"]},
            ["no norm feeds down_proj", "SmoothQuant changes only", "Awq changes other"],
        ),
        (["OsPlus", "GPTQ"], {"OsPlus": {"layers": "o_proj"}}, ["no norm feeds o_proj", "OsPlus"]),
        (["Awq"], {"layers": []}, ["quant.special.layers", "at least one"]),
        (["Awq"], {"layer": ["down_proj"]}, ["quant.special.layer", "did you mean 'layers'?"]),
    ],
)
def test_names_that_make_no_sense_are_refused_before_a_weight_is_read(case, capsys, methods, special, said):
    run = case(method=methods, quant={"special": special})
    assert main(run.arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert [part for part in said if part not in message] == [], message
    assert not run.save_path.exists()


def test_a_scale_needs_something_in_front_that_can_absorb_it(case, source_of, capsys):
    """The norms of this model stand behind the additions. Clipping needs nothing in front."""
    for options, code in (({}, 2), ({"trans": False}, 0)):
        run = case(source_of("opt-post-norm"), "Awq", quant={"special": {"layers": "fc1", **options}})
        assert main([*run.arguments, "--dry-run"]) == code
    assert "nothing in front of fc1 can absorb a scale" in capsys.readouterr().err
