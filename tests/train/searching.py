"""A small search on a tiny random model, for the tests of tune and for processes that they kill."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from rich.console import Console

import foreword as fw
import zoo
from foreword.data import encode, read_examples
from foreword.train.space import Budget, SearchSpace
from foreword.train.tune import tune

BASE = fw.PrefixConfig(length=4, init="random", hidden=8, rank=2)
SPACE = SearchSpace(lengths=(2, 4, 8), base=BASE)


def data(sentences=zoo.SENTENCES * 3):
    return encode(read_examples([{"text": s} for s in sentences]), zoo.tokenizer(), max_length=40)


def search(out, space=SPACE, *, trials=6, model=None, valid="same", console=None, **options):
    """Trials of six steps; validated on what is trained."""
    given = {"budget": Budget(trials=trials), "steps": 6, "resume": False, **options}
    arguments = {"use_cpu": True, "per_device_train_batch_size": 3, **given.pop("arguments", {})}
    return tune(
        model or zoo.build("llama"), zoo.tokenizer(), data(), data() if valid == "same" else valid, Path(out), space,
        arguments=arguments, console=console or Console(file=io.StringIO()), **given,
    )  # fmt: skip


def seen(trials):
    """What must not depend on kills: configurations, losses and how it went, of the trials that count."""
    return [(t.outcome, t.default, t.config, t.loss, t.curve) for t in trials if t.outcome != "stopped"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    search(sys.argv[1], trials=int(sys.argv[2]), resume="--resume" in sys.argv)
