"""Models inside something else: PEFT's wrapper is looked through, others are refused with what to do."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foreword.errors import ConfigError


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model that a call gets: itself, or the one inside a ``PeftModel``.

    Raises:
        ConfigError: it is in another wrapper, or is none; the message says what to give instead.
    """
    if isinstance(model, PreTrainedModel):
        return model
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            kind = str(model.active_peft_config.peft_type.value)
            raise ConfigError(
                f"the PeftModel puts virtual tokens of its own before the text ({kind}), beside which foreword's "
                "would be counted wrongly; save it and read it with foreword.exchange.peft.read_peft (PREFIX_TUNING), "
                "or give the model inside, peft_model.get_base_model()"
            )
        return unwrapped(inside(model))
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            "this is a compiled model (torch.compile), whose code was or will be made without what is attached; give "
            "foreword the model itself (compiled._orig_mod), and compile it after attaching"
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        raise ConfigError(
            f"this is a {name} around the model, made for the parameters that the model had then; give foreword the "
            "model itself (wrapper.module), and wrap it after attaching"
        )
    raise ConfigError(
        f"expected a transformers model (PreTrainedModel), not {name}; load one first (model, tokenizer = "
        "fw.load_model(...)), or where this holds one, give foreword that"
    )


def inside(model: nn.Module) -> nn.Module:
    """What PEFT's wrapper is around; any other model itself."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model
    return model


def refuse_meta(model: nn.Module) -> None:
    """Raise ConfigError for a model that is a plan without numbers."""
    from foreword._offloaded import is_offloaded

    parameters = list(model.parameters())
    if parameters and all(p.is_meta for p in parameters) and not is_offloaded(model):
        raise ConfigError(
            f"{type(model).__name__} is on the meta device: it has shapes and no numbers, so nothing can be attached "
            "to it. Load its weights first (from_pretrained, or to_empty and load_state_dict)"
        )
