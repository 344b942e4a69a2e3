"""The router, the gated activation and the experts: laws of the specification."""

import ml_dtypes
import numpy as np
import pytest
import torch
from flagops.reference._rounding import round_to
from hypothesis import given
from hypothesis import strategies as st

import flagops
from flagops import arrays, dispatch, registry, testing

GATE, GLU, EXPERTS = (registry.operators()[name].reference for name in ("moe_gate", "swiglu", "moe_experts"))
seeds = st.integers(0, 2**32 - 1)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def layer(rng, t=5, k=3, e=4, d=24, i=16, dtype=np.float32):
    """Arguments of moe_experts with plain weights."""
    ids = np.stack([rng.permutation(e)[:k] for _ in range(t)]).astype(np.int32) if t else np.zeros((0, k), np.int32)
    plain = (normal(rng, e, 2 * i, d, dtype=dtype), normal(rng, e, d, i, dtype=dtype))
    return [normal(rng, t, d, dtype=dtype), normal(rng, t, k), ids, *plain]


def run(name, backend, *inputs):
    """Call a backend on NumPy arrays, through torch where it takes nothing else."""
    given_ = [testing.as_kind(x, testing.kinds_of(backend)[0]) for x in inputs]
    result = getattr(flagops, name)(*given_, backend=backend)
    return tuple(map(arrays.as_numpy, result)) if isinstance(result, tuple) else arrays.as_numpy(result)


@given(seeds)
def test_weights_sum_to_the_scale_and_the_bias_moves_only_the_selection(seed):
    rng = np.random.default_rng(seed)
    x, w, bias = normal(rng, 7, 5), normal(rng, 9, 5), 3 * normal(rng, 9)
    weights, indices = GATE(x, w, bias, top_k=4, scale=1.5)
    testing.assert_near(weights.sum(1), np.full(7, 1.5), 12)  # a score in a sum of 4, and 4 of them summed
    z = x.astype(float) @ w.T.astype(float)
    scores = np.sqrt(np.log1p(np.exp(z)))
    steep = 1 + np.abs(x).astype(float) @ np.abs(w).T.astype(float).max(1, keepdims=True)  # of z in its roundings
    chosen = np.take_along_axis(scores, indices.astype(int), 1)
    testing.assert_near(weights, chosen / chosen.sum(1, keepdims=True) * 1.5, 30, weights * steep)
    biased = np.take_along_axis(scores + bias, indices.astype(int), 1)
    assert (np.diff(biased, axis=1) <= 0).all()
    assert (biased[:, -1:] >= np.sort(scores + bias, axis=1)[:, -4:-3] - 1e-12).all()
    everyone, _ = GATE(x, w, bias, top_k=9)
    expected = np.sort(scores / scores.sum(1, keepdims=True), 1)
    testing.assert_near(np.sort(everyone, 1), expected, 40, expected * steep)


@pytest.mark.drawn
@pytest.mark.operators("moe_gate")
def test_equal_logits_come_in_the_order_of_the_experts(kernel, rng):
    """Whatever their number: loops over vectors and over what is left of them must give them one score."""
    for experts in rng.permutation(np.arange(7, 140))[: 10 if kernel[1] in ("numpy", "triton") else 60]:
        for dtype in (np.float32, np.float64):
            x, w = np.full((3, 1), rng.standard_normal(), dtype), np.ones((experts, 1), dtype)
            _, indices = run("moe_gate", kernel[1], x, w)
            assert indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 3, (experts, x[0, 0])


@pytest.mark.operators("moe_gate")
def test_a_table_selects_by_token_in_its_own_order(kernel, rng):
    x, w = normal(rng, 4, 5), normal(rng, 8, 5)
    table = np.array([[7, 0, 3], [1, 2, 4]], np.int64)
    tokens = np.array([1, 0, 0, 1], np.int32)
    inputs = x, w, normal(rng, 8), table, tokens, 3
    weights, indices = run("moe_gate", kernel[1], *inputs)
    assert (indices == table[tokens]).all()
    testing.assert_of("moe_gate", (weights, indices), *inputs)
    scores = np.sqrt(np.log1p(np.exp(x.astype(float) @ w.T.astype(float))))
    chosen = np.take_along_axis(scores, table[tokens], 1)
    testing.assert_of("moe_gate", ((chosen / chosen.sum(1, keepdims=True)).astype(np.float32), indices), *inputs)


