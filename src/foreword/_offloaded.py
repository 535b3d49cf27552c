"""A base whose weights accelerate keeps elsewhere: on the CPU while a GPU computes, or on disk.

Between forward passes such a parameter is a placeholder on the meta device. A hook of its module brings the numbers in
before the module runs and takes them away afterwards, and each time makes a new ``Parameter``. So neither the device
nor the numbers of a parameter may be asked of the parameter itself, and it can't be remembered by its identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from foreword._sharded import show_shards
from foreword.errors import ConfigError


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of the weights are kept elsewhere."""
    return any(_hooks(module) for module in model.modules())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter is, or where a hook will put it."""
    first = next(module.parameters(), None)
    if first is None or first.is_meta:
        for inner in module.modules():
            for hook in _hooks(inner):
                if hook.execution_device is not None:
                    return torch.device(hook.execution_device)
    return first.device if first is not None else torch.device("cpu")


def is_there(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter has numbers, here or elsewhere; those of a model on the meta device have none."""
    return not parameter.is_meta or _keeper(model, name) is not None


def numbers(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """What a parameter's numbers are, wherever they are kept."""
    keeper = _keeper(model, name) if parameter.is_meta else None
    if keeper is None:
        return parameter
    hook, own_name = keeper
    found: Tensor = hook.weights_map[own_name]
    return found


def flags_of(model: nn.Module) -> dict[str, bool]:
    """Each parameter's ``requires_grad`` by name; what shares a tensor now may be apart when it is kept elsewhere."""
    show_shards(model)
    return {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}


def set_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    """Give every parameter its ``requires_grad`` back."""
    show_shards(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in flags:
            parameter.requires_grad_(flags[name])


def refuse_placeholders(model: nn.Module, chosen: dict[str, nn.Parameter], method: str) -> None:
    """Raise ConfigError if what a method would train is kept elsewhere: an optimizer can't move a placeholder."""
    away = next((n for n, p in chosen.items() if p.is_meta), None)
    if away is not None and is_offloaded(model):
        raise ConfigError(
            f"{method} would train {away}, which is kept outside of the memory that computes (offloaded); load the "
            "model without offloading, or train a prefix, whose numbers stay where they are used"
        )


@contextmanager
def to_the_end(model: nn.Module) -> Iterator[None]:
    """Inside the block, gradient checkpointing runs each layer of an offloaded model again as a whole.

    It would stop as soon as it has what the backward needs: in the midst of a layer's last module, whose hook would
    then not take the weights away.
    """
    if not is_offloaded(model):
        yield
        return
    with set_checkpoint_early_stop(False):
        yield


def settings(most: str | int, device: torch.device | None) -> dict[str, Any]:
    """What ``from_pretrained`` takes to keep in a device's memory no more than this of a model.

    The rest stays in the CPU's memory while another device computes, and on disk where that is full or the CPU
    computes.

    Raises:
        ConfigError: not a size.
    """
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    try:
        size = convert_file_size_to_int(most)
    except ValueError:
        size = 0
    if size <= 0:
        raise ConfigError(f'offload={most!r}; expected the most to keep in memory, such as "2GB" or "500MB"')
    place: Any = "cpu"
    if device is not None and device.type != "cpu":
        place = device.type if device.type == "mps" else device.index or 0
    elif device is None and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        place = "mps" if accelerator is not None and accelerator.type == "mps" else 0
    most_of = {place: size} if place == "cpu" else {place: size, "cpu": get_max_memory()["cpu"]}
    return {"device_map": "sequential", "max_memory": most_of}


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks that take a module's weights away."""
    hook = module.__dict__.get("_hf_hook")
    return [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)]


def _keeper(model: nn.Module, name: str) -> tuple[Any, str] | None:
    """The hook that knows a parameter's numbers, and its name there: of its module, or of one that places a block."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:end]))):
            if hook.weights_map is not None and (end == len(parts) - 1 or hook.place_submodules):
                return hook, ".".join(parts[end:])
    return None
