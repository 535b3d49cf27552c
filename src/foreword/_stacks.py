"""The stacks of layers in a model: which transformers model around a site is told what its queries are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foreword.sites import Site


def stack_of(model: PreTrainedModel, site: str) -> str:
    """The name of the innermost model around a site whose call says where its queries stand; empty: the model."""
    names = site.split(".")
    for end in range(len(names) - 1, 0, -1):
        name = ".".join(names[:end])
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel) and reads_text(module):
            return name
    return ""


def positioned_stacks(model: PreTrainedModel, sites: Sequence[Site]) -> list[PreTrainedModel]:
    """The stacks around these sites that can be told their positions (``position_ids``), each once."""
    names = dict.fromkeys(stack_of(model, s.name) for s in sites)
    stacks = [model.get_submodule(name) for name in names]
    return [s for s in stacks if isinstance(s, PreTrainedModel) and reads_text(s) and takes(s, "position_ids")]


def reads_text(module: nn.Module) -> bool:
    """Whether a module's call is given token ids or their embeddings."""
    return takes(module, "input_ids") or takes(module, "inputs_embeds")


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's call has an argument of this name."""
    return argument in inspect.signature(module.forward).parameters


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
