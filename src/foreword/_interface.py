"""How transformers calls us: one attention function a delegate, registered under ``foreword_<delegate>``.

transformers 5 looks its attention up by the name in ``config._attn_implementation``. ``install`` puts our name
there (in every config object of the model, each with the delegate it had), ``uninstall`` puts the old one back.
Our function looks for a *slot* on the attention module: without one it is the delegate, called as it was.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from foreword.errors import UnsupportedModelError

PREFIX = "foreword_"
SLOT = "_foreword_slot"

Delegate = Callable[..., tuple[Tensor, Tensor | None]]


class Slot(Protocol):
    """What stands on an attention module and answers its calls."""

    def __call__(
        self, delegate: Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip


def _register(delegate_name: str) -> str:
    """Register our function over a delegate (once a process); returns the name to put into a config."""
    name = PREFIX + delegate_name
    if name in AttentionInterface._global_mapping:
        return name
    registered = AttentionInterface._global_mapping.get(delegate_name)

    def foreword_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        delegate = registered if registered is not None else eager_function(type(module))
        slot: Slot | None = module.__dict__.get(SLOT)
        if slot is None:
            return delegate(module, query, key, value, attention_mask, **kwargs)
        return slot(delegate, delegate_name, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, foreword_attention)
    if (mask_function := AttentionMaskInterface._global_mapping.get(delegate_name)) is not None:
        AttentionMaskInterface.register(name, cast(Callable[..., Any], mask_function))
    return name


def eager_function(cls: type[nn.Module]) -> Delegate:
    """The eager attention that a module's own file defines: transformers passes it as the default.

    Raises:
        UnsupportedModelError: the file has none.
    """
    for base in cls.__mro__:
        # The file that defines forward, not the one that inherits it, holds the function that forward names.
        forward = base.__dict__.get("forward")
        for home in (getattr(inspect.unwrap(forward), "__globals__", {}) if forward else {},
                     vars(sys.modules.get(base.__module__, sys))):  # fmt: skip
            function = home.get("eager_attention_forward")
            if function is not None:
                return function
    raise UnsupportedModelError(
        f"{cls.__name__} runs eager attention that foreword cannot find; load the model with attn_implementation='sdpa'"
    )


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object that some module of the model reads, each once."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def install(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str]]:
    """Route the model's attention through foreword; returns what ``uninstall`` needs.

    Raises:
        UnsupportedModelError: the model does not look its attention up by name.
    """
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} computes its attention in its own code instead of transformers' attention "
            "interface, so nothing can be placed before its keys and values. Expected: a model whose file calls "
            "ALL_ATTENTION_FUNCTIONS (Llama, Qwen, Gemma, GPT-2, BERT, T5, ViT and most others do)"
        )
    undo = []
    for config in configs_of(model):
        delegate = config._attn_implementation_internal
        if delegate is None or delegate.startswith(PREFIX):
            continue
        name = _register(delegate)
        config._attn_implementation_internal = name
        undo.append((config, delegate))
    return undo


def uninstall(undo: list[tuple[PreTrainedConfig, str]]) -> None:
    """Put the delegates back."""
    for config, delegate in undo:
        config._attn_implementation_internal = delegate
