"""FP4 and FP8 block formats on the CPU: all results of a scale stand in a table, and vector shuffles look them up.

Bound by bytes, those of the result: a large one is streamed past the caches. A scale per block of float32 makes its own
table for each band of rows, which a band's height pays for.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from flagops.arrays import dtype_name, numpy_dtype
from flagops.backends.numba import jit, parallel, pointer, strides
from flagops.registry import kernel

from .._moe import GROUP
from ._blocks import Block, alive, at, laid, pack, scratch, unpack, vput
from ._formats import FORMATS, decode_fp4, decode_fp8
from ._vectors import BYTE, FLOAT32, LANES, TAGS, fence, load, size, vload

_E2M1, _E8M0 = FORMATS["e2m1"].values, FORMATS["e8m0"].values
_E4M3 = FORMATS["e4m3"].values[: FORMATS["e4m3"].top + 1].astype(np.float32)  # of no sign
_NIBBLES, _POSITIVE = len(_E2M1), len(_E4M3)
_ALIGNED_FP4, _ALIGNED_FP8 = 16, 64  # bytes, for stores past the caches
_GRAIN = 1 << 17  # elements worth a thread
_CACHED = 32 << 20  # bytes; a larger result is streamed past the caches


@kernel(deterministic=True, batch_invariant=True, note="table lookup by byte shuffles")
def fp4_dequantize(packed: Any, scale: Any, dtype: str, out: Any) -> None:
    """Each group of 32 looks up its nibbles among the 16 products of its scale."""
    rows, columns = out.shape
    streaming = _streams(out, _ALIGNED_FP4)
    parallel(
        _fp4_rows, rows if columns else 0, TAGS[dtype], laid(packed), laid(scale), laid(out),
        columns // GROUP, pointer(_fp4_products(dtype)), streaming, minimum=-(-_GRAIN // max(columns, 1)),
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True, note="table lookup by word permutations where there is AVX-512")
def fp8_dequantize(weight: Any, scale: Any, block: tuple[int, int], dtype: str, out: Any) -> None:
    """Each block looks up its codes among the 128 products of its scale; the sign is a bit apart."""
    rows, columns = out.shape
    streaming = not block[1] * out.itemsize % _ALIGNED_FP8 and _streams(out, _ALIGNED_FP8)
    coded = dtype_name(scale) != "float32"
    parallel(
        _fp8_rows, rows if columns else 0, TAGS[dtype], laid(weight), laid(scale), block, laid(out), columns,
        coded, pointer(_fp8_products(dtype) if coded else _E4M3), streaming, minimum=-(-_GRAIN // max(columns, 1)),
    )  # fmt: skip


def _streams(out: Any, aligned: int) -> bool:
    """Whether a result is to go past the caches, its rows aligned; it is then made ready for that."""
    (rows, columns), (row, column), address, item = out.shape, strides(out), pointer(out), out.itemsize
    streaming = column == 1 and rows * columns * item > _CACHED and not (address | row * item) % aligned
    if streaming:
        _use_large_pages(address, rows * row * item)
    return streaming


def _use_large_pages(address: int, size: int) -> None:
    """Where a result is not in memory yet, fault it in by large pages: else that takes longer than the decoding."""
    madvise = _madvise()
    if madvise:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(start, max(0, address + size - start), mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Callable[..., int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


@cache
def _fp4_products(dtype: str) -> Any:
    return _products(_E2M1, dtype)


@cache
def _fp8_products(dtype: str) -> Any:
    return _products(_E4M3, dtype)


def _products(values: Any, dtype: str) -> Any:
    """[256, values]: each value times each e8m0 scale. The products are exact in float32 up to overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (_E8M0[:, None] * values).astype(np.float32).astype(numpy_dtype(dtype))


@jit
def _fp4_rows(start, stop, tag, packed, scale, out, groups, products, streaming):
    (packed, packed_row, packed_column), (scale, scale_row, scale_column) = packed, scale
    (out, out_row, out_column), table = out, Block(tag, products, _NIBBLES)
    halves, shape = (1, groups * GROUP // 2), (1, groups * GROUP)
    memory, (codes,) = scratch(BYTE, (halves,))
    apart, (results,) = scratch(tag, (shape,))
    for row in range(start, stop):
        source, target = packed + row * packed_row, at(Block(tag, out, out_row), row, 0)
        into = Block(tag, target, out_row) if out_column == 1 else results
        if packed_column != 1:
            pack(BYTE, source, (0, packed_column), halves, codes, halves)
            source = codes.base
        for group in range(groups):
            code = load(BYTE, scale + row * scale_row + group * scale_column)
            decode_fp4(source + group * GROUP // 2, at(into, 0, group * GROUP), at(table, code, 0), streaming, tag)
        if out_column != 1:
            unpack(tag, results, shape, target, (0, out_column))
    if streaming:
        fence()
    return alive(memory, apart)


@jit
def _fp8_rows(start, stop, tag, weight, scale, block, out, columns, coded, values, streaming):
    """`values`: of codes without a sign under every scale, in the results' dtype; if not `coded` of one, in float32."""
    (weight, weight_row, weight_column), (scale, scale_row, scale_column) = weight, scale
    (out, out_row, out_column), (block_rows, block_columns) = out, block
    blocks, shape = -(-columns // block_columns), (1, columns)
    memory, (codes,) = scratch(BYTE, (shape,))
    apart, (results, products) = scratch(tag, (shape, (0 if coded else blocks, _POSITIVE)))
    table = Block(tag, values, _POSITIVE) if coded else products
    band = -1
    for row in range(start, stop):
        source, target = weight + row * weight_row, at(Block(tag, out, out_row), row, 0)
        into = Block(tag, target, out_row) if out_column == 1 else results
        scales = row // block_rows * scale_row
        if not coded and row // block_rows != band:
            band = row // block_rows
            _multiply(values, scale + scales * size(FLOAT32), scale_column, blocks, products)
        if weight_column != 1:
            pack(BYTE, source, (0, weight_column), shape, codes, shape)
            source = codes.base
        for i in range(blocks):
            column = i * block_columns
            entry = np.int64(load(BYTE, scale + scales + i * scale_column)) if coded else i
            count = min(block_columns, columns - column)
            decode_fp8(source + column, at(into, 0, column), count, at(table, entry, 0), streaming, tag)
        if out_column != 1:
            unpack(tag, results, shape, target, (0, out_column))
    if streaming:
        fence()
    return alive(memory, apart)


@jit
def _multiply(values, scales, step, blocks, products):
    """The table of each block of a band."""
    for block in range(blocks):
        factor = load(FLOAT32, scales + block * step * size(FLOAT32))
        for i in range(0, _POSITIVE, LANES):
            vput(products, block, i, vload(FLOAT32, values + i * size(FLOAT32)) * factor)
