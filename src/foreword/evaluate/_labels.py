"""Metrics of labels: accuracy, F1 over classes, F1 over entities. The reference is the label, the first one counts."""

from __future__ import annotations

import warnings

import numpy as np

from foreword.evaluate._counts import Counts, Given, Numbers, mean


def accuracy(given: Given) -> Counts:
    """The share of predictions that are the label, whatever the case and the white space at the ends."""
    return mean([float(p == r) for p, r in _pairs(given)])


def macro_f1(given: Given) -> Counts:
    """The mean over the classes of their F1."""
    counted = _by_class(given)
    return Counts(counted, _macro, note=_classes(given))


def micro_f1(given: Given) -> Counts:
    """F1 over the classes' counts added up."""
    counted = _by_class(given)
    return Counts(counted, lambda sums: _f1(*_present(sums).sum(axis=0)), note=_classes(given))


def entity_f1(given: Given) -> Counts:
    """F1 over entities, right where span and kind are (Tjong Kim Sang & De Meulder 2003), as seqeval counts them.

    Predictions and references are tags with white space between (``B-person I-person O``). A prediction that is too
    long is cut, and one that is too short says nothing of the rest.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    rows, uneven = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is no tag: a model may write anything
        for prediction, refs in zip(given.predictions, given.references, strict=True):
            right, said = refs[0].split(), prediction.split()
            uneven += len(said) != len(right)
            wanted = set(get_entities(right))
            found = set(get_entities([*said, *["O"] * len(right)][: len(right)]))
            rows.append([len(wanted & found), len(found - wanted), len(wanted - found)])
    note = f"{uneven} of {len(rows)} predictions have another number of tags than their text" if uneven else ""
    return Counts(np.array(rows, dtype=float), lambda sums: _f1(*sums), note=note)


def _pairs(given: Given) -> list[tuple[str, str]]:
    return [(_name(p), _name(refs[0])) for p, refs in zip(given.predictions, given.references, strict=True)]


def _name(label: str) -> str:
    return " ".join(label.split()).casefold()


def _by_class(given: Given) -> Numbers:
    """``(N, 3 · classes)``: right, wrongly said, missed, for each class of the references.

    A prediction that is no class at all is only missed: it has no F1 of its own to be averaged.
    """
    pairs = _pairs(given)
    place = {label: i for i, label in enumerate(sorted({r for _, r in pairs}))}
    counts = np.zeros((len(pairs), len(place), 3))
    for row, (said, right) in zip(counts, pairs, strict=True):
        if said == right:
            row[place[right], 0] = 1
        else:
            row[place[right], 2] = 1
            if said in place:
                row[place[said], 1] = 1
    return counts.reshape(len(pairs), -1)


def _classes(given: Given) -> str:
    classes = {right for _, right in _pairs(given)}
    other = sum(said not in classes for said, _ in _pairs(given))
    return f"{len(classes)} classes" + (f"; {other} predictions are none of them" if other else "")


def _macro(sums: Numbers) -> float:
    each = [_f1(*counts) for counts in _present(sums)]
    return sum(each) / len(each)


def _present(sums: Numbers) -> Numbers:
    """``(classes, 3)``, of those that a resample has references of: the others are no classes there."""
    counts = sums.reshape(-1, 3)
    return counts[counts[:, 0] + counts[:, 2] > 0]


def _f1(right: float, wrong: float, missed: float) -> float:
    all_said = 2 * right + wrong + missed
    return 100.0 * 2 * right / all_said if all_said else 0.0
