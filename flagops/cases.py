"""What the calls of a card look like: drawn cases, named workloads, memory layouts.

A case is plain data, so whoever chooses it (a seeded generator in ``flagops check``, hypothesis in the tests) the same
numbers come out.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flagops import arrays, registry
from flagops.backends import missing
from flagops.errors import Unsupported
from flagops.layouts import FLIPPED, LAYOUTS, Allocate, Place, heap, put
from flagops.operator import Dims, Operator, Tensor

Array = NDArray[Any]
T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]


@dataclass(frozen=True)
class Scope:
    """How large drawn cases are: sizes of an axis, elementary products in all, and how many examples."""

    sizes: tuple[int, ...]
    volume: int
    examples: int


FULL = Scope((1, 2, 3, 0, 7, 16, 17, 33, 64, 65, 130, 520, 1030), 1 << 20, 100)
INTERPRETED = Scope((1, 2, 3, 0, 16, 17, 33, 130), 1 << 13, 20)
BATCHES = ((), (1,), (3,), (2, 3), (0,), (2, 3, 2), (2, 2, 2, 2), (1, 2, 1, 1, 2), (2, 1, 1, 1, 1, 1))
SHAPES = (
    (), (3,), (2, 3), (0,), (17,), (33,), (5, 33), (2, 3, 2), (130,), (3, 1, 65), (4, 17, 3), (2, 130), (1030,),
    (7, 520), (2, 2, 2, 2), (2, 3, 0), (1, 2, 1, 1, 2), (3, 2050), (2, 1, 1, 1, 1, 33),
)  # fmt: skip
"""Batch axes where a card has no others."""
VALUES = (
    "normal", "large range", "special", "integers", "positive", "cancelling", "extreme", "ties", "sparse", "subnormal",
    "edges", "one special", "spoiled row",
)  # fmt: skip
"""Of all float tensors alike, but for the last: one tensor full or half full of one special value, or with one row that
is no number, which no other row may notice."""
MODES = ("", "", "", "inference", "no gradient", "default float64", "default bfloat16", "autocast")
"""What of torch is switched on around a call: none of it changes what an operator means."""
SPECIAL = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, "max", "-max", "subnormal", "-subnormal", "tiny")


@dataclass(frozen=True)
class Case:
    """One call of an operator: everything that decides its arguments, and nothing else."""

    operator: str
    dims: tuple[tuple[str, int], ...]
    batch: tuple[int, ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    scalars: tuple[tuple[str, Any], ...] = ()
    absent: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()
    values: str = "normal"
    kind: str = "torch"
    budget: int = 256 << 20
    inplace: bool = False
    seed: int = 0
    redrawn: int = 0
    """Other values in the same shapes."""
    mode: str = ""
    """What is switched on around the call, one of `MODES`."""

    def arguments(self) -> dict[str, Any]:
        """The inputs by name, as NumPy arrays in the drawn layouts (absent tensors are None)."""
        return {n: x.view if isinstance(x, Place) else x for n, x in self.places().items()}

    def places(self, allocate: Allocate = heap) -> dict[str, Any]:
        """The inputs by name, each array as the place where it lies."""
        layouts = dict(self.layouts)
        return {
            name: put(x, layouts.get(name, "contiguous"), allocate) if isinstance(x, np.ndarray) else x
            for name, x in self.values_drawn().items()
        }

    def values_drawn(self) -> dict[str, Any]:
        """The inputs by name, before they are laid out."""
        op, dims = registry.operator(self.operator), dict(self.dims)
        dtypes, scalars = dict(self.dtypes), dict(self.scalars)
        odd = self._odd(op, dtypes)
        made: dict[str, Any] = {}
        for name in op.inputs:
            if name in op.scalars:
                made[name] = scalars[name]
            elif name in self.absent:
                made[name] = None
            else:
                rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
                tensor = op.tensors[name]
                shape = op.shape(tensor, dims, self._batch_of(name, rng))
                if self.redrawn:
                    rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), self.redrawn])
                alone = {"one special": "filled", "spoiled row": "spoiled"}.get(self.values)
                values = self.values if not alone else alone if name == odd else "normal"
                made[name] = np.asarray(_draw(rng, tensor, shape, dtypes[name], dims, values))
        if op.fit:
            op.fit(made, dims, np.random.default_rng([self.seed, 1, self.redrawn]))
        return made

    def _odd(self, op: Operator, dtypes: dict[str, str]) -> str | None:
        """The tensor that has the special value, where one has."""
        names = [n for n, dtype in dtypes.items() if dtype in arrays.FLOATS and op.tensors[n].draw is None]
        return names[self.seed % len(names)] if names else None

    def _batch_of(self, name: str, rng: np.random.Generator) -> tuple[int, ...]:
        """The batch axes of one argument; where several have them, some are 1 or left out, to broadcast."""
        op = registry.operator(self.operator)
        if sum(tensor.axes.startswith("...") for tensor in op.tensors.values()) < 2:
            return self.batch
        lead = tuple(1 if rng.random() < 0.3 else size for size in self.batch)
        return lead[rng.integers(0, len(lead) + 1) if rng.random() < 0.3 else 0 :]

    def __str__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return f"Case({', '.join(f'{k}={v!r}' for k, v in fields.items() if v)})"


def parse(text: str) -> Case:
    """A case from what it is printed as. Raises ValueError."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        case = Case(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"{text!r} is no case; one is printed as Case(operator=..., dims=...)") from None
    registry.operator(case.operator)
    return case


