"""What a program of a compiled Triton kernel asks of memory and of the matrix units, without a chip.

The compiler's own IR (`asm["ttir"]`, after inlining and the passes that remove what is not used) is walked for one
program of the grid: integers, addresses and masks are computed, loops run as often as they would, and floats are left
out, for no address depends on them. So every load and store has its addresses, and every `dot` its shapes.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

SECTOR = 32
"""Bytes that memory moves at least: a sector of NVIDIA's L2. AMD's lines are longer."""

INTEGERS = {"i1": np.bool_, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "index": np.int64}
_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8} | {name: np.dtype(kind).itemsize for name, kind in INTEGERS.items()}
_WORD = re.compile(r"%[\w.$-]+(?:#\d+)?")
_LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
_LINE = re.compile(r'^(?:(?P<results>%[^=(]+) = )?"?(?P<op>[a-z_]\w*\.[\w.]+)"?(?P<rest>.*)$')
_TENSOR = re.compile(r"tensor<((?:\d+x)+)([^<>]*(?:<[^<>]*>)?)>")

Value = Any
"""An integer, or an array of them (of a pointer: addresses in bytes); None where it depends on data."""


class Uncounted(Exception):
    """What a program does depends on data that is not there, or is written in a way that is not understood."""


@dataclass
class Node:
    op: str
    results: list[str]
    operands: list[str]
    text: str
    bodies: list[list[Node]] = field(default_factory=list)


@dataclass
class Traffic:
    """Of one storage in one program, in bytes.

    issued: elements of each access, an element that several lanes of one access share counted once.
    distinct: elements, however often accessed. sectors: what memory moves for them.
    """

    issued: float = 0
    distinct: float = 0
    sectors: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.issued + other.issued, self.distinct + other.distinct, self.sectors + other.sectors)

    def __mul__(self, by: float) -> Traffic:
        return Traffic(self.issued * by, self.distinct * by, self.sectors * by)


@dataclass
class Counts:
    """Of one program, or the sum of several: traffic by storage, and how often a dot of (m, n, k, element) ran.

    data: accesses and branches that depend on data: every lane of them counted, and the first branch taken.
    """

    reads: dict[int, Traffic] = field(default_factory=dict)
    writes: dict[int, Traffic] = field(default_factory=dict)
    dots: dict[tuple[int, int, int, str], float] = field(default_factory=lambda: defaultdict(float))
    data: int = 0

    def add(self, other: Counts, by: float = 1) -> None:
        for mine, theirs in ((self.reads, other.reads), (self.writes, other.writes)):
            for at, traffic in theirs.items():
                mine[at] = mine.get(at, Traffic()) + traffic * by
        for shape, count in other.dots.items():
            self.dots[shape] += count * by
        self.data += other.data


def parsed(ttir: str) -> tuple[list[str], list[Node]]:
    """The names of a kernel's parameters, and its body."""
    lines = [_LOCATION.sub("", line).strip() for line in ttir.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "//"))]
    starts = [at for at, line in enumerate(lines) if line.startswith("tt.func")]
    if len(starts) != 1:
        raise Uncounted(f"{len(starts)} functions; those that are called are not followed")
    start = starts[0]
    names = [word[:-1] for word in re.findall(r"%[\w.$-]+:", lines[start])]
    body, _ = _block(lines, start + 1)
    return names, body


def _block(lines: Sequence[str], at: int) -> tuple[list[Node], int]:
    """The operations up to the brace that closes them, and where it is."""
    found: list[Node] = []
    while not lines[at].startswith("}"):
        line = lines[at]
        at += 1
        if line.startswith("^"):
            if found:
                raise Uncounted("a jump between blocks")
            continue
        match = _LINE.match(line)
        if match is None:
            raise Uncounted(f"not understood: {line[:80]}")
        names: list[str] = []
        for word in (match["results"] or "").replace(" ", "").split(","):
            name, _, count = word.partition(":")
            names += [name] if not count else [f"{name}#{i}" for i in range(int(count))]
        node = Node(match["op"], [name for name in names if name], [], match["rest"])
        while line.endswith("{"):
            body, at = _block(lines, at)
            node.bodies.append(body)
            line = lines[at]
            node.text += line if not line.endswith("{") else ""
            at += 1
        node.operands = _WORD.findall(match["rest"])
        found.append(node)
    return found, at


