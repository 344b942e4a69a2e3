"""How LLVM IR is built for numba kernels, and what every dtype is in memory and in registers: `STORAGE`.

Addresses are int64. A *tag* is a value whose numba type is named as a dtype is: NumPy's own zero of it, and where numba
has no arithmetic for it, as for both halves, one that `named` makes. What is written here is for the authors of
words (`_vectors`), tiles (`_tiles`) and formats (`_formats`); kernels use those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox

from flagops.backends._numba_internals import lower_constant
from flagops.backends.numba import architecture, features

X86 = "+sse2" in features()
FUSED = not X86 or "+fma" in features()
MANY = not X86 or "+avx512f" in features()
"""Whether there are 32 registers of vectors rather than 16."""
WORDS = "+avx512vnni" in features()
"""Whether one instruction adds the products of two int16s to an int32 of 512 bits. Unset as `PAIRS`."""
QUADS = "+dotprod" in features()
"""Whether one adds the products of four int8s, on an aarch64."""
LANES = 16 if "+avx512f" in features() else 8 if "+avx" in features() else 4
"""Elements of 32 bits in a register."""
PAIRS = "+avx512bf16" in features()
"""Whether one instruction adds the products of two bfloat16s to a float32. Unset by NUMBA_CPU_NAME and _FEATURES."""

i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f16, f32, f64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
Kind = Any  # numba's types, and llvmlite's values: what mypy reads of them knows too little
Value = Any
Builder = Any


class Named(types.Type):
    """The numba type of a tag whose dtype numba has no arithmetic for."""


def named(name: str) -> tuple[Named, Any]:
    """A type and the tag that has it: a scalar of a NumPy record, since numba's dispatcher knows the type of those at
    once, where it asks Python about any object of a class of ours at each call."""
    kind, own = Named(name), type(name, (np.void,), {})
    typeof_impl.register(own)(lambda value, context: kind)
    return kind, np.zeros((), np.dtype((own, [(name, np.uint8)])))[()]


register_model(Named)(models.OpaqueModel)
unbox(Named)(lambda kind, value, c: NativeValue(c.context.get_dummy_value()))
lower_constant(Named)(lambda context, builder, kind, value: context.get_dummy_value())


def like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """Another element, in as many lanes as `kind` has, which may be a scalar."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def element_of(kind: ir.Type) -> ir.Type:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def constant(kind: ir.Type, value: Any) -> Value:
    """A number, the same in every lane."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _widen_bfloat16(builder: Builder, value: Value) -> Value:
    wide = builder.zext(value, like(value.type, i32))
    return builder.bitcast(builder.shl(wide, constant(wide.type, 16)), like(value.type, f32))


def _narrow_bfloat16(builder: Builder, value: Value) -> Value:
    """To nearest even. The processors' own instruction is not taken: it flushes subnormals."""
    bits = builder.bitcast(value, like(value.type, i32))
    sixteen = constant(bits.type, 16)
    high = builder.lshr(bits, sixteen)
    even = builder.add(builder.and_(high, constant(bits.type, 1)), constant(bits.type, 0x7FFF))
    rounded = builder.lshr(builder.add(bits, even), sixteen)
    quiet = builder.or_(high, constant(bits.type, 0x40))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, quiet, rounded), like(value.type, i16))


def _same(builder: Builder, value: Value) -> Value:
    return value


SIZE = {f64: 8, f32: 4, f16: 2, i64: 8, i32: 4, i16: 2, i8: 1}


class Storage(NamedTuple):
    """A dtype: what it is in memory, the type it is computed with, and the ways there and back."""

    memory: ir.Type
    arithmetic: Kind
    widen: Callable[[Builder, Value], Value] = _same
    narrow: Callable[[Builder, Value], Value] = _same

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return SIZE[self.memory]


def _low(memory: ir.Type) -> Storage:
    """The low bits of an int32."""
    return Storage(
        memory, types.int32,
        lambda builder, value: builder.sext(value, like(value.type, i32)),
        lambda builder, value: builder.trunc(value, like(value.type, memory)),
    )  # fmt: skip


