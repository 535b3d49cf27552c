"""The base in ONNX Runtime, with a prefix in its cache: transformers with the prefix attached is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import foreword as fw
import zoo
from foreword.errors import AttachError, ConfigError, MismatchError, PrefixFileError
from foreword.exchange.onnx import ABOUT, OnnxModel, export_base, write_past

pytest.importorskip("onnxruntime")


def build(name, seed=0):
    """More than ten layers where that is cheap: names are not in the order of numbers then."""
    if name == "gpt2":
        return zoo.build(name, seed)
    torch.manual_seed(seed)
    config = {**zoo._DEC, "num_hidden_layers": 11, "hidden_size": 16, "intermediate_size": 16}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**config, initializer_range=0.2)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    export_base(build(request.param), folder)
    return request.param, folder


def made(name, length, seed=0):
    model = build(name)
    offset = 0 if name in zoo.ROTARY else length
    tensors = zoo.random_prefix(model, fw.sites(model), length, seed)
    return model, fw.Prefix.from_tensors(model, tensors, position_offset=offset)


@pytest.mark.slow
def test_onnx_runtime_writes_what_transformers_writes(base, tmp_path):
    """One file of the model, several prefixes of different lengths, several shapes of text, and no prefix at all."""
    name, folder = base
    runs = OnnxModel.load(folder)
    for length, batch, text in ((5, 1, 7), (1, 3, 4), (12, 2, 1), (0, 2, 6)):
        model, ids = build(name), zoo.ids(batch, text, seed=length)
        path = None
        if length:
            model, prefix = made(name, length, seed=length)
            path = write_past(prefix, tmp_path / f"{length}.safetensors")
            fw.attach(model, prefix)
        got, cache = runs.logits(ids.numpy(), runs.past(path, batch))
        np.testing.assert_allclose(got, zoo.logits(model, input_ids=ids).numpy(), atol=1e-4, rtol=1e-4)
        assert cache["past_key_values.1.value"].shape[2] == length + text
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[:, text:]
        assert runs.generate(ids.numpy(), 8, path).tolist() == want.tolist()


def test_a_folder_keeps_its_model(base, tmp_path):
    name, folder = base
    before = (folder / "model.onnx").stat().st_mtime_ns
    export_base(build(name), folder)
    assert (folder / "model.onnx").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"holds another model .*give another --out"):
        export_base(build(name, seed=1), folder)
    assert not list(folder.glob(".export-*"))


def test_a_past_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    _, prefix = made("llama", 3)
    runs = OnnxModel(None, [(s.kv_heads, s.key_dim) for s in fw.sites(build("llama"))])
    path = write_past(prefix, tmp_path / "p.safetensors")
    assert {t.shape[::2] for t in runs.past(path, 2).values()} == {(2, 3)}
    for heads in (runs.heads[:-1], [(h, d + 1) for h, d in runs.heads], [(h * 2, d) for h, d in runs.heads]):
        with pytest.raises(MismatchError, match="is no prefix for this model of"):
            OnnxModel(None, heads).past(path, 1)
    tensors = load_file(path)
    for change, error in (
        ({"past_key_values.0.key": tensors["past_key_values.0.key"][:, :, :1].contiguous()}, MismatchError),
        ({"past_key_values.0.key": tensors["past_key_values.0.key"] * torch.nan}, PrefixFileError),
        ({"past_key_values.0.key": tensors["past_key_values.0.key"].half()}, PrefixFileError),
    ):
        save_file({**tensors, **change}, tmp_path / "wrong.safetensors")
        with pytest.raises(error):
            runs.past(tmp_path / "wrong.safetensors", 1)
    path.write_bytes(b"nonsense")
    for gone in (path, tmp_path / "none.safetensors"):
        with pytest.raises(PrefixFileError, match="can't be read"):
            runs.past(gone, 1)


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random", gate="head"))
    with pytest.raises(AttachError, match="would be exported with it"):
        export_base(model, tmp_path / "m")
    gated = tuning.bake()
    tuning.detach()
    with pytest.raises(MismatchError, match="gates, which weigh it against the text; ONNX Runtime's cache"):
        write_past(gated, tmp_path / "p")
    for name in ("t5", "deepseek"):
        with pytest.raises(MismatchError, match="is no decoder with keys and values of one width"):
            export_base(zoo.build(name), tmp_path / "m")
    with pytest.raises(ConfigError, match="holds no exported model"):
        OnnxModel.load(tmp_path)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_base(model, tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == [] and not (tmp_path / "m" / ABOUT).exists()
