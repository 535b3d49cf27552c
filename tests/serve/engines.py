"""Engines on tiny models, and what their model writes for one request alone."""

from __future__ import annotations

from contextlib import contextmanager

import torch

import foreword as fw
import zoo
from foreword.serve.admission import Limits
from foreword.serve.engine import Engine
from foreword.serve.library import Library
from foreword.serve.request import Sampling

TASKS = {"short": 1, "middle": 3, "long": 6}
GREEDY = {"temperature": 0.0}


def prefixes(model, lengths=TASKS):
    sites = fw.sites(model)
    return {
        task: fw.Prefix.from_tensors(model, zoo.random_prefix(model, sites, n, seed))
        for seed, (task, n) in enumerate(lengths.items())
    }


def library(name="llama", **options):
    model = zoo.build(name, **options)
    made = prefixes(model)
    held = Library(model)
    for task, prefix in made.items():
        held.add(task, prefix)
    return held


@contextmanager
def engine(held=None, **limits):
    """A running engine; it is stopped in the end."""
    held = held if held is not None else library()
    made = Engine(held, zoo.tokenizer(), Limits(**{"rows": 8, **limits})).start()
    try:
        yield made
    finally:
        made.stop()


def alone(held, prompt, task, tokens, **options):
    """The tokens of one greedy request, written by ``generate``."""
    ids = torch.tensor([prompt])
    with held.use(task), torch.no_grad():
        out = held.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options
        )
    return out[0, len(prompt) :].tolist()


def prompt(length, seed=0):
    return zoo.ids(1, length, seed)[0].tolist()


def greedy(tokens=8, **options):
    return Sampling(max_tokens=tokens, **{**GREEDY, **options})
