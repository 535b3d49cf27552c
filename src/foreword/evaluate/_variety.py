"""How varied a set of texts is: distinct n-grams, and how much each text repeats the others."""

from __future__ import annotations

from collections.abc import Sequence

from foreword.errors import DataError
from foreword.evaluate._counts import Counts, Given, fixed
from foreword.evaluate._overlap import Grams, caption_words, ngrams

_ORDER = 4


def distinct1(given: Given) -> Counts:
    """Distinct words by words, over all texts (Li et al. 2016)."""
    return _distinct(given, 1)


def distinct2(given: Given) -> Counts:
    """Distinct pairs of words by pairs."""
    return _distinct(given, 2)


def distinct3(given: Given) -> Counts:
    """Distinct triples of words by triples."""
    return _distinct(given, 3)


def _distinct(given: Given, n: int) -> Counts:
    texts = [caption_words(p) for p in given.predictions]
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    value = 100.0 * len(set(grams)) / len(grams) if grams else 0.0
    return fixed(value, len(texts), note="falls with the number of texts: compare sets of one size")


def self_bleu(given: Given) -> Counts:
    """The mean BLEU of each text with all the others as references (Zhu et al. 2018): 100 if all are the same.

    sacrebleu's sentence BLEU (tokens 13a, exponential smoothing, effective order). Counting what the others have most
    of takes one pass over the set, not one a text.
    """
    from sacrebleu.metrics import BLEU

    if len(given.predictions) < 2:
        raise DataError("self-bleu compares each text with the others, and there is one text; give more")
    tokenise = BLEU(force=True)._preprocess_segment
    texts = [tokenise(p).split() for p in given.predictions]
    lengths = sorted(map(len, texts))
    grams = [[ngrams(words, n) for n in range(1, _ORDER + 1)] for words in texts]
    tops = [_tops([g[n] for g in grams]) for n in range(_ORDER)]
    values = []
    for words, mine in zip(texts, grams, strict=True):
        shared = [
            sum(min(count, top[1] if count == top[0] else top[0]) for g, count in counts.items() for top in (best[g],))
            for counts, best in zip(mine, tops, strict=True)
        ]
        score = BLEU.compute_bleu(
            correct=shared,
            total=[max(0, len(words) - n) for n in range(_ORDER)],
            sys_len=len(words),
            ref_len=_closest(len(words), lengths),
            smooth_method="exp",
            effective_order=True,
        )
        values.append(float(score.score))
    note = "falls with variety, rises with the number of texts: compare sets of one size"
    return fixed(sum(values) / len(values), len(values), note=note, per_example=values)


def _tops(each: Sequence[Grams]) -> dict[tuple[str, ...], tuple[int, int]]:
    """Of each n-gram, the largest and the second largest count in any text: without itself, a text sees one of them."""
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    for counts in each:
        for gram, count in counts.items():
            first, second = found.get(gram, (0, 0))
            found[gram] = (count, first) if count >= first else (first, max(second, count))
    return found


def _closest(length: int, lengths: list[int]) -> int:
    """The length of another text that is closest, the shorter of two (BLEU's reference length)."""
    others = list(lengths)
    others.remove(length)
    return min(others, key=lambda other: (abs(other - length), other))
