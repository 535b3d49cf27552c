"""From tokens to text as they come: whole characters only, and nothing that may turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what a tokenizer gives for bytes that are no whole character (yet)
_LONGEST_CHARACTER = 16  # tokens; whatever is still broken after them is given as it is
_LOOK_BACK = 32  # tokens decoded again with each new one, at most: a token's text can depend on those before it


class Text:
    """The text of an answer.

    What :meth:`add` and :meth:`end` return, put together, is ``tokenizer.decode(tokens, skip_special_tokens=True)`` up
    to the first stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._first = 0  # where the tokens begin that are decoded again
        self._given = ""  # the text of tokens[first:] that has been taken
        self._whole = (0, 0)  # the last two counts of tokens whose text was whole
        self._held = ""  # may be the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._tokens.append(token)
        text = self._decode(self._first)
        if text.endswith(_BROKEN) and len(self._tokens) - self._whole[1] < _LONGEST_CHARACTER:
            return ""
        new, self._given = text[len(self._given) :], text
        self._whole = (self._whole[1], len(self._tokens))
        if len(self._tokens) - self._first > _LOOK_BACK:
            self._first = self._whole[0]
            self._given = self._decode(self._first)
        return self._certain(new)

    def end(self) -> str:
        """What was held back; no token comes any more."""
        new = self._decode(self._first)[len(self._given) :]
        text = self._certain(new)
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _decode(self, first: int) -> str:
        return str(self._tokenizer.decode(self._tokens[first:], skip_special_tokens=True))

    def _certain(self, new: str) -> str:
        if not self._stops:
            return new
        text = self._held + new
        places = [i for s in self._stops if (i := text.find(s)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of a text that a stop text begins with."""
        most = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
