"""Where models and texts are found, and what is said where they aren't."""

from __future__ import annotations

import json

import datasets
import pytest

from llmc.config import load_config
from scripts.reproduction.places import Places
from scripts.reproduction.suites import KnownModel

MODEL = KnownModel(hub="org/My-Model-7b", family="llama", gigabytes=13.5)


def config(calib=None, **evaluation):
    evaluation = {"name": "wikitext2", "eval_pos": ["fake_quant"], "seq_len": 8} | evaluation
    content = {"model": {"path": "m"}, "eval": evaluation, "quant": {"method": "RTN"}}
    content["quant"]["weight"] = {"bit": 4, "symmetric": True, "granularity": "per_channel"}
    return load_config({**content, **({"calib": calib} if calib else {})}).config


def save(folder, *splits):
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({split: one for split in splits}).save_to_disk(folder)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "models" / "my-model-7B").mkdir(parents=True)
    (tmp_path / "models" / "my-model-7B" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    return Places(tmp_path / "models", tmp_path / "data")


def test_a_model_is_known_by_its_hub_name_in_upper_or_lower_case(places, tmp_path):
    save(tmp_path / "data" / "wikitext2", "train", "test")
    found = places.find("my", MODEL, config())
    assert found.missing == ()
    assert found.overrides == (
        f"model.path={json.dumps(str(tmp_path / 'models' / 'my-model-7B'))}",
        f"eval.0.path={json.dumps(str(tmp_path / 'data' / 'wikitext2'))}",
        "eval.0.download=false",
    )


def test_a_folder_without_a_model_and_a_set_without_its_split_are_missing(places, tmp_path):
    (tmp_path / "models" / "my-model-7B" / "config.json").unlink()
    save(tmp_path / "data" / "wikitext2", "train")
    found = places.find("my", MODEL, config())
    assert found.overrides == ()
    assert found.missing[0].startswith(f"model my: no my or My-Model-7b in {tmp_path / 'models'}; --download fetches")
    assert found.missing[1].startswith("data set wikitext2, split test: not in")


def test_text_files_in_a_folder_of_a_public_sets_name_are_not_that_set(places, tmp_path):
    (tmp_path / "data" / "wikitext2").mkdir()
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text("another edition")
    assert "data set wikitext2" in places.find("my", MODEL, config()).missing[0]


def test_a_split_may_be_saved_alone(places, tmp_path):
    datasets.Dataset.from_dict({"sentence": ["a"]}).save_to_disk(tmp_path / "data" / "ptb" / "validation")
    found = places.find("my", MODEL, config(name="ptb", protocol="gptq_old"))
    assert f"eval.0.path={json.dumps(str(tmp_path / 'data' / 'ptb' / 'validation'))}" in found.overrides
    assert places.find("my", MODEL, config(name="ptb")).missing  # whose split is test


def test_the_mix_needs_all_its_sets(places, tmp_path):
    calib = {"name": "mix", "n_samples": 3, "seq_len": 8, "preproc": "mix_gptq", "download": True}
    for name in ("wikitext2", "ptb"):
        save(tmp_path / "data" / name, "train", "test", "validation")
    assert [line.split(",")[0] for line in places.find("my", MODEL, config(calib)).missing] == ["data set c4"]
    save(tmp_path / "data" / "c4", "train", "validation")
    found = places.find("my", MODEL, config(calib))
    assert found.missing == ()
    assert {f"calib.path={json.dumps(str(tmp_path / 'data'))}", "calib.download=false"} <= set(found.overrides)


def test_what_is_not_there_is_fetched_if_that_is_asked_for(tmp_path):
    found = Places(tmp_path, tmp_path, download=True).find("my", MODEL, config())
    assert found.missing == ()
    assert found.overrides == ('model.path="org/My-Model-7b"', "eval.0.download=true")
