"""Small distillations, for the tests of them."""

from __future__ import annotations

import io

from rich.console import Console

import foreword as fw
import zoo
from foreword.data import encode, read_examples
from foreword.train.distill import distill

TEXT = " ".join(zoo.SENTENCES)
QUIET = Console(file=io.StringIO())
ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 3, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
             "report_to": "none", "eval_steps": 2}  # fmt: skip
CONFIG = fw.PrefixConfig(length=6, init=TEXT, freeze_first=True)


def examples(n=7, seq2seq=False, **more):
    """Encoded questions and answers of different lengths."""
    words = TEXT.split()
    starts = [i % (len(words) - 6) for i in range(n)]
    rows = [{"input": " ".join(words[s : s + 2 + i % 3]), "output": " " + " ".join(words[s + 5 : s + 7 + i % 4])}
            for i, s in enumerate(starts)]  # fmt: skip
    return encode(read_examples(rows), zoo.tokenizer(), max_length=64, seq2seq=seq2seq, **more)


def run(model, out, teacher=TEXT, what=CONFIG, data=None, *, arguments=None, **more):
    settings = {**ARGUMENTS, **(arguments or {})}
    return distill(model, zoo.tokenizer(), teacher, what, data or examples(), out, settings, console=QUIET, **more)


def without_dropout(model):
    """A model trains as it is judged."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def losses(result):
    return [e["loss"] for e in result.history if "loss" in e]
