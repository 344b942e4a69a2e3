"""The bytes of an output, slice by slice: read, dequantised into buffers that are used again, checked, handed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from flagops import arrays, config, registry
from flagops.call import of
from flagops.errors import Unsupported

from . import formats
from .documents import Refused
from .integers import Errors
from .plan import COPY, FP4, FP8, KEEP, KEPT_SCALE, RECODE, RECODED_SCALE, STORED, Output, Plan, Shard, slices
from .source import Reader

BAND = 32  # elements of FP4 that share a scale
BLOCK = 128  # rows and columns that share a scale in FP8 recoded from FP4
LARGEST = 1 << 20  # elements of a slice: their bytes stay in a processor's cache from the read to the write
SMALLEST = 64 << 10
_ALIGNED = 32  # elements that slices of one row begin at, in whole bytes of every format
_CHUNK = 1 << 17  # elements that a check looks at together
_FINITE = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DAMAGED = "the checkpoint is damaged: copy or download it again"


_WIDTH = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
_OPERATORS = {FP4: "fp4_dequantize", FP8: "fp8_dequantize", RECODE: "fp4_to_fp8", "int8": "int8_quantize"}


class Kernels:
    """flagops' operators on NumPy buffers, by one backend: the one named, or the first of the default order.

    Where a backend takes no NumPy arrays, they are handed over as torch tensors of the CPU, or copied to the GPU.
    Raises Unsupported with the reason of each backend that cannot run here or has no kernel that the plan needs.
    """

    def __init__(self, plan: Plan, backend: str | None = None) -> None:
        self._plan = plan
        wishes = (backend,) if backend else config.current().backend or ("numba", "torch", "numpy")
        reasons = {}
        for name in wishes:
            reason = registry.backend(name).unavailable() or self._lacks(name)
            if reason is None:
                self.backend = name
                self._device = self._place(name)
                break
            reasons[name] = reason
        else:
            raise Unsupported("no backend can run here: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))

    def _lacks(self, name: str) -> str | None:
        needed = {_OPERATORS[action] for action in self._actions() if action in _OPERATORS}
        absent = [op for op in sorted(needed) if not registry.written(op, name)]
        return f"has no kernel of {', '.join(absent)}" if absent else None

    def _actions(self) -> set[str]:
        """What is done to tensors, and to the numbers that they are codes of."""
        return {action for out in self._plan.outputs for action in (out.action, out.of and out.of.action) if action} | {
            self._plan.to
        }

    @property
    def temporaries(self) -> int:
        """Bytes for an element that a call may take besides its arguments."""
        return 0 if self.backend == "numba" else 72

    def warm(self) -> None:
        """Load and compile what the plan needs, so that the memory it takes is seen before buffers are made."""
        codes, out = np.zeros((BLOCK, BLOCK), np.uint8), np.empty((BLOCK, BLOCK), arrays.numpy_dtype(wide(self._plan)))
        for action in self._actions():
            if action == FP4:
                self.fp4(codes[:, :64], np.zeros((BLOCK, 4), np.uint8), out)
            elif action == RECODE:
                self.recode(codes[:, :64], np.zeros((BLOCK, 4), np.uint8), np.empty_like(codes))
            elif action == "int8":
                self.int8(out, np.empty((BLOCK, BLOCK), np.int8), np.empty((BLOCK, 1), np.float32))
        made = (out.of or out for out in self._plan.outputs)
        for kind in {each.scale.dtype in _WIDTH for each in made if each.action == FP8 and each.scale}:
            self.fp8(codes, np.zeros((1, 1), np.float32 if kind else np.uint8), (BLOCK, BLOCK), out)

    def fp4(self, packed: Any, scale: Any, out: Any) -> None:
        """`flagops.fp4_dequantize` into `out`."""
        self._call("fp4_dequantize", (packed, scale), out, dtype=arrays.dtype_name(out))

    def fp8(self, weight: Any, scale: Any, block: tuple[int, int], out: Any) -> None:
        """`flagops.fp8_dequantize` into `out`."""
        self._call("fp8_dequantize", (weight, scale), out, block=block, dtype=arrays.dtype_name(out))

    def recode(self, packed: Any, scale: Any, out: Any) -> tuple[Any, Any]:
        """`flagops.fp4_to_fp8` into `out`; returns the scales, and whether each block kept its values."""
        blocks = packed.shape[0] // BLOCK, 2 * packed.shape[1] // BLOCK
        scales, lossless = np.empty(blocks, np.uint8), np.empty(blocks, np.bool_)
        codes = out.view(ml_dtypes.float8_e4m3fn), scales.view(ml_dtypes.float8_e8m0fnu), lossless
        self._call("fp4_to_fp8", (packed, scale), codes)
        return scales, lossless

    def int8(self, values: Any, codes: Any, scale: Any) -> None:
        """`flagops.int8_quantize` into `codes` and `scale`."""
        self._call("int8_quantize", (values,), (codes, scale))

    def _call(self, name: str, inputs: tuple[Any, ...], out: Any, **options: Any) -> None:
        call = of(registry.operator(name))
        given = [self._given(x) for x in inputs]
        several = isinstance(out, tuple)
        if self._device in (None, "cpu"):
            target = tuple(self._given(x) for x in out) if several else self._given(out)
            call(*given, out=target, backend=self.backend, **options)
            return
        made = call(*given, backend=self.backend, **options)
        for x, result in zip(out if several else (out,), made if several else (made,), strict=True):
            arrays.as_torch(x).copy_(result)

    def _given(self, array: Any) -> Any:
        return array if self._device is None else arrays.as_torch(array).to(self._device)

    def _place(self, name: str) -> str | None:
        """None for NumPy arrays, else the torch device that the backend takes."""
        refuses = registry.backend(name).refuses
        probe = np.zeros(64, np.uint8)
        if refuses(probe) is None:
            return None
        import torch

        tensor = torch.from_numpy(probe)
        if refuses(tensor) is None:
            return "cpu"
        if torch.cuda.is_available() and refuses(tensor.cuda()) is None:
            return "cuda"
        raise Unsupported(f"{name}: {refuses(tensor)}")


def wide(plan: Plan) -> str:
    """The widest dtype that narrow weights become on their way into files."""
    return "float32" if plan.integers else "bfloat16"


class Stream:
    """Makes the bytes of outputs for one thread. Use as a context manager.

    limit: elements of a slice; no buffer is larger than that many elements of the output.
    dtype: what quantised tensors become.
    not_finite: copied tensors in which an infinity or a NaN was seen; they are copied all the same.
    errors: relative, of the tensors that have become integers.
    """

    def __init__(self, plan: Plan, kernels: Kernels, limit: int = LARGEST, dtype: str | None = None) -> None:
        self._plan, self._kernels, self._limit = plan, kernels, limit
        self._narrowed, self._dtype = dtype or "bfloat16", dtype or wide(plan)
        self._input = np.empty(limit, np.uint8)
        self._output = np.empty(limit * self._wide, np.uint8)
        self._test = np.empty(_CHUNK, np.uint8)
        self._scales: dict[str, list[Any]] = {}
        self.reader = Reader(plan.source)
        self.not_finite: set[str] = set()
        self.errors: dict[str, float] = {}

    @property
    def _wide(self) -> int:
        """Bytes of an element that is made."""
        return arrays.numpy_dtype(self._dtype).itemsize

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.__exit__()

    def shard(self, shard: Shard, wanted: Callable[[Output], bool] = lambda _: True) -> Iterator[tuple[Output, Any]]:
        """Each output of a shard with its bytes in order, in pieces; nothing for those not wanted."""
        for out in shard.outputs:
            if wanted(out):
                for piece in self.output(out):
                    yield out, piece

    def output(self, out: Output) -> Iterator[Any]:
        """The bytes of one output as uint8 arrays, each valid until the next is asked for.

        Raises Refused for what is damaged, after the last piece also if its file was changed while it was read.
        """
        made: dict[str, Callable[[Output], Iterator[Any]]] = {
            COPY: self._watched, STORED: self._copy, KEPT_SCALE: self._kept_scale, KEEP: self._keep,
            FP4: self._transposed if out.transposed else self._fp4, FP8: self._fp8 if out.scale else self._coded,
            RECODE: self._recode, RECODED_SCALE: self._recoded_scale,
        }  # fmt: skip
        self._dtype = wide(self._plan) if out.of else self._narrowed
        try:
            yield from self._integers(out) if out.of else made.get(out.action, self._coded)(out)
        except Refused:
            self.reader.check()  # of a file that is written to anything may be wrong
            raise
        self.reader.check()

    def _read(self, stored: Any, offset: int, size: int, buffer: Any = None) -> Any:
        found: Any = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        self.reader.read(stored.file, stored.offset + offset, memoryview(found))
        return found

    def _watched(self, out: Output) -> Iterator[Any]:
        kind = _FLOATS.get(out.dtype)
        for piece in self._copy(out):
            if kind and out.name not in self.not_finite and _infinite(piece, kind):
                self.not_finite.add(out.name)
            yield piece

    def _copy(self, out: Output) -> Iterator[Any]:
        step = len(self._output) // 8 * 8  # whole numbers
        for start in range(0, out.size, step):
            yield self._read(out.weight, start, min(step, out.size - start), self._output)

    def _kept_scale(self, out: Output) -> Iterator[Any]:
        for piece in self._copy(out):
            self._finite_scale(out, piece.view(np.float32) if out.dtype == "F32" else piece, out.weight)
            yield piece

    def _keep(self, out: Output) -> Iterator[Any]:
        for piece in self._copy(out):
            self._numbers(out, piece)
            yield piece

    def _fp4(self, out: Output) -> Iterator[Any]:
        matrices, rows, columns = out.matrix
        for r0, r1, c0, c1 in slices(matrices * rows, columns, (1, 32), self._limit):
            shape = r1 - r0, c1 - c0
            first = r0 * columns + c0
            packed = self._read(out.weight, first // 2, shape[0] * shape[1] // 2, self._input)
            scale = self._read(out.scale, first // 32, shape[0] * shape[1] // 32)
            largest = self._finite_scale(out, scale)
            made = self._made(shape)
            self._kernels.fp4(packed.reshape(shape[0], -1), scale.reshape(shape[0], -1), made)
            if largest > 252 or self._dtype != "bfloat16":
                self._in_range(out, made)
            yield self._bytes(made)

    def _fp8(self, out: Output) -> Iterator[Any]:
        for start, shape, _, scale in self._tiles(out, self._limit):
            codes = self._read(out.weight, start, shape[0] * shape[1], self._input)
            largest = self._finite_scale(out, scale)
            self._numbers(out, codes)
            made = self._made(shape)
            self._kernels.fp8(codes.reshape(shape), scale, out.block, made)
            if largest > (246 if scale.dtype == np.uint8 else 1e35) or self._dtype == "float16":
                self._in_range(out, made)
            yield self._bytes(made)

    def _coded(self, out: Output) -> Iterator[Any]:
        """Formats that no kernel is written for, in slices that stay in a processor's cache."""
        assert out.format is not None
        self._size(out)
        factor = self._factor(out)
        for start, shape, row, scale in self._tiles(out, min(self._limit, _CHUNK)):
            codes = self._read(out.weight, start * out.format.bits // 8, shape[0] * shape[1] * out.format.bits // 8)
            with np.errstate(all="ignore"):
                scale = scale / factor if out.format.divides else scale * factor
            largest = self._finite_scale(out, scale)
            self._numbers(out, codes, out.format.invalid)
            made = self._made(shape)
            out.format.expand(codes, scale, out.block, row, made)
            if largest > 1e30 or self._dtype == "float16":
                self._in_range(out, made)
            yield self._bytes(made)

    def _integers(self, out: Output) -> Iterator[Any]:
        """Codes, scales or the size of a weight; those of the scales are made again, and no state is kept for them."""
        to, of, lost = self._plan.integers, out.of, Errors()
        assert to is not None
        assert of is not None
        if out.part == "size":
            yield self._bytes(np.array(of.shape))
            return
        for values in self._rows(of):
            if out.part == "scale":
                made = scale = to.scales(values, self._kernels.int8)
            else:
                codes, scale = to.quantize(values, self._kernels.int8)
                made = to.packed(codes)
            if not np.isfinite(scale.astype(np.float32)).all():
                raise Refused(f"{out.weight} has an infinity or NaN; leave it as it is with --keep, or repair it")
            if out.part == "codes":
                lost.add(values, to.restored(codes, scale))
            yield self._bytes(np.ascontiguousarray(made))
        if out.part == "codes":
            self.errors[of.name] = lost.relative

    def _rows(self, of: Output) -> Iterator[Any]:
        """Whole rows of a weight as float32, few enough that what is made of them stays in a processor's cache."""
        columns = of.shape[-1]
        step = max(1, _CHUNK // columns)
        for piece in self._plain(of) if not of.made else self._narrow(of):
            band = piece.view(np.float32).reshape(-1, columns)
            for first in range(0, len(band), step):
                yield band[first : first + step]

    def _plain(self, of: Output) -> Iterator[Any]:
        rows, columns = of.shape
        kind = np.dtype(_WIDTH[of.dtype])
        for r0, r1, _, _ in slices(rows, columns, (1, columns), self._limit):
            size = (r1 - r0) * columns
            yield (
                self._read(of.weight, r0 * columns * kind.itemsize, size * kind.itemsize).view(kind).astype(np.float32)
            )

    def _narrow(self, of: Output) -> Iterator[Any]:
        return {FP4: self._fp4, FP8: self._fp8 if of.scale else self._coded}.get(of.action, self._coded)(of)

    def _tiles(self, out: Output, limit: int) -> Iterator[tuple[int, tuple[int, int], int, Any]]:
        """Slices of a weight: the first element, rows and columns, the rows above it in its block, and its scales."""
        matrices, rows, columns = out.matrix
        height, width = out.block
        across = -(-columns // width)
        unit = height, width if width < columns else _ALIGNED
        for matrix in range(matrices if out.size else 0):  # a shape may have 2^55 of no rows
            base = matrix * -(-rows // height) * across
            for r0, r1, c0, c1 in slices(rows, columns, unit, limit):
                grid = -(-r1 // height) - r0 // height, -(-c1 // width) - c0 // width
                scale = self._scale(out, base + r0 // height * across + c0 // width, grid)
                yield (matrix * rows + r0) * columns + c0, (r1 - r0, c1 - c0), r0 % height, scale

    def _scale(self, out: Output, first: int, grid: tuple[int, int]) -> Any:
        """Scales of a slice, as bytes of e8m0 or as float32."""
        if out.scale is None:
            return np.ones((1, 1), np.float32)
        kind = np.dtype(_WIDTH.get(out.scale.dtype, np.uint8))
        scale = self._read(out.scale, kind.itemsize * first, kind.itemsize * grid[0] * grid[1]).view(kind)
        return (scale if kind == np.uint8 else scale.astype(np.float32)).reshape(grid)

    def _factor(self, out: Output) -> Any:
        """What scales the scales of a whole tensor."""
        factor = out.parts and out.parts.factor
        if not factor:
            return np.float32(1)
        value = self._read(factor, 0, 4).view(np.float32)[0]
        if not np.isfinite(value) or value == 0:
            raise Refused(f"{factor} is {value}, expected a finite number other than 0; {_DAMAGED}")
        return value

    def _size(self, out: Output) -> None:
        """Hold what a packed tensor says of its size to the size that its bytes and scales have."""
        size = out.parts and out.parts.size
        if size:
            said = self._read(size, 0, size.size).view({"I64": np.int64, "I32": np.int32}[size.dtype]).tolist()
            if said != [*out.shape]:
                raise Refused(f"{size} is {said}, but {out.weight} and its scales are {[*out.shape]}; {_DAMAGED}")

    def _transposed(self, out: Output) -> Iterator[Any]:
        """FP4 in matrices that become their transposes, each held packed and made in bands."""
        matrices, depth, rows = out.matrix
        step = max(BAND, self._limit // max(1, rows) // BAND * BAND)
        for matrix in range(matrices if out.size else 0):
            packed = self._read(out.weight, matrix * rows * depth // 2, rows * depth // 2).reshape(rows, -1)
            scale = self._read(out.scale, matrix * rows * depth // BAND, rows * depth // BAND).reshape(rows, -1)
            largest = self._finite_scale(out, scale)
            for k in range(0, depth, step):
                end = min(k + step, depth)
                made = self._made((rows, end - k))
                self._kernels.fp4(packed[:, k // 2 : end // 2], scale[:, k // BAND : end // BAND], made)
                if largest > 252 or self._dtype != "bfloat16":
                    self._in_range(out, made)
                yield self._bytes(np.ascontiguousarray(made.T))

    def _recode(self, out: Output) -> Iterator[Any]:
        matrices, rows, columns = out.matrix
        kept = self._scales[out.name] = []
        for r0, r1, _, _ in slices(matrices * rows, columns, (BLOCK, columns), self._limit):
            packed = self._read(out.weight, r0 * columns // 2, (r1 - r0) * columns // 2, self._input)
            scale = self._read(out.scale, r0 * columns // 32, (r1 - r0) * columns // 32)
            self._finite_scale(out, scale)
            weight = self._output[: (r1 - r0) * columns].reshape(r1 - r0, columns)
            scales, lossless = self._kernels.recode(packed.reshape(r1 - r0, -1), scale.reshape(r1 - r0, -1), weight)
            lossy = np.argwhere(~lossless)
            if len(lossy):
                row, column = (int(i) * BLOCK for i in lossy[0])
                raise Refused(
                    f"{out.weight}: the block from row {r0 + row}, column {column} cannot be FP8 without loss, "
                    "its scales lie too far apart or too low; use --to bf16"
                )
            kept.append(scales.reshape(-1))
            yield self._bytes(weight)

    def _recoded_scale(self, out: Output) -> Iterator[Any]:
        kept = self._scales.pop(out.weight.name)
        if kept:
            yield np.concatenate(kept)

    def _made(self, shape: tuple[int, int]) -> Any:
        size = shape[0] * shape[1] * self._wide
        return self._output[:size].view(arrays.numpy_dtype(self._dtype)).reshape(shape)

    def _bytes(self, array: Any) -> Any:
        return array.reshape(-1).view(np.uint8)

    def _finite_scale(self, out: Output, scale: Any, stored: Any = None) -> float:
        """The largest scale of a slice, as a number or as its code."""
        coded = scale.dtype == np.uint8
        largest = scale.max(initial=0) if coded else np.abs(scale).max(initial=0)  # NaN is passed on
        if largest == 255 if coded else not np.isfinite(largest):
            what = "byte 0xFF (NaN)" if coded else "value that is not finite"
            raise Refused(f"{stored or out.scale} has a {what}; {_DAMAGED}")
        return float(largest)

    def _numbers(self, out: Output, codes: Any, invalid: int = formats.FP8.invalid) -> None:
        """Refuse the codes that are no numbers, which have all bits of `invalid`."""
        for start in range(0, len(codes) if invalid else 0, _CHUNK):
            chunk = codes[start : start + _CHUNK]
            if np.bitwise_and(chunk, invalid, out=self._test[: len(chunk)]).max() == invalid:
                least = "code 0x7F or 0xFF (NaN)" if invalid == 0x7F else "code of an infinity or NaN"
                raise Refused(f"{out.weight} has a {least}; {_DAMAGED}")

    def _in_range(self, out: Output, made: Any) -> None:
        if _infinite(made.reshape(-1), self._dtype):
            remedy = "use bfloat16" if self._dtype == "float16" else _DAMAGED
            raise Refused(f"{out.weight} scaled by {out.scale} overflows {self._dtype}; {remedy}")


def _infinite(values: Any, dtype: str) -> bool:
    """Whether an infinity or a NaN is among contiguous numbers, given in any form."""
    unsigned, mask = _FINITE[dtype]
    bits = values.view(unsigned)
    chunks = (bits[start : start + _CHUNK] for start in range(0, len(bits), _CHUNK))
    return any(bool(np.any(chunk & unsigned(mask) == mask)) for chunk in chunks)
