"""`foreword distill`: a document or a prefix becomes a short prefix, and how the command refuses."""

from __future__ import annotations

import json

import pytest
from calling import call
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword.cli import app

DOCUMENT = "\n\n".join(zoo.SENTENCES) + "\n\n"
SMALL = ["--length", "6", "--count", "4", "--passages", "6", "--chunk", "24", "--steps", "5", "--batch-size", "4",
         "--max-length", "64"]  # fmt: skip


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, "distill", *arguments)


@pytest.fixture(scope="session")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "film.txt"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture(scope="session")
def distilled(folder, document, tmp_path_factory):
    """A prefix that `foreword distill` made, and what it printed."""
    out = tmp_path_factory.mktemp("distilled") / "film"
    given = [
        "distill",
        "--model",
        folder,
        "--document",
        document,
        "--out",
        out,
        "--valid-share",
        "0.3",
        *SMALL,
        "--json",
    ]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_a_document_becomes_a_prefix(distilled, folder, capsys, monkeypatch):
    out, record = distilled
    prefix, tokenizer = fw.Prefix.load(out), zoo.tokenizer()
    tokens = len(tokenizer(DOCUMENT)["input_ids"])
    assert record["steps"] == 5 and record["text_tokens"] == tokens and record["loss"] > 0 and record["eval_loss"] > 0
    assert record["bytes"] == prefix.nbytes and record["replaced_bytes"] == prefix.nbytes * tokens // 6
    start = fw.Prefix.from_text(zoo.build("llama"), tokenizer, DOCUMENT, length=6)
    for site in prefix.keys:
        assert (prefix.keys[site][:, 0] == start.keys[site][:, 0]).all()
    rows = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert len(rows) >= 4 and all(r["question"] and r["answer"] for r in rows)
    code, printed, err = call(
        capsys, monkeypatch, "generate", "--model", folder, "--prefix", out, "--prompt", "The film", "--json"
    )
    assert code == 0, err
    assert json.loads(printed)[0]["texts"]
    code, printed, _ = call(capsys, monkeypatch, "inspect", out)
    assert code == 0 and "6" in printed


def test_what_people_read(distilled, run, folder, document, tmp_path):
    code, printed, err = run("--model", folder, "--document", document, "--out", tmp_path / "out", *SMALL)
    assert code == 0, err
    assert "nats from the teacher" in printed and "bytes instead of the text's" in printed
    assert "questions" in err and "teacher, train" in err and "data: 10 examples" in err


def test_going_on(distilled, run, folder, document):
    out, _ = distilled
    given = ["--model", folder, "--document", document, "--out", out, "--valid-share", "0.3", *SMALL, "--json"]
    code, _, err = run(*given)
    assert code == 1 and "holds a prefix already" in err
    code, printed, err = run(*given, "--resume", "--steps", "7")
    assert code == 0, err
    assert json.loads(printed)["steps"] == 7
    code, _, err = run(*given, "--resume", "--top", "3")
    assert code == 1 and "another top" in err


def test_own_questions(run, folder, document, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(
        '{"question": "What is the film?", "answer": "A lovely old one."}\n{"question": "Where is the place?"}\n'
    )
    code, _, err = run(
        "--model", folder, "--document", document, "--out", tmp_path / "out", "--questions", mine, *SMALL
    )
    assert code == 0, err
    written = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert [r["question"] for r in written] == ["Where is the place?"] and "data: 2 examples" in err


def test_a_prefix_as_teacher(run, folder, data, distilled, tmp_path):
    out, _ = distilled
    given = [
        "--model",
        folder,
        "--teacher-prefix",
        out,
        "--data",
        data,
        "--length",
        "3",
        "--init",
        "The film is good",
        "--steps",
        "2",
    ]
    code, printed, err = run(*given, "--out", tmp_path / "short", "--json")
    assert code == 0, err
    assert json.loads(printed)["text_tokens"] is None and fw.Prefix.load(tmp_path / "short").longest == 3
    code, printed, err = run(*given, "--out", tmp_path / "further", "--start", tmp_path / "short")
    assert code == 0 and "bytes instead of" in printed


REFUSED = {
    "no teacher": ([], "--document FILE, or --teacher-prefix DIR"),
    "two teachers": (["--document", "DOC", "--teacher-prefix", "OUT", "--data", "DATA"], "give one of the two"),
    "a prefix without data": (["--teacher-prefix", "OUT"], "go together"),
    "a missing document": (["--document", "nowhere.txt"], r"nowhere\.txt"),
    "an empty document": (["--document", "EMPTY"], "is empty; expected a text"),
    "no text": (["--document", "BINARY"], "expected a UTF-8 text file"),
    "too short a document": (["--document", "DOC", "--length", "400"], "the document has .* tokens and the prefix 400"),
    "too long a document": (["--document", "LONG"], "reads 128 at most"),
    "nothing to learn from": (["--document", "DOC", "--count", "0", "--passages", "0"], "leaves nothing to learn from"),
    "an unknown kind": (["--document", "DOC", "--kinds", "riddle"], "expected some of question"),
    "top too large": (["--document", "DOC", "--top", "129"], "top=129"),
    "nothing to go on with": (["--document", "DOC", "--resume"], "leave --resume out"),
    "a rate below zero": (["--document", "DOC", "--learning-rate", "-1"], "above 0"),
}


@pytest.mark.parametrize("given, said", REFUSED.values(), ids=REFUSED)
def test_refused_before_any_question_is_made(
    given, said, run, folder, document, data, distilled, tmp_path, monkeypatch
):
    monkeypatch.setattr("foreword.train.self_study.write", lambda *_, **__: pytest.fail("the model was asked"))
    files = {"DOC": document, "DATA": data, "OUT": distilled[0]}
    for name, content in (("EMPTY", b" \n"), ("BINARY", b"\xff\xfe\x00"), ("LONG", (DOCUMENT * 9).encode())):
        files[name] = tmp_path / name
        files[name].write_bytes(content)
    small = [] if "--length" in given else ["--length", "6"]
    code, _, err = run(
        "--model", folder, "--out", tmp_path / "out", "--max-length", "40", *small, *(files.get(g, g) for g in given)
    )
    import re

    assert code == 1 and re.search(said, err.replace("\n", " ")), err
    assert not (tmp_path / "out").exists() and "Traceback" not in err


def test_own_questions_as_whole_examples(run, folder, document, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"input": "What is the film?", "output": " A lovely old one."}\n')
    code, _, err = run(
        "--model", folder, "--document", document, "--out", tmp_path / "out", "--questions", mine, *SMALL
    )
    assert code == 0 and "data: 1 example," in err, err
