"""Loads chats to calibrate with: JSON files and data sets whose rows have "messages"."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_q.errors import RequestError

from .data_sets import DATA_SETS, data_set, read_documents
from .text_files import is_json, json_items, read_utf8
from .texts import Text, load_text, unknown_source

__all__ = ["Chats", "load_source", "save_sources"]


@dataclass(frozen=True)
class Chats:
    """Conversations, which a checkpoint's chat template turns into text."""

    name: str
    """The path or the name of the data set, as given."""
    conversations: tuple[list[Any], ...]
    """Lists of messages such as {"role": "user", "content": "Hi"}; at least one."""
    places: tuple[str, ...]
    """For each conversation, words that say where it stands, for errors."""
    sha256: str
    """Of the conversations as lines of JSON with sorted keys."""


def load_source(name_or_path: str) -> Text | Chats:
    """Load the text or the chats of a file or of a data set.

    As `texts.load_text`; besides, a JSON file whose first item has a field "messages", and data sets of chats, give chats.

    Raises:
        RequestError: as `load_text`, or an item of a file of chats has no list of messages.
        UnsupportedError: a data set was named and `datasets` is not installed.
    """
    path = Path(name_or_path)
    if name_or_path and os.path.exists(path):
        if is_json(path) and path.is_file():
            items = json_items(path, read_utf8(path), "an object with a field 'text' or 'messages'")
            first = next(items, ("", None))
            if isinstance(first[1], dict) and "messages" in first[1] and "text" not in first[1]:
                return _chats(name_or_path, [first, *items])
        return load_text(name_or_path)
    known = data_set(name_or_path)
    if known is None and name_or_path:
        raise unknown_source(name_or_path, tuple(DATA_SETS))
    if known is None or not known.has_chats:
        return load_text(name_or_path)
    rows = [{"messages": messages} for messages in read_documents(name_or_path, known)]
    return _chats(name_or_path, [(f"{name_or_path}: row {number}", row) for number, row in enumerate(rows, 1)])


def save_sources(names: Iterable[str], folder: Path) -> list[Path]:
    """Write data sets to files, of which a machine without a network reads the same texts and chats; returns the files.

    Args:
        names: as for `load_source`.
        folder: is created; gets `name.txt` for a text and `name.jsonl` for chats.

    Raises:
        RequestError: as `load_source`.
        UnsupportedError: `datasets` is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in names:
        source = load_source(name)
        file = folder / f"{name}.{'jsonl' if isinstance(source, Chats) else 'txt'}"
        if isinstance(source, Chats):
            lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in source.conversations)
            file.write_text("".join(lines), encoding="utf-8", newline="")
        else:
            file.write_text(source.text, encoding="utf-8", newline="")
        files.append(file)
    return files


def _chats(name: str, items: list[tuple[str, Any]]) -> Chats:
    conversations = tuple(_messages(item, where) for where, item in items)
    lines = "\n".join(json.dumps(messages, sort_keys=True) for messages in conversations)
    return Chats(name, conversations, tuple(where for where, _ in items), hashlib.sha256(lines.encode()).hexdigest())


def _messages(item: Any, where: str) -> list[Any]:
    messages = item.get("messages") if isinstance(item, Mapping) else None
    if not isinstance(messages, list) or not messages:
        actual = f"the fields {', '.join(map(repr, item)) or '(none)':.80}" if isinstance(item, Mapping) else type(item).__name__
        if isinstance(item, Mapping) and "messages" in item:
            actual = f"{json.dumps(messages):.60}"
        raise RequestError(f"{where}: must be an object whose field 'messages' is a list of messages; found {actual}. Correct the line")
    return messages
