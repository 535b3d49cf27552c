"""Methods that change a model's layers: adapters, BitFit, full fine-tuning, a trained head (LoRA is in ``_lora``).

Each is a *part* that goes onto a model in place and comes off again without a trace. Its numbers are tensors by name,
saved in the same file as a prefix.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from foreword._offloaded import device_of, refuse_placeholders
from foreword._sublayers import layer_of, linear_layers, sublayer_outputs, width
from foreword.errors import AttachError, ConfigError, MismatchError, PrecisionWarning
from foreword.methods import AdapterConfig, BitFitConfig, FullConfig

HEADS = {
    "sequence": "SequenceClassification", "token": "TokenClassification", "question": "QuestionAnswering",
    "choice": "MultipleChoice",
}  # fmt: skip


_ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu}


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

    def check_off(self, model: PreTrainedModel) -> None:
        """Raise AttachError if the part can't be taken off as the model stands now."""

    @contextmanager
    def hidden(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block, the model's modules and names are those of the base."""
        yield

    def without(self, state: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """A state dict of the model without what the part added, under the base's names."""
        return dict(state)

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

    def check_off(self, model: PreTrainedModel) -> None:
        for name, value, original in zip(self.names, self._now(model), self.originals, strict=True):
            if value.shape != original.shape:
                raise AttachError(
                    f"{self.method} can't give {name} back the numbers that it had: it was {tuple(original.shape)} and "
                    f"is {tuple(value.shape)} now. Give it its size back and call detach() again; to train with "
                    "another size, change it before attaching"
                )

    def _now(self, model: PreTrainedModel) -> list[Tensor]:
        """The model's parameters of these names, which may have been replaced; PEFT's layers change names."""
        there: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        return [there.get(n, v) for n, v in zip(self.names, self.values, strict=True)]

    @torch.no_grad()
    def take_off(self, model: PreTrainedModel) -> None:
        for value, original in zip(self._now(model), self.originals, strict=True):
            value.copy_(original)
        for module in self.added:
            module.register_parameter("bias", None)


class Adapters(WeightPart):
    """Bottlenecks on the outputs of sublayers, by forward hooks. Where these outputs are, a dry run tells."""

    def __init__(self, config: AdapterConfig, example_inputs: Mapping[str, Any] | None) -> None:
        super().__init__("adapter")
        self.config = config
        self.example_inputs = example_inputs
        self.handles: list[Any] = []

    def put_on(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        for name in sublayer_outputs(model, self.config.style == "houlsby", self.example_inputs):
            module = model.get_submodule(name)
            size, narrow = width(module), self.config.width
            down = torch.randn(narrow, size, generator=generator) * size**-0.5
            device = device_of(module)
            parts = [nn.Parameter(t.to(device)) for t in (down, torch.zeros(narrow), torch.zeros(size, narrow),
                                                                 torch.zeros(size))]  # fmt: skip
            self.names += [f"{name}.{p}" for p in ("down.weight", "down.bias", "up.weight", "up.bias")]
            self.values.extend(parts)
            # A partial of a bound method, not a closure: a deep copy of the model then has its own.
            adapt = partial(self._adapt, len(self.values) - 4)
            self.handles.append(module.register_forward_hook(adapt))

    def _adapt(self, first: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (self.values[first + i].to(output) for i in range(4))
        linear = nn.functional.linear
        return output + linear(_ACTIVATIONS[self.config.activation](linear(output, down, down_bias)), up, up_bias)

    def take_off(self, model: PreTrainedModel) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


# ------------------------------------------------------------------------------------------ which of its own parameters


def bias_parameters(model: PreTrainedModel, config: BitFitConfig, taken: Collection[str] = ()) -> OwnParameters:
    """The part that trains biases, but for those of these names, which another part trains.

    Raises:
        ConfigError: the model has none.
    """
    added: list[nn.Module] = []
    if config.missing == "add":
        # Linear layers themselves, not what PEFT puts beside them.
        found: list[tuple[str, Any]] = [(n, getattr(m, "base_layer", m)) for n, m in linear_layers(model)]
        bare = {
            n: m for n, m in found if isinstance(m, nn.Linear) and m.bias is None and layer_of(model, n) is not None
        }
        refuse_placeholders(model, {f"{n}.weight": m.weight for n, m in bare.items()}, "BitFit")
        for module in bare.values():
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
            added.append(module)
    chosen = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] == "bias" and n not in taken}
    refuse_placeholders(model, chosen, "BitFit")
    if not chosen:
        raise ConfigError(
            f'{type(model).__name__} has no biases to train; BitFitConfig(missing="add") gives its linear layers '
            "biases of zero"
        )
    return OwnParameters("bitfit", chosen, added)


def all_parameters(model: PreTrainedModel, config: FullConfig, taken: Collection[str] = ()) -> OwnParameters:
    """The part that trains the model itself, but for what another part trains.

    Raises:
        ConfigError: no parameter matches.
    """
    try:
        pattern = re.compile(config.parameters or ".*")
    except re.error as exc:
        raise ConfigError(f"parameters={config.parameters!r} is not a regular expression: {exc}") from None
    fitting = {n: p for n, p in model.named_parameters() if pattern.fullmatch(n) and p.is_floating_point()}
    chosen = {n: p for n, p in fitting.items() if n not in taken}
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
    chosen = _head(model, kind)
    refuse_placeholders(model, chosen, f"head={kind!r}")
    return OwnParameters("head", chosen)


def head_names(model: PreTrainedModel, kind: str) -> set[str]:
    """The names of what :func:`head_parameters` trains, by the same rules."""
    return set(_head(model, kind))


def _head(model: PreTrainedModel, kind: str) -> dict[str, nn.Parameter]:
    from transformers.models.auto import modeling_auto

    task = HEADS[kind]
    mapping = "MODEL_FOR_" + re.sub(r"(?<!^)(?=[A-Z])", "_", task).upper() + "_MAPPING_NAMES"
    known = {n for e in getattr(modeling_auto, mapping).values() for n in ([e] if isinstance(e, str) else e)}
    own = _outside_the_backbone(model) if type(model).__name__ in known else set()
    chosen = {n: p for n, p in model.named_parameters() if n in own}
    if type(model).__name__ not in known or not chosen:
        raise ConfigError(
            f"head={kind!r}, but {type(model).__name__} has no such head; load the model with AutoModelFor{task}, or "
            "leave head out"
        )
    pooler = f"{model.base_model_prefix}.pooler"
    return chosen | {n: p for n, p in model.named_parameters() if n.startswith(pooler)}


def _outside_the_backbone(model: PreTrainedModel) -> set[str]:
    """The names of the parameters that stand after the backbone.

    Some models have no module for the backbone and hold its parts themselves (T5 for question answering): there, the
    backbone's own class says which parts are its.
    """
    names = {n for n, _ in model.named_parameters() if not n.startswith("foreword.")}
    if hasattr(model, model.base_model_prefix):
        return {n for n in names if not n.startswith(f"{model.base_model_prefix}.")}
    try:
        with torch.device("meta"):
            backbone = AutoModel.from_config(copy.deepcopy(model.config))
    except ValueError:
        return set()
    return names - {n for n, _ in backbone.named_parameters()}
