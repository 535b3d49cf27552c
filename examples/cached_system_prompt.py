"""A system prompt read once and kept as a prefix: the same answer, and no context spent on it.

    python examples/cached_system_prompt.py

`Prefix.from_text` needs no training. In a rotary model the prompted text and the prefixed text stand at different
positions, and attention depends on distances only, so both give the same logits up to rounding.
"""

from __future__ import annotations

import torch

import foreword as fw

SYSTEM = "<|im_start|>system\nYou are a patient gardener. Answer in one short sentence.<|im_end|>\n"
QUESTION = "<|im_start|>user\nWhen should I water tomatoes?<|im_end|>\n<|im_start|>assistant\n"

model, tokenizer = fw.load_model("demo")


def answer(text: str) -> tuple[torch.Tensor, str, int]:
    """The next token's logits, a greedy answer, and how many positions of the context the input took."""
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[0, -1]
        tokens = model.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    used = batch["input_ids"].shape[1]
    return logits, tokenizer.decode(tokens[0, used:], skip_special_tokens=True), used


prompted, prompted_text, prompted_tokens = answer(SYSTEM + QUESTION)

prefix = fw.Prefix.from_text(model, tokenizer, SYSTEM)
fw.attach(model, prefix)
prefixed, prefixed_text, prefixed_tokens = answer(QUESTION)

print(prefix)
print(f"prompted: {prompted_tokens} tokens of context: {prompted_text}")
print(f"prefixed: {prefixed_tokens} tokens of context: {prefixed_text}")
print(f"same answer: {prompted_text == prefixed_text}")
print(f"largest difference between the logits: {float((prompted - prefixed).abs().max()):.1e}")
