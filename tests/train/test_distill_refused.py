"""Distillations that are refused, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from distilling import CONFIG, TEXT, examples, run

import foreword as fw
import zoo
from foreword.data import EncodedDataset
from foreword.train import _teacher
from foreword.train.distill import DistillTrainer


def unanswered():
    data = examples()
    ids = [data[i]["input_ids"] for i in range(len(data))]
    return EncodedDataset(ids, [[i[0]] + [-100] * (len(i) - 1) for i in ids], data.stats)


def other_prefix(name):
    model = zoo.build(*(("llama", 1) if name == "weights" else ("gpt2", 0)))
    return fw.Prefix.from_text(model, zoo.tokenizer(), TEXT)


def conditional():
    tuning = fw.attach(
        zoo.build("llama"), fw.PrefixConfig(length=3, init="random", reparam="mlp", hidden=8, condition=2)
    )
    return tuning.bake()


TROUBLE = {
    "a text longer than the context": (
        lambda: {"teacher": TEXT * 9},
        fw.ConfigError,
        r"has \d+ tokens and the longest example \d+: \d+, and .* reads 128 at most",
    ),
    "an empty text": (
        lambda: {"teacher": " \n"},
        fw.ConfigError,
        "the teacher's text is empty",
    ),
    "no text and no prefix": (
        lambda: {"teacher": CONFIG},
        fw.ConfigError,
        "a text or a Prefix, not PrefixConfig",
    ),
    "a student longer than its text": (
        lambda: {"what": fw.PrefixConfig(length=99, init="The film")},
        fw.ConfigError,
        "the init text has",
    ),
    "no answers": (
        lambda: {"data": unanswered()},
        fw.DataError,
        "none of the 7 examples .* has an answer token",
    ),
    "no answers to validate on": (
        lambda: {"valid": unanswered()},
        fw.DataError,
        r"\(valid\) has an answer token",
    ),
    "a teacher of other weights": (
        lambda: {"teacher": other_prefix("weights")},
        fw.MismatchError,
        "other weights",
    ),
    "a teacher of another shape": (
        lambda: {"teacher": other_prefix("shape")},
        fw.MismatchError,
        "doesn't fit",
    ),
    "a student of other weights": (
        lambda: {"what": other_prefix("weights")},
        fw.MismatchError,
        "other weights",
    ),
    "a teacher still to be made": (
        lambda: {"teacher": conditional()},
        fw.ConfigError,
        r"teacher\.given\(vector\)",
    ),
    "top 0": (
        lambda: {"top": 0},
        fw.ConfigError,
        "top=0; expected .* from 1 to 128",
    ),
    "top too large": (
        lambda: {"top": 129},
        fw.ConfigError,
        "top=129",
    ),
    "several tasks": (
        lambda: {"what": fw.PrefixConfig(length=2, init="random", tasks=("a", "b"))},
        fw.ConfigError,
        "has one student",
    ),
}


@pytest.mark.parametrize("make, error, said", TROUBLE.values(), ids=TROUBLE)
def test_refused_before_anything_is_computed(make, error, said, tmp_path, monkeypatch):
    monkeypatch.setattr(_teacher, "_shard", lambda *_: pytest.fail("the teacher was asked"))
    model = zoo.build("llama")
    with pytest.raises(error, match=said):
        run(model, tmp_path / "out", **make())
    assert not (tmp_path / "out").exists() and fw.tuning.tuning_of(model) is None
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), zoo.logits(zoo.build("llama"), input_ids=zoo.ids()))


def test_models_and_prefixes_that_cannot(tmp_path):
    with pytest.raises(fw.ConfigError, match="BertForMaskedLM predicts none"):
        run(zoo.build("bert"), tmp_path / "out")
    model = zoo.build("llama")
    tuning = fw.attach(model, CONFIG, tokenizer=zoo.tokenizer())
    with pytest.raises(fw.AttachError, match="attached already"):
        run(model, tmp_path / "out")
    baked = tuning.bake()
    tuning.detach()
    fw.attach(model, baked)  # frozen
    with pytest.raises(fw.AttachError, match="this model has no trainable one"):
        DistillTrainer(model, fw.PrefixTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"))
