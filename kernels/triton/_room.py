"""Which tiles fit on a chip: what weighs them against the memory that the table of chips gives a program.

On a chip of warps a program computes in registers, and on the chip lies what waits for its turn: operands, as many as
there are stages. On a chip without (a `width` of 1 in `flagops.chips`, as Ascend's) all lies there: addresses,
operands, what comes between them and the result. How many bytes of an element that makes is known from a compiler that
refuses what does not fit (``make ascend``), and stands in each kernel's file.
"""

from collections.abc import Callable, Sequence

import torch

from ._common import chip

Tile = dict[str, int]
ADDRESSED = 27
"""Bytes of an element of a product's operand: three numbers of 64 bits while its address is computed, and itself."""


def fits(device: torch.device, held: int, staged: int = 0) -> bool:
    """Whether a program has room that holds so much in all, and so much of it in operands that wait."""
    measure = chip(device)
    return (staged if measure.warps else held) <= measure.shared


def fitting(
    tiles: Sequence[Tile],
    device: torch.device,
    held: Callable[[Tile], int],
    cut: tuple[str, ...],
    staged: Callable[[Tile], int] = lambda tile: 0,
) -> list[Tile]:
    """Those of a table's tiles that fit, in its order; where none does, each with the longest of its axes `cut` halved
    until it does."""
    found = [tile for tile in tiles if fits(device, held(tile), staged(tile))]
    if found:
        return found
    for tile in tiles:
        while not fits(device, held(tile), staged(tile)) and (axis := max(cut, key=tile.__getitem__, default="")):
            if tile[axis] == 1:
                break
            tile = tile | {axis: tile[axis] // 2}
        if tile not in found:
            found.append(tile)
    return found


def fitted(tile: Tile, device: torch.device, held: Callable[[Tile], int], cut: tuple[str, ...]) -> Tile:
    """A kernel's one tile, as far as it fits."""
    return fitting([tile], device, held, cut)[0]


def products(tiles: Sequence[Tile], device: torch.device, item: int) -> list[Tile]:
    """Of a table for products, whose operands have so many bytes each."""
    return fitting(
        tiles, device, lambda tile: ADDRESSED * max(tile["BM"], tile["BN"]) * tile["BK"], ("BK", "BN"),
        lambda tile: waiting(tile, item, device),
    )  # fmt: skip


def waiting(tile: Tile, item: int, device: torch.device) -> int:
    """Bytes of a product's operands that wait on the chip."""
    buffers = tile["num_stages"] - (chip(device).kind != "cuda")  # on AMD's one of the stages lies in registers
    return buffers * (tile["BM"] + tile["BN"]) * tile["BK"] * item