@pytest.mark.operators("moe_gate")
def test_equal_scores_go_to_the_lower_expert_and_vanished_scores_weigh_nothing(kernel):
    x, w = np.ones((2, 4), np.float32), np.zeros((70, 4), np.float32)
    w[[5, 68]] = 1
    weights, indices = run("moe_gate", kernel[1], x, w, None, None, None, 4)
    assert indices.tolist() == [[5, 68, 0, 1]] * 2
    assert weights[0, 0] == weights[0, 1] > weights[0, 2] == weights[0, 3]
    weights, indices = run("moe_gate", kernel[1], x, w - 1000, None, None, None, 4)
    assert not weights.any()
    masked = np.where(np.arange(70) == 9, 0, -np.inf).astype(np.float32)
    _, indices = run("moe_gate", kernel[1], x, w, masked, None, None, 3)
    assert indices.tolist() == [[9, 0, 1]] * 2


@pytest.mark.operators("moe_gate")
def test_a_row_of_nan_still_names_different_experts(kernel):
    x = np.array([[np.nan, 1], [np.inf, -1], [0, 1]], np.float32)
    weights, indices = run("moe_gate", kernel[1], x, np.ones((7, 2), np.float32), None, None, None, 5)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 7 for row in indices.tolist())
    testing.assert_near(weights[2], np.full(5, 0.2), 8)


def test_the_judge_of_the_router_accepts_no_wrong_choice(rng):
    x, w = normal(rng, 3, 6), normal(rng, 8, 6)
    named = {"x": x, "weight": w, "bias": None, "table": None, "tokens": None, "top_k": 3, "scale": 2.0}
    weights, indices = run("moe_gate", "numpy", *named.values())
    op = registry.operator("moe_gate")
    op.judge((weights, indices), named)
    out = np.setdiff1d(np.arange(8), indices[0])[0].astype(np.int32)
    wrong = [(weights, indices[:, ::-1]), (weights[:, ::-1], indices), (weights * np.float32(1.001), indices)]
    wrong += [(weights, np.where(indices == indices[0, 1], out, indices)), (weights, indices * 0)]
    for got in wrong:
        with pytest.raises(AssertionError):
            op.judge(got, named)
    ties = named | {"x": np.zeros_like(x), "weight": np.rint(w)}
    weights, indices = run("moe_gate", "numpy", *ties.values())
    assert indices.tolist() == [[0, 1, 2]] * 3
    with pytest.raises(AssertionError, match="precedes an equal one"):
        op.judge((weights, indices + np.int32(1)), ties)


@pytest.mark.operators("swiglu")
def test_the_clamp_has_no_lower_limit_for_the_gate(kernel):
    edge = np.nextafter(np.float32([10, -10]), np.float32(np.inf))
    gate = np.array([[10, 50, -10, -50, 3, np.inf, edge[0], -100]], np.float32)
    up = np.array([[-50, 10, 50, -10, edge[1], 1, -1, np.inf]], np.float32)
    got = run("swiglu", kernel[1], gate, up, None, 10.0)
    g, u = np.minimum(gate.astype(float), 10), np.clip(up.astype(float), -10, 10)
    for result in (got, (g / (1 + np.exp(-g)) * u).astype(np.float32)):
        testing.assert_of("swiglu", result, gate, up, None, 10.0)
    assert np.isnan(run("swiglu", kernel[1], gate * np.float32(np.nan), up, None, 10.0)).all()
    weight = np.array([-0.5], np.float32)
    assert np.array_equal(run("swiglu", kernel[1], gate, up, weight, 10.0), got * weight)


