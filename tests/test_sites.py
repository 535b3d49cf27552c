"""What sites() says of every architecture, and that looking leaves a model as it was."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import foreword as fw
import zoo
from foreword._interface import SLOT

# model: (kinds in order, heads, kv_heads, key_dim, value_dim, windows, scaling)
EXPECTED = {
    "gpt2": (["self"] * 2, 4, 4, 8, 8, [None] * 2, 8**-0.5),
    "opt": (["self"] * 2, 4, 4, 8, 8, [None] * 2, 1.0),
    "neox": (["self"] * 2, 4, 4, 8, 8, [None] * 2, 8**-0.5),
    "llama": (["self"] * 2, 4, 2, 8, 8, [None] * 2, 8**-0.5),
    "mistral": (["self"] * 2, 4, 2, 8, 8, [4] * 2, 8**-0.5),
    "qwen2": (["self"] * 2, 4, 2, 8, 8, [None] * 2, 8**-0.5),
    "qwen3": (["self"] * 2, 4, 2, 8, 8, [None] * 2, 8**-0.5),
    "gemma2": (["self"] * 2, 4, 2, 8, 8, [4096, None], 8**-0.5),
    "gemma3": (["self"] * 3, 4, 2, 8, 8, [4, None, 4], 1 / 16),
    "phi3": (["self"] * 2, 4, 2, 8, 8, [None] * 2, 8**-0.5),
    "gptoss": (["self"] * 2, 4, 2, 8, 8, [128, None], 8**-0.5),
    "deepseek": (["self"] * 2, 4, 4, 16, 12, [None] * 2, 0.25),
    "qwen3next": (["self"], 4, 2, 8, 8, [None], 8**-0.5),
    "bert": (["encoder"] * 2, 4, 4, 8, 8, [None] * 2, 8**-0.5),
    "roberta": (["encoder"] * 2, 4, 4, 8, 8, [None] * 2, 8**-0.5),
    "modernbert": (["encoder"] * 3, 4, 4, 8, 8, [None, 5, 5], 8**-0.5),
    "t5": (["encoder"] * 4 + ["self", "cross"] * 4, 4, 4, 8, 8, [None] * 12, 1.0),
    "bart": (["encoder"] * 4 + ["self", "cross"] * 4, 4, 4, 8, 8, [None] * 12, 8**-0.5),
    "whisper": (["encoder"] * 2 + ["self", "cross"] * 2, 4, 4, 8, 8, [None] * 6, None),
    "vit": (["encoder"] * 2, 4, 4, 8, 8, [None] * 2, 8**-0.5),
}
NEED_INPUTS = ("vit", "whisper")


def example(name):
    return zoo.inputs(name, batch=1) if name in NEED_INPUTS else None


@pytest.mark.parametrize("name", EXPECTED)
def test_every_attention_call_is_found(name):
    kinds, heads, kv_heads, key_dim, value_dim, windows, scaling = EXPECTED[name]
    model = zoo.build(name)
    found = fw.sites(model, example(name))
    assert [s.kind for s in found] == kinds
    assert len({s.name for s in found}) == len(found)
    assert {(s.heads, s.kv_heads, s.key_dim, s.value_dim) for s in found} == {(heads, kv_heads, key_dim, value_dim)}
    assert [s.sliding_window for s in found] == windows
    assert [s.causal for s in found] == [s.kind == "self" for s in found]
    assert {s.calls for s in found} == {1} and {s.tower for s in found} == {""}
    if scaling is not None:
        assert all(s.scaling == pytest.approx(scaling) for s in found)
    for site in found:
        assert isinstance(model.get_submodule(site.name), torch.nn.Module)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("training", [False, True])
def test_looking_changes_nothing(name, training):
    model = zoo.build(name).train(training)
    next(model.children()).eval()
    flags = [m.training for m in model.modules()]
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    fw.sites(model, example(name))
    assert [m.training for m in model.modules()] == flags
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == implementations
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert not any(SLOT in m.__dict__ for m in model.modules())


def test_a_failing_dry_run_changes_nothing_either():
    model = zoo.build("llama")
    with pytest.raises(fw.UnsupportedModelError, match=r"dry run of LlamaForCausalLM failed .*example_inputs"):
        fw.sites(model, {"input_ids": torch.tensor([[99999]])})
    assert model.config._attn_implementation == "sdpa"
    assert not any(SLOT in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", zoo.UNSUPPORTED)
def test_unsupported_models_are_named_with_the_reason(name):
    model = zoo.build(name)
    reason = "no attention call" if name == "mamba" else "in its own code"
    with pytest.raises(fw.UnsupportedModelError, match=f"{type(model).__name__} .*{reason}"):
        fw.sites(model)
    with pytest.raises(fw.UnsupportedModelError, match=type(model).__name__):
        fw.attach(model, fw.PrefixConfig(init="random"))
    with pytest.raises(fw.UnsupportedModelError, match=type(model).__name__):
        fw.Library(model)


@pytest.mark.parametrize("name", NEED_INPUTS)
def test_models_of_images_and_sound_ask_for_inputs(name):
    model = zoo.build(name)
    with pytest.raises(fw.ConfigError, match=rf"starts from '{model.main_input_name}'.*example_inputs"):
        fw.sites(model)


def test_llava_text_tower_by_default_vision_on_request():
    model, arguments = zoo.build("llava"), zoo.inputs("llava", batch=1)
    assert {s.tower for s in fw.sites(model)} == {""}  # without an image: the text tower only
    found = fw.sites(model, arguments)
    assert sorted({s.tower for s in found}) == ["", "vision_config"]
    config = fw.PrefixConfig(length=3, init="random")
    tuning = fw.attach(model, config, example_inputs=arguments)
    assert [s.kind for s in tuning.sites] == ["self"] * 2 and {s.tower for s in tuning.sites} == {""}
    tuning.detach()
    base = zoo.logits(model, **arguments)
    config = fw.PrefixConfig(length=3, init="random", sites=".*vision.*")
    tuning = fw.attach(model, config, example_inputs=arguments)
    assert tuning.sites and {s.tower for s in tuning.sites} == {"vision_config"}
    assert not torch.equal(zoo.logits(model, **arguments), base)
    tuning.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)


def test_shared_layers_are_one_site_called_often():
    torch.manual_seed(0)
    config = tf.AlbertConfig(vocab_size=128, embedding_size=16, hidden_size=32, intermediate_size=64,
                             num_hidden_layers=3, num_attention_heads=4)  # fmt: skip
    (site,) = fw.sites(tf.AlbertModel(config))
    assert site.calls == 3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: tf.GPT2LMHeadModel(tf.GPT2Config()), 368_640),
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig()), 5_242_880),
    ],
    ids=["gpt2-small", "llama-2-7b"],
)
def test_parameter_counts_without_weights(make, expected):
    with torch.device("meta"):
        model = make()
    assert sum(s.parameters(20) for s in fw.sites(model)) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sites": "("}, "not a regular expression"),
        ({"sites": "nothing"}, "leaves no site"),
        ({"sites": ["model.layers.9.self_attn"]}, "no attention site is named 'model.layers.9.self_attn'"),
        ({"kinds": ("cross",)}, "leaves no site"),
        ({"kinds": ("sideways",)}, "sideways"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(choice, message):
    with pytest.raises(fw.ConfigError, match=message):
        fw.attach(zoo.build("llama"), fw.PrefixConfig(init="random", **choice))


def test_sites_are_chosen_by_pattern_list_and_kind():
    model = zoo.build("t5")
    for choice, count in (
        ({"kinds": ("cross",)}, 4),
        ({"sites": r"encoder\..*"}, 4),
        ({"sites": r".*block\.[01]\..*", "kinds": ("self", "encoder")}, 4),
        ({"sites": ["decoder.block.1.layer.0.SelfAttention"]}, 1),
    ):
        tuning = fw.attach(model, fw.PrefixConfig(init="random", length=2, **choice))
        assert len(tuning.sites) == count
        tuning.detach()


def test_the_public_name_is_the_function_and_not_its_file():
    import foreword.sites

    assert fw.attach and fw.sites is foreword.sites and callable(fw.sites)
