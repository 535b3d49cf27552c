"""Layer by layer: some attention sites are trained first, others later, each stage at its own learning rate.

Sites that a stage leaves out keep their numbers: their gradients are zero and the optimizer passes them over. Which
stage holds follows from the step alone, so a run that was interrupted goes on in the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foreword.config import check_learning_rate
from foreword.encoders import Direct, Frozen
from foreword.errors import ConfigError
from foreword.sites import select
from foreword.tuning import Tuning, tuning_of


@dataclass(frozen=True)
class Stage:
    """Some steps on some sites.

    Attributes:
        sites: which are trained, in the forms of ``PrefixConfig.sites``; None: all.
        steps: optimizer steps.
        learning_rate: highest of this stage, of the first method; None: the trainer's.
        warmup: the share of the steps in which the rate rises to that; then it falls to 0 linearly.
    """

    sites: str | Sequence[str | int] | None
    steps: int
    learning_rate: float | None = None
    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        if self.steps < 1:
            raise ConfigError(f"Stage(steps={self.steps}); expected 1 or more")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"Stage(warmup={self.warmup}); expected a share of the steps, from 0 to below 1")


class LayerByLayer(TrainerCallback):
    """Train in stages: ``PrefixTrainer(..., callbacks=[LayerByLayer([Stage("last:10", 100), Stage(None, 200)])])``.

    The run must be as long as its stages: ``max_steps=plan.steps``.

    Raises:
        ConfigError: no stage; when training begins: a stage without sites, another number of steps, or parameters
            that several sites share (an MLP, a low-rank product).
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ConfigError("LayerByLayer needs a stage; e.g. LayerByLayer([Stage('last:4', 100), Stage(None, 100)])")
        self.stages = list(stages)
        self.ends = list(accumulate(s.steps for s in self.stages))
        self.owned: dict[str, list[nn.Parameter]] = {}
        self.chosen: list[set[str]] = []
        self.frozen: dict[int, nn.Parameter] = {}  # by identity
        self._handles: list[Any] = []

    @classmethod
    def in_groups(
        cls, layers: int, groups: int, steps: int, *, order: Literal["top-down", "bottom-up"] = "top-down"
    ) -> LayerByLayer:
        """``groups`` stages that share the ``steps``: a part of the layers first, more with each stage, all at last."""
        if order not in ("top-down", "bottom-up"):
            raise ConfigError(f'order={order!r}; expected "top-down" or "bottom-up"')
        if not 1 <= groups <= layers:
            raise ConfigError(f"groups={groups}; expected 1 to {layers}, the number of layers")
        if steps < groups:
            raise ConfigError(f"{steps} steps are too few for {groups} stages; expected one for each at least")
        word = "last" if order == "top-down" else "first"
        ends = [steps * (i + 1) // groups for i in range(groups)]
        shares = [end - before for before, end in zip([0, *ends], ends, strict=False)]
        return cls([Stage(f"{word}:{-(-layers * (i + 1) // groups)}", n) for i, n in enumerate(shares)])

    @property
    def steps(self) -> int:
        """Of all stages."""
        return self.ends[-1]

    def check_schedule(self, args: TrainingArguments, scheduler: Any) -> None:
        """Raise ConfigError if a schedule was asked for: each stage has its own."""
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if scheduler is not None or name != "linear" or args.lr_scheduler_kwargs:
            asked = "the scheduler that was given" if scheduler is not None else f"lr_scheduler_type={name!r}"
            raise ConfigError(
                f"each stage of LayerByLayer warms up and falls to 0 linearly (Stage(learning_rate=..., warmup=...)), "
                f"and {asked} would have no effect; leave it out"
            )

    def learning_rate_factor(self, learning_rate: float) -> Callable[[int], float]:
        """What to multiply the first method's learning rate by at a step (for ``LambdaLR``).

        Raises:
            ConfigError: that is 0, and a stage has a rate of its own.
        """
        if not learning_rate and any(stage.learning_rate for stage in self.stages):
            raise ConfigError(
                "learning_rate=0 trains nothing, and a stage has a learning rate of its own; give the trainer a rate "
                "above 0, or leave the stage's out"
            )

        def factor(step: int) -> float:
            number = self._number(step)
            stage = self.stages[number]
            done = min(step - (self.ends[number] - stage.steps), stage.steps)
            warmup = round(stage.warmup * stage.steps)
            highest = stage.learning_rate / learning_rate if stage.learning_rate else 1.0
            if done < warmup:
                return highest * (done + 1) / (warmup + 1)
            return highest * (stage.steps - done) / (stage.steps - warmup)

        return factor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        tuning = tuning_of(kwargs["model"])
        assert tuning is not None
        if state.max_steps != self.steps:
            raise ConfigError(
                f"the stages take {self.steps} steps and the run {state.max_steps}; set max_steps={self.steps}"
            )
        self.owned = _by_site(tuning)
        sites = [s for s in tuning.sites if s.name in self.owned]
        self.chosen = [
            {s.name for s in (select(sites, stage.sites) if stage.sites is not None else sites)}
            for stage in self.stages
        ]
        for parameters in self.owned.values():
            for parameter in parameters:
                self._handles.append(parameter.register_hook(_Silence(self, parameter)))
        self._enter(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._enter(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter in self.frozen.values():
            parameter.grad = None  # not zero: momentum would go on moving it

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.frozen = [], {}

    def _number(self, step: int) -> int:
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.stages) - 1)

    def _enter(self, step: int) -> None:
        now = self.chosen[self._number(step)]
        self.frozen = {id(p): p for name, own in self.owned.items() if name not in now for p in own}


@dataclass(frozen=True)
class _Silence:
    """A gradient hook: zero while the parameter's stage is not on, so that clipping doesn't count it."""

    plan: LayerByLayer
    parameter: nn.Parameter

    def __call__(self, grad: Tensor) -> Tensor | None:
        return torch.zeros_like(grad) if id(self.parameter) in self.plan.frozen else None


def _by_site(tuning: Tuning) -> dict[str, list[nn.Parameter]]:
    """The parameters of each site.

    Raises:
        ConfigError: some belong to several.
    """
    encoder, holder = tuning.encoder, tuning.holder
    if not isinstance(encoder, Direct | Frozen):
        raise ConfigError(
            f"stages train some sites and not others, and {type(encoder).__name__} makes all of them from the same "
            'parameters; use reparam="direct"'
        )
    owned: dict[str, list[nn.Parameter]] = {}
    if isinstance(encoder, Direct):
        owned.update(zip(encoder.names, encoder.by_site(), strict=True))
    for i, site in enumerate(tuning.sites):
        for group in (holder.bias, holder.gate, holder.reading):
            if str(i) in group:
                owned.setdefault(site.name, []).append(group[str(i)])
    if holder.memory is not None:
        for name, factors in holder.memory.factors().items():
            owned.setdefault(name, []).extend(p for p in factors if isinstance(p, nn.Parameter))
    if not owned:
        raise ConfigError("stages train prefixes and memories site by site, and neither is attached")
    return owned
