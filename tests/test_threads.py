"""Kernels in forked children, under concurrent callers, and on as many threads as torch allows.

In subprocesses: a crash must be a failed test, not the end of the run.
"""

import os
import subprocess
import sys
import textwrap

import pytest

SLOW = "linear fp8_dequantize sparse_attention lightning_indexer"  # to compile; they seldom add to what is asked
EVERY = f"matmul fp4_dequantize {SLOW}"
SETUP = """
import os, sys, threading
import torch, flagops
torch.manual_seed(0)
a, b = torch.randn(257, 300), torch.randn(300, 129)
packed, scale = (torch.randint(0, 127, s, dtype=torch.uint8) for s in ((300, 64), (300, 4)))
q, kv, indices = torch.randn(1, 40, 4, 32), torch.randn(1, 64, 32), torch.randint(-1, 64, (1, 40, 50))
calls = {
    "matmul": lambda: flagops.matmul(a, b, backend="numba"),
    "linear": lambda: flagops.linear(a, b.T, backend="numba"),
    "fp4_dequantize": lambda: flagops.fp4_dequantize(packed, scale, backend="numba"),
    "fp8_dequantize": lambda: flagops.fp8_dequantize(packed, scale[:3, :1], backend="numba"),
    "sparse_attention": lambda: flagops.sparse_attention(q, kv, None, indices, 0.2, backend="numba"),
    "lightning_indexer": lambda: flagops.lightning_indexer(q, kv, q[..., 0], 9, backend="numba"),
}
for name in os.environ.get("LEFT_OUT", "").split():
    del calls[name]
expected = {name: call() for name, call in calls.items()}
def same(name):
    return torch.equal(calls[name](), expected[name])
"""


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes():
    run("""
        pid = os.fork()
        if pid == 0:
            ok = all(same(name) for name in calls)
            alone = threading.active_count() == 1
            os._exit(0 if ok and alone else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert all(same(name) for name in calls)
    """)


