"""A distillation that is killed again and again: `distill_tiny.py OUT SEED`; each child is really killed.

It makes questions, asks the teacher, and trains; after every batch it says of which stage, then dawdles. The kills are
aimed by stage, so that each is met on any machine, and come a random moment after the batch.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import tiny  # noqa: F401  (no network, one thread)
import torch
import transformers
from rich.console import Console

import foreword as fw
import zoo
from foreword.data import encode
from foreword.train import _teacher
from foreword.train.distill import begun, distill
from foreword.train.progress import Counting
from foreword.train.questions import examples_of
from foreword.train.self_study import Writing, self_study

TEXT = "\n\n".join(zoo.SENTENCES)
ARGUMENTS = {"max_steps": 14, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 4, "seed": 5,
             "logging_steps": 1, "use_cpu": True, "report_to": "none"}  # fmt: skip


STAGES = {b"q": "questions", b"t": "teacher", b"x": "training"}


class Slow(transformers.TrainerCallback):
    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        say(self.pipe, b"x")


def say(pipe, stage):
    os.write(pipe, stage)
    time.sleep(0.02)


def work(out, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    advance = Counting.advance

    def advanced(self, count):
        advance(self, count)
        label = self.bar.tasks[0].description
        say(pipe, b"q" if label == "questions" else b"t")

    Counting.advance = advanced
    _teacher.SHARD = 4
    try:
        model, tokenizer, console = zoo.build("llama"), zoo.tokenizer(), Console(file=io.StringIO())
        path, how = out / "questions.jsonl", Writing(rows=4, chunk=24, question=24, answer=8)
        resume = path.with_name("questions.jsonl.json").exists()
        rows = self_study(model, tokenizer, TEXT, path, 16, how=how, resume=resume, console=console)
        data = encode(examples_of(rows, tokenizer), tokenizer, max_length=64)
        config = fw.PrefixConfig(length=4, init=TEXT, freeze_first=True)
        more = {"resume": begun(out), "console": console, "callbacks": [Slow(pipe)]}
        distill(model, tokenizer, TEXT, config, data, out, ARGUMENTS, **more)
    finally:
        Counting.advance = advance


def run(out, aim=None, count=0, wait=0.0):
    """Work in a child; kill it ``wait`` seconds after ``count`` batches of stage ``aim``, or the first of a later one.

    Returns its exit status, and the stage in which it was when that was decided.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            work(out, write)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    order, seen, where = list(STAGES.values()), 0, None
    while event := os.read(read, 1):
        if aim is None:
            continue
        where = STAGES[event]
        seen += where == aim
        if seen == count or order.index(where) > order.index(aim):
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            break
    os.close(read)
    return os.waitpid(child, 0)[1], where


if __name__ == "__main__":
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    aims = [("questions", 1), ("questions", 2), ("teacher", 1), ("teacher", 1), ("training", 1), ("training", 2),
            ("training", 2)]  # fmt: skip
    for aim, count in aims:
        moment = chance.uniform(0, 0.03)
        status, where = run(folder, aim, count, moment)
        print(where, count, round(moment, 4), os.WTERMSIG(status), flush=True)
    sys.exit(os.waitstatus_to_exitcode(run(folder)[0]))
