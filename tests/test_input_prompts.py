"""Prompt tuning of encoder-decoder models against PEFT and against embeddings that are put in front by hand."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf
from tokenizers.processors import TemplateProcessing

import foreword as fw
import zoo
from foreword.methods import LEARNING_RATES

P = 4
CONFIG = fw.PromptConfig(length=P, init="random")


def build(name):
    """A model of the zoo, or BART with scaled embeddings. Nothing is dropped, also in training."""
    model = zoo.build("bart" if name == "scaled" else name)
    if name == "scaled":
        config = copy.deepcopy(model.config)
        config.scale_embedding = True
        scaled = tf.BartForConditionalGeneration(config)
        scaled.load_state_dict(model.state_dict())
        scaled.generation_config = model.generation_config
        model = scaled.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def masks():
    """By name: a mask over the 7 tokens of 2 rows, or none."""
    left, right = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    left[1, :3], right[0, 5:] = 0, 0
    return {"no mask": {}, "left": {"attention_mask": left}, "right": {"attention_mask": right}}


def in_front(model, prompt, tokens, attention_mask=None):
    """What a base model is given to read the prompt before its tokens."""
    embedded = model.get_encoder().get_input_embeddings()(tokens)
    found = {"inputs_embeds": torch.cat([prompt.expand(len(tokens), -1, -1), embedded], 1)}
    if attention_mask is not None:
        ones = torch.ones(len(tokens), len(prompt), dtype=torch.long)
        found["attention_mask"] = torch.cat([ones, attention_mask], 1)
    return found


def the_prompt(tuning):
    return next(iter(tuning.parameters()))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("mask", ["no mask", "left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_it_is_pefts(name, mask):
    model, arguments, hidden = build(name), {**zoo.inputs(name), **masks()[mask]}, masks()[mask]
    tuning = fw.attach(model, CONFIG)
    start = the_prompt(tuning).detach().clone()
    ours = zoo.logits(model, **arguments)
    tokens = arguments["input_ids"]
    hows = ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2})
    written = [model.generate(input_ids=tokens, **hidden, max_new_tokens=6, **how) for how in hows]
    tuning.detach()
    assert not torch.allclose(ours, zoo.logits(model, **arguments), atol=1e-2)

    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1)
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(start)
    close(ours, zoo.logits(theirs, **arguments))
    for how, ids in zip(hows, written, strict=True):
        assert torch.equal(ids, theirs.generate(input_ids=tokens, **hidden, max_new_tokens=6, **how))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", ["no mask", "left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart", "scaled"])
def test_gradients_are_those_of_embeddings_in_front(name, mask, checkpointing):
    model, hidden = build(name).train(), masks()[mask]
    tokens, labels = zoo.ids(), zoo.ids(2, 5, seed=1)
    tuning = fw.attach(model, CONFIG)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(input_ids=tokens, labels=labels, use_cache=False, **hidden).loss
    loss.backward()
    ours = the_prompt(tuning)
    start = ours.detach().clone().requires_grad_()
    assert ours.grad.norm() > 1e-3 and all(p.grad is None for p in model.parameters() if p is not ours)
    tuning.detach()
    model.gradient_checkpointing_disable()
    expected = model(**in_front(model, start, tokens, **hidden), labels=labels, use_cache=False).loss
    expected.backward()
    close(loss, expected)
    close(ours.grad, start.grad)


@pytest.mark.parametrize("mask", ["no mask", "left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart", "scaled"])
def test_it_writes_what_embeddings_in_front_do(name, mask):
    model, hidden, tokens = build(name), masks()[mask], zoo.ids()
    tuning = fw.attach(model, CONFIG)
    start = the_prompt(tuning).detach().clone()
    hows = [{"do_sample": False}, {"do_sample": False, "use_cache": False}, {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 2}]  # fmt: skip

    def write(given, how):
        torch.manual_seed(0)
        return model.generate(**given, max_new_tokens=6, **how)

    ours = [write({"input_ids": tokens, **hidden}, how) for how in hows]
    embedded = model.get_encoder().get_input_embeddings()(tokens)
    from_embeddings = write({"inputs_embeds": embedded, **hidden}, hows[0])
    tuning.detach()
    base = [write({"input_ids": tokens, **hidden}, how) for how in hows]
    given = in_front(model, start, tokens, **hidden)
    for own, how in zip(ours, hows, strict=True):
        assert torch.equal(own, write(given, how))
    assert torch.equal(from_embeddings, ours[0])
    assert any(not torch.equal(own, plain) for own, plain in zip(ours, base, strict=True))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_ways_to_call_it_agree(name):
    """By position, from embeddings, with outputs of the encoder, through the backbone, and with a whole mask."""
    model, mask = build(name), masks()["left"]["attention_mask"]
    tokens, decoder = zoo.ids(), zoo.ids(2, 5, seed=1)
    tuning = fw.attach(model, CONFIG)
    want = zoo.logits(model, input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder)
    encoder = model.get_encoder()
    embedded = encoder.get_input_embeddings()(tokens)
    long = torch.cat([mask.new_ones(2, P), mask], 1)
    with torch.no_grad():
        outputs = encoder(tokens, mask)
        assert torch.equal(model(tokens, mask, decoder).logits, want)
        close(model(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=decoder).logits, want)
        for given in (mask, long):
            read = model(encoder_outputs=outputs, attention_mask=given, decoder_input_ids=decoder)
            close(read.logits, want)
            close(model(input_ids=tokens, attention_mask=given, decoder_input_ids=decoder).logits, want)
        backbone = getattr(model, model.base_model_prefix, model)
        if backbone is not model:
            states = backbone(input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder)[0]
            close(model.lm_head(states) + model.final_logits_bias, want)
    assert outputs[0].shape[1] == P + 7
    tuning.detach()
    with torch.no_grad():
        assert encoder(tokens, mask)[0].shape[1] == 7


def test_a_model_made_of_two():
    """BERT as encoder and BERT as decoder: the encoder is a model of its own, and the pair has few settings."""
    half = zoo.build("bert").config
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    torch.manual_seed(0)
    model, mask = tf.EncoderDecoderModel(config=config).eval(), masks()["left"]
    arguments = {"input_ids": zoo.ids(), "decoder_input_ids": zoo.ids(2, 5, seed=1)}
    tuning = fw.attach(model, CONFIG)
    start = the_prompt(tuning).detach().clone()
    ours = zoo.logits(model, **arguments, **mask)
    tuning.detach()
    given = in_front(model, start, arguments.pop("input_ids"), **mask)
    close(ours, zoo.logits(model, **given, **arguments))


# ------------------------------------------------------------------------------------------ where it starts


def test_a_text_prompt_is_the_text(tokenizer):
    model, tokens = build("t5"), zoo.ids()
    text = zoo.SENTENCES[0]
    ids = torch.tensor([tokenizer(text)["input_ids"]]).expand(2, -1)
    decoder = zoo.ids(2, 5, seed=1)
    want = zoo.logits(model, input_ids=torch.cat([ids, tokens], 1), decoder_input_ids=decoder)
    tuning = fw.attach(model, fw.PromptConfig(length=None, init=text), tokenizer=tokenizer)
    close(zoo.logits(model, input_ids=tokens, decoder_input_ids=decoder), want)
    assert tuning.num_parameters == ids.shape[1] * 32
    prefix = tuning.bake()
    tuning.detach()
    assert prefix.parts[0]["length"] == ids.shape[1] and prefix.metadata["config"]["length"] is None
    fw.attach(model, prefix)  # needs no tokenizer any more
    close(zoo.logits(model, input_ids=tokens, decoder_input_ids=decoder), want)


def test_a_text_does_not_end_before_the_text(tokenizer):
    """Tokenizers of encoder-decoder models end each text; a prompt's goes on in the input."""
    model = build("t5")
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", ending.eos_token_id)]
    )
    text = "The film is good."
    assert ending(text)["input_ids"] == [*tokenizer(text)["input_ids"], ending.eos_token_id]
    config = fw.PromptConfig(length=None, init=text)
    starts = []
    for own in (tokenizer, ending):
        tuning = fw.attach(model, config, tokenizer=own)
        starts.append(the_prompt(tuning).detach().clone())
        tuning.detach()
    assert torch.equal(*starts)


