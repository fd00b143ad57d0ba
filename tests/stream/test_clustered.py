"""A block on grids of clusters against its forward written down again: no reordering, one channel at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llmc.models import Heads, heads_of
from llmc.quant import ClusterGrid
from llmc.stream import clustered
from llmc.stream.attention import attending
from llmc.stream.clustered import ClusteredBlock

CPU = torch.device("cpu")


def on_grid(values: Tensor, grid: ClusterGrid) -> Tensor:
    """Each channel ``[..., channel]`` on its cluster's grid, by the published formulas in float32."""
    if grid.bits is None:
        return values
    rounded, half = values.clone(), 2 ** (grid.bits - 1)
    for channel, label in enumerate(grid.labels):
        lo, hi = torch.tensor(grid.lo[label]), torch.tensor(grid.hi[label])
        scale = ((hi - lo) / 2**grid.bits).clamp(1e-4, 1e4)
        zero = (-(lo + hi) / (2 * scale)).clamp(-1e4, 1e4).round()
        codes = ((values[..., channel].float() / scale).round() + zero).clamp(-half, half - 1)
        rounded[..., channel] = (codes - zero) * scale
    return rounded


def random_grid(channels: int, clusters: int, bits: int | None, seed: int, heads: int = 1) -> ClusterGrid:
    """Clusters within heads, ranges about those of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.randint(clusters, (channels // heads,), generator=generator) + clusters * h for h in range(heads)]
    )
    labels = labels.unique(return_inverse=True)[1]
    count = int(labels.max()) + 1
    ends = torch.rand(2, count, generator=generator) * 2 + 0.3
    return ClusterGrid(tuple(labels.tolist()), bits, tuple((-ends[0]).tolist()), tuple(ends[1].tolist()))


def grids_of(name: str, *, only_kv: bool = False) -> dict[str, ClusterGrid]:
    """For the tiny models: 4 heads of 16 channels, Llama's with 2 for keys and values."""
    kv, low, norm = 4 if name == "opt" else 2, None if only_kv else 4, None if only_kv else 8
    names = (
        ("self_attn.q_proj+self_attn.k_proj+self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
        if name == "opt"
        else (
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj+mlp.up_proj",
            "mlp.down_proj",
        )
    )

    def repeated(grid: ClusterGrid, seed: int, bits: int | None) -> ClusterGrid:
        """The clusters of key-value heads for each query head, with other ranges."""
        by_head = torch.tensor(grid.labels).reshape(kv, 16)
        labels = torch.cat([row * 4 + h % (4 // kv) for h, row in enumerate(by_head.repeat_interleave(4 // kv, 0))])
        labels = labels.unique(return_inverse=True)[1]
        ends = torch.rand(2, int(labels.max()) + 1, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3
        return ClusterGrid(tuple(labels.tolist()), bits, tuple((-ends[0]).tolist()), tuple(ends[1].tolist()))

    key = random_grid(16 * kv, 3, 4, 1, kv)
    value = random_grid(16 * kv, 3, 3, 2, kv)
    return {
        names[0]: random_grid(64, 5, norm, 3),
        names[1]: repeated(value, 4, low),
        names[2]: random_grid(64, 5, norm, 5),
        names[3]: random_grid(128, 6, low, 6),
        "key": key,
        "query": repeated(key, 7, low),
        "value": value,
    }


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, *, round_probabilities: bool) -> Tensor:
    """``[batch, tokens, heads * dim]`` of scaled queries ``[batch, tokens, heads, dim]``, one head at a time."""
    outputs, tokens = [], query.shape[1]
    for head in range(query.shape[2]):
        own = head // (query.shape[2] // key.shape[2])
        scores = query[:, :, head] @ key[:, :, own].transpose(1, 2)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        probabilities = scores.softmax(-1)
        if round_probabilities:
            probabilities = torch.round(255 * probabilities) / 255
        outputs.append(probabilities @ value[:, :, own])
    return torch.cat(outputs, dim=-1)


def by_hand(block: nn.Module, hidden: Tensor, name: str, grids: dict[str, ClusterGrid], rope=None) -> Tensor:
    """The block's forward with the original weights in the original order."""
    qkv, out, up, down = (grids[key] for key in list(grids)[:4])
    attention, opt = block.self_attn, name == "opt"
    first, second = (
        (block.self_attn_layer_norm, block.final_layer_norm)
        if opt
        else (block.input_layernorm, block.post_attention_layernorm)
    )
    normed = on_grid(first(hidden), qkv)
    query, key, value = (getattr(attention, f"{part}_proj")(normed).unflatten(-1, (-1, 16)) for part in ("q", "k", "v"))
    if rope is not None:
        cos, sin = (part[:, :, None] for part in rope)
        query, key = (x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (query, key))
    query, key, value = (
        on_grid(states.flatten(2), grids[part]).unflatten(-1, (-1, 16))
        for part, states in (("query", query * 0.25), ("key", key), ("value", value))
    )
    seen = attention_by_hand(query, key, value, round_probabilities=grids["query"].bits is not None)
    hidden = hidden + (attention.out_proj if opt else attention.o_proj)(on_grid(seen, out))
    normed = on_grid(second(hidden), up)
    if opt:
        inner = block.fc1(normed).relu()
        return hidden + block.fc2(on_grid(inner, down))
    inner = nn.functional.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)
    return hidden + block.mlp.down_proj(on_grid(inner, down))


@pytest.fixture
def exact(checkpoint):
    """A tiny model in float64 with RMSNorms that stay in it, and a block's call."""

    def make(name):
        model = checkpoint(name).model().double()
        for path, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
                norm.weight = module.weight
                model.set_submodule(path, norm)
        return model

    return make


@pytest.mark.parametrize("queries", [1000, 5], ids=["at once", "5 queries at a time"])
@pytest.mark.parametrize("only_kv", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2"])
@torch.no_grad()
def test_a_reordered_block_rounds_as_one_that_isnt(exact, checkpoint, name, only_kv, queries, monkeypatch):
    monkeypatch.setattr(clustered, "_QUERIES", queries)
    model, tiny = exact(name), checkpoint(name)
    block = model.get_submodule(tiny.adapter.blocks)[0]
    hidden = torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rope, call = None, {}
    if name != "opt":
        rope = model.model.rotary_emb(hidden, torch.arange(13)[None])
        call = {"position_embeddings": rope}
    grids = grids_of(name, only_kv=only_kv)
    expected = by_hand(block, hidden, name, grids, rope)
    plain = block(hidden, **call)
    work = ClusteredBlock(block, tiny.subsets, heads_of(tiny.config), CPU, attends=True)
    work.switch_on(grids, reorder=True)
    with attending(model, work.attend):
        got = block(hidden, **call)
    got, plain = (output[0] if isinstance(output, tuple) else output for output in (got, plain))
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (got - plain).abs().max() > 1e-3
    work.remove()


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_are_those_of_transformers(kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    allowed = (torch.ones(9, 9).tril() * torch.ones(9, 9).triu(-3)).bool().expand(2, 1, 9, 9)
    mask = allowed if kind == "bool" else torch.zeros(2, 1, 9, 9).masked_fill(~allowed, -torch.inf)
    got = clustered._with_rounded_probabilities(query, key, value, mask)
    keys, values = (states.repeat_interleave(2, 1) for states in (key, value))
    scores = (query @ keys.transpose(-1, -2)).masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = ((scores * 255).round() / 255 @ values).transpose(1, 2)
    assert torch.allclose(got, expected, atol=1e-6)


@torch.no_grad()
def test_attention_is_watched_as_it_will_be_rounded(exact, checkpoint):
    """Scaled queries behind the rotary embedding, all heads, sequence by sequence; and the output isn't touched."""
    model, tiny = exact("llama"), checkpoint("llama")
    block = model.model.layers[0]
    hidden = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rope = model.model.rotary_emb(hidden, torch.arange(7)[None])
    work = ClusteredBlock(block, tiny.subsets, heads_of(tiny.config), CPU, attends=True)
    before = block(hidden, position_embeddings=rope)
    with work.watching():
        assert work.on
        seen = work.watched
        with attending(model, work.attend):
            assert torch.equal(block(hidden, position_embeddings=rope), before)
    assert not work.on
    query = block.self_attn.q_proj(block.input_layernorm(hidden)).unflatten(-1, (4, 16))
    cos, sin = (part[:, :, None] for part in rope)
    query = (query * cos + torch.cat([-query[..., 8:], query[..., :8]], -1) * sin) / 4
    value = block.self_attn.v_proj(block.input_layernorm(hidden))
    assert torch.allclose(seen.query.hi, query.flatten(2).amax(1).float())
    assert torch.equal(seen.value.lo, value.amin(1).float())
    assert seen.key.lo.shape == (3, 32)


def test_without_quantized_activations_attention_is_left_alone(exact, checkpoint):
    tiny = checkpoint("llama")
    work = ClusteredBlock(exact("llama").model.layers[0], tiny.subsets, Heads(4, 2, 16), CPU, attends=False)
    with work.watching():
        assert not work.on
