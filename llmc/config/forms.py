"""The forms that values may have in a YAML file, LLMC's looser ones among them, for the validators of the schema."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator

from llmc.config.suggest import did_you_mean, show


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MICRO_GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}  # formats that fix their groups, and how large they are
FLOAT_BITS = ("e4m3", "e5m2", "e3m2", "e4m7", "e2m1", *MICRO_GROUPS)
FOUR_IN_EIGHT = 48  # the number by which LLMC calls 4-bit weights whose group scales are 8-bit integers
MODEL_TYPES = _words(
    "auto Bloom ChatGLM DeepseekV2 DeepseekV3 Falcon GPT2 Gemma Gemma2 Gemma3 Glm Glm4 GptBigCode GptNeoX GptOss "
    "Granite InternLM2 InternVL2 Llama Llama4 Llava LlavaHf Llava_OneVision MiniCPM Mistral Mixtral Mllama OPT Olmo2 "
    "Opt Phi Phi3 Qwen Qwen2 Qwen2.5VL Qwen2Moe Qwen2VL Qwen3 Qwen3Moe Qwen3Next Qwen3VL SmolLM SmolLM3 StableLm "
    "Starcoder Starcoder2"
)
TEXT_EVALS = ("wikitext2", "c4", "ptb", "text", "custom_ppl", "custom_gen")


def listed(value: object) -> object:
    """A lone value stands for a list of one, an empty one for the empty list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def or_empty(value: object) -> object:
    """A section written without any key is a section of defaults."""
    return {} if value is None else value


def dtype(value: object) -> object:
    """`torch.float16` is `float16`."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def device(value: str) -> str:
    """auto, cpu, cuda or cuda:N."""
    number = value.removeprefix("cuda:")
    if value in ("auto", "cpu", "cuda") or (number != value and number.isdecimal()):
        return value
    raise ValueError(f"{value!r} is not one of auto, cpu, cuda, cuda:N{did_you_mean(value, ('auto', 'cpu', 'cuda'))}")


def model_family(value: str) -> str:
    """One of LLMC's names, or auto."""
    if value in MODEL_TYPES:
        return value
    hint = did_you_mean(value, MODEL_TYPES)
    raise ValueError(f"{value!r} is not a known model family{hint}; auto finds it from the checkpoint")


def number_range(value: object) -> tuple[float, float]:
    """`[low, high]`, in that order."""
    pair = value if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in pair):
        raise ValueError(f"{show(value)} is not a pair of numbers [low, high]")
    if not pair[0] < pair[1]:
        raise ValueError(f"in {show(value)} the first number is not below the second")
    return (pair[0], pair[1])


def bit_width(value: object) -> int | str:
    """A number of bits, or the name of a float format."""
    if isinstance(value, str) and value in FLOAT_BITS:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if 2 <= value <= 16 or value == FOUR_IN_EIGHT:
            return value
        raise ValueError(f"{value} is not in 2..16")
    wanted = f"neither a whole number in 2..16 nor one of {', '.join(FLOAT_BITS)}"
    raise ValueError(f"{show(value)} is {wanted}{did_you_mean(value, FLOAT_BITS)}")


def zero_pattern(value: object) -> str:
    """`n:m`, so many zeros in each run of m."""
    zeros, colon, of = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not zeros.isdecimal() or not of.isdecimal() or not 0 < int(zeros) < int(of):
        raise ValueError(f"{show(value)} isn't of the form '2:4', in quotes: 2 zeros in each 4 neighbours")
    return f"{int(zeros)}:{int(of)}"


def pattern_conflict(pattern: str | None, sparsity: float | None) -> str:
    """In what a pattern contradicts the sparsity beside it; empty if it doesn't."""
    if pattern is None or sparsity is None:
        return ""
    zeros, of = map(int, pattern.split(":"))
    fits = abs(zeros / of - sparsity) < 1e-6
    return "" if fits else f"pattern {pattern} is {zeros} zeros in each {of}: sparsity {zeros / of:g}, not {sparsity:g}"


def block_ids(value: object) -> tuple[int, ...]:
    """Block numbers and ranges such as "0-3" as one sorted tuple."""
    found: set[int] = set()
    for item in value if isinstance(value, list | tuple) else [] if value is None else [value]:
        low, dash, high = item.partition("-") if isinstance(item, str) else (str(item), "", "")
        if isinstance(item, bool) or not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"{show(item)} is neither a block number nor a range such as 0-3")
        if dash and int(high) < int(low):
            raise ValueError(f"the range {show(item)} runs backwards")
        found.update(range(int(low), int(high or low) + 1))
    return tuple(sorted(found))


