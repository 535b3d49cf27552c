"""The real model as teacher and student: a stretch of the licence becomes a prefix of a quarter of its length."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import foreword as fw
from foreword.data import encode
from foreword.errors import MissingPartError
from foreword.train._teacher import Answers
from foreword.train.questions import context, examples_of, passages, read_questions

pytestmark = [pytest.mark.real, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_a_stretch_of_the_licence(tmp_path):
    try:
        model, tokenizer = fw.load_model("demo", dtype="float32")
    except MissingPartError as exc:
        pytest.skip(str(exc))
    before = [p.clone() for p in model.parameters()]
    text = context((ROOT / "LICENSE").read_text()[500:1900])
    rows = passages(text, 8, words=(6, 10)) + read_questions(ROOT / "benchmarks" / "distill_questions.jsonl")[1][:8]
    data = encode(examples_of(rows, tokenizer), tokenizer, max_length=64)
    student = fw.PrefixConfig(length=64, init=text, freeze_first=True)
    arguments = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True,
                 "report_to": "none", "save_strategy": "no", "warmup_steps": 0}  # fmt: skip
    result = fw.distill(
        model, tokenizer, text, student, data, tmp_path, arguments, valid=data, console=Console(file=io.StringIO())
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    losses = [e["loss"] for e in result.history if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]

    told, prompt = Answers(tmp_path / "teacher" / "train", data, seq2seq=False), tokenizer(text)["input_ids"]
    model.eval()
    for i in (0, 15):  # what the teacher said is what the model says after the text, in one sequence
        ids, labels = data[i]["input_ids"], data[i]["labels"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) :]
        expected = logits[[t - 1 for t in range(1, len(ids)) if labels[t] != -100]].log_softmax(-1)
        tokens, log_probs = told[i]
        torch.testing.assert_close(log_probs[:, :-1], expected.gather(1, tokens.long()), atol=2e-3, rtol=1e-3)
        rest = (1 - expected.gather(1, tokens.long()).exp().sum(1)).clamp(min=0)
        torch.testing.assert_close(log_probs[:, -1].exp(), rest, atol=1e-3, rtol=0)
