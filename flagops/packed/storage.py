"""The tensors of a checkpoint where they lie in its files: mapped, so that a page is in memory once it is used.

A mapping is private: who writes to a tensor writes to a page of this process, never to the file. A file that becomes
shorter under a mapping ends the process (SIGBUS), as with every mapping.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch

from flagops.checkpoint import Refused, documents
from flagops.checkpoint.source import Source, Stored

DTYPES: dict[str, Any] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F4": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""What arrays have; two elements of F4 are a byte."""


class Mapped:
    """Tensors of a source by name, each made once, on the bytes of its file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._files: dict[str, mmap.mmap] = {}
        self._made: dict[str, torch.Tensor] = {}
        self._spans: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = self._tensor(self.source.tensors[name])
        return found

    def where(self, x: torch.Tensor) -> tuple[str, int] | None:
        """The file and the offset at which a contiguous part of a mapped tensor lies; None where it is a copy."""
        address = x.data_ptr()
        for file, (start, size) in self._spans.items():
            if start <= address < start + size:
                return file, address - start
        return None

    def at(self, file: str, offset: int) -> Stored:
        """The tensor that lies at a place of a file."""
        return next(x for x in self.source.tensors.values() if x.file == file and 0 <= offset - x.offset < x.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mapped:
        return self

    def __reduce__(self) -> Any:
        return _again, (str(self.source.folder),)

    def forget(self, name: str) -> None:
        """Let the pages of a tensor go that lie in no other's; what has been written to them is lost."""
        stored = self.source.tensors[name]
        page = mmap.PAGESIZE
        first, last = -(-stored.offset // page) * page, (stored.offset + stored.size) // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._file(stored.file).madvise(mmap.MADV_DONTNEED, first, last - first)

    def _tensor(self, stored: Stored) -> torch.Tensor:
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise Refused(f"{stored} is of a dtype that tensors lack here; convert the checkpoint first")
        shape = stored.shape
        if stored.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        if not stored.size:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self._file(stored.file), dtype=torch.uint8, offset=stored.offset, count=stored.size)
        if stored.offset % dtype.itemsize:  # kernels read whole words
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def _file(self, name: str) -> mmap.mmap:
        if name not in self._files:
            path = self.source.path(name)
            handle = documents.regular(path)
            try:
                if documents.stamp(os.fstat(handle)) != self.source.stamps[name]:
                    raise Refused(f"{path} has changed since its header was read; load it when nothing writes there")
                found = self._files[name] = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
                self._spans[name] = torch.frombuffer(found, dtype=torch.uint8).data_ptr(), len(found)
            finally:
                os.close(handle)
        return self._files[name]


def _again(folder: str) -> Mapped:
    return Mapped(Source(folder))
