"""The classes of transformers' DeepSeek-V4, those of quantised layers of any model, and what stands for each."""

from __future__ import annotations

from . import _attention, _compress, _layers, _moe, _numerics, _quantised
from ._fit import EAGER, FINEGRAINED, MASKS, MODELING, MODULES, ROTATION, STATES, Kind

_COMPRESS = frozenset({"compress_kv", "lightning_indexer"})
_COMPRESSOR = "kv_proj gate_proj position_bias kv_norm rotary_emb"
_ENTRIES = "compress_rate head_dim rope_layer_type"

KINDS: dict[str, Kind] = {
    "DeepseekV4Attention": Kind(
        _attention.OPS,
        (_attention.attention, _attention.attention_5_23),
        numerics=True,
        parts="q_a_proj q_a_norm q_b_proj q_b_norm kv_proj kv_norm o_a_proj o_b_proj sinks compressor",
        reads="config head_dim layer_idx layer_type rope_layer_type sliding_window scaling attention_dropout",
        calls=ROTATION | EAGER,
    ),
    "DeepseekV4HCACompressor": Kind(
        _COMPRESS,
        (_compress.compressor, _compress.compressor_5_23),
        numerics=True,
        parts=_COMPRESSOR,
        reads=_ENTRIES,
        calls=ROTATION | STATES,
    ),
    "DeepseekV4CSACompressor": Kind(
        _COMPRESS,
        (_compress.compressor, _compress.compressor_5_23),
        numerics=True,
        parts=f"{_COMPRESSOR} indexer",
        reads=_ENTRIES,
        calls=ROTATION | STATES,
    ),
    "DeepseekV4Indexer": Kind(
        _COMPRESS,
        (_compress.indexer, _compress.indexer_5_23),
        numerics=True,
        parts=f"{_COMPRESSOR} q_b_proj scorer",
        reads=f"{_ENTRIES} index_topk",
        calls=ROTATION | STATES,
    ),
    "DeepseekV4IndexerScorer": Kind(
        frozenset(), (_numerics.scorer,), numerics=True, parts="weights_proj", reads="softmax_scale weights_scaling"
    ),
    "DeepseekV4Model": Kind(frozenset({"sparse_attention"}), implementation="attn", calls=MASKS),
    "DeepseekV4RotaryEmbedding": Kind(frozenset(), (_layers.rotary_tables,), numerics=True),
    "DeepseekV4RMSNorm": Kind(frozenset({"rms_norm"}), (_layers.rms_norm,), parts="weight", reads="variance_epsilon"),
    "DeepseekV4UnweightedRMSNorm": Kind(
        frozenset({"rms_norm"}), (_layers.unweighted_rms_norm,), numerics=True, parts="", reads="eps"
    ),
    "DeepseekV4HyperConnection": Kind(
        frozenset({"hc_pre"}),
        (_layers.hyper_connection,),
        parts="input_norm fn base scale",
        reads="hc_sinkhorn_iters hc_eps",
    ),
    "DeepseekV4HyperHead": Kind(
        frozenset({"hc_head"}), (_layers.hyper_head,), parts="input_norm hc_fn hc_base hc_scale", reads="eps"
    ),
    "DeepseekV4DecoderLayer": Kind(
        frozenset({"hc_post"}),
        (_layers.decoder_layer,),
        parts="self_attn mlp input_layernorm post_attention_layernorm attn_hc ffn_hc",
        reads="gradient_checkpointing",
    ),
    "DeepseekV4SparseMoeBlock": Kind(
        frozenset({"moe_gate"}), (_moe.moe_block,), parts="gate experts shared_experts", reads="is_hash"
    ),
    "DeepseekV4TopKRouter": Kind(
        frozenset({"moe_gate"}),
        (_moe.router,),
        parts="weight score_fn e_score_correction_bias",
        reads="hidden_dim top_k routed_scaling_factor",
    ),
    "DeepseekV4HashRouter": Kind(
        frozenset({"moe_gate"}),
        (_moe.hash_router,),
        parts="weight score_fn tid2eid",
        reads="hidden_dim top_k routed_scaling_factor",
    ),
    "DeepseekV4Experts": Kind(
        frozenset({"moe_experts"}),
        (_moe.experts_forward,),
        implementation="experts",
        parts="gate_up_proj down_proj act_fn",
        reads="config limit _is_expert_parallel",
    ),
    "DeepseekV4MLP": Kind(
        frozenset({"swiglu"}), (_moe.shared_expert,), parts="gate_proj up_proj down_proj act_fn", reads="limit"
    ),
}
_PARTS = "weight weight_scale_inv activation_scale bias"
_SCHEME = "block_size activation_scheme"
QUANTISED: dict[str, tuple[str, Kind]] = {
    "PackedLinear": (MODULES, Kind(_quantised.LINEAR, (_quantised.packed,))),
    "PackedExperts": (MODULES, Kind(_quantised.EXPERTS, (_quantised.packed_experts,))),
    "StackedExperts": (MODULES, Kind(_quantised.EXPERTS, (_quantised.packed_experts,))),
    "FP8Linear": (FINEGRAINED, Kind(_quantised.LINEAR, (_quantised.fp8_linear,), parts=_PARTS, reads=_SCHEME)),
    "FP8GroupedLinear": (
        FINEGRAINED,
        Kind(_quantised.LINEAR, (_quantised.fp8_grouped,), parts=_PARTS, reads=f"{_SCHEME} n_groups"),
    ),
    "FP8Experts": (
        FINEGRAINED,
        Kind(
            _quantised.EXPERTS,
            (_quantised.fp8_experts,),
            reads=f"has_gate act_fn limit {_SCHEME} gate_up_proj down_proj",
        ),
    ),
}
"""Quantised layers by class: their module, and what is known of them."""
KINDS |= {name: kind for name, (_, kind) in QUANTISED.items()}
HOMES = dict.fromkeys(KINDS, MODELING) | {name: home for name, (home, _) in QUANTISED.items()}
LISTS = {"DeepseekV4Attention", "DeepseekV4HCACompressor", "DeepseekV4CSACompressor", "DeepseekV4Indexer"}

for _kind in KINDS.values():
    for _forward in _kind.forwards:
        _forward.__name__ = "forward"  # by which a method is pickled: a model that is loaded finds its class's own
