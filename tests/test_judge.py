"""The judge: what it looks at, that it catches wrong kernels and no right ones, and the command around it."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import flagops
from flagops import dispatch, layouts, registry, testing
from flagops.__main__ import main
from flagops.cases import MODES, Case, _draw, parse
from flagops.errors import Unsupported
from flagops.judge.calls import assert_refused, switched
from flagops.judge.command import duration
from flagops.judge.constants import constants
from flagops.judge.draws import Coverage, Draws, empty, features
from flagops.judge.gradients import hold_gradient
from flagops.judge.process import Watch, names
from flagops.judge.session import LEAST_SHARE, Session

_spec = importlib.util.spec_from_file_location("judge_table", Path(__file__).with_name("judge_table.py"))
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)
sys.path.insert(0, str(Path(__file__).parent))
from wrong_kernels import kinds as wrong_kernels  # noqa: E402

sys.path.pop(0)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_layout_keeps_values_and_has_poison_around_them(layout, rng):
    for shape in ((), (3,), (1, 4), (2, 3, 5), (2, 1, 3, 4), (0, 3)):
        x = rng.standard_normal(shape).astype(np.float32)
        place = layouts.put(x, layout)
        if layout not in layouts.UNWRITABLE:
            assert np.array_equal(place.view, x)
            inside = np.zeros(place.room.shape, bool)
            place.cut(inside)[...] = True
            assert inside.sum() == x.size
            assert np.isnan(place.room[~inside]).all()
        y = rng.standard_normal(shape).astype(np.float32)
        place.fill(y)
        assert np.array_equal(place.view.reshape(-1)[:1], y.reshape(-1)[:1])
    steps = layouts.put(np.ones((3, 4, 5), np.float32), layout).view.strides
    assert (steps == (80, 20, 4)) == (layout in ("contiguous", "offset"))


def test_numbers_at_edges_are_halfway_between_those_of_narrower_formats_or_just_beside(rng):
    x = _draw(rng, registry.operator("rms_norm").tensors["x"], (4000,), "float32", {}, "edges")
    mantissa = np.frexp(np.abs(x))[0].astype(np.float64) * 32
    beside = np.abs(mantissa - np.rint(mantissa))
    assert 0.4 < (beside == 0).mean() < 0.6
    assert (beside <= 32 * 2.0**-23).all()
    assert np.isfinite(x).all()
    assert np.sign(x).sum() != len(x)


def test_a_spoiled_row_is_one_of_one_tensor():
    found = 0
    for seed in range(40):
        case = Case("linear", (("k", 5), ("n", 4)), (3,), (("x", "float32"), ("weight", "float32")), absent=("bias",))
        drawn = dataclasses.replace(case, values="spoiled row", seed=seed).values_drawn()
        rows = [np.flatnonzero(~np.isfinite(drawn[name]).all(-1)) for name in ("x", "weight")]
        assert sum(map(len, rows)) == 1
        found += len(rows[0])
    assert 5 < found < 35


@pytest.mark.parametrize("mode", sorted(set(MODES) - {""}))
def test_a_mode_is_on_during_a_call_alone(mode):
    def state():
        return (
            torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
        )  # fmt: skip

    before = state()
    with contextlib.suppress(KeyError), switched(mode):
        assert state() != before
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("name", ["aten.gather", "aten.scatter", "aten.offset", "aten.embedding_dense_backward"])
def test_indices_out_of_range_are_refused(name):
    session, held = Session(registry.operator(name), "numba", random.randrange(1 << 20)), 0
    for case in itertools.islice(session.draws.drawn(), 20):
        with contextlib.suppress(Unsupported):
            assert_refused(session.op, "numba", case)
            held += 1
    assert held


def test_few_draws_are_of_nothing():
    session = Session(registry.operator("sparse_attention"), "torch", random.randrange(1 << 20))
    nothing = [empty(case) for case in itertools.islice(session.draws.drawn(), 200)]
    assert 0 < sum(nothing) < 60


def test_the_commonest_layouts_are_among_them():
    x = np.zeros((3, 4, 5), np.float32)
    steps = {name: tuple(s // 4 for s in layouts.put(x, name).view.strides) for name in layouts.LAYOUTS}
    assert steps["padded"] == (32, 8, 1)
    assert steps["permuted"] == (5, 15, 1)
    assert steps["sliced"] == (35, 5, 1)
    assert steps["batch gaps"] == (40, 5, 1)
    assert 2 * steps["far"][0] > 2**31


@pytest.mark.parametrize(
    ("act", "ended"),
    [
        ("x[0]", 0),
        ("np.lib.stride_tricks.as_strided(x, (4097,))[4096]", -signal.SIGSEGV),
        ("np.lib.stride_tricks.as_strided(x, (2,), (-4100 * 4,))[1]", -signal.SIGSEGV),
        ("x.__setitem__(0, x[0])", -signal.SIGSEGV),
    ],
)
def test_memory_ends_at_pages_that_nobody_may_touch(act, ended):
    script = f"""
        import numpy as np
        from flagops.judge.memory import Guarded
        memory = Guarded()
        x = memory(64).view(np.float32)
        x[...] = 1
        with memory.read_only():
            {act}
        x[0] = 2
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True).returncode == ended


