"""Texts to measure on: files as they are, documents of JSON lines, and the data sets that perplexities are quoted on."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dbrx_q.errors import RequestError, UnsupportedError

__all__ = ["DATA_SETS", "Text", "load_text"]

_DOCUMENTS_APART = "\n\n"
_GPTQ_C4_DOCUMENTS = 1100


@dataclass(frozen=True)
class Text:
    """A text to measure on. name: as given. text: never empty. sha256: of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True)
class _DataSet:
    """Where a data set lies on the hub, and how its documents become one text."""

    repository: str
    config: str | None
    files: dict[str, str] | None  # of each split, where the repository holds more than is wanted
    split: str
    apart: str
    documents: int | None  # from the first on; None for all


# Joined as by `datautils.py` of GPTQ (github.com/IST-DASLab/gptq), whose figures everybody compares with.
_DATA_SETS = {
    "wikitext2": _DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "\n\n", None),
    "wikitext2-tokenized": _DataSet("Salesforce/wikitext", "wikitext-2-v1", None, "test", "\n\n", None),
    "c4": _DataSet("allenai/c4", None, {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "validation", " ", _GPTQ_C4_DOCUMENTS),
}
DATA_SETS = tuple(_DATA_SETS)
"""Names that `load_text` knows."""


def load_text(name_or_path: str) -> Text:
    """The text of a file or of a data set; a file or folder that exists wins over a name.

    Files: UTF-8 text, as it is, line ends included; `.jsonl` and `.json`: one JSON object with a field "text" per line, or one array of
    such objects or of strings, whose documents are joined by a blank line. Either may be gzipped, with `.gz` at the end of its name.

    Data sets, through the package `datasets` (extra `datasets`), which fetches them once:
    - "wikitext2": the test split of wikitext-2-raw-v1, its lines joined by blank lines, as GPTQ's code does (Frantar et al. 2022).
    - "wikitext2-tokenized": the same of wikitext-2-v1, in which rare words are <unk>.
    - "c4": the first 1100 documents of the first validation shard of C4's "en", joined by spaces, as GPTQ's `get_c4_new` does. That code
      then keeps 256 windows of tokens; measure with a limit of 256 windows to do the same.

    Raises:
        RequestError: nothing there, a folder, a text that is empty, damaged, not UTF-8 or not the JSON described, or a data set that the
            hub does not give.
        UnsupportedError: a data set, and `datasets` is not installed.
    """
    path = Path(name_or_path)
    if not name_or_path:
        raise RequestError(f"a text must be a file or one of {', '.join(DATA_SETS)}; found an empty name. Check the path")
    if os.path.exists(path):
        text = _read_file(path)
    elif name_or_path in _DATA_SETS:
        text = _read_data_set(name_or_path, _DATA_SETS[name_or_path])
    else:
        near = get_close_matches(name_or_path.lower(), DATA_SETS, n=1)
        guess = f"Did you mean {near[0]}?" if near else "Check the path"
        raise RequestError(
            f"{name_or_path}: a text must be a file or the name of a data set ({', '.join(DATA_SETS)}); there is neither. {guess}"
        )
    if not text:
        raise RequestError(f"{name_or_path}: a text must not be empty. Give a file with something in it")
    if text.isspace():
        raise RequestError(f"{name_or_path}: a text must hold more than blanks; found {len(text):,} blanks. Give a file with words in it")
    return Text(name_or_path, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _read_file(path: Path) -> str:
    if path.is_dir():
        raise RequestError(f"{path}: a text must be a file; found a folder. Name the file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: a text must be a readable file; {error.strerror}. Check its permissions") from None
    kind = path.name.lower()
    if kind.endswith(".gz"):
        content, kind = _unzipped(path, content), kind.removesuffix(".gz")
    text = _decoded(path, content)
    return _DOCUMENTS_APART.join(_documents(path, text.removeprefix("\ufeff"))) if kind.endswith((".jsonl", ".json")) else text


def _unzipped(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except EOFError:
        raise RequestError(f"{path}: a gzip file must have an end; this one breaks off. Fetch it again") from None
    except (zlib.error, OSError) as error:
        raise RequestError(f"{path}: a file named .gz must be an undamaged gzip file; {error}. Fetch it again, or rename it") from None


def _decoded(path: Path, content: bytes) -> str:
    zero = content.find(0)
    if zero >= 0:
        raise RequestError(
            f"{path}: a text must be UTF-8 text; this file is binary, or text in UTF-16: byte {zero} is NUL. Unpack or convert it"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: a text must be UTF-8; byte {error.start} ({content[error.start]:#04x}) is not. Convert it") from None


def _documents(path: Path, text: str) -> Iterator[str]:
    if text.lstrip().startswith("["):
        items = _parsed(text, f"{path}")
        assert isinstance(items, list)
        for number, item in enumerate(items, 1):
            yield _document(item, f"{path}: element {number}", plain=True)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut where a string holds a Unicode line separator
        if line.strip():
            where = f"{path}: line {number}"
            yield _document(_parsed(line, where), where)


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise RequestError(
            f"{where}: must be an object with a field 'text'; found JSON that is nested too deep. Name another file"
        ) from None
    except ValueError as error:
        problem = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RequestError(
            f"{where}: must be JSON, one object with a field 'text'; {problem}. Correct it, or name plain text without .json or .jsonl"
        ) from None


def _document(item: object, where: str, *, plain: bool = False) -> str:
    """The text of an object; or of a string, where it may stand for itself."""
    if isinstance(item, dict):
        found = f"{type(item['text']).__name__} there" if "text" in item else f"the fields {', '.join(map(repr, item)) or '(none)':.80}"
        item = item.get("text")
    else:
        found = f"{type(item).__name__}"
        item = item if plain else None
    if not isinstance(item, str):
        raise RequestError(
            f"{where}: must be an object whose field 'text' is a string; found {found}. Rename the field that holds the text"
        )
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where}: a text must be Unicode; character {error.start} is half of a surrogate pair. Write it again with whole ones"
        ) from None
    return item


def _read_data_set(name: str, wanted: _DataSet) -> str:
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"the data set {name} needs the package datasets, which is not installed: pip install 'dbrx_q[datasets]', or give a file"
        ) from None
    with _errors_of(name, wanted.repository):
        found = datasets.load_dataset(wanted.repository, wanted.config, data_files=wanted.files, split=wanted.split)
        return wanted.apart.join(found[: wanted.documents]["text"])


@contextmanager
def _errors_of(name: str, repository: str) -> Iterator[None]:
    """Turns what the hub's client raises (OSError, ValueError, its HTTP library's own) into one line."""
    import logging

    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.ERROR)  # every attempt that is repeated is a warning otherwise
    try:
        yield
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RequestError(
            f"{name}: the hub did not give the data set {repository} ({first_line}). Check the network, or give the text as a file"
        ) from None
    finally:
        set_verbosity(verbosity)
