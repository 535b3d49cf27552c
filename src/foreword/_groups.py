"""What is trained, counted and in groups with a learning rate for each method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from foreword.config import PrefixConfig
from foreword.methods import LEARNING_RATES, usual_learning_rate

if TYPE_CHECKING:
    from foreword.tuning import Tuning


def parameter_groups(tuning: Tuning, learning_rate: float | None) -> list[dict[str, Any]]:
    """See :meth:`foreword.tuning.Tuning.parameter_groups`."""
    holder = tuning.holder
    # Where each method's numbers are; those of prefixes, and of prompts that became one, are the first.
    places: dict[str, list[nn.Module]] = {
        "direct": [holder.encoder, holder.bias, holder.gate, holder.reading],
        "memory": [holder.memory] if holder.memory is not None else [],
        **{method: [part] for method, part in holder.weights.items()},
    }
    wanted = []
    for config in tuning.configs:
        own = config.method if not isinstance(config, PrefixConfig) and config.method in places else "direct"
        wanted.append((places.pop(own), config.learning_rate, usual_learning_rate(config)))
    loaded = {**LEARNING_RATES, "direct": LEARNING_RATES["mlp" if tuning.encoder.asks == "condition" else "direct"]}
    head = next(filter(None, (getattr(c, "head_learning_rate", None) for c in tuning.configs)), None)
    wanted += [(own, head if method == "head" else None, loaded[method]) for method, own in places.items()]
    groups: list[dict[str, Any]] = []
    for modules, rate, usual in wanted:
        chosen = [p for m in modules for p in m.parameters() if p.requires_grad]
        if chosen:
            first = learning_rate if not groups else None
            groups.append({"params": chosen, "lr": next(r for r in (rate, first, usual) if r is not None)})
    return groups


def counts(tuning: Tuning) -> tuple[int, int]:
    """How many numbers are trained, and how many there are in the model and what stands on it."""
    everything = {id(p): p for p in tuning.model.parameters()}  # once, however many modules share it
    return tuning.num_parameters, sum(map(_numbers, everything.values()))


def _numbers(parameter: nn.Parameter) -> int:
    if type(parameter).__name__ == "Params4bit":  # bitsandbytes packs two numbers into each byte
        return parameter.numel() * parameter.element_size() * 2
    return parameter.numel()
