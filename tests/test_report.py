"""`report()`: times beside calls, what to do about what was left to torch, what was never called, and its texts."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import flagops  # noqa: E402
from flagops import config  # noqa: E402
from flagops.override import timing  # noqa: E402
from flagops.override.report import HINTS, REMEDIES, Report, Row  # noqa: E402


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by one second at each look."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(seconds)))


def rows(handle):
    return {row.op: row for row in handle.report().rows}


def test_times_are_apart_from_those_of_first_calls(ticks):
    x, y = torch.randn(3, 3), torch.randn(3, 4)
    with flagops.enable(backend="numpy", timed=True) as handle:
        for _ in range(4):
            x @ x
        x @ y
        x.cfloat() @ x.cfloat()
        x.cfloat() @ x.cfloat()
    row = rows(handle)["aten::mm"]
    clock, left = row.times["matmul/numpy"], row.times["dtype complex64"]
    assert (clock.calls, clock.seconds, clock.first, clock.compared) == (3, 3.0, 2.0, 0)
    assert (left.calls, left.first) == (1, 1.0)
    assert "5 matmul/numpy, 1 s each" in str(handle.report())
    assert "first calls, which plan and may compile, took 3 s" in str(handle.report())


@pytest.mark.parametrize(("load", "said"), [(1.0, False), (64.0 * (os.cpu_count() or 1), True)])
def test_a_report_says_that_others_share_the_processors(load, said, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    x = torch.randn(3, 3)
    with flagops.enable(backend="numpy", compare=True) as handle:
        for _ in range(3):
            x @ x
    assert ("other programs use the processors too" in str(handle.report())) is said


def test_a_handle_that_takes_no_times_holds_no_clock():
    x = torch.randn(3, 3)
    with flagops.enable(backend="numpy") as handle:
        x @ x
    assert not handle._clocks
    assert "each" not in str(handle.report())


@pytest.mark.parametrize("op", ["mm", "rms_norm", "scaled_dot_product_attention", "add"])
def test_torch_computes_the_same_calls_and_changes_nothing(op, ticks):
    x = torch.randn(2, 2, 4, 4)
    calls = {
        "mm": lambda out: torch.mm(x[0, 0], x[1, 1], out=out),
        "rms_norm": lambda out: F.rms_norm(x, (4,)),
        "scaled_dot_product_attention": lambda out: F.scaled_dot_product_attention(x, x, x),
        "add": lambda out: out.add_(x[0, 0]),
    }
    with flagops.enable(op, backend="numpy"):
        expected, plain = torch.zeros(4, 4), []
        for _ in range(5):
            plain.append(calls[op](expected).clone())
    with flagops.enable(op, backend="numpy", compare=True) as handle:
        got, compared = torch.zeros(4, 4), []
        for _ in range(5):
            compared.append(calls[op](got).clone())
    assert all(map(torch.equal, compared, plain))
    assert handle.report().calls == handle.report().replaced == 5
    (clock,) = (clock for row in handle.report().rows for clock in row.times.values())
    assert (clock.calls, clock.compared, clock.torchs) == (4, 4, 4.0)
    assert "1 s each (torch's 1 s)" in str(handle.report())
    assert "1.00 times as fast" in str(handle.report())


def test_a_replaced_copy_is_compared_without_counting_the_copies_for_it():
    x, y = torch.randn(4, 4), torch.zeros(4, 4)
    with flagops.enable("all", backend="numba", compare=True) as handle:
        for _ in range(3):
            y.copy_(x)
            y.add_(x)
    assert torch.equal(y, x + x)
    assert {op: row.calls for op, row in rows(handle).items()} == {"aten::copy_": 3, "aten::add_.Tensor": 3}


def test_gradients_of_compared_calls_are_the_same():
    x = torch.randn(3, 8, requires_grad=True)
    grads = []
    for words in ({}, {"compare": True}):
        with flagops.enable("rms_norm", backend="numpy", **words):
            for _ in range(3):
                (grad,) = torch.autograd.grad(F.rms_norm(x, (8,)).square().sum(), x)
        grads.append(grad)
    assert torch.equal(*grads)


def test_each_way_out_answers_a_reason_that_is_given():
    """Every pattern is that of a reason which some call here is left for."""
    x, q, wide = torch.randn(4, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 4, 3, 4)
    shared, half = torch.zeros(8, 4), torch.ones(4, 4, dtype=torch.float16)
    with flagops.enable(backend="numba") as handle:
        x.cfloat() @ x.cfloat()
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        torch.addmm(shared[0], x, x, out=shared[:4])
        with torch.autograd.forward_ad.dual_level():
            F.rms_norm(x, (4,))
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(wide, q, q)
        with pytest.raises(RuntimeError):
            torch.mm(x, x, out=torch.zeros(4, 4, dtype=torch.float64))
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            F.scaled_dot_product_attention(q, q, q)
        with flagops.using(budget=1):
            torch.addmm(half, half, half, beta=2)
    with config.using(fuel=0), flagops.enable(backend="numba") as empty:
        x @ x
    measured = Row("aten::mm", "CPU", {}, {"torch's own kernel is faster for one row": 1})
    reasons = handle.report().remedies | empty.report().remedies | Report((measured,), {}).remedies
    unseen = {pattern for pattern, _ in REMEDIES if not any(re.match(pattern, reason) for reason in reasons)}
    assert unseen == set(), reasons
    assert all(reasons.values())


def test_a_measured_choice_names_the_backend_of_its_device():
    reason = "torch's own kernel is faster for one row, says flagops/orders/cpu.json"
    texts = {key: Row("aten::mm", key, {}, {reason: 1}).remedy(reason) for key in ("CPU", "CUDA")}
    assert 'backend="numba"' in texts["CPU"]
    assert 'backend="triton"' in texts["CUDA"]
    assert "flagops tune" in str(Report((Row("aten::mm", "CPU", {}, {reason: 1}),), {}))


def test_what_was_never_called_is_named_with_a_hint():
    x = torch.randn(4, 4)
    with flagops.enable("rms_norm,mm,bmm", backend="numpy") as handle:
        x @ x
    report = handle.report()
    assert report.uncalled == ("bmm", "rms_norm")
    assert "asked for and never called: bmm, rms_norm" in str(report)
    assert HINTS["rms_norm"] in str(report)
    with flagops.enable("rms_norm,mm", backend="numpy") as handle:
        torch.mm(x, x, out=torch.empty(4, 4))
        F.rms_norm(x, (4,))
    assert handle.report().uncalled == ()


def test_lines_stand_in_one_order():
    x = torch.randn(4, 4)
    calls = [lambda: x @ x, lambda: x @ x[0], lambda: F.rms_norm(x, (4,)), lambda: x[None] @ x[None]]
    texts = []
    for ordered in (calls, calls[::-1]):
        with flagops.enable(backend="numpy") as handle:
            for call in ordered:
                call()
        texts.append(str(handle.report()))
    assert texts[0] == texts[1]


def test_json_holds_what_the_text_says():
    x = torch.randn(4, 4)
    with flagops.enable("mm,mv", backend="numpy", timed=True) as handle:
        for _ in range(3):
            x @ x
        x.cfloat() @ x.cfloat()
    found = json.loads(json.dumps(handle.report().to_json()))
    (row,) = found["rows"]
    assert (row["op"], row["replaced"], row["left"]) == ("aten::mm", {"matmul/numpy": 3}, {"dtype complex64": 1})
    assert row["times"]["matmul/numpy"]["calls"] == 2
    assert (found["calls"], found["replaced"], found["share"], found["uncalled"]) == (4, 3, 0.75, ["mv"])
    assert set(found["remedies"]) == {"dtype complex64"}


def test_shares_of_all_computing_calls_stand_at_the_head():
    x = torch.randn(4, 4)

    def work():
        (x @ x).relu().sum()

    with flagops.enable("mm", backend="numpy") as handle:
        work()
        seen = flagops.coverage(work)
    report = handle.report(seen)
    assert str(report).splitlines()[3].startswith("1 of 3 computing calls by flagops (33%)")
    assert report.to_json()["coverage"]["calls"] == 3


def test_forked_workers_are_named_as_not_counted():
    x = torch.randn(4, 4)
    with flagops.enable("mm", backend="numpy") as handle:
        assert "not counted: worker processes (DataLoader, multiprocessing)" in str(handle.report())
        worker = multiprocessing.get_context("fork").Process(target=torch.mm, args=(x, x))
        worker.start()
        worker.join()
    assert worker.exitcode == 0
    assert handle.report().calls == 0
    assert "1 forked meanwhile" in str(handle.report())


@pytest.mark.drawn
def test_run_prints_it_in_the_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nx = torch.ones(3, 3)\nfor _ in range(3):\n    y = x @ x\nprint(y[0], sys.argv[1:])"
    )
    words = [sys.executable, "-m", "flagops", "run", "--compare", "--shares", str(script), "--shares"]
    done = subprocess.run(words, capture_output=True, text=True, env=None, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor([3., 3., 3.]) ['--shares']\n"
    assert re.search(r"\d of \d calls replaced", done.stderr) or "flagops tune" in done.stderr, done.stderr
    assert "computing calls by flagops" in done.stderr


def test_counts_do_not_depend_on_times(rng):
    found = []
    for words in ({}, {"timed": True}, {"compare": True}):
        with flagops.enable(backend="numba", **words) as handle:
            model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0).train()
            model(torch.randn(3, 2, 16)).sum().backward()
        found.append(Counter({row.op: row.calls for row in handle.report().rows}))
    assert found[0] == found[1] == found[2]
