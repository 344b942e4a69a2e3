"""Whole attention layers, on every backend: against the specification in float64, transformers, and themselves."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flagops
from flagops import AttentionCache, AttentionConfig, AttentionWeights, CompressorWeights, IndexerWeights
from flagops.arrays import as_numpy, as_torch
from flagops.deepseek_v4.cache import KINDS, PackedRows

sys.path.insert(0, str(Path(__file__).parent))
from layer_data import (
    TINY,
    D,
    Spec,
    assert_near,
    expected,
    hidden_states,
    in_chunks,
    layer,
    of_every_kind,
    on_every_backend,
    plain,
    weights,
)  # fmt: skip


@on_every_backend
@of_every_kind
def test_equals_the_specification(kind, backend):
    """The interpreter is slow: one run there, a chunk after another and a step."""
    sizes = [13, 1, 5] if backend == "triton" else [13, 1, 1, 7, 1, 1, 12, 1]
    x = hidden_states(2, sum(sizes), D)
    for official in (True, False)[: 1 if backend == "triton" else 2]:
        config = replace(TINY, official=official)
        made, want = expected(kind, x, config)
        cache = AttentionCache(config, kind)
        if backend != "triton":
            assert_near(layer(kind)(x, made, cache, backend=backend), want)
            assert cache.position == sum(sizes)
            cache.reset()
        assert_near(in_chunks(kind, x, made, sizes, backend, cache), want)


@pytest.mark.parametrize("backend", ["numba", "torch", "numpy"])
@of_every_kind
def test_chunks_of_any_size_give_what_one_call_gives(kind, backend):
    """Top-k choices and quantisers turn an error of a sum's order into a jump: exact backends are held to them."""
    config = TINY if backend != "torch" else replace(TINY, official=False, top_k=9)
    x, made = hidden_states(2, 40, D, seed=1), weights(kind, 1, config)
    want = layer(kind)(x, made, AttentionCache(config, kind), backend=backend)

    @settings(max_examples=15)
    @given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
    def run(sizes):
        total = sum(sizes)
        sizes = [*sizes, 40 - total] if total <= 40 else [40]
        assert_near(in_chunks(kind, x, made, sizes, backend, AttentionCache(config, kind)), want, 1e-5)

    run()


@pytest.mark.parametrize("backend", ["numba", "torch", "numpy"])
@of_every_kind
@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 15, 16, 17])
def test_prefill_and_a_step_equal_the_longer_prefill(kind, backend, length):
    """Around the ends of windows and of the ring."""
    config = TINY if backend != "torch" else replace(TINY, official=False, top_k=9)
    x, made = hidden_states(1, length + 1, D, seed=length), weights(kind, 2, config)
    cache = AttentionCache(config, kind)
    layer(kind)(x[:, :length], made, cache, backend=backend)
    step = layer(kind)(x[:, length:], made, cache, backend=backend)
    whole = layer(kind)(x, made, AttentionCache(config, kind), backend=backend)
    assert_near(step[:, 0], whole[:, -1], 1e-5)


@of_every_kind
@pytest.mark.parametrize(("dtype", "share"), [("float16", 1e-2), ("bfloat16", 5e-2), ("float64", 1e-6)])
def test_other_dtypes(kind, dtype, share):
    config = replace(TINY, official=False, top_k=9)
    dtype = getattr(torch, dtype)
    made = weights(kind, dtype=dtype)
    if dtype == torch.float64:
        for part in (made, made.compressor, made.indexer and made.indexer.compressor):
            for name in ("attn_sink", "ape", "q_norm", "kv_norm", "norm") if part else ():
                if hasattr(part, name):
                    setattr(part, name, getattr(part, name).double())
    x = hidden_states(2, 30, D, dtype=dtype)
    want = torch.from_numpy(np.array([Spec(kind, made, config)(row) for row in x.double().numpy()]))
    got = in_chunks(kind, x, made, [20, 1, 1, 7, 1], "torch", AttentionCache(config, kind))
    assert got.dtype == dtype
    assert_near(got, want, share)


@of_every_kind
def test_decoding_across_many_turns_of_the_ring(kind):
    x = hidden_states(1, 70, D, seed=3)
    made, want = expected(kind, x)
    assert_near(in_chunks(kind, x, made, [1] * 70, "numba", AttentionCache(TINY, kind)), want)


