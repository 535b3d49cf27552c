"""Prefixes that are made without training: of a text, or of keys and values from elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from foreword._prompted import check_text
from foreword._wrapped import unwrapped
from foreword.errors import InexactWarning, MismatchError
from foreword.fingerprint import Fingerprint
from foreword.initializers import ids_of_text, text_states
from foreword.positions import find_rotations
from foreword.prefix import Prefix
from foreword.sites import sites as find_sites
from foreword.tuning import require_detached, tuning_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST = 2000  # characters of a text that are kept with its prefix


def from_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int | None, position_offset: int
) -> Prefix:
    """What :meth:`Prefix.from_text` returns."""
    model = unwrapped(model)
    if tuning_of(model) is not None:  # a Library may stay: the text is read without its prefixes
        require_detached(model)
    chosen = [s for s in find_sites(model) if not s.tower]
    rotations = find_rotations(model, chosen)
    ids = ids_of_text(model, tokenizer, text, length)
    if inexact := check_text(model, chosen, rotations, ids, position_offset):
        warnings.warn(f"a prefix of this text only resembles it: {inexact}", InexactWarning, stacklevel=3)
    states = text_states(model, ids, chosen, position_offset, rotations)
    return Prefix(
        {n: k for n, (k, _) in states.items()},
        {n: v for n, (_, v) in states.items()},
        chosen,
        position_offset,
        rotations,
        fingerprint=Fingerprint.of(model),
        metadata={"text": text if len(text) <= _MOST else f"{text[:_MOST]}…"},
    )


def from_tensors(
    model: PreTrainedModel,
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    position_offset: int,
    example_inputs: Mapping[str, Any] | None,
) -> Prefix:
    """What :meth:`Prefix.from_tensors` returns."""
    model = unwrapped(model)
    found = {s.name: s for s in find_sites(model, example_inputs)}
    for name in tensors:
        if name not in found:
            raise MismatchError(f"the model has no attention site {name!r}; its sites: {', '.join(found)}")
    chosen = [s for s in found.values() if s.name in tensors]
    return Prefix(
        {n: k.detach() for n, (k, _) in tensors.items()},
        {n: v.detach() for n, (_, v) in tensors.items()},
        chosen,
        position_offset,
        find_rotations(model, chosen),
        fingerprint=Fingerprint.of(model),
    )
