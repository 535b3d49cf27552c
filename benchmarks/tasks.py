"""Three tasks on one model: apart, in one run, drawn by size, alike or between, with a shared part, kept orthogonal.

Positive film reviews, the Bible from old to modern English, restaurant facts to text; SmolLM2-135M. Every run has the
same number of rows in all (three separate runs share them), the same length and learning rate. Measured are each
task's held-out loss under each prefix (nats a token, ``foreword.evaluate.measure_interference``) and how much the
tasks' keys and values share (mean squared cosine, ``foreword.orthogonal.overlap``). One seed.

The data sets are not part of this project. JSONL files, one folder each with train.jsonl and valid.jsonl:

    python benchmarks/tasks.py --reviews reviews_rt --bible bible_modern --e2e e2e_nlg [--steps 21] [--only separate]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from pathlib import Path

from _measure import RESULTS, keep

LENGTH, LONGEST = 18, 48  # virtual tokens; tokens of a row
TEXTS = {
    "reviews": "Here is a glowing, enthusiastic review by somebody who loved every minute of this wonderful film:",
    "bible": "These verses of the Bible are given in old English, and then in the plain modern English of today:",
    "e2e": "These are facts about a restaurant, and then a description of it in one or two plain sentences:",
}
GENERAL = "Read the text carefully, and write what comes next in plain words, as the examples that you know of do:"
SIZES = {"reviews": 120, "bible": 240, "e2e": 960}  # as unlike as tasks often are
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "interference.png"


def variants() -> dict[str, dict]:
    """By name: the configuration of one run, how tasks are drawn, the strength of the penalty."""
    own = {"init": TEXTS, "length": LENGTH}
    random_start = {"init": "random", "length": LENGTH}
    return {
        "one run, by size": {"config": own},
        "one run, alike": {"config": own, "sampling": "uniform"},
        "one run, temperature 2": {"config": own, "sampling": "temperature"},
        "one run, alike, 6 of 18 tokens common": {
            "config": {**own, "init": {**TEXTS, "*": GENERAL}, "common": 6}, "sampling": "uniform"
        },
        "one run, alike, penalty 10": {"config": own, "sampling": "uniform", "orthogonality": 10.0},
        "one run, alike, random start": {"config": random_start, "sampling": "uniform"},
        "one run, alike, orthogonal start": {"config": {**random_start, "init": "orthogonal"}, "sampling": "uniform"},
        "one run, alike, random start around 0": {
            "config": {**random_start, "init": "orthogonal"}, "sampling": "uniform", "redrawn": True
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for task in TEXTS:
        parser.add_argument(f"--{task}", required=True, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--held-out", type=int, default=20, help="examples of each task")
    parser.add_argument("--only", nargs="*", help="names of variants, or 'starts', 'separate'; other rows stay")
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import encode, read_examples

    warnings.simplefilter("ignore")
    model, tokenizer = fw.load_model("demo")
    train: dict = {}
    valid: dict = {}
    for name, data, sizes in (("train", train, SIZES), ("valid", valid, dict.fromkeys(TEXTS, options.held_out))):
        for task in TEXTS:
            rows_of = examples(Path(getattr(options, task)) / f"{name}.jsonl")
            encoded = encode(read_examples(rows_of), tokenizer, max_length=512)
            short = [i for i in range(len(encoded)) if len(encoded[i]["input_ids"]) <= LONGEST]
            data[task] = encode(
                read_examples([rows_of[i] for i in short[: sizes[task]]]), tokenizer, max_length=LONGEST
            )
    path = RESULTS / "tasks.json"
    rows: dict[str, dict] = json.loads(path.read_text(encoding="utf-8"))["rows"] if options.only else {}

    def measured(name: str, run: dict, prefixes: dict) -> None:
        rows[name] = {**run, **told(model, tokenizer, valid, prefixes, name)}
        own = " ".join(f"{task} {rows[name]['own'][task]:.3f}" for task in TEXTS)
        print(f"{name:40} {own}  overlap {rows[name]['overlap']:.3f}", flush=True)

    if not options.only or "starts" in options.only:
        texts = {t: fw.Prefix.from_text(model, tokenizer, text, length=LENGTH) for t, text in TEXTS.items()}
        measured("the texts, untrained", {"parameters": 0}, texts)
    if not options.only or "separate" in options.only:
        made = {task: separate(model, tokenizer, task, train[task], options) for task in TEXTS}
        trained = sum(run["parameters"] for run, _ in made.values())
        measured("separate runs", {"parameters": trained}, {t: p for t, (_, p) in made.items()})
    for name, variant in variants().items():
        if options.only and name not in options.only:
            continue
        measured(name, *together(model, tokenizer, variant, train, options))
    kept = {k: v for k, v in vars(options).items() if k not in (*TEXTS, "only")}  # not where they stood
    print("written:", keep("tasks", {"options": kept, "sizes": SIZES, "rows": rows}))


def examples(path: Path) -> list[dict]:
    """Inputs and outputs in random order; of reviews the positive ones."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [
        {"text": r["text"]} if "text" in r else {"input": r["input"] + "\n", "output": r["references"][0]}
        for r in rows
        if r.get("label", "positive") == "positive"
    ]