FORKED = """
    import faulthandler, signal, time, traceback
    def child(work):
        \"\"\"The exit status of a forked child, which has a minute.\"\"\"
        pid = os.fork()
        if pid == 0:
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(60)
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.mark.drawn
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("held", ["compiler", "llvm", "plans"])
def test_a_child_forked_while_another_thread_holds_a_lock(held):
    """What the child computes must be compiled first, and has no plan yet."""
    run(
        textwrap.dedent(FORKED)
        + textwrap.dedent(f"""
        from numba.core import event
        from flagops import dispatch
        begun = threading.Event()

        class Slow(event.Listener):
            def on_start(self, occurred):
                if not begun.is_set():
                    begun.set()
                    time.sleep(1)
            def on_end(self, occurred):
                pass

        def work(dtype):
            x = torch.arange(12).reshape(3, 4).to(dtype)
            assert torch.equal(flagops.rms_norm(x, None, 1e-6, backend="numba"), flagops.rms_norm(x, None, 1e-6))

        work(torch.float32)  # a child of a process that imports a module may wait for Python's own lock of it
        if {held!r} == "plans":
            plain = dispatch._lock
            class Lock:
                def __enter__(self):
                    plain.acquire()
                    if not begun.is_set():
                        begun.set()
                        time.sleep(1)
                def __exit__(self, *exception):
                    plain.release()
            dispatch._lock = Lock()
        else:
            event.register("numba:compile" if {held!r} == "compiler" else "numba:llvm_lock", Slow())
        thread = threading.Thread(target=work, args=(torch.float64,))
        thread.start()
        begun.wait()
        assert child(lambda: work(torch.bfloat16)) == 0
        thread.join()
        work(torch.float16)
        """),
        FLAGOPS_CACHE=os.devnull,
        LEFT_OUT=EVERY,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_data_loader_workers_compute():
    run("""
        class Set(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, i): return calls["matmul"]()
        for batch in torch.utils.data.DataLoader(Set(), batch_size=4, num_workers=2, multiprocessing_context="fork"):
            assert torch.equal(batch[0], expected["matmul"])
    """)


def test_four_concurrent_threads():
    run("""
        wrong = []
        def work():
            for _ in range(25):
                wrong.extend(name for name in calls if not same(name))
        threads = [threading.Thread(target=work) for _ in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not wrong, wrong
    """)


@pytest.mark.drawn
def test_the_first_calls_may_be_concurrent(tmp_path):
    """No call has compiled anything yet, and the cache is empty."""
    run(
        """
        wrong = []
        fresh = [torch.randint(-8, 9, shape).double() for shape in ((33, 65), (65, 17))]  # sums are exact
        def work():
            got = flagops.matmul(*fresh, backend="numba")
            wrong.extend([] if torch.equal(got, fresh[0] @ fresh[1]) else [1])
        threads = [threading.Thread(target=work) for _ in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not wrong
        """,
        FLAGOPS_CACHE=str(tmp_path),
        LEFT_OUT=EVERY,
    )


def test_set_num_threads_is_obeyed_and_changes_no_result():
    run("""
        torch.set_num_threads(1)
        before = threading.active_count()
        from flagops.backends import numba
        used = set()
        def note(start, stop):
            used.add(threading.get_ident())
        numba.parallel(note, 64)
        assert used == {threading.get_ident()}, used
        torch.set_num_threads(2)
        used.clear()
        with numba.at_most(1):
            numba.parallel(note, 64)
        assert used == {threading.get_ident()} and numba.threads() == 2
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(same(name) for name in calls), threads
    """)


@pytest.mark.drawn
def test_a_cache_that_cannot_be_written(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    run("assert all(same(name) for name in calls)", FLAGOPS_CACHE=str(folder), LEFT_OUT=f"matmul {SLOW}")


@pytest.mark.drawn
def test_a_second_process_compiles_nothing(tmp_path):
    """And the cache is where it is said to be."""
    script = """
        from numba.core import event
        torch.set_num_threads(2)
        with event.install_recorder("numba:compile") as recorder:
            large = torch.randn(64, 512)
            flagops.linear(large, torch.randn(700, 512), backend="numba")  # on several threads
            assert all(same(name) for name in calls)
        print(len(recorder.buffer))
    """
    first, second = (int(run(script, FLAGOPS_CACHE=str(tmp_path))) for _ in range(2))
    assert list(tmp_path.rglob("*.nbc"))
    assert first > 0
    assert second == 0


PARALLEL = """
import itertools
import numpy as np
from flagops.backends import numba as backend

@backend.jit
def count(start, stop, counts, nothing, factor):
    for i in range(start, stop):
        counts[i] += factor[0]

@backend.jit
def fail(start, stop, at):
    if start <= at < stop:
        raise ValueError

def check():
    for tasks, minimum in itertools.product((0, 1, 2, 3, 7, 64, 1001), (1, 2, 50, 600)):
        counts = np.zeros(max(tasks, 1), np.int64)
        backend.parallel(count, tasks, counts, (), (3, 1.0), minimum=minimum)
        assert (counts[:tasks] == 3).all(), (tasks, minimum, counts)
    try:
        backend.parallel(fail, 64, 63)
    except (MemoryError, ValueError) as error:
        return error
    raise AssertionError("the kernel's failure was lost")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP has no entry point that is known here")
def test_tasks_run_on_torchs_own_threads():
    run(
        PARALLEL
        + """
        from flagops.backends import _team
        assert "OpenMP" in backend.backend.facts()["threads"] and _team.openmp()
        before = threading.active_count()
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            error = check()
        assert isinstance(error, MemoryError), error
        assert threading.active_count() == before, "threads of our own were started"
        """.replace("\n        ", "\n"),
        LEFT_OUT=EVERY,
    )


def test_tasks_run_on_threads_of_our_own_where_torch_has_none():
    run(
        PARALLEL
        + """
        from flagops.backends import _team
        _team.openmp = lambda: 0
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            error = check()
        assert isinstance(error, ValueError), error
        assert any(thread.name.startswith("flagops-") for thread in threading.enumerate())
        """.replace("\n        ", "\n"),
        LEFT_OUT=EVERY,
    )


def test_tasks_run_without_torch():
    script = PARALLEL + "\ncheck(); import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
