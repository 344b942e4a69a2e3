"""One small call of an operator drawn from its card, the same each time."""

import random

import torch

from flagops import registry, testing
from flagops.call import of

SMALL = testing.Scope((3, 2, 5), 1 << 10, 1)


def drawn(name, backend="torch"):
    """The inputs of a call that a backend takes, torch tensors with elements, by position."""
    op = registry.operator(name)
    for seed in range(1000):
        rng = random.Random(seed)
        case = testing.draw_case(op, lambda options, rng=rng: options[rng.randrange(len(options))], SMALL)
        if case.values not in ("normal", "integers"):
            continue
        dtypes = dict(case.dtypes)
        given = [testing.as_kind(x, "torch", dtypes.get(n)) for n, x in case.arguments().items()]
        if all(x.numel() for x in given if isinstance(x, torch.Tensor)) and _taken(op, backend, given):
            return given
    raise AssertionError(f"no call of {name} for {backend} in 1000 draws")


def _taken(op, backend, given):
    kernel = registry.find(op.name, backend)
    return not (kernel.unsupported and kernel.unsupported(*given))


def tensors(op, given):
    """The tensors of a call: name and position."""
    return [(op.inputs[p], p) for p in op.tensor_positions if given[p] is not None]


def results(op, given, backend=None):
    """Results of a call as a list, bytes where a one-byte format knows no equal."""
    return [plain(x) for x in op.each(of(op)(*given, backend=backend))]


def plain(x):
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def equal(got, expected):
    return all(torch.equal(plain(x).nan_to_num(), plain(y).nan_to_num()) for x, y in zip(got, expected, strict=True))
