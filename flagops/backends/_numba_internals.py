"""What flagops uses of numba that numba does not promise: all of it stands here, and `self_test` tries it.

Beside each use stands where numba keeps it, the same in all releases from OLDEST to NEWEST.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types
from numba.core import serialize
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.core.typeconv import Conversion
from numba.core.types.misc import unliteral
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flagops import config
from flagops.errors import Uncompiled

from ._store import Store

log = logging.getLogger("flagops")

OLDEST, NEWEST = (0, 62), (0, 68)
"""The releases that were tried; before the oldest, LLVM's pointers have types."""

__all__ = ["Conversion", "lower_constant", "signature", "unliteral"]  # what types of our own are declared with

OPTIONS = {"nogil": True, "error_model": "numpy"}

_IMPLIED = {
    "avx512bf16": "avx512bw",
    "avx512bw": "avx512f",
    "avx512f": "avx2 fma f16c",
    "avx2": "avx",
    "fma": "avx",
    "f16c": "avx",
    "avx": "sse4.2",
    "sse4.2": "sse4.1",
    "sse4.1": "ssse3",
    "ssse3": "sse3",
    "sse3": "sse2",
}
"""What a feature brings with it in LLVM, which NUMBA_CPU_FEATURES need not name."""


@cache
def settings() -> tuple[str, str, str]:
    """Triple, processor and features that numba compiles for. numba.core.codegen: JITCPUCodegen.magic_tuple"""
    return tuple(cpu_target.target_context.codegen().magic_tuple())


@cache
def target() -> tuple[str, str, frozenset[str]]:
    """Architecture, processor and features, such as ``"+avx2"``, with what they imply."""
    triple, name, features = settings()
    architecture = triple.split("-")[0]
    given = {feature[1:]: feature[0] == "+" for feature in features.split(",") if feature}
    following = [feature for feature, has in given.items() if has] + (["sse2"] if architecture == "x86_64" else [])
    found = set()
    while following:
        found.add(feature := following.pop())
        following += [implied for implied in _IMPLIED.get(feature, "").split() if given.get(implied, True)]
    return architecture, name, frozenset(f"+{feature}" for feature in found)


class Cache:
    """What a dispatcher asks for compiled code and gives it to; a failure costs a compilation, never the call.

    numba's own keeps an index beside the code, which two processes that write at once can make name each other's.
    """

    def __init__(self, function: Any, owner: Any, store: Store | str) -> None:
        code = owner.__code__
        own = "" if function is owner else f".{function.__name__}"
        self._prefix = f"{owner.__module__}.{code.co_name}{own}-{code.co_firstlineno}".replace("<", "").replace(">", "")
        self._function, self._store, self._writes = function, store, not isinstance(store, str) and store.writable
        self.cache_path = "" if isinstance(store, str) else str(store.folder)  # numba.core.dispatcher: Dispatcher.stats

    def _name(self, signature: Any) -> str:
        cells = tuple(cell.cell_contents for cell in self._function.__closure__ or ())
        key = repr(signature).encode() + self._function.__code__.co_code + serialize.dumps(cells)
        return f"{self._prefix}.{hashlib.sha256(key).hexdigest()[:24]}.nbc"

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function for a signature, or None. numba.core.dispatcher: Dispatcher.compile"""
        found = self._loaded(signature, context)
        if found is None and config.current().jit == "error":
            kept = f"{self.cache_path} has none for {settings()[1]}" if self.cache_path else str(self._store)
            raise Uncompiled(f"FLAGOPS_JIT=error: {self._prefix} would be compiled for {signature}; {kept}")
        return found

    def _loaded(self, signature: Any, context: Any) -> Any:
        if isinstance(self._store, str):
            return None
        try:
            content = self._store.read(self._name(signature))
            if content is None:
                return None
            context.refresh()  # as numba.core.caching: Cache.load_overload
            kept, parts = pickle.loads(content)
            return CompileResult._rebuild(context, *parts) if kept == signature else None
        except Exception as error:
            log.info("cached numba kernel ignored: %s", error)
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled function, unless it holds addresses. numba.core.dispatcher: Dispatcher.compile"""
        if isinstance(self._store, str) or not self._writes:
            return
        if compiled.lifted or compiled.library.has_dynamic_globals:
            return
        try:
            self._store.write(self._name(signature), serialize.dumps((signature, compiled._reduce())))
        except Exception as error:
            log.info("compiled numba kernel not cached: %s", error)
            self._writes = False

    def flush(self) -> None:
        """Nothing is forgotten: what is compiled again is written again. numba.core.dispatcher: Dispatcher.recompile"""


def keep(dispatcher: Any, owner: Any, store: Store | str) -> None:
    """Let a dispatcher keep its code in a store, by the name of its owner, or keep none and say why.
    numba.core.dispatcher: Dispatcher._cache"""
    dispatcher._cache = Cache(dispatcher.py_func, owner, store)


def compiled(dispatcher: Any, arguments: Sequence[Any]) -> Any:
    """The compiled function for types of arguments. numba.core.dispatcher: Dispatcher.compile, overloads"""
    dispatcher.compile(tuple(arguments))
    return dispatcher.overloads[tuple(arguments)]


