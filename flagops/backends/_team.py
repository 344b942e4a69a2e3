"""A numba kernel shared out among the OpenMP threads that torch's own kernels run on.

Those threads wait for the next parallel region for a while before they sleep: whoever keeps threads of his own has
them woken late, and beside others that spin on the same processors.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from types import FunctionType
from typing import Any

_HARD = 2  # omp_pause_hard


def openmp() -> int:
    """Address of `GOMP_parallel` (libgomp's entry point; LLVM's OpenMP has it too) as torch calls it, or 0."""
    extension = getattr(sys.modules.get("torch"), "_C", None)
    return _entry(extension.__file__) if extension is not None else 0


@cache
def _entry(library: str) -> int:
    try:
        torch = ctypes.CDLL(library)  # its symbols and those of all that it is linked with
        fork, pause = torch.GOMP_parallel, torch.omp_pause_resource_all
    except (OSError, AttributeError):
        return 0
    if hasattr(os, "register_at_fork"):
        # A child would wait for threads that stayed in the parent, in torch's own operators too: let them end first.
        os.register_at_fork(before=lambda: pause(_HARD))
    return ctypes.cast(fork, ctypes.c_void_p).value or 0


def launcher(kernel: Any) -> FunctionType:
    """`launch(entry, threads, chunk, tasks, args)`, to be compiled: `kernel(start, stop, *args)` on a team of threads.

    Each takes the next `chunk` of the tasks until none is left. The result is 0 if all went well.
    """
    # Its own globals, not a closure, which numba's cache would pickle.
    return FunctionType(_launch.__code__, {"__name__": __name__, "share": _intrinsic(kernel)})


def _launch(entry, threads, chunk, tasks, args):  # type: ignore[no-untyped-def]
    return share(entry, threads, chunk, tasks, args)  # type: ignore[name-defined]  # noqa: F821


def _intrinsic(kernel: Any) -> Any:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from ._numba_internals import call, compiled, link

    count, flag, pointer = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
    body = ir.FunctionType(ir.VoidType(), [pointer])

    def share(typing: Any, entry: Any, threads: Any, chunk: Any, tasks: Any, args: Any) -> Any:
        arguments = types.intp, types.intp, *args.types
        function = compiled(kernel, arguments)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            entry, threads, chunk, tasks, packed = values
            link(context, function)
            items = cgutils.unpack_tuple(builder, packed, len(args.types))
            # what the threads share: the next task, the tasks, a chunk, whether one failed, and the arguments
            layout = ir.LiteralStructType([count, count, count, flag, *(item.type for item in items)])
            shared = cgutils.alloca_once(builder, layout)
            for place, value in enumerate((count(0), tasks, chunk, flag(0), *items)):
                builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))
            team = _body(context, builder.module, layout)
            data = builder.bitcast(shared, pointer)
            fork = ir.FunctionType(ir.VoidType(), [body.as_pointer(), pointer, flag, flag]).as_pointer()
            builder.call(builder.inttoptr(entry, fork), [team, data, builder.trunc(threads, flag), flag(0)])
            return builder.load(cgutils.gep_inbounds(builder, shared, 0, 3))

        def _body(context: Any, module: Any, layout: Any) -> Any:
            """What each thread of the team runs."""
            region = ir.Function(module, body, module.get_unique_name("team"))
            region.linkage = "internal"
            builder = ir.IRBuilder(region.append_basic_block())
            shared = builder.bitcast(region.args[0], layout.as_pointer())
            places = [cgutils.gep_inbounds(builder, shared, 0, place) for place in range(len(layout.elements))]
            following, tasks, chunk, failed = places[0], *map(builder.load, places[1:3]), places[3]
            items = [builder.load(place) for place in places[4:]]
            begin, work, stop = (region.append_basic_block() for _ in range(3))
            builder.branch(begin)
            builder.position_at_end(begin)
            first = builder.atomic_rmw("add", following, chunk, "monotonic")
            builder.cbranch(builder.icmp_signed("<", first, tasks), work, stop)
            builder.position_at_end(work)
            last = builder.add(first, chunk)
            last = builder.select(builder.icmp_signed("<", last, tasks), last, tasks)
            with cgutils.if_unlikely(builder, call(context, builder, function, [first, last, *items])):
                builder.store(flag(1), failed)
            builder.branch(begin)
            builder.position_at_end(stop)
            builder.ret_void()
            return region

        return types.int32(entry, threads, chunk, tasks, args), generate

    return intrinsic(share)
