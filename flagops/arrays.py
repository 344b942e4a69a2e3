"""torch tensors and NumPy arrays seen alike, without importing the library that a caller does not use."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

HALF = ("float16", "bfloat16")
FLOATS = (*HALF, "float32", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
NUMBERS = (*FLOATS, *INTEGERS)
DTYPES = (*NUMBERS, "bool")
ONE_BYTE = ("uint8", "int8", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn_x2")


def arithmetic(dtype: str) -> str:
    """What operands are brought to before anything is computed in a dtype: halves are float32, integers int64."""
    return "float32" if dtype in HALF else "int64" if dtype in INTEGERS else dtype


@functools.cache
def _name(dtype: Any) -> str:
    if type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    import numpy

    return numpy.dtype(dtype).name


def dtype_name(x: Any) -> str:
    """The dtype of an array by the name that torch, NumPy and ml_dtypes share, such as ``"bfloat16"``."""
    return _name(x.dtype)


def parse_dtype(value: Any) -> str:
    """The name of a dtype given as a name, a torch dtype or anything that `numpy.dtype` takes."""
    if isinstance(value, str):
        return value
    try:
        return _name(value)
    except TypeError:
        raise TypeError(f"must be a dtype or its name, got {value!r}") from None


def is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def private_in_host_memory() -> bool:
    """Whether the memory of torch's custom device (PrivateUse1) is the host's: its module, ``torch.<name>``, says so by
    ``host_memory = True``."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return bool(getattr(getattr(torch, torch._C._get_privateuse1_backend_name(), None), "host_memory", False))


def in_host_memory(x: Any) -> bool:
    """Whether a torch tensor's elements lie where the CPU reads them."""
    return x.device.type == "cpu" or (x.device.type == _private() and private_in_host_memory())


def _private() -> str:
    return str(sys.modules["torch"]._C._get_privateuse1_backend_name())


def is_number(x: Any) -> bool:
    """Whether it is one number in a torch tensor of the host's, repeated or not: it goes with tensors of any device."""
    if not is_torch(x) or x.device.type != "cpu" or x.layout != sys.modules["torch"].strided:
        return False
    return not any(x.stride())


def is_numpy(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of a name; ml_dtypes gives those that NumPy lacks."""
    import numpy

    if name in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu"):
        import ml_dtypes

        return numpy.dtype(getattr(ml_dtypes, name))
    return numpy.dtype(name)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """An uninitialised array of the kind and on the device of another."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    import numpy

    return numpy.empty(shape, numpy_dtype(dtype))


def maker(shape: tuple[int, ...], dtype: str, like: Any) -> Callable[[], Any]:
    """What makes the arrays that `empty` does, many alike."""
    if is_torch(like):
        torch, strides = sys.modules["torch"], [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * max(size, 1))
        strides = strides[: len(shape)]
        kind = {"dtype": getattr(torch, dtype), "device": like.device}
        return functools.partial(torch.empty_strided, shape, tuple(strides), **kind)  # a third faster than torch.empty
    import numpy

    return functools.partial(numpy.empty, shape, numpy_dtype(dtype))


def codes(x: Any) -> Any:
    """A one-byte format as its bytes; uint8 and wider formats as they are."""
    if dtype_name(x) == "uint8" or x.dtype.itemsize != 1:
        return x
    return x.view(sys.modules["torch"].uint8 if is_torch(x) else "uint8")


def compact(x: Any) -> Any:
    """An array without gaps, copied where it has some."""
    return x.contiguous() if is_torch(x) else sys.modules["numpy"].ascontiguousarray(x)


def as_numpy(x: Any) -> Any:
    """A tensor in the host's memory (or an array) as a NumPy array on it; bfloat16 and FP8 become ml_dtypes."""
    if not is_torch(x):
        return x
    torch, name = sys.modules["torch"], dtype_name(x)
    x = x.detach()
    if x.device.type != "cpu" and in_host_memory(x):
        return _seen(x, "uint8" if name == "float4_e2m1fn_x2" else name)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu"):
        raw = torch.uint8 if x.dtype.itemsize == 1 else torch.uint16
        return x.view(raw).numpy().view(numpy_dtype(name))
    return codes(x).numpy() if name == "float4_e2m1fn_x2" else x.numpy()


def _seen(x: Any, name: str) -> Any:
    """A tensor of a device whose memory the host addresses, which torch does not hand to NumPy."""
    import ctypes

    import numpy

    low, high = span(x)
    memory = (ctypes.c_char * (high - low)).from_address(address(x) + low)
    steps = [step * x.element_size() for step in x.stride()]
    return numpy.ndarray(tuple(x.shape), numpy_dtype(name), memoryview(memory), -low, steps)


def as_torch(x: Any) -> Any:
    """A NumPy array as a CPU tensor on the same memory; the inverse of `as_numpy`."""
    import torch

    name = dtype_name(x)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu"):
        raw = "uint8" if x.dtype.itemsize == 1 else "uint16"
        return torch.from_numpy(x.view(raw)).view(getattr(torch, name))
    return torch.from_numpy(x)


def address(x: Any) -> int:
    """Where the first element lies."""
    return int(x.data_ptr() if is_torch(x) else x.__array_interface__["data"][0])


def span(x: Any) -> tuple[int, int]:
    """The bytes that an array may touch, from and to, relative to its first element."""
    steps = [step * x.element_size() for step in x.stride()] if is_torch(x) else x.strides
    if 0 in x.shape:
        return 0, 0
    reach = [(size - 1) * step for size, step in zip(x.shape, steps, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + x.dtype.itemsize
