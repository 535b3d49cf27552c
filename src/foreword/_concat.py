"""The reference path: the model's own attention over keys and values that begin with the prefix.

Works with every delegate. Its mask and position bias are extended by the prefix's columns.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.integrations.flex_attention import flex_attention_forward

from foreword._interface import Delegate, is_flash, is_sdpa
from foreword._masks import additive, causal_mask, extend_mask, is_causal
from foreword.errors import AttachError

if TYPE_CHECKING:
    from foreword._views import BatchPrefix

# Arguments by which a function picks the keys that it reads, by their numbers.
_SELECTING = ("indices", "block_indices", "block_table")

_honouring: weakref.WeakSet[Any] = weakref.WeakSet()  # functions of others that were seen to honour masks


def concatenate(
    prefix: BatchPrefix,
    delegate: Delegate,
    delegate_name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The reference path: the delegate over keys and values that begin with the prefix."""
    bias = kwargs.get("position_bias")
    sdpa, flash = is_sdpa(delegate), is_flash(delegate_name)
    on_cpu = sdpa and query.is_cpu and bias is None
    if not sdpa and (by := next((n for n in _SELECTING if kwargs.get(n) is not None), None)):
        raise AttachError(
            f"{type(module).__name__} has {delegate_name!r} choose keys by number ({by}), and a prefix before them "
            "would change every number; load the model with attn_implementation='sdpa' or 'eager'"
        )
    if flash:
        _check_flash(prefix, key, attention_mask, kwargs)
    elif attention_mask is None and is_causal(module, query, None, kwargs) and delegate_name != "eager":
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        attention_mask = causal_mask(query)
        if not sdpa and delegate is not flex_attention_forward:
            prove_masks(delegate, delegate_name, module, query, key, value, attention_mask, kwargs)
    if attention_mask is None and (prefix.visible is not None or prefix.bias is not None):
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        counts = prefix.visible is not None and prefix.visible.dtype != torch.bool
        wants_numbers = on_cpu or counts or delegate_name == "eager"
        if wants_numbers and isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
        attention_mask = _extend(attention_mask, prefix, query)
    if bias is not None:  # distance means nothing to a virtual token
        kwargs["position_bias"] = torch.nn.functional.pad(bias, (prefix.length, 0))
    key, value = _join(prefix, key.to(query.dtype), value.to(query.dtype))
    if on_cpu and query.shape[1] != key.shape[1] and kwargs.get("softcap") is None:
        return _grouped_sdpa(query, key, value, attention_mask, kwargs), None
    if not flash:
        kwargs["is_causal"] = False  # the mask says it all, or there was nothing to hide
    return delegate(module, query, key, value, attention_mask, **kwargs)


def prove_masks(
    delegate: Delegate, name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
    kwargs: dict[str, Any],
) -> None:  # fmt: skip
    """Make sure, once per function, that a delegate which is not transformers' own honours a mask.

    Without one it was causal by itself; with a prefix before the text, a mask has to say so. A text whose first token
    is hidden by a mask must give what the rest of the text gives without one.

    Args:
        mask: ``(1, 1, S, S)`` bool, causal; S is 2 or more.

    Raises:
        AttachError: it gives something else.
    """
    if is_compiling() or _has(_honouring, delegate):
        return
    hidden = mask.clone()
    hidden[..., 1:, 0] = False
    with torch.no_grad():
        masked = delegate(module, query, key, value, hidden, **{**kwargs, "is_causal": False})[0][:, 1:].float()
        plain = delegate(module, query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], None, **kwargs)[0].float()
    off = float((plain - masked).abs().max() / plain.abs().max().clamp(min=1e-30))
    if not off <= 64 * torch.finfo(query.dtype).eps:
        raise AttachError(
            f"the attention function {name!r} gives another output where a mask hides a token than without that token "
            f"(off by {off:.2g} of its size), so a prefix can't be placed before the text with it. Expected a function "
            "that honours attention_mask and is_causal; load the model with attn_implementation='sdpa'"
        )
    with suppress(TypeError):  # neither hashable nor weakly referable: proved again each time
        _honouring.add(delegate)


def _has(functions: weakref.WeakSet[Any], delegate: Delegate) -> bool:
    try:
        return delegate in functions
    except TypeError:
        return False


def _join(prefix: BatchPrefix, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that begin with the prefix's: ``(B, G, P + N, dim)`` each."""
    batch = key.shape[0]
    before, before_values = prefix.keys.expand(batch, -1, -1, -1), prefix.values.expand(batch, -1, -1, -1)
    return torch.cat((before, key), dim=2), torch.cat((before_values, value), dim=2)


def _grouped_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """What the sdpa delegate computes, without the copies of keys and values that it makes for grouped heads.

    The CPU kernel takes grouped heads as they are, also under a mask. A single query's heads of one group become
    the rows of one product, so that their keys are read once.
    """
    attention, scale = torch.nn.functional.scaled_dot_product_attention, kwargs.get("scaling")
    dropout = kwargs.get("dropout") or 0.0
    batch, heads, queries, _ = query.shape
    if queries == 1 and (mask is None or mask.shape[1] == 1):
        out = attention(query.reshape(batch, key.shape[1], -1, query.shape[3]), key, value, mask, dropout, scale=scale)
        return out.reshape(batch, 1, heads, value.shape[3])
    out = attention(query, key, value, mask, dropout, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def _extend(mask: Any, prefix: BatchPrefix, query: Tensor) -> Any:
    if not isinstance(mask, Tensor):  # flex attention's BlockMask
        return _extend_block_mask(mask, prefix, query)
    if mask.dim() == 2:  # flash: (B, N), 1 where a token is real
        return torch.nn.functional.pad(mask, (prefix.length, 0), value=1)
    if mask.shape[2] == 1 and query.shape[2] > 1:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return extend_mask(mask, prefix.length, prefix.visible, prefix.bias)


def _extend_block_mask(mask: Any, prefix: BatchPrefix, query: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if prefix.bias is not None or (prefix.visible is not None and prefix.visible.dtype != torch.bool):
        raise AttachError(
            "flex_attention cannot weigh a prefix by head or token here; load the model with attn_implementation='sdpa'"
        )
    length, inner, visible = prefix.length, mask.mask_mod, prefix.visible

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = kv < length
        if visible is not None:
            seen = seen & visible[b, kv.clamp(max=length - 1)]
        return seen | ((kv >= length) & inner(b, h, q, (kv - length).clamp(min=0)))

    rows = query.shape[0] if visible is not None else mask.shape[0]
    return create_block_mask(
        mask_mod, rows, mask.shape[1], mask.seq_lengths[0], mask.seq_lengths[1] + length, device=query.device
    )


def _check_flash(prefix: BatchPrefix, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
    """Flash kernels align causality to the last key, so a prefix before the text is right by itself, but:"""
    advice = "; load the model with attn_implementation='sdpa'"
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] + prefix.length > window:
        raise AttachError(f"flash attention's sliding window would hide the prefix from later positions{advice}")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise AttachError(f"flash attention on packed sequences cannot carry a prefix{advice}")
    if prefix.visible is not None or prefix.bias is not None:
        raise AttachError(f"flash attention cannot mix prefixes of different lengths or weigh them{advice}")
