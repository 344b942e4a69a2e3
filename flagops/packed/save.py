"""Writing a loaded model back as the checkpoint that it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagops.checkpoint.source import CONFIG, INDEX, Reader, Stored
from flagops.checkpoint.store import Writer

from .storage import Mapped

_CHUNK = 1 << 22


class Saved:
    """Stands for a model's ``save_pretrained``: writes the checkpoint's own files into a folder.

    Tensors have their stored names, dtypes and places, and the bytes that they had unless the model holds others;
    configuration, tokenizer and all other files are copied. Files appear whole or not at all. A model that is not
    `whole`, the part of a rank, is refused.
    """

    def __init__(self, mapped: Mapped, places: dict[str, Any], whole: bool = True) -> None:
        self._mapped, self._places, self._whole = mapped, places, whole

    def __call__(self, save_directory: str | os.PathLike[str]) -> None:
        source, folder = self._mapped.source, Path(save_directory)
        if not self._whole:
            raise ValueError(f"save_pretrained: a rank has its part of {source.folder} alone; load it without a mesh")
        folder.mkdir(parents=True, exist_ok=True)
        with Reader(source) as reader:
            for shard in source.shards:
                tensors = [x for x in source.tensors.values() if x.file == shard]
                start = min((x.offset for x in tensors), default=source.stamps[shard].size)
                with Writer(folder, shard) as writer:
                    _copy(reader, writer, shard, start)
                    for stored in tensors:
                        writer.write(_bytes(self._value(stored)))
                    writer.finish()
            rest = [name for name in source.stamps if name not in source.shards and name not in (CONFIG, INDEX)]
            for name in (*rest, *(name for name in (CONFIG, INDEX) if name in source.stamps)):
                with Writer(folder, name) as writer:
                    _copy(reader, writer, name, source.stamps[name].size)
                    writer.finish()
            reader.check()

    def _value(self, stored: Stored) -> Tensor:
        """What a tensor is now, in its stored dtype."""
        original, place = self._mapped[stored.name], self._places.get(stored.name)
        if place is None:
            return original
        found = getattr(place.module, place.leaf).detach().cpu()[place.part]
        if found.shape != original.shape:
            raise ValueError(f"save_pretrained: {stored} is {list(found.shape)} in the model")
        if found.dtype == original.dtype:
            return found
        same = torch.equal(original.to(found.dtype), found)  # converted, and not changed since
        return original if same else found.to(original.dtype)


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(-1).view(torch.uint8).numpy().data if x.numel() else b""


def _copy(reader: Reader, writer: Writer, name: str, end: int) -> None:
    """A file from its beginning up to a byte."""
    buffer = memoryview(bytearray(min(_CHUNK, end)))
    for start in range(0, end, _CHUNK):
        part = buffer[: min(_CHUNK, end - start)]
        reader.read(name, start, part)
        writer.write(part)
