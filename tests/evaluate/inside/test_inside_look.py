"""Everything at once, on every architecture; the page."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from looking import baked, batch

import foreword as fw
import zoo
from foreword.data import Example
from foreword.evaluate import inside
from foreword.evaluate.inside.page import page

SUPPORTED = [n for n in zoo.ZOO if n not in zoo.UNSUPPORTED]


def finite(value):
    """Whether every number of a JSON value is one."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_architecture(name):
    model = zoo.build(name)
    prefix = baked(model, name)
    data = batch(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    passes = {}
    found = inside.look(
        model, prefix, zoo.tokenizer(), [data], progress=lambda part, done, total: passes.update({part: (done, total)})
    )
    record = json.loads(json.dumps(found.to_json()))
    assert finite(record) and set(record) == {"about", "sites", "share", "dilution", "words", "norms", "spectra",
                                              "similarity", "layers"}  # fmt: skip
    assert all(done == total for done, total in passes.values())
    for part in (found.share, found.norms, found.spectra["all"], found.similarity["itself"]):
        assert not isinstance(part, inside.Unavailable), part
    assert all(0 < s.mean < 1 for s in found.share.sites) and all(s.size > 0 for s in found.spectra["all"].sites)
    unavailable = {n for n in ("dilution", "words", "layers") if "unavailable" in record[n]}
    assert unavailable == {"vit": {"dilution", "words", "layers"}, "whisper": {"dilution", "layers"},
                           "llava": {"dilution", "layers"}, "qwen3next": {"words"}}.get(name, set())  # fmt: skip
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert not any("_foreword_slot" in m.__dict__ for m in model.modules()) and not model.training


@pytest.mark.parametrize("gate", ["head", "zero", "input"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gates_and_memories(name, gate):
    model = zoo.build(name)
    prefix = baked(model, name, [fw.PrefixConfig(length=3, init="random", gate=gate), fw.MemoryConfig(rank=2)])
    found = inside.look(model, prefix, zoo.tokenizer(), [batch(name)])
    assert list(found.spectra) == ["all", "virtual tokens", "memory"]
    assert {w["kind"] for w in found.share.weights.values()} == {gate}
    text = page(found)
    assert finite(found.to_json()) and text.count("<img") == 9
    assert ("no share as trained" in text) == (gate == "zero")


def test_the_page_needs_nothing_else_and_takes_no_orders(tmp_path):
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    hostile = '<script>alert("x")</script> & $\\frac{1}'
    prefix = replace(prefix, fingerprint=replace(prefix.fingerprint, base_model=hostile))
    found = inside.look(
        model, prefix, _Rude(zoo.tokenizer()), [batch("llama")], name=hostile, against=(hostile, prefix), force=True
    )
    path = inside.write_page(found, tmp_path / "look.html")
    text = path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["look.html"] and path.stat().st_mode & 0o777 == 0o644
    outside = re.sub(r"data:image/svg\+xml;base64,[\w+/=]+", "", text)
    assert not re.search(r"(?i)https?:|<script|<link|<iframe|@import|url\(|src=\"[^\"]", outside)
    assert "&lt;script&gt;" in outside and '<meta name="viewport"' in outside
    assert outside.count("<h2>") == text.count("<h2>") == 9
    for picture in re.findall(r"base64,([\w+/=]+)", text):
        drawn = base64.b64decode(picture).decode()
        assert drawn.startswith("<?xml") and "<script" not in drawn
    # A sentence that says how to read it stands before each picture.
    for section in outside.split("<h2>")[1:]:
        assert "<p>" in section.split("<img")[0] and "Not available" not in section


class _Rude:
    """A tokenizer whose tokens are markup."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.tokenizer)

    def decode(self, ids):
        return f"<b onclick='x'>{self.tokenizer.decode(ids)}\x00\n"


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = zoo.build("llama")
    found = inside.look(model, baked(model, "llama"), zoo.tokenizer(), [batch("llama")], only=["norms"])
    path = tmp_path / "look.html"
    path.write_text("before")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            inside.write_page(found, path)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["look.html"]
    inside.write_page(found, path)
    assert path.read_text().count("<h2>") == 1 and "How large" in path.read_text()
    with pytest.raises(fw.ConfigError, match="is a folder"):
        inside.write_page(found, tmp_path)
    with pytest.raises(fw.ConfigError, match="no folder"):
        inside.write_page(found, tmp_path / "a" / "look.html")
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test that runs as root can write anywhere
    with pytest.raises(fw.ConfigError, match="can't be written into"):
        inside.write_page(found, path)


def test_against_another():
    model = zoo.build("llama")
    prefix, memory = baked(model, "llama"), baked(model, "llama", fw.MemoryConfig())
    lora = baked(model, "llama", fw.LoRAConfig(rank=2))
    found = inside.look(model, prefix, zoo.tokenizer(), [batch("llama")], against=("memory", memory))
    assert isinstance(found.similarity["memory"], inside.Unavailable)
    assert isinstance(found.spectra["memory"], inside.Spectrum) and "memory: effective rank" in page(found)
    found = inside.look(model, lora, zoo.tokenizer(), [batch("llama")], against=("prefix", prefix), only=["spectrum"])
    assert all(isinstance(s, inside.Spectrum) for s in found.spectra.values()) and page(found)
    found = inside.look(
        model, lora, zoo.tokenizer(), [batch("llama")], name="itself", against=("itself", lora), only=["similarity"]
    )
    assert list(found.similarity) == ["itself", "itself (the other)"]
    with pytest.raises(fw.MismatchError, match="no site in common"):
        inside.look(model, prefix, zoo.tokenizer(), [batch("llama")], against=("x", baked(zoo.build("gpt2"), "gpt2")))
    with pytest.raises(fw.MismatchError, match="other weights"):
        inside.look(zoo.build("llama", seed=2), prefix, zoo.tokenizer(), [batch("llama")])
    done = []
    stranger = ("x", baked(zoo.build("llama", seed=2), "llama"))
    with pytest.raises(fw.MismatchError, match="other weights"):  # before anything is measured
        inside.look(model, prefix, zoo.tokenizer(), [batch("llama")], only=["share", "spectrum"], against=stranger,
                    progress=lambda *_: done.append(1))  # fmt: skip
    assert not done
    forced = inside.look(
        model, prefix, zoo.tokenizer(), [batch("llama")], only=["similarity"], force=True, against=stranger
    )
    assert isinstance(forced.similarity["x"], inside.Similarity)
    with pytest.raises(fw.ConfigError, match="no part 'shares'"):
        inside.look(model, prefix, zoo.tokenizer(), [batch("llama")], only=["shares"])
    fw.attach(model, prefix)
    with pytest.raises(fw.AttachError, match="attached already"):
        inside.look(model, prefix, zoo.tokenizer(), [batch("llama")])


# ---------------------------------------------------------------- texts


def examples(*texts):
    return [Example("", t, f"{i}") for i, t in enumerate(texts)]


def test_texts_for_each_kind_of_model():
    tokenizer = zoo.tokenizer()
    made = inside.batches_of(zoo.build("llama"), tokenizer, examples(*zoo.SENTENCES), batch_size=2)
    assert [len(b["input_ids"]) for b in made] == [2, 1]
    labels, ids = made[1]["labels"][0], made[1]["input_ids"][0]
    assert (labels[1:] == ids[1:]).all()
    made = inside.batches_of(zoo.build("t5"), tokenizer, [Example("The film", "is good", "0")] * 4)
    assert made[0]["labels"].shape[1] != made[0]["input_ids"].shape[1]
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    made = inside.batches_of(zoo.build("bert"), tokenizer, examples(*zoo.SENTENCES))
    masked = made[0]["labels"] != -100
    assert masked.any(1).all() and (made[0]["input_ids"][masked] == tokenizer.mask_token_id).all()
    again = inside.batches_of(zoo.build("bert"), tokenizer, examples(*zoo.SENTENCES))
    assert torch.equal(made[0]["input_ids"], again[0]["input_ids"])
    with pytest.raises(fw.DataError, match="tokens in all; expected 8 or more"):
        inside.batches_of(zoo.build("llama"), zoo.tokenizer(), examples("a film"))
    with pytest.raises(fw.DataError, match="no text"):
        inside.batches_of(zoo.build("llama"), zoo.tokenizer(), [])


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_classifiers(kind):
    """Labels that are no tokens, and a head that came with the prefix and stays when the prefix is off."""
    import transformers as tf

    torch.manual_seed(0)
    made = {"sequence": tf.BertForSequenceClassification, "token": tf.BertForTokenClassification}[kind]
    model = made(tf.BertConfig(**zoo._ENC, num_labels=3)).eval()
    data = batch("bert")
    labels = torch.randint(0, 3, data["labels"].shape)
    data["labels"] = labels[:, 0] if kind == "sequence" else labels.masked_fill(data["labels"] == -100, -100)
    prefix = baked(model, "bert", fw.PrefixConfig(length=3, init="random", head=kind))
    found = inside.look(model, prefix, zoo.tokenizer(), [data])
    assert found.layers.labels == (3 if kind == "sequence" else 50) and "no vocabulary" in found.words.why
    tuning = fw.attach(model, prefix)
    with torch.no_grad():
        assert found.layers.whole == pytest.approx(float(model(**data).loss), abs=1e-5)
    tuning.detach()
    head = inside.methods_of(prefix)["head"]
    tuning = fw.attach(model, head)
    with torch.no_grad():
        assert found.layers.none == pytest.approx(float(model(**data).loss), abs=1e-5)
    tuning.detach()
    assert isinstance(found.spectra["head"], inside.Unavailable) and page(found)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_base_whose_weights_are_elsewhere(name):
    from accelerate import cpu_offload

    model = zoo.build(name)
    prefix = baked(model, name, [fw.PrefixConfig(length=3, init="random"), fw.MemoryConfig(rank=2)])
    want = inside.look(model, prefix, zoo.tokenizer(), [batch(name)])
    away = zoo.build(name)
    cpu_offload(away, execution_device=torch.device("cpu"))
    assert inside.look(away, prefix, zoo.tokenizer(), [batch(name)]).to_json() == want.to_json()


def test_prompts_have_what_virtual_tokens_have():
    """A prompt at the input is baked into keys and values."""
    model = zoo.build("llama")
    found = inside.look(model, baked(model, "llama", fw.PromptConfig(length=3, init="random")), zoo.tokenizer(),
                        [batch("llama")])  # fmt: skip
    assert not any("unavailable" in part for part in found.to_json().values())
    assert all(0 < s.mean < 1 and len(s.tokens) == 3 for s in found.share.sites)
