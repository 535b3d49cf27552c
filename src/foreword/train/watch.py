"""What the norm of a gradient says of divergence, step by step.

Judged is the gradient as the optimizer would take it: summed over accumulated passes and processes, and with fp16's
loss scale taken off. A gradient that isn't finite under such a scale means that the scale was too high: the scaler
passes the step over and halves the scale, which is no divergence unless it goes on and on.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_EARLY = 10  # steps that only show what is usual
_MOST_SKIPPED = 100  # in a row
_LEAST_SCALE = 2.0**-10  # a gradient that overflows 16 bits at this scale is beyond 10^7


@dataclass
class Watch:
    """Judges each step's gradient by those before it.

    Attributes:
        factor: a norm this many times the usual is divergence. Usual is the largest of three: the median of the last
            50, the largest of the first ten, and ``clip``. So a run that has learned its easy rows, and whose gradients
            have all but gone, may meet a hard one.
        clip: the norm that gradients are clipped to; 0: they are not.
        norms: the last 50.
        early: the largest of the first ten.
        skipped: steps in a row that the scaler of fp16 passed over.
    """

    factor: float
    clip: float
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    early: float = 0.0
    skipped: int = 0
    _scale: float = 0.0  # before the first of those

    def wrong_with(self, norm: float, scaler: Any = None) -> str:
        """What a step's norm says of divergence; empty: nothing.

        Args:
            scaler: of fp16's loss, if there is one; the norm is without its scale.
        """
        if not math.isfinite(norm):
            return self._overflowed(scaler) if scaler is not None else f"the gradient's norm is {norm}"
        self.skipped = 0
        begun = len(self.norms) >= _EARLY
        if begun and norm > self.factor * (usual := self.usual()):
            return f"the gradient's norm is {norm:.3g}, {self.factor:g} times the usual {usual:.3g}"
        if not begun:
            self.early = max(self.early, norm)
        self.norms.append(norm)
        return ""

    def usual(self) -> float:
        """What norms are measured by."""
        return max(statistics.median(self.norms), self.early, self.clip)

    def _overflowed(self, scaler: Any) -> str:
        scale = float(scaler.get_scale())
        if not self.skipped:
            self._scale = scale
        self.skipped += 1
        if self.skipped < _EARLY or (scale >= _LEAST_SCALE and self.skipped < _MOST_SKIPPED):
            return ""
        return (
            f"no gradient of the last {self.skipped} steps is finite, though the loss scale of fp16 fell from "
            f"{self._scale:g} to {scale:g}"
        )

    def tensors(self) -> dict[str, Tensor]:
        """What was seen, for a checkpoint."""
        seen = [self.early, float(self.skipped), self._scale]
        return {
            "norms": torch.tensor(list(self.norms), dtype=torch.float64),
            "seen": torch.tensor(seen, dtype=torch.float64),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`tensors` gave."""
        self.norms.clear()
        self.norms.extend(tensors["norms"].tolist())
        if "seen" in tensors:
            self.early, skipped, self._scale = tensors["seen"].tolist()
            self.skipped = int(skipped)
        else:  # written before the first norms were kept
            self.early = max(list(self.norms)[:_EARLY], default=0.0)


def risen_loss(history: Sequence[Mapping[str, Any]]) -> str:
    """What a whole run's log says where training made the loss worse; empty: it didn't, or the log is too short.

    Compared are the first loss that was logged and the mean over the last quarter.
    """
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    if len(losses) < 4:
        return ""
    first, last = losses[0], statistics.fmean(losses[-(len(losses) // 4) :])
    return f"the training loss rose from {first:.3g} to {last:.3g}" if last > 1.1 * first > 0 else ""
