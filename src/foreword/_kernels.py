"""Attention kernels that give their log-sum-exp and take the joint one back: one entry a device.

``forward(q, k, v, mask, causal, scale) -> (out, lse)`` and ``backward(grad, q, k, v, out, lse, mask, causal,
scale) -> (dq, dk, dv)``, with q ``(B, H, S, D)``, k and v ``(B, G, N, D)`` (G divides H), an additive mask
``(B|1, 1|H, S|1, N)`` or None, and ``lse`` ``(B, H, S)``, -inf where a query sees no key.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from foreword._masks import dead_rows

aten = torch.ops.aten


class Kernel(Protocol):
    """Two calls into one fused kernel; see the module's docstring for the shapes."""

    def accepts(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> bool:
        """Whether the kernel takes these dtypes and sizes."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@dataclass(frozen=True)
class CpuFlash:
    """PyTorch's flash attention for CPUs: any float type, masks, grouped heads."""

    def accepts(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> bool:
        return q.shape[-1] == v.shape[-1] and q.dtype.is_floating_point and k.shape[2] > 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = dense(q), dense(k), dense(v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_readable(mask), scale=scale
        )
        if mask is not None:  # the kernel says 0 where a query sees nothing
            lse = lse.masked_fill(dead_rows(mask), -torch.inf)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        grad, q, k, v, out = dense(grad), dense(q), dense(k), dense(v), dense(out)
        result: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_readable(mask), scale=scale
        )
        return result


@dataclass(frozen=True)
class CudaFlash:
    """PyTorch's flash attention for CUDA: half precision, no mask. Checked against concatenation on first use."""

    def accepts(self, q: Tensor, k: Tensor, v: Tensor, masked: bool) -> bool:
        dim = q.shape[-1]
        fits = not masked and dim == v.shape[-1] and dim % 8 == 0 and dim <= 256 and k.shape[2] > 0
        return fits and q.dtype in (torch.float16, torch.bfloat16) and _agrees(self, q.device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = dense(q), dense(k), dense(v)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse[..., : q.shape[2]]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        grad, q, k, v, out = dense(grad), dense(q), dense(k), dense(v), dense(out)
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # random state of the dropout we never use
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


_KERNELS: dict[str, Kernel] = {"cpu": CpuFlash(), "cuda": CudaFlash()}


def dense(x: Tensor) -> Tensor:
    """The same numbers with each row's side by side, and rows that don't overlap: what the kernels take for granted.

    They are given a stride a row and none within it, so that of other tensors (a transposed or expanded one, every
    second column) they would read what isn't theirs, or past the end.
    """
    (*_, rows, width), (*_, step, within) = x.shape, x.stride()
    return x if within == 1 and (step >= width or rows == 1) else x.contiguous()


def _readable(mask: Tensor | None) -> Tensor | None:
    """A mask whose rows lie side by side each; they may be the same one for all queries."""
    return mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()


def kernel_for(device: torch.device) -> Kernel | None:
    """The kernel of a device, or None: then attention concatenates."""
    return _KERNELS.get(device.type)


@lru_cache
def _agrees(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel that we could not test gives the gradients of plain attention, tried once on this device."""
    try:
        error = self_check(kernel, device, torch.float16)
    except Exception as exc:  # a build without the kernel, or with another signature: anything may come back
        warnings.warn(f"attention falls back to concatenation: {type(exc).__name__}: {exc}", stacklevel=3)
        return False
    if error > 0.02:
        warnings.warn(
            f"attention falls back to concatenation: this kernel is off by {error:.3g} here; "
            "please report your versions (`foreword doctor --json`)",
            stacklevel=3,
        )
        return False
    return True


def self_check(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a kernel's output and gradients against plain attention in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 33, 64), (2, 2, 33, 64), (2, 2, 33, 64), (2, 4, 33, 64))
    q, k, v, grad = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    out, lse = kernel.forward(q, k, v, None, True, 0.125)
    got = (out, *kernel.backward(grad, q, k, v, out, lse, None, True, 0.125))
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    full_k, full_v = (x.repeat_interleave(2, dim=1) for x in leaves[1:])
    scores = (leaves[0] @ full_k.transpose(-1, -2) * 0.125).masked_fill(
        ~torch.ones(33, 33, dtype=torch.bool, device=device).tril(), -torch.inf
    )
    plain = scores.softmax(-1) @ full_v
    expected = (plain, *torch.autograd.grad(plain, leaves, grad.float()))
    return max(float((a.float() - b).detach().abs().max()) for a, b in zip(got, expected, strict=True))
