"""The report of a comparison: Markdown, one HTML page that needs nothing else, and the numbers as JSON."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword._begun import write_whole
from foreword.compare.literature import CAUTION, LITERATURE, Reported
from foreword.compare.plan import Plan
from foreword.compare.plots import NAMES, draw
from foreword.compare.tasks import TaskData

Line = Mapping[str, Any]
Cells = list[list[str]]
RESULTS, MARKDOWN, PAGE, PLOTS = "results.json", "report.md", "report.html", "plots"
_NOT_BRIEF = ("share", "tokens trained on", "training s", "memory")
_SHOWN = 3  # test examples whose texts are shown


def write_report(out: Path, task: TaskData, plan: Plan, record: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json``, ``report.md``, ``report.html`` and the plots; returns their paths."""
    from foreword.evaluate.run import finite

    write_whole(out / RESULTS, json.dumps(finite(record), ensure_ascii=False, indent=1) + "\n")
    final = [r for r in record["runs"].values() if r["run"]["kind"] == "final"]
    pictures = draw(record["rows"], final, out / PLOTS)
    parts = _parts(task, plan, record, _texts(out, record))
    write_whole(out / MARKDOWN, _markdown(parts, pictures))
    write_whole(out / PAGE, _page(parts, pictures))
    return [out / RESULTS, out / MARKDOWN, out / PAGE, *(p for files in pictures.values() for p in files)]


# ---------------------------------------------------------------- what is in it

Part = tuple[str, list[str], list[tuple[str, Cells]]]  # heading, paragraphs, tables with a title


def _parts(task: TaskData, plan: Plan, record: Mapping[str, Any], texts: Cells) -> list[Part]:
    lines = record["rows"]
    parts: list[Part] = [
        ("", _about(task, plan, record), []),
        ("Quality", _quality_notes(lines, record["facts"].get("tested")), _quality_tables(task, lines)),
        ("Cost", _cost_notes(plan), [("", cost(lines))]),
    ]
    if any(line["search"] for line in lines):
        parts.append(("Learning rates", _rate_notes(plan, lines), [("", rates(lines))]))
    if reported := LITERATURE.get(record["preset"] or ""):
        parts.append(_reported(reported))
    if len(texts) > 1:
        parts.append(("What they write", [f"The first {_SHOWN} test examples, the first seed."], [("", texts)]))
    return parts


def _about(task: TaskData, plan: Plan, record: Mapping[str, Any]) -> list[str]:
    facts, about = record["facts"], record["about"]
    machine = about["machine"]
    data = facts["task"]["data"]
    preset = f", preset {record['preset']}" if record["preset"] else ""
    sizes = ", ".join(f"{part['examples']} {name}" for name, part in data.items())
    found = [
        f"Task {task.name}{preset}: {sizes} examples. {task.note}".rstrip(),
        f"Base model {about['model']['name']} ({about['parameters']:,} parameters, {facts['model']['dtype']}). Budget "
        f"of a line: {plan.budget.describe()}, batches of {facts['batch_size']}, seeds "
        f"{', '.join(map(str, plan.seeds))}. Every line of a seed sees the same examples in the same order.",
        f"Measured on {machine['accelerator'] or machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, foreword {machine['foreword']}.",
    ]
    if record["missing_runs"]:
        found.append(f"Not finished: {record['missing_runs']} runs are still to be done (--resume).")
    found += [f"Failed, and left out: {message}" for message in record["failed"]]
    return found


def _quality_tables(task: TaskData, lines: Sequence[Line]) -> list[tuple[str, Cells]]:
    return [(name if len(task.tests) > 1 else "", quality(lines, name)) for name in task.tests]


def _reported(found: Sequence[Reported]) -> Part:
    said = [f"{r.where}; {r.setting}: {r.said}." for r in found if r.said]
    tables = [(f"{r.where}; {r.setting}", [list(row) for row in r.cells]) for r in found if r.cells]
    return "What the literature reports", [CAUTION, *said], tables


def _quality_notes(lines: Sequence[Line], tested: str | None) -> list[str]:
    state = f"the state of the {tested}" if tested else "what the run ends with"
    found = [
        "Mean over seeds ± standard deviation over seeds (where there are several), and in brackets the 95 % bootstrap "
        "interval over test examples, its ends averaged over seeds. Loss is the negative log-likelihood of the (first) "
        f"reference in nats a token; what is tested is {state}.",
    ]
    notes: dict[str, str] = {}
    for line in lines:
        for metrics in line["tests"].values():
            notes |= {m: s["note"] for m, s in metrics.items() if s["note"] and m not in notes}
    return found + [f"{metric}: {note}." for metric, note in notes.items()]


