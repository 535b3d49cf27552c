"""A small comparison on a tiny random model, for the tests and for processes that they kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import zoo
from foreword.compare import Budget, Comparison, Plan, Settings, TaskData, make_rows
from foreword.evaluate.predict import Decoding

RECORDS = [{"input": s[:20], "output": s[20:]} for s in zoo.SENTENCES * 3]


def task(**changes):
    given = {
        "train": RECORDS, "valid": RECORDS[:3], "tests": {"test": RECORDS[:3]}, "metrics": ("bleu", "distinct-1"),
        "decoding": Decoding(max_new_tokens=6), "init": zoo.SENTENCES[0], "max_length": 40, **changes,
    }  # fmt: skip
    return TaskData("films", **given)


def save_model(folder):
    zoo.build("llama").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return str(folder)


def comparison(model, *, data=None, methods=("prefix", "lora:2"), lengths=(3,), seeds=1, budget=None, **plan):
    """Three steps of four examples a line, one learning rate."""
    data = data or task()
    given = {"factors": (1.0,), "prompted": False, "timed": False, **plan}
    plan = Plan(make_rows(methods, lengths, data), range(seeds), budget or Budget(steps=3), **given)
    return Comparison(Settings(str(model), batch_size=4, looks=3, intervals=20), data, plan)


def lasting(path):
    """A file of results without what the hour changes."""

    def cleaned(value):
        if isinstance(value, dict):
            changing = ("measured", "seconds", "training_seconds", "peak_bytes", "speed_ratio", "machine")
            return {
                k: cleaned(v) for k, v in value.items()
                if k not in (*changing, "training_seconds_ratio", "peak_bytes_ratio")
            }  # fmt: skip
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    return cleaned(json.loads(Path(path).read_text()))


if __name__ == "__main__":
    comparison(sys.argv[1], seeds=2).run(Path(sys.argv[2]), resume="--resume" in sys.argv)
