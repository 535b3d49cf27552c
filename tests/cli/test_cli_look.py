"""`foreword look`: the page, the numbers, and what it refuses before any time is spent."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from calling import call
from looking_cli import baked_in

import foreword as fw
import zoo
from foreword.evaluate import inside

TEXTS = ("The film is a lovely old confection and the acting is good.", "There is a place in the city centre.")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(capsys, monkeypatch, "look", *arguments)


@pytest.fixture(scope="module")
def prefixes(folder, tmp_path_factory):
    """Two prefixes of the tiny model, as folders."""
    root = tmp_path_factory.mktemp("prefixes")
    return [baked_in(folder, root / name, length) for name, length in (("one", 3), ("two", 4))]


def test_it_makes_a_page_of_the_base_that_the_prefix_names(run, folder, prefixes, data, tmp_path, monkeypatch):
    code, out, err = run(prefixes[0], "--model", folder, "--data", data, "--against", prefixes[1], "--limit", 4)
    assert code == 0, err
    assert "look.html" in out and "4 texts" in out and "layers" in err  # the bars are on the other channel
    page = (tmp_path / "look.html").read_text()
    assert "Inside one" in page and "Beside two" in page and page.count("<img") == 11
    monkeypatch.chdir(folder.parent)
    assert fw.Prefix.load(prefixes[0]).fingerprint.base_model == folder.name


def test_json_has_the_numbers_of_the_library(run, folder, prefixes):
    code, out, err = run(prefixes[0], "--model", folder, "--text", TEXTS[0], "--text", TEXTS[1], "--json",
                         "--lengths", "4,8", "--strengths", "3", "--only", "share,dilution,layers")  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    model, tokenizer = fw.load_model(folder)
    prefix = fw.Prefix.load(prefixes[0])
    from foreword.data import Example

    batches = inside.batches_of(model, tokenizer, [Example("", t, "") for t in TEXTS])
    want = inside.look(model, prefix, tokenizer, batches, name="one", lengths=[4, 8], strengths=[3.0],
                       only=["share", "dilution", "layers"]).to_json()  # fmt: skip
    assert record == json.loads(json.dumps(want))
    assert record["dilution"]["lengths"] == [4, 8] and list(record["dilution"]["variants"]) == [
        "as trained",
        "strength 3",
    ]
    assert "not asked for" in record["norms"]["unavailable"]
    assert sorted(p.name for p in prefixes[0].iterdir()) == ["README.md", "foreword.json", "prefix.safetensors"]


def test_json_writes_a_page_only_where_it_is_named(run, folder, prefixes, tmp_path):
    given = (prefixes[0], "--model", folder, "--text", TEXTS[0], "--only", "norms", "--json")
    assert run(*given)[0] == 0 and not list(tmp_path.glob("*.html"))
    code, out, _ = run(*given, "--out", tmp_path / "mine.html")
    assert code == 0 and json.loads(out) and (tmp_path / "mine.html").exists()


@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "seq2seq-lm"), ("bert", "masked-lm"), ("gpt2", "causal-lm"), ("encoder", "encoder")]
)
def test_the_kind_of_base_is_read_off_the_prefix(run, data, tmp_path, name, kind):
    base = tmp_path / name
    (zoo.build("bert").bert if name == "encoder" else zoo.build(name)).save_pretrained(base)
    tokenizer = zoo.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(base)
    prefix = baked_in(base, tmp_path / "prefix", 3, kind)
    code, out, err = run(prefix, "--model", base, "--data", data, "--json")
    assert code == 0, err
    record = json.loads(out)
    missing = [n for n, part in record.items() if "unavailable" in part]
    assert missing == (["words", "layers"] if name == "encoder" else [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no text to look with"),
        (("--text", " "), "--text number 1 is empty"),
        (("--text", "a"), "tokens in all; expected 8 or more"),
        (("--text", TEXTS[0], "--lengths", "4,x"), "--lengths '4,x'"),
        (("--text", TEXTS[0], "--lengths", "4000"), "lengths=[4000]"),
        (("--text", TEXTS[0], "--strengths", "0"), "numbers above 0"),
        (("--text", TEXTS[0], "--only", "everything"), "no part 'everything'"),
        (("--text", TEXTS[0], "--out", "."), "is a folder"),
        (("--text", TEXTS[0], "--out", "no/where.html"), "no folder"),
        (("--text", TEXTS[0], "--against", "nothing"), "not a folder"),
        (("--data", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_refusals(run, folder, prefixes, arguments, said, tmp_path):
    code, out, err = run(prefixes[0], "--model", folder, *arguments)
    assert code == 1 and said in err and not out
    assert not list(tmp_path.glob("*.html"))


def test_folders_and_models_that_are_not_the_right_ones(run, folder, prefixes, tmp_path):
    code, _, err = run(folder, "--text", TEXTS[0])
    assert code == 1 and "holds no foreword.json" in err
    other = tmp_path / "other"
    zoo.build("llama", seed=5).save_pretrained(other)
    zoo.tokenizer().save_pretrained(other)
    given = (prefixes[0], "--model", other, "--text", TEXTS[0], "--only", "norms")
    code, _, err = run(*given)
    assert code == 1 and "other weights" in err and "force=True" in err
    assert run(*given, "--force")[0] == 0
    prefix = fw.Prefix.load(prefixes[0])
    for name, changed, said in (
        ("nameless", {"base_model": ""}, "give --model"),
        ("odd", {"base_model": "x", "model_class": "LlamaForSequenceClassification"}, "from the command line"),
    ):
        replace(prefix, fingerprint=replace(prefix.fingerprint, **changed)).save(tmp_path / name)
        code, _, err = run(tmp_path / name, "--text", TEXTS[0])
        assert code == 1 and said in err
