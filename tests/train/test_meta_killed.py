"""A meta-training that is killed or stopped at any moment goes on exactly."""

from __future__ import annotations

import json
import signal
import time

import pytest
from killing import start, whole_and_killed
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword.cli import app
from foreword.train._meta_state import STATE, read_record


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_a_run_killed_six_times_ends_to_the_bit(algorithm, tmp_path):
    whole, out, told = whole_and_killed("meta_tiny", algorithm, tmp_path)
    assert fw.Prefix.load(out) == fw.Prefix.load(whole), told
    assert (out / STATE).read_bytes() == (whole / STATE).read_bytes(), told
    assert len(read_record(out)["history"]) == 14, told


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_and_the_run_goes_on(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    for name in "ab":
        lines = [json.dumps({"text": s[i:]}) + "\n" for s in zoo.SENTENCES for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def command(out, *more):
        tasks = [t for name in "ab" for t in ("--task", f"{name}={tmp_path / name}.jsonl")]
        given = ["meta", "--model", tmp_path / "model", *tasks, "--out", out, "--length", 4, "--init", "random",
                 "--inner-steps", 2, "--batch-size", 2, "--meta-steps", 60, "--save-every", 1000, "--json",
                 *more]  # fmt: skip
        return list(map(str, given))

    out = tmp_path / "stopped"
    process = start("-m", "foreword", *command(out))
    deadline = time.time() + 120
    while not (out / STATE).exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    assert "Traceback" not in err and "stopping after this step" in err and "interrupted; go on with --resume" in err
    record = json.loads(printed)
    assert record["interrupted"] and 0 < record["steps"] < 60
    assert read_record(out)["step"] == record["steps"] and fw.Prefix.load(out).longest == 4

    results = [CliRunner().invoke(app, command(*given)) for given in ((out, "--resume"), (tmp_path / "whole",))]
    for result in results:
        assert result.exit_code == 0, result.output
        record = json.loads(result.stdout)
        assert record["steps"] == 60 and not record["interrupted"]
    assert fw.Prefix.load(out) == fw.Prefix.load(tmp_path / "whole")
