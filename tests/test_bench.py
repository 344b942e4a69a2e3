"""`flagops bench`: a wrong result gets no speed, whatever it pretends."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flagops
from flagops import arrays, registry, testing
from flagops.call import of
from flagops.errors import Unsupported
from flagops.tools import bench, companions, measure, results, workloads

FAST = measure.Settings(seconds=0.01, rounds=3, most=4)
WORKLOAD = "v4-flash.indexer.weights_proj.1"


@pytest.fixture(scope="module")
def trial() -> measure.Trial:
    return measure.prepare(registry.operator("matmul"), WORKLOAD, cold=False)


def correct(a: Any, b: Any, out: Any) -> None:
    of(registry.operator("matmul"))(a, b, out, backend="torch")


class Late:
    """Right while it is looked at for the first time."""

    calls = 0

    def __call__(self, a: Any, b: Any, out: Any) -> None:
        self.calls += 1
        if self.calls < 4:
            correct(a, b, out)
        else:
            out.zero_()


def unfinished(a: Any, b: Any, out: Any) -> None:
    out[..., :-1] = a @ b[..., :-1]


def last_column(a: Any, b: Any, out: Any) -> None:
    correct(a, b, out)
    out[..., -1] += 1


def raises(a: Any, b: Any, out: Any) -> None:
    raise RuntimeError("no such instruction")


def refuses(a: Any, b: Any, out: Any) -> None:
    raise Unsupported("needs a GPU")


def test_a_correct_kernel_is_timed_against_the_baseline(trial: measure.Trial) -> None:
    row, baseline = measure.compare(trial, {"mine": correct}, {"theirs": correct}, FAST)
    assert row.match == "bound"
    assert len(row.times) == len(baseline.times) >= FAST.rounds
    assert not row.wrong
    assert row.ratio is not None
    assert row.ratio > 0
    assert baseline.ratio == 1


@pytest.mark.parametrize(
    "wrong", [Late(), unfinished, last_column, raises], ids=lambda x: getattr(x, "__name__", "late")
)
def test_a_wrong_kernel_gets_no_speed(trial: measure.Trial, wrong: Any) -> None:
    row, good = measure.compare(trial, {"mine": wrong, "good": correct}, {}, FAST)
    assert row.wrong
    assert row.problem
    assert not row.times
    assert row.ratio is None
    assert good.times


def test_a_refusal_is_no_error(trial: measure.Trial) -> None:
    (row,) = measure.compare(trial, {"mine": refuses}, {}, FAST)
    assert not row.wrong
    assert not row.times
    assert row.problem == "needs a GPU"


def test_the_command_exits_with_1_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "candidates", lambda op, backends: {"mine": last_column})
    monkeypatch.setattr(measure, "roofline", lambda settings: measure.Roofline(1e15, 1e15))
    path = tmp_path / "bench.json"
    assert bench.run(["matmul", "--workload", WORKLOAD, "--quick", "--device", "cpu", "--json", str(path)]) == 1
    assert "WRONG" in capsys.readouterr().out
    found = json.loads(path.read_text())
    (mine,) = found["not_timed"]
    assert "stats" not in mine
    assert mine["extra_info"]["wrong"]
    assert all(entry["stats"] and entry["extra_info"]["baseline"] for entry in found["benchmarks"])


def test_json_markdown_and_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "roofline", lambda settings: measure.Roofline(1e15, 1e15))
    written = {name: tmp_path / name for name in ("bench.json", "bench.md", "bench.svg")}
    command = ["matmul", "--workload", WORKLOAD, "--backend", "torch", "--quick", "--device", "cpu"]
    command += ["--json", str(written["bench.json"]), "--markdown", str(written["bench.md"])]
    pytest.importorskip("matplotlib")
    assert bench.run([*command, "--plot", str(written["bench.svg"])]) == 0
    found = json.loads(written["bench.json"].read_text())
    assert {"machine_info", "benchmarks", "datetime", "version"} <= found.keys()
    entry = found["benchmarks"][0]
    assert entry["params"] == {"workload": WORKLOAD, "dtype": "bfloat16", "by": "torch"}
    assert {"min", "max", "mean", "median", "stddev", "rounds", "iqr", "q1", "q3", "ops", "data"} <= entry[
        "stats"
    ].keys()
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"])
    assert entry["extra_info"]["match"] == "bound"
    assert WORKLOAD in written["bench.md"].read_text()
    assert written["bench.svg"].read_text().startswith("<?xml")
    assert "roofline" in capsys.readouterr().out


def times(*values: float, **facts: Any) -> measure.Row:
    row = measure.Row("matmul", WORKLOAD, "float32", facts.pop("name", "numba"), **facts)
    row.times = list(values)
    return row


def test_a_share_above_all_of_the_roofline_is_an_error_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "roofline", lambda settings: measure.Roofline(1.0, 1.0))
    command = ["matmul", "--workload", WORKLOAD, "--backend", "torch", "--quick", "--device", "cpu"]
    assert bench.run(command) == 1
    said = capsys.readouterr().out
    assert "WRONG ROOFLINE" in said
    assert "% !" in said


def test_the_roofline_is_the_best_of_what_moves_and_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"read": [4.0, 1.0], "copy": [1.0, 9.0], "triad": [2.0, 3.0], "float32": [5.0, 2.0], "bfloat16": [1.0]}
    found["int8"] = [0.5]
    monkeypatch.setattr(measure, "alternate", lambda *_, **__: found)
    limits = measure.roofline(FAST)
    assert limits.bandwidth == 2 * (256 << 20)  # a copy reads and writes 256 MiB in its best second
    assert (limits.matmul, limits.half, limits.int8) == (2048**3, 2 * 2048**3, 4 * 2048**3)
    row = times(1.0, flops=3.0)
    assert measure.Roofline(1.0, 2.0, 6.0).share(row) == 1.5
    assert measure.Roofline(1.0, 2.0).exceeded(row)
    assert not measure.Roofline(1.0, 2.5).exceeded(row), "weights that were packed exceed torch's products by a little"
    assert measure.Roofline(1.0, 9.0).exceeded(times(1.0, bytes=1.1)), "nothing exceeds memory"
    row.dtype = "bfloat16"
    assert measure.Roofline(1.0, 2.0, 6.0).share(row) == 0.5
    assert measure.Roofline(1.0, 2.0, 6.0, 12.0).share(row) == 0.5, "units for int8 are none of this operator's"
    row.operator = "int8_matmul"
    assert measure.Roofline(1.0, 2.0, 6.0, 12.0).share(row) == 0.25
    assert measure.Roofline(1.0, 5.0, 6.0).best(measure.Roofline(2.0, 4.0)) == measure.Roofline(2.0, 5.0, 6.0)


def test_a_wide_spread_is_said_in_a_word(trial: measure.Trial) -> None:
    assert times(1.0, 1.0, 1.0, 1.4, 1.4).disturbed
    assert not times(1.0, 1.0, 1.0, 1.0, 1.9).disturbed, "one of five is no spread"
    assert " ~" in results.cells(times(1.0, 2.0, 3.0), measure.Roofline(1.0, 1.0))[4]


def test_a_plot_has_a_title_its_baseline_and_ticks_that_stand_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path: drawn.append(self))
    rows = [times(1.0, ratio=ratio) for ratio in (0.9, 1.1)]
    results.plot(tmp_path / "a.svg", [*rows, times(1.0, name="torch.matmul", baseline=True, ratio=1.0)])
    (figure,) = drawn
    (axes,) = figure.axes
    assert "matmul" in figure.get_suptitle()
    assert "torch.matmul" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.5", "1", "2"]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert not any(one.overlaps(two) for one, two in itertools.pairwise(boxes))
    with pytest.raises(ValueError, match="nothing to plot"):
        results.plot(tmp_path / "a.svg", [times(1.0)])


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="did you mean 'matmul'"):
        bench.run(["matmull", "--device", "cpu"])
    with pytest.raises(ValueError, match="no workload contains"):
        bench.run(["--workload", "v5-flash", "--device", "cpu"])
    with pytest.raises(ValueError, match=r"no workload of rms_norm contains '4096x4096.1'; known: v4"):
        bench.run(["rms_norm", "--workload", "4096x4096.1", "--device", "cpu"])  # linear has it


def test_only_a_fresh_process_can_do_without_bf16() -> None:
    with pytest.raises(ValueError, match="before torch is loaded"):
        bench.run(["--no-native-bf16"])
    code = "from flagops import bench; bench._targets = lambda *_: 0; bench.run(['--no-native-bf16', '--targets'])"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert bench.NO_BF16 in ran.stdout
    assert "emulated" in ran.stdout


def test_candidates_alternate_on_rotating_inputs_into_nan() -> None:
    seen: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        def call(i: int, out: torch.Tensor) -> None:
            assert out.isnan().all()
            seen.append((name, i))

        return call

    out = torch.empty(1 << 22)  # filling it takes no time that counts, but each call is one round
    measure.alternate({"a": note("a"), "b": note("b")}, [(0,), (1,), (2,)], out, measure.Settings(0, 4, 4))
    rounds: list[str] = [seen[0][0]]
    for name, _ in seen[1:]:
        if name != rounds[-1]:
            rounds.append(name)
    assert rounds == ["a", "b", "a", "b", "a", "b"]  # ab ba ab ba ab
    assert [i for _, i in seen] == [n % 3 for n in range(len(seen))]


@pytest.mark.drawn
@pytest.mark.parametrize("name", registry.cards())
def test_an_excerpt_of_the_result_is_the_result_of_the_excerpt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.operator(name)
    whole = workloads._spread
    monkeypatch.setattr(workloads, "_spread", lambda size, limit, device: whole(size, min(limit, 3), device))
    rng = np.random.default_rng(5)
    for _ in range(15):
        small = testing.Scope((1, 2, 7, 16), 1 << 20, 15)
        drawn = testing.draw_case(op, lambda options: options[int(rng.integers(len(options)))], small)
        given = [arrays.as_torch(np.array(x)) if isinstance(x, np.ndarray) else x for x in drawn.arguments().values()]
        bound = op.bind((*given, None))
        outs = [torch.zeros(s, dtype=getattr(torch, d)) for s, d in zip(bound.shapes, bound.results, strict=True)]
        out = tuple(outs) if op.several else outs[0]
        of(op)(*given, out=out, backend="numpy")
        if op.exact or not any(x.isnan().any() for x in outs if x.dtype.itemsize > 1):
            assert workloads.verify(op, given, out) == ("bits" if op.exact else "bound")


@pytest.mark.parametrize("name", dir(flagops.aten))
def test_operators_of_torch_are_measured_beside_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each card's workload, made small, is drawn, verified, and right as torch's own operator computes it."""
    op = registry.operator(f"aten.{name}")
    for load, said in op.workloads.items():
        small = {k: min(x, 48) if isinstance(x, int) else x for k, x in said.items()}
        small |= {"batch": tuple(min(x, 8) for x in said["batch"])} if "batch" in said else {}
        monkeypatch.setitem(op.workloads, load, small)
        half = said.get("dtype") == "bfloat16"  # in which torch rounds what cards do not
        for call in (measure.candidates(op, ["numpy"]) | ({} if half else companions.baselines(op))).values():
            trial = measure.prepare(op, load, cold=False)
            measure.poison(trial.out)
            call(*trial.sets[0], trial.out)
            workloads.verify(op, trial.sets[0], trial.out)