@of_every_kind
def test_a_short_prompt_after_another_sequence(kind):
    """An earlier sequence must leave nothing in the compressor: the official code forgets to reset it for s < 4."""
    made, x = weights(kind), hidden_states(1, 30, D)
    short = hidden_states(1, 12, D, seed=9)
    cache = AttentionCache(TINY, kind)
    layer(kind)(x, made, cache, backend="numba")
    cache.reset()
    assert cache.position == 0
    assert cache.batch is None
    got = in_chunks(kind, short, made, [3] + [1] * 9, "numba", cache)
    fresh = in_chunks(kind, short, made, [3] + [1] * 9, "numba", AttentionCache(TINY, kind))
    assert torch.equal(got, fresh)


@of_every_kind
def test_another_batch_may_come_after_a_reset(kind):
    made, cache = weights(kind), AttentionCache(TINY, kind)
    layer(kind)(hidden_states(3, 10, D), made, cache)
    cache.reset()
    x = hidden_states(2, 10, D, dtype=torch.float32)
    assert torch.equal(layer(kind)(x, made, cache), layer(kind)(x, made, AttentionCache(TINY, kind)))
    assert cache.batch == 2


@of_every_kind
def test_a_row_of_a_batch_is_the_row_alone(kind):
    made, x = weights(kind), hidden_states(3, 21, D)
    sizes = [10, 1, 4, 1, 1, 4]
    together = in_chunks(kind, x, made, sizes, "numba", AttentionCache(TINY, kind))
    for i in range(3):
        assert torch.equal(
            together[i : i + 1], in_chunks(kind, x[i : i + 1], made, sizes, "numba", AttentionCache(TINY, kind))
        )


@of_every_kind
@pytest.mark.parametrize("layout", ["plain", "fp8"])
def test_beams_may_be_reordered(kind, layout):
    dtype = torch.bfloat16
    made, x = weights(kind, dtype=dtype), hidden_states(3, 22, D, dtype=dtype)
    order = [2, 0, 0, 1]
    cache = AttentionCache(TINY, kind, layout=layout)
    in_chunks(kind, x[:, :13], made, [13], "numba", cache)
    cache.reorder(torch.tensor(order))
    assert cache.batch == 4
    rest = hidden_states(4, 9, D, seed=5, dtype=dtype)
    got = in_chunks(kind, torch.cat([x[order, :13], rest], 1), made, [1, 1, 5, 2], "numba", cache)
    other = AttentionCache(TINY, kind, layout=layout)
    want = in_chunks(kind, torch.cat([x[order, :13], rest], 1), made, [13, 1, 1, 5, 2], "numba", other)
    assert torch.equal(got, want[:, 13:])
    with pytest.raises(ValueError, match="expected sequences 0 to 3"):
        cache.reorder([4])


@pytest.mark.parametrize("backend", ["numba", "torch", "numpy"])
@of_every_kind
def test_the_fp8_layout_loses_nothing(kind, backend):
    dtype = torch.bfloat16
    made, x = weights(kind, dtype=dtype), hidden_states(2, 40, D, dtype=dtype)
    results = []
    for layout in ("plain", "fp8"):
        cache = AttentionCache(TINY, kind, layout=layout, page=5)
        results.append(in_chunks(kind, x, made, [9, 1, 1, 1, 17, 1, 9, 1], backend, cache))
    assert torch.equal(*results)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_the_fp8_layout_is_that_of_584_bytes(library):
    x = torch.randn(2, 70, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 70)[:, None]
    x = x.bfloat16()
    x[:, 3], x[:, 4, :448] = 0, -(2.0**-40)
    still = x[..., :448]
    flagops.fp8_fake_quantize(still, 64, out=still, backend="numpy")
    given_ = x if library == "torch" else as_numpy(x)
    rows = PackedRows(given_, 2, 448, 64, 64, 64)
    rows.reserve(71)
    rows.write(1, given_, "numpy")
    data = rows.data if library == "torch" else as_torch(rows.data)
    size = data.shape[2]
    assert size % 576 == 0
    assert 64 * 584 <= size < 64 * 584 + 576
    codes, scale = flagops.fp8_quantize(still, 64, backend="numpy")
    for entry in (0, 5, 62, 63, 69):
        page, slot = divmod(entry + 1, 64)
        there = data[:, page, 576 * slot : 576 * slot + 576]
        assert torch.equal(there[:, :448], codes[:, entry].view(torch.uint8))
        assert torch.equal(there[:, 448:], x[:, entry, 448:].contiguous().view(torch.uint8))
        scales = data[:, page, 64 * 576 + 8 * slot :][:, :8]
        assert torch.equal(scales[:, :7], scale[:, entry].view(torch.uint8))
        assert not scales[:, 7].any()
    back = rows.all(71, "numpy")
    back = back if library == "torch" else as_torch(back)
    assert torch.equal(back[:, 1:].view(torch.int16), x.view(torch.int16))


