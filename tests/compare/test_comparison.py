"""Comparisons of a tiny model: their numbers against oracles, resuming, kills, a full disk, other data."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import comparing
import pytest
import torch

import foreword as fw
import zoo
from foreword.compare import Budget, Watcher, process
from foreword.compare.folder import Folder
from foreword.data import Collator, encode, read_examples
from foreword.errors import ConfigError, DataError
from foreword.evaluate import Decoding, predict, score
from foreword.generation import write_on
from foreword.losses import example_losses, supervised_tokens

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, HERE, Path(fw.__file__).parents[1]])),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return comparing.save_model(tmp_path_factory.mktemp("model"))


class Runs(Watcher):
    """Which runs were begun, finished and failed."""

    def __init__(self):
        self.seen = []

    def begun(self, run):
        self.seen.append(run.describe())

    def failed(self, run, message):
        self.seen.append(message)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished comparison with rates to choose, prompt and speed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    made = comparing.comparison(model, budget=Budget(steps=16), factors=(0.3, 1.0), prompted=True, timed=True)
    return made, out, made.run(out)


def loss_of(model, tokenizer, records):
    """Nats a token, one example at a time."""
    data = encode(read_examples(records), tokenizer, max_length=40)
    losses = [example_losses(model, encode(read_examples([r]), tokenizer, max_length=40), Collator(0)) for r in records]
    return math.fsum(x for (x,) in losses) / sum(supervised_tokens(data, seq2seq=False))


def test_lines_and_files(done):
    made, out, outcome = done
    lines = outcome.record["rows"]
    assert [line["label"] for line in lines] == ["base model", "prompted", "prefix 3", "lora 2"]
    assert outcome.missing == 0 and not outcome.failed and len(outcome.record["runs"]) == len(made.plan) == 8
    assert all(path.stat().st_size for path in outcome.written)
    names = {p.name for p in outcome.written}
    assert {"results.json", "report.md", "report.html", "parameters.svg", "steps.png", "curves.svg"} <= names
    assert not [p for p in out.iterdir() if p.name.startswith(".work")]
    assert json.loads((out / "results.json").read_text())["rows"] == json.loads(json.dumps(lines))


def test_numbers_are_those_of_the_saved_prefix(done, model):
    """Loaded and attached by hand, what a run saved has the losses and texts that the run reports."""
    _, out, outcome = done
    base, tokenizer = fw.load_model(model)
    by_label = {r["run"]["label"]: (k, r) for k, r in outcome.record["runs"].items() if r["run"]["kind"] != "rate"}
    records, how = comparing.RECORDS[:3], Decoding(max_new_tokens=6)
    for label in ("base model", "prompted", "prefix 3", "lora 2"):
        key, result = by_label[label]
        tuning = None
        if label == "prompted":
            tuning = fw.attach(base, fw.Prefix.from_text(base, tokenizer, comparing.task().init))
        elif label != "base model":
            prefix = fw.Prefix.load(out / "runs" / key / "prefix")
            assert result["stored_bytes"] == (out / "runs" / key / "prefix" / "prefix.safetensors").stat().st_size
            tuning = fw.attach(base, prefix)
        loss = loss_of(base, tokenizer, records)
        texts = predict(base, tokenizer, [r["input"] for r in records], settings=how)
        if tuning is not None:
            tuning.detach()
        scores = result["tests"]["test"]
        assert scores["loss"]["value"] == pytest.approx(loss, rel=1e-5)
        assert scores["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert scores["loss"]["low"] <= loss <= scores["loss"]["high"]
        kept = [
            json.loads(x)["prediction"] for x in (out / "runs" / key / "predictions.jsonl").read_text().splitlines()
        ]
        assert kept == texts
        wanted = score(texts, [[r["output"]] for r in records], metrics=["bleu"])["bleu"].value
        assert scores["bleu"]["value"] == pytest.approx(wanted)
        assert result["valid_loss"] == pytest.approx(loss, rel=1e-5)  # the same three examples


def test_prompted_is_the_model_with_the_text_before_the_input(done, model):
    _, _, outcome = done
    base, tokenizer = fw.load_model(model)
    text = tokenizer(comparing.task().init)["input_ids"]
    total = tokens = 0.0
    for record in comparing.RECORDS[:3]:
        data = encode(read_examples([record]), tokenizer, max_length=40)[0]
        ids, labels = torch.tensor([text + data["input_ids"]]), torch.tensor([[-100] * len(text) + data["labels"]])
        with torch.no_grad():
            count = int((labels != -100).sum())
            total += float(base(input_ids=ids, labels=labels).loss) * count
            tokens += count
    (line,) = (x for x in outcome.record["rows"] if x["kind"] == "prompted")
    assert line["tests"]["test"]["loss"]["mean"] == pytest.approx(total / tokens, rel=1e-5)


def test_what_a_line_costs(done, model):
    _, _, outcome = done
    base, tokenizer = fw.load_model(model)
    configs = {"prefix 3": fw.PrefixConfig(length=3, init=comparing.task().init), "lora 2": fw.LoRAConfig(rank=2)}
    lines = {line["label"]: line for line in outcome.record["rows"]}
    total = sum(p.numel() for p in base.parameters())
    for label, config in configs.items():
        tuning = fw.attach(base, config, tokenizer=tokenizer)
        assert lines[label]["parameters"] == tuning.num_parameters
        assert lines[label]["share"] == pytest.approx(tuning.num_parameters / total)
        tuning.detach()
        assert lines[label]["training_seconds"]["mean"] > 0 and lines[label]["speed_ratio"]["mean"] > 0
    assert lines["prefix 3"]["training_seconds_ratio"] == lines["prefix 3"]["peak_bytes_ratio"] == 1
    assert lines["prefix 3"]["steps"]["mean"] == 12 and lines["lora 2"]["steps"]["mean"] == 12
    assert lines["prefix 3"]["supervised_tokens"] == lines["lora 2"]["supervised_tokens"]
    orders = {r["order"] for r in outcome.record["runs"].values() if r["run"]["kind"] == "final"}
    assert len(orders) == 1


def test_the_taken_rate_validated_best(done):
    _, _, outcome = done
    for line in outcome.record["rows"][2:]:
        losses = {s["factor"]: s["valid_loss"] for s in line["search"]}
        assert len(losses) == 2 and line["factor"] == min(losses, key=losses.get) and line["at_the_edge"]
        assert line["rates"] == next(s["rates"] for s in line["search"] if s["factor"] == line["factor"])


def test_the_page_needs_nothing_else(done):
    _, out, _ = done
    page = (out / "report.html").read_text()
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!["']?#)[^"')\s>]""", page)
    assert page.count("<svg") >= 3 and "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {r.lstrip("#") for r in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page) for r in r if r} <= set(ids)
    text = (out / "report.md").read_text()
    for word in ("prefix 3", "lora 2", "Learning rates", "with seed 0", "plots/steps.png", "At the edge"):
        assert word in text and (word.startswith("plots") or word in page)
    assert all((out / p).is_file() for p in re.findall(r"\]\((plots/[^)]+)\)", text))


