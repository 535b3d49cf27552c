"""Inside a real prefix: which layers carry it, dilution, the sink, its spectrum beside a memory's and LoRA's.

How favourable IMDB reviews end (as in benchmarks/methods.py), SmolLM2-135M, the same steps and batches for a prefix, a
memory and LoRA, then everything that `foreword look` shows, on endings that none was trained on. One seed.

    python benchmarks/inside.py [--steps 60] [--keep FOLDER]

Writes results/inside.json and docs/images/inside-*.png. With --keep, trained prefixes are kept there and used again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import keep
from methods import TEXT, reviews

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def configs() -> dict[str, Any]:
    import foreword as fw

    return {
        "prefix": fw.PrefixConfig(length=18, init=TEXT),
        "memory": fw.MemoryConfig(),
        "lora": fw.LoRAConfig(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="held-out texts to look with")
    parser.add_argument("--keep", type=Path, help="folder for the trained prefixes")
    options = parser.parse_args()

    import foreword as fw
    from foreword.data import read_examples
    from foreword.evaluate import inside

    model, tokenizer = fw.load_model("demo")
    train, valid = reviews()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        where = options.keep or Path(folder)
        prefixes = {n: trained(n, c, model, tokenizer, train, options, where, seconds) for n, c in configs().items()}
    start = fw.Prefix.from_text(model, tokenizer, TEXT, length=18)
    batches = inside.batches_of(model, tokenizer, read_examples(valid[: options.texts]), max_length=48)
    wide = inside.batches_of(model, tokenizer, read_examples(valid), max_length=48)  # for covariances

    def told(part: str, done: int, total: int) -> None:
        if done == total:
            seconds[part] = round(time.perf_counter() - began, 1)
            print(f"{part}: {done} passes, {seconds[part]} s so far", flush=True)

    began = time.perf_counter()
    parts = [p for p in inside.PARTS if p != "spectrum"]
    found = inside.look(model, prefixes["prefix"], tokenizer, batches, name="favourable reviews",
                        against=("its start", start), only=parts, progress=told)  # fmt: skip
    before = inside.attention_share(model, start, batches)
    spectra = {n: inside.spectrum(model, p, wide) for n, p in prefixes.items()}
    seconds["all"] = round(time.perf_counter() - began, 1)
    draw(found, spectra)
    record = {
        "options": {k: v for k, v in vars(options).items() if k != "keep"}, "seconds": seconds,
        **numbers(found, before, spectra),
    }  # fmt: skip
    print("written:", keep("inside", record))


def trained(name, config, model, tokenizer, train, options, folder: Path, seconds: dict[str, float]):
    """A prefix (memory, LoRA) of so many steps, or the one that is there."""
    import foreword as fw
    from foreword.data import Collator, encode, read_examples

    if (folder / name / "foreword.json").is_file():
        return fw.Prefix.load(folder / name)
    began = time.perf_counter()
    tuning = fw.attach(model, config, tokenizer=tokenizer)
    try:
        arguments = fw.PrefixTrainingArguments(
            output_dir=str(folder / f"{name}-run"), max_steps=options.steps, seed=0, use_cpu=True,
            per_device_train_batch_size=options.batch, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        data = encode(read_examples(train), tokenizer, max_length=48)
        collator = Collator.for_tokenizer(tokenizer)
        fw.PrefixTrainer(model, arguments, train_dataset=data, data_collator=collator).train()
        tuning.save(folder / name)
        prefix = tuning.bake()
    finally:
        tuning.detach()
    seconds[f"train {name}"] = round(time.perf_counter() - began, 1)
    print(f"{name}: trained in {seconds[f'train {name}']} s", flush=True)
    return prefix


def draw(found: Any, spectra: dict[str, Any]) -> None:
    """The pictures of docs/inside.md."""
    from foreword._figures import save_figure
    from foreword.evaluate.inside import pictures

    figures = {
        "share": pictures.draw_share(found.share), "positions": pictures.draw_positions(found.share),
        "tokens": pictures.draw_tokens(found.share), "dilution": pictures.draw_dilution(found.dilution),
        "first": pictures.draw_first(found.share), "norms": pictures.draw_norms(found.norms),
        "spectra": pictures.draw_spectra(spectra), "layers": pictures.draw_layers(found.layers),
        "cosines": pictures.draw_cosines(found.similarity["its start"], ("trained", "its start")),
        "likeness": pictures.draw_likeness(found.similarity["its start"]),
    }  # fmt: skip
    for name, figure in figures.items():
        save_figure(figure, IMAGES / f"inside-{name}.png")


def numbers(found: Any, before: Any, spectra: dict[str, Any]) -> dict[str, Any]:
    """What the pictures show, without what only a picture needs."""
    from foreword.evaluate.inside._rows import rounded

    curve, layers = found.dilution, found.layers
    started = {s.name: s.mean for s in before.sites}
    shares = [
        {"site": s.name, "share": s.mean, "share_at_start": started[s.name], "from_first": s.from_first,
         "first": s.first, "first_base": s.first_base, "first_virtual": s.tokens[0]}
        for s in found.share.sites
    ]  # fmt: skip
    return rounded({
        "about": found.about,
        "share": shares,
        "dilution": {"lengths": curve.lengths, "uniform": curve.uniform,
                     "mean": {n: curve.mean(n) for n in curve.variants}, "sites": curve.variants["as trained"]},
        "spectra": {n: {"tokens": s.tokens, "sites": [
            {"site": x.name, "size": x.size, "constant": x.constant, "effective_rank": x.effective_rank,
             "participation": x.participation, "values": x.values[:8]} for x in s.sites]} for n, s in spectra.items()},
        "layers": {"labels": layers.labels, "whole": layers.whole, "none": layers.none, "without": layers.without,
                   "only": layers.only},
        "likeness": found.similarity["its start"].to_json()["sites"],
        "norms": [{"site": s.name, "keys": sum(s.keys) / len(s.keys), "values": sum(s.values) / len(s.values),
                   "text_keys": s.text_keys, "text_values": s.text_values, "first_key": s.first_key,
                   "first_value": s.first_value} for s in found.norms.sites],
        "words": {s.name: [row[0][0] for row in s.words] for s in found.words.sites},
    })  # fmt: skip


if __name__ == "__main__":
    main()
