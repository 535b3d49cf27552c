"""A tiny model in a folder, and data for it."""

from __future__ import annotations

import json

import pytest

import zoo


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random Llama with its tokenizer, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("llama")
    zoo.build("llama").save_pretrained(path)
    zoo.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "film.jsonl"
    rows = [{"input": s[:20], "output": s[20:], "label": str(i % 2)} for i, s in enumerate(zoo.SENTENCES * 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
