"""A distillation that is killed again and again: `distill_tiny.py OUT SEED`; each child is really killed.

It makes questions, asks the teacher, and trains; after every batch of each it says so, then dawdles.
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
ARGUMENTS = {"max_steps": 8, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 4, "seed": 5,
             "logging_steps": 1, "use_cpu": True, "report_to": "none"}  # fmt: skip


class Slow(transformers.TrainerCallback):
    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        say(self.pipe)


def say(pipe):
    os.write(pipe, b".")
    time.sleep(0.01)


def work(out, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    advance = Counting.advance

    def advanced(self, count):
        advance(self, count)
        say(pipe)

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


def run(out, kill_after, wait):
    """Work in a child; kill it some time after so many events. Returns its exit status, and how many there were."""
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
    events = 0
    while os.read(read, 1):
        events += 1
        if events == kill_after:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            break
    os.close(read)
    return os.waitpid(child, 0)[1], events


def stage(out):
    if _teacher_done(out):
        return "training"
    return "teacher" if begun(out) else "questions"


def _teacher_done(out):
    return begun(out) and len(list((out / "teacher" / "train").glob("0*.safetensors"))) == 4


if __name__ == "__main__":
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    for after in (1, 2, 2, 3, 1, 2, 3):
        moment = chance.uniform(0, 0.05)
        status, _ = run(folder, after, moment)
        print(stage(folder), after, round(moment, 4), os.WTERMSIG(status), flush=True)
    sys.exit(os.waitstatus_to_exitcode(run(folder, None, 0)[0]))
