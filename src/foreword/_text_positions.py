"""Where the text of each row starts, told to the model where it would count otherwise.

A prefix stands right before its text. So the first real token of a row has to have the position that the prefix was
made for (``position_offset``, 0 unless it was chosen), however many padding tokens stand before it. Rotary models don't
say so by themselves: their own output is the same wherever a row starts, so nobody gives them positions outside
``generate``.

The positions are those that the innermost stack of layers uses: what a model has made for itself there, such as the
three coordinates of pictures, is moved as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from foreword._memo import current
from foreword._stacks import bound, positioned_stacks, takes
from foreword.sites import Site


class _Still(threading.local):
    on = False


_still = _Still()


@contextmanager
def as_called() -> Iterator[None]:
    """Inside the block, texts start where the model itself has them: for passes that make a prefix."""
    before, _still.on = _still.on, True
    try:
        yield
    finally:
        _still.on = before


class TextPositions:
    """Has the text of each row start at an offset, in every stack of layers around some sites.

    Args:
        offset: the position of a row's first token.
        counted: whether positions are counted over real tokens where none are given, also without an offset: for models
            whose own output doesn't depend on where a row starts.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], *, offset: int, counted: bool) -> None:
        self.model = model
        self.offset = offset
        self.counted = counted
        self.stacks = positioned_stacks(model, sites) if offset or counted else []
        self.handles: list[Any] = []

    def install(self) -> None:
        """Watch the model's calls."""
        if not self.stacks:
            return
        one_text = not self.model.config.is_encoder_decoder  # else the mask of a call is the encoder's
        for module in self.model.modules():
            if module in self.stacks:
                self.handles.append(module.register_forward_pre_hook(self._move, with_kwargs=True))
            elif one_text and isinstance(module, PreTrainedModel) and takes(module, "attention_mask"):
                self.handles.append(module.register_forward_pre_hook(self._note, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the padding mask of a model that hands its stack a mask of another form."""
        if is_compiling():
            return
        mask = bound(module, args, kwargs).get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.dim() == 2
        if padded or current.depth <= 1:
            current.padding = mask if padded else None

    def _move(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if _still.on:
            return None
        given = bound(module, args, kwargs)
        positions = given.get("position_ids")
        if positions is None:
            mask = given.get("attention_mask")
            if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
                mask = current.padding
            if not self.offset and (mask is None or (not is_compiling() and bool(mask[:, 0].all()))):
                return None  # all rows start at once: one set of positions for all
            positions = default_positions(given, mask)
            if positions is None:
                return None
        elif not self.offset:
            return None
        return (), {**given, "position_ids": positions + self.offset if self.offset else positions}


def default_positions(given: dict[str, Any], mask: Any) -> Tensor | None:
    """Positions of the tokens of one call, from 0, counted over real tokens as generation does: ``(B|1, S)``.

    Args:
        given: the call's arguments.
        mask: ``(B, past + S)``, 1 where a token is real; anything else: all are.
    """
    inputs = given.get("input_ids")
    inputs = inputs if inputs is not None else given.get("inputs_embeds")
    if inputs is None:
        return None
    length, cache = inputs.shape[1], given.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return counted[:, -length:] if mask.shape[1] <= past + length else counted[:, past : past + length]
    return (torch.arange(length, device=inputs.device) + past)[None]


@contextmanager
def placed(stacks: Sequence[PreTrainedModel], starts: Sequence[int] | None) -> Iterator[None]:
    """Inside the block and in its thread, row i of every batch starts at ``starts[i]`` in these stacks.

    None: as they have it.
    """
    thread = threading.get_ident()

    def place(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None
        given = bound(module, args, kwargs)
        inputs = given.get("input_ids")
        inputs = inputs if inputs is not None else given["inputs_embeds"]
        first = torch.tensor(starts, device=inputs.device)[:, None]
        return (), {**given, "position_ids": first + torch.arange(inputs.shape[1], device=inputs.device)}

    hook: Callable[..., Any] = place
    handles = [s.register_forward_pre_hook(hook, with_kwargs=True) for s in stacks] if starts is not None else []
    try:
        with as_called():
            yield
    finally:
        for handle in handles:
            handle.remove()
