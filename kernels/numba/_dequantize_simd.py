# mypy: disable-error-code="untyped-decorator"
"""LLVM intrinsics for block formats: a code is an index into a small table of results that vector shuffles look up."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flagops.backends.numba import architecture, features

_POINTER = ir.PointerType()
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat(element: ir.Type, lanes: int, value: Any) -> ir.Constant:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _at(builder: ir.IRBuilder, address: Any, offset: int = 0) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)) if offset else address, _POINTER)


def _load(builder: ir.IRBuilder, typ: ir.Type, address: Any, offset: int = 0) -> Any:
    return builder.load(_at(builder, address, offset), align=1, typ=typ)


def _store(builder: ir.IRBuilder, value: Any, address: Any, offset: int = 0, aligned: int = 0) -> None:
    """aligned: the alignment in bytes that allows a streaming store, or 0 for a plain one."""
    store = builder.store(value, _at(builder, address, offset), align=aligned or 1)
    if aligned:
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def _shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _interleave(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    lanes = a.type.count
    return _shuffle(builder, a, b, [lane for i in range(lanes) for lane in (i, lanes + i)])


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: Any) -> Any:
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def _lookup_bytes(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    """<16 x i8> of a 16-entry byte table."""
    typ = _vector(_I8, 16)
    if "+ssse3" in features():
        return _call(builder, "llvm.x86.ssse3.pshuf.b.128", typ, table, index)
    if architecture() in ("aarch64", "arm64"):
        return _call(builder, "llvm.aarch64.neon.tbl1.v16i8", typ, table, index)
    result = ir.Constant(typ, ir.Undefined)
    for lane in range(16):
        entry = builder.extract_element(table, builder.extract_element(index, _I32(lane)))
        result = builder.insert_element(result, entry, _I32(lane))
    return result


@intrinsic
def decode_fp4(typingctx: Any, codes: Any, out: Any, table: Any, streaming: Any, tag: Any) -> Any:
    """Write the 32 results for the 16 bytes at `codes`; streaming stores need `out` aligned to 16 bytes.

    `table` is the address of 16 results in the bits of `tag`.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        codes, out, table, streaming, _ = args
        size = tag.bitwidth // 8
        packed = _load(builder, _vector(_I8, 16), codes)
        low, high = builder.and_(packed, _splat(_I8, 16, 15)), builder.lshr(packed, _splat(_I8, 16, 4))
        entries = _load(builder, _vector(_I8, 16 * size), table)
        planes = [_shuffle(builder, entries, entries, list(range(byte, 16 * size, size))) for byte in range(size)]
        results = []
        for part in (range(8), range(8, 16)):
            index = _shuffle(builder, low, high, [lane for i in part for lane in (i, 16 + i)])
            parts = [_lookup_bytes(builder, plane, index) for plane in planes]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [_interleave(builder, *pair) for pair in zip(parts[:half], parts[half:], strict=True)]
            results += parts
        with builder.if_else(streaming) as branches:
            for branch, aligned in zip(branches, (16, 0), strict=True):
                with branch:
                    for i, result in enumerate(results):
                        _store(builder, result, out, 16 * size * i, aligned)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.boolean, tag), generate


@intrinsic
def decode_fp8(typingctx: Any, codes: Any, out: Any, count: Any, table: Any, streaming: Any, tag: Any) -> Any:
    """Write the results for `count` sign-magnitude bytes; streaming stores need `out` aligned to 64 bytes.

    `table` is the address of the results of the 128 positive codes in the bits of `tag`.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        codes, out, count, table, streaming, _ = args
        bits = ir.IntType(tag.bitwidth)
        lanes, size = 512 // bits.width, bits.width // 8
        typ = _vector(bits, lanes)
        permute = f"llvm.x86.avx512.vpermi2var.{'hi' if size == 2 else 'd'}.512"
        entries = [_load(builder, typ, table, 64 * i) for i in range(128 // lanes)]

        def decode(start: Any, aligned: int) -> None:
            code = builder.zext(_load(builder, _vector(_I8, lanes), builder.add(codes, start)), typ)
            pairs = zip(entries[::2], entries[1::2], strict=True)
            found = [_call(builder, permute, typ, low, code, high) for low, high in pairs]
            bit = 2 * lanes
            while len(found) > 1:
                zero = builder.icmp_unsigned("==", builder.and_(code, _splat(bits, lanes, bit)), _splat(bits, lanes, 0))
                found = [builder.select(zero, *pair) for pair in zip(found[::2], found[1::2], strict=True)]
                bit *= 2
            sign = builder.shl(builder.and_(code, _splat(bits, lanes, 128)), _splat(bits, lanes, bits.width - 8))
            _store(builder, builder.xor(found[0], sign), builder.add(out, builder.mul(start, _I64(size))), 0, aligned)

        whole = _I64(0)
        if "+avx512bw" in features():
            whole = builder.and_(count, _I64(-lanes))
            with builder.if_else(streaming) as branches:
                for branch, aligned in zip(branches, (64, 0), strict=True):
                    with branch, cgutils.for_range_slice(builder, _I64(0), whole, _I64(lanes), inc=True) as (start, _):
                        decode(start, aligned)
        with cgutils.for_range_slice(builder, whole, count, _I64(1), inc=True) as (i, _):
            code = builder.zext(_load(builder, _I8, builder.add(codes, i)), _I64)
            entry = builder.add(table, builder.mul(builder.and_(code, _I64(127)), _I64(size)))
            result = builder.load(builder.inttoptr(entry, _POINTER), align=size, typ=bits)
            sign = builder.shl(builder.trunc(builder.and_(code, _I64(128)), bits), bits(bits.width - 8))
            _store(builder, builder.xor(result, sign), builder.add(out, builder.mul(i, _I64(size))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.boolean, tag), generate


@intrinsic
def byte(typingctx: Any, address: Any) -> Any:
    """The byte at an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _load(builder, _I8, args[0])

    return types.uint8(types.int64), generate


@intrinsic
def fence(typingctx: Any) -> Any:
    """Order streaming stores before whatever tells another thread that they are done."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if architecture() in ("x86_64", "i686"):
            _call(builder, "llvm.x86.sse.sfence", ir.VoidType())
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
