"""Every cell of every suite: its configuration is the published recipe, and its dry run works on its family's model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dry import small, write_bytes_tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, OPTConfig

from llmc.algorithms import options_types
from llmc.config import load_config
from llmc.prepare import prepare
from scripts.reproduce import ROOT, SUITES
from scripts.reproduction.published import read_published
from scripts.reproduction.suites import read_models, read_suite

PUBLISHED = read_published(SUITES / "published.tsv")
MODELS = read_models(SUITES / "models.toml")
SUITE_NAMES = sorted(file.parent.name for file in SUITES.glob("*/suite.toml"))
CELLS = [
    pytest.param(cell, id=f"{name}-{cell.id}")
    for name in SUITE_NAMES
    for cell in read_suite(SUITES / name, ROOT, MODELS, PUBLISHED).cells
]
LINKS = [
    pytest.param(cell, one, id=f"{param.id}-{one.published}")
    for param in CELLS
    for cell in param.values
    for one in cell.compare
    if one.published
]
METHODS = {
    "rtn": (("RTN",), None),
    "gptq": (("GPTQ",), None),
    "gptq-act-order": (("GPTQ",), None),
    "awq": (("Awq",), None),
    "omniquant": (("OmniQuant",), None),
    "awq-omniquant": (("Awq", "OmniQuant"), None),
    "smoothquant": (("SmoothQuant",), None),
    "osplus": (("OsPlus",), None),
    "quarot-gptq": (("Quarot", "GPTQ"), None),
    "quarot-rtn": (("Quarot", "RTN"), None),
    "rptq": (("RPTQ",), None),
    "wanda": ((), "Wanda"),
    "sparsegpt": ((), "SparseGPT"),
    "magnitude": ((), "Magnitude"),
}
SIZE = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda vocabulary: LlamaConfig(
        vocab_size=vocabulary, **SIZE, intermediate_size=256, num_key_value_heads=2
    ),
    "opt": lambda vocabulary: OPTConfig(vocab_size=vocabulary, **SIZE, ffn_dim=256, word_embed_proj_dim=256),
    "bloom": lambda vocabulary: BloomConfig(vocab_size=vocabulary, hidden_size=256, n_layer=2, n_head=4),
}


def loaded(cell, overrides=()):
    return load_config(cell.config, [*cell.overrides, *overrides], options_types())


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"tiny-{family}")
            config = FAMILIES[family](write_bytes_tokenizer(made[family]))
            AutoModelForCausalLM.from_config(config).save_pretrained(made[family])
        return made[family]

    return get


def test_there_are_suites_for_every_size_of_machine():
    assert SUITE_NAMES == ["llama2", "llama31", "small", "tiny"]
    used = {cell.config for param in CELLS for cell in param.values}
    assert {file for file in SUITES.rglob("*.yml") if file not in used} == set()


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_parses_without_a_warning_and_its_dry_run_works_on_its_family(cell, tiny_model, little_text, tmp_path):
    assert loaded(cell).warnings == ()
    config = loaded(cell).config
    sections = ["calib"] * (config.calib is not None) + [f"eval.{index}" for index in range(len(config.eval))]
    path = tiny_model(MODELS[cell.model].family)
    overrides = [f"model.path={path}", f"save.save_path={tmp_path / 'out'}", "base.device=cpu"]
    prepared = prepare(loaded(cell, overrides + [one for section in sections for one in small(section, little_text)]))
    assert bool(prepared.calib) == (config.calib is not None) == prepared.recipe.needs_data
    asked = {(one.position, one.text or config.eval[0].name) for one in cell.compare}
    assert asked == {(position, one.name) for one in config.eval for position in one.eval_pos}
    assert not prepared.exporters


def shown_scheme(config):
    """As the published rows have it."""
    sparse = config.sparse
    if sparse is not None:
        return f"sparse{sparse.weight.pattern or format(sparse.weight.sparsity, '.0%')}"
    quant = config.quant
    only_kv = "RPTQ" in quant.method and quant.options["RPTQ"].only_quant_kv
    act = quant.act.bit if quant.act is not None else 16
    kv = quant.kvcache.bit if quant.kvcache is not None else None
    group = f"g{quant.weight.group_size}" if quant.weight.group_size else ""
    if only_kv:
        return f"W{quant.weight.bit}A16KV{act}{group}"
    return f"W{quant.weight.bit}A{act}{f'KV{kv}' if kv else ''}{group}"


@pytest.mark.parametrize(("cell", "one"), LINKS)
def test_a_cell_is_the_published_recipe(cell, one):
    row, config = PUBLISHED[one.published], loaded(cell).config
    evaluation = next(each for each in config.eval if one.text in (None, each.name))
    assert row.model == cell.model
    assert row.text == evaluation.name
    if row.protocol.startswith("p1 "):
        windows = one.windows or evaluation.num_chunks
        assert (row.protocol, evaluation.seq_len) == (f"p1 {windows}", 1024)
    else:
        assert row.protocol == f"{evaluation.protocol} {evaluation.seq_len}"
        assert evaluation.num_chunks is None
    assert (row.method == "float") == (one.position == "pretrain")
    if row.method == "float":
        return
    if row.id.startswith("opt-1.3b/gptq") and row.id.endswith("@rptq"):
        methods: tuple[tuple[str, ...], str | None] = (("RPTQ",), None)  # its own GPTQ, on the clusters
    else:
        methods = METHODS[row.method]
    assert (config.quant.method if config.quant else (), config.sparse.method if config.sparse else None) == methods
    symmetric = re.search(r"-(a?)sym$", row.scheme)
    if symmetric:
        assert config.quant.weight.symmetric == (symmetric[1] == "")
    assert re.sub(r"-a?sym$", "", row.scheme) == shown_scheme(config)
    known = re.fullmatch(r"([\w-]+) (\d+)x(\d+)(?: seed (\d+))?", row.calibration)
    assert (known is None) == (row.calibration in ("-", "?"))
    assert (config.calib is None) == (row.calibration == "-")
    if known:
        name, samples, length, seed = known.groups()
        assert (int(samples), int(length)) == (config.calib.n_samples, config.calib.seq_len)
        if name != "wikitext2-valid":
            assert name == config.calib.name
        assert seed is None or int(seed) == config.calib.seed
        assert seed is not None or "seed" in row.unstated or name == "wikitext2-valid"


def test_the_table_of_models_has_what_the_cells_run():
    assert {cell.model for param in CELLS for cell in param.values} == set(MODELS)
    assert {model.family for model in MODELS.values()} == set(FAMILIES)
