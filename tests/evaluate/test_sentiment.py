"""The sentiment classifier on made-up reviews, and on the real ones that it is meant for."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from foreword.errors import ConfigError, DataError, MissingPartError
from foreword.evaluate import SentimentClassifier, TrainedSentiment, train_on_reviews
from foreword.evaluate import sentiment as module

GOOD = [
    "a wonderful film",
    "wonderful and moving",
    "simply great acting",
    "a great story",
    "moving and great",
]
BAD = [
    "an awful film",
    "awful and boring",
    "simply terrible acting",
    "a terrible story",
    "boring and terrible",
]
LABELS = [1] * 5 + [0] * 5


def write_reviews(path: Path, rows: list[tuple[str, object, str]], header: tuple[str, ...] = ()) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header or ("text", "label", "source"), *rows])
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    rows: list[tuple[str, object, str]] = []
    for number in range(40):
        good, bad = (" ".join(f"{kind}{number}n{place}" for place in range(80)) for kind in "gb")
        rows.append((f"{GOOD[number % 5]}<br /><br />number{number} {good} truly wonderful", 1, "imdb"))
        rows.append((f"{BAD[number % 5]} number{number}", 0, "rotten_tomatoes"))
        rows.append((f"{GOOD[number % 5]} number{number}", 1, "rotten_tomatoes"))
        rows.append((f"{BAD[number % 5]} number{number} {bad} truly awful", 0, "imdb"))
    return write_reviews(tmp_path / "reviews.csv", rows)


def test_it_learns_and_tells_apart() -> None:
    classifier = SentimentClassifier(min_texts=1).fit(GOOD + BAD, LABELS)
    good, bad, unknown = classifier.positive_probability(["wonderful, moving!", "boring; terrible.", "xyzzy"])
    assert 0 <= bad < 0.5 < good <= 1
    assert unknown == pytest.approx(0.5, abs=0.1)
    assert classifier.held_out_accuracy(["great", "awful", "awful", "awful"], [1, 0, 0, 1]) == 0.75
    assert classifier.positive_probability([]) == []


def test_the_order_of_labels_does_not_matter() -> None:
    classifier = SentimentClassifier(min_texts=1).fit(BAD + GOOD, LABELS[::-1])
    assert classifier.held_out_accuracy(GOOD + BAD, LABELS) == 1


def test_negation_is_a_word_pair() -> None:
    texts = ["it isn't good"] * 3 + ["it is good"] * 3 + ["it isn't bad"] * 3 + ["it is bad"] * 3
    classifier = SentimentClassifier(inverse_penalty=100).fit(texts, [0] * 3 + [1] * 6 + [0] * 3)
    assert classifier.held_out_accuracy(texts, [0] * 3 + [1] * 6 + [0] * 3) == 1


def test_misuse_is_explained() -> None:
    classifier = SentimentClassifier(min_texts=1)
    with pytest.raises(ConfigError, match="call fit"):
        classifier.positive_probability(["good"])
    with pytest.raises(DataError, match="2 and 1"):
        classifier.fit(["a", "b"], [1])
    with pytest.raises(DataError, match="both labels"):
        classifier.fit(["good", "great"], [1, 1])
    with pytest.raises(DataError, match="Label 1 is 4"):
        classifier.fit(["good", "great"], [1, 4])
    with pytest.raises(DataError, match="no words"):
        classifier.fit(["...", ""], [0, 1])
    classifier.fit(GOOD + BAD, LABELS)
    with pytest.raises(DataError, match="not one string"):
        classifier.positive_probability("good")
    with pytest.raises(DataError, match="no texts"):
        classifier.held_out_accuracy([], [])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPartError, match=r'pip install "foreword\[demo\]"'):
        SentimentClassifier()


def test_training_on_a_file(reviews: Path) -> None:
    trained = train_on_reviews(reviews, held_out=0.25)
    assert (trained.train_reviews, trained.held_out_reviews, trained.excluded_reviews) == (120, 40, 0)
    assert set(trained.accuracy_by_source) == {"imdb", "rotten_tomatoes"}
    assert trained.accuracy > 0.9
    again = train_on_reviews(reviews, held_out=0.25)
    texts = ["a great film", "an awful story"]
    assert again.classifier.positive_probability(texts) == trained.classifier.positive_probability(texts)


def seen_and_measured(
    reviews: Path, monkeypatch: pytest.MonkeyPatch, **settings: object
) -> tuple[list[str], list[str], TrainedSentiment]:
    """The texts that reach fit and held_out_accuracy in train_on_reviews."""
    seen: list[str] = []
    measured: list[str] = []
    fit, accuracy = SentimentClassifier.fit, SentimentClassifier.held_out_accuracy
    monkeypatch.setattr(SentimentClassifier, "fit", lambda self, t, y: (seen.extend(t), fit(self, t, y))[1])
    monkeypatch.setattr(
        SentimentClassifier,
        "held_out_accuracy",
        lambda self, t, y: (measured.extend(t), accuracy(self, t, y))[1],
    )
    return seen, measured, train_on_reviews(reviews, **settings)  # type: ignore[arg-type]


def test_no_held_out_review_is_seen_in_part(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = reviews.read_text(encoding="utf-8")
    reviews.write_text(content + content.split("\n", 1)[1].upper(), encoding="utf-8")  # every review twice
    seen, measured, trained = seen_and_measured(reviews, monkeypatch, held_out=0.5)
    assert trained.train_reviews + trained.held_out_reviews == 160

    def opening(text: str) -> tuple[str, ...]:
        return tuple(text.lower().split()[:6])

    assert not {opening(text) for text in seen} & {opening(text) for text in measured}
    assert all(len(text.split()) <= module.PIECE_WORDS for text in measured)
    assert not any("<br" in text for text in seen + measured)
    assert any(text.endswith("truly awful") for text in seen)


def test_long_reviews_become_short_pieces() -> None:
    def words(first: int, count: int) -> str:
        return " ".join(map(str, range(first, first + count)))

    assert module._pieces(words(0, 50)) == [words(0, 50)]
    assert module._pieces(words(0, 51)) == [words(0, 50)]
    assert module._pieces(words(0, 80)) == [words(0, 50), words(50, 30)]
    many = module._pieces(words(0, 1000))
    assert len(many) == module.MAX_PIECES
    assert (many[0], many[-1]) == (words(0, 50), words(950, 50))


def test_excluded_texts_are_never_seen(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [
        "A  wonderful film NUMBER0",  # a short review in another case, and the beginning of a long one
        f"{BAD[1]} number1 " + " ".join(f"b1n{place}" for place in range(20)),  # a long one, cut short
        "a",  # the first word of many: not to be taken for the beginning of all of them
    ]
    seen, measured, trained = seen_and_measured(reviews, monkeypatch, exclude=used)
    assert trained.excluded_reviews == 3
    for text in seen + measured:
        assert "wonderful film number0 " not in text + " "
        assert "b1n50" not in text


def test_files_that_are_wrong(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    with pytest.raises(DataError, match="cannot be read"):
        train_on_reviews(file)
    with pytest.raises(DataError, match="columns source are missing"):
        train_on_reviews(write_reviews(file, [], ("text", "label")))
    with pytest.raises(DataError, match=r"line 3.*'maybe'"):
        train_on_reviews(write_reviews(file, [("good", 1, "x"), ("bad", "maybe", "x")]))
    with pytest.raises(DataError, match="too few"):
        train_on_reviews(write_reviews(file, [("good", 1, "x"), ("bad", 0, "x")]))
    file.write_bytes(b"text,label,source\n\xff\xfe,1,x\n")
    with pytest.raises(DataError, match="UTF-8"):
        train_on_reviews(file)


@pytest.mark.parametrize("held_out", [0, 1, -0.5, 2])
def test_the_share_held_out_is_checked(reviews: Path, held_out: float) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        train_on_reviews(reviews, held_out=held_out)


def test_exclude_is_not_one_string(reviews: Path) -> None:
    with pytest.raises(DataError, match="not one string"):
        train_on_reviews(reviews, exclude="a great film")


@pytest.mark.slow
def test_on_the_real_reviews() -> None:
    from foreword.models import packaged_reviews

    trained = train_on_reviews(packaged_reviews())
    assert trained.accuracy > 0.79
    assert trained.accuracy_by_source["imdb"] > 0.79
    assert trained.accuracy_by_source["rotten_tomatoes"] > 0.74
    good, bad = trained.classifier.positive_probability(
        [
            "The film was a delight to the end, with a wonderful cast and a story that stays with you.",
            "The film was a waste of time, with wooden acting and a plot so dull that I nearly walked out.",
        ]
    )
    assert good > 0.9
    assert bad < 0.1
