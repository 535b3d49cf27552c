"""What a record becomes: one thing to learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: after ``input``, write ``output``.

    Attributes:
        input: The prompt. Empty when the example is plain text.
        output: The text that the loss is computed on; of a conversation, the last answer (its tool calls as JSON
            where it says nothing else).
        source: Where it was read, "file:line" or "dataset[index]". Error messages quote it.
        messages: The whole conversation, when the record was one. It goes through the tokenizer's chat
            template; ``input`` then holds the earlier contents, one per line, for people to read.
        tools: The tools that the chat template is given.
        template: More that it is given: the record's ``chat_template_kwargs``.
        learned_from: Answers are learned from this message on: the first of the completion, where a record has a
            prompt and a completion that are conversations.
        layout: "text", "pair", "alpaca" or "chat"; empty where the example was not read from a record.
    """

    input: str
    output: str
    source: str
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    template: Mapping[str, Any] | None = None
    learned_from: int = 0
    layout: str = field(default="", compare=False)


class Conversation(tuple[Mapping[str, Any], ...]):
    """Messages that are to be answered, with the tools and options that the chat template is given."""

    tools: tuple[dict[str, Any], ...] | None
    template: Mapping[str, Any] | None

    def __new__(
        cls,
        messages: Iterable[Mapping[str, Any]],
        tools: tuple[dict[str, Any], ...] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Conversation:
        made = super().__new__(cls, messages)
        made.tools, made.template = tools, template
        return made
