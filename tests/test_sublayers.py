"""Where adapters go, and that no number is trained by two methods."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf

import foreword as fw
import zoo
from foreword._sublayers import sublayer_outputs


def _experts(name):
    size = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16}  # fmt: skip
    mla = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    shared = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
    configs = {
        "DeepseekV3": {**mla, **shared, "num_key_value_heads": 4},
        "Glm4Moe": {**shared, "head_dim": 8},
        "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
        "Mixtral": {"num_local_experts": 4},
    }
    config = getattr(tf, f"{name}Config")(**{**size, **configs[name]})
    return getattr(tf, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", ["DeepseekV3", "Glm4Moe", "Qwen2Moe", "Mixtral"])
def test_a_shared_expert_is_not_the_feed_forward(name, style):
    model = _experts(name)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(fw.ConfigError, match="shared expert"):
        fw.attach(model, fw.AdapterConfig(style=style))
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_a_gate_on_attention_is_not_its_end():
    size = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    config = tf.BeamConfig(**size, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
                           num_experts_per_tok=2, moe_intermediate_size=16)  # fmt: skip
    assert sublayer_outputs(tf.BeamForCausalLM(config).eval(), True)[0] == "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("beside", ["lora", "own"])
def test_adapters_go_after_a_layer_with_its_lora(beside):
    """Not after the low-rank change alone, which is a linear layer as well."""
    lora = fw.LoRAConfig(rank=2, targets="all-linear")
    model = zoo.build("llama")
    plain = sublayer_outputs(model, True)
    if beside == "own":
        model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    tuning = fw.attach(model, [lora, fw.AdapterConfig(width=4)] if beside == "lora" else fw.AdapterConfig(width=4))
    assert [n.removesuffix(".down.weight") for n in tuning.holder.weights["adapter"].names[::4]] == plain


def test_the_same_numbers_are_not_trained_twice():
    model = zoo.build("llama")
    with pytest.raises(fw.ConfigError, match="one of the two"):
        fw.attach(model, [fw.BitFitConfig(missing="add"), fw.FullConfig()])
    assert not hasattr(model, "foreword") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [fw.BitFitConfig(), fw.FullConfig()])
def test_a_head_trains_its_own_numbers_beside_another_method(method, tmp_path):
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**zoo._ENC)).eval()
    plain, x = zoo.logits(model, input_ids=zoo.ids()), zoo.ids()
    head = fw.PrefixConfig(length=3, init="random", head="sequence")
    tuning = fw.attach(model, [head, method])
    torch.optim.AdamW(tuning.parameter_groups())  # which refuses a parameter in two groups
    names = [tuning.holder.weights[n].names for n in ("head", method.method)]
    assert "classifier.bias" in names[0] and not set(names[0]) & set(names[1])
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.1)
    want = zoo.logits(model, input_ids=x)
    tuning.save(tmp_path)
    tuning.detach()
    assert torch.equal(zoo.logits(model, input_ids=x), plain)
    fw.attach(model, fw.Prefix.load(tmp_path))
    torch.testing.assert_close(zoo.logits(model, input_ids=x), want)
