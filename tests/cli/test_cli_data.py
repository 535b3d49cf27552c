"""Options about data: several sources, layouts, what is not used, and conversations up to generating."""

from __future__ import annotations

import gzip
import io
import json
import sys

import pytest

import zoo
from foreword.prefix import Prefix

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tiny model whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("chatty")
    zoo.build("llama").save_pretrained(path)
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    tokenizer.chat_template = None  # the tokenizer is one for all tests
    return path


@pytest.fixture
def lines(tmp_path):
    def write(name, *records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    return write


def talk(*contents):
    return {
        "messages": [{"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)]
    }  # fmt: skip


def supervised(shown):
    """What stands in brackets in a shown batch, without the bars between tokens."""
    joined = "".join(line.replace("│", "") for line in shown.splitlines())
    return [part.partition("⟧")[0] for part in joined.split("⟦")[1:]]


def test_several_sources_are_joined(run, folder, lines, tmp_path, monkeypatch):
    one, two = lines("a.jsonl", {"text": " film"}), lines("b.jsonl", {"text": " acting"})
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": " place"}\n'))
    for sources in ((one, two, packed), (str(tmp_path / "?.jsonl"), packed)):
        options = [part for source in sources for part in ("--data", source)]
        code, _, err = run("train", "--model", folder, *options, "--show-batch")
        assert code == 0 and "3 examples" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(one.read_bytes())))
    code, _, err = run("train", "--model", folder, "--data", "-", "--data", two, "--show-batch")
    assert code == 0 and "2 examples" in err
    code, _, err = run("train", "--model", folder, "--data", "-", "--valid", "-", "--show-batch")
    assert code == 1 and "standard input can be read once" in err
    code, _, err = run("train", "--model", folder, "--data", one, "--data", one, "--show-batch")
    assert code == 1 and "given twice" in err


def test_unused_columns_and_refusals_name_options_of_the_command_line(run, folder, lines):
    record = {"input": "The film", "output": " is good.", "context": "important", "label": 1}
    command = ("train", "--model", folder, "--show-batch", "--data")
    code, _, err = run(*command, lines("a.jsonl", record))
    assert code == 0 and err.count("columns not used") == 1
    assert "data: columns not used: context, label (--where label=VALUE keeps rows by it; to use one: --column " in err
    code, _, err = run(*command, lines("a.jsonl", record), "--valid", lines("v.jsonl", record))
    assert code == 0 and err.count("columns not used") == 1
    assert "not used: context" in run(*command, lines("a.jsonl", record), "--where", "label=1")[2]
    code, _, err = run(*command, lines("b.jsonl", {"question": "The film?", "answer": " is good."}))
    assert code == 1 and "--column input=question --column output=answer, or --chat" in err and "columns=" not in err
    code, _, err = run(*command, lines("c.jsonl", {"prompt": "a", "completion": "b", "response": "c"}))
    assert "--column input=prompt --column output=completion or --column input=prompt --column output=response" in err
    code, _, err = run(*command, lines("d.jsonl", {"text": "x"}), "--split", "train")
    assert code == 1 and "--split train was given" in err
    code, _, err = run("eval", "--data", lines("e.jsonl", record), "--predictions", lines("p.txt"), "--metrics", "bleu")
    assert "columns not used: context (" in err, "a label is one that metrics use"


def test_instructions_and_empty_inputs(run, folder, lines):
    file = lines("a.jsonl", {"instruction": "Write a review", "input": "", "output": "The film is good."})
    code, out, _ = run("train", "--model", folder, "--data", file, "--show-batch")
    assert code == 0 and supervised(out) == ["The film is good.<eos>"]
    assert "instr" not in supervised(out)[0] and "r│e│v" in out.replace(" re│view", "r│e│view")
    file = lines("b.jsonl", {"input": "", "output": "The film is good."})
    _, out, _ = run("train", "--model", folder, "--data", file, "--show-batch")
    assert supervised(out) == ["The film is good.<eos>"]


def test_all_answers_or_the_last(run, chatty, lines):
    file = lines("a.jsonl", talk("film", "good", "acting", "plain"))
    command = ("train", "--model", chatty, "--data", file, "--show-batch")
    assert supervised(run(*command)[1]) == ["good<eos>", "plain<eos>"]
    assert supervised(run(*command, "--turns", "last")[1]) == ["plain<eos>"]
    pairs = lines("b.jsonl", {"input": "film", "output": "good"})
    assert supervised(run("train", "--model", chatty, "--data", pairs, "--show-batch", "--chat")[1]) == ["good<eos>"]


def test_a_prefix_remembers_conversations_and_generate_follows(run, chatty, lines, tmp_path):
    outs = {}
    for name, record in {"chat": talk("film", "good"), "alpaca": {"instruction": "film", "output": "good"}}.items():
        outs[name] = tmp_path / name
        code, _, err = run(
            "train", "--model", chatty, "--data", lines(f"{name}.jsonl", record), "--out", outs[name], "--steps", 2,
            "--length", 2, "--init", "random", "--batch-size", 1, "--max-length", 999,
        )  # fmt: skip
        assert code == 0, err
        assert Prefix.load(outs[name]).metadata["form"] == name
        assert ("chat template" in (outs[name] / "README.md").read_text()) == (name == "chat")

    def written(*options):
        code, out, err = run("generate", "--model", chatty, "--max-new-tokens", 6, "--json", *options)
        assert code == 0, err
        return json.loads(out)[0]["texts"], err

    asked = ("--prefix", outs["chat"], "--prompt", "film")
    texts, err = written(*asked)
    assert f"note: {outs['chat']} was trained on conversations" in err and "--no-chat" in err
    spelled = ("--prefix", outs["chat"], "--prompt", "<user>film<eos><assistant>", "--no-chat")
    assert (texts, "") == written(*spelled) == written(*asked, "--chat")
    assert written(*asked, "--no-chat")[1] == ""
    texts, err = written("--prefix", outs["alpaca"], "--prompt", "film")
    assert "trained on instructions" in err
    from foreword.data.shapes import alpaca

    assert texts == written("--prefix", outs["alpaca"], "--prompt", alpaca("film"), "--no-chat")[0]


def test_a_template_that_writes_bos_is_not_given_another(run, chatty, tmp_path, monkeypatch):
    """The prompt of generation is that of training, for tokenizers that open every text with BOS themselves."""
    from foreword.cli.generate import _ids

    class Opening:
        chat_template = "{{ bos_token }}x"
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, **_):
            one = lambda t: ([1] if add_special_tokens else []) + [ord(c) for c in t.replace("^", "\x01")]  # noqa: E731
            return {"input_ids": one(text) if isinstance(text, str) else [one(t) for t in text]}

        def apply_chat_template(self, messages, **_):
            return "^" + "".join(m["content"] for m in messages)

    assert _ids("chat", "ab", Opening(), False) == [1, 97, 98]
    assert _ids("text", "ab", Opening(), False) == [1, 97, 98]
