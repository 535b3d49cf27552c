"""`foreword serve --engine vllm --dry-run`: the command, and options that belong to the other engine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword import cli


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    model = zoo.build("llama")
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)))
    prefix.save(tmp_path / "shelf" / "task")
    return tmp_path / "shelf"


def invoke(*options):
    return CliRunner().invoke(cli.app, ["serve", *map(str, options)])


def test_the_command_is_printed(folder, shelf):
    result = invoke(
        "--model", folder, "--engine", "vllm", "--prefix-dir", shelf, "--dry-run", "--port", 9, "--", "--seed", 1
    )
    assert result.exit_code == 0, result.exception
    words = shlex.split(result.stdout)
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and words[-2:] == ["--seed", "1"]
    options = json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert options["prefixes"] == str(shelf) and options["placeholder_text"] == "<pad>"
    assert words[words.index("--model") + 1] == str(folder) and words[words.index("--port") + 1] == "9"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--engine", "vllm"], "give --prefix-dir"),
        (["--engine", "vllm", "--rows", "3"], "--rows is for --engine foreword"),
        (["--engine", "vllm", "--prefix", "a=b"], "--prefix is for --engine foreword"),
        (["--dry-run"], "--dry-run is for --engine vllm"),
        (["--", "--seed", "1"], "arguments after -- is for --engine vllm"),
        (["--engine", "sglang"], "expected foreword or vllm"),
    ],
)
def test_options_of_the_other_engine(options, what):
    result = invoke("--model", "no such model", *options)  # before anything is loaded
    assert result.exit_code == 1 and what in str(result.exception)


def test_what_cannot_be_is_said_before_vllm_is_started(folder, shelf, tmp_path):
    common = ["--engine", "vllm", "--model", folder, "--prefix-dir", shelf, "--dry-run"]
    assert "call it or the task something else" in str(invoke(*common, "--name", "task").exception)
    assert "--port is set by foreword" in str(invoke(*common, "--", "--port", "3").exception)
    result = invoke(*common[:-1], "--vllm-python", tmp_path / "nowhere")
    assert result.exit_code == 1 and "give --vllm-python" in str(result.exception)
    asked = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is not None)"
    if subprocess.run([sys.executable, "-c", asked]).returncode == 0:
        result = invoke(*common[:-1])
        assert isinstance(result.exception, fw.MissingPartError) and "vllm can't be found" in str(result.exception)
