"""What a kernel hands to its loops is noted down once its calls look alike, and replayed for those that follow."""

import random
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import flagops
from flagops import dispatch, registry, testing
from flagops.backends import _launches, numba
from flagops.calls import replay
from flagops.errors import Unsupported

sys.path.insert(0, str(Path(__file__).parent))
from drawing import SMALL, far, given


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """The second call of a signature is noted down."""
    monkeypatch.setattr(replay, "OFTEN", 1)


NUMBA = sorted(name for name in registry.operators() if registry.written(name, "numba"))
NAMED = {"matmul", "linear", "rms_norm", "hc_post", "scaled_dot_product_attention", "swiglu", "rotary_embedding"}
NAMED |= {
    "fp4_matmul",
    "hc_pre",
    "hc_head",
    "moe_gate",
    "sparse_attention",
    "lightning_indexer",
    "fp8_quantize",
    "fp8_matmul",
}
"""Operators whose calls are small in a model that writes one token after the other."""


def launch_of(plan):
    """What replays the calls of a plan here, None where its kernel is called each time."""
    found = plan.replay.known.get(plan.replay.environment())
    return found if getattr(found, "__name__", "") == "launch" else None


def tables(launch):
    return {name: x.tobytes() for name, x in launch.__globals__.items() if isinstance(x, np.ndarray)}


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
        kept = launch and tables(launch)
        got, ran = dispatch.execute(plan, (*args, None))
        assert ran == "numba"
        expected = outs_like(op, got, 0xA5)
        plan.run(*plan.clean((*args, expected)))
        for x, y in zip(bits(op, got), bits(op, expected), strict=True):
            assert torch.equal(x, y), op.name
        assert kept == (launch and tables(launch)), op.name
        args = [moved(x) for x in args]
    return launch_of(plan)


@pytest.mark.drawn
@pytest.mark.parametrize("name", NUMBA)
def test_a_replay_is_the_kernel_bit_for_bit(name):
    op, recorded, ran = registry.operator(name), 0, 0
    for _ in range(60):
        case = testing.draw_case(op, lambda options: options[random.randrange(len(options))], SMALL)
        if far(case):  # all of its memory would be moved
            continue
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


def _run(x, out, table):
    numba.parallel(_add, 1, numba.pointer(x), numba.pointer(out), table)


def _values(x, out):
    _run(x, out, np.asarray(x))


def _own_tensor(x, out):
    _run(x, torch.empty(4), np.zeros(1))


def _copy(x, out):
    _run(x.contiguous(), out, np.zeros(1))


def _address(x, out):
    numba.parallel(_add, 1, numba.pointer(x) % 64, numba.pointer(out), np.zeros(1))


def _writes(x, out):
    out.zero_()
    _run(x, out, np.zeros(1))


def _writes_between_launches(x, out):
    table = np.zeros(1)
    for value in range(2):
        table[0] = value
        _run(x, out, table)


def _shared_memory(x, out):
    table = np.zeros(2)
    _run(x, out, table[:1])
    _run(x, out, table[:2])


def _looks_at_results(x, out):
    table = np.zeros(1)
    _run(x, out, table)
    if table[0] != 0:
        raise MemoryError


def _goes_by_results(x, out):
    table = np.zeros(1)
    _run(x, out, table)
    while table[0] == 0:
        _run(x, out, table)


def _another_each_time(x, out):
    _run(x, out, np.zeros(random.randrange(1, 500)))


def _long_table(x, out):
    _run(x, out, np.zeros(10_000))


UNRECORDABLE = [
    _values, _own_tensor, _copy, _address, _writes, _writes_between_launches, _shared_memory, _looks_at_results,
    _goes_by_results, _another_each_time, _long_table,
]  # fmt: skip
PLACES = [((0,), 0), ((1,), 0)]


def fail(held):
    raise AssertionError("the kernel is called")


@pytest.mark.parametrize("function", UNRECORDABLE)
def test_what_shapes_do_not_say_is_not_noted_down(function):
    x = torch.ones(4, 2).t()
    assert numba.backend.record(function, (x, torch.ones(4)), PLACES, fail) is None


