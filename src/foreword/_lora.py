"""LoRA through PEFT, on a model that may carry adapters of its user's own.

PEFT keeps one list of active adapters a layer and puts a new adapter there alone. Here the user's stay as they were:
both act while ours is attached, and taking ours off leaves each layer, its list, and every flag as it was.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword._offloaded import refuse_placeholders
from foreword.errors import AttachError, ConfigError, MissingPartError
from foreword.methods import LoRAConfig
from foreword.weights import WeightPart

ADAPTER = "foreword"  # PEFT's name of ours


class LoRA(WeightPart):
    """PEFT's LoRA, injected in place."""

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__("lora")
        self.config = config
        # Of the user's own: a layer, which of its adapters were active, whether they were switched off, in PEFT's form.
        self.own: list[tuple[nn.Module, Any, bool]] = []
        self.had_configs = False
        self.handles: list[Any] = []
        self.watched: list[Any] = []  # one of PEFT's layers, which tells whether ours is active

    def put_on(self, model: PreTrainedModel) -> None:
        try:
            import peft
        except ImportError as exc:
            raise MissingPartError("LoRA is PEFT's: pip install 'foreword[lora]'") from exc
        flags = {p: p.requires_grad for p in model.parameters()}
        c = self.config
        targets = c.targets if isinstance(c.targets, str | None) else list(c.targets)
        self._look_at_own(model)
        try:
            lora = peft.LoraConfig(
                r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout, target_modules=targets, **c.options
            )
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                torch.manual_seed(c.seed)
                peft.inject_adapter_in_model(lora, model, adapter_name=ADAPTER)
        except (ValueError, TypeError) as exc:
            self.take_off(model)
            raise ConfigError(f"PEFT refuses this LoRA: {exc}") from exc
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        self._switch_both_on()
        found = {n: p for n, p in model.named_parameters() if p not in flags}
        refuse_placeholders(model, found, "LoRA (PEFT puts it where the weights are)")
        for parameter in found.values():
            if parameter.dtype in (torch.float16, torch.bfloat16):  # trained in float32, as PEFT's own models do
                parameter.data = parameter.data.float()
        self.names, self.values = list(found), nn.ParameterList(found.values())
        self.watched = [m for m in model.modules() if _is_adapted(m) and ADAPTER in _adapters_on(m)][:1]
        self.handles.append(model.register_forward_pre_hook(self._check_active))

    def _look_at_own(self, model: PreTrainedModel) -> None:
        """Raise AttachError where PEFT can't have both act."""
        self.had_configs = "peft_config" in model.__dict__
        if ADAPTER in (model.__dict__.get("peft_config") or {}):
            raise AttachError(
                f"the model has an adapter of PEFT's that is named {ADAPTER!r}, as foreword names its own; delete it "
                "or load it under another name"
            )
        for name, layer in model.named_modules():
            if not _is_adapted(layer):
                continue
            if getattr(layer, "merged", False):
                raise AttachError(
                    f"the model's own adapter {layer.merged_adapters[0]!r} is merged into {name}, where PEFT computes "
                    "no other beside it; unmerge it, or keep it in the weights for good (merge_and_unload)"
                )
            self.own.append((layer, layer._active_adapter, layer._disable_adapters))

    def _switch_both_on(self) -> None:
        for layer, active, off in self.own:
            state: Any = layer
            if ADAPTER in _adapters_on(layer):
                state._active_adapter, state._disable_adapters = [*([] if off else _listed(active)), ADAPTER], False
            else:
                state._active_adapter, state._disable_adapters = active, off

    def _check_active(self, model: PreTrainedModel, args: Any) -> None:
        """Raise AttachError if another adapter was made the only active one: PEFT's calls do so without a word."""
        layer = self.watched[0]
        if ADAPTER not in layer.active_adapters and not layer.disable_adapters:
            raise AttachError(
                f"PEFT made {layer.active_adapters} the only active adapters, which leaves out the LoRA that foreword "
                f"attached; call model.set_adapter([..., {ADAPTER!r}]), or detach, add the adapter, and attach again"
            )

    def take_off(self, model: PreTrainedModel) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.watched = [], []
        if importlib.util.find_spec("peft") is None:
            return
        before = {layer: (active, off) for layer, active, off in self.own}
        ours: list[Any] = [m for m in model.modules() if _is_adapted(m) and ADAPTER in _adapters_on(m)]
        for layer in ours:
            kept = [n for n in layer.active_adapters if n != ADAPTER]
            active, off = before.get(layer, (kept, layer._disable_adapters))
            as_we_left_it = kept == ([] if off else _listed(active)) and not layer._disable_adapters
            layer._active_adapter = kept  # so that PEFT has no other one to choose
            _delete(layer, kept)
            if as_we_left_it:
                layer._active_adapter, layer._disable_adapters = active, off
        for parent, child, inner in list(_emptied(model)):
            setattr(parent, child, inner)
        configs = model.__dict__.get("peft_config")
        if configs is not None:
            configs.pop(ADAPTER, None)
            if not configs and not self.had_configs:
                del model.__dict__["peft_config"]
        self.own = []

    @contextmanager
    def hidden(self, model: PreTrainedModel) -> Iterator[None]:
        swapped = [(parent, child, parent._modules[child]) for parent, child, _ in _only_ours(model)]
        inner = {id(layer): _inside(layer, _has_only_ours) for _, _, layer in swapped}
        states: list[tuple[Any, Any]] = [(m, m._active_adapter) for m in model.modules() if _is_adapted(m)]
        configs = model.__dict__.get("peft_config")
        ours = configs.pop(ADAPTER, None) if configs is not None else None
        try:
            for parent, child, layer in swapped:
                parent._modules[child] = inner[id(layer)]
            for layer, active in states:
                layer._active_adapter = [n for n in _listed(active) if n != ADAPTER]
            yield
        finally:
            for parent, child, layer in swapped:
                parent._modules[child] = layer
            for layer, active in states:
                layer._active_adapter = active
            if configs is not None and ours is not None:
                configs[ADAPTER] = ours

    def without(self, state: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        wrapped = [f"{n}." for n, m in model.named_modules() if _is_adapted(m) and _has_only_ours(m)]
        kept = {}
        for name, tensor in state.items():
            if name in self.names:
                continue
            for start in wrapped:
                if name.startswith(start):
                    inside = name.removeprefix(start).removeprefix("base_layer.").removeprefix("original_module.")
                    name = start + inside
            kept[name] = tensor
        return kept


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is one of PEFT's layers around a layer of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _adapters_on(layer: Any) -> set[str]:
    """The names of all adapters that a layer of PEFT's has, active or not."""
    return set(layer._get_available_adapters())


def _has_only_ours(layer: Any) -> bool:
    return _adapters_on(layer) == {ADAPTER}


def _listed(active: str | list[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


def _delete(layer: Any, kept: list[str]) -> None:
    if hasattr(layer, "original_module"):
        layer.delete_adapter(ADAPTER, kept)
    else:
        layer.delete_adapter(ADAPTER)


def _inside(layer: Any, drop: Any) -> nn.Module:
    """The first module further in that isn't to be dropped."""
    while _is_adapted(layer) and drop(layer):
        layer = layer.original_module if hasattr(layer, "original_module") else layer.base_layer
    inner: nn.Module = layer
    return inner


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    return ((parent, n, child) for parent in list(model.modules()) for n, child in list(parent.named_children()))


def _emptied(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Layers of PEFT's that no adapter is left on: where they stand, and what they stand around."""
    for parent, name, child in _children(model):
        if _is_adapted(child) and not _adapters_on(child):
            yield parent, name, _inside(child, lambda m: not _adapters_on(m))


def _only_ours(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent, name, child in _children(model):
        if _is_adapted(child) and _has_only_ours(child):
            yield parent, name, child
