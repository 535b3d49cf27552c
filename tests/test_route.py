"""The route from transformers' attention to ours: names stay, functions are asked anew, nothing is left behind."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foreword as fw
import zoo
from foreword import _memo

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_MOE = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2}
_DEC = {**zoo._DEC, "num_key_value_heads": 4}


def _sparse():
    """DeepSeek-V3.2, whose file asks for the name of its attention: each query sees the 4 keys that it selects."""
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "moe_intermediate_size": 16}
    return _random(
        tf.DeepseekV32ForCausalLM(tf.DeepseekV32Config(**_DEC, **_MLA, **_MOE, **index, first_k_dense_replace=2))
    )


def _sharing():
    """Gemma 4, whose upper layers read the keys of lower ones, and cut their queries to the logits that are kept."""
    config = {**zoo._DEC, "num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 4}
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 64}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": zoo.VOCAB}
    return _random(tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**config, **small)))


def _random(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def _registry():
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)


def _prefix(model, inputs=None):
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, [s for s in fw.sites(model, inputs) if not s.tower]))


@pytest.fixture
def mine():
    """A registered attention function of a user's: sdpa, but for what ``change`` makes of it."""
    change = {"by": lambda out: out}

    def function(module, query, key, value, mask, **kwargs):
        out, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return change["by"](out), weights

    AttentionInterface.register("mine", function)
    AttentionMaskInterface.register("mine", sdpa_mask)
    yield function
    del AttentionInterface._global_mapping["mine"], AttentionMaskInterface._global_mapping["mine"]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_names_and_the_registry_stay_what_they_were(attn):
    model = zoo.build("llama", attn=attn)
    registry = _registry()
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random"))
    assert model.config._attn_implementation == attn
    assert _registry() == registry
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward
    tuning.detach()
    assert _registry() == registry


_LIFE = """
import gc
import zoo
import foreword as fw
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

first, second = zoo.build("llama"), zoo.build("gpt2")
methods = AttentionInterface.get_interface, AttentionInterface.__getitem__
tuning, library = fw.attach(first, fw.PrefixConfig(length=2, init="random")), fw.Library(second)
tuning.detach()
assert AttentionInterface.get_interface is not methods[0], "the other model still has something on it"
library.detach()
assert (AttentionInterface.get_interface, AttentionInterface.__getitem__) == methods
assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
fw.attach(first, fw.PrefixConfig(length=2, init="random"))
del first, tuning
gc.collect()
assert AttentionInterface.get_interface is methods[0], "a model that is gone with its prefix holds the route"
"""


def test_the_route_is_there_as_long_as_something_stands_anywhere():
    """In a process of its own, where nothing else is attached."""
    subprocess.run(
        [sys.executable, "-c", _LIFE], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_its_prefix_when_the_original_is_detached(how):
    model = zoo.build("llama")
    tuning = fw.attach(model, _prefix(model))
    want = zoo.logits(model, input_ids=zoo.ids())
    other = how(model)
    tuning.detach()
    assert torch.equal(zoo.logits(other, input_ids=zoo.ids()), want)


@pytest.mark.parametrize("build", [_sparse, _sharing])
def test_models_whose_files_ask_for_the_name_are_the_base_with_nothing_to_add(build):
    model = build().requires_grad_(False)  # frozen before too: some products take another kernel for frozen weights
    inputs = {"input_ids": zoo.ids(2, 12)}
    for extra in ({}, {"logits_to_keep": 1}, {"logits_to_keep": 2}):
        base = zoo.logits(model, **inputs, **extra)
        library = fw.Library(model)
        assert torch.equal(zoo.logits(model, **inputs, **extra), base)
        library.detach()
        tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random"), strength=0)
        assert torch.equal(zoo.logits(model, **inputs, **extra), base)
        tuning.strength = 1
        assert not torch.allclose(zoo.logits(model, **inputs, **extra), base)
        tuning.detach()


def test_assisted_generation_is_greedy_generation_where_layers_share_keys():
    model, draft = _sharing(), zoo.build("llama")
    tuning = fw.attach(model, _prefix(model))
    for seed in range(3):
        ids = zoo.ids(1, 9, seed=seed)
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=draft), greedy)
    tuning.detach()


