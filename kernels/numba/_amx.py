"""Products of bfloat16 in the tile registers that an x86 processor may have (AMX), for the loops of `_gemm`.

A register holds 16 rows of 64 bytes. `tile_product` keeps four of sums and reads two of either factor, so that each is
used twice; 16 by 16 sums take the products of two neighbours along k of 32 in one instruction. The process must ask
Linux for the registers once, and a thread tells them their shape, which it must leave as it was found: oneDNN takes the
shape that it gave them for what they have.
"""

from __future__ import annotations

import ctypes
import sys

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from flagops.backends.numba import features, jit

from ._blocks import Block, pack, round_up
from ._ir import call, i8, i16, i64, pointer
from ._tiles import places

GRID = 32
"""Rows and columns of a `tile_product`."""
DEPTH = 32
"""Of one instruction; a depth is a multiple of it, filled with zeros."""
_ROWS, _BYTES, _ITEM = 16, 64, 4  # of a register, and of a sum or two factors
_LEFT, _RIGHT = (4, 5), (6, 7)  # the registers of factors; before them those of sums


def _permitted() -> bool:
    """Ask Linux (5.16 and newer) for the registers, for all threads of the process."""
    if sys.platform != "linux":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


TILES = {"+amx-tile", "+amx-bf16", "+avx512f"} <= features() and _permitted()
"""Whether there are tile registers. Unset by NUMBA_CPU_NAME and _FEATURES."""


@jit
def grid_width(columns):
    """How wide panels of so many columns are: no wider than these, if half of the registers hold them."""
    return columns if columns <= GRID // 2 else GRID


@intrinsic
def shape_tiles(typingctx, place, columns):
    """Give the registers of this thread their shape; what they had before goes to 64 bytes at an address.

    Those that hold columns have no more than so many: a row of B and of C is read and written no further.
    """

    def generate(context, builder, signature, arguments):
        place, columns = arguments
        call(builder, "x86.sttilecfg", pointer(builder, place), result=ir.VoidType())
        few = builder.icmp_signed("<", columns, i64(_BYTES // _ITEM))
        held = builder.trunc(builder.select(few, builder.mul(columns, i64(_ITEM)), i64(_BYTES)), i16)
        # palette 1 and 15 bytes, the bytes of a row of each of eight registers, the same again of none, and their rows
        layout = ir.LiteralStructType([i8, ir.ArrayType(i8, 15), *[i16] * 16, *[i8] * 16])
        own = cgutils.alloca_once(builder, layout, zfill=True)
        builder.store(i8(1), cgutils.gep_inbounds(builder, own, 0, 0))
        for tile in range(8):
            size = i16(_BYTES) if tile in _LEFT else held
            builder.store(size, cgutils.gep_inbounds(builder, own, 0, 2 + tile))
            builder.store(i8(_ROWS), cgutils.gep_inbounds(builder, own, 0, 18 + tile))
        call(builder, "x86.ldtilecfg", builder.bitcast(own, i8.as_pointer()), result=ir.VoidType())
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def restore_tiles(typingctx, place):
    """Give them the shape that lies at an address again."""

    def generate(context, builder, signature, arguments):
        call(builder, "x86.ldtilecfg", pointer(builder, arguments[0]), result=ir.VoidType())
        return context.get_dummy_value()

    return types.none(types.int64), generate


def _product(wide):
    """`tile_product`, or its left half: registers of 16 columns, one or two of them."""

    def typed(typingctx, a, b, k, c, add):
        def generate(context, builder, signature, arguments):
            (a, a_row), (b, b_row), (c, c_row) = (places(builder, arguments[i]) for i in (0, 1, 3))
            k, add = arguments[2], arguments[4]
            a_row, b_row, c_row = (builder.mul(row, i64(item)) for row, item in ((a_row, 2), (b_row, 2), (c_row, 4)))

            def op(name, *values):
                call(builder, f"x86.{name}", *values, result=ir.VoidType())

            def move(name, tile, address, row, down=0, along=0):
                place = builder.add(address, builder.add(builder.mul(row, i64(_ROWS * down)), i64(_BYTES * along)))
                op(name, i8(tile), pointer(builder, place), row)

            sums = [(i, j, 2 * i + j) for i in range(2) for j in range(1 + wide)]
            with builder.if_else(add) as (more, fresh):
                with more:
                    for i, j, tile in sums:
                        move("tileloadd64", tile, c, c_row, i, j)
                with fresh:
                    for *_, tile in sums:
                        op("tilezero", i8(tile))
            with cgutils.for_range(builder, builder.sdiv(k, i64(DEPTH))) as step:
                near = builder.add(a, builder.mul(step.index, i64(_BYTES)))
                deep = builder.add(b, builder.mul(builder.mul(step.index, i64(_ROWS)), b_row))
                for i in range(2):
                    move("tileloadd64", _LEFT[i], near, a_row, i)
                for j in range(1 + wide):
                    move("tileloadd64", _RIGHT[j], deep, b_row, 0, j)
                for i, j, tile in sums:
                    op("tdpbf16ps", i8(tile), i8(_LEFT[i]), i8(_RIGHT[j]))
            for i, j, tile in sums:
                move("tilestored64", tile, c, c_row, i, j)
            return context.get_dummy_value()

        return types.none(a, b, types.int64, c, types.boolean), generate

    return intrinsic(typed)


_whole, _half = _product(True), _product(False)


@jit
def tile_product(a, b, columns, k, c, add):
    """C[GRID, GRID] = A[.., k] B, plus C if add, where so many columns are wanted: A and B of bfloat16, B as `zip_rows`
    leaves it, C of float32. Where the registers have fewer columns, so have B and C; one column of B lies as it is."""
    if columns > GRID // 2:
        _whole(a, b, k, c, add)
    else:
        _half(a, b, k, c, add)


@jit
def rows_of_tiles(source, steps, shape, tag, panel, often):
    """GRID rows for `tile_product` where they lie; in the panel if they are not whole, or read often: rows far
    apart meet in one set of a cache."""
    (row, column), (count, depth) = steps, shape
    if not often and column == 1 and count == GRID and depth % DEPTH == 0:
        return Block(tag, source, row)
    padded = round_up(depth, DEPTH)
    pack(tag, source, steps, shape, panel, (GRID, padded))
    return Block(tag, panel.base, panel.row)
