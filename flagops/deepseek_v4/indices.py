"""Lists of the keys that each query sees, for `sparse_attention` in DeepSeek-V4's layers.

Keys of a prefill are the raw rows of all its tokens, then the compressed entries. Keys of a decode step are the ring
of the last ``window`` positions (position p in slot ``p % window``), then the compressed entries. Source: the index
builders of DeepSeek-V4's inference code.
"""

from __future__ import annotations

from typing import Any


def window_indices(tokens: int, window: int = 128, start: int = 0, *, device: Any = None) -> Any:
    """The sliding window of each new token, oldest first, -1 where there is none yet.

    Args:
        tokens: new tokens; more than one only in a prefill (``start == 0``).
        window: positions that a query sees, its own included.
        start: position of the first new token. 0 is a prefill over raw rows; a later one decodes over the ring.
        device: give one for a torch tensor there (``"cpu"``, ``"cuda"``); None gives a NumPy array.

    Returns:
        int32 ``[tokens, min(tokens, window)]`` for a prefill, ``[1, window]`` for a decode step.

    Raises:
        ValueError: a size is out of range, or several tokens with ``start > 0``.
    """
    _check(tokens, window, start, "window")
    xp, like = _library(device)
    if start == 0:
        t, i = xp.arange(tokens, **like)[:, None], xp.arange(min(tokens, window), **like)[None]
        index = (t - window + 1).clip(0) + i
        return _int32(xp.where(index <= t, index, -1))
    i = xp.arange(window, **like)[None]
    if start < window - 1:
        return _int32(xp.where(i <= start, i, -1))
    return _int32((start + 1 + i) % window)


def chunk_window(first: int, tokens: int, window: int, start: int, chunk: int, *, device: Any = None) -> Any:
    """The sliding window of some tokens of a chunk whose keys lie beside the ring, oldest first, -1 where none is yet.

    Args:
        first, tokens: positions of these tokens.
        start: position of the first token of the chunk; those before it are in the ring, position p in ``p % window``.
        chunk: the row of the chunk's first token.

    Returns:
        int32 ``[tokens, min(first + tokens, window)]``.
    """
    xp, like = _library(device)
    width = min(first + tokens, window)
    t, i = first + xp.arange(tokens, **like)[:, None], xp.arange(width, **like)[None]
    p = (t - window + 1).clip(0) + i
    if start:
        p = xp.where(p > t, -1, xp.where(p < start, p % window, p + (chunk - start)))
    else:
        p = xp.where(p > t, -1, p + chunk)
    return _int32(p)


def visible_entries(first: int, tokens: int, ratio: int, offset: int, *, device: Any = None) -> Any:
    """Every compressed entry that each of some tokens sees, counted from a row on: int32 ``[tokens, the most]``, -1."""
    xp, like = _library(device)
    t, w = first + xp.arange(tokens, **like)[:, None], xp.arange((first + tokens) // ratio, **like)[None]
    return _int32(xp.where(w < (t + 1) // ratio, w + offset, -1))


def hca_indices(tokens: int, ratio: int = 128, start: int = 0, window: int = 128, *, device: Any = None) -> Any:
    """Every compressed entry that a token of an HCA layer sees: entry w once its ``ratio`` tokens are complete.

    Args:
        tokens: new tokens; more than one only in a prefill (``start == 0``).
        ratio: tokens that one entry stands for.
        start: position of the first new token, as in `window_indices`.
        window: ring slots that lie before the entries when decoding.
        device: give one for a torch tensor there; None gives a NumPy array.

    Returns:
        int32 ``[tokens, tokens // ratio]`` for a prefill, offset by the raw rows, -1 where an entry is still to come;
        ``[1, (start + 1) // ratio]`` for a decode step, offset by the ring.

    Raises:
        ValueError: a size is out of range, or several tokens with ``start > 0``.
    """
    _check(tokens, window, start, "window")
    _check(tokens, ratio, start, "ratio")
    xp, like = _library(device)
    if start == 0:
        t, w = xp.arange(tokens, **like)[:, None], xp.arange(tokens // ratio, **like)[None]
        return _int32(xp.where(w < (t + 1) // ratio, w + tokens, -1))
    return _int32(window + xp.arange((start + 1) // ratio, **like)[None])


def _check(tokens: int, width: int, start: int, name: str) -> None:
    if tokens < 0 or width < 1 or start < 0:
        raise ValueError(f"expected tokens >= 0, {name} >= 1 and start >= 0, got {tokens}, {width} and {start}")
    if start and tokens != 1:
        raise ValueError(f"a decode step (start = {start}) takes one token, got {tokens}")


def _library(device: Any) -> tuple[Any, dict[str, Any]]:
    if device is None:
        import numpy

        return numpy, {}
    import torch

    return torch, {"device": device}


def _int32(x: Any) -> Any:
    return x.astype("int32") if hasattr(x, "astype") else x.int()
