"""Copies a checkpoint's tokenizer into a quantized one, so that transformers reads the right ids from the copy too."""

from __future__ import annotations

import shutil
from pathlib import Path

from dbrx_q.errors import TokenizerError

from .bpe_file import read_json
from .saving import PLAIN_CLASSES, TEMPLATES_NAME, TOKENIZER_CLASS, as_json
from .tokenizer import DbrxTokenizer

__all__ = ["copy_tokenizer"]

_CONFIG, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of the checkpoint in `source` into `folder`, so that transformers reads the right ids from it too.

    tokenizer.json is copied as it is. Launch files, which name an encoding of tiktoken, become a tokenizer.json, unless tiktoken lacks the
    encoding's ranks: then they are copied. Nothing is written where the checkpoint has no tokenizer.

    Raises:
        TokenizerError: tokenizer_config.json is malformed, or as `write_tokenizer`.
    """
    config_file = source / _CONFIG
    if not config_file.is_file() and not (source / _TOKENIZER).is_file():
        return
    config = read_json(config_file) if config_file.is_file() else {}
    if not (source / _TOKENIZER).is_file():
        try:
            DbrxTokenizer.from_pretrained(source).save_pretrained(folder)
        except TokenizerError:
            shutil.copyfile(config_file, folder / _CONFIG)
        return
    shutil.copyfile(source / _TOKENIZER, folder / _TOKENIZER)
    if config.get("tokenizer_class") not in PLAIN_CLASSES:
        config = {name: value for name, value in config.items() if name != "auto_map"} | {"tokenizer_class": TOKENIZER_CLASS}
        (folder / _CONFIG).write_text(as_json(config), encoding="utf-8")
    elif config_file.is_file():
        shutil.copyfile(config_file, folder / _CONFIG)
    if (source / TEMPLATES_NAME).is_dir():
        shutil.copytree(source / TEMPLATES_NAME, folder / TEMPLATES_NAME, dirs_exist_ok=True)
