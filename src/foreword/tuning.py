"""attach, bake, detach: a prefix on a model, in place.

The model stays its own class. Attaching puts a *slot* on each chosen attention module, routes attention through
foreword, and adds one child module named ``foreword`` that holds the prefix, so that ``.to()``, ``.train()``,
optimizers and DDP see its parameters. Detaching takes all of it off again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword import _interface
from foreword._buffers import Buffers
from foreword._generate import Generate
from foreword._given import Task
from foreword._holder import CHILD, PrefixHolder, SiteSlot, require_detached, tuning_of
from foreword._offloaded import device_of, flags_of, set_flags
from foreword._passes import Passes
from foreword._queries import Queries
from foreword._saving import unwatch, watch
from foreword._sharded import show_shards
from foreword._views import SitePrefix
from foreword._wrapped import refuse_meta, unwrapped
from foreword.config import PrefixConfig
from foreword.encoders import PrefixEncoder
from foreword.errors import AttachError, ConfigError
from foreword.fingerprint import Fingerprint
from foreword.memory import Recall, SiteMemory
from foreword.methods import Config, PromptConfig
from foreword.positions import PositionFacts, Rotation
from foreword.prefix import Prefix
from foreword.sites import Site
from foreword.visibility import Visibility
from foreword.weights import WeightPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def attach(
    model: PreTrainedModel,
    what: Config | Prefix | Sequence[Config | Prefix],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    trainable: bool = False,
    strength: float | None = None,
    force: bool = False,
) -> Tuning:
    """Put a prefix, or another method, onto a model, in place.

    With a configuration (:class:`PrefixConfig`, ``MemoryConfig``, ``PromptConfig``, ``LoRAConfig``, ``AdapterConfig``,
    ``BitFitConfig``, ``FullConfig``) it is new and trainable, and every other parameter is frozen until
    :meth:`Tuning.detach`. With a :class:`Prefix` it is frozen, for inference; ``trainable=True`` goes on training it.
    A list puts several on together; their order makes no difference.

    Args:
        model: a transformers model, or a ``PeftModel``, which is looked through; other wrappers are refused.
        tokenizer: the model's; needed to start from a text.
        example_inputs: one forward pass's arguments, for models that don't start from token ids.
        strength: weight of the prefix against the text, 1 as trained, 0 none; overrides the configuration's.
        force: attach a prefix although the base model's weights differ (never its shapes).

    Raises:
        AttachError: the model has a prefix already. Detach it first, or hold several in a ``fw.Library``.
        UnsupportedModelError: nothing can be placed before this model's keys and values.
        MismatchError: the prefix belongs to another model.
        ConfigError: the configurations do not fit the model, or each other; or it is in a wrapper, or has no numbers.
    """
    from foreword._building import build

    model = unwrapped(model)
    refuse_meta(model)
    require_detached(model)
    items = list(what) if isinstance(what, Sequence) else [what]
    return build(model, items, tokenizer, example_inputs, trainable, strength, force)


__all__ = ["SiteSlot", "Tuning", "attach", "require_detached", "tuning_of"]


class Tuning:
    """A prefix on a model. Made by :func:`attach`.

    Attributes:
        model: the base model, untouched but for the prefix.
        sites: where the prefix or memory stands.
        config: the configuration of a new prefix; None for a loaded one.
        configs: all configurations that are trained.
        metadata: what :meth:`bake` writes into the prefix.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: Fingerprint) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.sites: list[Site] = []
        self.position_offset = 0
        self.positions = PositionFacts({})
        self.visible = Visibility()
        self.recall = Recall()
        self.config: PrefixConfig | PromptConfig | None = None
        self.configs: list[Config] = []
        self.parts: list[dict[str, Any]] = []
        self.metadata: dict[str, Any] = {}
        self.holder = PrefixHolder()
        self.holder.tuning = self
        self.trainable = False
        self._through_tanh = True  # whether zero-initialised gates are trained, and so stored before their tanh
        self.queries: Queries | None = None
        self._passes = Passes(self)
        self.holder.moved = self._passes.forget
        self._generate = Generate(model)
        self._strength = 1.0
        self._flags = flags_of(model)
        self._buffers = Buffers()

    @property
    def tasks(self) -> Sequence[str]:
        """The names of the tasks that are trained together; empty for one prefix."""
        return self.config.tasks if isinstance(self.config, PrefixConfig) else ()

    @property
    def encoder(self) -> PrefixEncoder:
        """What makes the keys and values."""
        return self.holder.encoder

    def weight_parts(self) -> list[WeightPart]:
        """LoRA, adapters and the like that stand on the model."""
        return [p for p in self.holder.weights.values() if isinstance(p, WeightPart)]

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

    @contextmanager
    def given(self, *, condition: Any = None, task: Task | None = None) -> Iterator[None]:
        """Inside the block, what the prefix of each row is made from (``generate`` needs it; a call can be told).

        The block holds in its own context: threads and asyncio tasks don't disturb each other, and a thread that is
        started in it is handed it by ``contextvars.copy_context().run``, or raises.

        Args:
            condition: vectors ``(B, C)``, or one ``(C,)`` for all rows, for ``PrefixConfig(condition=C)``.
            task: names (or numbers) one a row, or one for all, for ``PrefixConfig(tasks=...)``.

        Raises:
            ConfigError: not what this prefix asks for.
        """
        with self._passes.given.block(self.read_given(condition=condition, task=task)):
            yield  # a backward that is still to come has its views

    def read_given(self, *, condition: Any = None, task: Task | None = None) -> Tensor:
        """Condition vectors ``(R, C)`` or numbers of tasks ``(R,)``, checked."""
        return self._passes.given.read(self.encoder, self.tasks, condition, task)

    @property
    def rotations(self) -> dict[str, Rotation]:
        """How the keys of each site depend on their position; empty for models that aren't rotary."""
        return self.positions.rotations

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

    def parameter_groups(self, learning_rate: float | None = None) -> list[dict[str, Any]]:
        """What an optimizer takes: each method's parameters with a learning rate of their own.

        Args:
            learning_rate: of the first method, where its configuration names none (0 is a rate: it stays as it is). The
                others go at what is usual for them, and so does what was loaded.
        """
        from foreword._groups import parameter_groups

        return parameter_groups(self, learning_rate)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained, of how many in model and prefix together, as PEFT does."""
        from foreword._groups import counts

        trained, of = counts(self)
        print(f"trainable params: {trained:,d} || all params: {of:,d} || trainable%: {100 * trained / of:.4f}")

    def add_gates(self, kind: str, sites: Sequence[Site]) -> None:
        """Learned weights per head: ``"head"`` and ``"input"`` from 1, ``"zero"`` from a closed gate."""
        for i, site in enumerate(self.sites):
            if site not in sites:
                continue
            if kind == "input":
                self.holder.reading[str(i)] = nn.Parameter(torch.zeros(site.heads, site.key_dim + 1))
            else:
                group = self.holder.bias if kind == "head" else self.holder.gate
                group[str(i)] = nn.Parameter(torch.zeros(site.heads))

    def load_gates(self, prefix: Prefix, trainable: bool) -> None:
        """Take the gates of a baked prefix, to be trained on or not."""
        self._through_tanh = trainable
        for i, site in enumerate(self.sites):
            for group, tensors in ((self.holder.bias, prefix.bias), (self.holder.reading, prefix.readings)):
                if (tensor := tensors.get(site.name)) is not None:
                    group[str(i)] = nn.Parameter(tensor.clone(), requires_grad=trainable)
            if (gate := prefix.gates.get(site.name)) is not None:
                # Trained through tanh, stored after it.
                inner = (
                    torch.atanh(gate.double().clamp(-1 + 1e-6, 1 - 1e-6)).to(gate.dtype) if trainable else gate.clone()
                )
                self.holder.gate[str(i)] = nn.Parameter(inner, requires_grad=trainable)

    # ---------------------------------------------------------------- what the attention reads

    def build_views(self, given: Tensor | None = None, rows: Tensor | None = None) -> dict[str, SitePrefix]:
        """Every site's keys and values for one forward pass; the encoder runs here, once.

        Args:
            given: what the encoder is given; None where it asks for nothing.
            rows: which of what it makes each row reads; None: each its own, or all the only one.
        """
        if self._strength == 0:
            return {}
        states = self.encoder(given)
        memory = self.holder.memory.factors() if self.holder.memory is not None else {}
        seen_by = (self.visible,) if self.visible.kind != "all" else None
        views = {}
        for i, site in enumerate(self.sites):
            keys, values = states[site.name] if site.name in states else self.nothing_at(site)
            views[site.name] = SitePrefix(
                keys if keys.dim() == 4 else keys.unsqueeze(0),
                values if values.dim() == 4 else values.unsqueeze(0),
                rows,
                self.holder.log_weights(i, keys),
                bias=self.bias_at(i, self._strength),
                gate=self.gate_at(i, self._strength),
                reading=self.reading_at(i),
                seen_by=seen_by if keys.shape[-2] else None,
                memory=self._memory(site, memory),
            )
        return views

    def grow_to(self, active: int, opening: tuple[int, float] | None = None) -> None:
        """Let the first ``active`` virtual tokens stand; the newest may come in slowly (``PrefixEncoder.opening``)."""
        self.encoder.active, self.encoder.opening = active, opening
        self._passes.forget()

    def reading_at(self, i: int) -> Tensor | None:
        return self.holder.reading[str(i)] if str(i) in self.holder.reading else None  # noqa: SIM401

    def nothing_at(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys and values of length 0, for a site with a memory only."""
        device = next(self.holder.parameters()).device
        shapes = ((site.kv_heads, 0, site.key_dim), (site.kv_heads, 0, site.value_dim))
        return torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)

    def _memory(self, site: Site, factors: Mapping[str, tuple[Tensor, Tensor | None]]) -> SiteMemory | None:
        if site.name not in factors:
            return None
        matrix, up = factors[site.name]
        if self._strength != 1:
            matrix = matrix * self._strength
        rotation = self.rotations.get(site.name) if self.recall.queries == "plain" else None
        upper = up.unsqueeze(0) if up is not None else None
        return SiteMemory(matrix.unsqueeze(0), upper, self.recall.activation, rotation)

    def bias_at(self, i: int, strength: float) -> Tensor | None:
        """The learned weight and the strength of a site, as a bias on the log-sum-exp."""
        name = str(i)
        learned: Tensor | None = self.holder.bias[name] if name in self.holder.bias else None  # noqa: SIM401
        if strength == 1 or name in self.holder.gate:
            return learned
        if learned is None:
            return torch.full((self.sites[i].heads,), math.log(strength), device=device_of(self.model))
        return learned + math.log(strength)

    def gate_at(self, i: int, strength: float) -> Tensor | None:
        if str(i) not in self.holder.gate:
            return None
        gate: Tensor = self.holder.gate[str(i)]
        return (torch.tanh(gate) if self._through_tanh else gate) * strength

    # ---------------------------------------------------------------- baking and detaching

    @torch.no_grad()
    def bake(self, *, condition: Any = None, task: str | None = None) -> Prefix:
        """The prefix as it stands, without what made it: an MLP never runs again.

        A strength other than 1 becomes part of it (0 would leave nothing, and is left out).

        Args:
            condition: the vector ``(C,)`` of a conditional prefix to make a plain one of. None: its encoder is kept,
                and ``Prefix.given`` makes plain ones of it.
            task: which of the tasks that are trained together.

        Raises:
            ConfigError: the prefix has several tasks and none is named, or isn't given anything.
        """
        from foreword._baking import bake

        return bake(self, condition, task)

    def save(self, folder: str | Path, *, overwrite: bool = True) -> Path:
        """Bake and save: one prefix folder, or one for each task in a folder of its name below."""
        if not self.tasks:
            return self.bake().save(folder, overwrite=overwrite)
        for task in self.tasks:
            self.bake(task=task).save(Path(folder) / task, overwrite=overwrite)
        return Path(folder)

    def detach(self) -> PreTrainedModel:
        """Take the prefix off; the model is what it was, bit for bit. Returns the model."""
        if not self.attached:
            raise AttachError("this prefix is not attached (any more); nothing to detach")
        for part in self.weight_parts():
            part.check_off(self.model)
        for site in self.sites:
            self.model.get_submodule(site.name).__dict__.pop(_interface.SLOT, None)
        self._passes.remove()
        self._generate.remove()
        if self.queries is not None:
            self.queries.remove()
        del self.model._modules[CHILD]
        unwatch(self)
        self.take_parts_off()
        return self.model

    def take_parts_off(self) -> None:
        """Take LoRA and the like off the model, and give every parameter its ``requires_grad`` back."""
        for part in reversed(self.weight_parts()):  # what was put on last stands around the others
            part.take_off(self.model)
        self._buffers.put_back()
        set_flags(self.model, self._flags)

    def install(self, *, trainable: bool) -> None:
        """Put everything that was built onto the model. ``attach`` calls it."""
        if hasattr(self.model, CHILD):
            raise AttachError(f"{type(self.model).__name__} has an attribute named {CHILD!r} of its own")
        self.trainable = trainable
        trained = {p for part in self.weight_parts() for p in part.values if p.requires_grad}
        if trainable:
            self._buffers.hold(self.model)
            show_shards(self.model)
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter in trained)
        self.holder.place(self.model, self.sites, trainable)
        self.model.add_module(CHILD, self.holder)
        self.holder.train(self.model.training)
        watch(self)
        if self.sites:
            for site in self.sites:
                self.model.get_submodule(site.name).__dict__[_interface.SLOT] = SiteSlot(site.name, self._passes)
        self._passes.install()
        if self.visible.kind != "all":
            self.queries = Queries(self.model, self.sites, offset=self.position_offset, watch=self._passes.watch)
            self.queries.install()
            self._generate.around.append(self.queries.generating)
        if self._passes.by_pass:
            self._generate.around.append(self._passes.generating)
        if self._generate.around:
            self._generate.install()

    def __repr__(self) -> str:
        what = f"{self.num_parameters:,} trainable parameters" if self.trainable else "frozen"
        longest = self.encoder.longest
        parts = [f"{longest} virtual tokens at {len(self.sites)} sites"] if longest else []
        parts += ["memory"] if self.holder.memory is not None else []
        parts += [p.method for p in self.weight_parts()]
        return f"Tuning({' + '.join(parts)} of {type(self.model).__name__}, {what})"