@pytest.mark.parametrize("name", ["bart", "scaled"])
def test_a_start_from_the_vocabulary_is_what_the_encoder_reads(name):
    model = build(name)
    tuning = fw.attach(model, fw.PromptConfig(length=6, init="vocabulary"))
    rows = model.get_encoder().get_input_embeddings()(torch.arange(zoo.VOCAB))
    distances = torch.cdist(the_prompt(tuning).detach(), rows.detach())
    assert distances.min(1).values.max() < 1e-5
    tuning.detach()
    tuning = fw.attach(model, fw.PromptConfig(length=400, init="random"))
    ratio = the_prompt(tuning).std() / rows.std()
    assert 0.9 < ratio < 1.1


# ------------------------------------------------------------------------------------------ life


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_it_comes_off_without_a_trace_and_again_from_a_file(name, tmp_path):
    model, arguments = build(name), {**zoo.inputs(name), **masks()["right"]}
    before = [sorted(m.__dict__) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    base = zoo.logits(model, **arguments)
    tuning = fw.attach(model, CONFIG)
    assert tuning.num_parameters == P * model.config.d_model
    assert [g["lr"] for g in tuning.parameter_groups()] == [LEARNING_RATES["prompt"]] == [0.3]
    assert "prompt" in repr(tuning)
    model(**arguments, labels=arguments["decoder_input_ids"]).loss.backward()
    with torch.no_grad():
        the_prompt(tuning).sub_(the_prompt(tuning).grad)
    moved = zoo.logits(model, **arguments)
    prefix = tuning.bake()
    tuning.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)
    assert [sorted(m.__dict__) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())

    assert prefix.keys == {} and prefix.longest == 0 and prefix.num_parameters == P * model.config.d_model
    prefix.save(tmp_path / "p")
    loaded = fw.Prefix.load(tmp_path / "p")
    assert loaded == prefix
    frozen = fw.attach(model, loaded)
    assert torch.equal(zoo.logits(model, **arguments), moved) and frozen.num_parameters == 0
    frozen.detach()
    on = fw.attach(model, loaded, trainable=True)
    assert on.num_parameters == P * model.config.d_model
    assert [g["lr"] for g in on.parameter_groups()] == [0.3]
    assert torch.equal(zoo.logits(model, **arguments), moved)
    on.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)


