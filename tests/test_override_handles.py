"""`flagops.enable` itself: handles, other libraries, names, the environment, reports, threads and devices."""

import itertools
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flagops
from flagops import config, override
from flagops.errors import Unsupported
from flagops.override import interpose, lowering, sites
from flagops.testing import assert_of

sys.path.insert(0, str(Path(__file__).parent))
from overriding import (  # noqa: F401
    COMPOSITE,
    DEFAULT,
    FORMS,
    PLAIN,
    PRODUCTS,
    counted,
    everything_taken,
    kernels,
    untouched,
    usable,
    whole,
)

BACKENDS = usable("numba", "numpy")
FUSED = " ".join(name for name in DEFAULT if name not in PRODUCTS)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_handles_end_in_any_order(order):
    x, y = whole(5, 4), whole(4, 3)
    plain = x @ y
    wants = ("numpy", "torch", BACKENDS[0])
    handles = [flagops.enable(backend=backend) for backend in wants]
    alive = [0, 1, 2]
    for ended in order:
        before = [handle.report().calls for handle in handles]
        assert torch.equal(x @ y, plain)
        served = [handle.report().calls - n for handle, n in zip(handles, before, strict=True)]
        assert served == [int(i == alive[-1]) for i in range(3)]
        alive.remove(ended)
        handles[ended].disable()
        handles[ended].disable()
    assert kernels() == PLAIN
    assert torch.equal(x @ y, plain)
    assert sum(handle.report().calls for handle in handles) == 3


def test_the_newest_handle_decides_at_once():
    x = torch.eye(2)
    with flagops.enable(backend="numpy") as first:
        x @ x
        with flagops.enable(backend=BACKENDS[0]) as second:
            x @ x
        x @ x
    assert (first.report().calls, second.report().calls) == (2, 1)


def test_what_torchs_kernels_call_is_not_counted():
    others = torch.eye(2, dtype=torch.cfloat)
    with flagops.enable(backend="numpy") as handle:
        torch.mv(others, others[0])
        assert [(row.op, row.calls) for row in handle.report().rows] == [("aten::mv", 1)]


def test_handles_of_different_operators():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    with flagops.enable("matmul", backend="numpy") as first, flagops.enable("linear", backend="numpy") as second:
        F.linear(x, w, b)
        F.linear(x, w)
    assert [row.op for row in first.report().rows] == ["aten::mm"]
    assert [row.op for row in second.report().rows] == ["aten::addmm"]


def test_enabling_again_and_again_keeps_one_registration_each():
    for _ in range(3):
        with flagops.enable(backend="numpy"), flagops.enable(backend="numpy"):
            dump = torch._C._dispatch_dump("aten::mm")
            assert len(re.findall(rf"^CPU.*{re.escape(interpose.__file__)}", dump, re.MULTILINE)) == 1


class Theirs:
    """Another library's override of mm, which hands on to what was there before."""

    def __init__(self):
        self.calls = 0
        self.below = torch.library.get_kernel("aten::mm", "CPU")
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.library.impl("mm", self.mm, "CPU", with_keyset=True, allow_override=True)

    def mm(self, keyset, a, b):
        self.calls += 1
        return self.below.call_boxed(keyset, a, b)

    def remove(self):
        self.library._destroy()


@pytest.mark.drawn
def test_enabling_thousands_of_times_keeps_no_memory():
    """torch keeps 88 bytes of each Library that was ever made, and 50 of each look at a kernel of its own."""
    script = """
        import resource, flagops
        def held(cycles):
            for _ in range(cycles):
                flagops.enable(backend="numpy").disable()
            with open("/proc/self/statm") as pages:
                return int(pages.read().split()[1]) * resource.getpagesize()
        before = held(300)
        print(held(1500) - before)
    """
    assert int(subprocess.check_output([sys.executable, "-c", textwrap.dedent(script)])) < 1500 * 1000


def test_another_library_comes_back_at_the_same_place():
    """What torch shows of its override is the same text, and yet it is another kernel."""
    others = torch.eye(2, dtype=torch.cfloat)
    for _ in range(2):
        theirs = Theirs()
        with flagops.enable(backend="numpy"):
            assert torch.equal(others @ others, others)
        assert theirs.calls == 1
        theirs.remove()


