"""Which keys a query sees: lists of their rows in place of transformers' dense masks.

A list is int32 ``[b, s, k]``, rows of the keys in any order, -1 where there is none. `index_mask` is registered with
transformers as the mask function of ``flagops``, so its lists follow whatever transformers knows of windows, padding,
packed sequences and caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch

from ._binding import is_view, served

_KNOWN = {"dtype", "allow_is_causal_skip", "allow_is_bidirectional_skip"}  # what says nothing of who sees what


def index_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """The sliding window of each query as a list, the mask function asked about those pairs alone.

    A dense mask where transformers asks for more than a window of its patched model.
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    if not is_view(config) or local_size is None or use_vmap or not kwargs.keys() <= _KNOWN or not served(config):
        return masking_utils.eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    queries = (torch.arange(q_length, device=device) + q_offset).unsqueeze(-1)
    first = (queries - local_size + 1).clamp(min=kv_offset)
    rows = first + torch.arange(min(local_size, kv_length), device=device)
    keys = rows.clamp(max=kv_offset + kv_length - 1)
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1)
    seen = mask_function(batch, batch.new_zeros(()), queries.unsqueeze(0), keys.unsqueeze(0)) & (rows == keys)
    return torch.where(seen, keys - kv_offset, -1).to(torch.int32).expand(batch_size, -1, -1)


def is_lists(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dtype is torch.int32 and mask.dim() == 3


def dense(lists: torch.Tensor, keys: int, dtype: torch.dtype, hidden: float | None = None) -> torch.Tensor:
    """An additive mask ``[b, 1, s, keys]``: 0 for listed keys, for others the least number or what `hidden` says."""
    value = torch.finfo(dtype).min if hidden is None else hidden
    mask = torch.full((*lists.shape[:2], keys + 1), value, dtype=dtype, device=lists.device)
    mask.scatter_(-1, lists.masked_fill(lists < 0, keys).long(), 0.0)
    return mask[:, None, :, :keys]


def visible_indices(mask: torch.Tensor) -> torch.Tensor | None:
    """int32 [b, s, k]: the keys that an additive mask [b, s, n] leaves visible, ascending, then -1.

    None when the mask holds anything but 0 and, for a hidden key, -inf or the least finite number.
    """
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    count = visible.sum(-1, keepdim=True)
    width = int(count.max()) if count.numel() else 0
    indices = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int32, device=mask.device)
    indices[torch.arange(width, device=mask.device) < count] = visible.nonzero()[:, -1].to(torch.int32)
    return indices


def listed(block: torch.Tensor) -> torch.Tensor:
    """The lists of a mask that is known to hold 0 and -inf alone, as transformers' compressors make it."""
    if torch.compiler.is_compiling():  # no list may be as long as the values say
        rows = torch.arange(block.shape[-1], dtype=torch.int32, device=block.device)
        return torch.where(block[:, 0] == 0, rows, -1)
    found = visible_indices(block[:, 0])
    assert found is not None, "a compressor's mask is 0 and -inf"
    return found


def first_rows(seen: torch.Tensor, count: int) -> torch.Tensor:
    """The lists ``[b, s, count]`` of rows 0 to ``seen - 1``."""
    rows = torch.arange(count, dtype=torch.int32, device=seen.device)
    return torch.where(rows < seen.unsqueeze(-1), rows, -1)


def read(mask: Any) -> tuple[torch.Tensor | None, str | None]:
    """A mask as lists, or why it cannot be."""
    if mask is None:
        return None, "no mask came (is the mask function registered under the same name?)"
    if is_lists(mask):
        return mask, None
    if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        return None, f"a mask of {kind}, where transformers' own are added to the logits"
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None, f"a mask of shape {tuple(mask.shape)}"
    if torch.compiler.is_compiling():
        return None, "a mask whose values a compiler cannot read"
    lists = visible_indices(mask[:, 0])
    return lists, None if lists is not None else "the mask is more than visible or hidden"


def joined(
    mask: Any, own: int, extra: torch.Tensor | None, entries: int, wanted: bool = True
) -> tuple[Any, str | None]:
    """A layer's mask over its own keys and the entries of its compressor behind them: lists where they are wanted, and
    no reason; or the mask that transformers' code would make of them, and why it cannot be lists.

    extra: the entries that each query sees, as lists or as an additive mask; None for all of them.
    """
    lists, reason = (mask, None) if is_lists(mask) else read(mask) if wanted else (None, None)
    if lists is not None and lists is not mask and mask.shape[-1] >= own + entries:
        return lists, None  # it covers the entries as well
    if lists is not None and entries and extra is not None and extra.is_floating_point():
        found, reason = read(extra)
        if found is None:
            mask, lists = dense(lists, own, extra.dtype) if lists is mask else mask, None
        else:
            extra = found
    if lists is None:
        return _added(mask, own, extra, entries), reason
    if not entries:
        return lists, None
    if extra is None:
        extra = torch.arange(entries, dtype=torch.int32, device=lists.device).expand(*lists.shape[:2], -1)
    batch = max(lists.shape[0], extra.shape[0])
    shifted = torch.where(extra < 0, -1, extra + own).to(torch.int32)
    return torch.cat([lists.expand(batch, -1, -1), shifted.expand(batch, -1, -1)], -1), None


def _added(mask: Any, own: int, extra: torch.Tensor | None, entries: int) -> Any:
    """A mask as transformers extends it over the entries."""
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] >= own + entries:
        return mask
    if extra is None:
        return torch.nn.functional.pad(mask, (0, entries))
    if not extra.is_floating_point():
        extra = dense(extra, entries, torch.float32, float("-inf"))
    return torch.cat([mask, extra.expand(mask.shape[0], -1, -1, -1).to(mask.dtype)], -1)
