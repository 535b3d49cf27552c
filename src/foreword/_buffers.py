"""Buffers of a base model that is trained with: what its forward passes in training would change for good.

A frozen base stays what it is: batch normalisation uses the statistics that it came with (the prefix that is trained
would else fit statistics that nobody keeps), and every other buffer is put back at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_WAS = "_foreword_was_training"
_MOST = 1 << 22  # numbers; what is larger is a weight that a quantiser keeps as a buffer, which no pass changes


class Buffers:
    """Keeps the buffers of a model while something is trained on it."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.kept: list[tuple[nn.Module, str, Tensor, int, Tensor]] = []

    def hold(self, model: nn.Module) -> None:
        """Have statistics stand still, and remember the rest (of those that a checkpoint has)."""
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                self.handles.append(module.register_forward_pre_hook(_as_in_evaluation))
                self.handles.append(module.register_forward_hook(_as_before, always_call=True))
            for name, buffer in module._buffers.items():
                if buffer is None or name in module._non_persistent_buffers_set:
                    continue
                if buffer.is_meta or buffer.is_inference() or buffer.numel() > _MOST:
                    continue
                self.kept.append((module, name, buffer, buffer._version, buffer.detach().clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Make every buffer that has changed what it was."""
        for handle in self.handles:
            handle.remove()
        for module, name, buffer, version, numbers in self.kept:
            now = module._buffers.get(name)
            unchanged = now is buffer and buffer._version == version
            if now is not None and not unchanged and now.shape == numbers.shape:
                now.copy_(numbers)
        self.handles, self.kept = [], []


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    module.__dict__[_WAS] = module.training
    module.training = False


def _as_before(module: nn.Module, args: Any, output: Any) -> None:
    module.training = module.__dict__.pop(_WAS, module.training)
