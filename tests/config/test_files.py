"""Files as people have them for LLMC: they load, and mean what they meant there."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from llmc.config import LoadedConfig, load_config


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class GptqOptions(Options):
    actorder: bool = False
    static_groups: bool = False
    percdamp: float = Field(0.01, gt=0)
    blocksize: int = 128
    true_sequential: bool = True


class AwqOptions(Options):
    trans: bool = True
    trans_version: str = "v2"
    weight_clip: bool = True
    clip_sym: bool | None = None


class SmoothOptions(Options):
    alpha: float = 0.5


METHODS = {"RTN": Options, "GPTQ": GptqOptions, "Awq": AwqOptions, "SmoothQuant": SmoothOptions}

HEAD = """
base:
    seed: &seed 42
model:
    type: Llama
    path: /models/tiny
    tokenizer_mode: slow
    torch_dtype: auto
"""
AWQ_VLLM = (
    HEAD
    + """
calib:
    name: pileval
    download: False
    path: /data/pileval
    n_samples: 128
    bs: -1
    seq_len: 512
    preproc: pileval_awq
    seed: *seed
eval:
    eval_pos: [pretrain, fake_quant]
    name: wikitext2
    download: False
    path: /data/wikitext2
    seq_len: 2048
    bs: 1
    inference_per_block: False
quant:
    method: Awq
    weight:
        bit: 4
        symmetric: True
        granularity: per_group
        group_size: 128
        need_pack: True
    special:
        trans: True
        trans_version: v2
        weight_clip: True
        clip_sym: True
        percdamp: 0.01
    quant_out: True
save:
    save_vllm: True
    save_path: /out/awq
"""
)
GPTQ = (
    HEAD
    + """
calib:
    name: wikitext2
    download: True
    n_samples: 128
    bs: 1
    seq_len: 2048
    preproc: wikitext2_gptq
    seed: *seed
eval:
    eval_pos: [fake_quant]
    name: [wikitext2, c4]
    path: /data/eval
    seq_len: 2048
    eval_token_consist: True
quant:
    method: GPTQ
    quant_type: float_quant
    weight:
        bit: e4m3
        symmetric: True
        granularity: per_channel
        group_size: -1
        use_qtorch: True
        qmax_to_tensor: True
    act:
        bit: e4m3
        symmetric: True
        granularity: per_token
    special:
        actorder: True
        static_groups: True
        percdamp: 1e-2
        blocksize: 128
        true_sequential: True
    quant_out: True
save:
    save_fp: False
    save_trans: False
    save_path: ./save
"""
)
SMOOTH_ANCHORS = (
    HEAD
    + """
calib: &texts
    name: pileval
    path: /data/pileval
    n_samples: 4
    bs: 1
    seq_len: 512
    preproc: general
    seed: *seed
eval:
    - &ppl
      eval_pos: [pretrain, transformed, fake_quant]
      name: wikitext2
      path: /data/wikitext2
      seq_len: 2048
    - <<: *ppl
      name: c4
      path: /data/c4
quant:
    language:
        method: SmoothQuant
        weight: &int8
            bit: 8
            symmetric: True
            granularity: per_channel
        act:
            <<: *int8
            granularity: per_token
        speical:
            alpha: 0.8
ignored_layers:
    block_ids: [5, 0-2, 1]
    layer_names: [mlp.down_proj]
    speical_names: []
save:
    save_fake: True
    save_path: /out/smooth
"""
)
RTN = (
    HEAD
    + """
eval:
quant:
    method: RTN
    weight: {bit: 8, symmetric: True, granularity: per_channel, group_size: -1}
    act: {bit: 8, symmetric: True, granularity: per_tensor, static: True}
    kvcache: {method: Naive, bit: 8, symmetric: True, granularity: per_token}
