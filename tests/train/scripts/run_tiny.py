"""A run that is killed again and again: `run_tiny.py OUT SEED STRATEGY` trains in forks and prints how each ended.

One import for all of them; every child is a process of its own that is really killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import tiny
import torch
import transformers

import foreword as fw
from foreword.train.growth import Growth
from foreword.train.monitor import Monitor
from foreword.train.rollback import RollBack
from foreword.train.stages import LayerByLayer, Stage


class Slow(transformers.TrainerCallback):
    """Says which step is done, then dawdles, so that a kill may also fall between steps."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, bytes([state.global_step]))
        time.sleep(0.01)


MLP = {"reparam": "mlp", "hidden": 16, "dropout": 0.1}


def strategy(name):
    """The prefix, callbacks and arguments of one way to train."""
    if name == "growth":
        watched = {"eval_strategy": "steps", "eval_steps": 1, "valid": tiny.rows(4, seed=9)}
        return {**MLP, "length": 9}, [Growth(start=2, step=3, threshold=10.0, settle=3)], watched
    if name == "stages":
        stages = [Stage("last:1", 5), Stage("first:1", 4, learning_rate=0.01), Stage(None, 5)]
        return {"gate": "head", "dropout": 0.1}, [LayerByLayer(stages)], {}
    if name == "monitor":
        return MLP, [Monitor(every=1)], {}
    if name == "tasks":  # 20 rows, so that checkpoints fall into three epochs
        data = {task: tiny.rows(n, seed=i) for i, (task, n) in enumerate({"one": 12, "two": 6, "three": 2}.items())}
        config = {"tasks": tuple(data), "common": 2, "dropout": 0.1, "init": "orthogonal", "length": 4}
        mixture = fw.TaskMixture(data, sampling="temperature", temperature=2.0)
        watched = {"eval_strategy": "steps", "eval_steps": 4, "valid": mixture}
        return config, [], {"data": mixture, "orthogonality": 0.5, **watched}
    if name == "rollback":  # three steps in a row, as far from usual as it takes
        return MLP, [RollBack(every=2, times=9), Spikes((11, 12, 13))], {"explode_factor": 50.0}
    return MLP, [], {}


class Spikes(transformers.TrainerCallback):
    """Huge gradients at some steps."""

    def __init__(self, steps):
        self.steps, self.now = steps, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for parameter in model.foreword.parameters():
            parameter.register_hook(lambda grad: grad * 1e4 if self.now else None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1 in self.steps


def train(out, pipe, name):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config, callbacks, more = strategy(name)
    model, tuning = tiny.tuned(**config)
    arguments = {"save_steps": 1, "save_total_limit": 2, "max_steps": 14, **more}
    tiny.trainer(model, out, callbacks=[*callbacks, Slow(pipe)], **arguments).train(resume_from_checkpoint=True)
    tuning.save(out / "final")


def run(out, kill_at, wait, name, train):
    """Train in a child; kill it some time after a step. Returns its exit status as waitpid gives it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            train(out, write, name)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    while step := os.read(read, 1):
        if kill_at is not None and step[0] >= kill_at:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            break
    os.close(read)
    return os.waitpid(child, 0)[1]


def killed_again_and_again(train):
    """What a script of these does: `SCRIPT OUT SEED NAME`."""
    folder, chance, name = Path(sys.argv[1]), random.Random(int(sys.argv[2])), sys.argv[3]
    for at in (1, 3, 5, 7, 9, 11):
        moment = chance.uniform(0, 0.08)
        print(at, round(moment, 4), os.WTERMSIG(run(folder, at, moment, name, train)), flush=True)
    sys.exit(os.waitstatus_to_exitcode(run(folder, None, 0, name, train)))


if __name__ == "__main__":
    killed_again_and_again(train)
