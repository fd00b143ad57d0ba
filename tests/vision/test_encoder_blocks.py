"""Block by block, an image encoder is loaded and run as Transformers does it at once, and folds leave it as it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_vision_exact import change, model_of
from tiny_vision import CONFIGS, TinyVision, image_sample
from torch import Tensor, nn

from llmc.errors import ModelError
from llmc.models import Encoder, find_adapter, fold_scale, scale_rule
from llmc.stream.activations import ActivationStore
from llmc.stream.entrance import Entrance
from llmc.stream.front import encoder_of
from llmc.stream.skeleton import EMBED, HEAD, Skeleton, block_unit

CPU = torch.device("cpu")


def encoder_of_family(tiny: TinyVision) -> Encoder:
    images = tiny.adapter.images
    assert images is not None
    return images.encoder(tiny.config)


def lists_of(tiny: TinyVision, skeleton: Skeleton) -> list[Skeleton]:
    paths = encoder_of_family(tiny).lists
    return [encoder_of(skeleton, path, paths) for path in paths]


def watched(model: nn.Module, paths: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Where inputs and outputs of the blocks will be found, by their names."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see(name: str, block: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            inputs[name] = args[0] if args else kwargs["hidden_states"]

        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(lambda _, __, out: outputs.update({name: out}))

    for path in paths:
        for index, block in enumerate(model.get_submodule(path)):
            see(f"{path}.{index}", block)
    return inputs, outputs


def test_replaying_the_encoders_blocks_equals_the_whole_encoder_bit_for_bit(tiny, tmp_path):
    samples = [image_sample(tiny.name, seed) for seed in (0, 1)]
    paths = encoder_of_family(tiny).lists
    whole = tiny.model()
    inputs, outputs = watched(whole, paths)
    expected = []
    for sample in samples:
        whole(**sample.inputs, use_cache=False)
        expected.append((dict(inputs), dict(outputs)))
    finished, batches = [], [sample.batch for sample in samples]
    for number, encoder in enumerate(lists_of(tiny, tiny.skeleton())):
        source = tiny.source(encoder)
        store = ActivationStore(tmp_path / str(number), None)
        entrance = Entrance(encoder, store, CPU, finished)
        encoder.load(source.take(EMBED))
        entrance.fill("one", batches, keep=True)
        encoder.release_unit(EMBED)
        for index, block in enumerate(encoder.blocks):
            encoder.load(source.take(block_unit(index)))
            run = entrance.run(index, "one", batches)
            for batch in range(len(samples)):
                before, after = (found[f"{encoder.path}.{index}"] for found in expected[batch])
                assert torch.equal(run.inputs.load(batch, CPU), before)
                run.inputs.store(batch, run.forward(batch))
                assert torch.equal(run.inputs.load(batch, CPU), after)
            encoder.release(block)
        source.close()
        finished.append((encoder.blocks, store.streams))
    assert len(expected[0][1]) == sum(len(blocks) for blocks, _ in finished)


@pytest.mark.parametrize("name", ["llava", "internvl", "mllama"])
def test_the_whole_encoder_still_runs_behind_a_recording(vision, tmp_path, name):
    """Transformers hooks an encoder's blocks when it's first asked for hidden states: a stand-in that is there at that
    moment must not take the hooks with it."""
    tiny = vision(name)
    sample, skeleton = image_sample(name), tiny.skeleton()
    batches = [sample.batch]
    source = tiny.source(skeleton)
    skeleton.load(source.take(EMBED))
    source.close()
    language = Entrance(skeleton, ActivationStore(tmp_path / "language", None), CPU)
    for number, encoder in enumerate(lists_of(tiny, skeleton)[:1]):
        Entrance(encoder, ActivationStore(tmp_path / str(number), None), CPU).fill("one", batches, keep=False)
    language.fill("one", batches, keep=True)
    first = {}
    whole = tiny.model()
    block = whole.get_submodule(tiny.adapter.blocks)[0]
    block.register_forward_pre_hook(lambda _, args: first.update(hidden=args[0]))
    whole(**sample.inputs, use_cache=False)
    assert torch.equal(language.run(0, "one", batches).inputs.load(0, CPU), first["hidden"])


def test_loading_the_encoder_unit_by_unit_equals_from_pretrained(tiny):
    expected, skeleton = tiny.model().state_dict(), tiny.skeleton()
    lists, reads = lists_of(tiny, skeleton), Counter[str]()
    for encoder in lists:
        source = tiny.source(encoder)
        for unit in encoder.units:
            encoder.load(source.take(unit))
        source.close()
        reads += Counter({name: count for name, count in source.reads.items() if name not in encoder.units[EMBED]})
        assert encoder.units[HEAD] == []
    loaded = {name: tensor for name, tensor in skeleton.model.state_dict().items() if not tensor.is_meta}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name
    inside = [name for one in lists for unit, own in one.units.items() if unit != EMBED for name in own]
    assert reads == Counter(inside)
    front = {name for one in lists for name in one.units[EMBED]}
    assert front | set(inside) == set(skeleton.units[EMBED]) and not front & set(inside)


def test_the_declared_linears_of_the_encoder_read_one_tensor_and_are_all_of_them(tiny):
    encoder, model = encoder_of_family(tiny), tiny.model()
    seen: dict[str, Tensor] = {}
    for path in encoder.lists:
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(**image_sample(tiny.name).inputs, use_cache=False)
    declared = set()
    for path in encoder.lists:
        for index in range(len(model.get_submodule(path))):
            for subset in encoder.subsets:
                names = [f"{path}.{index}.{one}" for one in subset.linears]
                assert all(seen[name] is seen[names[0]] for name in names), names
                declared |= set(names)
    assert declared == seen.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_declared_fold_of_the_encoder_preserves_the_output(name):
    model = model_of(name)
    images = find_adapter("auto", name).images
    assert images is not None
    encoder = images.encoder(model.config)
    sample = {key: t.double() if t.is_floating_point() else t for key, t in image_sample(name).inputs.items()}
    _, outputs = watched(model, encoder.lists)
    model(**sample, use_cache=False)
    before, folded = dict(outputs), Counter[str]()
    for path in encoder.lists:
        for block in model.get_submodule(path):
            for seed, subset in enumerate(encoder.subsets):
                if subset.prev is None:
                    continue
                prev, linears = block.get_submodule(subset.prev), [block.get_submodule(one) for one in subset.linears]
                rule = scale_rule(subset, prev, linears[0].in_features, encoder.heads, allow_gqa=False)
                assert rule is not None
                generator = torch.Generator().manual_seed(seed)
                scale = torch.rand(linears[0].in_features, generator=generator, dtype=torch.float64) + 0.5
                kept = linears[0].weight.clone()
                fold_scale(prev, linears, scale, rule, torch.float64)
                assert change(kept, linears[0].weight) > 0.1
                folded[path] += 1
    model(**sample, use_cache=False)
    assert all(change(before[one], outputs[one]) < 1e-10 for one in before)
    each = 4 if name == "qwen2_5_vl" else 3  # only its feed-forward part is gated
    assert folded == {path: each * len(model.get_submodule(path)) for path in encoder.lists}


def test_a_scale_between_values_and_queries_would_be_noticed():
    """The rows of a fused Linear that make the values are the last third: folding into others changes the output."""
    model = model_of("qwen2_vl")
    images = find_adapter("auto", "qwen2_vl").images
    assert images is not None
    encoder = images.encoder(model.config)
    block, subset = model.get_submodule(encoder.lists[0])[0], encoder.subsets[1]
    wrong = replace(subset, rows=((0, 32),))
    sample = {key: t.double() if t.is_floating_point() else t for key, t in image_sample("qwen2_vl").inputs.items()}
    _, outputs = watched(model, encoder.lists)
    model(**sample, use_cache=False)
    before = dict(outputs)
    qkv, proj = block.get_submodule("attn.qkv"), block.get_submodule("attn.proj")
    rule = scale_rule(wrong, qkv, 32, encoder.heads, allow_gqa=False)
    assert rule is not None
    fold_scale(qkv, [proj], torch.linspace(0.5, 1.5, 32, dtype=torch.float64), rule, torch.float64)
    model(**sample, use_cache=False)
    assert change(before[f"{encoder.lists[0]}.0"], outputs[f"{encoder.lists[0]}.0"]) > 1e-3


def test_an_encoder_that_nobody_declared_is_refused_by_name(vision):
    tiny = vision("llava")
    config, images = tiny.config, tiny.adapter.images
    assert images is not None
    config.vision_config.model_type = "pixtral"
    with pytest.raises(ModelError, match="'pixtral', whose blocks nobody declared"):
        images.encoder(config)
