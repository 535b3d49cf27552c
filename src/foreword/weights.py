"""Methods that change a model's layers: LoRA, adapters, BitFit, full fine-tuning, and a trained head.

Each is a *part* that goes onto a model in place and comes off again without a trace. Its numbers are tensors by name,
saved in the same file as a prefix.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foreword._offloaded import device_of, refuse_placeholders
from foreword.errors import ConfigError, MismatchError, MissingPartError, PrecisionWarning
from foreword.methods import AdapterConfig, BitFitConfig, FullConfig, LoRAConfig
from foreword.sites import Call, dry_run

HEADS = {
    "sequence": "SequenceClassification", "token": "TokenClassification", "question": "QuestionAnswering",
    "choice": "MultipleChoice",
}  # fmt: skip


class WeightPart(nn.Module):
    """Parameters that a method trains, by name. Subclasses put them onto the model and take them off."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.names: list[str] = []
        self.values = nn.ParameterList()

    def put_on(self, model: PreTrainedModel) -> None:
        """Change the model in place and fill ``names`` and ``values``."""
        raise NotImplementedError

    def take_off(self, model: PreTrainedModel) -> None:
        """Make the model what it was, to the last bit."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The numbers as they stand, by name."""
        return {n: v.detach().clone() for n, v in zip(self.names, self.values, strict=True)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved numbers.

        Raises:
            MismatchError: they are of another model or configuration.
        """
        if tensors.keys() != set(self.names):
            odd = sorted(tensors.keys() ^ set(self.names))[0]
            raise MismatchError(f"the saved {self.method} doesn't fit this model: {odd} is not in both")
        for name, value in zip(self.names, self.values, strict=True):
            if value.shape != tensors[name].shape:
                raise MismatchError(
                    f"the saved {self.method} doesn't fit this model: {name} is {tuple(tensors[name].shape)} there and "
                    f"{tuple(value.shape)} here"
                )
            value.copy_(tensors[name])


class OwnParameters(WeightPart):
    """Some of the model's own parameters: all (full fine-tuning), the biases (BitFit), or the head.

    What they were is kept, so that they can be put back.
    """

    def __init__(self, method: str, chosen: Mapping[str, nn.Parameter], added: list[nn.Module] | None = None) -> None:
        super().__init__(method)
        self.names = list(chosen)
        self.values = nn.ParameterList(chosen.values())
        self.originals = [p.detach().clone() for p in chosen.values()]
        self.added = added or []  # linear layers that were given a bias
        if narrow := {str(p.dtype).removeprefix("torch.") for p in chosen.values() if p.dtype.itemsize < 4}:
            warnings.warn(
                f"{method} trains the base's own {' and '.join(sorted(narrow))} numbers: steps that are small beside a "
                'number are rounded away; load the base in float32 (dtype="float32") to train it so',
                PrecisionWarning,
                stacklevel=5,
            )

    def put_on(self, model: PreTrainedModel) -> None:
        pass

    @torch.no_grad()
    def take_off(self, model: PreTrainedModel) -> None:
        for value, original in zip(self.values, self.originals, strict=True):
            value.copy_(original)
        for module in self.added:
            module.register_parameter("bias", None)


class LoRA(WeightPart):
    """PEFT's LoRA, injected in place."""

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__("lora")
        self.config = config

    def put_on(self, model: PreTrainedModel) -> None:
        try:
            import peft
        except ImportError as exc:
            raise MissingPartError("LoRA is PEFT's: pip install 'foreword[lora]'") from exc
        flags = {p: p.requires_grad for p in model.parameters()}
        c = self.config
        targets = c.targets if isinstance(c.targets, str | None) else list(c.targets)
        try:
            lora = peft.LoraConfig(
                r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout, target_modules=targets, **c.options
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(c.seed)
                peft.inject_adapter_in_model(lora, model, adapter_name="foreword")
        except (ValueError, TypeError) as exc:
            self.take_off(model)
            raise ConfigError(f"PEFT refuses this LoRA: {exc}") from exc
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        found = {n: p for n, p in model.named_parameters() if p not in flags}
        refuse_placeholders(model, found, "LoRA (PEFT puts it where the weights are)")
        for parameter in found.values():
            if parameter.dtype in (torch.float16, torch.bfloat16):  # trained in float32, as PEFT's own models do
                parameter.data = parameter.data.float()
        self.names, self.values = list(found), nn.ParameterList(found.values())

    def take_off(self, model: PreTrainedModel) -> None:
        if importlib.util.find_spec("peft") is None:
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        model.__dict__.pop("peft_config", None)


class Adapters(WeightPart):
    """Bottlenecks on the outputs of sublayers, by forward hooks. Where these outputs are, a dry run tells."""

    def __init__(self, config: AdapterConfig, example_inputs: Mapping[str, Any] | None) -> None:
        super().__init__("adapter")
        self.config = config
        self.example_inputs = example_inputs
        self.handles: list[Any] = []

    def put_on(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        act = {"relu": torch.relu, "gelu": nn.functional.gelu}[self.config.activation]
        for name in sublayer_outputs(model, self.config.style == "houlsby", self.example_inputs):
            module = model.get_submodule(name)
            size, width = _width(module), self.config.width
            down = torch.randn(width, size, generator=generator) * size**-0.5
            device = device_of(module)
            parts = [nn.Parameter(t.to(device)) for t in (down, torch.zeros(width), torch.zeros(size, width),
                                                                 torch.zeros(size))]  # fmt: skip
            self.names += [f"{name}.{p}" for p in ("down.weight", "down.bias", "up.weight", "up.bias")]
            self.values.extend(parts)
            first = len(self.values) - 4

            def adapt(_: nn.Module, args: Any, output: Tensor, first: int = first) -> Tensor:
                down, down_bias, up, up_bias = (self.values[first + i].to(output) for i in range(4))
                linear = nn.functional.linear
                return output + linear(act(linear(output, down, down_bias)), up, up_bias)

            self.handles.append(module.register_forward_hook(adapt))

    def take_off(self, model: PreTrainedModel) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def sublayer_outputs(
    model: PreTrainedModel, after_attention: bool, example_inputs: Mapping[str, Any] | None = None
) -> list[str]:
    """The linear layers that end each layer's attention (on request) and feed-forward, in the order they run.

    Nothing is known of the architecture: the first linear layer after an attention call ends the attention, and the
    last one of a layer ends its feed-forward.

    Raises:
        ConfigError: a layer has no such linear layer (a mixture of experts, say).
    """
    events: list[tuple[str, str]] = []
    handles = [
        m.register_forward_hook(lambda _m, _a, _o, name=name: events.append(("linear", name)))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    ]
    try:
        dry_run(model, lambda call, _: _note(events, call), example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    called = [_layer(model, name) for kind, name in events if kind == "attention"]
    layers = list(dict.fromkeys(layer for layer in called if layer is not None))
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no list of layers, so there is no place for adapters")
    chosen: list[str] = []
    for layer in layers:
        own = [(kind, name) for kind, name in events if name == layer or name.startswith(f"{layer}.")]
        ends = [_next_linear(own, i) for i, (kind, _) in enumerate(own) if kind == "attention"]
        last = own[-1][1] if own[-1][0] == "linear" else None
        sizes = {_width(model.get_submodule(n)) for n in ends if n}
        if None in ends or last is None or last in ends or _width(model.get_submodule(last)) not in sizes:
            raise ConfigError(
                f"{layer} does not end in a linear layer of the residual's width after its attention (a mixture of "
                "experts, or attention alone), so there is no output to adapt; use LoRA or a prefix with this model"
            )
        chosen += [n for n in (*(ends if after_attention else ()), last) if n is not None]
    return chosen


def _note(events: list[tuple[str, str]], call: Call) -> None:
    events.append(("attention", call.name))


def _next_linear(events: list[tuple[str, str]], start: int) -> str | None:
    return next((name for kind, name in events[start:] if kind == "linear"), None)


def _layer(model: PreTrainedModel, name: str) -> str | None:
    """The outermost element of a list of layers around a module."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def _width(module: nn.Module) -> int:
    """Features that a linear layer gives."""
    weight: Any = module.weight
    return int(weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0])


# ------------------------------------------------------------------------------------------ which of its own parameters


def bias_parameters(model: PreTrainedModel, config: BitFitConfig) -> OwnParameters:
    """The part that trains biases.

    Raises:
        ConfigError: the model has none.
    """
    added: list[nn.Module] = []
    if config.missing == "add":
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None]
        bare = {n: m for n, m in found if _layer(model, n) is not None}
        refuse_placeholders(model, {f"{n}.weight": m.weight for n, m in bare.items()}, "BitFit")
        for module in bare.values():
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
            added.append(module)
    chosen = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] == "bias"}
    refuse_placeholders(model, chosen, "BitFit")
    if not chosen:
        raise ConfigError(
            f'{type(model).__name__} has no biases to train; BitFitConfig(missing="add") gives its linear layers '
            "biases of zero"
        )
    return OwnParameters("bitfit", chosen, added)


def all_parameters(model: PreTrainedModel, config: FullConfig) -> OwnParameters:
    """The part that trains the model itself.

    Raises:
        ConfigError: no parameter matches.
    """
    try:
        pattern = re.compile(config.parameters or ".*")
    except re.error as exc:
        raise ConfigError(f"parameters={config.parameters!r} is not a regular expression: {exc}") from None
    chosen = {n: p for n, p in model.named_parameters() if pattern.fullmatch(n) and p.is_floating_point()}
    refuse_placeholders(model, chosen, "full fine-tuning")
    if not chosen:
        first = next(n for n, _ in model.named_parameters())
        raise ConfigError(f"parameters={config.parameters!r} matches no parameter such as {first!r}")
    return OwnParameters("full", chosen)


def head_parameters(model: PreTrainedModel, kind: str) -> OwnParameters:
    """The part that trains a model's own head: all that stands after the backbone's last layer.

    That is what the model has outside its backbone, and the pooler that some keep inside it: a checkpoint without one
    gets a random one at loading, which would be another one the next time.

    Raises:
        ConfigError: the model has no head of this kind.
    """
    from transformers.models.auto import modeling_auto

    task = HEADS[kind]
    mapping = "MODEL_FOR_" + re.sub(r"(?<!^)(?=[A-Z])", "_", task).upper() + "_MAPPING_NAMES"
    known = {n for e in getattr(modeling_auto, mapping).values() for n in ([e] if isinstance(e, str) else e)}
    backbone = f"{model.base_model_prefix}."
    chosen = {n: p for n, p in model.named_parameters() if not n.startswith(backbone)}
    if type(model).__name__ not in known or not chosen:
        raise ConfigError(
            f"head={kind!r}, but {type(model).__name__} has no such head; load the model with AutoModelFor{task}, or "
            "leave head out"
        )
    chosen |= {n: p for n, p in model.named_parameters() if n.startswith(f"{backbone}pooler")}
    refuse_placeholders(model, chosen, f"head={kind!r}")
    return OwnParameters("head", chosen)