@given(seeds)
def test_experts_are_their_formula_and_slots_may_be_permuted(seed):
    rng = np.random.default_rng(seed)
    x, weights, ids, gate_up, down = layer(rng)
    expected, magnitude = np.zeros(x.shape), np.zeros(x.shape)
    for t, slot in np.ndindex(*ids.shape):
        g, u = np.split(gate_up[ids[t, slot]].astype(float) @ x[t], 2)
        expected[t] += down[ids[t, slot]] @ (GLU(g, u, None, 1.5).astype(float) * weights[t, slot])
        g, u = np.split(np.abs(gate_up[ids[t, slot]]).astype(float) @ np.abs(x[t]), 2)
        magnitude[t] += np.abs(down[ids[t, slot]]) @ (g * u * np.abs(weights[t, slot]))
    terms = 2 * (2 * 24 + 16 + 10)  # products of 24 twice, a silu no steeper than 1.1, products of 16, on both sides
    testing.assert_near(EXPERTS(x, weights, ids, gate_up, down, limit=1.5), expected, terms, magnitude)
    order = rng.permutation(3)
    permuted = EXPERTS(x, weights[:, order], ids[:, order], gate_up, down, limit=1.5)
    testing.assert_near(permuted, expected, terms, magnitude)


@pytest.mark.operators("moe_experts")
def test_an_id_twice_counts_twice_and_slots_may_be_permuted(kernel, rng):
    x, weights, ids, gate_up, down = layer(rng, t=9, e=5)
    permuted = run("moe_experts", kernel[1], x, weights[:, ::-1].copy(), ids[:, ::-1].copy(), gate_up, down)
    testing.assert_of("moe_experts", permuted, x, weights, ids, gate_up, down)
    doubled = [np.concatenate((y, y), axis=1) for y in (weights, ids)]
    twice = run("moe_experts", kernel[1], x, *doubled, gate_up, down)
    testing.assert_of("moe_experts", twice, x, 2 * weights, ids, gate_up, down)


@pytest.mark.operators("moe_experts")
def test_nothing_to_do(kernel, rng):
    for sizes in ({"t": 0}, {"k": 0}, {"d": 0}, {"i": 0}):
        inputs = layer(rng, **sizes)
        got = run("moe_experts", kernel[1], *inputs)
        assert got.shape == inputs[0].shape
        assert not got.any()
        shared = normal(rng, *got.shape)
        got = run("moe_experts", kernel[1], *inputs, None, None, None, shared)
        assert np.array_equal(got, shared)


@pytest.mark.operators("moe_experts")
def test_what_is_shared_joins_before_the_one_rounding(kernel):
    """The routed part alone would be rounded away from what the sum needs: 256 + 1 + 1 is 258, not 256."""
    one = np.ones((1, 1), ml_dtypes.bfloat16)
    x, weights = 32 * one, np.full((1, 2), 2**-10, np.float32)
    gate_up, down = np.ones((2, 2, 1), ml_dtypes.bfloat16), np.ones((2, 1, 1), ml_dtypes.bfloat16)
    ids = np.array([[1, 0]], np.int32)
    got = run("moe_experts", kernel[1], x, weights, ids, gate_up, down, None, None, None, 256 * one)
    assert got.astype(float).tolist() == [[258]]