def test_above_another_librarys_override():
    x = torch.randn(3, 4)
    theirs = Theirs()
    with flagops.enable(backend="numpy") as handle:
        x @ x.t()
        assert (theirs.calls, handle.report().replaced) == (0, 1)
        torch.eye(2, dtype=torch.cfloat) @ torch.eye(2, dtype=torch.cfloat)
        assert theirs.calls == 1
    x @ x.t()
    assert theirs.calls == 2
    with pytest.raises(RuntimeError, match="already a kernel registered"):
        torch.library.Library("aten", "IMPL").impl("mm", theirs.mm, "CPU", allow_override=False)
    theirs.remove()


@pytest.mark.parametrize("ours_first", [True, False])
def test_below_another_librarys_override(ours_first):
    x = whole(3, 4)
    plain = x @ x.t()
    handle = flagops.enable(backend="numpy")
    theirs = Theirs()
    assert torch.equal(x @ x.t(), plain)
    assert (theirs.calls, handle.report().replaced) == (1, 1)
    if ours_first:
        handle.disable()
        assert torch.equal(x @ x.t(), plain)
        assert (theirs.calls, handle.report().replaced) == (2, 1)
        theirs.remove()
        assert torch.equal(x @ x.t(), plain)
    else:
        theirs.remove()
        x @ x.t()
        assert (theirs.calls, handle.report().replaced) == (1, 2)
        handle.disable()


def test_between_an_older_registration_and_another_library():
    x = torch.randn(3, 4)
    first = flagops.enable(backend="numpy")
    theirs = Theirs()
    first.disable()
    with flagops.enable(backend="numpy") as second:
        x @ x.t()
        assert (theirs.calls, second.report().replaced) == (0, 1)
    x @ x.t()
    assert (theirs.calls, first.report().replaced) == (1, 0)
    theirs.remove()


def test_the_override_below_is_removed_meanwhile():
    others = torch.eye(2, dtype=torch.cfloat)
    theirs = Theirs()
    with flagops.enable(backend="numpy") as handle:
        theirs.remove()
        assert torch.equal(others @ others, others)
        assert torch.equal(others @ others, others)
        assert handle.report().calls == 2
        torch.eye(2) @ torch.eye(2)
        assert handle.report().replaced == 1


def test_composite_operators_are_refused(monkeypatch):
    wrong = lowering.Lowering("matmul", "matmul", lambda to, self, other: to("matmul", self, other))
    monkeypatch.setitem(lowering.LOWERINGS, "matmul", wrong)
    with pytest.raises(TypeError, match="aten::matmul is composite"):
        flagops.enable("matmul")


def test_composite_operators_in_the_table():
    for name in [*FORMS, *override.WATCHED]:
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CompositeImplicitAutograd")
        assert composite == (name in COMPOSITE)


# names


@pytest.mark.parametrize(
    ("ops", "chosen"),
    [
        ("default", f"mm bmm baddbmm mv dot addmm addmv {FUSED}"),
        ("default,-matmul", f"addmm addmv {FUSED}"),
        ("-linear", f"mm bmm baddbmm mv dot {FUSED}"),
        (["linear", "mm"], "addmm addmv mm"),
        ("default, -mm, -sparse_attention", f"bmm baddbmm mv dot addmm addmv {FUSED}"),
        (
            "rms_norm,fp8_matmul,grouped_matmul,-_grouped_mm",
            "rms_norm _fused_rms_norm _fused_rms_norm_backward _scaled_mm",
        ),
        ("", ""),
    ],
)
def test_names(ops, chosen):
    with everything_taken():
        with flagops.enable(ops) as handle:
            assert " ".join(handle.ops) == chosen
        with flagops.using(ops=ops), flagops.enable() as handle:
            assert " ".join(handle.ops) == chosen


@pytest.mark.parametrize(
    ("ops", "words"),
    [
        ("matmull", "'matmul'"),
        ("default,-liner", "'linear'"),
        (["admm"], "'addmm'"),
        ("sparse_attention", "flagops.patch"),
    ],
)
def test_wrong_names(ops, words):
    with pytest.raises(ValueError, match=words):
        flagops.enable(ops)


def test_wrong_backends():
    with pytest.raises(ValueError, match="'numba'"):
        flagops.enable(backend="nunba")


