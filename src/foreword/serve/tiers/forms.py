"""How the numbers of a prefix are held: as they are, or keys and values in few bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from foreword import _packing
from foreword.prefix import Prefix
from foreword.serve.tiers.files import Files, Mapped
from foreword.serve.tiers.sizes import packed_bytes
from foreword.storage import Storage


@dataclass(frozen=True, slots=True)
class Form:
    """The tensors of a prefix by name, and all else of it.

    Attributes:
        storage: how keys and values are packed; None: they are not.
        mapped: the file that the tensors lie in; None: they lie in memory.
    """

    tensors: Mapping[str, Tensor]
    outline: Mapping[str, Any]
    shapes: Mapping[str, Mapping[str, tuple[int, int, int]]]  # of keys and values, by site
    storage: Storage | None = None
    mapped: Mapped | None = field(default=None)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def size(self, storage: Storage | None, dtype: torch.dtype, *, most: int | None = None) -> int:
        """Bytes that it would have in another storage, its numbers in a dtype, with at most so many tokens a site."""
        total = 0
        for kind, shapes in self.shapes.items():
            cut = [(g, n if most is None else min(n, most), d) for g, n, d in shapes.values()]
            if storage is not None:
                total += packed_bytes(cut, storage.keys if kind == "keys" else storage.values)
            else:
                total += sum(map(math.prod, cut)) * dtype.itemsize
        for name, tensor in self.tensors.items():
            group = name.partition("/")[0]
            if group not in self.shapes and not name.startswith("packed."):
                count = tensor.numel() if most is None or group != "log_weights" else min(tensor.numel(), most)
                total += count * dtype.itemsize
        return total

    def prefix(self, device: torch.device, dtype: torch.dtype) -> Prefix:
        """The prefix in memory of its own, ready to be read by the model."""
        tensors = dict(self.tensors)
        if self.storage is not None:
            tensors = {n: t.cpu() for n, t in tensors.items()}
            for kind in ("keys", "values"):
                states = _packing.unpack(tensors, kind, getattr(self.storage, kind), self.shapes[kind])
                tensors |= {f"{kind}/{name.removesuffix('.' + kind)}": t for name, t in states.items()}
        groups = _grouped({n: t.to(device, dtype, copy=True) for n, t in tensors.items()})
        if self.mapped is not None:
            self.mapped.let_go()
        fields_of: dict[str, Any] = {
            **self.outline,
            **{g: {n: own[n] for n in _order(self, g, own)} for g, own in groups.items()},
        }
        return Prefix(**fields_of)

    def in_memory(self, device: torch.device | str, *, pinned: bool = False) -> Form:
        """The same in memory on a device (no copy of what is there); ``pinned``: in pages that a GPU can read."""

        def copied(tensor: Tensor) -> Tensor:
            new = tensor.to(device, copy=self.mapped is not None)
            return new.pin_memory() if pinned else new

        return replace(self, tensors={n: copied(t) for n, t in self.tensors.items()}, mapped=None)

    def in_file(self, files: Files) -> Form:
        """The same in a file. Raises OSError if it can't be written."""
        mapped = files.write(self.tensors)
        return replace(self, tensors=mapped.tensors, mapped=mapped)

    def packed(self, storage: Storage) -> Form:
        """Keys and values in few bits, in CPU memory.

        Raises:
            ConfigError: numbers that few bits can't hold.
        """
        assert self.storage is None
        groups = _grouped(self.tensors)
        tensors = {n: t.cpu() for n, t in self.tensors.items() if n.partition("/")[0] not in ("keys", "values")}
        for kind in ("keys", "values"):
            tensors |= _packing.pack(groups.get(kind, {}), kind, getattr(storage, kind))
        return replace(self, tensors=tensors, storage=storage, mapped=None)


def plain(prefix: Prefix, change: Callable[[Tensor], Tensor] | None = None) -> Form:
    """A prefix's own tensors, or changed ones, as a form."""
    groups = prefix._groups()
    tensors = {f"{g}/{n}": change(t) if change else t for g, own in groups.items() for n, t in own.items()}
    outline = {f.name: getattr(prefix, f.name) for f in fields(Prefix) if f.name not in groups}
    shapes = {
        kind: {n: (t.shape[0], t.shape[1], t.shape[2]) for n, t in groups[kind].items()} for kind in ("keys", "values")
    }
    return Form(tensors, outline, shapes)


def prefix_bytes(prefix: Prefix, *, storage: Storage | str | None = None, dtype: torch.dtype | None = None) -> int:
    """Bytes that a library holds of a prefix, known before it is added.

    Args:
        storage: keys and values in few bits, also ``"int8"`` or ``"int4"``; None: as numbers.
        dtype: the model's; None: the prefix's own.
    """
    chosen = Storage.of(storage) if isinstance(storage, str) else storage
    own = dtype or next((t.dtype for t in prefix.keys.values()), torch.float32)
    return plain(prefix).size(None if chosen is None or chosen.plain else chosen, own)


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By group (``keys``, ``values``, ``bias``, …) and name within it."""
    found: dict[str, dict[str, Tensor]] = {"keys": {}, "values": {}}
    for name, tensor in tensors.items():
        group, _, own = name.partition("/")
        found.setdefault(group, {})[own] = tensor
    return found


def _order(form: Form, group: str, own: Mapping[str, Tensor]) -> list[str]:
    """Sites in the order that they had."""
    return list(form.shapes[group]) if group in form.shapes else list(own)
