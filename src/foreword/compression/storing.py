"""The same tokens in fewer bytes: 8 or 4 bits, two factors, half precision.

Each function gives the prefix as its file will give it back, so what is measured is what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from foreword import _packing
from foreword.errors import ConfigError
from foreword.prefix import Prefix
from foreword.storage import Packing, Storage


def as_stored(prefix: Prefix, storage: Storage) -> Prefix:
    """The prefix with the keys and values that a file of this storage gives back, and with that storage.

    Raises:
        ConfigError: numbers that the storage can't hold.
    """

    def read_back(states: Mapping[str, Tensor], kind: str, packing: Packing) -> dict[str, Tensor]:
        tensors = _packing.pack(states, kind, packing)
        shapes = {name: (t.shape[0], t.shape[1], t.shape[2]) for name, t in states.items()}
        tensors |= _packing.unpack(dict(tensors), kind, packing, shapes)
        return {name: tensors[f"{name}.{kind}"].to(t.device) for name, t in states.items()}

    keys, values = read_back(prefix.keys, "keys", storage.keys), read_back(prefix.values, "values", storage.values)
    return replace(prefix, keys=keys, values=values, storage=storage)


def quantize(prefix: Prefix, keys: str = "int8", values: str | None = None) -> Prefix:
    """Keys and values in few bits: ``"int8"``, ``"int4"``, ``"plain"``; ``"int4:token"`` says what shares a scale.

    Args:
        values: as the keys if None.

    Raises:
        ConfigError: another form, or numbers that few bits can't hold.
    """
    return as_stored(prefix, Storage.of(keys, values))


def low_rank(prefix: Prefix, keys: int | None = None, values: int | None = None) -> Prefix:
    """Each site's keys and values of these ranks at most, stored as two factors where that takes fewer bytes.

    A site's heads share the factors: with P tokens, G heads and d dimensions ``r (P + G d)`` numbers instead of
    ``P G d``. A rank that saves nothing leaves the site as it is.

    Args:
        keys, values: the rank; None: as they are stored.

    Raises:
        ConfigError: a rank below 1.
    """
    packings = (Packing(rank=rank) if rank is not None else None for rank in (keys, values))
    of_keys, of_values = packings
    return as_stored(prefix, Storage(of_keys or prefix.storage.keys, of_values or prefix.storage.values))


def halve(prefix: Prefix) -> Prefix:
    """Everything in float16, in memory as well.

    Raises:
        ConfigError: numbers that float16 can't hold.
    """
    half = prefix.to(torch.float16)
    for name, group in half._groups().items():
        if odd := next((site for site, t in group.items() if not t.isfinite().all()), None):
            raise ConfigError(f"{odd}: the {name} have numbers above 65504, which float16 can't hold; use bfloat16")
    return replace(half, storage=Storage())
