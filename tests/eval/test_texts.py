"""Texts from files and data sets."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.eval import data_sets
from dbrx_q.eval.texts import DATA_SETS, TextWarning, load_text

WIKI = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English film actor . \n"]


def test_a_file_is_read_unchanged(tmp_path: Path) -> None:
    content = "\ufeffone\r\ntwo\n\n  dré \u2028 end\r".encode()
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.warns(TextWarning, match=r"has 1 line ends CRLF and a byte order mark .U\+FEFF. at its beginning"):
        text = load_text(str(path))
    assert text.text.encode() == content
    assert text.sha256 == hashlib.sha256(content).hexdigest()
    assert text.name == str(path)


@pytest.mark.parametrize(
    ("content", "message"), [("one\r\ntwo\r\n", "has 2 line ends CRLF, which"), ("\ufeffone", "has a byte order mark")]
)
def test_marks_of_editors_are_measured_and_said(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    with pytest.warns(TextWarning, match=message):
        assert load_text(str(path)).text == content


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", '{"text": "as it is"}\n', '{"text": "as it is"}\n'),
        ("a.jsonl", '{"text": "a\\n"}\n\n{"text": "", "id": 1}\r\n{"text": "dré\u2028end"}', "a\n\n\n\n\ndré\u2028end"),
        ("A.JSON", '\ufeff{"id": 1, "text": "one"}\n{"text": "two"}\n', "one\n\ntwo"),
        ("a.json", '[{"text": "one"},\n "two",\n {"text": "three"}]\n', "one\n\ntwo\n\nthree"),
    ],
    ids=["text", "lines", "lines-with-bom", "array"],
)
def test_documents(tmp_path: Path, name: str, content: str, expected: str, zipped: bool) -> None:
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    text = load_text(str(path))
    assert text.text == expected
    assert text.sha256 == hashlib.sha256(expected.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must not be empty"),
        ("a.txt", b" \n\t\r\n", "must have more than white space; found 5 blanks"),
        ("a.txt", "caf\xe9".encode("latin-1"), "must be UTF-8; byte 3 (0xe9) is not"),
        ("a.txt", "word".encode("utf-16"), "binary, or text in UTF-16: byte 3 is NUL"),
        ("a.jsonl", b"", "must not be empty"),
        ("a.json", b"[]", "must not be empty"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2: must be JSON"),
        ("a.jsonl", b'{"text": "one"}\n\n{"content": "two", "id": 2}\n', "line 3: must be an object whose field 'text' is a string; found "
         "the fields 'content', 'id'"),
        ("a.jsonl", b"{}\n", "line 1: must be an object whose field 'text' is a string; found the fields (none)"),
        ("a.jsonl", b'{"text": ["one"]}\n', "line 1: must be an object whose field 'text' is a string; found a field of type list"),
        ("a.jsonl", b'"one"\n', "line 1: must be an object whose field 'text' is a string; found str"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: a text must be Unicode; character 0 is half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: must be an object with a field 'text'; found JSON that is nested too deeply"),
        ("a.json", b'["one", 2]', "element 2: must be an object whose field 'text' is a string; found int"),
        ("a.json", b'["one", ', "a.json: must be JSON"),
        ("a.txt.gz", b"one", "must be an undamaged gzip file; Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"one two three", mtime=0)[:-9], "must be complete; this one is truncated"),
        ("a.txt.gz", gzip.compress(b"one", mtime=0)[:-8] + b"12345678", "must be an undamaged gzip file; CRC check failed"),
        ("a.txt.gz", gzip.compress(b"one", mtime=0)[:10] + b"\xff" * 12, "must be an undamaged gzip file; Error -3"),
        ("a.txt.gz", gzip.compress(b"a\0b", mtime=0), "byte 1 is NUL"),
    ],
)  # fmt: skip
def test_refused_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        load_text(str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="must be a file; found a folder"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such.txt", "x" * 5000, ""])
def test_an_unknown_name_lists_the_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        load_text(name)
    assert "wikitext2, wikitext2-tokenized, c4" in str(caught.value)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("wikitext", "wikitext2"), ("WikiText-2", "wikitext2"), ("C4", "c4")])
def test_a_similar_name_is_suggested(name: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"Did you mean {near}\?"):
        load_text(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders with the layout of the repositories, in place of these; `datasets` itself reads them."""
    import datasets

    wiki = tmp_path / "hub" / "wikitext"
    for config, lines in (("wikitext-2-raw-v1", WIKI), ("wikitext-2-v1", [line.replace("Boulter", "<unk>") for line in WIKI])):
        for split in ("train", "validation", "test"):
            (wiki / config).mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_dict({"text": lines if split == "test" else [f"{split} of {config}"]})
            table.to_parquet(str(wiki / config / f"{split}-00000-of-00001.parquet"))
    entries = [
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("test", "train", "validation"))
        for config in ("wikitext-2-raw-v1", "wikitext-2-v1")
    ]
    (wiki / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n", encoding="utf-8")

    c4 = tmp_path / "hub" / "c4" / "en"
    c4.mkdir(parents=True)
    for shard in range(2):
        rows = [json.dumps({"text": f"Page {number}\nof shard {shard}.", "url": "https://example.com"}) for number in range(1200)]
        (c4 / f"c4-validation.0000{shard}-of-00008.json.gz").write_bytes(gzip.compress("\n".join(rows).encode()))

    for name, known in data_sets.DATA_SETS.items():
        folder = tmp_path / "hub" / known.repository.split("/")[1]
        monkeypatch.setitem(data_sets.DATA_SETS, name, replace(known, repository=str(folder)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


def test_wikitext2(hub: Path) -> None:
    text = load_text("wikitext2")
    assert text.text == "\n\n".join(WIKI)
    assert (text.name, text.sha256) == ("wikitext2", hashlib.sha256(text.text.encode()).hexdigest())
    assert load_text("wikitext2-tokenized").text == "\n\n".join(WIKI).replace("Boulter", "<unk>")


def test_c4_is_the_first_documents_of_the_first_shard(hub: Path) -> None:
    assert load_text("c4").text == " ".join(f"Page {number}\nof shard 0." for number in range(1100))


def test_a_file_takes_precedence_over_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c4").write_text("plastic", encoding="utf-8")
    assert load_text("c4").text == "plastic"


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_sets_without_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dbrx_q\[datasets\]'"):
        load_text(name)


def test_an_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="wikitext2: the hub must provide the data set Salesforce/wikitext") as caught:
        load_text("wikitext2")
    assert "\n" not in str(caught.value)


def test_a_damaged_repository(hub: Path) -> None:
    (hub / "c4" / "en" / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"te'))
    with pytest.raises(RequestError, match="c4: the hub must provide the data set") as caught:
        load_text("c4")
    assert "\n" not in str(caught.value)
