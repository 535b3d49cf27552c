"""Tensors in files of our own, mapped into memory: no byte of them is read before it is used.

They are ours, because a file that somebody else shortens while it is mapped ends the process.
"""

from __future__ import annotations

import json
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class Files:
    """A folder that is there while something needs it.

    Args:
        parent: of the folder; None: the system's for temporary files.
    """

    def __init__(self, parent: str | Path | None) -> None:
        self._parent = Path(parent) if parent is not None else None
        self._folder: Path | None = None
        self._made = 0
        self.nbytes = self.most = 0

    def write(self, tensors: Mapping[str, Tensor]) -> Mapped:
        """Write tensors to a new file, and map it.

        Raises:
            OSError: it can't be written; nothing is left of it then.
        """
        folder = self._there()
        self._made += 1
        path = folder / f"{self._made}.safetensors"
        staged = path.with_suffix(".part")
        try:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, staged)
            staged.replace(path)
        except SafetensorError as exc:
            raise OSError(f"{path} can't be written: {exc}") from exc
        finally:
            staged.unlink(missing_ok=True)
        mapped = Mapped(path, tensors)
        self.nbytes += mapped.nbytes
        self.most = max(self.most, self.nbytes)
        return mapped

    def remove(self, mapped: Mapped) -> None:
        """The file goes now; who has its tensors still can read them."""
        self.nbytes -= mapped.nbytes
        mapped.path.unlink(missing_ok=True)

    def close(self) -> None:
        """The folder goes with all that is in it."""
        if self._folder is not None:
            self._end()
            self._folder = None

    def _there(self) -> Path:
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="foreword-tier-", dir=self._parent))
            self._end = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # also at exit
        return self._folder


class Mapped:
    """Tensors of a file. They may be read, and mustn't be written to."""

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        self.path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            places = json.loads(file.read(size))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in like.items():
            if not tensor.numel():  # a buffer of no bytes can't be mapped
                self.tensors[name] = torch.empty_like(tensor, device="cpu")
                continue
            start = 8 + size + places[name]["data_offsets"][0]
            flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            self.tensors[name] = flat.view(tensor.shape)
        self.nbytes = sum(t.numel() * t.element_size() for t in self.tensors.values())

    def let_go(self) -> None:
        """Give the pages that were read back to the system; they are read again when they are needed."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
