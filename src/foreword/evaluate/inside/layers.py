"""Which layers carry a prefix: the loss without each site's part of it, and with that part alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from foreword import _interface
from foreword._holder import SiteSlot
from foreword.evaluate.inside._rows import Batches, Unavailable, standing, without_cache
from foreword.evaluate.inside.attention import Progress, silent
from foreword.losses import IGNORED
from foreword.prefix import Prefix
from foreword.sites import Site


@dataclass(frozen=True)
class LayerLosses:
    """Losses in nats a label, mean over all labels.

    Attributes:
        labels: how many labels the losses are over.
        whole: with the whole prefix.
        none: without it at any site. What else came with it (LoRA, a head) stays.
        without: by site, with the prefix everywhere but there.
        only: by site, with the prefix there alone.
        kinds: of the sites.
    """

    labels: int
    whole: float
    none: float
    without: dict[str, float]
    only: dict[str, float]
    kinds: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def layer_losses(
    model: PreTrainedModel, prefix: Prefix, batches: Batches, *, force: bool = False, progress: Progress = silent
) -> LayerLosses | Unavailable:
    """Leave one site out, and one site in: ``2 * sites + 2`` times the data.

    Args:
        model: the base model, with nothing attached.
        batches: arguments of forward passes, with ``labels``.
        force: accept other weights of the base model.
        progress: is told of each pass.
    """
    if not prefix.sites:
        return Unavailable("nothing of it stands at an attention site")
    if not batches or any(b.get("labels") is None for b in batches):
        return Unavailable("the data has no labels, so there is no loss")
    with standing(model, prefix, force=force) as tuning:
        names = [s.name for s in tuning.sites]
        counts = [_labels(model, tuning.sites, b["labels"]) for b in batches]
        if not sum(counts):
            return Unavailable("no example has a label that counts, so there is no loss")
        total, done = (2 * len(names) + 2) * len(batches), 0

        def loss(kept: Collection[str]) -> float | None:
            nonlocal done
            found = 0.0
            with _kept(model, kept):
                for batch, n in zip(batches, counts, strict=True):
                    out = model(**{**batch, **without_cache(model)})
                    if getattr(out, "loss", None) is None:
                        return None
                    found += float(out.loss) * n if n else 0.0  # of no label it is not a number
                    done += 1
                    progress(done, total)
            return found / sum(counts)

        whole = loss(names)
        if whole is None:
            return Unavailable(f"{type(model).__name__} gives no loss; use a model with a head that has one")
        none = loss(())
        without = {n: loss([m for m in names if m != n]) for n in names}
        only = {n: loss([n]) for n in names}
    known = [{n: x for n, x in group.items() if x is not None} for group in (without, only)]
    kinds: dict[str, str] = {s.name: s.kind for s in tuning.sites}
    return LayerLosses(sum(counts), whole, none if none is not None else whole, known[0], known[1], kinds)


@contextmanager
def _kept(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Inside the block, only these sites have the prefix."""
    slots = {module: _interface.slot_of(module) for module in model.modules()}
    rest = {m: None for m, slot in slots.items() if isinstance(slot, SiteSlot) and slot.name not in names}
    with _interface.slots_over(rest):
        yield


def _labels(model: PreTrainedModel, sites: Sequence[Site], labels: Tensor) -> int:
    """How many of them the model's loss is the mean of: a causal language model predicts all but the first."""
    shifts = any(s.kind == "self" for s in sites) and not model.config.is_encoder_decoder
    if shifts and labels.dim() == 2 and model.get_output_embeddings() is not None:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())
