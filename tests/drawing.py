"""One small call of an operator drawn from its card, the same each time."""

import dataclasses
import functools
import itertools
import random

import torch

from flagops import arrays, registry, testing
from flagops.call import of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALL = testing.Scope((3, 2, 5), 1 << 10, 1)


def cases(op):
    """Small cases of a card, the same each time, of ordinary values."""
    for seed in range(1000):
        rng = random.Random(seed)
        case = testing.draw_case(op, lambda options, rng=rng: options[rng.randrange(len(options))], SMALL)
        if case.values in ("normal", "integers") and not far(case):
            yield case


def far(case):
    """Whether a tensor spans gigabytes, which tests that copy its memory would touch."""
    return "far" in dict(case.layouts).values()


def given(case):
    """The inputs of a case by position, as torch tensors."""
    dtypes = dict(case.dtypes)
    return [testing.as_kind(x, "torch", dtypes.get(name)) for name, x in case.arguments().items()]


def drawn(name, backend="torch"):
    """The inputs of a call that a backend takes, torch tensors with elements, by position."""
    op = registry.operator(name)
    for case in cases(op):
        made = given(case)
        if _whole(made) and _taken(op, backend, made):
            return made
    raise AssertionError(f"no call of {name} for {backend} in 1000 draws")


def small_call(name, grad=True, dtype=torch.float64):
    """The inputs of a call in the dtype nearest to this one, other values each time; no result is NaN.

    Optional tensors are there as far as the card draws them together; floats ask for gradients if `grad`.
    """
    op = registry.operator(name)
    case = _small_case(op)
    wanted = str(dtype).removeprefix("torch."), "uint8"  # bytes, since opcheck cannot multiply float8
    dtypes = testing.dtypes_near(op, wanted, case.absent)
    case = dataclasses.replace(case, dtypes=tuple(dtypes.items()), layouts=(), values="normal")
    for _ in range(1000):
        made = given(dataclasses.replace(case, seed=int(torch.randint(2**16, ()))))
        numbers = [x.double() for x in made if isinstance(x, torch.Tensor)]
        results = [x.double() for x in op.each(of(op)(*made, backend="torch"))]
        if all(x.isfinite().all() for x in numbers) and not any(x.isnan().any() for x in results):
            return tuple(
                x.requires_grad_() if grad and isinstance(x, torch.Tensor) and x.dtype in FLOATS else x for x in made
            )
    raise AssertionError(f"nothing of {name} is a number in 1000 calls")


@functools.cache
def _small_case(op):
    """Of the first cases with elements that of the fewest tensors of codes, and so on; of equals the smallest."""

    def key(case):
        coded = sum(dtype in arrays.ONE_BYTE for _, dtype in case.dtypes)
        return coded, len(case.absent), not case.batch, sum(_sizes(given(case)))

    return min(itertools.islice((case for case in cases(op) if _whole(given(case))), 20), key=key)


def _sizes(made):
    return [x.numel() for x in made if isinstance(x, torch.Tensor)]


def _whole(made):
    return all(_sizes(made))


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
