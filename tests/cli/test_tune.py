"""`foreword tune` as a command: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json

import pytest
from test_cli import call


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def test_a_share_of_the_data_is_held_out(run, folder, data, tmp_path):
    given = ("train", "--model", folder, "--data", data, "--length", 4, "--init", "random", "--steps", 2, "--json")
    code, out, err = run(*given, "--valid-share", 0.34, "--out", tmp_path / "p")
    assert code == 0 and "data: 6 examples" in err and json.loads(out)["eval_loss"] > 0
    for share, said in ((0.01, "leaves 0 for validation and 9"), (1.5, "above 0 and below 1"), (0.99, "and 0 for")):
        code, _, err = run(*given, "--valid-share", share, "--out", tmp_path / "q")
        assert code == 1 and said in err
    code, _, err = run(*given, "--valid-share", 0.2, "--valid", data, "--out", tmp_path / "q")
    assert code == 1 and "give one" in err and not (tmp_path / "q").exists()
