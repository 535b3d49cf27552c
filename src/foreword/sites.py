"""Which attention calls a model makes. Reads, changes nothing.

There is no table of architectures: a dry run with a recording slot on every module sees each call as the model
makes it, with its shapes, mask and scaling.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword._interface import Delegate, Slot, only_slots, unrouted
from foreword._kinds import Streams, sees_only_back
from foreword._offloaded import device_of
from foreword._proof import check_route
from foreword._wrapped import unwrapped
from foreword.errors import ConfigError, ForewordError, UnsupportedModelError

Kind = Literal["self", "cross", "encoder"]

# Different lengths in encoder and decoder tell cross attention from self attention where numbers can't (on meta).
_TOKENS, _DECODER_TOKENS = 8, 5


@dataclass(frozen=True, slots=True)
class Site:
    """One attention call of a model.

    Attributes:
        name: the attention module's name in the model, e.g. ``model.layers.3.self_attn``.
        kind: ``self`` (causal), ``encoder`` (self attention in both directions) or ``cross``.
        heads, kv_heads: query heads, and key/value heads as the attention function gets them.
        key_dim, value_dim: width of one head's keys and values.
        causal: whether a position is hidden from earlier ones.
        sliding_window: the window in tokens, or None. A prefix is seen from outside the window as well.
        scaling: what the scores are multiplied by.
        tower: the part of a composite model, e.g. ``vision_config``; empty for the text or only part.
        calls: how often one forward pass calls it (more than 1: layers that share one module).
    """

    name: str
    kind: Kind
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    causal: bool
    sliding_window: int | None
    scaling: float
    tower: str = ""
    calls: int = 1

    def parameters(self, length: int) -> int:
        """Numbers in a prefix of ``length`` tokens here: ``length * kv_heads * (key_dim + value_dim)``."""
        return length * self.kv_heads * (self.key_dim + self.value_dim)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call as the model made it; shapes as in ``foreword.attention.attend``."""

    name: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: Mapping[str, Any]


def sites(model: PreTrainedModel, example_inputs: Mapping[str, Any] | None = None) -> list[Site]:
    """Every attention call of a model, in the order of a forward pass.

    Args:
        model: a transformers model that looks its attention up by name (most do).
        example_inputs: keyword arguments of one forward pass. Text models need none; image, audio and
            vision-language models do (for a vision-language model without them: its text tower only).

    Raises:
        UnsupportedModelError: the model computes attention in its own code, or makes no attention call.
        ConfigError: the model needs example inputs.
    """
    model = unwrapped(model)
    found: dict[str, Site] = {}

    def observe(call: Call, delegate_name: str) -> None:
        if streams.asking is not None:  # a call made once more, to see where its keys come from
            streams.asking.append((call.query, call.key))
            return
        previous = found.get(call.name)
        site = _describe(call, delegate_name, model, streams)
        found[call.name] = site if previous is None else _again(previous)

    def recorded() -> Any:
        with streams:
            return dry_run(model, observe, example_inputs)

    streams = Streams(model)
    check_route(model, recorded, lambda: _plain_run(model, example_inputs))
    if not found:
        raise UnsupportedModelError(_why_none(model))
    return list(found.values())


