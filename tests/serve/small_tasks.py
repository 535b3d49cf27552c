"""Prefixes of a small model, and what a token of them takes."""

from __future__ import annotations

import foreword as fw
import zoo

MODEL = zoo.build("llama")
SITES = fw.sites(MODEL)
TOKEN = sum(s.parameters(1) for s in SITES) * 4  # bytes


def make(length, seed=0, model=MODEL):
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed))
