"""What the commands refuse: one plain line each, with what is wrong in it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import foreword as fw
import zoo


def refusals(folder, data, tmp, trained):
    train = ("train", "--model", folder, "--data", data, "--out", tmp / "o", "--steps", 2, "--length", 4)
    write = ("generate", "--model", folder, "--prompt", "The film")
    other = tmp / "other"
    zoo.build("gpt2").save_pretrained(other)
    zoo.tokenizer().save_pretrained(other)
    corrupt = tmp / "corrupt"
    fw.Prefix.load(trained).save(corrupt)
    (corrupt / "prefix.safetensors").write_bytes(b"nonsense")
    bad_json = tmp / "bad.jsonl"
    bad_json.write_text('{"text": "fine"}\n{"text": \n')
    latin = tmp / "latin.txt"
    latin.write_bytes("Café".encode("latin-1"))
    return {
        "no model": (("generate", "--model", tmp / "none", "--prompt", "a"), "There is no file or folder"),
        "not a model": (("generate", "--model", tmp, "--prompt", "a"), "has no config.json"),
        "no data": (("train", "--model", folder, "--data", tmp / "none.jsonl", "--out", tmp / "o"), "none.jsonl"),
        "bad json": ((*train[:4], bad_json, *train[5:]), "bad.jsonl:2: malformed JSON"),
        "map twice": ((*train, "--column", "input=a", "--column", "input=b"), "--column names 'input' twice"),
        "bad map": ((*train, "--column", "input"), "--column 'input' is not of the form KEY=VALUE"),
        "no such column": ((*train, "--column", "input=nothing"), "nothing"),
        "nothing left": ((*train, "--where", "label=7"), "label"),
        "bad init": ((*train, "--init", "words:"), "names no word"),
        "empty init": ((*train, "--init", " "), "empty text"),
        "short init": ((*train, "--init", "a"), "the init text has 1 tokens and the prefix 4"),
        "negative length": ((*train[:-1], -4), "length=-4; expected 1 or more"),
        "bad sites": ((*train, "--init", "random", "--sites", "nothing.*"), "nothing.*"),
        "broken sites": ((*train, "--init", "random", "--sites", "("), "regular expression"),
        "bad kinds": ((*train, "--init", "random", "--kinds", "selfish"), "selfish"),
        "bad dtype": ((*train, "--dtype", "float33"), "Unknown dtype 'float33'"),
        "bad rate": ((*train, "--init", "random", "--learning-rate", -1), "--learning-rate -1.0; expected a number"),
        "no epochs": ((*train, "--init", "random", "--epochs", 0), "--epochs 0.0; expected a number above 0"),
        "out is taken": (("train", *train[1:5], "--out", trained), "holds a prefix already"),
        "out is a file": ((*train[:6], data, *train[7:], "--init", "random"), "film.jsonl is a file"),
        "no out": (train[:5], "--out names the folder"),
        "no resume": ((*train, "--init", "random", "--resume"), "holds no whole checkpoint"),
        "no start": ((*train, "--start", tmp / "none"), "none"),
        "other model": (("generate", "--model", other, "--prefix", trained, "--prompt", "a"), "layers.0.self_attn"),
        "no prefix": ((*write, "--prefix", tmp / "none"), "none"),
        "corrupt": ((*write, "--prefix", corrupt), "prefix.safetensors"),
        "corrupt, inspected": (("inspect", corrupt), "prefix.safetensors"),
        "no folder": (("inspect", tmp / "none"), "none"),
        "no prompt": (write[:3], "there is no prompt"),
        "empty prompt": (("generate", "--model", folder, "--prompt", ""), "there is no prompt (or an empty one)"),
        "no prompts file": ((*write, "--prompts", tmp / "none.txt"), "none.txt"),
        "latin prompts": ((*write, "--prompts", latin), "UTF-8"),
        "no template": ((*write, "--chat"), "no chat template"),
        "n alone": ((*write, "--n", 2), "add --sample, or --beams 2"),
        "n and beams": ((*write, "--n", 3, "--beams", 2), "add --sample, or --beams 3"),
        "taken by others": (("demo", "--out", tmp), "is not empty"),
        "not a demo": (("demo", "--out", tmp, "--overwrite"), "which is not of a demo"),
    }


@pytest.fixture(scope="module")
def refused(folder, data, trained, tmp_path_factory):
    return refusals(folder, data, tmp_path_factory.mktemp("refused"), trained[0])


NAMES = (
    "no model", "not a model", "no data", "bad json", "map twice", "bad map", "no such column", "nothing left",
    "bad init", "empty init", "short init", "negative length", "bad sites", "broken sites", "bad kinds", "bad dtype",
    "bad rate", "no epochs", "out is taken", "out is a file", "no out", "no resume", "no start", "other model",
    "no prefix", "corrupt", "corrupt, inspected", "no folder", "no prompt", "empty prompt", "no prompts file",
    "latin prompts", "no template", "n alone", "n and beams", "taken by others", "not a demo",
)  # fmt: skip


def test_every_refusal_is_tried(refused):
    assert set(NAMES) == set(refused)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_one_plain_line(name, refused, run):
    arguments, said = refused[name]
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("data: ")]
    assert code == 1, (code, err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], err
    assert "Traceback" not in out + err


USAGE = (
    ("generate", "--model", "x", "--n", 0),
    *(("train", "--model", "x", "--data", "y", "--out", "z", f"--{name}", -1)
      for name in ("steps", "batch-size", "accumulate", "limit", "max-length", "save-every", "eval-every", "clip")),
)  # fmt: skip


@pytest.mark.parametrize("wrong", [("train",), ("nothing",), ("--what",), *USAGE])
def test_usage_errors_leave_with_2(run, wrong):
    code, _, err = run(*wrong)
    assert code == 2 and "Traceback" not in err and "Usage" in err


@pytest.mark.slow
def test_the_process_itself_exits_as_told(folder, tmp_path):
    for arguments, code, said in (
        (("inspect", tmp_path), 1, "error: "),
        (("doctor", "--json"), 0, ""),
    ):
        command = [sys.executable, "-m", "foreword", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code and "Traceback" not in done.stderr and done.stderr.startswith(said), done.stderr
        if arguments[0] == "doctor":
            assert json.loads(done.stdout)["problems"] == []
