"""Chats from files and data sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dbrx_q.errors import RequestError
from dbrx_q.eval.chats import Chats, load_source
from dbrx_q.eval.texts import Text

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
BYE = [{"role": "user", "content": "Bye\u2028now"}]


@pytest.mark.parametrize("form", ["lines", "array", "gzip"])
def test_chats_of_a_file(tmp_path: Path, form: str) -> None:
    rows = [{"messages": HI, "id": 1}, {"messages": BYE}]
    path = tmp_path / {"lines": "a.jsonl", "array": "a.json", "gzip": "a.jsonl.gz"}[form]
    content = json.dumps(rows) if form == "array" else "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if form == "gzip" else content.encode())
    chats = load_source(str(path))
    assert isinstance(chats, Chats)
    assert chats.conversations == (HI, BYE)
    kind = "element" if form == "array" else "line"
    assert chats.places == (f"{path}: {kind} 1", f"{path}: {kind} {2 if form == 'array' else 3}")
    other = tmp_path / "b.jsonl"
    other.write_text("\n".join(json.dumps({"messages": messages}, indent=None, sort_keys=True) for messages in (HI, BYE)))
    again = load_source(str(other))
    assert again.sha256 == chats.sha256
    assert again.name == str(other)


def test_documents_with_messages_beside_their_text_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one", "messages": HI}))
    text = load_source(str(path))
    assert isinstance(text, Text)
    assert text.text == "one"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"messages": HI}, {"text": "one"}], "line 2: must be an object whose field 'messages' is a list .*; found the fields 'text'"),
        ([{"messages": HI}, {"messages": []}], r"line 2: must be .*; found \[\]"),
        ([{"messages": "Hi"}], 'line 1: must be .*; found "Hi"'),
        ([{"messages": HI}, "Hi"], "line 2: must be .*; found str"),
        ([{"content": "Hi"}], "line 1: must be an object whose field 'text' is a string; found the fields 'content'"),
    ],
)  # fmt: skip
def test_refused_files(tmp_path: Path, lines: list[object], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RequestError, match=message):
        load_source(str(path))


def test_damaged_chats_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": [')
    with pytest.raises(RequestError, match="line 2: must be JSON, one object with a field 'text' or 'messages'; Expecting value"):
        load_source(str(path))
