"""Two prefixes and the base model in one batch, a task a row.

    python examples/mixed_batch.py

The prefixes have different lengths. Each row equals what the same task writes alone.
"""

from __future__ import annotations

import foreword as fw
from foreword.generation import write

TEXTS = {
    "pirate": "Old pirate's diary. We sail at dawn, the crew is drunk again, arrr, and I write this by lamplight:",
    "report": "Minutes of the board meeting, in a dry and formal tone:",
}
OPENING = "Yesterday evening"

model, tokenizer = fw.load_model("demo")
prefixes = {name: fw.Prefix.from_text(model, tokenizer, text) for name, text in TEXTS.items()}

library = fw.Library(model)
for name, prefix in prefixes.items():
    library.add(name, prefix)
    print(f"{name}: {prefix.longest} virtual tokens, {prefix.nbytes:,} bytes")

tasks = ["pirate", None, "report"]
with library.use(tasks):
    mixed = write(model, tokenizer, [OPENING] * len(tasks), max_new_tokens=24, do_sample=False)

for task, text in zip(tasks, mixed, strict=True):
    with library.use(task):
        (alone,) = write(model, tokenizer, [OPENING], max_new_tokens=24, do_sample=False)
    print(f"\n{task or 'base model'} (as alone: {text == alone})\n  {OPENING}{' '.join(text.split(' '))}")

library.detach()
