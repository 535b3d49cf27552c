"""Does a strategy help? Growing prefixes, layer by layer, orthogonal starts, rolling back; each beside the plain run.

How favourable IMDB reviews end (as in benchmarks/methods.py), SmolLM2-135M, the same steps and batches for every row;
the negative log-likelihood of 48 held-out endings, the best and the last, in nats a token. One seed a run: differences
of some hundredths mean nothing.

    python benchmarks/strategies.py [--steps 32] [--seed 0] [--only growth stages stability]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

from _measure import keep
from methods import TEXT, reviews


def variants(steps: int) -> dict[str, dict]:
    """By group and name: the configuration, callbacks, the learning rate."""
    import foreword as fw

    def text(length: int, **more) -> fw.PrefixConfig:
        return fw.PrefixConfig(length=length, init=TEXT, **more)

    def mlp(**more) -> fw.PrefixConfig:
        return fw.PrefixConfig(length=18, init="random", reparam="mlp", **more)

    def groups(order: str) -> list:
        return [fw.LayerByLayer.in_groups(30, 3, steps, order=order)]

    settle = max(1, steps // 8)
    return {
        "growth": {
            "length 6": (text(6), []),
            "length 12": (text(12), []),
            "length 18": (text(18), []),
            "6, then 12, then 18": (text(18), [fw.Growth(start=6, step=6, threshold=0.02, settle=settle)]),
        },
        "stages": {
            # all layers at once is "length 18"
            "top down, 3 stages": (text(18), groups("top-down")),
            "bottom up, 3 stages": (text(18), groups("bottom-up")),
        },
        "stability": {
            "MLP, 1e-3": (mlp(learning_rate=1e-3), []),
            "MLP, 1e-3, orthogonal": (mlp(learning_rate=1e-3, orthogonal=True), []),
            "MLP, 1e-2": (mlp(learning_rate=1e-2), []),
            "MLP, 1e-2, orthogonal": (mlp(learning_rate=1e-2, orthogonal=True), []),
            "MLP, 1e-2, rolling back": (mlp(learning_rate=1e-2), [fw.RollBack(times=3, every=5)]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--looks", type=int, default=8, help="validations of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data; of another: results apart")
    parser.add_argument("--explode", type=float, default=20.0, help="explode_factor of the runs that may roll back")
    parser.add_argument("--only", nargs="*", help="groups")
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import encode, read_examples

    warnings.simplefilter("ignore")
    model, tokenizer = fw.load_model("demo")
    train, valid = (encode(read_examples(part), tokenizer, max_length=48) for part in reviews())
    rows: dict[str, dict] = {}
    for group, found in variants(options.steps).items():
        if options.only and group not in options.only:
            continue
        rows[group] = {}
        for name, (config, callbacks) in found.items():
            row = rows[group][name] = run(model, tokenizer, config, callbacks, train, valid, options)
            print(f"{group:10} {name:28} best {row['best']:.3f} last {row['last']:.3f} {row['events']}", flush=True)
    name = "strategies" + (f"_seed{options.seed}" if options.seed else "")
    print("written:", keep(name, {"options": vars(options), "rows": rows}))


def run(model, tokenizer, config, callbacks, train, valid, options) -> dict:
    """The validation losses of one run, what its strategy did, and what a Monitor saw of each site."""
    import foreword as fw
    from foreword.data import Collator

    tuning = fw.attach(model, config, tokenizer=tokenizer)
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = fw.PrefixTrainingArguments(
                output_dir=str(Path(folder) / "run"), max_steps=options.steps, seed=options.seed, use_cpu=True,
                per_device_train_batch_size=options.batch, per_device_eval_batch_size=16, eval_strategy="steps",
                eval_steps=max(1, options.steps // options.looks), save_strategy="no", report_to="none",
                disable_tqdm=True, logging_strategy="no", explode_factor=options.explode if callbacks else 1000.0,
            )  # fmt: skip
            trainer = fw.PrefixTrainer(
                model, arguments, train_dataset=train, eval_dataset=valid, callbacks=callbacks,
                data_collator=Collator.for_tokenizer(tokenizer),
            )  # fmt: skip
            ended = ""
            try:
                trainer.train()
            except fw.DivergedError as exc:
                ended = str(exc).split(".")[0]
            losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
            events = [e for e in trainer.state.log_history if "prefix_length" in e or "rolled_back" in e]
            lines = Path(folder) / "run" / "monitor.jsonl"
            seen = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
            return {
                "parameters": tuning.num_parameters, "losses": losses, "events": [*events, *([ended] if ended else [])],
                "best": min(losses, default=float("nan")), "last": losses[-1] if losses else float("nan"),
                **({"seen": seen} if seen else {}),
            }  # fmt: skip
    finally:
        tuning.detach()


if __name__ == "__main__":
    main()
