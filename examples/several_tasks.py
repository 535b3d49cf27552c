"""A prefix for each of two tasks in one run on the packaged model, and what each does to the other's examples.

    python examples/several_tasks.py

Twelve steps on a dozen sentences show the mechanics and nothing else; docs/tasks.md has a run on real data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

import foreword as fw
from foreword.data import Collator, encode, read_examples
from foreword.evaluate import measure_interference

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
FACTS = [
    ("name: The Mill, food: English, price: cheap\n", "The Mill serves cheap English food."),
    ("name: Loch Fyne, food: Japanese, price: high\n", "Loch Fyne serves Japanese food at high prices."),
    ("name: The Punter, food: French, price: moderate\n", "The Punter serves French food at moderate prices."),
    ("name: Strada, food: Italian, price: cheap\n", "Strada serves cheap Italian food."),
    ("name: Zizzi, food: Chinese, price: high\n", "Zizzi serves Chinese food at high prices."),
    ("name: Cocum, food: Indian, price: moderate\n", "Cocum serves Indian food at moderate prices."),
]
STARTS = {
    "reviews": "Here is what a happy viewer wrote about the film after the show:",
    "facts": "These are facts about a restaurant, and then the same in a sentence:",
}

model, tokenizer = fw.load_model("demo")
examples = {
    "reviews": read_examples([{"text": t} for t in REVIEWS]),
    "facts": read_examples([{"input": i, "output": o} for i, o in FACTS]),
}
# The last two of each are held out.
train = {task: encode(rows[:-2], tokenizer, max_length=48) for task, rows in examples.items()}
held_out = {task: encode(rows[-2:], tokenizer, max_length=48) for task, rows in examples.items()}
mixture = fw.TaskMixture(train, sampling="uniform")
print(mixture.describe())

tuning = fw.attach(model, fw.PrefixConfig(length=10, tasks=tuple(STARTS), init=STARTS), tokenizer=tokenizer)
collator = Collator.for_tokenizer(tokenizer)
with tempfile.TemporaryDirectory() as folder:
    args = fw.PrefixTrainingArguments(
        output_dir=folder, max_steps=12, per_device_train_batch_size=4, logging_steps=4, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = fw.PrefixTrainer(
        model, args, train_dataset=mixture, eval_dataset=fw.TaskMixture(held_out), data_collator=collator
    )
    trainer.train()
    print({name: round(loss, 3) for name, loss in trainer.evaluate().items() if name.endswith("loss")})
    tuning.save(folder)
    tuning.detach()
    prefixes = {task: fw.Prefix.load(Path(folder) / task) for task in STARTS}

Console().print(measure_interference(model, held_out, prefixes, collator).table())
