"""Where each layer's attention and feed-forward end: the places of adapters, found by running the model.

Nothing is known of the architecture. What is found is proved: with the chosen layers' outputs held still, and
everything else inside the layers that has weights disturbed, every layer must still give what it gave. So nothing of
a sublayer (an expert, a gate, a second branch) goes past the place that stands for its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foreword.errors import ConfigError
from foreword.sites import Call, dry_run

Events = list[tuple[str, str]]  # ("linear" or "attention", the module's name), in the order they ran


def sublayer_outputs(
    model: PreTrainedModel, after_attention: bool, example_inputs: Mapping[str, Any] | None = None
) -> list[str]:
    """The linear layers that end each layer's attention (on request) and feed-forward, in the order they run.

    The last linear layer of an attention module, or the next one after it, ends the attention; the last one of a layer
    ends its feed-forward.

    Raises:
        ConfigError: a layer has no such linear layer (a mixture of experts, say).
    """
    events: Events = []
    handles = [
        m.register_forward_hook(lambda _m, _a, _o, name=name: events.append(("linear", name)))
        for name, m in linear_layers(model)
    ]
    try:
        dry_run(model, lambda call, _: _note(events, call), example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    called = [layer_of(model, name) for kind, name in events if kind == "attention"]
    layers = list(dict.fromkeys(layer for layer in called if layer is not None))
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no list of layers, so there is no place for adapters")
    chosen: list[str] = []
    everything: list[str] = []
    for layer in layers:
        own = [(kind, name) for kind, name in events if name == layer or name.startswith(f"{layer}.")]
        ends = [_end_of_attention(own, i) for i, (kind, _) in enumerate(own) if kind == "attention"]
        last = own[-1][1] if own[-1][0] == "linear" else None
        sizes = {width(model.get_submodule(n)) for n in ends if n}
        if None in ends or last is None or last in ends or width(model.get_submodule(last)) not in sizes:
            raise _no_place(layer)
        chosen += [n for n in (*(ends if after_attention else ()), last) if n is not None]
        everything += [n for n in (*ends, last) if n is not None]
    _prove(model, layers, everything, example_inputs)
    return chosen


def _no_place(layer: str) -> ConfigError:
    return ConfigError(
        f"{layer} does not end in a linear layer of the residual's width after its attention that all of its "
        "feed-forward goes through (a mixture of experts, a shared expert beside others, or attention alone), so there "
        "is no output to adapt; use LoRA or a prefix with this model"
    )


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers by name; one with an adapter of PEFT's around it counts as one, with what PEFT adds."""
    found: list[tuple[str, nn.Module]] = []
    around = ""
    for name, module in model.named_modules():
        if around and name.startswith(around):
            continue
        if isinstance(_bare(module), nn.Linear | Conv1D):
            found.append((name, module))
            around = f"{name}."
    return found


def _bare(module: nn.Module) -> nn.Module:
    """What a layer of PEFT's stands around; any other module itself."""
    base = getattr(module, "get_base_layer", None)
    return base() if callable(base) else module


def layer_of(model: PreTrainedModel, name: str) -> str | None:
    """The outermost element of a list of layers around a module."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def width(module: nn.Module) -> int:
    """Features that a linear layer gives."""
    bare = _bare(module)
    weight: Any = bare.weight
    return int(weight.shape[1] if isinstance(bare, Conv1D) else weight.shape[0])


def _note(events: Events, call: Call) -> None:
    events.append(("attention", call.name))


def _end_of_attention(events: Events, start: int) -> str | None:
    """The last linear layer inside the attention module before the next call, else the next one outside."""
    after = events[start + 1 :]
    upto = next((i for i, (kind, _) in enumerate(after) if kind == "attention"), len(after))
    inside = [n for _, n in after[:upto] if n.startswith(f"{events[start][1]}.")]
    return inside[-1] if inside else next((n for kind, n in after[:upto] if kind == "linear"), None)


def _prove(
    model: PreTrainedModel, layers: Sequence[str], held: Sequence[str], example_inputs: Mapping[str, Any] | None
) -> None:
    """Raise ConfigError for a layer that something goes through beside the chosen outputs."""
    inside = tuple(f"{layer}." for layer in layers)
    parts = tuple(f"{name}." for name in held)
    others = [
        name for name, module in model.named_modules()
        if name.startswith(inside) and name not in held and not name.startswith(parts)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
    ]  # fmt: skip
    seen: dict[str, list[Tensor]] = {name: [] for name in (*held, *layers)}
    handles = [model.get_submodule(n).register_forward_hook(_recorder(seen[n])) for n in seen]
    try:
        dry_run(model, lambda *_: None, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    now: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [model.get_submodule(n).register_forward_hook(_disturb) for n in others]
    handles += [model.get_submodule(n).register_forward_hook(_replayer(list(seen[n]))) for n in held]
    handles += [model.get_submodule(n).register_forward_hook(_recorder(now[n])) for n in layers]
    try:
        dry_run(model, lambda *_: None, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if not all(torch.equal(a, b) for a, b in zip(seen[layer], now[layer], strict=True)):
            raise _no_place(layer)


def _first(output: Any) -> Tensor:
    """The hidden states that a module gives."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _recorder(seen: list[Tensor]) -> Any:
    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(_first(output).clone())

    return record


def _replayer(seen: list[Tensor]) -> Any:
    return lambda _module, _args, _output: seen.pop(0)


def _disturb(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Something else, of the same shape and scale."""
    if isinstance(output, tuple):
        return tuple(_disturb(_module, _args, o) for o in output)
    return 1.5 * output + 0.25 if isinstance(output, Tensor) and output.is_floating_point() else output
