"""What a model's state is, for tests that hold it to be as it was."""

from __future__ import annotations

import torch


def move(tuning, by=0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


def peft_state(model):
    layers = {
        n: (m._active_adapter, m._disable_adapters, sorted(m._get_available_adapters()))
        for n, m in model.named_modules() if hasattr(m, "_get_available_adapters")
    }  # fmt: skip
    configs = model.__dict__.get("peft_config")
    return layers, None if configs is None else dict(configs), getattr(model, "_hf_peft_config_loaded", None)


def everything(model):
    return ([n for n, _ in model.named_modules()], list(model.state_dict()), flags(model), peft_state(model),
            sorted(model.__dict__), len(model._forward_pre_hooks))  # fmt: skip
