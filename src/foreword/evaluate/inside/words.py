"""What a virtual token says, in words: its value through the model's own output projection, final norm and vocabulary.

The logit lens (nostalgebraist 2020) on values: if all heads of a site looked at virtual token i alone, the site would
write ``W_o [v_i; ...; v_i]`` into the residual stream, each head its group's value. That vector is read as the model
reads its last state. Which modules these are, one forward pass tells: the output projection is the linear layer that
is handed just what the attention gave, and the reading is what stands between the last state and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from foreword._offloaded import device_of
from foreword.errors import UnsupportedModelError
from foreword.evaluate.inside._rows import Unavailable, require_plain, without_cache
from foreword.evaluate.inside._taps import Tap, tapped
from foreword.prefix import Prefix
from foreword.sites import Site, evaluating, sites, text_inputs


@dataclass(frozen=True)
class SiteWords:
    """The nearest vocabulary tokens at one site.

    Attributes:
        words: by virtual token, the likeliest tokens of the vocabulary and their probabilities, best first.
        why: why there are none, where there are none.
    """

    name: str
    kind: str
    words: list[list[tuple[str, float]]]
    why: str = ""


@dataclass(frozen=True)
class Lens:
    """What virtual tokens say, site by site.

    Attributes:
        reading: the modules that stand between the last state and the vocabulary.
    """

    sites: list[SiteWords]
    reading: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reader:
    """The way out of a model, found by a forward pass.

    Attributes:
        outputs: by site name, the name of the linear layer after the attention.
        between: names of the modules that a last state goes through on its way to the vocabulary, in their order.
        scale: what the state is multiplied by besides (T5 does).
        vocabulary: the output embedding.
    """

    outputs: dict[str, str]
    between: list[str]
    scale: float
    vocabulary: nn.Module


def lens(
    model: PreTrainedModel,
    prefix: Prefix,
    tokenizer: PreTrainedTokenizerBase,
    *,
    top: int = 5,
    force: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
) -> Lens | Unavailable:
    """The vocabulary tokens that each virtual token's value speaks for, at each site.

    What a model does to its logits afterwards (Gemma 2's cap, Granite's scale) is left out: it changes the
    probabilities, never the order.

    Args:
        model: the base model, with nothing attached.
        top: how many tokens.
        force: accept other weights of the base model.
        example_inputs: one forward pass's arguments, for models that don't start from token ids.

    Raises:
        MismatchError: the prefix belongs to another model.
    """
    require_plain(prefix)
    if not prefix.longest:
        return Unavailable("there are no virtual tokens in it")
    found_sites = sites(model, example_inputs)
    prefix.check_fits(model, found_sites, force=force)
    try:
        reader = find_reader(model, found_sites, example_inputs)
    except UnsupportedModelError as exc:
        return Unavailable(str(exc))
    found = []
    for site in prefix.sites:
        if not prefix.length(site.name):
            continue
        why = _unread(model, site, reader)
        words = [] if why else _spoken(model, prefix, site, reader, tokenizer, top)
        found.append(SiteWords(site.name, site.kind, words, why))
    if all(s.why for s in found):
        return Unavailable(found[0].why)
    return Lens(found, reader.between)


@torch.no_grad()
def value_logits(model: PreTrainedModel, prefix: Prefix, site: Site, reader: Reader) -> Tensor:
    """What each virtual token's value at a site says of the vocabulary: ``(P, V)`` logits, float32 on the CPU."""
    values = prefix.values[site.name]  # (G, P, E)
    by_head = values.repeat_interleave(site.heads // site.kv_heads, 0)  # each query head its group's value
    joined = by_head.transpose(0, 1).flatten(1)  # (P, H * E)
    out = model.get_submodule(reader.outputs[site.name])
    joined = joined.to(device_of(out), model.dtype)[None]
    written = out(joined) - out(torch.zeros_like(joined))  # (1, P, D), without the bias: that is not the token's
    for name in reader.between:
        written = model.get_submodule(name)(written)
    vocabulary: Any = reader.vocabulary
    logits: Tensor = vocabulary(reader.scale * written)[0]
    return logits.float().cpu()


def _spoken(
    model: PreTrainedModel,
    prefix: Prefix,
    site: Site,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    top: int,
) -> list[list[tuple[str, float]]]:
    logits = value_logits(model, prefix, site, reader)
    logits = logits[:, : min(logits.shape[1], len(tokenizer))]  # the rest of the table is padding
    chances, ids = torch.softmax(logits, -1).topk(min(top, logits.shape[1]))
    return [
        [(str(tokenizer.decode([i])), c) for i, c in zip(row, shares, strict=True)]
        for row, shares in zip(ids.tolist(), chances.tolist(), strict=True)
    ]


def _unread(model: PreTrainedModel, site: Site, reader: Reader) -> str:
    """Why a site can't be read; empty where it can."""
    if site.tower:
        return f"what stands in the {site.tower.removesuffix('_config')} tower doesn't go into the vocabulary"
    if model.config.is_encoder_decoder and site.kind == "encoder":
        return "what stands in the encoder doesn't go into the vocabulary, only through the decoder"
    if site.name not in reader.outputs:
        return "no linear layer is handed what its attention gives, so its output projection is unknown"
    return ""


# ------------------------------------------------------------------------------------------ finding the way out


def find_reader(
    model: PreTrainedModel, found: Sequence[Site], example_inputs: Mapping[str, Any] | None = None
) -> Reader:
    """Watch one forward pass.

    Args:
        found: the model's attention sites.
        example_inputs: the pass's arguments; None: a few token ids.

    Raises:
        UnsupportedModelError: the model writes into no vocabulary.
    """
    vocabulary = model.get_output_embeddings()
    if not isinstance(vocabulary, nn.Module) or isinstance(vocabulary, nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__} has no vocabulary to write into")
    inputs = dict(example_inputs if example_inputs is not None else text_inputs(model)) | without_cache(model)
    names = [s.name for s in found]
    watch = _Watch(names)
    with tapped(model, names) as taps, evaluating(model), torch.no_grad():
        watch.taps = taps
        watch.install(model, vocabulary)
        try:
            model(**inputs)
        finally:
            watch.remove()
    if watch.last is None:
        raise UnsupportedModelError(f"{type(model).__name__} didn't read its state off with its output embedding")
    between, scale = watch.way_out()
    return Reader(watch.outputs, between, scale, vocabulary)


class _Watch:
    """What goes through a model's modules in one pass."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = sites
        self.taps: dict[str, Tap] = {}
        self.outputs: dict[str, str] = {}
        self.last: Tensor | None = None  # what the vocabulary was handed
        self.calls: list[tuple[str, Tensor, Tensor]] = []  # modules of one tensor to one tensor, as they return
        self.handles: list[Any] = []

    def install(self, model: PreTrainedModel, vocabulary: nn.Module) -> None:
        for name, module in model.named_modules():
            if module is vocabulary:
                self.handles.append(module.register_forward_pre_hook(lambda _m, args: self._reads(args)))
            elif isinstance(module, nn.Linear | Conv1D):
                self.handles.append(
                    module.register_forward_pre_hook(lambda _m, args, name=name: self._linear(name, args))
                )
            if self._may_read(model, name, module):
                note = lambda _m, args, out, name=name: self._note(name, args, out)  # noqa: E731
                self.handles.append(module.register_forward_hook(note))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _may_read(self, model: PreTrainedModel, name: str, module: nn.Module) -> bool:
        """Whether a module can stand between the last state and the vocabulary: in a layer, nothing but a norm can."""
        if not name or any(s == name or s.startswith(f"{name}.") for s in self.sites):
            return False
        parts = name.split(".")
        in_layer = any(
            isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts))
        )
        return not (in_layer and any(isinstance(m, nn.Linear | Conv1D) for m in module.modules()))

    def way_out(self) -> tuple[list[str], float]:
        """The modules from the residual stream to the vocabulary, and the factor on the way."""
        assert self.last is not None
        names: list[str] = []
        wanted, scale, end = self.last, 1.0, len(self.calls)
        while True:
            # Backwards, so that of a module and what it is made of the whole comes first.
            for i in range(end - 1, -1, -1):
                name, given, out = self.calls[i]
                factor = _factor(out, wanted)
                if factor is not None and (not names or factor == 1):
                    break
            else:
                return names, scale
            scale = scale if names else factor
            names.insert(0, name)
            wanted, end = given, i

    def _linear(self, name: str, args: tuple[Any, ...]) -> None:
        """Note the sites whose attention gave just what this layer is handed."""
        for site, tap in self.taps.items():
            out = tap.out
            if site in self.outputs or not args or out is None or out.numel() != args[0].numel():
                continue
            if torch.equal(out.flatten().to(args[0].device), args[0].flatten()):
                self.outputs[site] = name

    def _reads(self, args: tuple[Any, ...]) -> None:
        self.last = args[0].detach().float().cpu()

    def _note(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        given = [a for a in args if isinstance(a, Tensor)]
        if len(given) != 1 or not isinstance(out, Tensor) or not out.is_floating_point():
            return
        if given[0].is_floating_point() and not (given[0].shape == out.shape and torch.equal(given[0], out)):
            self.calls.append((name, given[0].detach().float().cpu(), out.detach().float().cpu()))


def _factor(out: Tensor, wanted: Tensor) -> float | None:
    """What a module's output is multiplied by to be what is wanted; None: it is something else."""
    if out.shape != wanted.shape:
        return None
    if torch.equal(out, wanted):
        return 1.0
    factor = float((wanted * out).sum() / out.square().sum().clamp(min=1e-12))
    near = float((wanted - factor * out).abs().max()) < 1e-2 * float(wanted.abs().max())
    return factor if near else None