def scope(backend: str) -> Scope:
    """The scope for a backend here: Triton's interpreter is slow."""
    return INTERPRETED if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else FULL


def draw_case(
    op: Operator,
    choose: Choose[Any],
    within: Scope = FULL,
    kinds: Sequence[str] = ("torch",),
    fixed: Mapping[str, int] | None = None,
    batch: tuple[int, ...] | None = None,
) -> Case:
    """A case of an operator, every decision made by ``choose(options)``; early options are the simple ones.

    fixed, batch: sizes that are not chosen, of axes by name and of the batch axes; then no whole set of the card's is.
    """
    whole = fixed is None and batch is None
    fixed = fixed or {}
    names = {f for t in op.tensors.values() for w in t.axes.split() if w != "..." for f in w.split("*")}
    ordered = sorted(n for n in names if not n.isdecimal())
    first, room = choose(range(max(1, len(ordered)))), within.volume
    dims: Dims = dict(choose(({}, {}, {}, *op.cases))) if whole else {}
    for name in () if dims else [n for n in ordered if n in fixed] + ordered[first:] + ordered[:first]:
        options = op.sizes.get(name, within.sizes)
        if name not in dims:
            least = (min(options, key=lambda size: size or 1 << 60),)
            dims[name] = fixed[name] if name in fixed else choose(tuple(s for s in options if s <= room) or least)
            room //= max(dims[name], 1)
    batched = any(t.axes.startswith("...") for t in op.tensors.values())
    if batch is None:
        shapes = BATCHES if ordered else tuple(s for s in SHAPES if math.prod(s) <= within.volume)
        batch = choose(shapes) if batched else ()
    scalars: dict[str, Any] = {}
    for name, scalar in op.scalars.items():
        options = scalar.choices({**dims, **scalars}) if callable(scalar.choices) else scalar.choices
        scalars[name] = dims[scalar.axis] if scalar.axis else choose(tuple(options))
    if op.derived:
        dims |= op.derived(dims, scalars)
    absent = tuple(name for name, t in op.tensors.items() if t.optional and choose((False, True)))
    dtypes: dict[str, str] = {}
    for name in op.tensors:
        if name not in absent:
            dtypes[name] = choose(op.dtype_choices(name, dtypes))
    kind = choose(tuple(kinds))
    drawable = {n: d for n, d in dtypes.items() if kind == "torch" or d != "float4_e2m1fn_x2"}
    dtypes |= {n: "uint8" for n in dtypes if n not in drawable}
    layouts = [layout for layout in LAYOUTS if kind == "numpy" or layout not in FLIPPED]
    plain = [layout for layout in layouts if layout != "overlapping"]  # which leaves nothing of what the card draws
    return Case(
        operator=op.name,
        dims=tuple(dims.items()),
        batch=batch,
        dtypes=tuple(dtypes.items()),
        scalars=tuple(scalars.items()),
        absent=absent,
        layouts=tuple(
            (name, choose(tuple(plain if name != "out" and op.tensors[name].draw else layouts)))
            for name in (*dtypes, "out")
        ),
        values=choose(VALUES),
        kind=kind,
        budget=choose((256 << 20, 1 << 16)),
        inplace=bool(op.inplace) and choose((False, True)),
        seed=choose(range(2**16)),
        mode=choose(MODES) if kind == "torch" else "",
    )