def script(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_environment_decides():
    code = "import flagops; h = flagops.enable(); print(*h.ops); h.disable()"
    assert script(code, FLAGOPS_OPS="default,-matmul", FLAGOPS_BACKEND="numpy").stdout == f"addmm addmv {FUSED}\n"
    assert "did you mean 'matmul'" in script(code, FLAGOPS_OPS="matmulx").stderr


def test_enabling_is_quiet_and_logged():
    code = (
        "import logging, sys, flagops, torch\n"
        "logging.basicConfig(stream=sys.stdout, level='INFO', format='%(name)s: %(message)s')\n"
        "with flagops.enable('mm', backend='numpy'): torch.eye(2) @ torch.eye(2)\n"
    )
    result = script(code, "-W", "error")
    assert (result.returncode, result.stderr) == (0, "")
    assert "flagops: enabled at CPU: mm\n" in result.stdout
    assert "flagops: aten::mm at CPU is computed by matmul/numpy\n" in result.stdout


def test_reasons_are_logged_once(caplog):
    with caplog.at_level(logging.INFO, "flagops"), flagops.enable(backend="numpy"):
        for n in (2, 2, 3):
            torch.eye(n, dtype=torch.cfloat) @ torch.eye(n, dtype=torch.cfloat)
    assert [r.message for r in caplog.records].count("aten::mm at CPU is left to torch: dtype complex64") == 1


# report


def test_report():
    from rich.console import Console

    x = torch.randn(1, 2, 8, 4)
    plain = F.scaled_dot_product_attention(x, x, x), torch.nn.LSTM(4, 4)(x[0])
    with flagops.enable("default,-scaled_dot_product_attention", backend="numpy") as handle:
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), plain[0])
        torch.nn.LSTM(4, 4)(x[0])
        x[0, 0] @ x[0, 0].t()
        x[0, 0].cfloat() @ x[0, 0].cfloat().t()
    F.scaled_dot_product_attention(x, x, x)
    report = handle.report()
    assert (report.calls, report.replaced, report.share) == (2, 1, 0.5)
    assert report.bypassed["scaled_dot_product_attention, fused"] == 1
    assert report.bypassed["LSTM layers in oneDNN"] == 1
    assert report.bypassed["products of int8 matrices"] == 0
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    for text in (str(report), capture.get()):
        assert re.search(r"aten::mm\W+2\W+1 matmul/numpy\W+1 dtype complex64", text)
        assert "1 of 2 calls replaced (50%)" in text
        assert "torch.compile" in text
        assert "scaled_dot_product_attention, fused: 1\n" in re.sub(" +\n", "\n", text)


def test_what_stays_torchs_costs_nothing():
    """Neither it nor its parts are registered: a call that is only counted crosses into Python as well."""
    from flagops import machine, order
    from flagops.override.interpose import live

    nothing = order.Table(machine.cpu_kind(), {"*": ("numba", "torch")}, {"*": ()}, {}, "nothing")
    x = torch.randn(1, 2, 8, 4)
    with order.forced(nothing), flagops.enable() as handle:
        F.scaled_dot_product_attention(x, x, x)
        here = {site.name for site in live.values() if handle in site.handles}
        report = handle.report()
    assert not report.calls
    assert "scaled_dot_product_attention" in report.kept
    assert "scaled_dot_product_attention, fused" not in report.bypassed
    assert not {name for name in here if "scaled_dot_product" in name or name == "mm"}


def test_compiled_graphs_are_counted():
    with flagops.enable(backend="numpy") as handle:
        x = whole(3, 3, dtype=torch.float64).requires_grad_()
        assert torch.equal(torch.compile(lambda y: (y @ y).sin(), backend="aot_eager")(x), (x @ x).sin())
        assert handle.report().bypassed[override.COMPILED] == 1
        assert handle.report().replaced == 2


def test_attention_by_plain_products_is_replaced():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.randn(1, 2, 8, 4)
    with sdpa_kernel(SDPBackend.MATH), flagops.enable("matmul", backend="numpy") as handle:
        assert_of("scaled_dot_product_attention", F.scaled_dot_product_attention(x, x, x), x, x, x)
        assert counted(handle, "bmm") == (2, {})
        assert handle.report().bypassed["scaled_dot_product_attention, fused"] == 0


def test_fuel():
    x = torch.randn(3, 3)
    with config.using(fuel=2), flagops.enable(backend="numpy") as handle:
        for _ in range(5):
            x @ x
        assert counted(handle, "mm") == (2, {"out of fuel": 3})
        assert override.spent()["calls"] == 5
        last = override.spent()["last"]
    assert last == {"call": 2, "op": "mm", "by": "matmul/numpy", "arguments": ["float32[3, 3]", "float32[3, 3]"]}
    with flagops.enable(backend="numpy") as handle:
        x @ x
        assert counted(handle, "mm") == (1, {})


