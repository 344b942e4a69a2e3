"""Where results go that a call gives tensors for: of another dtype or shape, as torch converts, resizes and refuses."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flagops import arrays
from flagops.calls import memory

from .forms import Form
from .interpose import thread
from .lowering import REFUSED, Pass

if TYPE_CHECKING:
    from torch import Tensor


def deliver(form: Form, args: Sequence[Any], results: Sequence[Tensor], over: Sequence[str] | None) -> None:
    """Results into the tensors that a call gives for them, of another dtype, shape or layout, as torch does.

    over: as in `shared`, which one that has grown may be only now.
    """
    import torch

    for position, result in zip(form.outs, results, strict=True):
        out = args[position]
        if out is result or out is None:
            continue
        argument = form.arguments[position]
        if not torch.can_cast(result.dtype, out.dtype):
            kinds = (_torchs_name(x.dtype) for x in (result, out))
            raise RuntimeError("result type {} can't be cast to the desired output type {}".format(*kinds))
        if out.shape != result.shape:
            if not argument.is_out:
                raise RuntimeError(
                    f"output with shape {list(out.shape)} doesn't match the broadcast shape {list(result.shape)}"
                )
            resized(out, result)
            refused = shared(form, args, over)
            if refused:
                raise RuntimeError(SAID[refused])
        with unbusy():
            out.copy_(result)


_NAMES = {
    "float64": "Double", "float32": "Float", "bfloat16": "BFloat16", "float16": "Half", "bool": "Bool",
    "int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte",
    "complex64": "ComplexFloat", "complex128": "ComplexDouble", "complex32": "ComplexHalf",
}  # fmt: skip


def _torchs_name(dtype: Any) -> str:
    """A dtype as torch's errors call it."""
    name = str(dtype).removeprefix("torch.")
    return _NAMES.get(name, name)


def resized(out: Tensor, like: Tensor) -> None:
    """Give a destination the shape and strides of the result, with torch's warning where it had elements."""
    if out.numel():
        warnings.warn(
            "An output with one or more elements was resized since it had shape "
            f"{list(out.shape)}, which does not match the required output shape {list(like.shape)}. This behavior is "
            "deprecated, and in a future PyTorch release outputs will not be resized unless they have zero elements. "
            "You can explicitly reuse an out tensor t by resizing it, inplace, to zero elements with t.resize_(0).",
            stacklevel=2,
        )
    out.resize_(like.shape)
    reach = sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    if reach < like.numel():
        out.as_strided_(like.shape, like.stride())


_converted: set[tuple[Any, ...]] = set()
"""Overloads with dtypes of results and of destinations that torch's kernels were seen to convert between."""


def refuse_other_dtypes(form: Form, args: Sequence[Any], made: Sequence[Any], ask: Callable[..., Any] | None) -> None:
    """Raise what torch raises of destinations in another dtype than the results: some operators convert to it, others
    ask for their own. Torch's kernel knows, asked once with destinations of its own, else its shape function.

    made: the dtypes of the results. ask: torch's kernel, if it may be asked; raises Pass where that refuses.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    outs = [args[i] for i in form.outs if form.arguments[i].is_out]
    given = [None if x is None else x.dtype for x in outs]
    known = form.name, ask is None, *made, *given
    if all(x in (None, y) for x, y in zip(given, made, strict=False)) or known in _converted:
        return
    with torch.no_grad():
        if ask is not None:
            args = tree_map_only(torch.Tensor, torch.clone, list(args))  # some keep statistics in theirs
            try:
                ask([x.new_empty(0) if x is not None and i in form.outs else x for i, x in enumerate(args)])
            except Exception:  # it raises it again, of the call itself
                raise Pass(REFUSED) from None
        else:
            positional, named = form.split(tree_map_only(torch.Tensor, _without_memory, list(args)))
            with contextlib.suppress(NotImplementedError):  # torch has no shape function that says so
                form.overload()(*positional, **named)
    _converted.add(known)


def refuse_product(form: Form, out: Tensor, like: Tensor, problem: str, alone: bool) -> None:
    """Raise what torch does for a destination that its products do not resize; alone: it has no kernel that says so,
    else Pass."""
    argument, typed = form.arguments[form.given], (out.dtype, out.device) == (like.dtype, like.device)  # type: ignore[index]
    if typed and argument.is_out and out.shape != like.shape:
        return
    if not alone:
        raise Pass(problem)
    if out.shape != like.shape and not argument.is_out:
        sizes = f"input tensor size {list(out.shape)} and output tensor size {list(like.shape)}"
        raise RuntimeError(f"Bad in-place call: {sizes} should match")
    if out.dtype != like.dtype:
        wanted, got = (_CPP.get(arrays.dtype_name(x), arrays.dtype_name(x)) for x in (like, out))
        raise RuntimeError(f"Expected out tensor to have dtype {wanted}, but got {got} instead")
    if out.device != like.device:
        raise RuntimeError(f"Expected out tensor to have device {like.device}, but got {out.device} instead")
    raise RuntimeError(SAID[ITSELF])


_CPP = {"float32": "float", "float64": "double", "bfloat16": "c10::BFloat16", "float16": "c10::Half"}
_CPP |= {"int64": "long int", "int16": "short int", "int32": "int", "int8": "signed char", "uint8": "unsigned char"}
"""Dtypes as torch's structured kernels call them."""


def _without_memory(x: Tensor) -> Tensor:
    import torch

    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def shared(form: Form, args: Sequence[Any], over: Sequence[str] | None) -> str | None:
    """Which of `SAID` is true of the destinations of a call, or None. over: the arguments that they may be."""
    from torch.utils._pytree import tree_leaves

    written = [(i, out) for i in form.outs for out in tree_leaves(args[i])]  # a foreach form has lists
    for i, out in written:
        if out is None:
            continue
        if not out.numel():
            inputs = (x for j, y in enumerate(args) if j not in form.outs for x in tree_leaves(y))
            if over == () and any(x is out for x in inputs):
                return AN_INPUT
            continue
        if overlaps_itself(out):
            return ITSELF
        if not form.arguments[i].is_out:
            continue
        for j, argument in enumerate(form.arguments):
            may = over is None or argument.name in over
            for x in tree_leaves(args[j]) if j not in form.outs else ():
                if hasattr(x, "untyped_storage") and _meet(x, out) and not (may and _same_place(x, out)):
                    return AN_INPUT
    return None


ITSELF, AN_INPUT = "out may overlap itself", "out may share memory with an input"
_SINGLE = "to a single memory location. Please clone() the tensor before performing the operation."
SAID = {
    ITSELF: f"unsupported operation: more than one element of the written-to tensor refers {_SINGLE}",
    AN_INPUT: f"unsupported operation: some elements of the input tensor and the written-to tensor refer {_SINGLE}",
}
"""What torch says where a call may not be so."""


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of a tensor may be one in memory."""
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _meet(x: Tensor, y: Tensor) -> bool:
    if not x.numel() or x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return False
    one, two = ((z.data_ptr() + low, z.data_ptr() + high) for z in (x, y) for low, high in [arrays.span(z)])
    return memory.meet(one, two)


def _same_place(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


@contextlib.contextmanager
def unbusy() -> Iterator[None]:
    """What torch calls within a call that is ours is ours too."""
    busy, thread.busy = thread.busy, False
    try:
        yield
    finally:
        thread.busy = busy
