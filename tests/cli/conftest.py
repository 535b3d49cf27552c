"""A tiny model in a folder, data for it, a prefix that was trained on them, and the command as a call."""

from __future__ import annotations

import json

import pytest
from calling import call
from typer.testing import CliRunner

import zoo
from foreword import cli


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


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="session")
def trained(folder, data, tmp_path_factory):
    """A prefix that `foreword train` made, and what it printed."""
    out = tmp_path_factory.mktemp("trained") / "film"
    result = CliRunner().invoke(cli.app, [
        "train", "--model", str(folder), "--data", str(data), "--valid", str(data), "--out", str(out), "--length", "4",
        "--init", "random", "--steps", "6", "--batch-size", "4", "--eval-every", "3", "--json",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)
