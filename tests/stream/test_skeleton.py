"""Unit by unit, the skeleton takes exactly the weights that transformers would load at once."""

from __future__ import annotations

import json
import resource
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV3Config

from llmc.errors import CheckpointError, ModelError
from llmc.stream.empty import empty_model, load_config
from llmc.stream.headers import INDEX_FILE
from llmc.stream.source import check_finite


@pytest.fixture
def copy(llama, tmp_path):
    return replace(llama, folder=Path(shutil.copytree(llama.folder, tmp_path / "model")))


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_loading_unit_by_unit_equals_from_pretrained(tiny):
    expected = tiny.model().state_dict()
    loaded = tiny.loaded().model.state_dict()
    if tiny.layout is not None:
        loaded = tiny.layout.join(loaded)  # as the family's own modules have them
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor), name


def test_every_tensor_belongs_to_one_unit_and_is_read_once(tiny):
    skeleton = tiny.skeleton()
    assert Counter(name for unit in skeleton.units.values() for name in unit) == Counter(list(tiny.entries))
    source = tiny.source(skeleton)
    for unit in skeleton.units:
        source.take(unit)
    source.close()
    assert source.reads == dict.fromkeys(tiny.entries, 1)
    assert source.bytes_read == sum(entry.nbytes for entry in tiny.entries.values())


def test_the_checkpoint_is_sharded(tiny):
    assert len({entry.file for entry in tiny.entries.values()}) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_asked_for_whatever_the_config_says(llama, dtype):
    assert llama.config.dtype == torch.bfloat16
    skeleton = llama.skeleton(dtype)
    skeleton.load(llama.source(skeleton).take("block-1"))
    assert {parameter.dtype for parameter in skeleton.model.parameters()} == {dtype}
    assert {parameter.device.type for parameter in skeleton.blocks[1].parameters()} == {"cpu"}


def test_a_model_that_insists_on_another_dtype_is_refused(llama, monkeypatch):
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", lambda *args, **kwargs: Stubborn())
    with pytest.raises(ModelError, match="parameter gate insists on another dtype"):
        llama.skeleton()


def test_only_the_loaded_unit_takes_memory(tiny):
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    for unit, names in skeleton.units.items():
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())
        skeleton.load(source.take(unit))
        here = {name for name, p in skeleton.model.named_parameters(remove_duplicate=False) if not p.is_meta}
        assert here == {skeleton.parameter_of[name] for name in names}
        if unit.startswith("block-"):
            skeleton.release(skeleton.blocks[int(unit.removeprefix("block-"))])
        else:
            skeleton.release_unit(unit)
    source.close()
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())


def test_a_released_block_can_be_loaded_again(llama):
    skeleton = llama.loaded()
    before = {name: parameter.clone() for name, parameter in skeleton.blocks[2].named_parameters()}
    skeleton.release(skeleton.blocks[2])
    skeleton.load(llama.source(skeleton).take("block-2"))
    for name, parameter in skeleton.blocks[2].named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_missing_tensor_is_named(copy):
    edit_index(copy.folder, lambda weight_map: weight_map.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.2\.mlp\.up_proj\.weight\n"):
        copy.skeleton()


def test_several_missing_tensors_are_counted(copy):
    edit_index(copy.folder, lambda weight_map: [weight_map.pop(n) for n in list(weight_map) if "layers.3" in n])
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.3\.\S+ and 8 more"):
        copy.skeleton()


def test_an_untied_head_may_not_be_missing(copy):
    edit_index(copy.folder, lambda weight_map: weight_map.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
        copy.skeleton()


def test_a_wrong_shape_is_named(copy):
    edit_config(copy.folder, intermediate_size=96)
    skeleton = copy.skeleton()
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.\w+_proj\.weight.*: the shape doesn't fit"):
        skeleton.load(copy.source(skeleton).take("block-1"))


def test_a_leftover_that_the_model_lacks_is_ignored(copy):
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({extra: torch.ones(8)}, copy.folder / "extra.safetensors")
    edit_index(copy.folder, lambda weight_map: weight_map.update({extra: "extra.safetensors"}))
    assert extra in copy.entries
    skeleton = copy.skeleton()
    assert extra not in skeleton.parameter_of
    assert not any(extra in names for names in skeleton.units.values())


def test_a_quantized_checkpoint_is_refused(copy):
    edit_config(copy.folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        load_config(copy.folder, trust_remote_code=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no-such-model"}'])
def test_an_unusable_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(value, dtype):
    bad = torch.ones(3, 5, dtype=dtype)
    bad[1, 2] = value
    with pytest.raises(CheckpointError, match="up: 1 of 15 values"):
        check_finite({"down": torch.ones(4, dtype=dtype), "up": bad})


def test_opposite_infinities_do_not_hide_each_other():
    with pytest.raises(CheckpointError, match="w: 2 of 2 values"):
        check_finite({"w": torch.tensor([torch.inf, -torch.inf])})


def test_large_finite_weights_pass():
    largest = torch.finfo(torch.float32).max
    check_finite({"w": torch.full((64,), largest), "ids": torch.ones(3, dtype=torch.int64)})


def test_the_tied_head_is_known(tiny):
    skeleton = tiny.skeleton()
    assert skeleton.tied_head == tiny.config.tie_word_embeddings


def test_the_first_gpt2s_leave_out_the_prefix_and_keep_their_masks(checkpoint, tmp_path):
    """As the published checkpoints of 2019 do."""
    tiny = checkpoint("gpt2")
    old = replace(tiny, folder=tmp_path)
    tensors = {k: v for file in tiny.folder.glob("*.safetensors") for k, v in load_file(file).items()}
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64) for index in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(tiny.folder / "config.json", tmp_path)
    expected, loaded = tiny.loaded().model.state_dict(), old.loaded().model.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())
    assert loaded["transformer.h.0.mlp.c_fc.weight"].shape == (128, 64)


def test_a_block_larger_than_the_memory_is_made_without_any():
    """DeepSeek-V3's: 256 experts of 7168 x 2048."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = empty_model(DeepseekV3Config(num_hidden_layers=4), torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) > 15e9
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB
