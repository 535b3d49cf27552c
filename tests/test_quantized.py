"""Prefixes on bases in 8 and 4 bits: each backend that is installed, on a model from a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers as tf

import foreword as fw
import zoo
from foreword.quantized import _MODULES, BACKENDS, _installed, keep_backward, quantization_config
from foreword.train._live import _plain, bytes_of

sys.path.insert(0, str(zoo.__file__).replace("zoo.py", "train"))
import tiny

KINDS = [f"{width}:{backend}" for width, backends in BACKENDS.items() for backend in backends]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama wide enough for groups of 128."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.LlamaConfig(**sizes, **ids, num_hidden_layers=2, vocab_size=zoo.VOCAB, max_position_embeddings=128)
    model = tf.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones in a new model, which would make all new models alike
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    zoo.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def kind(request):
    if not _installed(_MODULES[request.param.split(":")[1]]):
        pytest.skip(f"{request.param.split(':')[1]} is not installed")
    return request.param


def widened(folder, quantized):
    """The model in 32 bits whose linear layers have the weights that the quantised one's stand for."""
    model, _ = fw.load_model(folder)
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                identity = torch.eye(module.in_features).requires_grad_()  # so that no weight is packed for inference
                with torch.enable_grad():
                    columns = quantized.model.get_submodule(name)(identity)
                module.weight.copy_(columns.detach().T)
    return model


def gradients(model, ids):
    tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random", seed=1))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return tuning, torch.cat([p.grad.flatten() for p in tuning.parameters()])


def test_gradients_are_those_of_the_widened_weights(folder, kind):
    plain, _ = fw.load_model(folder)
    model, _ = fw.load_model(folder, quantize=kind)
    own, stored = bytes_of(plain.model.layers.parameters()), bytes_of(model.model.layers.parameters())
    assert stored < own * (0.3 if kind.startswith("int8") else 0.2)
    ids = zoo.ids(4, 9)
    want = gradients(widened(folder, model), ids)[1]
    before = [t.detach().clone() for p in model.parameters() for t in _plain(p)]
    tuning, found = gradients(model, ids)
    assert want.norm() > 1e-3
    # bitsandbytes narrows the activations of its int8 layers as well.
    bound = 0.05 if kind == "int8:bitsandbytes" else 1e-3
    assert (found - want).norm() / want.norm() < bound
    assert all(p.dtype == torch.float32 for p in tuning.parameters())
    tuning.detach()
    after = [t for p in model.parameters() for t in _plain(p)]
    assert len(before) == len(after) > 20
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.grad is not None for p in model.parameters())


def test_a_prefix_goes_between_the_base_and_the_quantised_base(folder, kind, tmp_path):
    plain, _ = fw.load_model(folder)
    model, _ = fw.load_model(folder, quantize=kind)
    ids = zoo.ids(2, 9)
    tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random"))
    trainer = tiny.trainer(model, tmp_path / "run", max_steps=4, save_steps=2)
    trainer.train()
    tuning.bake().save(tmp_path / "saved")
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        tuning.detach()
        bare = model(input_ids=ids).logits
    prefix = fw.Prefix.load(tmp_path / "saved")
    assert len(prefix.fingerprint.weights) >= 3
    for base, exact in ((model, True), (plain, False)):
        attached = fw.attach(base, prefix)
        with torch.no_grad():
            found = base(input_ids=ids).logits
        attached.detach()
        if exact:
            torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-3)
            assert (found - bare).abs().max() > 0.01
    fw.attach(model, fw.attach(plain, fw.PrefixConfig(length=2, init="random")).bake()).detach()
    other = tf.LlamaForCausalLM(plain.config)
    with pytest.raises(fw.MismatchError):
        fw.attach(other, prefix)


def test_the_memory_of_a_quantised_base_is_that_of_its_narrow_weights(folder, kind, tmp_path):
    from foreword.train.memory_estimate import estimate_memory

    model, _ = fw.load_model(folder, quantize=kind)
    fw.attach(model, fw.PrefixConfig(length=4, init="random"))
    estimate = estimate_memory(tiny.trainer(model, tmp_path, tiny.rows(16, 100)))
    whole = bytes_of(fw.load_model(folder)[0].parameters())
    assert estimate.base < 0.5 * whole and estimate.activations > 0


def test_weights_packed_for_inference_are_refused(folder):
    if not _installed("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    model, _ = fw.load_model(folder, quantize="int4:bitsandbytes")
    with torch.no_grad():
        model(input_ids=zoo.ids(1, 4))
    if not getattr(model.model.layers[0].self_attn.q_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no bf16 instructions, so nothing is packed")
    for _ in range(2):
        with pytest.raises(fw.AttachError, match="packed by bitsandbytes"):
            keep_backward(model)


def test_what_is_wrong_and_what_is_missing(monkeypatch):
    for wrong in ("int2", "int8:nothing", "int4:torchao", ""):
        with pytest.raises(fw.ConfigError, match='expected "int8", "int4"'):
            quantization_config(wrong)
    monkeypatch.setattr("foreword.quantized._installed", lambda module: False)
    with pytest.raises(fw.MissingPartError, match="pip install torchao or pip install optimum-quanto"):
        quantization_config("int8")
    with pytest.raises(fw.MissingPartError, match=r"int4 needs .*: pip install optimum-quanto"):
        quantization_config("int4:quanto")


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's heap is looked at through /proc")
def test_freed_memory_goes_back_to_the_system():
    code = """
import ctypes, gc, pathlib, torch
from foreword.quantized import give_back_memory
if not hasattr(ctypes.CDLL(None), "malloc_trim"): print("none"); raise SystemExit
ctypes.CDLL(None).mallopt(-3, 32 << 20)  # from the heap, as large blocks are once some were freed
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
pairs = [(torch.ones(1 << 20), torch.ones(5000)) for _ in range(50)]  # 4 MB wide, 20 KB narrow
narrow = [n for _, n in pairs]
del pairs; gc.collect()  # the narrow ones stay between: the heap cannot shrink by itself
before = resident(); give_back_memory()
print(before - resident())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if said == "none":
        pytest.skip("not glibc")
    assert int(said) > 150e6
