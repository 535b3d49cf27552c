"""Two prefixes joined: where the first one's keys go, and what two attention sinks do.

Two texts are read apart and joined in several ways; the yardstick is the model prompted with both texts in one.
Printed is the KL divergence from it in nats a token, over continuations that neither text is about: what is lost by
not having read the second text after the first. The first token of a text draws attention to itself whatever it says
(a *sink*, arXiv 2309.17453), and a join of two has two of them.

    python benchmarks/join.py
"""

from __future__ import annotations

from dataclasses import replace

from _measure import keep

PAIRS = [
    ("You are a film critic who writes short, warm sentences.",
     " Always mention the weather in your answer, and be polite."),
    ("The following reviews were written by people who loved the film.",
     " They speak of the actors, the music and the pictures."),
    ("Write in the style of an old English book, with long sentences.",
     " Tell the story of a traveller who comes home after many years."),
    ("Here is a text about a small restaurant in the city centre.",
     " It serves cheap Italian food near the river, and is friendly to families."),
]  # fmt: skip
TEXTS = [
    "The film was a surprise to all of us, because the", "When we came out of the house in the evening, it was",
    "I went there with my family and we had", "In the beginning there was a man who",
]  # fmt: skip


def unmoved(first, second):
    """Both right before the text, as each was alone: the keys are not moved."""
    import torch

    return replace(
        first,
        keys={n: torch.cat([first.keys[n], second.keys[n]], 1) for n in first.keys},
        values={n: torch.cat([first.values[n], second.values[n]], 1) for n in first.keys},
    )


def main() -> None:
    import torch

    import foreword as fw

    model, tokenizer = fw.load_model("demo", dtype="float32")

    @torch.no_grad()
    def said(ids, prefix=None):
        tuning = fw.attach(model, prefix) if prefix is not None else None
        try:
            return model(ids).logits.double().log_softmax(-1)
        finally:
            if tuning is not None:
                tuning.detach()

    found: dict[str, list[float]] = {}
    for a, b in PAIRS:
        first, second = (fw.Prefix.from_text(model, tokenizer, text) for text in (a, b))
        whole = fw.Prefix.from_text(model, tokenizer, a + b)
        ways = {
            "no prefix": None,
            "the first alone": first,
            "the second alone": second,
            "first.join(second)": first.join(second),
            "first.join(second.slice(1)): one sink": first.join(second.slice(1)),
            "keys not moved": unmoved(first, second),
            "keys not moved, one sink": unmoved(first, second.slice(1)),
        }
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            want = said(ids, whole)
            for name, prefix in ways.items():
                kl = (want.exp() * (want - said(ids, prefix))).sum(-1).mean()
                found.setdefault(name, []).append(float(kl))
    rows = {name: sum(v) / len(v) for name, v in found.items()}
    for name, kl in rows.items():
        print(f"{name:40} {kl:.3f}")
    print("written:", keep("join", {"rows": rows}))


if __name__ == "__main__":
    main()