def test_resuming_repeats_nothing(done):
    made, out, _ = done
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*")}
    results, watcher = (out / "results.json").read_bytes(), Runs()
    made.run(out, resume=True, watcher=watcher)
    assert watcher.seen == [] and (out / "results.json").read_bytes() == results
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*")} == before


def test_a_run_that_measured_its_speed_is_not_repeated_without(done):
    made, out, outcome = done
    watcher, page = Runs(), (out / "report.md").read_text()
    again = replace(made, plan=replace(made.plan, timed=False)).run(out, resume=True, watcher=watcher)
    assert watcher.seen == [] and again.missing == 0
    assert again.record["rows"] == outcome.record["rows"]
    assert (out / "report.md").read_text() == page  # with what each line wrote


def test_a_line_may_get_another_name(done):
    made, out, _ = done
    row, other = made.plan.rows
    renamed = replace(made, plan=replace(made.plan, rows=[replace(row, label="from the text"), other]))
    watcher = Runs()
    runs = renamed.run(out, resume=True, watcher=watcher).record["runs"].values()
    assert watcher.seen == []
    assert {r["run"]["label"] for r in runs} == {"base model", "prompted", "from the text", "lora 2"}
    made.run(out, resume=True)


def test_the_best_state_is_tested_where_that_is_asked_for(model, tmp_path):
    # Validated on what is never said, so that the more is learned, the worse it is.
    other = [{**r, "output": " 9 9 9 9"} for r in comparing.RECORDS[:3]]
    data = comparing.task(valid=other, tests={"test": other})
    made = comparing.comparison(model, data=data, methods=("full",), budget=Budget(steps=12), factors=(200.0,))
    made = replace(made, settings=replace(made.settings, keep="best", looks=12))
    outcome = made.run(tmp_path / "out")
    (result,) = (r for r in outcome.record["runs"].values() if r["run"]["kind"] == "final")
    assert result["best"]["step"] < 12 and result["best"]["loss"] < result["curve"][-1]["loss"]
    assert result["valid_loss"] == result["best"]["loss"]
    assert result["tests"]["test"]["loss"]["value"] == pytest.approx(result["best"]["loss"], rel=1e-5)  # the same data
    assert "what is tested is the state of the best validation" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ConfigError, match='tested is "best validation" there'):
        replace(made, settings=replace(made.settings, keep="last")).run(tmp_path / "out", resume=True)