save: {save_trans: False}
"""
)


def load(tmp_path: Path, text: str, *overrides: str) -> LoadedConfig:
    file = tmp_path / "run.yml"
    file.write_text(text)
    return load_config(file, overrides, METHODS)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


@pytest.mark.parametrize("text", [AWQ_VLLM, GPTQ, SMOOTH_ANCHORS, RTN])
def test_resolved_loads_to_the_same_configuration(tmp_path: Path, text: str) -> None:
    first = load(tmp_path, text)
    again = load_config(first.resolved, methods=METHODS)
    assert again.resolved == first.resolved
    assert again.config.model_dump(exclude={"quant": {"special"}}) == first.config.model_dump(
        exclude={"quant": {"special"}}
    )
    assert again.warnings == ()


def test_awq_for_vllm(tmp_path: Path) -> None:
    loaded = load(tmp_path, AWQ_VLLM)
    quant = loaded.config.quant
    assert quant is not None and quant.method == ("Awq",) and quant.weight is not None
    assert quant.options["Awq"] == AwqOptions(clip_sym=True)
    assert (quant.weight.bit, quant.weight.group_size, quant.weight.quant_type) == (4, 128, "int-quant")
    assert quant.act is None and loaded.config.calib is not None and loaded.config.calib.seed == 42
    line = line_of(AWQ_VLLM, "percdamp:")
    assert loaded.warnings == (f"quant.special.percdamp (line {line}): ignored by Awq; an option of another method",)


def test_gptq_fp8(tmp_path: Path) -> None:
    loaded = load(tmp_path, GPTQ)
    quant = loaded.config.quant
    assert quant is not None and quant.weight is not None and quant.act is not None
    assert quant.weight.quant_type == quant.act.quant_type == "float-quant"
    assert quant.weight.group_size is None and quant.quant_out is True
    assert quant.options["GPTQ"] == GptqOptions(actorder=True, static_groups=True)
    assert [(one.type, one.name, one.path) for one in loaded.config.eval] == [
        ("ppl", "wikitext2", "/data/eval/wikitext2"),
        ("token_acc", "wikitext2", "/data/eval/wikitext2"),
        ("ppl", "c4", "/data/eval/c4"),
        ("token_acc", "c4", "/data/eval/c4"),
    ]
    noted = [warning.split(" ")[0] for warning in loaded.warnings]
    assert sorted(noted) == [
        "eval.eval_token_consist", "quant.quant_type", "quant.weight.qmax_to_tensor", "save.save_fp"
    ]  # fmt: skip


def test_several_types_are_several_evaluations_of_each_text() -> None:
    text = {"eval_pos": ["fake_quant"], "download": True, "seq_len": 64, "eval_token_consist": True}
    content = {
        "model": {"path": "model"},
        "eval": {**text, "name": ["wikitext2", "c4"], "type": ["ppl", "token_acc"]},
        "quant": {"method": "RTN", "weight": {"bit": 4, "symmetric": True, "granularity": "per_channel"}},
    }
    loaded = load_config(content)
    found = [(one.name, one.type) for one in loaded.config.eval]
    assert found == [(name, kind) for name in ("wikitext2", "c4") for kind in ("ppl", "token_acc")]
    assert load_config(loaded.resolved).config == loaded.config


def test_smoothquant_with_anchors(tmp_path: Path) -> None:
    loaded = load(tmp_path, SMOOTH_ANCHORS)
    config = loaded.config
    assert config.quant is not None and config.quant.act is not None and config.quant.weight is not None
    assert config.quant.act.granularity == "per_token" and config.quant.weight.granularity == "per_channel"
    assert config.quant.options["SmoothQuant"] == SmoothOptions(alpha=0.8)
    assert [one.name for one in config.eval] == ["wikitext2", "c4"] and config.eval[1].seq_len == 2048
    assert config.ignored_layers.block_ids == (0, 1, 2, 5)
    assert config.calib is not None and config.calib.preproc == "txt_general_preproc"
    place = f"quant.language.speical (line {line_of(SMOOTH_ANCHORS, 'speical:')})"
    assert f"{place}: an old spelling, read as 'special'" in loaded.warnings


def test_rtn_without_data(tmp_path: Path) -> None:
    config = load(tmp_path, RTN).config
    assert config.calib is None and config.eval == () and config.quant is not None and config.quant.quant_out is None
    assert config.quant.act is not None and config.quant.act.calib_algo == "static_minmax"
    assert config.quant.kvcache is not None and config.quant.kvcache.residual_length == 128


@pytest.mark.parametrize(
    ("quant", "check"),
    [
        ({"weight": {"bit": 4, "symmetric": True, "granularity": "per_channel"}, "act": {"bit": 16}}, "act"),
        ({"weight": {"bit": 16}, "act": {"bit": 8, "symmetric": True, "granularity": "per_token"}}, "weight"),
    ],
)
def test_bit_16_switches_off(quant: dict[str, object], check: str) -> None:
    config = load_config({"model": {"path": "m"}, "quant": {"method": "RTN", **quant}}).config
    assert getattr(config.quant, check) is None


def test_forms_of_several_levels() -> None:
    level = {"symmetric": False, "granularity": "per_group", "group_size": 128}
    outer = {"symmetric": True, "granularity": "per_channel"}
    four_in_eight = {"bit": 48, "bit4": {**level, "scales_bit": 8}, "bit8": {**outer, "int_range": [-120, 120]}}
    dgq = {"w_1": {"bit": 4, **level}, "w_2": {"bit": 8, **outer}}
    for weight, bit in ((four_in_eight, 48), (dgq, 4)):
        config = load_config({"model": {"path": "m"}, "quant": {"method": "DGQ", "weight": weight}}).config
        assert config.quant is not None and config.quant.weight is not None
        assert (config.quant.weight.bit, config.quant.weight.group_size) == (bit, 128)


def test_mixed_bits_and_blocks() -> None:
    block = {"bit": "e4m3", "symmetric": True, "granularity": "per_block", "block_size": 128}
    act = {"bit": "e4m3", "symmetric": True, "granularity": "per_group", "group_size": 128}
    mixed = {"setting_0": {"layer_name": ["down_proj#0-1-2"], "do_quant": False}}
    quant = {"method": "RTN", "weight": block, "act": act, "mix_bits": mixed}
    config = load_config({"model": {"path": "m"}, "quant": quant}).config
    assert config.quant is not None and config.quant.mix_bits["setting_0"].do_quant is False


@pytest.mark.parametrize(
    ("calib", "name", "preproc"),
    [
        ({"name": "custom", "path": "a.txt", "load_from_txt": True, "preproc": "original_txt", "seq_len": None},
         "text", "original_txt"),
        ({"name": "custom", "path": "folder", "preproc": "general"}, "custom_txt", "txt_general_preproc"),
        ({"name": "text", "path": "a.jsonl", "preproc": "sequential", "text_field": "body"}, "text", "sequential"),
    ],
)  # fmt: skip
def test_names_of_calibration_sets(calib: dict[str, object], name: str, preproc: str) -> None:
    loaded = load_config({"model": {"path": "m"}, "calib": {"seq_len": 64, **calib}})
    assert loaded.config.calib is not None
    assert (loaded.config.calib.name, loaded.config.calib.preproc) == (name, preproc)
    assert len(loaded.warnings) == len({"load_from_txt", "custom", "general"} & {*calib, *calib.values()})


def test_sparse() -> None:
    loaded = load_config(
        {"model": {"path": "m"}, "sparse": {"method": "Wanda", "weight": {"sparsity": 0.5}}},
        methods={"Wanda": Options},
    )
    assert loaded.config.sparse is not None and loaded.config.sparse.options == {"Wanda": Options()}


@pytest.mark.parametrize("written", ["2:4", "'2:4'", '"2:4"'])
def test_a_pattern_of_zeros_needs_no_quotes(tmp_path: Path, written: str) -> None:
    """By the book 2:4 is 124, in base 60."""
    (tmp_path / "run.yml").write_text(
        f"model: {{path: m}}\nsparse: {{method: SparseGPT, weight: {{sparsity: 0.5, pattern: {written}}}}}\n"
    )
    for overrides in ([], [f"sparse.weight.pattern={written}"]):
        loaded = load_config(tmp_path / "run.yml", overrides)
        assert loaded.config.sparse is not None and loaded.config.sparse.weight.pattern == "2:4"
        assert load_config(loaded.resolved).resolved == loaded.resolved


@pytest.mark.parametrize(
    ("text", "value"), [("017", 15), ("0x1F", 31), ("0b11", 3), ("1_000", 1000), ("+7", 7), ("0", 0), ("42", 42)]
)
def test_whole_numbers_are_those_of_yaml(tmp_path: Path, text: str, value: int) -> None:
    assert load(tmp_path, f"base: {{seed: {text}}}\nmodel: {{path: m}}\n").config.base.seed == value


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_data_types(dtype: str) -> None:
    for spelling in {dtype, dtype if dtype == "auto" else f"torch.{dtype}"}:
        assert load_config({"model": {"path": "m", "torch_dtype": spelling}}).config.model.torch_dtype == dtype


def test_numbers_and_dates_as_people_mean_them(tmp_path: Path) -> None:
    loaded = load(tmp_path, GPTQ, "quant.special.percdamp=1e-3", "save.save_path=2024-01-01")
    assert loaded.config.quant is not None and loaded.config.save.save_path == "2024-01-01"
    assert loaded.config.quant.options["GPTQ"] == GptqOptions(actorder=True, static_groups=True, percdamp=0.001)
