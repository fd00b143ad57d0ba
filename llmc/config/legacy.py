"""What the YAML files of LLMC hold besides the plain schema: its names and its old spellings of keys.

`modernise` rewrites a document to the one spelling that the schema knows. Everything it changes or drops is noted for
the user, everything that lies outside this project is a problem, and nothing else is touched: what it doesn't
recognise is left for the schema to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmc.config.forms import split_evals
from llmc.config.suggest import Document, KeyPath, nearest


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MULTIMODAL = _words("GLM4V InternOmni MiniCPMV Qwen2Audio VideoLLaVA Vila Vit")
METHODS = _words(
    "RTN SmoothQuant OsPlus Awq GPTQ OmniQuant Quarot HQQ AdaDim DGQ NormTweaking LlmInt8 QUIK SpQR TesseraQ "
    "Magnitude Wanda SparseGPT ShortGPT Dense TokenReduction"
)
# LLMC keeps the options of all methods in one namespace and reads of it what the method at hand knows.
SPECIAL_KEYS = _words(
    "true_sequential weight_clip clip_version clip_sym save_clip clip_path load_clip search_clip_init save_scale "
    "scale_path search_scale_init online_rotate fp32_had rotate_mode do_gqa_trans trans trans_version awq_bs save_mem "
    "alpha actorder static_groups percdamp blocksize chunk_num owq n_outs aug_loss let lwc lwc_lr let_lr use_shift "
    "deactive_amp epochs wd smooth_up_down ntweak_lr gamma lp_norm beta kappa iters axis threshold fp_relative "
    "fp_features fp_threshold last_fc_bit relative_threshold simplified_outliers scale zero lr iterations batch_size "
    "optimize_scale scale_lr thresholds load_transform reduce_memory"
)


@dataclass(frozen=True)
class OldKey:
    """A key of older files: where it stands ("*" for any one key), its new name or None to drop it, and what to say."""

    path: str
    becomes: str | None
    note: str


_TYPO = "an old spelling, read as {new!r}"
_NEVER_READ = "ignored; LLMC doesn't read it either"
OLD_KEYS = (
    *(OldKey(f"{section}.speical", "special", _TYPO) for section in ("quant", "quant.vision")),
    OldKey("quant.kvcache.speical", "special", _TYPO),
    OldKey("sparse.speical", "special", _TYPO),
    OldKey("ignored_layers.speical_names", "special_names", _TYPO),
    *(OldKey(f"{section}.special.version", "trans_version", _TYPO) for section in ("quant", "quant.vision")),
    *(
        OldKey(f"{section}.{key}", None, _NEVER_READ)
        for section in (
            *("quant", "quant.weight", "quant.act", "quant.kvcache", "quant.*.*.weight", "quant.*.*.act"),
            *("quant.vision", "quant.vision.weight", "quant.vision.act"),
        )
        for key in ("qmax_to_tensor", "pack_mode")
    ),
    *(
        OldKey(f"{section}.need_pack", None, "ignored; every exporter knows how it packs")
        for section in ("quant", "quant.act", "quant.vision", "quant.vision.act")
    ),
    OldKey("quant.quant_objects", None, "ignored; only the language model is compressed"),
    OldKey("save.save_fp", None, "ignored; nothing is saved for it (save_trans saves the transformed model)"),
    OldKey("save.save_quant", None, "ignored; nothing is saved for it (save_fake saves the fake-quantized model)"),
    OldKey("opencompass.max_num_workers", None, _NEVER_READ),
    OldKey("calib.load_from_txt", None, "ignored; a path that ends in .txt is recognised by itself"),
    OldKey("model.use_cpu_to_save_cuda_mem_for_catcher", None, "ignored; blocks are loaded one at a time anyway"),
)

_ENCODER = "pruning the encoder isn't available; language, or no such section, prunes the language blocks alone"
_OUT_OF_SCOPE = {
    "video_gen": "video generation",
    "sparse.vision": _ENCODER,
    "quant.video_gen": "video generation",
    "calib.video": "video generation",
    "model.lora_path": "merging LoRA weights of video models",
    "save.save_lightx2v": "the LightX2V export of video models",
}
_FOREIGN_NAMES = {
    **dict.fromkeys(("t2v", "i2v", "video_gen", "WanI2V", "WanT2V"), "video generation"),
    **dict.fromkeys(("images", "imagenet", "img"), "compressing image models"),
    **dict.fromkeys(_MULTIMODAL, "compressing this family of models of images, video or sound"),
}


def modernise(document: Document) -> None:
    """Bring the document to the spelling and the form of the schema, in place."""
    _refuse_foreign(document)
    for section in ("quant", "sparse"):
        _flatten_language(document, section)
    for old in OLD_KEYS:
        for parent, path in _matches(document.data, old.path):
            _respell(document, parent, path, old)
    _repair_need_pack(document)
    _spread_quant_type(document)
    _name_calibration(document)
    _split_evaluations(document)


def _matches(data: object, pattern: str) -> Iterator[tuple[dict[str | int, Any], KeyPath]]:
    """Every mapping that holds the last key of the pattern, with the full path to that key."""
    found: list[tuple[object, KeyPath]] = [(data, ())]
    *sections, key = pattern.split(".")
    for part in sections:
        found = [
            (below, (*path, name))
            for parent, path in found
            if isinstance(parent, dict)
            for name, below in parent.items()
            if part in ("*", name)
        ]
    for parent, path in found:
        if isinstance(parent, dict) and key in parent:
            yield parent, (*path, key)


def _respell(document: Document, parent: dict[str | int, Any], path: KeyPath, old: OldKey) -> None:
    if old.becomes is not None and old.becomes in parent:
        document.problem(path, f"an old spelling of {old.becomes!r}, which is there too; keep one of them")
        return
    document.note(path, old.note.format(new=old.becomes))
    value = parent.pop(path[-1])
    if old.becomes is not None:
        parent[old.becomes] = value
        document.move((*path[:-1], old.becomes), path)


def _refuse_foreign(document: Document) -> None:
    """What is about images and video is a problem of its own, so that it isn't reported as a spelling mistake."""
    for pattern, matter in _OUT_OF_SCOPE.items():
        for parent, path in _matches(document.data, pattern):
            if parent.pop(path[-1]) not in (None, False):
                text = matter if matter is _ENCODER else f"{matter} is out of scope of this toolkit"
                document.problem(path, text, final=True)
    for pattern in ("model.type", "calib.name", "calib.type", "eval.type", "eval.name", "eval.*.type", "eval.*.name"):
        for parent, path in _matches(_eval_as_mapping(document.data), pattern):
            value = parent[path[-1]]
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str) and name in _FOREIGN_NAMES:
                    text = f"{name!r}: {_FOREIGN_NAMES[name]} is out of scope of this toolkit"
                    document.problem(path, text, final=True)


