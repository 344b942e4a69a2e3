"""Which kernel runs, why another did not, and how to say what is wanted."""

import contextlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import flagops
from flagops import dispatch, registry
from flagops.call import of, run
from flagops.errors import Unsupported
from flagops.transformers._handle import Handle

A, B = torch.randint(-8, 9, (3, 4)).float(), torch.randint(-8, 9, (4, 5)).float()  # sums are exact


def ran(before):
    after = flagops.coverage("matmul")["calls"]
    return {name: calls - before.get(name, 0) for name, calls in after.items() if calls != before.get(name, 0)}


def counted(call):
    before = dict(flagops.coverage("matmul")["calls"])
    call()
    return ran(before)


@pytest.mark.parametrize("backend", ["numba", "torch", "numpy"])
def test_a_name_runs_that_backend(backend):
    assert counted(lambda: flagops.matmul(A, B, backend=backend)) == {backend: 1}


def test_an_explicit_name_never_falls_back():
    a, b = np.ones((3, 4)), np.ones((4, 5))
    with pytest.raises(Unsupported, match=r"torch: a: takes torch tensors"):
        flagops.matmul(a, b, backend="torch")
    with flagops.using(backend="torch"), pytest.raises(Unsupported):
        flagops.matmul(a, b)


def test_a_sequence_takes_the_first_that_works():
    a, b = np.ones((3, 4)), np.ones((4, 5))
    assert counted(lambda: flagops.matmul(a, b, backend=["torch", "numpy", "numba"])) == {"numpy": 1}
    assert counted(lambda: flagops.matmul(a, b, backend=("torch", "numba"))) == {"numba": 1}
    refused = flagops.coverage("matmul")["refused"]["torch"]
    assert refused["a: takes torch tensors"] >= 1


def test_nothing_fits_lists_every_reason():
    with pytest.raises(Unsupported) as caught:
        flagops.matmul(np.ones((3, 4)), np.ones((4, 5)), backend=["torch", "triton"])
    assert "torch: " in str(caught.value)
    assert "triton: " in str(caught.value)


def test_argument_beats_context_beats_environment():
    script = """
        import numpy as np, flagops
        a = np.ones((2, 2))
        flagops.matmul(a, a)
        with flagops.using(backend="numba"):
            flagops.matmul(a, a)
            flagops.matmul(a, a, backend="numpy")
        print(flagops.coverage("matmul")["calls"])
    """
    assert _python(script, FLAGOPS_BACKEND="numpy").stdout.strip() == "{'numpy': 2, 'numba': 1}"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FLAGOPS_BACKNED", "torch", "did you mean 'backend'"),
        ("FLAGOPS_BUDGET", "lots", "FLAGOPS_BUDGET: expected bytes"),
        ("FLAGOPS_CHECK", "yes", "FLAGOPS_CHECK: expected 0 or 1"),
        ("FLAGOPS_BACKEND", "nunba", "did you mean 'numba'"),
        ("FLAGOPS_LOG", "LOUD", "FLAGOPS_LOG: expected DEBUG"),
    ],
)
def test_an_unknown_setting_raises(variable, value, words):
    script = "import numpy as np, flagops; flagops.matmul(np.ones((2, 2)), np.ones((2, 2)))"
    done = _python(script, **{variable: value})
    assert done.returncode != 0
    assert words in done.stderr


def test_using_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="did you mean 'backend'"), flagops.using(backed="torch"):
        pass
    with pytest.raises(ValueError, match="expected bytes"), flagops.using(budget="1 banana"):
        pass


def test_using_is_undone():
    before = flagops.config.current()
    with contextlib.suppress(RuntimeError), flagops.using(backend="numpy", budget="1MiB"):
        assert flagops.config.budget() == 1 << 20
        raise RuntimeError
    assert flagops.config.current() is before


