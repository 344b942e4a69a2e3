"""A model that lies in a folder: its sizes by its configuration, its weights by the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from flagops.checkpoint.configuration import Configuration
from flagops.checkpoint.documents import AGAIN, Refused, shown, whole
from flagops.checkpoint.plan import KEPT_SCALE, RECODED_SCALE, Output, Plan, outputs
from flagops.checkpoint.source import CONFIG, Source

from .model import Model, Part, Role, merged

_ROLES = (
    (Role.DRAFT, r"^mtp\."),
    (Role.TABLE, r"\.tid2eid$"),
    (Role.EXPERTS, r"\.experts\."),
    (Role.SHARED, r"\.shared_experts\."),
    (Role.ROUTER, r"\.(ffn|mlp)\.gate\."),
    (Role.HYPER, r"(^|[._])hc_|_hc\."),
    (Role.NORMS, r"norm\.weight$"),
    (Role.INDEXER, r"\.indexer\.(scorer\.)?(wq_b|q_b_proj|weights_proj)\."),
    (Role.COMPRESSOR, r"\.(compressor|indexer)\."),
    (Role.PROJECTION, r"\.(wo_[ab]|o_[ab]_proj)\."),
    (Role.ATTENTION, r"\.(attn|self_attn)\."),
    (Role.EMBEDDING, r"^(model\.)?embed(_tokens)?\."),
    (Role.HEAD, r"^(lm_)?head\."),
)
"""What a tensor is for by its name, in the official or in transformers' spelling; the first that fits."""

_KEYS = {
    "hidden": "hidden_size", "heads": "num_attention_heads", "q_rank": "q_lora_rank", "groups": "o_groups",
    "experts": "n_routed_experts", "width": "moe_intermediate_size", "vocabulary": "vocab_size",
    "active": "num_experts_per_tok", "head_dim": "head_dim", "o_rank": "o_lora_rank", "index_heads": "index_n_heads",
    "index_dim": "index_head_dim", "index_keys": "index_topk", "streams": "hc_mult", "window": "sliding_window",
}  # fmt: skip
_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "bf16", "I64": "i64", "I32": "i64", "F8_E4M3": "fp8"}
_FORMATS = {"FP4": "fp4", "FP8": "fp8", "INT8": "int8", "INT4": "w4a8"}


def of_folder(folder: Path, form: str) -> tuple[Model, list[Part]]:
    """The sizes of a checkpoint and its weights in a format: as stored, or as `flagops convert` would write them.

    Raises Refused for what is no DeepSeek-V4 or cannot be in that format, naming file or tensor.
    """
    source = Source(folder)
    model = _model(source)
    return model, merged(_parts(source, form, model.layers))


def _model(source: Source) -> Model:
    said = source.config or {}
    if said.get("model_type") != "deepseek_v4":
        raise Refused(
            f"{source.folder / CONFIG} is of {shown(said.get('model_type'))}; plan counts deepseek_v4 alone, whose "
            "layers and cache it knows"
        )
    types = said.get("layer_types") or [_TYPES.get(ratio) for ratio in _list(said.get("compress_ratios"), int)]
    layers: Any = said.get("num_hidden_layers")
    if not whole(layers, 1) or len(types) < layers or not set(_list(types, str)[:layers]) <= set(_TYPES.values()):
        raise Refused(
            f"{source.folder / CONFIG}: compress_ratios or layer_types do not say what each layer is; {AGAIN}"
        )
    sliding, csa, hca = (types[:layers].count(kind) for kind in _TYPES.values())
    rates: Any = said.get("compress_rates")
    rates = rates if isinstance(rates, dict) else {}
    hashed = _list(said.get("mlp_layer_types"), str).count("hash_moe")
    found = {field.name: said.get(_KEYS.get(field.name, ""), field.default) for field in fields(Model)} | {
        "csa_ratio": rates.get(_TYPES[4], said.get("compress_rate_csa", 4)),
        "hca_ratio": rates.get(_TYPES[128], said.get("compress_rate_hca", 128)),
        "hash_layers": said.get("num_hash_layers", hashed),
        "sliding": sliding,
        "csa": csa,
        "hca": hca,
    }
    for name, value in found.items():
        if not whole(value, 0 if name in ("sliding", "csa", "hca", "hash_layers") else 1):
            key = _KEYS.get(name, name)
            raise Refused(f"{source.folder / CONFIG}: {key} is {shown(value)}, expected a size; {AGAIN}")
    return Model(**found)


def _list(value: Any, of: type) -> list[Any]:
    """A list of one type; an empty one in place of all else."""
    return value if isinstance(value, list) and all(isinstance(x, of) for x in value) else []


def _parts(source: Source, form: str, layers: int) -> Iterator[Part]:
    if form == "checkpoint":
        for out in outputs(source.tensors, "bf16", Configuration(source.config)):
            held = sum(x.size for x in (out.weight, *(out.parts.beside() if out.parts else ())))
            kind = _FORMATS.get(out.format.name, out.format.name) if out.format else _DTYPES[out.dtype]
            yield _part(out, layers, kind, held)
        return
    for out in Plan(source, form).outputs:
        scale = out.action in (KEPT_SCALE, RECODED_SCALE) or out.part not in ("", "codes")
        yield _part(out, layers, form if scale or out.of else _DTYPES[out.dtype], out.size, scale)


def _part(out: Output, layers: int, kind: str, held: int, scale: bool = False) -> Part:
    name, shape = out.weight.name, (out.of or out).shape
    found = role(name, layers)
    if found is None:
        raise Refused(f"{out.weight} is no part of a DeepSeek-V4; remove it")
    multiplies = len(shape) > 1 and not scale and found not in (Role.TABLE, Role.EMBEDDING)
    return Part(found, kind, held, math.prod(shape) if multiplies else 0)


def role(name: str, layers: int) -> Role | None:
    """What a tensor is for, None for none; layers beyond those of the model are drafts."""
    layer = re.search(r"(^|\.)layers\.(\d+)\.", name)
    if layer and int(layer[2]) >= layers:
        return Role.DRAFT
    return next((found for found, pattern in _ROLES if re.search(pattern, name)), None)
