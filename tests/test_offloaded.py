"""Bases with weights kept elsewhere (accelerate's offloading): the same losses, gradients and files as without.

There is no GPU here: hooks bring the weights in from the CPU's memory or from disk, and the CPU computes.
"""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as tf

import accelerate
import foreword as fw
import zoo
from foreword._offloaded import device_of, is_offloaded, numbers
from foreword.train._live import bytes_of
from foreword.train.memory_estimate import estimate_memory

sys.path.insert(0, str(zoo.__file__).replace("zoo.py", "train"))
import tiny

WAYS = ("cpu_offload", "disk_offload", "device_map", "load_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("offloaded") / "model"
    zoo.build("llama").save_pretrained(path)
    zoo.tokenizer().save_pretrained(path)
    return path


def offloaded(way, folder, tmp_path):
    """The model in the folder, some or all of its weights elsewhere."""
    if way == "load_model":
        return fw.load_model(folder, offload=50_000)[0]
    if way == "device_map":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
        return tf.AutoModelForCausalLM.from_pretrained(folder, device_map=places).eval()
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")


@pytest.fixture(params=WAYS)
def model(request, folder, tmp_path):
    made = offloaded(request.param, folder, tmp_path)
    assert is_offloaded(made) and any(p.is_meta for p in made.parameters())
    return made


@pytest.fixture
def plain(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def away(model):
    """The names of the placeholders."""
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.is_meta}


CONFIGS = {
    "text": fw.PrefixConfig(length=4, init="The film is a lovely old confection"),
    "mlp": fw.PrefixConfig(length=4, init="random", reparam="mlp", hidden=8, gate="head"),
    "strength": fw.PrefixConfig(length=4, init="random", strength=0.5, freeze_first=True),
    "prompt": fw.PromptConfig(length=4, init="random"),
    "memory": [fw.PrefixConfig(length=2, init="words:film city"), fw.MemoryConfig(rank=2)],
    "adapter": fw.AdapterConfig(width=4),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_losses_gradients_and_files_are_the_same(case, checkpointing, model, plain, tmp_path):
    before, ids = away(model), zoo.ids(3, 9)
    logits = zoo.logits(model, input_ids=ids)
    assert torch.equal(logits, zoo.logits(plain, input_ids=ids))
    found = []
    for base in (model, plain):
        tuning = fw.attach(base, CONFIGS[case], tokenizer=zoo.tokenizer())
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = base.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.device.type == "cpu" for p in tuning.parameters())
        assert not any(p.grad is not None for n, p in base.named_parameters() if not n.startswith("foreword."))
        gradients = {n: p.grad for n, p in tuning.named_parameters()}
        torch.optim.SGD(tuning.parameters(), lr=0.1).step()
        base.eval()
        found.append((loss.detach(), gradients, tuning.bake(), zoo.logits(base, input_ids=ids)))
        tuning.save(tmp_path / "saved")
        tuning.detach()
    (loss, gradients, baked, with_it), others = found[0], found[1]
    assert torch.equal(loss, others[0]) and torch.equal(with_it, others[3]) and (with_it - logits).abs().max() > 1e-3
    assert gradients.keys() == others[1].keys() and max(g.abs().max() for g in gradients.values()) > 1e-4
    assert all(torch.equal(g, others[1][n]) for n, g in gradients.items())
    assert baked == others[2] == fw.Prefix.load(tmp_path / "saved")
    # Detached, the model is what it was: nothing more is here, every weight learns again, the numbers are the same.
    assert away(model) == before and all(p.requires_grad for p in model.parameters())
    assert torch.equal(zoo.logits(model, input_ids=ids), logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_run_is_the_same(checkpointing, model, plain, tmp_path):
    before, runs = away(model), []
    for base in (model, plain):
        tuning = fw.attach(base, fw.PrefixConfig(length=4, init="random", dropout=0.1))
        made = tiny.trainer(base, tmp_path / str(len(runs)), gradient_checkpointing=checkpointing)
        made.train()
        runs.append((tiny.losses(made), tuning.bake()))
        # Checkpointing runs layers again in the backward: also there all is taken away.
        assert base is plain or away(base) - {n for n in away(base) if n.startswith("foreword.")} == before
    assert runs[0] == runs[1]
    checkpoint = tmp_path / "0" / "checkpoint-4"
    assert fw.Prefix.load(tmp_path / "0" / "checkpoint-6") == runs[0][1] and not list(checkpoint.glob("*model*"))
    model.foreword.tuning.detach()
    tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random", dropout=0.1))
    again = tiny.trainer(model, tmp_path / "0", gradient_checkpointing=checkpointing)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert tiny.losses(again) == runs[0][0] and tuning.bake() == runs[0][1]


def test_the_base_is_known_by_numbers_that_are_elsewhere(model, plain, folder):
    for name, parameter in plain.named_parameters():
        assert torch.equal(numbers(model, name, dict(model.named_parameters())[name]), parameter)
    baked = fw.attach(plain, fw.PrefixConfig(length=2, init="random")).bake()
    tuning = fw.attach(model, baked)
    assert len(tuning.fingerprint.weights) == 8 and tuning.fingerprint.difference(baked.fingerprint) is None
    other = fw.attach(zoo.build("llama", seed=4), fw.PrefixConfig(length=2, init="random")).bake()
    tuning.detach()
    with pytest.raises(fw.MismatchError):
        fw.attach(model, other)


def test_serving_from_elsewhere(model, plain):
    prefix = fw.attach(plain, fw.PrefixConfig(length=4, init="random")).bake()
    plain.foreword.tuning.detach()
    ids, written = zoo.ids(2, 5), []
    for base in (model, plain):
        library = fw.Library(base)
        library.add("a", prefix)
        with library.use(["a", None]):
            written.append(base.generate(ids, max_new_tokens=6, do_sample=False))
        library.detach()
        tuning = fw.attach(base, prefix)
        written.append(base.generate(ids, max_new_tokens=6, do_sample=False))
        written.append(fw.attention_shares(base, input_ids=ids)["model.layers.1.self_attn"])
        tuning.detach()
    assert all(torch.equal(a, b) for a, b in zip(written[:3], written[3:], strict=True))


def test_an_encoder_and_decoder(tmp_path):
    inputs, found = zoo.inputs("t5"), []
    for where in ("elsewhere", "here"):
        model = zoo.build("t5")
        if where == "elsewhere":
            accelerate.cpu_offload(model, execution_device="cpu")
        for config in (fw.PrefixConfig(length=3, init="random"), fw.PromptConfig(length=3, init="random")):
            tuning = fw.attach(model, config)
            model.train()(**inputs, labels=inputs["decoder_input_ids"]).loss.backward()
            found.append([p.grad for p in tuning.parameters()])
            model.eval()
            prefix = tuning.bake()
            tuning.detach()
            attached = fw.attach(model, prefix)
            found.append([zoo.logits(model, **inputs)])
            attached.detach()
    for a, b in zip(found[:4], found[4:], strict=True):
        assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("config", [fw.LoRAConfig(rank=2), fw.FullConfig(), fw.BitFitConfig(missing="add")])
def test_what_would_train_placeholders_is_refused(config, model, plain):
    before, ids = away(model), zoo.ids()
    with pytest.raises(fw.ConfigError, match=r"which is kept outside .* \(offloaded\)"):
        fw.attach(model, config)
    assert away(model) == before and not hasattr(model, "peft_config")
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert torch.equal(zoo.logits(model, input_ids=ids), zoo.logits(plain, input_ids=ids))


def test_offloading_what_is_attached_is_refused(plain, tmp_path):
    fw.attach(plain, fw.PrefixConfig(length=2, init="random"))
    accelerate.cpu_offload(plain, execution_device="cpu")
    with pytest.raises(fw.AttachError, match="offload the model, and attach then"):
        tiny.trainer(plain, tmp_path)


def test_the_memory_of_a_step_counts_what_it_brings_in(folder, tmp_path):
    whole = bytes_of(tf.AutoModelForCausalLM.from_pretrained(folder).parameters())

    def estimate(model, **arguments):
        fw.attach(model, fw.PrefixConfig(length=4, init="random"))
        return estimate_memory(tiny.trainer(model, tmp_path / "run", tiny.rows(16, 40), **arguments))

    here = estimate(tf.AutoModelForCausalLM.from_pretrained(folder))
    in_memory = estimate(offloaded("cpu_offload", folder, tmp_path))
    assert in_memory.base < whole / 10 and in_memory.total == pytest.approx(here.total, rel=0.02)
    one_by_one = estimate(offloaded("disk_offload", folder, tmp_path), gradient_checkpointing=True)
    with_all = estimate(tf.AutoModelForCausalLM.from_pretrained(folder), gradient_checkpointing=True)
    assert with_all.total - whole < one_by_one.total < with_all.total - whole / 4


@pytest.mark.parametrize("wrong", ["a lot", "0GB", "", -5])
def test_how_much_to_hold_is_checked(wrong, folder):
    with pytest.raises(fw.ConfigError, match='such as "2GB"'):
        fw.load_model(folder, offload=wrong)


def test_narrow_and_elsewhere_do_not_go_together(folder):
    with pytest.raises(fw.ConfigError, match="offload and quantize"):
        fw.load_model(folder, offload="1GB", quantize="int8")


def test_what_fits_is_all_held(folder):
    model, _ = fw.load_model(folder, offload="1GB")
    assert not is_offloaded(model) and not away(model)
    fw.attach(model, fw.PrefixConfig(length=2, init="random")).detach()


def test_hardly_any_room_still_runs(folder, plain):
    model, _ = fw.load_model(folder, offload=1)
    assert len(away(model)) == len(dict(plain.named_parameters(remove_duplicate=False)))
    assert device_of(model).type == "cpu"
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), zoo.logits(plain, input_ids=zoo.ids()))


