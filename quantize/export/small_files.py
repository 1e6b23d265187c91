"""The files beside the weights: tokenizer, generation settings, and the licence, which goes with the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.tokenizer.copying import copy_tokenizer

__all__ = ["copy_licence", "copy_small_files", "write_tokenizer"]

_GENERATION = "generation_config.json"
_TOKENIZER_FILES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def copy_small_files(weights: StoredWeights, folder: Path) -> None:
    """Write the tokenizer, generation_config.json and the licence into a folder."""
    write_tokenizer(weights, folder)
    copy_licence(weights.small_files, folder)
    source = weights.small_files
    if source is not None and (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)


def write_tokenizer(weights: StoredWeights, folder: Path) -> None:
    """Write the tokenizer into a folder; nothing where the checkpoint has none."""
    source = weights.small_files
    if source is None:
        weights.write_small_files(folder)
        return
    for path in sorted(source.iterdir()):  # before `copy_tokenizer`, which writes those that transformers must read otherwise
        if path.is_file() and path.name in _TOKENIZER_FILES:
            shutil.copyfile(path, folder / path.name)
    copy_tokenizer(source, folder)


def copy_licence(source: Path | None, folder: Path) -> None:
    """Copy the files of the licence; None stands for a checkpoint without such files, such as a GGUF file."""
    for path in sorted(source.iterdir()) if source is not None else ():
        if path.is_file() and path.name.startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(path, folder / path.name)
