"""`foreword tune` as a command: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import foreword as fw
from foreword import cli
from foreword.methods import LEARNING_RATES

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fw.__file__).parents[1])}


def test_a_share_of_the_data_is_held_out(run, folder, data, tmp_path):
    given = ("train", "--model", folder, "--data", data, "--length", 4, "--init", "random", "--steps", 2, "--json")
    code, out, err = run(*given, "--valid-share", 0.34, "--out", tmp_path / "p")
    assert code == 0 and "data: 6 examples" in err and json.loads(out)["eval_loss"] > 0
    for share, said in ((0.01, "leaves 0 for validation and 9"), (1.5, "above 0 and below 1"), (0.99, "and 0 for")):
        code, _, err = run(*given, "--valid-share", share, "--out", tmp_path / "q")
        assert code == 1 and said in err
    code, _, err = run(*given, "--valid-share", 0.2, "--valid", data, "--out", tmp_path / "q")
    assert code == 1 and "give one" in err and not (tmp_path / "q").exists()


SMALL = ("--lengths", "2,4", "--inits", "random", "--hidden", 8, "--rank", 2, "--steps", 5, "--batch-size", 4)


@pytest.fixture(scope="module")
def searched(folder, data, tmp_path_factory):
    """A search of four trials that the command made, and what it printed as JSON."""
    out = tmp_path_factory.mktemp("tuned") / "search"
    given = ["tune", "--model", folder, "--data", data, "--valid", data, "--out", out, "--budget", 4, *SMALL, "--json"]
    result = CliRunner().invoke(cli.app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout), given


def test_the_result_is_one_json_value(searched):
    out, record, _ = searched
    assert [t["number"] for t in record["trials"]] == [0, 1, 2, 3] and record["trials"][0]["default"]
    default = record["trials"][0]["config"]
    assert (default["length"], default["init"], default["reparam"], default["learning_rate"]) == (
        20,
        None,
        "direct",
        2e-2,
    )
    best = record["trials"][record["best"]]
    assert record["loss"] == best["loss"] and record["config"] == best["config"] and not record["interrupted"]
    assert fw.PrefixConfig(**json.loads((out / "best.json").read_text())) == fw.PrefixConfig(**record["config"])
    assert json.loads((out / "trials.json").read_text())["best"] == record["best"] and (out / "tune.png").is_file()
    assert (record["clear"] is None) == (record["best"] == 0) and record["verdict"]


def test_the_command_for_the_best_trains_what_was_searched(searched, run, tmp_path):
    """The validation loss of the printed command is the trial's."""
    _, record, _ = searched
    command = shlex.split(record["command"])
    assert command[:2] == ["foreword", "train"]
    command[command.index("--out") + 1] = str(tmp_path / "best")
    code, out, err = run(*command[1:], "--json")
    assert code == 0, err
    assert json.loads(out)["eval_loss"] == pytest.approx(record["loss"], abs=2e-4)


def test_the_table_names_every_trial_and_resuming_repeats_none(searched, run):
    out, record, given = searched
    journal = (out / "study.journal").read_bytes()
    code, shown, err = run(*given[:-1], "--resume")
    assert code == 0, err
    assert (out / "study.journal").read_bytes() == journal
    for word in ("trials", "default", "best", "direct", record["verdict"][:20], "foreword train --model"):
        assert word in shown, word
    assert shown.count("complete") + shown.count("pruned") == 4


def test_options_reach_the_space_and_the_configuration(run, folder, data, tmp_path):
    text = "The film is a lovely, old confection"
    code, out, err = run(
        "tune", "--model", folder, "--data", data, "--valid-share", 0.34, "--out", tmp_path / "a", "--budget", 3,
        "--lengths", 3, "--learning-rates", "1e-3:1e-2", "--init", text, "--reparams", "low-rank", "--rank", 2,
        "--steps", 1, "--freeze-first", "--sites", "last:1", "--gate", "head", "--dropout", 0.1, "--no-prune", "--json",
        "--seed", 3,
    )  # fmt: skip
    assert code == 0 and "data: 6 examples" in err, err
    record = json.loads(out)
    for trial in record["trials"][1:]:
        config = trial["config"]
        assert (config["length"], config["init"], config["reparam"], config["rank"]) == (3, text, "low-rank", 2)
        assert (
            config["freeze_first"] and config["sites"] == "last:1" and config["gate"] == "head" and config["seed"] == 3
        )
        assert 1e-3 <= config["learning_rate"] <= 1e-2
    assert "--valid-share 0.34" in record["command"] and "--freeze-first" in record["command"]


