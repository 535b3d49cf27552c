"""The demo's parts that need no model: which reviews, what the counts say, the report, what may be cleared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import foreword as fw
from foreword.cli.demo import _clear
from foreword.demo.job import OPENINGS, Plan, Results, ending, pick_reviews, plain
from foreword.demo.report import draw, verdict, write_report

STARTS = [(lean, opening) for lean, openings in OPENINGS.items() for opening in openings]


def results(positive=40, base=24, negative=5, samples=4):
    """Made results of 48 texts a writer."""
    made = Results({"steps": 40, "batch_size": 8, "length": 16, "samples": samples}, "SmolLM2")
    counts = {"base": base, "positive": positive, "negative": negative}
    for name, count in counts.items():
        rows = [start for start in STARTS for _ in range(samples)]
        made.texts[name] = [{"lean": r[0], "opening": r[1], "text": f" {name} {i}", "positive": 0.9 * (i < count)}
                            for i, r in enumerate(rows)]  # fmt: skip
        made.greedy[name] = [f" written\n by {name} on {o}" for _, o in STARTS]
        leaning = {f"favourable_{lean}": count / 3 for lean in OPENINGS} | {f"texts_{lean}": 16 for lean in OPENINGS}
        made.summary[name] = {"texts": 48, "favourable": count, "mean_positive": count / 48, "perplexity": 12.34,
                              **leaning}  # fmt: skip
    for task in ("positive", "negative"):
        history = [{"step": 1, "loss": 4.0}, {"step": 2, "eval_loss": 3.5}]
        made.trained[task] = {"parameters": 184320, "bytes": 737280, "valid_loss_before": 4.1234,
                              "valid_loss_after": 3.5, "history": history}  # fmt: skip
    made.classifier = {"held_out_accuracy": 0.884, "held_out_reviews": 2000, "train_reviews": 23000}
    made.mixed = {"rows": 36, "equal_to_alone": 35}
    return made


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("A <b>good</b> film.<br /><br />Really!", "A good film. Really!"),
        ("Tom &amp; Jerry &#39;99", "Tom & Jerry '99"),
        ("  two\n\nlines\t", "two lines"),
        ("3 < 4 and 5", "3 < 4 and 5"),
        ("", ""),
    ],
)
def test_plain_takes_the_marks_of_the_page_out(marked, expected):
    assert plain(marked) == expected


def test_reviews_are_of_one_label_and_source(tmp_path):
    path = tmp_path / "reviews.csv"
    end = "I have seen it twice and would gladly see it again with anybody."
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        for i in range(40):
            text = f"{'good' if i % 2 else 'bad'},<br />{i}. {end}"
            writer.writerow((text, i % 2, "imdb" if i < 30 else "rotten_tomatoes"))
        writer.writerow(("good, 1. Short end.", 1, "imdb"))
    found = pick_reviews(path, "1", Plan(examples=10, seed=1))
    assert len(set(found)) == 10 and all(t.startswith("good, ") and t.endswith(end) for t in found)
    assert all(int(t[6:].split(".")[0]) < 30 for t in found)
    assert pick_reviews(path, "1", Plan(examples=10, seed=1)) == found
    assert pick_reviews(path, "1", Plan(examples=10, seed=2)) != found
    assert all(t.startswith("bad, ") for t in pick_reviews(path, "0", Plan(examples=15)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A plot. It was bad. " + "Never again will I watch one of these long and empty things.",
         "Never again will I watch one of these long and empty things."),
        ("First. Two words here. Then six more words of mine. And five words come last.",
         "Two words here. Then six more words of mine. And five words come last."),
        ("Too short.", ""),
        ("It goes on " * 20, ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_ending_is_whole_sentences(text, expected):
    assert ending(text) == expected


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((40, 24, 5), "differ clearly from each other and from the base model"),
        ((28, 24, 5), "stand on either side of the base model, but not every difference is clear"),
        ((40, 44, 5), "do not stand on either side"),
        ((5, 24, 40), "do not stand on either side"),
    ],
)
def test_the_verdict_is_what_the_counts_say(counts, said):
    told = verdict(results(*counts))
    assert said in told
    assert f"base {counts[1]} of 48, positive {counts[0]} of 48, negative {counts[2]} of 48" in told


def test_the_report_has_the_numbers_the_texts_and_the_pictures(tmp_path):
    made = results()
    draw(made, tmp_path)
    write_report(made, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    wanted = ("| positive | 40 of 48 | 13 of 16 | 13 of 16 | 13 of 16 | 0.83 | 12.3 |", "| base | 24 of 48 | 8 of 16 |",
              "35 of 36 greedy", "88.4% of the",
              "23,000 other reviews", "184,320 numbers (737,280 bytes), validation loss 4.123 → 3.500")  # fmt: skip
    assert not [w for w in wanted if w not in report]
    for _, opening in STARTS:
        block = report.split(f"**{opening}** …")[1].split("**")[0]
        assert f"*negative*: written by negative on {opening}\n" in block
    for picture in ("curves.png", "sentiment.png"):
        assert picture in report and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    json.dumps(made.__dict__)


def test_only_a_demo_is_cleared(tmp_path):
    out = tmp_path / "demo"
    (out / "positive" / "checkpoint-1").mkdir(parents=True)
    (out / "report.md").touch()
    (out / "thesis.tex").touch()
    with pytest.raises(fw.ConfigError, match=r"holds thesis\.tex, which is not of a demo"):
        _clear(out)
    assert sorted(p.name for p in out.iterdir()) == ["positive", "report.md", "thesis.tex"]
    (out / "thesis.tex").unlink()
    _clear(out)
    assert not out.exists() and Path(tmp_path).exists()
