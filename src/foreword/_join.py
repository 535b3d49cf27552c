"""Two prefixes as one: what :meth:`Prefix.join` does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foreword.errors import MismatchError

if TYPE_CHECKING:
    from foreword.prefix import Prefix


def join(first: Prefix, second: Prefix) -> Prefix:
    """The tokens of both; the first's keys move back to stand before the second's."""
    for prefix in (first, second):
        prefix._check_whole("joined")
    if list(first.keys) != list(second.keys):
        raise MismatchError("the two prefixes stand at different attention sites; join needs the same ones")
    if first.position_offset != second.position_offset:
        raise MismatchError(
            f"the two prefixes expect text at positions {first.position_offset} and {second.position_offset}; "
            "shift one of them first"
        )
    if any(p.bias or p.gates or p.readings for p in (first, second)):
        raise MismatchError("prefixes with gates or weights per head can't be joined: the gates differ by token")
    if first.visible != second.visible:
        raise MismatchError("the two prefixes are seen by different positions, so they can't become one")
    if any(p.memory or p.parts for p in (first, second)):
        raise MismatchError("prefixes with a memory or trained weights can't be joined; attach them as a list")
    for name, rotation in first.rotations.items():
        if name not in second.rotations or not rotation.equals(second.rotations[name]):
            raise MismatchError(f"the two prefixes rotate differently at {name}: they are of different models")

    def moved(name: str) -> Tensor:
        rotation = first.rotations.get(name)
        keys = first.keys[name]
        return keys if rotation is None else rotation(keys, -second.keys[name].shape[1])

    return replace(
        first,
        keys={n: torch.cat([moved(n), second.keys[n].to(first.keys[n])], dim=1) for n in first.keys},
        values={n: torch.cat([v, second.values[n].to(v)], dim=1) for n, v in first.values.items()},
        log_weights={
            n: torch.cat([_log_weights(first, n), _log_weights(second, n)])
            for n in first.keys
            if n in first.log_weights or n in second.log_weights
        },
    )


def _log_weights(prefix: Prefix, site: str) -> Tensor:
    found = prefix.log_weights.get(site)
    return found if found is not None else torch.zeros(prefix.length(site), device=prefix.keys[site].device)
