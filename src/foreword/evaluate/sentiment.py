"""A judge of sentiment for short texts, trained on real film reviews and measured on held-out ones.

TF-IDF over words and word pairs with logistic regression: it trains in well under a minute on one core, and
shares nothing with the language model whose texts it judges. It is trained anew where it is needed; nothing
is stored.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, DataError, MissingPartError

# Length, in words, of the pieces that long reviews are cut into: about that of the texts to be judged.
PIECE_WORDS = 50
# Pieces of one long review: more take longer to learn from and add no accuracy.
MAX_PIECES = 5

# Apostrophes stay in their words ("isn't" is one), one-letter words count, and so do ! and ?.
_TOKEN = r"(?u)\b\w[\w']*\b|[!?]"
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_COLUMNS = ("text", "label", "source")


class SentimentClassifier:
    """Gives the probability that an English text is positive. Needs scikit-learn.

    Args:
        inverse_penalty: scikit-learn's ``C``; a larger value fits the training texts more closely.
        min_texts: words and word pairs in fewer training texts than this are ignored.
    """

    def __init__(self, *, inverse_penalty: float = 10.0, min_texts: int = 2) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingPartError('Judging sentiment needs scikit-learn: pip install "foreword[demo]"') from error
        self._features: Any = TfidfVectorizer(
            ngram_range=(1, 2),
            sublinear_tf=True,
            min_df=min_texts,
            strip_accents="unicode",
            token_pattern=_TOKEN,
        )
        # On such sparse features the dual problem is solved faster; its order is random, hence the seed.
        self._model: Any = LogisticRegression(
            C=inverse_penalty, solver="liblinear", dual=True, max_iter=1000, random_state=0
        )
        self._fitted = False

    def fit(self, texts: Sequence[str], labels: Sequence[int]) -> SentimentClassifier:
        """Learn from texts labelled 1 (positive) or 0 (negative); returns itself.

        Raises:
            DataError: the lengths differ, a label is neither 0 nor 1, one of the two is absent, or the texts
                have no words in common.
        """
        _check_labels(texts, labels)
        if len(set(labels)) < 2:
            raise DataError("Training a sentiment classifier needs texts of both labels, 0 and 1.")
        try:
            features = self._features.fit_transform(texts)
        except ValueError as error:
            raise DataError(f"The texts have no words to learn from: {error}") from error
        self._model.fit(features, labels)
        self._fitted = True
        return self

    def positive_probability(self, texts: Sequence[str]) -> list[float]:
        """The probability, between 0 and 1, that each text is positive. Raises ConfigError before ``fit``."""
        if not self._fitted:
            raise ConfigError("This sentiment classifier has not been trained: call fit, or use train_on_reviews.")
        if isinstance(texts, str):
            raise DataError("positive_probability takes a list of texts, not one string.")
        if not texts:
            return []
        # Column 1 belongs to label 1: scikit-learn sorts the labels.
        column: list[float] = self._model.predict_proba(self._features.transform(texts))[:, 1].tolist()
        return column

    def held_out_accuracy(self, texts: Sequence[str], labels: Sequence[int]) -> float:
        """The share of texts, none of which it was trained on, whose label it finds.

        Raises DataError if there are none, the lengths differ or a label is neither 0 nor 1.
        """
        _check_labels(texts, labels)
        if not texts:
            raise DataError("The accuracy on no texts is not defined: give at least one.")
        found = self.positive_probability(texts)
        return sum((p > 0.5) == (label == 1) for p, label in zip(found, labels, strict=True)) / len(texts)


@dataclass(frozen=True)
class TrainedSentiment:
    """A classifier and how far to trust it.

    The accuracies are on reviews that it never saw, cut to their first ``PIECE_WORDS`` words.
    """

    classifier: SentimentClassifier
    accuracy: float
    accuracy_by_source: dict[str, float]
    train_reviews: int
    held_out_reviews: int
    excluded_reviews: int


class Review(NamedTuple):
    text: str
    label: int
    source: str


def train_on_reviews(
    reviews: Path, *, exclude: Collection[str] = (), seed: int = 0, held_out: float = 0.1
) -> TrainedSentiment:
    """Train on a CSV of reviews (columns text, label 0 or 1, source) but for a random part, to measure on.

    Long reviews are learnt from in short pieces, because short texts are what is judged later. The split
    is by review, after dropping repeated ones, so that no held-out review is seen in part.

    Args:
        exclude: texts that prefixes were trained on. Reviews that equal one, or begin like one (its first
            twelve words, or all if it has four to eleven; whatever the case and spacing), are left out.
        seed: of the random split.
        held_out: share of the reviews to hold out, between 0 and 1.

    Raises:
        DataError: the file is missing or malformed (the message gives the line), or too little is left.
        ConfigError: held_out is not between 0 and 1.
        MissingPartError: scikit-learn is not installed.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is a share between 0 and 1 (such as 0.1), not {held_out}.")
    classifier = SentimentClassifier()
    everything = _distinct(_read(reviews))
    used = _Used(exclude)
    kept = [review for review in everything if review.text not in used]
    random.Random(seed).shuffle(kept)
    count = round(len(kept) * held_out)
    test, train = kept[:count], kept[count:]
    if not test or not train:
        raise DataError(f"{reviews} leaves {len(train)} reviews to train and {len(test)} to measure on: too few.")

    pieces = [(piece, review.label) for review in train for piece in _pieces(review.text)]
    classifier.fit([text for text, _ in pieces], [label for _, label in pieces])
    by_source = {
        source: _accuracy(classifier, [review for review in test if review.source == source])
        for source in sorted({review.source for review in test})
    }
    return TrainedSentiment(
        classifier=classifier,
        accuracy=_accuracy(classifier, test),
        accuracy_by_source=by_source,
        train_reviews=len(train),
        held_out_reviews=len(test),
        excluded_reviews=len(everything) - len(kept),
    )


