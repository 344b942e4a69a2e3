"""`flagops.load` over a mesh: each rank has its shards alone, and all have the logits of one."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flagops
from flagops.deepseek_v4.examples import TRAINED, held_out, packed_deepseek_v4
from flagops.distributed import plan

pytest.importorskip("transformers.models.deepseek_v4")
sys.path.insert(0, str(Path(__file__).parent))
import ranks
from load_data import floating

IDS = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1))
WIDE = {"dtype": "float32", "activations": "none"}
ROOM = {"memory": "64GiB"}
SCHEMES = ("replicate", "split-input", "split-rank")
PLANNED = plan.Model(
    hidden=512, sliding=1, csa=1, hca=1, heads=4, q_rank=128, groups=2, experts=16, width=512, vocabulary=64,
    hash_layers=1, active=4, head_dim=128, o_rank=256, index_heads=16, index_dim=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two groups whose rank has two blocks, so that four ranks share them in every scheme."""
    folder = tmp_path_factory.mktemp("mesh") / "small"
    packed_deepseek_v4(folder, o_lora_rank=PLANNED.o_rank, compress_rate_hca=128)
    return folder


@pytest.fixture(scope="module")
def pair(small):
    """Of two ranks: plain activations, the same with experts read on demand, FP8, FP8 stacked, bfloat16, trained."""
    cases = [WIDE, WIDE | ROOM, {"dtype": "float32"} | ROOM, {"dtype": "float32", "pack": True}, {}]
    jobs = [("packed", {"folder": small, "ids": IDS} | options) for options in cases]
    return ranks.launch(2, [*jobs, ("packed", {"folder": TRAINED, "ids": held_out(48)})])


@pytest.fixture(scope="module")
def quartet(small, tmp_path_factory):
    """Of four ranks: each scheme, the weights as stored, and what cannot be divided."""
    empty, v3 = tmp_path_factory.mktemp("empty"), floating(tmp_path_factory.mktemp("v3"), "v3")
    refused = [
        ("packed", {"folder": TRAINED, "ids": IDS}),
        ("packed", {"folder": v3, "ids": IDS}),
        ("packed", {"folder": small, "ids": IDS, "scheme": "split-ranks"}),
        ("packed", {"folder": empty, "ids": IDS}),
        ("odd_one", {"folder": small}),
    ]
    jobs = [("packed", {"folder": small, "ids": IDS, "scheme": scheme} | WIDE) for scheme in SCHEMES]
    return ranks.launch(4, [*jobs, ("packed", {"folder": small, "ids": IDS}), *refused])


@pytest.fixture(scope="module")
def expected(small):
    """Of one process, plain activations in float32, where only the order of sums may differ."""
    return whole(small, **WIDE)


def whole(folder, ids=IDS, **options):
    model = flagops.load(folder, backend="torch", **options)
    with torch.no_grad():
        return ranks._steps(model, ids).float().numpy()


def near(found, expected, tolerance):
    assert all(np.array_equal(one["logits"], found[0]["logits"]) for one in found)
    assert np.abs(found[0]["logits"] - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.drawn
def test_two_ranks_are_one(pair, expected):
    near(pair[0], expected, 1e-5)
    for mine, again in zip(pair[0], pair[1], strict=True):
        np.testing.assert_array_equal(mine["logits"], again["logits"])
        assert again["reads"] > 0
        assert mine["heads"] == {2}
        assert not mine["left"]
        assert mine["copied"] == {"o_b_proj.weight", "o_b_proj.weight_scale_inv"}, "codes lie in the files"
        assert "load it without" in mine["refused"][0]
        assert "has its part" in mine["refused"][1]


@pytest.mark.drawn
def test_two_ranks_are_one_in_fp8(pair, small, expected):
    """A sum in another order may choose the next code: no further from one process than FP8 is from plain."""
    quantised = whole(small, dtype="float32")
    distance = np.abs(quantised - expected).max() / np.abs(expected).max()
    for found in pair[2:4]:
        near(found, quantised, distance)
    near(pair[4], whole(small), 2 * distance)


@pytest.mark.drawn
@pytest.mark.parametrize("scheme", SCHEMES)
def test_four_ranks_share_two_groups(quartet, expected, scheme):
    found = quartet[SCHEMES.index(scheme)]
    near(found, expected, 1e-5)
    assert {heads for one in found for heads in one["heads"]} == {1}


def test_the_trained_model_says_the_same(pair):
    expected = whole(TRAINED, held_out(48))
    assert (pair[5][0]["logits"].argmax(-1) == expected.argmax(-1)).mean() >= 0.95
    near(pair[5], expected, 0.1)


def test_the_plan_counts_what_a_rank_holds(pair, quartet):
    for tp, found in ((2, pair[4]), (4, quartet[len(SCHEMES)])):
        planned = {row.weights for row in plan.rows(PLANNED, tp, None) if row.chosen}
        assert {one["bytes"] for one in found} == planned


def test_what_cannot_be_divided(quartet):
    said = ("do not divide the 6 experts", "divides a deepseek_v4", "split-rank", "empty", "rank 1 has options")
    for found, words in zip(quartet[len(SCHEMES) + 1 :], said, strict=True):
        for error in found:
            assert isinstance(error, ValueError)
            assert words in str(error)
