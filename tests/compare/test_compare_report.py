"""Tables and pages from made-up results."""

from __future__ import annotations

import statistics

import comparing
import pytest
from matplotlib.figure import Figure

from foreword.compare import PRESETS, Budget, Plan, make_rows, preset_rows
from foreword.compare.literature import LITERATURE
from foreword.compare.plots import _levels, draw
from foreword.compare.report import cost, edge_note, quality, rates, write_report
from foreword.compare.table import best_epoch, tabulate

FACTS = {
    "model": {"weights": "w", "dtype": "torch.float32"},
    "batch_size": 4,
    "task": {"data": {"train": {"examples": 9}}},
}
ABOUT = {
    "model": {"name": "a | b <i>"}, "parameters": 1000,
    "machine": {"accelerator": None, "cpu": "c", "threads": 1, "torch": "t", "transformers": "t", "foreword": "f"},
}  # fmt: skip


def result(run, loss, seconds=2.0, peak=10.0, **changes):
    found = {
        "run": run.to_json() | {"label": run.label}, "outcome": "complete", "message": "", "parameters": 50,
        "share": 0.05,
        "stored_bytes": 400, "valid_loss": loss, "curve": [{"step": 0, "seconds": 0.0, "loss": 3.0},
        {"step": 3, "seconds": seconds, "loss": loss}], "best": {"step": 3, "loss": loss}, "steps": 3,
        "supervised_tokens": 90, "train": [], "rates": [0.1],
        "tests": {"test": {"loss": {"value": loss, "low": loss - 1, "high": loss + 2, "unit": "nats a token",
                                    "higher_is_better": False, "note": "n<b>"}}},
        "measured": {"training_seconds": seconds, "peak_bytes": peak, "speed": None},
    }  # fmt: skip
    return found | changes


@pytest.fixture
def made():
    task = comparing.task()
    plan = Plan(make_rows(["prefix", "full"], [4], task), (0, 1, 2), Budget(steps=16), (0.5, 1.0), prompted=False)
    results = {}
    base = next(plan.runs({}, FACTS))
    untrained = {"parameters": 0, "share": 0.0, "stored_bytes": 0, "curve": [], "best": None, "steps": None}
    nothing = {"training_seconds": None, "peak_bytes": None, "speed": None}
    results[base.key(FACTS)] = result(base, 4.0, **untrained, measured=nothing)
    for row in plan.rows:
        for trial in plan.trials(row):
            results[trial.key(FACTS)] = result(trial, 2.0 + trial.factor, tests={})
    for seed, loss in ((0, 1.0), (1, 1.5), (2, 2.6)):
        run = plan.final(plan.rows[0], seed, 0.5)
        results[run.key(FACTS)] = result(run, loss)
    for seed, loss in ((0, 1.2), (1, None)):
        run = plan.final(plan.rows[1], seed, 0.5)
        bad = {"outcome": "diverged", "message": "no", "tests": {}, "valid_loss": None, "best": None}
        results[run.key(FACTS)] = result(run, loss or 0.0, seconds=5.0, peak=15.0, **(bad if loss is None else {}))
    return task, plan, results


def test_means_spread_and_ratios(made):
    _, plan, results = made
    base, prefix, full = tabulate(plan, results, FACTS)
    assert [base["label"], prefix["label"], full["label"]] == ["base model", "prefix 4", "full"]
    loss = prefix["tests"]["test"]["loss"]
    assert loss["mean"] == pytest.approx(1.7) and loss["sd"] == pytest.approx(statistics.stdev([1.0, 1.5, 2.6]))
    assert (loss["low"], loss["high"]) == (pytest.approx(0.7), pytest.approx(3.7)) and loss["values"] == [1.0, 1.5, 2.6]
    assert prefix["training_seconds_ratio"] == prefix["peak_bytes_ratio"] == 1
    assert (
        full["training_seconds_ratio"] == 2.5 and full["peak_bytes_ratio"] == 1.5 and base["peak_bytes_ratio"] is None
    )
    assert (full["runs"], full["diverged"]) == (2, 1) and full["tests"]["test"]["loss"]["sd"] is None
    assert prefix["best_epoch"] == pytest.approx(3 * 4 / 9) and base["best_epoch"] is None
    few = {"best_step": {"mean": 12.0}, "examples": 6}
    assert best_epoch(few, FACTS) == 8
    assert prefix["factor"] == 0.5 and prefix["at_the_edge"] and len(prefix["search"]) == 2


def test_a_line_without_a_finished_run_is_left_out(made):
    _, plan, results = made
    last = plan.rows[1]
    left = {k: r for k, r in results.items() if r["run"]["label"] != last.label or r["run"]["kind"] == "rate"}
    assert [line["label"] for line in tabulate(plan, left, FACTS)] == ["base model", "prefix 4"]
    assert tabulate(plan, {}, FACTS) == []


