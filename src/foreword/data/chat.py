"""Where a conversation's answers stand in what the chat template writes of it, to the character.

The template's own ``{% generation %}`` marks say it, where it has them. Otherwise an answer begins where the prompt for
it ends: the template's rendering of what comes before, with the opening of an answer, must be how the whole begins; and
it ends where the rendering up to it ends. Templates of reasoning models write an answer in another way while it is the
last (with its reasoning) than later on. Then the answer is what both have: the longest end of the first that stands in
the whole where the answer begins. What can't be proved is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ..errors import DataError
from ._example import Example
from ._say import option
from .messages import is_learned
from .template import Chat, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "last"]
_REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message
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
        history = chat.render(index, generate=False)
        at = self._end_of(index, history)
        if at is None or not prompt.startswith(history):
            self._refuse(
                index, "the chat template writes what comes before this answer in another way once more follows"
            )
        found = self._elsewhere(index, at, len(prompt) - len(history), alone[len(history) :])
        if found is None:
            self._refuse(index, "the chat template writes this answer in another way once more follows it")
        return found

    def _elsewhere(self, index: int, at: int, opening: int, written: str) -> Span | None:
        """An answer in a whole that does not begin as the rendering up to the answer does.

        What comes before it is placed first, so that nothing else can be taken for it; of the opening of an answer and
        the answer, the template may leave out the reasoning.

        Args:
            at: where in the whole what comes before the answer ends.
            opening: characters of ``written`` that open an answer.
            written: what the template writes there while the answer is the last.
        """
        whole, message = self._chat.whole, self._chat.messages[index]
        if whole.startswith(written, at):
            return at + opening, at + len(written)
        if _reasoning(message) and whole.startswith(bare := self._without_reasoning(index), at) and len(bare) > opening:
            self.unwritten += 1
            return at + opening, at + len(bare)
        same = next(i for i, (a, b) in enumerate(zip(whole[at:], written, strict=False)) if a != b)
        start = at + min(same, opening)
        for cut in range(opening + (same >= opening), len(written)):
            if whole.startswith(written[cut : cut + 32], start) and whole.startswith(kept := written[cut:], start):
                if not _is_said(_visible(message), message, kept):
                    return None
                self.unwritten += bool(_reasoning(message))
                return start, start + len(kept)
        return None

    def _without_reasoning(self, index: int) -> str:
        """What the template writes for an answer and its opening, once the reasoning is taken out of the message."""
        chat = self._chat
        bare = {name: value for name, value in chat.messages[index].items() if name not in _REASONING}
        if "content" in bare:
            bare["content"] = _visible(bare).lstrip("\n")
        text = chat.rendered([*chat.messages[:index], bare], generate=False)
        return text.removeprefix(chat.render(index, generate=False))

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
    for name in _REASONING:
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
