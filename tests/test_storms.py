"""Millions of calls, many threads, shapes, children and processes: rows of ``make test-all``.

In subprocesses: a crash must be a failed test, not the end of the run.
"""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.slow

SETUP = """
import faulthandler, itertools, os, random, resource, signal, sys, threading
import torch, flagops

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()

def whole(*shape):
    return torch.randint(-8, 9, shape).float()  # sums are exact in every order

def in_threads(count, work):
    failures = []
    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            failures.append(error)
            raise
    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what a process holds from /proc")


def run(script, wait=True, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", SETUP + textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    return ended(process) if wait else process


def ended(process):
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, out
    return out


@linux
def test_a_million_and_a_half_calls_from_eight_threads():
    run("""
        EACH = 200_000
        pairs = [(whole(2 + i, 5), whole(5, 3)) for i in range(8)]
        expected = [a @ b for a, b in pairs]
        def work(i, calls=EACH):
            (a, b), right = pairs[i], expected[i]
            for _ in range(calls):
                assert torch.equal(flagops.matmul(a, b, backend="numba"), right)
        in_threads(8, lambda i: work(i, 1000))
        before, counted = resident(), flagops.coverage("matmul")["calls"]["numba"]
        in_threads(8, work)
        assert flagops.coverage("matmul")["calls"]["numba"] - counted == 8 * EACH
        assert resident() - before < 32 << 20, resident() - before
    """)


@linux
@pytest.mark.parametrize("way", ["flagops.matmul(a, b, backend='numba')", "a @ b"])
def test_fifty_thousand_shapes(way):
    """More than the plans that are kept: the memory of 40,000 shapes is that of 10,000."""
    run(f"""
        torch.set_num_threads(1)
        handle = flagops.enable(backend="numba")
        sizes = [(m, k, n) for m in range(1, 41) for k in range(1, 41) for n in range(1, 33)]
        random.shuffle(sizes)
        held = []
        for at, (m, k, n) in enumerate(sizes[:50_000]):
            a, b = whole(m, k), whole(k, n)
            result = {way}
            if at % 50 == 0:
                assert torch.equal(result, (a.long() @ b.long()).float()), (m, k, n)
            if at % 10_000 == 9_999:
                held.append(resident())
        assert len(sizes) > 50_000
        assert held[-1] - held[0] < 16 << 20, held
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_storm_of_forks():
    """Children are forked while threads call, plan and compile; each computes, in shapes that nobody has planned.

    Without torch's generator, whose lock a child may inherit for ever.
    """
    run(
        """
        stop = threading.Event()
        def right(m, k, n):
            a, b = (torch.arange(p * q).reshape(p, q).remainder(7).float() for p, q in ((m, k), (k, n)))
            return torch.equal(flagops.matmul(a, b, backend="numba"), (a.long() @ b.long()).float())
        def compile_on():
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                for operator in (flagops.rms_norm, flagops.swiglu):
                    x = torch.randn(8, 64).to(dtype)
                    operator(x, *((None, 1e-6) if operator is flagops.rms_norm else (x,)), backend="numba")
        def work(i):
            while not stop.is_set():
                assert right(*(random.randrange(1, 200) for _ in range(3)))
        right(3, 4, 5)
        flagops.rms_norm(torch.randn(8, 64), None, 1e-6, backend="numba")
        flagops.swiglu(torch.randn(8, 64), torch.randn(8, 64), backend="numba")
        def fork():
            for _ in range(300):
                pid = os.fork()
                if pid == 0:
                    faulthandler.register(signal.SIGALRM, chain=True)
                    signal.alarm(60)
                    os._exit(0 if all(right(*(random.randrange(1, 300) for _ in range(3))) for _ in range(3)) else 1)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert status == 0, status
        def every(i):
            if i == 0:
                try:
                    fork()
                finally:
                    stop.set()
            elif i == 1:
                compile_on()
            else:
                work(i)
        in_threads(5, every)
        """,
        FLAGOPS_CACHE=os.devnull,
    )


def test_a_storm_of_processes(tmp_path):
    """Twelve processes fill one empty cache at once; none is wrong, and what they left serves the next."""
    script = """
        from numba.core import event
        with event.install_recorder("numba:compile") as recorder:
            for dtype in random.sample((torch.float32, torch.float64, torch.bfloat16), 3):
                a, b = whole(9, 70).to(dtype), whole(70, 11).to(dtype)
                assert torch.equal(flagops.matmul(a, b, backend="numba"), (a.long() @ b.long()).to(dtype))
        print(len(recorder.buffer))
    """
    processes = [run(script, wait=False, FLAGOPS_CACHE=str(tmp_path)) for _ in range(12)]
    assert any(int(ended(process)) for process in processes)
    assert int(run(script, FLAGOPS_CACHE=str(tmp_path))) == 0
    assert all(path.suffix == ".nbc" for path in tmp_path.rglob("*") if path.is_file())
