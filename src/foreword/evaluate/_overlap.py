"""Metrics of overlap with references: BLEU, chrF, ROUGE, METEOR, NIST, CIDEr, exact match."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from foreword.evaluate._counts import Counts, Given, Numbers, mean

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

# A word with what hyphens, slashes and points join to it; the clitics of "don't" and "it's"; the pound.
_CAPTION_WORD = re.compile(r"n't\b|\w+?(?=n't\b)|\w+(?:[-./]\w+)*|['’]\w+|£")
_NIST_ORDER = 5
_CIDER_ORDER, _CIDER_SIGMA = 4, 6.0


def bleu(given: Given) -> Counts:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default."""
    from sacrebleu.metrics import BLEU

    return _sacrebleu(BLEU(force=True), given)


def bleu_lower(given: Given) -> Counts:
    """Corpus BLEU of lower-cased texts: what E2E's own script and ``mteval-v13a.pl`` give."""
    from sacrebleu.metrics import BLEU

    return _sacrebleu(BLEU(force=True, lowercase=True), given)


def chrf(given: Given) -> Counts:
    """chrF2 (Popović 2015) as sacrebleu computes it by default."""
    from sacrebleu.metrics import CHRF

    return _sacrebleu(CHRF(), given)


def _sacrebleu(metric: Any, given: Given) -> Counts:
    """sacrebleu's own counts; it adds them up and scores the sums in the same way for its confidence intervals."""
    most = max(map(len, given.references))
    # One stream a reference, with None where an example has fewer.
    streams = [[r[i] if i < len(r) else None for r in given.references] for i in range(most)]
    rows = np.array(metric._extract_corpus_statistics(list(given.predictions), streams), dtype=float)
    signature = metric.get_signature().format()

    def value(sums: Numbers) -> float:
        # compute_bleu writes into the lists that it is given.
        return float(metric._compute_score_from_stats([int(x) for x in sums]).score)

    return Counts(rows, value, note=signature)


def rouge1(given: Given) -> Counts:
    """ROUGE-1 F1 (Lin 2004)."""
    return _rouge("rouge1", given)


def rouge2(given: Given) -> Counts:
    """ROUGE-2 F1."""
    return _rouge("rouge2", given)


def rouge_l(given: Given) -> Counts:
    """ROUGE-L F1 over the whole text."""
    return _rouge("rougeL", given)


def _rouge(kind: str, given: Given) -> Counts:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    values = [
        scorer.score_multi(list(refs), prediction)[kind].fmeasure
        for prediction, refs in zip(given.predictions, given.references, strict=True)
    ]
    return mean(values, note="rouge-score with stemming; the best of several references")


def rouge_l_coco(given: Given) -> Counts:
    """ROUGE-L as image captioning and E2E have it: best precision and best recall over references, F of beta 1.2."""
    beta2 = 1.2**2
    values = []
    for prediction, refs in zip(given.predictions, given.references, strict=True):
        words = caption_words(prediction)
        common = [(_common(words, other), len(other)) for other in map(caption_words, refs)]
        precision = max(c for c, _ in common) / max(1, len(words))
        recall = max(c / max(1, n) for c, n in common)
        both = precision and recall
        values.append((1 + beta2) * precision * recall / (recall + beta2 * precision) if both else 0.0)
    return mean(values, note="tokens as in captioning, nearly (the original is the Stanford tokenizer)")


def meteor(given: Given) -> Counts:
    """METEOR of 2007 (Lavie & Agarwal) by nltk: exact words and stems, and WordNet's synonyms where they are."""
    from nltk.translate.meteor_score import meteor_score

    wordnet, said = _wordnet()
    values = [
        meteor_score([caption_words(r) for r in refs], caption_words(prediction), wordnet=wordnet)
        for prediction, refs in zip(given.predictions, given.references, strict=True)
    ]
    return mean(values, note=f"nltk's METEOR, {said}; not comparable with the Java METEOR 1.5")


