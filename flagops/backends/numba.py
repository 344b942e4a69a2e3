"""CPU kernels compiled by numba: the descriptor, and what its kernels share (`jit`, `pointer`, `strides`, `parallel`).

numba itself is imported by `jit` and `unavailable` only; what of it is not promised stands in `_numba_internals`.
Compiled code is cached in a folder of our own whose name is a digest of the kernel sources, so that an edited helper
never meets stale code; numba's settings are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .. import arrays, config
from ..arrays import is_numpy, is_torch
from ..calls.replay import Place
from . import _launches, _pool, _team, missing
from ._store import Refused, Store

log = logging.getLogger("flagops")

_current = _launches.current
room = _launches.room


class _Numba:
    """Kernels compiled for the host CPU by numba; torch CPU tensors and NumPy arrays."""

    name = "numba"
    kernels = "flagops.kernels.numba"

    @property
    def dispatch_keys(self) -> tuple[str, ...]:
        return ("CPU", "PrivateUse1") if arrays.private_in_host_memory() else ("CPU",)

    @cache  # noqa: B019  (one instance per process)
    def unavailable(self) -> str | None:
        reason = missing("numba")
        if reason:
            return reason
        import numba

        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set: numba compiles nothing"
        try:
            from . import _numba_internals as internals
        except Exception as error:
            return f"numba {numba.__version__} has not what flagops needs of it: {error}"
        if tuple(map(int, numba.__version__.split(".")[:2])) < internals.OLDEST:
            return f"numba {numba.__version__} is older than {'.'.join(map(str, internals.OLDEST))}"
        return None

    def refuses(self, array: Any) -> str | None:
        if is_torch(array):
            import torch

            if array.device.type != "cpu" and not arrays.in_host_memory(array):
                return f"the tensor is on {array.device}, numba kernels run on the CPU"
            if array.layout is not torch.strided:
                return f"the tensor's layout is {array.layout}, not torch.strided"
            if type(array).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
                return f"{type(array).__name__} keeps no elements of its own"
            return _without_halves() if array.dtype is torch.float16 else None
        if is_numpy(array):
            size = array.itemsize
            if not array.flags.aligned or any(
                s % size for s, n in zip(array.strides, array.shape, strict=True) if n > 1
            ):
                return "the array is not aligned to its elements"
            if not array.dtype.isnative:
                return "the array is not in native byte order"
            return _without_halves() if array.dtype == "float16" else None
        return f"{type(array).__name__} is neither a torch tensor nor a NumPy array"

    def facts(self) -> dict[str, str]:
        import llvmlite.binding as llvm
        import numba

        missing("torch")  # whose threads the kernels of everybody who has torch run on
        kept = _kept(self.kernels)
        return {
            "numba": numba.__version__,
            "llvm": ".".join(map(str, llvm.llvm_version_info)),
            "cpu": _target()[1],
            "threads": f"{threads()}, {'torch OpenMP' if _team.openmp() else 'own'}",
            "cache": str(kept.folder) if isinstance(kept, Store) else f"none, {kept}",
        }

    def self_test(self) -> dict[str, str | None]:
        from ._numba_internals import self_test

        return self_test()

    def synchronize(self) -> None:
        """Nothing runs behind a caller's back."""

    @cached_property
    def environment(self) -> Callable[[], tuple[Any, ...]]:
        """What a kernel may look at besides its arguments, for calls on torch's tensors."""
        count, current = sys.modules["torch"].get_num_threads, config.current
        return lambda: (count(), _caller.most, current().budget)

    def record(
        self,
        function: Callable[..., None],
        args: Sequence[Any],
        places: Sequence[Place],
        otherwise: Callable[[Sequence[Any]], None],
    ) -> Callable[[Sequence[Any]], None] | None:
        """What a kernel hands to its loops for calls like this one, with new addresses each time; None if it cannot
        be told without the values of its arguments.

        places: where its tensors lie among the values of a call. otherwise: runs it for those that overlap in another
        way than here.
        """
        given = iter(places)
        seen = [_launches.stand_in(x, given) for x in args]
        try:
            return _launches.replay(function, seen, parallel, threads(), otherwise)
        except Exception as error:  # whatever it raised, the kernel itself raises it better
            log.debug("%s is not recorded: %s", function.__name__, error)
            return None


backend = _Numba()


def pointer(x: Any) -> Any:
    """Address of the first element of a torch CPU tensor or a NumPy array."""
    if _current.recording is not None:
        return _current.recording.address(x)
    return x.data_ptr() if hasattr(x, "data_ptr") else x.__array_interface__["data"][0]


