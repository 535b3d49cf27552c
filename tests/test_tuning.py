"""attach, bake, detach in place; training, dtypes, autocast, compilation."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers as tf

import foreword as fw
import zoo

RANDOM = fw.PrefixConfig(length=3, init="random")
SUPPORTED = [n for n in zoo.ZOO if n not in zoo.UNSUPPORTED]


def attached(name, config=RANDOM, **kwargs):
    model = zoo.build(name)
    return model, fw.attach(model, config, tokenizer=zoo.tokenizer(), **kwargs)


def frozen(name, length=3, seed=0, **kwargs):
    """A model with a frozen random prefix."""
    model = zoo.build(name)
    tensors = zoo.random_prefix(model, fw.sites(model), length, seed)
    return model, fw.attach(model, fw.Prefix.from_tensors(model, tensors), **kwargs)


def state(model):
    """All that attaching might leave behind."""
    modules = list(model.modules())
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_always_called), len(m._backward_hooks))
        for m in modules
    ]
    return (
        [type(m) for m in modules], [sorted(m.__dict__) for m in modules], hooks, [m.training for m in modules],
        {n: p.requires_grad for n, p in model.named_parameters()}, list(model.state_dict()),
        [m.config._attn_implementation for m in modules if hasattr(m, "config")],
    )  # fmt: skip


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("kind", ["new", "frozen", "trainable", "library"])
def test_detaching_leaves_nothing(name, kind):
    model, arguments = zoo.build(name), zoo.inputs(name)
    next(model.parameters()).requires_grad_(False)
    base = zoo.logits(model, **arguments)
    before = state(model)
    tuning = fw.attach(model, RANDOM, example_inputs=arguments)
    assert type(model) is type(zoo.build(name))
    assert not torch.equal(zoo.logits(model, **arguments), base)
    if kind != "new":
        prefix = tuning.bake()
        tuning.detach()
        if kind == "library" and name in ("vit", "whisper"):
            return
        tuning = fw.Library(model) if kind == "library" else fw.attach(model, prefix, trainable=kind == "trainable")
        zoo.logits(model, **arguments)
    assert tuning.detach() is model
    assert state(model) == before
    assert torch.equal(zoo.logits(model, **arguments), base)
    with pytest.raises(fw.AttachError, match=r"not .*any more"):
        tuning.detach()


def test_one_prefix_at_a_time():
    model, tuning = attached("llama")
    for again in (lambda: fw.attach(model, RANDOM), lambda: fw.Library(model), lambda: fw.attach(model, tuning.bake())):
        with pytest.raises(fw.AttachError, match=r"attached already.*detach\(\)"):
            again()
    tuning.detach()
    library = fw.Library(model)
    with pytest.raises(fw.AttachError, match="attached already"):
        fw.attach(model, RANDOM)
    library.detach()
    fw.attach(model, RANDOM)
    with pytest.raises(fw.ConfigError, match="PrefixConfig or a Prefix, not str"):
        fw.attach(zoo.build("llama"), "reviews")
    with pytest.raises(fw.ConfigError, match="needs the model's tokenizer"):
        fw.attach(zoo.build("llama"), fw.PrefixConfig())


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_a_detached_model_can_be_copied_and_pickled(name):
    model, tuning = attached(name)
    arguments = zoo.inputs(name)
    with_prefix = zoo.logits(model, **arguments)
    twin = copy.deepcopy(model)
    assert torch.equal(zoo.logits(twin, **arguments), with_prefix)
    tuning.detach()
    base = zoo.logits(model, **arguments)
    assert torch.equal(zoo.logits(twin, **arguments), with_prefix)  # the copy has its own prefix
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(zoo.logits(other, **arguments), base)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(zoo.logits(torch.load(buffer, weights_only=False), **arguments), base)


def test_saving_the_detached_model(tmp_path):
    model, tuning = attached("llama")
    tuning.detach().save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(zoo.logits(again, input_ids=zoo.ids()), zoo.logits(model, input_ids=zoo.ids()))


def test_modes_and_dtypes_follow_the_model():
    model, tuning = attached("llama", fw.PrefixConfig(length=3, init="random", dropout=0.5))
    assert not tuning.encoder.training and model.train() is model and tuning.encoder.training
    model.eval()
    want = zoo.logits(model, input_ids=zoo.ids())
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), want)
    model.train()
    assert not torch.equal(zoo.logits(model, input_ids=zoo.ids()), zoo.logits(model, input_ids=zoo.ids()))
    model.eval()
    for cast in (lambda m: m.to(torch.float64), lambda m: m.bfloat16(), lambda m: m.half()):
        cast(model)
        assert {p.dtype for p in tuning.parameters()} == {model.dtype}
        got = zoo.logits(model, input_ids=zoo.ids())
        assert got.dtype == model.dtype
        torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_frozen_prefix_follows_the_model(name):
    model, tuning = frozen(name)
    arguments = zoo.inputs(name)
    want = zoo.logits(model, **arguments)
    model.to(torch.float64)
    site = tuning.sites[0].name
    assert tuning._passes.view(site).keys.dtype == torch.float64  # and is not cast at each call
    torch.testing.assert_close(zoo.logits(model, **arguments).float(), want, atol=1e-3, rtol=1e-3)


def test_the_prefix_trains_in_float32_on_a_half_precision_model():
    model = zoo.build("llama").bfloat16()
    tuning = fw.attach(model, RANDOM)
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}
    model(input_ids=zoo.ids(), labels=zoo.ids()).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in tuning.parameters())


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "bert", "gemma2"])
def test_autocast(name):
    model, tuning = attached(name)
    arguments = zoo.inputs(name)
    want = zoo.logits(model, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**arguments).logits
    torch.testing.assert_close(out.float(), want, atol=0.3, rtol=0.3)
    assert (out.float() - want).abs().mean() < 0.05
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuning.parameters())


def test_only_the_prefix_is_trained_and_two_passes_add_up():
    model, tuning = attached("llama")
    ids, names = zoo.ids(), [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.startswith("foreword.") for n in names)

    def gradients(times):
        model.zero_grad()
        sum(model(input_ids=ids, labels=ids).loss for _ in range(times)).backward()
        return [p.grad.clone() for p in tuning.parameters()]

    for once, twice in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(twice, 2 * once)
    assert not [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("foreword.")]


def test_a_step_is_seen_by_the_next_pass():
    """The views of a pass without gradients are kept until a parameter changes, however it does."""
    model, tuning = attached("llama")
    first = zoo.logits(model, input_ids=zoo.ids())
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(0.5)
    second = zoo.logits(model, input_ids=zoo.ids())
    tuning.holder.load_state_dict({n: t + 0.5 for n, t in tuning.holder.state_dict().items()})
    third = zoo.logits(model, input_ids=zoo.ids())
    assert not torch.allclose(first, second, atol=1e-2) and not torch.allclose(second, third, atol=1e-2)
    prefix = tuning.bake()
    tuning.detach()
    fw.attach(model, prefix)
    torch.testing.assert_close(zoo.logits(model, input_ids=zoo.ids()), third)


@pytest.mark.parametrize("trainable", [False, True])
def test_inference_mode_first_and_gradients_later(trainable):
    model, tuning = frozen("llama", trainable=trainable)
    with torch.inference_mode():
        want = model(input_ids=zoo.ids()).logits.clone()
    got = model(input_ids=zoo.ids()).logits
    got.sum().backward()
    torch.testing.assert_close(got.detach(), want.clone())
    owner = tuning if trainable else model
    assert any(p.grad is not None for p in owner.parameters())


def test_a_failed_pass_does_not_spoil_the_next():
    model, tuning = attached("llama")
    for bad in ({"input_ids": torch.tensor([[9999]])}, {}):
        with pytest.raises(Exception):
            model(**bad)
    assert tuning._passes.depth == 0
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=zoo.ids(), labels=zoo.ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bert", "gemma2", "gemma3", "gptoss", "modernbert"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_delegates_agree(name, attn):
    if attn == "sdpa" and name in ("gemma2", "gptoss"):
        pytest.skip("transformers has no sdpa for softcap and sinks")
    model, arguments = zoo.build(name), zoo.inputs(name)
    mask = torch.ones_like(arguments["input_ids"])
    mask[0, :2] = 0
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)))
    fw.attach(model, prefix)
    want = zoo.logits(model, **arguments, attention_mask=mask)
    other = zoo.build(name, attn=attn)
    fw.attach(other, prefix)
    got = zoo.logits(other, **arguments, attention_mask=mask)
    kept = slice(None) if name == "t5" else mask.bool()
    torch.testing.assert_close(got[kept], want[kept], atol=1e-4, rtol=1e-4)


def test_attention_weights_of_the_eager_delegate_begin_with_the_prefix():
    model = zoo.build("llama", attn="eager")
    fw.attach(model, RANDOM)
    weights = model(input_ids=zoo.ids(), output_attentions=True).attentions
    assert weights[0].shape == (2, 4, 7, 10)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 7))
    assert (weights[0][..., :3] > 0).all()


@pytest.mark.slow
def test_flex_attention():
    model = zoo.build("llama")
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)))
    fw.attach(model, prefix)
    want = zoo.logits(model, input_ids=zoo.ids())
    other = zoo.build("llama", attn="flex_attention")
    fw.attach(other, prefix)
    torch.testing.assert_close(zoo.logits(other, input_ids=zoo.ids()), want, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- transformers.Trainer and torch.compile


def test_a_plain_trainer_trains_it(tmp_path):
    model, tuning = attached("llama")
    weights = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("foreword.")}
    rows = [{"input_ids": i, "labels": i} for i in zoo.ids(8, 10)]
    arguments = tf.TrainingArguments(
        tmp_path, num_train_epochs=10, per_device_train_batch_size=4, learning_rate=0.3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = tf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])
    assert tuning.attached and tuning.bake().longest == 3


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "frozen"), ("llama", "trainable"), ("llama", "mlp")])
def test_compiled_without_more_graph_breaks(name, kind):
    torch._dynamo.reset()
    ids = zoo.ids()
    base = torch._dynamo.explain(zoo.build(name).forward)(input_ids=ids)
    torch._dynamo.reset()
    if kind == "mlp":
        model, tuning = attached(name, fw.PrefixConfig(length=3, init="random", reparam="mlp", hidden=8))
    else:
        model, tuning = frozen(name, trainable=kind == "trainable")
    want = model(input_ids=ids, labels=ids)
    found = torch._dynamo.explain(model)(input_ids=ids)
    # What is trained is made in a hook before the model's forward, which is a graph of its own.
    assert not found.break_reasons and found.graph_count <= base.graph_count + (kind != "frozen")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    got = compiled(input_ids=ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits)
    if kind != "frozen":
        gradients = torch.autograd.grad(got.loss, list(tuning.parameters()))
        for a, b in zip(gradients, torch.autograd.grad(want.loss, list(tuning.parameters())), strict=True):
            torch.testing.assert_close(a, b)
    else:
        longer = zoo.ids(2, 12)
        torch.testing.assert_close(compiled(input_ids=longer).logits, model(input_ids=longer).logits)


def test_a_compiled_training_loop_does_not_recompile():
    torch._dynamo.reset()
    model, tuning = frozen("llama", trainable=True)
    compiled, ids = torch.compile(model, backend="eager"), zoo.ids()
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.3)
    losses, graphs = [], []
    for _ in range(4):
        optimizer.zero_grad()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert graphs[1] == graphs[-1]
    torch.testing.assert_close(zoo.logits(compiled, input_ids=ids), zoo.logits(model, input_ids=ids))


def test_compiled_library_follows_the_choice():
    torch._dynamo.reset()
    model = zoo.build("llama")
    prefixes = [fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), seed=s)) for s in (0, 1)]
    library = fw.Library(model)
    library.add("a", prefixes[0])
    library.add("b", prefixes[1])
    compiled = torch.compile(model, backend="eager")
    for task in ("a", "b", ["a", None], "a"):
        with library.use(task), torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=zoo.ids()).logits, model(input_ids=zoo.ids()).logits)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model, tuning = frozen("llama", trainable=True)
    ids = zoo.ids()
    want = model(input_ids=ids, labels=ids)
    got = torch.compile(model)(input_ids=ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    for a, b in zip(*(torch.autograd.grad(x.loss, list(tuning.parameters())) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", [None, "head", "zero"])
def test_bake_keeps_the_strength(gate):
    model, tuning = attached("llama", fw.PrefixConfig(length=3, init="random", gate=gate, strength=2.5))
    inputs = zoo.ids()
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        want = model(inputs).logits
    prefix = tuning.bake()
    tuning.detach()
    fw.attach(model, prefix)
    torch.testing.assert_close(model(inputs).logits, want, atol=1e-5, rtol=0)


def test_a_frozen_prefix_is_not_in_the_state_dict():
    """So that saving the model while one is attached saves the model."""
    model = zoo.build("llama")
    names = list(model.state_dict())
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random"))
    prefix = tuning.bake()
    assert set(model.state_dict()) > set(names)
    tuning.detach()
    fw.attach(model, prefix)
    assert list(model.state_dict()) == names


def test_a_prefix_goes_onto_the_backbone_alone_and_back(tmp_path):
    import transformers as tf

    whole, x = zoo.build("llama"), zoo.ids()
    prefix = fw.Prefix.from_tensors(whole, zoo.random_prefix(whole, fw.sites(whole)))
    tuning = fw.attach(whole, prefix)
    want = zoo.logits(whole, input_ids=x)
    tuning.detach()
    whole.save_pretrained(tmp_path)
    backbone = tf.AutoModel.from_pretrained(tmp_path).eval()
    tuning = fw.attach(backbone, prefix)
    assert [s.name for s in tuning.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    states = zoo.logits(backbone, input_ids=x)
    torch.testing.assert_close(whole.lm_head(states).detach(), want, atol=1e-5, rtol=1e-5)
    back = tuning.bake()
    tuning.detach()
    library = fw.Library(backbone)
    library.add("a", prefix)
    with library.use("a"):
        torch.testing.assert_close(zoo.logits(backbone, input_ids=x), states)
    fw.attach(whole, back)
    torch.testing.assert_close(zoo.logits(whole, input_ids=x), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(fw.MismatchError):  # other weights: the names prove nothing
        fw.attach(zoo.build("llama", seed=1).model, prefix)


@pytest.mark.parametrize("options", [{}, {"reparam": "mlp", "hidden": 8}, {"reparam": "low-rank", "hidden": 2}])
@pytest.mark.parametrize("how", ["data.copy_", "data =", "vector", "copy_", "functional"])
def test_a_change_of_the_numbers_is_seen_by_passes_without_gradients(options, how):
    """However they were changed: averages that are swapped in, a vector put back, another model's numbers."""
    model, tuning = attached("llama", fw.PrefixConfig(length=3, init="random", **options))
    ids, parameters = zoo.ids(), list(tuning.parameters())
    with torch.no_grad():
        model(ids)
        before = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_logits=True).logits[0]
        new = [p + 0.5 for p in parameters]
        named = {f"foreword.{n}": v for (n, _), v in zip(tuning.named_parameters(), new, strict=True)}
        if how == "functional":
            found = torch.func.functional_call(model, named, (ids,)).logits
        for parameter, value in zip(parameters, new, strict=True):
            if how == "data.copy_":
                parameter.data.copy_(value)
            elif how == "data =":
                parameter.data = value.clone()
            else:
                parameter.copy_(value)
        if how == "vector":
            torch.nn.utils.vector_to_parameters(torch.cat([n.flatten() for n in new]), parameters)
        if how != "functional":
            found = model(ids).logits
        after = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_logits=True).logits[0]
    want = model(ids).logits.detach()  # a pass with gradients makes its own
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(after, want[:, -1])
    assert not torch.allclose(before, after, atol=1e-3)
