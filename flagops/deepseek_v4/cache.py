"""What the attention layers of `flagops.deepseek_v4.layers` remember of a sequence, and how it lies in memory.

Rows of a cache: the ring of the last ``window`` positions (position p in row ``p % window``), then the compressed
entries, then, while a call runs, the keys of its own tokens. A call writes behind what the sequence holds and moves its
tokens into the ring when all else is done, so a call that fails leaves the sequence as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flagops
from flagops import arrays
from flagops.scalars import whole

KINDS = ("sliding", "csa", "hca")
LAYOUTS = ("plain", "fp8")


@dataclass(frozen=True)
class AttentionConfig:
    """The shape and numerics of DeepSeek-V4's attention layers; the defaults are those of V4-Flash.

    official: the numerics of the official inference code: keys through FP8 (`fp8_fake_quantize` of the channels that
        are not rotated), the indexer's queries and keys rotated by `hadamard` and through FP4. False does neither, as
        transformers.
    stepwise: heads normalised in steps, see `rms_norm`.
    kv_block, index_block: channels that share a scale in FP8 and FP4.
    """

    heads: int = 64
    head_dim: int = 512
    rope_dim: int = 64
    groups: int = 8
    window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128
    index_heads: int = 64
    index_dim: int = 128
    top_k: int = 512
    eps: float = 1e-6
    rope_base: float = 10000.0
    compress_rope_base: float = 160000.0
    rope_factor: float = 16.0
    rope_original: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    official: bool = True
    stepwise: bool = False
    kv_block: int = 64
    index_block: int = 32

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "groups", "window", "csa_ratio", "hca_ratio", "index_heads", "top_k"):
            whole().read(f"AttentionConfig: {name}", getattr(self, name))
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= min(self.head_dim, self.index_dim):
            raise ValueError(f"AttentionConfig: {self.rope_dim} channels cannot be rotated in pairs in every head")
        if self.heads % self.groups:
            raise ValueError(f"AttentionConfig: {self.groups} groups do not divide {self.heads} heads")
        still = self.head_dim - self.rope_dim
        if self.official and still % self.kv_block:
            raise ValueError(
                f"AttentionConfig: blocks of {self.kv_block} do not divide the {still} channels that are not rotated; "
                "official=True quantises them"
            )

    @classmethod
    def v4_flash(cls, **changes: Any) -> AttentionConfig:
        """DeepSeek-V4-Flash."""
        return cls(**changes)

    @classmethod
    def v4_pro(cls, **changes: Any) -> AttentionConfig:
        """DeepSeek-V4-Pro."""
        return cls(**{"heads": 128, "groups": 16, "top_k": 1024} | changes)

    @classmethod
    def of_transformers(cls, config: Any, **changes: Any) -> AttentionConfig:
        """From a transformers `DeepseekV4Config`, with transformers' numerics unless ``official=True`` is given.

        Raises ValueError for what the layers do not compute: biases, several key-value heads, other rotary tables.
        """
        main, compress = (config.rope_parameters[name] for name in ("main", "compress"))
        _refuse(config, main, compress)
        values = {
            "heads": config.num_attention_heads,
            "head_dim": config.head_dim,
            "rope_dim": config.qk_rope_head_dim,
            "groups": config.o_groups,
            "window": config.sliding_window,
            "csa_ratio": config.compress_rates["compressed_sparse_attention"],
            "hca_ratio": config.compress_rates["heavily_compressed_attention"],
            "index_heads": config.index_n_heads,
            "index_dim": config.index_head_dim,
            "top_k": config.index_topk,
            "eps": config.rms_norm_eps,
            "rope_base": main["rope_theta"],
            "compress_rope_base": compress["rope_theta"],
            "official": False,
        }
        if compress["rope_type"] == "default":
            values["rope_factor"] = 1.0
        else:  # with the defaults of transformers
            original = compress["original_max_position_embeddings"]
            values["rope_factor"] = compress["factor"] or config.max_position_embeddings / original
            values["rope_original"] = original
            values["beta_fast"] = compress.get("beta_fast") or 32.0
            values["beta_slow"] = compress.get("beta_slow") or 1.0
        return cls(**values | changes)

    def ratio(self, kind: str) -> int:
        """Tokens that one compressed entry stands for, 0 where there are none."""
        return {"sliding": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[kind]


def _refuse(config: Any, main: dict[str, Any], compress: dict[str, Any]) -> None:
    """Raises ValueError for each setting of a `DeepseekV4Config` that would make another model of its layers."""
    factor = compress.get("attention_factor")
    if factor is None and compress["rope_type"] == "yarn":
        factor = f"that of factor {compress['factor']}"
    rotated = {int(config.head_dim * rope.get("partial_rotary_factor", 1.0)) for rope in (main, compress)}
    for name, found, *allowed in (
        ("attention_bias", config.attention_bias, False),
        ("num_key_value_heads", config.num_key_value_heads, 1),
        ("rope_parameters['main']['rope_type']", main["rope_type"], "default"),
        ("rope_parameters['compress']['rope_type']", compress["rope_type"], "default", "yarn"),
        ("rope_parameters['compress']['attention_factor']", factor, None, 1.0),
        ("rope_parameters['compress']['truncate']", compress.get("truncate", True), True),
        ("the number of rotated channels by rope_parameters", rotated, {config.qk_rope_head_dim}),
    ):
        if found not in allowed:
            raise ValueError(f"AttentionConfig: {name} is {found}, expected {' or '.join(map(str, allowed))}")


class AttentionCache:
    """The memory of one attention layer for a batch of sequences of equal length.

    Args:
        config: of the layer.
        kind: ``"sliding"``, ``"csa"`` or ``"hca"``.
        max_length: positions to make room for at once; None grows as needed, by doubling.
        layout: ``"plain"`` keeps keys in the dtype of the hidden states; ``"fp8"`` in the serving layout of 584 bytes
            an entry (448 e4m3 codes and 64 rotated channels in bfloat16; behind the entries of a page 7 scales and a
            byte of padding for each, the page padded to a multiple of 576). FP8 keeps exactly what the official
            numerics round keys to, so both layouts give the same bits.
        page: entries of a page of the ``"fp8"`` layout.

    Batch, dtype and device are those of the first tokens; after `reset` any others may come. ``position`` is the number
    of tokens held. A call that does not fit raises ValueError and leaves the cache as it was.
    """

    def __init__(
        self,
        config: AttentionConfig,
        kind: str,
        *,
        max_length: int | None = None,
        layout: str = "plain",
        page: int = 64,
    ) -> None:
        for name, value, allowed in (("kind", kind, KINDS), ("layout", layout, LAYOUTS)):
            if value not in allowed:
                raise ValueError(f"AttentionCache: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if layout == "fp8" and not config.official:
            raise ValueError(
                "AttentionCache: the fp8 layout is exact for quantised keys only; this config has official=False"
            )
        if page < 1:
            raise ValueError(f"AttentionCache: a page holds at least one entry, got {page}")
        self.config, self.kind, self.layout, self.page, self.max_length = config, kind, layout, page, max_length
        self.position = 0
        self.keys: PlainRows | PackedRows | None = None
        self.index_keys: PlainRows | None = None
        self.states: dict[str, tuple[Any, Any]] = {}

    @property
    def batch(self) -> int | None:
        """Sequences held; None before the first tokens."""
        return self.keys.batch if self.keys is not None and self.position else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        rows = [x.nbytes for x in (self.keys, self.index_keys) if x is not None]
        return sum(rows) + sum(x.nbytes for pair in self.states.values() for x in pair)

    def reset(self) -> None:
        """Forget the sequences; the memory stays for the next ones."""
        self.position = 0
        self.states = {}

    def reorder(self, rows: Any) -> None:
        """Let sequence i continue what sequence ``rows[i]`` was, as beam search does; the batch may change its size."""
        if self.keys is None or not self.position:
            raise ValueError("AttentionCache.reorder: the cache holds no sequence yet")
        chosen = [int(row) for row in rows]
        if any(not 0 <= row < self.keys.batch for row in chosen):
            raise ValueError(f"AttentionCache.reorder: got {chosen}, expected sequences 0 to {self.keys.batch - 1}")
        keys = self.keys.select(chosen)
        index_keys = self.index_keys.select(chosen) if self.index_keys else None
        states = {name: (select(a, chosen), select(b, chosen)) for name, (a, b) in self.states.items()}
        self.keys, self.index_keys, self.states = keys, index_keys, states

    def check(self, kind: str, x: Any, start: int | None) -> None:
        """Raises ValueError where tokens ``x`` [b, s, D] at position ``start`` do not go on from here."""
        if kind != self.kind:
            raise ValueError(f"{NAMES[kind]}: the cache is one of a {self.kind} layer, expected {kind}")
        if start is not None and start != self.position:
            raise ValueError(
                f"{NAMES[kind]}: tokens from position {start} on, but the cache holds positions up to "
                f"{self.position - 1}: expected {self.position}"
            )
        end = self.position + x.shape[1]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"{NAMES[kind]}: {end} positions, the cache was made for {self.max_length}")
        if self.layout == "fp8" and arrays.dtype_name(x) != "bfloat16":
            raise ValueError(f"{NAMES[kind]}: the fp8 layout keeps bfloat16, x is {arrays.dtype_name(x)}")
        if self.keys is not None and self.position:
            for name, held, got in (
                ("batch", self.keys.batch, x.shape[0]),
                ("dtype", self.keys.dtype, arrays.dtype_name(x)),
                ("device", self.keys.place, place(x)),
            ):
                if held != got:
                    raise ValueError(f"{NAMES[kind]}: x has {name} {got}, the cache holds {name} {held}")

    def open(self, x: Any) -> None:
        """Make room for the tokens ``x`` behind what is held."""
        config, ratio, b = self.config, self.config.ratio(self.kind), x.shape[0]
        entries = (self.position + x.shape[1]) // ratio if ratio else 0
        most = self.max_length // ratio if self.max_length is not None and ratio else entries
        dtype = arrays.dtype_name(x)
        if not self.position:
            self.keys = self.keys if self.keys is not None and self.keys.fits(x) else None
            self.index_keys = self.index_keys if self.keys is not None else None
        if self.keys is None:
            if self.layout == "plain":
                self.keys = PlainRows(x, b, config.head_dim, dtype)
            else:
                still = config.head_dim - config.rope_dim
                self.keys = PackedRows(x, b, still, config.rope_dim, config.kv_block, self.page)
        exact = self.max_length is not None
        self.keys.reserve(config.window + max(entries, most) + max(x.shape[1], _TAIL), exact)
        if self.kind == "csa":
            self.index_keys = self.index_keys or PlainRows(x, b, config.index_dim, dtype)
            self.index_keys.reserve(max(entries, most), exact)

    def state(self, name: str, x: Any, series: int, ratio: int, channels: int) -> tuple[Any, Any]:
        """The compressor state of a name; a fresh one at the start of a sequence."""
        if name in self.states:
            return self.states[name]
        dtype = "float64" if arrays.dtype_name(x) == "float64" else "float32"
        kv, score = (arrays.empty((x.shape[0], series * ratio, series * channels), dtype, x) for _ in range(2))
        kv[...] = 0
        score[...] = -math.inf
        return kv, score

    def commit(self, tokens: int, chunk: int, states: dict[str, tuple[Any, Any]]) -> None:
        """The tokens whose keys lie in rows from ``chunk`` on now belong to the sequence."""
        assert self.keys is not None
        window, end = self.config.window, self.position + tokens
        kept = min(tokens, window)
        slot = (end - kept) % window
        first = min(kept, window - slot)
        self.keys.move(chunk + tokens - kept, slot, first)
        if kept > first:
            self.keys.move(chunk + tokens - kept + first, 0, kept - first)
        self.states = states
        self.position = end


_TAIL = 16
"""Rows for the tokens of a call that there are at least."""

NAMES = {kind: f"{name}_attention" for kind, name in zip(KINDS, ("sliding_window", "csa", "hca"), strict=True)}


def place(x: Any) -> str:
    """Where an array lies, in words."""
    return str(x.device) if arrays.is_torch(x) else "numpy"


def select(x: Any, rows: Sequence[int]) -> Any:
    """Rows of the first axis, copied."""
    if arrays.is_torch(x):
        import torch

        return x.index_select(0, torch.tensor(rows, dtype=torch.int64, device=x.device))
    return x[list(rows)]


def aranged(start: int, count: int, like: Any) -> Any:
    """int64 numbers where an array lies."""
    if arrays.is_torch(like):
        import torch

        return torch.arange(start, start + count, device=like.device)
    import numpy

    return numpy.arange(start, start + count)


class _Rows:
    """Rows of entries for each sequence, in one array whose second axis grows by doubling."""

    dtype: str
    data: Any

    @property
    def batch(self) -> int:
        return int(self.data.shape[0])

    @property
    def place(self) -> str:
        return place(self.data)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def fits(self, x: Any) -> bool:
        """Whether the memory serves for hidden states like these."""
        return (self.batch, self.dtype, self.place) == (x.shape[0], arrays.dtype_name(x), place(x))

    def _grow(self, length: int, exact: bool) -> None:
        held = self.data.shape[1]
        if length > held:
            shape = (self.batch, length if exact else max(length, 2 * held), self.data.shape[2])
            data = arrays.empty(shape, arrays.dtype_name(self.data), self.data)
            data[:, :held] = self.data
            self.data = data

    def select(self, rows: Sequence[int]) -> Any:
        """Other sequences of the batch, copied."""
        chosen = object.__new__(type(self))
        vars(chosen).update(vars(self), data=select(self.data, rows))
        return chosen


class PlainRows(_Rows):
    """Entries as they are computed."""

    def __init__(self, like: Any, batch: int, width: int, dtype: str) -> None:
        self.dtype = dtype
        self.data = arrays.empty((batch, 0, width), dtype, like)

    def reserve(self, rows: int, exact: bool = False) -> None:
        """Make room for so many rows, or for more unless exact."""
        self._grow(rows, exact)

    def write(self, row: int, values: Any, backend: Any = None) -> None:
        """Put entries ``[b, n, width]`` in rows from ``row`` on."""
        self.data[:, row : row + values.shape[1]] = values

    def move(self, source: int, target: int, count: int) -> None:
        """Copy rows that do not overlap."""
        self.data[:, target : target + count] = self.data[:, source : source + count]

    def all(self, rows: int, backend: Any = None) -> Any:
        """The first rows, without a copy."""
        return self.data[:, :rows]

    def listed(self, indices: Any, rows: int, backend: Any = None) -> tuple[Any, Any]:
        """Keys and indices into them that stand for some of the first rows."""
        return self.data[:, :rows], indices


class PackedRows(_Rows):
    """Entries as FP8 codes, bfloat16 channels and e8m0 scales, page by page."""

    dtype = "bfloat16"

    def __init__(self, like: Any, batch: int, coded: int, rotated: int, block: int, page: int) -> None:
        self.coded, self.rotated, self.block, self.page = coded, rotated, block, page
        self.entry = coded + 2 * rotated
        self.tail = -(-(coded // block) // 8) * 8
        size = -(-page * (self.entry + self.tail) // self.entry) * self.entry
        self.data = arrays.empty((batch, 0, size), "uint8", like)

    def reserve(self, rows: int, exact: bool = False) -> None:
        """Make room for so many rows, or for more unless exact."""
        self._grow(-(-rows // self.page), exact)

    def _parts(self) -> tuple[Any, Any]:
        """Views of the entries ``[b, pages, page, entry]`` and of their scales ``[b, pages, page, tail]``."""
        lead, middle = (self.batch, self.data.shape[1], self.page), self.page * self.entry
        end = middle + self.page * self.tail
        return (
            self.data[:, :, :middle].reshape(*lead, self.entry),
            self.data[:, :, middle:end].reshape(*lead, self.tail),
        )

    def write(self, row: int, values: Any, backend: Any = None) -> None:
        """Put entries ``[b, n, width]`` in rows from ``row`` on; exact for entries that are already quantised."""
        codes, scale = flagops.fp8_quantize(values[..., : self.coded], self.block, backend=backend)
        entries, scales = self._parts()
        at = aranged(row, values.shape[1], self.data)
        page, slot = at // self.page, at % self.page
        entries[:, page, slot, : self.coded] = arrays.codes(codes)
        entries[:, page, slot, self.coded :] = _bytes(values[..., self.coded :])
        scales[:, page, slot, : scale.shape[-1]] = arrays.codes(scale)
        scales[:, page, slot, scale.shape[-1] :] = 0

    def move(self, source: int, target: int, count: int) -> None:
        """Copy rows that do not overlap."""
        there, here = (aranged(row, count, self.data) for row in (source, target))
        for part in self._parts():
            part[:, here // self.page, here % self.page] = part[:, there // self.page, there % self.page]

    def all(self, rows: int, backend: Any = None) -> Any:
        """The first rows, decoded."""
        at = aranged(0, rows, self.data)[None]
        return self._decoded(at, backend)

    def listed(self, indices: Any, rows: int, backend: Any = None) -> tuple[Any, Any]:
        """Only the rows that one token ``[b, 1, k]`` lists, decoded, and their places in that list."""
        place_of = aranged(0, indices.shape[-1], self.data)
        there = indices[:, 0] >= 0
        keys = self._decoded(indices[:, 0].clip(0), backend)
        return keys, (place_of * there + there - 1)[:, None]

    def _decoded(self, at: Any, backend: Any) -> Any:
        """Rows ``[b or 1, n]`` as bfloat16 ``[b, n, width]``."""
        entries, scales = self._parts()
        b, n, blocks = self.batch, at.shape[1], self.coded // self.block
        sequence = aranged(0, b, self.data)[:, None]
        page, slot = at // self.page, at % self.page
        entry, scale = entries[sequence, page, slot], scales[sequence, page, slot]
        keys = arrays.empty((b, n, self.coded + self.rotated), self.dtype, self.data)
        codes = entry[..., : self.coded].reshape(b * n, self.coded)
        scale = scale[..., :blocks].reshape(b * n, blocks)
        values = flagops.fp8_dequantize(codes, scale, (1, self.block), self.dtype, backend=backend)
        keys[..., : self.coded] = values.reshape(b, n, self.coded)
        keys[..., self.coded :] = _halves(entry[..., self.coded :])
        return keys


def _bytes(x: Any) -> Any:
    """bfloat16 ``[..., n]`` as bytes ``[..., 2 n]``."""
    if arrays.is_torch(x):
        import torch

        return x.contiguous().view(torch.uint8)
    import numpy

    return numpy.ascontiguousarray(x).view(numpy.uint8)


def _halves(x: Any) -> Any:
    """The inverse of `_bytes`."""
    if arrays.is_torch(x):
        import torch

        return x.contiguous().view(torch.bfloat16)
    import numpy

    return numpy.ascontiguousarray(x).view(arrays.numpy_dtype("bfloat16"))
