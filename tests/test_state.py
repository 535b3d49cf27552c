"""A model's own state: adapters, buffers, copies and files are as they were, during and after."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open

import foreword as fw
import zoo
from foreword.tuning import tuning_of
from stating import everything, move

PREFIX = fw.PrefixConfig(length=3, init="random")
LORA = fw.LoRAConfig(rank=2, targets=["q_proj", "v_proj"])


# ---------------------------------------------------------------- wrappers


def test_a_peft_model_is_looked_through():
    x, tokenizer = zoo.ids(1), zoo.tokenizer()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    outer = peft.get_peft_model(zoo.build("llama"), config).eval()
    assert [s.name for s in fw.sites(outer)] == [s.name for s in fw.sites(outer.get_base_model())]
    prefix = fw.Prefix.from_text(outer, tokenizer, zoo.SENTENCES[2])
    assert prefix == fw.Prefix.from_text(outer.get_base_model(), tokenizer, zoo.SENTENCES[2]) and prefix.rotations
    ids = torch.tensor([tokenizer(zoo.SENTENCES[2])["input_ids"]])
    want = zoo.logits(outer, input_ids=torch.cat((ids, x), 1))[:, ids.shape[1] :]
    tuning = fw.attach(outer, prefix)
    assert tuning_of(outer) is tuning and tuning.model is outer.get_base_model()
    torch.testing.assert_close(zoo.logits(outer, input_ids=x), want, atol=1e-4, rtol=1e-4)
    tuning.detach()
    library = fw.Library(outer)
    library.add("a", prefix)
    with library.use("a"):
        torch.testing.assert_close(zoo.logits(outer, input_ids=x), want, atol=1e-4, rtol=1e-4)
    library.detach()
    made = fw.Prefix.from_tensors(outer, {n: (prefix.keys[n], prefix.values[n]) for n in prefix.keys})
    assert made == prefix


def test_a_peft_model_with_virtual_tokens_of_its_own_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(fw.ConfigError, match=r"PREFIX_TUNING.*read_peft"):
        fw.attach(peft.get_peft_model(zoo.build("llama"), config), PREFIX)


@pytest.mark.parametrize("call", [fw.sites, fw.Library, lambda m: fw.attach(m, PREFIX),
                                  lambda m: fw.Prefix.from_text(m, zoo.tokenizer(), "The film")])  # fmt: skip
@pytest.mark.parametrize(
    ("wrap", "words"),
    [(torch.compile, "_orig_mod"), (torch.nn.DataParallel, r"wrapper\.module"), (torch.nn.Sequential, "Sequential")],
)
def test_other_wrappers_are_refused(wrap, words, call):
    with pytest.raises(fw.ConfigError, match=words):
        call(wrap(zoo.build("llama")))


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = zoo.ZOO["llama"]()
    for config in (PREFIX, LORA, fw.FullConfig()):
        with pytest.raises(fw.ConfigError, match="meta device"):
            fw.attach(model, config)


def test_what_peft_froze_is_not_trained_in_silence():
    model, x = zoo.build("llama"), zoo.ids()
    tuning = fw.attach(model, PREFIX)
    outer = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert tuning.num_parameters == 0
    outer.eval()(input_ids=x)
    with pytest.raises(fw.AttachError, match="after get_peft_model"):
        outer.train()(input_ids=x, labels=x)


# ---------------------------------------------------------------- copies

COPIED = {
    "prefix": PREFIX,
    "mlp": fw.PrefixConfig(length=3, init="random", reparam="mlp"),
    "infix": fw.PrefixConfig(length=3, init="random", visible="infix"),
    "memory": fw.MemoryConfig(rank=2),
    "prompt": fw.PromptConfig(length=3, init="random"),
    "lora": LORA,
    "adapters": fw.AdapterConfig(width=4),
    "bitfit": fw.BitFitConfig(missing="add"),
    "full": fw.FullConfig(),
    "offset": fw.PrefixConfig(length=3, init="random", position_offset=3),
}


@pytest.mark.parametrize("name", COPIED)
def test_a_deep_copy_is_a_model_of_its_own(name):
    model, x = zoo.build("llama"), zoo.ids()
    labels = x.clone()
    labels[:, :3] = -100
    plain = zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, COPIED[name])
    move(tuning)
    model.train()
    model(input_ids=x, labels=labels).loss.backward()  # what the pass made is of its graph
    model.eval()

    def said(of):
        with fw.boundary(3):
            return zoo.logits(of, input_ids=x)

    got = said(model)
    tuning.model.zero_grad()
    twin = copy.deepcopy(model)
    other = tuning_of(twin)
    assert other is not tuning and other.model is twin and torch.equal(said(twin), got)
    move(other)
    assert not torch.allclose(said(twin), got, atol=1e-4) and torch.equal(said(model), got)
    twin(input_ids=x, labels=labels).loss.backward()
    assert any(p.grad is not None for p in other.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in tuning.parameters())
    other.detach()
    assert torch.equal(zoo.logits(twin, input_ids=x), plain) and torch.equal(said(model), got)
    tuning.detach()
    assert torch.equal(zoo.logits(model, input_ids=x), plain)
    assert everything(twin) == everything(model)


@pytest.mark.parametrize("name", [n for n in COPIED if n != "infix"])
def test_a_model_is_pickled_with_what_is_attached(name):
    model, x = zoo.build("llama"), zoo.ids()
    plain = zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, COPIED[name])
    move(tuning)
    got = zoo.logits(model, input_ids=x)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(zoo.logits(twin, input_ids=x), got)
    tuning_of(twin).detach()
    assert torch.equal(zoo.logits(twin, input_ids=x), plain)


# ---------------------------------------------------------------- buffers


def parakeet():
    torch.manual_seed(0)
    config = tf.ParakeetEncoderConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_mel_bins=8,
        subsampling_conv_channels=8, layerdrop=0.0, dropout=0.0, dropout_positions=0.0, activation_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    return tf.ParakeetEncoder(config).eval(), torch.randn(2, 64, 8)


def test_statistics_of_a_base_stand_still_while_it_is_trained_with():
    model, x = parakeet()
    base = model(x)[0].detach()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    tuning = fw.attach(model, PREFIX, example_inputs={"input_features": x})
    evaluated = model(x)[0].detach()
    model.train()
    torch.testing.assert_close(model(x)[0].detach(), evaluated)  # what is trained is what will run
    assert all(m.training for m in model.modules())
    model(x)[0].square().mean().backward()
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n in buffers)
    tuning.detach()
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
    model.eval()
    assert torch.equal(model(x)[0], base)
    model.train()(x)
    assert any(not torch.equal(b, buffers[n]) for n, b in model.named_buffers())  # and are the model's again


def _count(module, args, output):
    module.seen.add_(module.training)


def test_other_buffers_are_put_back():
    model, x = zoo.build("llama"), zoo.ids()
    model.model.register_buffer("seen", torch.zeros(2))
    model.model.register_forward_hook(_count)
    tuning = fw.attach(model, PREFIX)
    model.train()(input_ids=x)
    assert model.model.seen[0] == 1
    tuning.detach()
    assert model.model.seen[0] == 0


# ---------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize("kind", ["frozen", *COPIED])
def test_save_pretrained_writes_the_base_and_says_what_it_leaves_out(kind, tmp_path):
    model, x = zoo.build("llama"), zoo.ids()
    names, plain = set(model.state_dict()), zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, COPIED["prefix" if kind == "frozen" else kind])
    move(tuning)
    if kind == "frozen":
        prefix = tuning.bake()
        tuning.detach()
        tuning = fw.attach(model, prefix)
    with fw.boundary(3):
        got = zoo.logits(model, input_ids=x)
        with pytest.warns(UserWarning, match=r"save_pretrained|the base's own.*"):
            model.save_pretrained(tmp_path)
        assert torch.equal(zoo.logits(model, input_ids=x), got)  # it is as it was
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert written == names | ({n for n in model.state_dict() if n.endswith(".bias")} if kind == "bitfit" else set())
    if kind != "bitfit":
        read = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
        want = got if kind == "full" else plain
        torch.testing.assert_close(zoo.logits(read, input_ids=x), want, atol=1e-5, rtol=1e-5)
    tuning.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "after")


def test_a_state_dict_that_a_trainer_hands_over_is_cleaned(tmp_path):
    model = zoo.build("llama")
    names = set(model.state_dict())
    tuning = fw.attach(model, [PREFIX, LORA])
    with pytest.warns(UserWarning, match="the prefix and the lora"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    tuning.detach()


# ---------------------------------------------------------------- sizes that change


def test_embeddings_resized_under_full_fine_tuning():
    model, x = zoo.build("llama"), zoo.ids()
    base = zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, fw.FullConfig())
    move(tuning)
    with pytest.raises(fw.AttachError, match="trained by full"):
        model.resize_token_embeddings(zoo.VOCAB + 8)
    tf.LlamaForCausalLM.resize_token_embeddings(model, zoo.VOCAB + 8)  # by another way
    with pytest.raises(fw.AttachError, match=r"give model\.embed_tokens\.weight back"):
        tuning.detach()
    assert tuning.attached
    tf.LlamaForCausalLM.resize_token_embeddings(model, zoo.VOCAB)
    tuning.detach()
    assert torch.equal(zoo.logits(model, input_ids=x), base)
    model.resize_token_embeddings(zoo.VOCAB + 8)


def test_embeddings_resized_beside_a_prefix_stay():
    model, x = zoo.build("llama"), zoo.ids()
    base = zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, PREFIX)
    model.resize_token_embeddings(zoo.VOCAB + 8)
    model(input_ids=x, labels=x).loss.backward()
    tuning.detach()
    assert torch.equal(zoo.logits(model, input_ids=x)[..., : zoo.VOCAB], base)