def _why_none(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if model._can_set_attn_implementation():
        return (
            f"{name} made no attention call in a dry run, so there are no keys and values to place a prefix before "
            "(state-space and recurrent models have none)"
        )
    return (
        f"{name} computes its attention in its own code instead of transformers' attention interface, so nothing can "
        "be placed before its keys and values. Expected: a model whose file calls ALL_ATTENTION_FUNCTIONS (Llama, "
        "Qwen, Gemma, GPT-2, BERT, T5, ViT and most others do)"
    )


def dry_run(
    model: PreTrainedModel,
    observe: Callable[[Call, str], None],
    example_inputs: Mapping[str, Any] | None = None,
) -> Any:
    """One forward pass in eval mode without gradients, ``observe(call, delegate_name)`` at each attention call.

    Raises:
        UnsupportedModelError: the pass failed; the cause is chained.
    """
    with recording(model, observe):
        return _run(model, example_inputs)


def _plain_run(model: PreTrainedModel, example_inputs: Mapping[str, Any] | None = None) -> Any:
    """The same pass as if nothing were attached anywhere."""
    with unrouted():
        return _run(model, example_inputs)


def _run(model: PreTrainedModel, example_inputs: Mapping[str, Any] | None) -> Any:
    inputs: dict[str, Any] = dict(example_inputs if example_inputs is not None else text_inputs(model))
    if "use_cache" in inspect.signature(model.forward).parameters:
        # On the meta device a cache keeps transformers from looking into position_ids for packed sequences.
        inputs.setdefault("use_cache", device_of(model).type == "meta")
    with evaluating(model), torch.no_grad():
        try:
            return model(**inputs)
        except ForewordError:
            raise
        except Exception as exc:
            raise UnsupportedModelError(
                f"a dry run of {type(model).__name__} failed ({type(exc).__name__}: {exc}); pass the arguments of "
                "one working forward pass as example_inputs={...}"
            ) from exc


@contextmanager
def recording(model: PreTrainedModel, observe: Callable[[Call, str], None]) -> Iterator[None]:
    """Inside the block, every attention call of the model is shown to ``observe`` and runs without prefixes."""
    with only_slots(model, lambda name: _Recorder(name, observe)):
        yield


@dataclass(frozen=True)
class _Recorder(Slot):
    name: str
    observe: Callable[[Call, str], None]

    def __call__(
        self, delegate: Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        self.observe(Call(self.name, module, query, key, value, attention_mask, kwargs), delegate_name)
        return delegate(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module trains or not as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unreached_encoder(model: PreTrainedModel, found: Sequence[Site]) -> str | None:
    """The name of a text encoder that made no attention call beside a decoder that did; None: there is none such."""
    if not model.config.is_encoder_decoder or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    name = next((n for n, m in model.named_modules() if m is encoder), None)
    layers = name and any(isinstance(m, nn.ModuleList) for m in encoder.modules())
    return name if layers and not any(s.name.startswith(f"{name}.") for s in found) else None


def text_inputs(model: PreTrainedModel, length: int = _TOKENS) -> dict[str, Tensor]:
    """Token ids for one forward pass of a text model, ``(1, length)`` (and shorter ones for a decoder).

    Raises:
        ConfigError: the model doesn't start from token ids.
    """
    parameters = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids" or "input_ids" not in parameters:
        raise ConfigError(
            f"{type(model).__name__} starts from {model.main_input_name!r}, not from token ids; pass the arguments "
            f"of one forward pass, e.g. example_inputs={{{model.main_input_name!r}: torch.zeros(...)}}"
        )
    config = model.config.get_text_config()
    special = {v for k, v in model.config.to_dict().items() if k.endswith(("_token_id", "_token_index"))
               and isinstance(v, int)}  # fmt: skip
    vocabulary = getattr(config, "vocab_size", None) or 4 * length + 64  # CANINE reads characters and has none
    ids = [i for i in range(3, min(int(vocabulary), 4 * length + 64)) if i not in special]
    chosen = [ids[(7 * i) % len(ids)] for i in range(length)]
    device = input_device(model)
    inputs = {"input_ids": torch.tensor([chosen], device=device)}
    if type(model).__name__.endswith("ForMultipleChoice"):  # these read (batch, choices, length)
        inputs["input_ids"] = inputs["input_ids"][:, None].expand(-1, 2, -1).contiguous()
    if model.config.is_encoder_decoder:
        eos = getattr(model.config, "eos_token_id", None)
        if isinstance(eos, int):  # BART's classification head looks for it
            inputs["input_ids"][0, -1] = eos
        # Heads that classify read the same tokens in both: BART's looks its last one up in the decoder's states.
        own = _DECODER_TOKENS if model.can_generate() else length
        inputs["decoder_input_ids"] = torch.tensor([chosen[:own]], device=device)
    return inputs


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's token ids go."""
    try:
        return device_of(model.get_input_embeddings())
    except NotImplementedError:  # a model that doesn't say which its embeddings are
        return device_of(model)


def _describe(call: Call, delegate_name: str, model: PreTrainedModel, streams: Streams) -> Site:
    query, key = call.query, call.key
    causal = sees_only_back(call.module, query, key, call.mask, call.kwargs, delegate_name)
    if streams.cross(call.module, query, key, call.mask):
        kind: Kind = "cross"
    else:
        kind = "self" if causal else "encoder"
    window = call.kwargs.get("sliding_window") or getattr(call.module, "sliding_window", None)
    scaling = call.kwargs.get("scaling")
    return Site(
        name=call.name,
        kind=kind,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=call.value.shape[3],
        causal=causal and kind != "cross",
        sliding_window=window if isinstance(window, int) and not isinstance(window, bool) else None,
        scaling=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        tower=_tower(model, call.name),
    )


def _tower(model: PreTrainedModel, name: str) -> str:
    """The sub-config whose sub-model holds a module; empty where that is the text (or the only) part."""
    text = model.config.get_text_config(decoder=True) if model.config.sub_configs else model.config
    parts = {id(c): key for key in model.config.sub_configs if (c := getattr(model.config, key, None)) is not None}
    names = name.split(".")
    for end in range(len(names), 0, -1):
        config = getattr(model.get_submodule(".".join(names[:end])), "config", None)
        if config is text or config is model.config:
            return ""
        if id(config) in parts:
            key = parts[id(config)]
            return "" if key in ("encoder", "decoder", "text_config") else key
    return ""


def _again(site: Site) -> Site:
    return Site(**{**asdict(site), "calls": site.calls + 1})


def select(
    found: Sequence[Site],
    names: str | Sequence[str | int] | None = None,
    kinds: Sequence[str] = ("self", "cross", "encoder"),
) -> list[Site]:
    """The sites that a prefix goes to.

    Args:
        names: ``"first:4"``, ``"last:4"``, ``"every:2"`` (of the sites of each kind), a regular expression matched
            against whole names, a list of names or of layer numbers (of each kind, from 0, -1 the last). None: all
            sites outside vision and audio towers (a model that is only a tower has just the one).
        kinds: which kinds of site.

    Raises:
        ConfigError: the choice is malformed or leaves nothing; the message lists what there is.
    """
    unknown_kinds = set(kinds) - {"self", "cross", "encoder"}
    if unknown_kinds:
        raise ConfigError(f"kinds has {sorted(unknown_kinds)}; expected some of 'self', 'cross', 'encoder'")
    if names is None:
        chosen = [s for s in found if not s.tower]
    elif isinstance(names, str):
        chosen = _by_pattern(found, names)
    else:
        chosen = _by_list(found, names)
    chosen = [s for s in chosen if s.kind in kinds]
    if not chosen:
        raise ConfigError(f"sites={names!r} with kinds={tuple(kinds)} leaves no site; the model has {_listing(found)}")
    return chosen


def _by_pattern(found: Sequence[Site], pattern: str) -> list[Site]:
    if match := re.fullmatch(r"(first|last|every):(\d+)", pattern):
        word, n = match[1], int(match[2])
        if n == 0:
            raise ConfigError(f"sites={pattern!r} leaves no site; expected 1 or more")
        cut = {"first": slice(n), "last": slice(-n, None), "every": slice(None, None, n)}[word]
        kept = {s.name for own in _by_kind(found) for s in own[cut]}
        return [s for s in found if s.name in kept]
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise ConfigError(f"sites={pattern!r} is not a regular expression: {exc}") from None
    return [s for s in found if compiled.fullmatch(s.name)]


def _by_list(found: Sequence[Site], names: Sequence[str | int]) -> list[Site]:
    known, kept = {s.name for s in found}, set()
    for name in names:
        if isinstance(name, str):
            if name not in known:
                raise ConfigError(f"no attention site is named {name!r}; the model has {_listing(found)}")
            kept.add(name)
            continue
        layers = [own[name] for own in _by_kind(found) if -len(own) <= name < len(own)]
        if not layers:
            raise ConfigError(f"sites has layer {name}, which the model doesn't have: {_listing(found)}")
        kept.update(s.name for s in layers)
    return [s for s in found if s.name in kept]


def _by_kind(found: Sequence[Site]) -> list[list[Site]]:
    """The sites outside towers, kind by kind."""
    text = [s for s in found if not s.tower]
    return [[s for s in text if s.kind == kind] for kind in ("encoder", "self", "cross")]


def _listing(found: Sequence[Site]) -> str:
    shown = ", ".join(f"{s.name} ({s.kind})" for s in found[:4])
    return shown if len(found) <= 4 else f"{shown}, … {found[-1].name} ({found[-1].kind}): {len(found)} in all"
