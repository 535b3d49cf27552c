"""How much of the attention a prefix gets: at each site, head and position of a text.

The share is the weight of the virtual tokens in the joint softmax, ``alpha = exp(l2 - l)`` with the log-sum-exps of
``foreword.attention``. It falls as the text grows (dilution), and tells which layers use the prefix at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword import _interface
from foreword._holder import SiteSlot
from foreword._masks import additive, causal_mask, is_causal
from foreword._views import BatchPrefix
from foreword.errors import AttachError

_T = TypeVar("_T")
# What is read off an attention call: of the prefix, queries, keys, mask, whether it is causal without one, arguments.
Measure = Callable[[BatchPrefix, Tensor, Tensor, Any, bool, Mapping[str, Any]], _T]


def attention_shares(model: PreTrainedModel, **inputs: Any) -> dict[str, Tensor]:
    """The prefix's share of attention in one forward pass, by site name: ``(B, H, S)``, float32 on the CPU.

    NaN where a zero-initialised gate keeps the softmaxes apart: there is no share then.

    Args:
        inputs: of the model's call.

    Raises:
        AttachError: nothing with virtual tokens is attached.
    """
    with measured_shares(model) as found, torch.no_grad():
        model(**inputs)
    return dict(found)


@contextmanager
def measured_shares(model: PreTrainedModel, *, by_token: bool = False) -> Iterator[Mapping[str, Tensor]]:
    """Inside the block, every pass of the model fills the mapping with its shares, by site name.

    Args:
        by_token: each virtual token's share apart, ``(B, H, S, P)``; behind a zero-initialised gate, the weight that
            its value comes in with.
    """
    found: dict[str, Tensor] = {}
    with measured(model, partial(share, by_token=by_token), found.__setitem__):
        yield found


@contextmanager
def measured(model: PreTrainedModel, measure: Measure[_T], tell: Callable[[str, _T], None]) -> Iterator[None]:
    """Inside the block, ``tell`` is given what ``measure`` reads at each call of a prefixed site, by its name.

    Read are the passes of this thread.
    """
    slots = {m: slot for m in model.modules() if isinstance(slot := _interface.slot_of(m), SiteSlot | _Measuring)}
    if not slots:
        raise AttachError("no prefix stands on this model, so none has a share of its attention; attach one first")
    with _interface.slots_over({module: _Measuring(slot, measure, tell) for module, slot in slots.items()}):
        yield


@dataclass(frozen=True)
class _Measuring(_interface.Slot):
    """A slot that looks before it does what it did."""

    slot: SiteSlot | _Measuring
    measure: Measure[Any]
    tell: Callable[[str, Any], None]

    @property
    def site(self) -> SiteSlot:
        """The slot that is looked at."""
        return self.slot if isinstance(self.slot, SiteSlot) else self.slot.site

    def __call__(
        self, delegate: _interface.Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor,
        value: Tensor, attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        source, name = self.site.source, self.site.name
        prefix = source.view(name)
        if prefix is not None and prefix.length:
            seen = None if prefix.seen_by is None else source.seen(name, prefix, query)
            with torch.no_grad():
                here = prefix.for_batch(query, seen)
                causal = delegate_name != "eager" and is_causal(module, query, attention_mask, kwargs)
                self.tell(name, self.measure(here, query, key, attention_mask, causal, kwargs))
        return self.slot(delegate, delegate_name, module, query, key, value, attention_mask, **kwargs)


def share(
    prefix: BatchPrefix,
    query: Tensor,
    key: Tensor,
    mask: Any,
    causal: bool,
    kwargs: Mapping[str, Any],
    *,
    by_token: bool = False,
) -> Tensor:
    """``exp(l2 - logaddexp(l1, l2))``, ``(B, H, S)``; of each token with score s ``exp(s - ...)``, ``(B, H, S, P)``."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    before = _scores(query.float(), prefix.keys.float(), scale, kwargs)
    if prefix.visible is not None:
        hidden = additive(prefix.visible[:, None, None, :], before.dtype)
        assert hidden is not None
        before = before + hidden
    if prefix.bias is not None:
        before = before + prefix.bias
    _, other = text_scores(query, key, mask, causal, kwargs)
    own = before.logsumexp(-1)
    joint = torch.logaddexp(own, other)
    found = torch.exp(before - joint[..., None] if by_token else own - joint).nan_to_num(0.0)
    if prefix.gate is None:
        return found.cpu()
    # Rows whose softmax stands apart: all that have a token, or, in a mixed batch, those that a bias keeps out.
    apart = own > -torch.inf if prefix.bias is None else (own == -torch.inf) & (prefix.gate.squeeze(-1) != 0)
    if not by_token:
        return found.masked_fill(apart, torch.nan).cpu()
    weights = torch.softmax(before, -1).nan_to_num(0.0) * prefix.gate.abs()
    return torch.where(apart[..., None], weights, found).cpu()


def text_scores(
    query: Tensor, key: Tensor, mask: Any, causal: bool, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The scores of the text's keys ``(B, H, S, N)``, -inf where hidden, and their log-sum-exp ``(B, H, S)``.

    Learned logits that take attention and give nothing (``s_aux``) are in the log-sum-exp.
    """
    query, key = query.float(), key.float()
    if causal:
        key = key[:, :, : query.shape[2]]  # the rest of a static cache is empty
        mask = causal_mask(query)
    text = _scores(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs)
    if (bias := kwargs.get("position_bias")) is not None:
        text = text + bias
    if isinstance(mask, Tensor) and mask.dim() == 4:
        numbers = additive(mask, text.dtype)
        assert numbers is not None
        text = text + numbers[..., : text.shape[-1]]
    total = text.logsumexp(-1)
    if (sinks := kwargs.get("s_aux")) is not None:
        total = torch.logaddexp(total, sinks.float().view(1, -1, 1).expand_as(total))
    if (sinks := kwargs.get("sinks")) is not None:  # per query: (B, H, S, 1)
        total = torch.logaddexp(total, sinks.float().squeeze(-1).expand_as(total))
    return text, total


def _scores(query: Tensor, key: Tensor, scale: float, kwargs: Mapping[str, Any]) -> Tensor:
    """``(B, H, S, N)``, each head by its group's keys."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    cap = kwargs.get("softcap")
    return scores if cap is None else cap * torch.tanh(scores / cap)