def complete_tensor(data: object) -> object:
    """Fill in what a weight, act or kvcache section leaves to be understood."""
    if not isinstance(data, Mapping):
        return data
    inner = data.get("bit4") or data.get("w_1")
    if isinstance(inner, Mapping):  # two-level forms: the first level describes the tensor itself
        shared = ("bit", "symmetric", "granularity", "group_size")
        data = {**{key: inner[key] for key in shared if key in inner}, **data}
    if data.get("bit") == 16:  # switched off, so nothing else need be said
        data = {"symmetric": True, "granularity": "per_tensor", **data}
    if isinstance(bit := data.get("bit"), str):
        data = {"quant_type": "float-quant", **data}
        if bit in MICRO_GROUPS:
            size = {"group_size": MICRO_GROUPS[bit]} if data.get("granularity") in (None, "per_group") else {}
            data = {"symmetric": True, "granularity": "per_group", **size, **data}
    if isinstance(data.get("quant_type"), str):
        data = {**data, "quant_type": data["quant_type"].replace("_", "-")}
    if data.get("static") is True and data.get("calib_algo") in (None, "minmax"):
        data = {**data, "calib_algo": "static_minmax"}
    return data


def evals(value: object) -> tuple[object, ...]:
    """`eval` in any of its forms as a tuple of single evaluations."""
    return tuple(section for _, section in split_evals(value))


def split_evals(value: object) -> list[tuple[int | None, object]]:
    """One evaluation for each type and text: a section may name several; of texts, its path is then their folder.

    Returns the evaluations, each with the index of the section it comes from (None if there was no list).
    """
    sections: list[tuple[int | None, object]] = [] if value is None else [(None, value)]
    if isinstance(value, list | tuple):
        sections = list(enumerate(value))
    result: list[tuple[int | None, object]] = []
    for index, section in sections:
        names = section.get("name") if isinstance(section, Mapping) else None
        if not isinstance(section, Mapping) or not isinstance(names, list | tuple) or not names:
            result.append((index, section))
            continue
        path = section.get("path")
        for name in names:
            if len(names) > 1 and isinstance(path, str) and isinstance(name, str):
                result.append((index, {**section, "name": name, "path": os.path.join(path, name)}))
            else:
                result.append((index, {**section, "name": name}))
    return [(index, one) for index, section in result for one in _each_type(section)]


def _each_type(section: object) -> list[object]:
    types = section.get("type") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(types, list | tuple) or not types:
        return [section]
    return [{**section, "type": one} for one in types]


Item = TypeVar("Item")
OrDefault = Annotated[Item, BeforeValidator(or_empty)]
Options = Annotated[dict[str, Any], BeforeValidator(or_empty)]
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
Range = Annotated[tuple[float, float], BeforeValidator(number_range)]
Bit = Annotated[int | str, BeforeValidator(bit_width)]
BlockIds = Annotated[tuple[int, ...], BeforeValidator(block_ids)]
ZeroPattern = Annotated[str, BeforeValidator(zero_pattern)]
GroupSize = Annotated[int | None, BeforeValidator(lambda size: None if size == -1 else size)]
DType = Annotated[Literal["auto", "float16", "bfloat16", "float32", "float8_e4m3fn"], BeforeValidator(dtype)]
Device = Annotated[str, AfterValidator(device)]
Family = Annotated[str, AfterValidator(model_family)]
CalibName = Literal["wikitext2", "c4", "pileval", "ptb", "mix", "ultrachat", "text", "custom_txt", "custom_mm"]
Preproc = Literal[
    "wikitext2_gptq", "ptb_gptq", "c4_gptq", "mix_gptq", "pileval_awq", "pileval_smooth", "pileval_omni",
    "txt_general_preproc",
    "random_truncate_txt", "ultrachat_general", "img_general", "original_txt", "sequential",
]  # fmt: skip
EvalPosition = Literal["pretrain", "transformed", "fake_quant", "fake_quant_wo_kv"]
EvalPositions = Annotated[tuple[EvalPosition, ...], BeforeValidator(listed)]
EvalType = Literal["ppl", "acc", "vqa", "code", "generate_only", "token_acc", "decode_ppl", "lm_eval"]
WeightGrain = Literal["per_tensor", "per_channel", "per_group", "per_head", "per_block", "per_cluster"]
StreamGrain = Literal["per_tensor", "per_token", "per_group", "per_head", "per_cluster"]
Pruner = Literal["Magnitude", "Wanda", "SparseGPT", "ShortGPT", "Dense", "TokenReduction"]
StreamAlgo = Literal["minmax", "static_minmax", "static_hist", "static_moving_minmax"]
ScaleDType = Literal["auto", "bfloat16", "float16", "float32"]
