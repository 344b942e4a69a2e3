"""Random calls of torch's operators, and torch's own results to hold ours to."""

import torch

import flagops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def compared(form, draws, ops, backend="numba"):
    """Results of flagops' kernels beside torch's own, which are computed while nothing is replaced; nothing is left."""
    calls = [form(draw) for draw in draws]
    expected = [function(*given) for function, given in calls]
    before = [[x.clone() for x in given] for _, given in calls]
    with flagops.enable(ops, backend=backend) as handle:
        got = [function(*given) for function, given in calls]
        left = {(row.op, reason) for row in handle.report().rows for reason in row.passed}
    assert left == set()
    for (_, given), kept in zip(calls, before, strict=True):
        assert all(torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip(given, kept, strict=True))
    for one, other in zip(got, expected, strict=True):
        yield from zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]


class Draw:
    """Tensors in any layout; whole numbers, of which sums are exact in every order."""

    def __init__(self, rng, dtype):
        self.rng, self.dtype = rng, dtype

    def number(self, least, most):
        return int(self.rng.integers(least, most + 1))

    def shape(self, least=0, most=4):
        return tuple(self.number(1, 5) for _ in range(self.number(least, most)))

    def laid(self, x):
        """The elements of a tensor in another layout."""
        how = self.number(0, 3)
        if how == 1 and x.dim():
            order = self.rng.permutation(x.dim()).tolist()
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
        if how == 2 and x.dim():
            return torch.stack((x, x), -1).flatten(-2)[..., ::2]
        return x

    def tensor(self, *shape, dtype=None):
        dtype = dtype or self.dtype
        values = torch.as_tensor(self.rng.integers(0 if dtype in (torch.uint8, torch.bool) else -4, 5, shape))
        return self.laid((values > 1) if dtype == torch.bool else values.to(dtype))

    def index(self, size, *shape, signed=False, dtype=torch.int64):
        return self.laid(torch.as_tensor(self.rng.integers(-size if signed else 0, size, shape)).to(dtype))

    def distinct(self, size, count):
        return torch.from_numpy(self.rng.permutation(size)[:count])
