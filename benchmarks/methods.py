"""Every generative method under one budget: the same reviews, steps and batches; what it learns, and what it costs.

How favourable IMDB reviews end (the packaged reviews of `make demo`), or a table-to-text set of your own such as E2E:
JSONL files with `input` and `output` (or `references`). Printed is the negative log-likelihood of held-out outputs
before and after, in nats a token. One seed, and the learning rates that the methods start from by default, not tuned:
a look at all of them, not a verdict.

    python benchmarks/methods.py [--steps 24] [--only prefix memory]
    python benchmarks/methods.py --train E2E/train.jsonl --valid E2E/valid.jsonl --init "These are facts about a ..."
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from _measure import keep

TEXT = "Here is a glowing, enthusiastic review by somebody who loved every minute of this wonderful film:"


def configs(text: str, inputs: bool) -> dict:
    import foreword as fw

    prefix = {"length": 18, "init": text}
    infix = {"infix": fw.PrefixConfig(**prefix, visible="infix:1")} if inputs else {}
    return {
        **infix,
        "prefix": fw.PrefixConfig(**prefix),
        "prefix, random start": fw.PrefixConfig(length=18, init="random"),
        "prefix, MLP 512, random start": fw.PrefixConfig(length=18, init="random", reparam="mlp"),
        "prefix, one MLP for all layers": fw.PrefixConfig(**prefix, reparam="mlp", share="layers"),
        "prefix, weight per head": fw.PrefixConfig(**prefix, gate="head"),
        "prefix, weight per query": fw.PrefixConfig(**prefix, gate="input"),
        "prefix, zero-initialised gate": fw.PrefixConfig(**prefix, gate="zero"),
        "prefix, seen by the first 16": fw.PrefixConfig(**prefix, visible="first:16"),
        "prefix, last 15 layers": fw.PrefixConfig(**prefix, sites="last:15"),
        "memory": fw.MemoryConfig(),
        "memory of rank 4": fw.MemoryConfig(rank=4),
        "prefix and memory of rank 4": [fw.PrefixConfig(**prefix), fw.MemoryConfig(rank=4)],
        "prompt": fw.PromptConfig(**prefix),
        "LoRA, rank 8": fw.LoRAConfig(),
        "prefix and LoRA": [fw.PrefixConfig(**prefix), fw.LoRAConfig()],
        "adapters of width 32": fw.AdapterConfig(),
        "BitFit, biases added": fw.BitFitConfig(missing="add"),
        "full fine-tuning": fw.FullConfig(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--train", help="JSONL with input and output, instead of the packaged reviews")
    parser.add_argument("--valid", help="the same, held out")
    parser.add_argument(
        "--init", default=TEXT, help="the text that prefixes and prompts start from (18 tokens or more)"
    )
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import encode, read_examples

    model, tokenizer = fw.load_model("demo")
    parts = from_files(options) if options.train else reviews()
    longest = 128 if options.train else 48
    train, valid = (encode(read_examples(part), tokenizer, max_length=longest) for part in parts)
    rows = {}
    for name, config in configs(options.init, inputs=bool(options.train)).items():
        if options.only and name not in options.only:
            continue
        rows[name] = train_one(model, tokenizer, config, train, valid, options)
        print(
            f"{name:32} {rows[name]['parameters']:>12,} {rows[name]['before']:.3f} -> {rows[name]['after']:.3f}",
            flush=True,
        )
    if not options.only or options.train:
        kept = {k: v for k, v in vars(options).items() if k not in ("train", "valid")}  # not where they stood
        print("written:", keep("methods_files" if options.train else "methods", {"options": kept, "rows": rows}))


def reviews() -> tuple[list, list]:
    """Endings of favourable reviews, the last 48 held out."""
    from foreword.demo.job import Plan, ending, pick_reviews
    from foreword.models import packaged_reviews

    texts = [{"text": ending(t)} for t in pick_reviews(packaged_reviews(), "1", Plan())]
    random.Random(0).shuffle(texts)
    return texts[48:], texts[:48]


def from_files(options) -> tuple[list, list]:
    """Two files' inputs and outputs, as many as are needed."""
    chosen = []
    for path, n in ((options.train, options.steps * options.batch), (options.valid, 48)):
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(rows)
        outputs = [r["output"] if "output" in r else r["references"][0] for r in rows[:n]]
        chosen.append([{"input": r["input"] + "\n", "output": o} for r, o in zip(rows, outputs, strict=False)])
    return chosen[0], chosen[1]


def train_one(model, tokenizer, config, train, valid, options) -> dict:
    """Parameters, validation loss before and after."""
    import foreword as fw
    from foreword.data import Collator

    tuning = fw.attach(model, config, tokenizer=tokenizer)
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = fw.PrefixTrainingArguments(
                output_dir=str(Path(folder) / "run"), max_steps=options.steps,
                per_device_train_batch_size=options.batch, per_device_eval_batch_size=16, seed=0, use_cpu=True,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            trainer = fw.PrefixTrainer(
                model,
                arguments,
                train_dataset=train,
                eval_dataset=valid,
                data_collator=Collator.for_tokenizer(tokenizer),
            )
            before = trainer.evaluate()["eval_loss"]
            try:
                trainer.train()
                after = trainer.evaluate()["eval_loss"]
            except fw.DivergedError as exc:
                print(exc)
                after = float("nan")
        return {"parameters": tuning.num_parameters, "before": before, "after": after,
                "learning_rate": arguments.learning_rate}  # fmt: skip
    finally:
        tuning.detach()


if __name__ == "__main__":
    main()
