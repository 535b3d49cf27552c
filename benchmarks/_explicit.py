"""Attention over [prefix; text] written out in float64: what every path of ours is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreword._interface import Slot


class Explicit(Slot):
    """A slot that computes ``softmax([q P_k^T, q K^T] * scale + mask) [P_v; V]`` itself, with what a call carries.

    Args:
        keys, values: ``(G, P, dim)`` of the prefix; P may be 0.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(
        self, delegate: Any, delegate_name: str, module: Any, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        dtype, (batch, heads, length, dim) = query.dtype, query.shape
        before = self.keys.shape[1]
        keys = torch.cat([self.keys.double().expand(batch, -1, -1, -1), key.double()], 2)
        values = torch.cat([self.values.double().expand(batch, -1, -1, -1), value.double()], 2)
        keys, values = (t.repeat_interleave(heads // t.shape[1], 1) for t in (keys, values))
        scores = query.double() @ keys.mT * (kwargs.get("scaling") or dim**-0.5)
        if (cap := kwargs.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        text = scores[..., before:]
        if (bias := kwargs.get("position_bias")) is not None:
            text = text + bias.double()
        text = text + self._hidden(attention_mask, delegate_name, module, length, key.shape[2], kwargs)
        scores = torch.cat([scores[..., :before], text], -1)
        # A learned logit that takes attention and gives nothing: per head, or per head and query.
        sinks = next((s for s in (kwargs.get("s_aux"), kwargs.get("sinks")) if s is not None), None)
        if sinks is not None:
            sinks = sinks.double().view(1, -1, 1, 1) if sinks.dim() == 1 else sinks.double()
            scores = torch.cat([scores, sinks.expand(batch, heads, length, 1)], -1)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        if sinks is not None:
            weights = weights[..., :-1]
        return (weights @ values).transpose(1, 2).to(dtype).contiguous(), None

    def _hidden(self, mask: Any, name: str, module: Any, queries: int, keys: int, kwargs: Any) -> Tensor:
        """Added to the scores of the text: 0, or -inf where a key is hidden."""
        if mask is None:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            if name == "eager" or queries == 1 or not causal:
                return torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            mask = torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]
        mask = mask[..., :keys]
        if mask.dtype != torch.bool:
            return mask.double()
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
