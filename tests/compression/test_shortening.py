"""Fewer tokens by distillation: nearer to the long prefix than its best tokens, in a search, and after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_search import QUIET
from test_tokens import dataset, make, said
from transformers import TrainerCallback

import foreword as fw
import zoo
from foreword.compression import prune, search, shorten, token_shares

SCRIPTS = Path(__file__).parent / "scripts"
ARGUMENTS = {"max_steps": 30, "save_steps": 10, "report_to": "none", "use_cpu": True, "learning_rate": 0.05}


def apart(model, prefix, teacher):
    """KL(teacher || student) over the whole vocabulary, on ids that neither has seen."""
    ids = zoo.ids(4, 9, seed=7)
    theirs, ours = (said(model, p, input_ids=ids).log_softmax(-1) for p in (teacher, prefix))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_a_distilled_prefix_is_nearer_than_its_start(tmp_path):
    model, prefix = make(length=12)
    data = dataset(24, 1)
    start = prune(prefix, token_shares(model, zoo.tokenizer(), prefix, data), 4, uniform=True)
    done = shorten(model, zoo.tokenizer(), prefix, 4, data, tmp_path / "run", ARGUMENTS, console=QUIET)
    assert done.steps == 30 and not done.interrupted and done.prefix.longest == 4
    assert apart(model, done.prefix, prefix) < 0.7 * apart(model, start, prefix)
    assert not hasattr(model, "foreword")


def test_refusals(tmp_path):
    model, prefix = make(length=4)
    for own, tokens, message in (
        (prefix, 4, "has 4 at most already"),
        (prefix, 0, "1 or more"),
        (replace(prefix, memory={n: torch.zeros(4, 8, 8) for n in prefix.keys}), 2, "brings a memory"),
    ):
        with pytest.raises(fw.ConfigError, match=message):
            shorten(model, zoo.tokenizer(), own, tokens, dataset(), tmp_path / "run", ARGUMENTS, console=QUIET)
    assert not list(tmp_path.iterdir())


def compress(model, prefix, out, **more):
    share = {"target_bytes": int(0.5 * prefix.stored_nbytes), "console": QUIET}
    return fw.compress(
        model, zoo.tokenizer(), prefix, dataset(24, 1), dataset(6, 2), methods=("prune", "int8", "distill"), out=out,
        arguments=ARGUMENTS, **(share | more),
    )  # fmt: skip


def test_a_search_distils_where_it_is_asked_to(tmp_path):
    model, prefix = make(length=40)
    found = compress(model, prefix, tmp_path / "out")
    distilled = [c for c in found.candidates if c.plan.shorter == "distill"]
    assert len(distilled) == 1 and distilled[0].nbytes <= 0.5 * prefix.stored_nbytes
    short = [c for c in found.candidates if c.plan.shorter and c.plan.shorter != "distill" and c.small(found.limits)]
    assert distilled[0].plan.tokens == min(short, key=lambda c: c.loss).plan.tokens
    run = tmp_path / "out" / f"distilled-{distilled[0].plan.tokens}"
    assert json.loads((run / "finished.json").read_text()) == {"steps": 30}
    assert fw.Prefix.load(run).longest == distilled[0].plan.tokens
    if found.best == distilled[0]:
        assert fw.Prefix.load(tmp_path / "out").metadata.keys() == prefix.metadata.keys() | {"compression"}


def test_none_is_trained_where_a_quick_plan_is_good_enough(tmp_path):
    model, prefix = make(length=40)
    console = Console(record=True, quiet=False, file=(tmp_path / "said").open("w"))
    found = compress(model, prefix, tmp_path / "out", max_loss_increase=5.0, console=console)
    assert found.best is not None and not any(c.plan.shorter == "distill" for c in found.candidates)
    assert "none is distilled" in console.export_text()


class PressCtrlC(TrainerCallback):
    """After the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_training_is_told_and_gone_on_from(tmp_path, monkeypatch):
    model, prefix = make(length=40)
    whole = compress(model, prefix, tmp_path / "whole")
    real = search.shorten
    monkeypatch.setattr(search, "shorten", lambda *a, **k: real(*a, **k, callbacks=[PressCtrlC()]))
    stopped = compress(model, prefix, tmp_path / "out")
    assert stopped.interrupted and stopped.best is None and stopped.prefix is None
    assert not (tmp_path / "out" / "foreword.json").exists() and not hasattr(model, "foreword")
    monkeypatch.setattr(search, "shorten", real)
    rest = compress(model, prefix, tmp_path / "out", resume=True)
    assert not rest.interrupted and [c.loss for c in rest.candidates] == [c.loss for c in whole.candidates]
    assert fw.Prefix.load(tmp_path / "out") == fw.Prefix.load(tmp_path / "whole")


def test_without_a_target_one_length_after_another(tmp_path):
    model, prefix = make(length=12)
    limits = {"target_bytes": None, "max_loss_increase": 0.0}
    found = compress(model, prefix, tmp_path / "out", **limits)
    lengths = [c.plan.tokens for c in found.candidates if c.plan.shorter == "distill"]
    quick = [
        c for c in found.candidates if c.plan.shorter != "distill" and c.good(found.limits) and c.small(found.limits)
    ]
    assert not quick or not lengths
    assert lengths == [9, 6, 3][: len(lengths)] and (quick or lengths)


@pytest.mark.slow
def test_a_search_killed_five_times_ends_with_the_same_prefix(tmp_path):
    seed = time.time_ns()
    paths = [Path(fw.__file__).parents[1], Path(__file__).parents[1], Path(__file__).parent]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }  # fmt: skip
    command = [sys.executable, str(SCRIPTS / "compress_tiny.py"), str(tmp_path), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    told = f"seed {seed}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert done.returncode == 0 and "9" in done.stdout.split(), told
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert fw.Prefix.load(whole) == fw.Prefix.load(killed), told
    plans = [json.loads((p / "plans.json").read_text())["plans"] for p in (whole, killed)]
    same = [[{k: v for k, v in p.items() if k != "seconds"} for p in own] for own in plans]
    assert same[0] == same[1] and any(p["plan"].startswith("distill") for p in same[0]), told
