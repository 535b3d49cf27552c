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
    def said(*options):
        result = invoke(folder, *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)[0]["texts"]

    assert said("--sample", "--top-k", 1) == said("--sample", "--top-p", 0.01) == said()
    usual, hot = said("--sample"), said("--sample", "--temperature", 3)
    assert (
        usual == said("--sample", "--temperature", 0.8, "--top-p", 0.95, "--top-k", 0)
        and len({*usual, *hot, *said()}) == 3
    )
