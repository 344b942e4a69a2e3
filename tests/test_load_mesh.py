"""`flagops.load` over a mesh: each rank has its shards alone, and all have the logits of one."""

import importlib.util
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
from load_data import floating, generated  # noqa: E402

_spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
ranks = importlib.util.module_from_spec(_spec)
sys.modules["ranks"] = ranks
_spec.loader.exec_module(ranks)

IDS = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1))
WIDE = {"dtype": "float32", "activations": "none"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two groups whose rank has two blocks, so that four ranks share them in every scheme."""
    return generated(tmp_path_factory.mktemp("mesh") / "small", o_lora_rank=256, hidden_size=256, n_routed_experts=8)[0]


def whole(folder, ids=IDS, **options):
    model = flagops.load(folder, backend="torch", **options)
    with torch.no_grad():
        return ranks._steps(model, ids).float().numpy()


def near(found, expected, tolerance):
    assert all(np.array_equal(one["logits"], found[0]["logits"]) for one in found)
    assert np.abs(found[0]["logits"] - expected).max() <= tolerance * np.abs(expected).max()


def test_two_ranks_are_one(small):
    """In float32, where only the order of sums differs; with experts read on demand, stacked, and in FP8."""
    room = {"memory": "64GiB"}
    cases = [WIDE, WIDE | room, {"dtype": "float32"} | room, {"dtype": "float32", "pack": True}, {}]
    found = ranks.launch(2, [("packed", {"folder": small, "ids": IDS} | options) for options in cases])
    expected = whole(small, **WIDE)
    near(found[0], expected, 1e-5)
    for mine, again in zip(found[0], found[1], strict=True):
        np.testing.assert_array_equal(mine["logits"], again["logits"])
        assert again["reads"] > 0
        assert mine["heads"] == {2}
        assert not mine["left"]
        assert mine["copied"] == {"o_b_proj.weight", "o_b_proj.weight_scale_inv"}, "everything else lies in the files"
        assert "load it without" in mine["refused"][0]
        assert "has its part" in mine["refused"][1]
    quantised = whole(small, dtype="float32")  # where a sum in another order may choose the next code
    distance = np.abs(quantised - expected).max() / np.abs(expected).max()
    for one in found[2:4]:
        near(one, quantised, distance)
    near(found[4], whole(small), 2 * distance)


@pytest.mark.parametrize("scheme", ["replicate", "split-input", "split-rank"])
def test_four_ranks_share_two_groups(small, scheme):
    found = ranks.launch(4, [("packed", {"folder": small, "ids": IDS, "scheme": scheme} | WIDE)])[0]
    near(found, whole(small, **WIDE), 1e-5)
    assert {heads for one in found for heads in one["heads"]} == {1}


def test_the_trained_model_says_the_same():
    ids = held_out(48)
    found = ranks.launch(2, [("packed", {"folder": TRAINED, "ids": ids})])[0]
    expected = whole(TRAINED, ids)
    assert (found[0]["logits"].argmax(-1) == expected.argmax(-1)).mean() >= 0.95
    near(found, expected, 0.1)


def test_the_plan_counts_what_a_rank_holds(tmp_path):
    model = plan.Model(
        hidden=512, sliding=1, csa=1, hca=1, heads=4, q_rank=128, groups=2, experts=16, width=512, vocabulary=64,
        hash_layers=1, active=4, head_dim=128, o_rank=256, index_heads=16, index_dim=128,
    )  # fmt: skip
    packed_deepseek_v4(tmp_path / "src", o_lora_rank=256, compress_rate_hca=128)
    for tp in (2, 4):
        found = ranks.launch(tp, [("packed", {"folder": tmp_path / "src", "ids": IDS})])[0]
        planned = next(row.weights for row in plan.rows(model, tp, None) if row.chosen)
        assert {one["bytes"] for one in found} == {planned}


def test_what_cannot_be_divided(small, tmp_path):
    cases = [
        ("packed", {"folder": TRAINED, "ids": IDS}),
        ("packed", {"folder": floating(tmp_path, "v3"), "ids": IDS}),
        ("packed", {"folder": small, "ids": IDS, "scheme": "split-ranks"}),
        ("packed", {"folder": tmp_path, "ids": IDS}),
        ("odd_one", {"folder": small}),
    ]
    said = ("do not divide the 6 experts", "divides a deepseek_v4", "split-rank", str(tmp_path), "rank 1 has options")
    for found, words in zip(ranks.launch(4, cases), said, strict=True):
        for error in found:
            assert isinstance(error, ValueError)
            assert words in str(error)
