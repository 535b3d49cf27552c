"""Which prefixes can become rows of another program's cache of keys and values, and of which layers.

Such a cache knows keys and values at positions, and nothing else: every token of every layer attends to all of them,
and text starts after them. What needs more than that is refused with its reason.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from foreword.errors import MismatchError
from foreword.prefix import Prefix
from foreword.sites import sites


def check_cacheable(prefix: Prefix, program: str, instead: str) -> int:
    """The length of a prefix that keys and values in a cache can stand for.

    Args:
        program: whose cache, for the messages.
        instead: what to do with a prefix of another kind.

    Raises:
        MismatchError: it is another kind of prefix; the message says what it has that the program doesn't.
    """
    for has, what in (
        (prefix.parts, f"trained weights ({', '.join(str(p['method']) for p in prefix.parts)})"),
        (prefix.memory, "a memory beside the attention"),
        (prefix.bias or prefix.gates or prefix.readings, "gates, which weigh it against the text"),
        (prefix.log_weights, "merged tokens, which count more than once"),
        (prefix.visible.kind != "all", f"positions that don't see it (visible={prefix.visible.to_json()!r})"),
    ):
        if has:
            raise MismatchError(f"the prefix has {what}; {program}'s cache holds keys and values only. {instead}")
    lengths = {prefix.length(s.name) for s in prefix.sites}
    if len(lengths) != 1 or 0 in lengths:
        shown = ", ".join(map(str, sorted(lengths))) or "none"
        raise MismatchError(
            f"the prefix has {shown} tokens at its sites; {program}'s cache has one length for all layers"
        )
    length = lengths.pop()
    for site in prefix.sites:
        if site.kind != "self" or site.tower:
            raise MismatchError(
                f"{site.name} is {site.tower or site.kind} attention; {program} serves decoders' own only"
            )
        if site.sliding_window is not None:
            raise MismatchError(
                f"{site.name} has a sliding window of {site.sliding_window} tokens, and {program} would let it slide "
                f"past the prefix. {instead}"
            )
        if site.key_dim != site.value_dim:
            raise MismatchError(
                f"{site.name} has keys of {site.key_dim} and values of {site.value_dim} dimensions (latent attention), "
                f"which {program} caches in another form"
            )
        if site.calls != 1:
            raise MismatchError(
                f"{site.name} is called {site.calls} times in a pass; {program}'s cache has one place for it"
            )
        if prefix.position_offset != length and site.name not in prefix.rotations:
            raise MismatchError(
                f"the model has learned or relative positions, so the prefix can't be moved: {program} has its text "
                f"start at {length}, it was trained for {prefix.position_offset}. Train it with "
                f"position_offset={length}"
            )
    numbers = [layer_number(s.name) for s in prefix.sites]
    if len(set(numbers)) != len(numbers):
        raise MismatchError(f"two sites of the prefix are in one layer; {program}'s cache has one place for each")
    return length


def check_all_layers(prefix: Prefix, model: PreTrainedModel, program: str) -> None:
    """Make sure that a prefix is this model's, and has keys for each of its layers.

    Raises:
        MismatchError: says what differs.
    """
    found = sites(model)
    prefix.check_fits(model, found)
    own = [s for s in found if s.kind == "self" and not s.tower]
    if len(prefix.sites) != len(own):
        raise MismatchError(
            f"the prefix has keys for {len(prefix.sites)} of {len(own)} layers, and {program} has one length for all "
            "of them. Train a prefix for all layers (sites=None)"
        )


def for_cache(prefix: Prefix, length: int) -> Prefix:
    """A prefix in 32 bits whose keys stand at the positions 0 … length-1, so that its text starts after them."""
    return prefix.to(torch.float32).shift(length - prefix.position_offset)


def layer_number(name: str) -> int:
    """The one number in a dotted name, of a site or of another program's attention layer.

    Raises:
        MismatchError: there is none, or several.
    """
    numbers = [part for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise MismatchError(f"{name!r} doesn't say which layer it is; expected one number between dots")
    return int(numbers[0])
