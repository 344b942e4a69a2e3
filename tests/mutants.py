"""Small edits of the real kernels, each a bug that the parity suite must find.

``python tests/mutants.py FILE [INDEX...]`` tries those of one kernel file.

One line is printed for each mutant. A mutant may read or write anywhere, so the caller runs this as a process of its own
and goes on behind a mutant that ended it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

# file: [(operators that must notice, text, its replacement, which occurrence)]
MUTANTS: dict[str, list[tuple[str, str, str, int]]] = {
    "_gemm.py": [
        ("matmul", "row * am + first * ak", "row * am", 0),
        ("matmul", "row * am + first * ak", "row * am", 1),
        ("matmul", "column * bn + first) * item", "column * bn) * item", 0),
        ("matmul", "column * bn + first * bk", "column * bn", 0),
        ("matmul", "depth = min(span, k - first)", "depth = min(span, k - first, 512)", 0),
        ("matmul", "add = right + (j * bn + at) * item, part + at > 0", "add = right + (j * bn + at) * item, at > 0", 0),
        ("matmul", "sums + j * width, part > 0", "sums + j * width, part > 1", 0),
        ("matmul", "padded_rows, padded)", "padded_rows, depth)", 0),
        ("matmul", "row * cm + column * cn", "row * cm + column", 0),
        ("matmul", "row * cm + column * cn", "row * cn + column * cm", 1),
        ("matmul", "store(tag, goal + c * column * item, scalar)", "store(tag, goal + c * item, scalar)", 0),
        ("matmul", "elif sb == 0 and", "elif True and", 0),
        ("matmul", "extent = extent_b if extent_a == 1 else extent_a", "extent = extent_a", 0),
        ("matmul", "if k == 0:", "if k == -1:", 0),
        ("matmul", "direct = rows <= OUTER_ROWS and bn == 1", "direct = rows <= OUTER_ROWS", 0),
        ("linear", "scalar += load(tag, bias + c * bias_stride * item)", "scalar += load(tag, bias + c * item)", 0),
        ("linear", "value = vadd(value, vload(tag, bias + c * item))", "value = vload(float_tag, origin + c * width)", 0),
        ("linear", "column * bias_stride * item if bias != 0", "0 if bias != 0", 0),
    ],
    "projection_numba.py": [
        ("grouped_output_projection", "(per_group * by_head, by_head,", "(by_head, per_group * by_head,", 0),
        ("grouped_output_projection", "(r * by_row, c * by_column,", "(r * by_row, by_column,", 0),
        ("grouped_output_projection", "(r * step, 0, *steps, step)", "(step, 0, *steps, step)", 0),
    ],
    "attention_numba.py": [
        ("sparse_attention", "if 0 <= row < rows:", "if 0 < row < rows:", 0),
        ("sparse_attention", "if 0 <= row < rows:", "if 0 <= row < rows - 1:", 0),
        ("sparse_attention", "t * index_steps[1]", "t", 0),
        ("sparse_attention", "at * index_steps[2]", "at", 0),
        ("sparse_attention", "row * kv_steps[1]", "row * width", 0),
        ("sparse_attention", "first * q_steps[2]", "first", 0),
        ("sparse_attention", "width, sums, seen > 0)", "width, sums, False)", 0),
        ("sparse_attention", "mass += math.exp(", "mass -= math.exp(", 0),
        ("sparse_attention", "(first + i) * sink_step * unit", "i * sink_step * unit", 0),
        ("sparse_attention", "vmul(vload(real, p + j * unit), factor)", "vload(real, p + j * unit)", 0),
        ("sparse_attention", "load(real, mass) * fade + vsum(total)", "load(real, mass) + vsum(total)", 0),
        ("sparse_attention", "if not fresh and fade != 1:", "if False:", 0),
        ("sparse_attention", "if seen == 0:", "if seen == -1:", 0),
        ("sparse_attention", "store(real, p + j * unit, cast(real, -np.inf))", "store(real, p + j * unit, real)", 0),
        ("sparse_attention", "target + i * out_steps[2] * item", "target + i * width * item", 0),
    ],
    "dequantize_numba.py": [
        ("fp4_dequantize", "(_E2M1, -_E2M1)", "(_E2M1, 0 - _E2M1)", 0),
        ("fp4_dequantize", "np.arange(255) - 127.0", "np.arange(255) - 126.0", 0),
        ("fp4_dequantize", "np.nan)", "np.inf)", 0),
        ("fp4_dequantize", "group * scale_column", "group", 0),
        ("fp4_dequantize", "row * scale_row + group", "group", 0),
        ("fp4_dequantize", "_gather(codes, source, packed_column)", "_gather(codes, source, 1)", 0),
        ("fp8_dequantize", "row // block_rows * scale_row", "row * scale_row", 0),
        ("fp8_dequantize", "table = tables + 128 * size * byte(scales + block * scale_column)", "table = tables + 128 * size * byte(scales)", 0),
        ("fp8_dequantize", "row // block_rows != band", "band < 0", 0),
        ("fp8_dequantize", "_multiply(products, tables, scales, scale_column", "_multiply(products, tables, scales, 1", 0),
    ],
    "_dequantize_simd.py": [
        ("fp4_dequantize", "for lane in (i, 16 + i)", "for lane in (16 + i, i)", 0),
        ("fp8_dequantize", "_splat(bits, lanes, 128)), _splat(bits, lanes, bits.width - 8)", "_splat(bits, lanes, 64)), _splat(bits, lanes, bits.width - 7)", 0),
        ("fp8_dequantize", "builder.and_(code, _I64(127))", "builder.and_(code, _I64(63))", 0),
    ],
    "matmul_torch.py": [
        ("linear", "total += bias", "total += 0", 0),
        ("linear", "torch.addmm(bias, matrix(x), weight.mT, out=", "torch.mm(matrix(x), weight.mT, out=", 0),
        ("matmul", "a[..., :step].float()", "a[..., :step].bfloat16()", 0),
    ],
    "dequantize_torch.py": [
        ("fp4_dequantize", "values[byte & 15], values[byte >> 4]", "values[byte >> 4], values[byte & 15]", 0),
        ("fp8_dequantize", "row // height", "row // width", 0),
        ("fp8_dequantize", "first // width :", "0 :", 0),
        ("fp8_dequantize", "(code // 8 - 10)", "(code // 8 - 9)", 0),
    ],
    "projection_torch.py": [
        ("grouped_output_projection", "(groups, rank)).mT", "(groups, rank)).flip(0).mT", 0),
        ("grouped_output_projection", "x.transpose(0, 1), down", "x.flip(1).transpose(0, 1), down", 0),
    ],
    "attention_torch.py": [
        ("sparse_attention", "(indices >= 0) & (indices < count)", "(indices > 0) & (indices < count)", 0),
        ("sparse_attention", "mul_(scale)", "mul_(1)", 0),
        ("sparse_attention", "mass = mass * fade + p.sum(-1, keepdim=True)", "mass = mass + p.sum(-1, keepdim=True)", 0),
        ("sparse_attention", "total.mul_(fade), p, values", "total, p, values", 0),
        ("sparse_attention", "mass.double() + torch.exp(", "mass.double() - torch.exp(", 0),
        ("sparse_attention", ".masked_fill_(~valid.any(-1)[:, None, None], 0)", "", 0),
    ],
    "matmul_triton.py": [
        ("matmul", "depth.to(tl.int64)[None, :] * a_k", "depth.to(tl.int64)[None, :]", 0),
        ("matmul", "inside_m[:, None] & inside_n[None, :]", "inside_m[:, None] | inside_n[None, :]", 0),
        ("matmul", "left = tl.arange(0, BK) < end - k", "left = tl.arange(0, BK) <= end - k", 0),
        ("matmul", "EVEN=k % tile[\"BK\"] == 0", "EVEN=True", 0),
        ("matmul", "within * b_inner", "within * a_inner", 0),
        ("linear", "columns.to(tl.int64) * bias_n", "columns.to(tl.int64)", 0),
    ],
    "_triton.py": [
        ("matmul", "a, b = widen(a), widen(b)", "a, b = a, b", 0),
        ("matmul", "+ 0x7FFF + (kept & 1)", "+ 0x8000", 0),
        ("matmul", "+ 0x7FFF + (kept & 1)", "", 0),
    ],
    "projection_triton.py": [
        ("grouped_output_projection", "wo_a.view(groups, rank, width).mT", "wo_a.view(groups, rank, width).flip(0).mT", 0),
    ],
    "dequantize_triton.py": [
        ("fp4_dequantize", "tl.join(pair & 15, pair >> 4)", "tl.join(pair >> 4, pair & 15)", 0),
        ("fp4_dequantize", "tl.where(code == 0, 0x400000,", "tl.where(code == 0, 0,", 0),
        ("fp4_dequantize", "tl.where(code == 255, 0x7FC00000, code << 23)", "code << 23", 0),
        ("fp4_dequantize", "(code & 8) << 28", "(code & 8) << 27", 0),
        ("fp8_dequantize", "(row // block_r)", "(row // block_c)", 0),
        ("fp8_dequantize", "(code & 0x7F) == 0x7F", "code == 0x7F", 0),
        ("fp8_dequantize", "(code & 0x80) << 24", "(code & 0x80) << 23", 0),
    ],
    "attention_triton.py": [
        ("sparse_attention", "(index >= 0) & (index < N)", "(index > 0) & (index < N)", 0),
        ("sparse_attention", "score * scale", "score", 0),
        ("sparse_attention", "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", 0),
        ("sparse_attention", "acc * shrink[:, None], PRECISION", "acc, PRECISION", 0),
        ("sparse_attention", "total += tl.exp2((tl.load(sink + head * sink_h, here", "total -= tl.exp2((tl.load(sink + head * sink_h, here", 0),
        ("sparse_attention", "head.to(tl.int64)[:, None] * q_h", "head.to(tl.int64)[:, None] * q_d", 0),
        ("sparse_attention", "tl.max(seen.to(tl.int32), 0) > 0, acc / total[:, None], 0.0", "True, acc / total[:, None], 0.0", 0),
    ],
}  # fmt: skip

EQUIVALENT: dict[tuple[str, int], str] = {}
"""Mutants that survive, each with why no result can tell it apart."""


def backend_of(file: str) -> str:
    return "triton" if "triton" in file else "torch" if "torch" in file else "numba"


def mutate(source: str, old: str, new: str, occurrence: int) -> str:
    parts = source.split(old)
    if len(parts) < occurrence + 2:
        raise SystemExit(f"the kernel has changed: {old!r} occurs {len(parts) - 1} times")
    return old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])


def verdict(file: str, index: int, folder: Path) -> str:
    """Load the kernels with one of them edited, and run the suite until it notices."""
    from flagops import dispatch, registry, testing
    from flagops.errors import Unsupported

    name, old, new, occurrence = MUTANTS[file][index]
    for module in [m for m in sys.modules if m.startswith("flagops.kernels.")]:
        del sys.modules[module]
    real = Path(importlib.util.find_spec(f"flagops.kernels.{file[:-3]}").origin)
    edited = folder / f"{file[:-3]}_{index}.py"
    edited.write_text(mutate(real.read_text(), old, new, occurrence))
    spec = importlib.util.spec_from_file_location(f"flagops.kernels.{file[:-3]}", edited)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    registry._module.cache_clear()
    registry.find.cache_clear()
    dispatch._plans.clear()
    backend = backend_of(file)
    for seed in range(8):
        try:
            ran, _ = testing.check(registry.operator(name), backend, 50, seed)
        except Unsupported as reason:
            return f"not run: {reason}"
        except (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
            return f"killed by {type(error).__name__}"
        if not ran:
            return "not run"
    return "survived"


def main(file: str, *chosen: int) -> None:
    os.environ["FLAGOPS_CACHE"] = os.devnull  # an edited kernel must never meet, or leave, compiled code
    if backend_of(file) == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for index in chosen or range(len(MUTANTS[file])):
            print(f"{index}: ", end="", flush=True)
            print(verdict(file, index, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
