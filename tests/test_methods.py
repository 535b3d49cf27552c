"""LoRA, adapters, BitFit and full fine-tuning: against PEFT or by hand, with a prefix, and mixed by row."""

from __future__ import annotations

import copy

import pytest
import torch

import foreword as fw
import zoo
from foreword._sublayers import sublayer_outputs

METHODS = {
    "prefix": fw.PrefixConfig(length=3, init="random"),
    "gated": fw.PrefixConfig(length=3, init="random", gate="zero"),
    "weighed": fw.PrefixConfig(length=3, init="random", gate="input"),
    "memory": fw.MemoryConfig(rank=2),
    "prompt": fw.PromptConfig(length=3, init="random"),
    "lora": fw.LoRAConfig(rank=2, targets="all-linear"),
    "adapter": fw.AdapterConfig(width=4),
    "pfeiffer": fw.AdapterConfig(width=4, style="pfeiffer"),
    "bitfit": fw.BitFitConfig(missing="add"),
    "full": fw.FullConfig(),
}
PAIRS = [("prefix", "memory"), ("prefix", "lora"), ("weighed", "adapter"), ("prompt", "bitfit"), ("memory", "lora"),
         ("lora", "bitfit"), ("full", "lora")]  # fmt: skip


def trained(model, what, arguments, steps=2):
    """Attached and moved by a few steps of plain descent."""
    tuning = fw.attach(model, what, tokenizer=zoo.tokenizer())
    for _ in range(steps):
        out = model(**arguments)
        loss = out.loss if out.loss is not None else out[0].square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in tuning.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
    return tuning


def with_labels(name):
    arguments = zoo.inputs(name)
    labels = arguments.get("decoder_input_ids", arguments["input_ids"])
    return {**arguments, "labels": labels}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "bert"])
def test_every_method_trains_is_saved_and_leaves_nothing(name, method, tmp_path):
    model, arguments = zoo.build(name), with_labels(name)
    if method == "prompt" and name == "bert":
        with pytest.raises(fw.ConfigError, match=r"the pooled token, token labels.*Use a PrefixConfig"):
            fw.attach(model, METHODS[method])
        return
    original = {n: (t.clone(), t.requires_grad) for n, t in model.named_parameters()}
    kept = copy.deepcopy([sorted(m.__dict__) for m in model.modules()])
    base = zoo.logits(model, **arguments)
    tuning = trained(model, METHODS[method], arguments)
    moved = zoo.logits(model, **arguments)
    assert not torch.equal(moved, base)
    count = tuning.num_parameters
    prefix = tuning.bake()
    tuning.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: f for n, (_, f) in original.items()}
    assert all(torch.equal(p, original[n][0]) for n, p in model.named_parameters())
    assert [sorted(m.__dict__) for m in model.modules()] == kept
    prefix.save(tmp_path / "p")
    loaded = fw.Prefix.load(tmp_path / "p")
    assert loaded == prefix and count > 0
    again = fw.attach(model, loaded)
    torch.testing.assert_close(zoo.logits(model, **arguments), moved, atol=1e-5, rtol=1e-4)
    assert again.num_parameters == 0
    again.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)


@pytest.mark.parametrize("pair", PAIRS)
def test_two_methods_in_either_order_and_again_from_a_file(pair, tmp_path):
    model, arguments = zoo.build("llama"), with_labels("llama")
    base = zoo.logits(model, **arguments)
    found = []
    for order in (pair, pair[::-1]):
        tuning = trained(model, [METHODS[m] for m in order], arguments)
        found.append(zoo.logits(model, **arguments))
        prefix = tuning.bake()
        tuning.detach()
        assert torch.equal(zoo.logits(model, **arguments), base)
    assert torch.equal(*found)
    prefix.save(tmp_path / "both")
    fw.attach(model, fw.Prefix.load(tmp_path / "both"))
    torch.testing.assert_close(zoo.logits(model, **arguments), found[0], atol=1e-5, rtol=1e-4)


