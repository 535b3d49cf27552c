"""`foreword compress` as a command: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foreword as fw
import zoo


@pytest.fixture(scope="module")
def long(folder, tmp_path_factory):
    """A folder with a prefix of 60 tokens, which names its base as `folder` is named."""
    model = fw.load_model(folder)[0]
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), 60))
    return prefix.save(tmp_path_factory.mktemp("long") / "p")


def test_a_smaller_prefix_a_table_and_pictures(run, folder, data, long, tmp_path):
    size, out = (long / "prefix.safetensors").stat().st_size, tmp_path / "small"
    given = ("compress", long, "--model", folder, "--data", data, "--out", out, "--target-bytes", size // 2)
    code, printed, err = run(*given, "--plot", tmp_path / "curve.svg")
    assert code == 0, err
    assert "held out: " in err and "data: " in err and "int8" in printed and "prune to" in printed
    assert printed.strip().splitlines()[-1].split(":")[0] == str(out) or str(out) in printed
    stored = (out / "prefix.safetensors").stat().st_size
    assert stored <= size // 2 and fw.Prefix.load(out).stored_nbytes == stored
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml") and (out / "plans.png").is_file()
    record = json.loads((out / "plans.json").read_text())
    assert record["best"]["nbytes"] == stored and record["target_bytes"] == size // 2
    code, printed, err = run("inspect", out)
    assert code == 0 and f"its file {stored:,}" in printed and record["best"]["plan"] in printed
    inspected = json.loads(run("inspect", out, "--json")[1])
    assert inspected["file_bytes"] == stored and inspected["bytes"] == fw.Prefix.load(out).nbytes
    assert inspected["metadata"]["compression"]["plan"] == record["best"]["plan"]
    code, printed, err = run(
        "generate", "--model", folder, "--prefix", out, "--prompt", "The film", "--max-new-tokens", 3
    )
    assert code == 0, err


def test_the_result_as_json(run, folder, data, long, tmp_path):
    given = ("compress", long, "--model", folder, "--data", data, "--valid", data, "--out", tmp_path / "p", "--json")
    code, out, err = run(*given, "--max-loss-increase", 0.5, "--methods", "int8,int4")
    assert code == 0, err
    record = json.loads(out)
    assert [p["plan"] for p in record["plans"]] == [
        "int8",
        "int8 keys and int4 values",
        "int4 keys and int8 values",
        "int4",
    ]
    assert record["best"]["nbytes"] == min(p["nbytes"] for p in record["plans"]) and record["verdict"].startswith(
        "int4: "
    )
    assert record["best"]["increase"] <= 0.5 and record["before"]["bytes"] == fw.Prefix.load(long).stored_nbytes


def test_a_dry_run_measures_and_writes_nothing(run, folder, data, long, tmp_path):
    target = (long / "prefix.safetensors").stat().st_size // 2
    given = ("compress", long, "--data", data, "--target-bytes", target, "--dry-run")
    code, out, err = run(*given)
    assert code == 0 and not err and "int4" in out and "bytes now" in out
    record = json.loads(run(*given, "--json")[1])
    assert [p["fits"] for p in record["plans"]] == [p["nbytes"] <= target for p in record["plans"]]
    assert any(p["fits"] for p in record["plans"]) and not list(tmp_path.iterdir())


def test_where_no_plan_is_within_the_limits(run, folder, data, long, tmp_path):
    size = (long / "prefix.safetensors").stat().st_size
    given = ("compress", long, "--model", folder, "--data", data, "--out", tmp_path / "p", "--methods", "half,int8")
    code, out, err = run(*given, "--target-bytes", size // 3, "--max-loss-increase", 0.7)
    assert code == 1 and "no plan keeps to" in err and "a loss at most 0.7 higher" in err
    assert "the nearest: int8 (" in err and 'add "distill"' in err and "float16" in out
    assert not (tmp_path / "p" / "foreword.json").exists() and (tmp_path / "p" / "plans.png").is_file()


def test_a_distillation_from_the_command_line(run, folder, data, long, tmp_path):
    target = (long / "prefix.safetensors").stat().st_size // 2
    given = ("compress", long, "--model", folder, "--data", data, "--out", tmp_path / "p", "--target-bytes", target)
    code, out, err = run(*given, "--methods", "prune,distill", "--steps", 4, "--batch-size", 2, "--json")
    assert code == 0, err
    plans = [p["plan"] for p in json.loads(out)["plans"]]
    tokens = int(plans[-1].removeprefix("distill to "))
    assert plans[-1].startswith("distill to ") and json.loads(
        (tmp_path / "p" / f"distilled-{tokens}" / "finished.json").read_text()
    ) == {"steps": 4}


def test_the_base_that_the_prefix_names(run, folder, data, long, tmp_path, monkeypatch):
    """By the folder's own name where that is here; else the error says to give --model."""
    given = ("compress", long, "--data", data, "--out", tmp_path / "p", "--max-loss-increase", 1, "--methods", "int8")
    code, _, err = run(*given)
    assert code == 1 and "give --model" in err and not (tmp_path / "p").exists()
    monkeypatch.chdir(Path(folder).parent)
    code, _, err = run(*given)
    assert code == 0, err


def test_refusals(run, folder, data, long, tmp_path):
    given = ("compress", long, "--model", folder, "--data", data)
    out, target = ("--out", tmp_path / "p"), ("--target-bytes", 9000)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for arguments, said in (
        ((*given, *target), "--out names the folder"),
        ((*given, *out), "needs a limit"),
        ((*given, *out, "--target-bytes", 100), "one virtual token at each of 2 sites"),
        ((*given, *out, "--target-bytes", 10**9), "nothing to do"),
        ((*given, *out, "--max-loss-increase", -1), "expected 0 or more"),
        ((*given, *out, *target, "--methods", "zip"), "'zip' is no method"),
        ((*given, *out, *target, "--plot", tmp_path / "x.gif"), "end its name with"),
        ((*given, *out, *target, "--valid-share", 2), "above 0 and below 1"),
        ((*given, *out, *target, "--resume"), "holds no search that was begun"),
        ((*given[:-1], empty, *out, *target), "empty.jsonl"),
        (("compress", tmp_path / "none", *given[2:], *out, *target), "is not a folder"),
    ):
        code, _, err = run(*arguments)
        assert code == 1 and said in err, (said, err)
    assert not (tmp_path / "p").exists()
