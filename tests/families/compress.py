"""The compress family: edits of its kernels that the suite must notice."""

MUTANTS = {
    "numba/compress.py": [
        ("compress_kv", "(inside + row - old) % m", "(row - old) % m", 0),
        ("compress_kv", "current + c", "c", 1),
        ("compress_kv", "row -= m", "row -= 1", 0),
        ("compress_kv", "(j, before + inside + j)", "(j, before + j)", 0),
        ("compress_kv", "if column == 1 and c + step <= width", "if c + step <= width", 0),
        ("compress_kv", "bias_row), (inside + row - old) % m, 0), bias_column)", "bias_row), (inside + row - old) % m, 0), 1)", 0),
        ("compress_kv", "address + b * step * size(tag)", "address", 0),
        ("compress_kv", "line[:, closed:, :width] = 0", "pass", 0),
        ("compress_kv", "(vget(values, j, place) - pooled)", "vget(values, j, place)", 0),
        ("compress_kv", "scores[:, before:held] = 0", "pass", 0),
        ("compress_kv", "found[:rest] += scores", "found[:rest] -= scores", 0),
        ("compress_kv", "put(logits, j, place + i, get(parts, 1, i))", "pass", 0),
    ],
    "_compress.py": [
        ("compress_kv", "(inside + stop - start) % m", "inside", 0),
        ("compress_kv", "emitted + windows", "emitted", 0),
        ("compress_kv", "min(batch, first + together)", "first + together", 0),
    ],
    "torch/compress.py": [
        ("compress_kv", "(inside + torch.arange", "(torch.arange", 0),
        ("compress_kv", "line[:, closed : closed + before]", "line[:, before : 2 * before]", 0),
        ("compress_kv", "windows * m, channels - width :]", "windows * m, :width]", 0),
        ("compress_kv", "held : held + line.shape[1]", "before : before + line.shape[1]", 0),
    ],
    "triton/compress.py": [
        ("compress_kv", "(inside + place) % M", "place % M", 0),
        ("compress_kv", "tl.where(slot < before, 0, C - width)", "tl.where(slot < before, 0, 0)", 1),
        ("compress_kv", "row -= M", "row -= 1", 0),
        ("compress_kv", "row = windows * M + j", "row = M + j", 0),
    ],
}  # fmt: skip
