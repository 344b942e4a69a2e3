"""Small attention layers of DeepSeek-V4, and what they give by the specification in float64."""

import ml_dtypes
import numpy as np
import pytest
import torch

import flagops
from flagops import AttentionConfig, AttentionWeights, CompressorWeights, IndexerWeights, registry
from flagops.arrays import as_numpy
from flagops.deepseek_v4.cache import KINDS, NAMES

OPERATORS = (
    "linear", "rms_norm", "rotary_embedding", "yarn_table", "fp8_fake_quantize", "hadamard", "fp4_fake_quantize",
    "compress_kv", "lightning_indexer", "sparse_attention", "grouped_output_projection",
)  # fmt: skip
TINY = AttentionConfig(
    heads=4, head_dim=24, rope_dim=8, groups=2, window=8, csa_ratio=4, hca_ratio=8, index_heads=6, index_dim=16,
    top_k=3, rope_original=64, kv_block=16, index_block=16,
)  # fmt: skip
D = 32


def _backends():
    for name in registry.backend_names():
        reason = registry.backend(name).unavailable()
        unwritten = [op for op in OPERATORS if not registry.written(op, name)]
        if not reason and unwritten:
            reason = f"no kernel of {', '.join(unwritten)}"
        yield pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {reason}") if reason else ())


on_every_backend = pytest.mark.parametrize("backend", list(_backends()))
of_every_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind):
    return getattr(flagops, NAMES[kind])


def compressor(draw, series, width, ratio, hidden=D):
    wkv, wgate = draw(series * width, hidden), draw(series * width, hidden)
    return CompressorWeights(wkv, wgate, 2 * draw(ratio, series * width).float(), 1 + draw(width).float())


