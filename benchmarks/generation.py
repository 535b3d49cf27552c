"""Generation: tokens a second with a prefix against the base model, at batch 1 and 8, taking turns on one model.

All write the same number of tokens greedily (no early stop), after a few words and after a long prompt.

    python benchmarks/generation.py [--length 20] [--new-tokens 48] [--prompt-tokens 256] [--rounds 7] [--no-peft]
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager

from _measure import keep, plainly, ratios, take_turns

TEXTS = ["The film was", "I watched this one late at night, and", "Nobody could have", "Yesterday"] * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the long prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()

    import torch

    import foreword as fw

    model, tokenizer = fw.load_model(options.model)
    tuning = fw.attach(model, fw.PrefixConfig(length=options.length, init="random"))
    prefix = tuning.bake()
    tuning.detach()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    record = {}
    for size, long in ((1, False), (8, False), (1, True), (8, True)):
        batch = tokenizer(TEXTS[:size], return_tensors="pt", padding=True)
        if long:
            words = torch.arange(size * options.prompt_tokens).view(size, -1) * 7919 % 40_000 + 500
            batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
            batch["attention_mask"][1::2, : options.prompt_tokens // 8] = 0
        common = {
            "max_new_tokens": options.new_tokens,
            "min_new_tokens": options.new_tokens,
            "do_sample": False,
            "pad_token_id": tokenizer.eos_token_id,
        }

        def run(model=model, batch=batch, common=common) -> None:
            with torch.no_grad():
                model.generate(**batch, **common)

        @contextmanager
        def prefixed(run=run):
            attached = fw.attach(model, prefix)
            try:
                yield run
            finally:
                attached.detach()

        variants = {"base": plainly(run), "foreword": prefixed}
        if not options.no_peft:
            from peft import PrefixTuningConfig, get_peft_model

            # A prompt-learning PeftModel wraps the model and leaves it as it is.
            config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.length)
            peft = get_peft_model(model, config).eval()
            variants["PEFT"] = plainly(lambda peft=peft, run=run: run(peft))
        speed = {n: 1 / r for n, r in ratios(take_turns(variants, rounds=options.rounds), "base").items()}
        case = f"batch {size}, {f'{options.prompt_tokens} tokens' if long else 'short prompt'}"
        record[case] = speed
        print(f"{case}: tokens a second against the base: " + ", ".join(f"{n} {s:.3f}" for n, s in speed.items()))
    keep("generation", {"options": vars(options), "speed": record})


if __name__ == "__main__":
    main()