def _wordnet() -> tuple[Any, str]:
    """nltk's reader of WordNet, or one that knows no synonyms where the data is not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return _NoSynonyms(), "without WordNet's synonyms (its data is not installed)"
    return wordnet, "with WordNet's synonyms"


class _NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


def exact_match(given: Given) -> Counts:
    """The share of predictions equal to a reference, but for white space at the ends and its runs."""
    pairs = zip(given.predictions, given.references, strict=True)
    return mean([float(_line(p) in {_line(r) for r in refs}) for p, refs in pairs])


def _line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------ NIST


def nist(given: Given) -> Counts:
    """NIST (Doddington 2002, eq. 2 and 3), with n-grams up to 5, as ``mteval-v13a.pl`` computes it.

    An n-gram of the prediction counts as often as in any one reference, with its information in all references of
    the set; lengths are compared with the mean over the references. (nltk takes the best single reference of each
    order instead, and gives other values where there are several.)
    """
    from sacrebleu.metrics import BLEU

    tokenise = BLEU(force=True, lowercase=True)._preprocess_segment
    references = [[tokenise(r).split() for r in refs] for refs in given.references]
    information = _information([r for refs in references for r in refs])
    rows = np.zeros((len(references), 2 * _NIST_ORDER + 2))
    for row, prediction, refs in zip(rows, given.predictions, references, strict=True):
        words = tokenise(prediction).split()
        for n in range(1, _NIST_ORDER + 1):
            grams, allowed = ngrams(words, n), _most(ngrams(r, n) for r in refs)
            row[n - 1] = sum(min(c, allowed[g]) * information[g] for g, c in grams.items() if g in allowed)
            row[_NIST_ORDER + n - 1] = max(0, len(words) - n + 1)
        row[-2:] = len(words), sum(map(len, refs)) / len(refs)
    return Counts(rows, _nist, note="tokens as in mteval-v13a, lower case; information from the references of this set")


def _nist(sums: Numbers) -> float:
    gained, possible, (words, expected) = sums[:_NIST_ORDER], sums[_NIST_ORDER:-2], sums[-2:]
    if not words or not expected:
        return 0.0
    # The factor is 0.5 where the text has two thirds of the references' words.
    beta = math.log(0.5) / math.log(1.5) ** 2
    penalty = math.exp(beta * math.log(min(1.0, words / expected)) ** 2)
    return float(sum(g / p for g, p in zip(gained, possible, strict=True) if p)) * penalty


def _information(references: Sequence[Words]) -> dict[tuple[str, ...], float]:
    """log2 of how often an n-gram's first n - 1 words occur by how often all of it does (eq. 2)."""
    counts: Grams = Counter()
    for words in references:
        for n in range(1, _NIST_ORDER + 1):
            counts.update(ngrams(words, n))
    total = sum(map(len, references))
    return {g: math.log2((counts[g[:-1]] if len(g) > 1 else total) / c) for g, c in counts.items()}


# ------------------------------------------------------------------------------------------ CIDEr


def cider(given: Given) -> Counts:
    """CIDEr-D (Vedantam et al. 2015, eq. 8), which is what captioning and E2E report as CIDEr: 0 to 10.

    For each n from 1 to 4, n-grams are weighted by term frequency and inverse document frequency, a document being
    the references of an example; the prediction's weights are clipped at the reference's, and a difference in length
    is punished by a Gaussian of sigma 6. Here as in the original code without stemming.
    """
    references = [[_orders(caption_words(r)) for r in refs] for refs in given.references]
    documents: Grams = Counter()
    for refs in references:
        documents.update({gram for orders in refs for grams in orders for gram in grams})
    size = math.log(len(references))

    def weigh(grams: Grams) -> dict[tuple[str, ...], float]:
        return {g: c * (size - math.log(max(1, documents[g]))) for g, c in grams.items()}

    values = []
    for prediction, refs in zip(given.predictions, references, strict=True):
        mine = _orders(caption_words(prediction))
        weights = [weigh(grams) for grams in mine]
        scores = [
            math.exp(-((mine[0].total() - theirs[0].total()) ** 2) / (2 * _CIDER_SIGMA**2))
            * sum(_clipped_cosine(w, weigh(t)) for w, t in zip(weights, theirs, strict=True))
            for theirs in refs
        ]
        values.append(sum(scores) / (_CIDER_ORDER * len(refs)))
    return mean(values, scale=10.0, note="CIDEr-D; its weights come from the references of this set")


def _orders(words: Words) -> list[Grams]:
    return [ngrams(words, n) for n in range(1, _CIDER_ORDER + 1)]


def _clipped_cosine(one: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    sizes = math.hypot(*one.values()) * math.hypot(*other.values())
    return sum(min(w, other[g]) * other[g] for g, w in one.items() if g in other) / sizes if sizes else 0.0


# ------------------------------------------------------------------------------------------ words


def caption_words(text: str) -> list[str]:
    """Lower-case words without punctuation, as image captioning counts them."""
    return _CAPTION_WORD.findall(text.lower())


def ngrams(words: Words, n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _most(counters: Any) -> Grams:
    """The largest count of each n-gram in any of them."""
    found: Grams = Counter()
    for counter in counters:
        found |= counter
    return found


def _common(one: Words, other: Words) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for j, against in enumerate(other, 1):
            above = best[j]
            best[j] = diagonal + 1 if word == against else max(above, best[j - 1])
            diagonal = above
    return best[-1]