def test_numpy_arrays_give_what_tensors_give():
    for kind in KINDS:
        made, x = weights(kind), hidden_states(2, 30, D)
        arrays = copy.deepcopy(made)
        for part in (arrays, arrays.compressor, arrays.indexer, arrays.indexer and arrays.indexer.compressor):
            for name, value in vars(part).items() if part else ():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.numpy())
        cache = AttentionCache(TINY, kind)
        got = [layer(kind)(x.numpy()[:, part], arrays, cache) for part in (slice(0, 29), slice(29, 30))]
        want = in_chunks(kind, x, made, [29, 1], "numba", AttentionCache(TINY, kind))
        assert_near(torch.from_numpy(np.concatenate(got, 1)), want, 1e-6)


@of_every_kind
def test_small_budgets_change_nothing(kind):
    made, x = weights(kind), hidden_states(2, 40, D)
    want = layer(kind)(x, made, AttentionCache(TINY, kind), backend="numba")
    with flagops.using(budget="8KiB"):
        got = layer(kind)(x, made, AttentionCache(TINY, kind), backend="numba")
    assert torch.equal(got, want)


@of_every_kind
def test_room_made_at_once_is_enough(kind):
    made, x = weights(kind), hidden_states(1, 50, D)
    cache = AttentionCache(TINY, kind, max_length=50)
    layer(kind)(x[:, :3], made, cache)
    held = cache.nbytes
    in_chunks(kind, x, made, [10] + [1] * 37, "numba", cache)
    assert cache.nbytes == held
    with pytest.raises(ValueError, match="51 positions, the cache was made for 50"):
        layer(kind)(x[:, :1], made, cache)


@of_every_kind
def test_out_and_empty_calls(kind):
    made, x = weights(kind), hidden_states(2, 9, D)
    cache = AttentionCache(TINY, kind)
    assert layer(kind)(x[:, :0], made, cache).shape == (2, 0, D)
    assert cache.position == 0
    out = torch.empty(2, D, 9).mT
    assert layer(kind)(x, made, cache, 0, out) is out
    assert torch.equal(out, layer(kind)(x, made, AttentionCache(TINY, kind)))


# Against others.


@of_every_kind
def test_names_of_the_checkpoint(kind):
    made = weights(kind)
    tensors = {}

    def name(part, prefix):
        for field, value in vars(part).items():
            if value is None:
                continue
            if hasattr(value, "__dataclass_fields__"):
                name(value, f"{prefix}{field}.")
            else:
                tensors[f"{prefix}{field}" + ("" if field in ("ape", "attn_sink") else ".weight")] = value

    name(made, "layers.3.attn.")
    tensors["layers.3.attn.wq_a.scale"] = torch.ones(1, 1)
    read = AttentionWeights.of_checkpoint(tensors, "layers.3.attn.")
    assert read.wq_a_scale is tensors["layers.3.attn.wq_a.scale"]
    read.wq_a_scale = None
    assert plain(read).keys() == plain(made).keys()
    assert read == made or str(read) == str(made)


TRANSFORMERS = {
    "sliding": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["numba", "torch"])
