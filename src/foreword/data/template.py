"""A conversation with the chat template that writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ._say import in_python

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """A conversation with the template that writes it."""

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{source}: the example is a conversation, but the tokenizer has no chat template. "
                f"{in_python('Set tokenizer.chat_template') or 'Use a model that has one'}, or give the data as input "
                "and output."
            )
        self.source, self.tokenizer = source, tokenizer
        self.tools: list[Any] | None = [dict(tool) for tool in tools] if tools else None
        self.options = dict(options or {})
        self.messages: list[dict[str, Any]] = [dict(m) for m in messages]
        self._known: dict[tuple[int, bool], str] = {}
        if any(m.get("tool_calls") for m in self.messages):
            self.messages = self._readable()

    @cached_property
    def whole(self) -> str:
        return self.render(len(self.messages), generate=False)

    @cached_property
    def marked(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return bool(_MARKS.search(self.template))

    @cached_property
    def template(self) -> str:
        return str(self.tokenizer.get_chat_template(None, self.tools))

    def render(self, count: int, *, generate: bool) -> str:
        """The first messages as text, with the opening of an answer or without.

        Raises:
            DataError: The template refuses them.
        """
        if (count, generate) not in self._known:
            self._known[count, generate] = self.rendered(self.messages[:count], generate)
        return self._known[count, generate]

    def blocks(self, count: int) -> list[Span]:
        """What the template marks as the assistant's in the first messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {**self.tokenizer.special_tokens_map, **self.options}
        try:
            render: Any = render_jinja_template
            texts, found = render(
                conversations=[self.messages[:count]], tools=self.tools, chat_template=self.template,
                return_assistant_tokens_mask=True, add_generation_prompt=False, **given,
            )  # fmt: skip
        except Exception as error:  # a template may raise anything
            raise DataError(f"{self.source}: the chat template refuses this conversation: {error}") from error
        if texts[0] != self.render(count, generate=False):
            raise DataError(
                f"{self.source}: the tokenizer writes this conversation in another way than its chat template does, so "
                "the marks of the template can't be trusted. Use a template without {% generation %}."
            )
        return [(start, end) for start, end in found[0] if end > start]

    def rendered(self, messages: list[dict[str, Any]], generate: bool) -> str:
        """Any messages as text.

        Raises:
            DataError: The template refuses them.
        """
        try:
            render: Any = self.tokenizer.apply_chat_template
            return str(
                render(messages, tools=self.tools, tokenize=False, add_generation_prompt=generate, **self.options)
            )
        except Exception as error:  # a template may raise anything, from its own complaints to type errors
            raise DataError(f"{self.source}: the chat template refuses this conversation: {error}") from error

    def _readable(self) -> list[dict[str, Any]]:
        """The messages with the form of tool calls that this template can write.

        Arguments may be an object or JSON, and content absent or empty. Templates that expect the other form of
        arguments raise, print Python's form of a dict, or quote JSON a second time.
        """
        error: DataError | None = None
        for messages in _variants(self.messages):
            try:
                text = self.rendered(messages, generate=False)
            except DataError as exc:
                error = error or exc
                continue
            if not any(wrong in text for wrong in _misread(messages)):
                return messages
        raise error or DataError(
            f"{self.source}: the chat template writes the arguments of tool calls neither as JSON nor one by one. Use "
            "another template."
        )


def _variants(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for arguments in (_as_object, _as_json):
        for fill in ({}, {"content": ""}):
            yield [
                {**fill, **m, "tool_calls": [_with_arguments(call, arguments) for call in m["tool_calls"]]}
                if m.get("tool_calls")
                else m
                for m in messages
            ]


def _with_arguments(call: Mapping[str, Any], form: Any) -> dict[str, Any]:
    inner = dict(call["function"])
    return {**call, "function": {**inner, "arguments": form(inner.get("arguments", {}))}}


def _as_object(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _misread(messages: list[dict[str, Any]]) -> Iterator[str]:
    """What stands in a text if the template misreads the arguments."""
    for call in (call for m in messages for call in m.get("tool_calls") or ()):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            yield json.dumps(arguments, ensure_ascii=False)
        elif repr(arguments) != json.dumps(arguments, ensure_ascii=False):
            yield repr(arguments)
