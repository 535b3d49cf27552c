"""What a trained prefix can lose: each way to compress it alone, then the search for the best plan within a target.

A prefix of 32 tokens is trained on E2E (facts to a sentence, SmolLM2-135M), or on the packaged reviews; every row is
the rise of the loss on the same held-out outputs, in nats a token, with the standard error over them. Shares of
attention are measured on examples of the training file that the prefix wasn't trained on, and distillation trains on
those. One seed.

    python benchmarks/compress.py --train E2E/train.jsonl --valid E2E/valid.jsonl [--work DIR] [--target 0.08]

`--work` keeps the prefix and the search, so that a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from _measure import RESULTS, keep

TEXT = (
    "These are facts about a restaurant or a pub, followed by one or two fluent sentences that tell a visitor all of "
    "them, and nothing that the facts do not say:"
)
REVIEW = "Here is a glowing, enthusiastic review by somebody who loved every minute of this wonderful film:"
DISTILLED = {13: (2e-2,), 4: (2e-2, 5e-3)}  # to how many tokens, at which learning rates
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "compress.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", help="JSONL with input and output or references, instead of the packaged reviews")
    parser.add_argument("--valid", help="the same, held out")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--distill-steps", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--target", type=float, default=0.08, help="share of the file's bytes")
    parser.add_argument("--work", type=Path, help="folder for the prefix and the search")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="the others stay as they were kept")
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import encode

    model, tokenizer = fw.load_model("demo")
    parts = from_files(options) if options.train else reviews(options)
    train, more, valid = (encode(part, tokenizer, max_length=128 if options.train else 48) for part in parts)
    work = options.work or Path(tempfile.mkdtemp())
    prefix = trained(model, tokenizer, train, work / "prefix", options)
    rows = {"prefix": about(model, tokenizer, prefix, more, valid)}
    if options.only is not None:
        rows = {**json.loads((RESULTS / "compress.json").read_text(encoding="utf-8"))["rows"], **rows}
    for name, section in SECTIONS.items():
        if options.only is None or name in options.only:
            rows[name] = section(model, tokenizer, prefix, more, valid, work, options)
    kept = {k: v for k, v in vars(options).items() if k not in ("train", "valid", "work", "only")}
    print("written:", keep("compress", {"data": "E2E" if options.train else "reviews", "options": kept, "rows": rows}))
    if options.work is None:
        shutil.rmtree(work)


def trained(model, tokenizer, train, folder, options):
    """The prefix that is compressed."""
    import foreword as fw
    from foreword.train.run import train_prefix

    if (folder / "foreword.json").exists():
        return fw.Prefix.load(folder)
    config = fw.PrefixConfig(length=options.length, init=TEXT if options.train else REVIEW, repeat=True)
    arguments = {
        "max_steps": options.steps,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "save_strategy": "no",
    }
    return train_prefix(model, tokenizer, config, train, folder, arguments).prefix


def about(model, tokenizer, prefix, more, valid) -> dict:
    """The losses that rises are over, and how much of the attention the prefix gets at its sites."""
    from foreword.compression import held_out_loss, token_shares

    base, own = (held_out_loss(model, tokenizer, p, valid).mean for p in (None, prefix))
    by_site = [float(s.mean(0).sum()) for s in token_shares(model, tokenizer, prefix, more).values()]
    print(f"base model {base:.4f}, with the prefix {own:.4f}, {prefix.stored_nbytes:,} bytes", flush=True)
    return {
        "base loss": base, "loss": own, "bytes": prefix.stored_nbytes,
        "share of attention": {"least": min(by_site), "most": max(by_site), "mean": sum(by_site) / len(by_site)},
        "squares kept by rank": {k: kept_by_rank(getattr(prefix, k)) for k in ("keys", "values")},
    }  # fmt: skip


def kept_by_rank(states) -> dict:
    """The share of the sum of squares that a low rank keeps, averaged over sites."""
    import torch

    squares = [torch.linalg.svdvals(t.transpose(0, 1).flatten(1).double()).square() for t in states.values()]
    length = len(squares[0])
    ranks = (length // 4, length // 2, length * 3 // 4)
    return {r: sum(float(s[:r].sum() / s.sum()) for s in squares) / len(squares) for r in ranks}


def alone(model, tokenizer, prefix, more, valid, work, options) -> dict:
    """What the search doesn't try: what shares a scale, merged tokens without weights, keys or values alone."""
    from foreword.compression import low_rank, merge, quantize, token_shares

    shares = token_shares(model, tokenizer, prefix, more)
    made = {}
    for bits in ("int8", "int4"):
        for by in ("channel", "token"):
            made[f"keys {bits} by {by}"] = quantize(prefix, f"{bits}:{by}", "plain")
            made[f"values {bits} by {by}"] = quantize(prefix, "plain", f"{bits}:{by}")
    for n in (prefix.longest * 3 // 4, prefix.longest // 2, prefix.longest // 4):
        made[f"merge to {n}, without weights"] = merge(prefix, shares, n, weigh=False)
    half = prefix.longest // 2
    made[f"keys of rank {half}"], made[f"values of rank {half}"] = low_rank(prefix, half), low_rank(prefix, None, half)
    return rises(model, tokenizer, prefix, made, valid)


def search(model, tokenizer, prefix, more, valid, work, options) -> dict:
    """All plans without training for the target."""
    import foreword as fw
    from foreword.compression.report import draw_plans, verdict

    folder = work / "small"
    found = fw.compress(
        model, tokenizer, prefix, more, valid, target_bytes=int(options.target * prefix.stored_nbytes), out=folder,
        resume=(folder / "begun.json").exists(),
    )  # fmt: skip
    draw_plans(found.candidates, found.limits, found.best, PICTURE)
    for c in found.candidates:
        print(f"{c.plan.name:56} {c.nbytes:>10,} {c.increase:+.4f} ± {c.error:.4f} {c.seconds:.1f} s", flush=True)
    print(verdict(found))
    return found.to_json()


def distilled(model, tokenizer, prefix, more, valid, work, options) -> dict:
    """Distilling beside what it starts from, and beside merging, to the same numbers of tokens."""
    from foreword.compression import merge, prune, shorten, token_shares

    shares = token_shares(model, tokenizer, prefix, more)
    made = {}
    for tokens, rates in DISTILLED.items():
        start = made[f"prune uniformly to {tokens}"] = prune(prefix, shares, tokens, uniform=True)
        made[f"merge to {tokens}"] = merge(prefix, shares, tokens)
        for rate in rates:
            arguments = {
                "max_steps": options.distill_steps,
                "learning_rate": rate,
                "report_to": "none",
                "save_steps": 20,
            }
            folder = work / f"distilled-{tokens}-{rate:g}"
            run = shorten(model, tokenizer, prefix, tokens, more, folder, arguments, start=start, resume=True)
            made[f"distill to {tokens}, {rate:g}"] = run.prefix
    return rises(model, tokenizer, prefix, made, valid)


def rises(model, tokenizer, prefix, made, valid) -> dict:
    """The rise of the loss of each."""
    from foreword.compression import held_out_loss

    before, rows = held_out_loss(model, tokenizer, prefix, valid), {}
    for name, small in made.items():
        rise, error = held_out_loss(model, tokenizer, small, valid).above(before)
        rows[name] = {"bytes": small.stored_nbytes, "rise": round(rise, 5), "error": round(error, 5)}
        print(f"{name:32} {small.stored_nbytes:>10,} {rise:+.4f} ± {error:.4f}", flush=True)
    return rows


SECTIONS = {"alone": alone, "search": search, "distilled": distilled}


def from_files(options) -> tuple[list, list, list]:
    """Examples to train on, others for what compressing needs, and held-out ones."""

    def rows(path: str, start: int, n: int) -> list:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(lines)
        chosen = lines[start : start + n]
        outputs = [r["output"] if "output" in r else r["references"][0] for r in chosen]
        return as_examples([{"input": r["input"] + "\n", "output": o} for r, o in zip(chosen, outputs, strict=True)])

    many = options.steps * 8
    return (
        rows(options.train, 0, many), rows(options.train, many, options.distill_steps * 8),
        rows(options.valid, 0, options.held_out),
    )  # fmt: skip


def reviews(options) -> tuple[list, list, list]:
    from methods import reviews as packaged

    rest, held_out = packaged()
    half = len(rest) // 2
    return as_examples(rest[:half]), as_examples(rest[half:]), as_examples(held_out[: options.held_out])


def as_examples(rows: list) -> list:
    from foreword.data import read_examples

    return read_examples(rows)


if __name__ == "__main__":
    main()