def _cost_notes(plan: Plan) -> list[str]:
    first = "Time and memory as ratios to the first trained line, in the same comparison on the same machine."
    clock = (
        "Time is what the budget gives; by it the steps differ."
        if plan.budget.seconds is not None
        else "Training time is that of the training steps alone."
    )
    return [
        f"{first} {clock} Memory is how far a process's resident memory rises in training steps above what it was "
        "before the model was loaded. Writing speed is that of the saved artefact, as a ratio to the base model in the "
        "same process; below 1 is slower. Best step is where the validation loss was lowest; epochs to it: how often "
        "the training examples had been seen by then."
    ]


def _rate_notes(plan: Plan, lines: Sequence[Line]) -> list[str]:
    trial, rest = plan.budget.split(len(plan.factors), plan.share)
    assert trial is not None
    found = [
        f"Each line tries {len(plan.factors)} learning rates with {trial.describe()} each, with seed {plan.seeds[0]}; "
        f"the one with the lowest validation loss trains for {rest.describe()} with every seed. The trials are part of "
        "the budget, and the other seeds reuse the choice. A short trial may favour another rate than a long run."
    ]
    return [*found, edge] if (edge := edge_note(lines)) else found


def edge_note(lines: Sequence[Line]) -> str:
    """Which lines took a rate at the grid's edge, and a grid that goes on there; empty: none did."""
    edges = [line for line in lines if line["at_the_edge"]]
    if not edges:
        return ""
    grid, taken = sorted(trial["factor"] for trial in edges[0]["search"]), {line["factor"] for line in edges}
    below = [grid[0] ** 2 / grid[1]] if grid[0] in taken else []
    above = [grid[-1] ** 2 / grid[-2]] if grid[-1] in taken else []
    wider = ",".join(f"{factor:.2g}" for factor in (*below, *grid, *above))
    return (
        "At the edge of the grid of learning rates, so that a better one may lie beyond it: "
        f"{', '.join(line['label'] for line in edges)}. A comparison with --rates {wider} would tell."
    )


def quality(lines: Sequence[Line], test: str, *, brief: bool = False) -> Cells:
    """The table of the validation loss and a test's metrics; ``brief``: without intervals."""
    metrics = list(dict.fromkeys(m for line in lines for m in line["tests"].get(test, {})))
    units = {m: s["unit"] for line in lines for m, s in line["tests"].get(test, {}).items()}
    arrows = {
        m: "↑" if s["higher_is_better"] else "↓" for line in lines for m, s in line["tests"].get(test, {}).items()
    }
    of_tests = [f"{m} {arrows[m]}" + (" %" if units[m] == "%" else "") for m in metrics]
    rows = []
    for line in lines:
        scores = line["tests"].get(test, {})
        name = line["label"] + (f" ({line['diverged']} of {line['runs']} diverged)" if line["diverged"] else "")
        valid = _with_spread(line["valid_loss"], 3)
        rows.append([name, _count(line), valid, *(_score(scores.get(m), brief) for m in metrics)])
    return [["", "parameters", "validation loss ↓", *of_tests], *rows]


def cost(lines: Sequence[Line], *, brief: bool = False) -> Cells:
    """The table of what each line costs; ``brief``: only what people look at first."""
    head = ["", "parameters", "share", "stored", "steps", "tokens trained on", "training s", "× time", "memory",
            "× memory", "best step", "epochs to it", "writing speed"]  # fmt: skip
    rows = [
        [
            line["label"], _count(line), f"{line['share']:.3%}" if line["parameters"] else "",
            _bytes(line["stored_bytes"]) if line["stored_bytes"] else "", _mean(line["steps"], "{:,.0f}"),
            _mean(line["supervised_tokens"], "{:,.0f}"), _mean(line["training_seconds"], "{:.1f}"),
            _number(line["training_seconds_ratio"]), _mean(line["peak_bytes"], "", _bytes),
            _number(line["peak_bytes_ratio"]), _mean(line["best_step"], "{:.0f}"), _number(line["best_epoch"]),
            _mean(line["speed_ratio"], "{:.2f}"),
        ] for line in lines
    ]  # fmt: skip
    keep = [
        i for i in range(len(head)) if i == 0 or (any(r[i] for r in rows) and not (brief and head[i] in _NOT_BRIEF))
    ]
    return [[row[i] for i in keep] for row in [head, *rows]]


