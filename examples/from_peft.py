"""A prefix that PEFT trained, brought over, and checked to give the same logits and tokens.

    pip install peft
    python examples/from_peft.py

PEFT keeps one row a virtual token, `(layers, key or value, heads, dim)` side by side, and has the text start at
position P; foreword keeps keys and values by attention site and has it start at 0.
"""

from __future__ import annotations

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import foreword as fw

P = 8  # virtual tokens


def build() -> LlamaForCausalLM:
    """A tiny Llama with random weights, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    ).eval()  # fmt: skip


peer = get_peft_model(build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
model = build()

weight = peer.prompt_encoder["default"].embedding.weight.detach()
sites = fw.sites(model)
kv_heads, dim = sites[0].kv_heads, sites[0].key_dim
states = weight.view(P, len(sites), 2, kv_heads, dim).permute(1, 2, 3, 0, 4)  # (layer, key|value, head, token, dim)
tensors = {site.name: (keys, values) for site, (keys, values) in zip(sites, states, strict=True)}

theirs = fw.Prefix.from_tensors(model, tensors, position_offset=P)  # text starts at P, as PEFT has it
ours = theirs.shift(-P)  # text starts at 0: keys rotated by R(-P), exact in rotary models

ids = torch.randint(3, 256, (2, 12))
generate = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
with torch.no_grad():
    want = peer(input_ids=ids).logits
    tokens = peer.generate(input_ids=ids, **generate)
for name, prefix in (("position_offset=P", theirs), ("shift(-P)", ours)):
    tuning = fw.attach(model, prefix)
    with torch.no_grad():
        got = model(input_ids=ids).logits
        same = torch.equal(model.generate(ids, **generate), tokens)
    print(f"{name:18} largest difference of logits {float((got - want).abs().max()):.1e}, same tokens: {same}")
    tuning.detach()
