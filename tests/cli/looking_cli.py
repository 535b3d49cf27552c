"""A prefix for a model in a folder."""

from __future__ import annotations

import torch

import foreword as fw


def baked_in(folder, out, length, kind="causal-lm"):
    """A random prefix of the model in ``folder``, saved into ``out``."""
    model, _ = fw.load_model(folder, kind=kind)
    tuning = fw.attach(model, fw.PrefixConfig(length=length, init="random", seed=length))
    generator = torch.Generator().manual_seed(length)
    for parameter in tuning.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tuning.save(out)
    return out
