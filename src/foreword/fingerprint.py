"""What a prefix remembers of the model it was made on: a name, shapes, and a few weights.

A prefix on the wrong base model runs without an error and writes nonsense, so the file carries enough to notice.
Weights are compared as numbers within a tolerance, so the same model in another dtype is the same model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from foreword._offloaded import is_there, numbers
from foreword.sites import Site

_PARAMETERS, _NUMBERS = 8, 8


@dataclass(frozen=True)
class Fingerprint:
    """Of a base model.

    Attributes:
        base_model: the name or folder name that it was loaded by (may be empty).
        model_class: e.g. ``LlamaForCausalLM``.
        weights: a few numbers of a few parameters, by parameter name.
        layer_types: how many layers of each type the config names, where it does (e.g. linear attention).
    """

    base_model: str
    model_class: str
    weights: dict[str, list[float]] = field(default_factory=dict)
    layer_types: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, names: Collection[str] = ()) -> Fingerprint:
        """Of a model; with the parameters of these names where it has them, else of some that are spread over it."""
        name = str(getattr(model.config, "_name_or_path", "") or "")
        if Path(name).is_absolute() or Path(name).exists():
            name = Path(name).name  # a folder of this machine means nothing on another
        types: dict[str, int] = {}
        for kind in getattr(model.config.get_text_config(), "layer_types", None) or []:
            types[str(kind)] = types.get(str(kind), 0) + 1
        return cls(name, type(model).__name__, _sample(model, names), types)

    def difference(self, other: Fingerprint) -> str | None:
        """What differs in the weights, in words; None where all numbers known to both agree."""
        for name, mine in self.weights.items():
            theirs = other.weights.get(name)
            if theirs is None:
                continue
            # bf16 and fp16 keep 8 and 11 bits; another model differs by its whole size.
            close = [math.isclose(a, b, rel_tol=0.02, abs_tol=1e-4) for a, b in zip(mine, theirs, strict=False)]
            if not all(close):
                return f"parameter {name} begins {_short(mine)} there and {_short(theirs)} here"
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "base_model": self.base_model,
            "model_class": self.model_class,
            "weights": self.weights,
            "layer_types": self.layer_types,
        }


def shape_differences(mine: Sequence[Site], theirs: Sequence[Site]) -> list[str]:
    """Where the sites of a prefix don't fit those of a model, in words."""
    known = {s.name: s for s in theirs}
    problems = []
    for site in mine:
        here = known.get(site.name)
        if here is None:
            problems.append(f"no attention site {site.name}")
        elif (site.kv_heads, site.key_dim, site.value_dim) != (here.kv_heads, here.key_dim, here.value_dim):
            problems.append(
                f"{site.name} has {here.kv_heads} key/value heads of {here.key_dim}/{here.value_dim} dimensions, "
                f"the prefix {site.kv_heads} of {site.key_dim}/{site.value_dim}"
            )
    return problems


def _sample(model: PreTrainedModel, names: Collection[str]) -> dict[str, list[float]]:
    """The first numbers of a few floating-point parameters spread over the backbone, or of those named.

    A head may be new and random, and so may a pooler that the checkpoint lacks. Quantised weights are left out: the
    same base in another width is the same base, and embeddings and norms, which keep theirs, tell two bases apart. Of
    weights that are kept elsewhere (offloaded), the numbers are fetched.
    """
    usable = [
        (n, p) for n, p in model.named_parameters()
        if p.is_floating_point() and is_there(model, n, p) and p.numel() >= _NUMBERS and not n.startswith("foreword.")
        and (hasattr(p, "full_tensor") or not is_traceable_wrapper_subclass(p))
    ]  # fmt: skip
    backbone = f"{model.base_model_prefix}."
    inside = [(n, p) for n, p in usable if n.startswith(backbone) and not n.startswith(f"{backbone}pooler")]
    usable = inside or usable
    if not usable:
        return {}
    named = [(n, p) for n, p in usable if n in names]
    step = max(1, len(usable) // _PARAMETERS)
    chosen = named or usable[::step][:_PARAMETERS]
    with torch.no_grad():
        whole = {n: _whole(numbers(model, n, p)) for n, p in chosen}
        return {n: [float(x) for x in tensor.flatten()[:_NUMBERS].float().cpu()] for n, tensor in whole.items()}


def _whole(parameter: Tensor) -> Tensor:
    """Of one that FSDP has spread over processes, all of it (which every process has to ask for)."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def _short(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in numbers[:3]) + ", …]"
