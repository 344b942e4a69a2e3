"""Tokens on trial: a model reads them in one forward, and its cache keeps the first of them.

A forward replaces what a layer of the cache holds and never writes to it, entries being added behind those that are
there; so going back is to hold the old tensors again. From there a layer is brought forward by the tokens that stay:
their keys lie in the window that the forward has left, and compressors read their hidden states a second time, for
what they had of a token is gone once its window of compression has closed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ._cache import restore, snapshot
from ._compress import reread
from ._fit import MODELING


class Trial:
    """Within it a DeepSeek-V4 of transformers, patched or not, reads tokens on trial.

    ``keep(n)`` leaves the cache bit by bit as if the model had read the first `n` alone, given that their hidden states
    are the same: kernels that are batch invariant give a token's whatever follows it, others to within rounding. All
    that was read stays without it; an error takes everything back.

    model: what reads, all of its attention layers with compressors being in it. cache: its `DynamicCache`.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        attention = sys.modules[MODELING].DeepseekV4Attention
        layers = [module for module in model.modules() if isinstance(module, attention)]
        self._cache = cache
        self._layers = {layer.layer_idx: layer for layer in layers if layer.compressor is not None}
        self._read: dict[int, list[torch.Tensor]] = {index: [] for index in self._layers}

    def __enter__(self) -> Trial:
        self._before = [snapshot(layer) for layer in self._cache.layers]
        self._start = self._cache.get_seq_length()
        self._hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self._layers.values()]
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            self._take_back()

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens of the trial.

        Raises ValueError where there are not as many, or where some must be forgotten and more have been read than the
        sliding window remembers.
        """
        layers = self._cache.layers
        read = self._cache.get_seq_length() - self._start
        if not 0 <= count <= read:
            raise ValueError(f"keep: {count} tokens of {read} that were read")
        if count == read:
            return
        window = min(layer.sliding_window for layer in layers)
        if count and read >= window:
            raise ValueError(f"keep: {read} tokens were read, of which a window of {window} remembers {window - 1}")
        after = [(layer.keys, layer.values, dict(getattr(layer, "compressed_kv", {}))) for layer in layers]
        self._take_back()
        if not count:
            return
        for index, (layer, (keys, values, entries)) in enumerate(zip(layers, after, strict=True)):
            layer.update(*(x[:, :, -read:][:, :, :count] for x in (keys, values)))
            if index in self._layers:
                hidden = torch.cat(self._read[index], 1)[:, :count]
                reread(self._layers[index].compressor, hidden, self._cache, index, entries)

    def _note(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._read[layer.layer_idx].append(args[0] if args else kwargs["hidden_states"])

    def _take_back(self) -> None:
        for layer, state in zip(self._cache.layers, self._before, strict=True):
            restore(layer, state)
