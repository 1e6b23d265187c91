"""Writes a tokenizer's files, from which this project and transformers read the same ids.

transformers rebuilds the pattern that splits a text where tokenizer_config.json names GPT2Tokenizer, or no class beside a DBRX config.json.
PreTrainedTokenizerFast, which all its versions know, reads tokenizer.json as it is; so every file written here names that class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import TokenizerError

from .bpe_file import DBRX_PATTERN, FILE_ENCODING, byte_of_character, parts_below
from .tokenizer_config import NO_LIMIT, Settings

if TYPE_CHECKING:
    from .tokenizer import DbrxTokenizer
    from .vocabulary import Vocabulary

__all__ = ["PLAIN_CLASSES", "TEMPLATES_NAME", "TOKENIZER_CLASS", "as_json", "tokenizer_json", "write_tokenizer"]

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class that files written here name."""
_CONFIG, _TOKENIZER, _TEMPLATE, TEMPLATES_NAME = (
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
PLAIN_CLASSES = (TOKENIZER_CLASS, "TokenizersBackend")
"""The classes with which transformers reads tokenizer.json as it is."""
# Keys that are written anew, that name code, or that belong to the files of DBRX's launch.
_DROPPED = (
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template", "auto_map", "tokenizer_file"),
    *("model_name", "encoding_name", "use_default_system_prompt", "add_bos_token", "add_eos_token", "errors", "backend", "name_or_path"),
)


def write_tokenizer(tokenizer: DbrxTokenizer, folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Write tokenizer.json, tokenizer_config.json and the chat templates.

    Args:
        tokenizer: to write.
        folder: created where it is missing.
        config: tokenizer_config.json of the checkpoint; keys that the tokenizer does not know are kept.

    Returns:
        The files.

    Raises:
        TokenizerError: the folder cannot be written, a template's name is no file name, or the encoding is another one of tiktoken's.
    """
    settings = {name: getattr(tokenizer, name) for name in Settings.__dataclass_fields__ if name != "extra_special_tokens"}
    kept = {name: value for name, value in config.items() if name not in _DROPPED and not name.endswith("_token")}
    written = kept | {name: value for name, value in settings.items() if name in config or value != getattr(Settings(), name)}
    if tokenizer.model_max_length < NO_LIMIT:
        written["model_max_length"] = tokenizer.model_max_length
    if tokenizer.extra_special_tokens:
        written["extra_special_tokens"] = tokenizer.extra_special_tokens
    written |= tokenizer.special_tokens_map | {"tokenizer_class": TOKENIZER_CLASS}
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"default": tokenizer.chat_template}
    files = {_CONFIG: as_json(written), _TOKENIZER: as_json(tokenizer_json(tokenizer.vocabulary, trims_offsets=tokenizer.trims_offsets))}
    for name, template in templates.items():
        if template is not None and name != Path(name).name:
            raise TokenizerError(f"the name of a chat template must be a file name; found {name!r}. Rename it")
        if template is not None:
            files[_TEMPLATE if name == "default" else f"{TEMPLATES_NAME}/{name}.jinja"] = template
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")
        if templates.get("default") is None:
            (folder / _TEMPLATE).unlink(missing_ok=True)  # another tokenizer's
    except OSError as error:
        raise TokenizerError(f"{folder}: must be a folder that can be written; {error.strerror}. Name another folder") from None
    return [folder / name for name in files]


def tokenizer_json(vocabulary: Vocabulary, *, trims_offsets: bool = False) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary.

    Of the merges that the original listed, it has the one that builds each token, which gives the same ids (see `bpe_file.py`). Where ids
    have gaps, added tokens are part of `model.vocab`: the `tokenizers` library numbers other added tokens from the end of the vocabulary.
    """
    characters = {byte: character for character, byte in byte_of_character().items()}
    ranks = {"".join(map(characters.__getitem__, token)): rank for token, rank in _ranks(vocabulary).items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = parts_below(token, rank, ranks)
        if len(parts) == 2:  # a single byte has one part, and a token that ignores merges may have more
            merges.append(parts)
    added = vocabulary.added_tokens()
    contiguous = [token.id for token in added if token.id >= len(ranks)]
    has_gaps = contiguous != list(range(len(ranks), len(ranks) + len(contiguous))) or max(ranks.values()) != len(ranks) - 1
    vocab = ranks | ({token.content: token.id for token in added} if has_gaps else {})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _pattern(vocabulary)}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token.id, "content": token.content, **flags, "special": token.special} for token in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level if trims_offsets else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.ignores_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def _pattern(vocabulary: Vocabulary) -> str:
    """The pattern, in a spelling that the `tokenizers` library reads alike; tiktoken's own of cl100k_base has possessive quantifiers."""
    name = vocabulary.encoding.name
    if name == "cl100k_base":
        return DBRX_PATTERN
    if name != FILE_ENCODING:
        raise TokenizerError(f"a tokenizer.json must have DBRX's encoding, cl100k_base; found tiktoken's {name!r}. Keep the launch files")
    return vocabulary.encoding._pat_str


def _ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Id of each ordinary token, by its bytes."""
    return vocabulary.encoding._mergeable_ranks


def as_json(data: Mapping[str, Any]) -> str:
    """The text of a JSON file, indented as the checkpoint's files are."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