@pytest.mark.parametrize("trainable", [False, True])
def test_another_implementation_takes_effect_with_the_prefix_there(trainable):
    model = zoo.build("llama")
    base = zoo.logits(model, input_ids=zoo.ids())
    tuning = fw.attach(model, _prefix(model), trainable=trainable)
    want = zoo.logits(model, input_ids=zoo.ids())
    hidden = model.model(zoo.ids())[0].detach()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert torch.allclose(zoo.logits(model, input_ids=zoo.ids()), want, atol=1e-5)
        assert torch.allclose(model.model(zoo.ids())[0].detach(), hidden, atol=1e-5)
    model.config._attn_implementation_internal = "eager"
    assert torch.allclose(zoo.logits(model, input_ids=zoo.ids()), want, atol=1e-5)
    tuning.detach()
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(zoo.logits(model, input_ids=zoo.ids()), base, atol=1e-5)


def test_another_implementation_of_a_tower_or_under_a_library_takes_effect():
    model = zoo.build("llava")
    prefix, inputs = _prefix(model), {"input_ids": zoo.ids()}
    tuning = fw.attach(model, prefix)
    want = zoo.logits(model, **inputs)
    model.set_attn_implementation({"text_config": "eager"})
    assert torch.allclose(zoo.logits(model, **inputs), want, atol=1e-5)
    tuning.detach()
    library = fw.Library(model)
    library.add("a", prefix)
    model.set_attn_implementation("sdpa")
    with library.use("a"):
        assert torch.allclose(zoo.logits(model, **inputs), want, atol=1e-5)


def test_a_function_registered_anew_is_the_delegate(mine):
    model = zoo.build("llama", attn="mine")
    prefix, inputs = _prefix(model), {"input_ids": zoo.ids()}
    tuning = fw.attach(model, prefix)
    before = zoo.logits(model, **inputs)

    def doubled(*args, **kwargs):
        out, weights = mine(*args, **kwargs)
        return 2 * out, weights

    AttentionInterface.register("mine", doubled)
    after = zoo.logits(model, **inputs)
    assert not torch.allclose(before, after)
    tuning.detach()
    base = zoo.logits(model, **inputs)
    tuning = fw.attach(model, prefix, strength=0)
    assert torch.equal(zoo.logits(model, **inputs), base)
    tuning.strength = 1
    assert torch.equal(zoo.logits(model, **inputs), after)


@pytest.mark.parametrize("length", [1, 600])
def test_a_function_of_the_users_under_the_name_sdpa_is_the_delegate(length):
    """Our own kernels stand for transformers' function, not for whatever has its name."""
    model, original = zoo.build("llama"), AttentionInterface._global_mapping["sdpa"]
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length))

    def negative(*args, **kwargs):
        out, weights = original(*args, **kwargs)
        return -out, weights

    tuning = fw.attach(model, prefix)
    inputs = {"input_ids": zoo.ids(2, 9), "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    plain = zoo.logits(model, input_ids=zoo.ids())
    try:
        AttentionInterface.register("sdpa", negative)
        turned = zoo.logits(model, input_ids=zoo.ids())
        written = model.generate(**inputs, output_logits=True).logits
        model.set_attn_implementation("eager")
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter.data.neg_()
        want = zoo.logits(model, input_ids=zoo.ids())
        expected = model.generate(**inputs, output_logits=True).logits
    finally:
        AttentionInterface.register("sdpa", original)
        tuning.detach()
    assert not torch.allclose(turned, plain)
    torch.testing.assert_close(turned, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(written), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_function_that_looks_up_another_reads_the_prefix_once(mine):
    def nested(module, query, key, value, mask, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    model, inputs = zoo.build("llama"), {"input_ids": zoo.ids()}
    tuning = fw.attach(model, _prefix(model))
    want = zoo.logits(model, **inputs)
    AttentionInterface.register("mine", nested)
    model.set_attn_implementation("mine")
    torch.testing.assert_close(zoo.logits(model, **inputs), want, atol=1e-5, rtol=1e-5)
    tuning.detach()


def test_a_function_that_does_not_honour_masks_is_refused(mine):
    def blind(module, query, key, value, mask, **kwargs):
        return mine(module, query, key, value, None, **(kwargs | {"is_causal": True}))

    model = zoo.build("llama", attn="mine")
    AttentionInterface.register("mine", blind)
    tuning = fw.attach(model, _prefix(model))
    model(input_ids=zoo.ids(1, 1))
    with pytest.raises(fw.AttachError, match=r"'mine' gives another output where a mask hides a token.*sdpa"):
        model(input_ids=zoo.ids())
    tuning.detach()


class _Written(tf.PreTrainedModel):
    """A model as hubs hold them: its file looks its function up in brackets, as older releases of transformers did."""

    config_class = tf.LlamaConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.embed, self.qkv = nn.Embedding(config.vocab_size, size), nn.Linear(size, 3 * size)
        self.head = nn.Linear(size, config.vocab_size)
        self.attention, self.is_causal = nn.Identity(), True
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.embed(input_ids)
        query, key, value = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(hidden).chunk(3, -1))
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = function(self.attention, query, key, value, attention_mask, is_causal=True)
        return CausalLMOutput(logits=self.head(hidden + out.flatten(2)))


def test_a_model_that_looks_its_function_up_by_brackets():
    model = _Written(tf.LlamaConfig(**zoo._DEC, attn_implementation="sdpa")).eval()
    sites = fw.sites(model)
    assert [s.name for s in sites] == ["attention"]
    base = zoo.logits(model, input_ids=zoo.ids())
    tuning = fw.attach(model, fw.Prefix.from_tensors(model, zoo.random_prefix(model, sites)))
    assert not torch.allclose(zoo.logits(model, input_ids=zoo.ids()), base)
    tuning.strength = 0
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), base)


