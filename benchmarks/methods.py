"""Every generative method under one budget: the same reviews, steps and batches; what it learns, and what it costs.

How favourable IMDB reviews end (the packaged reviews of `make demo`); the negative log-likelihood of held-out endings
before and after, in nats a token. One seed, and the learning rates that the methods start from by default, not tuned:
a look at all of them, not a verdict.

    python benchmarks/methods.py [--steps 24] [--only prefix memory]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from _measure import keep


def configs() -> dict:
    import foreword as fw

    text = "Here is a glowing, enthusiastic review by somebody who loved every minute of this wonderful film:"
    prefix = {"length": 18, "init": text}
    return {
        "prefix": fw.PrefixConfig(**prefix),
        "prefix, random start": fw.PrefixConfig(length=18, init="random"),
        "prefix, MLP 512, random start": fw.PrefixConfig(length=18, init="random", reparam="mlp"),
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
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import encode, read_examples
    from foreword.demo.job import Plan, ending, pick_reviews
    from foreword.models import packaged_reviews

    plan = Plan()
    model, tokenizer = fw.load_model("demo")
    texts = [ending(t) for t in pick_reviews(packaged_reviews(), "1", plan)]
    random.Random(0).shuffle(texts)
    train, valid = (
        encode(read_examples([{"text": t} for t in part]), tokenizer, max_length=plan.max_tokens)
        for part in (texts[48:], texts[:48])
    )
    rows = {}
    for name, config in configs().items():
        if options.only and name not in options.only:
            continue
        rows[name] = train_one(model, tokenizer, config, train, valid, options)
        print(
            f"{name:32} {rows[name]['parameters']:>12,} {rows[name]['before']:.3f} -> {rows[name]['after']:.3f}",
            flush=True,
        )
    if not options.only:
        print("written:", keep("methods", {"options": vars(options), "rows": rows}))


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
