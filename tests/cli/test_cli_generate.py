"""`foreword generate`: what is drawn from, and options that say nothing without drawing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from foreword import cli


def invoke(folder, *options):
    arguments = ["generate", "--model", folder, "--prompt", "The film is", "--max-new-tokens", 8, "--json", *options]
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.mark.parametrize("option", [("--temperature", 0.5), ("--top-p", 0.5), ("--top-k", 0)])
@pytest.mark.parametrize("how", [(), ("--greedy",), ("--beams", 2)])
def test_nothing_is_drawn_without_sample(option, how):
    result = invoke("no such model", *option, *how)  # before anything is loaded
    assert result.exit_code == 1
    assert str(result.exception).startswith(f"{option[0]} goes with --sample") and "add --sample" in str(
        result.exception
    )


def test_what_is_drawn_from(folder):
    greedy = invoke(folder)
    assert greedy.exit_code == 0, greedy.output
    for option in (("--top-k", 1), ("--top-p", 0.01), ("--temperature", 0.01)):
        assert json.loads(invoke(folder, "--sample", *option).stdout) == json.loads(greedy.stdout)
    drawn = invoke(folder, "--sample", "--temperature", 2, "--top-p", 1.0)
    assert json.loads(drawn.stdout) != json.loads(greedy.stdout)
