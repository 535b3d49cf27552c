"""The main job, on real parts: from film reviews to two trained prefixes of one frozen model, and what they write.

One base model, two tasks: a prefix trained on favourable reviews and one on unfavourable ones, each started from a
text that names its task.
"""

from __future__ import annotations

import csv
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from foreword.config import PrefixConfig
from foreword.data import encode, read_examples
from foreword.data.reviews import ending, plain
from foreword.evaluate import perplexity, text_nll, train_on_reviews
from foreword.generation import write
from foreword.models import load_model, packaged_reviews
from foreword.prefix import Prefix
from foreword.serve.library import Library
from foreword.train.run import train_prefix

TASKS = {"positive": "1", "negative": "0"}
STARTS = {
    "positive": "Here is a glowing, enthusiastic review by somebody who loved every minute of this wonderful film:",
    "negative": "Here is a scathing, disappointed review by somebody who hated every minute of this dreadful film:",
}
# As in work on steering sentiment: some openings say nothing yet, some lean one way, some the other.
OPENINGS = {
    "neutral": ("The film", "This movie", "The director", "The acting"),
    "praising": ("The best thing about the film is", "I was delighted", "The acting is superb and the script",
                 "I loved this movie because"),
    "critical": ("The movie is a mess, and", "Two hours of boredom:", "The acting is terrible and the script",
                 "The plot makes no sense and"),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much the demo does. The defaults take about five minutes on two cores."""

    steps: int = 60
    batch_size: int = 8
    length: int = 18
    max_tokens: int = 48
    examples: int = 720
    samples: int = 8
    new_tokens: int = 40
    seed: int = 1


@dataclass
class Results:
    """What came out; written to ``results.json``.

    Attributes:
        texts: by writer (``base``, ``positive``, ``negative``), one record a sampled text.
        summary: by writer: texts, how many read as favourable, mean probability of that, perplexity.
        mixed: the mixed batch: rows, and how many equal the same row written alone.
    """

    plan: dict[str, Any]
    base_model: str
    trained: dict[str, Any] = field(default_factory=dict)
    classifier: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    greedy: dict[str, list[str]] = field(default_factory=dict)
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    mixed: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(out: Path, plan: Plan, console: Console) -> Results:
    """Train, write, score; leaves prefixes, results.json, pictures and a report in ``out``.

    Raises:
        MissingPartError: a package with the model or the reviews isn't installed; the message says how to get it.
    """
    from foreword.demo.report import draw, write_report

    began = time.perf_counter()
    reviews = packaged_reviews()
    model, tokenizer = load_model("demo")
    results = Results(asdict(plan), "SmolLM2-135M-Instruct")
    used: list[str] = []
    prefixes = {}
    for task, label in TASKS.items():
        texts = pick_reviews(reviews, label, plan)
        used += texts
        endings = [ending(text) for text in texts]
        prefixes[task], results.trained[task] = _train(model, tokenizer, task, endings, out, plan, console)
    results.seconds["training"] = time.perf_counter() - began
    began = time.perf_counter()
    with console.status("writing …"):
        _write(model, tokenizer, prefixes, results, plan)
    results.seconds["writing"] = time.perf_counter() - began
    began = time.perf_counter()
    with console.status("training a sentiment classifier on other reviews, scoring …"):
        _score(model, tokenizer, reviews, used, results, plan)
    results.seconds["scoring"] = time.perf_counter() - began
    draw(results, out)
    write_report(results, out)
    record = json.dumps(asdict(results), ensure_ascii=False, indent=1)
    temporary = out / ".results.json"
    temporary.write_text(record + "\n", encoding="utf-8")
    temporary.replace(out / "results.json")
    return results


def pick_reviews(path: Path, label: str, plan: Plan) -> list[str]:
    """Real IMDB reviews of one label, in plain text, drawn at random from those with an :func:`ending`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r["text"] for r in csv.DictReader(file) if r["label"] == label and r["source"] == "imdb"]
    texts = [plain(text) for text in rows]
    return random.Random(plan.seed).sample([t for t in texts if ending(t)], plan.examples)


