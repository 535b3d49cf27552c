"""Captions for pictures: a prefix that is made of what a small vision model saw (as ClipCap does, arXiv 2111.09734).

    python examples/captions.py [--steps 150]

Coloured shapes are drawn, a small residual network with random weights looks at them, and its features are the
condition of a prefix on the frozen text model. The encoder of the prefix is trained, and the vision model through it.
Then it captions pictures that it has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import random

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

import foreword as fw

SIDE = 32
COLOURS = {"red": (1, 0, 0), "green": (0, 0.8, 0), "blue": (0, 0.2, 1), "yellow": (1, 0.9, 0), "white": (1, 1, 1)}
SHAPES = ("circle", "square", "triangle")
KINDS = list(itertools.product(COLOURS, SHAPES))


def draw(colour: str, shape: str, chance: random.Random) -> Tensor:
    """A shape of some size somewhere on a dark, noisy ground: ``(3, SIDE, SIDE)``."""
    r = chance.uniform(5, 9)
    x, y = (chance.uniform(r + 1, SIDE - r - 1) for _ in range(2))
    rows, columns = torch.meshgrid(torch.arange(SIDE) - y, torch.arange(SIDE) - x, indexing="ij")
    inside = {
        "circle": rows**2 + columns**2 < r**2,
        "square": (rows.abs() < 0.85 * r) & (columns.abs() < 0.85 * r),
        "triangle": (rows < 0.8 * r) & (rows > 2 * columns.abs() - r),
    }[shape]
    noise = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(chance.getrandbits(32)))
    ink = torch.tensor(COLOURS[colour]).view(3, 1, 1) * chance.uniform(0.7, 1.0)
    return torch.where(inside, ink, torch.zeros(())) + 0.2 * noise


class Eyes(nn.Module):
    """A small residual network; what it sees in a picture is ``(B, 128)`` numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
        self.model = ResNetModel(ResNetConfig(**size, downsample_in_first_stage=False))

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.model(pixel_values=pictures).last_hidden_state.flatten(2)
        return torch.cat([seen.mean(2), seen.amax(2)], dim=-1)


def batches(tokenizer, steps: int, rows: int, seed: int):
    """Pictures, and the tokens of their captions with a mask for padding."""
    chance = random.Random(seed)
    for _ in range(steps):
        kinds = [chance.choice(KINDS) for _ in range(rows)]
        pictures = torch.stack([draw(*kind, chance) for kind in kinds])
        captions = [f"Picture: a {colour} {shape}." for colour, shape in kinds]
        yield pictures, tokenizer(captions, return_tensors="pt", padding=True, padding_side="right"), captions


def train(model, tokenizer, *, steps: int = 150, rows: int = 16):
    """The tuning and the eyes, trained together."""
    config = fw.PrefixConfig(length=8, init="A short caption of a picture with one coloured shape.", reparam="mlp",
                             hidden=128, condition=128)  # fmt: skip
    tuning, eyes = fw.attach(model, config, tokenizer=tokenizer), Eyes()
    optimizer = torch.optim.AdamW([*tuning.parameters(), *eyes.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step, (pictures, text, _) in enumerate(batches(tokenizer, steps, rows, seed=0), 1):
        labels = text.input_ids.masked_fill(text.attention_mask == 0, -100)
        labels[:, :3] = -100  # not the words that all captions begin with
        loss = model(**text, labels=labels, condition=eyes(pictures)).loss
        loss.backward()
        nn.utils.clip_grad_norm_([*tuning.parameters(), *eyes.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)
    return tuning, eyes.eval()


@torch.no_grad()
def captions_of(model, tokenizer, tuning, eyes, pictures: Tensor) -> list[str]:
    """What the model writes about each picture, greedily."""
    start = tokenizer(["Picture: a"] * len(pictures), return_tensors="pt")
    with tuning.given(condition=eyes(pictures)):
        written = model.generate(**start, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text.split(".")[0].strip() + "." for text in texts]


def share_right(model, tokenizer, tuning, eyes, pictures: int = 60, seed: int = 1) -> float:
    """How many captions of pictures never seen are right, word for word. By chance it is one in ``len(KINDS)``."""
    right = 0
    for shown, _, wanted in batches(tokenizer, pictures // 20, 20, seed):
        written = captions_of(model, tokenizer, tuning, eyes, shown)
        right += sum(a == b for a, b in zip(written, wanted, strict=True))
    return right / pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    model, tokenizer = fw.load_model("demo")
    tuning, eyes = train(model, tokenizer, steps=options.steps)
    print(
        f"right: {share_right(model, tokenizer, tuning, eyes):.0%} of 60 new pictures (by chance {1 / len(KINDS):.0%})"
    )
    chance = random.Random(2)
    kinds = chance.sample(KINDS, 4)
    shown = torch.stack([draw(*kind, chance) for kind in kinds])
    for kind, caption in zip(kinds, captions_of(model, tokenizer, tuning, eyes, shown), strict=True):
        print(f"{' '.join(kind):16} -> {caption}")


if __name__ == "__main__":
    main()