def _eval_as_mapping(data: dict[str, Any]) -> dict[str, Any]:
    sections = data.get("eval")
    return {**data, "eval": dict(enumerate(sections))} if isinstance(sections, list) else data


def _flatten_language(document: Document, section: str) -> None:
    """The keys of `language` stand in the section itself; `vision`, if it's quantized, stays a section in it."""
    inner = document.data.get(section)
    if not isinstance(inner, dict):
        return
    vision = inner.pop("vision", None) if section == "quant" else None
    if inner.get("language", True) in (None, False):
        del inner["language"]
    if isinstance(inner.get("language"), dict):
        for key in inner:
            if key != "language":
                document.problem((section, key), f"stands beside {section}.language; put it into that section")
        document.moved[section, "vision"] = (section, "vision")
        document.data[section] = inner = inner["language"]
        document.move((section,), (section, "language"))
    if vision not in (None, False):
        # A file that names the encoder alone leaves the language blocks as they are.
        document.data[section] = {**(inner or {"method": []}), "vision": vision}


def _repair_need_pack(document: Document) -> None:
    """`need_pack` has no effect here, so that even its misspellings may pass."""
    found = [pair for place in ("quant", "quant.vision") for pair in _matches(document.data, f"{place}.weight")]
    for weight, path in found:
        section = weight["weight"]
        for key in list(section) if isinstance(section, dict) else []:
            if key not in ("need_pack", "pack_version") and "pack" in key and nearest(key, ["need_pack"]):
                del section[key]
                document.note((*path, key), "taken as need_pack, which every exporter decides by itself")


def _spread_quant_type(document: Document) -> None:
    found = [pair for place in ("quant", "quant.vision") for pair in _matches(document.data, f"{place}.quant_type")]
    for quant, path in found:
        kind = quant.pop("quant_type")
        document.note(path, "an old place, read as the quant_type of weight and act")
        for name in ("weight", "act"):
            section = quant.get(name)
            if isinstance(section, dict) and "quant_type" not in section and section.get("bit") != 16:
                section["quant_type"] = kind
                document.move((*path[:-1], name, "quant_type"), path)


def _name_calibration(document: Document) -> None:
    calib = document.data.get("calib")
    if not isinstance(calib, dict):
        return
    if calib.get("type") in ("img", "txt"):
        kind = calib.pop("type")
        if kind == "txt":
            document.note(("calib", "type"), "ignored; calibration data is text")
    if calib.get("name") in ("custom", "custom_txt"):
        is_lines = isinstance(calib.get("path"), str) and calib["path"].endswith(".txt")
        name = "text" if is_lines else "custom_txt"
        if calib["name"] != name:
            text = "a .txt file, one text per line" if is_lines else "an old name"
            document.note(("calib", "name"), f"{calib['name']!r} is read as {name!r}: {text}")
            calib["name"] = name
    if calib.get("name") == "custom_mm" and calib.get("preproc") in ("vlm_general", "img_general"):
        document.note(("calib", "preproc"), "ignored; the model's own processor makes the samples")
        del calib["preproc"]
    if calib.get("preproc") == "general":
        document.note(("calib", "preproc"), "'general' is an old name, read as 'txt_general_preproc'")
        calib["preproc"] = "txt_general_preproc"


def _split_evaluations(document: Document) -> None:
    """Make `eval` a list with one text each; comparing the tokens of both models becomes an evaluation of its own."""
    result: list[object] = []
    for index, section in split_evals(document.data.get("eval")):
        origin: KeyPath = ("eval",) if index is None else ("eval", index)
        added = [section]
        if isinstance(section, dict):
            if section.get("name") == "custom":
                name = "custom_gen" if section.get("type") == "generate_only" else "custom_ppl"
                document.note((*origin, "name"), f"'custom' is an old name, read as {name!r}")
                section = added[0] = {**section, "name": name}
            if isinstance(section.get("eval_token_consist"), bool):
                wanted = section["eval_token_consist"]
                section = added[0] = {key: value for key, value in section.items() if key != "eval_token_consist"}
                if wanted:
                    document.note((*origin, "eval_token_consist"), "read as one more evaluation, of type 'token_acc'")
                    added.append({**section, "type": "token_acc"})
        for entry in added:
            if entry in result:
                continue  # asked for in both ways
            document.moved["eval", len(result)] = origin
            result.append(entry)
    if "eval" in document.data:
        document.data["eval"] = result