def _cut(a: Any, b: Any) -> Any:
    """Division of integers towards zero."""
    return (a - np.fmod(a, b)) // np.where(b == 0, 1, b)


def _unsigned(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        found = operation(*(x.view(f"u{x.dtype.itemsize}") for x in map(np.asarray, given)))
        return found.view(f"i{found.dtype.itemsize}") if found.dtype.kind == "u" else found

    return run


def _extended(name: str, x: Any, kind: str) -> Any:
    """An integer in another width; unsigned by its bits, a bool with its sign as -1."""
    x = np.asarray(x)
    if x.dtype == np.bool_:
        return -x.astype(INTEGERS[kind]) if name == "extsi" else x.astype(INTEGERS[kind])
    return (x.view(f"u{x.dtype.itemsize}") if name in ("extui", "index_castui") else x).astype(INTEGERS[kind])


def _constant(text: str, shape: tuple[int, ...], kind: str) -> Value:
    if kind not in INTEGERS and kind not in ("true", "false"):
        return None
    word = re.match(r" *(?:dense<)?(-?\d+|true|false)>?(?: |$)", text)
    if word is None:
        return None
    value = word[1] == "true" if word[1] in ("true", "false") else int(word[1])
    return np.broadcast_to(np.asarray(value).astype(INTEGERS.get(kind, np.bool_)), shape)


_SIGNED: dict[str, Callable[..., Any]] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "divsi": _cut, "remsi": np.fmod, "andi": np.bitwise_and,
    "ori": np.bitwise_or, "xori": np.bitwise_xor, "shli": np.left_shift, "shrsi": np.right_shift, "minsi": np.minimum,
    "maxsi": np.maximum, "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
    "sge": np.greater_equal,
}  # fmt: skip
_PLAIN = {
    "divui": np.floor_divide, "remui": np.remainder, "shrui": np.right_shift, "minui": np.minimum, "maxui": np.maximum,
    "ult": np.less, "ule": np.less_equal, "ugt": np.greater, "uge": np.greater_equal,
}  # fmt: skip
OPERATIONS = _SIGNED | {name: _unsigned(operation) for name, operation in _PLAIN.items()}


def _shape(words: str) -> tuple[int, ...]:
    return tuple(map(int, words.split("x")[:-1]))


def _type(text: str) -> tuple[tuple[int, ...], str]:
    """The shape and the element of the last type of a line; a scalar has no axes."""
    found = _TENSOR.findall(text)
    if found and text.endswith(">"):
        return _shape(found[-1][0]), found[-1][1]
    return (), re.split(r"[ ,]", text.rstrip())[-1]


def _first(text: str) -> tuple[tuple[int, ...], str]:
    found = _TENSOR.search(text)
    return (_shape(found[1]), found[2]) if found else ((), "")


def _pointee(text: str) -> str:
    """What the first pointer of a line points to."""
    return _part(r"!tt\.ptr<(\w+)", text)


def _part(pattern: str, text: str) -> str:
    """What a pattern holds of a line."""
    found = re.search(pattern, text)
    if found is None:
        raise Uncounted(f"not understood: {text[:80]}")
    return found[1]


