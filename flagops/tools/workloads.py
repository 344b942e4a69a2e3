"""The inputs of named workloads, drawn fast at real sizes, and whether a result of theirs is right."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flagops import arrays, testing
from flagops.errors import Unsupported
from flagops.operator import Operator

if TYPE_CHECKING:
    import torch


def case(op: Operator, workload: str, dtype: str | None = None, sizes: Mapping[str, int] | None = None) -> testing.Case:
    """A named workload of the card, in another dtype and other sizes if given. Raises Unsupported if the operator has
    no such dtype."""
    found = testing.workload(op, workload, sizes=sizes)
    if dtype is None:
        return found
    scalars, dtypes = dict(found.scalars), dict(found.dtypes)
    source = op.result.dtypes
    if isinstance(source, str) and source in op.scalars:
        try:
            scalars[source] = op.scalars[source].parse(dtype)
        except ValueError as error:
            raise Unsupported(f"{op.name}: {source} {error}") from None
    else:
        dtypes = testing.dtypes_near(op, dtype, found.absent)
        if op.result_dtype(dtypes, scalars) != dtype:
            raise Unsupported(f"{op.name} does not run in {dtype}")
    return dataclasses.replace(found, dtypes=tuple(dtypes.items()), scalars=tuple(scalars.items()))


def inputs(
    op: Operator, of: testing.Case, seed: int = 0, device: str = "cpu", hollow: Callable[..., Any] | None = None
) -> list[Any]:
    """The inputs of a case by position, drawn fast: a large tensor repeats one random block of odd length.

    hollow: makes floats and codes instead, of a name, a shape and a dtype, for who looks at integers alone.
    """
    import torch

    dims, dtypes = dict(of.dims), dict(of.dtypes)

    def make(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if hollow and (dtype.is_floating_point or dtype.itemsize == 1):
            return hollow(name, shape, dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        if name == "indices" and "n" in dims:
            return _listed(shape, dims["n"], generator).to(dtype)
        if name == "indices" and dims.get("e", 0) >= shape[1]:  # a router's: no expert twice
            return torch.rand(shape[0], dims["e"], generator=generator).topk(shape[1]).indices.to(dtype)
        if op.tensors[name].draw and dtypes[name] not in arrays.ONE_BYTE:
            return arrays.as_torch(_drawn(op.tensors[name], tuple(shape), dtypes[name], dims, seed))
        x = random_values(shape, dtype, generator)
        return x.abs() if op.aten and dtype.is_floating_point else x  # of which roots and logarithms are numbers

    return [x.to(device) if arrays.is_torch(x) else x for x in made(op, of, make, seed)]


SELECTED = {"sparse_attention": ("indices", "n"), "moe_experts": ("indices", "e"), "moe_gate": ("tokens", "v")}
"""Operators of which an input selects what is read of others: that input, and the axis it selects along."""


def needed(op: Operator, given: Sequence[Any]) -> int:
    """Bytes of the inputs that a call has to read at least: of experts, keys and tables what is selected alone."""
    named = {n: x for n, x in zip(op.inputs, given, strict=True) if arrays.is_torch(x)}
    by, axis = SELECTED.get(op.name, ("", ""))
    if by not in named:
        return sum(x.nbytes for x in named.values())
    apart = named[by].flatten(1) if op.tensors[by].axes.startswith("b ") else named[by].flatten()[None]
    chosen = sum(int((one.unique() >= 0).sum()) for one in apart) / max(len(apart), 1)
    total = 0.0
    for name, x in named.items():
        words = op.tensors[name].axes.split()
        total += x.nbytes * (min(1.0, chosen / x.shape[words.index(axis)]) if axis in words else 1.0)
    return int(total)


def made(op: Operator, of: testing.Case, make: Callable[..., torch.Tensor], seed: int = 0) -> list[Any]:
    """The inputs of a case by position, each tensor by ``make(name, shape, dtype)`` and laid out as the case says."""
    import torch

    dims, dtypes, layouts, scalars = dict(of.dims), dict(of.dtypes), dict(of.layouts), dict(of.scalars)
    found: list[Any] = []
    for name in op.inputs:
        if name in scalars or name in of.absent:
            found.append(scalars.get(name))
            continue
        shape = op.shape(op.tensors[name], dims, of.batch)
        dtype = getattr(torch, dtypes[name])
        if layouts.get(name) == "transposed":
            found.append(make(name, (*shape[:-2], shape[-1], shape[-2]), dtype).mT)  # a weight, rows of it together
        else:
            found.append(make(name, shape, dtype))
    return _fitted(op, found, dims, seed) if op.fit else found


def _fitted(op: Operator, made: Sequence[Any], dims: dict[str, int], seed: int) -> list[Any]:
    import numpy

    assert op.fit
    named = {n: arrays.as_numpy(x) if arrays.is_torch(x) else x for n, x in zip(op.inputs, made, strict=True)}
    before = dict(named)
    op.fit(named, dims, numpy.random.default_rng(seed))
    return [
        x if named[n] is before[n] else None if named[n] is None else arrays.as_torch(named[n])
        for n, x in zip(op.inputs, made, strict=True)
    ]


def _drawn(tensor: Any, shape: tuple[int, ...], dtype: str, dims: dict[str, int], seed: int) -> Any:
    import numpy

    return numpy.asarray(tensor.draw(numpy.random.default_rng(seed), shape, dtype, dims), order="C")


def random_values(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    import torch

    size = math.prod(shape)
    block = min(size, (1 << 23) - 3)
    if dtype.itemsize == 1:
        values = 2 if dtype == torch.bool else 256
        one = torch.randint(0, values, (block,), dtype=torch.uint8, generator=generator)
        if dtype == torch.float8_e4m3fn:
            one[one & 0x7F == 0x7F] = 0  # no NaN
        elif dtype == torch.float8_e8m0fnu:
            one = 119 + one % 16  # scales as a model has them
    else:
        one = torch.randn(block, generator=generator).to(dtype)
    whole = torch.empty(size, dtype=one.dtype)
    for start in range(0, size, max(block, 1)):
        whole[start : start + block] = one[: size - start]
    return whole.view(dtype).view(tuple(shape))


def _listed(shape: Sequence[int], rows: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct rows for each query, as a model lists them: a window that moves with the query, the others scattered."""
    import torch

    queries, k = math.prod(shape[:-1]), shape[-1]
    window = min(128, k)
    start = torch.linspace(0, max(rows - window, 0), queries, dtype=torch.float64).long()[:, None]
    near = start + torch.arange(window)
    scores = torch.rand(queries, rows, generator=generator).scatter_(1, near, -1.0)
    return torch.cat((near, scores.topk(k - window).indices), 1).view(*shape)


