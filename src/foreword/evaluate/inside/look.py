"""All diagnostics of one prefix, one after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.errors import ConfigError
from foreword.evaluate.inside._rows import Batches, Unavailable, rounded, rows_of, standing
from foreword.evaluate.inside.attention import AttentionShare, Dilution, attention_share, dilution, dilution_lengths
from foreword.evaluate.inside.layers import LayerLosses, layer_losses
from foreword.evaluate.inside.norms import Norms, norms
from foreword.evaluate.inside.similarity import Similarity, similarity
from foreword.evaluate.inside.spectrum import Spectrum, methods_of, spectrum
from foreword.evaluate.inside.words import Lens, lens
from foreword.prefix import Prefix

_T = TypeVar("_T")
NOT_ASKED = Unavailable("it was not asked for")
PARTS = ("share", "dilution", "words", "norms", "spectrum", "similarity", "layers")


@dataclass(frozen=True)
class Look:
    """What was seen. A part that can't be had is :class:`Unavailable` and says why.

    Attributes:
        about: the prefix, its base model and the texts, in a few words and numbers.
        spectra: of the whole (``"all"``), of each method in it where there are several, and of the other prefix.
        similarity: of the prefix with itself (``"itself"``), and with the other one.
        sites: by site name its kind, in the model's order.
    """

    about: dict[str, Any]
    share: AttentionShare | Unavailable
    dilution: Dilution | Unavailable
    words: Lens | Unavailable
    norms: Norms | Unavailable
    spectra: dict[str, Spectrum | Unavailable]
    similarity: dict[str, Similarity | Unavailable]
    layers: LayerLosses | Unavailable
    sites: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it, numbers to six digits."""
        record: dict[str, Any] = {"about": self.about, "sites": self.sites}
        for name in ("share", "dilution", "words", "norms", "layers"):
            record[name] = getattr(self, name).to_json()
        for name in ("spectra", "similarity"):
            record[name] = {label: found.to_json() for label, found in getattr(self, name).items()}
        return {name: rounded(value) for name, value in record.items()}


def look(
    model: PreTrainedModel,
    prefix: Prefix,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    *,
    name: str = "prefix",
    against: tuple[str, Prefix] | None = None,
    only: Collection[str] = PARTS,
    lengths: Sequence[int] | None = None,
    strengths: Sequence[float] = (0.5, 2.0),
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Look:
    """Look inside a prefix: shares of attention, dilution, words, norms, spectra, similarity, layers.

    Args:
        model: the base model, with nothing attached; it is left as it was.
        batches: arguments of forward passes, padded on the right, with labels for the layers' losses (as
            :func:`batches_of` makes them).
        name: of the prefix, for people.
        against: another prefix of the same base, by name: its similarity and spectrum beside this one's.
        only: which parts.
        lengths: of text for the dilution, in tokens; None: powers of two.
        strengths: weights of the prefix to try in the dilution.
        force: accept other weights of the base model.
        progress: is told the part, the passes done and how many there are.

    Raises:
        ConfigError: an unknown part, or a prefix that is still to be made of a condition.
        MismatchError: the prefix belongs to another model, or the other one does.
        DataError: there is no text, or too little.
    """
    if unknown := sorted(set(only) - set(PARTS)):
        raise ConfigError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    rows = rows_of(model, batches)
    example = rows[0]
    with standing(model, prefix, force=force):  # what doesn't fit is refused now, before any time is spent
        pass
    if "dilution" in only:
        dilution_lengths(model, prefix, rows, lengths)
    spectra = {"all": prefix, **_several(prefix)}
    likeness: dict[str, Similarity | Unavailable] = {"itself": _wanted("similarity", only, lambda: _itself(prefix))}
    if against is not None:
        label, other = _unlike(against[0], {name, "itself", *spectra}), against[1]
        likeness[label] = _wanted("similarity", only, lambda: similarity(prefix, other, force=force))
        with standing(model, other, force=force):
            pass
        against, spectra[label] = (label, other), other
    tell = {part: partial(progress, part) for part in PARTS}
    return Look(
        about=_about(model, prefix, rows, name, against),
        share=_wanted(
            "share", only, lambda: attention_share(model, prefix, batches, force=force, progress=tell["share"])
        ),
        dilution=_wanted(
            "dilution",
            only,
            lambda: dilution(
                model, prefix, batches, lengths=lengths, strengths=strengths, force=force, progress=tell["dilution"]
            ),
        ),
        words=_wanted("words", only, lambda: lens(model, prefix, tokenizer, force=force, example_inputs=example)),
        norms=_wanted("norms", only, lambda: norms(model, prefix, batches, force=force, progress=tell["norms"])),
        spectra={
            label: _wanted(
                "spectrum",
                only,
                partial(spectrum, model, of, batches, force=force, progress=_nth(tell["spectrum"], i, len(spectra))),
            )
            for i, (label, of) in enumerate(spectra.items())
        },
        similarity=likeness,
        layers=_wanted(
            "layers", only, lambda: layer_losses(model, prefix, batches, force=force, progress=tell["layers"])
        ),
        sites={s.name: s.kind for s in prefix.sites},
    )


def _wanted(part: str, only: Collection[str], make: Callable[[], _T]) -> _T | Unavailable:
    return make() if part in only else NOT_ASKED


def _itself(prefix: Prefix) -> Similarity | Unavailable:
    if not prefix.longest:
        return Unavailable("there are no virtual tokens in it")
    return similarity(prefix, prefix)


def _several(prefix: Prefix) -> dict[str, Prefix]:
    methods = methods_of(prefix)
    return methods if len(methods) > 1 else {}


def _unlike(name: str, taken: Collection[str]) -> str:
    """A name for the other prefix that nothing else here has."""
    return f"{name} (the other)" if name in taken else name


def _nth(progress: Callable[[int, int], None], n: int, of: int) -> Callable[[int, int], None]:
    """Progress of one of several rounds of the same length."""
    return lambda done, total: progress(n * total + done, of * total)


def _about(
    model: PreTrainedModel, prefix: Prefix, rows: Sequence[Any], name: str, against: tuple[str, Prefix] | None
) -> dict[str, Any]:
    ids = [r["input_ids"] for r in rows if "input_ids" in r]
    return {
        "name": name,
        "prefix": repr(prefix),
        "base_model": prefix.fingerprint.base_model,
        "model_class": type(model).__name__,
        "sites": len(prefix.sites),
        "virtual_tokens": prefix.longest,
        "parameters": prefix.num_parameters,
        "methods": list(methods_of(prefix)),
        "visible": "function" if prefix.visible.kind == "predicate" else prefix.visible.to_json(),
        "texts": len(rows),
        "tokens": sum(i.numel() for i in ids) if ids else None,
        "against": {"name": against[0], "prefix": repr(against[1])} if against is not None else None,
    }
