"""Conversations: which answers are learned, to the token, under templates of every kind."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from foreword.data import encode, read_examples
from foreword.data.encode import prompt_ids
from foreword.data.examples import Conversation
from foreword.data.messages import ROLES
from foreword.errors import DataError

Tokenizer = PreTrainedTokenizerFast
START, END = "<|im_start|>", "<|im_end|>"
OPEN = START + "assistant\n"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: reasoning is written after the last user's message only, in the template's own white space.
REASONS = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'assistant' %}{%- set r = '' %}"
    "{%- if m.reasoning_content is string %}{%- set r = m.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set r = content.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or r) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + r.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' ~ c.function.name ~ ':' ~ (c.function.arguments | tojson) ~ '</call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As Qwen3-Thinking's: the prompt opens the reasoning, which earlier answers are written without.
OPENS = REASONS.replace("(loop.last or r)", "loop.last").replace(
    "add_generation_prompt %}{{- '<|im_start|>assistant\n'",
    "add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n'",
)
# As DeepSeek-R1's: the prompt opens the reasoning, which no answer is written with.
DROPS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
# As GLM-4.6's: earlier answers are written with empty reasoning; nothing ends a turn but the next one's beginning.
EMPTIES = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_end|>\n{{ m.content }}{% else %}<|im_start|>"
    "{% set c = m.content.split('</think>')[-1] %}{% set r = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{{ '\n<think>' ~ (r if loop.index0 > ns.last and '</think>' in m.content else '') ~ '</think>\n' ~ c.strip() }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
# As Mistral's: tools stand before the last question.
MOVES = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}[{{ tools | tojson }}]{% endif %}"
    "<|im_start|>{{ m.content }}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CONTENT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# The end of a turn belongs to the last answer alone, in another form than before.
RETURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<eos>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calling(name: str, arguments: Any) -> dict[str, Any]:
    return answer(None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


TWO = [user("Hi"), answer("Hello"), user("And?"), answer("Yes.")]


def templated(tokenizer: Tokenizer, template: str) -> Tokenizer:
    changed = Tokenizer(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=[START, END],
    )  # fmt: skip
    changed.chat_template = template
    return changed


def encoded(
    tokenizer: Tokenizer, record: list[dict[str, Any]] | dict[str, Any], max_length: int = 9999, **options: Any
) -> Any:
    row = record if isinstance(record, dict) else {"messages": record}
    return encode(read_examples([row]), tokenizer, max_length=max_length, **options)


def learned(tokenizer: Tokenizer, record: list[dict[str, Any]] | dict[str, Any], **options: Any) -> list[str]:
    """The supervised stretches as texts."""
    item = encoded(tokenizer, record, **options)[0]
    pairs = list(zip(item["input_ids"], item["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    runs = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([token for token, _ in run]) for supervised, run in runs if supervised]


def test_all_answers_the_last_or_those_with_a_weight(chat: Tokenizer) -> None:
    assert learned(chat, TWO) == ["Hello<|im_end|>", "Yes.<|im_end|>"]
    assert learned(chat, TWO, turns="last") == ["Yes.<|im_end|>"]
    assert learned(chat, [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]) == ["d<|im_end|>"]
    assert learned(chat, [user("a"), answer("b"), user("c"), answer("d", weight=0)]) == ["b<|im_end|>"]
    assert learned(chat, {"prompt": TWO[:3], "completion": TWO[3:]}) == ["Yes.<|im_end|>"]
    with pytest.raises(DataError, match="turns='first'"):
        encoded(chat, TWO, turns="first")


def test_answers_with_nothing_before_them_or_in_them_are_not_learned(chat: Tokenizer) -> None:
    for messages in ([answer("Welcome."), *TWO], [user("a"), answer(" "), *TWO]):
        with pytest.warns(UserWarning, match="answers that are not learned: blank ones, or with nothing before them"):
            assert learned(chat, messages) == ["Hello<|im_end|>", "Yes.<|im_end|>"]
    strict = templated(
        chat,
        "{% if messages | length == 1 and messages[0].role == 'system' %}{{ raise_exception('no query') }}{% endif %}"
        + CHATML,
    )
    with pytest.warns(UserWarning, match="nothing before them"):
        assert learned(strict, [{"role": "system", "content": "s"}, answer("Welcome."), *TWO])[0] == "Hello<|im_end|>"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=2, max_size=7), st.booleans())
def test_any_conversation_learns_its_answers_as_the_template_writes_them(
    chat: Tokenizer, contents: list[str], marked: bool
) -> None:
    contents = [c if c.strip() else "x" for c in contents[: len(contents) // 2 * 2]]
    messages = [answer(c) if i % 2 else user(c) for i, c in enumerate(contents)]
    tokenizer = templated(chat, MARKED) if marked else chat
    item = encoded(tokenizer, messages)[0]
    assert learned(tokenizer, messages) == [
        tokenizer.decode(tokenizer(f"{c}{END}")["input_ids"]) for c in contents[1::2]
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert tokenizer.decode(item["input_ids"]) == tokenizer.decode(tokenizer(whole)["input_ids"])


def test_the_templates_own_marks(chat: Tokenizer) -> None:
    tokenizer = templated(chat, MARKED)
    item = encoded(tokenizer, TWO)[0]
    own = tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True)
    size = len(item["input_ids"])
    assert item["input_ids"] == own["input_ids"][:size]
    assert [int(label != -100) for label in item["labels"]] == own["assistant_masks"][:size]
    assert sum(own["assistant_masks"][size:]) == 0
    assert learned(tokenizer, TWO, turns="last") == ["Yes.<|im_end|>"]
    assert learned(tokenizer, [user("a"), answer("b", weight=0), user("c"), answer("d")]) == ["d<|im_end|>"]
    # Where the marks leave out the end of a turn, it is learned nevertheless: a model has to stop.
    assert learned(templated(chat, MARKED_CONTENT), TWO) == ["Hello<|im_end|>", "Yes.<|im_end|>"]
    never = MARKED.replace("m.role == 'assistant' %}{% gen", "m.role == 'nobody' %}{% gen")
    with pytest.raises(DataError, match="marks nothing"):
        encoded(templated(chat, never), TWO)


def test_reasoning_templates(chat: Tokenizer) -> None:
    reasons = templated(chat, REASONS)
    assert learned(reasons, TWO) == ["Hello<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"]
    tight = [user("a"), answer("<think>why</think>b")]
    assert learned(reasons, tight) == ["<think>\nwhy\n</think>\n\nb<|im_end|>"]
    with pytest.warns(UserWarning, match="reasoning before the last answer, which the chat template leaves out"):
        assert learned(reasons, [*tight, *tight]) == ["b<|im_end|>", "<think>\nwhy\n</think>\n\nb<|im_end|>"]
    opens = templated(chat, OPENS)
    assert learned(opens, TWO) == ["Hello<|im_end|>", "\n</think>\n\nYes.<|im_end|>"]
    assert (
        learned(opens, [user("b"), answer("b"), user("b"), answer("b"), user("b"), answer("b")])[:2]
        == ["b<|im_end|>"] * 2
    )


def test_templates_that_write_earlier_answers_with_empty_reasoning(chat: Tokenizer) -> None:
    empties = templated(chat, EMPTIES)
    tight = [user("a"), answer("<think>why</think>b")]
    assert learned(empties, TWO) == ["\n<think></think>\nHello", "\n<think></think>\nYes.<eos>"]
    with pytest.warns(UserWarning, match="reasoning before the last answer"):
        assert learned(empties, [*tight, *tight]) == ["\n<think></think>\nb", "\n<think>why</think>\nb<eos>"]


def test_steps_with_tools(chat: Tokenizer) -> None:
    """The second answer of a turn, where the template has rewritten the first once the next question follows."""
    tokenizer = templated(chat, REASONS)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    step = {**calling("f", '{"a": "b"}'), "reasoning_content": "hm"}
    messages = [
        user("q"),
        step,
        {"role": "tool", "content": "3"},
        answer("It is 3."),
        user("more"),
        calling("f", {"a": 1}),
    ]
    with pytest.warns(UserWarning, match="reasoning before the last answer"):
        assert learned(tokenizer, {"messages": messages, "tools": tools}) == [
            '<call>f:{"a": "b"}</call><|im_end|>', "It is 3.<|im_end|>",
            '<think>\n\n</think>\n\n<call>f:{"a": 1}</call><|im_end|>',
        ]  # fmt: skip
    ids = encode(read_examples([{"messages": messages[:4], "tools": tools}]), tokenizer, max_length=9999)[0][
        "input_ids"
    ]
    assert tokenizer.decode(ids).startswith('<|im_start|>system\n{"type": "function"'), "tools reach the template"
    (prompt,) = prompt_ids([Conversation(messages[:3], tuple(tools))], tokenizer)
    assert ids[: len(prompt)] == prompt, "and the prompt of generation"
    with pytest.warns(UserWarning, match="tools that the chat template does not write"):
        encoded(chat, {"messages": TWO, "tools": tools})


@pytest.mark.parametrize("arguments", [{"k": "v"}, '{"k": "v"}', {}, "{}"])
@pytest.mark.parametrize(
    "written",
    ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}", "{{ '' + c.function.arguments }}",
     "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"],
)  # fmt: skip
@pytest.mark.parametrize("content", ["{{ m.content or '' }}", "{{ '' + m.content }}"])
def test_arguments_of_tools_in_the_form_that_the_template_reads(
    chat: Tokenizer, content: str, written: str, arguments: Any
) -> None:
    tokenizer = templated(
        chat,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "{% for c in m.tool_calls or [] %}f:" + written
        + "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )  # fmt: skip
    full = arguments in ({"k": "v"}, '{"k": "v"}')
    items = "k=v" if full else ""
    wanted = items if "items" in written else '{"k": "v"}' if full else "{}"
    assert learned(tokenizer, [user("q"), calling("f", arguments)]) == [f"f:{wanted}{END}"]


def test_what_cannot_be_proved_is_refused(chat: Tokenizer) -> None:
    cases = {
        DROPS: "does not simply continue the prompt.*Use another template",
        RETURNS: r"messages\[1\]: the chat template writes this answer in another way.*turns='last'",
        CHATML.replace("m['content'] }}", "m['content'] | upper }}"): "what it writes is not the message's content",
    }
    for template, words in cases.items():
        with pytest.raises(DataError, match=rf"list\[0\]: .*{words}"):
            encoded(templated(chat, template), TWO)
    assert learned(templated(chat, RETURNS), TWO, turns="last") == ["Yes.<eos>"]
    tools = [{"name": "f", "parameters": {}}]
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template writes what comes before this answer in"):
        encoded(templated(chat, MOVES), {"messages": TWO, "tools": tools})
    assert learned(templated(chat, MOVES), {"messages": TWO, "tools": tools}, turns="last") == ["Yes.<|im_end|>"]
    with pytest.raises(DataError, match="leaves out the tool calls"):
        encoded(chat, [user("q"), calling("f", {})])
    with pytest.raises(DataError, match="leaves out the reasoning"):
        encoded(chat, [user("q"), answer("a", reasoning_content="because")])


def test_an_answer_is_not_taken_for_what_others_say(chat: Tokenizer) -> None:
    """The answer's words stand earlier on, where the template has rewritten them: still only answers are learned."""
    marks_last = (  # the last user's message is written in another way than earlier ones
        "{% set n = namespace(u=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.u = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '/last ' if loop.index0 == n.u }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"messages\[1\]: .*in another way once more follows"):
        encoded(templated(chat, marks_last), [user("Yes."), answer("Yes."), user("Yes."), answer("Yes.")])


def test_cutting_counts_answers_that_are_lost(chat: Tokenizer) -> None:
    whole = encoded(chat, TWO)[0]
    size, first = len(whole["input_ids"]), next(i for i, label in enumerate(whole["labels"]) if label != -100)
    last = size - len(chat("Yes.<|im_end|>")["input_ids"])
    for most in range(2, size + 1):
        data = encoded(chat, TWO, max_length=most)
        ids, labels, cut = data[0]["input_ids"], data[0]["labels"], size - most
        stats = data.stats
        if most >= size - last:
            assert ids == whole["input_ids"][cut:]
            kept = 0 if cut and cut >= first else 1
            wanted = [-100 if i < last and not kept else label for i, label in enumerate(whole["labels"])][cut:]
            assert labels == [-100, *wanted[1:]]
            assert (stats.input_cut, stats.output_cut, stats.turns_cut) == (int(cut > 0), 0, 1 - kept)
        else:
            assert (ids, stats.output_cut, stats.turns_cut) == (whole["input_ids"][last : last + most], 1, 1)
        assert stats.supervised_tokens == len(labels) - labels.count(-100)
    assert "1 earlier answer cut" in encoded(chat, TWO, max_length=first).stats.describe()


def test_seq2seq_learns_the_last_answer_and_says_so(chat: Tokenizer) -> None:
    with pytest.warns(UserWarning, match="an encoder-decoder model learns the last one"):
        item = encoded(chat, TWO, seq2seq=True)[0]
    assert chat.decode(item["labels"]) == "Yes.<|im_end|>"
    assert chat.decode(item["input_ids"]).endswith(f"And?{END}\n{OPEN}")


def test_an_empty_input_still_supervises_the_first_token(plain: Tokenizer, with_bos: Tokenizer) -> None:
    record = {"input": "", "output": "The sea"}
    for tokenizer in (plain, with_bos):
        item = encoded(tokenizer, record)[0]
        ids = [*tokenizer("The sea", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert (item["input_ids"], item["labels"]) == ([tokenizer.bos_token_id, *ids], [-100, *ids])
    assert encoded(plain, {"text": "The sea"})[0]["labels"][0] == -100
    assert encoded(plain, {"text": "The sea"})[0]["input_ids"] == ids
    unopened = Tokenizer(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>")
    with pytest.warns(UserWarning, match="no BOS token, so the first token of their outputs is not learned"):
        assert encoded(unopened, record)[0]["input_ids"] == ids


def test_a_data_set_knows_what_its_examples_were(chat: Tokenizer) -> None:
    pair, alpaca = {"input": "a", "output": "b"}, {"instruction": "a", "output": "b"}
    talk = {"messages": TWO}
    for rows, form in (([pair], "text"), ([alpaca] * 2, "alpaca"), ([talk], "chat"), ([talk, pair], "mixed")):
        data = encode(read_examples(rows), chat, max_length=999)
        assert data.form == form == data.with_column("task", ["x"] * len(rows)).form


def test_roles_are_what_templates_know() -> None:
    assert {"system", "developer", "user", "assistant", "tool"} == ROLES
