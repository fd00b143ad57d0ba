"""Every kind of damage is named, by file and tensor; and what isn't damaged isn't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import INDEX, Export, add, change, edit_json, flip, shard_of, swap, tensors_of

from llmc.cli import main
from llmc.verify import Report, verify

Q, K, UP, DOWN = (
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
)
NORM, HEAD = "model.layers.2.input_layernorm.weight", "lm_head.weight"
LINEARS = 4 * 7


def said(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings]


def found(report: Report) -> list[tuple[str, str]]:
    return [(finding.place, finding.tensor) for finding in report.findings]


@pytest.mark.parametrize("scheme", ["w4", "w8a8", "fp8"])
def test_an_export_is_clean_by_itself_beside_its_twin_and_beside_the_original(exported, scheme):
    made = exported(scheme)
    for against in (None, made.fake, made.original):
        report = verify(made.vllm, against)
        assert (said(report), report.exit_code, report.notes, report.unjudged) == ([], 0, [], "")
        assert any(f"{LINEARS} of {LINEARS + 2} Linears and embeddings quantized" in line for line in report.checked)
    assert any(f"{LINEARS} weights, relative error" in line for line in report.checked)
    twin = verify(made.vllm, made.fake)
    assert f"against MODEL: {LINEARS} of {LINEARS} weights equal bit for bit" in twin.checked
    assert verify(made.fake).exit_code == verify(made.original).exit_code == 0
    dense = verify(made.fake, made.original)
    assert said(dense) == []
    assert any("30 weights, relative error" in line for line in dense.checked)
    assert "against MODEL: 30 of 30 weights equal bit for bit" in verify(made.original, made.original).checked


def set_(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def how(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 0] = value
        return tensor

    return how


def drop(tensor: torch.Tensor) -> None:
    return None


def twice(folder: Path, name: str) -> None:
    own = shard_of(folder, name)
    shard = next(index for index, file in enumerate(sorted(folder.glob("*.safetensors"))) if file != own)
    add(folder, name, tensors_of(folder)[name], shard)


STRUCTURAL = {
    "a missing tensor": (lambda f: change(f, f"{Q}.weight_scale", drop), f"{Q}.weight_scale", "isn't there, where"),
    "a missing norm": (lambda f: change(f, NORM, drop), NORM, "is missing"),
    "a missing head": (lambda f: change(f, HEAD, drop), HEAD, "is missing"),
    "another dtype": (
        lambda f: change(f, f"{Q}.weight_packed", lambda t: t.long()),
        f"{Q}.weight_packed",
        "is int64, not int32 [64, 8]",
    ),
    "another dtype of scales": (
        lambda f: change(f, f"{Q}.weight_scale", lambda t: t.double()),
        f"{Q}.weight_scale",
        "is float64, not bfloat16 or float16 or float32 [64, 2]",
    ),
    "another shape": (
        lambda f: change(f, f"{Q}.weight_scale", lambda t: t[:, :1]),
        f"{Q}.weight_scale",
        "has the shape [64, 1], not [64, 2]",
    ),
    "a transposed norm": (lambda f: change(f, NORM, lambda t: t[:, None]), NORM, "has the shape [64, 1], not [64]"),
    "another weight_shape": (
        lambda f: change(f, f"{UP}.weight_shape", lambda t: t.flip(0)),
        f"{UP}.weight_shape",
        "says [64, 128], and the model has [128, 64]",
    ),
    "an extra tensor": (lambda f: add(f, f"{Q}.g_idx", torch.zeros(4)), f"{Q}.g_idx", "is one too many"),
    "a tensor of no module": (lambda f: add(f, "model.extra.weight", torch.zeros(4)), "model.extra.weight", "too many"),
    "a tensor twice": (
        lambda f: twice(f, NORM),
        NORM,
        "-of-00003.safetensors too",
    ),
    "a scale of 0": (
        lambda f: change(f, f"{DOWN}.weight_scale", set_(0)),
        f"{DOWN}.weight_scale",
        "1 of 256 scales is 0",
    ),
    "a NaN scale": (
        lambda f: change(f, f"{DOWN}.weight_scale", set_(float("nan"))),
        f"{DOWN}.weight_scale",
        "1 of 256 scales is NaN, the first at [3, 0]",
    ),
    "an infinite scale": (
        lambda f: change(f, f"{DOWN}.weight_scale", set_(float("inf"))),
        f"{DOWN}.weight_scale",
        "1 of 256 scales is infinite",
    ),
    "NaN in the head": (lambda f: change(f, HEAD, set_(float("nan"))), HEAD, "1 of 13312 values are NaN or infinite"),
    "an ignored name that isn't there": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["ignore"].append("model.layers.9.x")),
        "model.layers.9.x",
        "the model has no such module",
    ),
    "an ignored module that is quantized": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["ignore"].append(DOWN)),
        DOWN,
        "is quantized (weight_packed), but config.json leaves it out",
    ),
}


@pytest.mark.parametrize("damage", STRUCTURAL)
def test_damage_to_the_structure_is_named_by_tensor(copied, damage):
    made: Export = copied("w4")
    how, tensor, problem = STRUCTURAL[damage]
    how(made.vllm)
    report = verify(made.vllm)
    assert report.exit_code == 1
    mine = [finding for finding in report.findings if finding.tensor == tensor]
    assert any(problem in finding.problem for finding in mine), said(report)
    assert {finding.tensor for finding in report.findings} <= {tensor, ""}
    assert all((made.vllm / finding.place).exists() for finding in report.findings)
    assert all(finding.remedy for finding in report.findings)


@pytest.mark.parametrize(
    ("damage", "tensors"),
    [
        (
            lambda f: swap(f, f"{Q}.weight_scale", "model.layers.2.self_attn.q_proj.weight_scale"),
            {Q, Q.replace("1", "2")},
        ),
        (lambda f: change(f, f"{UP}.weight_packed", torch.zeros_like), {UP}),
        (lambda f: change(f, f"{UP}.weight_packed", lambda t: t.flip(0)), {UP}),
        (lambda f: change(f, f"{UP}.weight_packed", lambda t: t.flip(1)), {UP}),
        (
            lambda f: swap(f, f"{Q}.weight_packed", "model.layers.3.self_attn.q_proj.weight_packed"),
            {Q, Q.replace("1", "3")},
        ),
        (lambda f: change(f, f"{UP}.weight_scale", lambda t: t * 2), {UP}),
        (lambda f: change(f, f"{UP}.weight_zero_point", lambda t: ~t), {UP}),
    ],
    ids=["scales", "zeros", "rows", "columns", "codes", "twice", "zero points"],
)
def test_damaged_values_are_found_beside_the_twin_and_beside_the_original(copied, damage, tensors):
    made: Export = copied("w4")
    damage(made.vllm)
    assert verify(made.vllm).exit_code == 0
    for against in (made.fake, made.original):
        report = verify(made.vllm, against)
        assert {finding.tensor for finding in report.findings} == tensors, said(report)


@pytest.mark.parametrize(
    ("scheme", "damage", "problem"),
    [
        (
            "w4-channel",
            lambda f: swap(f, f"{Q}.weight_scale", "model.layers.2.self_attn.q_proj.weight_scale"),
            "has runs of another size than MODEL's, off by ",
        ),
        ("w8a8", lambda f: change(f, f"{Q}.weight", torch.zeros_like), "has nothing to do with MODEL's"),
        ("w8a8", lambda f: swap(f, f"{Q}.weight_scale", "model.layers.2.self_attn.q_proj.weight_scale"), "off by "),
    ],
)
def test_the_original_tells_rounding_from_damage(copied, scheme, damage, problem):
    made: Export = copied(scheme)
    damage(made.vllm)
    report = verify(made.vllm, made.original)
    assert {finding.tensor for finding in report.findings} <= {Q, Q.replace("1", "2")}
    assert report.findings[0].tensor == Q
    assert problem in report.findings[0].problem


@pytest.mark.parametrize("bit", [0, 6])
@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_flipped_bit_is_found_beside_the_twin(copied, part, bit):
    made: Export = copied("w4")
    flip(made.vllm, f"{DOWN}.{part}", byte=10, bit=bit)
    assert verify(made.vllm).exit_code == 0
    report = verify(made.vllm, made.fake)
    assert found(report) == [(shard_of(made.vllm, f"{DOWN}.weight_packed").name, DOWN)]
    assert "differs from MODEL, first at [" in said(report)[0]
    assert "relative error" in said(report)[0]


def test_a_flipped_bit_outside_of_the_quantized_weights_is_found_too(copied):
    made: Export = copied("w4")
    flip(made.vllm, NORM, byte=5, bit=1)
    assert verify(made.vllm).exit_code == 0
    report = verify(made.vllm, made.fake)
    assert [finding.tensor for finding in report.findings] == [NORM]


@pytest.mark.parametrize("left", [0, 4, 100, 0.3, 0.6, 0.999])
def test_a_truncated_shard_is_named_and_what_it_held_is_not_called_missing(copied, left):
    made: Export = copied("w4")
    file = shard_of(made.vllm, f"{Q}.weight_packed")
    content = file.read_bytes()
    file.write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
    report = verify(made.vllm, made.fake)
    assert found(report) == [(file.name, "")]
    if isinstance(left, float):
        assert "shorter than its header says" in said(report)[0]
        assert "it ends within model." in said(report)[0]
    else:
        assert "ends within its header" in said(report)[0]


def test_the_tensor_within_which_a_shard_ends_is_the_right_one(copied):
    made: Export = copied("w4")
    file = shard_of(made.vllm, f"{Q}.weight_packed")
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:header])
    begin, end = entries[f"{Q}.weight_packed"]["data_offsets"]
    file.write_bytes(content[: header + (begin + end) // 2])
    assert f"it ends within {Q}.weight_packed" in said(verify(made.vllm))[0]


def test_a_missing_shard_and_a_stray_one_are_named(copied):
    made: Export = copied("w4")
    file = shard_of(made.vllm, f"{Q}.weight_packed")
    shutil.copy(file, made.vllm / "model-00009-of-00009.safetensors")
    file.unlink()
    report = verify(made.vllm)
    assert [finding.place for finding in report.findings] == [file.name, "model-00009-of-00009.safetensors"]
    assert "is missing, with" in said(report)[0]
    assert "isn't named in" in said(report)[1]


def test_an_index_that_points_to_the_wrong_file_is_named(copied):
    made: Export = copied("w4")
    right = shard_of(made.vllm, HEAD).name
    edit_json(made.vllm / INDEX, lambda index: index["weight_map"].update({HEAD: "model-00003-of-00003.safetensors"}))
    wrong = "model-00003-of-00003.safetensors"
    assert right != wrong
    assert found(verify(made.vllm)) == [(right, HEAD), (wrong, HEAD)]
    edit_json(made.vllm / INDEX, lambda index: index["weight_map"].pop(HEAD))
    report = verify(made.vllm)
    assert set(found(report)) == {(right, HEAD), (INDEX, HEAD)}
    assert any("so that no loader sees it" in line for line in said(report))


def test_what_an_interrupted_export_leaves_is_named(copied):
    made: Export = copied("w4")
    (made.vllm / "config.json").unlink()
    (made.vllm / INDEX).unlink()
    (made.vllm / ".unfinished").mkdir()
    (made.vllm / "tokenizer.json.tmp").write_text("half")
    report = verify(made.vllm)
    assert {finding.place for finding in report.findings} == {".unfinished", "tokenizer.json.tmp", INDEX, "config.json"}
    assert any("an export writes it last" in line for line in said(report))


@pytest.mark.parametrize(("bits", "expected"), [(8, "[64, 16]"), (3, "[64, 6]")])
def test_a_wrong_number_of_bits_is_named_for_every_weight(copied, bits, expected):
    made: Export = copied("w4")
    edit_json(
        made.vllm / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=bits),
    )
    report = verify(made.vllm)
    names = {name for name in tensors_of(made.vllm) if name.endswith("weight_packed")}
    assert {finding.tensor for finding in report.findings} >= names
    assert any(f"{Q}.weight_packed: has the shape [64, 8], not {expected}" in line for line in said(report))


def test_codes_and_zero_points_outside_of_their_grid_are_named(copied):
    made: Export = copied("w8a8")
    edit_json(
        made.vllm / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=4),
    )
    report = verify(made.vllm)
    assert {finding.tensor for finding in report.findings} == {
        name for name in tensors_of(made.vllm) if name.endswith("_proj.weight")
    }
    assert "codes lie outside of -8 ... 7, the first at [" in said(report)[0]


def test_fused_linears_with_different_scales_of_their_input_are_named(copied):
    made: Export = copied("w8a8")
    change(made.vllm, f"{K}.input_scale", lambda t: t * 1.5)
    change(made.vllm, f"{DOWN}.input_scale", lambda t: t * 1.5)  # nothing is fused with it
    report = verify(made.vllm)
    assert found(report) == [(shard_of(made.vllm, f"{K}.input_scale").name, f"{K}.input_scale")]
    assert f"that of {Q}" in said(report)[0]


def test_fused_linears_of_which_one_is_not_quantized_are_named(copied):
    made: Export = copied("w4")
    for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
        file = shard_of(made.vllm, f"{K}.{part}")
        change(made.vllm, f"{K}.{part}", drop)
        edit_json(made.vllm / INDEX, lambda index, part=part: index["weight_map"].pop(f"{K}.{part}"))
    add(made.vllm, f"{K}.weight", tensors_of(made.fake)[f"{K}.weight"])
    assert file.exists()
    report = verify(made.vllm)
    assert "isn't quantized, but config.json says pack-quantized" in said(report)[0]
    edit_json(made.vllm / "config.json", lambda c: c["quantization_config"]["ignore"].append(K))
    report = verify(made.vllm)
    assert found(report) == [("config.json", K)]
    assert "backends run both as one" in said(report)[0]


def test_a_nan_code_of_fp8_is_named(copied):
    made: Export = copied("fp8")

    def damage(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8)
        raw[2, 5] = 0x7F
        return raw.view(torch.float8_e4m3fn)

    change(made.vllm, f"{UP}.weight", damage)
    assert "1 of 8192 values are NaN or infinite, the first at [2, 5]" in said(verify(made.vllm))[0]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_not_one_is_named(copied, content):
    made: Export = copied("w4")
    (made.vllm / "config.json").write_text(content)
    assert found(verify(made.vllm)) == [("config.json", "")]


def test_side_files_are_compared(copied):
    made: Export = copied("w4")
    (made.vllm / "tokenizer.json").write_text("{ }")
    assert found(verify(made.vllm, made.fake)) == [("tokenizer.json", "")]
    (made.vllm / "tokenizer.json").unlink()
    assert "is missing, and" in said(verify(made.vllm, made.fake))[0]


def test_another_model_to_compare_with_is_one_finding(copied, checkpoint):
    made: Export = copied("w4")
    other = made.vllm.parent / "other"
    shutil.copytree(made.original, other)
    for name in tensors_of(other):
        change(other, name, lambda tensor: tensor * 1.25)
    report = verify(made.vllm, other)
    assert len(report.findings) == 1
    assert "it isn't the model that was rounded here" in said(report)[0]
    assert verify(made.vllm, checkpoint("opt").folder).notes[0].startswith("not compared, the other folder has none: ")


def test_the_command_line_says_what_it_found_and_ends_with_its_code(copied, capsys, tmp_path):
    made: Export = copied("w4")
    assert main(["verify", str(made.vllm), "--against", str(made.fake)]) == 0
    shown = capsys.readouterr().out
    assert "clean" in shown
    assert "equal bit for bit" in shown
    change(made.vllm, f"{Q}.weight_scale", set_(0))
    assert main(["verify", str(made.vllm)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FOUND"))
    assert line.startswith(f"FOUND {shard_of(made.vllm, f'{Q}.weight_scale').name}: {Q}.weight_scale: 1 of 128 scales")
    assert " -> " in line
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong in (empty, tmp_path / "nowhere"):
        assert main(["verify", str(wrong)]) == 2
        assert "error: " in capsys.readouterr().err
    assert main(["verify", str(made.vllm), "--against", str(made.vllm)]) == 2
    assert "quantized itself" in capsys.readouterr().err
    edit_json(made.vllm / "config.json", lambda c: c["quantization_config"].update(quant_method="squeeze"))
    assert main(["verify", str(made.vllm)]) == 2
    assert "quant_method 'squeeze' isn't known here" in capsys.readouterr().out


def test_a_folder_of_runs_is_told_apart_from_a_model(exported, capsys):
    made: Export = exported("w4")
    assert main(["verify", str(made.vllm.parent)]) == 2
    assert "name one of its folders: fake_quant_model, original, vllm_quant_model" in capsys.readouterr().err


def test_verify_reads_and_changes_nothing(copied):
    made: Export = copied("w4")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in made.vllm.iterdir()}
    verify(made.vllm, made.fake)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(made.vllm).iterdir()} == before
