"""Learning rates, optimizers and schedules where several methods are trained, each at a rate of its own.

Trainer makes the optimizer and the schedule, whatever the arguments say; here its groups of parameters are divided by
method, and the absolute rates that some schedules take (a floor, an end) are carried over to each group by its share.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from transformers import TrainingArguments

from foreword.config import PrefixConfig
from foreword.errors import ConfigError
from foreword.methods import usual_learning_rate
from foreword.tuning import Tuning

_LOW, _HIGH = 1 / 100, 30.0  # times the usual rate: one hardly moves a prefix, the other throws it about
_ABSOLUTE = ("min_lr", "max_lr", "lr_end")  # what schedules take as a rate; all else is a share
_BY_GROUP = ("reduce_lr_on_plateau", "greedy")  # take a list of them; all others multiply each group's own rate


def settle_learning_rate(args: TrainingArguments, tuning: Tuning, *, own: bool) -> None:
    """Have the arguments name the rate of the first method, the usual one where they name none.

    Warns of a rate that is far from the usual, unless the optimizer is the user's ``own``.

    Raises:
        ConfigError: not a rate.
    """
    first = tuning.configs[0] if tuning.configs else None
    usual = usual_learning_rate(first) if first is not None else tuning.parameter_groups()[0]["lr"]
    asked = first.learning_rate if first is not None else None
    if args.learning_rate is None:
        args.learning_rate = asked or usual
    if not 0 <= args.learning_rate < math.inf:
        raise ConfigError(f"learning_rate={args.learning_rate}; expected 0 or a positive number")
    rate = asked or args.learning_rate
    if own or usual * _LOW < rate <= usual * _HIGH:
        return
    what = "a prefix" if isinstance(first, PrefixConfig | None) else "this"
    name = f"reparam={first.reparam!r}" if isinstance(first, PrefixConfig) else getattr(first, "method", "keys")
    if rate > usual:
        told = f"is {rate / usual:.3g} times what is usual for {name} ({usual:g}), and will hardly train {what}"
    else:
        told = f"hardly moves {what}; {usual:g} is usual for {name}"
    warnings.warn(f"learning_rate={rate:g} {told}", stacklevel=3)


def divide(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Divide the groups of an optimizer that Trainer made by method, each with its rate.

    Args:
        groups: the parameters of each method and their rate (``Tuning.parameter_groups``).

    Raises:
        ConfigError: the optimizer has no such groups, or leaves parameters out.
    """
    made = getattr(optimizer, "param_groups", None) or []
    place = {id(p): i for i, group in enumerate(made) for p in group["params"]}
    if any(id(p) not in place for group in groups for p in group["params"]):
        raise ConfigError(
            f"{type(optimizer).__name__} chooses by itself what it trains, and leaves out some of what is attached; "
            'use another (optim="adamw_torch"), or one that you made: optimizers=(optimizer, None)'
        )
    divided: list[dict[str, Any]] = []
    for group in groups:
        parts: list[dict[str, Any]] = []
        for i, of in enumerate(made):
            chosen = [p for p in group["params"] if place[id(p)] == i]
            settings = {**{k: v for k, v in of.items() if k != "params"}, "lr": group["lr"]}
            if chosen:
                parts.append({"params": chosen, **settings})
        alike = all({**part, "params": 0} == {**parts[0], "params": 0} for part in parts)
        divided += [{**parts[0], "params": list(group["params"])}] if alike else parts
    optimizer.param_groups = divided
    optimizer.defaults["lr"] = divided[0]["lr"]  # what schedules take for the highest rate


def check_own_optimizer(optimizer: Optimizer, tuning: Tuning) -> None:
    """Refuse an optimizer of the user's that trains nothing of what is attached; warn if it leaves something out."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = list(tuning.named_parameters())
    missing = [name for name, p in named if id(p) not in held]
    if len(missing) == len(named):
        raise ConfigError(
            "the optimizer that was given holds none of the parameters that are to be trained; make it after "
            "attaching, of tuning.parameter_groups() or tuning.parameters()"
        )
    if missing:
        warnings.warn(
            f"the optimizer that was given leaves out {len(missing)} of {len(named)} parameters ({missing[0]}, …), "
            "which stay as they are",
            stacklevel=3,
        )


@contextmanager
def rates_by_group(args: TrainingArguments, optimizer: Any) -> Iterator[None]:
    """Inside the block, absolute rates in ``lr_scheduler_kwargs`` are those of the first group, for each its share.

    Raises:
        ConfigError: a floor above the rate that is to come down to it, or what the schedule itself refuses.
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    before: Any = args.lr_scheduler_kwargs
    given = {**(_greedy_defaults() if name == "greedy" else {}), **(before or {})}
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for key in ("min_lr", "lr_end"):
        floor = given.get(key)
        if isinstance(floor, int | float) and floor > rates[0]:
            raise ConfigError(
                f"lr_scheduler_type={name!r} falls to {key}={floor:g}, which is above the learning rate {rates[0]:g}; "
                "give lr_scheduler_kwargs a lower one, or a higher learning_rate"
            )
    if name in _BY_GROUP and rates[0] and len(set(rates)) > 1:
        absolute = {k: given[k] for k in _ABSOLUTE if isinstance(given.get(k), int | float)}
        args.lr_scheduler_kwargs = given | {k: [v * r / rates[0] for r in rates] for k, v in absolute.items()}
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as exc:
        why = "the learning rate is 0" if isinstance(exc, ZeroDivisionError) else exc
        raise ConfigError(
            f"lr_scheduler_type={name!r} can't be made with lr_scheduler_kwargs={before}, learning rate {rates[0]:g}: "
            f"{why}"
        ) from exc
    finally:
        args.lr_scheduler_kwargs = before


def _greedy_defaults() -> dict[str, Any]:
    from transformers.optimization import GreedyLR

    parameters = inspect.signature(GreedyLR).parameters
    return {name: parameters[name].default for name in _ABSOLUTE if name in parameters}


def scale(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply every learning rate, now and for the rest of a schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if "max_lr" in group:  # torch's OneCycleLR goes by what stands in the groups
            for key in ("initial_lr", "max_lr", "min_lr"):
                group[key] *= factor
    _scale_schedule(scheduler, factor)


def _scale_schedule(scheduler: Any, factor: float) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _scale_schedule(inner, factor)
    for name in ("base_lrs", "max_lrs", "min_lrs", "_init_lrs"):
        if isinstance(rates := getattr(scheduler, name, None), list):
            setattr(scheduler, name, [rate * factor for rate in rates])
