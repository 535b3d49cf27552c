"""Several tasks on the command line: train, generate with one of them, measure what they do to each other."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword import cli


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "food.jsonl"
    rows = [{"question": s[10:30], "answer": s[30:], "label": "1"} for s in zoo.SENTENCES * 2]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def train(folder, data, other, out, *more):
    return [*map(str, (
        "train", "--model", folder, "--task", f"film={data}", "--task", f"food={other}", "--column",
        "food:input=question", "--column", "food:output=answer", "--out", out, "--steps", 4, "--batch-size", 4,
        "--length", 5, "--init", "random", *more,
    ))]  # fmt: skip


@pytest.fixture(scope="session")
def trained(folder, data, other, tmp_path_factory):
    """Prefixes of two tasks that `foreword train` made, and what it printed."""
    out = tmp_path_factory.mktemp("several") / "out"
    result = CliRunner().invoke(cli.app, train(
        folder, data, other, out, "--valid-task", f"film={data}", "--valid-task", f"food={other}", "--common", 2,
        "--sampling", "temperature:2", "--orthogonality", 0.1, "--eval-every", 2, "--json",
    ))  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout), result.stderr


def test_train_saves_a_prefix_for_each_task(trained):
    out, record, said = trained
    assert set(record) == {"out", "steps", "interrupted", "parameters", "tasks"} and record["steps"] == 4
    for task in ("film", "food"):
        prefix, told = fw.Prefix.load(out / task), record["tasks"][task]
        assert told["out"] == str(out / task) and told["bytes"] == prefix.nbytes
        assert told["eval_loss"] == prefix.metadata["metrics"]["eval_loss"]
        config = prefix.metadata["config"]
        assert config["tasks"] == ["film", "food"] and config["common"] == 2
    assert record["tasks"]["film"]["eval_loss"] != record["tasks"]["food"]["eval_loss"]
    assert record["parameters"] == (2 + 2 * 3) * 2 * 2 * 16
    assert "data: film: 9 examples" in said and "data: 2 tasks: film 9 (" in said and "food 6 (" in said


def test_generate_takes_one_of_them(run, folder, trained):
    written = {}
    for task in ("film", "food"):
        code, out, err = run(
            "generate", "--model", folder, "--prefix", trained[0] / task, "--prompt", "The film", "--json"
        )
        assert code == 0, err
        written[task] = json.loads(out)[0]["texts"]
    assert written["film"] != written["food"]


def test_it_prints_a_line_a_task_and_resumes(run, folder, data, other, tmp_path):
    given = train(folder, data, other, tmp_path / "o", "--save-every", 2, "--reparam", "mlp", "--hidden", 8)
    code, out, err = run(*given)
    assert code == 0, err
    assert [line.split(":")[0] for line in out.splitlines()] == [str(tmp_path / "o" / t) for t in ("film", "food")]
    code, out, err = run(*given, "--resume", "--steps", 6, "--json")
    assert code == 0 and json.loads(out)["steps"] == 6, err


@pytest.mark.parametrize("how", [
    ("--init", "orthogonal"), ("--share-keys", "--sampling", "uniform"), ("--valid-share", 0.3, "--eval-every", 2),
    ("--task-init", "film=The film is a lovely old confection", "--common", 1, "--length", 4),
    ("--method", "prefix", "--method", "memory"),
    ("--grow-from", 2, "--valid-share", 0.3, "--eval-every", 1, "--steps", 24),
])  # fmt: skip
def test_train_takes_the_configuration(run, folder, data, other, tmp_path, how):
    code, out, err = run(*train(folder, data, other, tmp_path / "o", *how, "--json"))
    assert code == 0, err
    record = json.loads(out)
    assert ("eval_loss" in record["tasks"]["film"]) == ("--valid-share" in how)
    prefixes = [fw.Prefix.load(tmp_path / "o" / task) for task in ("film", "food")]
    if "--share-keys" in how:
        assert all((prefixes[0].keys[s] == prefixes[1].keys[s]).all() for s in prefixes[0].keys)
    if "--task-init" in how:
        assert prefixes[0].metadata["config"]["init"] == {"film": "The film is a lovely old confection", "*": "random"}


def test_show_batch_names_the_rows_tasks(run, folder, data, other, tmp_path):
    given = train(folder, data, other, tmp_path / "o")
    code, shown, err = run(*given, "--show-batch", "--batch-size", 8)
    assert code == 0, err
    named = shown.splitlines()[0].removeprefix("tasks of the rows: ").split(", ")
    assert len(named) == 8 and set(named) == {"film", "food"} and shown.count("⟦") == 8
    assert run(*given, "--show-memory")[0] == 0 and not (tmp_path / "o").exists()


def test_rows_are_chosen_task_by_task(run, folder, data, other, tmp_path):
    given = train(folder, data, other, tmp_path / "o", "--show-batch")
    assert "film: 4 examples" in (said := run(*given, "--where", "film:label=1")[2]) and "food: 6 examples" in said
    assert "film: 4 examples" in (said := run(*given, "--where", "label=1")[2]) and "food: 6 examples" in said
    assert "film: 2 examples" in run(*given, "--limit", 2)[2]


# ---------------------------------------------------------------- interference


def measure(folder, data, other, *more):
    return ["interference", "--model", folder, "--task", f"film={data}", "--task", f"food={other}",
            "--column", "food:input=question", "--column", "food:output=answer", *more]  # fmt: skip


def test_interference_measures_and_draws(run, folder, data, other, trained, tmp_path):
    out, record, _ = trained
    given = measure(folder, data, other)
    one = [*given, "--prefix", f"film={out / 'film'}", "--prefix", f"food={out / 'food'}"]
    code, printed, err = run(*one, "--json", "--plot", tmp_path / "heat.svg")
    assert code == 0, err
    found = json.loads(printed)
    assert found["tasks"] == found["prefixes"] == ["film", "food"] and found["examples"] == [9, 6]
    for i, task in enumerate(("film", "food")):  # the validation examples of the run
        assert found["losses"][i][i] == pytest.approx(record["tasks"][task]["eval_loss"], abs=0.05)
    assert (tmp_path / "heat.svg").read_text().startswith("<?xml")
    assert json.loads(run(*given, "--prefix", out, "--json")[1]) == found  # the folder of the run
    only = json.loads(run(*given, "--prefix", out / "food", "--json", "--batch-size", 3)[1])
    assert only["prefixes"] == ["food"] and only["losses"][0][0] == pytest.approx(found["losses"][0][1], abs=1e-5)
    code, printed, err = run(*one, "--plot", tmp_path / "heat.png")
    assert code == 0 and "film" in printed and f"{found['losses'][0][0]:.3f}" in printed
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG") and "heat.png" in printed


# ---------------------------------------------------------------- refusals


def refusals(folder, data, other, tmp, trained):
    good = train(folder, data, other, tmp / "o")
    matrix, valid, out = measure(folder, data, other), (*good, "--valid-task", f"film={data}"), trained[0]
    empty = tmp / "empty.jsonl"
    empty.write_text("")
    return {
        "twice": ((*good, "--task", f"film={other}"), "--task names 'film' twice; expected different names"),
        "no file": ((*good, "--task", "news"), "--task 'news' is not of the form KEY=VALUE"),
        "bad name": ((*good, "--task", f"../news={data}"), "can't name a folder"),
        "no examples": ((*good, "--task", f"news={empty}"), "the file is empty"),
        "no such file": ((*good, "--task", f"news={tmp / 'news.jsonl'}"), "news.jsonl"),
        "data too": ((*good, "--data", data), "--data is for one prefix, and --task for several; use --task alone"),
        "valid too": ((*good, "--valid", data), "use --valid-task NAME=FILE"),
        "start too": ((*good, "--start", out / "film"), "--start is for one prefix"),
        "neither": (("train", "--model", folder, "--out", tmp / "o"), "--data names the examples of one prefix"),
        "alone": (("train", "--model", folder, "--data", data, "--out", tmp, "--common", 2), "are for several tasks"),
        "unknown valid": ((*good, "--valid-task", f"news={data}"), "--valid-task names 'news', and --task does not"),
        "missing valid": (valid, "--valid-task is missing for 'food'"),
        "both valids": ((*valid, "--valid-task", f"food={data}", "--valid-share", 0.1), "give one"),
        "unknown init": ((*good, "--task-init", "news=A text"), "--task-init names 'news', and --task does not"),
        "bad sampling": ((*good, "--sampling", "temperature:x"), "expected size, uniform or temperature:2"),
        "cold": ((*good, "--sampling", "temperature:0.5"), "expected 1 (by size) or more"),
        "no prefix": ((*good, "--method", "lora"), "add --method prefix"),
        "one task": ((*good[:5], *good[11:], "--orthogonality", 1), "keeps the prefixes of several tasks apart"),
        "one orthogonal": ((*good[:5], *good[11:], "--init", "orthogonal"), "keeps tasks apart, and there are 1"),
        "no room": ((*good, "--init", "orthogonal", "--length", 9), "are 18 directions, and model.layers.0.self"),
        "too common": ((*good, "--common", 5), "leaves the tasks none of their own"),
        "taken": (train(folder, data, other, out), "holds a prefix already"),
        "no folder": ((*matrix, "--prefix", tmp / "none"), "expected NAME=FOLDER, or a folder that holds a prefix"),
        "prefix twice": ((*matrix, "--prefix", out, "--prefix", out / "film"), "--prefix names 'film' twice"),
        "task twice": ((*matrix, "--task", f"film={data}", "--prefix", out), "--task names 'film' twice"),
    }  # fmt: skip


NAMES = (
    "twice", "no file", "bad name", "no examples", "no such file", "data too", "valid too", "start too", "neither",
    "alone", "unknown valid", "missing valid", "both valids", "unknown init", "bad sampling", "cold", "no prefix",
    "one task", "one orthogonal", "no room", "too common", "taken", "no folder", "prefix twice", "task twice",
)  # fmt: skip


@pytest.fixture(scope="module")
def refused(folder, data, other, trained, tmp_path_factory):
    found = refusals(folder, data, other, tmp_path_factory.mktemp("refused"), trained)
    assert set(found) == set(NAMES)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_one_plain_line(name, refused, run):
    arguments, said = refused[name]
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("data: ")]
    assert code == 1, (code, err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], err
    assert "Traceback" not in out + err