STORAGE = {
    "float32": Storage(f32, types.float32),
    "float64": Storage(f64, types.float64),
    "bfloat16": Storage(i16, types.float32, _widen_bfloat16, _narrow_bfloat16),
    "float16": Storage(
        f16, types.float32,
        lambda builder, value: builder.fpext(value, like(value.type, f32)),
        lambda builder, value: builder.fptrunc(value, like(value.type, f16)),
    ),
    "bool": Storage(
        i8, types.boolean,
        lambda builder, value: builder.icmp_unsigned("!=", value, constant(value.type, 0)),
        lambda builder, value: builder.zext(value, like(value.type, i8)),
    ),
    **{f"int{kind.width}": Storage(kind, getattr(types, f"int{kind.width}")) for kind in (i8, i16, i32, i64)},
    **{f"uint{kind.width}": Storage(kind, getattr(types, f"uint{kind.width}")) for kind in (i8, i16, i32, i64)},
    "low16": _low(i16),
    "low8": _low(i8),
}  # fmt: skip
"""Every dtype that a kernel may name, a row each; ``low8`` and ``low16`` are the low bits of an int32."""

TAGS: dict[str, Any] = {
    name: named(name)[1] if name in ("bfloat16", "float16", "low8", "low16") else np.dtype(name).type(0)
    for name in STORAGE
}


def storage(tag: Kind) -> Storage:
    """Of the numba type of a tag."""
    return STORAGE[tag.name]


def register(element: Kind) -> ir.Type:
    """The IR type of an arithmetic type."""
    return i1 if element is types.boolean else storage(element).memory


def lanes_of(element: Kind) -> int:
    """Elements of an arithmetic type in a register; of bool as many as of bytes."""
    return LANES * 32 // (8 if element is types.boolean else element.bitwidth)


def pointer(builder: Builder, base: Value, index: Value | int = 0, size: int = 1) -> Value:
    """The address `base` moved by `index` elements of `size` bytes, as a pointer."""
    offset = builder.mul(i64(index) if isinstance(index, int) else index, i64(size))
    return builder.inttoptr(builder.add(base, offset), ir.PointerType())


def read(builder: Builder, kind: ir.Type, base: Value, *offsets: Value | int) -> Value:
    """A value at an address of any alignment moved by offsets in bytes."""
    for offset in offsets:
        base = builder.add(base, i64(offset) if isinstance(offset, int) else offset)
    return builder.load(builder.inttoptr(base, ir.PointerType()), align=1, typ=kind)


def write(builder: Builder, value: Value, base: Value, offset: int = 0, streaming: int = 0) -> None:
    """A value to an address; `streaming`: past the caches, the address a multiple of so many bytes."""
    target = builder.add(base, i64(offset)) if offset else base
    instruction = builder.store(value, builder.inttoptr(target, ir.PointerType()), align=streaming or 1)
    if streaming:
        instruction.set_metadata("nontemporal", builder.module.add_metadata([i32(1)]))


def prefetch(builder: Builder, address: Value) -> None:
    """Ask for a line of memory to read, which need not exist."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), i32, i32, i32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [builder.inttoptr(address, ir.PointerType()), i32(0), i32(3), i32(1)])


def load(builder: Builder, tag: Kind, base: Value, index: Value | int = 0, lanes: int = 0) -> Value:
    """The element of a tag's dtype that lies `index` of them behind an address, or a vector of them, widened."""
    own = storage(tag)
    kind = ir.VectorType(own.memory, lanes) if lanes else own.memory
    place = pointer(builder, base, index, own.size)
    return own.widen(builder, builder.load(place, align=own.size, typ=kind))


def store(builder: Builder, tag: Kind, value: Value, base: Value, index: Value | int = 0) -> Value:
    """As `load`, the other way; the instruction."""
    own = storage(tag)
    place = pointer(builder, base, index, own.size)
    return builder.store(own.narrow(builder, value), place, align=own.size)


def call(builder: Builder, name: str, *values: Value, result: ir.Type | None = None) -> Value:
    """A function of LLVM's or the processor's by its full name; the result is like the first argument if not given."""
    kind = ir.FunctionType(result or values[0].type, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), values)


