"""Which keys a query sees: lists of their rows in place of transformers' dense masks.

A list is int32 ``[b, s, k]``, rows of the keys in any order, -1 where there is none. `index_mask` is registered with
transformers as the mask function of ``flagops``, so its lists follow whatever transformers knows of windows, padding,
packed sequences and caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch

from ._binding import is_view


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
    if not is_view(config) or local_size is None or use_vmap:
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
    return isinstance(mask, torch.Tensor) and not mask.is_floating_point() and mask.dim() == 3


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


def first_rows(seen: torch.Tensor, count: int) -> torch.Tensor:
    """The lists ``[b, s, count]`` of rows 0 to ``seen - 1``."""
    rows = torch.arange(count, dtype=torch.int32, device=seen.device)
    return torch.where(rows < seen.unsqueeze(-1), rows, -1)


def joined(mask: Any, own: int, extra: torch.Tensor | None, entries: int) -> tuple[Any, str | None]:
    """A layer's mask over its own keys and the entries of its compressor behind them: lists, and no reason; or the mask
    that transformers' code would make of them, and why it cannot be lists.

    extra: the entries that each query sees, as lists or as an additive mask; None for all of them.
    """
    if mask is None:
        return None, "no mask came (is the mask function registered under the same name?)"
    if is_lists(mask):
        lists, reason = mask, None
    elif mask.dim() != 4 or mask.shape[1] != 1:
        lists, reason = None, f"a mask of shape {tuple(mask.shape)}"
    else:
        lists = visible_indices(mask[:, 0])
        reason = None if lists is not None else "the mask is more than visible or hidden"
    if not is_lists(mask) and mask.shape[-1] >= own + entries:  # it covers the entries as well
        return (mask, reason) if lists is None else (lists, None)
    if extra is not None and extra.is_floating_point():
        found = visible_indices(extra[:, 0])
        assert found is not None, "a compressor's mask is 0 and -inf"
        extra = found
    if lists is None:
        if not entries:
            return mask, reason
        if extra is None:
            return torch.nn.functional.pad(mask, (0, entries)), reason
        behind = dense(extra, entries, mask.dtype, float("-inf"))
        return torch.cat([mask, behind.expand(mask.shape[0], -1, -1, -1)], -1), reason
    if not entries:
        return lists, None
    if extra is None:
        extra = torch.arange(entries, dtype=torch.int32, device=lists.device).expand(*lists.shape[:2], -1)
    batch = max(lists.shape[0], extra.shape[0])
    shifted = torch.where(extra < 0, -1, extra + own).to(torch.int32)
    return torch.cat([lists.expand(batch, -1, -1), shifted.expand(batch, -1, -1)], -1), None
