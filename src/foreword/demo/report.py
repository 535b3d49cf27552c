"""The demo's pictures and report. The numbers are what came out."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from foreword.train.curves import draw_curves

if TYPE_CHECKING:
    from foreword.demo.job import Results

_COLOURS = {"base": "#8a8a8a", "positive": "#2a7f4f", "negative": "#b0413e"}


def draw(results: Results, out: Path) -> None:
    """``curves.png``: the losses; ``sentiment.png``: how favourable the texts of each writer read."""
    draw_curves(
        {t: r["history"] for t, r in results.trained.items()},
        out / "curves.png",
        title="Training two prefixes",
    )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, (name, records) in enumerate(results.texts.items()):
        chances = sorted(r["positive"] for r in records)
        offsets = [row + 0.5 * ((i * 7 % 11) / 11 - 0.5) for i in range(len(chances))]
        axes.scatter(chances, offsets, s=18, alpha=0.55, color=_COLOURS.get(name, "C0"))
        mean = results.summary[name]["mean_positive"]
        axes.plot([mean, mean], [row - 0.38, row + 0.38], color=_COLOURS.get(name, "C0"), linewidth=3)
    axes.set_yticks(range(len(results.texts)), [n if n == "base" else f"{n} prefix" for n in results.texts])
    axes.invert_yaxis()
    axes.axvline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_xlabel("favourable, by a classifier trained on other reviews (bar: mean)")
    figure.savefig(out / "sentiment.png", dpi=120)


def verdict(results: Results) -> str:
    """What the numbers say, in one sentence. Clear is a difference of two standard errors."""
    differences = {pair: _difference(results, *pair) for pair in _PAIRS}
    low = min(mean / error if error else 0.0 for mean, error in differences.values())
    if low > 2:
        said = "The two prefixes differ clearly from each other and from the base model"
    elif low > 0:
        said = "The two prefixes stand on either side of the base model, but not every difference is clear"
    else:
        said = "The two prefixes do not stand on either side of the base model"
    means = ", ".join(f"{a} - {b} {mean:+.2f} ± {error:.2f}" for (a, b), (mean, error) in differences.items())
    counts = ", ".join(f"{n} {s['favourable']:.0f} of {s['texts']:.0f}" for n, s in results.summary.items())
    return f"{said} (mean probability and standard error: {means}). Texts that read as favourable: {counts}."


_PAIRS = (("positive", "base"), ("base", "negative"), ("positive", "negative"))


def _difference(results: Results, a: str, b: str) -> tuple[float, float]:
    """Difference of two writers' mean probabilities of favourable, and its standard error."""
    chances = [[float(r["positive"]) for r in results.texts[name]] for name in (a, b)]
    error = math.sqrt(sum(statistics.variance(c) / len(c) for c in chances))
    return statistics.fmean(chances[0]) - statistics.fmean(chances[1]), error


def write_report(results: Results, out: Path) -> None:
    """``report.md``: what was done, the counts, the pictures, and texts to read."""
    leans = list(dict.fromkeys(r["lean"] for r in results.texts["base"]))
    rows = "".join(
        f"| {name} | {s['favourable']:.0f} of {s['texts']:.0f} | "
        + " | ".join(f"{s[f'favourable_{lean}']:.0f} of {s[f'texts_{lean}']:.0f}" for lean in leans)
        + f" | {s['mean_positive']:.2f} | {s['perplexity']:.1f} |\n"
        for name, s in results.summary.items()
    )
    trained = "".join(
        f"- **{task}**: {t['parameters']:,} numbers ({t['bytes']:,} bytes), validation loss "
        f"{t['valid_loss_before']:.3f} → {t['valid_loss_after']:.3f} nats a token\n"
        for task, t in results.trained.items()
    )
    texts = "".join(
        f"**{r['opening']}** …\n\n"
        + "".join(f"- *{name}*: {_line(results.greedy[name][i])}\n" for name in results.greedy)
        + "\n"
        for i, r in enumerate(results.texts["base"][:: max(1, results.plan["samples"])])
    )
    judge = results.classifier
    report = f"""# Two prefixes, one frozen model

Base model: {results.base_model}, untouched. Two prefixes of {results.plan["length"]} virtual tokens were trained
for {results.plan["steps"]} steps of {results.plan["batch_size"]} endings of real IMDB reviews each, from texts that
name the two tasks:

{trained}
{verdict(results)}

| writer | favourable | {" | ".join(f"{lean} openings" for lean in leans)} | mean probability | perplexity (base) |
| --- | --- | {"--- | " * len(leans)}--- | --- |
{rows}
Some openings lean one way or the other ("The worst thing about the film is"), as is usual where steering is measured;
only what was written after them is judged.

The judge is a TF-IDF and logistic-regression classifier trained on {judge["train_reviews"]:,} other reviews; on
{judge["held_out_reviews"]:,} held-out ones it is right {judge["held_out_accuracy"]:.1%} of the time, so single texts
are often misjudged and only the counts mean something.

One batch with all three writers mixed, row by row: {results.mixed["equal_to_alone"]} of {results.mixed["rows"]} greedy
texts equal the ones that each wrote alone.

![losses](curves.png)

![sentiment](sentiment.png)

## Greedy texts

{texts}"""
    (out / "report.md").write_text(report, encoding="utf-8")


def _line(text: str) -> str:
    return " ".join(text.split())