@of_every_kind
def test_equals_the_layer_of_transformers(kind, backend):
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = modeling.DeepseekV4Config(
        vocab_size=64, hidden_size=D, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=1, qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=8, index_n_heads=16,
        index_head_dim=16, index_topk=3, sliding_window=8, compress_rope_theta=160000.0, rope_theta=10000.0,
        max_position_embeddings=1024, layer_types=[TRANSFORMERS[kind]], attn_implementation="eager",
        compress_rates={TRANSFORMERS["csa"]: 4, TRANSFORMERS["hca"]: 8},
        rope_scaling={"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                      "original_max_position_embeddings": 64},
    )  # fmt: skip
    torch.manual_seed(0)
    attention = modeling.DeepseekV4Attention(config, 0).eval().requires_grad_(False)
    for parameter in attention.parameters():
        noise = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
        parameter.copy_(1 + noise if parameter.dim() == 1 and parameter is not attention.sinks else noise)
    s = 60
    x, positions = torch.randn(2, s, D), torch.arange(s)[None].expand(2, -1)
    rotary = modeling.DeepseekV4RotaryEmbedding(config)
    tables = {name: rotary(x, positions, name) for name in ("main", "compress")}
    far = torch.arange(s)[:, None] - torch.arange(s)
    mask = torch.zeros(s, s).masked_fill((far < 0) | (far >= 8), -torch.inf).expand(2, 1, s, s)
    want = attention(x, tables, positions, mask)[0]
    made = of_transformers(attention)
    shape = AttentionConfig.of_transformers(config)
    assert not shape.official
    got = layer(kind)(x, made, AttentionCache(shape, kind), backend=backend)
    assert_near(got, want)
    steps = in_chunks(kind, x, made, [30, 1, 1, 7, *[1] * 21], backend, AttentionCache(shape, kind))
    assert_near(steps, want)


def of_transformers(attention):
    """The weights of a transformers layer."""

    def inner(part):
        return CompressorWeights(part.kv_proj.weight, part.gate_proj.weight, part.position_bias, part.kv_norm.weight)

    found = AttentionWeights(
        attention.q_a_proj.weight, attention.q_a_norm.weight, attention.q_b_proj.weight, attention.kv_proj.weight,
        attention.kv_norm.weight, attention.o_a_proj.weight, attention.o_b_proj.weight, attention.sinks,
    )  # fmt: skip
    if attention.compressor is not None:
        found.compressor = inner(attention.compressor)
        indexer = getattr(attention.compressor, "indexer", None)
        if indexer is not None:
            proj = indexer.scorer.weights_proj.weight
            found.indexer = IndexerWeights(indexer.q_b_proj.weight, proj, inner(indexer))
    return found


WIDE = AttentionConfig(
    heads=4, head_dim=128, rope_dim=64, groups=2, window=8, csa_ratio=4, hca_ratio=8, index_heads=4, index_dim=128,
    top_k=3, rope_original=64,
)  # fmt: skip


@of_every_kind
def test_projections_in_the_checkpoints_formats(kind):
    """FP8 and packed FP4 weights, against the same weights expanded."""
    made = weights(kind, 0, WIDE, hidden=256, lora=128, rank=128, dtype=torch.bfloat16)
    coded, expanded = copy.copy(made), copy.copy(made)
    for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
        weight = getattr(made, name)
        if name == "wq_b":
            packed, scale = flagops.fp4_quantize(weight, backend="numpy")
            setattr(expanded, name, flagops.fp4_dequantize(packed, scale))
        else:
            blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
            packed, scale = flagops.fp8_quantize(blocks.flatten(2).contiguous(), 128 * 128, backend="numpy")
            packed = packed.view(torch.uint8).view(*blocks.shape).transpose(1, 2).reshape(weight.shape)
            packed, scale = packed.view(torch.float8_e4m3fn), scale.view(torch.uint8)[..., 0].view(torch.float8_e8m0fnu)
            setattr(expanded, name, flagops.fp8_dequantize(packed, scale))
        setattr(coded, name, packed)
        setattr(coded, f"{name}_scale", scale)
    x = hidden_states(1, 30, 256, dtype=torch.bfloat16)
    got = layer(kind)(x, coded, AttentionCache(WIDE, kind), backend="numpy").float()
    fast = layer(kind)(x, coded, AttentionCache(WIDE, kind), backend="torch").float()
    assert (got - fast).norm() < 0.1 * got.norm()
    want = layer(kind)(x, expanded, AttentionCache(WIDE, kind), backend="numpy").float()
    assert (got - want).norm() < 0.15 * want.norm()
    assert not torch.equal(got, want)
