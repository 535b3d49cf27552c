"""One training step: the frozen base model's own forward and backward, foreword, and PEFT, side by side.

The base's backward runs to its input embeddings, which is what any method that trains something below the layers
pays. Same data, same loss, one process, taking turns.

    python benchmarks/step.py [--batch 8] [--tokens 128] [--length 20] [--rounds 7] [--no-peft]
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager

from _measure import keep, plainly, ratios, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()

    import torch

    import foreword as fw

    model, _ = fw.load_model(options.model)
    model.requires_grad_(False)
    ids = torch.randint(5, model.config.vocab_size - 5, (options.batch, options.tokens))
    embed = model.get_input_embeddings()

    def base_step() -> None:
        model(inputs_embeds=embed(ids).requires_grad_(), labels=ids).loss.backward()

    def with_prefix(config: fw.PrefixConfig, path: str = "auto"):
        @contextmanager
        def variant():
            tuning = fw.attach(model, config)

            def step() -> None:
                with fw.attention_path(path):
                    model(input_ids=ids, labels=ids).loss.backward()

            try:
                yield step
            finally:
                tuning.detach()

        return variant

    def with_peft(projection: bool):
        from peft import PrefixTuningConfig, get_peft_model

        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=options.length,
            prefix_projection=projection,
            encoder_hidden_size=512 if projection else None,
        )
        # A prompt-learning PeftModel wraps the model and leaves it as it is.
        peft = get_peft_model(model, config)

        def step() -> None:
            peft(input_ids=ids, labels=ids).loss.backward()
            peft.zero_grad(set_to_none=True)

        return plainly(step)

    direct = fw.PrefixConfig(length=options.length, init="random")
    variants = {
        "base": plainly(base_step),
        "foreword, direct": with_prefix(direct),
        "foreword, MLP 512": with_prefix(fw.PrefixConfig(length=options.length, init="random", reparam="mlp")),
        "foreword, direct, merged": with_prefix(direct, "merged"),
    }
    if not options.no_peft:
        variants |= {"PEFT, direct": with_peft(False), "PEFT, MLP 512": with_peft(True)}
    result = ratios(take_turns(variants, rounds=options.rounds), "base")
    print(f"batch {options.batch} x {options.tokens} tokens, {options.length} virtual tokens; ratios to the base model")
    for name, ratio in result.items():
        print(f"{name:34} {ratio:.3f}")
    keep("step", {"options": vars(options), "ratios": result})


if __name__ == "__main__":
    main()
