"""Reads tokenizer_config.json: named tokens, added tokens, the chat template, the name of a tiktoken encoding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import TokenizerError
from dbrx_q.json_file import read_small_file

from .bpe_file import AddedToken, parse_added_token, wrong

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "NAMED_TOKENS",
    "NO_LIMIT",
    "Settings",
    "named_encoding",
    "read_added_tokens",
    "read_chat_template",
    "read_settings",
    "read_token_names",
]

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


NO_LIMIT = int(1e30)
"""`model_max_length` of a tokenizer whose files name none, as in transformers."""


@dataclass(frozen=True)
class Settings:
    """Settings of calls in tokenizer_config.json; names and defaults are those of transformers."""

    padding_side: str = "right"
    """"left" or "right"."""
    truncation_side: str = "right"
    """"left" or "right"."""
    model_max_length: int = NO_LIMIT
    """Tokens that the model takes."""
    model_input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    """What a call returns by default."""
    split_special_tokens: bool = False
    """Whether the spelling of a special token in a text is plain text."""
    clean_up_tokenization_spaces: bool = False
    """Kept and without effect, as in transformers for byte-level BPE."""
    extra_special_tokens: tuple[str, ...] = ()
    """Special tokens without a name."""


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
    for name in NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            names[name] = content
        elif value is not None:
            raise wrong(file, name, "a string, an object with a string 'content', or null", value)
    return names


def read_settings(file: Path, config: Mapping[str, Any]) -> Settings:
    """Settings of calls, for which a tokenizer has attributes.

    Raises:
        TokenizerError: a value of another type.
    """
    settings = Settings()
    for name in ("padding_side", "truncation_side"):
        if config.get(name, "right") not in ("left", "right"):
            raise wrong(file, name, "'left' or 'right'", config[name])
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float)) or not 0 < length < float("inf")):
        raise wrong(file, "model_max_length", "a positive number or null", length)
    names = config.get("model_input_names", settings.model_input_names)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for name, values in (("model_input_names", names), ("extra_special_tokens", extra)):
        if not isinstance(values, (list, tuple)):
            raise wrong(file, name, "a list", values)
    spellings = tuple(value.get("content") if isinstance(value, dict) else value for value in extra)
    for name, strings in (("model_input_names", names), ("extra_special_tokens", spellings)):
        if not all(isinstance(value, str) and value for value in strings):
            raise wrong(file, name, "a list of strings", strings)
    return Settings(
        padding_side=config.get("padding_side", settings.padding_side),
        truncation_side=config.get("truncation_side", settings.truncation_side),
        model_max_length=NO_LIMIT if length is None else int(length),
        model_input_names=tuple(names),
        split_special_tokens=bool(config.get("split_special_tokens", False)),
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        extra_special_tokens=tuple(map(str, spellings)),
    )


def read_chat_template(folder: Path, file: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name; None where there is none.

    chat_template.jinja precedes the config's, and files of additional_chat_templates/ have the names of templates.
    """
    single, named = _template_files(folder)
    if single is not None or named:
        return single if not named else ({} if single is None else {"default": single}) | named
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value):
        value = {entry["name"]: entry.get("template") for entry in value}
    if value is not None and not isinstance(value, str) and not (isinstance(value, dict) and _are_strings(value.values())):
        raise wrong(file, "chat_template", "a string or a list of {name, template}", value)
    return value


def _are_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _template_files(folder: Path) -> tuple[str | None, dict[str, str]]:
    """(the text of chat_template.jinja, the texts in additional_chat_templates/ by name)."""
    single, named = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return _read_template(single) if single.is_file() else None, {path.stem: _read_template(path) for path in named}


def _read_template(path: Path) -> str:
    try:
        return read_small_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: must be a readable UTF-8 file; {error}. Fetch it again") from None
