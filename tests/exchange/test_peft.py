"""Prefixes from PEFT's folders and to them: PEFT itself writes, and reads, the other side."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import foreword as fw
import zoo
from foreword.errors import MismatchError, PrefixFileError
from foreword.exchange.peft import CONFIG, WEIGHTS, read_peft, write_peft
from test_oracles import P, of_peft, wide, with_peft

DECODERS = ("llama", "qwen2", "qwen3", "phi3", "neox", "gpt2", "opt")


@pytest.mark.parametrize("name", DECODERS)
def test_what_peft_saved_gives_its_logits(name, tmp_path):
    peer, model, ids = with_peft(name), wide(name), zoo.ids()
    peer.save_pretrained(tmp_path)
    want = zoo.logits(peer, input_ids=ids)
    prefix = read_peft(tmp_path, model)
    assert prefix.position_offset == (0 if name in zoo.ROTARY else P)
    kept = read_peft(tmp_path, model, keep_positions=True)
    assert kept.position_offset == P
    assert kept == fw.Prefix.from_tensors(model, of_peft(peer, model), position_offset=P)
    for p in (prefix, kept):
        tuning = fw.attach(model, p)
        torch.testing.assert_close(zoo.logits(model, input_ids=ids), want, atol=1e-4, rtol=1e-4)
        tuning.detach()


def test_an_mlp_of_peft_is_applied_already(tmp_path):
    model = wide("llama")
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16
    )
    peer = peft.get_peft_model(wide("llama"), settings).eval()
    peer.save_pretrained(tmp_path)
    tuning = fw.attach(model, read_peft(tmp_path, model))
    want = zoo.logits(peer, input_ids=zoo.ids())
    torch.testing.assert_close(zoo.logits(model, input_ids=zoo.ids()), want, atol=1e-4, rtol=1e-4)
    tuning.detach()


@pytest.mark.parametrize("name", DECODERS)
def test_peft_loads_what_we_write(name, tmp_path):
    model, ids = wide(name), zoo.ids()
    offset = 0 if name in zoo.ROTARY else 3
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), 3), position_offset=offset)
    tuning = fw.attach(model, prefix)
    want = zoo.logits(model, input_ids=ids)
    tuning.detach()
    write_peft(prefix, model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    peer = peft.PeftModel.from_pretrained(wide(name), tmp_path / "adapter").eval()
    torch.testing.assert_close(zoo.logits(peer, input_ids=ids), want, atol=1e-4, rtol=1e-4)
    again = read_peft(tmp_path / "adapter", model)
    for site in prefix.keys:
        torch.testing.assert_close(again.keys[site], prefix.keys[site], atol=1e-5, rtol=1e-5)
        assert torch.equal(again.values[site], prefix.values[site])


def test_a_prefix_that_peft_has_not_is_refused(tmp_path):
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random", gate="head"))
    gated = tuning.bake()
    tuning.detach()
    with pytest.raises(MismatchError, match="gates, which weigh it against the text; PEFT's cache holds"):
        write_peft(gated, model, tmp_path / "a")
    gpt = zoo.build("gpt2")
    with pytest.raises(MismatchError, match="learned or relative positions"):
        write_peft(fw.Prefix.from_tensors(gpt, zoo.random_prefix(gpt, fw.sites(gpt), 3)), gpt, tmp_path / "a")
    found = fw.sites(model)
    some = fw.Prefix.from_tensors(model, {found[0].name: zoo.random_prefix(model, found)[found[0].name]})
    with pytest.raises(MismatchError, match="keys for 1 of 2 layers, and PEFT has one length"):
        write_peft(some, model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_damaged_and_strange_folders(tmp_path):
    model = zoo.build("llama")
    with pytest.raises(PrefixFileError, match=f"holds no {CONFIG}"):
        read_peft(tmp_path, model)
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), 3))
    good = write_peft(prefix, model, tmp_path / "good")
    config = json.loads((good / CONFIG).read_text())

    def folder(name, changes=None, rows=None, text=None):
        path = tmp_path / name
        path.mkdir()
        (path / CONFIG).write_text(text or json.dumps(config | (changes or {})))
        if rows is not None:
            save_file(rows, path / WEIGHTS)
        return path

    width = 2 * 2 * 2 * 8
    rows = torch.zeros(3, width)
    cases = [
        (folder("json", text="[1"), "is not PEFT's"),
        (folder("kind", {"peft_type": "LORA"}), "an adapter of type LORA; foreword reads PREFIX_TUNING"),
        (folder("t5", {"task_type": "SEQ_2_SEQ_LM"}), "encoder-decoder"),
        (folder("none"), f"holds no {WEIGHTS}"),
        (folder("names", rows={"other": rows}), "holds no matrix 'prompt_embeddings'; it has other"),
        (folder("count", {"num_virtual_tokens": 4}, {"prompt_embeddings": rows}), "has 3 virtual tokens and .* says 4"),
        (folder("nan", rows={"prompt_embeddings": rows / 0}), "aren't finite"),
    ]
    cut = folder("cut")
    (cut / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:-9])
    pickled = folder("pickled")
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    cases += [(cut, "can't be read"), (pickled, "a pickle, which runs code when it is read")]
    for path, match in cases:
        with pytest.raises(PrefixFileError, match=match):
            read_peft(path, model)
    with pytest.raises(
        MismatchError, match=f"has {width + 8} numbers a virtual token; LlamaForCausalLM needs 2 layers"
    ):
        read_peft(folder("wide", rows={"prompt_embeddings": torch.zeros(3, width + 8)}), model)
    with pytest.raises(MismatchError, match="is no decoder"):
        read_peft(good, zoo.build("t5"))


# ---------------------------------------------------------------- heads that PEFT trained beside the virtual tokens


def headed(task, labels=3):
    name = {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "QUESTION_ANS": "QuestionAnswering",
    }
    torch.manual_seed(0)
    config = tf.LlamaConfig(**zoo._DEC, **({} if task == "QUESTION_ANS" else {"num_labels": labels}))
    return getattr(tf, f"LlamaFor{name[task]}")(config).eval()


def said(model):
    with torch.no_grad():
        out = model(input_ids=zoo.ids())
    return out.logits if "logits" in out else torch.stack((out.start_logits, out.end_logits), -1)


def saved(task, folder):
    peer = peft.get_peft_model(headed(task), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P))
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    peer.eval().save_pretrained(folder)
    return peer


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_trained_head_comes_along(task, tmp_path):
    want = said(saved(task, tmp_path))
    model = headed(task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{model.base_model_prefix}."):
                parameter.zero_()
    base = said(model)
    prefix = read_peft(tmp_path, model)
    prefix.save(tmp_path / "ours")
    tuning = fw.attach(model, fw.Prefix.load(tmp_path / "ours"))
    torch.testing.assert_close(said(model), want, atol=1e-4, rtol=1e-4)
    tuning.detach()
    assert torch.equal(said(model), base)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_for_another_model_is_refused_by_name(task, tmp_path):
    saved(task, tmp_path)
    with pytest.raises(MismatchError, match=r"trained head \(base_model\.score\..*AutoModelFor"):
        read_peft(tmp_path, zoo.build("llama"))
    with pytest.raises(MismatchError, match=r"score\.\w+ of shape \(3,.*\(5,"):
        read_peft(tmp_path, headed(task, 5))


def test_more_than_a_head_is_refused_by_name(tmp_path):
    saved("SEQ_CLS", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(PrefixFileError, match=r"base_model\.score\.weight"):
        read_peft(tmp_path, headed("SEQ_CLS"))
    (tmp_path / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "base_model.odd.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(MismatchError, match=r"odd\.weight"):
        read_peft(tmp_path, headed("SEQ_CLS"))
    save_file({n: t for n, t in tensors.items() if "score" not in n}, tmp_path / WEIGHTS)
    with pytest.raises(PrefixFileError, match="score"):
        read_peft(tmp_path, headed("SEQ_CLS"))
