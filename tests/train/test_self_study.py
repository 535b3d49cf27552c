"""Questions about a text: parts of it, passages, what the model writes and how that goes on, a user's own file."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import foreword as fw
import zoo
from foreword.data import encode
from foreword.train import self_study as made
from foreword.train.questions import asked, chunks, context, examples_of, passages, read_questions
from foreword.train.self_study import KINDS, Writing, answer_questions, self_study

TEXT = "\n\n".join(zoo.SENTENCES)
QUIET = Console(file=io.StringIO())
HOW = Writing(rows=4, chunk=20, question=24, answer=6)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def study(model, path, count=6, text=TEXT, how=HOW, **more):
    return self_study(model, zoo.tokenizer(), text, path, count, how=how, console=QUIET, **more)


# ---------------------------------------------------------------- parts and passages

WORDS = st.sampled_from(["The", "film", "is", "a", "lovely", "old", "place"])
PARAGRAPHS = st.lists(st.lists(WORDS, min_size=1, max_size=30).map(" ".join), min_size=1, max_size=6)


@given(PARAGRAPHS, st.integers(1, 40))
def test_parts_are_the_text_in_order_and_short_enough(paragraphs, size):
    tokenizer, text = zoo.tokenizer(), "\n\n".join(paragraphs)
    found = chunks(tokenizer, text, size)
    assert " ".join(found).split() == text.split()
    for part in found:  # a single word is never cut
        assert len(tokenizer(part)["input_ids"]) <= size or len(part.split()) == 1
    whole = len(tokenizer(text)["input_ids"])
    assert len(chunks(tokenizer, text, whole + 8 * len(paragraphs))) == 1


@given(st.integers(14, 400), st.integers(1, 40), st.integers(0, 5))
def test_passages_go_on_as_the_text_does_and_cover_it(words, count, seed):
    text = " \n ".join(str(i) for i in range(words))
    rows = passages(text, count, words=(5, 9), seed=seed)
    assert len(rows) == count and passages(text, count, words=(5, 9), seed=seed) == rows
    firsts = []
    for row in rows:
        shown = re.search(r"“(.*)”", row["question"])[1].split()
        told = [int(x) for x in [*shown, *row["answer"].split()]]
        assert len(shown) == 5 and told == list(range(told[0], told[0] + len(told))) and 6 <= len(told) <= 14
        firsts.append(told[0])
    assert firsts == sorted(firsts)
    assert max(b - a for a, b in zip([0, *firsts], [*firsts, words], strict=True)) <= 2 * words / count + 15


def test_a_text_too_short_for_passages():
    with pytest.raises(fw.ConfigError, match="13 words at least, and the text has 4; leave them out"):
        passages("one two three four", 1)
    assert passages("one", 0) == []


# ---------------------------------------------------------------- what the model writes


def test_the_model_asks_and_answers(tmp_path):
    model, path = zoo.build("llama"), tmp_path / "out" / "questions.jsonl"
    state = torch.get_rng_state()
    rows = study(model, path, kinds=("question", "creative"))
    assert torch.equal(torch.get_rng_state(), state) and fw.tuning.tuning_of(model) is None
    assert len(rows) == 6 and {r["kind"] for r in rows} == {"question", "creative"}
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written[:6] == rows
    for row in written:
        assert len(row["question"].split()) >= 4 and row["answer"] and "\n" not in row["question"]
        assert any(row["question"].startswith(o) for o in KINDS[row["kind"]][1])
    assert len({made._key(r["question"]) for r in written}) == len(written)
    assert study(model, tmp_path / "again.jsonl", kinds=("question", "creative")) == rows
    other = replace(HOW, seed=1)
    assert study(model, tmp_path / "other.jsonl", kinds=("question", "creative"), how=other) != rows


def test_it_reads_the_part_that_it_asks_about(tmp_path, monkeypatch):
    """What it writes is what it would write after that part, in one sequence."""
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    seen = []
    write = made.write

    def watched(model, tokenizer, prompts, **options):
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        written = write(model, tokenizer, prompts, **options)
        seen.append((prompts, written))
        return written

    monkeypatch.setattr(made, "write", watched)
    parts = chunks(tokenizer, TEXT, HOW.chunk)
    rows = study(model, tmp_path / "q.jsonl", count=1)
    part = parts[rows[0]["chunk"]]
    prompts, written = seen[0]
    for prompt, text in zip(prompts, written, strict=True):
        alone = write(model, tokenizer, [context(part) + prompt], max_new_tokens=HOW.question, do_sample=False)
        assert alone[0] == text
    assert prompts[0].startswith("Questions about details of the text above, and answers:\n\nQuestion: ")


def test_writing_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    model = zoo.build("llama")
    whole = study(model, tmp_path / "whole.jsonl", count=14)
    path, left = tmp_path / "q.jsonl", [2]
    answers = made._answers

    def broken(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return answers(*args)

    monkeypatch.setattr(made, "_answers", broken)
    with pytest.raises(KeyboardInterrupt):
        study(model, path, count=14)
    assert fw.tuning.tuning_of(model) is None
    assert 0 < len(path.read_text().splitlines()) < 14
    with pytest.raises(fw.ConfigError, match="questions that were begun; pass --resume"):
        study(model, path, count=14)
    with pytest.raises(fw.ConfigError, match="another text"):
        study(model, path, count=14, text=TEXT + ".", resume=True)
    with pytest.raises(fw.ConfigError, match="another answer"):
        study(model, path, count=14, how=Writing(rows=4, chunk=20, question=24, answer=7), resume=True)
    left[0] = 99
    assert study(model, path, count=14, resume=True) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert study(model, path, count=16, resume=True)[:14] == whole  # and more of them
    path.write_text("{")
    with pytest.raises(fw.DataError, match="delete it to begin anew"):
        study(model, path, count=14, resume=True)


def test_a_model_that_writes_nothing_of_use(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "write", lambda model, tokenizer, prompts, **_: [" " for _ in prompts])
    with pytest.raises(fw.DataError, match=r"no usable question in .* batches; give questions of your own"):
        study(zoo.build("llama"), tmp_path / "q.jsonl")


@pytest.mark.parametrize("written, kept", [
    (" is the law?\nIt is", ["What is the law?"]),
    (" is", []),
    (" is the name? What else is there? ", ["What is the name?"]),
    (" makes the list long\nand more", ["What makes the list long"]),
    ("\n\nthe", []),
])  # fmt: skip
def test_a_question_is_one_line_of_some_words(written, kept):
    assert [q for q, _ in made._usable(["What" + written], ["question"], set())] == kept


def test_questions_that_differ_in_case_only_are_one():
    same = ["What is the law here?", "what is THE law here", "What is the law there?"]
    found = made._usable(same, ["question"] * 3, {made._key("What is the law THERE?")})
    assert found == [("What is the law here?", "question")]


def test_bad_wishes(tmp_path):
    model = zoo.build("llama")
    with pytest.raises(fw.ConfigError, match="no text to ask about"):
        study(model, tmp_path / "q", text=" ")
    with pytest.raises(fw.ConfigError, match=r"kinds=\['riddle'\]; expected some of question"):
        study(model, tmp_path / "q", kinds=("riddle",))
    with pytest.raises(fw.ConfigError, match="has no chat template; ask without"):
        study(model, tmp_path / "chat" / "q", chat=True)
    for name, value in (("rows", 0), ("chunk", 0), ("temperature", 0.0), ("top_p", 1.5)):
        with pytest.raises(fw.ConfigError, match=f"{name}={value}"):
            Writing(**{name: value})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a user's own


def test_given_questions_are_answered_with_all_of_the_text(tmp_path):
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    questions = [f"What is the film {i}?" for i in range(6)]
    rows = answer_questions(model, tokenizer, TEXT, questions, tmp_path / "q.jsonl", how=HOW, console=QUIET)
    assert [r["question"] for r in rows] == questions and all(r["answer"] for r in rows)
    again = answer_questions(
        model, tokenizer, TEXT, questions, tmp_path / "q.jsonl", how=HOW, resume=True, console=QUIET
    )
    assert again == rows and fw.tuning.tuning_of(model) is None


def test_a_file_of_questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Who?", "answer": "The actor."}\n{"question": "Where?"}\n')
    examples, rows = read_questions(path)
    assert not examples and rows == [
        {"question": "Who?", "answer": "The actor.", "kind": "given"},
        {"question": "Where?", "kind": "given"},
    ]
    path.write_text('{"input": "Who?", "output": " I."}\n')
    examples, rows = read_questions(path)
    assert not rows and (examples[0].input, examples[0].output) == ("Who?", " I.")
    for bad, said in (
        ('{"question": "Who?"}\n{"answer": "a"}\n', "'question' is None"),
        ('{"question": " "}\n', "'question' is ' '"),
        ('{"question": "Who?", "answer": 3}\n', "'answer' is 3"),
        ("", "mine"),
    ):
        path.write_text(bad)
        with pytest.raises(fw.DataError, match=said):
            read_questions(path)


@pytest.mark.parametrize("chat", [False, True])
def test_examples_end_where_the_question_as_asked_does(chat):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"question": "What is the film?", "answer": "It is a lovely old place."}]
    data = encode(examples_of(rows, tokenizer, chat=chat), tokenizer, max_length=200)
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    shown = [i for i, label in zip(ids, labels, strict=True) if label == -100]
    assert shown == tokenizer(asked(tokenizer, rows[0]["question"], chat))["input_ids"]
    assert "lovely old place" in tokenizer.decode([x for x in labels if x != -100])
