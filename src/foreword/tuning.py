"""attach, bake, detach: a prefix on a model, in place.

The model stays its own class. Attaching puts a *slot* on each chosen attention module, routes attention through
foreword, and adds one child module named ``foreword`` that holds the prefix, so that ``.to()``, ``.train()``,
optimizers and DDP see its parameters. Detaching takes all of it off again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword import _interface
from foreword._passes import Passes
from foreword.attention import SitePrefix, attend
from foreword.config import PrefixConfig
from foreword.encoders import Direct, Frozen, PrefixEncoder, make_encoder
from foreword.errors import AttachError, ConfigError
from foreword.fingerprint import Fingerprint
from foreword.initializers import initial_states
from foreword.positions import Rotation, check_offset, find_rotations
from foreword.prefix import Prefix
from foreword.sites import Site, select
from foreword.sites import sites as find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHILD = "foreword"


def attach(
    model: PreTrainedModel,
    what: PrefixConfig | Prefix,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    trainable: bool = False,
    strength: float | None = None,
    force: bool = False,
) -> Tuning:
    """Put a prefix onto a model, in place.

    With a :class:`PrefixConfig` the prefix is new and trainable, and every other parameter is frozen until
    :meth:`Tuning.detach`. With a :class:`Prefix` it is frozen, for inference; ``trainable=True`` goes on training it.

    Args:
        tokenizer: the model's; needed to start from a text.
        example_inputs: one forward pass's arguments, for models that don't start from token ids.
        strength: weight of the prefix against the text, 1 as trained, 0 none; overrides the configuration's.
        force: attach a prefix although the base model's weights differ (never its shapes).

    Raises:
        AttachError: the model has a prefix already. Detach it first, or hold several in a ``fw.Library``.
        UnsupportedModelError: nothing can be placed before this model's keys and values.
        MismatchError: the prefix belongs to another model.
        ConfigError: the configuration does not fit the model.
    """
    require_detached(model)
    if isinstance(what, PrefixConfig):
        found = find_sites(model, example_inputs)
        return _attach_new(model, what, found, tokenizer, example_inputs, strength)
    if isinstance(what, Prefix):
        found = _known_sites(model, what, example_inputs)
        what.check_fits(model, found, force=force)
        check_offset(model, what.position_offset)
        return _attach_prefix(model, what, trainable, 1.0 if strength is None else strength)
    raise ConfigError(f"attach takes a PrefixConfig or a Prefix, not {type(what).__name__}")


def require_detached(model: nn.Module) -> None:
    """Raise AttachError if the model has a prefix or a library on it."""
    if CHILD in model._modules or any(_interface.SLOT in m.__dict__ for m in model.modules()):
        raise AttachError(
            "the model has a prefix attached already; call detach() on what attach returned, join the two prefixes "
            "(Prefix.join), or hold several in a fw.Library"
        )


def _known_sites(model: PreTrainedModel, prefix: Prefix, example_inputs: Mapping[str, Any] | None) -> list[Site]:
    """The model's sites; a prefix for a model that needs inputs to be looked at vouches for its own by name."""
    try:
        return find_sites(model, example_inputs)
    except ConfigError:
        if example_inputs is not None:
            raise
        modules = dict(model.named_modules())
        return [s for s in prefix.sites if s.name in modules]


def _attach_new(
    model: PreTrainedModel,
    config: PrefixConfig,
    found: Sequence[Site],
    tokenizer: PreTrainedTokenizerBase | None,
    example_inputs: Mapping[str, Any] | None,
    strength: float | None,
) -> Tuning:
    chosen = select(found, config.sites, config.kinds)
    check_offset(model, config.position_offset)
    rotations = find_rotations(model, chosen)
    start = initial_states(config, model, tokenizer, chosen, rotations, example_inputs)
    kept = [s for s in chosen if s.name in start]
    encoder = make_encoder(config, start, kept)
    tuning = Tuning(model, encoder, kept, config.position_offset, config.strength if strength is None else strength)
    tuning.config = config
    tuning.__dict__["rotations"] = rotations
    if config.gate is not None:
        tuning.add_gates(config.gate)
    tuning._install(trainable=True)
    return tuning


