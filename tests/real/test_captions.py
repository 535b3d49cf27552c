"""examples/captions.py, trained for real: pictures to captions through a prefix on the frozen text model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import foreword as fw
from foreword.errors import MissingPartError

pytestmark = [pytest.mark.real, pytest.mark.slow]
EXAMPLE = Path(__file__).parents[2] / "examples" / "captions.py"


def test_new_pictures_are_captioned_far_above_chance():
    spec = importlib.util.spec_from_file_location("captions", EXAMPLE)
    captions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(captions)
    try:
        model, tokenizer = fw.load_model("demo", dtype="float32")
    except MissingPartError as exc:
        pytest.skip(str(exc))
    before = [p.clone() for p in model.parameters()]
    tuning, eyes = captions.train(model, tokenizer, steps=110)
    right = captions.share_right(model, tokenizer, tuning, eyes, pictures=40)
    tuning.detach()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert right > 4 / len(captions.KINDS)  # word for word; a guess is right one time in that many