def test_a_prefix_on_a_frozen_lora_and_the_reverse():
    model, arguments = zoo.build("llama"), with_labels("llama")
    parts = {}
    for method in ("lora", "prefix"):
        tuning = trained(model, METHODS[method], arguments)
        parts[method] = tuning.bake()
        tuning.detach()
    apart = fw.attach(model, [parts["lora"], parts["prefix"]])
    both = zoo.logits(model, **arguments)
    apart.detach()
    apart = fw.attach(model, [parts["prefix"], parts["lora"]])
    assert torch.equal(zoo.logits(model, **arguments), both)
    apart.detach()
    tuning = fw.attach(model, [parts["lora"], METHODS["prefix"]])
    assert all(n.startswith("encoder") for n, _ in tuning.named_parameters())
    baked = tuning.bake()
    assert [p["method"] for p in baked.parts] == ["lora"]


@pytest.mark.parametrize("what", [m for m in METHODS if m not in ("lora", "full")])
@pytest.mark.parametrize("goes_on", [False, True])
def test_what_is_loaded_is_itself_beside_what_is_new(what, goes_on):
    """A new LoRA adds nothing yet: the output is that of what was loaded, and so is what it becomes."""
    model, arguments = zoo.build("llama"), with_labels("llama")
    tuning = trained(model, METHODS[what], arguments, steps=4)
    want, loaded = zoo.logits(model, **arguments), tuning.bake()
    tuning.detach()
    tuning = fw.attach(model, [loaded, METHODS["lora"]], trainable=goes_on)
    torch.testing.assert_close(zoo.logits(model, **arguments), want, atol=1e-5, rtol=1e-4)
    again = tuning.bake()
    tuning.detach()
    fw.attach(model, again)
    torch.testing.assert_close(zoo.logits(model, **arguments), want, atol=1e-5, rtol=1e-4)


def test_lora_is_pefts():
    """Same seed: same numbers, count, logits and gradients as get_peft_model's."""
    import peft

    tokens = zoo.ids()
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.LoRAConfig(rank=2, alpha=8, targets=["q_proj", "v_proj"], seed=3))
    with torch.no_grad():
        for parameter in tuning.parameters():
            if parameter.shape[1] == 2:  # B, which starts at zero
                parameter.fill_(0.03)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.manual_seed(3)
    other = peft.get_peft_model(
        zoo.build("llama"), peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    theirs = {n: p for n, p in other.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for mine, peer in zip(tuning.parameters(), theirs.values(), strict=True):
            peer.copy_(mine)
    other.eval()(input_ids=tokens, labels=tokens).loss.backward()
    assert tuning.num_parameters == sum(p.numel() for p in theirs.values())
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), zoo.logits(other, input_ids=tokens))
    for mine, peer in zip(tuning.parameters(), theirs.values(), strict=True):
        torch.testing.assert_close(mine.grad, peer.grad)


