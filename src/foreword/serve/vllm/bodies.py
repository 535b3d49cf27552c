"""Requests for a task become requests for the base model: placeholders in front, the salt, and nothing that gets past.

What would be answered wrongly is refused here, since the connector sees tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foreword.serve.http.errors import ApiError
from foreword.serve.vllm.salt import MARK
from foreword.serve.vllm.tasks import Task

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VARIABLE = "foreword_placeholders"  # of the chat template
Body = dict[str, Any]
Tokenize = Callable[[str, bool], list[int]]

# Fields that make a task's answer another one than they say, and why.
_REFUSED = {
    "prompt_embeds": "a task's prompt is text or token ids",
    "truncate_prompt_tokens": "the prefix would be cut off; cut the text before it is sent",
    "use_beam_search": "beams are read anew, without the prefix",
    "suffix": "nothing is written before a text",
    "kv_transfer_params": "the cache's transfer is the server's own",
    "ec_transfer_params": "the cache's transfer is the server's own",
    "mm_processor_kwargs": "a task's prompt is text",
    "chat_template": "the server's template has the place for the prefix",
}
_ALL = "prompt_logprobs"


def check_salts(body: Any) -> None:
    """Make sure that no client names a prefix past its task's name.

    Raises:
        ApiError: a salt of ours, anywhere in it.
    """
    found = [body]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            salt = value.get("cache_salt")
            if isinstance(salt, str) and salt.startswith(MARK):
                raise ApiError(
                    400, f"cache_salt: salts that begin with {MARK!r} are the server's own", param="cache_salt"
                )
            if isinstance(kwargs := value.get("chat_template_kwargs"), dict) and VARIABLE in kwargs:
                raise ApiError(
                    400, f"chat_template_kwargs: {VARIABLE!r} is the server's own", param="chat_template_kwargs"
                )
            found.extend(value.values())
        elif isinstance(value, list):
            found.extend(v for v in value if isinstance(v, dict | list))


def translate(
    body: Body, path: str, task: Task, base: str, place: str, tokenize: Tokenize, *, all_logprobs: bool
) -> Body:
    """A request for a task as vLLM is asked.

    Args:
        base: vLLM's own name of the model.
        place: the placeholder's text.
        tokenize: a text's ids, with or without the tokenizer's own special tokens.
        all_logprobs: whether the server gives log-probabilities of prompts.

    Raises:
        ApiError: 400, with the field at fault.
    """
    _check_fields(body, all_logprobs)
    own = body.get("cache_salt")
    if own is not None and not isinstance(own, str):
        raise ApiError(400, "cache_salt: expected a text", param="cache_salt")
    made = {k: v for k, v in body.items() if k not in ("strength", "add_special_tokens")}
    made |= {"model": base, "cache_salt": str(task.salt.of_client(own))}
    special = body.get("add_special_tokens")
    if special is not None and not isinstance(special, bool):
        raise ApiError(400, "add_special_tokens: expected true or false", param="add_special_tokens")
    if path == COMPLETIONS:
        made["prompt"] = _prompts(body.get("prompt"), task, tokenize, special is not False)
        return made
    if special:
        raise ApiError(400, "add_special_tokens: they would stand before the prefix; the template has its own",
                       param="add_special_tokens")  # fmt: skip
    kwargs = body.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ApiError(400, "chat_template_kwargs: expected an object", param="chat_template_kwargs")
    _check_messages(body.get("messages"))
    made["chat_template_kwargs"] = {**kwargs, VARIABLE: place * task.length}
    return made


def prompts_in(body: Body) -> int:
    """How many prompts a request has."""
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several and isinstance(prompt, list) else 1


def _check_fields(body: Body, all_logprobs: bool) -> None:
    for name, why in _REFUSED.items():
        if (given := body.get(name)) is not None and given is not False:
            raise ApiError(400, f"{name}: not for a task ({why})", param=name)
    if (echo := body.get("echo")) is not None and echo is not False:
        raise ApiError(
            400, "echo: prompts are not given back, since a task's begins with what is no text", param="echo"
        )
    if body.get("strength", 1) not in (1, None):
        raise ApiError(400, "strength: prefixes have their trained weight here; other ones are for `foreword serve`",
                       param="strength")  # fmt: skip
    if body.get(_ALL) is not None and not all_logprobs:
        raise ApiError(400, f"{_ALL}: not for a task on this server (its option is --prompt-logprobs)", param=_ALL)


def _prompts(prompt: Any, task: Task, tokenize: Tokenize, special: bool) -> list[int] | list[list[int]]:
    if isinstance(prompt, str):
        return _ids(prompt, task, tokenize, special)
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            400, "prompt: expected a text, texts, token ids, or lists of them; none may be empty", param="prompt"
        )
    if all(_is_id(p) for p in prompt):
        return task.before(prompt)
    if all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) for p in prompt):
        return [_ids(p, task, tokenize, special) for p in prompt]
    raise ApiError(400, "prompt: expected a text, texts, token ids, or lists of them", param="prompt")


def _ids(prompt: str | list[Any], task: Task, tokenize: Tokenize, special: bool) -> list[int]:
    ids = tokenize(prompt, special) if isinstance(prompt, str) else prompt
    if not ids:
        raise ApiError(400, "prompt: it has no token; a task answers to a text of at least one", param="prompt")
    if not all(_is_id(i) for i in ids):
        raise ApiError(400, "prompt: expected token ids of 0 or more", param="prompt")
    return task.before(ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: expected at least one", param="messages")
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
            raise ApiError(400, f"messages.{number}.content: a task reads text only", param="messages")
