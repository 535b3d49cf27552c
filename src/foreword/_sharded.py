"""A base model that FSDP2 has spread over processes: which of its parameters are to be frozen there.

Each parameter is there twice, as this process's shard and as the whole that is gathered for a forward pass, and the
model shows the one that is in use. The whole takes its ``requires_grad`` from the shard, so freezing the whole would
not last: the frozen base would have gradients, sent around, and counted when the prefix's are clipped.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread a model over processes."""
    return any(hasattr(module, "unshard") and hasattr(module, "reshard") for module in model.modules())


def show_shards(model: nn.Module) -> None:
    """Have ``parameters()`` give the shards: some layers stay whole after a forward pass."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()
