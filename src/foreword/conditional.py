"""Prefixes that depend on the example: an encoder that reads a condition vector, kept as it is.

``P[i] = start[i] + MLP(P'[i] + W c)`` for a vector c a row: the features of a picture (ClipCap, arXiv 2111.09734), of a
user, of a retrieved text. Baking can't throw such an encoder away, so the artefact holds it: the start as its keys and
values, and a *part* named ``condition`` with the encoder's own numbers. ``Prefix.given`` makes a plain prefix of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreword._given import Given
from foreword.encoders import MLP, Start, States
from foreword.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from foreword.prefix import Prefix

METHOD = "condition"
_FIELDS = ("groups", "depth", "hidden", "freeze_first", "dropout", "share_layers", "condition")


def record_of(encoder: MLP) -> dict[str, Any]:
    """The part's record, as JSON has it."""
    fields = {
        "groups": encoder.groups,
        "depth": (len(encoder.nets[0]) + 1) // 2,  # type: ignore[arg-type]
        "hidden": encoder.embeddings[0].shape[-1],
        "freeze_first": encoder.freeze_first,
        "dropout": encoder.dropout,
        "share_layers": len(encoder.layers) > 0,
        "condition": encoder.condition,
    }
    return {"method": METHOD, **fields}


def weights_of(encoder: MLP) -> dict[str, Tensor]:
    """The encoder's own numbers, by ``condition/<name>``."""
    return {f"{METHOD}/{name}": p.detach().clone() for name, p in encoder.named_parameters()}


def part_of(prefix: Prefix) -> Mapping[str, Any] | None:
    """The record of a prefix's encoder; None for one that is the same for all rows."""
    return next((p for p in prefix.parts if p["method"] == METHOD), None)


def plain_prefixes(folders: Sequence[Path]) -> list[Prefix]:
    """The prefixes in these folders, for a command line. Raises ConfigError for one that depends on a condition."""
    from foreword.prefix import Prefix

    found = [Prefix.load(folder) for folder in folders]
    for prefix, folder in zip(found, folders, strict=True):
        if part_of(prefix) is not None:
            raise ConfigError(
                f"{folder} depends on a condition vector, which has no place on a command line; make a plain prefix of "
                "one in Python, fw.Prefix.load(...).given(vector).save(...), and use that"
            )
    return found


def encoder_of(prefix: Prefix) -> MLP:
    """The encoder of a conditional prefix, in float32.

    Raises:
        MismatchError: its record, start and numbers don't belong together.
    """
    record = part_of(prefix)
    assert record is not None
    start: Start = {
        s.name: (prefix.keys[s.name].float().cpu(), prefix.values[s.name].float().cpu())
        for s in prefix.sites
        if prefix.length(s.name)
    }
    own = {n.removeprefix(f"{METHOD}/"): t for n, t in prefix.weights.items() if n.startswith(f"{METHOD}/")}
    try:
        read = own["read.weight"].shape
        if read != (record["hidden"], record["condition"]) or record["depth"] not in (2, 3):
            raise ValueError(f"W is {tuple(read)}, and the record says {record['hidden']} by {record['condition']}")
        if sorted(i for g in record["groups"] for i in g) != list(range(len(start))):
            raise ValueError("its groups aren't the sites")
        with torch.random.fork_rng(devices=[]):
            encoder = MLP(start, **{name: record[name] for name in _FIELDS})
        found = dict(encoder.named_parameters())
        if own.keys() != found.keys() or any(own[n].shape != p.shape for n, p in found.items()):
            odd = next((n for n in own if n not in found or own[n].shape != found[n].shape), "one")
            raise ValueError(f"{odd} is missing or of another shape")
    except (KeyError, TypeError, ValueError, IndexError) as exc:
        raise MismatchError(f"the encoder of this conditional prefix is damaged: {exc}; save it again") from exc
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(own[name])
    return encoder


@torch.no_grad()
def given(prefix: Prefix, condition: Any) -> Prefix:
    """The plain prefix that a conditional one makes of one vector ``(C,)``, in the start's dtype."""
    encoder = encoder_of(prefix).eval()
    vector = Given().read(encoder, (), condition, None)
    if len(vector) != 1:
        raise MismatchError(f"one prefix is made of one vector, and {len(vector)} were given; call given() for each")
    states: States = {n: (k[0], v[0]) for n, (k, v) in encoder(vector.float().cpu()).items()}
    for site in prefix.sites:  # those with a memory only have no keys
        states.setdefault(site.name, (prefix.keys[site.name], prefix.values[site.name]))
    return replace(
        prefix,
        keys={n: states[n][0].to(k) for n, k in prefix.keys.items()},
        values={n: states[n][1].to(v) for n, v in prefix.values.items()},
        parts=[p for p in prefix.parts if p["method"] != METHOD],
        weights={n: t for n, t in prefix.weights.items() if not n.startswith(f"{METHOD}/")},
    )