class _Suspicious(_Written):
    """One whose output depends on which function it is given."""

    def forward(self, input_ids=None, attention_mask=None):
        out = super().forward(input_ids, attention_mask)
        known = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation] is sdpa_attention_forward
        return CausalLMOutput(logits=out.logits * (1.0 if known else 1.5))


@pytest.mark.parametrize("use", [fw.sites, fw.Library, lambda m: fw.attach(m, fw.PrefixConfig(init="random"))])
def test_a_model_that_the_route_alone_changes_is_refused_with_the_difference(use):
    model = _Suspicious(tf.LlamaConfig(**zoo._DEC, attn_implementation="sdpa")).eval()
    with pytest.raises(fw.UnsupportedModelError, match=r"_Suspicious gives another output .* off by 0\.5"):
        use(model)


def test_two_models_given_the_same_mask_do_not_meet():
    first, second = zoo.build("llama"), zoo.build("gptoss")
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "sinks" in name:
                parameter.fill_(2.0)
    for model in (first, second):
        fw.attach(model, _prefix(model))
    inputs = {"input_ids": zoo.ids(16, 1), "attention_mask": torch.zeros(16, 1, 1, 1), "use_cache": False}
    want = zoo.logits(second, **inputs)
    zoo.logits(first, **inputs)
    assert torch.equal(zoo.logits(second, **inputs), want)


def test_a_mask_changed_past_its_version_is_read_anew_in_the_next_pass():
    model = zoo.build("llama")
    fw.attach(model, _prefix(model))
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    inputs = {"input_ids": zoo.ids(1), "attention_mask": mask, "use_cache": False}
    before = zoo.logits(model, **inputs)
    mask.data[..., 1:, 0] = -torch.inf
    after = zoo.logits(model, **inputs)
    assert not torch.allclose(before, after)
    assert torch.equal(after, zoo.logits(model, **(inputs | {"attention_mask": mask.clone()})))


@pytest.mark.parametrize("trainable", [False, True])
def test_nothing_of_a_pass_outlives_it(trainable):
    model = zoo.build("deepseek")  # its values are narrower than its keys, so causal masks are written out
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random")) if trainable else fw.Library(model)
    model(input_ids=zoo.ids(1, 60)).logits.sum().backward()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[9999]]))
    assert (_memo.current.open, _memo.current.memo, _memo.current.kept) == ([], {}, {})
    tuning.detach()
    assert not any(name.startswith("_forward") and getattr(m, name) for m in model.modules() for name in vars(m)
                   if name in ("_forward_hooks", "_forward_pre_hooks"))  # fmt: skip


def test_a_pass_that_was_interrupted_leaves_nothing_to_the_next():
    model = zoo.build("llama")
    fw.attach(model, _prefix(model))
    want = zoo.logits(model, input_ids=zoo.ids())

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=zoo.ids())
    handle.remove()
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), want)
    assert _memo.current.open == []