# threads and devices


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_threads(backend):
    pairs = [(torch.randn(17 + i, 33), torch.randn(33, 9 + i)) for i in range(4)]
    with flagops.enable(backend=backend) as handle:
        expected = [a @ b for a, b in pairs]
        wrong = []

        def work(i):
            a, b = pairs[i]
            wrong.extend(1 for _ in range(200) if not torch.equal(a @ b, expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert counted(handle, "mm") == (804, {})


def test_threads_while_handles_come_and_go():
    x = whole(9, 9, dtype=torch.float64)
    plain, stop, seen = x @ x, threading.Event(), [0, 0]

    def work(i):
        while not stop.is_set():
            seen[i] += 1 if torch.equal(x @ x, plain) else -(1 << 30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    replaced = 0
    while replaced < 100 or not all(seen):  # a thread may have to wait for its turn
        with flagops.enable(backend="numpy") as handle:
            x @ x
        replaced += handle.report().replaced
    stop.set()
    for thread in threads:
        thread.join()
    assert min(seen) > 0, "a product was wrong"


def test_a_forked_child():
    code = (
        "import os, threading, flagops, torch\n"
        "from flagops.override import interpose\n"
        "x = torch.arange(25.0).view(5, 5)\n"
        "plain = x @ x\n"
        "flagops.enable(backend='numpy')\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with interpose.lock:\n"
        "        held.set(); done.wait(1)\n"
        "threading.Thread(target=hold).start(); held.wait()\n"
        "child = os.fork()\n"
        "if not child: os._exit(42 if torch.equal(x @ x, plain) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert script(code).stdout == "42\n"


def test_privateuse1_device_in_python():
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("privateuse1.py")], capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout) == (0, "mirrored\n"), result.stderr[-2000:]


def test_a_site_where_torch_has_no_kernel():
    """A device may lack the kernel: ours computes what it takes, and the rest is an error that says so."""

    def product(to, self, mat2, out_dtype):
        if out_dtype != self.dtype:
            raise lowering.Pass("another result dtype")
        return to("matmul", self, mat2)

    wide = lowering.Lowering("mm", "matmul", product)
    x = whole(3, 4)
    with pytest.raises(NotImplementedError):
        torch.mm(x, x.t(), out_dtype=torch.float32)
    assert interpose.acquire("mm.dtype", "CPU", lambda: sites.Site("mm.dtype", "CPU", wide)) is None
    site = interpose.acquire("mm.dtype", "CPU", lambda: sites.Site("mm.dtype", "CPU", wide), bare=True)
    with flagops.enable("mm", backend="numpy") as handle:
        site.handles.append(handle)
        assert torch.equal(torch.mm(x, x.t(), out_dtype=torch.float32), x @ x.t())
        with pytest.raises(NotImplementedError, match=r"aten::mm.dtype has no kernel at CPU but flagops'"):
            torch.mm(x.bfloat16(), x.t().bfloat16(), out_dtype=torch.float32)
        assert counted(handle, "mm.dtype") == (1, {"another result dtype": 1})
    site.handles.clear()
    interpose.release(site)
    interpose.sweep()
    with pytest.raises(NotImplementedError, match="Could not run"):
        torch.mm(x, x.t(), out_dtype=torch.float32)


ONES = torch.ones(2)


def _refused():
    with pytest.raises(Unsupported, match=r"strict: flagops does not replace aten::add\.Tensor, or was not asked to"):
        ONES + ONES


def _taken():
    assert (ONES + ONES).tolist() == [2, 2]


def test_a_strict_handle_leaves_nothing_behind():
    for _ in range(2):
        with flagops.enable("mm", backend="numpy", strict=True):
            _refused()
        _taken()
        with flagops.enable("add", backend="numpy") as handle:
            _taken()
        assert handle.report().replaced == 1


@pytest.mark.parametrize("strict_first", [True, False])
@pytest.mark.parametrize("ends_first", [0, 1])
def test_a_strict_handle_lets_others_compute_what_they_take(strict_first, ends_first):
    """In whichever order they begin and end."""
    make = {
        True: lambda: flagops.enable("mm", backend="numpy", strict=True),
        False: lambda: flagops.enable("add", backend="numpy"),
    }
    handles = [make[strict_first](), make[not strict_first]()]
    try:
        _taken()
        handles[ends_first].disable()
        (_taken if strict_first == (ends_first == 0) else _refused)()
    finally:
        for handle in handles:
            handle.disable()
    _taken()
    assert not interpose.live
    assert not interpose.buried