def _accuracy(classifier: SentimentClassifier, reviews: list[Review]) -> float:
    short = [" ".join(review.text.split()[:PIECE_WORDS]) for review in reviews]
    return classifier.held_out_accuracy(short, [review.label for review in reviews])


def _pieces(text: str) -> list[str]:
    """What to learn from a review: all of it if short, else up to MAX_PIECES pieces, evenly spread."""
    words = text.split()
    if len(words) <= PIECE_WORDS:
        return [text]
    # A last piece of less than half the length would say too little.
    starts = range(0, len(words) - PIECE_WORDS // 2, PIECE_WORDS)
    count = min(MAX_PIECES, len(starts))
    chosen = [starts[round(step * (len(starts) - 1) / max(1, count - 1))] for step in range(count)]
    return [" ".join(words[start : start + PIECE_WORDS]) for start in chosen]


class _Used:
    """Recognises reviews that are among the given texts or begin with one."""

    # Enough words to single out a review, few enough that a text cut short is still recognised.
    LONGEST, SHORTEST = 12, 4

    def __init__(self, texts: Collection[str]) -> None:
        if isinstance(texts, str):
            raise DataError("exclude takes a collection of texts, not one string.")
        self.wholes = {_words(text) for text in texts}
        self.heads = {words[: self.LONGEST] for words in self.wholes if len(words) >= self.SHORTEST}
        self.lengths = {len(head) for head in self.heads}

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return words in self.wholes or any(words[:length] in self.heads for length in self.lengths)


def _plain(text: str) -> str:
    """One line: HTML line breaks and runs of white space become single spaces."""
    return " ".join(_LINE_BREAK.sub(" ", text).split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(_plain(text).lower().split())


def _distinct(reviews: Iterator[Review]) -> list[Review]:
    found: dict[tuple[str, ...], Review] = {}
    for review in reviews:
        found.setdefault(_words(review.text), review)
    return list(found.values())


def _read(path: Path) -> Iterator[Review]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            absent = [column for column in _COLUMNS if column not in (rows.fieldnames or [])]
            if absent:
                raise DataError(f"{path}, line 1: the columns {', '.join(absent)} are missing from the CSV header.")
            for row in rows:
                if row["label"] not in {"0", "1"} or row["source"] is None:
                    raise DataError(
                        f"{path}, line {rows.line_num}: a review needs a label, 0 or 1, and a source; "
                        f"here they are {row['label']!r} and {row['source']!r}."
                    )
                yield Review(_plain(row["text"]), int(row["label"]), row["source"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The reviews in {path} cannot be read as UTF-8 CSV: {error}") from error


def _check_labels(texts: Sequence[str], labels: Sequence[int]) -> None:
    if isinstance(texts, str) or len(texts) != len(labels):
        raise DataError(f"A list of texts with one label each is needed, not {len(texts)} and {len(labels)}.")
    for index, label in enumerate(labels):
        if label not in (0, 1):
            raise DataError(f"Label {index} is {label!r}; labels are 1 (positive) and 0 (negative).")
