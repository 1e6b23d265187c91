"""The tokenizer in a GGUF file's metadata."""

from __future__ import annotations

import warnings

from dbrx_q.errors import CheckpointError, TokenizerError
from dbrx_q.tokenizer.bpe_file import DBRX_PATTERN, TokenizerWarning
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .gguf_file import GgufParts

__all__ = ["eos_ids_of", "tokenizer_of"]

# What files of DBRX have in tokenizer.ggml.pre; llama.cpp splits by the name's pattern. Converters before May 2024 wrote no name, and some
# after them a name of another model, for the one DBRX: a file of this architecture means DBRX's pattern.
_NAME, _OLD_NAMES = "dbrx", (None, "default", "llama-bpe")

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(parts: GgufParts) -> DbrxTokenizer:
    """The tokenizer, with the same ids as in the checkpoint that was converted.

    Raises:
        CheckpointError, TokenizerError: metadata is missing, or describes a tokenizer that is not DBRX's.
    """
    tokens, pattern = _checked_tokens(parts)
    vocab, added = _vocab_and_added(parts, tokens)
    data = {
        "model": {"type": "BPE", "vocab": vocab, "merges": parts.strings("tokenizer.ggml.merges")},
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel"},
    }
    template = parts.metadata.get("tokenizer.chat_template")
    return DbrxTokenizer.from_json(
        data,
        source=parts.path,
        token_names=_token_names(parts, tokens),
        chat_template=template if isinstance(template, str) else None,
    )


def eos_ids_of(parts: GgufParts) -> tuple[int, ...]:
    """Ids that end a generation: those that the metadata names, and <|im_end|> where it is a control token, as in llama.cpp."""
    tokens, types = parts.strings("tokenizer.ggml.tokens"), parts.counts("tokenizer.ggml.token_type")
    named = [parts.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    typed = enumerate(zip(tokens, types, strict=False))
    turn_ends = [token_id for token_id, (token, kind) in typed if token == "<|im_end|>" and kind == _CONTROL]
    return tuple(sorted({value for value in [*named, *turn_ends] if isinstance(value, int)}))


def _checked_tokens(parts: GgufParts) -> tuple[list[str], str]:
    """(spelling of every token, the pattern that splits a text), after a check that the tokenizer is of DBRX's kind."""
    model, pre = parts.text("tokenizer.ggml.model"), parts.metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise TokenizerError(
            f"{parts.path}: tokenizer.ggml.model must be 'gpt2', a byte-level BPE; found {model!r}. Convert the model again"
        )
    if pre in _OLD_NAMES:
        message = (
            f"{parts.path}: tokenizer.ggml.pre should be {_NAME!r}; found {pre!r}, as converters of early 2024 wrote. Texts are split by "
            "DBRX's pattern all the same; llama.cpp splits them otherwise until the model is converted again"
        )
        warnings.warn(message, TokenizerWarning, stacklevel=2)
    elif pre != _NAME:
        raise TokenizerError(f"{parts.path}: tokenizer.ggml.pre must be {_NAME!r}; found {pre!r}. Convert the model with a newer llama.cpp")
    for name in ("add_bos_token", "add_eos_token"):
        if parts.metadata.get(f"tokenizer.ggml.{name}"):
            raise TokenizerError(
                f"{parts.path}: tokenizer.ggml.{name} must be false or absent; DBRX adds no token. Convert the model again"
            )
    return parts.strings("tokenizer.ggml.tokens"), DBRX_PATTERN


def _vocab_and_added(parts: GgufParts, tokens: list[str]) -> tuple[dict[str, int], list[dict[str, object]]]:
    """(ordinary tokens with their ids, `added_tokens` as tokenizer.json has them)."""
    types = parts.counts("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise TokenizerError(f"{parts.path}: every token must have a type; found {len(types)} for {len(tokens)}. Fetch the file again")
    vocab: dict[str, int] = {}
    added: list[dict[str, object]] = []
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED or token == f"[PAD{token_id}]":
            continue  # a row of the embedding without a token; converters of 2024 mark it as user-defined
        if kind == _NORMAL:
            if vocab.setdefault(token, token_id) != token_id:
                raise TokenizerError(f"{parts.path}: a token must have one id; {token!r} has {vocab[token]} and {token_id}. Fetch it again")
        elif kind in (_CONTROL, _USER_DEFINED):
            added.append({"content": token, "id": token_id, "special": kind == _CONTROL})
        else:
            rule = "a token's type must be 1 (normal), 3 (control), 4 (user-defined) or 5 (unused)"
            raise TokenizerError(f"{parts.path}: {rule}; token {token_id} ({token!r}) has {kind}. Convert the model again")
    return vocab, added


def _token_names(parts: GgufParts, tokens: list[str]) -> dict[str, str]:
    """Spellings of the tokens that the metadata names, such as {"eos_token": "<|endoftext|>"}."""
    names = {}
    for name, key in _NAMED.items():
        value = parts.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            continue
        if not isinstance(value, int) or not 0 <= value < len(tokens):
            raise CheckpointError(
                f"{parts.path}: tokenizer.ggml.{key}_token_id must be a token's id; found {value!r}. Convert the model again"
            )
        names[name] = tokens[value]
    return names
