"""`flagops.coverage`: the computing calls of a program below autograd, each with who served it or why torch did."""

import copy
import json
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import flagops
from flagops.__main__ import main
from flagops.override import interpose
from flagops.override.annotations import annotated
from flagops.override.coverage import Coverage, watching
from flagops.override.forms import kind

sys.path.insert(0, str(Path(__file__).parent))
from opinfo_calls import Check, Choice, Room, _out, checks, infos, observe
from opinfo_differences import differences
from opinfo_judge import Bench, replaced
from opinfo_results import Tally, joined, report, summed, written
from overriding import everything_taken, untouched  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Kineto's first profile of a process takes a second; no test shall time it."""
    with profile():
        pass


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.RMSNorm(24), torch.nn.Linear(24, 24)

    def forward(self, x):
        heads = self.linear(self.norm(x)).view(2, 3, 5, 24)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)


def by_overload(found):
    return {(row.overload, row.by): row.calls for row in found.rows}


def test_each_call_has_who_served_it_or_the_reason():
    others, floats = torch.ones(3, 3, dtype=torch.cfloat), torch.randn(3, 3)

    def work():
        floats.mm(floats.t()).logcumsumexp(0)
        torch.mm(others, others)
        torch.mm(floats, floats, out=torch.empty(3, 3))
        floats.cumprod(0)

    with flagops.enable("mm", backend="numba"):
        found = flagops.coverage(work)
    assert by_overload(found) == {
        ("mm", "matmul/numba"): 1,
        ("mm", ""): 1,
        ("mm.out", "matmul/numba"): 1,
        ("logcumsumexp", ""): 1,
        ("cumprod", ""): 1,
    }
    (left,) = (row for row in found.rows if row.overload == "mm" and not row.by)
    assert left.reason == "dtype complex64"
    assert found.calls == 5


@pytest.mark.parametrize("grad", [False, True])
def test_replaced_compositions_count_as_one_call_and_others_as_their_parts(grad):
    block, x = Block(), torch.randn(2, 15, 24, requires_grad=grad)

    def step():
        y = block(x)
        if grad:
            y.sum().backward()

    with flagops.enable(backend="numba"):
        step()
        found = by_overload(flagops.coverage(step))
    assert found["rms_norm", "rms_norm/numba"] == 1
    assert found["scaled_dot_product_attention", "scaled_dot_product_attention/numba"] == 1
    assert found["addmm", "linear/numba"] == 1
    assert ("_OwnBackward", "gradient of a composite") in found if grad else len(found) == 3
    plain = flagops.coverage(step)
    with flagops.enable("mm"):
        (row,) = (r for r in flagops.coverage(block, x.detach()).rows if r.overload.startswith("_scaled_dot_product"))
    assert row.by == ""
    assert plain.calls >= 3


def test_the_parts_of_a_composition_that_was_left_say_why_it_was():
    query = torch.randn(1, 2, 5, 8)
    with flagops.enable("scaled_dot_product_attention", backend="numba"):
        found = flagops.coverage(torch.nn.functional.scaled_dot_product_attention, query, query, query, dropout_p=0.5)
    assert found.calls > 2
    assert {row.reason for row in found.rows} == {"scaled_dot_product_attention: dropout"}


def test_what_the_handle_counted_is_what_coverage_shows():
    """Plans known before, made meanwhile and made after: each call is counted once, by the handle and here."""
    a, b = torch.randn(4, 4), torch.randn(5, 5)
    with flagops.enable(backend="numba") as handle:
        a.mm(a)
        found = flagops.coverage(lambda: (a.mm(a), b.mm(b), b.mm(b)))
        plans = [count for _, count in interpose.live["mm", "CPU"].plans.values()]
        a.mm(a)
        b.mm(b)
        (row,) = handle.report().rows
        assert plans == [handle._counters["mm", "CPU", "matmul/numba", ""].add] * 2
    assert row.replaced == {"matmul/numba": 6}
    assert by_overload(found) == {("mm", "matmul/numba"): 3}