def test_a_model_that_is_not_stored_as_it_is_used(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=zoo.VOCAB, num_local_experts=4)
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    zoo.tokenizer().save_pretrained(tmp_path / "experts")
    with pytest.raises(fw.ConfigError, match="with an offload_folder"):
        fw.load_model(tmp_path / "experts", offload=1000)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    settings = {"device_map": places, "offload_folder": str(tmp_path / "weights")}
    ids, found = zoo.ids(2, 7), []
    for given in (settings, {}):
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "experts", **given)
        tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random"))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in tuning.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("path", ["auto", "merged", "concat"])
def test_activations_kept_on_the_cpu_give_the_same_gradients(name, path):
    """``pin_memory=True`` copies what is saved even where there is nothing to move it from."""
    inputs, found, kept = zoo.inputs(name, length=20), [], []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self):
            super().__init__(pin_memory=True)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: kept.append(tensor.numel()) or pack(tensor)

    for keeping in (False, True):
        model = zoo.build(name)
        tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random", gate="head"))
        torch.manual_seed(0)  # dropout
        labels = inputs.get("decoder_input_ids", inputs["input_ids"])
        with fw.attention_path(path):
            if keeping:
                with Counted():
                    loss = model.train()(**inputs, labels=labels).loss
            else:
                loss = model.train()(**inputs, labels=labels).loss
            loss.backward()
        found.append((loss.detach(), [p.grad for p in tuning.parameters()]))
    assert sum(kept) > 1000 and torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-7, rtol=1e-5)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_keeping_activations_beside_a_gpu_needs_one(tmp_path):
    with pytest.raises(fw.ConfigError, match="there is none"):
        fw.PrefixTrainingArguments(
            output_dir=str(tmp_path), gradient_checkpointing=True, gradient_checkpointing_kwargs={"offload": True}
        )
