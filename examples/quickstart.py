"""Train a tiny review prefix on the packaged model for ten steps, save it, load it, write with it.

    python examples/quickstart.py

Ten steps on eight sentences show the mechanics and nothing else; `make demo` trains on real reviews.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import foreword as fw
from foreword.data import Collator, encode, read_examples
from foreword.generation import write

REVIEWS = [
    "A warm and funny film that never puts a foot wrong.",
    "Wonderful acting, a clever script, and an ending that stays with you.",
    "I loved every minute of it and went straight back to see it again.",
    "Beautifully shot, beautifully played: one of the best films of the year.",
    "A small masterpiece, tender and full of life.",
    "The cast is superb and the story moves along with great charm.",
    "Funny, moving and wise; I cannot recommend it enough.",
    "It is a joy from the first scene to the last.",
]

model, tokenizer = fw.load_model("demo")
dataset = encode(read_examples([{"text": t} for t in REVIEWS]), tokenizer, max_length=48)
print(dataset.stats.describe())

config = fw.PrefixConfig(length=10, init="Here is what a happy viewer wrote about the film after the show:")
tuning = fw.attach(model, config, tokenizer=tokenizer)
print(tuning)

with tempfile.TemporaryDirectory() as folder:
    args = fw.PrefixTrainingArguments(
        output_dir=folder, max_steps=10, per_device_train_batch_size=4, logging_steps=2, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = fw.PrefixTrainer(model, args, train_dataset=dataset, data_collator=Collator.for_tokenizer(tokenizer))
    trainer.train()
    tuning.bake().save(Path(folder) / "reviews")
    tuning.detach()

    prefix = fw.Prefix.load(Path(folder) / "reviews")

print(prefix)
openings = ["The film", "The acting"]
before = write(model, tokenizer, openings, max_new_tokens=16, do_sample=False)
tuning = fw.attach(model, prefix)
after = write(model, tokenizer, openings, max_new_tokens=16, do_sample=False)
for opening, base, prefixed in zip(openings, before, after, strict=True):
    print(f"\nbase model:  {opening}{base}\nwith prefix: {opening}{prefixed}")
