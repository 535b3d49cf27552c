"""Runs that are killed or stopped at any moment go on exactly."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
import tiny
from killing import SCRIPTS, start, whole_and_killed
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword.cli import app
from foreword.train.monitor import Monitor
from foreword.train.trainer import last_checkpoint


def same(a, b):
    """Equal numbers at every site."""
    return a.keys.keys() == b.keys.keys() and all(
        (x[s] == y[s]).all() for x, y in ((a.keys, b.keys), (a.values, b.values)) for s in x
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["plain", "growth", "stages", "rollback", "monitor", "tasks"])
def test_a_run_killed_six_times_ends_with_the_same_prefix(strategy, tmp_path):
    whole, out, told = whole_and_killed("run_tiny", strategy, tmp_path)
    for task in ("one", "two", "three") if strategy == "tasks" else ("",):
        assert fw.Prefix.load(out / "final" / task) == fw.Prefix.load(whole / "final" / task), told
    logs = [json.loads((p / "checkpoint-14" / "trainer_state.json").read_text())["log_history"]
            for p in (whole, out)]  # fmt: skip
    first, second = ([(e["step"], e["loss"], e.get("orthogonality")) for e in log if "loss" in e] for log in logs)
    assert first == second and len(first) == 14, told
    if strategy == "monitor":
        seen = [(p / "monitor.jsonl").read_text() for p in (whole, out)]
        assert seen[0] == seen[1] and len(seen[0].splitlines()) == 14, told
    for event, least in (("prefix_length", 2), ("rolled_back", 3)):
        happened = [[e for e in log if event in e] for log in logs]
        expected = least if event == {"growth": "prefix_length", "rollback": "rolled_back"}.get(strategy) else 0
        assert happened[0] == happened[1] and len(happened[0]) >= expected, told


def test_a_run_killed_after_its_last_checkpoint_is_at_its_end(tmp_path):
    def trained(resume):  # six steps in the middle of a second epoch, and a learning rate that isn't zero at the end
        model, tuning = tiny.tuned()
        made = tiny.trainer(model, tmp_path, callbacks=[Monitor(every=1)], lr_scheduler_type="constant")
        made.train(resume_from_checkpoint=resume)
        return tuning.bake(), made.state.global_step, (tmp_path / "monitor.jsonl").read_text()

    whole = trained(resume=None)
    assert whole[1] == tiny.STEPS == len(whole[2].splitlines())
    assert trained(resume=True) == whole


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": s}) + "\n" for s in zoo.SENTENCES * 3))

    def command(out, *more):
        given = ["train", "--model", tmp_path / "model", "--data", data, "--out", out, "--length", 4, "--init",
                 "random", "--batch-size", 2, "--save-every", 1000, "--steps", 150, "--json", *more]  # fmt: skip
        return list(map(str, given))

    out = tmp_path / "stopped"
    process = start("-m", "foreword", *command(out))
    deadline = time.time() + 120
    while not (out / "runs").exists() and time.time() < deadline and process.poll() is None:  # made as training begins
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    assert "Traceback" not in err and "stopping after this step" in err and "interrupted; go on with --resume" in err
    record = json.loads(printed)
    assert record["interrupted"] and 0 < record["steps"] < 150
    assert last_checkpoint(out) == out / f"checkpoint-{record['steps']}"

    results = [CliRunner().invoke(app, command(*given)) for given in ((out, "--resume"), (tmp_path / "whole",))]
    for result in results:
        assert result.exit_code == 0, result.output
        record = json.loads(result.stdout)
        assert record["steps"] == 150 and not record["interrupted"]
    assert same(fw.Prefix.load(out), fw.Prefix.load(tmp_path / "whole"))


@pytest.mark.slow
def test_a_distillation_killed_in_every_stage_ends_with_the_same_prefix(tmp_path):
    sys.path.insert(0, str(SCRIPTS))
    try:
        import distill_tiny
    finally:
        sys.path.remove(str(SCRIPTS))
    status, _ = distill_tiny.run(tmp_path / "whole")
    assert os.waitstatus_to_exitcode(status) == 0
    out, seed = tmp_path / "killed", time.time_ns()
    process = start(SCRIPTS / "distill_tiny.py", out, seed)
    printed, err = process.communicate(timeout=400)
    told = f"seed {seed}\n{printed}\n{err[-3000:]}"
    assert process.returncode == 0, told
    killed = [line.split()[0] for line in printed.splitlines() if line.endswith(f" {signal.SIGKILL:d}")]
    assert set(killed) == {"questions", "teacher", "training"} and len(killed) == 7, told
    assert fw.Prefix.load(out) == fw.Prefix.load(tmp_path / "whole"), told
    for name in ("questions.jsonl", "teacher/teacher.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), told
    assert not list((out / "teacher").rglob(".*")), told