def separate(model, tokenizer, task: str, data, options) -> tuple[dict, object]:
    """A run of a task's own, with a third of the steps."""
    import foreword as fw

    config = fw.PrefixConfig(length=LENGTH, init=TEXTS[task])
    run, tuning = train_one(model, tokenizer, config, data, options.steps // len(TEXTS), options)
    prefix = tuning.bake()
    tuning.detach()
    return run, prefix


def together(model, tokenizer, variant: dict, train: dict, options) -> tuple[dict, dict]:
    """One run for all tasks."""
    import foreword as fw

    config = fw.PrefixConfig(tasks=tuple(TEXTS), **variant["config"])
    data = fw.TaskMixture(train, sampling=variant.get("sampling", "size"))
    run, tuning = train_one(model, tokenizer, config, data, options.steps, options, variant)
    prefixes = {task: tuning.bake(task=task) for task in TEXTS}
    tuning.detach()
    return {**run, "drawn": drawn(data, options)}, prefixes


def drawn(data, options) -> dict[str, int]:
    """How many rows of each task the run saw."""
    rows = options.steps * options.batch
    order = [i for epoch in range(-(-rows // len(data))) for i in data.order(0, epoch)][:rows]
    names = [data[i]["task"] for i in order]
    return {task: names.count(task) for task in data.tasks}


def train_one(model, tokenizer, config, data, steps: int, options, variant: dict | None = None) -> tuple[dict, object]:
    import foreword as fw
    from foreword.data import Collator

    variant = variant or {}
    tuning = fw.attach(model, config, tokenizer=tokenizer)
    if variant.get("redrawn"):
        redraw(tuning)
    with tempfile.TemporaryDirectory() as folder:
        arguments = fw.PrefixTrainingArguments(
            output_dir=str(Path(folder) / "run"), max_steps=steps, per_device_train_batch_size=options.batch, seed=0,
            use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            orthogonality=variant.get("orthogonality", 0.0),
        )  # fmt: skip
        collator = Collator.for_tokenizer(tokenizer)
        trainer = fw.PrefixTrainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.train()
    return {"parameters": tuning.num_parameters}, tuning


def redraw(tuning) -> None:
    """Random numbers of the same size by head and dimension, around 0 as well, and not orthogonal."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuning.parameters():  # (tasks, heads, tokens, dimensions)
            size = parameter.square().mean((0, 2), keepdim=True).sqrt()
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def told(model, tokenizer, valid: dict, prefixes: dict, name: str) -> dict:
    """The interference matrix and the overlap; the matrix of the one that tasks are drawn alike in is drawn."""
    import torch

    from foreword.data import Collator
    from foreword.evaluate import measure_interference
    from foreword.orthogonal import overlap

    found = measure_interference(model, valid, prefixes, Collator.for_tokenizer(tokenizer), batch_size=16)
    if name == "one run, alike":
        found.draw(IMAGE, title="SmolLM2-135M, three tasks in one run")
    shared = []
    for kind in ("keys", "values"):
        for site in getattr(prefixes["e2e"], kind):
            matrix = overlap(torch.stack([getattr(p, kind)[site] for p in prefixes.values()]))
            shared.append(matrix[torch.triu_indices(3, 3, 1).unbind()].mean())
    return {
        "own": {task: found.own(task) for task in found.tasks}, "overlap": float(torch.stack(shared).mean()),
        "interference": found.to_json(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