def test_without_enable_the_default_is_watched_and_undone():
    with everything_taken():
        found = flagops.coverage(torch.nn.functional.rms_norm, torch.randn(3, 24), (24,))
    assert by_overload(found) == {("rms_norm", "rms_norm/numba"): 1}
    assert not interpose.live


def test_an_error_of_the_program_comes_through_and_leaves_nothing():
    counter = flagops.override.Handle.counter
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        flagops.coverage(torch.mm, torch.ones(2, 3), torch.ones(2, 3))
    assert flagops.override.Handle.counter is counter
    assert not interpose.live


def test_a_handle_that_the_program_makes_is_seen():
    a = torch.randn(4, 4)

    def work():
        with flagops.enable(backend="numba"):
            a.mm(a)

    with flagops.enable("bmm", backend="numba"):
        assert by_overload(flagops.coverage(work)) == {("mm", "matmul/numba"): 1}
        (row,) = flagops.coverage(a.mm, a).rows
    assert row.reason == "enable was not asked for it"


@pytest.mark.parametrize(
    ("overload", "expected"),
    [
        *(
            (name, "view")
            for name in ("view", "t", "slice.Tensor", "_unsafe_view", "expand", "detach", "split.Tensor", "detach_")
        ),
        *((name, "allocation") for name in ("empty.memory_format", "new_empty", "empty_like", "resize_")),
        *((name, "read") for name in ("_local_scalar_dense", "is_set_to")),
        *((name, "CompositeImplicitAutograd") for name in ("linear", "matmul", "reshape", "rms_norm")),
        *((name, "computing") for name in ("copy_", "_to_copy", "fill_.Scalar", "add_.Tensor", "equal", "mm.out")),
        *((name, "computing") for name in ("_foreach_add_.Scalar", "topk", "silu_backward", "zeros_like")),
        *((name, "") for name in ("no_such_operator", "add.NoSuch")),
    ],
)
def test_kinds_follow_from_schemas(overload, expected):
    assert kind(overload) == expected


def test_every_overload_that_is_replaced_is_a_computing_call():
    from flagops.override.forms import forms
    from flagops.override.lowering import LOWERINGS

    kinds = {overload: kind(overload) for name in LOWERINGS for overload in forms(name)}
    assert set(kinds.values()) <= {"computing", "CompositeImplicitAutograd"}, kinds


def test_times_are_those_of_the_calls():
    big, small = torch.randn(512, 512), torch.randn(4, 4)
    found = flagops.coverage(lambda: [big @ big for _ in range(20)] + [small + small])
    assert isinstance(found, Coverage)
    assert found.rows[0].overload == "mm"
    assert found.seconds == sum(row.seconds for row in found.rows)
    assert found.rows[0].seconds > 10 * found.rows[-1].seconds


def test_totals_texts_and_json_agree():
    a = torch.randn(4, 4)
    with flagops.enable("mm", backend="numba"), watching() as watched:
        a.mm(a)
        a.mm(a)
        a.exp2()
    found = watched()
    assert found.calls == 3
    assert found.share_of_calls == 2 / 3
    assert 0 < found.share_of_time < 1
    assert "2 of 3 computing calls by flagops (67%)" in str(found)
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["calls"] == 3
    assert {row["overload"] for row in plain["rows"]} == {"mm", "exp2"}


def test_names_of_operators_still_ask_what_ran():
    assert set(flagops.coverage("matmul")) == {"calls", "refused"}
    with pytest.raises(TypeError, match="no further arguments"):
        flagops.coverage("matmul", torch.ones(2))
    with pytest.raises(TypeError, match="expected a function"):
        flagops.coverage(3)


def test_a_call_stands_in_the_trace_with_operator_backend_and_shapes():
    a, others = torch.randn(2, 3), torch.ones(3, 2, dtype=torch.cfloat)
    with flagops.enable(backend="numba"):
        a.mm(a.t())
        torch.mm(others, others.t())
        site = interpose.live["mm", "CPU"]
        ours, left = site.plans.values()
        with profile() as profiled:
            compute, count = annotated(site, ours, (a, a.t()))
            got = compute((a, a.t()))
            assert annotated(site, left, (others, others.t())) == left
        assert torch.equal(got, a.mm(a.t()))
    assert count is ours[1]
    names = [event.name for event in profiled.events()]
    assert "flagops::matmul/numba [2, 3] [3, 2]" in names
    assert "flagops leaves mm [3, 2] [2, 3] to torch: dtype complex64" in names


