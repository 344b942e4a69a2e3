"""The weights of DeepSeek-V4's attention layers: read from a checkpoint, and held to what a layer of a kind has.

An absent norm, sink or compressor would run, as another model; so nothing here is optional but what the kind of the
layer decides, and the scale of a projection, which its dtype decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagops import arrays
from flagops.deepseek_v4.cache import KINDS, AttentionConfig


@dataclass
class CompressorWeights:
    """A compressor: ``wkv`` and ``wgate`` ``[o * d, D]``, ``ape`` ``[m, o * d]`` float32, ``norm`` ``[d]``."""

    wkv: Any
    wgate: Any
    ape: Any
    norm: Any


@dataclass
class IndexerWeights:
    """The indexer of a CSA layer: ``wq_b`` ``[h * d, q_lora]``, ``weights_proj`` ``[h, D]``, its own compressor."""

    wq_b: Any
    weights_proj: Any
    compressor: CompressorWeights
    wq_b_scale: Any = None


@dataclass
class AttentionWeights:
    """The tensors of one layer by the names of the official checkpoint.

    ``wq_a`` ``[q_lora, D]``, ``wq_b`` ``[H * c, q_lora]``, ``wkv`` ``[c, D]``, ``wo_a`` ``[G * r, H / G * c]``,
    ``wo_b`` ``[D, G * r]``, each in the dtype of the hidden states or, with its scale, in FP8 or packed FP4; ``q_norm``
    and ``kv_norm`` in that dtype or float32; ``attn_sink`` ``[H]`` float32.
    """

    wq_a: Any
    q_norm: Any
    wq_b: Any
    wkv: Any
    kv_norm: Any
    wo_a: Any
    wo_b: Any
    attn_sink: Any
    compressor: CompressorWeights | None = None
    indexer: IndexerWeights | None = None
    wq_a_scale: Any = None
    wq_b_scale: Any = None
    wkv_scale: Any = None
    wo_a_scale: Any = None
    wo_b_scale: Any = None

    @classmethod
    def of_checkpoint(cls, tensors: Mapping[str, Any], prefix: str, kind: str | None = None) -> AttentionWeights:
        """From tensors by their names in a checkpoint, such as ``prefix = "layers.2.attn."``.

        Below the prefix it reads ``wq_a.weight``, ``wq_b.weight``, ``wkv.weight``, ``wo_a.weight``, ``wo_b.weight``,
        ``q_norm.weight``, ``kv_norm.weight`` and ``attn_sink``; of a CSA or HCA layer also ``compressor.wkv.weight``,
        ``compressor.wgate.weight``, ``compressor.ape`` and ``compressor.norm.weight``; of a CSA layer
        ``indexer.wq_b.weight``, ``indexer.weights_proj.weight``, and ``indexer.compressor.`` with the same four. Beside
        each projection and ``indexer.wq_b`` of one byte an element its ``.scale``.

        kind: ``"sliding"``, ``"csa"`` or ``"hca"``; None for the kind whose compressor and indexer are there.

        Raises ValueError that names each tensor below the prefix that a layer of this kind lacks or has too much; a
        projection of one byte lacks a scale that is not there.
        """
        held = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        if not held:
            raise ValueError(
                f"of_checkpoint: no tensor's name begins with {prefix!r}, expected one as 'layers.2.attn.'"
            )
        if kind not in (*KINDS, None):
            raise ValueError(f"of_checkpoint: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        kind = kind or _kind(tensors, prefix, held)
        expected = _names(kind)
        scales = {f"{name}.scale" for name in (*_PROJECTIONS, "indexer.wq_b") if f"{name}.weight" in held & expected}
        coded = {name for name in scales if _coded(tensors[f"{prefix}{name.removesuffix('scale')}weight"])}
        wrong = [
            f"{what} {', '.join(prefix + name for name in sorted(names))}"
            for what, names in (("lacks", (expected | coded) - held), ("holds", held - expected - scales))
            if names
        ]
        if wrong:
            raise ValueError(f"of_checkpoint: the layer {' and '.join(wrong)}, unlike the {kind} layers of DeepSeek-V4")

        def weight(name: str) -> Any:
            return tensors[f"{prefix}{name}.weight"]

        def scale(name: str) -> Any:
            return tensors[f"{prefix}{name}.scale"] if f"{name}.scale" in held else None

        def compressor(at: str) -> CompressorWeights:
            wkv, wgate, norm = (weight(f"{at}{name}") for name in ("wkv", "wgate", "norm"))
            return CompressorWeights(wkv, wgate, tensors[f"{prefix}{at}ape"], norm)

        def indexer(at: str) -> IndexerWeights:
            inner = compressor(f"{at}compressor.")
            return IndexerWeights(weight(f"{at}wq_b"), weight(f"{at}weights_proj"), inner, scale(f"{at}wq_b"))

        return cls(
            **{name: weight(name) for name in (*_PROJECTIONS, "q_norm", "kv_norm")},
            **{f"{name}_scale": scale(name) for name in _PROJECTIONS},
            attn_sink=tensors[f"{prefix}attn_sink"],
            compressor=None if kind == "sliding" else compressor("compressor."),
            indexer=indexer("indexer.") if kind == "csa" else None,
        )


_PROJECTIONS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
_COMPRESSOR = ("wkv.weight", "wgate.weight", "ape", "norm.weight")


def _names(kind: str) -> set[str]:
    """The tensors of a layer besides scales, as the official checkpoint names them."""
    names = {*(f"{name}.weight" for name in (*_PROJECTIONS, "q_norm", "kv_norm")), "attn_sink"}
    if kind != "sliding":
        names |= {f"compressor.{name}" for name in _COMPRESSOR}
    if kind == "csa":
        names |= {"indexer.wq_b.weight", "indexer.weights_proj.weight"}
        names |= {f"indexer.compressor.{name}" for name in _COMPRESSOR}
    return names


def _kind(tensors: Mapping[str, Any], prefix: str, held: set[str]) -> str:
    """The kind that a layer must be of; a compressor of two series is one of a CSA layer, also without an indexer."""
    if any(name.startswith("indexer.") for name in held):
        return "csa"
    if not any(name.startswith("compressor.") for name in held):
        return "sliding"
    if {"compressor.ape", "compressor.norm.weight"} <= held:
        width, series = (tensors[f"{prefix}compressor.{name}"].shape[-1] for name in ("norm.weight", "ape"))
        return "csa" if series == 2 * width else "hca"
    return "hca"


def check(name: str, kind: str, hidden: int, weights: AttentionWeights, shape: AttentionConfig) -> None:
    """Raises ValueError unless every tensor is there and fits the configuration and `hidden` channels."""
    for needed in ("q_norm", "wo_a"):
        if getattr(weights, needed) is None:
            raise ValueError(f"{name}: the weights hold no {needed}")
    heads, width, groups = shape.heads, shape.head_dim, shape.groups
    lora, rank = weights.q_norm.shape[-1], weights.wo_a.shape[0] // groups
    expected: dict[str, tuple[int, ...]] = {
        "wq_a": (lora, hidden), "q_norm": (lora,), "wq_b": (heads * width, lora), "wkv": (width, hidden),
        "kv_norm": (width,), "wo_a": (groups * rank, heads // groups * width), "wo_b": (hidden, groups * rank),
        "attn_sink": (heads,),
    }  # fmt: skip
    _fits(name, "", weights, expected)
    if weights.compressor is not None:
        _fits(name, "compressor.", weights.compressor, _compressor_shapes(shape, kind, width, hidden))
    if weights.indexer is not None:
        index = {
            "wq_b": (shape.index_heads * shape.index_dim, lora), "weights_proj": (shape.index_heads, hidden),
            "compressor": (),
        }  # fmt: skip
        _fits(name, "indexer.", weights.indexer, index)
        inner = _compressor_shapes(shape, kind, shape.index_dim, hidden)
        _fits(name, "indexer.compressor.", weights.indexer.compressor, inner)


def _compressor_shapes(shape: AttentionConfig, kind: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    series = (2 if kind == "csa" else 1) * width
    return {
        "wkv": (series, hidden), "wgate": (series, hidden), "ape": (shape.ratio(kind), series), "norm": (width,),
    }  # fmt: skip


def _fits(name: str, at: str, part: Any, expected: dict[str, tuple[int, ...]]) -> None:
    for field, wanted in expected.items():
        tensor = getattr(part, field)
        if tensor is None:
            raise ValueError(f"{name}: the weights hold no {at}{field}")
        if not wanted:
            continue
        found = tuple(tensor.shape)
        if found != wanted and not (len(wanted) == 2 and packed(tensor) and found == (wanted[0], wanted[1] // 2)):
            raise ValueError(f"{name}: {at}{field} has shape {list(found)}, expected {list(wanted)}")
        scaled = getattr(part, f"{field}_scale", None) is not None
        if scaled != _coded(tensor):
            what = "has a scale" if scaled else "has no scale"
            raise ValueError(f"{name}: {at}{field} is {arrays.dtype_name(tensor)} and {what}; FP8 and FP4 have one")


def packed(weight: Any) -> bool:
    """Whether a byte holds two elements of FP4."""
    return arrays.dtype_name(weight) in ("uint8", "int8", "float4_e2m1fn_x2")


def _coded(weight: Any) -> bool:
    """Whether a weight is codes of FP8 or FP4, that a scale belongs to."""
    return bool(weight.dtype.itemsize == 1)
