"""Conversations as people keep them, brought into the one form that chat templates read.

OpenAI's (``role``, ``content`` as a text or as parts, ``tool_calls``, ``function_call``, ``weight``) and ShareGPT's
(``from``, ``value``) become ``{role, content}`` with texts, and ``tool_calls`` where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError

Message = dict[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# What ShareGPT's files call them. "function_call" is the assistant's, its value the call as JSON.
_FROM = {
    "system": "system", "developer": "developer", "human": "user", "user": "user", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "assistant": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")


def conversation(place: str, name: str, value: object) -> tuple[Message, ...]:
    """The messages of a list (or of JSON that holds one), each ``{role, content}``.

    ``content`` is missing where there are tool calls alone.

    Raises:
        DataError: It is not a list with one message at least, or a message is not of a known form.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # a table of texts
        value = _json(place, name, value)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{place}: {name!r} must be a list of {{role, content}}, not {shown(value)}.")
    return tuple(_message(place, f"{name}[{index}]", message) for index, message in enumerate(value))


def is_conversation(value: object) -> bool:
    """Whether a value is a list of messages, rather than a text."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def with_system(place: str, messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The same with the record's own system prompt in front.

    Raises:
        DataError: The conversation opens with another one.
    """
    if not system.strip():
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": system}, *messages)
    if messages[0].get("content") != system:
        raise DataError(
            f"{place}: the record has a system prompt in a column of its own, and another one as its first message. "
            "Which of the two is meant? Leave one out."
        )
    return messages


def tools_of(place: str, value: object) -> tuple[dict[str, Any], ...] | None:
    """A record's tools, from a list or from JSON that holds one; None where there are none.

    A bare function (``name``, ``parameters``) is put into ``{"type": "function", "function": ...}``, which is what
    chat templates read.

    Raises:
        DataError: It is neither.
    """
    if isinstance(value, str) and value.strip():
        value = _json(place, "tools", value)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{place}: 'tools' must be a list of objects (or JSON that holds one), not {shown(value)}.")
    found = []
    for tool in value:
        bare = "name" in tool and "function" not in tool and tool.get("type", "function") == "function"
        inner = {key: part for key, part in tool.items() if key != "type"}
        found.append({"type": "function", "function": inner} if bare else dict(tool))
    return tuple(found) or None


def said(message: Mapping[str, Any]) -> str:
    """What a message says, for people to read and as a reference: its content, or its tool calls as JSON."""
    content = message.get("content") or ""
    if content.strip() or not message.get("tool_calls"):
        return str(content)
    return json.dumps([call.get("function", call) for call in message["tool_calls"]], ensure_ascii=False)


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer that is to be learned: OpenAI's ``weight`` of 0 says that it is not."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and bool(said(message).strip())


def text(place: str, name: str, value: object, *, blank: bool) -> str:
    """The value, if it is text that can be trained on.

    Raises:
        DataError: It is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} must be a string, not {shown(value)}.")
    if not blank and not value.strip():
        raise DataError(f"{place}: {name!r} is blank, so there is nothing to learn from it. Remove the record.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {name!r} holds half of a surrogate pair at character {error.start}; not valid text."
        ) from error
    return value


def shown(value: object) -> str:
    """Describe a wrong value in a few words."""
    if value is None:
        return "null"
    found = repr(value)
    return f"{type(value).__name__} {found if len(found) <= 40 else found[:37] + '...'}"


# --- one message ------------------------------------------------------------------------------------------


def _message(place: str, name: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: {name!r} must be an object with 'role' and 'content', not {shown(message)}.")
    # Tables fill the keys that a message lacks with null, and a chat template would take them as present.
    kept = {str(key): value for key, value in message.items() if value is not None}
    if "from" in kept and "role" not in kept:
        kept = _from_sharegpt(place, name, kept)
    if kept.get("role") == "function":  # OpenAI's older name
        kept["role"] = "tool"
    if "function_call" in kept:
        kept["tool_calls"] = [{"type": "function", "function": kept.pop("function_call")}]
    role = kept.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place}: {name}.role is {role!r}. The roles are {', '.join(sorted(ROLES))}.")
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(place, f"{name}.tool_calls", kept["tool_calls"])
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    if isinstance(kept.get("content"), list | tuple):
        kept["content"] = _joined(place, f"{name}.content", kept["content"])
    # An assistant that only calls a tool says nothing.
    if "content" in kept or not (role == "assistant" and "tool_calls" in kept):
        text(place, f"{name}.content", kept.get("content"), blank=True)
    if kept.get("weight", 1) not in (0, 1):
        raise DataError(f"{place}: {name}.weight is {kept['weight']!r}; expected 1 (learned) or 0 (not learned).")
    return kept


def _from_sharegpt(place: str, name: str, message: Message) -> Message:
    who = message.pop("from")
    value = message.pop("value", None)
    role = _FROM.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise DataError(f"{place}: {name}.from is {who!r}. Known are {', '.join(_FROM)}.")
    if who.lower() in _CALLS:
        calls = _json(place, f"{name}.value", text(place, f"{name}.value", value, blank=False))
        return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls], **message}
    if value is None and message.get("tool_calls"):
        return {"role": role, **message}
    return {"role": role, "content": value, **message}


def _joined(place: str, name: str, parts: Sequence[object]) -> str:
    """Content in parts as one text, as the server joins them."""
    found = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            found.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise DataError(
                f"{place}: {name}[{index}] is {shown(part)}; only parts of text are read: "
                '{"type": "text", "text": "..."}.'
            )
        found.append(part[kind])
    return "".join(found)


def _calls(place: str, name: str, value: object) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, whose arguments may be an object or JSON."""
    if isinstance(value, str):
        value = _json(place, name, value)
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: {name!r} must be a list, not {shown(value)}.")
    found = []
    for index, call in enumerate(value):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(
                f"{place}: {name}[{index}] is {shown(call)}; expected "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
            )
        assert isinstance(call, Mapping)
        found.append(dict(call) if "function" in call else {"type": "function", "function": dict(call)})
    return found


def _json(place: str, name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {name!r} is text that is not JSON: {error}.") from error