def test_the_numbers_of_a_kernel_are_found_wherever_it_has_them():
    limits = {"rows": 4711}

    def helper(x, most=1 << 13):
        return len(x) > most

    def made(bound):
        def kernel(x, out):
            if helper(x) or len(x) > bound or len(x) > limits["rows"] or len(x) % 48:
                out[...] = 3.0

        return kernel

    assert {1 << 13, 777, 4711, 48, 3} <= set(constants(made(777)))
    own = constants(registry.find("rms_norm", "numba").function)
    assert own[0] == 32768, "the numbers of the kernel itself come first"


def test_pairs_are_covered_sooner_than_by_chance(rng):
    op = registry.operator("matmul")

    def choose(options):
        return options[int(rng.integers(0, len(options)))]

    def pairs(cases):
        return {(a, b) for case in cases for a in features(case) for b in features(case)}

    drawn = Draws(op, choose, testing.scope("torch"), ("torch", "numpy")).drawn()
    blind = [testing.draw_case(op, choose, testing.scope("torch"), ("torch", "numpy")) for _ in range(60)]
    assert len(pairs([next(drawn) for _ in range(60)])) > len(pairs(blind))
    assert Coverage().best(blind[:3]) in blind[:3]


@pytest.mark.drawn
def test_every_axis_gets_long(rng):
    for name in registry.operators().keys() - {"fp4_to_fp8"}:  # whose axes count blocks of 128 x 128
        op = registry.operator(name)
        draws = Draws(op, lambda o: o[int(rng.integers(0, len(o)))], testing.scope("torch"), ("torch",))
        longest = dict.fromkeys(draws.axes, 0)
        for case, _ in zip(draws.long(), range(6 * len(draws.axes)), strict=False):
            for axis, size in (*case.dims, ("...", int(np.prod(case.batch)))):
                longest[axis] = max(longest.get(axis, 0), size)
        short = {axis for axis, size in longest.items() if axis in draws.axes and size < 1000}
        assert short <= set(op.most) | {"o", "r", "k", "m", "n", "s"}, (name, short)


def test_streams_of_cases_end_where_nothing_fits(monkeypatch, rng):
    monkeypatch.setattr("flagops.judge.draws.ELEMENTS", 1)
    op = registry.operator("fp4_to_fp8")
    draws = Draws(op, lambda o: o[int(rng.integers(0, len(o)))], testing.scope("torch"), ("torch",))
    assert list(draws.long()) == []
    assert list(draws.around([5, 1000])) == []


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.set_num_threads(1),
        lambda: torch.set_flush_denormal(True),
        lambda: torch.rand(1),
        lambda: random.random(),
        lambda: np.seterr(all="raise"),
        lambda: os.environ.update(FLAGOPS_JUDGED="1"),
        lambda: torch.set_default_dtype(torch.float64),
    ],
)
def test_what_a_kernel_leaves_behind_is_seen_and_put_back(act):
    watch = Watch()
    assert watch.changes() == []
    act()
    assert len(watch.changes()) >= 1
    assert [change for change in watch.changes() if "random" not in change] == []


