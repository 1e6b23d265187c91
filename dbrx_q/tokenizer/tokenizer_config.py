"""Reads tokenizer_config.json: named tokens, added tokens, the chat template, the name of a tiktoken encoding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import TokenizerError
from dbrx_q.json_file import read_small_file

from .bpe_file import AddedToken, parse_added_token, wrong

if TYPE_CHECKING:
    import tiktoken

__all__ = ["named_encoding", "read_added_tokens", "read_chat_template", "read_token_names"]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def named_encoding(file: Path, config: Mapping[str, Any]) -> tiktoken.Encoding:
    """The tiktoken encoding that a file of DBRX's launch names, by the encoding's name or by a model's.

    Raises:
        TokenizerError: tiktoken does not know the name, or has no rank file and cannot download it.
    """
    import tiktoken

    if config.get("tokenizer_class") != "TiktokenTokenizerWrapper":
        rule = "'TiktokenTokenizerWrapper' where the folder has no tokenizer.json"
        raise wrong(file, "tokenizer_class", rule, config.get("tokenizer_class"))
    name, model = config.get("encoding_name"), config.get("model_name")
    if not isinstance(name if model is None else model, str) or (name is not None and model is not None):
        raise wrong(file, "model_name and encoding_name", "one string and one null", (model, name))
    encoding_names = tiktoken.list_encoding_names()
    if model is not None:
        try:
            name = tiktoken.encoding_name_for_model(model)
        except KeyError:
            raise wrong(file, "model_name", "a model that tiktoken knows, such as 'gpt-4'", model) from None
    if name not in encoding_names:
        raise wrong(file, "encoding_name", f"one of {', '.join(encoding_names)}", name)
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{file}: names tiktoken's encoding {name!r}, whose rank file must be in tiktoken's cache or be downloaded; tiktoken failed "
            f"with {type(error).__name__}: {error}. Go online once, or set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled elsewhere"
        ) from error


def read_added_tokens(file: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens of added_tokens_decoder; [] where it is absent."""
    node = config.get("added_tokens_decoder") or {}
    if not isinstance(node, dict):
        raise wrong(file, "added_tokens_decoder", "an object", node)
    name = "added_tokens_decoder"
    return [parse_added_token(file, name, value, int(key) if key.isdecimal() else key) for key, value in node.items()]


def read_token_names(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Spellings of the named tokens that are set, such as {"eos_token": "<|endoftext|>"}."""
    names: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            names[name] = content
        elif value is not None:
            raise wrong(file, name, "a string, an object with a string 'content', or null", value)
    return names


def read_chat_template(folder: Path, file: Path, config: Mapping[str, Any]) -> str | None:
    """The Jinja source in chat_template.jinja, else in the config (of several templates, the one named "default"), else None."""
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        try:
            return read_small_file(template_file).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{template_file}: must be a readable UTF-8 file; {error}. Fetch it again") from None
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise wrong(file, "chat_template", "a string or a list of {name, template}", value)
    return value