@pytest.mark.parametrize("other", [fw.MemoryConfig(rank=2), fw.LoRAConfig(rank=2), fw.AdapterConfig(width=4)])
def test_it_stands_together_with_other_methods(other):
    model, arguments = build("t5"), {**zoo.inputs("t5"), **masks()["left"]}
    base = zoo.logits(model, **arguments)
    found = []
    for order in ([CONFIG, other], [other, CONFIG]):
        tuning, generator = fw.attach(model, order), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        assert 0.3 in [g["lr"] for g in tuning.parameter_groups()]
        found.append(zoo.logits(model, **arguments))
        prefix = tuning.bake()
        tuning.detach()
    assert torch.equal(*found)
    assert torch.equal(zoo.logits(model, **arguments), base)
    fw.attach(model, prefix)
    close(zoo.logits(model, **arguments), found[0])


def test_a_copied_model_has_its_own():
    model, arguments = build("bart"), zoo.inputs("bart")
    tuning = fw.attach(model, CONFIG)
    want = zoo.logits(model, **arguments)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        the_prompt(tuning).zero_()
    assert torch.equal(zoo.logits(copied, **arguments), want)
    assert not torch.allclose(zoo.logits(model, **arguments), want, atol=1e-3)


def test_half_precision():
    model, tokens = build("t5").to(torch.bfloat16), zoo.ids()
    tuning = fw.attach(model, CONFIG)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert the_prompt(tuning).dtype == torch.float32 and the_prompt(tuning).grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "what", "said"),
    [
        ("t5", fw.PromptConfig(length=2, init="random", position_offset=2), "position_offset=2"),
        ("bart", fw.PromptConfig(length=2, init="random", visible="first:3"), "visible='first:3'"),
        ("t5", fw.PromptConfig(length=2), "needs the model's tokenizer"),
        ("t5", [CONFIG, fw.PrefixConfig(length=2, init="random")], "two of what was given to attach are a prefix"),
        ("whisper", CONFIG, "doesn't start from token embeddings"),
        ("bert", CONFIG, "Use a PrefixConfig with this model"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(name, what, said):
    model = zoo.build(name)
    before = [sorted(m.__dict__) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    example = zoo.inputs(name) if name == "whisper" else None
    with pytest.raises(fw.ConfigError, match=said):
        fw.attach(model, what, example_inputs=example)
    assert [sorted(m.__dict__) for m in model.modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "foreword") and [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("kind", [tf.T5EncoderModel, tf.T5ForTokenClassification])
def test_an_encoder_alone_is_refused(kind):
    torch.manual_seed(0)
    model = kind(zoo.build("t5").config).eval()
    with pytest.raises(fw.ConfigError, match="the pooled token, token labels"):
        fw.attach(model, CONFIG)


def test_a_saved_prompt_is_a_prefix_to_others():
    model = build("t5")
    tuning = fw.attach(model, CONFIG)
    prefix = tuning.bake()
    tuning.detach()
    with pytest.raises(fw.ConfigError, match="are a prefix"):
        fw.attach(model, [prefix, fw.PrefixConfig(length=2, init="random")])
    with pytest.raises(fw.ConfigError, match="brings prompt"):
        fw.Library(model).add("task", prefix)


def test_a_prompt_for_another_kind_of_model_is_refused():
    model = build("t5")
    tuning = fw.attach(model, CONFIG)
    prefix = tuning.bake()
    tuning.detach()
    with pytest.raises(fw.ConfigError, match="no encoder that a decoder reads"):
        fw.attach(llama := zoo.build("llama"), prefix)
    wider = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=zoo.VOCAB, **{**zoo._T5, "d_model": 48}))
    with pytest.raises(fw.MismatchError, match="doesn't fit this model"):
        fw.attach(wider, prefix, force=True)
    assert not any(m._forward_pre_hooks for m in (*llama.modules(), *wider.modules()))


def test_an_encoder_that_scales_its_ids_itself_is_refused():
    """Pegasus multiplies what its embeddings give for ids, and leaves embeddings that it is given as they are."""
    sizes = {f"{part}_{n}": v for part in ("encoder", "decoder")
             for n, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    torch.manual_seed(0)
    config = tf.PegasusConfig(
        vocab_size=zoo.VOCAB, d_model=32, max_position_embeddings=64, scale_embedding=True, **sizes
    )
    model = tf.PegasusForConditionalGeneration(config).eval()
    with pytest.raises(fw.UnsupportedModelError, match="gives something else for the embeddings"):
        fw.attach(model, CONFIG)
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.get_encoder().embed_scale = 1.0
    assert fw.attach(model, CONFIG).num_parameters == P * 32


def test_a_mask_of_another_length_is_refused_and_the_next_pass_is_right():
    model, arguments = build("t5"), zoo.inputs("t5")
    tuning = fw.attach(model, [CONFIG, fw.MemoryConfig()])
    with torch.no_grad():
        for parameter in tuning.holder.memory.parameters():
            parameter += 0.1
    want = zoo.logits(model, **arguments)
    with pytest.raises(fw.ConfigError, match=r"shape \(2, 6\); expected \(batch, 7\)"):
        model(**arguments, attention_mask=torch.ones(2, 6))
    assert tuning._passes.depth == 0  # the pass that failed was left again
    with torch.no_grad():
        for parameter in tuning.holder.memory.parameters():
            parameter += 0.1
    moved = zoo.logits(model, **arguments)
    assert not torch.equal(moved, want)
    prefix = tuning.bake()
    tuning.detach()
    fw.attach(model, prefix)
    close(zoo.logits(model, **arguments), moved)
