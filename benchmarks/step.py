"""One training step: the frozen base model's own forward and backward, foreword, and PEFT, side by side.

The base's backward runs to its input embeddings, which is what any method that trains something below the layers
pays. Same data, same loss, one process, taking turns.

    python benchmarks/step.py [--batch 8] [--tokens 128] [--length 20] [--rounds 7] [--no-peft] [--methods]
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager

from _measure import hold_memory, keep, plainly, ratios, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--methods", action="store_true", help="what each option costs over a plain prefix, instead")
    parser.add_argument("--only", nargs="*", help="with --methods: these beside the plain prefix, printed and not kept")
    options = parser.parse_args()

    hold_memory()
    import torch

    import foreword as fw

    model, _ = fw.load_model(options.model)
    model.requires_grad_(False)
    ids = torch.randint(5, model.config.vocab_size - 5, (options.batch, options.tokens))
    labels = ids.clone()
    if options.methods:  # half is input, so that an infix has a boundary
        labels[:, : options.tokens // 2] = -100
    embed = model.get_input_embeddings()

    def base_step() -> None:
        model(inputs_embeds=embed(ids).requires_grad_(), labels=ids).loss.backward()

    def with_prefix(config, path: str = "auto"):
        @contextmanager
        def variant():
            tuning = fw.attach(model, config)

            def step() -> None:
                with fw.attention_path(path):
                    model(input_ids=ids, labels=labels).loss.backward()

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
    against = "base"
    if options.methods:
        against = "plain prefix"
        wanted = methods(options.length)
        names = [against, *options.only] if options.only else wanted
        variants = {n: with_prefix(wanted[n]) for n in names}
    result = ratios(take_turns(variants, rounds=options.rounds), against)
    print(f"batch {options.batch} x {options.tokens} tokens, {options.length} virtual tokens; ratios to the {against}")
    for name, ratio in result.items():
        print(f"{name:34} {ratio:.3f}")
    if not options.only:
        keep("step_methods" if options.methods else "step", {"options": vars(options), "ratios": result})


def methods(length: int) -> dict:
    """Each option alone, and what it is compared with."""
    import foreword as fw

    plain = {"length": length, "init": "random"}
    return {
        "plain prefix": fw.PrefixConfig(**plain),
        "plain prefix, again": fw.PrefixConfig(**plain),  # how much of a ratio is noise
        "infix": fw.PrefixConfig(**plain, visible="infix:1"),
        "first half": fw.PrefixConfig(**plain, visible="first:64"),
        "weight per head": fw.PrefixConfig(**plain, gate="head"),
        "weight per query": fw.PrefixConfig(**plain, gate="input"),
        "zero-initialised gate": fw.PrefixConfig(**plain, gate="zero"),
        "prefix and memory": [fw.PrefixConfig(**plain), fw.MemoryConfig()],
        "prefix and memory of rank 4": [fw.PrefixConfig(**plain), fw.MemoryConfig(rank=4)],
        "prompt": fw.PromptConfig(length=length, init="vocabulary"),
    }


if __name__ == "__main__":
    main()