def dtypes_near(op: Operator, dtype: str | tuple[str, ...] | None, absent: Sequence[str] = ()) -> dict[str, str]:
    """The dtype of each tensor: the first of those asked for that the card allows there, else the card's own first."""
    wanted = dtype if isinstance(dtype, tuple) else (dtype,)
    dtypes: dict[str, str] = {}
    for tensor in (name for name in op.tensors if name not in absent):
        allowed = op.dtype_choices(tensor, dtypes)
        dtypes[tensor] = next((choice for choice in wanted if choice in allowed), allowed[0])
    return dtypes


def workload(op: Operator, name: str, seed: int = 0, sizes: Mapping[str, int] | None = None) -> Case:
    """A named workload of the card as a case, with other sizes of axes that it names; ``batch`` is the first of its
    batch axes."""
    load = dict(op.workloads[name])
    load |= {axis: size for axis, size in (sizes or {}).items() if type(load.get(axis)) is int}
    if load.get("batch") and sizes and "batch" in sizes:
        load["batch"] = (sizes["batch"], *load["batch"][1:])
    batch, dtype = load.pop("batch", ()), load.pop("dtype", None)
    transposed, absent = load.pop("transposed", None), tuple(load.pop("absent", ()))
    scalars = {n: load.pop(n) for n in op.scalars if n in load}
    dims: Dims = load
    for scalar_name, scalar in op.scalars.items():
        if scalar.axis:
            dims[scalar.axis] = scalars[scalar_name] = scalars.get(scalar_name) or dims[scalar.axis]
        elif scalar_name not in scalars:
            scalars[scalar_name] = (scalar.choices(dims) if callable(scalar.choices) else scalar.choices)[0]
    if op.derived:
        dims |= op.derived(dims, scalars)
    dtypes = dtypes_near(op, dtype, absent)
    if op.aten and "dtype" in scalars and dtype:
        scalars["dtype"] = dtype
    return Case(
        operator=op.name,
        dims=tuple(dims.items()),
        batch=tuple(batch),
        dtypes=tuple(dtypes.items()),
        scalars=tuple(scalars.items()),
        absent=absent,
        layouts=((transposed, "transposed"),) if transposed else (),
        seed=seed,
    )


