"""The card of an operator: what its arguments are, what it means, and what every kernel of it is held to.

A card is a NumPy function in ``reference/`` under the `operator` decorator. Binding, validation, the drawn test cases,
the benchmarks, the coverage table, the torch schema and the type stubs are all derived from it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flagops.arrays import dtype_name, is_number, is_numpy, is_torch

Dims = dict[str, int]


@dataclass(frozen=True)
class Tensor:
    """A tensor argument.

    axes: one word per axis, each a product of names and numbers (``"g*p c"``); a leading ``...`` stands for batch axes.
    dtypes: the names allowed, the name of the argument whose dtype it shares, or a function of the dtypes so far. Of a
        result: the name of the tensor or scalar that gives it, a function of the dtypes, or a tuple of its one dtype.
    codes: the kernel gets the bytes of a one-byte format as uint8.
    draw: test values, ``draw(rng, shape, dtype, dims)``; standard normal or random bytes if not given.
    """

    axes: str
    dtypes: tuple[str, ...] | str | Callable[[Mapping[str, str]], tuple[str, ...]]
    optional: bool = False
    codes: bool = False
    draw: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Scalar:
    """An argument that is no tensor.

    parse: checks and normalises; raises ValueError or TypeError saying what was expected.
    choices: what tests draw from, a sequence or a function of the dimensions and of the scalars before it.
    axis: the dimension that the value gives, if it is one.
    """

    parse: Callable[[Any], Any]
    choices: Sequence[Any] | Callable[[Dims], Sequence[Any]]
    axis: str | None = None
    torch: str = "float"

    def read(self, name: str, value: Any) -> Any:
        """The value, checked; what is wrong with it is said of `name`."""
        try:
            return self.parse(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} {error}") from None


@dataclass(frozen=True)
class Bound:
    """A call whose arguments fit together: its dimensions and what the result will be."""

    dims: Dims
    batch: tuple[int, ...]
    dtypes: Mapping[str, str]
    scalars: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.shapes[0]

    @property
    def dtype(self) -> str:
        """The dtype of the first result."""
        return self.results[0]


@dataclass(eq=False)
class Operator:
    """See `operator`; `flagops.call.of` gives the function that users call.

    function: the name of its reference and its kernels, of which `name` is what the world calls it.
    """

    name: str
    family: str
    reference: Callable[..., Any]
    tensors: dict[str, Tensor]
    scalars: dict[str, Scalar]
    results: dict[str, Tensor]
    workloads: dict[str, dict[str, Any]]
    flops: Callable[..., float]
    several: bool = False
    inplace: Mapping[str, str] = field(default_factory=dict)
    separable: bool | tuple[str, ...] = True
    exact: bool = False
    integral: bool = False
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    cases: Sequence[Dims] = ()
    most: Mapping[str, int] = field(default_factory=dict)
    derived: Callable[[Dims, Mapping[str, Any]], Dims] | None = None
    check: Callable[[Dims, Mapping[str, Any]], str | None] | None = None
    fit: Callable[[dict[str, Any], Dims, Any], None] | None = None
    within: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        inputs = list(inspect.signature(self.reference).parameters.values())
        out = inspect.Parameter("out", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        self.signature = inspect.Signature([*inputs, out])
        self.parameters = tuple(self.signature.parameters)
        self.inputs = self.parameters[:-1]
        if set(self.inputs) != {*self.tensors, *self.scalars}:
            raise TypeError(f"{self.name}: the card must describe every parameter of the reference")
        self.positions = {name: i for i, name in enumerate(self.parameters)}
        self.tensor_positions = tuple(self.positions[name] for name in self.tensors)
        self.scalar_positions = tuple(self.positions[name] for name in self.scalars)
        self.coded_results = tuple(i for i, tensor in enumerate(self.results.values()) if tensor.codes)
        self.aliases = tuple(self.positions.get(self.inplace.get(name, ""), -1) for name in self.results)
        self.defaults = tuple(p.default for p in self.signature.parameters.values())
        self.required = self.defaults.count(inspect.Parameter.empty)

    @property
    def result(self) -> Tensor:
        """The first result, in most operators the only one."""
        return next(iter(self.results.values()))

    @property
    def function(self) -> str:
        return self.reference.__name__

    @property
    def aten(self) -> bool:
        """Whether it stands under torch's own operators, below autograd."""
        return self.name.startswith("aten.")

    @functools.cached_property
    def bound(self) -> Callable[..., Any]:
        """``f_bound(exact, arguments, dtype)``: how far a kernel's result may lie from the exact one."""
        return self.within or self._beside("bound")  # type: ignore[return-value]

    @functools.cached_property
    def judge(self) -> Callable[..., None] | None:
        """``f_judge(got, arguments)``: raises AssertionError for a wrong result, where distance says nothing."""
        return self._beside("judge")

    @functools.cached_property
    def values(self) -> Callable[..., str | None] | None:
        """``f_values(*inputs)``: what is wrong with the values of the inputs, or None."""
        return self._beside("values")

    @functools.cached_property
    def astray(self) -> Callable[..., tuple[str, tuple[int, ...]]] | None:
        """``f_astray(*inputs)``: a tensor of indices, and some that are out of range, where kernels look themselves."""
        return self._beside("astray")

    @functools.cached_property
    def rounded(self) -> Callable[..., Any]:
        """The reference, with intermediates rounded where the specification says so."""
        return self._beside("rounded") or self.reference

    def _beside(self, suffix: str) -> Callable[..., Any] | None:
        return getattr(sys.modules[self.reference.__module__], f"{self.function}_{suffix}", None)

    def fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, defaults filled in; Python's own TypeError for a call that does not fit."""
        if len(args) <= len(self.defaults):
            values = [*args, *self.defaults[len(args) :]]
            missing = max(self.required - len(args), 0)
            for name, value in kwargs.items():
                position = self.positions.get(name, -1)
                if position < len(args):
                    break
                values[position] = value
                missing -= position < self.required
            else:
                if not missing:
                    return tuple(values)
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}() {error}; its signature is {self.name}{self.signature}") from None
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    def bind(self, args: Sequence[Any]) -> Bound:
        """Check that the arguments fit the card and each other. Raises TypeError or ValueError with the argument."""
        present = self._arrays(args)
        dtypes = self._dtypes(present)
        dims: Dims = {}
        scalars = []
        for name, scalar in self.scalars.items():
            value = scalar.read(f"{self.name}: {name}", args[self.positions[name]])
            scalars.append(value)
            if scalar.axis:
                dims[scalar.axis] = value
        batch = self._solve({name: tuple(x.shape) for name, x in present.items()}, dims)
        if self.check:
            named = dict(zip(self.parameters, args, strict=True)) | dict(zip(self.scalars, scalars, strict=True))
            problem = self.check(dims, named)
            if problem:
                raise ValueError(f"{self.name}: {problem}")
        by_name = dict(zip(self.scalars, scalars, strict=True))
        if self.derived:
            dims |= {name: size for name, size in self.derived(dims, by_name).items() if name not in dims}
        shapes = tuple(self.shape(tensor, dims, batch) for tensor in self.results.values())
        results = tuple(self.result_dtype(dtypes, by_name, tensor) for tensor in self.results.values())
        self._check_outs(args[-1], present, shapes, results)
        return Bound(dims, batch, dtypes, tuple(scalars), shapes, results)

    def shape(self, tensor: Tensor, dims: Dims, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of the card for given dimensions."""
        words = tensor.axes.split()
        lead = batch if words[:1] == ["..."] else ()
        return (*lead, *(_product(word, dims) for word in words if word != "..."))

    def result_dtype(self, dtypes: Mapping[str, str], scalars: Mapping[str, Any], result: Tensor | None = None) -> str:
        """The dtype of a result, of the first if none is given, from those of the tensors and the scalars."""
        source = (result or self.result).dtypes
        if callable(source):
            source = source(dtypes)
        if not isinstance(source, str):
            (dtype,) = source
            return dtype
        return dtypes[source] if source in dtypes else str(scalars[source])

    def like(self, inputs: Sequence[Any]) -> Any:
        """The first tensor that a call has, which others are made like."""
        return next(inputs[p] for p in self.tensor_positions if inputs[p] is not None)

    def each(self, value: Any) -> tuple[Any, ...]:
        """What an operator takes or gives as results, as a tuple also where there is only one."""
        return tuple(value) if self.several else (value,)

    def dtype_choices(self, name: str, dtypes: Mapping[str, str]) -> tuple[str, ...]:
        """The dtypes that an argument may have, given those of the arguments before it."""
        allowed = self.tensors[name].dtypes
        if isinstance(allowed, str):
            return (dtypes[allowed],)
        return allowed(dtypes) if callable(allowed) else allowed

    def _arrays(self, args: Sequence[Any]) -> dict[str, Any]:
        present: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            x = args[self.positions[name]]
            if x is None and tensor.optional:
                continue
            if not (is_torch(x) or is_numpy(x)):
                raise TypeError(f"{self.name}: {name} must be a torch tensor or a NumPy array, got {_kind(x)}")
            present[name] = x
        first, *others = present
        for name in others:
            if is_torch(present[name]) != is_torch(present[first]):
                raise TypeError(
                    f"{self.name}: {name} is a {_kind(present[name])} but {first} is a {_kind(present[first])}; "
                    "the arguments of one call are all torch tensors or all NumPy arrays"
                )
            if self.aten and is_torch(present[name]) and is_number(present[name]) | is_number(present[first]):
                continue  # as torch has it
            if is_torch(present[name]) and present[name].device != present[first].device:
                raise ValueError(
                    f"{self.name}: {name} is on {present[name].device} but {first} is on {present[first].device}; "
                    "all tensors must be on one device"
                )
        return present

    def _dtypes(self, present: Mapping[str, Any]) -> dict[str, str]:
        dtypes: dict[str, str] = {}
        for name, x in present.items():
            allowed = self.dtype_choices(name, dtypes)
            if dtype_name(x) not in allowed:
                source = self.tensors[name].dtypes
                like = f" like {source}" if isinstance(source, str) else ""
                raise TypeError(f"{self.name}: {name} is {dtype_name(x)}, expected {' or '.join(allowed)}{like}")
            dtypes[name] = dtype_name(x)
        return dtypes

    def _solve(self, shapes: Mapping[str, tuple[int, ...]], dims: Dims) -> tuple[int, ...]:
        batch: tuple[int, ...] = ()
        equations = []
        for name, shape in shapes.items():
            words = self.tensors[name].axes.split()
            axes = [word for word in words if word != "..."]
            if len(shape) < len(axes) or (len(shape) > len(axes) and words[:1] != ["..."]):
                rank = f"at least {len(axes)}" if words[:1] == ["..."] else str(len(axes))
                raise ValueError(
                    f"{self.name}: {name} has shape {shape}, expected {rank} dimensions [{', '.join(words)}]"
                )
            lead = shape[: len(shape) - len(axes)]
            try:
                batch = _broadcast(batch, lead)
            except ValueError:
                raise ValueError(f"{self.name}: batch axes {lead} of {name} do not broadcast with {batch}") from None
            equations += [(name, shape, word, size) for word, size in zip(axes, shape[len(lead) :], strict=True)]
        while equations:
            deferred = []
            for name, shape, word, size in equations:
                known = math.prod(int(f) if f.isdecimal() else dims.get(f, 1) for f in word.split("*"))
                unknown = [f for f in word.split("*") if not f.isdecimal() and f not in dims]
                if len(unknown) > 1:
                    deferred.append((name, shape, word, size))
                    continue
                if (size % known if known else size) if unknown else size != known:
                    want = f"a multiple of {known}" if unknown else f"{known}"
                    wanted = ", ".join(self.tensors[name].axes.split())
                    raise ValueError(
                        f"{self.name}: {name} has shape {shape}, expected [{wanted}] with {word} = {want}, got {size}"
                    )
                if unknown:
                    dims[unknown[0]] = size // known if known else 0
            if len(deferred) == len(equations):
                raise ValueError(f"{self.name}: the shapes {dict(shapes)} leave {deferred[0][2]} open")
            equations = deferred
        return batch

    def _check_outs(
        self, out: Any, present: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]
    ) -> None:
        if out is None:
            return
        if self.several and (not isinstance(out, (tuple, list)) or len(out) != len(shapes)):
            got = f"{len(out)}" if isinstance(out, (tuple, list)) else f"a {_kind(out)}"
            raise TypeError(f"{self.name}: out must be {len(shapes)} arrays ({', '.join(self.results)}), got {got}")
        for one, shape, dtype in zip(self.each(out), shapes, dtypes, strict=True):
            self._check_out(one, present, shape, dtype)

    def _check_out(self, out: Any, present: Mapping[str, Any], shape: tuple[int, ...], dtype: str) -> None:
        like = next((x for x in present.values() if is_torch(x) and not is_number(x)), next(iter(present.values())))
        if is_torch(out) != is_torch(like) or not (is_torch(out) or is_numpy(out)):
            raise TypeError(f"{self.name}: out must be a {_kind(like)} like the inputs, got {_kind(out)}")
        if is_torch(out) and out.device != like.device and not (self.aten and is_number(like)):
            raise ValueError(f"{self.name}: out is on {out.device}, expected {like.device}")
        if dtype_name(out) != dtype:
            raise TypeError(f"{self.name}: out is {dtype_name(out)}, expected {dtype}")
        if tuple(out.shape) != shape:
            raise ValueError(f"{self.name}: out has shape {tuple(out.shape)}, expected {shape}")
        if is_numpy(out) and not out.flags.writeable:
            raise ValueError(f"{self.name}: out is read-only")
        steps = out.stride() if is_torch(out) else out.strides
        if 0 not in shape and any(step == 0 and size > 1 for step, size in zip(steps, shape, strict=True)):
            raise ValueError(f"{self.name}: out has a stride of 0 over more than one element, it cannot be written")


def operator(
    *,
    tensors: dict[str, Tensor],
    result: Tensor | dict[str, Tensor],
    workloads: dict[str, dict[str, Any]],
    flops: Callable[..., float],
    scalars: dict[str, Scalar] | None = None,
    inplace: Mapping[str, str] | None = None,
    separable: bool | tuple[str, ...] = True,
    exact: bool = False,
    integral: bool = False,
    sizes: Mapping[str, Sequence[int]] | None = None,
    cases: Sequence[Dims] = (),
    most: Mapping[str, int] | None = None,
    derived: Callable[[Dims, Mapping[str, Any]], Dims] | None = None,
    check: Callable[[Dims, Mapping[str, Any]], str | None] | None = None,
    fit: Callable[[dict[str, Any], Dims, Any], None] | None = None,
    within: Callable[..., Any] | None = None,
    name: str = "",
) -> Callable[[Callable[..., Any]], Operator]:
    """Make a NumPy function the reference of an operator of its own name, which then also takes ``out=None``.

    tensors, result, scalars: the arguments and the result, see `Tensor` and `Scalar`. An operator with several results
        names them in a dict; its reference returns a tuple, and ``out`` is one.
    workloads: dimensions (and dtypes, scalars) at real model sizes by name, for benchmarks and the default order.
    flops: useful floating-point operations, ``flops(dims, batch)``.
    inplace: results by name (``"out"`` if there is one) that may be given as the very tensor of an input, by name.
    separable: along which axes, by word, a part of the result is the result of that part of the inputs; True for all,
        False for none. A benchmark verifies such a part of a workload.
    exact: kernels must agree bit for bit; else beside ``f`` stands ``f_bound(exact, arguments, dtype)``, of several
        results a tuple of bounds for the tuple of exact values and of dtypes, None where bits must agree.
    integral: on small integers, whose sums are exact in any order, kernels must give the rounded reference itself.
    sizes: what tests draw for a dimension, where the general choice would not do.
    cases: whole sets of dimensions that tests draw besides, for what small ones do not reach.
    most: the largest size of a dimension that the reference or its bound can serve.
    derived: dimensions that follow from others and the scalars, ``derived(dims, scalars)``.
    check: what the axes cannot say, ``check(dims, arguments) -> problem | None``; metadata only.
    name: what the operator is called where its function cannot be, as ``"aten.add"``.
    within: the bound, where it follows from the operator's family and no ``f_bound`` stands beside it.
    fit: makes drawn arguments fit each other where the axes cannot say how, ``fit(arguments, dims, rng)``, in place.

    Beside ``f`` its module may hold ``f_rounded`` (the reference with the roundings of intermediates that the
    specification asks for), ``f_values(*inputs) -> problem | None`` (checks of values), ``f_astray(*inputs)`` (what
    kernels raise an IndexError for: the name of a tensor and values out of range) and ``f_judge(got, arguments)``,
    which raises AssertionError for a wrong result where no distance can tell, as for indices; it replaces the bound.
    """

    def declare(reference: Callable[..., Any]) -> Operator:
        return Operator(
            name=name or reference.__name__,
            family=reference.__module__.rpartition(".")[2],
            reference=reference,
            tensors=tensors,
            scalars=scalars or {},
            results=result if isinstance(result, dict) else {"out": result},
            workloads=workloads,
            flops=flops,
            several=isinstance(result, dict),
            inplace=inplace or {},
            separable=separable,
            exact=exact,
            integral=integral,
            sizes=sizes or {},
            cases=cases,
            most=most or {},
            derived=derived,
            check=check,
            fit=fit,
            within=within,
        )

    return declare


def _product(word: str, dims: Dims) -> int:
    return math.prod(int(f) if f.isdecimal() else dims[f] for f in word.split("*"))


def _broadcast(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
    width = max(len(one), len(two))
    pairs = list(zip((1,) * (width - len(one)) + one, (1,) * (width - len(two)) + two, strict=True))
    if any(x != y and 1 not in (x, y) for x, y in pairs):
        raise ValueError("not broadcastable")
    return tuple(y if x == 1 else x for x, y in pairs)


def _kind(x: Any) -> str:
    return "torch tensor" if is_torch(x) else "NumPy array" if is_numpy(x) else type(x).__name__
