"""Loads the texts that models are measured on: plain files, JSON documents, and the data sets that published perplexities use."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dbrx_q.errors import RequestError

from .data_sets import DATA_SETS as _KNOWN
from .data_sets import DataSet, data_set, read_documents
from .text_files import is_json, json_items, read_utf8

__all__ = ["DATA_SETS", "Text", "TextWarning", "load_text", "unknown_source"]

_DOCUMENT_SEPARATOR = "\n\n"
_EXPECTED = "an object with a field 'text'"
DATA_SETS = tuple(name for name, known in _KNOWN.items() if not known.has_chats)
"""Names of data sets that `load_text` accepts."""


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


def load_text(name_or_path: str) -> Text:
    """Load the text of a file or of a data set; an existing file or folder takes precedence over a data set's name.

    Files: UTF-8 text, unchanged, line ends included; `.jsonl` and `.json`: one JSON object with a field "text" per line, or one array of
    such objects or of strings, whose documents are joined by a blank line. Either may be gzipped, with `.gz` at the end of its name.

    Data sets, through the package `datasets` (extra `datasets`), each as `name` or `name@revision`:
    - "wikitext2": the test split of wikitext-2-raw-v1, its lines joined by blank lines, as GPTQ's code does (Frantar et al. 2022);
      "wikitext2-train" and "wikitext2-validation": its other splits.
    - "wikitext2-tokenized": the test split of wikitext-2-v1, in which rare words are <unk>.
    - "c4": the first 1100 documents of the first validation shard of C4's "en", joined by spaces, as GPTQ's `get_c4_new` does. That code
      then keeps 256 windows of tokens; measure with a limit of 256 windows to do the same.
    - The other texts of `data_sets.DATA_SETS`, to calibrate with: the first documents of each, joined by blank lines.

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
    elif known := data_set(name_or_path):
        text = _read_data_set(name_or_path, known)
    else:
        raise unknown_source(name_or_path, DATA_SETS)
    if not text:
        raise RequestError(f"{name_or_path}: a text must not be empty. Name a file with text")
    if text.isspace():
        raise RequestError(f"{name_or_path}: a text must have more than white space; found {len(text):,} blanks. Name a file with words")
    _warn_of_marks(name_or_path, text)
    return Text(name_or_path, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def unknown_source(name: str, known: tuple[str, ...]) -> RequestError:
    """The error for a name that is neither a file nor one of the data sets `known`."""
    near = get_close_matches(name.lower(), known, n=1)
    guess = f"Did you mean {near[0]}?" if near else "Check the path"
    return RequestError(f"{name}: a text must be a file or the name of a data set ({', '.join(known)}); found neither. {guess}")


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
    text = read_utf8(path)
    if not is_json(path):
        return text
    plain = text.removeprefix("\ufeff").lstrip().startswith("[")  # an array may hold strings
    return _DOCUMENT_SEPARATOR.join(_document(item, where, plain=plain) for where, item in json_items(path, text, _EXPECTED))


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


def _read_data_set(name: str, source: DataSet) -> str:
    if source.has_chats:
        raise RequestError(f"{name}: a text to measure on must be documents; this data set has chats, which calibrate. Name a text")
    return source.separator.join(read_documents(name, source))
