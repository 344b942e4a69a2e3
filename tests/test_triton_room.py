"""Which tiles fit on a chip, and kernels rewritten for a Triton that has no tuples."""

import contextlib
import importlib

import pytest
import torch

from flagops import chips, registry, testing
from flagops.errors import Unsupported

pytest.importorskip("triton")
COMMON, ROOM, OLDER, MATMUL, QUANTIZE = (
    importlib.import_module(f"flagops.kernels.triton.{name}")
    for name in ("_common", "_room", "_older", "matmul", "quantize")
)
CPU = torch.device("cpu")
ASCEND = next(chip for chip in chips.CHIPS if chip.name == "Ascend 910B")


@pytest.fixture
def on(monkeypatch):
    """Believe to be on a chip with so much memory, of warps or not."""

    def believe(shared, warps, kind="cuda"):
        monkeypatch.setattr(COMMON, "pretended", COMMON.Chip(kind, 1, shared, False, warps))

    return believe


def _drawn(rng):
    axes = ("BM", "BN", "BK")
    tiles = [{axis: 16 << int(rng.integers(5)) for axis in axes} | {"num_stages": 2} for _ in range(4)]
    return axes[: rng.integers(1, 4)], tiles


def test_what_fits_is_chosen_and_what_does_not_is_cut(rng, on):
    """In the order of the table; only the named axes are cut, by halves, and no more than must be."""
    held, staged = lambda tile: 24 * tile["BM"] * tile["BK"] + tile["BN"], lambda tile: 2 * tile["BN"] * tile["BK"]
    for _ in range(200):
        cut, tiles = _drawn(rng)
        warps, shared = bool(rng.integers(2)), 1 << int(rng.integers(8, 22))
        on(shared, warps)
        need = staged if warps else held
        found = ROOM.fitting(tiles, CPU, held, cut, staged)
        whole = [tile for tile in tiles if need(tile) <= shared]
        if whole:
            assert found == whole
            continue
        assert found
        for tile in found:
            longest = max(cut, key=tile.get)
            assert need(tile) <= shared or tile[longest] == 1
            wholes = [whole for whole in tiles if all(whole[axis] == tile[axis] for axis in whole.keys() - set(cut))]
            assert any(all(whole[axis] >= tile[axis] for axis in cut) for whole in wholes)
            twice = tile | {longest: 2 * tile[longest]}
            assert twice in tiles or any(whole[axis] > tile[axis] for whole in wholes for axis in cut)


@pytest.mark.parametrize("warps", (True, False), ids=("warps", "none"))
def test_products_of_every_dtype_fit_every_room(warps, on):
    for shared in (64 << 10, 99 << 10, 192 << 10, 227 << 10):
        on(shared, warps)
        for dtype, item in (("half", 2), ("float32", 4), ("float64", 8)):
            for tile in ROOM.products(MATMUL.TILES["cuda"][dtype], CPU, item):
                need = ROOM.waiting(tile, item, CPU) if warps else 27 * max(tile["BM"], tile["BN"]) * tile["BK"]
                assert need <= shared, tile


def test_chips_of_the_table_say_where_a_program_keeps_what_it_computes():
    assert not chips.warps("npu")
    assert not chips.warps("mlu")
    assert chips.warps("musa")
    assert chips.warps("cuda")
    assert chips.warps("never heard of")


def test_a_chip_without_warps_refuses_rows_that_it_cannot_hold(on):
    wide = torch.ones(3, 256)
    assert QUANTIZE.hadamard_unsupported(wide, None) is None
    on(ASCEND.shared, False)
    assert "256" in QUANTIZE.hadamard_unsupported(wide, None)
    assert QUANTIZE.hadamard_unsupported(torch.ones(3, 128), None) is None


CALLS = (
    "matmul", "linear", "sparse_attention", "scaled_dot_product_attention", "fp4_dequantize", "hc_pre", "int8_matmul",
    "fp8_matmul", "fp4_matmul", "fp8_quantize", "fp4_quantize", "fp4_to_fp8", "hadamard", "grouped_matmul",
    "moe_experts", "aten.sort", "aten.scatter", "aten.sum", "aten.argmax", "aten.cumsum",
)  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize("name", CALLS)
def test_tiles_of_a_small_room_compute_the_same(name, on, rng):
    """Against the reference, with the tiles of a chip that has 32 KB for all that a program holds."""
    on(32 << 10, False)
    _hold(name, rng, 5)


TABLES = (
    "matmul", "sparse_attention", "scaled_dot_product_attention", "int8_matmul", "fp8_matmul", "fp4_matmul",
    "lightning_indexer", "moe_experts",
)  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ("hip", "radeon"))
@pytest.mark.parametrize("name", TABLES)
def test_tiles_of_every_column_compute_the_same(name, kind, on, rng):
    on(64 << 10, True, kind)
    _hold(name, rng, 4)


def test_chips_of_the_table_have_columns_of_their_own():
    """Radeon's warps have 32 threads, and operands of its matrix instructions lie in registers twice; what reads them
    where they wait needs none."""
    made = {chip.target: COMMON.Chip.of(chip) for chip in chips.CHIPS if chip.processors}
    assert {target for target, chip in made.items() if chip.kind == "radeon"} == {"gfx1100"}
    assert {target for target, chip in made.items() if chip.kind == "hip"} == {
        "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950",
    }  # fmt: skip
    assert {target for target, chip in made.items() if chip.direct} == {"sm_90", "sm_100"}
    assert {target for target, chip in made.items() if chip.converts} == {"sm_89", "sm_90", "sm_100", "sm_120"}


def _hold(name, rng, examples):
    """Drawn cases against the reference."""
    operator, ran = registry.operator(name), 0
    for _ in range(examples):
        case = testing.draw_case(
            operator, lambda options: options[int(rng.integers(len(options)))], testing.INTERPRETED, ["torch"]
        )
        with contextlib.suppress(Unsupported):
            testing.assert_parity(operator, "triton", case)
            ran += 1
    assert ran


REWRITTEN = (
    "add", "where", "copy", "flip", "tril", "sum", "argmax", "cumsum", "_softmax", "native_layer_norm",
    "nll_loss_forward", "adamw",
)  # fmt: skip


@pytest.mark.parametrize("name", REWRITTEN)
def test_kernels_rewritten_without_tuples_compute_the_same(name, monkeypatch, rng):
    """As Triton 3.2 takes them, run by the interpreter of this Triton."""
    monkeypatch.setattr(COMMON, "OLDER", True)

    def asked():
        return sum(OLDER._written.cache_info()[:2])  # another test may have had it written

    before = asked()
    _hold(f"aten.{name}", rng, 4)
    for _ in range(30):  # cases without elements launch nothing
        if asked() > before:
            return
        _hold(f"aten.{name}", rng, 1)
    pytest.fail("no kernel was written again")
