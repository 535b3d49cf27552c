"""From a record and its layout to examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import DataError
from ._example import Example
from ._say import mapped, option
from .layouts import Layout
from .messages import (
    Message,
    conversation,
    is_conversation,
    is_learned,
    said,
    shown,
    text,
    tools_of,
    with_system,
)

# The prompt that Stanford Alpaca's data were made for, as alpaca-lora, axolotl and others have written it since: with
# a line end after "Response:", so that the answer's first token is one that begins a line.
_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = f"{_TASK}, paired with an input that provides further context."
_ASKED = "Write a response that appropriately completes the request."


def alpaca(instruction: str, given: str = "", system: str = "") -> str:
    """Alpaca's prompt; a system prompt takes the place of its first sentences."""
    has_input = bool(given.strip())
    opening = system if system.strip() else f"{_WITH_INPUT if has_input else f'{_TASK}.'} {_ASKED}"
    middle = f"### Input:\n{given}\n\n" if has_input else ""
    return f"{opening}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def used(layout: Layout, record: Mapping[str, Any], chat: bool) -> set[str]:
    """The columns that :func:`examples` makes something of."""
    names = set(layout.columns)
    talks = chat or is_chat(layout, record)
    if not talks:
        names -= {"tools"} if "instruction" in names else {"tools", "system"}
    if "text" in names:
        names -= {"tools", "system"}
    more = {"chat_template_kwargs"} if talks else set()
    if chat and not is_chat(layout, record) and "text" not in names:
        more |= {"history"}
    return {layout.columns[name] for name in names} | more


def examples(
    place: str, record: Mapping[str, Any], layout: Layout, columns: Mapping[str, str], chat: bool
) -> Iterator[Example]:
    """The examples of a record.

    Args:
        columns: the mapping that was given, for messages.
        chat: inputs and outputs become conversations.

    Raises:
        DataError: A value is not of the form that its layout has.
    """
    for name in ("system", "tools"):
        if name in columns and layout.columns.get(name) not in used(layout, record, chat):
            raise DataError(
                f"{place}: {mapped({name: columns[name]})} is for conversations"
                f"{' and instructions' if name == 'system' else ''}, and this record is neither. Make conversations of "
                f"inputs and outputs with {option('chat', True)}."
            )
    if "text" in layout.columns:
        found = text(place, "text", layout.value(record, "text"), blank=False)
        yield Example("", found, place, layout="text")
    elif "messages" in layout.columns:
        name = layout.columns["messages"]
        messages = conversation(place, "messages" if "messages" in columns else name, layout.value(record, "messages"))
        yield _chat(place, record, layout, messages, 0)
    elif is_chat(layout, record):
        yield _continued(place, record, layout)
    else:
        yield from _pairs(place, record, layout, chat)


def is_chat(layout: Layout, record: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation: messages, or a prompt or completion that is a list of them."""
    if "messages" in layout.columns:
        return True
    values = [layout.value(record, name) for name in ("input", "output")]
    return "instruction" not in layout.columns and any(is_conversation(value) for value in values)


# --- texts ------------------------------------------------------------------------------------------------


def _pairs(place: str, record: Mapping[str, Any], layout: Layout, chat: bool) -> Iterator[Example]:
    given = layout.value(record, "input")
    if "instruction" in layout.columns:
        instruction = text(place, layout.columns["instruction"], layout.value(record, "instruction"), blank=False)
        given = "" if given is None else text(place, layout.columns["input"], given, blank=True)
        asked = f"{instruction}\n{given}" if given.strip() else instruction
        prompt, kind = alpaca(instruction, given, _system(place, record, layout)), "alpaca"
    else:
        asked = prompt = text(place, _name(layout, "input"), given, blank=True)
        kind = "pair"
    for answer in _answers(place, record, layout):
        if chat:
            if not asked.strip():
                raise DataError(f"{place}: the input is blank, and a conversation needs a question.")
            turns = [*_history(place, record.get("history")), (asked, answer)]
            messages = tuple(
                {"role": role, "content": said}
                for turn in turns
                for role, said in zip(("user", "assistant"), turn, strict=True)
            )
            yield _chat(place, record, layout, messages, 0)
        else:
            yield Example(prompt, answer, place, layout=kind)


def _history(place: str, value: object) -> Iterator[tuple[str, str]]:
    """LLaMA-Factory's earlier turns: pairs of what was asked and answered."""
    if value is None or value == "":
        return
    if not isinstance(value, list | tuple) or any(not isinstance(t, list | tuple) or len(t) != 2 for t in value):
        raise DataError(f"{place}: 'history' must be a list of [question, answer], not {shown(value)}.")
    for index, (asked, answer) in enumerate(value):
        yield (
            text(place, f"history[{index}][0]", asked, blank=True),
            text(place, f"history[{index}][1]", answer, blank=True),
        )


def _answers(place: str, record: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    if "output" in layout.columns:
        yield text(place, _name(layout, "output"), layout.value(record, "output"), blank=False)
        return
    references = layout.value(record, "references")
    if not isinstance(references, list | tuple) or not references:
        raise DataError(f"{place}: 'references' must be a list with at least one string, not {shown(references)}.")
    for index, reference in enumerate(references):
        yield text(place, f"references[{index}]", reference, blank=False)


def _name(layout: Layout, name: str) -> str:
    return name if layout.own else layout.columns[name]


def _system(place: str, record: Mapping[str, Any], layout: Layout) -> str:
    value = layout.value(record, "system")
    return "" if value is None else text(place, layout.columns["system"], value, blank=True)


# --- conversations ----------------------------------------------------------------------------------------


def _continued(place: str, record: Mapping[str, Any], layout: Layout) -> Example:
    """TRL's conversational prompt and completion: only the completion is learned."""
    parts = []
    for name, role in (("input", "user"), ("output", "assistant")):
        value, column = layout.value(record, name), layout.columns[name]
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        parts.append(conversation(place, column, value))
    prompt, completion = parts
    system = _system(place, record, layout)
    shift = len(with_system(place, prompt, system)) - len(prompt)
    return _chat(place, record, layout, prompt + completion, len(prompt) + shift)


def _chat(
    place: str, record: Mapping[str, Any], layout: Layout, messages: tuple[Message, ...], learned_from: int
) -> Example:
    messages = with_system(place, messages, _system(place, record, layout))
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: the last of the messages must be the assistant's, because that is what is learned; it "
            f"is the {messages[-1]['role']}'s."
        )
    if len(messages) < 2:
        raise DataError(f"{place}: 'messages' holds only the answer; at least one message must come before it.")
    if "tool_calls" not in messages[-1]:
        text(place, f"messages[{len(messages) - 1}].content", messages[-1].get("content"), blank=False)
    if not any(is_learned(message) for message in messages[max(1, learned_from) :]):
        raise DataError(f"{place}: every answer has a weight of 0, so there is nothing to learn. Remove the record.")
    options = record.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise DataError(f"{place}: 'chat_template_kwargs' must be an object, not {shown(options)}.")
    tools = tools_of(place, layout.value(record, "tools"))
    before = "\n".join(said(message) for message in messages[:-1])
    return Example(
        before, said(messages[-1]), place, messages, tools=tools, template=options or None, learned_from=learned_from,
        layout="chat",
    )  # fmt: skip