def coded(rng, four, t=6, k=2, e=3, d=160, i=96):
    """A layer whose every sum is exact: gates past 32, where silu is the identity, and small whole numbers."""
    x = rng.integers(1, 5, (t, d)).astype(ml_dtypes.bfloat16)
    weights = np.exp2(rng.integers(-3, 1, (t, k))).astype(np.float32)
    ids = np.stack([rng.permutation(e)[:k] for _ in range(t)])
    if four:
        codes = [rng.integers(0, 256, (e, rows, width // 2), dtype=np.uint8) for rows, width in ((2 * i, d), (d, i))]
        codes[0][:, :i] = 0x77
        scales = [rng.integers(126, 129, (e, 2 * i, d // 32)), rng.integers(126, 129, (e, d, i // 32))]
    else:
        values = [rng.integers(-3, 4, (e, rows, width)) for rows, width in ((2 * i, d), (d, i))]
        values[0][:, :i] = 4
        codes = [y.astype(ml_dtypes.float8_e4m3fn) for y in values]
        scales = [rng.integers(126, 129, (e, -(-y.shape[1] // 128), -(-y.shape[2] // 128))) for y in values]
    return x, weights, ids, *codes, *(s.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu) for s in scales), 32.0


@pytest.mark.parametrize("four", (True, False), ids=("FP4", "FP8"))
@pytest.mark.operators("moe_experts")
def test_exact_sums_of_coded_weights_are_equal_bit_for_bit(kernel, four, rng):
    inputs = coded(rng, four)
    expected = round_to(EXPERTS(*inputs), "bfloat16")
    assert np.count_nonzero(expected) > expected.size // 2
    testing.assert_bits(run("moe_experts", kernel[1], *inputs), expected)


def test_coded_experts_round_their_activations():
    """7.25 and 17 become 7 and 16 beside 448; 448 times their sum, 10304, becomes 10240 in units of 32."""
    x = np.zeros((1, 128), np.float32)
    x[0, :3] = 448, 7.25, 17
    eye = np.zeros((1, 2, 128), np.float32)
    eye[0, 0, 0] = eye[0, 1, 1] = 1
    eye[0, 1, 2] = 1
    codes = eye.astype(ml_dtypes.float8_e4m3fn)
    one = np.full((1, 1, 1), 127, np.uint8)
    down = np.ones((1, 128, 1), ml_dtypes.float8_e4m3fn)
    got = EXPERTS(x, np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), codes, down, one, one)
    assert got[0, 0] == 10240
    plain = EXPERTS(x, np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), eye, down.astype(np.float32))
    assert plain[0, 0] == 448 * 24.25


@pytest.mark.operators("moe_experts")
def test_unchecked_ids_never_read_outside(kernel, rng):
    """On a GPU values are not checked by default: a foreign id counts for nothing."""
    name, backend = kernel
    if backend in ("numba", "numpy"):
        pytest.skip("runs on the CPU alone, where ids are always checked")
    x, weights, ids, gate_up, down = map(torch.from_numpy, layer(rng, k=2))
    wild = ids.clone()
    wild[0, 0], wild[2, 1], wild[3, 0] = 4, -1, 2**31 - 1
    out = torch.empty_like(x)
    plan = dispatch.plan(
        registry.operator(name), (x, weights, wild, gate_up, down, None, None, None, None, out), backend
    )
    plan.run(x, weights, wild, gate_up, down, None, None, None, None, out)
    left = weights.masked_fill(wild != ids, 0)
    testing.assert_of("moe_experts", out, x, left, ids, gate_up, down)


@pytest.mark.operators("grouped_matmul")
def test_unchecked_offsets_never_reach_outside(kernel):
    name, backend = kernel
    if backend in ("numba", "numpy"):
        pytest.skip("runs on the CPU alone, where offsets are always checked")
    room = torch.full((9, 3), 7.0)
    a, b, out = torch.ones(5, 4), torch.ones(3, 4, 3), room[2:7]
    wild = torch.tensor([-3, 9, 2], dtype=torch.int32)
    plan = dispatch.plan(registry.operator(name), (a, b, wild, out), backend)
    plan.run(a, b, wild, out)
    assert (room[:2] == 7).all()
    assert (room[7:] == 7).all()


@pytest.mark.operators("grouped_matmul")
def test_a_group_is_a_product_of_its_own(kernel, rng):
    a, b = normal(rng, 9, 33), normal(rng, 4, 33, 17)
    offsets = np.array([2, 2, 7, 8], np.int32)
    got = run("grouped_matmul", kernel[1], a, b, offsets)
    for expert, (start, stop) in enumerate(((0, 2), (2, 2), (2, 7), (7, 8))):
        testing.assert_of("matmul", got[start:stop], a[start:stop], b[expert])
    assert not got[8:].any()


X = torch.zeros(3, 64)
ROUTED = (torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32))
PACKED = (torch.zeros(4, 64, 32, dtype=torch.uint8), torch.zeros(4, 64, 16, dtype=torch.uint8))
BYTES = (torch.ones(4, 64, 2, dtype=torch.uint8), torch.ones(4, 64, 1, dtype=torch.uint8))
BAD = {
    "top_k": (
        lambda: flagops.moe_gate(X, torch.zeros(4, 64), top_k=5),
        ValueError,
        "top_k is 5, but there are 4 experts",
    ),
    "table alone": (
        lambda: flagops.moe_gate(X, torch.zeros(4, 64), None, torch.zeros(2, 2, dtype=torch.int32), top_k=2),
        ValueError,
        "table and tokens go together",
    ),
    "token": (
        lambda: flagops.moe_gate(
            X, torch.zeros(4, 64), None, torch.zeros(2, 2, dtype=torch.int32), torch.tensor([0, 1, 2]), 2
        ),
        ValueError,
        "tokens reaches from 0 to 2, but there are 2 rows",
    ),
    "limit": (
        lambda: flagops.swiglu(X, X, limit=0),
        ValueError,
        "swiglu: limit must be a number above 0 or None, got 0",
    ),
    "offsets": (
        lambda: flagops.grouped_matmul(X, torch.zeros(2, 64, 5), torch.tensor([2, 1])),
        ValueError,
        "got 2 before offsets[1] = 1",
    ),
    "last offset": (
        lambda: flagops.grouped_matmul(X, torch.zeros(2, 64, 5), torch.tensor([2, 4])),
        ValueError,
        "got 4 before the 3 rows of a",
    ),
    "expert": (
        lambda: flagops.moe_experts(X, ROUTED[0], ROUTED[1] + 4, torch.zeros(4, 64, 64), torch.zeros(4, 64, 32)),
        ValueError,
        "moe_experts: indices reach from 4 to 4, but there are 4 experts",
    ),
    "no scale": (
        lambda: flagops.moe_experts(X, *ROUTED, *PACKED),
        ValueError,
        "gate_up_scale is missing: gate_up is uint8",
    ),
    "scale shape": (
        lambda: flagops.moe_experts(X, *ROUTED, *PACKED, BYTES[1], BYTES[1]),
        ValueError,
        "gate_up_scale has shape (4, 64, 1), expected (4, 64, 2)",
    ),
    "scale of plain weights": (
        lambda: flagops.moe_experts(X, *ROUTED, torch.zeros(4, 64, 64), torch.zeros(4, 64, 32), *BYTES),
        ValueError,
        "gate_up_scale belongs to FP8 and FP4 weights, gate_up is float32",
    ),
    "float32 scale": (
        lambda: flagops.moe_experts(X, *ROUTED, *PACKED, *(s.float() for s in BYTES)),
        ValueError,
        "scales of FP4 weights are powers of two",
    ),
    "gradient": (
        lambda: flagops.moe_experts(X.clone().requires_grad_(), *ROUTED, *PACKED, *BYTES, backend="torch"),
        flagops.Unsupported,
        "FP8 and FP4 experts have no backward",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, words = BAD[name]
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)


def test_gradients_do_not_depend_on_the_budget():
    """Runs hold whole experts: the bits are those of all experts at once."""
    torch.manual_seed(0)
    shapes = (40, 24), (40, 3), (9, 26, 24), (9, 24, 13), (40, 24)
    x, weights, gate_up, down, shared = (torch.randn(shape).requires_grad_() for shape in shapes)
    indices, grad = torch.randint(0, 8, (40, 3)), torch.randn(24, 40).T  # the last expert has no rows
    found = []
    for budget in (1 << 28, 1 << 14, 1):
        with flagops.config.using(budget=budget):
            y = flagops.moe_experts(x, weights, indices, gate_up, down, limit=1.5, shared=shared, backend="numba")
            found.append(torch.autograd.grad(y, (x, weights, gate_up, down, shared), grad))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    assert (found[0][2][8] == 0).all()
    assert (found[0][3][8] == 0).all()
