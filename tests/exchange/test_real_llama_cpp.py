"""A trained model's prefix in llama.cpp: the base in 32 bits, so that its own numbers are transformers'."""

from __future__ import annotations

import pytest
import torch

import foreword as fw
from foreword.exchange.llama_cpp import Form, export_llama_cpp
from foreword.models import load_model, packaged_model

ggufs = pytest.importorskip("ggufs")
TEXT = "You are a film critic who loved the film. Write one warm sentence about it."
PROMPT = "The film begins in a small town, and"


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_writes_the_same_48_tokens_with_its_prefix(tmp_path):
    model, tokenizer = load_model("demo")
    prefix = fw.Prefix.from_text(model, tokenizer, TEXT)
    noise = torch.Generator().manual_seed(0)
    keys, values = (
        {n: t + 0.05 * t.std() * torch.randn(t.shape, generator=noise) for n, t in group.items()}
        for group in (prefix.keys, prefix.values)
    )  # so that no text has these keys and values
    prefix = fw.Prefix.from_tensors(model, {n: (keys[n], values[n]) for n in keys})
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tuning = fw.attach(model, prefix)
    want = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    tuning.detach()
    base = ggufs.in_32_bits(packaged_model(), tmp_path / "base.gguf")
    done = export_llama_cpp(prefix, model, base, tmp_path / "critic.bin", Form(cache="f32", flash_attention=False))
    assert done.base.paired
    with ggufs.server(base, tmp_path) as post:
        post("/slots/0?action=restore", filename="critic.bin")
        for prompt in (inputs["input_ids"][0].tolist(), [PROMPT]):  # as ids, and as a text after the placeholders
            answer = post(
                "/completion", prompt=[*done.tokens, *prompt], id_slot=0, n_predict=48, temperature=0,
                return_tokens=True, ignore_eos=True,
            )  # fmt: skip
            assert answer["timings"]["cache_n"] >= done.length
            assert answer["tokens"] == want
