"""Prefix: the trained artefact, the keys and values that stand before the text at each attention site.

A prefix is data: tensors by site name, the position that its text starts at, and what it remembers of its base
model. It knows nothing of training; ``foreword.attach`` puts one onto a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword.errors import ConfigError, MismatchError
from foreword.fingerprint import Fingerprint, shape_differences
from foreword.memory import Recall
from foreword.positions import Rotation
from foreword.sites import Site
from foreword.storage import Storage
from foreword.visibility import Visibility

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_COUNTED = ("keys", "values", "memory", "memory_up", "weights")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values by attention site.

    Attributes:
        keys: by site name, ``(kv_heads, length, key_dim)``. Lengths may differ from site to site.
        values: by site name, ``(kv_heads, length, value_dim)``.
        sites: the sites that they belong to, in the model's order.
        position_offset: where the text starts: 0 as in the base model, or P as PEFT and vLLM have it.
        rotations: how the keys of rotary models depend on their position, by site name.
        bias: by site name, ``(heads,)`` added to the prefix's log-sum-exp. Sites may be missing.
        gates: by site name, ``(heads,)`` for zero-initialised gated attention. Sites may be missing.
        fingerprint: the base model that it was made on.
        metadata: anything JSON can hold: configuration, metrics, training.
        visible: which positions of the text see the prefix.
        readings: by site name, ``(heads, key_dim + 1)``: weights on the prefix read off each query. May be missing.
        memory: by site name, ``(heads, key_dim, value_dim)``: a memory beside the attention; ``(heads, key_dim, rank)``
            where ``memory_up`` has its second factor. Sites may be missing.
        memory_up: by site name, ``(heads, rank, value_dim)``, of memories of low rank.
        recall: how the memory is read.
        parts: the configurations of other methods trained with it (LoRA, adapters, a head, …), as JSON has them.
        weights: their tensors, by ``method/name``.
        log_weights: by site name, ``(length,)`` added to the scores of the tokens: log n for one that stands for n.
            Sites may be missing.
        storage: how :meth:`save` writes keys and values.
    """

    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    sites: Sequence[Site]
    position_offset: int = 0
    rotations: Mapping[str, Rotation] = field(default_factory=dict)
    bias: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprint: Fingerprint = field(default_factory=lambda: Fingerprint("", ""))
    metadata: Mapping[str, Any] = field(default_factory=dict)
    visible: Visibility = field(default_factory=Visibility)
    readings: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    memory_up: Mapping[str, Tensor] = field(default_factory=dict)
    recall: Recall = field(default_factory=Recall)
    parts: Sequence[Mapping[str, Any]] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    log_weights: Mapping[str, Tensor] = field(default_factory=dict)
    storage: Storage = field(default_factory=Storage)

    def __post_init__(self) -> None:
        names = [s.name for s in self.sites]
        if set(names) != set(self.keys) or set(names) != set(self.values):
            odd = sorted(set(names) ^ set(self.keys) | set(names) ^ set(self.values))
            raise MismatchError(f"sites, keys and values name different sites: {odd[0]} is not in all three")
        for site in self.sites:
            _check_site(site, self.keys[site.name], self.values[site.name])
            for extra, tensors, shape in (
                ("bias", self.bias, (site.heads,)),
                ("gate", self.gates, (site.heads,)),
                ("reading", self.readings, (site.heads, site.key_dim + 1)),
                ("log_weight", self.log_weights, (self.length(site.name),)),
                ("memory", self.memory, (site.heads, site.key_dim, self._rank(site.name) or site.value_dim)),
                ("memory_up", self.memory_up, (site.heads, self._rank(site.name), site.value_dim)),
            ):
                tensor = tensors.get(site.name)
                if tensor is not None and tensor.shape != shape:
                    raise MismatchError(f"{site.name}: the {extra} has shape {tuple(tensor.shape)}, expected {shape}")
        if alone := sorted(self.memory_up.keys() - self.memory.keys()):
            raise MismatchError(f"{alone[0]}: a memory_up without a memory, expected both factors")

    def _rank(self, site: str) -> int | None:
        """Of a site's memory; None: it is whole, or has a second factor that isn't one."""
        up = self.memory_up.get(site)
        return up.shape[1] if up is not None and up.dim() == 3 else None

    # ---------------------------------------------------------------- where prefixes come from

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        length: int | None = None,
        position_offset: int = 0,
    ) -> Prefix:
        """The keys and values that a model computes for a text: an untrained prefix, or a cached system prompt.

        Rotary models then answer as if prompted with the text; models with learned positions do so with
        ``position_offset`` set to the prefix's length. This is tried on a few tokens of the model at hand. An
        ``InexactWarning`` says where it holds for no text: in models that read in both directions, and in those with
        learned positions and another offset.

        Args:
            length: keep the first tokens of the text only; None: all of it.

        Raises:
            ConfigError: the text has no token, or fewer than ``length``.
            MismatchError: the model would answer otherwise than if prompted.
        """
        from foreword._made import from_text

        return from_text(model, tokenizer, text, length, position_offset)

    @classmethod
    def from_tensors(
        cls,
        model: PreTrainedModel,
        tensors: Mapping[str, tuple[Tensor, Tensor]],
        *,
        position_offset: int = 0,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> Prefix:
        """A prefix from keys and values made elsewhere, by site name, shapes as in :class:`Prefix`.

        Args:
            position_offset: where the text starts that they are for: P for prefixes of PEFT or vLLM.
            example_inputs: one forward pass's arguments, for models that don't start from token ids.

        Raises:
            MismatchError: a name or a shape that the model doesn't have.
        """
        from foreword._made import from_tensors

        return from_tensors(model, tensors, position_offset, example_inputs)

    @classmethod
    def load(cls, folder: str | Path) -> Prefix:
        """Read what :meth:`save` wrote, here or on a hub (``"hf://owner/name"``). Never runs code from the folder.

        Raises:
            PrefixFileError: the folder is missing, incomplete, corrupt, or of an unknown format.
            StoreError: the hub can't be read, or has no such repository.
        """
        from foreword._prefix_file import load
        from foreword.hub import located

        return load(located(folder))

    def given(self, condition: Any) -> Prefix:
        """The plain prefix that a conditional one (``PrefixConfig(condition=C)``) makes of one vector ``(C,)``.

        Raises:
            ConfigError: this prefix is the same for all, or the vector is of another size.
        """
        from foreword.conditional import given, part_of

        if part_of(self) is None:
            raise ConfigError("this prefix is the same for all rows, so it is given nothing")
        return given(self, condition)

    def _check_whole(self, doing: str) -> None:
        """Raise ConfigError for a prefix that is still to be made of a condition."""
        if any(p["method"] == "condition" for p in self.parts):
            raise ConfigError(f"a prefix that depends on a condition can't be {doing}; make a plain one: given(vector)")

    def save(self, folder: str | Path, *, overwrite: bool = True, storage: Storage | str | None = None) -> Path:
        """Write ``prefix.safetensors``, ``foreword.json`` and ``README.md``, all of them or none.

        Args:
            storage: how keys and values are written, also ``"plain"``, ``"int8"``, ``"int4"``; None: as
                ``self.storage`` says, which is how they were stored when loaded.

        Raises:
            PrefixFileError: the folder holds something else, or can't be written.
            ConfigError: an unknown storage, or numbers that it can't hold.
        """
        from foreword._prefix_file import save

        chosen = Storage.of(storage) if isinstance(storage, str) else storage
        return save(replace(self, storage=chosen or self.storage), Path(folder), overwrite=overwrite)

    def push_to_hub(self, to: str, *, private: bool | None = None, message: str | None = None) -> str:
        """Save it on a hub as ``"owner/name"``; returns the address of this version: :func:`foreword.hub.push`."""
        from foreword.hub import push

        return push(self, to, private=private, message=message)

    # ---------------------------------------------------------------- what is in it

    def length(self, site: str) -> int:
        """Virtual tokens at a site."""
        if site not in self.keys:
            raise MismatchError(f"the prefix has nothing at {site!r}; its sites: {', '.join(self.keys)}")
        return self.keys[site].shape[1]

    @property
    def longest(self) -> int:
        """The largest length among the sites."""
        return max((k.shape[1] for k in self.keys.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of everything in it, in memory; for those of its file see ``stored_nbytes``.

        Of keys and values: sum over sites of ``length * kv_heads * (key_dim + value_dim) * itemsize``.
        """
        return sum(t.numel() * t.element_size() for group in self._groups().values() for t in group.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the ``prefix.safetensors`` that :meth:`save` writes, its head and description included."""
        from foreword._prefix_file import stored_nbytes

        return stored_nbytes(self)

    @property
    def num_parameters(self) -> int:
        """Numbers in all keys and values, memories and weights (not in gates, which are few)."""
        return sum(t.numel() for name in _COUNTED for t in getattr(self, name).values())

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything that is a tensor."""
        return {name: getattr(self, name) for name in (*_COUNTED, "bias", "gates", "readings", "log_weights")}

    def __eq__(self, other: object) -> bool:
        """Equal sites, positions and tensors, to the bit; metadata, fingerprint and storage don't count."""
        if not isinstance(other, Prefix):
            return NotImplemented
        mine, theirs = self._groups(), other._groups()
        settings = (self.position_offset, self.visible, self.recall)
        return settings == (other.position_offset, other.visible, other.recall) and all(
            mine[g].keys() == theirs[g].keys() and all(_same(mine[g][n], theirs[g][n]) for n in mine[g]) for g in mine
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lengths = {k.shape[1] for k in self.keys.values()}
        tokens = f"{min(lengths, default=0)}-{max(lengths, default=0)}" if len(lengths) != 1 else str(lengths.pop())
        what = [f"{tokens} virtual tokens at {len(self.sites)} sites"] if self.longest else []
        what += [f"memory at {len(self.memory)} sites"] if self.memory else []
        what += [str(p["method"]) for p in self.parts]
        return (
            f"Prefix({' + '.join(what)}, {self.num_parameters:,} numbers, "
            f"{self.nbytes:,} bytes, base {self.fingerprint.base_model or self.fingerprint.model_class or '?'})"
        )

    # ---------------------------------------------------------------- changed copies

    def to(self, target: torch.dtype | torch.device | str) -> Prefix:
        """The same prefix in another dtype or on another device."""
        return self._map(lambda t: t.to(target))

    def slice(self, start: int | None = None, stop: int | None = None) -> Prefix:
        """The virtual tokens ``start:stop`` of every site (Python's slice rules).

        Raises:
            ConfigError: nothing is left anywhere.
        """
        self._check_whole("sliced")
        keys = {n: k[:, start:stop] for n, k in self.keys.items()}
        if all(k.shape[1] == 0 for k in keys.values()):
            raise ConfigError(f"slice({start}, {stop}) leaves no virtual token of {self.longest}")
        values = {n: v[:, start:stop] for n, v in self.values.items()}
        return replace(
            self, keys=keys, values=values, log_weights={n: w[start:stop] for n, w in self.log_weights.items()}
        )

    def join(self, other: Prefix) -> Prefix:
        """This prefix's tokens, then the other's; in rotary models these move back to stand before the other's.

        Raises:
            MismatchError: different sites, positions, or gates.
        """
        from foreword._join import join

        return join(self, other)

    def shift(self, positions: int) -> Prefix:
        """The same prefix for text that starts ``positions`` later: keys rotated, ``position_offset`` moved.

        Raises:
            MismatchError: the model has learned or relative positions, or the text would start before 0.
        """
        if positions == 0:
            return self
        self._check_whole("shifted")
        offset = self.position_offset + positions
        if offset < 0:
            raise MismatchError(f"shift({positions}) would have the text start at {offset}; the least is 0")
        still = [s.name for s in self.sites if s.kind != "cross" and s.name not in self.rotations]
        if still:
            raise MismatchError(
                f"the keys of {still[0]} can't be rotated: the model has learned or relative positions, or a rotation "
                "that could not be proved (values or norms turn as well, or frequencies depend on the text's length). "
                "Train or make the prefix with position_offset set instead"
            )
        if self.memory and self.recall.queries == "rotated":
            raise MismatchError('a memory of rotated queries can\'t be shifted; train it with queries="plain"')
        keys = {n: self.rotations[n](k, positions) if n in self.rotations else k for n, k in self.keys.items()}
        return replace(self, keys=keys, position_offset=offset)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        groups: dict[str, Any] = {
            name: {n: change(t) for n, t in group.items()} for name, group in self._groups().items()
        }
        return replace(self, **groups)

    # ---------------------------------------------------------------- does it fit

    def check_fits(self, model: PreTrainedModel, found: Sequence[Site], *, force: bool = False) -> None:
        """Make sure that this prefix belongs to a model.

        Args:
            found: the model's sites.
            force: accept other weights (never other shapes).

        Raises:
            MismatchError: says what differs.
        """
        if problems := shape_differences(self.sites, found):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise MismatchError(
                f"this prefix was made for {self.fingerprint.model_class or 'another model'} "
                f"({self.fingerprint.base_model or 'unnamed'}) and doesn't fit {type(model).__name__}: "
                f"{problems[0]}{more}"
            )
        difference = self.fingerprint.difference(Fingerprint.of(model, self.fingerprint.weights))
        if difference and not force:
            raise MismatchError(
                f"this prefix was made on other weights ({self.fingerprint.base_model or 'unnamed'}): {difference}. "
                "Load that base model, or pass force=True if you know that they belong together"
            )


def _check_site(site: Site, keys: Tensor, values: Tensor) -> None:
    for what, tensor, dim in (("keys", keys, site.key_dim), ("values", values, site.value_dim)):
        length = tensor.shape[1] if tensor.dim() == 3 else -1
        if tensor.shape != (site.kv_heads, length, dim):
            raise MismatchError(
                f"{site.name}: {what} have shape {tuple(tensor.shape)}, expected (kv_heads {site.kv_heads}, length, "
                f"{'key' if what == 'keys' else 'value'}_dim {dim})"
            )
        if not tensor.is_floating_point():
            raise MismatchError(f"{site.name}: {what} are {tensor.dtype}, expected a floating-point dtype")
    if keys.shape[1] != values.shape[1]:
        raise MismatchError(f"{site.name}: {keys.shape[1]} keys but {values.shape[1]} values")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
