"""Softmax over [prefix; text], exact.

The keys and values of a prefix stand before those of the text in one softmax (Li & Liang 2021, eq. 5-7)::

    o = softmax(q [P_k; K]^T * scale) [P_v; V]

**Concatenation** computes just that, with whatever attention function the model had (its *delegate*): the
reference. **Merging** computes two softmaxes and joins them by their log-sum-exps, which is the same number::

    (o1, l1) = text,  (o2, l2) = prefix,    l = logaddexp(l1, l2),    o = o1 exp(l1 - l) + o2 exp(l2 - l)

so the text keeps its fast causal kernel, no S x (P+S) mask is made, and one prefix serves the whole batch. The
backward needs no kernel of its own: a flash backward rebuilds P = exp(s - lse) and delta = sum(dO * O) from what
it is given, so with the *joint* ``o`` and ``l`` it returns exactly that part's gradients of the joint softmax.

A learned weight on the prefix is a bias added to ``l2`` (-inf: no prefix at all); a zero-initialised gate
(LLaMA-Adapter, arXiv 2303.16199) adds ``gate * o2`` to ``o1``, the two softmaxes kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from foreword._kernels import Kernel, kernel_for
from foreword._masks import additive, causal_mask, extend_mask
from foreword.errors import AttachError, ConfigError

Path = Literal["auto", "merged", "concat"]
Delegate = Callable[..., tuple[Tensor, Tensor | None]]

_PATH: ContextVar[Path] = ContextVar("foreword_path", default="auto")


@dataclass(frozen=True, slots=True)
class SitePrefix:
    """What one attention site reads during one forward pass.

    Shapes: T tasks, G key/value heads, P virtual tokens, H query heads, B batch rows.
    """

    keys: Tensor  # (T, G, P, key_dim)
    values: Tensor  # (T, G, P, value_dim)
    rows: Tensor | None = None  # (R,) the task of each row; B must be a multiple of R. None: T is 1
    visible: Tensor | None = None  # (T, P) bool, False where a shorter task is padded. None: all
    bias: Tensor | None = None  # (H,) added to the prefix's log-sum-exp
    gate: Tensor | None = None  # (H,) if given: o1 + gate * o2 instead of one softmax

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def for_batch(self, query: Tensor) -> SitePrefix:
        """The same prefix in the query's dtype and device, one entry a row unless all rows share it."""
        keys, values = self.keys.to(query), self.values.to(query)
        rows, visible = self.rows, self.visible
        if rows is not None:
            batch = query.shape[0]
            if batch % len(rows):
                raise AttachError(
                    f"the batch has {batch} rows but {len(rows)} tasks were named; name one task a row "
                    "(beams and return sequences are multiplied for you)"
                )
            rows = rows.to(query.device).repeat_interleave(batch // len(rows))
            keys, values = keys[rows], values[rows]
            visible = visible.to(query.device)[rows] if visible is not None else None
        bias = self.bias.to(query.device) if self.bias is not None else None
        gate = self.gate.to(query) if self.gate is not None else None
        return SitePrefix(keys, values, None, visible, bias, gate)


@contextmanager
def attention_path(path: Path) -> Iterator[None]:
    """Force ``"merged"`` or ``"concat"`` inside the block (``"auto"``: by size, as measured in benchmarks/).

    Raises:
        ConfigError: the name is none of the three.
    """
    if path not in ("auto", "merged", "concat"):
        raise ConfigError(f'attention path {path!r} is unknown; expected "auto", "merged" or "concat"')
    token = _PATH.set(path)
    try:
        yield
    finally:
        _PATH.reset(token)


def attend(
    prefix: SitePrefix,
    delegate: Delegate,
    delegate_name: str,
    module: nn.Module,
    query: Tensor,  # (B, H, S, key_dim)
    key: Tensor,  # (B, G, N, key_dim)
    value: Tensor,  # (B, G, N, value_dim)
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention site returns when it has a prefix: ``(B, S, H, value_dim)`` and the weights or None.

    Raises:
        AttachError: the batch does not fit the tasks named, or the delegate cannot carry a prefix here.
    """
    prefix = prefix.for_batch(query)
    if prefix.gate is not None:
        text, weights = delegate(module, query, key, value, attention_mask, **kwargs)
        return text + _gated(prefix, query, kwargs.get("scaling")).to(text), weights
    kernel = _merge_kernel(prefix, delegate_name, query, key, value, attention_mask, kwargs)
    if kernel is None:
        return _concatenate(prefix, delegate, delegate_name, module, query, key, value, attention_mask, kwargs)
    causal = _is_causal(module, query, attention_mask, kwargs)
    if causal and key.shape[2] > query.shape[2]:  # first pass over an empty static cache: the rest is unused
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    mask = additive(attention_mask, query.dtype)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    out = merged_attention(query, key, value, prefix, mask=mask, causal=causal, scale=scale, kernel=kernel)
    return out.transpose(1, 2).contiguous(), None


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: SitePrefix,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    kernel: Kernel,
) -> Tensor:
    """Attention over [prefix; text] by two kernel calls and their log-sum-exps: ``(B, H, S, value_dim)``."""
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    prefix_mask = None
    if prefix.visible is not None:
        prefix_mask = additive(prefix.visible[:, None, None, :], dtype)  # (B, 1, 1, P)
    out: Tensor = _Merged.apply(
        query, key, value, prefix.keys.to(dtype), prefix.values.to(dtype), prefix.bias,
        mask.to(dtype) if mask is not None else None, prefix_mask, causal, scale, kernel,
    )  # fmt: skip
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, bias: Tensor | None,
        mask: Tensor | None, prefix_mask: Tensor | None, causal: bool, scale: float, kernel: Kernel,
    ) -> Tensor:  # fmt: skip
        o1, l1 = kernel.forward(q, k, v, mask, causal, scale)
        o2, l2 = kernel.forward(_fold(q, pk), pk, pv, prefix_mask, False, scale)
        o2, l2 = _unfold(o2, q), _unfold(l2, q)
        if bias is not None:
            l2 = l2 + bias.to(l2.dtype)[:, None]
        lse = torch.logaddexp(l1, l2)  # (B, H, S)
        if prefix_mask is not None:  # a padded query of a row without a prefix sees nothing at all
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        w2 = torch.exp(l2 - lse)
        out = torch.lerp(o1, o2, w2.to(o1.dtype).unsqueeze(-1))  # w1 = 1 - w2
        part2 = o2 if bias is not None and bias.requires_grad else None
        ctx.save_for_backward(
            q, k, v, pk, pv, bias, mask, prefix_mask, out, lse, part2, w2 if part2 is not None else None
        )
        ctx.causal, ctx.scale, ctx.kernel = causal, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pk, pv, bias, mask, prefix_mask, out, lse, o2, w2 = ctx.saved_tensors
        dq, dk, dv = ctx.kernel.backward(grad, q, k, v, out, lse, mask, ctx.causal, ctx.scale)
        # exp(s + bias - l) = exp(s - (l - bias)): the kernel sees the bias as a smaller log-sum-exp.
        prefix_lse = lse if bias is None else lse - bias.to(lse.dtype)[:, None]
        dq2, dpk, dpv = ctx.kernel.backward(
            _fold(grad, pk),
            _fold(q, pk),
            pk,
            pv,
            _fold(out, pk),
            _fold(prefix_lse, pk),
            prefix_mask,
            False,
            ctx.scale,
        )
        dbias = None
        if ctx.needs_input_grad[5]:  # sum over the prefix of ds = p (dp - delta)
            per_query = (grad * (o2 - out)).sum(-1).to(w2.dtype) * w2
            dbias = per_query.sum((0, 2)).to(bias.dtype)
        return dq + _unfold(dq2, q), dk, dv, dpk, dpv, dbias, None, None, None, None, None


def _fold(x: Tensor, prefix: Tensor) -> Tensor:
    """``(B, H, S, ...)`` -> ``(1, H, B*S, ...)`` when all rows share the prefix: one call, no copies of it."""
    if prefix.shape[0] == x.shape[0]:
        return x
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[0] == like.shape[0]:
        return x
    return x.squeeze(0).unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)


def _concatenate(
    prefix: SitePrefix,
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
    batch, length = key.shape[0], prefix.length
    if "flash" in delegate_name:
        _check_flash(prefix, key, attention_mask, kwargs)
    elif _is_causal(module, query, attention_mask, kwargs) and delegate_name != "eager":
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        attention_mask = causal_mask(query.shape[2], query)
    if attention_mask is None and (prefix.visible is not None or prefix.bias is not None):
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        if delegate_name == "eager" and attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
        attention_mask = _extend(attention_mask, prefix, query)
    if (position_bias := kwargs.get("position_bias")) is not None:  # distance means nothing to a virtual token
        kwargs["position_bias"] = torch.nn.functional.pad(position_bias, (length, 0))
    key = torch.cat([prefix.keys.expand(batch, -1, -1, -1), key.to(query.dtype)], dim=2)
    value = torch.cat([prefix.values.expand(batch, -1, -1, -1), value.to(query.dtype)], dim=2)
    if "flash" not in delegate_name:
        kwargs["is_causal"] = False  # the mask says it all, or there was nothing to hide
    return delegate(module, query, key, value, attention_mask, **kwargs)


def _extend(mask: Any, prefix: SitePrefix, query: Tensor) -> Any:
    if not isinstance(mask, Tensor):  # flex attention's BlockMask
        return _extend_block_mask(mask, prefix, query)
    if mask.dim() == 2:  # flash: (B, N), 1 where a token is real
        return torch.nn.functional.pad(mask, (prefix.length, 0), value=1)
    if mask.shape[2] == 1 and query.shape[2] > 1:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return extend_mask(mask, prefix.length, prefix.visible, prefix.bias)


def _extend_block_mask(mask: Any, prefix: SitePrefix, query: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if prefix.bias is not None:
        raise AttachError(
            "flex_attention cannot weigh a prefix by head here; load the model with attn_implementation='sdpa'"
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


def _check_flash(prefix: SitePrefix, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
    """Flash kernels align causality to the last key, so a prefix before the text is right by itself, but:"""
    advice = "; load the model with attn_implementation='sdpa'"
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] + prefix.length > window:
        raise AttachError(f"flash attention's sliding window would hide the prefix from later positions{advice}")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise AttachError(f"flash attention on packed sequences cannot carry a prefix{advice}")
    if prefix.visible is not None or prefix.bias is not None:
        raise AttachError(f"flash attention cannot mix prefixes of different lengths or weigh them{advice}")


def _gated(prefix: SitePrefix, query: Tensor, scaling: float | None) -> Tensor:
    """``gate * softmax(q P_k^T) P_v``: ``(B, S, H, value_dim)``; zero for rows without a prefix."""
    assert prefix.gate is not None
    batch = query.shape[0]
    mask, seen = None, None
    if prefix.visible is not None:
        seen = prefix.visible.any(-1)[:, None, None, None]
        mask = prefix.visible[:, None, None, :] | ~seen  # an empty softmax is not a number: zeroed below
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        prefix.keys.expand(batch, -1, -1, -1),
        prefix.values.expand(batch, -1, -1, -1),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != prefix.keys.shape[1],
    )
    if seen is not None:
        out = torch.where(seen, out, 0.0)
    return (out * prefix.gate[:, None, None]).transpose(1, 2)


def _is_causal(module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """transformers' own rule: without a mask, a call of more than one query is causal unless it says otherwise."""
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return query.shape[2] > 1 and mask is None and bool(causal)


def _merge_kernel(
    prefix: SitePrefix,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Kernel | None:
    """The kernel to merge with, or None where concatenation is needed, asked for, or faster."""
    path = _PATH.get()
    if path == "concat" or name != "sdpa" or kwargs.get("dropout"):
        return None
    if any(kwargs.get(k) is not None for k in ("softcap", "s_aux", "position_bias", "cache")):
        return None
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4 or mask.requires_grad):
        return None
    if not torch.is_autocast_enabled(query.device.type) and not query.dtype == key.dtype == value.dtype:
        return None
    kernel = kernel_for(query.device)
    masked = mask is not None or prefix.visible is not None
    if kernel is None or not kernel.accepts(query, key, value, masked):
        return None
    if path == "auto" and not merging_pays(query, key, prefix, mask):
        return None
    return kernel


def merging_pays(query: Tensor, key: Tensor, prefix: SitePrefix, mask: Any) -> bool:
    """Whether two kernel calls beat one over copied keys and values, by the sizes (benchmarks/attention.py)."""
    return query.shape[2] > 1
