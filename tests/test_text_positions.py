"""Where a row's text starts, and what is proved of positions before keys are moved: exact, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import foreword as fw
import zoo
from foreword.positions import study

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_FREE = [n for n in zoo.ROTARY if n != "qwen3next"]  # its linear layers read padding


def _random(model, std=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def _llama(**rope):
    config = tf.LlamaConfig(**(zoo._DEC | {"max_position_embeddings": 32}), rope_parameters={"rope_theta": 1e4, **rope})
    return _random(tf.LlamaForCausalLM(config))


def _values_turn():
    own = {"head_dim": 8, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 16}
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = {**zoo._DEC, "num_key_value_heads": 1, "layer_types": ["sliding_attention"] * 2, "sliding_window": 64}
    return _random(tf.DeepseekV4ForCausalLM(tf.DeepseekV4Config(**config, **own, **moe, index_topk=4)))


def _normed_after(spread):
    model = _random(tf.HunYuanDenseV1ForCausalLM(tf.HunYuanDenseV1Config(**zoo._DEC, head_dim=8)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_layernorm" in name and "self_attn" in name:
                parameter.copy_(1 + spread * torch.randn(parameter.shape, generator=generator))
    return model


UNPROVED = {
    "values turn": _values_turn,
    "norm after rotation": lambda: _normed_after(0.3),
    "norm after rotation, nearly even": lambda: _normed_after(0.01),
    "dynamic": lambda: _llama(rope_type="dynamic", factor=4.0),
    "longrope": lambda: _llama(rope_type="longrope", factor=4.0, original_max_position_embeddings=32,
                               short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0]),
}  # fmt: skip
PROVED = {
    "turns the other way": lambda: _random(tf.NanoChatForCausalLM(tf.NanoChatConfig(**zoo._DEC))),
    "norm after rotation, even": lambda: _normed_after(0.0),
    "linear": lambda: _llama(rope_type="linear", factor=4.0),
    "llama3": lambda: _llama(rope_type="llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0,
                             high_freq_factor=4.0),
    "yarn": lambda: _llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
}  # fmt: skip
TEXT = zoo.SENTENCES[2]


def _with(model, prefix, ids):
    tuning = fw.attach(model, prefix)
    out = zoo.logits(model, input_ids=ids)
    tuning.detach()
    return out


def _prompted(model, tokenizer, ids):
    text = torch.tensor([tokenizer(TEXT)["input_ids"]])
    whole = torch.cat([text, ids], 1)
    return zoo.logits(model, input_ids=whole)[:, text.shape[1] :], text.shape[1]


def _close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", UNPROVED.values(), ids=UNPROVED)
def test_keys_that_turn_in_a_way_that_is_not_proved_are_never_moved(build, tokenizer):
    model, ids = build(), zoo.ids(1, 7)
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)))
    assert prefix.rotations == {}
    for refused in (
        lambda: prefix.shift(4),
        lambda: fw.Prefix.from_text(model, tokenizer, TEXT),
        lambda: fw.attach(model, fw.PrefixConfig(length=4, init=TEXT), tokenizer=tokenizer),
        lambda: fw.attach(model, fw.PrefixConfig(length=4, init="words: film good"), tokenizer=tokenizer),
        lambda: fw.attach(model, fw.PromptConfig(length=4, init=TEXT), tokenizer=tokenizer),
    ):
        with pytest.raises(fw.MismatchError, match="position_offset"):
            refused()
    library = fw.Library(model)
    elsewhere = fw.Prefix.from_tensors(model, {n: (prefix.keys[n], prefix.values[n]) for n in prefix.keys},
                                       position_offset=3)  # fmt: skip
    with pytest.raises(fw.MismatchError, match="can't be rotated"):
        library.add("elsewhere", elsewhere)
    library.detach()
    want, length = _prompted(model, tokenizer, ids)  # but where it stays, it is exact
    _close(_with(model, fw.Prefix.from_text(model, tokenizer, TEXT, position_offset=length), ids), want)
    tuning = fw.attach(model, fw.PrefixConfig(length=None, init=TEXT, position_offset=length), tokenizer=tokenizer)
    _close(zoo.logits(model, input_ids=ids), want)
    tuning.detach()


@pytest.mark.parametrize("build", PROVED.values(), ids=PROVED)
def test_keys_whose_rotation_is_proved_are_moved_exactly(build, tokenizer):
    model, ids = build(), zoo.ids(1, 7)
    want, _ = _prompted(model, tokenizer, ids)
    prefix = fw.Prefix.from_text(model, tokenizer, TEXT)
    _close(_with(model, prefix, ids), want)
    _close(_with(model, prefix.shift(5), ids), want)
    tuning = fw.attach(model, fw.PrefixConfig(length=None, init=TEXT), tokenizer=tokenizer)
    _close(zoo.logits(model, input_ids=ids), want)
    tuning.detach()
    library = fw.Library(model)
    library.add("moved", prefix.shift(5))
    with library.use("moved"):
        _close(zoo.logits(model, input_ids=ids), want)


@pytest.mark.parametrize("offset", [0, 12])
def test_a_model_that_reads_more_of_a_text_than_keys_and_values_is_refused(offset, tokenizer):
    model = _random(tf.DogeForCausalLM(tf.DogeConfig(**zoo._DEC)))  # its masks are made of values
    with pytest.raises(fw.MismatchError, match=r"answers otherwise than prompted .*off by 0\.\d.*random"):
        fw.Prefix.from_text(model, tokenizer, TEXT, position_offset=offset)
    with pytest.raises(fw.MismatchError, match="answers otherwise than prompted"):
        fw.attach(model, fw.PrefixConfig(length=4, init=TEXT, position_offset=4 if offset else 0), tokenizer=tokenizer)
    with pytest.raises(fw.MismatchError, match="answers otherwise than prompted"):
        fw.attach(model, fw.PromptConfig(length=4, init=TEXT), tokenizer=tokenizer)
    fw.attach(model, fw.PrefixConfig(length=4, init="random")).detach()


@pytest.mark.parametrize(("name", "why"), [("gpt2", "position_offset=4"), ("bert", "both directions"), ("t5", "both")])
def test_a_text_that_can_only_be_resembled_is_said_to(name, why, tokenizer):
    with pytest.warns(fw.InexactWarning, match=why):
        fw.Prefix.from_text(zoo.build(name), tokenizer, TEXT, length=4)


def test_a_rotation_that_a_file_claims_is_proved_on_the_model():
    model = _normed_after(0.3)
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)), position_offset=3)
    even = _normed_after(0.0)
    claimed = fw.Prefix.from_tensors(even, {n: (prefix.keys[n], prefix.values[n]) for n in prefix.keys},
                                     position_offset=3)  # fmt: skip
    assert claimed.rotations
    library = fw.Library(model)
    with pytest.raises(fw.MismatchError, match="can't be rotated"):
        library.add("claimed", claimed, force=True)
    library.detach()
    tuning = fw.attach(model, claimed, force=True)
    assert tuning.bake().rotations == {}


# ---------------------------------------------------------------- padding on the left


def _padded(model, ids, pad):
    """A batch whose first row has ``pad`` tokens of padding before it, and what its rows are alone."""
    whole = ids.clone()
    whole[0, pad:] = ids[0, : ids.shape[1] - pad]
    whole[0, :pad] = 0
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return {"input_ids": whole, "attention_mask": mask}, [ids[:1, : ids.shape[1] - pad], ids[1:]]


def _rows_are_those_alone(model, pad=3):
    batch, alone = _padded(model, zoo.ids(2, 9), pad)
    got = zoo.logits(model, **batch)
    _close(got[:1, pad:], zoo.logits(model, input_ids=alone[0]))
    _close(got[1:], zoo.logits(model, input_ids=alone[1]))


METHODS = {
    "prefix": fw.PrefixConfig(length=4, init="random"),
    "at an offset": fw.PrefixConfig(length=4, init="random", position_offset=5),
    "gated": fw.PrefixConfig(length=4, init="random", gate="head"),
    "first": fw.PrefixConfig(length=4, init="random", visible="first:4"),
    "memory": fw.MemoryConfig(),
    "plain memory": fw.MemoryConfig(queries="plain"),
    "prompt": fw.PromptConfig(length=4, init="vocabulary"),
    "lora": fw.LoRAConfig(rank=2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_row_padded_on_the_left_is_the_row_alone(method, frozen):
    model = zoo.build("llama")
    tuning = fw.attach(model, METHODS[method])
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if frozen:
        prefix = tuning.bake()
        tuning.detach()
        fw.attach(model, prefix)
    _rows_are_those_alone(model)


@pytest.mark.parametrize("name", _FREE)
def test_padding_on_the_left_on_every_rotary_model(name):
    model = zoo.build(name)
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)))
    tuning = fw.attach(model, prefix)
    _rows_are_those_alone(model)
    tuning.detach()
    library = fw.Library(model)
    library.add("a", prefix)
    with library.use("a"):
        _rows_are_those_alone(model)
    with library.use(["a", None]):
        batch, alone = _padded(model, zoo.ids(2, 9), 3)
        mixed = zoo.logits(model, **batch)
    with library.use("a"):
        _close(mixed[:1, 3:], zoo.logits(model, input_ids=alone[0]))
    library.detach()
    _close(mixed[1:], zoo.logits(model, input_ids=alone[1]))


def test_the_loss_and_its_gradients_do_not_know_on_which_side_the_padding_is():
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(length=4, init="random"))
    ids = zoo.ids(2, 9)
    left, _ = _padded(model, ids, 3)
    right = {k: v.clone() for k, v in left.items()}
    for value in right.values():
        value[0] = value[0].roll(-3)
    found = []
    for batch in (left, right):
        real = batch["attention_mask"].cumsum(1) * batch["attention_mask"]
        labels = batch["input_ids"].masked_fill(real < 2, -100)  # nothing predicts a row's first token
        loss = model(**batch, labels=labels).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in tuning.parameters())])
        model.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_backbone_alone_and_steps_over_a_cache_start_there_too():
    model = zoo.build("llama")
    fw.attach(model, fw.PrefixConfig(length=4, init="random", position_offset=6))
    ids = zoo.ids(1, 9)
    whole = zoo.logits(model, input_ids=ids)
    with torch.no_grad():
        _close(model.lm_head(model.model(input_ids=ids).last_hidden_state), whole)
        for cache in (tf.DynamicCache(), tf.StaticCache(config=model.config, max_cache_len=20)):
            first = model(input_ids=ids[:, :6], past_key_values=cache).logits
            rest = model(input_ids=ids[:, 6:], past_key_values=cache).logits
            _close(torch.cat([first, rest], 1), whole)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_models_whose_base_depends_on_padding_are_left_as_they_are(name):
    model = zoo.build(name)
    batch, _ = _padded(model, zoo.ids(2, 9), 3)
    assert not study(model, fw.sites(model)).free
    base = zoo.logits(model, **batch)
    library = fw.Library(model)
    assert torch.equal(zoo.logits(model, **batch), base)
    library.detach()


def _qwen_vl():
    text = {**zoo._DEC, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 40, "num_heads": 4,
              "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "fullatt_block_indexes": [1],
              "window_size": 16, "spatial_patch_size": 4}  # fmt: skip
    tokens = {"image_token_id": 110, "video_token_id": 111, "vision_start_token_id": 112, "vision_end_token_id": 113}
    return _random(tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)))  # fmt: skip


def _picture(pad=0):
    ids = zoo.ids(1, 11)
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 112, 110, 113
    pixels = torch.randn(16, 48, generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], 1)
    mask = (torch.arange(ids.shape[1]) >= pad).long()[None]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == 110).int()}  # fmt: skip


def test_an_offset_moves_the_coordinates_of_pictures_as_a_whole():
    model = _qwen_vl()
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, [s for s in fw.sites(model) if not s.tower]))
    found = []
    for moved in (prefix, prefix.shift(4)):
        tuning = fw.attach(model, moved)
        written = model.generate(**_picture(), max_new_tokens=5, do_sample=False)
        forward = zoo.logits(model, **_picture())
        assert int(forward[0, -1].argmax()) == int(written[0, 11])
        found.append(
            (zoo.logits(model, input_ids=zoo.ids(1, 11)), forward, zoo.logits(model, **_picture(3))[:, 3:], written)
        )
        tuning.detach()
    for ours, theirs in zip(*found, strict=True):
        _close(ours.double(), theirs.double())
    _close(found[0][2], found[0][1])  # padded on the left, and not


def test_a_text_only_resembles_itself_where_layers_keep_a_state_of_their_own(tokenizer):
    model = zoo.build("qwen3next")
    with pytest.warns(fw.InexactWarning, match=r"layers without attention too \(model\.layers\.0\)"):
        fw.Prefix.from_text(model, tokenizer, TEXT)
    fw.attach(model, fw.PrefixConfig(length=4, init=TEXT), tokenizer=tokenizer).detach()  # a start all the same
