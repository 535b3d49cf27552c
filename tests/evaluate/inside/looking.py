"""Tiny models with a prefix, and padded batches for them."""

from __future__ import annotations

import torch

import foreword as fw
import zoo

LENGTHS = (20, 13, 17)
OTHERS = ("vit", "whisper", "llava")  # start from more than token ids


def baked(model, name, what=None, *, noise=0.3):
    """A prefix of a few virtual tokens (or of what is given), its numbers moved at random; the model is bare again."""
    what = what if what is not None else fw.PrefixConfig(length=3, init="random")
    tuning = fw.attach(model, what, example_inputs=zoo.inputs(name))
    generator = torch.Generator().manual_seed(1)
    for parameter in tuning.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    prefix = tuning.bake()
    tuning.detach()
    return prefix


def batch(name, lengths=LENGTHS):
    """Texts of different lengths, padded on the right, with labels; other inputs as the zoo has them."""
    if name in OTHERS:
        return zoo.inputs(name, batch=2, length=12)
    ids = zoo.ids(len(lengths), max(lengths))
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
    ids = ids * mask
    if name in ("t5", "bart"):
        labels = zoo.ids(len(lengths), 9, seed=1)
        labels[1, 6:] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def alone(name, one):
    """Each text of a batch by itself, made by hand."""
    rows = []
    for i in range(len(one["input_ids"])):
        n = int(one["attention_mask"][i].sum())
        row = {"input_ids": one["input_ids"][i : i + 1, :n]}
        labels = one["labels"][i : i + 1]
        row["labels"] = labels[labels != -100][None]
        rows.append(row)
    return rows


def eager_weights(model, sites, **arguments):
    """The attention weights of an eager model by site name, from transformers itself."""
    with torch.no_grad():
        out = model(**arguments, output_attentions=True)
    kinds = {"encoder": out.get("encoder_attentions") or out.get("attentions"), "cross": out.get("cross_attentions"),
             "self": out.get("decoder_attentions") or out.get("attentions")}  # fmt: skip
    layers = dict.fromkeys(kinds, 0)
    found = {}
    for site in sites:
        found[site.name] = kinds[site.kind][layers[site.kind]]
        layers[site.kind] += 1
    return found