def test_a_folder_takes_no_other_comparison(done, tmp_path):
    made, out, _ = done
    with pytest.raises(ConfigError, match="holds a comparison already"):
        made.run(out)
    with pytest.raises(ConfigError, match="holds no comparison; leave --resume out"):
        made.run(tmp_path / "none", resume=True)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which is not of a comparison"):
        made.run(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        made.run(tmp_path / "thesis.tex")
    other = replace(made, task=comparing.task(train=comparing.RECORDS[1:]))
    with pytest.raises(ConfigError, match=r"other conditions: task\.data\.train\.examples is 9 there and 8 here"):
        other.run(out, resume=True)
    changed = [{**comparing.RECORDS[0], "output": " another"}, *comparing.RECORDS[1:3]]
    other = replace(made, task=comparing.task(tests={"test": changed}))
    with pytest.raises(ConfigError, match=r"task\.data\.test\.sha256 is"):
        other.run(out, resume=True)
    other = replace(made, plan=replace(made.plan, budget=Budget(steps=17)))
    with pytest.raises(ConfigError, match=r"budget\.steps is 16 there and 17 here"):
        other.run(out, resume=True)
    other = replace(made, settings=replace(made.settings, keep="best"))
    with pytest.raises(ConfigError, match='tested is not given there and "best validation" here'):
        other.run(out, resume=True)


def test_another_model_is_another_comparison(done, tmp_path):
    made, out, _ = done
    import zoo

    torch.manual_seed(9)
    zoo.build("gpt2").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"other conditions: model\.weights is"):
        replace(made, settings=replace(made.settings, model=str(tmp_path))).run(out, resume=True)


def test_one_process_works_on_a_folder(done):
    made, out, _ = done
    with Folder(out).locked(), pytest.raises(ConfigError, match="another process is at work"):
        made.run(out, resume=True)


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "result.json").write_text("{")
    with pytest.raises(DataError, match=r"runs/a/result\.json cannot be read"):
        Folder(tmp_path).finished()


