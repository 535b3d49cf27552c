"""Kinds of sites from what attention does, in models where lengths and the shapes of masks would mislead."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword import cli

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = {**SMALL, "image_size": 16, "patch_size": 8}
DECODER = {
    **SMALL,
    "vocab_size": zoo.VOCAB,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
PREFIX = fw.PrefixConfig(length=3, init="random")
D_MODEL = {
    "vocab_size": zoo.VOCAB, "d_model": 32, "pad_token_id": 0, "max_position_embeddings": 64,
    **{f"{part}_{n}": v for part in ("encoder", "decoder")
       for n, v in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 40))},
}  # fmt: skip


def kinds(model, example_inputs=None):
    return [s.kind for s in fw.sites(model.eval(), example_inputs) if not s.tower]


def captioner():
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tf.ViTConfig(**VIT), tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=zoo.VOCAB, n_positions=64)
    )
    return tf.VisionEncoderDecoderModel(config=config)


def gemma3():
    text = {**DECODER, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=text, vision_config=VIT, mm_tokens_per_image=4, image_token_index=98, image_token_id=98
        )
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [4, 5, 6])
def test_cross_attention_stays_cross_whatever_the_lengths(length, attn):
    model = captioner()
    model.set_attn_implementation(attn)
    given = {
        "pixel_values": torch.randn(1, 3, 16, 16),
        "decoder_input_ids": zoo.ids(1, length),
    }  # 5 tokens of a picture
    assert kinds(model, given) == ["encoder"] * 2 + ["self", "cross"] * 2


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders_with_as_many_tokens_in_both(name):
    model = zoo.build(name)
    given = zoo.inputs(name, 1)
    first = next(iter(given))
    length = 16 if name == "whisper" else given[first].shape[1]
    given["decoder_input_ids"] = zoo.ids(1, length, seed=4)
    layers = 2 if name == "whisper" else 4
    assert kinds(model, given) == ["encoder"] * layers + ["self", "cross"] * layers
    assert kinds(model, given) == kinds(model, zoo.inputs(name, 1))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_an_encoder_whose_mask_is_one_row(attn):
    config = tf.LayoutLMConfig(vocab_size=zoo.VOCAB, **SMALL)
    model = tf.LayoutLMForMaskedLM(config).eval()
    model.set_attn_implementation(attn)
    assert {(s.kind, s.causal) for s in fw.sites(model)} == {("encoder", False)}
    for config in (fw.PromptConfig(length=3, init="random"), fw.PrefixConfig(length=3, init="random", visible="infix")):
        with pytest.raises(fw.ConfigError):
            fw.attach(model, config)


@pytest.mark.parametrize("attn", ["sdpa", "eager", "flex_attention"])
def test_an_encoder_with_padding_is_one(attn):
    model = zoo.build("bert", attn=attn)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    mask[1, :3] = 0
    assert set(kinds(model, {"input_ids": zoo.ids(), "attention_mask": mask})) == {"encoder"}
    assert set(kinds(zoo.build("llama", attn=attn), {"input_ids": zoo.ids(), "attention_mask": mask})) == {"self"}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("at", [0, 2, 8])
def test_a_text_tower_is_causal_with_a_picture_in_it(at, attn):
    model = gemma3()
    model.set_attn_implementation(attn)
    ids = zoo.ids(1, 12)
    ids[:, at : at + 4] = 98
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 98).long()}
    found = fw.sites(model.eval(), given)
    assert [(s.kind, s.causal) for s in found if not s.tower] == [("self", True)] * 3
    assert {s.kind for s in found if s.tower} == {"encoder"}
    fw.attach(model, fw.PromptConfig(length=3, init="random"), example_inputs=given).detach()


def long_t5():
    config = tf.LongT5Config(
        vocab_size=zoo.VOCAB, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.LongT5ForConditionalGeneration(config)


def big_bird():
    return tf.BigBirdPegasusForConditionalGeneration(tf.BigBirdPegasusConfig(**D_MODEL, attention_type="original_full"))


def pegasus_x():
    config = {**D_MODEL, "block_size": 4, "num_global_tokens": 2}
    return tf.PegasusXForConditionalGeneration(tf.PegasusXConfig(**config))


@pytest.mark.parametrize("make", [long_t5, big_bird, pegasus_x])
def test_an_encoder_that_cannot_be_reached_is_named(make, tmp_path):
    model = make().eval()
    assert set(kinds(model)) == {"self", "cross"}
    with pytest.warns(UserWarning, match=r"attention of its encoder .* in its own code"):
        tuning = fw.attach(model, PREFIX)
    prefix = tuning.bake()
    assert prefix.metadata["unreached"] in ("encoder", "model.encoder")
    prefix.save(tmp_path / "p")
    printed = " ".join(CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "p")]).output.split())
    assert f"nothing stands in the encoder ({prefix.metadata['unreached']})" in printed
    tuning.detach()
    with pytest.raises(fw.ConfigError, match="encoder"):
        fw.attach(model, fw.PrefixConfig(length=3, init="random", kinds=("encoder",)))


@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
def test_an_encoder_that_is_reached_is_not(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "unreached" not in fw.attach(zoo.build(name), PREFIX).metadata


@pytest.mark.parametrize("of", ["SequenceClassification", "QuestionAnswering"])
def test_encoder_decoders_that_classify_are_looked_at_without_examples(of):
    model = getattr(tf, f"BartFor{of}")(tf.BartConfig(**D_MODEL)).eval()
    assert kinds(model) == ["encoder", "self", "cross"]


def test_models_that_compute_their_own_attention_are_refused_in_words():
    with pytest.raises(fw.UnsupportedModelError, match="in its own code"):
        fw.sites(tf.CanineModel(tf.CanineConfig(**SMALL)).eval())
    part = {**SMALL, "num_hidden_layers": 1}
    flava = tf.FlavaModel(tf.FlavaConfig(text_config=part, image_config={**VIT, **part}, multimodal_config=part))
    with pytest.raises(fw.UnsupportedModelError, match="in its own code"):
        fw.sites(flava.eval())