def weights(kind, seed=0, config=TINY, hidden=D, lora=16, rank=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    heads, width = config.heads, config.head_dim
    made = AttentionWeights(
        wq_a=draw(lora, hidden),
        q_norm=1 + draw(lora).float(),
        wq_b=draw(heads * width, lora),
        wkv=draw(width, hidden),
        kv_norm=1 + draw(width).float(),
        wo_a=draw(config.groups * rank, heads // config.groups * width),
        wo_b=draw(hidden, config.groups * rank),
        attn_sink=draw(heads).float(),
    )
    if kind != "sliding":
        made.compressor = compressor(draw, 2 if kind == "csa" else 1, width, config.ratio(kind), hidden)
    if kind == "csa":
        inner = compressor(draw, 2, config.index_dim, config.csa_ratio, hidden)
        queries = draw(config.index_heads * config.index_dim, lora)
        made.indexer = IndexerWeights(queries, draw(config.index_heads, hidden), inner)
    return made


def hidden_states(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_chunks(kind, x, made, sizes, backend, cache):
    parts, at = [], cache.position
    for size in sizes:
        parts.append(layer(kind)(x[:, at : at + size], made, cache, start=at, backend=backend))
        at += size
    return torch.cat(parts, 1)


# The specification, sections 4 to 8, in float64 and one token at a time.


class Spec:
    def __init__(self, kind, made, config):
        self.kind, self.config, self.m = kind, config, config.ratio(kind)
        self.w, self.margin = made, np.inf
        half = config.rope_dim // 2
        theta = (config.rope_base if kind == "sliding" else config.compress_rope_base) ** (-np.arange(half) / half)
        if kind != "sliding":
            turns = np.array([config.beta_fast, config.beta_slow])
            corr = config.rope_dim * np.log(config.rope_original / (2 * np.pi * turns))
            corr /= 2 * np.log(config.compress_rope_base)
            low, high = max(np.floor(corr[0]), 0), min(np.ceil(corr[1]), config.rope_dim - 1)
            ramp = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)
            theta = theta / config.rope_factor * ramp + theta * (1 - ramp)
        self.theta = theta

    def norm(self, x, weight=1.0):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.eps) * weight

    def rope(self, x, p, sign=1):
        z = x[..., -self.config.rope_dim :: 2] + 1j * x[..., 1 - self.config.rope_dim :: 2]
        z = z * np.exp(1j * sign * p * self.theta)
        turned = np.stack([z.real, z.imag], -1).reshape(*x.shape[:-1], self.config.rope_dim)
        return np.concatenate([x[..., : -self.config.rope_dim], turned], -1)

    def fp8(self, x):
        if not self.config.official:
            return x
        still, block = x[: -self.config.rope_dim].reshape(-1, self.config.kv_block), 448.0
        scale = 2 ** np.ceil(np.log2(np.maximum(np.abs(still).max(-1, keepdims=True), 1e-4) / block))
        codes = (still / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(float)
        return np.concatenate([(codes * scale).ravel(), x[-self.config.rope_dim :]])

    def fp4(self, x):
        if not self.config.official:
            return x
        matrix = np.ones((1, 1))
        while len(matrix) < x.shape[-1]:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        blocks = (x @ matrix / len(matrix) ** 0.5).reshape(*x.shape[:-1], -1, self.config.index_block)
        scale = 2 ** np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True) / 6))
        levels = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # even codes first: they win ties
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = levels[np.abs(np.abs(blocks / scale)[..., None] - values[levels]).argmin(-1)]
        return (np.sign(blocks) * values[nearest] * scale).reshape(x.shape)

    def compressed(self, x, w):
        """Entries, normalised and rotated."""
        kv, z = x @ w["wkv"].T, x @ w["wgate"].T
        m, d, entries = self.m, len(w["norm"]), []
        for i in range(len(x) // m):
            now = slice(i * m, i * m + m)
            if self.kind == "hca":
                values, scores = kv[now], z[now] + w["ape"]
            else:
                values, scores = kv[now, d:], z[now, d:] + w["ape"][:, d:]
                if i:
                    before = slice(i * m - m, i * m)
                    values = np.concatenate([kv[before, :d], values])
                    scores = np.concatenate([z[before, :d] + w["ape"][:, :d], scores])
            p = np.exp(scores - scores.max(0))
            entries.append(self.rope(self.norm((p * values).sum(0) / p.sum(0), w["norm"]), i * m))
        return entries

    def chosen(self, t, x, latent, keys, w):
        seen = (t + 1) // self.m
        if seen <= self.config.top_k:
            return range(seen)
        q = (w["wq_b"] @ latent).reshape(self.config.index_heads, self.config.index_dim)
        q = self.fp4(self.rope(q, t))
        factor = (self.config.index_dim * self.config.index_heads) ** -0.5
        scores = np.array([(w["weights_proj"] @ x * factor) @ np.maximum(q @ k, 0) for k in keys[:seen]])
        order = np.argsort(-scores, kind="stable")
        last, first_out = scores[order[self.config.top_k - 1]], scores[order[self.config.top_k]]
        self.margin = min(self.margin, (last - first_out) / np.abs(scores).max())
        return order[: self.config.top_k]

    def __call__(self, x):
        """One sequence [s, D]."""
        config, w = self.config, plain(self.w)
        keys = [self.fp8(self.rope(self.norm(w["wkv"] @ h, w["kv_norm"]), t)) for t, h in enumerate(x)]
        entries, index_keys = [], []
        if self.m:
            entries = [self.fp8(e) for e in self.compressed(x, w["compressor"])]
        if self.kind == "csa":
            index_keys = [self.fp4(e) for e in self.compressed(x, w["indexer"]["compressor"])]
        result = []
        for t, h in enumerate(x):
            latent = self.norm(w["wq_a"] @ h, w["q_norm"])
            q = self.rope(self.norm((w["wq_b"] @ latent).reshape(config.heads, config.head_dim)), t)
            seen = keys[max(0, t - config.window + 1) : t + 1]
            if self.kind == "hca":
                seen = seen + entries[: (t + 1) // self.m]
            if self.kind == "csa":
                seen = seen + [entries[i] for i in self.chosen(t, h, latent, index_keys, w["indexer"])]
            kv = np.array(seen)
            logits = q @ kv.T * config.head_dim**-0.5
            p = np.exp(logits)
            o = p @ kv / (p.sum(1, keepdims=True) + np.exp(w["attn_sink"])[:, None])
            o = self.rope(o, t, -1).reshape(config.groups, -1)
            z = [a @ g for a, g in zip(np.split(w["wo_a"], config.groups), o, strict=True)]
            result.append(w["wo_b"] @ np.concatenate(z))
        return np.array(result)


def plain(w):
    """Weights as float64 arrays by name."""
    return {
        name: plain(x) if hasattr(x, "__dataclass_fields__") else as_numpy(x).astype(float)
        for name, x in vars(w).items()
        if x is not None
    }


def expected(kind, x, config=TINY, **options):
    """The output by the specification, of weights whose top-k leaves no doubt."""
    for seed in range(100):
        made = weights(kind, seed, config, **options)
        spec = Spec(kind, made, config)
        result = np.array([spec(row) for row in x.double().numpy()])
        if spec.margin > 1e-3:
            return made, torch.from_numpy(result)
    raise AssertionError("no weights with a clear choice")


def assert_near(got, want, share=1e-4):
    assert got.shape == want.shape
    error, scale = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert error <= share * scale, f"off by {float(error)} of {float(scale)}"
