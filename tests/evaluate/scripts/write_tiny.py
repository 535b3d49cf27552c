"""Writing that is killed again and again: `write_tiny.py OUT SEED` goes on in forks and prints what each did.

One import for all of them; every child is a process of its own that is really killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import zoo
from foreword.evaluate.examples import Task
from foreword.evaluate.predict import Batch, Decoding
from foreword.evaluate.run import Folder, write_all

TASKS = [Task(f"{s[:k]}", (s[k:],), f"line {i}") for i, (s, k) in enumerate((s, k) for s in zoo.SENTENCES for k in
         range(4, 40, 4))]  # fmt: skip
HOW = Decoding(sample=True, temperature=1.2, max_new_tokens=12, seed=4)
RUN = {"examples": len(TASKS), "decoding": HOW.to_json()}


class Telling(Folder):
    """Says which batch is on the disk, then dawdles, so that a kill may also fall between batches."""

    def keep(self, done):
        add = super().keep(done)

        def told(batch: Batch) -> None:
            add(batch)
            os.write(int(os.environ["PIPE"]), bytes([batch.number]))
            time.sleep(0.01)

        return told


def write(out: Path) -> list[str]:
    torch.set_num_threads(1)
    folder = Telling(out)
    folder.begin(RUN, resume=(out / "run.json").exists())
    there = folder.written(TASKS)
    return there or write_all(zoo.build("llama").eval(), zoo.tokenizer(), TASKS, HOW, batch_size=2, folder=folder)


def child(out: Path, kill_after: int | None, wait: float) -> tuple[int, list[int]]:
    """Write in a child; kill it some time after so many batches. Returns its status and the batches that it wrote."""
    read, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.environ["PIPE"] = str(pipe)
            write(out)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(pipe)
    written: list[int] = []
    while told := os.read(read, 1):
        written.append(told[0])
        if kill_after is not None and len(written) == kill_after:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
    os.close(read)
    return os.waitpid(pid, 0)[1], written


if __name__ == "__main__":
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    for after in (1, 2, 1, 3):
        status, written = child(folder, after, chance.uniform(0, 0.03))
        print("killed", os.WTERMSIG(status), *written, flush=True)
    status, written = child(folder, None, 0)
    print("ended", os.waitstatus_to_exitcode(status), *written, flush=True)
