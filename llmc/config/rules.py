"""Rules across the keys of a section, where they are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.config import forms
from llmc.config.suggest import did_you_mean, refuse_if

if TYPE_CHECKING:
    from llmc.config.schema import Config, EvalConfig, QuantConfig
    from llmc.config.tensors import ActConfig, KvCacheConfig

_FLOATS = ("e4m3", "e5m2")
_OF_ENCODERS = ("RTN", "GPTQ", "Awq", "SmoothQuant")
_WITHOUT_DATA = ("RTN",)
_NEEDS_MODEL = ("lm_eval", "generate_only")  # evaluations of what a run wrote, once it has finished
_NO_MODEL = ("save_trans", "save_imatrix")  # formats that don't hold the compressed model


def check_cache(cache: KvCacheConfig) -> KvCacheConfig:
    """Grid, granularity and residual of a quantized KV cache go together."""
    if cache.bit == 16:  # off
        return cache
    bit, floating = cache.bit, isinstance(cache.bit, str)
    known = bit in _FLOATS if isinstance(bit, str) else bit <= 8
    refuse_if(not known, "bit", f"{bit}: a KV cache has 2 to 8 bits, or e4m3 or e5m2")
    refuse_if(floating and not cache.symmetric, "symmetric", f"must be True with {bit}: floats have no zero point")
    refuse_if(cache.granularity == "per_head", "granularity", "per_head: use per_token, which has scales for each head")
    if cache.method == "Naive":
        idle = cache.residual_length != type(cache).model_fields["residual_length"].default
        refuse_if(idle, "residual_length", "has no use with method Naive; leave it out, or use method Kivi")
        return cache
    refuse_if(cache.granularity == "per_tensor", "granularity", "per_tensor: Kivi needs per_group or per_token")
    residual, group = cache.residual_length, cache.group_size or 1
    text = f"{residual} isn't a multiple of group_size {group}: Kivi quantizes whole groups of tokens"
    refuse_if(residual % group, "residual_length", text)
    return cache


def check_evaluation(one: EvalConfig) -> EvalConfig:
    """An evaluation of text knows its text, and how many tokens of it go together; one of tasks knows its tasks."""
    _check_tasks(one)
    reads_text = one.type in ("ppl", "token_acc", "decode_ppl")
    refuse_if(reads_text and not one.name, "name", f"missing; one of {', '.join(forms.TEXT_EVALS)}")
    wanted = f"is not one of {', '.join(forms.TEXT_EVALS)}{did_you_mean(one.name, forms.TEXT_EVALS)}"
    refuse_if(reads_text and one.name not in forms.TEXT_EVALS, "name", f"{one.name!r} {wanted}")
    refuse_if(one.name == "text" and not one.path, "path", "missing; name 'text' reads a local file or folder")
    blind, tokens = one.eval_pos and not one.seq_len, one.num_eval_tokens
    refuse_if(one.type == "ppl" and blind, "seq_len", "missing; perplexity needs the number of tokens in a window")
    compares = one.type == "token_acc"
    refuse_if(compares and blind, "seq_len", "missing; token_acc needs the number of tokens in a window")
    alone = compares and set(one.eval_pos) == {"pretrain"}
    refuse_if(alone, "eval_pos", "only pretrain: token_acc compares with it; add fake_quant, transformed or both")
    decodes = one.type == "decode_ppl"
    refuse_if(decodes and blind and not tokens, "seq_len", "missing; decode_ppl needs it, or num_eval_tokens")
    refuse_if(one.type == "generate_only" and not one.path, "path", "missing; generate_only reads a file of prompts")
    more = decodes and one.seq_len and tokens and tokens > one.seq_len
    refuse_if(more, "num_eval_tokens", f"{tokens} is more than the {one.seq_len} tokens of a window (seq_len)")
    return one


def _check_tasks(one: EvalConfig) -> None:
    """Keys of tasks stand where they have a meaning, and those of a server together."""
    asks = one.type == "lm_eval"
    refuse_if(asks and not one.tasks, "tasks", "missing; lm_eval needs the names of tasks, such as [arc_easy]")
    refuse_if(asks and one.name, "name", f"{one.name!r} has no use with lm_eval; list tasks in tasks")
    refuse_if(asks and one.seq_len, "seq_len", "has no use with lm_eval; a model reads as much as it can")
    for key in ("tasks", "num_fewshot", "limit", "server", "server_model", "confirm_run_unsafe_code"):
        value = getattr(one, key)
        refuse_if(not asks and value, key, f"has no use with type {one.type}, only with lm_eval")
    part = one.limit is not None and one.limit > 1 and one.limit != int(one.limit)
    refuse_if(part, "limit", f"{one.limit} is neither a number of documents nor a share below 1")
    if one.server is None:
        refuse_if(one.server_model, "server_model", "has no use without server")
        return
    web = one.server.startswith(("http://", "https://"))
    refuse_if(not web, "server", f"{one.server!r} isn't an address such as http://127.0.0.1:8000/v1")
    several = len(one.eval_pos) > 1
    refuse_if(several, "eval_pos", "a server runs one model: name the one position that it is, such as [fake_quant]")


def check_written(config: Config) -> None:
    """Tasks and prompts are for what a run wrote, so it must write something."""
    asked = {p for one in config.eval if one.type in _NEEDS_MODEL and one.server is None for p in one.eval_pos}
    if not asked - {"pretrain"}:
        return
    written = {name for name, value in config.save if value is True}
    text = "evaluations of type lm_eval and generate_only are done on what the run wrote"
    refuse_if(
        "transformed" in asked and "save_trans" not in written, "eval", f"{text}: transformed needs save.save_trans"
    )
    compressed = asked - {"pretrain", "transformed"}
    refuse_if(
        compressed and not written - set(_NO_MODEL),
        "eval",
        f"{text}: {min(compressed, default='')} needs save.save_path and a format, such as save.save_fake: True",
    )


def check_encoder(vision: QuantConfig | None) -> None:
    """An encoder is quantized by methods that need neither a language model around it nor a cache."""
    if vision is None:
        return
    other = [name for name in vision.method if name not in _OF_ENCODERS]
    text = f"method {other[:1]} isn't for an image encoder; these are: {', '.join(_OF_ENCODERS)}"
    refuse_if(not vision.method or other, "vision", text if other else "it needs a method")
    refuse_if(vision.kvcache, "vision", "kvcache: an encoder has no KV cache; put it into the section language")
    refuse_if(vision.token_reduction, "vision", "token_reduction isn't available")
    refuse_if(vision.vision, "vision", "vision stands in it again; write it once")
    static = [section for section in _acts(vision) if section.static]
    refuse_if(static, "vision", "act: static scales aren't available for an encoder; use granularity: per_token")


def _acts(quant: QuantConfig) -> list[ActConfig]:
    found = [quant.act, *(one.act for one in quant.mix_bits.values())]
    return [act for act in found if act is not None]


def check_images(config: Config) -> None:
    """What calibrates an encoder is images."""
    vision = None if config.quant is None else config.quant.vision
    if vision is None:
        return
    shown = config.calib is not None and config.calib.name == "custom_mm"
    asking = [name for name in vision.method if name not in _WITHOUT_DATA]
    text = f"quant.vision: {asking[:1]} is calibrated with images; use name: custom_mm, or method RTN"
    refuse_if(asking and not shown, "calib", text)
    text = "save_trans: the encoder before it's rounded isn't kept (quant.vision); use save_fake or save_vllm"
    refuse_if(config.save.save_trans, "save", text)