def test_what_is_wrong_is_found_before_anything_is_trained(model, tmp_path):
    out, watcher = tmp_path / "out", Runs()
    narrow = comparing.comparison(model, methods=("full",))
    narrow = replace(narrow, settings=replace(narrow.settings, dtype="bfloat16"))
    cases = [
        (comparing.comparison(model, data=comparing.task(valid=[{"input": "a", "output": "~~"}])), "has no tokens"),
        (comparing.comparison(model, data=comparing.task(init="~")), "prefix 3: .*has no token"),
        (comparing.comparison(model, data=comparing.task(metrics=("sentiment",))), "sentiment needs labels"),
        (comparing.comparison(str(tmp_path / "no-model")), "There is no file or folder"),
        (narrow, r"full: full trains the base's own bfloat16 numbers.*float32"),
    ]
    for made, said in cases:
        with pytest.raises((ConfigError, DataError), match=said):
            made.run(out, watcher=watcher)
    assert watcher.seen == [] and not (out / "comparison.json").exists()


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others(model, tmp_path, monkeypatch):
    made, watcher, call = comparing.comparison(model), Runs(), process.call

    def failing(function, *given, **more):
        if function == "one:execute" and given[2].label == "prefix 3":
            raise process.RunFailedError("its process ended without a result (signal SIGKILL)")
        return call(function, *given, **more)

    monkeypatch.setattr(process, "call", failing)
    outcome = made.run(tmp_path / "out", watcher=watcher)
    assert [line["label"] for line in outcome.record["rows"]] == ["base model", "lora 2"]
    assert outcome.missing == 1 and "prefix 3, seed 0" in outcome.failed[0]
    assert "Failed, and left out: prefix 3" in (tmp_path / "out" / "report.md").read_text()
    monkeypatch.undo()
    again = Runs()
    outcome = made.run(tmp_path / "out", resume=True, watcher=again)
    assert len(again.seen) == 1 and outcome.missing == 0 and not outcome.failed


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_results(model, tmp_path):
    script, whole, out = str(HERE / "comparing.py"), tmp_path / "whole", tmp_path / "killed"
    # In the same environment as those that are killed: another number of threads rounds otherwise.
    subprocess.run([sys.executable, script, model, str(whole)], env=ENVIRONMENT, check=True, timeout=400)
    command = [sys.executable, script, model, str(out)]
    for finished in (1, 3):  # killed while the run after so many is going on
        resume = ["--resume"] if finished > 1 else []
        going = subprocess.Popen([*command, *resume], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 400
        while len(list((out / "runs").glob("*"))) < finished or not list(out.glob(".work-*")):
            assert going.poll() is None and time.time() < deadline, going.stderr.read()
            time.sleep(0.02)
        going.send_signal(signal.SIGKILL)
        going.wait()
    finished = {p.name: (p / "result.json").read_bytes() for p in (out / "runs").glob("*")}
    assert 3 <= len(finished) < 5
    subprocess.run([*command, "--resume"], env=ENVIRONMENT, check=True, timeout=400)
    assert comparing.lasting(out / "results.json") == comparing.lasting(whole / "results.json")
    assert all((out / "runs" / k / "result.json").read_bytes() == content for k, content in finished.items())
    assert not list(out.glob(".work-*"))


@pytest.mark.slow
def test_a_full_disk_loses_only_the_run_that_was_going_on(model, tmp_path):
    """No file may grow beyond a size: the error that a full disk gives, first for a trained prefix."""
    out = tmp_path / "full"
    code = (
        "import resource, sys, comparing; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))\n"
        "try: comparing.comparison(sys.argv[1], seeds=2).run(Path(sys.argv[2]))\n"
        "except OSError as exc: print('OSError', exc.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, model, str(out)], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=240, check=True)  # fmt: skip
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr[-3000:]
    (base,) = (out / "runs").glob("*")
    assert json.loads((base / "result.json").read_text())["run"]["kind"] == "base"
    assert not list(out.glob(".work-*"))
    kept = (base / "result.json").read_bytes()
    watcher = Runs()
    comparing.comparison(model, seeds=2).run(out, resume=True, watcher=watcher)
    assert len(watcher.seen) == 4 and (base / "result.json").read_bytes() == kept


@pytest.mark.parametrize("turns", ["all", "last"])
def test_conversations_are_compared_by_their_answers(tmp_path, turns):
    """The loss is that of the answers' tokens, and texts are written from the conversation up to the last answer."""
    folder = tmp_path / "model"
    zoo.build("llama").save_pretrained(folder)
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else '<bos>' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    roles = ("user", "assistant", "user", "assistant")
    parts = [(s[:9], s[9:20], " film", s[20:]) for s in zoo.SENTENCES]
    talks = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, p, strict=True)]} for p in parts]
    data = comparing.task(
        train=talks, valid=talks, tests={"test": talks}, metrics=("bleu",), turns=turns, max_length=99
    )
    outcome = comparing.comparison(folder, data=data, methods=("prefix",)).run(tmp_path / "out")
    model, losses, prompts = zoo.build("llama").eval(), [], []
    for part in parts:
        row, learned = [], []
        for place, text in enumerate(part):
            answer = place % 2 == 1
            piece = tokenizer(f"{text}{'<eos>' if answer else '<bos>'}", add_special_tokens=False)["input_ids"]
            prompts += [list(row)] if place == 3 else []
            row, learned = row + piece, learned + [answer and (turns == "all" or place == 3)] * len(piece)
        with torch.no_grad():
            scores = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        losses += [-float(scores[i - 1, token]) for i, token in enumerate(row) if learned[i]]
    base = next(row for row in outcome.record["rows"] if row["label"] == "base model")
    assert base["tests"]["test"]["loss"]["mean"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    files = [[json.loads(line) for line in path.open()] for path in (tmp_path / "out").glob("runs/*/predictions.jsonl")]
    assert len(files) == 2 and all({line["input"] for line in f} == {"\n".join(p[:3]) for p in parts} for f in files)
    asked = dict(zip(("\n".join(p[:3]) for p in parts), prompts, strict=True))
    end = tokenizer.eos_token_id
    own = [write_on(model, tokenizer, [asked[f["input"]]], max_new_tokens=6, eos_token_id=end)[0] for f in files[0]]
    assert own in [[line["prediction"] for line in f] for f in files]