class Once:
    """An operator whose reference and bound are computed once, for several results of the same inputs.

    beyond: of the arguments, what roundings add that the operator does not have.
    """

    def __init__(self, op: Operator, beyond: Callable[[Mapping[str, Any]], Any] | None = None) -> None:
        self._op, self._beyond, self._exact, self._bound = op, beyond, None, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def reference(self, *inputs: Any) -> Any:
        if self._exact is None:
            self._exact = self._op.reference(*inputs)
        return self._exact

    def bound(self, *of: Any) -> Any:
        if self._bound is None:
            bound = self._op.bound(*of)
            self._bound = bound + self._beyond(of[1]) if self._beyond else bound
        return self._bound


def verify(op: Operator, given: Sequence[Any], out: Any) -> str:
    """Hold a result to the reference on rows and columns spread over all of it; returns how they matched.

    Raises AssertionError, also where anything is left of the NaN that the output was full of.
    """
    if not op.exact:
        left = sum(int(x.isnan().sum()) for x in op.each(out) if x.is_floating_point() and x.dtype.itemsize > 1)
        assert not left, f"{left} elements are NaN or were not written"
    named = dict(zip(op.inputs, given, strict=True))
    parts = op.each(out)
    if op.separable:
        named, parts = excerpt(op, named, parts)
    held = {n: arrays.as_numpy(x.cpu()) if arrays.is_torch(x) else x for n, x in named.items()}
    got = tuple(arrays.as_numpy(x.cpu()) for x in parts)
    testing.compare(op, held, got if op.several else got[0])
    return "bits" if op.exact else "bound"


def excerpt(
    op: Operator, named: Mapping[str, Any], outs: tuple[torch.Tensor, ...]
) -> tuple[dict[str, Any], tuple[torch.Tensor, ...]]:
    """A smaller call whose results are parts of ``outs``: some rows and, where each is its own sum, columns."""
    out, *others = outs
    words = op.result.axes.split()
    first = next(iter(op.tensors))
    rows = [word for word in words[:-1] if out.ndim >= len(words) or word != "..."]
    coded = {n for n, t in op.tensors.items() if t.codes and arrays.is_torch(named[n])}  # torch selects no rows of FP8
    part = {n: arrays.codes(x) if n in coded else x for n, x in named.items()}
    for word in (*rows, words[-1]):
        if isinstance(op.separable, tuple) and word not in op.separable:
            continue
        if word == words[-1]:
            blocks = any(f"{word}b" in t.axes.split() and part[n] is not None for n, t in op.tensors.items())
            given = any(word in tensor.axes.split() for tensor in op.tensors.values())
            if "*" in word or word in op.tensors[first].axes.split() or blocks or not given:
                continue
            limit = 512
        else:
            limit = 64 if len(rows) == 1 else 8
        axis = words.index(word) - len(words) if word != "..." else -out.ndim
        size = out.shape[axis]
        keep = _spread(size, limit, out.device)
        out = out.index_select(axis, keep)
        for i, tensor in enumerate(list(op.results.values())[1:]):
            axes = tensor.axes.split()
            if word in axes:
                others[i] = others[i].index_select(axes.index(word) - len(axes) if word != "..." else 0, keep)
        for name, tensor in op.tensors.items():
            axes = tensor.axes.split()
            if word in axes and part[name] is not None:
                at = axes.index(word) - len(axes) if word != "..." else len(words) - len(axes) - out.ndim
                if part[name].ndim >= -at and part[name].shape[at] == size:  # else it broadcasts
                    part[name] = part[name].index_select(at, keep)
        if op.name == "fp8_dequantize":  # each row of the excerpt takes the scales of its block along
            height, width = part["block"]
            part |= {"scale": part["scale"].index_select(0, keep // height), "block": (1, width)}
    return part, (out, *others)


def _spread(size: int, limit: int, device: Any) -> torch.Tensor:
    """Up to `limit` indices, one from each equal part, the first and the last among them."""
    import torch

    if size <= limit:
        return torch.arange(size, device=device)
    steps = torch.linspace(0, size - 1, limit, dtype=torch.float64)
    jitter = torch.rand(limit, generator=torch.Generator().manual_seed(size)) * (size / limit)
    steps[1:-1] += jitter[1:-1] - size / limit / 2
    found: torch.Tensor = torch.unique(steps.round().long().clamp(0, size - 1))
    return found.to(device)
