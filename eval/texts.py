"""Loads the texts that models are measured on: plain files, JSON documents, and the data sets that published perplexities use."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dbrx_q.errors import RequestError, UnsupportedError

__all__ = ["DATA_SETS", "Text", "TextWarning", "load_text"]

_DOCUMENT_SEPARATOR = "\n\n"
_GPTQ_C4_DOCUMENTS = 1100


class TextWarning(UserWarning):
    """A text that is measured as it is, and may not be the one that published figures are of."""


@dataclass(frozen=True)
class Text:
    """A text to measure on."""

    name: str
    """The path or the name of the data set, as given."""
    text: str
    """Never empty."""
    sha256: str
    """Of the UTF-8 bytes of `text`."""


@dataclass(frozen=True)
class _DataSet:
    """A data set on the hub, and how its documents become one text."""

    repository: str
    """Id of the repository on the hub."""
    config: str | None
    """Name of the configuration, if the repository has several."""
    files: dict[str, str] | None
    """The file of each split, if only a part of the repository is needed."""
    split: str
    """Name of the split."""
    separator: str
    """Written between two documents."""
    documents: int | None
    """How many documents to take, from the first on; None for all."""


# Joined as in `datautils.py` of GPTQ (github.com/IST-DASLab/gptq), whose protocol published figures follow.
_DATA_SETS = {
    "wikitext2": _DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "\n\n", None),
    "wikitext2-tokenized": _DataSet("Salesforce/wikitext", "wikitext-2-v1", None, "test", "\n\n", None),
    "c4": _DataSet("allenai/c4", None, {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "validation", " ", _GPTQ_C4_DOCUMENTS),
}
DATA_SETS = tuple(_DATA_SETS)
"""Names of data sets that `load_text` accepts."""


def load_text(name_or_path: str) -> Text:
    """Load the text of a file or of a data set; an existing file or folder takes precedence over a data set's name.

    Files: UTF-8 text, unchanged, line ends included; `.jsonl` and `.json`: one JSON object with a field "text" per line, or one array of
    such objects or of strings, whose documents are joined by a blank line. Either may be gzipped, with `.gz` at the end of its name.

    Data sets, through the package `datasets` (extra `datasets`), which downloads them once:
    - "wikitext2": the test split of wikitext-2-raw-v1, its lines joined by blank lines, as GPTQ's code does (Frantar et al. 2022).
    - "wikitext2-tokenized": the same split of wikitext-2-v1, in which rare words are <unk>.
    - "c4": the first 1100 documents of the first validation shard of C4's "en", joined by spaces, as GPTQ's `get_c4_new` does. That code
      then keeps 256 windows of tokens; measure with a limit of 256 windows to do the same.

    Raises:
        RequestError: the path does not exist or is a folder; the text is empty, damaged, not UTF-8 or not the JSON described; or the hub
            does not provide the data set.
        UnsupportedError: a data set was named and `datasets` is not installed.
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
            f"{name_or_path}: a text must be a file or the name of a data set ({', '.join(DATA_SETS)}); found neither. {guess}"
        )
    if not text:
        raise RequestError(f"{name_or_path}: a text must not be empty. Name a file with text")
    if text.isspace():
        raise RequestError(f"{name_or_path}: a text must have more than white space; found {len(text):,} blanks. Name a file with words")
    _warn_of_marks(name_or_path, text)
    return Text(name_or_path, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _warn_of_marks(name: str, text: str) -> None:
    """Say what a text editor may have put into the text: they are measured, and raise the perplexity."""
    lines = text.count("\r\n")
    marks = [f"{lines:,} line ends CRLF"] if lines else []
    marks += ["a byte order mark (U+FEFF) at its beginning"] if text.startswith("\ufeff") else []
    if marks:
        warnings.warn(
            f"{name}: has {' and '.join(marks)}, which are measured like any character and change the perplexity. To measure without "
            "them: sed -i '1s/^\\xef\\xbb\\xbf//; s/\\r$//' FILE",
            TextWarning,
            stacklevel=3,
        )


def _read_file(path: Path) -> str:
    if path.is_dir():
        raise RequestError(f"{path}: a text must be a file; found a folder. Name the file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: a text must be a readable file; {error.strerror}. Check its permissions") from None
    kind = path.name.lower()
    if kind.endswith(".gz"):
        content, kind = _decompressed(path, content), kind.removesuffix(".gz")
    text = _decoded(path, content)
    return _DOCUMENT_SEPARATOR.join(_documents(path, text.removeprefix("\ufeff"))) if kind.endswith((".jsonl", ".json")) else text


def _decompressed(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except EOFError:
        raise RequestError(f"{path}: a gzip file must be complete; this one is truncated. Download it again") from None
    except (zlib.error, OSError) as error:
        raise RequestError(f"{path}: a file named .gz must be an undamaged gzip file; {error}. Download it again, or rename it") from None


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
            f"{where}: must be an object with a field 'text'; found JSON that is nested too deeply. Name another file"
        ) from None
    except ValueError as error:
        problem = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RequestError(
            f"{where}: must be JSON, one object with a field 'text'; {problem}. Correct it, or name plain text without .json or .jsonl"
        ) from None


def _document(item: object, where: str, *, plain: bool = False) -> str:
    """The text of a JSON object; with `plain` a string is accepted as a text too."""
    if isinstance(item, dict):
        fields = f"the fields {', '.join(map(repr, item)) or '(none)':.80}"
        actual = f"a field of type {type(item['text']).__name__}" if "text" in item else fields
        item = item.get("text")
    else:
        actual = type(item).__name__
        item = item if plain else None
    if not isinstance(item, str):
        raise RequestError(
            f"{where}: must be an object whose field 'text' is a string; found {actual}. Rename the field that holds the text"
        )
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where}: a text must be Unicode; character {error.start} is half of a surrogate pair. Write the file with complete characters"
        ) from None
    return item


def _read_data_set(name: str, data_set: _DataSet) -> str:
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"the data set {name} needs the package datasets, which is not installed: pip install 'dbrx_q[datasets]', or name a file"
        ) from None
    with _hub_errors(name, data_set.repository):
        rows = datasets.load_dataset(data_set.repository, data_set.config, data_files=data_set.files, split=data_set.split)
        return data_set.separator.join(rows[: data_set.documents]["text"])


@contextmanager
def _hub_errors(name: str, repository: str) -> Iterator[None]:
    """Turns the errors of the hub's client (OSError, ValueError, those of its HTTP library) into a RequestError of one line."""
    import logging

    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.ERROR)  # otherwise each retry logs a warning
    try:
        yield
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RequestError(
            f"{name}: the hub must provide the data set {repository}; it did not ({first_line}). Check the network, or name a file"
        ) from None
    finally:
        set_verbosity(verbosity)