def test_bad_searches_are_one_plain_line(run, folder, data, searched, tmp_path):
    given = ("tune", "--model", folder, "--data", data, "--out", tmp_path / "o")
    judged = (*given, "--valid", data)
    for wrong, said in (
        (given, "give --valid, or --valid-share"),
        ((*judged, "--valid-share", 0.2), "give one"),
        ((*judged, "--budget", 0), "a budget of 0 trials; expected 1 or more"),
        ((*judged, "--budget", "soon"), "'soon' is neither"),
        ((*judged, "--budget", "0.01s"), "too small: a step takes"),
        ((*judged, "--lengths", "5,ten"), "--lengths '5,ten'; expected whole numbers"),
        ((*judged, "--lengths", "0"), "length of 0"),
        ((*judged, "--learning-rates", "0.1"), "expected lowest:highest"),
        ((*judged, "--learning-rates", "0.1:0.01"), "lowest <= highest"),
        ((*judged, "--reparams", "mpl"), "'mpl'; expected some of direct, mlp, low-rank"),
        ((*judged, "--inits", "random,"), "empty text"),
        ((*judged, "--inits", "The film", "--lengths", 30), "no point of the search space"),
        ((*judged, "--freeze-first", "--lengths", 1), "nothing to train"),
        ((*judged, "--gate", "zero", "--sites", "nothing.*"), "nothing.*"),
        ((*judged, "--resume"), "holds no search"),
        ((*judged[:6], searched[0], "--valid", data), "lengths was"),
    ):
        arguments = wrong if searched[0] not in wrong else (*wrong[:5], "--out", searched[0], *wrong[7:], "--resume")
        code, out, err = run(*arguments)
        lines = [x for x in err.splitlines() if x.strip() and not x.startswith(("data: ", "left out: "))]
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], (wrong, err)
        assert "Traceback" not in out + err and not (tmp_path / "o").exists()
    code, _, err = run(*searched[2][:-1])
    assert code == 1 and "holds a search already; go on with it (--resume)" in err


def test_a_search_where_everything_diverges_says_so(run, folder, data, tmp_path, monkeypatch):
    given = ("tune", "--model", folder, "--data", data, "--valid", data, "--out", tmp_path / "a", "--budget", 2)
    monkeypatch.setitem(LEARNING_RATES, "direct", 1e32)
    code, out, err = run(*given, "--lengths", 20, "--inits", "default", "--reparams", "direct", "--steps", 4)
    assert code == 1 and "every trial diverged" in err and out.count("diverged") == 2
    assert "no trial was completed" in out and not (tmp_path / "a" / "best.json").exists()


def test_help_of_tune_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['foreword', 'tune', '--help']\n"
        "from foreword.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'optuna', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--learning-rates" in done.stdout, done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done(folder, data, tmp_path):
    out = tmp_path / "stopped"
    given = ["tune", "--model", folder, "--data", data, "--valid", data, "--out", out, *SMALL[:-4], "--steps", 40,
             "--budget", 3, "--json"]  # fmt: skip
    command = [sys.executable, "-m", "foreword", *map(str, given)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, trials = time.time() + 120, out / "trials.json"
    while not trials.exists() and time.time() < deadline and process.poll() is None:  # written after the first trial
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted; go on with --resume" in err, err
    record = json.loads(printed)
    assert record["interrupted"] and record["trials"][0]["outcome"] == "complete" and record["best"] is not None
    assert len(record["trials"]) < 4 and record["trials"][-1]["outcome"] in ("stopped", "complete", "pruned")
    assert json.loads(trials.read_text())["trials"] == record["trials"]
    result = CliRunner().invoke(cli.app, [*map(str, given), "--resume"])
    assert result.exit_code == 0, result.output
    ended = [t["outcome"] for t in json.loads(result.stdout)["trials"]]
    assert len([e for e in ended if e != "stopped"]) == 3
