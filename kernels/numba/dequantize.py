"""FP4 and FP8 block formats on the CPU: all results of a scale stand in a table, and vector shuffles look them up."""

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

from ._formats import FORMATS, decode_fp4, decode_fp8
from ._vectors import BYTE, FLOAT32, LANES, TAGS, fence, load, store, vload, vsplat, vstore

_E4M3 = FORMATS["e4m3"].values[:128].astype(np.float32)
_GRAIN = 1 << 17  # elements worth a thread
_CACHED = 32 << 20  # bytes; a larger result is streamed past the caches


@kernel(deterministic=True, batch_invariant=True, note="table lookup by byte shuffles")
def fp4_dequantize(packed: Any, scale: Any, dtype: str, out: Any) -> None:
    """Each group of 32 looks up its nibbles among the 16 products of its scale."""
    rows, columns = out.shape
    size, tag = out.itemsize, TAGS[dtype]
    out_row, out_column = (size * step for step in strides(out))
    target = pointer(out)
    streaming = out_column == size and rows * columns * size > _CACHED and not (target | out_row) % 16
    if streaming:
        _use_large_pages(target, rows * out_row)
    parallel(
        _fp4_rows, rows if columns else 0, pointer(packed), *strides(packed), pointer(scale), *strides(scale),
        target, out_row, out_column, columns // 32, pointer(_fp4_products(dtype)), size, streaming, tag,
        minimum=-(-_GRAIN // max(columns, 1)),
    )  # fmt: skip


@kernel(deterministic=True, batch_invariant=True, note="table lookup by word permutations where there is AVX-512")
def fp8_dequantize(weight: Any, scale: Any, block: tuple[int, int], dtype: str, out: Any) -> None:
    """Each block looks up its codes among the 128 products of its scale; the sign is a bit apart."""
    rows, columns = out.shape
    size, tag = out.itemsize, TAGS[dtype]
    out_row, out_column = (size * step for step in strides(out))
    target = pointer(out)
    streaming = out_column == size and rows * columns * size > _CACHED and not (target | out_row | block[1] * size) % 64
    if streaming:
        _use_large_pages(target, rows * out_row)
    if dtype_name(scale) == "float32":
        coded, tables, unit = False, pointer(_E4M3), 4
    else:
        coded, tables, unit = True, pointer(_fp8_products(dtype)), 1
    parallel(
        _fp8_rows, rows if columns else 0, pointer(weight), *strides(weight),
        pointer(scale), *(unit * step for step in strides(scale)), *block,
        target, out_row, out_column, columns, coded, tables, size, streaming, tag,
        minimum=-(-_GRAIN // max(columns, 1)),
    )  # fmt: skip


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
    return _products(FORMATS["e2m1"].values, dtype)


@cache
def _fp8_products(dtype: str) -> Any:
    return _products(_E4M3, dtype)


def _products(values: Any, dtype: str) -> Any:
    """[256, values]: each value times each e8m0 scale. The products are exact in float32 up to overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (FORMATS["e8m0"].values[:, None] * values).astype(np.float32).astype(numpy_dtype(dtype))


@jit
def _fp4_rows(
    start, stop, packed, packed_row, packed_column, scale, scale_row, scale_column,
    out, out_row, out_column, groups, tables, size, streaming, tag,
):  # fmt: skip
    codes = np.empty(16 * groups if packed_column != 1 else 0, np.uint8)
    results = np.empty(32 * groups * size if out_column != size else 0, np.uint8)
    for row in range(start, stop):
        source, target = packed + row * packed_row, out + row * out_row
        if packed_column != 1:
            source = _gather(codes, source, packed_column)
        if out_column != size:
            target = np.int64(results.ctypes.data)
        for group in range(groups):
            table = tables + 16 * size * load(BYTE, scale + row * scale_row + group * scale_column)
            decode_fp4(source + 16 * group, target + 32 * size * group, table, streaming, tag)
        if out_column != size:
            _scatter(results, out + row * out_row, out_column, 32 * groups, size, tag)
    if streaming:
        fence()


@jit
def _fp8_rows(
    start, stop, weight, weight_row, weight_column, scale, scale_row, scale_column, block_rows, block_columns,
    out, out_row, out_column, columns, coded, tables, size, streaming, tag,
):  # fmt: skip
    codes = np.empty(columns if weight_column != 1 else 0, np.uint8)
    results = np.empty(columns * size if out_column != size else 0, np.uint8)
    blocks = -(-columns // block_columns)
    products = np.empty(0 if coded else 128 * size * blocks, np.uint8)
    band = -1
    for row in range(start, stop):
        source, target = weight + row * weight_row, out + row * out_row
        scales = scale + row // block_rows * scale_row
        if not coded and row // block_rows != band:
            band = row // block_rows
            _multiply(products, tables, scales, scale_column, size, tag)
        if weight_column != 1:
            source = _gather(codes, source, weight_column)
        if out_column != size:
            target = np.int64(results.ctypes.data)
        for block in range(blocks):
            if coded:
                table = tables + 128 * size * load(BYTE, scales + block * scale_column)
            else:
                table = np.int64(products.ctypes.data) + 128 * size * block
            column = block * block_columns
            count = min(block_columns, columns - column)
            decode_fp8(source + column, target + column * size, count, table, streaming, tag)
        if out_column != size:
            _scatter(results, out + row * out_row, out_column, columns, size, tag)
    if streaming:
        fence()


@jit
def _multiply(products, values, scales, scale_column, size, tag):
    for block in range(products.size // (128 * size)):
        factor = vsplat(load(FLOAT32, scales + block * scale_column))
        table = np.int64(products.ctypes.data) + 128 * size * block
        for i in range(0, 128, LANES):
            vstore(tag, table + i * size, vload(FLOAT32, values + 4 * i) * factor)


@jit
def _gather(codes, source, step):
    for i in range(codes.size):
        codes[i] = load(BYTE, source + i * step)
    return np.int64(codes.ctypes.data)


@jit
def _scatter(results, target, step, count, size, tag):
    source = np.int64(results.ctypes.data)
    for i in range(count):
        store(tag, target + i * step, load(tag, source + i * size))
