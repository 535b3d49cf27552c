"""What each site does while a prefix is trained: the norm of its gradient, and its share of attention.

One line of JSON a look (``monitor.jsonl``) and, at the end, both as a picture over steps and sites. Shares are read off
the training passes themselves, so nothing is run twice and no random number is drawn.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foreword.encoders import States
from foreword.errors import ConfigError
from foreword.shares import measured_shares
from foreword.train.curves import draw_monitor
from foreword.tuning import Tuning, tuning_of

LINES, PICTURE = "monitor.jsonl", "monitor.png"


class Monitor(TrainerCallback):
    """Watch the sites: ``PrefixTrainer(..., callbacks=[Monitor(every=10)])``.

    A gradient's norm is that of a site's keys and values, whatever makes them, before clipping (of accumulated passes:
    the root of the sum of their squares). A share is the mean
    over rows, heads and positions of one pass; none for a zero-initialised gate.

    Args:
        every: steps from one look to the next; the first step is looked at.

    Raises:
        ConfigError: ``every`` is below 1; when training begins: no prefix is attached.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ConfigError(f"Monitor(every={every}); expected 1 or more steps")
        self.every = every
        self._looking = ExitStack()
        self._norms: dict[str, float] = {}
        self._scale = 1.0
        self._shares: Any = {}
        self._tuning: Tuning | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tuning = tuning_of(kwargs["model"])
        if self._tuning is None or not self._tuning.encoder.names:
            raise ConfigError("Monitor watches a prefix's sites, and no virtual tokens are attached; leave it out")
        path = Path(args.output_dir or ".") / LINES
        if path.is_file() and state.is_world_process_zero:  # what was written after the checkpoint comes again
            kept = [look for look in _looks(path) if look["step"] <= state.global_step]
            temporary = path.with_name(f".{LINES}")
            temporary.write_text("".join(f"{json.dumps(look)}\n" for look in kept), encoding="utf-8")
            temporary.replace(path)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every or self._tuning is None:
            return
        self._norms = {}
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # of fp16's loss, and so of every gradient
        self._scale = float(scaler.get_scale()) if scaler is not None else 1.0
        self._shares = self._looking.enter_context(measured_shares(self._tuning.model))
        handle = self._tuning.encoder.register_forward_hook(self._watch)
        self._looking.callback(handle.remove)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._norms:
            return
        self._looking.close()
        if state.is_world_process_zero:
            sites = {
                name: {"gradient_norm": self._norm(name), "attention_share": _mean(self._shares.get(name))}
                for name in self._norms
            }
            path = Path(args.output_dir or ".") / LINES
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "sites": sites}) + "\n")
        self._norms = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._looking.close()
        path = Path(args.output_dir or ".") / LINES
        if state.is_world_process_zero and path.is_file():
            draw_monitor({"": _looks(path)}, path.with_name(PICTURE))

    def _norm(self, name: str) -> float | None:
        """None: not finite, in a step that fp16's scaler skipped."""
        norm = self._norms[name] ** 0.5 / self._scale
        return norm if math.isfinite(norm) else None

    def _watch(self, encoder: Any, args: Any, states: States) -> None:
        """Have each site's gradient counted in the backward of this pass."""
        for name, pair in states.items():
            self._norms.setdefault(name, 0.0)
            for states_of in pair:
                if states_of.requires_grad:
                    handle = states_of.register_hook(_Counting(self, name))
                    self._looking.callback(handle.remove)


class _Counting:
    def __init__(self, monitor: Monitor, name: str) -> None:
        self.monitor, self.name = monitor, name

    def __call__(self, grad: Tensor) -> None:
        norms = self.monitor._norms
        norms[self.name] += float(grad.detach().float().square().sum())


def _looks(path: Path) -> list[dict[str, Any]]:
    """The lines; without one that a kill cut short, which can only be the last."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _mean(share: Tensor | None) -> float | None:
    if share is None or torch.isnan(share).any():
        return None
    return float(share.mean())
