"""A caller's mistake is a ValueError or TypeError that names the operator and the argument; no kernel starts."""

import numpy as np
import pytest
import torch

import flagops
from flagops import registry

T = torch.randn
U8 = torch.zeros(4, 32, dtype=torch.uint8)
Q, KV, SINK = T(1, 2, 3, 4), T(1, 5, 4), T(3)
INDICES = torch.zeros(1, 2, 2, dtype=torch.int32)


def attention(q=Q, kv=KV, sink=SINK, indices=INDICES, scale=0.5, **kw):
    return flagops.sparse_attention(q, kv, sink, indices, scale, **kw)


CASES = {
    "rank": (lambda: flagops.matmul(T(3), T(3, 2)), ValueError, "matmul: a has shape (3,), expected at least 2"),
    "rank of weight": (lambda: flagops.linear(T(3), T(2, 2, 3)), ValueError, "linear: weight has shape (2, 2, 3)"),
    "size": (lambda: flagops.matmul(T(3, 4), T(5, 2)), ValueError, "k = 4, got 5"),
    "batch": (lambda: flagops.matmul(T(3, 2, 4), T(2, 4, 2)), ValueError, "matmul: batch axes (2,) of b"),
    "dtype": (lambda: flagops.matmul(T(3, 4), T(4, 2).double()), TypeError, "matmul: b is float64, expected float32"),
    "integers": (lambda: flagops.matmul(U8, U8.T), TypeError, "matmul: a is uint8, expected float16 or"),
    "mixed kinds": (lambda: flagops.matmul(T(3, 4), np.ones((4, 2))), TypeError, "b is a NumPy array but a is a torch"),
    "no array": (lambda: flagops.matmul([[1.0]], T(1, 1)), TypeError, "matmul: a must be a torch tensor or a NumPy"),
    "devices": (lambda: flagops.matmul(T(3, 4), T(4, 2, device="meta")), ValueError, "b is on meta but a is on cpu"),
    "missing": (lambda: flagops.matmul(T(3, 4)), TypeError, "missing a required argument: 'b'"),
    "unknown": (lambda: flagops.matmul(T(3, 4), T(4, 2), c=1), TypeError, "unexpected keyword argument 'c'"),
    "twice": (lambda: flagops.matmul(T(3, 4), T(4, 2), a=T(1, 1)), TypeError, "multiple values for argument 'a'"),
    "too many": (lambda: flagops.matmul(T(3, 4), T(4, 2), None, 1), TypeError, "too many positional arguments"),
    "bias": (lambda: flagops.linear(T(3, 4), T(2, 4), T(3)), ValueError, "linear: bias has shape (3,)"),
    "out shape": (
        lambda: flagops.matmul(T(3, 4), T(4, 2), out=T(2, 3)),
        ValueError,
        "out has shape (2, 3), expected (3, 2)",
    ),
    "out dtype": (lambda: flagops.matmul(T(3, 4), T(4, 2), out=T(3, 2).half()), TypeError, "out is float16"),
    "out kind": (
        lambda: flagops.matmul(T(3, 4), T(4, 2), out=np.ones((3, 2))),
        TypeError,
        "out must be a torch tensor",
    ),
    "out expanded": (
        lambda: flagops.matmul(T(3, 4), T(4, 2), out=T(1, 2).expand(3, 2)),
        ValueError,
        "stride of 0",
    ),
    "K": (
        lambda: flagops.fp4_dequantize(U8[:, :24], U8[:, :2]),
        ValueError,
        "fp4_dequantize: packed has shape (4, 24), expected [r, 16*g] with 16*g = a multiple of 16",
    ),
    "scale size": (lambda: flagops.fp4_dequantize(U8, U8[:, :1]), ValueError, "fp4_dequantize: scale has shape (4, 1)"),
    "scale dtype": (lambda: flagops.fp4_dequantize(U8, T(4, 2)), TypeError, "scale is float32"),
    "output dtype": (lambda: flagops.fp4_dequantize(U8, U8[:, :2], "float64"), ValueError, "dtype must be bfloat16"),
    "no dtype": (lambda: flagops.fp4_dequantize(U8, U8[:, :2], 7), TypeError, "fp4_dequantize: dtype must be a dtype"),
    "blocks": (
        lambda: flagops.fp8_dequantize(U8, U8[:2, :1]),
        ValueError,
        "fp8_dequantize: scale has shape (2, 1), expected (1, 1)",
    ),
    "block": (
        lambda: flagops.fp8_dequantize(U8, U8[:1, :1], (0, 1)),
        ValueError,
        "block must be a whole number",
    ),
    "no block": (lambda: flagops.fp8_dequantize(U8, U8[:1, :1], 128), TypeError, "block must be two whole numbers"),
    "fnuz": (
        lambda: flagops.fp8_dequantize(U8.view(torch.float8_e4m3fnuz), U8[:1, :1]),
        TypeError,
        "weight is float8_e4m3fnuz",
    ),
    "heads": (
        lambda: flagops.grouped_output_projection(T(2, 6, 4), T(8, 12), T(3, 8), 4),
        ValueError,
        "o has shape (2, 6, 4), expected [..., g*p, c] with g*p = a multiple of 4, got 6",
    ),
    "groups": (
        lambda: flagops.grouped_output_projection(T(2, 6, 4), T(8, 12), T(3, 8), 0),
        ValueError,
        "groups must be a whole number of at least 1",
    ),
    "high index": (lambda: attention(indices=INDICES + 5), ValueError, "sparse_attention: indices reach from 5 to 5"),
    "low index": (lambda: attention(indices=INDICES - 2), ValueError, "sparse_attention: indices reach from -2"),
    "index dtype": (
        lambda: attention(indices=INDICES.float()),
        TypeError,
        "indices is float32, expected int32 or int64",
    ),
    "sink dtype": (lambda: attention(sink=SINK.half()), TypeError, "sink is float16, expected float32"),
    "sink size": (lambda: attention(sink=T(4)), ValueError, "sparse_attention: sink has shape (4,)"),
    "scale": (lambda: attention(scale=float("nan")), ValueError, "scale must be a finite number"),
    "no scale": (lambda: attention(scale="big"), TypeError, "scale must be a number, got"),
    "backend": (lambda: flagops.matmul(T(3, 4), T(4, 2), backend="nunba"), ValueError, "did you mean 'numba'"),
    "attribute": (lambda: flagops.matmull, AttributeError, "did you mean 'matmul'"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, kind, words = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("backend", ["numba", "torch", "numpy"])
def test_out_must_not_share_memory_with_an_input(backend):
    a = T(4, 4)
    for out in (a, a.T, a[:, :]):
        with pytest.raises(ValueError, match="out shares memory with"):
            flagops.matmul(a, T(4, 4), out=out, backend=backend)
    room = T(40)
    flagops.matmul(room[:16].view(4, 4), T(4, 4), out=room[16:32].view(4, 4), backend=backend)
    with pytest.raises(ValueError, match="out shares memory with a"):
        flagops.matmul(room[:16].view(4, 4), T(4, 4), out=room[15:31].view(4, 4), backend=backend)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_an_array_without_elements_shares_no_memory_wherever_it_lies(make):
    room = make(64)
    for start in range(64):
        a, b = room[:0].reshape(4, 0), room[start:start].reshape(0, 4)
        if make is np.zeros:
            a, b = a[:, ::-1], np.lib.stride_tricks.as_strided(room[start:], (0, 4), (16, -4))[:, ::-1]
        assert (flagops.matmul(a, b, out=room[8:24].reshape(4, 4)) == 0).all()
    empty = room[8:8].reshape(0, 4)
    flagops.matmul(empty, room[:16].reshape(4, 4), out=room[12:12].reshape(0, 4))


def test_read_only_output_is_refused():
    out = np.zeros((3, 2))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        flagops.matmul(np.ones((3, 4)), np.ones((4, 2)), out=out)


@pytest.mark.operators("sparse_attention")
def test_unchecked_indices_never_read_outside(kernel):
    """On a GPU values are not checked by default: kernels must count a wild index as absent."""
    op, backend = registry.operator(kernel[0]), kernel[1]
    from flagops import dispatch

    q, kv = T(1, 2, 3, 4), T(1, 5, 4)
    wild = torch.tensor([[[0, 5, 2**31 - 1], [-2, -(2**31), 3]]], dtype=torch.int32)
    tame = torch.where((wild < 5) & (wild >= 0), wild, -1)
    out = torch.empty_like(q)
    plan = dispatch.plan(op, (q, kv, None, wild, 0.5, out), backend)
    plan.run(q, kv, None, wild, 0.5, out)
    expected = flagops.sparse_attention(q, kv, None, tame, 0.5, backend=backend)
    assert torch.equal(out, expected)


def test_memory_flags_of_a_tensor_are_honoured():
    z = torch.randn(4, 4, dtype=torch.complex64)
    negative = z.conj().imag  # a view with the neg bit: its memory holds the opposite sign
    assert negative.is_neg()
    for backend in ("numba", "torch", "numpy"):
        got = flagops.matmul(negative, torch.eye(4), backend=backend)
        assert torch.equal(got, -z.imag), backend
