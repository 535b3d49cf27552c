"""A run that is killed again and again: `run_tiny.py OUT SEED` trains in forked processes, prints how each ended.

One import for all of them; every child is a process of its own that is really killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny
import torch
import transformers


class Slow(transformers.TrainerCallback):
    """Says which step is done, then dawdles, so that a kill may also fall between steps."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, bytes([state.global_step]))
        time.sleep(0.01)


def train(out, pipe):
    torch.set_num_threads(1)
    model, tuning = tiny.tuned(reparam="mlp", hidden=16, dropout=0.1)
    arguments = {"save_steps": 1, "save_total_limit": 2, "max_steps": 14}
    tiny.trainer(model, out, callbacks=[Slow(pipe)], **arguments).train(resume_from_checkpoint=True)
    tuning.bake().save(out / "final")


def run(out, kill_at, wait):
    """Train in a child; kill it some time after a step. Returns its exit status as waitpid gives it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            train(out, write)
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


if __name__ == "__main__":
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    for at in (1, 3, 5, 7, 9, 11):
        moment = chance.uniform(0, 0.08)
        print(at, round(moment, 4), os.WTERMSIG(run(folder, at, moment)), flush=True)
    sys.exit(os.waitstatus_to_exitcode(run(folder, None, 0)))
