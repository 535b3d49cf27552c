"""A meta-training that is killed again and again: `meta_tiny.py OUT SEED ALGORITHM`, as run_tiny.py."""

from __future__ import annotations

import io
import os
import time
import warnings

import torch
from families import family
from rich.console import Console
from run_tiny import killed_again_and_again

import foreword as fw
import zoo
from foreword.train._meta_state import STATE

WHAT = {
    "reptile": fw.PrefixConfig(length=4, init="random", reparam="mlp", hidden=16, dropout=0.1),
    "fomaml": [fw.PrefixConfig(length=4, init="random", gate="head"), fw.MemoryConfig(rank=2)],
}


def train(out, pipe, algorithm):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def slow(step, losses):
        os.write(pipe, bytes([step]))
        time.sleep(0.01)

    plan = fw.MetaConfig(algorithm, meta_steps=14, inner_steps=2, tasks_per_step=2, batch_size=2, save_every=1)
    fw.meta_train(
        zoo.build("llama"), zoo.tokenizer(), WHAT[algorithm], family(), out, plan, resume=(out / STATE).exists(),
        on_step=slow, console=Console(file=io.StringIO()),
    )  # fmt: skip


if __name__ == "__main__":
    killed_again_and_again(train)