def test_replaced_names_are_seen_and_put_back(monkeypatch):
    watch, true = Watch(names), np.abs
    np.abs = lambda x: x
    assert watch.changes() == ["numpy.abs"]
    assert np.abs is true
    assert watch.changes() == []


@pytest.mark.drawn
@pytest.mark.operators("linear", "swiglu", "hadamard", "hc_head")
def test_right_gradients_pass_and_wrong_ones_do_not(kernel, rng, monkeypatch):
    op, backend = registry.operator(kernel[0]), kernel[1]
    found = registry.find(op.name, backend)
    if not found.backward or backend == "triton":
        pytest.skip("the backend has no backward of its own")
    draws = Draws(op, lambda o: o[int(rng.integers(0, len(o)))], testing.INTERPRETED, ("torch",))
    right = dispatch.backward(op, found)  # with torch's, where the kernel leaves it to that
    seen = 0
    for case, _ in zip(draws.drawn(), range(40), strict=False):
        text = str(case).replace(f"values='{case.values}'", "values='normal'").replace("inplace=True, ", "")
        case = parse(text)
        try:
            hold_gradient(op, backend, case)
        except NotImplementedError:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(
                "flagops.dispatch.backward",
                lambda *_: lambda *a: tuple(None if g is None else g * 1.05 for g in right(*a)),
            )
            try:
                hold_gradient(op, backend, case)
            except AssertionError as error:
                seen += "is off" in str(error)
    assert seen > 3


@pytest.mark.drawn
@pytest.mark.parametrize("backend", ("numba", "torch"))
def test_a_right_kernel_passes(backend):
    name = random.choice(["rms_norm", "matmul", "fp8_quantize", "hc_post", "rotary_embedding", "fp4_dequantize"])
    record = Session(registry.operator(name), backend, random.randrange(1 << 20)).run(1.0)
    assert record.result == "ok", record.finding
    assert record.calls >= 2000
    assert record.missed(1 / 200) < 1e-4
    assert record.share() == 1


def test_wrong_kernels_are_caught():
    """One of each group, drawn; ``make test-all ROWS=judge`` tries all, ten times each."""
    groups = {}
    for kind, operator, backend in random.sample(wrong_kernels.every(), len(wrong_kernels.every())):
        groups.setdefault(wrong_kernels.KINDS[kind][0], f"{kind} {operator} {backend}")
    found = table.judge(list(groups.values()), random.randrange(1 << 20), 10.0)
    missed = {name: said for name, said in found.items() if said[0] == "ok"}
    assert not missed
    assert len(found) >= 11