def _train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, texts: list[str], out: Path, plan: Plan,
    console: Console,
) -> tuple[Prefix, dict[str, Any]]:  # fmt: skip
    held = len(texts) // 10
    read = [read_examples([{"text": t} for t in part]) for part in (texts[held:], texts[:held])]
    train, valid = (encode(e, tokenizer, max_length=plan.max_tokens) for e in read)
    config = PrefixConfig(length=plan.length, init=STARTS[task], seed=plan.seed)
    arguments = {
        "max_steps": plan.steps, "per_device_train_batch_size": plan.batch_size, "eval_steps": max(1, plan.steps // 2),
        "seed": plan.seed, "save_strategy": "no", "report_to": "none", "logging_steps": 2, "use_cpu": True,
        "eval_on_start": True,
    }  # fmt: skip
    result = train_prefix(
        model, tokenizer, config, train, out / task, arguments, valid=valid, label=task, console=console
    )
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    return result.prefix, {
        "parameters": result.parameters,
        "bytes": result.prefix.nbytes,
        "valid_loss_before": losses[0],
        "valid_loss_after": losses[-1],
        "history": [{k: e[k] for k in ("step", "loss", "eval_loss") if k in e} for e in result.history],
    }


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: dict[str, Prefix],
    results: Results,
    plan: Plan,
) -> None:
    """From the same openings: the base model, each prefix, and all three in one mixed batch."""
    library = Library(model)
    for task, prefix in prefixes.items():
        library.add(task, prefix)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": plan.new_tokens}
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": plan.new_tokens}
    every = [(lean, opening) for lean, openings in OPENINGS.items() for opening in openings]
    rows = [(lean, opening) for lean, opening in every for _ in range(plan.samples)]
    starts = [opening for _, opening in every]
    alone: dict[str | None, list[str]] = {}
    for writer in (None, *prefixes):
        with library.use(writer):
            set_seed(plan.seed)
            written = write(model, tokenizer, [opening for _, opening in rows], **sampled)
            alone[writer] = write(model, tokenizer, starts, **greedy)
        name = writer or "base"
        results.texts[name] = [{"lean": r[0], "opening": r[1], "text": t} for r, t in zip(rows, written, strict=True)]
        results.greedy[name] = alone[writer]
    mixing: list[tuple[int, str | None]] = [(i, t) for i in range(len(starts)) for t in (None, *prefixes)]
    with library.use([t for _, t in mixing]):
        mixed = write(model, tokenizer, [starts[i] for i, _ in mixing], **greedy)
    equal = sum(text == alone[t][i] for text, (i, t) in zip(mixed, mixing, strict=True))
    results.mixed = {"rows": len(mixing), "equal_to_alone": equal}
    library.detach()


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reviews: Path,
    used: list[str],
    results: Results,
    plan: Plan,
) -> None:
    """Sentiment by a classifier that never saw the training reviews, and perplexity under the base model."""
    trained = train_on_reviews(reviews, exclude=used, seed=plan.seed)
    results.classifier = {
        "held_out_accuracy": trained.accuracy,
        "held_out_reviews": trained.held_out_reviews,
        "train_reviews": trained.train_reviews,
    }
    for name, records in results.texts.items():
        # The opening leans by design: only what was written after it is judged.
        chances = trained.classifier.positive_probability([r["text"] for r in records])
        for record, chance in zip(records, chances, strict=True):
            record["positive"] = round(chance, 4)
        written = [r for r in records if r["text"].strip()]
        nll = text_nll(model, tokenizer, [r["text"] for r in written], prompts=[r["opening"] for r in written])
        favourable = {lean: sum(r["positive"] > 0.5 for r in records if r["lean"] == lean) for lean in OPENINGS}
        results.summary[name] = {
            "texts": len(records),
            "favourable": sum(favourable.values()),
            **{f"favourable_{lean}": count for lean, count in favourable.items()},
            **{f"texts_{lean}": sum(r["lean"] == lean for r in records) for lean in OPENINGS},
            "mean_positive": sum(r["positive"] for r in records) / len(records),
            "perplexity": perplexity(nll),
        }
