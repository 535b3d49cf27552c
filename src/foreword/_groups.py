"""What an optimizer takes: the parameters of each method, with a learning rate of their own."""

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
            groups.append({"params": chosen, "lr": rate or first or usual})
    return groups
