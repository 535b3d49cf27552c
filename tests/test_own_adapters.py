"""Adapters of the user's own, through PEFT: active beside ours, and as they were after it."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import foreword as fw
import zoo
from stating import everything, move

PREFIX = fw.PrefixConfig(length=3, init="random")
LORA = fw.LoRAConfig(rank=2, targets=["q_proj", "v_proj"])


def own(model, name="mine", targets=("q_proj", "down_proj"), seed=0, kind=peft.LoraConfig, **options):
    """An adapter of the user's, with weights that show."""
    torch.manual_seed(seed)
    known = {"r": 2, "init_lora_weights": False} if kind is peft.LoraConfig else {}
    model.add_adapter(kind(target_modules=list(targets), **{**known, **options}), adapter_name=name)
    return model


def one(model):
    return own(model)


def several(model):
    own(own(model), "other", ("v_proj",), 1)
    model.set_adapter(["mine", "other"])
    return model


def one_of_two(model):
    own(own(model), "other", ("q_proj", "v_proj"), 1)
    model.set_adapter("mine")
    return model


def switched_off(model):
    own(model).disable_adapters()
    return model


def another_kind(model):
    own(model, kind=peft.IA3Config, targets=("q_proj", "down_proj"), feedforward_modules=["down_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.add_(0.5 * torch.arange(parameter.numel()).view(parameter.shape).cos())
    return model


def injected(model):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model, adapter_name="put_in")


def inside_peft(model):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).get_base_model().eval()


OWN = {f.__name__: f for f in (one, several, one_of_two, switched_off, another_kind, injected, inside_peft)}


@pytest.mark.parametrize(
    "what", [[LORA], [PREFIX, LORA], [PREFIX, fw.AdapterConfig(width=4)]], ids=["lora", "both", "adapters"]
)
@pytest.mark.parametrize("kind", OWN)
def test_own_adapters_act_beside_ours_and_stay(kind, what):
    model, x = OWN[kind](zoo.build("llama")).eval(), zoo.ids()
    before, base = everything(model), zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, what, strength=0)
    assert torch.equal(zoo.logits(model, input_ids=x), base)  # a new LoRA changes nothing yet
    move(tuning)
    moved = zoo.logits(model, input_ids=x)
    assert not torch.allclose(moved, base, atol=1e-3)
    saved = tuning.bake()
    model.train()
    model(input_ids=x, labels=x).loss.backward()
    model.eval()
    tuning.detach()
    assert everything(model) == before
    assert torch.equal(zoo.logits(model, input_ids=x), base)
    again = fw.attach(model, saved, strength=0)  # and what was trained beside them goes back beside them
    torch.testing.assert_close(zoo.logits(model, input_ids=x), moved, atol=1e-5, rtol=1e-5)
    again.detach()
    assert everything(model) == before


def test_both_deltas_are_added():
    model, x = own(zoo.build("llama"), targets=("q_proj",)), zoo.ids()
    tuning = fw.attach(model, LORA)
    move(tuning)
    got = zoo.logits(model, input_ids=x)
    numbers = tuning.bake().weights
    tuning.detach()
    layers = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    with torch.no_grad():
        for name, layer in layers.items():
            base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            a, b = (numbers[f"lora/{name}.lora_{p}.foreword.weight"] for p in "AB")
            base.weight.add_(b @ a * (LORA.alpha / LORA.rank))
    torch.testing.assert_close(got, zoo.logits(model, input_ids=x), atol=1e-5, rtol=1e-5)


def test_an_adapter_added_while_ours_is_attached():
    model, x = zoo.build("llama"), zoo.ids()
    tuning = fw.attach(model, LORA)
    move(tuning)
    own(model, targets=("q_proj", "down_proj"))
    with pytest.raises(fw.AttachError, match="leaves out the LoRA"):
        model(input_ids=x)
    model.set_adapter(["mine", "foreword"])
    model(input_ids=x)
    tuning.detach()
    alone = own(zoo.build("llama"), targets=("q_proj", "down_proj"))
    assert torch.equal(zoo.logits(model, input_ids=x), zoo.logits(alone, input_ids=x))
    assert list(model.peft_config) == ["mine"] and [n for n, _ in model.named_modules()] == [
        n for n, _ in alone.named_modules()
    ]


def test_what_peft_cannot_do_is_refused_and_leaves_nothing():
    model = own(zoo.build("llama"))
    for layer in model.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    before = everything(model)
    with pytest.raises(fw.AttachError, match="'mine' is merged"):
        fw.attach(model, LORA)
    assert everything(model) == before
    model = own(zoo.build("llama"), name="foreword")
    with pytest.raises(fw.AttachError, match="named 'foreword'"):
        fw.attach(model, LORA)
    model, x = own(zoo.build("llama"), bias="all"), zoo.ids()
    before, base = everything(model), zoo.logits(model, input_ids=x)
    with pytest.raises(fw.ConfigError, match="PEFT refuses"):
        fw.attach(model, fw.LoRAConfig(rank=2, options={"bias": "all"}))
    assert everything(model) == before and torch.equal(zoo.logits(model, input_ids=x), base)


def test_saved_modules_of_ours_come_off_as_well():
    model, x = zoo.build("llama"), zoo.ids()
    before, base = everything(model), zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, fw.LoRAConfig(rank=2, options={"modules_to_save": ["lm_head"]}))
    move(tuning)
    assert not torch.allclose(zoo.logits(model, input_ids=x), base)
    tuning.detach()
    assert everything(model) == before and torch.equal(zoo.logits(model, input_ids=x), base)


@pytest.mark.parametrize("method", [fw.BitFitConfig(missing="add"), fw.FullConfig(parameters=r".*q_proj.*")])
def test_methods_on_own_parameters_beside_own_adapters(method):
    model, x = own(zoo.build("llama")), zoo.ids()
    before, base = everything(model), zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, method)
    if isinstance(method, fw.BitFitConfig):
        assert not any("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    move(tuning)
    tuning.detach()
    assert everything(model) == before and torch.equal(zoo.logits(model, input_ids=x), base)


def test_own_adapters_are_saved_without_ours(tmp_path):
    model, x = own(zoo.build("llama")), zoo.ids()
    base = zoo.logits(model, input_ids=x)
    model.save_pretrained(tmp_path / "before")
    tuning = fw.attach(model, [PREFIX, LORA])
    move(tuning)
    with pytest.warns(UserWarning, match="does not write"):
        model.save_pretrained(tmp_path / "attached")
    tuning.detach()
    read = zoo.build("llama")
    read.load_adapter(str(tmp_path / "attached"))
    assert torch.equal(zoo.logits(read, input_ids=x), base)
    files = [{p.name for p in (tmp_path / f).iterdir()} for f in ("before", "attached")]
    assert files[0] == files[1]


def test_conv1d_models_keep_own_adapters_as_well():
    model, x = zoo.build("gpt2"), zoo.ids()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    base = zoo.logits(model, input_ids=x)
    tuning = fw.attach(model, [fw.LoRAConfig(rank=2, targets=["c_attn"]), fw.AdapterConfig(width=4)])
    assert torch.equal(zoo.logits(model, input_ids=x), base)
    move(tuning)
    tuning.detach()
    assert torch.equal(zoo.logits(model, input_ids=x), base)
    assert sum(isinstance(m, Conv1D) for m in model.modules()) == 8
