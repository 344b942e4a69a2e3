"""A small DeepSeek-V4 written from the operators' specification against the interface of its kernel module.

Whoever imports this puts the module under test into ``sys.modules["kernel"]`` before. Prefill of one batch: a sliding
and a CSA layer with hyper-connections, FP8 and FP4 linears, an indexer, experts and a shared expert.
"""

import torch
import torch.nn.functional as F
from fast_hadamard_transform import hadamard_transform
from kernel import act_quant, fp4_act_quant, fp4_gemm, fp8_gemm, hc_split_sinkhorn, sparse_attn

BLOCK, E8M0, FP4 = 128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2
VOCAB, D, HEADS, C, ROPE, Q_LORA, GROUPS, O_LORA = 64, 256, 4, 128, 64, 128, 2, 128
INDEX_HEADS, TOP_K, WINDOW, RATIO, STREAMS = 16, 2, 8, 4, 4
EXPERTS, ACTIVE, INNER, LIMIT, ROUTE_SCALE, EPS = 4, 2, 128, 10.0, 1.5, 1e-6


class Weights:
    """Random weights by name, drawn once whatever the dtype that the model computes in."""

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)

    def plain(self, *shape, scale=1.0):
        drawn = torch.randn(*shape, generator=self.random, dtype=torch.float64) * scale
        return drawn.bfloat16().to(torch.get_default_dtype())

    def exact(self, *shape, scale=1.0):
        """What is kept in float32 where the model computes in less."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return (torch.randn(*shape, generator=self.random, dtype=torch.float64) * scale).float().to(dtype)

    def fp8(self, n, k):
        weight = torch.randn(n, k, generator=self.random, dtype=torch.float64) * k**-0.5
        blocks = weight.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
        exponent = torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / 448))
        codes = (blocks / torch.exp2(exponent)[:, None, :, None]).view(n, k).float().to(torch.float8_e4m3fn)
        return codes, (exponent + 127).to(torch.uint8).view(E8M0)

    def fp4(self, n, k):
        packed = torch.randint(0, 256, (n, k // 2), generator=self.random, dtype=torch.uint8)
        scale = torch.randint(121, 124, (n, k // 32), generator=self.random, dtype=torch.uint8)
        return packed.view(FP4), scale.view(E8M0)


def linear(x, weight):
    if not isinstance(weight, tuple):
        return x @ weight.T
    codes, scale = weight
    product = fp4_gemm if codes.dtype == FP4 else fp8_gemm
    return product(*act_quant(x, BLOCK, "ue8m0", E8M0), codes, scale, E8M0)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight=None):
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return (y if weight is None else weight * y).to(x.dtype)


def rotate(x, positions, inverse=False):
    """The last channels of ``[b, s, ..., d]`` in place, interleaved pairs."""
    tail = wide(x[..., -ROPE:]).unflatten(-1, (-1, 2))
    theta = 10000.0 ** (-torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
    angle = (positions.double()[:, None] * theta).to(tail.dtype)
    angle = angle.view(len(positions), *[1] * (x.dim() - 3), ROPE // 2)
    cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
    first, second = tail.unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    x[..., -ROPE:] = turned.to(x.dtype)


class Compressor:
    """One entry for every four tokens, from their window and the one before."""

    def __init__(self, w, width):
        self.width = width
        self.wkv, self.wgate = (w.exact(2 * width, D, scale=D**-0.5) for _ in range(2))
        self.bias, self.norm = w.exact(RATIO, 2 * width), 1 + w.exact(width, scale=0.1)

    def __call__(self, x):
        count = x.shape[1] // RATIO
        kv, score = ((wide(x) @ m.T)[:, : count * RATIO].unflatten(1, (count, RATIO)) for m in (self.wkv, self.wgate))
        score = score + self.bias
        before, empty = slice(None, self.width), score.new_full((len(x), 1, RATIO, self.width), -torch.inf)
        scores = torch.cat((torch.cat((empty, score[:, :-1, :, before]), 1), score[..., self.width :]), 2)
        values = torch.cat((torch.cat((0 * kv[:, :1, :, before], kv[:, :-1, :, before]), 1), kv[..., self.width :]), 2)
        entries = rms_norm((scores.softmax(2) * values).sum(2).to(x.dtype), self.norm)
        rotate(entries, RATIO * torch.arange(count))
        return entries


class Indexer:
    def __init__(self, w):
        self.wq, self.weights = w.fp8(INDEX_HEADS * 128, Q_LORA), w.plain(INDEX_HEADS, D)
        self.compressor = Compressor(w, 128)
        self.margin = torch.inf

    def __call__(self, x, qr, positions, offset):
        q, keys = linear(qr, self.wq).unflatten(-1, (INDEX_HEADS, 128)), self.compressor(x)
        rotate(q, positions)
        q, keys = hadamard_transform(q, 128**-0.5), hadamard_transform(keys, scale=128**-0.5)
        for tensor in (q, keys):
            assert fp4_act_quant(tensor, 32, inplace=True) is tensor
        factor = wide(linear(x, self.weights)) * (128 * INDEX_HEADS) ** -0.5
        score = (torch.einsum("bshd,bnd->bshn", wide(q), wide(keys)).relu() * factor[..., None]).sum(2)
        visible = (positions + 1) // RATIO
        score = score.masked_fill(torch.arange(keys.shape[1]) >= visible[:, None], -torch.inf)
        best = score.topk(TOP_K + 1, -1).values
        self.margin = (best[..., TOP_K - 1] - best[..., TOP_K])[:, visible > TOP_K].min()
        chosen = score.topk(TOP_K, -1).indices
        return torch.where(chosen < visible[:, None], chosen + offset, -1)


class Attention:
    def __init__(self, w, compressed):
        self.wq_a, self.wq_b, self.wkv = w.fp8(Q_LORA, D), w.fp8(HEADS * C, Q_LORA), w.fp8(C, D)
        self.q_norm, self.kv_norm = (1 + w.exact(n, scale=0.1) for n in (Q_LORA, C))
        self.wo_a = w.plain(GROUPS, O_LORA, HEADS * C // GROUPS, scale=(HEADS * C // GROUPS) ** -0.5)
        self.wo_b, self.sink = w.fp8(D, GROUPS * O_LORA), w.exact(HEADS)
        self.compressor, self.indexer = (Compressor(w, C), Indexer(w)) if compressed else (None, None)

    def __call__(self, x):
        batch, length, _ = x.shape
        positions = torch.arange(length)
        qr = rms_norm(linear(x, self.wq_a), self.q_norm)
        q = rms_norm(linear(qr, self.wq_b).unflatten(-1, (HEADS, C)))
        rotate(q, positions)
        kv = rms_norm(linear(x, self.wkv), self.kv_norm)
        rotate(kv, positions)
        act_quant(kv[..., :-ROPE], 64, "ue8m0", E8M0, True)
        window = (positions[:, None] - WINDOW + 1).clamp(min=0) + torch.arange(min(length, WINDOW))
        indices = torch.where(window > positions[:, None], -1, window).expand(batch, -1, -1)
        if self.compressor:
            entries = self.compressor(x)
            act_quant(entries[..., :-ROPE], 64, "ue8m0", E8M0, True)
            indices = torch.cat((indices, self.indexer(x, qr, positions, length)), -1)
            kv = torch.cat((kv, entries), 1)
        o = sparse_attn(q, kv, self.sink, indices.int(), C**-0.5)
        rotate(o, positions, inverse=True)
        inner = torch.einsum("bsgc,grc->bsgr", o.reshape(batch, length, GROUPS, -1), self.wo_a)
        return linear(inner.flatten(2), self.wo_b)


class Expert:
    def __init__(self, w, make):
        self.w1, self.w3, self.w2 = make(INNER, D), make(INNER, D), make(D, INNER)

    def __call__(self, x, weight=1.0):
        gate, up = wide(linear(x, self.w1)).clamp(max=LIMIT), wide(linear(x, self.w3)).clamp(-LIMIT, LIMIT)
        return linear((weight * (F.silu(gate) * up)).to(x.dtype), self.w2)


class Experts:
    def __init__(self, w):
        self.gate, self.bias = w.exact(EXPERTS, D, scale=D**-0.5), w.exact(EXPERTS, scale=0.1)
        self.experts = [Expert(w, w.fp4) for _ in range(EXPERTS)]
        self.shared = Expert(w, w.fp8)
        self.margin = torch.inf

    def __call__(self, x):
        flat = x.flatten(0, 1)
        score = F.softplus(wide(flat) @ self.gate.T).sqrt()
        best = (score + self.bias).topk(ACTIVE + 1, -1)
        self.margin = (best.values[:, ACTIVE - 1] - best.values[:, ACTIVE]).min()
        chosen = best.indices[:, :ACTIVE]
        weights = score.gather(1, chosen)
        weights = ROUTE_SCALE * weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(wide(flat))
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            y[row] += expert(flat[row], weights[row, place, None])
        return (y + self.shared(flat)).to(x.dtype).view(x.shape)


class Layer:
    def __init__(self, w, compressed):
        self.sublayers = Attention(w, compressed), Experts(w)
        self.norms = [1 + w.exact(D, scale=0.1) for _ in self.sublayers]
        self.mixes = [(w.exact(24, STREAMS * D, scale=0.1), w.exact(3), w.exact(24)) for _ in self.sublayers]

    def __call__(self, streams):
        for sublayer, norm, (fn, scale, base) in zip(self.sublayers, self.norms, self.mixes, strict=True):
            flat = wide(streams.flatten(2))
            mixes = (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
            pre, post, comb = hc_split_sinkhorn(mixes, scale, base, STREAMS, 20, EPS)
            y = (pre[..., None] * wide(streams)).sum(-2).to(streams.dtype)
            y = wide(sublayer(rms_norm(y, norm)))
            mixed = torch.einsum("bsjk,bsjd->bskd", comb, wide(streams))
            streams = (post[..., None] * y[:, :, None] + mixed).to(streams.dtype)
        return streams


class Model:
    def __init__(self, seed):
        w = Weights(seed)
        self.embedding, self.layers = w.plain(VOCAB, D), [Layer(w, compressed) for compressed in (False, True)]
        self.norm, self.head = 1 + w.exact(D, scale=0.1), w.exact(VOCAB, D, scale=D**-0.5)
        self.fn, self.scale, self.base = w.exact(STREAMS, STREAMS * D, scale=0.1), w.exact(1), w.exact(STREAMS)

    def __call__(self, ids):
        streams = self.embedding[ids][:, :, None].repeat(1, 1, STREAMS, 1)
        for layer in self.layers:
            streams = layer(streams)
        flat = wide(streams.flatten(2))
        mixes = (flat @ self.fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
        pre = torch.sigmoid(mixes * self.scale + self.base) + EPS
        y = (pre[..., None] * wide(streams)).sum(-2).to(streams.dtype)
        return wide(rms_norm(y, self.norm)) @ self.head.T

    @property
    def margin(self):
        """How far from another choice the indexer and the routers were in the last call."""
        indexers = [layer.sublayers[0].indexer for layer in self.layers]
        chosen = [*(i for i in indexers if i), *(layer.sublayers[1] for layer in self.layers)]
        return float(min(float(x.margin) for x in chosen))
