"""`foreword compare` as a command: what it prints, what it leaves, how it refuses and stops."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calling import call
from rich.console import Console
from typer.testing import CliRunner

import foreword as fw
from foreword import cli
from foreword.compare import METHODS, PRESETS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fw.__file__).parents[1])}


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, "compare", *arguments)


@pytest.fixture(scope="module")
def told(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "films.yaml"
    path.write_text(
        f"name: films\ntrain: {data}\nvalid: {data}\ntest: {data}\nmetrics: [chrf]\nmax_length: 40\n"
        "generation: {max_new_tokens: 5}\ninit: The film is a lovely old confection and the acting is good.\n"
    )
    return path


SMALL = ("--methods", "prefix,full", "--lengths", 3, "--rates", 1, "--batch-size", 4, "--looks", 2, "--intervals", 20,
         "--no-speed", "--valid-limit", 3, "--test-limit", 3)  # fmt: skip


@pytest.fixture(scope="module")
def compared(folder, told, tmp_path_factory):
    """A comparison that the command made, what it printed as JSON, and its arguments."""
    out = tmp_path_factory.mktemp("compare") / "out"
    given = ["compare", "--model", folder, "--task", told, *SMALL, "--budget", 3, "--seeds", 1, "--out", out]
    result = CliRunner().invoke(cli.app, [*map(str, given), "--json"])
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout), given[1:]


def test_the_result_is_one_json_value(compared):
    out, record, _ = compared
    assert [line["label"] for line in record["rows"]] == ["base model", "prompted", "prefix 3", "full"]
    assert record == json.loads((out / "results.json").read_text()) and record["missing_runs"] == 0
    assert record["facts"]["budget"] == {"steps": 3}
    assert all(line["tests"]["test"]["chrf"]["mean"] is not None for line in record["rows"])


def test_the_tables_and_more_seeds(compared, run):
    out, record, given = compared
    before = {p.name for p in (out / "runs").iterdir()}
    code, shown, err = run(*given, "--resume", "--seeds", 2)
    assert code == 0, err
    for word in ("base model", "prompted", "prefix 3", "full", "chrf", "written:", "±"):
        assert word in shown, word
    assert "prefix 3, seed 1" in err and "prefix 3, seed 0" not in err
    assert len({p.name for p in (out / "runs").iterdir()} - before) == 2
    assert {k: v for k, v in json.loads((out / "results.json").read_text())["runs"].items() if k in before} == record[
        "runs"
    ]


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_a_wide_table_stands_in_parts_of_whole_cells(width):
    from foreword.cli._compare_shown import _print_table

    heads = ["", "parameters", "validation loss ↓", "slot-hallucinated ↓ %", "bleu ↑"]
    cells = [heads, ["base model", "", "2.602", "0.00", "0.10"], ["every second", "115,200", "1.325", "10.42", "55.68"]]
    console = Console(width=width, file=io.StringIO())
    _print_table(console, cells, "test")
    lines = console.file.getvalue().split("\n")
    assert max(map(len, lines)) <= max(width, 36)  # of the least table: the names and the widest column
    rows = [[c.strip() for c in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    for name, *numbers in cells[1:]:
        assert [n for row in rows if row[0] == name for n in row[1:]] == numbers
    assert len(rows) == 2 * {30: 4, 50: 2, 80: 1, 200: 1}[width]


def test_other_conditions_are_refused(compared, run):
    _, _, given = compared
    code, _, err = run(*given)
    assert code == 1 and "holds a comparison already" in err and "--resume" in err
    code, _, err = run(*given, "--resume", "--budget", 4)
    assert code == 1 and "budget.steps is 3 there and 4 here" in err


def test_a_dry_run_writes_nothing(folder, told, run, tmp_path):
    code, out, err = run("--model", folder, "--task", told, *SMALL, "--budget", 30, "--seeds", 2, "--dry-run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["runs"] == 2 + 2 * 2 == sum(line["runs"] for line in found["lines"])
    lines = {line["label"]: line for line in found["lines"]}
    for label in ("prefix 3", "full"):
        step = lines[label]["seconds_a_step"]
        assert step > 0 and lines[label]["training_seconds"] == pytest.approx(2 * 30 * step)
    assert found["seconds"] == pytest.approx(sum(line["seconds"] for line in found["lines"]))
    assert found["seconds"] > found["training_seconds"]
    assert not list(tmp_path.iterdir())


def test_what_there_is(run):
    code, out, _ = run("--list", "--json")
    assert code == 0 and set(json.loads(out)["methods"]) == set(METHODS)
    code, out, _ = run("--list")
    assert code == 0 and all(name in out for name in (*METHODS, *PRESETS))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "give --model"),
        (("--model", "m"), "--out"),
        (("--model", "m", "--out", "o", "--budget", "soon"), "neither a number of steps"),
        (("--model", "m", "--out", "o", "--rates", "a"), "--rates 'a'"),
        (("--model", "m", "--out", "o", "--methods", "prefiks"), "did you mean prefix"),
        (("--model", "m", "--out", "o", "--lengths", "a"), "--lengths 'a'"),
        (("--model", "m", "--out", "o", "--task", "revews"), "did you mean reviews"),
        (("--model", "m", "--out", "o", "--preset", "lengths"), "did you mean length"),
        (("--model", "m", "--out", "o", "--task", "e2e"), "--data-dir"),
        (("--model", "m", "--out", "o", "--without", "food"), "give --preset extrapolation"),
        (("--model", "m", "--out", "o", "--metrics", "blue"), "did you mean bleu"),
        (("--model", "m", "--out", "o", "--budget", "10"), "--rates 1"),
        (("--model", "m", "--out", "o", "--resume"), "holds no comparison"),
        (("--model", "m", "--out", "o", "--keep", "first"), "keep='first'; expected 'last', or 'best'"),
    ],
)
def test_bad_options_say_what_to_do(run, given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*given)
    assert code == 1 and said in " ".join(err.split()) and not (tmp_path / "o").exists()


def test_help_waits_for_no_library():
    code = (
        "import sys; from typer.testing import CliRunner; from foreword.cli import app\n"
        "assert CliRunner().invoke(app, ['compare', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'yaml', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_ctrl_c_is_clean_and_the_comparison_goes_on(folder, told, tmp_path):
    out = tmp_path / "out"
    given = ["compare", "--model", folder, "--task", told, *SMALL, "--budget", 4, "--seeds", 3, "--out", out]
    command = [sys.executable, "-m", "foreword", *map(str, given)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
    deadline = time.time() + 120
    while len(list((out / "runs").glob("*"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-3000:]
    assert "Traceback" not in err and "go on with --resume" in err
    assert not list(out.glob(".work-*")) and "still to be done" in (out / "report.md").read_text()
    finished = {p.name for p in (out / "runs").iterdir()}
    done = subprocess.run(
        [*command, "--resume", "--json"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    assert record["missing_runs"] == 0 and finished < set(record["runs"]) and len(record["runs"]) == 8


def test_extrapolation_over_a_task_of_ones_own_asks_for_the_slot(run, told, tmp_path):
    code, _, err = run("--model", "m", "--out", tmp_path / "o", "--preset", "extrapolation", "--task", told)
    assert code == 1 and "give --without SLOT" in " ".join(err.split()) and "area" not in err
