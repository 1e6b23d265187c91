"""GGUF files of a folder or a hub repository, by their names: the parts of split ones, and which model a user means."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = ["GGUF_PART", "gguf_models", "holds_only_gguf", "with_label"]

GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of a part of a split file, as llama-gguf-split names it."""
# Files that llama.cpp's tools put beside models: statistics of activations, and the encoders of images.
_NO_MODEL = re.compile(r"(^|/)mmproj|imatrix", re.IGNORECASE)


def gguf_models(files: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among files.

    Args:
        files: paths, of which those of other files are ignored.

    Returns:
        The files of each model in order, by the first of them; a split one has several. Parts without the first are no model.
    """
    parts: dict[tuple[str, str], dict[int, str]] = {}
    for file in sorted(files):
        if file.endswith(".gguf") and not _NO_MODEL.search(file):
            match = GGUF_PART.fullmatch(file)
            stem, count, number = (match["stem"], match["count"], int(match["number"])) if match else (file, "00001", 1)
            parts.setdefault((stem, count), {})[number] = file
    models = ([named[number] for number in sorted(named)] for named in parts.values() if 1 in named)
    return {names[0]: names for names in models}


def holds_only_gguf(files: Collection[str]) -> bool:
    """Whether files hold GGUF models and no weights in safetensors files."""
    return bool(gguf_models(files)) and not any(file.endswith(".safetensors") for file in files)


def with_label(models: Mapping[str, Sequence[str]], label: str) -> dict[str, list[str]]:
    """Those of `gguf_models` whose path has a label such as Q4_K_M as a word, in any case."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(label)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return {first: list(names) for first, names in models.items() if word.search(first)}