def rates(lines: Sequence[Line]) -> Cells:
    """The table of learning rates: what each was tried with, and which was taken."""
    rows = []
    for line in lines:
        tried = [
            f"{_rates(s['rates'])}: {'diverged' if s['valid_loss'] is None else format(s['valid_loss'], '.3f')}"
            for s in line["search"]
        ]
        if tried:
            rows.append([line["label"], "; ".join(tried), _rates(line["rates"])])
    return [["", "rate: validation loss of the trial", "taken"], *rows]


def _texts(out: Path, record: Mapping[str, Any]) -> Cells:
    """What each line's first seed writes for the first test examples."""
    found: Cells = []
    for key, result in record["runs"].items():
        path = out / "runs" / result.get("folder", key) / "predictions.jsonl"
        if result["run"]["kind"] == "rate" or not path.is_file():
            continue
        if result["run"]["label"] in {row[0] for row in found}:
            continue
        records = [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n")[:_SHOWN] if x]
        if not found:
            found.append(["", *(_short(r["input"], 160) for r in records)])
        found.append([result["run"]["label"], *(_short(r["prediction"], 240) for r in records)])
    return found


# ---------------------------------------------------------------- as Markdown and as HTML


def _markdown(parts: Sequence[Part], pictures: Mapping[str, Sequence[Path]]) -> str:
    blocks = ["# Comparison"]
    for heading, paragraphs, tables in parts:
        blocks += [f"## {heading}"] if heading else []
        blocks += paragraphs
        for title, cells in tables:
            blocks += [f"**{title}**"] if title else []
            blocks.append(markdown_table(cells))
    for name, files in pictures.items():
        blocks += [f"## {NAMES[name]}", f"![{NAMES[name]}]({PLOTS}/{files[0].name})"]
    return "\n\n".join(blocks) + "\n"


def markdown_table(cells: Cells) -> str:
    """A table's cells, its head first, as Markdown."""

    def line(row: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |"

    return "\n".join([line(cells[0]), line("---" for _ in cells[0]), *(line(row) for row in cells[1:])])


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: .3em .6em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; } th { border-bottom: 2px solid #999; }
table.texts td, table.texts th { text-align: left; } svg { max-width: 100%; height: auto; } p { max-width: 60em; }
""".strip()


def _page(parts: Sequence[Part], pictures: Mapping[str, Sequence[Path]]) -> str:
    body = ["<h1>Comparison</h1>"]
    for heading, paragraphs, tables in parts:
        body += [f"<h2>{html.escape(heading)}</h2>"] if heading else []
        body += [f"<p>{html.escape(p)}</p>" for p in paragraphs]
        for title, cells in tables:
            body += [f"<h3>{html.escape(title)}</h3>"] if title else []
            body.append(_html_table(cells, "texts" if heading in ("What they write", "Learning rates") else ""))
    for name, files in pictures.items():
        body += [f"<h2>{html.escape(NAMES[name])}</h2>", _inline(next(f for f in files if f.suffix == ".svg"), name)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(cells: Cells, kind: str) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in cells[0])
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in cells[1:])
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    )


def _inline(path: Path, name: str) -> str:
    """The picture itself, without the file's head; names in it are made its own, as several are on one page."""
    found = re.search(r"<svg.*</svg>", path.read_text(encoding="utf-8"), re.DOTALL)
    svg = found[0] if found is not None else ""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)


# ---------------------------------------------------------------- numbers


def _score(score: Mapping[str, Any] | None, brief: bool = False) -> str:
    if not score or score["mean"] is None:
        return ""
    digits = 3 if score["unit"] == "nats a token" else 2
    text = _with_spread(score, digits)
    if not brief and score["low"] is not None and score["high"] is not None:
        text += f" [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"
    return text


def _with_spread(spread: Mapping[str, Any] | None, digits: int) -> str:
    if spread is None:
        return ""
    return f"{spread['mean']:.{digits}f}" + (f" ± {spread['sd']:.{digits}f}" if spread["sd"] is not None else "")


def _mean(spread: Mapping[str, Any] | None, form: str, shown: Any = None) -> str:
    if spread is None:
        return ""
    return str(shown(spread["mean"])) if shown is not None else form.format(spread["mean"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _count(line: Line) -> str:
    return f"{line['parameters']:,}" if line["parameters"] else ""


def _rates(found: Sequence[float]) -> str:
    return " and ".join(f"{r:g}" for r in found)


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
