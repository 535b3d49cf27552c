"""Engines on tiny models, and what their model writes for one request alone."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

import foreword as fw
import zoo
from foreword.serve.admission import Limits
from foreword.serve.engine import Engine
from foreword.serve.library import Library
from foreword.serve.request import Piece, Sampling

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


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self, n=1):
        self.told, self.tokens, self.text, self.finish = [], [[] for _ in range(n)], [""] * n, [None] * n
        self.error, self.ended = None, threading.Event()

    def __call__(self, what):
        assert not self.ended.is_set(), "told after the end"
        self.told.append(what)
        if isinstance(what, Exception):
            self.error = what
        else:
            assert isinstance(what, Piece) and self.finish[what.index] is None
            self.tokens[what.index] += what.tokens
            self.text[what.index] += what.text
            self.finish[what.index] = what.finish
        if self.error or all(self.finish):
            self.ended.set()
