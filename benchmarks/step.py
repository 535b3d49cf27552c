"""One training step: the frozen base model's own forward and backward, foreword, and PEFT, side by side.

The base's backward runs to its input embeddings, which is what any method that trains something below the layers
pays. Same data, same loss, one process, taking turns.

    python benchmarks/step.py [--batch 8] [--tokens 128] [--length 20] [--rounds 7] [--no-peft]
"""

from __future__ import annotations

import argparse

from _measure import keep, ratios, take_turns


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

    base, _ = fw.load_model(options.model)
    base.requires_grad_(False)
    ids = torch.randint(5, base.config.vocab_size - 5, (options.batch, options.tokens))
    embed = base.get_input_embeddings()

    def base_step() -> None:
        base(inputs_embeds=embed(ids).requires_grad_(), labels=ids).loss.backward()

    def with_prefix(config: fw.PrefixConfig, path: str):
        model, _ = fw.load_model(options.model)
        tuning = fw.attach(model, config)

        def step() -> None:
            with fw.attention_path(path):
                model(input_ids=ids, labels=ids).loss.backward()
            for parameter in tuning.parameters():
                parameter.grad = None

        return step

    direct = fw.PrefixConfig(length=options.length, init="random")
    mlp = fw.PrefixConfig(length=options.length, init="random", reparam="mlp")
    variants = {
        "base": base_step,
        "foreword, direct": with_prefix(direct, "auto"),
        "foreword, direct, merged": with_prefix(direct, "merged"),
        "foreword, direct, concatenated": with_prefix(direct, "concat"),
        "foreword, MLP 512": with_prefix(mlp, "auto"),
    }
    if not options.no_peft:
        variants["PEFT, direct"] = peft_step(options, ids, projection=False)
        variants["PEFT, MLP 512"] = peft_step(options, ids, projection=True)
    result = ratios(take_turns(variants, rounds=options.rounds), "base")
    print(f"batch {options.batch} x {options.tokens} tokens, {options.length} virtual tokens; ratios to the base model")
    for name, ratio in result.items():
        print(f"{name:34} {ratio:.3f}")
    keep("step", {"options": vars(options), "ratios": result})


def peft_step(options: argparse.Namespace, ids, *, projection: bool):
    from peft import PrefixTuningConfig, get_peft_model

    import foreword as fw

    model, _ = fw.load_model(options.model)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.length,
        prefix_projection=projection,
        encoder_hidden_size=512 if projection else None,
    )
    peft = get_peft_model(model, config)

    def step() -> None:
        peft(input_ids=ids, labels=ids).loss.backward()
        peft.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
