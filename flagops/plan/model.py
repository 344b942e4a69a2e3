"""The sizes of a DeepSeek-V4 and its weights, each kind with what it is for, its shape and its format.

Shapes are those of section 13 of the operator specification; a checkpoint's own come from its headers (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from flagops.distributed.layout import BLOCK, Sizes

FORMATS = ("checkpoint", "fp8", "bf16", "int8", "w4a8")
"""As released or stored, and as `flagops convert` writes it; bf16 is what others expand to."""


class Role(StrEnum):
    """What weights, and the cache, are for, in the order of a token; no token of the model itself reads drafts."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    PROJECTION = "output projection"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    CACHE = "cache"
    HYPER = "hyper-connections"
    NORMS = "norms"
    ROUTER = "router"
    TABLE = "hash table"
    SHARED = "shared expert"
    EXPERTS = "routed experts"
    HEAD = "head"
    DRAFT = "draft layers"


@dataclass(frozen=True)
class Model:
    """The sizes of a DeepSeek-V4 (section 0 of the operator specification)."""

    hidden: int
    sliding: int
    csa: int
    hca: int
    heads: int
    q_rank: int
    groups: int
    experts: int
    width: int
    vocabulary: int = 129280
    hash_layers: int = 3
    active: int = 6
    head_dim: int = 512
    o_rank: int = 1024
    index_heads: int = 64
    index_dim: int = 128
    index_keys: int = 512
    streams: int = 4
    window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128

    @property
    def layers(self) -> int:
        return self.sliding + self.csa + self.hca

    @property
    def projection(self) -> Sizes:
        return Sizes(self.heads, self.head_dim, self.groups, self.o_rank, self.hidden)


MODELS = {
    "v4-flash": Model(4096, 2, 21, 20, 64, 1024, 8, 256, 2048),
    "v4-pro": Model(7168, 0, 30, 31, 128, 1536, 16, 384, 3072, index_keys=1024),
}


@dataclass(frozen=True)
class Weight:
    """Tensors of one kind: what for, how many, their shape and their format as released.

    sharded: whether the ranks of tensor parallelism divide them. floating: whether they are BF16 among integers.
    """

    role: Role
    count: int
    rows: int
    columns: int
    kind: str
    sharded: bool = False
    floating: bool = False

    @property
    def elements(self) -> int:
        """Of one."""
        return self.rows * self.columns

    def stored(self, form: str) -> tuple[str, float]:
        """The kind that these are in a format, and the bytes of one, scales included."""
        kind = self.kind
        if kind in ("fp8", "fp4") and form != "checkpoint":
            kind = "bf16" if self.floating and form in ("int8", "w4a8") else form
        return kind, self.elements * BYTES[kind] + _scales(kind, self.rows, self.columns)


BYTES = {"f32": 4.0, "i64": 8.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5, "int8": 1.0, "w4a8": 0.5}
"""Of an element, by kind."""


def _scales(kind: str, rows: int, columns: int) -> float:
    """Bytes: one for each block of FP8 and each group of FP4, a float for each row of INT8; two for each group of INT4,
    and its shape."""
    if kind == "fp8":
        return -(-rows // BLOCK) * -(-columns // BLOCK)
    return {"fp4": rows * columns / 32, "int8": 4.0 * rows, "w4a8": rows * columns / 16 + 16}.get(kind, 0.0)


def weights(model: Model) -> Iterator[Weight]:
    """Every weight of the model; kinds are those of the released checkpoints."""
    d, n, e, wide = model.hidden, model.layers, model.experts, model.streams * model.hidden
    projection = model.projection
    yield Weight(Role.EMBEDDING, 1, model.vocabulary, d, "bf16", True)
    yield Weight(Role.HEAD, 1, model.vocabulary, d, "bf16", True)
    yield Weight(Role.NORMS, 1 + 2 * n, 1, d, "bf16")
    yield Weight(Role.HYPER, 2 * n, 24, wide, "f32")
    yield Weight(Role.HYPER, 2 * n, 1, 24 + 3, "f32")
    yield Weight(Role.HYPER, 1, 4, wide, "f32")
    yield Weight(Role.HYPER, 1, 1, 4 + 1, "f32")
    yield Weight(Role.ATTENTION, n, model.q_rank, d, "fp8")
    yield Weight(Role.ATTENTION, n, model.heads * model.head_dim, model.q_rank, "fp8", True)
    yield Weight(Role.ATTENTION, n, model.head_dim, d, "fp8")
    yield Weight(Role.NORMS, n, 1, model.q_rank + model.head_dim, "bf16")
    yield Weight(Role.ATTENTION, n, 1, model.heads, "f32", True)
    yield Weight(Role.PROJECTION, n, projection.groups * projection.rank, projection.width, "fp8", True, floating=True)
    yield Weight(Role.PROJECTION, n, d, projection.groups * projection.rank, "fp8", True)
    for layers, overlap, ratio, dim in (
        (model.csa, 2, model.csa_ratio, model.head_dim),
        (model.csa, 2, model.csa_ratio, model.index_dim),
        (model.hca, 1, model.hca_ratio, model.head_dim),
    ):
        yield Weight(Role.COMPRESSOR, 2 * layers, overlap * dim, d, "bf16")
        yield Weight(Role.COMPRESSOR, layers, ratio, overlap * dim, "f32")
        yield Weight(Role.NORMS, layers, 1, dim, "bf16")
    yield Weight(Role.INDEXER, model.csa, model.index_heads * model.index_dim, model.q_rank, "fp8", True)
    yield Weight(Role.INDEXER, model.csa, model.index_heads, d, "bf16", True)
    yield Weight(Role.ROUTER, n, e, d, "bf16")
    yield Weight(Role.ROUTER, n - model.hash_layers, 1, e, "f32")
    yield Weight(Role.TABLE, model.hash_layers, model.vocabulary, model.active, "i64")
    yield Weight(Role.SHARED, 2 * n, model.width, d, "fp8")
    yield Weight(Role.SHARED, n, d, model.width, "fp8")
    yield Weight(Role.EXPERTS, 2 * n * e, model.width, d, "fp4", True)
    yield Weight(Role.EXPERTS, n * e, d, model.width, "fp4", True)


@dataclass(frozen=True)
class Part:
    """All weights of a role that are stored alike.

    held: bytes. elements: of those that are matrices, which a token that uses them multiplies with once.
    """

    role: Role
    kind: str
    held: float
    elements: float


def parts(model: Model, form: str) -> list[Part]:
    """The weights of a model in a format, by role and kind."""
    found = []
    for weight in weights(model):
        kind, size = weight.stored(form)
        multiplies = weight.rows > 1 and weight.role not in (Role.TABLE, Role.EMBEDDING)
        elements = weight.count * weight.elements if multiplies else 0
        found.append(Part(weight.role, kind, weight.count * size, elements))
    return merged(found)


def merged(found: Iterable[Part]) -> list[Part]:
    """Those of one role and kind as one, in the order of roles."""
    sums: dict[tuple[Role, str], Part] = {}
    for part in found:
        key = part.role, part.kind
        old = sums.get(key, Part(*key, 0, 0))
        sums[key] = Part(*key, old.held + part.held, old.elements + part.elements)
    return sorted(sums.values(), key=lambda part: ([*Role].index(part.role), part.kind))