def link(context: Any, function: Any) -> None:
    """Let the code that an intrinsic generates call a compiled function. numba.core.base: active_code_library"""
    context.active_code_library.add_linking_library(function.library)


def call(context: Any, builder: Any, function: Any, values: Sequence[Any]) -> Any:
    """Emit a call; the result says whether it failed. numba.core.base: BaseContext.call_internal_no_propagate"""
    status, _ = context.call_internal_no_propagate(builder, function.fndesc, function.signature, values)
    return status.is_error


def entry(dispatcher: Any, arguments: Sequence[Any]) -> int:
    """The address at which C calls a compiled function; it stays as long as the dispatcher.
    numba.core.compiler: CompileResult.library, numba.core.funcdesc: FunctionDescriptor.llvm_cfunc_wrapper_name"""
    function = compiled(dispatcher, arguments)
    return int(function.library.get_pointer_to_function(function.fndesc.llvm_cfunc_wrapper_name))


def _locks() -> tuple[Any, Any]:
    """Of numba's compiler and of LLVM. numba.core.compiler_lock, llvmlite.binding.ffi: _lib_wrapper._lock"""
    return global_compiler_lock, llvm.ffi.lib._lock


def _acquire() -> None:
    for lock in _locks():
        lock.__enter__()


def _release() -> None:
    for lock in reversed(_locks()):
        lock.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):  # a child must not inherit them from a thread that it does not have
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)


def self_test() -> dict[str, str | None]:
    """What is wrong with each thing that numba does not promise, or None where it is as it was."""
    found: dict[str, str | None] = {}
    for name, check in _CHECKS.items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _release_tried() -> str | None:
    version = tuple(map(int, numba.__version__.split(".")[:2]))
    last = ".".join(map(str, NEWEST))
    return None if OLDEST <= version <= NEWEST else f"numba {numba.__version__} has not been tried, the last was {last}"


def _target_known() -> str | None:
    architecture, name, features = target()
    return None if architecture and name and features else f"no features of {name or 'the processor'} are known"


def _twice(x):  # type: ignore[no-untyped-def]
    return 2 * x


def _linked() -> str | None:
    """An intrinsic that calls another compiled function, which fails for 3."""

    def fails(x):  # type: ignore[no-untyped-def]
        if x == 3:
            raise ValueError
        return x

    inner = numba.njit(**OPTIONS)(fails)

    @intrinsic  # type: ignore[untyped-decorator]
    def failed(typing: Any, x: Any) -> Any:
        function = compiled(inner, [types.int64])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            link(context, function)
            return call(context, builder, function, values)

        return types.boolean(types.int64), generate

    got = [numba.njit(**OPTIONS)(lambda x: failed(x))(x) for x in (2, 3)]
    return None if got == [False, True] else f"a call between compiled functions gave {got}"


def _entered() -> str | None:
    """A compiled function as C calls it."""
    place = entry(numba.njit(**OPTIONS)(_twice), [types.int64])
    got = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(place)(21)
    return None if got == 42 else f"a function called by its address gave {got}"


class _Memory(dict[str, bytes]):
    folder, read, write, writable = "", dict.get, dict.__setitem__, True


def _kept() -> str | None:
    store: Any = _Memory()
    for hits in (0, 1):
        dispatcher = numba.njit(**OPTIONS)(_twice)
        keep(dispatcher, _twice, store)
        with config.using(jit="auto"):
            right = dispatcher(21) == 42
        if not right:
            return "a function from the cache computes something else"
        if sum(dispatcher.stats.cache_hits.values()) != hits:
            return "compiled code is not found again" if hits else "code is found that was never compiled"
    return None


def _declared() -> str | None:
    """A type that numbers become, with a constant and an operator of its own."""

    class Doubled(types.Type):
        def can_convert_from(self, typingctx: Any, other: Any) -> Any:
            return Conversion.unsafe if isinstance(other, types.Integer) else None

    kind = Doubled("doubled")
    two = signature(types.int64, kind, unliteral(types.literal(2)))
    if two.return_type != types.int64 or two.args != (kind, types.int64):
        return f"a signature has become {two}"
    lower_constant(Doubled)(lambda context, builder, kind, value: context.get_dummy_value())
    converted = cpu_target.typing_context.can_convert(types.int64, kind)
    return None if converted == Conversion.unsafe else f"an integer becomes a type of ours by {converted}"


def _locked() -> str | None:
    taken: list[bool] = []

    def take() -> None:
        for lock in _locks():
            taken.append(lock._lock.acquire(blocking=False))
            if taken[-1]:
                lock._lock.release()

    for change in (_acquire, _release):
        change()
        other = threading.Thread(target=take)
        other.start()
        other.join()
    return None if taken == [False, False, True, True] else f"another thread could take the locks: {taken}"


_CHECKS: dict[str, Callable[[], str | None]] = {
    "release": _release_tried,
    "target": _target_known,
    "code library": _linked,
    "address": _entered,
    "cache": _kept,
    "types": _declared,
    "locks": _locked,
}
