"""A prefix of a model with a head, for its backbone alone, and the other way round: the same sites by other names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from foreword.fingerprint import Fingerprint, shape_differences
from foreword.prefix import Prefix
from foreword.sites import Site

_BY_SITE = ("keys", "values", "bias", "gates", "readings", "memory", "memory_up", "log_weights", "rotations")


def fitted(prefix: Prefix, model: PreTrainedModel, found: Sequence[Site]) -> Prefix:
    """The prefix under the model's names, where only the backbone's name stands before them or is missing.

    That is so if all sites fit in shape under the other names, and every number of the weights that the prefix
    remembers is found, and the same, under them too. Otherwise it is returned as it is.
    """
    if not prefix.sites or prefix.parts or not shape_differences(prefix.sites, found):
        return prefix
    start = f"{model.base_model_prefix}."
    for rename in (lambda n: f"{start}{n}", lambda n: n.removeprefix(start)):
        other = _renamed(prefix, rename)
        if not shape_differences(other.sites, found) and _same_weights(other.fingerprint, model):
            return other
    return prefix


def _same_weights(mine: Fingerprint, model: PreTrainedModel) -> bool:
    theirs = Fingerprint.of(model, mine.weights)
    known = mine.weights.keys() & theirs.weights.keys()
    return bool(mine.weights) and known == mine.weights.keys() and mine.difference(theirs) is None


def _renamed(prefix: Prefix, rename: Callable[[str], str]) -> Prefix:
    groups: dict[str, Any] = {g: {rename(n): t for n, t in getattr(prefix, g).items()} for g in _BY_SITE}
    sites = [replace(s, name=rename(s.name)) for s in prefix.sites]
    weights = {rename(n): numbers for n, numbers in prefix.fingerprint.weights.items()}
    return replace(prefix, sites=sites, fingerprint=replace(prefix.fingerprint, weights=weights), **groups)
