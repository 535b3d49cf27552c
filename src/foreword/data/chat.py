"""Where a conversation's answers stand in what the chat template writes of it, to the character.

The template's own ``{% generation %}`` marks say it, where it has them. Otherwise an answer begins where the prompt for
it ends: the template's rendering of what comes before, with the opening of an answer, must be how the whole begins; and
it ends where the rendering up to it ends. Templates of reasoning models write an answer in another way while it is the
last (with its reasoning) than later on. Then the answer is what both have: the longest end of the first that stands in
the whole where the answer begins. What can't be proved is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ..errors import DataError
from ._example import Example
from ._say import option
from .messages import is_learned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "last"]
Span = tuple[int, int]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = "</think>"  # ends the reasoning in an answer's content


@dataclass(frozen=True, slots=True)
class Answers:
    """A rendered conversation.

    Attributes:
        text: All that the model reads, up to the end of the last answer that is learned.
        spans: The answers in it, first and last character, each with the template's own end of a turn; the last span
            ends the text.
        ended: Whether the template has ended the last answer.
        skipped: How many answers are not learned, because nothing comes before them or they are blank.
        unwritten: How many answers have reasoning that the template does not write once more follows.
    """

    text: str
    spans: tuple[Span, ...]
    ended: bool
    skipped: int
    unwritten: int


def answers(example: Example, tokenizer: PreTrainedTokenizerBase, turns: Turns = "all") -> Answers:
    """Render an example's conversation and find its answers.

    Raises:
        DataError: There is no chat template, it refuses the conversation, or an answer can't be told from the rest.
    """
    assert example.messages is not None
    messages = example.messages
    theirs = [i for i, m in enumerate(messages) if i >= example.learned_from and m["role"] == "assistant"]
    learned = [i for i in theirs if i > 0 and is_learned(messages[i])]
    skipped = sum(messages[i].get("weight", 1) != 0 for i in theirs) - len(learned)
    if turns == "last":
        learned, skipped = learned[-1:], 0
    if not learned:
        raise DataError(f"{example.source}: no answer has anything before it, so there is nothing to learn.")
    chat = Chat(example.source, tokenizer, messages[: learned[-1] + 1], example.tools, example.template)
    finder = _Finder(chat)
    if chat.marked:
        spans = _by_marks(chat, learned)
    else:
        finder.span(learned[-1])  # what is wrong with the last answer can't be helped by leaving out others
        if not _asked(messages, learned[0]) and len(learned) > 1 and not finder.can(learned[0]):
            learned, skipped = learned[1:], skipped + 1  # a greeting that the template has no prompt for
        spans = [finder.span(i) for i in learned]
        spans = [(start, start + len(chat.whole[start:end].rstrip())) for start, end in spans]
    text = chat.whole[: spans[-1][1]]
    last = chat.whole[spans[-1][0] :]
    return Answers(text, tuple(spans), _has_end(chat, last, learned[-1]), skipped, finder.unwritten)


def _asked(messages: Sequence[Mapping[str, Any]], index: int) -> bool:
    return any(m["role"] not in ("system", "developer") for m in messages[:index])


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
                f"{source}: the example is a conversation, but the tokenizer has no chat template. Set "
                "tokenizer.chat_template, or give the data as input and output."
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
            self._known[count, generate] = self._rendered(self.messages[:count], generate)
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

    def _rendered(self, messages: list[dict[str, Any]], generate: bool) -> str:
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
                text = self._rendered(messages, generate=False)
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


# --- the answers ------------------------------------------------------------------------------------------


def _by_marks(chat: Chat, learned: Sequence[int]) -> list[Span]:
    """What the template marks, and the end of a turn where it stands just behind."""
    blocks = chat.blocks(len(chat.messages))
    if not blocks:
        raise DataError(f"{chat.source}: the chat template marks nothing of this conversation as the assistant's.")
    tail = chat.whole[blocks[-1][1] :].rstrip()
    blocks = [(start, end + len(tail) if chat.whole.startswith(tail, end) else end) for start, end in blocks]
    theirs = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    if list(learned) == theirs:
        return blocks
    spans: list[Span] = []
    for i in learned:
        first = len(chat.blocks(i)) if i else 0
        found = blocks[first : len(chat.blocks(i + 1))]
        if not found:
            raise DataError(f"{chat.source}: the chat template marks nothing of messages[{i}] as the assistant's.")
        spans += found
    return spans


class _Finder:
    """Finds answers by rendering the conversation up to them."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._last = len(chat.messages) - 1
        self._found: dict[int, Span] = {}
        self.unwritten = 0

    def can(self, index: int) -> bool:
        """Whether an answer can be found."""
        try:
            self.span(index)
        except DataError:
            return False
        return True

    def span(self, index: int) -> Span:
        """First and last character of answer ``index`` in the whole, with white space after it.

        Raises:
            DataError: It can't be told from the rest.
        """
        if index not in self._found:
            self._found[index] = self._find(index)
        return self._found[index]

    def _find(self, index: int) -> Span:
        chat, whole = self._chat, self._chat.whole
        prompt = chat.render(index, generate=True)
        alone = whole if index == self._last else chat.render(index + 1, generate=False)
        answer = alone[len(prompt) :]
        if not alone.startswith(prompt) or not answer.strip():
            self._refuse(
                index,
                "with the answer, the chat template does not simply continue the prompt, so the answer cannot be told "
                "apart from it",
            )
        self._check(index, answer)
        if whole.startswith(alone):
            return len(prompt), len(alone)
        found = self._elsewhere(index, prompt, alone)
        if found is None:
            self._refuse(index, "the chat template writes this answer in another way once more follows it")
        return found

    def _elsewhere(self, index: int, prompt: str, alone: str) -> Span | None:
        """An answer in a whole that does not begin as the rendering up to the answer does.

        What comes before it is placed first, so that nothing else can be taken for it: then the opening of an answer
        follows, and of opening and answer the template may leave out the reasoning.
        """
        whole, history = self._chat.whole, self._chat.render(index, generate=False)
        at = self._end_of(index, history)
        if at is None or not prompt.startswith(history):
            return None
        written, opening = alone[len(history) :], len(prompt) - len(history)
        same = next((i for i, (a, b) in enumerate(zip(whole[at:], written, strict=False)) if a != b), len(written))
        if same == len(written):
            return at + opening, at + len(written)
        start, message = at + min(same, opening), self._chat.messages[index]
        for cut in range(opening + (same >= opening), len(written)):
            if whole.startswith(written[cut : cut + 32], start) and whole.startswith(kept := written[cut:], start):
                if not _is_said(_visible(message), message, kept):
                    return None
                self.unwritten += bool(_reasoning(message))
                return start, start + len(kept)
        return None

    def _end_of(self, index: int, history: str) -> int | None:
        """Where in the whole the messages before ``index`` end: as its beginning, or behind the answer before."""
        whole = self._chat.whole
        if whole.startswith(history):
            return len(history)
        before = [i for i, m in enumerate(self._chat.messages[:index]) if m["role"] == "assistant"]
        if not before or not self.can(before[-1]):
            return None
        reached = self._chat.render(before[-1] + 1, generate=False)
        between, at = history[len(reached) :], self.span(before[-1])[1]
        placed = history.startswith(reached) and whole.startswith(between, at)
        return at + len(between) if placed else None

    def _check(self, index: int, answer: str) -> None:
        """Refuse an answer of which the template leaves something out."""
        message = self._chat.messages[index]
        content = message.get("content") or ""
        if _is_said(content, message, answer) and _squeezed(_reasoning(message)) in _squeezed(answer):
            return
        if not _is_said(_visible(message), {}, answer):
            self._refuse(
                index,
                "with the answer, the chat template does not simply continue the prompt: what it writes is not the "
                "message's content, so the answer cannot be told apart from it",
            )
        if not _is_said(_visible(message), message, answer):
            self._refuse(index, "the chat template leaves out the tool calls")
        self._refuse(index, "the chat template leaves out the reasoning")

    def _refuse(self, index: int, reason: str) -> NoReturn:
        last = index == self._last
        advice = "Use another template, or give the data as input and output" if last else (
            f"Learn the last answers only with {option('turns', 'last')}, or use another template"
        )  # fmt: skip
        where = "" if last else f"messages[{index}]: "
        raise DataError(f"{self._chat.source}: {where}{reason}. {advice}.")


