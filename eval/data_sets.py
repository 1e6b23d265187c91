"""The data sets on the hub that texts and chats are read from, by short names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dbrx_q.errors import RequestError, UnsupportedError

__all__ = ["DATA_SETS", "DEFAULT_MIX", "DataSet", "data_set", "read_documents"]

_GPTQ_C4_DOCUMENTS = 1100


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub, and which of its documents are read."""

    repository: str
    """Id of the repository on the hub."""
    split: str
    """Name of the split."""
    configs: tuple[str | None, ...] = (None,)
    """Names of the configurations, which are read in turn; None where the repository has one."""
    files: tuple[str, ...] = ()
    """The files that are read in turn, where only a part of the repository is needed."""
    revision: str | None = None
    """Commit, tag or branch; None for the newest commit."""
    column: str = "text"
    """Where the document stands in a row; in the column "messages" it is a chat."""
    separator: str = "\n\n"
    """Written between two documents."""
    documents: int | None = None
    """How many documents to take of each configuration or file, from the first on; None for all."""
    characters: int | None = None
    """A longer document is cut to so many characters from its middle; None for no limit."""
    streamed: bool = True
    """Whether only the documents that are taken are downloaded; otherwise all files are, and kept."""
    licence: str = ""
    """As the repository states it."""

    @property
    def has_chats(self) -> bool:
        """Whether the documents are chats."""
        return self.column == "messages"


_WIKITEXT = DataSet("Salesforce/wikitext", "test", ("wikitext-2-raw-v1",), streamed=False, licence="CC BY-SA 3.0, GFDL")
_WIKIPEDIA = DataSet(
    "wikimedia/wikipedia",
    "train",
    ("20231101.en",),
    revision="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
    documents=600,
    characters=8_000,
    licence="CC BY-SA 3.0, GFDL",
)
# One shard of each language; the repository groups its 95 shards by language.
_STACK_SHARDS = {"C": 18, "C++": 20, "Go": 34, "Java": 38, "JavaScript": 50, "Python": 73, "Rust": 86, "Shell": 87, "TypeScript": 91}

# Joined as in `datautils.py` of GPTQ (github.com/IST-DASLab/gptq), whose protocol published figures follow: the first three.
_PUBLISHED = {
    "wikitext2": _WIKITEXT,
    "wikitext2-tokenized": replace(_WIKITEXT, configs=("wikitext-2-v1",)),
    "c4": DataSet(
        "allenai/c4",
        "validation",
        files=("en/c4-validation.00000-of-00008.json.gz",),
        separator=" ",
        documents=_GPTQ_C4_DOCUMENTS,
        streamed=False,
        licence="ODC-By",
    ),
}
_WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
# All at fixed commits; of those of the default mix about four megabytes of text, of which a calibration draws its sequences.
_CALIBRATING = {
    "wikitext2-train": replace(_WIKITEXT, split="train", revision=_WIKITEXT_COMMIT),
    "wikitext2-validation": replace(_WIKITEXT, split="validation", revision=_WIKITEXT_COMMIT),
    "gutenberg-en": DataSet(
        "sedthh/gutenberg_english",
        "train",
        revision="28973b04f28fd7be4a6186a042bc26159d4366ca",
        column="TEXT",
        documents=200,
        characters=20_000,
        licence="MIT; the books are in the public domain of the USA",
    ),
    "wikipedia-en": _WIKIPEDIA,
    "stack-edu": DataSet(
        "common-pile/stackv2_edu_filtered",
        "train",
        files=tuple(f"stack-edu-{number:04}.json.gz" for number in _STACK_SHARDS.values()),
        revision="c354dbe88469a1153e97c6a63ac50591849654de",
        documents=150,
        characters=5_000,
        licence="permissive licences, noted with each file",
    ),
    "open-web-math": DataSet(
        "open-web-math/open-web-math",
        "train",
        revision="fde8ef8de2300f5e778f56261843dab89f230815",
        documents=600,
        characters=8_000,
        licence="ODC-By",
    ),
    "ultrachat": DataSet(
        "HuggingFaceH4/ultrachat_200k",
        "train_sft",
        revision="8049631c405ae6576f93f445c6b8166f76f5505a",
        column="messages",
        documents=800,
        licence="MIT",
    ),
    "wikipedia-languages": replace(
        _WIKIPEDIA, configs=tuple(f"20231101.{language}" for language in ("de", "es", "fr", "ja", "ru", "zh")), documents=100
    ),
}
DATA_SETS: dict[str, DataSet] = {**_PUBLISHED, **_CALIBRATING}
"""Every data set by its name."""

DEFAULT_MIX = {"gutenberg-en": 2, "wikipedia-en": 2, "stack-edu": 2, "open-web-math": 1, "ultrachat": 2, "wikipedia-languages": 1}
"""The weights of the default mix for DBRX: prose, encyclopedic text, code, mathematics, chats and other languages."""


def data_set(name: str) -> DataSet | None:
    """The data set of a name, at the revision of `name@revision` where one is given; None for another name."""
    known, at, revision = name.partition("@")
    if known not in DATA_SETS or (at and not revision):
        return None
    return replace(DATA_SETS[known], revision=revision) if revision else DATA_SETS[known]


def read_documents(name: str, source: DataSet) -> list[Any]:
    """The documents that are taken of a data set: strings, or chats as lists of messages.

    Args:
        name: of the data set, for errors.
        source: what to read.

    Raises:
        RequestError: the hub does not provide the data set, or it has no such column.
        UnsupportedError: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"the data set {name} needs the package datasets, which is not installed: pip install 'dbrx_q[datasets]', or name a file"
        ) from None
    documents: list[Any] = []
    with _hub_errors(name, source.repository):
        for config in source.configs:
            for file in source.files or (None,):
                rows = datasets.load_dataset(
                    source.repository,
                    config,
                    data_files=None if file is None else {source.split: file},
                    split=source.split,
                    revision=source.revision,
                    streaming=source.streamed,
                )
                documents += (row[source.column] for row in islice(rows, source.documents))
    if source.characters is not None:
        documents = [_middle(document, source.characters) for document in documents]
    return documents


def _middle(document: str, characters: int) -> str:
    first = max(0, len(document) - characters) // 2
    return document[first : first + characters]


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
            f"{name}: the hub must provide the data set {repository}; it did not ({first_line}). Check the network, or name a file: "
            "docs/quantization.md, 'The mix without a network', says how to write one"
        ) from None
    finally:
        set_verbosity(verbosity)