def _attach_prefix(model: PreTrainedModel, prefix: Prefix, trainable: bool, strength: float) -> Tuning:
    kept = [s for s in prefix.sites if prefix.length(s.name)]
    states = {s.name: (prefix.keys[s.name], prefix.values[s.name]) for s in kept}
    encoder: PrefixEncoder
    if trainable:
        encoder = Direct({n: (k.float(), v.float()) for n, (k, v) in states.items()})
    else:
        encoder = Frozen(states)
    tuning = Tuning(model, encoder, kept, prefix.position_offset, strength)
    tuning.__dict__["rotations"] = dict(prefix.rotations)
    tuning.metadata = dict(prefix.metadata)
    tuning.load_gates(prefix, trainable)
    tuning._install(trainable=trainable)
    return tuning


class PrefixHolder(nn.Module):
    """The child module that a model carries: the encoder, and gates by site index."""

    def __init__(self, encoder: PrefixEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.bias = nn.ParameterDict()
        self.gate = nn.ParameterDict()
        self.moved: Callable[[], None] | None = None  # called after .to(), .half() and their like

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixHolder:
        super()._apply(fn, recurse)
        if self.moved is not None:
            self.moved()
        return self


class Tuning:
    """A prefix on a model. Made by :func:`attach`.

    Attributes:
        model: the base model, untouched but for the prefix.
        sites: where the prefix stands.
        config: the configuration of a new prefix; None for a loaded one.
        metadata: what :meth:`bake` writes into the prefix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: PrefixEncoder,
        chosen: Sequence[Site],
        position_offset: int,
        strength: float,
    ) -> None:
        self.model = model
        self.sites = list(chosen)
        self.position_offset = position_offset
        self.config: PrefixConfig | None = None
        self.metadata: dict[str, Any] = {}
        self.holder = PrefixHolder(encoder)
        self.trainable = False
        self._passes = Passes(self)
        self.holder.moved = self._passes.forget
        self._strength = 1.0
        self.strength = strength
        self._undo: list[Any] = []
        self._frozen: list[nn.Parameter] = []

    @property
    def encoder(self) -> PrefixEncoder:
        return self.holder.encoder

    @property
    def attached(self) -> bool:
        return self.model._modules.get(CHILD) is self.holder

    @property
    def strength(self) -> float:
        """Weight of the prefix against the text: 1 as trained, 0 none (the base model exactly)."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ConfigError(f"strength={value}; expected 0 (no prefix) or a positive factor")
        self._strength = float(value)
        self._passes.forget()

    @cached_property
    def rotations(self) -> dict[str, Rotation]:
        """How the keys of each site depend on their position; empty for models that aren't rotary."""
        return find_rotations(self.model, self.sites)

    # ---------------------------------------------------------------- what is trained

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, by their name inside the prefix."""
        return ((n, p) for n, p in self.holder.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters: give these to an optimizer."""
        return (p for _, p in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def add_gates(self, kind: str) -> None:
        """Learned weights per head: ``"head"`` from 1 (a bias of 0), ``"zero"`` from a closed gate."""
        group = self.holder.bias if kind == "head" else self.holder.gate
        for i, site in enumerate(self.sites):
            group[str(i)] = nn.Parameter(torch.zeros(site.heads))

    def load_gates(self, prefix: Prefix, trainable: bool) -> None:
        """Take the gates of a baked prefix."""
        for i, site in enumerate(self.sites):
            if (bias := prefix.bias.get(site.name)) is not None:
                self.holder.bias[str(i)] = nn.Parameter(bias.clone(), requires_grad=trainable)
            if (gate := prefix.gates.get(site.name)) is not None:
                # Trained through tanh, stored after it.
                inner = (
                    torch.atanh(gate.double().clamp(-1 + 1e-6, 1 - 1e-6)).to(gate.dtype) if trainable else gate.clone()
                )
                self.holder.gate[str(i)] = nn.Parameter(inner, requires_grad=trainable)

    # ---------------------------------------------------------------- what the attention reads

    def build_views(self) -> dict[str, SitePrefix]:
        """Every site's keys and values for one forward pass; the encoder runs here, once."""
        if self._strength == 0:
            return {}
        states = self.encoder()
        return {
            site.name: SitePrefix(
                states[site.name][0].unsqueeze(0),
                states[site.name][1].unsqueeze(0),
                bias=self._bias(i, self._strength),
                gate=self._gate(i, self._strength),
            )
            for i, site in enumerate(self.sites)
        }

    def _bias(self, i: int, strength: float) -> Tensor | None:
        """The learned weight and the strength of a site, as a bias on the log-sum-exp."""
        name = str(i)
        learned: Tensor | None = self.holder.bias[name] if name in self.holder.bias else None  # noqa: SIM401
        if strength == 1 or name in self.holder.gate:
            return learned
        if learned is None:
            device = next(self.model.parameters()).device
            return torch.full((self.sites[i].heads,), math.log(strength), device=device)
        return learned + math.log(strength)

    def _gate(self, i: int, strength: float) -> Tensor | None:
        if str(i) not in self.holder.gate:
            return None
        gate: Tensor = self.holder.gate[str(i)]
        return (torch.tanh(gate) if self.trainable else gate) * strength

    # ---------------------------------------------------------------- baking and detaching

    @torch.no_grad()
    def bake(self) -> Prefix:
        """The prefix as it stands, without what made it: an MLP never runs again.

        A strength other than 1 becomes part of it (0 would leave nothing, and is left out).
        """
        training = self.encoder.training
        self.encoder.eval()
        try:
            states = self.encoder()
        finally:
            self.encoder.train(training)
        metadata = dict(self.metadata)
        if self.config is not None:
            metadata["config"] = self.config.to_json()
        strength = self._strength or 1.0
        gates = {s.name: g.clone() for i, s in enumerate(self.sites) if (g := self._gate(i, strength)) is not None}
        bias = {s.name: b.clone() for i, s in enumerate(self.sites) if (b := self._bias(i, strength)) is not None}
        return Prefix(
            {n: k.detach().clone() for n, (k, _) in states.items()},
            {n: v.detach().clone() for n, (_, v) in states.items()},
            self.sites,
            self.position_offset,
            self.rotations,
            bias,
            gates,
            Fingerprint.of(self.model),
            metadata,
        )

    def detach(self) -> PreTrainedModel:
        """Take the prefix off; the model is what it was, bit for bit. Returns the model."""
        if not self.attached:
            raise AttachError("this prefix is not attached (any more); nothing to detach")
        for site in self.sites:
            self.model.get_submodule(site.name).__dict__.pop(_interface.SLOT, None)
        self._passes.remove()
        _interface.uninstall(self._undo)
        del self.model._modules[CHILD]
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        return self.model

    def _install(self, *, trainable: bool) -> None:
        if hasattr(self.model, CHILD):
            raise AttachError(f"{type(self.model).__name__} has an attribute named {CHILD!r} of its own")
        self.trainable = trainable
        if trainable:
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        place = self.model.get_submodule(self.sites[0].name)
        first = next(place.parameters(), None)
        self.holder.to(first.device if first is not None else self.model.device)
        if not trainable and first is not None and first.is_floating_point():
            self.encoder.to(first.dtype)
        self.model.add_module(CHILD, self.holder)
        self.holder.train(self.model.training)
        self._undo = _interface.install(self.model)
        for site in self.sites:
            self.model.get_submodule(site.name).__dict__[_interface.SLOT] = SiteSlot(site.name, self._passes)
        self._passes.install()

    def __repr__(self) -> str:
        what = f"{self.num_parameters:,} trainable parameters" if self.trainable else "frozen"
        longest = max((k.shape[1] for k, _ in self.encoder().values()), default=0)
        return f"Tuning({longest} virtual tokens at {len(self.sites)} sites of {type(self.model).__name__}, {what})"


class SiteSlot:
    """Stands on an attention module and gives its calls the prefix of the pass."""

    def __init__(self, name: str, source: Any) -> None:
        self.name = name
        self.source = source

    def __call__(
        self, delegate: _interface.Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor,
        value: Tensor, attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        prefix: SitePrefix | None = self.source.view(self.name)
        if prefix is None:
            return delegate(module, query, key, value, attention_mask, **kwargs)
        return attend(prefix, delegate, delegate_name, module, query, key, value, attention_mask, **kwargs)


def tuning_of(model: nn.Module) -> Tuning | None:
    """The prefix that :func:`attach` put onto a model, or None."""
    for module in model.modules():
        slot = module.__dict__.get(_interface.SLOT)
        if isinstance(slot, SiteSlot) and isinstance(slot.source, Passes):
            return slot.source.tuning
    return None