def test_the_command_watches_a_script(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\na = torch.randn(4, 4)\nprint('said', sys.argv[1:], (a @ a).shape)\n")
    monkeypatch.setattr(sys, "argv", sys.argv.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert main(["coverage", str(script), "--json", "--backend", "numba", "--", "-x"]) == 0
    said = capsys.readouterr()
    assert "said ['-x']" in said.err
    rows = json.loads(said.out)["rows"]
    assert [row["by"] for row in rows if row["overload"] == "mm"] == ["matmul/numba"]
    assert main(["coverage", "NoSuchModel"]) == 2


def test_the_command_watches_a_model(capsys):
    assert main(["coverage", "GPT2LMHeadModel", "--json", "--backend", "numba"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"addmm", "mm", "argmax", "native_layer_norm"} <= {row["overload"] for row in found["rows"]}
    assert 0 < found["share_of_calls"] < 1


def poisoned(outcome, change):
    got = copy.deepcopy(outcome)
    change(got)
    return got


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("times what is allowed", lambda o: o.leaves[0].mul_(1 + 2**-18)),
        ("where torch has", lambda o: o.leaves[0][0].fill_(float("inf"))),
        ("where torch has", lambda o: o.facts.__setitem__(0, (torch.float64, *o.facts[0][1:]))),
        ("where torch has", lambda o: o.facts.__setitem__(0, (*o.facts[0][:2], (1, 3), *o.facts[0][3:]))),
        ("where torch has", lambda o: o.facts.__setitem__(0, (*o.facts[0][:4], 0))),
        ("number of results", lambda o: o.facts.append(int)),
        ("an input was changed", lambda o: setattr(o, "changed", True)),
        ("warnings", lambda o: o.warned.append("resized")),
        ("where torch has a result", lambda o: setattr(o, "error", ("RuntimeError", "mm: no"))),
        ("", lambda o: o.leaves[0].copy_(torch.nextafter(o.leaves[0], torch.tensor(torch.inf)))),
    ],
)
def test_the_judge_by_samples_sees_each_kind_of_difference(said, change, rng):
    args = tuple(torch.from_numpy(rng.standard_normal((3, 3), dtype="float32")) for _ in range(2))
    check = Check("sample", torch.mm, args)
    theirs = observe(check, Room())
    assert differences(check, observe(check, Room()), theirs, True, {"mm"}, False) == ""
    found = differences(check, poisoned(theirs, change), theirs, False, {"mm"}, False)
    assert said in found if said else found == ""
    exact = differences(check, poisoned(theirs, change), theirs, True, {"mm"}, False)
    assert exact, "what is held bit by bit may not be a rounding away"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_follows_a_step_enlarges_its_roundings(dtype, rng):
    """Moved inputs do not show them, and in float64 torch's own result does not either."""
    x, far = torch.from_numpy(rng.uniform(1, 2, 64)).to(dtype), 1e5
    check = Check("gradient", lambda x: (x + far) - far, (x,))
    theirs = observe(check, Room())
    unit = torch.finfo(dtype).eps
    for off, right in ((0, True), (far * unit, True), (far * unit * 20, False)):
        ours = poisoned(theirs, lambda o: o.leaves[0].copy_(x + off))  # noqa: B023
        assert (differences(check, ours, theirs, False, {"add"}, True) == "") == right
    ours = poisoned(theirs, lambda o: o.leaves[0].copy_(x + far * unit * 2))
    assert differences(check, ours, theirs, False, {"add"}, False)


def test_a_call_of_numbers_has_no_floats_to_move():
    assert not Check("sample", torch.linspace, (-1.0, 1.0, 50)).floats()
    assert not Check("sample", _out, (torch.empty(50), torch.linspace, (-1.0, 1.0, 50), {})).floats()
    assert Check("sample", torch.mm, (torch.ones(2, 2), torch.ones(2, 2))).floats()
    assert Check("sample", _out, (torch.empty(2), torch.exp, (torch.ones(2),), {})).floats()


def test_which_of_equal_elements_is_chosen_is_open_and_nothing_else():
    x = torch.tensor([1, 3, 3, 2])
    check = Check("sample", torch.topk, (x, 2), picks=(x, -1))
    theirs = observe(check, Room())
    for picked, right in (([2, 1], True), ([1, 1], False), ([1, 3], False)):
        ours = poisoned(theirs, lambda o: o.leaves.__setitem__(1, torch.tensor(picked)))  # noqa: B023
        assert (differences(check, ours, theirs, True, {"topk"}, False) == "") == (right or picked == [1, 2])
    swapped = poisoned(theirs, lambda o: o.leaves.__setitem__(1, theirs.leaves[1].flip(0)))
    assert differences(Check("sample", torch.topk, (x, 2)), swapped, theirs, True, {"topk"}, False)


def test_a_wider_destination_holds_what_was_computed():
    x = torch.linspace(-20, -12, 7)  # where moving an operand moves nothing
    args = torch.empty(7, dtype=torch.float64), torch.expm1, (x,), {}
    wide, narrow = (Check("sample", _out, args, writes=True, computed=dtype) for dtype in (None, torch.float32))
    theirs = observe(wide, Room())
    ours = poisoned(theirs, lambda o: [x.mul_(1 + 2**-24) for x in o.leaves[:2]])
    assert differences(narrow, ours, theirs, False, {"expm1"}, False) == ""
    assert "times what is allowed" in differences(wide, ours, theirs, False, {"expm1"}, False)


def test_what_torch_leaves_to_the_order_of_its_loops_is_nobodys_error():
    labels = {
        name: {check.label for check in checks(infos()[name], torch.float32, Choice(1))}
        for name in ("tril", "fill", "add")
    }
    assert "sample 0 in place, expanded" not in labels["tril"]  # whose rows differ
    assert "sample 0 in place, expanded" in labels["fill"]
    assert "sample 0 in place, expanded" in labels["add"]  # which torch refuses


def test_the_judge_calls_nothing_of_its_own_under_a_replacement():
    bench = Bench(Namespace(backend="numba", device="cpu", most=1, seed=None), lambda _: None)
    found = bench.judge("neg", "int64", ["neg", "eq", "all", "isnan", "bitwise_and"], True)
    assert {name for name, tally in found["overloads"].items() if tally["ours"] or tally["left"]} == {
        "neg", "neg_", "neg.out",
    }  # fmt: skip
    assert not any(tally["failures"] for tally in found["overloads"].values())


def test_errors_must_be_torchs_or_name_the_operator():
    check = Check("wrong", torch.mm, (torch.ones(2, 3), torch.ones(2, 3)), wrong=True)
    theirs = observe(check, Room())
    assert theirs.error[0] == "RuntimeError"
    for error, right in (
        (("RuntimeError", "mm: shapes"), True),
        (("RuntimeError", "no"), False),
        (("TypeError", "mm"), False),
    ):
        ours = poisoned(theirs, lambda o: setattr(o, "error", error))  # noqa: B023
        assert (differences(check, ours, theirs, False, {"mm"}, False) == "") == right


def test_copies_for_a_call_share_memory_as_the_sample_does():
    memory = torch.arange(13.0)
    first, over, rows = memory[:-1].view(3, 4), memory[1:].view(3, 4), memory[:1].expand(4)
    copies = Room().values((first, [over, rows], first))
    assert copies[0] is copies[2]
    assert copies[1][0].stride() == (4, 1)
    assert copies[1][1].stride() == (0,)
    copies[0][0, 1] = 99
    assert copies[1][0][0, 0] == 99
    assert memory[1] == 1


def test_a_wrong_kernel_fails_and_what_torch_computed_is_untested():
    bench = Bench(Namespace(backend="numba", device="cpu", most=3, seed=None), lambda _: None)
    right = bench.judge("mm", "float32", ["mm"], True)
    assert right["overloads"]["mm"]["ours"] > 5
    assert not any(found["failures"] for found in right["overloads"].values())
    others = Bench(Namespace(backend="torch", device="cpu", most=3, seed=None), lambda _: None)
    left = others.judge("mm", "float32", ["mm"], True)["overloads"]["mm"]
    assert (left["ours"], set(left["left"])) == (0, {"torch's own kernel is the choice"})

    def wrong(ops):
        handle = flagops.enable(ops, backend="numba")
        counter = handle.counter

        def spoiling(name, at, by, reason):
            count = counter(name, at, by, reason)
            return (lambda: (warnings.warn("a wrong kernel", stacklevel=1), count())) if by else count

        handle.counter = spoiling
        return handle

    bench.enabled = wrong
    found = bench.judge("mm", "float32", ["mm"], True)["overloads"]
    assert found["mm"]["failures"]
    assert "a wrong kernel" in found["mm"]["failed"][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_floats_are_moved_by_their_last_place_and_nothing_else_is(dtype, rng):
    x = torch.from_numpy(rng.uniform(1, 2, 64)).to(dtype)
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    moved = Room(floats=torch.float64, moved=1).values(x)
    assert moved.dtype == torch.float64
    assert ((moved / x.double() - 1).abs() <= 1.5 * unit).all()
    assert len(set((moved > x.double()).tolist())) == 2
    assert (moved != x.double()).all()
    assert torch.equal(Room(moved=1).values(torch.arange(3)), torch.arange(3))
    assert torch.equal(Room(floats=torch.float64).values(x), x.double())


def run(when, tallies, units=(), backend="numba"):
    facts = {"when": when, "samples": 1, "wanted": 2, "device": "cpu", "backend": backend, "torch": "2", "cpu": "x"}
    return report(facts, tallies, dict(units))


def test_a_file_of_verdicts_holds_the_newest_run_of_each_overload(tmp_path):
    right, left, wrong = Tally(ours=2), Tally(ours=1), Tally()
    left.add({"ours": 0, "left": {"dtype int64": 3}, "failures": 0, "failed": []})
    wrong.fail("no")
    first = run("1", {"add.Tensor": right, "mul.Tensor": wrong, "normal_": Tally(), "mm": Tally(), "gone": right})
    rows = joined({}, first)["overloads"]
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "add.Tensor": "strict", "gone": "strict", "mm": "untested", "mul.Tensor": "failed", "normal_": "kept",
    }  # fmt: skip
    path = tmp_path / "coverage.json"
    written(path, first)
    written(path, run("2", {"mul.Tensor": left}, {"mul float32": {"checks": 7, "unstable": 0}}))
    found = json.loads(path.read_text())
    assert found["verdicts"] == {"strict": 1, "basic": 1, "kept": 1, "untested": 1}  # what is not replaced is gone
    assert {row["run"] for row in found["overloads"].values()} == set(found["runs"]) == {"1", "2"}
    assert found["runs"]["2"]["checks"] == 7
    assert "3 dtype int64" in path.with_suffix(".md").read_text()
    assert joined(found, run("3", {"mm": right}, backend="triton"))["runs"].keys() == {"3"}
    begun = joined(found, run("4", {"mm": right, "mul.Tensor": Tally()}))["overloads"]
    assert {name: row["run"] for name, row in begun.items()} == {
        "add.Tensor": "1", "normal_": "1", "mul.Tensor": "2", "mm": "4",
    }  # fmt: skip


def test_the_end_of_a_process_counts_against_all_that_the_sample_calls():
    crash = {"crash": "ended with -11", "checks": 0, "unstable": 0}
    found = summed({"trace float32": crash}, {"trace": ["sum", "mm"]}, ["sum", "mul"])
    assert found["sum"].failed == ["trace, float32: the process ended with -11"]
    assert not found["mul.Tensor"].failures
    assert "mm" not in found


def test_what_a_sample_calls_is_seen_and_what_makes_it_is_not():
    bench = Bench(Namespace(backend="numba", device="cpu", most=1, seed=None), lambda _: None)
    assert {"max", "max.dim"} <= {*replaced(bench.reached("max.reduction_with_dim"))}
    assert {"bmm", "neg"} <= {*bench.reached("matrix_exp")}
    assert not {"uniform_", "isnan"} & {*bench.reached("sum")}
