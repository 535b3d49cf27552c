"""`foreword meta` as a command: what it prints and leaves, that `train --start` goes on from it, how it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword import cli

SMALL = ("--length", 4, "--init", "random", "--meta-steps", 3, "--inner-steps", 2, "--batch-size", 2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Options for three tasks."""
    folder, options = tmp_path_factory.mktemp("tasks"), []
    for number, name in enumerate(("films", "towns", "reviews")):
        path = folder / f"{name}.jsonl"
        rows = [{"input": zoo.SENTENCES[number][:i], "output": zoo.SENTENCES[number][i:]} for i in range(5, 12)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        options += ["--task", f"{name}={path}"]
    return options


@pytest.fixture(scope="module")
def learned(folder, tasks, tmp_path_factory):
    """A start that the command made, and what it printed as JSON."""
    out = tmp_path_factory.mktemp("meta") / "start"
    given = ["meta", "--model", folder, *tasks, "--out", out, *SMALL, "--algorithm", "fomaml", "--json"]
    result = CliRunner().invoke(cli.app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_the_result_is_one_json_value(learned):
    out, record = learned
    prefix = fw.Prefix.load(out)
    assert record["out"] == str(out) and record["steps"] == 3 and not record["interrupted"]
    assert record["bytes"] == prefix.nbytes and record["parameters"] == prefix.num_parameters == 4 * 2 * 2 * 16
    assert record["loss_after"] == prefix.metadata["metrics"]["loss_after"] > 0
    assert prefix.metadata["meta"]["the tasks"] == ["films", "towns", "reviews"]
    assert prefix.metadata["meta"]["algorithm"] == "fomaml" and (out / "curve.png").is_file()


def test_the_options_are_those_of_the_library(learned, folder, tasks, tmp_path):
    """The command and `fw.meta_train` with the same settings give the same start."""
    from foreword.data import encode, read_examples

    model, tokenizer = fw.load_model(str(folder))
    paths = dict(option.split("=", 1) for option in tasks[1::2])
    data = {n: encode(read_examples(p), tokenizer, max_length=512) for n, p in paths.items()}
    config = fw.PrefixConfig(length=4, init="random")
    plan = fw.MetaConfig("fomaml", meta_steps=3, inner_steps=2, batch_size=2)
    assert fw.meta_train(model, tokenizer, [config], data, tmp_path / "o", plan).prefix == fw.Prefix.load(learned[0])


def test_a_new_task_is_trained_from_it(learned, run, folder, data, tmp_path):
    given = ("--model", folder, "--data", data, "--start", learned[0], "--out", tmp_path / "p", "--steps", 1)
    code, out, err = run("train", *given, "--warmup", 0, "--json")
    assert code == 0, err
    trained, start = fw.Prefix.load(tmp_path / "p"), fw.Prefix.load(learned[0])
    site = start.sites[0].name
    assert 0 < float((trained.keys[site] - start.keys[site]).abs().max()) < 0.021  # one step at the usual rate
    assert json.loads(out)["parameters"] == start.num_parameters


def test_it_says_what_to_do_next(run, folder, tasks, tmp_path):
    given = ("--model", folder, *tasks, *SMALL, "--method", "prefix", "--method", "lora", "--rank", 2)
    code, out, err = run("meta", *given, "--out", tmp_path / "p")
    assert code == 0 and "3 meta-steps, loss before adapting" in out and "films: 7 examples" in err
    assert f"foreword train --model {folder} --start {tmp_path / 'p'} --warmup 0" in out
    assert [p["method"] for p in fw.Prefix.load(tmp_path / "p").parts] == ["lora"]
    code, _, err = run("meta", *given, "--out", tmp_path / "p")
    assert code == 1 and "holds a meta-training already" in err
    code, _, err = run("meta", *given, "--out", tmp_path / "p", "--resume", "--inner-steps", 3)
    assert code == 1 and "inner_steps was 2 there and is 3 here" in err
    assert run("meta", *given, "--out", tmp_path / "p", "--resume")[0] == 0


def test_it_begins_from_a_saved_prefix(learned, run, folder, tasks, tmp_path):
    more = ("--meta-learning-rate", 1e-6, "--start", learned[0], "--json")
    code, _, err = run("meta", "--model", folder, *tasks, *SMALL, *more, "--out", tmp_path / "p")
    assert code == 0, err
    site = (began := fw.Prefix.load(learned[0])).sites[0].name
    moved = (fw.Prefix.load(tmp_path / "p").keys[site] - began.keys[site]).abs().max()
    assert 0 < float(moved) < 1e-4


def test_refusals_before_anything_is_written(run, folder, tasks, tmp_path):
    out, empty = tmp_path / "p", tmp_path / "empty.jsonl"
    empty.write_text("")
    for options, said in (
        (tasks[:2], "give two or more"),
        ([*tasks, *tasks[:2]], "--task names 'films' twice"),
        ([*tasks, "--task", "films"], "--task names 'films' twice"),
        ([*tasks, "--task", "nameless.jsonl"], "is not of the form KEY=VALUE"),
        ([*tasks, "--task", f"new={empty}"], "empty.jsonl"),
        ([*tasks, "--task", "new=missing.jsonl"], "missing.jsonl"),
        ([*tasks, "--batch-size", 8], "the task 'films' has 7 examples, and a step takes 8"),
        ([*tasks, "--algorithm", "fomaml", "--batch-size", 4], "takes 4 and 4 others for its query"),
        ([*tasks, "--inner-learning-rate", 0], "inner_learning_rate=0.0; expected a positive number"),
        ([*tasks, "--meta-learning-rate", "nan"], "meta_learning_rate=nan"),
        ([*tasks, "--inner-optimizer", "sgd"], 'inner_optimizer="sgd" has no usual learning rate'),
        ([*tasks, "--meta-steps", 0], "meta_steps=0; expected a whole number"),
        ([*tasks, "--inner-steps", -1], "inner_steps=-1"),
        ([*tasks, "--resume"], "holds no meta-training"),
        ([*tasks, "--start", tmp_path / "nothing"], "is not a folder"),
    ):  # fmt: skip
        code, printed, err = run("meta", "--model", folder, "--out", out, *SMALL, *options)
        assert code == 1 and said in err and "Traceback" not in err and not printed, (options, err)
        assert not out.exists()


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['foreword', 'meta', '--help']\n"
        "from foreword.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'rich.progress'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "--algorithm" in done.stdout, done.stderr


def test_columns_of_one_task(run, folder, tasks, tmp_path):
    named = tmp_path / "named.jsonl"
    rows = [{"said": zoo.SENTENCES[0][:i], "output": zoo.SENTENCES[0][i:], "n": i} for i in range(5, 14)]
    named.write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = ["--model", folder, *tasks, "--task", f"new={named}", *SMALL, "--out", tmp_path / "p", "--json"]
    assert run("meta", *given)[0] == 1
    code, _, err = run("meta", *given, "--column", "new:input=said", "--where", "new:n=5", "--batch-size", 1)
    assert code == 0 and "new: 1 example" in err, err
