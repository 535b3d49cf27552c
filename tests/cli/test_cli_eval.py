"""`foreword eval`: files, models, folders, comparisons, the harness, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calling import call
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword.cli import app
from foreword.evaluate.metrics import METRICS, score
from foreword.evaluate.predict import Decoding, predict

TABLE = "name[{}], food[{}]"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fw.__file__).parents[1])}


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, "eval", *arguments)


@pytest.fixture(scope="module")
def rows():
    return [{"input": s[:12], "references": [s[12:], s[10:]], "label": "positive"} for s in zoo.SENTENCES * 2]


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def predictions(tmp_path, rows):
    path = tmp_path / "said.txt"
    path.write_text("".join(r["references"][0] + "\n" for r in rows[:4]) + "something else\n\n")
    return path


@pytest.fixture(scope="module")
def prefix(folder, tmp_path_factory):
    model, tokenizer = fw.load_model(folder)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", seed=2), tokenizer=tokenizer)
    return tuning.bake().save(tmp_path_factory.mktemp("prefix") / "p")


def test_a_file_is_scored(run, data, predictions, rows):
    code, out, err = run("--data", data, "--predictions", predictions, "--metrics", "bleu,ROUGEL,exact-match", "--json",
                         "--intervals", 100)  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    texts = [*(r["references"][0] for r in rows[:4]), "something else", ""]
    own = score(texts, [r["references"] for r in rows], metrics=["bleu", "rougeL", "exact-match"], intervals=100)
    for name, s in own.items():
        found = record["metrics"][name]
        assert (found["value"], found["low"], found["high"]) == pytest.approx((s.value, s.low, s.high))
    assert record["metrics"]["exact-match"]["value"] == pytest.approx(400 / 6) and record["examples"] == 6


def test_the_table_is_for_people(run, data, predictions):
    code, out, _ = run("--data", data, "--predictions", predictions, "--metrics", "bleu,distinct-1")
    assert code == 0 and "6 examples of data.jsonl" in out and "95 % interval" in out and "tok:13a" in out


def test_a_model_writes_and_is_scored_and_compared(run, data, folder, prefix, tmp_path, rows):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    common = ("--data", data, "--model", folder, "--metrics", "rougeL,perplexity,distinct-2", "--decoding", "paper",
              "--max-new-tokens", 7, "--batch-size", 4, "--json", "--intervals", 200)  # fmt: skip
    code, out, err = run(*common, "--out", base)
    assert code == 0, err
    model, tokenizer = fw.load_model(folder)
    how = Decoding.paper(max_new_tokens=7)
    inputs = [r["input"] for r in rows]
    texts = predict(model, tokenizer, inputs, settings=how, batch_size=4)
    kept = [json.loads(x) for x in (base / "predictions.jsonl").read_text().split("\n") if x]
    assert [k["prediction"] for k in kept] == texts
    assert json.loads((base / "metrics.json").read_text()) == json.loads(out)

    code, out, err = run(*common, "--prefix", prefix, "--out", tuned, "--against", base)
    assert code == 0, err
    record = json.loads(out)
    tuning = fw.attach(model, fw.Prefix.load(prefix))
    prefixed = predict(model, tokenizer, inputs, settings=how, batch_size=4)
    tuning.detach()
    one, other = (score(t, [r["references"] for r in rows], metrics=["rougeL", "perplexity"], model=model,
                        tokenizer=tokenizer) for t in (prefixed, texts))  # fmt: skip
    for name in ("rougeL", "perplexity"):
        found = record["metrics"][name]
        assert found["value"] == pytest.approx(one[name].value, rel=1e-6)
        assert found["against"]["difference"] == pytest.approx(one[name].value - other[name].value, rel=1e-5, abs=1e-9)
        assert 0 < found["against"]["p"] <= 1
    assert record["metrics"]["distinct-2"]["against"]["p"] is None
    assert record["run"]["decoding"]["beams"] == 5 and len(record["run"]["prefixes"]) == 1
    code, out, _ = run(*common[:-3], "--resume", "--out", tuned, "--prefix", prefix, "--against", base)
    assert code == 0 and "less the other" in out and "with 6 examples the p-values say little" in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), Decoding(max_new_tokens=4)),
        (("--decoding", "beam"), Decoding(max_new_tokens=4, beams=5)),
        (("--decoding", "beam", "--beams", 2, "--length-penalty", 0.5),
         Decoding(max_new_tokens=4, beams=2, length_penalty=0.5)),
        (("--decoding", "sample", "--top-p", 0.5, "--temperature", 2, "--seed", 3),
         Decoding(max_new_tokens=4, sample=True, top_p=0.5, temperature=2.0, seed=3)),
    ],
)  # fmt: skip
def test_options_of_decoding(run, data, folder, options, expected):
    code, out, err = run("--data", data, "--model", folder, "--metrics", "distinct-1", "--max-new-tokens", 4, "--limit",
                         2, "--json", *options)  # fmt: skip
    assert code == 0 and json.loads(out)["run"]["decoding"] == expected.to_json(), err


def test_a_finished_run_is_scored_again_without_writing(run, data, folder, tmp_path):
    out = tmp_path / "out"
    common = ("--data", data, "--model", folder, "--max-new-tokens", 5, "--out", out)
    assert run(*common, "--metrics", "bleu")[0] == 0
    before = (out / "predictions.jsonl").stat().st_mtime_ns
    code, _, err = run(*common, "--metrics", "chrf")
    assert code == 1 and "holds an evaluation already; pass --resume" in err
    code, said, _ = run(*common, "--metrics", "chrf,slot-coverage", "--resume")
    assert code == 1  # these inputs are no tables
    code, said, err = run(*common, "--metrics", "chrf", "--resume", "--json")
    assert code == 0 and list(json.loads(said)["metrics"]) == ["chrf"], err
    assert (out / "predictions.jsonl").stat().st_mtime_ns == before
    code, _, err = run(*common, "--metrics", "chrf", "--resume", "--decoding", "beam")
    assert code == 1 and "holds another evaluation: decoding.beams is 1 there and 5 here" in err


def test_a_task_names_its_metrics_and_labels_can_be_given(run, tmp_path):
    data, said = tmp_path / "e2e.jsonl", tmp_path / "said.jsonl"
    places = [("Aromi", "French"), ("Cotto", "Indian"), ("Zizzi", "English")]
    data.write_text("".join(json.dumps({"input": TABLE.format(*p), "references": [f"{p[0]} is {p[1]}."]}) + "\n"
                            for p in places))  # fmt: skip
    said.write_text("".join(json.dumps({"prediction": f"{name} serves French food."}) + "\n" for name, _ in places))
    code, out, err = run("--data", data, "--predictions", said, "--task", "e2e", "--json")
    assert code == 0, err
    found = json.loads(out)["metrics"]
    assert found["slot-coverage"]["value"] == pytest.approx(100 * 4 / 6)
    assert found["slot-hallucinated"]["value"] == pytest.approx(200 / 3) and not found["slot-error"]["higher_is_better"]
    code, _, err = run("--data", data, "--predictions", said, "--metrics", "sentiment")
    assert code == 1 and "sentiment needs labels" in err
    code, _, err = run("--data", data, "--predictions", said, "--metrics", "sentiment", "--wanted", "so-so")
    assert code == 1 and "'so-so'" in err


def test_a_csv_with_a_reference_a_row_is_grouped(run, tmp_path):
    data, said = tmp_path / "d.csv", tmp_path / "said.txt"
    data.write_text("mr,ref\na,x y z w\nb,q r s t\na,x y w z\n")
    said.write_text("x y z w\nq r s t\n")
    common = ("--data", data, "--predictions", said, "--metrics", "bleu", "--column", "input=mr", "--column",
              "output=ref", "--json")  # fmt: skip
    code, _, err = run(*common)
    assert code == 1 and "2 predictions and d.csv 3 examples" in err and "--group" in err
    code, out, err = run(*common, "--group")
    assert code == 0 and json.loads(out)["metrics"]["bleu"]["value"] == pytest.approx(100), err


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--metrics", "bleu"), "give --data with --predictions"),
        (("--data", "DATA"), "--metrics names what to measure"),
        (("--data", "DATA", "--metrics", "blue", "--model", "nowhere"), "did you mean bleu"),
        (("--data", "DATA", "--task", "e2", "--model", "nowhere"), "did you mean e2e"),
        (("--data", "DATA", "--metrics", "bleu"), "give --data with --predictions"),
        (("--data", "DATA", "--metrics", "perplexity", "--predictions", "SAID"), "judged by the base model"),
        (("--data", "DATA", "--metrics", "bleu", "--predictions", "SAID", "--prefix", "x"), "give one of them"),
        (("--data", "DATA", "--metrics", "bleu", "--predictions", "SAID", "--limit", 3),
         "6 predictions and data.jsonl 3"),
        (("--data", "DATA", "--metrics", "bleu", "--predictions", "SAID", "--resume"), "name it"),
        (("--data", "DATA", "--metrics", "bleu", "--predictions", "none.txt"), "none.txt"),
        (("--data", "DATA", "--metrics", "bleu", "--model", "nowhere", "--against", "TMP"), "has no predictions.jsonl"),
        (("--data", "DATA", "--metrics", "bleu", "--model", "nowhere", "--prefix", "TMP"), "foreword.json"),
        (("--data", "DATA", "--metrics", "bleu", "--model", "nowhere", "--out", "TMP"), "is not of an evaluation"),
        (("--data", "DATA", "--metrics", "bleu", "--predictions", "SAID", "--against", "TMP", "--intervals", 0),
         "--intervals 1 or more"),
        (("--data", "DATA", "--metrics", "bleu", "--model", "nowhere", "--beams", 3),
         "--beams goes with --decoding beam, and it is greedy"),
        (("--data", "DATA", "--metrics", "bleu", "--model", "nowhere", "--decoding", "beam", "--top-p", 0.9),
         "--top-p goes with --decoding sample, and it is beam"),
        (("--data", "DATA", "--metrics", "bleu", "--model", "nowhere", "--shots", 2), "go with --harness"),
        (("--harness", "arc_easy", "--model", "demo", "--metrics", "bleu"), "metrics of its own"),
        (("--harness", "arc_easy"), "give it --model"),
        (("--harness", "arc_easy", "--model", "nowhere", "--out", "TMP"), "is not of an evaluation"),
        (("--harness", "arc_easy", "--model", "nowhere", "--prefix", "TMP"), "foreword.json"),
        (("--harness", "arc_easy", "--model", "demo", "--data", "DATA"), "brings its own data"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_a_model_is_loaded(run, data, predictions, tmp_path, arguments, said):
    places = {"DATA": data, "SAID": predictions, "TMP": tmp_path}
    code, _, err = run(*(places.get(a, a) for a in arguments))
    assert code == 1 and said in err, err


def test_data_without_references(run, tmp_path, predictions, folder):
    data = tmp_path / "inputs.jsonl"
    data.write_text('{"input": "a film"}\n{"input": "a place"}\n')
    code, _, err = run("--data", data, "--model", folder, "--metrics", "bleu")
    assert code == 1 and "bleu needs references, and there are none; the data needs references" in err
    code, out, err = run("--data", data, "--model", folder, "--metrics", "distinct-1", "--max-new-tokens", 4, "--json")
    assert code == 0 and json.loads(out)["examples"] == 2, err
    data.write_text('{"input": "a film"}\n{"input": "a place", "references": ["x"]}\n')
    code, _, err = run("--data", data, "--model", folder, "--metrics", "bleu")
    assert code == 1 and "inputs.jsonl:1: no references, and other examples have some" in err
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = run("--data", data, "--predictions", tmp_path / "empty.jsonl", "--metrics", "distinct-1")
    assert code == 1 and "empty" in err


def test_other_data_is_not_compared(run, data, predictions, tmp_path):
    one = tmp_path / "one"
    common = ("--data", data, "--metrics", "bleu")
    assert run(*common, "--predictions", predictions, "--out", one)[0] == 0
    short = tmp_path / "short.txt"
    short.write_text("a\nb\n")
    code, _, err = run(*common, "--predictions", short, "--limit", 2, "--against", one)
    assert (
        code == 1 and "the two runs saw different data: one run has 2 examples and the other 6; the first 2 are" in err
    )
    code, _, err = run("--data", data, "--limit", 2, "--metrics", "bleu", "--predictions", one / "predictions.jsonl")
    assert code == 1 and "6 predictions and data.jsonl 2 examples" in err


# ------------------------------------------------------------------------------------------ the rest


def test_the_metrics_are_listed():
    result = CliRunner().invoke(app, ["eval", "--list", "--json"])
    record = json.loads(result.stdout)
    assert list(record["metrics"]) == list(METRICS) and record["tasks"]["labels"] == [
        "accuracy",
        "macro-f1",
        "micro-f1",
    ]
    shown = CliRunner().invoke(app, ["eval", "--list"], env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in METRICS)


def test_listing_and_help_import_nothing_heavy():
    code = (
        "import sys; sys.argv = ['foreword', 'eval', '--list']\n"
        "from foreword.cli import main\n"
        "main_ended = False\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'sklearn', 'nltk'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_the_harness_runs_with_a_prefix(run, folder, prefix, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": s, "label": i % 2}) + "\n"
                                                 for i, s in enumerate(zoo.SENTENCES)))  # fmt: skip
    task = tmp_path / "film.yaml"
    task.write_text(
        f"task: film\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        f"  cache_dir: {tmp_path / 'cache'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: label\ndoc_to_choice: ["bad", "good"]\nmetric_list:\n  - metric: acc\n'
    )
    out = tmp_path / "out"
    code, said, err = run("--harness", task, "--model", folder, "--prefix", prefix, "--out", out, "--json")
    assert code == 0, err
    record = json.loads(said)
    assert record["tasks"]["film"]["acc"]["value"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert json.loads((out / "metrics.json").read_text()) == record
    code, said, _ = run("--harness", task, "--model", folder, "--limit", 2)
    assert code == 0 and "film" in said and "standard error" in said


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_written_and_the_run_goes_on(folder, data, tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text(data.read_text() * 40)
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "foreword", "eval", "--data", many, "--model", folder, "--metrics", "rougeL",
               "--batch-size", "2", "--max-new-tokens", "40", "--intervals", "0", "--json"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    process = subprocess.Popen([*map(str, command), "--out", str(out)], **pipes)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (out / "writing.jsonl").exists() and (out / "writing.jsonl").read_text().count("\n") > 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted; go on with --resume" in err, err
    assert not (out / "metrics.json").exists()
    whole = tmp_path / "whole"
    results = [CliRunner().invoke(app, [*map(str, command[3:]), "--out", str(o), *more])
               for o, more in ((out, ["--resume"]), (whole, []))]  # fmt: skip
    assert all(r.exit_code == 0 for r in results), [r.output for r in results]
    assert (out / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    assert json.loads(results[0].stdout)["metrics"] == json.loads(results[1].stdout)["metrics"]
