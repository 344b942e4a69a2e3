"""DeepSeek-V4's draft layer (``mtp.0.*``): it guesses the tokens to come, and the model reads several at once.

The layer takes the streams of a token, as they enter the model's head, and the token after it, and guesses the one
after that: ``e_proj(enorm(embedding)) + h_proj(hnorm(streams))``, a decoder layer with a sliding window, a head of
streams and a norm of its own; embedding and output layer are the model's (DeepSeek's inference code, ``MTPBlock``). For
the guess after it the layer takes the streams that it has made itself, and the token that it has guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flagops.checkpoint import Refused
from flagops.checkpoint.source import CONFIG, Source

_NORMS = ("enorm", "hnorm")


class DraftLayer(nn.Module):
    """The modules of ``mtp.0``, of transformers' classes, so that they are packed and patched as the model's own."""

    def __init__(self, config: Any) -> None:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        super().__init__()
        width = config.hidden_size
        self.enorm, self.hnorm, self.norm = (modeling.DeepseekV4RMSNorm(width, config.rms_norm_eps) for _ in range(3))
        self.e_proj, self.h_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.block = modeling.DeepseekV4DecoderLayer(config, 0)
        self.hc_head = modeling.DeepseekV4HyperHead(config)

    def forward(self, streams: Tensor, embedded: Tensor, **kwargs: Any) -> Tensor:
        """Streams ``[b, s, m, d]`` of tokens and the embeddings ``[b, s, d]`` of those after them, to streams."""
        x = self.e_proj(self.enorm(embedded)).unsqueeze(-2) + self.h_proj(self.hnorm(streams))
        result: Tensor = self.block(x, **kwargs)
        return result


def attach(model: Any, source: Source) -> None:
    """Give a model without memory its draft layer, ``model.model.mtp``. Raises Refused where `source` has none, or one
    that is not known."""
    config, folder = model.config, source.folder
    layers = {name.split("mtp.")[1].split(".")[0] for name in source.tensors if name.startswith(("mtp.", "model.mtp."))}
    if config.model_type != "deepseek_v4":
        raise Refused(f"{folder} is a {config.model_type}: only DeepSeek-V4's draft layer is known; leave draft out")
    if not layers:
        raise Refused(f"{folder} has no draft layer, no tensor mtp.0.*; leave draft out, or take one that has kept it")
    if layers != {"0"}:
        raise Refused(
            f"{folder} has draft layers mtp.{' and mtp.'.join(sorted(layers))}, expected one; leave draft out"
        )
    ratios = (source.config or {}).get("compress_ratios") or []
    if any(ratios[config.num_hidden_layers :]):
        raise Refused(
            f"{folder / CONFIG}: compress_ratios ends with {ratios[-1]}, expected 0 for a draft layer; leave draft out"
        )
    own = copy.deepcopy(config)
    own.num_hidden_layers, own.layer_types, own.mlp_layer_types = 1, ["sliding_attention"], ["moe"]
    with torch.device("meta"):
        model.model.mtp = nn.ModuleList([DraftLayer(own)])
    model._keep_in_fp32_modules_strict = {*model._keep_in_fp32_modules_strict, *_NORMS}


@dataclass(frozen=True)
class DraftReport:
    """What a `Draft` has done since it was made.

    drafted, accepted: tokens that were guessed, and those of them that the model would have made. forwards: of the
    model, without those of prompts; each makes one token more than it accepts.
    """

    drafted: int = 0
    accepted: int = 0
    forwards: int = 0

    def __str__(self) -> str:
        share, each = self.accepted / max(self.drafted, 1), self.accepted / max(self.forwards, 1)
        return (
            f"drafts: {self.accepted} of {self.drafted} tokens accepted ({share:.0%}), {1 + each:.2f} tokens a forward"
        )


class Draft:
    """Greedy decoding of a model that `flagops.load` has given its draft layer."""

    def __init__(self, model: Any) -> None:
        self._model, self._layer = model, model.model.mtp[0]
        self._report = DraftReport()

    def report(self) -> DraftReport:
        return self._report

    def generate(self, ids: Sequence[int], max_new_tokens: int, drafts: int = 1) -> Iterator[int]:
        """At most so many tokens after `ids`, each the likeliest to the model; ends after one that ends a text.

        drafts: tokens that are guessed before each forward of the model, which reads them all and keeps those that it
        would have made; what the cache had of others is taken back (`flagops.transformers.Trial`). So the tokens are
        those of decoding one by one, but where two are likely to within the rounding of products that are not batch
        invariant.

        Raises ValueError for no tokens, and for more drafts than a window of attention can take back.
        """
        most = self._model.config.sliding_window - 2
        if not 1 <= drafts <= most:
            raise ValueError(f"drafts: {drafts}, expected 1 to {most}, which the model's window can take back")
        if not len(ids) or max_new_tokens < 1:
            raise ValueError(
                f"expected tokens to go on from and at least one to make, got {len(ids)}, {max_new_tokens}"
            )
        return self._tokens(ids, max_new_tokens, drafts)

    @torch.no_grad()
    def _tokens(self, ids: Sequence[int], left: int, drafts: int) -> Iterator[int]:
        from transformers import DynamicCache

        from flagops.transformers import Trial

        configs = self._model.config, self._layer.block.self_attn.config
        cache, own = (DynamicCache(config=config) for config in configs)
        stop = ends(self._model)
        given = torch.tensor([list(ids)], device=self._model.device)
        logits, streams = self._read(given, cache, 1)
        found = logits.argmax(-1)
        following = torch.cat([given[:, 1:], found], 1)
        while True:
            for token in found[0].tolist():
                yield token
                left -= 1
                if token in stop or not left:
                    return
            guessed = self._guessed(streams, following, own, min(drafts, left - 1))
            with Trial(self._model, cache) as trial:
                logits, streams = self._read(torch.cat([found[:, -1:], guessed], 1), cache)
                made = logits.argmax(-1)
                right = int((guessed == made[:, :-1])[0].cumprod(0).sum())
                trial.keep(right + 1)
            found = following = made[:, : right + 1]
            streams = streams[:, : right + 1]
            known = self._report
            self._report = DraftReport(known.drafted + guessed.shape[1], known.accepted + right, known.forwards + 1)

    def _read(self, ids: Tensor, cache: Any, keep: int = 0) -> tuple[Tensor, Tensor]:
        """The model's logits after the last tokens, 0 for all of them, and all streams before its head."""
        seen: list[Tensor] = []
        hook = self._model.model.hc_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        finally:
            hook.remove()
        return out.logits, seen[0]

    def _guessed(self, streams: Tensor, following: Tensor, cache: Any, count: int) -> Tensor:
        """Tokens ``[1, count]`` after those that follow the tokens of some streams, which the draft layer reads."""
        from flagops.transformers import Trial

        tokens = [following[:, :0]]
        window = self._model.config.sliding_window
        streams = self._drafted(streams[:, -window:], following[:, -window:], cache)  # of more it keeps nothing
        with Trial(self._layer, cache) as trial:
            for number in range(count):
                if number:
                    streams = self._drafted(streams, tokens[-1], cache)
                streams = streams[:, -1:]
                hidden = self._layer.norm(self._layer.hc_head(streams))
                tokens.append(self._model.lm_head(hidden).argmax(-1))
            trial.keep(0)
        return torch.cat(tokens, 1)

    def _drafted(self, streams: Tensor, following: Tensor, cache: Any) -> Tensor:
        """The streams of the draft layer; its positions count from what it has read first, as only their differences
        matter to a layer with a sliding window."""
        from transformers.masking_utils import create_sliding_window_causal_mask

        model = self._model.model
        embedded = model.embed_tokens(following)
        start = cache.get_seq_length()
        positions = torch.arange(start, start + embedded.shape[1], device=embedded.device)[None]
        mask = create_sliding_window_causal_mask(
            config=model.config, inputs_embeds=embedded, attention_mask=None, past_key_values=cache,
            position_ids=positions,
        )  # fmt: skip
        tables = {"main": model.rotary_emb(embedded, position_ids=positions, layer_type="main")}
        result: Tensor = self._layer(
            streams, embedded, position_embeddings=tables, position_ids=positions, attention_mask=mask,
            input_ids=following, past_key_values=cache,
        )  # fmt: skip
        return result


def ends(model: Any) -> set[int]:
    """The tokens that end a text of a model."""
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found}
