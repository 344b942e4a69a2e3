"""What a kernel hands to its loops is noted down once its calls look alike, and replayed for those that follow."""

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import flagops
from flagops import dispatch, registry, replay, testing
from flagops.backends import _launches, numba
from flagops.errors import Unsupported

sys.path.insert(0, str(Path(__file__).parent))
from drawing import SMALL, given


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """The second call of a signature is noted down."""
    monkeypatch.setattr(replay, "OFTEN", 1)


NUMBA = sorted(name for name in registry.operators() if registry.written(name, "numba"))
NAMED = {"matmul", "linear", "rms_norm", "hc_post", "scaled_dot_product_attention", "swiglu", "rotary_embedding"}
"""Operators whose calls are small in a model that writes one token after the other."""


def launch_of(plan):
    """What replays the calls of a plan here, None where its kernel is called each time."""
    found = plan.replay.known.get(plan.replay.environment())
    return found if getattr(found, "__name__", "") == "launch" else None


def tables(launch):
    return {name: x.copy() for name, x in launch.__globals__.items() if isinstance(x, np.ndarray)}


def bits(op, result):
    return [x.contiguous().view(torch.uint8) for x in op.each(result)]


def outs_like(op, result, fill):
    """Results full of other numbers, laid out alike."""
    made = [torch.empty_like(x) for x in op.each(result)]
    for x in made:
        x.view(torch.uint8).fill_(fill)
    return tuple(made) if op.several else made[0]


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def moved(x):
    """The same numbers in another order, laid out alike at another address."""
    if not isinstance(x, torch.Tensor):
        return x
    words = torch.empty(0, dtype=WORDS[x.dtype.itemsize]).set_(x.untyped_storage())
    words = words[torch.randperm(len(words))]
    return torch.empty(0, dtype=x.dtype).set_(words.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def replayed(op, args):
    """Calls that differ in values and addresses against the kernel's own function; the replay, if there is one."""
    plan = dispatch.plan(op, (*args, None), "numba")
    for _ in range(4):
        launch = launch_of(plan)
        kept = tables(launch) if launch else {}
        got, ran = dispatch.execute(plan, (*args, None))
        assert ran == "numba"
        expected = outs_like(op, got, 0xA5)
        plan.run(*plan.clean((*args, expected)))
        for x, y in zip(bits(op, got), bits(op, expected), strict=True):
            assert torch.equal(x, y), op.name
        assert all(np.array_equal(x, launch.__globals__[name]) for name, x in kept.items()), op.name
        args = [moved(x) for x in args]
    return launch_of(plan)


@pytest.mark.parametrize("name", NUMBA)
def test_a_replay_is_the_kernel_bit_for_bit(name):
    op, recorded, ran = registry.operator(name), 0, 0
    for _ in range(60):
        case = testing.draw_case(op, lambda options: options[random.randrange(len(options))], SMALL)
        with numba.at_most(random.choice((1, 2))), flagops.using(budget=random.choice(("256MiB", "64KiB"))):
            try:
                recorded += replayed(op, given(case)) is not None
            except (Unsupported, ValueError):  # a case that the kernel or the card's `values` refuses
                continue
        ran += 1
    assert ran > 5
    assert recorded or name not in NAMED


def test_what_a_replay_depends_on_is_looked_at():
    """Threads and budget change what is launched, in any order."""
    a, b = torch.randint(-8, 9, (65, 40)).double(), torch.randint(-8, 9, (40, 130)).double()  # sums are exact
    op = registry.operator("matmul")
    plan = dispatch.plan(op, (a, b, None), "numba")
    for most, budget in [(1, "1MiB"), (2, "1MiB"), (1, "2MiB")] * 3:
        with numba.at_most(most), flagops.using(budget=budget):
            assert torch.equal(dispatch.execute(plan, (a, b, None))[0], a @ b)
            assert (plan.replay.environment() in plan.replay.known) or not plan.replay.known
    assert len(plan.replay.known) == 3


def test_four_threads_share_a_replay():
    q = torch.randn(1, 4, 5, 16)
    expected = flagops.scaled_dot_product_attention(q, q, q, backend="numba")
    wrong = []

    def work():
        for _ in range(200):
            got = flagops.scaled_dot_product_attention(q, q, q, backend="numba")
            if not torch.equal(got, expected):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@numba.jit
def _add(start, stop, x, y, table):
    for _ in range(start, stop):
        table[0] += 1


def _values(x, out):
    numba.parallel(_add, int(np.asarray(x)[0]), numba.pointer(x), numba.pointer(out), np.zeros(1))


def _own_memory(x, out):
    numba.parallel(_add, 1, numba.pointer(np.empty(4)), numba.pointer(out), np.zeros(1))


def _own_tensor(x, out):
    numba.parallel(_add, 1, numba.pointer(torch.empty(4)), numba.pointer(out), np.zeros(1))


def _copy(x, out):
    numba.parallel(_add, 1, numba.pointer(x.contiguous()), numba.pointer(out), np.zeros(1))


def _address(x, out):
    numba.parallel(_add, 1, numba.pointer(x) % 64, numba.pointer(out), np.zeros(1))


def _writes(x, out):
    out.zero_()
    numba.parallel(_add, 1, numba.pointer(x), numba.pointer(out), np.zeros(1))


def _between_launches(x, out):
    table = np.zeros(1)
    numba.parallel(_add, 1, numba.pointer(x), numba.pointer(out), table)
    numba.parallel(_add, 1, numba.pointer(x), numba.pointer(out), table)


def _long_table(x, out):
    numba.parallel(_add, 1, numba.pointer(x), numba.pointer(out), np.zeros(10_000))


UNRECORDABLE = [_values, _own_memory, _own_tensor, _copy, _address, _writes, _between_launches, _long_table]


@pytest.mark.parametrize("function", UNRECORDABLE)
def test_what_shapes_do_not_say_is_not_noted_down(function):
    x = torch.ones(4, 2).t()
    assert numba.backend.record(function, (x, torch.ones(4)), [((0,), 0), ((1,), 0)]) is None


def test_a_table_that_is_made_for_each_call_is_made_for_each_replay():
    seen = []

    @numba.jit
    def count(start, stop, x, table):
        for _ in range(start, stop):
            table[0] += 1

    def fresh(x):
        numba.parallel(count, 1, numba.pointer(x), np.zeros(1))

    kept = np.zeros(1)

    def always_the_same(x):
        numba.parallel(count, 1, numba.pointer(x), kept)

    x = torch.ones(4)
    for kernel in (fresh, always_the_same):
        launch = numba.backend.record(kernel, (x,), [((0,), 0)])
        (mine,) = (value for value in launch.__globals__.values() if isinstance(value, np.ndarray))
        launch((x,))
        launch((x,))
        seen.append(float(mine[0]))
    assert seen == [0, 2]


def test_arguments_lie_where_the_values_of_a_call_say():
    """A view of an argument is a number of bytes behind it."""
    noted = []

    held = torch.zeros(6), (torch.zeros(3), torch.zeros(4))
    one = _launches.Launch(None, 4, (_launches.Address(((0,), 16)), 5), 1)
    two = _launches.Launch(None, 4, ((_launches.Address(((1, 1), 0), 8), 3),), 1)
    _launches.replay([one, two], [one, two], lambda kernel, tasks, *args, minimum: noted.append(args), 2)(held)
    assert noted == [(held[0].data_ptr() + 16, 5), ((held[1][1].data_ptr() + 8, 3),)]


def test_what_is_met_a_few_times_is_not_noted_down(monkeypatch):
    monkeypatch.setattr(replay, "OFTEN", 3)
    asked = []
    monkeypatch.setattr(type(numba.backend), "record", lambda *args: asked.append(args))
    for _ in range(3):
        for n in (211, 223):
            flagops.matmul(torch.ones(n, 7), torch.ones(7, 3), backend="numba")
    assert not asked
    flagops.matmul(torch.ones(211, 7), torch.ones(7, 3), backend="numba")
    assert len(asked) == 1