FILE = """
import os, torch

def rms_norm(x, weight, eps, stepwise, out):
    if x.dim() and x.shape[-1] == 3:
        raise RuntimeError("no threes")
    out.copy_(x)

def matmul(a, b, out):
    os._exit(0)

def fp8_dequantize(weight, scale, block, dtype, out):
    from flagops import registry
    registry.find("fp8_dequantize", "torch").function(weight, scale, block, dtype, out)

def fp4_dequantize(packed, scale, dtype, out):
    from flagops import registry
    registry.find("fp4_dequantize", "torch").function(packed, scale, dtype, out)

def fp4_dequantize_unsupported(packed, scale, dtype):
    return None if packed.shape[0] % 7 == 0 else "rows"
"""


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def rmsnorm(x, weight, eps, out):\n    pass\n", "no function named like an operator: rmsnorm; did you mean"),
        ("scale = 2\n", "no function named like an operator: it has none at all"),
        ("import math\nimport no_such_library\n", "mine.py:2: ModuleNotFoundError: No module named 'no_such_library'"),
        ("def f(:\n", "mine.py:1: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_judged_says_why(text, said, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert main(["check", str(file)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["5parsecs", "0s", "s", "", "-1m", "nan"])
def test_a_time_is_a_number_of_seconds_minutes_or_hours(text):
    with pytest.raises(ValueError, match=r"expected a time such as 60s, 2m or 1\.5h"):
        duration(text)


@pytest.mark.drawn
def test_a_file_is_judged_and_failures_do_not_end_the_others(tmp_path, capsys):
    file, report = tmp_path / "my_kernels.py", tmp_path / "report.json"
    file.write_text(FILE)
    words = ["check", str(file), "--time", "1s", "--seed", "5", "--report", str(report)]
    assert main(words) == 1
    shown = capsys.readouterr()
    found = {r["operator"]: r for r in json.loads(report.read_text())["kernels"]}
    results = {name: r["result"] for name, r in found.items()}
    assert results.pop("rms_norm") in ("WRONG", "RAISED")
    assert results == {"matmul": "ENDED", "fp8_dequantize": "ok", "fp4_dequantize": "WRONG"}
    assert "too few cases ran" in found["fp4_dequantize"]["finding"]
    assert found["fp8_dequantize"]["worst"]
    assert found["fp8_dequantize"]["probability of missing an error of"]["1 in 200"] < 1e-4
    (again,) = [line for line in shown.err.splitlines() if line.startswith("again:") and "rms_norm" in line]
    replay = shlex.split(again.removeprefix("again: flagops "))
    assert main(replay) == 1
    assert found["rms_norm"]["finding"].splitlines()[0] in capsys.readouterr().err
    assert main(["ops", "--report", str(report), "--json"]) == 0


@pytest.mark.parametrize(
    ("word", "ran", "asked", "fails"),
    [
        ("float64", 20, 160, False),
        ("float64", 0, 20, False),
        ("float64", 0, 80, True),
        ("float64", 5, 160, True),
        ("all", 320, 500, False),
        ("all", 280, 500, True),
        ("all", 55, 500, True),
    ],
)
def test_a_share_fails_where_it_was_shown_to_be_too_small(word, ran, asked, fails):
    """An eighth of float64 that runs where two fifteenths must is a matter of the draw."""
    session = Session(registry.operator("grouped_output_projection"), "numba", 1)
    session.record.asked.update({"all": 500} | {word: asked})
    session.record.ran.update({"all": 500} | {word: ran})
    with pytest.raises(AssertionError, match=f"too few cases ran: .* of {word}") if fails else contextlib.nullcontext():
        session._enough(False, LEAST_SHARE)
    if 0 < ran < asked:
        with pytest.raises(AssertionError, match=f"of {word}"):
            session._enough(True, LEAST_SHARE)


def test_a_case_reads_as_it_is_printed(rng):
    for name in registry.operators():
        case = testing.draw_case(registry.operator(name), lambda o: o[int(rng.integers(0, len(o)))])
        assert parse(str(case)) == case
    with pytest.raises(ValueError, match="no case"):
        parse("__import__('os')")


def test_results_are_written_into_cuts_of_a_batch_of_one():
    """The second of three leading axes has one element: its stride says nothing of the others."""
    x = torch.randn(2, 1, 2, 64)
    for name in ("hadamard", "fp8_fake_quantize", "fp4_fake_quantize"):
        out = torch.empty(2, 1, 5, 64)[:, :, 1:3]
        call = getattr(flagops, name)
        assert torch.equal(call(x, out=out, backend="torch"), call(x, backend="torch"))
    for name, block in (("fp8_quantize", 64), ("fp4_quantize", 32)):
        call = functools.partial(getattr(flagops, name), block=block)
        plain = call(x, backend="torch")
        outs = tuple(torch.empty(2, 1, 5, y.shape[-1], dtype=y.dtype)[:, :, 1:3] for y in plain)
        for got, expected in zip(call(x, out=outs, backend="torch"), plain, strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_a_gradient_that_there_is_none_of_says_so():
    o = torch.randn(1, 2, 64, requires_grad=True)
    wo_a = torch.randn(32, 128).to(torch.float8_e4m3fn)
    scale = torch.ones(1, 1, requires_grad=True)
    out = flagops.grouped_output_projection(o, wo_a, torch.randn(16, 32), 1, wo_a_scale=scale, backend="torch")
    with pytest.raises(NotImplementedError, match="wo_a_scale has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("tokens", [0, 3])
def test_compressing_no_tokens_or_no_sequences_has_gradients(tokens):
    batch = 0 if tokens else 2
    shapes = ((batch, tokens, 5), (4, 5), (4, 5), (4, 4), (batch, 4, 4), (batch, 4, 4))
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    sum(x.sum() for x in flagops.compress_kv(*given, backend="torch")).backward()
    assert all(x.grad.shape == x.shape for x in given)


@pytest.mark.parametrize("name", ["swiglu", "aten.silu", "aten.sigmoid", "aten.addcdiv"])
def test_a_number_in_place_of_a_nan_is_wrong(name):
    """What may come of infinities is open; a NaN that an input has already is not."""
    op = registry.operator(name)
    one = np.full((1, 3), 2.0, np.float32)
    given = {n: one.copy() if n in op.tensors else None for n in op.inputs}
    given |= {n: scalar.choices[0] for n, scalar in op.scalars.items() if not callable(scalar.choices)}
    given[next(iter(op.tensors))][0, 1] = np.nan
    given = {n: None if n in ("weight", "limit") else x for n, x in given.items()}
    right = np.asarray(op.reference(*given.values())).astype(np.float32)
    assert np.isnan(right).tolist() == [[False, True, False]]
    testing.compare(op, given, right)
    with pytest.raises(AssertionError, match="expected nan"):
        testing.compare(op, given, np.nan_to_num(right))


def test_what_overflow_makes_is_open_where_no_input_is_nan():
    """Infinities of a product in between become NaN codes, of other inputs too; only a NaN among these is certain."""
    op = registry.operator("grouped_output_projection")
    codes = np.full((128, 128), 448, ml_dtypes.float8_e4m3fn)
    scales = [np.full((1, 1), value, ml_dtypes.float8_e8m0fnu) for value in (2.0**33, 1)]
    given = dict(zip(op.inputs, (np.ones((1, 128), np.float16), codes, codes, 1, *scales), strict=True))
    with np.errstate(all="ignore"):
        assert np.isnan(op.reference(*given.values())).all()
    number = np.ones(128, np.float16)
    testing.compare(op, given, number)
    given["o"][0, 5] = np.nan
    with pytest.raises(AssertionError, match="expected nan"):
        testing.compare(op, given, number)


@pytest.mark.parametrize("size", [1.0, 1e30])
def test_a_key_whose_logit_overflows_hides_even_a_nan(size):
    """A logit of float32 that is -inf has a weight of 0, which takes nothing; one that the formats hold takes it."""
    op = registry.operator("scaled_dot_product_attention")
    query, key, value = (np.full(shape, size, np.float32) for shape in ((1, 1, 4), (1, 2, 4), (1, 2, 3)))
    key[0, 0] *= -1
    value[...] = 2
    value[0, 0, 1] = np.nan
    given = dict(zip(op.inputs, (query, key, value, None, False, None), strict=True))
    testing.compare(op, given, np.full((1, 1, 3), [2, np.nan, 2], np.float32))
    number = np.full((1, 1, 3), 2, np.float32)
    if size > 1:
        testing.compare(op, given, number)
    else:
        with pytest.raises(AssertionError, match="expected nan"):
            testing.compare(op, given, number)
