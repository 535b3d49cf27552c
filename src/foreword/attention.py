"""Softmax over [prefix; text], exact.

The keys and values of a prefix stand before those of the text in one softmax (Li & Liang 2021, eq. 5-7)::

    o = softmax(q [P_k; K]^T * scale) [P_v; V]

**Concatenation** computes just that, with whatever attention function the model had (its *delegate*): the
reference. **Merging** computes two softmaxes and joins them by their log-sum-exps, which is the same number::

    (o1, l1) = text,  (o2, l2) = prefix,    l = logaddexp(l1, l2),    o = o1 exp(l1 - l) + o2 exp(l2 - l)

so the text keeps its fast causal kernel, no S x (P+S) mask is made, and one prefix serves the whole batch. The
backward needs no kernel of its own: a flash backward rebuilds P = exp(s - lse) and delta = sum(dO * O) from what
it is given, so with the *joint* ``o`` and ``l`` it returns exactly that part's gradients of the joint softmax.

What the literature varies is small from here:

- a weight on the prefix is a bias added to ``l2``: learned, per head, or read off the query; -inf: not seen at all
  (a query before an infix, a row without a prefix);
- a zero-initialised gate (LLaMA-Adapter, arXiv 2303.16199) adds ``gate * o2`` to ``o1``, the two softmaxes kept apart;
- a memory (``foreword.memory``) adds to ``o`` and knows no softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from foreword._choice import Path, cheapest
from foreword._concat import concatenate
from foreword._interface import Delegate, is_sdpa
from foreword._kernels import Kernel, kernel_for
from foreword._masks import additive, is_causal
from foreword._step import joint_mask, repeated, step
from foreword._views import BatchPrefix, SitePrefix
from foreword.errors import ConfigError

_PATH: ContextVar[Path | Literal["auto"]] = ContextVar("foreword_path", default="auto")
_forced = 0  # blocks of attention_path that are open: asking a context variable costs something in each layer


@contextmanager
def attention_path(path: Path | Literal["auto"]) -> Iterator[None]:
    """Force ``"merged"``, ``"step"`` or ``"concat"`` inside the block where the call allows it, else concatenation.

    ``"auto"`` is by size, as measured in benchmarks/.

    Raises:
        ConfigError: the name is none of the four.
    """
    if path not in ("auto", "merged", "step", "concat"):
        raise ConfigError(f'attention path {path!r} is unknown; expected "auto", "merged", "step" or "concat"')
    global _forced
    _forced += 1
    token = _PATH.set(path)
    try:
        yield
    finally:
        _PATH.reset(token)
        _forced -= 1


def attend(
    prefix: SitePrefix,
    delegate: Delegate,
    delegate_name: str,
    module: nn.Module,
    query: Tensor,  # (B, H, S, key_dim)
    key: Tensor,  # (B, G, N, key_dim)
    value: Tensor,  # (B, G, N, value_dim)
    attention_mask: Any,
    seen: Tensor | None = None,  # (B|1, S) which queries see the prefix
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention site returns when it has a prefix: ``(B, S, H, value_dim)`` and the weights or None.

    Raises:
        AttachError: the batch does not fit the tasks named, or the delegate cannot carry a prefix here.
    """
    hidden = None
    if attention_mask is not None and seen is None and not _forced and is_sdpa(delegate) and not _carries(kwargs):
        hidden = repeated(prefix, query, key, value, attention_mask)
    if hidden is not None:
        weights = None
        out = step(prefix, query, key, value, hidden, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    elif prefix.keys.shape[2] == 0 or (seen is not None and not seen.any()):
        out, weights = delegate(module, query, key, value, attention_mask, **kwargs)
    else:
        here = prefix.for_batch(query, seen)
        out, weights = _with_prefix(here, delegate, delegate_name, module, query, key, value, attention_mask, kwargs)
    if prefix.memory is not None:
        out = out + prefix.memory.recall(query, prefix.rows, kwargs).to(out)
    return out, weights


def _with_prefix(
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
    if prefix.gate is not None:
        if prefix.bias is None:
            text, weights = delegate(module, query, key, value, attention_mask, **kwargs)
        else:  # some rows share one softmax with their prefix
            rest = replace(prefix, gate=None)
            text, weights = _with_prefix(
                rest, delegate, delegate_name, module, query, key, value, attention_mask, dict(kwargs)
            )
        return text + _gated(prefix, query, kwargs.get("scaling")).to(text), weights
    path = _path(prefix, delegate, query, key, value, attention_mask, kwargs)
    if path == "concat":
        return concatenate(prefix, delegate, delegate_name, module, query, key, value, attention_mask, kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if path == "step":
        return step(prefix, query, key, value, joint_mask(prefix, attention_mask, query, key.shape[2]), scale), None
    causal = is_causal(module, query, attention_mask, kwargs)
    if causal and key.shape[2] > query.shape[2]:  # first pass over an empty static cache: the rest is unused
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    mask, kernel = additive(attention_mask, query.dtype), kernel_for(query.device)
    assert kernel is not None
    out = merged_attention(query, key, value, prefix, mask=mask, causal=causal, scale=scale, kernel=kernel)
    return out.transpose(1, 2).contiguous(), None


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: BatchPrefix,
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
        query, key, value, prefix.keys.to(dtype), prefix.values.to(dtype),
        prefix.bias.squeeze(-1) if prefix.bias is not None else None,
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
        if bias is not None:  # (B|1, H|1, S|1)
            l2 = l2 + bias.to(l2.dtype)
        lse = torch.logaddexp(l1, l2)  # (B, H, S)
        if prefix_mask is not None or bias is not None:  # a padded query that sees no prefix sees nothing at all
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        w2 = torch.exp(l2 - lse)
        out = torch.lerp(o1, o2, w2.to(o1.dtype).unsqueeze(-1))  # w1 = 1 - w2
        apart = o2.sub(out) if bias is not None and bias.requires_grad else None
        ctx.save_for_backward(
            q, k, v, pk, pv, bias, mask, prefix_mask, out, lse, apart, w2 if apart is not None else None
        )
        ctx.causal, ctx.scale, ctx.kernel = causal, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pk, pv, bias, mask, prefix_mask, out, lse, apart, w2 = ctx.saved_tensors
        dq, dk, dv = ctx.kernel.backward(grad, q, k, v, out, lse, mask, ctx.causal, ctx.scale)
        # exp(s + bias - l) = exp(s - (l - bias)): the kernel sees the bias as a smaller log-sum-exp.
        prefix_lse = lse if bias is None else lse - bias.to(lse.dtype)
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
            per_query = (grad * apart).sum(-1).to(w2.dtype) * w2
            dbias = per_query.sum_to_size(bias.shape).to(bias.dtype)
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


def _gated(prefix: BatchPrefix, query: Tensor, scaling: float | None) -> Tensor:
    """``gate * softmax(q P_k^T) P_v``: ``(B, S, H, value_dim)``; zero for rows without a prefix."""
    assert prefix.gate is not None
    batch = query.shape[0]
    mask, seen = None, None
    if prefix.visible is not None:
        tokens = prefix.visible if prefix.visible.dtype == torch.bool else prefix.visible > -torch.inf
        seen = tokens.any(-1)[:, None, None, None]
        mask = tokens[:, None, None, :] | ~seen  # an empty softmax is not a number: zeroed below
        if tokens is not prefix.visible:
            mask = torch.where(mask & seen, prefix.visible[:, None, None, :].to(query), 0.0).masked_fill(
                ~mask, -torch.inf
            )
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
    return (out * prefix.gate).transpose(1, 2)


def _path(
    prefix: BatchPrefix,
    delegate: Delegate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Path:
    """The path asked for or the fastest, where the call allows it: concatenation always works.

    Generation asks for each layer and token, with nothing of this in the processor's caches: few questions, the
    cheap ones first.
    """
    path = _PATH.get() if _forced and not is_compiling() else "auto"
    if path == "auto":
        path = cheapest(query, key, prefix, mask)
        if path == "concat" and prefix.bias is not None and prefix.bias.requires_grad and torch.is_grad_enabled():
            path = "merged"  # a mask that is learned leaves the fused kernel; the merged backward has its gradient
    if path == "concat" or not is_sdpa(delegate) or _carries(kwargs):
        return "concat"
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4 or mask.requires_grad):
        return "concat"
    one_dtype = query.dtype is key.dtype is value.dtype
    if path == "step":
        hidden = mask is None and query.shape[2] > 1  # causal, or hiding nothing: as the delegate decides
        plain = one_dtype and not hidden and query.is_cpu and not torch.is_autocast_enabled("cpu")
        return "step" if plain else "concat"
    autocast = torch.is_autocast_enabled(query.device.type)
    kernel = kernel_for(query.device)
    masked = mask is not None or prefix.visible is not None
    usable = (one_dtype or autocast) and kernel is not None and kernel.accepts(query, key, value, masked)
    return "merged" if usable else "concat"


# Arguments that only the delegate knows how to honour.
_CARRIED = frozenset(("softcap", "s_aux", "sinks", "position_bias", "cache"))


def _carries(kwargs: dict[str, Any]) -> bool:
    """Whether a call is more than a softmax over masked and scaled scores."""
    if kwargs.get("dropout"):
        return True
    return not _CARRIED.isdisjoint(kwargs) and any(kwargs.get(k) is not None for k in _CARRIED)
