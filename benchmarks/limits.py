"""What people hold against prefix tuning, each with a number: lengths, layers that disturb each other, gradients.

How favourable IMDB reviews end (as in benchmarks/methods.py), SmolLM2-135M, the same steps and batches for every row;
the negative log-likelihood of 48 held-out endings in nats a token. One seed: differences of some hundredths mean
nothing. Bases in 8 and 4 bits (quanto) are here as well. Unstable MLPs are in benchmarks/strategies.py, and memory by
length in benchmarks/memory.py.

    python benchmarks/limits.py [--steps 16] [--only length layers bases gradients] [--picture P]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

from _measure import RESULTS, keep
from methods import TEXT, reviews
from strategies import run

LENGTHS = (4, 8, 16, 32, 64)
STARTS = {  # each at the rate that is usual for it, and a random one at a smaller one as well
    "text": {},
    "random": {"init": "random"},
    "random, a quarter of the rate": {"init": "random", "learning_rate": 5e-3},
    "random, MLP": {"init": "random", "reparam": "mlp"},
}
LAYERS = {
    "first 10": "first:10",
    "middle 10": list(range(10, 20)),
    "last 10": "last:10",
    "every third": "every:3",
}  # all 30: "text, 16" of the lengths
BASES = {"int8": {"quantize": "int8:quanto"}, "int4": {"quantize": "int4:quanto"}}
RATES, MLP_RATES = (2e-2, 0.6), (1e-3, 1e-2)  # the usual one, and one that is too high


def variants(text: str, steps: int) -> dict[str, dict[str, tuple[Any, list[Any]]]]:
    """By group and name: the configuration, callbacks."""
    import foreword as fw

    def prefix(length: int = 16, **more: Any) -> fw.PrefixConfig:
        return fw.PrefixConfig(length=length, **{"init": text, **more})

    staged = fw.LayerByLayer.in_groups(30, 3, steps)
    return {
        "length": {f"{start}, {n}": (prefix(n, **how), []) for start, how in STARTS.items() for n in LENGTHS},
        "layers": {
            **{name: (prefix(sites=sites), []) for name, sites in LAYERS.items()},
            "all 30, top down in 3 stages": (prefix(), [staged]),
        },
        "bases": {name: (prefix(), []) for name in BASES},
        "gradients": {
            f"{start}, rate {rate:g}": (prefix(**how, learning_rate=rate), [fw.Monitor(every=2)])
            for start, how, rates in (("text", {}, RATES), ("random, MLP", STARTS["random, MLP"], MLP_RATES))
            for rate in rates
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--looks", type=int, default=1, help="validations of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--explode", type=float, default=1000.0, help="explode_factor")
    parser.add_argument("--only", nargs="*", help="groups; the others stay in the results as they were")
    parser.add_argument("--names", help="of the rows to run again, a regular expression; the others stay as well")
    parser.add_argument("--picture", type=Path, help="where the picture of the gradients goes")
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import encode, read_examples

    warnings.simplefilter("ignore")
    model, tokenizer = fw.load_model("demo")
    parts = reviews()
    text = " ".join([TEXT, *(example["text"] for example in parts[0][:3])])  # 64 tokens and more; the first are used
    train, valid = (encode(read_examples(part), tokenizer, max_length=48) for part in parts)
    before = RESULTS / "limits.json"
    rows = json.loads(before.read_text())["rows"] if options.only and before.is_file() else {}
    for group, found in variants(text, options.steps).items():
        if options.only and group not in options.only:
            continue
        rows.setdefault(group, {})
        for name, (config, callbacks) in found.items():
            if options.names and not re.fullmatch(options.names, name):
                continue
            base = fw.load_model("demo", **BASES[name])[0] if group == "bases" else model
            row = rows[group][name] = run(base, tokenizer, config, callbacks, train, valid, options)
            print(f"{group:10} {name:30} {row['parameters']:>8,} {row['last']:.3f} {row['events']}", flush=True)
        if group == "gradients":
            show_gradients(rows[group], options.picture)
        summary = {"length spread": spread(rows["length"])} if "length" in rows else {}
        kept = {k: v for k, v in vars(options).items() if k not in ("only", "names", "picture")}
        print(summary, "written:", keep("limits", {"options": kept, "rows": rows, **summary}), flush=True)


def spread(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By start: how far the worst length is above the best, as a share of the best loss."""
    by_start: dict[str, list[float]] = {}
    for name, row in rows.items():
        by_start.setdefault(name.rpartition(", ")[0], []).append(row["last"])
    return {start: (max(losses) - min(losses)) / min(losses) for start, losses in by_start.items()}


def show_gradients(rows: dict[str, dict[str, Any]], picture: Path | None) -> None:
    """Draw what the monitor saw of the prefixes that start from a text, and keep a summary of each look."""
    from foreword.train.curves import draw_monitor

    seen = {name: row.pop("seen") for name, row in rows.items() if "seen" in row}
    if picture is not None:
        draw_monitor({name: looks for name, looks in seen.items() if name.startswith("text")}, picture)
    for name, looks in seen.items():
        rows[name]["looks"] = [summary(look) for look in looks]


def summary(look: dict[str, Any]) -> dict[str, Any]:
    """Of all sites at one step."""
    norms = {site: seen["gradient_norm"] for site, seen in look["sites"].items()}
    shares = {site: seen["attention_share"] for site, seen in look["sites"].items()}
    strongest, most = max(norms, key=norms.__getitem__), max(shares, key=shares.__getitem__)
    return {
        "step": look["step"],
        "norm": sum(n * n for n in norms.values()) ** 0.5,
        "median": statistics.median(norms.values()),
        "strongest": strongest,
        "share": statistics.fmean(shares.values()),
        "most": most,
        "most share": shares[most],
    }


if __name__ == "__main__":
    main()