def test_tables_say_what_the_lines_hold(made):
    _, plan, results = made
    lines = tabulate(plan, results, FACTS)
    head, base, prefix, full = quality(lines, "test")
    assert head[2:] == ["validation loss ↓", "loss ↓"] and [base[1], base[3]] == ["", "4.000 [3.000, 6.000]"]
    assert [prefix[1], prefix[3]] == ["50", "1.700 ± 0.819 [0.700, 3.700]"] and full[0] == "full (1 of 2 diverged)"
    assert quality(lines, "test", brief=True)[2][3] == "1.700 ± 0.819"
    table = cost(lines)
    assert [row[table[0].index("epochs to it")] for row in table[1:]] == ["", "1.33", "1.33"]
    assert table[3][table[0].index("× time")] == "2.50" and "writing speed" not in table[0]
    assert set(cost(lines, brief=True)[0]) < set(table[0])
    assert rates(lines)[1] == ["prefix 4", "0.01: 2.500; 0.02: 3.000", "0.01"]


@pytest.mark.parametrize(
    ("taken", "wider"),
    [((0.3, 1.0), "0.09,0.3,1,3"), ((3.0, 1.0), "0.3,1,3,9"), ((3.0, 0.3), "0.09,0.3,1,3,9"), ((1.0, 1.0), None)],
)
def test_rates_at_the_edge_are_named_with_a_wider_grid(taken, wider):
    lines = [
        {"label": f"line {i}", "factor": factor, "at_the_edge": factor != 1,
         "search": [{"factor": f} for f in (1.0, 0.3, 3.0)]}
        for i, factor in enumerate(taken)
    ]  # fmt: skip
    said = edge_note([{"label": "base model", "at_the_edge": False}, *lines])
    if wider is None:
        assert said == ""
    else:
        assert f"--rates {wider} " in said and all((line["label"] in said) == line["at_the_edge"] for line in lines)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_pages_escape_what_they_show(made, preset, tmp_path):
    task, plan, results = made
    record = {"preset": preset, "facts": FACTS, "about": ABOUT, "failed": ["<x>"], "missing_runs": 1, "runs": results}
    record["rows"] = tabulate(plan, results, FACTS)
    write_report(tmp_path, task, plan, record)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "a | b &lt;i&gt;" in page and "&lt;x&gt;" in page and "n&lt;b&gt;" in page and "<x>" not in page
    assert "1 runs are still to be done" in text and "--rates 0.25,0.5,1 " in text
    assert ("What the literature reports" in text) == bool(LITERATURE.get(preset))
    columns = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert columns
    if preset in ("methods", "placement"):
        assert "70.3" in text and "70.3" in page and "Another model" in text


@pytest.mark.parametrize(
    ("preset", "lengths", "wanted"),
    [("methods", [4], set()), ("initialisation", [4], set()), ("initialisation", [4, 8], {"length"}),
     ("length", [4, 8], {"length"}), ("low-data", [4], {"examples"})],
)  # fmt: skip
def test_what_varies_is_drawn_against(preset, lengths, wanted, tmp_path):
    task = comparing.task(train=comparing.RECORDS * 14, words="film")
    rows = preset_rows(preset, task, methods=["prefix", "lora:2"], lengths=lengths)
    plan = Plan(rows, (0,), Budget(steps=3), (1.0,), prompted=False)
    results = {run.key(FACTS): result(run, 2.0) for run in plan.runs({}, FACTS)}
    (tmp_path / "length.svg").write_text("of an earlier report")
    drawn = draw(tabulate(plan, results, FACTS), list(results.values()), tmp_path)
    assert set(drawn) - {"parameters", "steps", "curves"} == wanted
    assert all(path.read_bytes()[:4] in (b"\x89PNG", b"<?xm") for files in drawn.values() for path in files)
    assert {path for files in drawn.values() for path in files} == set(tmp_path.iterdir())


def test_a_level_far_away_is_told_and_flattens_nothing():
    def line(kind, label, loss):
        return {"kind": kind, "label": label, "tests": {"test": {"loss": {"mean": loss}}}}

    axes = Figure().subplots()
    axes.plot([1, 2], [3.0, 3.2])
    lines = [line("base", "base model", 6.18), line("prompted", "prompted", 3.3), line("final", "full", 2.9)]
    assert _levels(axes, lines, 1, ("test", "loss")) == ["base model 6.18"]
    drawn = {drawn.get_label(): drawn for drawn in axes.lines[1:]}
    assert set(drawn) == {"prompted", "full"} and drawn["full"].get_color() == "C1"
    assert axes.get_ylim()[1] < 3.5


def test_the_literature_has_as_many_numbers_as_names():
    for reported in LITERATURE.values():
        for found in reported:
            assert found.said or found.cells
            assert len({len(row) for row in found.cells}) <= 1
            assert all(float(cell) > 0 for row in found.cells[1:] for cell in row[1:])