def _visible(message: Mapping[str, Any]) -> str:
    """An answer's content without the reasoning before it."""
    return str(message.get("content") or "").rpartition(_THOUGHT)[2]


def _reasoning(message: Mapping[str, Any]) -> str:
    """The reasoning before an answer: in a field of its own, or in the content."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(value := message.get(name), str) and value.strip():
            return value
    return str(message.get("content") or "").rpartition(_THOUGHT)[0].rpartition("<think>")[2].strip()


def _is_said(content: str, message: Mapping[str, Any], written: str) -> bool:
    """Whether a text has the content, white space apart, and the names of the tools that are called."""
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return _squeezed(content) in _squeezed(written) and all(name in written for name in names)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _has_end(chat: Chat, answer: str, index: int) -> bool:
    """Whether the template writes something after an answer that ends it."""
    message = chat.messages[index]
    said = _visible(message).strip()
    at = answer.find(said, answer.rfind(_THOUGHT) + 1) if said and not message.get("tool_calls") else -1
    if at >= 0:
        return bool(answer[at + len(said) :].strip())
    tokenizer = chat.tokenizer
    ids = tokenizer(answer.rstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    last = ids[-1] if ids else None
    return last in tokenizer.all_special_ids or bool(getattr(added.get(last), "special", False))
