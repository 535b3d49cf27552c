"""Merged against concatenated attention, forward and backward, over text and prefix lengths.

One attention call with the shapes of SmolLM2 (9 query and 3 key/value heads of 64), causal, without and with a
padding mask. Writes a table, a picture, and checks the automatic choice against the better of the two.

    python benchmarks/attention.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product

from _measure import RESULTS, keep, plainly, take_turns

HEADS, KV_HEADS, DIM = 9, 3, 64
TEXT = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
PREFIX = (10, 32, 128, 512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    texts = (1, 64, 1024) if options.quick else TEXT
    prefixes = (10, 512) if options.quick else PREFIX
    rows = []
    for masked, training, text, length in product((False, True), (True, False), texts, prefixes):
        batch = 1 if text >= 2048 else 8 if text <= 256 else 2
        if text <= 4 and (training or (text > 1 and not masked)):  # a step of generation
            continue
        rows.append(measure(batch, text, length, masked, training, options.rounds))
        show(rows[-1])
    worst = max(rows, key=lambda r: r["auto"] / r["best"])
    print(f"the automatic choice costs at most {worst['auto'] / worst['best']:.2f} of the best")
    draw(rows)
    print("written:", keep("attention", {"rows": rows}))


def measure(batch: int, text: int, length: int, masked: bool, training: bool, rounds: int) -> dict:
    """Medians of one size, the paths taking turns, as ratios to concatenation."""
    import torch
    from transformers import AttentionInterface

    from foreword._choice import cheapest
    from foreword.attention import SitePrefix, attend, attention_path

    torch.manual_seed(0)
    cached = 256 if text <= 4 else 0  # few tokens: a step of generation over a cache
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = HEADS // KV_HEADS, True, training

    def states(heads: int, rows: int) -> torch.Tensor:  # as a projection makes them: (B, S, H, D) transposed
        return torch.randn(batch, rows, heads, DIM).transpose(1, 2).requires_grad_(training)

    query, key, value = states(HEADS, text), states(KV_HEADS, text + cached), states(KV_HEADS, text + cached)
    if cached:  # a cache keeps them in the order of its heads
        key, value = key.contiguous(), value.contiguous()
    prefix = SitePrefix(
        torch.randn(1, KV_HEADS, length, DIM, requires_grad=training),
        torch.randn(1, KV_HEADS, length, DIM, requires_grad=training),
    )
    mask = None
    if masked:
        mask = torch.ones(batch, 1, text, text + cached, dtype=torch.bool).tril(cached)
        mask[::2, ..., : max(1, text // 8)] = False
        mask[..., -1] |= ~mask.any(-1)  # no query without a key
    delegate = AttentionInterface._global_mapping["sdpa"]
    grad = torch.randn(batch, text, HEADS, DIM)

    def run(path: str) -> None:
        with attention_path(path):
            out, _ = attend(prefix, delegate, "sdpa", module, query, key, value, mask, scaling=DIM**-0.5)
        if training:
            out.backward(grad)

    def repeated(path: str):
        times = max(1, int(30_000 / (batch * text * (text + cached + length) ** 0.5)))
        return lambda: [run(path) for _ in range(times)]

    paths = ["merged", "concat"]
    if text <= 16 and not training and (masked or text == 1):
        paths.append("step")
    with torch.set_grad_enabled(training):
        measured = take_turns({p: plainly(repeated(p)) for p in paths}, rounds=rounds)
    ratios = {p: statistics.median(measured[p]) / statistics.median(measured["concat"]) for p in paths}
    choice = cheapest(query, key, prefix, mask)
    return {
        "batch": batch, "text": text, "prefix": length, "masked": masked, "training": training,
        "ratios": ratios, "choice": choice, "auto": ratios[choice], "best": min(ratios.values()),
    }  # fmt: skip


def show(row: dict) -> None:
    mode = "forward+backward" if row["training"] else "forward"
    mask = "mask" if row["masked"] else "causal"
    print(
        f"{mode:17} {mask:7} batch {row['batch']} text {row['text']:5} prefix {row['prefix']:5} "
        + " ".join(f"{path} {ratio:.2f}" for path, ratio in row["ratios"].items())
        + f"  -> {row['choice']}"
    )


def draw(rows: list[dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (masked, training) in zip(grid.flat, product((False, True), (True, False)), strict=True):
        for length in sorted({r["prefix"] for r in rows}):
            line = [r for r in rows if r["prefix"] == length and r["masked"] == masked and r["training"] == training]
            axes.plot(
                [r["text"] for r in line], [r["ratios"]["merged"] for r in line], marker="o", label=f"prefix {length}"
            )
        axes.axhline(1, color="black", linewidth=0.7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_title(f"{'padding mask' if masked else 'causal'}, forward{' + backward' if training else ''}")
        axes.grid(alpha=0.3)
    grid[0][0].legend()
    figure.supxlabel("text tokens")
    figure.supylabel("time: merged / concatenated")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "attention.png", dpi=110)


if __name__ == "__main__":
    main()
