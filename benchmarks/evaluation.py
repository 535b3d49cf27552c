"""The metrics against published scores of published outputs; the slot rules on human texts; one short real run.

    python benchmarks/evaluation.py --e2e DIR [--published FILE] [--only published slots run]

`--e2e` holds E2E's train.jsonl and valid.jsonl (its devset) with `input` and `references`; not part of this project.
`--published` is the file `predictions.epoch16` in `predictions/e2e_model_MLP_seed1-…` of the repository
github.com/UKPLab/e2e-nlg-challenge-2017 (Puzikov & Gurevych 2018), a text a line for each of the devset's 547 tables;
`scores.csv` beside it has what E2E's official script gave for that epoch.

The run: SmolLM2-135M on 100 tables of the devset, as it is and with a prefix trained for 60 steps of 8 examples, greedy
and with the paper's 5 beams. One seed, nothing tuned: it shows what the evaluation says, not what the method can do.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import RESULTS, keep

# Of the file named above, from scores.csv, its 16th epoch; E2E's script, METEOR by Java.
KNOWN = {"bleu-lower": 71.09, "nist": 8.5236, "cider": 2.4766, "rougeL-coco": 74.04, "meteor": 48.11}
START = (
    "These are facts about a place to eat, and here is a sentence for its guests that tells all of them, "
    "one by one, in plain words:"
)
METRICS = ("bleu-lower", "nist", "rougeL-coco", "cider", "similarity", "slot-coverage", "slot-hallucinated",
           "slot-error", "perplexity", "distinct-2")  # fmt: skip


def published(valid: Path, outputs: Path) -> dict[str, Any]:
    """Our metrics of published outputs beside the published scores."""
    from foreword.evaluate.examples import read_predictions, read_tasks
    from foreword.evaluate.metrics import score

    texts, _ = read_predictions(outputs)
    scores = score(texts, [t.references for t in read_tasks(valid)], metrics=list(KNOWN))
    return {name: {"published": known, "ours": scores[name].value} for name, known in KNOWN.items()}


def slots(valid: Path) -> dict[str, float]:
    """What the slot rules say of all human references."""
    from foreword.evaluate.examples import read_tasks
    from foreword.evaluate.metrics import score

    pairs = [(r, t.input) for t in read_tasks(valid) for r in t.references]
    names = ("slot-coverage", "slot-hallucinated", "slot-error")
    scores = score([r for r, _ in pairs], metrics=names, inputs=[i for _, i in pairs])
    return {"references": len(pairs), **{n: s.value for n, s in scores.items()}}


def real(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The base and a short-trained prefix on the same tables, and what the paired test says of the differences."""
    from rich.console import Console

    import foreword as fw
    from foreword.data import encode, read_examples
    from foreword.evaluate.examples import read_tasks
    from foreword.evaluate.job import Evaluation, Writer
    from foreword.evaluate.predict import Decoding
    from foreword.train.run import train_prefix

    model, tokenizer = fw.load_model("demo")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        train = rows(folder / "train.jsonl", options.steps * options.batch)
        data = encode(
            read_examples([{"input": r["input"], "output": r["references"][0]} for r in train]),
            tokenizer,
            max_length=160,
        )
        began = time.perf_counter()
        result = train_prefix(
            model, tokenizer, fw.PrefixConfig(length=20, init=START), data, work / "prefix",
            {"max_steps": options.steps, "per_device_train_batch_size": options.batch, "seed": 0, "use_cpu": True,
             "save_strategy": "no", "report_to": "none", "logging_steps": 10},
            label="prefix", console=Console(stderr=True),
        )  # fmt: skip
        found: dict[str, Any] = {"training_seconds": time.perf_counter() - began, "parameters": result.parameters}
        test = work / "test.jsonl"
        test.write_text("".join(json.dumps(r) + "\n" for r in rows(folder / "valid.jsonl", options.tables)))
        greedy, paper = (make(max_new_tokens=64, stop="\n") for make in (Decoding, Decoding.paper))
        runs = {"base, greedy": ((), greedy), "prefix, greedy": ((work / "prefix",), greedy),
                "prefix, 5 beams": ((work / "prefix",), paper)}  # fmt: skip
        before = None
        for label, (prefixes, how) in runs.items():
            job = Evaluation(read_tasks(test), METRICS, "E2E", writer=Writer("demo", prefixes, how))
            out = work / label
            record = job.run(out, against=before)
            kept = ("value", "low", "high", "against")
            metrics = {n: {k: m[k] for k in kept if k in m} for n, m in record["metrics"].items()}
            found[label] = {"seconds": record["seconds"], "metrics": metrics}
            before = out
            show(label, metrics)
    return found


def rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Some of a file's tables, drawn with seed 0; a line end parts a table from its text."""
    everything = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [r | {"input": r["input"] + "\n"} for r in random.Random(0).sample(everything, count)]


def show(label: str, metrics: dict[str, Any]) -> None:
    print(f"\n{label}")
    for name, m in metrics.items():
        low = f"{m['low']:8.2f} to {m['high']:8.2f}" if m["low"] is not None else ""
        difference = f"{m['against']['difference']:+8.2f} p {m['against']['p']}" if "against" in m else ""
        print(f"  {name:16} {m['value']:8.2f}  {low:22} {difference}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--e2e", type=Path, required=True, help="folder of train.jsonl and valid.jsonl")
    parser.add_argument("--published", type=Path, help="the outputs named above")
    parser.add_argument("--only", nargs="*", choices=("published", "slots", "run"))
    parser.add_argument("--tables", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    path = RESULTS / "evaluation.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record.pop("machine", None)
    chosen = options.only or ("published", "slots", "run")
    if "published" in chosen and options.published is not None:
        record["published"] = published(options.e2e / "valid.jsonl", options.published)
        for name, row in record["published"].items():
            print(f"{name:16} published {row['published']:8.4f} ours {row['ours']:8.4f}")
    if "slots" in chosen:
        record["slots_of_human_references"] = slots(options.e2e / "valid.jsonl")
        print(record["slots_of_human_references"])
    if "run" in chosen:
        kept = {k: getattr(options, k) for k in ("tables", "steps", "batch")}
        record["run"] = {"options": kept, **real(options.e2e, options)}
    print("written:", keep("evaluation", record))


if __name__ == "__main__":
    main()
