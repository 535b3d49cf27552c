"""The commands, run in process and as processes: what they print, what they leave."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword import cli

PROMPTS = ("The film is", "There is a place")


# ---------------------------------------------------------------- help


COMMANDS = (
    "train", "tune", "meta", "distill", "compress", "generate", "push", "serve", "mirror", "export", "import",
    "eval", "compare", "inspect", "look", "interference", "demo", "doctor",
)  # fmt: skip


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_there_is(command):
    result = CliRunner().invoke(cli.app, [command, "--help"] if command else ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    wanted = COMMANDS if not command else ("--help", "Usage")
    assert all(w in result.stdout for w in wanted)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, time; t = time.process_time(); sys.argv = ['foreword', 'train', '--help']\n"
        "from foreword.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "spent = time.process_time() - t\n"
        "assert spent < 3, spent\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--reparam" in done.stdout


# ---------------------------------------------------------------- the round trip


@pytest.mark.parametrize(("rate", "said"), [("1e-6", "hardly moves a prefix; 0.02 is usual"), ("5", "is 250 times")])
def test_a_warning_is_its_sentence(rate, said, run, folder, data, tmp_path):
    code, _, err = run("train", "--model", folder, "--data", data, "--out", tmp_path / "o", "--steps", 1, "--length", 4,
                       "--init", "random", "--learning-rate", rate)  # fmt: skip
    (line,) = [line for line in err.splitlines() if said in line]
    assert code == 0 and line.startswith("warning: learning_rate=")
    assert "UserWarning" not in err and ".py:" not in err


def test_train_reports_and_saves(trained):
    out, record = trained
    prefix = fw.Prefix.load(out)
    assert record["out"] == str(out) and record["steps"] == 6 and record["interrupted"] is False
    assert record["parameters"] == prefix.num_parameters == 256 and record["bytes"] == prefix.nbytes
    assert record["loss"] > 0 and record["eval_loss"] == prefix.metadata["metrics"]["eval_loss"]
    assert (out / "curve.png").exists() and (out / "README.md").exists()


def test_inspect_tells_what_is_in_it(run, trained):
    code, out, err = run("inspect", trained[0], "--json")
    record = json.loads(out)
    assert code == 0 and not err
    assert record["parameters"] == 256 and record["model_class"] == "LlamaForCausalLM" and record["rotary_sites"] == 2
    assert [s["name"] for s in record["sites"]] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert all(
        s["length"] == 4 and s["kv_heads"] == 2 and s["key_norm"] > 0 and not s["gated"] for s in record["sites"]
    )
    code, out, err = run("inspect", trained[0])
    assert code == 0 and "eval_loss" in out and "LlamaForCausalLM" in out


def generate(run, folder, *arguments):
    code, out, err = run("generate", "--model", folder, "--max-new-tokens", 8, *arguments)
    assert code == 0, err
    return json.loads(out) if "--json" in arguments else out


def test_generate_writes_with_the_prefix(run, folder, trained):
    """The texts are those of the library calls, and the prefix changes them."""
    alone = generate(run, folder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--json")
    with_prefix = generate(
        run, folder, "--prefix", trained[0], "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--json"
    )
    off = generate(
        run, folder, "--prefix", trained[0], "--strength", 0, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--json"
    )
    assert [r["prompt"] for r in alone] == list(PROMPTS) and alone == off != with_prefix
    model = zoo.build("llama")
    fw.attach(model, fw.Prefix.load(trained[0]))
    for record in with_prefix:
        ids = torch.tensor([zoo.tokenizer()(record["prompt"])["input_ids"]])
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert record["texts"] == [zoo.tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)]


def test_one_prompt_streams_the_text_that_json_has(run, folder, trained):
    given = ("--prefix", trained[0], "--prompt", PROMPTS[0])
    want = generate(run, folder, *given, "--json")[0]["texts"][0]
    assert generate(run, folder, *given).strip() == (PROMPTS[0] + want).strip()
    assert generate(run, folder, *given, "--prompt", PROMPTS[1]).startswith(PROMPTS[0] + want)


def test_prompts_come_from_a_file(run, folder, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    record = generate(run, folder, "--prompt", "a", "--prompts", file, "--json")
    assert [r["prompt"] for r in record] == ["a", *PROMPTS]


@pytest.mark.parametrize("how", [("--sample", "--n", 3), ("--beams", 3, "--n", 2), ("--beams", 2)])
def test_several_answers(run, folder, how):
    record = generate(run, folder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *how, "--json")
    n = how[how.index("--n") + 1] if "--n" in how else 1
    assert [len(r["texts"]) for r in record] == [n, n]
    assert record == generate(run, folder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *how, "--json")
    if n > 1:
        assert len(set(record[0]["texts"])) > 1
    if "--sample" in how:
        other = generate(run, folder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *how, "--seed", 5, "--json")
        assert other != record


def test_show_batch_marks_what_is_supervised_and_trains_nothing(run, folder, data, tmp_path):
    out = tmp_path / "out"
    code, shown, err = run("train", "--model", folder, "--data", data, "--show-batch", "--batch-size", 2, "--out", out)
    assert code == 0 and not out.exists()
    assert shown.count("⟦") == shown.count("⟧") == 2 and shown.index("⟦") > 20 and "9 examples" in err
    assert run("train", "--model", folder, "--data", data, "--show-batch")[0] == 0


def test_show_memory_prints_the_parts_and_trains_nothing(run, folder, data, tmp_path):
    out = tmp_path / "out"
    given = ("train", "--model", folder, "--data", data, "--show-memory", "--init", "random", "--out", out)
    code, shown, _ = run(*given)
    assert code == 0 and not out.exists() and "base model" in shown and "at the peak" in shown
    few, many = (json.loads(run(*given, "--json", "--batch-size", n)[1]) for n in (2, 8))
    assert few["base"] == many["base"] > 0 and many["rows"] == 8
    assert 3 < many["activations"] / few["activations"] < 5


def test_where_limit_and_columns_choose_the_data(run, folder, data, tmp_path):
    given = ("train", "--model", folder, "--data", data, "--show-batch")
    assert "4 examples" in run(*given, "--where", "label=1")[2]
    assert "2 examples" in run(*given, "--limit", 2)[2]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(data.read_text().replace('"input"', '"question"'))
    assert "9 examples" in run(*given[:4], renamed, "--show-batch", "--column", "input=question")[2]


@pytest.mark.parametrize(
    "how",
    [
        ("--reparam", "mlp", "--hidden", 8, "--gate", "head"),
        ("--reparam", "mlp", "--hidden", 8, "--share-layers", "--per-kind"),
        ("--reparam", "low-rank", "--rank", 2, "--freeze-first", "--dropout", 0.1),
        (
            "--init",
            "The film is a lovely",
            "--repeat",
            "--sites",
            r".*layers\.1.*",
            "--checkpointing",
            "--accumulate",
            2,
        ),
        ("--init", "words:good film", "--gate", "zero", "--position-offset", 3),
    ],
)
def test_train_takes_the_configuration(run, folder, data, tmp_path, how):
    given = ("train", "--model", folder, "--data", data, "--length", 6, "--steps", 2)
    code, _, err = run(*given, "--out", tmp_path / "p", *how)
    assert code == 0, err
    prefix = fw.Prefix.load(tmp_path / "p")
    assert prefix.longest == 6 and prefix.position_offset == (3 if "--position-offset" in how else 0)
    assert len(prefix.sites) == (1 if "--sites" in how else 2)
    assert bool(prefix.bias) == ("head" in how) and bool(prefix.gates) == ("zero" in how)
    code, _, err = run(*given, "--start", tmp_path / "p", "--out", tmp_path / "on", "--json")
    assert code == 0, err
    assert fw.Prefix.load(tmp_path / "on") != prefix


@pytest.mark.parametrize(
    ("how", "methods"),
    [
        (("--method", "memory", "--memory-rank", 2), []),
        (("--method", "prefix", "--method", "lora", "--visible", "infix:1", "--sites", "last:1"), ["lora"]),
        (("--method", "prompt"), []),
        (("--method", "adapter", "--width", 4, "--method", "bitfit"), ["bitfit", "adapter"]),
    ],
)
def test_train_takes_other_methods(run, folder, data, tmp_path, how, methods):
    given = ("train", "--model", folder, "--data", data, "--length", 6, "--steps", 2, "--init", "random", "--json")
    code, out, err = run(*given, "--out", tmp_path / "p", *how)
    assert code == 0, err
    prefix = fw.Prefix.load(tmp_path / "p")
    assert [p["method"] for p in prefix.parts] == methods
    assert bool(prefix.memory) == ("memory" in how) and (prefix.longest == 6) == ("prefix" in how or "prompt" in how)
    assert prefix.visible.to_json() == ("infix:1" if "infix:1" in how else "all")
    assert json.loads(out)["parameters"] > 0
    code, out, err = run("inspect", tmp_path / "p")
    assert code == 0 and all(f"with {m}: " in out for m in methods), err
    assert ("seen by: infix:1" in out) == ("infix:1" in how)
    record = json.loads(run("inspect", tmp_path / "p", "--json")[1])
    assert record["parameters"] == prefix.num_parameters
    ranks = {s["memory_rank"] for s in record["sites"]}
    assert ranks <= {None} if "memory" not in how else ranks == {2} and "rank 2" in out
    code, out, err = run("generate", "--model", folder, "--prefix", tmp_path / "p", "--prompt", "The film", "--json")
    assert code == 0, err


# ---------------------------------------------------------------- doctor


def test_doctor_looks_at_this_machine(run, monkeypatch):
    code, out, _ = run("doctor", "--json")
    record = json.loads(out)
    assert code == 0 and record["problems"] == []
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["foreword"]
    assert "agrees" in record["kernels"]["cpu"] and record["device"].startswith(("cpu", "cuda", "mps"))
    monkeypatch.setitem(cli.doctor._OPTIONAL, "no_such_module", "pip install no-such-module")
    monkeypatch.setattr("foreword._kernels.self_check", lambda *_: 0.5)
    code, out, err = run("doctor")
    assert code == 1 and "missing; get it with: pip install no-such-module" in out
    assert "DISAGREES" in out and "problem: the cpu attention kernel is off by" in err


def test_generate_refuses_a_prefix_that_wants_a_vector(run, folder, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = fw.PrefixConfig(length=2, init="random", reparam="mlp", hidden=4, condition=3)
    tuning = fw.attach(model, config)
    tuning.bake().save(tmp_path / "p")
    tuning.bake(condition=torch.zeros(3)).save(tmp_path / "plain")
    assert "condition" in run("inspect", tmp_path / "p")[1]
    given = ("generate", "--model", folder, "--prompt", "The film", "--max-new-tokens", 2, "--prefix")
    code, out, err = run(*given, tmp_path / "p")
    assert code == 1 and not out and "given(vector)" in err
    assert run(*given, tmp_path / "plain", "--force")[0] == 0


def test_train_by_strategies(run, folder, data, tmp_path):
    given = ("train", "--model", folder, "--data", data, "--length", 6, "--init", "random", "--steps", 24)
    code, out, err = run(
        *given, "--valid", data, "--eval-every", 2, "--grow-from", 2, "--grow-by", 4, "--grow-threshold", 9,
        "--monitor", 2, "--roll-back", 2, "--out", tmp_path / "grown",
    )  # fmt: skip
    assert code == 0 and "length recommended: " in out, err
    assert (tmp_path / "grown" / "monitor.png").is_file()
    code, out, err = run(*given, "--layer-groups", 2, "--out", tmp_path / "staged", "--json")
    assert code == 0 and json.loads(out)["steps"] == 24, err
    for wrong, message in (
        (("--grow-from", 2), "validation loss"),
        (("--grow-from", 6, "--valid", data), "has 6 at most"),
        (("--grow-from", 2, "--valid", data), "would never grow"),
        (("--layer-groups", 3), "expected 1 to 2"),
        (("--layer-groups", 2, "--reparam", "mlp"), 'reparam="direct"'),
    ):
        code, _, err = run(*given, *wrong, "--out", tmp_path / "wrong")
        assert code == 1 and message in err
        assert not (tmp_path / "wrong" / "foreword.json").exists()