def test_inputs_are_those_of_the_workload() -> None:
    op = registry.operator("sparse_attention")
    q, kv, sink, indices, scale = workloads.inputs(op, workloads.case(op, "v4-flash.decode-1"))
    assert q.shape == (1, 1, 64, 512)
    assert q.dtype == kv.dtype == torch.bfloat16
    assert sink.dtype == torch.float32
    assert scale == 512**-0.5
    assert indices.unique().numel() == indices.numel() == 640
    assert 0 <= int(indices.min()) <= int(indices.max()) < kv.shape[1]


def test_a_workload_in_another_dtype() -> None:
    matmul, fp4 = registry.operator("matmul"), registry.operator("fp4_dequantize")
    assert dict(workloads.case(matmul, WORKLOAD, "float64").dtypes) == {"a": "float64", "b": "float64"}
    assert dict(workloads.case(fp4, "4096x7168", "float16").scalars)["dtype"] == "float16"
    with pytest.raises(Unsupported):
        workloads.case(fp4, "4096x7168", "float64")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_extra_memory_sees_a_temporary() -> None:
    assert (measure.extra_memory(lambda: None) or 0) < 4 << 20
    found = measure.extra_memory(lambda: torch.ones(16 << 20).sum())
    assert found is not None
    assert 60 << 20 < found < 80 << 20


def test_targets_pass_or_miss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    targets = companions.load("targets")
    if targets is None:
        pytest.skip("benchmarks/ is not here")
    assert targets.Result("a", 1.0, 0.9).reached
    assert not targets.Result("a", 1.0, 0.9, most=True).reached
    assert targets.Result("a", 0.0).reached

    def missed(settings: measure.Settings) -> Iterator[Any]:
        yield targets.Result("a promise", 0.5, 0.9)

    monkeypatch.setattr(targets, "TARGETS", (missed, missed))
    path = tmp_path / "targets.json"
    assert bench.run(["--targets", "--device", "cpu", "--json", str(path)]) == 1
    found = json.loads(path.read_text())["targets"]
    assert [entry["reached"] for entry in found] == [False] * 2


def test_without_a_checkout_there_are_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "load", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs a checkout"):
        bench.run(["--targets", "--device", "cpu"])
    assert companions.baselines(registry.operator("matmul")) == {}
