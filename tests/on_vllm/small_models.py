"""Tiny random decoders in heads that vLLM's kernels for CPUs know, their folders, and prefixes for them."""

from __future__ import annotations

import torch
import transformers as tf

import foreword as fw
import zoo

_SIZE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip
_OWN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=32)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZE, **_OWN, max_position_embeddings=512)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=128, n_embd=128, n_layer=3, n_head=4, n_positions=512, **_OWN)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(vocab_size=128, hidden_size=128, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4,
                     max_position_embeddings=512, word_embed_proj_dim=128, **_OWN)
    ),
}  # fmt: skip
LEARNED = ("gpt2", "opt")
TEXTS = [s[:30] for s in zoo.SENTENCES]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def build(name, seed=0):
    """In float32, with weights large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.12 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def save(model, folder):
    """As vLLM opens it."""
    model.save_pretrained(folder)
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def prefix(model, length, seed=0, learned=False):
    """Random keys and values for text that starts at 0; for models with learned positions at ``length``."""
    tensors = zoo.random_prefix(model, fw.sites(model), length, seed, scale=1.0)
    return fw.Prefix.from_tensors(model, tensors, position_offset=length if learned else 0)


def expected(model, prefix, ids, tokens):
    """foreword's own greedy tokens."""
    tuning = fw.attach(model, prefix) if prefix is not None else None
    batch = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    if tuning is not None:
        tuning.detach()
    return out[0, len(ids) :].tolist()
