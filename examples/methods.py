"""Several methods on one model: an infix, a memory beside a prefix, and a LoRA on a frozen prefix.

    python examples/methods.py

Each is attached, trained for two steps on two sentences, counted, and taken off again. Then the first two share a batch
with the base model. The LoRA needs PEFT: pip install "foreword[lora]".
"""

from __future__ import annotations

import torch

import foreword as fw
from foreword.data import Collator, encode, read_examples
from foreword.generation import write

model, tokenizer = fw.load_model("demo")
reviews = [
    {"input": "Review:", "output": " A warm and funny film."},
    {"input": "Review:", "output": " A joy from start to end."},
]
batch = Collator.for_tokenizer(tokenizer)(list(encode(read_examples(reviews), tokenizer, max_length=32)))
before = model.lm_head.weight.clone()


def trained(what) -> fw.Prefix:
    """Attach, train, bake, detach."""
    tuning = fw.attach(model, what, tokenizer=tokenizer)
    optimizer = torch.optim.AdamW(tuning.parameter_groups())
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{tuning}")
    prefix = tuning.bake()
    tuning.detach()
    return prefix


text = "A short and glowing review of a film:"
infix = trained(fw.PrefixConfig(length=None, init=text, visible="infix:1"))
both = trained([fw.PrefixConfig(length=None, init=text), fw.MemoryConfig(rank=4)])
on_top = trained([infix, fw.LoRAConfig(rank=8)])
on_top.save("infix-and-lora")  # one folder: fw.attach(model, fw.Prefix.load("infix-and-lora"))

library = fw.Library(model)
library.add("infix", infix)
library.add("both", both)
with library.use(["infix", "both", None]):
    for name, line in zip(
        ("infix", "prefix and memory", "base model"),
        write(model, tokenizer, ["Review:"] * 3, max_new_tokens=12, do_sample=False),
        strict=True,
    ):
        print(f"{name}: {' '.join(line.split())}")
library.detach()
print("the model is what it was:", torch.equal(model.lm_head.weight, before))
