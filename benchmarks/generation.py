"""Generation: tokens a second with a prefix against the base model, at batch 1 and 8, taking turns.

The base model and the one with a prefix write the same number of tokens greedily (no early stop).

    python benchmarks/generation.py [--length 20] [--new-tokens 48] [--rounds 7] [--no-peft]
"""

from __future__ import annotations

import argparse

from _measure import keep, ratios, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()

    import torch

    import foreword as fw

    base, tokenizer = fw.load_model(options.model)
    prefixed, _ = fw.load_model(options.model)
    tuning = fw.attach(prefixed, fw.PrefixConfig(length=options.length, init="random"))
    prefix = tuning.bake()
    tuning.detach()
    fw.attach(prefixed, prefix)
    models = {"base": base, "foreword": prefixed}
    if not options.no_peft:
        from peft import PrefixTuningConfig, get_peft_model

        plain, _ = fw.load_model(options.model)
        models["PEFT"] = get_peft_model(
            plain, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.length)
        ).eval()
    record = {}
    texts = ["The film was", "I watched this one late at night, and", "Nobody could have", "Yesterday"] * 2
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    for size in (1, 8):
        batch = tokenizer(texts[:size], return_tensors="pt", padding=True)
        common = {
            "max_new_tokens": options.new_tokens,
            "min_new_tokens": options.new_tokens,
            "do_sample": False,
            "pad_token_id": tokenizer.eos_token_id,
        }

        def run(model, batch=batch, common=common) -> None:
            with torch.no_grad():
                model.generate(**batch, **common)

        variants = {name: (lambda m=model: run(m)) for name, model in models.items()}
        times = ratios(take_turns(variants, rounds=options.rounds), "base")
        speed = {name: 1 / ratio for name, ratio in times.items()}
        record[f"batch {size}"] = speed
        print(f"batch {size}: tokens a second against the base: " + ", ".join(f"{n} {s:.3f}" for n, s in speed.items()))
    keep("generation", {"options": vars(options), "speed": record})


if __name__ == "__main__":
    main()
