"""vLLM's answers as a task's: under its name, and without the placeholders in what is counted and given back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from foreword.serve.vllm.tasks import Task


@dataclass(frozen=True, slots=True)
class Renamer:
    """Of one request.

    Args:
        place: the placeholder's text.
        prompts: how many the request has.
    """

    task: Task
    place: str
    prompts: int = 1

    def answer(self, body: Any, *, event: bool = False) -> Any:
        """An answer, or one event of a stream, changed in place."""
        if not isinstance(body, dict) or "error" in body:
            return body
        if "model" in body:
            body["model"] = self.task.name
        if isinstance(usage := body.get("usage"), dict):
            # An event with an answer's piece counts that answer's prompt, anything else all of them.
            self._count(usage, 1 if event and body.get("choices") else self.prompts)
        for part in (body, *body.get("choices", ())):
            self._cut(part)
        return body

    def _count(self, usage: dict[str, Any], prompts: int) -> None:
        """Placeholders are no tokens of a text."""
        details = usage.get("prompt_tokens_details") or {}
        for where, key in ((usage, "prompt_tokens"), (usage, "total_tokens"), (details, "cached_tokens")):
            if isinstance(where.get(key), int):
                where[key] = max(where[key] - prompts * self.task.length, 0)

    def _cut(self, part: Any) -> None:
        """Take the placeholders out of what is told of a prompt."""
        if not isinstance(part, dict):
            return
        if isinstance(ids := part.get("prompt_token_ids"), list):
            part["prompt_token_ids"] = ids[self.task.length :]
        if isinstance(scores := part.get("prompt_logprobs"), list):
            # The first token follows a placeholder, whose own scores mean nothing: none, as for a text's first token.
            part["prompt_logprobs"] = [None, *scores[self.task.length + 1 :]]
        if isinstance(text := part.get("prompt_text"), str):
            part["prompt_text"] = text.removeprefix(self.place * self.task.length)


class Events:
    """A stream of server-sent events, changed event by event however it was cut into pieces."""

    def __init__(self, renamer: Renamer) -> None:
        self._renamer, self._rest = renamer, b""

    def feed(self, piece: bytes, *, last: bool = False) -> bytes:
        """What can be sent on after a piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if last:
            lines, self._rest = [*lines, self._rest], b""
            return b"\n".join(self._changed(lines))
        return b"".join(line + b"\n" for line in self._changed(lines))

    def _changed(self, lines: list[bytes]) -> Iterator[bytes]:
        for line in lines:
            if not line.startswith(b"data: {"):
                yield line
                continue
            try:
                event = json.loads(line[6:])
            except ValueError:
                yield line
                continue
            yield b"data: " + json.dumps(self._renamer.answer(event, event=True), ensure_ascii=False).encode()