def strides(x: Any) -> tuple[int, ...]:
    """Strides in elements."""
    if hasattr(x, "stride"):
        return x.stride()
    size = x.itemsize
    return tuple([s // size for s in x.strides])


def _target() -> tuple[str, str, frozenset[str]]:
    from ._numba_internals import target

    return target()


def architecture() -> str:
    """The processor's architecture as LLVM names it, such as ``"x86_64"``."""
    return _target()[0]


def features() -> frozenset[str]:
    """The processor features numba compiles for, such as ``"+avx512f"``, and what they imply."""
    return _target()[2]


def _without_halves() -> str | None:
    if "+sse2" in features() and "+f16c" not in features():
        return "the processor has no float16 conversions (F16C)"
    return None


def jit(function: Any, owner: Any = None) -> Any:
    """`numba.njit` that releases the GIL, divides as NumPy does, and is cached in our own folder.

    A function that is made for another one is cached beside that one, its `owner`.
    """
    import numba

    from ._numba_internals import OPTIONS, keep

    dispatcher = numba.njit(**OPTIONS)(function)
    owner = owner or function
    package = owner.__module__.rpartition(".")[0]
    store, file = _kept(package), owner.__code__.co_filename
    if isinstance(store, Store) and not _lies_in(package, file):
        store = f"nothing is kept of {file}"
    keep(dispatcher, owner, store)
    return dispatcher


@cache
def _lies_in(package: str, file: str) -> bool:
    """Whether a file is the package's: an edited copy under a module's name must leave no code for the module."""
    from importlib.resources import files

    return os.path.realpath(file) == os.path.realpath(str(files(package).joinpath(os.path.basename(file))))


@cache
def _launcher(kernel: Any) -> Any:
    return jit(_team.launcher(kernel), kernel.py_func)


@cache
def _kept(package: str) -> Store | str:
    """Where the compiled code of a package of kernels is kept, or why it is not."""
    try:
        return Store(_folder(package))
    except Exception as error:  # no home folder, a file in its place, a package without a listing
        level = logging.WARNING if isinstance(error, Refused) else logging.INFO
        log.log(level, "compiled numba kernels are not cached: %s", error)
        return str(error)


def _folder(package: str) -> Path:
    """One folder for all that a package's compiled code depends on."""
    import numba

    from ._numba_internals import OPTIONS, settings

    if not package:
        raise ValueError("functions outside a package may change unnoticed")
    facts = numba.__version__, sys.implementation.cache_tag, settings(), OPTIONS
    digest = hashlib.sha256(repr(facts).encode())
    for file, content in _sources(package):
        digest.update(file.encode() + b"\0" + content)
    return Path(config.cache_folder()) / "numba" / digest.hexdigest()[:20]


def _sources(package: str) -> Iterator[tuple[str, bytes]]:
    """What kernels of a package may compile: its modules, helpers (``_*.py``) of the one above, and ours."""
    from importlib.resources import files

    above = package.rpartition(".")[0]
    ours = "flagops.backends"
    for folder, prefix in (package, ""), (above, "_"), (ours, "_team"), (ours, "_numba"):
        for source in sorted(files(folder).iterdir(), key=lambda file: file.name) if folder else ():
            if source.name.startswith(prefix) and source.name.endswith(".py"):
                yield f"{folder}/{source.name}", source.read_bytes()


class _Caller(threading.local):
    most: int | None = None
    """Of how many threads the calls of this one may run, None for as many as there are."""


_caller = _Caller()


@contextlib.contextmanager
def at_most(count: int) -> Iterator[None]:
    """Calls of this thread run on at most so many threads: for one of several threads that share the processors."""
    before = _caller.most
    _caller.most = count
    try:
        yield
    finally:
        _caller.most = before


def threads() -> int:
    """torch's thread count where torch is loaded, else the processors this process may use; less under `at_most`."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        count = int(torch.get_num_threads())
    else:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = _caller.most
    return count if most is None else min(count, most)


_CHUNKS = 4  # a thread that loses its processor delays the call by one chunk
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the threads stayed in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def parallel(kernel: Callable[..., Any], tasks: int, *args: Any, minimum: int = 1) -> None:
    """Run `kernel(start, stop, *args)`, made by `jit`, over range(tasks) on torch's OpenMP threads, else on our own.

    Chunks hold at least `minimum` tasks. Serial for few tasks, in a forked child and at interpreter exit.
    """
    if tasks < 1:
        return
    if _current.recording is not None:
        _current.recording.launch(kernel, tasks, args, minimum)
        return
    team = threads() if tasks >= 2 * minimum and not (_forked or sys.is_finalizing()) else 1
    if team < 2:
        kernel(0, tasks, *args)
        return
    busy = min(team, tasks // minimum)
    chunk = max(minimum, -(-tasks // (busy * _CHUNKS)))
    entry = _team.openmp()
    if not entry:
        _pool.run(kernel, busy, chunk, tasks, args)
    elif _launcher(kernel)(entry, team, chunk, tasks, args):  # a smaller team would end the other threads
        raise MemoryError("a thread of the kernel had no memory to work in")
