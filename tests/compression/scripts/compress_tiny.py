"""Compress a tiny prefix, a distillation among the plans; killed some times at any moment, and gone on with.

python compress_tiny.py OUT SEED
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_tokens import dataset, make

import foreword as fw
import zoo

ARGUMENTS = {"max_steps": 6, "save_steps": 2, "report_to": "none", "use_cpu": True, "seed": 3}


def compress(out):
    torch.set_num_threads(1)
    model, prefix = make(length=40)
    return fw.compress(
        model, zoo.tokenizer(), prefix, dataset(8, 1), dataset(6, 2), target_bytes=int(0.5 * prefix.stored_nbytes),
        methods=("prune", "distill"), out=out, resume=(out / "begun.json").exists(), arguments=ARGUMENTS,
        console=Console(quiet=True),
    )  # fmt: skip


def run(out, wait):
    """Compress in a child; kill it after some seconds. Returns its exit status as waitpid gives it."""
    child = os.fork()
    if child == 0:
        try:
            compress(out)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    began = time.monotonic()
    while wait is None or time.monotonic() - began < wait:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    began = time.monotonic()
    assert run(folder / "whole", None) == 0
    took = time.monotonic() - began
    kills = 0
    while kills < 5:
        wait = chance.uniform(0.1, 0.9) * took
        killed = os.WTERMSIG(run(folder / "killed", wait))
        print(round(wait, 3), killed, flush=True)
        kills += killed == signal.SIGKILL
        if (folder / "killed" / "foreword.json").exists():
            if kills:
                break
            shutil.rmtree(folder / "killed")  # sooner done than the first time: nothing was broken off
            took *= 0.7
    if not (folder / "killed" / "foreword.json").exists():
        sys.exit(os.waitstatus_to_exitcode(run(folder / "killed", None)))