def test_merged_lora_with_a_prefix_is_the_unmerged_one():
    model, arguments = zoo.build("llama"), with_labels("llama")
    tuning = trained(model, [METHODS["prefix"], METHODS["lora"]], arguments)
    apart = zoo.logits(model, **arguments)
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    torch.testing.assert_close(zoo.logits(model, **arguments), apart, atol=1e-5, rtol=1e-4)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.unmerge()
    tuning.detach()


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
def test_adapters_are_bottlenecks_on_sublayer_outputs(style):
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.AdapterConfig(width=4, style=style))
    places = 4 if style == "houlsby" else 2
    assert tuning.num_parameters == places * (2 * 32 * 4 + 4 + 32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    numbers = tuning.bake().weights
    got = zoo.logits(model, input_ids=zoo.ids())
    tuning.detach()

    def by_hand(name):
        down, down_bias, up, up_bias = (numbers[f"adapter/{name}.{p}"] for p in
                                        ("down.weight", "down.bias", "up.weight", "up.bias"))  # fmt: skip
        return lambda m, a, h: h + torch.relu(h @ down.T + down_bias) @ up.T + up_bias

    for i in range(2):
        names = [f"model.layers.{i}.self_attn.o_proj"] * (style == "houlsby") + [f"model.layers.{i}.mlp.down_proj"]
        for name in names:
            model.get_submodule(name).register_forward_hook(by_hand(name))
    torch.testing.assert_close(got, zoo.logits(model, input_ids=zoo.ids()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("llama", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj"),
        ("neox", "gpt_neox.layers.0.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("bert", "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.1.output.dense"),
        ("opt", "model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.1.fc2"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.o", "decoder.block.3.layer.2.DenseReluDense.wo"),
        ("bart", "model.encoder.layers.0.self_attn.out_proj", "model.decoder.layers.3.fc2"),
    ],
)  # fmt: skip
def test_sublayer_outputs_are_found_by_running(name, first, last):
    found = sublayer_outputs(zoo.build(name), True)
    assert (found[0], found[-1]) == (first, last)


def test_experts_have_no_single_output():
    with pytest.raises(fw.ConfigError, match="mixture of"):
        fw.attach(zoo.build("gptoss"), fw.AdapterConfig(style="pfeiffer"))


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_bitfit_trains_the_biases(name):
    model = zoo.build(name)
    tuning = fw.attach(model, fw.BitFitConfig())
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias") and not n.startswith("foreword")}
    assert tuning.num_parameters == sum(p.numel() for p in biases.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} - biases.keys() == {
        n for n, p in model.named_parameters() if n.startswith("foreword") and p.requires_grad
    }


def test_llama_has_no_biases():
    model = zoo.build("llama")
    with pytest.raises(fw.ConfigError, match='missing="add"'):
        fw.attach(model, fw.BitFitConfig())
    tuning = fw.attach(model, fw.BitFitConfig(missing="add"))
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert tuning.num_parameters == sum(m.out_features for m in linear)
    tuning.detach()
    assert all(m.bias is None for m in linear)


def test_full_is_everything():
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.FullConfig())
    assert tuning.num_parameters == sum(p.numel() for p in zoo.build("llama").parameters())
    tuning.detach()
    with pytest.raises(fw.ConfigError, match="matches no parameter"):
        fw.attach(model, fw.FullConfig(parameters="nothing"))


# ------------------------------------------------------------------------------------------ gates, layers, refusals


def test_an_input_gate_starts_at_the_plain_prefix_and_weighs_each_query():
    model, tokens = zoo.build("llama"), zoo.ids()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", seed=5))
    plain = zoo.logits(model, input_ids=tokens)
    tuning.detach()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", seed=5, gate="input"))
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), plain, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for reading in tuning.holder.reading.values():
            reading[:, -1] = -1e4  # the weight is 2 sigmoid(-10000) = 0: no prefix
    closed = zoo.logits(model, input_ids=tokens)
    tuning.detach()
    torch.testing.assert_close(closed, zoo.logits(model, input_ids=tokens), atol=1e-5, rtol=1e-4)


def test_what_was_loaded_goes_on_at_its_own_rate():
    """Each method at what is usual for it; a rate that is given is the first one's."""
    model = zoo.build("llama")
    tuning = fw.attach(model, [METHODS["prefix"], METHODS["memory"], METHODS["adapter"]])
    parts = tuning.bake()
    tuning.detach()
    tuning = fw.attach(model, parts, trainable=True)
    assert [g["lr"] for g in tuning.parameter_groups()] == [2e-2, 1e-3, 1e-3]
    assert [g["lr"] for g in tuning.parameter_groups(1e-4)] == [1e-4, 1e-3, 1e-3]
    tuning.detach()
    tuning = fw.attach(model, [parts, METHODS["lora"]], trainable=True)
    groups = tuning.parameter_groups(1e-4)
    assert [g["lr"] for g in groups] == [1e-4, 2e-2, 1e-3, 1e-3]
    assert {p for g in groups for p in g["params"]} == set(tuning.parameters())


@pytest.mark.parametrize(
    ("sites", "layers"),
    [("first:1", [0]), ("last:1", [1]), ("every:2", [0]), ([-1], [1]), ([0, 1], [0, 1]),
     (["model.layers.1.self_attn"], [1]), (r".*\.0\..*", [0])],
)  # fmt: skip
def test_layers_are_chosen(sites, layers):
    tuning = fw.attach(zoo.build("llama"), fw.PrefixConfig(length=2, init="random", sites=sites))
    assert [s.name for s in tuning.sites] == [f"model.layers.{i}.self_attn" for i in layers]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ([], "empty list"),
        ([METHODS["prefix"], METHODS["prompt"]], "two of what was given to attach are a prefix"),
        ([METHODS["lora"], METHODS["lora"]], "are a lora"),
        ("prefix", "not str"),
        (fw.LoRAConfig(targets=["nothing_proj"]), "PEFT refuses"),
        (fw.PrefixConfig(init="random", sites=[7]), "has layer 7"),
        (fw.PrefixConfig(init="random", sites="first:0"), "leaves no site"),
        (fw.PromptConfig(), "needs the model's tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(what, said):
    model = zoo.build("llama")
    before = [sorted(m.__dict__) for m in model.modules()]
    with pytest.raises(fw.ConfigError, match=said):
        fw.attach(model, what)
    assert [sorted(m.__dict__) for m in model.modules()] == before
    assert not hasattr(model, "foreword") and all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------ mixed batches


def test_methods_mix_by_row():
    """A plain prefix, a memory, both gates, an infix and the base model in one batch, each as alone; beams too."""
    model = zoo.build("llama")
    made = {}
    for name, config in {
        "plain": METHODS["prefix"], "gated": METHODS["gated"], "weighed": METHODS["weighed"],
        "headed": fw.PrefixConfig(length=5, init="random", gate="head"), "memory": METHODS["memory"],
        "infix": fw.PrefixConfig(length=2, init="random", visible="infix:1"),
        "both": [METHODS["prefix"], fw.MemoryConfig()],
    }.items():  # fmt: skip
        tuning = fw.attach(model, config)
        generator = torch.Generator().manual_seed(len(made))
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        made[name] = tuning.bake()
        tuning.detach()
    tasks = [*made, None]
    tokens = zoo.ids(len(tasks), 6)
    library = fw.Library(model)
    for name, prefix in made.items():
        library.add(name, prefix)
    with library.use(tasks), fw.boundary(4):
        mixed = zoo.logits(model, input_ids=tokens)
    with library.use(tasks):
        written = model.generate(tokens, max_new_tokens=4, do_sample=False)
        beams = model.generate(tokens, max_new_tokens=4, do_sample=False, num_beams=2)
    for row, task in enumerate(tasks):
        with library.use(task), fw.boundary(4):
            alone = zoo.logits(model, input_ids=tokens[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=2e-5, rtol=1e-4, msg=str(task))
        with library.use(task):
            own = model.generate(tokens[row : row + 1], max_new_tokens=4, do_sample=False)
            own_beams = model.generate(tokens[row : row + 1], max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(written[row : row + 1], own) and torch.equal(beams[row : row + 1], own_beams)
    library.detach()


def test_a_library_holds_no_weights():
    model = zoo.build("llama")
    tuning = fw.attach(model, METHODS["lora"])
    prefix = tuning.bake()
    tuning.detach()
    with pytest.raises(fw.ConfigError, match="changes the model for all rows"):
        fw.Library(model).add("a", prefix)


@pytest.mark.parametrize("method", ["lora", "adapter", "memory", "prefix", "prompt"])
def test_what_a_method_adds_to_a_narrow_base_is_trained_in_float32(method):
    model = zoo.build("llama").to(torch.bfloat16)
    tuning = trained(model, METHODS[method], with_labels("llama"), steps=1)
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}
    assert model(**zoo.inputs("llama")).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_training_a_narrow_bases_own_numbers_is_warned_about(method):
    with pytest.warns(fw.PrecisionWarning, match=f"{method} trains the base's own bfloat16 numbers.*float32"):
        fw.attach(zoo.build("llama").to(torch.bfloat16), METHODS[method])