class Memory:
    """The storages of the tensors that a launch was given: which one an address lies in, and its integers."""

    def __init__(self, tensors: Sequence[torch.Tensor], unread: set[int]) -> None:
        """unread: storages whose values are not there, for a kernel that did not run makes them."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self.sizes = {start: storage.nbytes() for start, storage in storages.items() if storage.nbytes()}
        self.unread = unread

    def storage(self, addresses: Any) -> int:
        """The storage that holds all of some addresses, by its first."""
        low, high = int(np.min(addresses)), int(np.max(addresses))
        for start, size in self.sizes.items():
            if start <= low and high < start + size:
                return start
        raise Uncounted("an access outside of the tensors that were given")

    def read(self, start: int, addresses: Any, mask: Any, kind: str) -> Value:
        if start in self.unread or kind not in ("i32", "i64"):
            return None
        dtype = np.dtype(INTEGERS[kind])
        raw = (ctypes.c_byte * (self.sizes[start] // dtype.itemsize * dtype.itemsize)).from_address(start)
        index = np.where(mask, (addresses - start) // dtype.itemsize, 0)
        return np.where(mask, np.frombuffer(raw, dtype)[index], 0).astype(dtype)


def once(numbers: Any) -> Any:
    """Each number once, in order. `np.unique` hashes them, which takes ten times as long."""
    steps = np.diff(numbers)
    if (steps > 0).all():
        return numbers
    numbers = np.sort(numbers)
    return numbers[np.append(True, np.diff(numbers) > 0)]


class Lost(NamedTuple):
    """A pointer moved by what depends on data; it is known only where it began."""

    address: int


class Program:
    """One program of a grid, walked."""

    def __init__(self, memory: Memory, place: Sequence[int], grid: Sequence[int]) -> None:
        self.memory, self.place, self.grid = memory, place, grid
        self.values: dict[str, Value] = {}
        self.counts = Counts()
        self.work = 0
        """Elements of accesses so far."""
        self._issued: dict[tuple[int, bool, str], list[Any]] = {}
        """By storage, and whether it is read, and element: addresses of each access, and elements that data choose."""

    def run(self, names: Sequence[str], given: Sequence[Value], body: Sequence[Node]) -> Counts:
        if len(names) != len(given):
            raise Uncounted(f"{len(given)} arguments for {len(names)} parameters")
        self.values.update(zip(names, given, strict=True))
        with np.errstate(all="ignore"):
            self._walk(body)
        for (start, reads, kind), (pieces, unknown) in self._issued.items():
            size = _BYTES[kind]
            every = once(np.concatenate(pieces)) if pieces else np.empty(0, np.int64)
            traffic = Traffic(
                (sum(map(len, pieces)) + unknown) * size,
                (len(every) + unknown) * size,
                len(once((every - start) // SECTOR)) * SECTOR + unknown * size,
            )
            found = self.counts.reads if reads else self.counts.writes
            found[start] = found.get(start, Traffic()) + traffic
        return self.counts

    def _walk(self, body: Sequence[Node]) -> list[Value]:
        """Run operations; what the last one yields."""
        for node in body:
            if node.op in ("scf.yield", "scf.condition", "tt.return"):
                return [self.values[name] for name in node.operands]
            if node.op == "scf.for":
                found = self._loop(node)
            elif node.op == "scf.if":
                chosen = self.values[node.operands[0]]
                self.counts.data += chosen is None
                taken = 0 if chosen is None or chosen else 1
                found = self._walk(node.bodies[taken]) if taken < len(node.bodies) else []
                if chosen is None:
                    found = [None] * len(found)
            elif node.bodies and not node.op.startswith(("tt.reduce", "tt.scan")):
                raise Uncounted(f"{node.op} is not followed")
            else:
                found = [self._value(node)] * max(1, len(node.results))
            self.values.update(zip(node.results, found, strict=False))
        return []

    def _loop(self, node: Node) -> list[Value]:
        counter, *words = node.operands
        low, high, step = (self.values[word] for word in words[:3])
        if low is None or high is None or step is None:
            raise Uncounted("a loop as long as data say")
        carried, start = words[3::2], [self.values[word] for word in words[4::2]]
        for k in range(int(low), int(high), int(step)):
            self.values[counter] = np.asarray(low).dtype.type(k)
            self.values.update(zip(carried, start, strict=True))
            start = self._walk(node.bodies[0])
        return start

    def _value(self, node: Node) -> Value:
        name = node.op.partition(".")[2]
        if node.op in ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas"):
            return self._access(node)
        if node.op == "tt.dot":
            (one, kind), (two, _) = _TENSOR.findall(node.text)[:2]
            (*batch, m, k), n = _shape(one), _shape(two)[-1]
            self.counts.dots[m, n, k, kind] += math.prod(batch)
            return None
        if node.op in ("tt.call", "tt.dot_scaled") or name.startswith("descriptor") or node.op.startswith("cf."):
            raise Uncounted(f"{node.op} is not followed")
        shape, kind = _type(node.text)
        if node.op == "arith.constant":
            return _constant(node.text, shape, kind)
        if node.op in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(node.text.split()[0])
            return np.int32((self.place if name == "get_program_id" else self.grid)[axis])
        if node.op == "tt.make_range":
            start, end = (int(_part(rf"{word} = (\d+)", node.text)) for word in ("start", "end"))
            return np.arange(start, end, dtype=np.int32)
        given = [self.values[word] for word in node.operands]
        lost = next((x for x in given if isinstance(x, Lost)), None)
        if lost is None and name == "addptr" and given[0] is not None and given[1] is None:
            lost = Lost(int(np.ravel(given[0])[0]))
        if lost is not None or not given or any(x is None for x in given):
            return lost if name == "addptr" or "!tt.ptr" in kind else None
        return self._computed(node, name, given, shape, kind)

    def _computed(self, node: Node, name: str, given: list[Any], shape: tuple[int, ...], kind: str) -> Value:
        """An operation on integers; None for one that makes anything else of them."""
        if name in OPERATIONS:
            return OPERATIONS[name](*given)
        if name == "cmpi":
            return OPERATIONS[node.text.split()[0].rstrip(",")](*given)
        if name == "select":
            return np.where(*given)
        if name in ("extsi", "trunci", "index_cast", "extui", "index_castui"):
            return _extended(name, given[0], kind)
        if name in ("splat", "broadcast"):
            return np.broadcast_to(given[0], shape)
        if name == "expand_dims":
            return np.expand_dims(given[0], int(_part(r"axis = (\d+)", node.text)))
        if name == "reshape":
            return np.reshape(given[0], shape)
        if name == "trans":
            order = _part(r"order = array<i32: ([\d, ]+)>", node.text)
            return np.transpose(given[0], [int(axis) for axis in order.split(",")])
        if name == "unsplat":
            return np.ravel(given[0])[0]
        if name == "bitcast" and "!tt.ptr" in kind:  # of a pointer to bool, to one to bytes
            return given[0]
        if name == "addptr":
            return given[0] + np.asarray(given[1]).astype(np.int64) * _BYTES[_pointee(node.text)]
        return None

    def _access(self, node: Node) -> Value:
        pointer, *rest = (self.values[word] for word in node.operands)
        loads, atomic = node.op == "tt.load", node.op.startswith("tt.atomic")
        given = rest if loads else rest[1:]
        mask = given[0] if given else np.True_
        shape, _ = _type(node.text) if loads else _first(node.text)
        kind = _pointee(node.text)
        ways = (True, False) if atomic else (loads,)
        self.work += math.prod(shape)
        if pointer is None or isinstance(pointer, Lost) or mask is None:
            if pointer is None:
                raise Uncounted(f"a pointer that data make: {node.op}{node.text}"[:120])
            self.counts.data += 1
            at = pointer.address if isinstance(pointer, Lost) else np.ravel(pointer)[0]
            for reads in ways:
                self._note(self.memory.storage(at), reads, kind, None, math.prod(shape))
            return None
        addresses, mask = np.broadcast_to(pointer, shape), np.broadcast_to(mask, shape)
        chosen = once(addresses[mask])
        if not chosen.size:
            return np.zeros(shape, INTEGERS[kind]) if kind in ("i32", "i64") else None
        start = self.memory.storage(chosen)
        for reads in ways:
            self._note(start, reads, kind, chosen, 0)
        return self.memory.read(start, addresses, mask, kind) if loads else None

    def _note(self, start: int, reads: bool, kind: str, addresses: Any, unknown: int) -> None:
        entry = self._issued.setdefault((start, reads, kind), [[], 0])
        if addresses is not None:
            entry[0].append(addresses)
        entry[1] += unknown
