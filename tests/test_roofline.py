"""``flagops bench --roofline``: how figures follow from times, and that real ones are figures."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flagops.plan.machine import Machine, of_file  # noqa: E402
from flagops.tools import measure, roofline  # noqa: E402

FAST = measure.Settings(seconds=0.0, rounds=1, most=1)


def fixed(monkeypatch, **seconds):
    """Calls that take so long, or longer where something else runs, whatever they do; each is made once."""

    def alternate(calls, sets, out, settings, poisoned):
        for call in calls.values():
            call(*sets[0], out)
        return {name: [9.0, seconds[name]] for name in calls}

    monkeypatch.setattr(measure, "alternate", alternate)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("f32", 4), ("bf16", 2), ("fp8", 1 + 1 / 16384), ("fp4", 17 / 32), ("int8", 1 + 4 / 256)],
)
def test_a_products_figures_are_what_its_small_call_does_not_explain(kind, size, monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", 256)
    fixed(monkeypatch, small=1.0, one=3.0, many=7.0)
    make, call = next((make, call) for name, make, call in roofline.kinds("cpu") if name == kind)
    read, rate = roofline.product(make, call, FAST)
    assert read == 256 * 256 * size / 2
    assert rate == 2 * 127 * 256 * 256 / 4


def test_attention_and_scores(monkeypatch):
    fixed(monkeypatch, attention=3.0, little=1.0, scores=2.0)
    found = roofline.attention(FAST)
    assert found["attention"] == 4 * 64 * 512 * 1023 / 2
    assert found["scores"] == 2 * 64 * 128 * 16384 / 2


@pytest.mark.drawn
def test_layers_of_a_model_that_runs():
    """On a machine whose products take no time, each kind of layer takes some."""
    kinds = dict.fromkeys(("f32", "bf16", "fp8", "fp4", "attention"), 1e20)
    layers, rest, row = roofline.layers(True, Machine("", 1e20, reads=kinds, rates=kinds), FAST)
    assert layers.keys() == {"sliding", "csa", "hca"}
    assert min(*layers.values(), rest, row) > 0
    assert row * 1024 < min(layers.values())  # a row of a prompt takes less than one alone


def test_a_disk_is_read_in_blocks_of_a_file_that_is_large_enough(tmp_path):
    (tmp_path / "small").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="give a larger one"):
        roofline.disk(tmp_path)
    (tmp_path / "large").write_bytes(bytes(20 << 20))
    assert 1e6 < roofline.disk(tmp_path) < 1e12


def test_the_command_writes_what_plan_reads(monkeypatch, tmp_path, capsys):
    from flagops.__main__ import main

    here = Machine(
        "here", 1e10, reads={"fp4": 1e9}, rates={"fp4": 1e10}, layers={"sliding": 1.0, "csa": 1.0, "hca": 1.0},
        rows=1e-9, experts=1.0, step=1.0, process=1, disk=1e9, single=1e9,
    )  # fmt: skip
    monkeypatch.setattr(roofline, "machine", lambda settings, disk: here)
    file = tmp_path / "here.json"
    assert main(["bench", "--roofline", "--json", str(file), "--device", "cpu"]) == 0
    assert "memory, read by all threads" in capsys.readouterr().out
    assert of_file(file) == here