def test_a_kernel_that_refuses_while_running_is_replaced(monkeypatch):
    def refuse(a, b, out):
        raise Unsupported("out of resources")

    kernel = registry.Kernel(refuse)
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda op, name: kernel if name == "numba" else find(op, name))
    monkeypatch.setattr(dispatch, "_plans", {})
    assert torch.equal(flagops.matmul(A, B, backend=["numba", "torch"]), A @ B)
    with pytest.raises(Unsupported, match="out of resources"):
        flagops.matmul(A, B, backend="numba")


@pytest.fixture
def refusing(monkeypatch):
    """numba's kernels of matmul refuse while they run."""

    def refuse(a, b, out):
        raise Unsupported("out of resources")

    find = registry.find
    kernel = registry.Kernel(refuse)
    monkeypatch.setattr(registry, "find", lambda op, name: kernel if name == "numba" else find(op, name))
    monkeypatch.setattr(dispatch, "_plans", {})


WAYS = {
    "straight": (lambda: (A, B, None), contextlib.nullcontext),
    "out": (lambda: (A, B, torch.empty(3, 5)), contextlib.nullcontext),
    "a gradient": (lambda: (A.clone().requires_grad_(), B, None), contextlib.nullcontext),
    "a device as a mode": (lambda: (A, B, None), lambda: torch.device("cpu")),
    "a class of its own": (lambda: (A.as_subclass(type("Own", (torch.Tensor,), {})), B, None), contextlib.nullcontext),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_call_says_who_ran(way):
    args, context = WAYS[way]
    for backend in ("numpy", "numba", "torch"):
        with context():
            result, ran = run(registry.operator("matmul"), args(), backend)
        assert torch.equal(result.detach().as_subclass(torch.Tensor), A @ B)
        assert ran == backend


@pytest.mark.parametrize("way", WAYS)
def test_a_call_says_who_ran_when_another_refused_meanwhile(way, refusing):
    args, context = WAYS[way]
    for _ in range(2):
        with context():
            assert run(registry.operator("matmul"), args(), ["numba", "torch"])[1] == "torch"


def test_nobody_runs_where_nothing_is_computed():
    with torch._subclasses.FakeTensorMode() as mode:
        assert run(registry.operator("matmul"), (mode.from_tensor(A), mode.from_tensor(B), None))[1] == ""


def test_a_patched_call_counts_who_ran_and_plans_once(refusing, monkeypatch):
    looked, look_up = [], dispatch.look_up
    monkeypatch.setattr(dispatch, "look_up", lambda *args: looked.append(args) or look_up(*args))
    handle = Handle((), ["numba", "torch"], "fast")
    for count in range(1, 4):
        assert torch.equal(handle.call("matmul", A, B), A @ B)
        assert len(looked) == count
    assert [row.replaced for row in handle.report().rows] == [{"torch": 3}]


def test_what_stands_in_for_an_operator_is_counted_by_its_own_name(monkeypatch):
    def doubled(a, b, out=None, backend=None):
        return 2 * (a @ b)

    monkeypatch.setattr(flagops, "matmul", doubled)
    handle = Handle((), None, "fast")
    assert torch.equal(handle.call("matmul", A, B), 2 * (A @ B))
    (row,) = handle.report().rows
    assert [name.rpartition(".")[2] for name in row.replaced] == ["doubled"]


def test_a_kernel_with_other_parameters_is_refused_when_it_is_found():
    def matmul(a, c, out): ...

    with pytest.raises(TypeError, match=r"takes \(a, c, out\), but the operator's card says \(a, b, out\)"):
        registry.describe(registry.operator("matmul"), matmul, None)


def test_choices_are_logged_once():
    script = """
        import numpy as np, flagops
        a = np.ones((2, 2))
        for n in range(3):
            flagops.matmul(a[:n], a, backend=["torch", "numpy"])
    """
    lines = [line for line in _python(script, FLAGOPS_LOG="DEBUG").stderr.splitlines() if "matmul" in line]
    assert lines == ["flagops: matmul: torch refused (a: takes torch tensors)", "flagops: matmul: numpy runs (float64)"]


def test_plans_are_forgotten_but_counts_are_kept(monkeypatch):
    monkeypatch.setattr(dispatch, "_PLANS_KEPT", 3)
    before = dict(flagops.coverage("matmul")["calls"])
    for n in range(8):
        flagops.matmul(np.ones((n, 2)), np.ones((2, 2)), backend="numpy")
    assert ran(before) == {"numpy": 8}
    assert len(dispatch._plans) <= 3


def test_outputs_have_the_kind_and_device_of_the_inputs():
    assert isinstance(flagops.matmul(A.numpy(), B.numpy()), np.ndarray)
    got = flagops.matmul(A.bfloat16(), B.bfloat16())
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.bfloat16


def test_dispatched_equals_direct(kernel):
    from flagops import testing

    op, backend = registry.operator(kernel[0]), kernel[1]
    case = testing.draw_case(op, lambda options: options[-1] if len(options) == 7 else options[0], testing.INTERPRETED)
    given = [testing.as_kind(x, "torch", dict(case.dtypes).get(n)) for n, x in case.arguments().items()]
    results = op.each(of(op)(*given, backend=backend))
    outs = tuple(torch.empty_like(result) for result in results)
    out = outs if op.several else outs[0]
    plan = dispatch.plan(op, (*given, out), backend)
    plan.run(*plan.clean((*given, out)))
    for got, result in zip(outs, results, strict=True):
        if result.dtype.itemsize == 1:  # FP8 knows no equal
            got, result = got.view(torch.uint8), result.view(torch.uint8)
        assert torch.equal(got.nan_to_num(), result.nan_to_num())


TOY = '''
from types import SimpleNamespace
import torch

def matmul(a, b, out):
    """A correct kernel of somebody else's backend."""
    out.copy_((a.double() @ b.double()).to(out.dtype))

def linear(x, weight, bias, out):
    """A wrong one: it forgets the bias."""
    out.copy_((x.double() @ weight.double().T).to(out.dtype))

class Backend:
    name = "toy"
    dispatch_keys = ("CPU",)
    def kernels(self, operator):
        return globals().get(operator.name)
    def unavailable(self):
        return None
    def refuses(self, array):
        return None if isinstance(array, torch.Tensor) else "takes torch tensors"
    def facts(self):
        return {"version": "1"}
    def synchronize(self):
        pass

backend = Backend()
'''


@pytest.fixture
def toy(tmp_path):
    """An installed package, outside of this one, that offers a backend."""
    (tmp_path / "flagops_toy.py").write_text(TOY)
    info = tmp_path / "flagops_toy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flagops-toy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[flagops.backends]\ntoy = flagops_toy\nbroken = flagops_absent\n")
    return tmp_path


def test_a_backend_from_another_package(toy):
    script = """
        import torch, flagops
        a, b = torch.arange(12.0).view(3, 4), torch.arange(20.0).view(4, 5)  # sums are exact
        assert torch.equal(flagops.matmul(a, b, backend="toy"), a @ b)
        print(flagops.coverage("matmul")["calls"])
        flagops.matmul(a, b, backend="broken")
    """
    done = _python(script, PYTHONPATH=str(toy))
    assert done.stdout.strip() == "{'toy': 1}"
    assert "its descriptor failed to load: ModuleNotFoundError: No module named 'flagops_absent'" in done.stderr


@pytest.mark.drawn
def test_it_gets_the_parity_suite(toy):
    script = "from flagops.__main__ import main; raise SystemExit(main('check {} --backend toy --time 2s'.split()))"
    right = _python(script.format("matmul"), PYTHONPATH=str(toy))
    assert right.returncode == 0, right.stderr
    wrong = _python(script.format("linear"), PYTHONPATH=str(toy))
    assert wrong.returncode == 1
    assert "linear on toy" in wrong.stderr
    assert "Case(operator='linear'" in wrong.stderr


def _python(script, **environment):
    import os

    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLAGOPS_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=clean | environment
    )