def generic(builder: Builder, name: str, *values: Value, result: ir.Type | None = None) -> Value:
    """One of LLVM's functions that exist for every type, which their names end with."""
    return call(builder, f"{name}.{name_of(values[0].type)}", *values, result=result)


def name_of(kind: ir.Type) -> str:
    """As in "v16f32"."""
    element = element_of(kind)
    many = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    return many + ({f32: "f32", f64: "f64"}.get(element) or f"i{element.width}")


class _Brain(ir.Type):
    """LLVM's bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Brain)

    def __hash__(self) -> int:
        return hash(_Brain)


def dot_pairs(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """To each float32 of c the products of two neighbours among the bits of bfloat16s in a and b, one by one.

    Each sum is rounded; subnormals, read or made, are zeros to this instruction, whatever the process has set.
    """
    kind = ir.VectorType(_Brain(), a.type.count)
    values = (builder.bitcast(value, kind) for value in (a, b))
    return call(builder, "x86.avx512bf16.dpbf16ps.512", c, *values)


def dot_words(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """To each int32 of c the products of two neighbours among the int16s of a and b; what passes 32 bits is cut."""
    if WORDS:
        return call(builder, "x86.avx512.vpdpwssd.512", c, *(builder.bitcast(value, c.type) for value in (a, b)))
    product = builder.mul(*(builder.sext(value, like(value.type, i32)) for value in (a, b)))
    even, odd = (shuffle(builder, product, product, range(i, product.type.count, 2)) for i in (0, 1))
    return builder.add(c, builder.add(even, odd))


def dot_quads(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """To each int32 of c the products of four neighbours among the int8s of a and b."""
    return call(builder, f"aarch64.neon.sdot.{name_of(c.type)}.{name_of(a.type)}", c, a, b)


def fma(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """``a * b + c``, rounded once where the processor can; integers wrap around."""
    if isinstance(element_of(a.type), ir.IntType):
        return builder.add(builder.mul(a, b), c)
    return generic(builder, "fma", a, b, c) if FUSED else builder.fadd(builder.fmul(a, b), c)


def shuffle(builder: Builder, a: Value, b: Value, lanes: Sequence[int]) -> Value:
    """Lanes of two vectors by number, those of `b` behind those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(lanes)), list(lanes)))


def splat(builder: Builder, value: Value, lanes: int) -> Value:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, i32(0))
    return shuffle(builder, one, one, [0] * lanes)


def bits(builder: Builder, value: Value) -> Value:
    """Floats as the integers of as many bits."""
    return builder.bitcast(value, like(value.type, ir.IntType(8 * SIZE[element_of(value.type)])))


def floats(builder: Builder, value: Value) -> Value:
    """Integers of 32 or 64 bits as floats of the same bits."""
    return builder.bitcast(value, like(value.type, f32 if element_of(value.type) == i32 else f64))


def loop(builder: Builder, count: Value, values: list[Value], body: Callable[..., list[Value]]) -> list[Value]:
    """`values = body(index, values)` for index in range(count), all in registers."""
    before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", count, i64(0)), inside, after)
    builder.position_at_end(inside)
    index = builder.phi(i64)
    index.add_incoming(i64(0), before)
    carried = [builder.phi(value.type) for value in values]
    results = body(index, carried)
    following = builder.add(index, i64(1))
    index.add_incoming(following, builder.block)
    for phi, first, result in zip(carried, values, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, builder.block)
    end = builder.block
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    merged = [builder.phi(value.type) for value in values]
    for phi, first, result in zip(merged, values, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, end)
    return merged


def lookup(builder: Builder, table: Value, index: Value) -> Value:
    """<16 x i8> of a table of 16 bytes."""
    if "+ssse3" in features():
        return call(builder, "x86.ssse3.pshuf.b.128", table, index)
    if architecture() in ("aarch64", "arm64"):
        return call(builder, "aarch64.neon.tbl1.v16i8", table, index)
    result = ir.Constant(table.type, ir.Undefined)
    for lane in map(i32, range(16)):
        entry = builder.extract_element(table, builder.extract_element(index, lane))
        result = builder.insert_element(result, entry, lane)
    return result
