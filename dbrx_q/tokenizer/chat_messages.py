"""Checks what a caller gives to a chat template, and makes plain JSON types of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dbrx_q.errors import TokenizerError

__all__ = ["as_conversations", "checked_messages", "checked_tools", "joined_parts", "plain_data"]

_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_DEEPEST = 100


def as_conversations(conversation: Any) -> tuple[list[Any], bool]:
    """(the conversations, whether `conversation` is a list of them).

    Raises:
        TokenizerError: `conversation` is empty, or neither a list of messages nor a list of such lists.
    """
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence) or not conversation:
        raise TokenizerError(f'messages must be a non-empty list like [{{"role": "user", "content": "Hi"}}]; found {_short(conversation)}')
    first = conversation[0]
    if hasattr(first, "messages") or (isinstance(first, Sequence) and not isinstance(first, (str, bytes))):
        return [getattr(item, "messages", item) for item in conversation], True
    return [conversation], False


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of `messages` in plain JSON types, without keys whose value is None.

    Raises:
        TokenizerError: `messages` is not a non-empty list of objects with a "role", a role is no plain name, or a content is no text.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TokenizerError(f'messages must be a non-empty list like [{{"role": "user", "content": "Hi"}}]; found {_short(messages)}')
    checked: list[dict[str, Any]] = []
    for index, given in enumerate(messages):
        message = plain_data(given)
        if not isinstance(message, dict) or "role" not in message:
            keys = sorted(map(str, message)) if isinstance(message, dict) else _short(given)
            raise TokenizerError(
                f"messages[{index}] must be an object with the keys 'role' and 'content'; found {keys}. Add what is missing"
            )
        role, content = message["role"], message.get("content")
        # Templates write the role beside their own punctuation, where "im_end|" could complete a special token.
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise TokenizerError(
                f"messages[{index}]['role'] must be a plain name like 'system', 'user' or 'assistant'; found {_short(role)}. Rename it"
            )
        if content is not None and not isinstance(content, (str, list)):
            raise TokenizerError(
                f"messages[{index}]['content'] must be a string or a list of parts like {{'type': 'text', 'text': ...}}; "
                f"found {_short(content)}. Write it as text"
            )
        if content is None and len(message) <= 1 + ("content" in message):
            raise TokenizerError(f"messages[{index}] must have the keys 'role' and 'content'; found {sorted(message)}. Add the content")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:  # under the names that templates read
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(message)
    return checked


def joined_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """`messages` whose lists of text parts are one string each, lines apart; None where there is no such list or a part is no text."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
                return None
            content = "\n".join(part["text"] for part in content)
        joined.append({**message, "content": content} if "content" in message else dict(message))
    return joined if joined != list(messages) else None


def checked_tools(name: str, values: Any) -> list[Any] | None:
    """Tools or documents in plain JSON types; None stays None.

    Raises:
        TokenizerError: they are no list of objects. A Python function is no tool: its JSON schema is.
    """
    if values is None:
        return None
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise TokenizerError(f"{name} must be a list of objects; found {_short(values)}. Put it into a list")
    for index, value in enumerate(values):
        if callable(value) and not isinstance(value, Mapping):
            raise TokenizerError(
                f"{name}[{index}] must be a JSON schema of the function {getattr(value, '__name__', '?')!r}, such as "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}; found the function. Write its schema'
            )
        if not isinstance(plain_data(value), dict):
            raise TokenizerError(f"{name}[{index}] must be an object; found {_short(value)}. Write it as a dictionary")
    return [plain_data(value) for value in values]


def plain_data(value: Any, depth: int = 0) -> Any:
    """`value` in JSON types, so that a template reaches no methods of other objects; a lone surrogate becomes U+FFFD.

    Raises:
        TokenizerError: it is nested too deeply.
    """
    if depth > _DEEPEST:
        raise TokenizerError(f"messages, tools and variables must be nested at most {_DEEPEST} deep; found more. Flatten them")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, (int, float)):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return plain_data(value.item(), depth + 1)
    if isinstance(value, str):
        return str.__str__(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {plain_data(key, depth + 1): plain_data(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, depth + 1) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain_data(getattr(value, item.name), depth + 1) for item in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # a pydantic model, such as a message of a client
        return plain_data(value.model_dump(), depth + 1)
    return f"<{type(value).__name__}>"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
