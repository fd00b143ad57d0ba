# ruff: noqa: E501 (one case a line reads better than one argument a line)
"""What a tired person gets to read: the key, its line, what is wrong with it, and the name that was meant."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from llmc.config import load_config, schema, tensors
from llmc.errors import ConfigError


class RtnOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class GptqOptions(RtnOptions):
    percdamp: float = Field(0.01, gt=0)
    actorder: bool = False


class QuarotOptions(RtnOptions):
    rotate_mode: str = "hadamard"


METHODS: dict[str, type[BaseModel]] = {"RTN": RtnOptions, "GPTQ": GptqOptions, "Quarot": QuarotOptions}

GOOD = """\
base:
    seed: 42
model:
    path: /models/tiny
calib:
    name: c4
    n_samples: 8
    seq_len: 64
    preproc: c4_gptq
eval:
    eval_pos: [fake_quant]
    name: wikitext2
    seq_len: 64
quant:
    method: GPTQ
    weight:
        bit: 4
        symmetric: True
        granularity: per_group
        group_size: 128
    act:
        bit: 8
        symmetric: True
        granularity: per_token
    special:
        percdamp: 0.01
ignored_layers:
    block_ids: [0-1]
save:
    save_path: /out
    save_vllm: True
"""
JARGON = (
    "pydantic",
    "Input should",
    "Extra inputs",
    "Value error",
    "type=",
    "Field required",
    "NoneType",
    "validation",
)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    file = tmp_path / "run.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides, METHODS)
    found = str(caught.value)
    assert found.startswith(str(file)) or overrides
    assert caught.value.remedy and not any(word in found for word in JARGON), found
    return found


def test_the_good_one(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text(GOOD)
    assert load_config(tmp_path / "run.yml", methods=METHODS).warnings == ()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # unknown keys: misspelt, misplaced, foreign
        ("bit: 4", "bitt: 4", "quant.weight.bitt (line 17): unknown key; did you mean 'bit'?"),
        ("granularity: per_group", "granularty: per_group", "quant.weight.granularty (line 19): unknown key; did you mean"),
        ("save_vllm", "save_vlm", "save.save_vlm (line 31): unknown key; did you mean 'save_vllm'?"),
        ("calib:", "clib:", "clib (line 5): unknown key; did you mean 'calib'?"),
        ("percdamp: ", "perc_damp: ", "quant.special.perc_damp (line 26): unknown key; did you mean 'percdamp'?"),
        ("    special:\n        percdamp", "    percdamp", "quant.percdamp (line 25): unknown key here; it belongs in quant.special"),
        ("    method: GPTQ\n", "    method: GPTQ\n    bit: 4\n", "quant.bit (line 16): unknown key here; it belongs in quant.weight"),
        ("    seed: 42", "    seed: 42\n    zzz: 1", "base.zzz (line 3): unknown key; known here: seed, device"),
        # values of the wrong kind or out of range
        ("bit: 4", "bit: 17", "quant.weight.bit (line 17): 17 is not in 2..16"),
        ("bit: 4", "bit: e4m4", "quant.weight.bit (line 17): 'e4m4' is neither a whole number in 2..16 nor one of e4m3, e5m2"),
        ("bit: 4", "bit: e4m4", "did you mean 'e4m3'?"),
        ("bit: 8", "bit: 48", "quant.act.bit (line 22): 48 is not in 2..16"),
        ("per_group", "per_grup", "quant.weight.granularity (line 19): 'per_grup' is not one of per_tensor, per_channel,"),
        ("per_group", "per_grup", "did you mean 'per_group'?"),
        ("n_samples: 8", "n_samples: '8'", "calib.n_samples (line 7): '8' is not a whole number; remove the quotes"),
        ("n_samples: 8", "n_samples: 0", "calib.n_samples (line 7): 0 is too small; the least is 1"),
        ("save_vllm: True", "save_vllm: 'True'", "save.save_vllm (line 31): 'True' is neither True nor False; remove the quotes"),
        ("save_vllm: True", "save_vllm: 1", "save.save_vllm (line 31): 1 is neither True nor False"),
        ("    path: /models/tiny", "    path: 3", "model.path (line 4): 3 is not text"),
        ("percdamp: 0.01", "percdamp: -1", "quant.special.percdamp (line 26): -1 is too small; it must be above 0"),
        ("percdamp: 0.01", "percdamp: high", "quant.special.percdamp (line 26): 'high' is not a number"),
        ("percdamp: 0.01", "percdamp: .nan", "quant.special.percdamp (line 26)"),
        ("name: c4", "name: c5", "calib.name (line 6): 'c5' is not one of wikitext2, c4,"),
        ("c4_gptq", "c4_gpqt", "calib.preproc (line 9): 'c4_gpqt' is not one of"),
        ("name: wikitext2", "name: wikitxt2", "eval.name (line 12): 'wikitxt2' is not one of"),
        ("name: wikitext2", "name: [c4, wikitxt2]", "eval.name (line 12): 'wikitxt2' is not one of"),
        ("[fake_quant]", "[fake_quan]", "eval.eval_pos.0 (line 11): 'fake_quan' is not one of pretrain, transformed, fake_quant"),
        ("[0-1]", "[0~1]", "ignored_layers.block_ids (line 28): '0~1' is neither a block number nor a range such as 0-3"),
        ("[0-1]", "[3-1]", "ignored_layers.block_ids (line 28): the range '3-1' runs backwards"),
        ("    seed: 42", "    device: gpu", "base.device (line 2): 'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("    path: /models/tiny", "    path: m\n    type: Lama", "model.type (line 5): 'Lama' is not a known model family; did you mean 'Llama'?"),
        ("    path: /models/tiny", "    path: m\n    torch_dtype: torch.int8", "model.torch_dtype (line 5): 'int8' is not one of"),
        ("base:\n    seed: 42", "base: 42", "base (line 1): 42 stands where a section with keys is expected"),
        # missing keys
        ("        granularity: per_group\n", "", "quant.weight.granularity (below line 16): missing; Which weights share one scale. One of per_tensor,"),
        ("    path: /models/tiny", "    type: Llama", "model.path (below line 3): missing"),
        ("    save_path: /out\n", "", "save.save_path (below line 29): missing; save_vllm needs a folder"),
        ("    name: wikitext2\n    seq_len: 64", "    name: wikitext2", "eval.seq_len (below line 10): missing; perplexity needs"),
        ("    eval_pos: [fake_quant]\n", "", "eval.eval_pos (below line 10): missing"),
        ("    preproc: c4_gptq\n", "", "calib.preproc (below line 5): missing"),
        ("model:\n    path: /models/tiny\n", "", "model: missing; The checkpoint to compress."),
        # rules across fields
        ("group_size: 128", "group_size: -1", "quant.weight.group_size (line 20): granularity per_group needs one above 0"),
        ("per_group", "per_channel", "quant.weight.group_size (line 20): 128 has no use with per_channel"),
        ("        bit: 4", "        bit: 4\n        quant_type: float_quant", "quant.weight.quant_type (line 18): float-quant doesn't go with bit 4"),
        ("        bit: 4", "        bit: 4\n        int_range: [-9, 8]", "quant.weight.int_range (line 18)"),
        ("        bit: 4", "        bit: 4\n        int_range: [8, -9]", "the first number is not below the second"),
        ("        bit: 8", "        bit: 8\n        static: True", "quant.act.granularity (line 25): static: True needs per_tensor"),
        ("        bit: 8", "        bit: 8\n        calib_algo: static_hist", "quant.act.calib_algo (line 23): static_hist needs static: True"),
        ("        symmetric: True\n        granularity: per_group", "        symmetric: False\n        sym_mode: full\n        granularity: per_group", "quant.weight.sym_mode (line 19): has no use"),
        ("    method: GPTQ", "    method: GPTQ\n    tp: 2", "quant.tp (line 16): 2: tensor-parallel scales are not supported yet"),
        # methods
        ("method: GPTQ", "method: gptq", "quant.method (line 15): there is no method 'gptq'; did you mean 'GPTQ'?; available: GPTQ, Quarot, RTN"),
        ("method: GPTQ", "method: Awq", "quant.method (line 15): method 'Awq' isn't available in this version; available: GPTQ, Quarot, RTN"),
        ("method: GPTQ", "method: [Quarot, GPTQ]", "quant.special.percdamp (line 26): with several methods the options are keyed by method; write special: {GPTQ: {percdamp: 0.01}}"),
        ("method: GPTQ", "method: [GPTQ, GPTQ]", "quant.method (line 15): ['GPTQ'] stands there twice"),
        ("        percdamp: 0.01", "        RTN: {}", "quant.special.RTN (line 26): RTN isn't in quant.method"),
        ("        percdamp: 0.01", "        GPTQ: {percdam: 1}", "quant.special.GPTQ.percdam (line 26): unknown key; did you mean 'percdamp'?"),
        # out of scope
        ("    method: GPTQ", "    vision: {method: Quarot}\n    method: GPTQ", "quant.vision (line 15): method ['Quarot'] isn't for an image encoder; these are: RTN, GPTQ, Awq, SmoothQuant"),
        ("name: c4", "name: t2v", "calib.name (line 6): 't2v': video generation is out of scope"),
        ("    save_vllm", "    save_lightx2v: True\n    save_vllm", "save.save_lightx2v (line 31)"),
        ("    path: /models/tiny", "    path: m\n    type: WanT2V", "model.type (line 5): 'WanT2V': video generation is out of scope"),
        ("    path: /models/tiny", "    path: m\n    type: Qwen2Audio", "model.type (line 5): 'Qwen2Audio': compressing this family of models of images, video or sound is out of scope"),
        ("base:", "video_gen: {}\nbase:", "video_gen (line 1): video generation is out of scope"),
        ("    special:\n", "    speical: {}\n    special:\n", "quant.speical (line 25): an old spelling of 'special', which is there too"),
    ],
)  # fmt: skip
def test_message(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) >= 1
    assert expected in message(tmp_path, GOOD.replace(old, new, 1))


def test_one_error_lists_every_problem_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = message(
        tmp_path, GOOD.replace("bit: 4", "bitt: 4").replace("n_samples: 8", "n_samples: 0").replace("0.01", "x")
    )
    lines = found.splitlines()
    assert lines[0].endswith("3 problems in the configuration")
    assert [line.split(" (")[0].strip() for line in lines[1:4]] == [
        "calib.n_samples", "quant.weight.bitt", "quant.special.percdamp"
    ]  # fmt: skip


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    many = "".join(f"    zz{number}: 1\n" for number in range(12))
    assert "... and 4 more" in message(tmp_path, GOOD.replace("base:\n", f"base:\n{many}"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  path: [1, 2\nbase: 3\n", "line 3, column 5: not valid YAML"),
        ("model:\n\tpath: x\n", "line 2, column 1: not valid YAML"),
        ("a: *nowhere\n", "line 1, column 4: not valid YAML: found undefined alias"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4: not valid YAML"),
        ("model:\n  path: x\n  path: y\n", "model.path stands there twice, lines 2 and 3"),
        ("model: {1: 2}\n", "line 1: the key '1' is not text"),
        ("model: &a\n  path: *a\n", "model.path contains itself"),
        ("", "the file is empty"),
        ("- 1\n", "the file holds [1], not sections with keys"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(tmp_path, text)


def test_nonsense_is_an_error_of_the_configuration() -> None:
    model = {"path": "m"}
    for source in (
        {"model": None},
        {"model": model, 3: 4},
        {"model": model, "calib": [], "eval": [3], "quant": {"method": 3, "weight": [1], "special": 4}},
        {"model": model, "quant": {"method": ["RTN", 3], "special": {"RTN": 3}, "weight": {"bit": None}}},
        {"model": model, "quant": {"method": [], "special": []}, "save": 3, "ignored_layers": {"block_ids": [True]}},
        {"model": model, "eval": {"eval_pos": "fake_quant", "name": "c4", "seq_len": 4}},
        {"model": model, "opencompass": {"cfg_path": "a", "output_path": "b"}},
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(source, methods=METHODS)  # type: ignore[arg-type]
        assert not any(word in str(caught.value) for word in JARGON), str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yml: can't be read: No such file"):
        load_config(tmp_path / "no.yml")


def test_an_error_in_a_merged_section_points_at_the_anchor(tmp_path: Path) -> None:
    text = GOOD.replace("    weight:\n", "    weight: &w\n").replace("bit: 4", "bit: 1").replace(
        "    act:\n        bit: 8\n        symmetric: True\n        granularity: per_token\n",
        "    kvcache:\n        <<: *w\n        method: Naive\n",
    )  # fmt: skip
    found = message(tmp_path, text)
    assert "quant.weight.bit (line 17): 1 is not in 2..16" in found
    assert "quant.kvcache.bit (line 17): 1 is not in 2..16" in found


# -- overrides ---------------------------------------------------------------------------------------------------------
def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(GOOD)
    texts = ("eval.0.seq_len=32", "quant.weight.bit=8", "quant.special={percdamp: 0.5}", "base.device=cpu", "calib=")
    config = load_config(file, texts, METHODS).config
    assert config.quant is not None and config.quant.weight is not None and config.calib is None
    assert (config.eval[0].seq_len, config.quant.weight.bit, config.base.device) == (32, 8, "cpu")
    assert config.quant.options["GPTQ"] == GptqOptions(percdamp=0.5)


def test_an_override_leaves_the_other_users_of_an_anchor_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    text = (
        GOOD.replace("weight:", "weight: &w")
        .replace("group_size: 128", "group_size: -1")
        .replace("per_group", "per_tensor")
    )
    act = "        bit: 8\n        symmetric: True\n        granularity: per_token\n"
    file.write_text(text.replace("    act:\n" + act, "    act: *w\n"))
    config = load_config(file, ["quant.act.bit=8"], METHODS).config
    assert config.quant is not None and config.quant.weight is not None and config.quant.act is not None
    assert (config.quant.weight.bit, config.quant.act.bit) == (4, 8)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quant.weight.bit", "is not of the form key.path=value\n  -> Write for example quant.weight.bit=8"),
        ("=8", "is not of the form key.path=value"),
        ("quant..bit=8", "is not of the form key.path=value"),
        ("quant.weight.bitt=8", "quant.weight.bitt (override quant.weight.bitt=8): unknown key; did you mean 'bit'?"),
        ("quant.weight.bit=17", "quant.weight.bit (override quant.weight.bit=17): 17 is not in 2..16"),
        ("quant.method.x=1", "fails at 'x': 'GPTQ' has no keys below it"),
        ("ignored_layers.block_ids.7=1", "fails at '7': there is a list here, with the indexes 0..0"),
        ("quant.weight.bit=[", "not valid YAML"),
        ("evall.seq_len=3", "evall (override evall.seq_len=3): unknown key; did you mean 'eval'?"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(tmp_path, GOOD, override)


# -- methods -----------------------------------------------------------------------------------------------------------
def test_several_methods_with_keyed_options(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(GOOD.replace("GPTQ", "[Quarot, GPTQ]").replace("percdamp: 0.01", "GPTQ: {percdamp: 0.5}"))
    loaded = load_config(file, methods=METHODS)
    assert loaded.config.quant is not None and loaded.config.quant.method == ("Quarot", "GPTQ")
    assert loaded.config.quant.options == {"Quarot": QuarotOptions(), "GPTQ": GptqOptions(percdamp=0.5)}
    assert loaded.resolved["quant"]["special"]["Quarot"] == {"rotate_mode": "hadamard"}


def test_options_are_checked_even_if_methods_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text(GOOD.replace("percdamp", "percdmp"))
    with pytest.raises(ConfigError, match="did you mean 'percdamp'"):
        load_config(tmp_path / "run.yml")


# -- nothing unknown passes --------------------------------------------------------------------------------------------
def sections(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in sections(item)]
    return [value, *(found for inner in value.values() for found in sections(inner))] if isinstance(value, dict) else []


RICH = yaml.safe_load(GOOD)
RICH["eval"] = [RICH["eval"], {**RICH["eval"], "name": ["c4", "ptb"], "path": "x"}]
RICH["quant"]["mix_bits"] = {
    "one": {"layer_name": ["o_proj"], "weight": dict(RICH["quant"]["weight"]), "act": {"bit": 16}}
}
RICH["quant"]["kvcache"] = {**RICH["quant"]["act"], "method": "Kivi", "special": {"window_length": 1}}
RICH["sparse"] = {"method": "Wanda", "weight": {"sparsity": 0.5}, "special": {"alpha": 1.0}}
RICH["opencompass"] = {"cfg_path": "a", "output_path": "b"}
RICH["save"] |= {"save_trans": True, "trtllm_cfg": {"tp_size": 1}}


def test_the_rich_one() -> None:
    assert load_config(RICH, methods=METHODS).config.eval[2].name == "ptb"


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    tail=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=2, max_size=12),
    value=st.sampled_from([None, 1, "x", {}, []]),
)
def test_an_unknown_key_never_passes(data: st.DataObject, tail: str, value: object) -> None:  # fmt: skip
    changed = deepcopy(RICH)
    places = [found for found in sections(changed) if "one" not in found]  # mix_bits names its settings freely
    places[data.draw(st.integers(0, len(places) - 1))]["qz" + tail] = value
    with pytest.raises(ConfigError, match=f"qz{tail}: unknown key"):
        load_config(changed, methods=METHODS)


def test_every_key_is_described() -> None:
    found = {**vars(schema), **vars(tensors)}.values()
    models = [item for item in found if isinstance(item, type) and issubclass(item, schema.Section)]
    assert schema.Config in models
    for model in models:
        for key, field in model.model_fields.items():
            assert (field.description or "").endswith("."), f"{model.__name__}.{key}"


def test_light_to_import() -> None:
    code = "import sys, llmc.config; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
