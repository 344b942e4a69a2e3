"""The calls of PyTorch's samples (OpInfo) in many layouts and forms, and all that can be seen of what they give."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from opinfo_own import OWN
from torch.testing._internal import common_methods_invocations
from torch.utils._pytree import tree_leaves, tree_map


@functools.cache
def infos() -> dict[str, Any]:
    foreach = (x for name, x in vars(common_methods_invocations).items() if name.startswith("foreach_"))
    found = [*common_methods_invocations.op_db, *OWN, *(op for x in foreach if isinstance(x, list) for op in x)]
    return {f"{op.name}.{op.variant_test_name}".rstrip("."): op for op in found if hasattr(op, "sample_inputs")}


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1)[..., 0] if x.dim() else x


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def offset(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape) if x.dim() and len(x) > 1 else x


LAYOUTS = {"not contiguous": strided, "transposed": transposed, "offset": offset, "expanded": expanded}


@dataclass(frozen=True)
class Room:
    """Where a call runs: on which device, in one dtype instead of its floats, with floats moved by their last place."""

    device: str = "cpu"
    floats: torch.dtype | None = None
    moved: int = 0

    def memory(self, x: torch.Tensor) -> torch.Tensor:
        """All of the memory in which a tensor lies, copied."""
        storage = x.untyped_storage()
        memory = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.element_size(),)).clone()
        if x.is_floating_point() and self.moved:
            narrow = x.dtype.itemsize == 2 or self.floats == torch.float32
            unit = torch.finfo(torch.float32 if narrow else x.dtype).eps
            signs = torch.randint(0, 2, memory.shape, generator=torch.Generator().manual_seed(self.moved))
            memory = memory.double() * (1 + unit * (2 * signs.double() - 1))
            memory = memory if self.floats else memory.to(x.dtype)
        if x.is_floating_point() and self.floats:
            memory = memory.to(self.floats)
        return memory.to(self.device)

    def values(self, tree: Any) -> Any:
        """Arguments as this room has them; what shares memory shares it here."""
        memories: dict[Any, torch.Tensor] = {}
        known: dict[int, torch.Tensor] = {}

        def tensor(x: torch.Tensor) -> torch.Tensor:
            place = x.untyped_storage()._cdata, x.dtype
            if place not in memories:
                memories[place] = self.memory(x.detach())
            return memories[place].as_strided(x.shape, x.stride(), x.storage_offset())

        def value(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                if id(x) not in known:
                    known[id(x)] = tensor(x).requires_grad_(x.requires_grad)
                return known[id(x)]
            if isinstance(x, torch.dtype) and x.is_floating_point and self.floats:
                return self.floats
            is_device = isinstance(x, torch.device) or x == "cpu"
            return torch.device(self.device) if is_device else x

        return tree_map(value, tree)


@dataclass(frozen=True)
class Check:
    """One call of a sample: ``call(arguments, named)`` of copies of these."""

    label: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    writes: bool = False
    wrong: bool = False  # an error is expected
    computed: torch.dtype | None = None  # where a destination has another one
    picks: tuple[torch.Tensor, int] | None = None  # of which axis of what indices pick elements, any of equal ones

    def floats(self) -> bool:
        """Whether it reads a tensor of floats."""
        read = self.args[1:] if self.call is _out else self.args
        return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tree_leaves((read, self.named)))


_PICK = ("sort", "argsort", "topk", "kthvalue")  # some of equal elements, which torch leaves open but in stable sorts


@dataclass(frozen=True)
class Choice:
    """Which samples of an OpInfo are taken: so many, the first ones or those that a seed draws; all of None."""

    most: int | None = None
    seed: int | None = None

    def of(self, samples: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        numbered = enumerate(samples)
        if self.most is None or self.seed is None:
            return itertools.islice(numbered, self.most)
        every = list(numbered)
        places = random.Random(self.seed).sample(range(len(every)), min(self.most, len(every)))
        return (every[i] for i in sorted(places))


def checks(op: Any, dtype: torch.dtype, choice: Choice, written: bool = True) -> Iterator[Check]:
    """Every call of an OpInfo on strided tensors; written: also those that write in place or to ``out=``."""
    torch.manual_seed(choice.seed or 0)  # the values of samples hang on no other's
    for check in _checks(op, dtype, choice, written):
        if op.name in _PICK and not check.wrong:
            (x, *rest), named = check.args[2:] if check.call is _out else (check.args, check.named)
            rest = rest[op.name in ("topk", "kthvalue") :]
            if not named.get("stable"):
                check = replace(check, picks=(x, named.get("dim", rest[0] if rest else -1)))
        yield check


def _checks(op: Any, dtype: torch.dtype, choice: Choice, written: bool) -> Iterator[Check]:
    def samples(**options: Any) -> Iterator[tuple[int, Any]]:
        dense = (s for s in op.sample_inputs("cpu", dtype, **options) if _dense(s.input, s.args, s.kwargs))
        return choice.of(dense)

    for number, sample in samples():
        args, named = (sample.input, *sample.args), sample.kwargs
        yield Check(f"sample {number}", op.op, args, named)
        for layout, lay in LAYOUTS.items():
            given = tree_map(lambda x: lay(x.detach()) if _strided(x) else x, (args, named))  # noqa: B023
            if any(
                x.stride() != y.stride() or x.storage_offset() != y.storage_offset()
                for x, y in _pairs(given, args, named)
            ):
                yield Check(f"sample {number}, {layout}", op.op, *given)
        yield from _written(op, number, args, named) if written else ()
    if op.supports_autograd and dtype in (torch.float32, torch.float64):
        for number, sample in samples(requires_grad=True):
            call = functools.partial(gradients, op, sample.output_process_fn_grad)
            yield Check(f"gradient of sample {number}", call, (sample.input, *sample.args), sample.kwargs)
    if op.error_inputs_func is not None and dtype == torch.float32:
        for number, case in enumerate(op.error_inputs("cpu")):
            wrong = case.sample_input
            if not _dense(wrong.input, wrong.args, wrong.kwargs):
                continue
            yield Check(f"wrong input {number}", op.op, (wrong.input, *wrong.args), wrong.kwargs, wrong=True)


def _dense(*trees: Any) -> bool:
    return all(_strided(x) or not isinstance(x, torch.Tensor) for x in tree_leaves(trees))


def _strided(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and not (x.is_nested or x.is_meta)


def _pairs(given: Any, args: Any, named: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    both = zip(tree_leaves(given), tree_leaves((args, named)), strict=True)
    return ((x, y) for x, y in both if _strided(x))


def _written(op: Any, number: int, args: tuple[Any, ...], named: dict[str, Any]) -> Iterator[Check]:
    """The forms that write where they are told."""
    if op.inplace_variant is not None:
        for layout, lay in {"": lambda x: x, ", not contiguous": strided, ", expanded": expanded}.items():
            first = tree_map(lambda x: lay(x.detach()) if _strided(x) else x, args[0])  # noqa: B023
            given, call = (first, *args[1:]), op.inplace_variant
            check = Check(f"sample {number} in place{layout}", call, given, named, writes=True)
            if "expanded" not in layout or _settled(check, Check("", op.op, given, named)):
                yield check
    if not op.supports_out or "out" in named:
        return
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # what torch refuses is another check's
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        whole = op.op(*args, **named)
        results = [whole] if isinstance(whole, torch.Tensor) else list(whole)
        for kind, make in OUTS.items():
            made = [make(x.detach()) for x in results]
            if all(x is not None for x in made):
                out = made[0] if isinstance(whole, torch.Tensor) else tuple(made)
                given, computed = (out, op.op, args, named), results[0].dtype
                yield Check(f"sample {number}, {kind}", _out, given, writes=True, computed=computed)
        first, alone = args[0], results[0].detach()
        if _strided(first) and len(results) == 1 and first.shape == alone.shape and first.dtype == alone.dtype:
            memory = torch.cat((first.detach().reshape(-1), alone.new_zeros(1)))
            first, over = memory[:-1].view(alone.shape), memory[1:].view(alone.shape)
            for kind, out in {"is the input": first, "overlaps the input": over}.items():
                given = (first, *args[1:])
                check = Check(f"sample {number}, out= {kind}", _out, (out, op.op, given, named), writes=True)
                if _settled(check, Check("", op.op, given, named)):
                    yield check


def _settled(check: Check, functional: Check) -> bool:
    """Whether torch refuses to write over what it reads, or elements that are one, or gives the result none the less:
    others, it says, depend on the order of its loops."""
    written, alone = (observe(x, Room()) for x in (check, functional))
    return bool(written.error) or (not alone.error and same_bits(written.leaves[0], alone.leaves[0]))


def _out(out: Any, call: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return call(*args, **named, out=out)


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1)


OUTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "out=": lambda x: _poisoned(torch.empty_like(x)),
    "out= not contiguous": lambda x: strided(_poisoned(x.clone())) if x.dim() else None,
    "out= transposed": lambda x: transposed(_poisoned(x.clone())) if x.dim() > 1 else None,
    "out= empty": lambda x: x.new_empty(0),
    "out= of another shape": lambda x: _poisoned(x.new_empty((*x.shape, 2))),
    "out= of float64": lambda x: torch.empty_like(x, dtype=torch.float64) if x.dtype != torch.float64 else None,
    "out= of int32": lambda x: torch.empty_like(x, dtype=torch.int32),
}


def gradients(op: Any, process: Callable[[Any], Any], *args: Any, **named: Any) -> Any:
    """Gradients of a sum of squares, and the results they come from."""
    result = process(op(*args, **named))
    results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves = [x for x in tree_leaves((args, named)) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not results or not leaves:
        return result
    total = sum((x * x.detach()).sum() for x in results)
    return result, torch.autograd.grad(total, leaves, allow_unused=True)


@dataclass
class Outcome:
    """Results as CPU tensors and numbers, what else there is to see of them, or the error."""

    leaves: list[Any] = field(default_factory=list)
    facts: list[Any] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    error: tuple[str, str] | None = None
    changed: bool = False


class Attempt:
    """A call of a check, of which alone something may stand in between: arguments are copied before, outcomes after."""

    def __init__(self, check: Check, room: Room) -> None:
        self.check, self.room = check, room
        self.args, self.named = room.values((check.args, check.named))
        self._given = [x for x in tree_leaves((self.args, self.named)) if isinstance(x, torch.Tensor)]
        self._before = [x.detach().cpu().clone() for x in self._given]
        self._result: Any = None
        self._outcome = Outcome()

    def call(self) -> Attempt:
        default = torch.get_default_dtype()
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                torch.set_default_dtype(self.room.floats or default)
                self._result = self.check.call(*self.args, **self.named)
            except Exception as error:
                self._outcome.error = type(error).__name__, str(error).split("\n")[0]
            finally:
                torch.set_default_dtype(default)
        self._outcome.warned = sorted({_said(w.message) for w in caught} - {""})
        return self

    def outcome(self) -> Outcome:
        outcome, given = self._outcome, self._given
        if outcome.error:
            outcome.warned = []
            return outcome
        for x in tree_leaves(self._result):
            if not isinstance(x, torch.Tensor):
                outcome.leaves.append(x)
                outcome.facts.append(type(x))
                continue
            if not _strided(x):
                outcome.leaves.append(str(x.layout))
                outcome.facts.append((x.dtype, x.layout))
                continue
            outcome.leaves.append(x.detach().cpu().clone())
            alias = next((i for i, y in enumerate(given) if x is y or _shares(x, y)), None)
            outcome.facts.append((x.dtype, tuple(x.shape), tuple(x.stride()), x.requires_grad, alias))
        after = [x.detach().cpu() for x in given]
        outcome.changed = not all(same_bits(x, y) for x, y in zip(self._before, after, strict=True))
        if self.check.writes or outcome.changed:
            outcome.leaves += [x.clone() for x in after]
            outcome.facts += [(x.dtype, tuple(x.shape), tuple(x.stride())) for x in given]
        return outcome


def observe(check: Check, room: Room) -> Outcome:
    return Attempt(check, room).call().outcome()


def _said(warning: Any) -> str:
    """A warning without the line of torch's source that it comes from; none where it is of torch's own speed."""
    said = str(warning).split("\n")[0].partition(" (Triggered internally")[0]
    return "" if "lower the performance" in said else said


def _shares(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(x.numel()) and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def same_bits(x: Any, y: Any) -> bool:
    """Whether values agree bit by bit, any NaN being one; +0 and -0 differ."""
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return type(x) is type(y) and (x == y or (x != x and y != y))
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.is_complex():
        return same_bits(torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj()))
    if not x.is_floating_point():
        return torch.equal(x, y)
    x, y = x.reshape(-1), y.reshape(-1)  # of more than 64 axes torch compares none
    return bool((((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())).all())


def equal(a: Outcome, b: Outcome) -> bool:
    """Whether nothing tells two outcomes apart."""
    seen = (a.error, a.facts, a.warned, a.changed) == (b.error, b.facts, b.warned, b.changed)
    return seen and all(map(same_bits, a.leaves, b.leaves))