def _draw(
    rng: np.random.Generator, tensor: Tensor, shape: tuple[int, ...], dtype: str, dims: Dims, values: str
) -> Array:
    if tensor.draw is not None:
        return np.asarray(tensor.draw(rng, shape, dtype, dims))
    numbers = isinstance(tensor.dtypes, tuple) and "int64" in tensor.dtypes
    if dtype in arrays.ONE_BYTE and not numbers:
        code = rng.integers(0, 256, shape, dtype=np.uint8)
        if dtype == "float8_e4m3fn" and values != "special":  # else most sums would be NaN
            code[code & 0x7F == 0x7F] = 0x7E
        return code.view(_numpy_dtype(dtype))
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype in arrays.INTEGERS:
        return _draw_integers(rng, shape, arrays.numpy_dtype(dtype), values)
    if dtype not in arrays.FLOATS:
        raise TypeError(f"the card must say how to draw {dtype}")
    to = arrays.numpy_dtype(dtype)
    if values == "integers":
        return rng.integers(-8, 9, shape).astype(to)
    if values == "ties":
        return (rng.integers(-1, 3, shape) / 2).astype(to)
    if values == "positive":
        return rng.uniform(0.5, 1, shape).astype(to)
    x = rng.standard_normal(shape)
    if values == "large range":
        x *= np.exp2(rng.integers(-12, 6, shape))
    elif values == "extreme":
        x *= rng.choice([30, 300])
    elif values == "subnormal":
        x *= float(_info(dtype).tiny) / 4
    elif values == "edges":
        return _edges(rng, shape, to, dtype)
    elif values == "sparse":
        x[rng.random(shape) < 0.9] = -0.0
    elif values == "cancelling" and shape:
        x[..., 1::2] = np.exp2(-10) * x[..., 1::2] - x[..., : 2 * (shape[-1] // 2) : 2]
    made: Array = np.asarray(x).astype(to)
    if values == "special":
        where = rng.random(shape) < 0.05
        made[where] = _special(dtype)[rng.integers(0, len(SPECIAL), int(where.sum()))]
    elif values == "spoiled" and made.size:
        rows = made.shape[-2] if made.ndim > 1 else made.size
        row = int(rng.choice([0, rows - 1, rows - 1, int(rng.integers(rows))]))
        made[(..., row, slice(None)) if made.ndim > 1 else (row if made.ndim else ...)] = rng.choice(
            np.array([np.nan, np.nan, np.inf, -np.inf], made.dtype)
        )
    elif values == "filled":
        made[rng.random(shape) < rng.choice([0.05, 0.5, 1])] = rng.choice(_special(dtype))
    return made


def _edges(rng: np.random.Generator, shape: tuple[int, ...], to: Any, dtype: str) -> Array:
    """Numbers of few bits over some range, and their nearest neighbours: halfway between numbers of narrower formats,
    at powers of two, where sums of others are ties, or just beside that."""
    reach = min(int(rng.choice([1, 6, 24])), int(_info(dtype).maxexp) - 3)
    made = np.ldexp(
        rng.integers(16, 32, shape) * rng.choice([-1.0, 1.0], shape), rng.integers(-reach, reach, shape) - 4
    )
    made = np.asarray(made).astype(to)
    beside = np.ascontiguousarray(made).reshape(-1).view(f"i{made.itemsize}")  # one more is the next number outwards
    beside += rng.choice([0, 0, 1, -1], beside.shape).astype(beside.dtype)
    return beside.view(to).reshape(shape)


def _draw_integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, values: str) -> Array:
    """Small numbers, some of them the largest there are; what is computed with them may wrap around."""
    info = np.iinfo(dtype)
    made = rng.integers(0 if values == "positive" else max(-8, info.min), 9, shape).astype(dtype)
    if values in ("special", "extreme", "large range"):
        where = rng.random(shape) < 0.2
        made[where] = rng.integers(info.min, info.max, int(where.sum()), dtype, endpoint=True)
    if values in ("special", "filled"):
        made[rng.random(shape) < 0.05] = rng.choice([info.min, info.max])
    return made


def _numpy_dtype(dtype: str) -> Any:
    return np.dtype(np.uint8) if dtype == "float4_e2m1fn_x2" else arrays.numpy_dtype(dtype)


def _info(dtype: str) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(arrays.numpy_dtype(dtype))


def _special(dtype: str) -> Array:
    info = _info(dtype)
    named = {
        "max": info.max,
        "-max": -info.max,
        "subnormal": info.smallest_subnormal,
        "-subnormal": -info.smallest_subnormal,
        "tiny": info.tiny,
    }
    return np.array([named.get(str(v), v) for v in SPECIAL], dtype=arrays.numpy_dtype(dtype))


def as_kind(x: Any, kind: str, dtype: str | None = None) -> Any:
    """A NumPy array as the kind of array that a case asks for, on the same memory."""
    if kind == "numpy" or not isinstance(x, np.ndarray):
        return x
    made = arrays.as_torch(x)
    if dtype == "float4_e2m1fn_x2" and x.dtype == np.uint8:
        import torch

        return made.view(torch.float4_e2m1fn_x2)
    return made


def kinds_of(backend: str) -> list[str]:
    """The kinds of array that a backend takes on the CPU."""
    present = ("numpy",) if missing("torch") else ("torch", "numpy")
    taken = [k for k in present if registry.backend(backend).refuses(as_kind(np.zeros(1, np.float32), k)) is None]
    if not taken:
        raise Unsupported(f"{backend} takes no array on the CPU")
    return taken
