"""Seeds, repeats, profiles, and the choice of backends. Without a GPU, Triton kernels run in Triton's interpreter.

Every draw of a test follows from the run's seed and the test's id: ``--seed N`` with the id repeats it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: test processes share the processors

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import functools
import gc
import importlib.util
import random
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from types import CodeType, FunctionType

import numpy as np
import pytest
from hypothesis import HealthCheck, core, register_random, settings

sys.path.insert(0, str(Path(__file__).parent))
import interpreter

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.quicken()


gc.set_threshold(20_000, 20, 20)  # tests, types and compilers' code are millions of objects, and few of them are freed


class _TorchRandom:
    """torch's generator, for hypothesis to seed before each example as it does Python's and NumPy's."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH = _TorchRandom()  # hypothesis holds it weakly
register_random(TORCH)
settings.register_profile(
    "default",
    max_examples=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=1000)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)

DRAWN = 4
"""Of tests marked `drawn` a run of the whole suite takes one in so many, by its seed; CI takes all."""

# What a test uses that compares by distance and not bit for bit.
DISTANCES = {"abs", "allclose", "assert_close", "assert_near", "assert_of", "assert_parity", "compare"}
DISTANCES |= {"BOUND", "gradcheck", "gradgradcheck"}


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of every draw; a run prints its own")
    parser.addoption("--repeat", type=int, default=1, help="run each test so many times, with other draws")
    parser.addoption("--seconds", type=float, default=20, help="after which a test is not repeated any more")
    parser.addoption("--distances", action="store_true", help="only tests that compare by distance, not bit for bit")
    parser.addoption("--mutants", default="2", help="kernel files of which a process tries an edit, drawn anew, or all")
    parser.addoption("--every", action="store_true", help="all tests, also those of which a whole run draws a few")
    parser.addoption("--backend", action="append", help="hold only these backends to the parity suite")
    parser.addoption(
        "--device", default="cpu", help="where the ranks of distributed tests compute: cpu, or cuda with NCCL"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.option.seed, config.option.every = config.workerinput["draws"]
        return
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1 << 31)
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    config.option.every |= not whole or config.option.repeat > 1


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """All workers of xdist draw alike."""
    node.workerinput["draws"] = node.config.option.seed, node.config.option.every


def pytest_report_header(config):
    drawn = "" if config.option.every else f", one in {DRAWN} of the longest tests; --every takes all"
    return f"draws: --seed {config.option.seed}{drawn}"


def _seed(config, name):
    seed = zlib.crc32(f"{config.option.seed} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - of whatever draws without a generator
    torch.manual_seed(seed)
    return seed


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector):
    """A module's own draws do not depend on what was imported before it."""
    _seed(collector.config, collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    settings.load_profile(PROFILE)  # torch's own test helpers, once imported, leave theirs of 10 examples
    seed = _seed(item.config, item.nodeid)
    if item.config.option.hypothesis_seed is None:
        core.global_force_seed = seed  # what that option sets once for all
    if item.config.option.repeat > 1 and _spent[_once(item)] > item.config.option.seconds:
        pytest.skip(f"repeated for {item.config.option.seconds:g} s")


@pytest.fixture
def rng(request):
    """NumPy's generator with the test's seed."""
    return np.random.default_rng(_seed(request.config, request.node.nodeid))


_spent = Counter()


def _once(item):
    """A test whatever its repeat."""
    return item.function, *(str(v) for k, v in item.callspec.params.items() if k != "repeat")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    start = time.process_time()
    try:
        return (yield)
    finally:
        if item.config.option.repeat > 1:
            _spent[_once(item)] += time.process_time() - start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        options = item.config.option
        repeat = f" --repeat {options.repeat}" if options.repeat > 1 else ""
        report.sections.append(("again", f"pytest --seed {options.seed}{repeat} {item.nodeid!r}"))
    return report


def _names(code):
    """Every name that a function's code uses, those of functions inside it too."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


@functools.cache
def _measures(function, seen=frozenset()):
    """Whether a test compares by distance, itself or through a helper of its module."""
    used = _names(function.__code__)
    helpers = [function.__globals__.get(name) for name in used - seen]
    return bool(used & DISTANCES) or any(
        _measures(helper, seen | used) for helper in helpers if isinstance(helper, FunctionType)
    )


def _left_out(seed, items):
    """Three quarters of the cases of each test that is marked `drawn`, in so many runs of one that has no others."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("drawn"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for test, some in cases.items():
        draws = random.Random(f"{seed} {test}")
        kept, rest = divmod(len(some), DRAWN)
        kept += draws.random() < rest / DRAWN
        yield from draws.sample(some, len(some) - kept)


def pytest_collection_modifyitems(config, items):
    settings.load_profile(PROFILE)
    if not config.option.every:
        left = set(_left_out(config.option.seed, items))
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
    items.sort(
        key=lambda item: "test_mutants.py" not in item.nodeid
    )  # the longest first, so that all workers end alike
    if config.option.distances:
        tests = {item: getattr(item.function, "hypothesis", None) for item in items}
        kept = [item for item, drawn in tests.items() if _measures(drawn.inner_test if drawn else item.function)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def pytest_collection_finish():
    """What is imported and collected stays to the end: the collector need not look through it again and again."""
    gc.freeze()


def pytest_generate_tests(metafunc):
    """``kernel``, and ``aten_kernel`` of cards under torch's own operators: every (operator, backend) that has one; a
    backend that cannot run here is named, not hidden."""
    from flagops import registry

    if metafunc.config.option.repeat > 1:
        metafunc.fixturenames.append("repeat")
        metafunc.parametrize("repeat", range(metafunc.config.option.repeat))
    for fixture, names in {
        "kernel": list(registry.operators()),
        "aten_kernel": [name for name, card in registry.cards().items() if card.aten],
    }.items():
        if fixture not in metafunc.fixturenames:
            continue
        backends = metafunc.config.getoption("--backend") or registry.backend_names()
        marker = metafunc.definition.get_closest_marker("operators")
        pairs = []
        for name in backends:
            reason = registry.backend(name).unavailable()
            for op in marker.args if marker else names:
                if registry.written(op, name):
                    marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
                    pairs.append(pytest.param((op, name), id=f"{op}-{name}", marks=marks))
        metafunc.parametrize(fixture, pairs)