def test_an_array_that_is_made_for_each_call_is_made_for_each_replay():
    kept, seen = np.zeros(1), []

    @numba.jit
    def count(start, stop, table, results, x):
        for _ in range(start, stop):
            table[0] += 1
            results[0] += table[0]

    def fresh(x, out):
        table = np.zeros(1)
        for _ in range(2):
            numba.parallel(count, 1, table, results, numba.pointer(x))

    def always_the_same(x, out):
        numba.parallel(count, 1, kept, results, numba.pointer(x))

    results = np.zeros(1)
    held = torch.ones(4), torch.ones(4)
    for kernel in (fresh, always_the_same):
        results[0] = 0
        launch = numba.backend.record(kernel, held, PLACES, fail)
        assert results[0] == kept[0] == 0
        launch(held)
        launch(held)
        seen.append(results[0])
    assert seen == [2 * (1 + 2), 1 + 2]


def test_memory_of_a_kernels_own_is_there_for_each_replay():
    @numba.jit
    def copy(start, stop, source, target):
        for i in range(start, stop):
            _store(target + 4 * i, _load(source + 4 * i) + 1)

    def kernel(x, out):
        between = np.empty(x.shape[0], np.float32)
        numba.parallel(copy, x.shape[0], numba.pointer(x), numba.pointer(between), minimum=1000)
        numba.parallel(copy, x.shape[0], numba.pointer(between), numba.pointer(out), minimum=1000)

    from flagops.kernels.numba import _vectors

    tag = np.float32(0)
    _load, _store = numba.jit(lambda at: _vectors.load(tag, at)), numba.jit(lambda at, x: _vectors.store(tag, at, x))
    launch = numba.backend.record(kernel, (torch.ones(8), torch.ones(8)), PLACES, fail)
    for _ in range(3):
        x, out = torch.randint(-8, 9, (8,)).float(), torch.zeros(8)
        launch((x, out))
        assert torch.equal(out, x + 2)


def test_a_call_whose_addresses_compare_in_another_way_is_the_kernels():
    went = []

    def kernel(x, out):
        _run(x, out, np.zeros(1 + (numba.pointer(x) == numba.pointer(out))))

    held = torch.ones(4), torch.ones(4)
    launch = numba.backend.record(kernel, held, PLACES, went.append)
    launch(held)
    launch((torch.ones(4), torch.ones(4)))
    assert not went
    same = (held[0], held[0])
    launch(same)
    assert went == [same]


def test_arguments_lie_where_the_values_of_a_call_say():
    """A view of an argument is a number of bytes behind it, and a result one of several."""
    noted = []

    def kernel(x, out):
        parallel(None, 4, numba.pointer(x) + 8, (numba.pointer(out), 3))

    def parallel(kernel, tasks, *args, minimum=1):
        if _launches.current.recording is None:
            noted.append(args)
        else:
            _launches.current.recording.launch(kernel, tasks, args, minimum)

    places = iter([((0,), 16), ((1, 1), 0)])
    seen = [_launches.stand_in(torch.zeros(2), places) for _ in range(2)]
    held = torch.zeros(8), (torch.zeros(3), torch.zeros(2))
    _launches.replay(kernel, seen, parallel, 2, fail)(held)
    assert noted == [(held[0].data_ptr() + 16 + 8, (held[1][1].data_ptr(), 3))]


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


def test_room_to_work_in_is_taken_anew_for_each_replay():
    noted = []

    def kernel(x, out):
        (first, one), (second, other) = _launches.room(9000), _launches.room(9000)
        parallel(None, 4, Named(numba.pointer(x), 3), one, (other + 64, numba.pointer(out)))
        assert first is not second

    def parallel(kernel, tasks, *args, minimum=1):
        if _launches.current.recording is None:
            noted.append(args)
        else:
            _launches.current.recording.launch(kernel, tasks, args, minimum)

    x, out = torch.zeros(2), torch.zeros(2)
    places = iter([((0,), 0), ((1,), 0)])
    seen = [_launches.stand_in(each, places) for each in (x, out)]
    launch = _launches.replay(kernel, seen, parallel, 2, fail)
    launch((x, out))
    ((named, one, (other, goal)),) = noted
    assert named == (x.data_ptr(), 3)
    assert type(named) is Named
    assert goal == out.data_ptr()
    assert one % 64 == other % 64 == 0
    assert abs(one - (other - 64)) >= 9000


class Named(NamedTuple):
    address: int
    step: int
