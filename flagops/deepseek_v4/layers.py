"""DeepSeek-V4's attention layers, from hidden states to hidden states, composed of the operators."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import flagops
from flagops import arrays, config
from flagops.deepseek_v4.cache import NAMES, AttentionCache, AttentionConfig
from flagops.deepseek_v4.indices import chunk_window, visible_entries
from flagops.deepseek_v4.weights import AttentionWeights, CompressorWeights, IndexerWeights, check, packed
from flagops.errors import Unsupported

__all__ = [
    "AttentionWeights", "CompressorWeights", "IndexerWeights", "csa_attention", "hca_attention",
    "sliding_window_attention",
]  # fmt: skip
Backend = str | Sequence[str] | None


def sliding_window_attention(
    x: Any,
    weights: AttentionWeights,
    cache: AttentionCache,
    start: int | None = None,
    out: Any = None,
    backend: Backend = None,
) -> Any:
    """A layer whose tokens see the last ``window`` positions, their own included.

    ``q = rms_norm(wq_b rms_norm(wq_a x))`` by heads and ``kv = rms_norm(wkv x)``, both rotated to their positions, are
    attended (one key-value head, sinks), rotated back and projected by groups.

    Args:
        x: ``[b, s, D]``, the next s tokens of every sequence: a prefill, a chunk after any position or one token.
        weights: of this layer; a projection is done in the format that its weight has.
        cache: an `AttentionCache` of this kind; a fresh one for a call that needs no memory.
        start: position of the first token, checked against the cache; None goes on from there.
        out: ``[b, s, D]`` to write into, dtype of ``x``; allocated if None.
        backend: as in every operator; ``"numpy"`` runs the references.

    Returns:
        ``[b, s, D]``. Each operator rounds once to the dtype of ``x``; the cache's `AttentionConfig` says which
        numerics there are besides. Chunks in turn give what one call gives, up to the order of sums.

    Raises:
        ValueError: the cache belongs to another kind of layer, batch, dtype or device, or the tokens do not follow it;
            it is left as it was, as by every call that fails.
        TypeError: an argument is no array, kinds are mixed, or a dtype does not fit.
        Unsupported: no backend can run an operator, or a gradient is asked for (run under ``torch.no_grad()``).

    Queries are computed for as many tokens at a time as ``FLAGOPS_BUDGET`` allows. Source: the DeepSeek-V4 report
    (arXiv 2606.19348) and its inference code.
    """
    return _layer("sliding", x, weights, cache, start, out, backend)


def csa_attention(
    x: Any,
    weights: AttentionWeights,
    cache: AttentionCache,
    start: int | None = None,
    out: Any = None,
    backend: Backend = None,
) -> Any:
    """A layer whose tokens see the window and the ``top_k`` compressed entries that the lightning indexer chooses.

    As `sliding_window_attention`; besides, `compress_kv` makes an entry of every 4 tokens (and of the 4 before them),
    normalised and rotated to its first token, and another, smaller, for the indexer to score. A query may choose
    entries whose tokens are complete, its own position included; while it sees no more than ``top_k``, nothing is
    scored.
    """
    return _layer("csa", x, weights, cache, start, out, backend)


def hca_attention(
    x: Any,
    weights: AttentionWeights,
    cache: AttentionCache,
    start: int | None = None,
    out: Any = None,
    backend: Backend = None,
) -> Any:
    """A layer whose tokens see the window and every compressed entry, one for 128 tokens.

    As `csa_attention` without an indexer, and with windows that do not overlap.
    """
    return _layer("hca", x, weights, cache, start, out, backend)


def _layer(
    kind: str, x: Any, weights: AttentionWeights, cache: AttentionCache, start: int | None, out: Any, backend: Backend
) -> Any:
    name, shape = NAMES[kind], cache.config
    _validate(name, kind, x, weights, shape, out)
    cache.check(kind, x, start)
    if out is None:
        out = arrays.empty(tuple(x.shape), arrays.dtype_name(x), x)
    if 0 in x.shape:
        return out
    run = _Run(kind, x, weights, shape, backend, cache.position)
    cache.open(x)
    assert cache.keys is not None
    latent = run.normalised(run.linear(x, weights.wq_a, weights.wq_a_scale), weights.q_norm)
    entries = run.end // run.ratio if run.ratio else 0
    chunk = shape.window + entries
    cache.keys.write(chunk, run.keys(), backend)
    states: dict[str, tuple[Any, Any]] = {}
    if weights.compressor:
        found = run.compressed(weights.compressor, cache, "compressor", states)
        cache.keys.write(chunk - found.shape[1], run.quantised(found), backend)
    if weights.indexer:
        assert cache.index_keys is not None
        found = run.compressed(weights.indexer.compressor, cache, "indexer", states)
        cache.index_keys.write(entries - found.shape[1], run.hashed(found), backend)
    rows, keys = chunk + x.shape[1], None
    if x.shape[1] > 1:
        keys = cache.keys.all(rows, backend)
    step = run.tokens_at_once()
    for first in range(0, x.shape[1], step):
        part = slice(first, min(first + step, x.shape[1]))
        indices = run.indices(part, chunk, latent, cache)
        here = (keys, indices) if keys is not None else cache.keys.listed(indices, rows, backend)
        o = flagops.sparse_attention(
            run.queries(latent[:, part], part), here[0], weights.attn_sink, here[1], run.scale, backend=backend
        )
        run.rotate(o, run.positions(part), inverse=True)
        run.project(o, out[:, part])
    cache.commit(x.shape[1], chunk, states)
    return out


def _validate(
    name: str, kind: str, x: Any, weights: AttentionWeights, shape: AttentionConfig, out: Any
) -> None:  # fmt: skip
    if not (arrays.is_torch(x) or arrays.is_numpy(x)):
        raise TypeError(f"{name}: x must be a torch tensor or a NumPy array, got {type(x).__name__}")
    if arrays.dtype_name(x) not in arrays.FLOATS:
        raise TypeError(f"{name}: x is {arrays.dtype_name(x)}, expected {' or '.join(arrays.FLOATS)}")
    if len(x.shape) != 3:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected 3 dimensions [b, s, D]")
    for words, kinds in (("a compressor", ("csa", "hca")), ("an indexer", ("csa",))):
        part = words.split()[1]
        held = getattr(weights, part) is not None
        if held != (kind in kinds):
            found = f"{words}, which a {kind} layer has not" if held else f"no {part}, which a {kind} layer has"
            raise ValueError(f"{name}: the weights hold {found}")
    if weights.wq_a is not None and x.shape[2] != weights.wq_a.shape[1] * (2 if packed(weights.wq_a) else 1):
        raise ValueError(f"{name}: x has {x.shape[2]} channels, wq_a takes {weights.wq_a.shape[1]}")
    check(name, kind, x.shape[2], weights, shape)
    if out is not None and tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"{name}: out has shape {tuple(out.shape)}, expected {tuple(x.shape)}")
    if out is not None and arrays.dtype_name(out) != arrays.dtype_name(x):
        raise TypeError(f"{name}: out is {arrays.dtype_name(out)}, expected {arrays.dtype_name(x)}")
    torch = sys.modules.get("torch")
    recording = torch is not None and torch.is_grad_enabled()
    if recording and any(getattr(t, "requires_grad", False) for t in _all(x, weights)):
        raise Unsupported(f"{name} has no backward; call it under torch.no_grad() or detach its inputs")


def _all(*parts: Any) -> list[Any]:
    """Every array among some values and the fields of weights."""
    found = []
    for part in parts:
        found += _all(*vars(part).values()) if hasattr(part, "__dataclass_fields__") else [part]
    return found


class _Run:
    """One call of a layer: its tokens, their positions and how each step is done."""

    def __init__(
        self, kind: str, x: Any, weights: AttentionWeights, shape: AttentionConfig, backend: Backend, start: int
    ) -> None:
        self.kind, self.x, self.weights, self.shape, self.backend = kind, x, weights, shape, backend
        self.start, self.end = start, start + x.shape[1]
        self.ratio = shape.ratio(kind)
        self.scale = shape.head_dim**-0.5
        self.device = x.device if arrays.is_torch(x) else None

    def linear(self, x: Any, weight: Any, scale: Any = None, out: Any = None) -> Any:
        """``x weight^T`` in the format of the weight; FP8 and FP4 take x in FP8, blocks of 128."""
        if scale is None:
            return flagops.linear(x, weight, None, out=out, backend=self.backend)
        codes, scales = flagops.fp8_quantize(x, backend=self.backend)
        product = flagops.fp4_matmul if packed(weight) else flagops.fp8_matmul
        return product(codes, scales, weight, scale, arrays.dtype_name(x), out=out, backend=self.backend)

    def normalised(self, x: Any, weight: Any, stepwise: bool = False) -> Any:
        return flagops.rms_norm(x, weight, self.shape.eps, stepwise, out=x, backend=self.backend)

    def positions(self, part: slice) -> tuple[Any, Any]:
        """Cosines and sines of some of the tokens."""
        return self._table(self.start + part.start, part.stop - part.start, 1)

    def _table(self, first: int, count: int, step: int) -> tuple[Any, Any]:
        shape, plain = self.shape, self.kind == "sliding"
        base, factor = (shape.rope_base, 1.0) if plain else (shape.compress_rope_base, shape.rope_factor)
        numbers = (shape.rope_dim, base, factor, shape.rope_original, shape.beta_fast, shape.beta_slow)
        wide = arrays.dtype_name(self.x) == "float64"
        build = _remembered_table if count <= _SMALL else _remembered_table.__wrapped__
        backend = config.current().backend if self.backend is None else self.backend
        backend = backend if isinstance(backend, str) else tuple(backend)
        return build(first, count, step, numbers, wide, self.device, backend)

    def rotate(self, x: Any, table: tuple[Any, Any], inverse: bool = False) -> Any:
        """``[b, s, h, c]`` in place."""
        return flagops.rotary_embedding(x, *table, inverse, out=x, backend=self.backend)

    def keys(self) -> Any:
        """The keys of the tokens, ``[b, s, c]``."""
        kv = self.normalised(self.linear(self.x, self.weights.wkv, self.weights.wkv_scale), self.weights.kv_norm)
        self.rotate(kv[:, :, None], self.positions(slice(0, self.x.shape[1])))
        return self.quantised(kv)

    def quantised(self, kv: Any) -> Any:
        """Through FP8, in place, but for the rotated channels."""
        if self.shape.official and kv.shape[1]:
            still = kv[..., : self.shape.head_dim - self.shape.rope_dim]
            flagops.fp8_fake_quantize(still, self.shape.kv_block, out=still, backend=self.backend)
        return kv

    def hashed(self, x: Any) -> Any:
        """The indexer's vectors, rotated by Hadamard's matrix and through FP4, in place."""
        if self.shape.official and 0 not in x.shape:
            flagops.hadamard(x, out=x, backend=self.backend)
            flagops.fp4_fake_quantize(x, self.shape.index_block, out=x, backend=self.backend)
        return x

    def compressed(
        self, weights: CompressorWeights, cache: AttentionCache, name: str, states: dict[str, tuple[Any, Any]]
    ) -> Any:
        """The entries of windows that these tokens complete, normalised and rotated; the new state goes to `states`."""
        x, m = self.x, self.ratio
        b, s, d = x.shape[0], x.shape[1], weights.norm.shape[0]
        series, filled = 2 if self.kind == "csa" else 1, self.start % m
        before = cache.state(name, x, series, m, d)
        count = (filled + s) // m
        if filled + s < m or (filled + s == m and series == 1):  # only rows are written that no later token reads
            out = (arrays.empty((b, count, d), arrays.dtype_name(x), x), *before)
        else:
            out = None
        entries, *state = flagops.compress_kv(
            x, weights.wkv, weights.wgate, weights.ape, *before, filled, out=out, backend=self.backend
        )
        states[name] = (state[0], state[1])
        if count:
            self.normalised(entries, weights.norm)
            self.rotate(entries[:, :, None], self._table(self.start - filled, count, m))
        return entries

    def tokens_at_once(self) -> int:
        """Tokens whose queries, attention outputs and index scores stay within the budget."""
        shape, x = self.shape, self.x
        each = 2 * shape.heads * shape.head_dim * x.dtype.itemsize + 8 * shape.window
        if self.kind == "csa":
            each += shape.index_heads * shape.index_dim * x.dtype.itemsize + 4 * shape.top_k
        if self.kind == "hca":
            each += 4 * self.end // self.ratio
        return max(1, config.budget() // (each * x.shape[0]))

    def queries(self, latent: Any, part: slice) -> Any:
        """``[b, s, H, c]``, normalised and rotated."""
        q = self.linear(latent, self.weights.wq_b, self.weights.wq_b_scale)
        q = q.reshape(*latent.shape[:2], self.shape.heads, self.shape.head_dim)
        return self.rotate(self.normalised(q, None, self.shape.stepwise), self.positions(part))

    def indices(self, part: slice, chunk: int, latent: Any, cache: AttentionCache) -> Any:
        """int32 ``[b, s, k]``: the rows of the cache that some of the tokens see."""
        shape, b = self.shape, self.x.shape[0]
        first, count = self.start + part.start, part.stop - part.start
        most = (first + count) // self.ratio if self.ratio else 0
        chosen = most
        if self.kind == "csa" and most > shape.top_k:
            chosen = min(shape.top_k, self.end // self.ratio)
        else:
            build = _remembered_lists if count <= _SMALL else _remembered_lists.__wrapped__
            listed = build(first, count, shape.window, self.start, chunk, self.ratio, self.device)
            return _repeated(listed, b)
        window = chunk_window(first, count, shape.window, self.start, chunk, device=self.device)
        indices = arrays.empty((b, count, window.shape[1] + chosen), "int32", self.x)
        indices[:, :, : window.shape[1]] = window
        self._choose(latent[:, part], part, cache, indices[:, :, window.shape[1] :])
        return indices

    def _choose(self, latent: Any, part: slice, cache: AttentionCache, out: Any) -> None:
        shape, indexer = self.shape, self.weights.indexer
        assert indexer is not None
        assert cache.index_keys is not None
        b, count = latent.shape[:2]
        q = self.linear(latent, indexer.wq_b, indexer.wq_b_scale).reshape(b, count, shape.index_heads, shape.index_dim)
        q = self.hashed(self.rotate(q, self.positions(part)))
        weights = self.linear(self.x[:, part], indexer.weights_proj)
        if shape.official:  # a positive factor alone changes no choice; its rounding may
            weights *= (shape.index_dim * shape.index_heads) ** -0.5
        visible = _visible(self.start + part.start, count, self.ratio, b, self.device)
        keys = cache.index_keys.all(self.end // self.ratio)
        flagops.lightning_indexer(q, keys, weights, shape.top_k, visible, shape.window, out=out, backend=self.backend)

    def project(self, o: Any, out: Any) -> None:
        """Attention outputs to hidden states."""
        w = self.weights
        scales = {"wo_a_scale": w.wo_a_scale, "wo_b_scale": w.wo_b_scale}
        scales = {name: scale for name, scale in scales.items() if scale is not None}
        flagops.grouped_output_projection(o, w.wo_a, w.wo_b, self.shape.groups, out=out, backend=self.backend, **scales)


_SMALL = 16
"""Tokens whose tables are kept for the next layer."""


@lru_cache(maxsize=64)
def _remembered_table(
    first: int, count: int, step: int, numbers: tuple[Any, ...], wide: bool, device: Any, backend: Any
) -> tuple[Any, Any]:
    if device is None:
        import numpy

        at: Any = numpy.arange(first, first + count * step, step)
    else:
        import torch

        at = torch.arange(first, first + count * step, step, device=device)
    table = flagops.yarn_table(at, *numbers, backend=backend)
    if not wide:
        return table
    cos, sin = (t.astype("float64") if device is None else t.double() for t in table)
    return cos, sin


@lru_cache(maxsize=64)
def _remembered_lists(first: int, count: int, window: int, start: int, chunk: int, ratio: int, device: Any) -> Any:
    """The window and every visible entry, ``[s, k]``."""
    near = chunk_window(first, count, window, start, chunk, device=device)
    if not ratio:
        return near
    far = visible_entries(first, count, ratio, window, device=device)
    if device is None:
        import numpy

        return numpy.concatenate([near, far], axis=1)
    import torch

    return torch.cat([near, far], dim=1)


def _repeated(indices: Any, batch: int) -> Any:
    """The same lists for every sequence, without a copy."""
    if arrays.is_torch(indices):
        return indices.expand(batch, -1, -1)
    import numpy

    return numpy.broadcast_to(indices, (batch, *indices.shape))


def _visible(first: int, count: int, ratio: int, batch: int, device: Any) -> Any:
    """Entries that each token may see, int32 ``[b, s]``."""
    if device is None:
        import numpy

        seen: Any = ((numpy.arange(first, first + count) + 1) // ratio).astype("int32")
        return numpy.broadcast_to(seen, (batch, count))
    import torch

    seen = ((torch.arange(first, first + count, device=device) + 1) // ratio).int()
    return seen.expand(batch, count)
