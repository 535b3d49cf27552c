"""P-Tuning v2 on a real encoder: a prefix and a head on all-MiniLM-L6-v2, beside the head alone and fine-tuning.

Three tasks that read an encoder differently: whether a film review is favourable, and whether one text follows from
another (RTE; accuracy), are read off the first token, through the pooler; which words name a person, a place, a product
(entity F1 over exact spans, WNUT17) off every word.
Every method of a seed sees the same batches in the same order and starts from the same new head, which is trained in
all of them. Learning rates were chosen with `--search`: three a method, one seed, on rows held out of the training
part; the validation part was only looked at afterwards. For pairs two of fine-tuning and three of the prefix were
tried: the prefix learns with none of them, and has the rate of the reviews, like the head alone. Nothing else was
searched, and the steps are few: 200, and 400 for pairs.

    python benchmarks/heads.py --reviews DIR --nlu DIR [--search] [--seeds 3] [--steps N]

`--reviews` holds train.jsonl and valid.jsonl with `text` and `label` (without it: the packaged Rotten Tomatoes
reviews, the last 800 held out); `--nlu` holds wnut17_ner_train.jsonl and wnut17_ner_valid.jsonl with `tokens` and BIO
`tags`, and rte_train.jsonl and rte_valid.jsonl with `premise`, `hypothesis` and `label` (without it: reviews only).
Neither is part of this project.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from _measure import RESULTS, keep

MAX_TOKENS = {"reviews": 64, "entities": 64, "pairs": 128}
METHODS = ["head only", "prefix and head", "full fine-tuning"]
LENGTH = 20
HELD_OUT = {"reviews": 800, "entities": 800, "pairs": 400}
STEPS = {"reviews": 200, "entities": 200, "pairs": 400}
TASKS = {"reviews": "sequence", "entities": "token", "pairs": "sequence"}
# What is trained in every method: all that stands after the encoder's last layer.
HEAD = {"sequence": r"classifier\..*|bert\.pooler\..*", "token": r"classifier\..*"}
RATES = {
    "reviews": {
        "head only": (1e-3, 3e-3, 1e-2),
        "prefix and head": (1e-2, 2e-2, 5e-2),
        "full fine-tuning": (1e-4, 2e-4, 5e-4),
    },
    "entities": {
        "head only": (3e-3, 1e-2, 3e-2),
        "prefix and head": (2e-2, 5e-2, 1e-1),
        "full fine-tuning": (1e-4, 2e-4, 5e-4),
    },
    "pairs": {
        "head only": (1e-3, 3e-3, 1e-2),
        "prefix and head": (3e-3, 1e-2, 2e-2),
        "full fine-tuning": (3e-5, 1e-4),
    },
}
# The best score in the search, and the lower loss of two alike; of pairs where nothing learns, those of the reviews.
CHOSEN = {
    "reviews": {"head only": 3e-3, "prefix and head": 2e-2, "full fine-tuning": 1e-4},
    "entities": {"head only": 3e-2, "prefix and head": 5e-2, "full fine-tuning": 2e-4},
    "pairs": {"head only": 3e-3, "prefix and head": 2e-2, "full fine-tuning": 3e-5},
}
# Of the head beside a prefix, not searched: the usual rate; ten times that for entities, where 1e-3 is too little for
# the head alone.
BESIDE = {"sequence": 1e-3, "token": 1e-2}


def config(method: str, kind: str, rate: float) -> Any:
    import foreword as fw

    return {
        "head only": fw.FullConfig(parameters=HEAD[kind], learning_rate=rate),
        "prefix and head": fw.PrefixConfig(
            length=LENGTH, init="random", head=kind, dropout=0.1, learning_rate=rate, head_learning_rate=BESIDE[kind]
        ),
        "full fine-tuning": fw.FullConfig(learning_rate=rate),
    }[method]


# ------------------------------------------------------------------------------------------ data


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reviews(folder: Path | None) -> tuple[list[dict], list[dict]]:
    if folder is not None:
        return read(folder / "train.jsonl"), read(folder / "valid.jsonl")
    from foreword.models import packaged_reviews

    with packaged_reviews().open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    return rows[:-800], rows[-800:]


def entities(folder: Path) -> tuple[list[dict], list[dict]]:
    return read(folder / "wnut17_ner_train.jsonl"), read(folder / "wnut17_ner_valid.jsonl")


def pairs(folder: Path) -> tuple[list[dict], list[dict]]:
    return read(folder / "rte_train.jsonl"), read(folder / "rte_valid.jsonl")


def labels(rows: list[dict], kind: str) -> list[str]:
    return sorted({r["label"] for r in rows} if kind == "sequence" else {t for r in rows for t in r["tags"]})


def encoded(rows: list[dict], tokenizer, names: list[str], task: str) -> list[dict]:
    """Token ids and labels; of a word, its first piece has the tag and the others none."""
    cut: dict[str, Any] = {"truncation": True, "max_length": MAX_TOKENS[task]}
    if task == "entities":
        batch, labels = tokenizer([r["tokens"] for r in rows], is_split_into_words=True, **cut), []
        for i, row in enumerate(rows):
            words = batch.word_ids(i)
            labels.append([
                names.index(row["tags"][w]) if w is not None and w != before else -100
                for before, w in zip([None, *words], words, strict=False)
            ])  # fmt: skip
    else:
        texts = [(r["premise"], r["hypothesis"]) if task == "pairs" else r["text"] for r in rows]
        batch, labels = tokenizer(texts, **cut), [names.index(r["label"]) for r in rows]
    columns = {**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}, "labels": labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def in_order(rows: list[dict], batch: int, steps: int, seed: int) -> list[dict]:
    """The training rows of a whole run: shuffled, batches of like lengths, so that little of a batch is padding."""
    rng, order = random.Random(seed), []
    while len(order) < steps * batch:
        epoch = rng.sample(rows, len(rows))
        pools = [sorted(epoch[i : i + 16 * batch], key=lambda r: len(r["input_ids"]))
                 for i in range(0, len(epoch), 16 * batch)]  # fmt: skip
        batches = [pool[i : i + batch] for pool in pools for i in range(0, len(pool) - batch + 1, batch)]
        rng.shuffle(batches)
        order += [row for b in batches for row in b]
    return order[: steps * batch]


# ------------------------------------------------------------------------------------------ one run


def metric(kind: str, names: list[str], rows: list[dict]):
    """Accuracy in percent, or entity F1 in percent; words cut off at the end count as not found."""

    def accuracy(result) -> dict[str, float]:
        return {"score": 100 * float((result.predictions.argmax(-1) == result.label_ids).mean())}

    def f1(result) -> dict[str, float]:
        from seqeval.metrics import f1_score

        best, found = result.predictions.argmax(-1), []
        for tags, labels, row in zip(best, result.label_ids, rows, strict=True):
            own = [names[t] for t in tags[np.asarray(labels) != -100]]
            found.append(own + ["O"] * (len(row["tags"]) - len(own)))
        return {"score": 100 * float(f1_score([r["tags"] for r in rows], found))}

    return accuracy if kind == "sequence" else f1


def run(
    model, tokenizer, what, train: list[dict], valid: list[dict], compute, batch: int, steps: int, seed: int
) -> dict:
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PrinterCallback

    import foreword as fw

    pad = DataCollatorForTokenClassification if isinstance(train[0]["labels"], list) else DataCollatorWithPadding
    tuning = fw.attach(model, what, tokenizer=tokenizer)
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = fw.PrefixTrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=batch,
                per_device_eval_batch_size=64, seed=seed, train_sampling_strategy="sequential", use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            trainer = fw.PrefixTrainer(
                model,
                arguments,
                train_dataset=in_order(train, batch, steps, seed),
                eval_dataset=valid,
                data_collator=pad(tokenizer),
                compute_metrics=compute,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            result = trainer.evaluate()
            return {"parameters": tuning.num_parameters, "score": result["eval_score"], "loss": result["eval_loss"]}
    finally:
        tuning.detach()


def new_model(kind: str, names: list[str], seed: int):
    """The encoder with a new head, which is drawn from the seed."""
    import torch
    import transformers

    from foreword.models import packaged_encoder

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    auto = {"sequence": "AutoModelForSequenceClassification", "token": "AutoModelForTokenClassification"}[kind]
    return getattr(transformers, auto).from_pretrained(packaged_encoder(), num_labels=len(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reviews", type=Path, help="folder of train.jsonl and valid.jsonl")
    parser.add_argument("--nlu", type=Path, help="folder of wnut17_ner_train.jsonl, rte_train.jsonl and their _valid")
    parser.add_argument("--search", action="store_true", help="look for learning rates, without the validation part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help=f"for all tasks (default: {STEPS})")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--rates", nargs="*", type=float, help="for --search: these, not those of the list")
    options = parser.parse_args()
    if options.nlu is None:
        options.tasks = [t for t in options.tasks if t == "reviews"]

    from transformers import AutoTokenizer

    from foreword.models import packaged_encoder

    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())
    for task in options.tasks:
        kind = TASKS[task]
        train, valid = (
            reviews(options.reviews) if task == "reviews" else {"entities": entities, "pairs": pairs}[task](options.nlu)
        )
        names = labels(train, kind)
        if options.search:
            random.Random(0).shuffle(train)
            train, valid = train[HELD_OUT[task] :], train[: HELD_OUT[task]]
        valid = sorted(valid, key=lambda r: len(str(r)))  # so that little of a batch is padding
        data = [*(encoded(rows, tokenizer, names, task) for rows in (train, valid)), metric(kind, names, valid)]
        part, look = ("search", search) if options.search else ("rows", compare)
        for found in look(tokenizer, task, names, data, options):
            path = keep("heads", merged(part, task, found, options))
    print("written:", path)


def merged(part: str, task: str, found: dict, options) -> dict:
    """What the results file holds already, and what was found now: the search and each task can run on their own."""
    path = RESULTS / "heads.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record.pop("machine", None)
    rows = record.setdefault(part, {}).setdefault(task, {})
    for method, row in found.items():
        rows.setdefault(method, {}).update(row)
    steps = {t: options.steps or STEPS[t] for t in record["rows"]}
    record["options"] = {"steps": steps, "batch": options.batch, "length": LENGTH, "held_out": HELD_OUT}
    return record


def search(tokenizer, task: str, names: list[str], data: list, options) -> Iterator[dict]:
    """The score of each learning rate on the held-out part, seed 0; one after the other."""
    kind, steps = TASKS[task], options.steps or STEPS[task]
    model = new_model(kind, names, 0)
    for method in options.methods:
        for rate in options.rates or RATES[task][method]:
            result = run(model, tokenizer, config(method, kind, rate), *data, options.batch, steps, 0)
            print(f"{task:9} {method:18} {rate:<8g} {result['score']:6.2f} loss {result['loss']:.3f}", flush=True)
            yield {method: {f"{rate:g}": result}}


def compare(tokenizer, task: str, names: list[str], data: list, options) -> Iterator[dict]:
    """Each method on the validation part: the mean over seeds, and the standard deviation; after each seed."""
    kind, steps = TASKS[task], options.steps or STEPS[task]
    runs: dict[str, list[dict]] = {m: [] for m in options.methods}
    for seed in range(1, options.seeds + 1):
        model = new_model(kind, names, seed)
        for method in options.methods:
            what = config(method, kind, CHOSEN[task][method])
            runs[method].append(run(model, tokenizer, what, *data, options.batch, steps, seed))
            print(f"{task:9} {method:18} seed {seed} {runs[method][-1]['score']:6.2f}", flush=True)
        found = {m: summary(own, CHOSEN[task][m]) for m, own in runs.items()}
        yield found
    print(f"\n{'method':18} {'trained numbers':>16} {'rate':>8}  score")
    for method, row in found.items():
        print(f"{method:18} {row['parameters']:>16,} {row['learning_rate']:>8g}  {row['mean']:.2f} "
              f"± {row['deviation']:.2f}")  # fmt: skip


def summary(runs: list[dict], rate: float) -> dict:
    scores = [r["score"] for r in runs]
    return {
        "parameters": runs[0]["parameters"],
        "learning_rate": rate,
        "scores": scores,
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "losses": [r["loss"] for r in runs],
    }


if __name__ == "__main__":
    main()
