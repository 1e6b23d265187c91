"""Reads tokenizer.json and refuses every file that tiktoken would encode otherwise.

tiktoken merges, among all neighbours whose concatenation is a token, the leftmost pair of the lowest rank, and takes a piece that is a
token as that token. The `tokenizers` library merges the leftmost pair that is first in a list of merges. Two conditions make the engines
agree: the list follows the ids (rank = id), and every token, encoded alone, is built by a listed merge. The second suffices because the
bytes of a token are merged in a longer piece as they are alone, as long as no merge has crossed their border. `read_tokenizer_json` checks
both, so a text has the same ids in either engine. Added tokens have the ids that the file gives them; `tokenizers` gives them the next free
ids, so the two differ on a file with a gap before the added tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dbrx_q.errors import CheckpointError, TokenizerError
from dbrx_q.json_file import read_json_object

__all__ = [
    "DBRX_PATTERN",
    "FILE_ENCODING",
    "AddedToken",
    "TokenizerFile",
    "TokenizerWarning",
    "byte_of_character",
    "check_spelling",
    "parse_added_token",
    "parse_tokenizer",
    "parts_below",
    "pattern_notice",
    "read_json",
    "read_tokenizer_json",
    "wrong",
]

DBRX_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The regular expression that splits a text for DBRX, that of tiktoken's cl100k_base."""
FILE_ENCODING = "dbrx"
"""The name of the tiktoken encoding of a tokenizer.json; others are tiktoken's own."""
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# (behavior, invert) of the splits that keep every match of the pattern as a piece. They differ in the text between matches, which
# tiktoken drops; `tokenizer.py` refuses patterns that leave text between matches.
_SPLITS = [("Isolated", False), ("Removed", True)]


class TokenizerWarning(UserWarning):
    """A tokenizer file that is read, and whose ids may not be those that the user wants."""


class AddedToken(NamedTuple):
    """A token beside the BPE vocabulary."""

    content: str
    """The spelling."""
    id: int
    """The token id."""
    special: bool
    """Whether decoding can skip the token."""

    def __str__(self) -> str:
        return self.content


class TokenizerFile(NamedTuple):
    """The contents of a tokenizer.json."""

    ranks: dict[bytes, int]
    """Id of each ordinary token, by its bytes; the id is also the rank."""
    pattern: str
    """The regular expression that splits a text into pieces; no merge crosses their borders."""
    added: list[AddedToken]
    """The tokens beside the vocabulary."""
    ignores_merges: bool
    """Whether a piece that is a token needs no merges."""
    trims_offsets: bool
    """Whether the offsets of a token leave out the blank that it begins with."""


def wrong(path: Path, name: str, rule: str, value: object) -> TokenizerError:
    """The error for a value in a file: names the file, the rule, the value and the next step."""
    shown = repr(value)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    return TokenizerError(f"{path}: {name} must be {rule}; found {shown}. Use the tokenizer files published with the DBRX checkpoint")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        TokenizerError: the file is missing, or holds no JSON object.
    """
    try:
        return read_json_object(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def parse_added_token(path: Path, name: str, node: object, token_id: object) -> AddedToken:
    """One added token of tokenizer.json or of tokenizer_config.json.

    Raises:
        TokenizerError: the token has no spelling or no id, takes in the blanks around it, or matches whole words only.
    """
    content = node.get("content") if isinstance(node, dict) else None
    if not isinstance(node, dict) or not isinstance(content, str) or not content:
        raise wrong(path, name, "an object with a non-empty string 'content'", node)
    check_spelling(f"{path}: {name}", content)
    if not _is_id(token_id):
        raise wrong(path, f"{name} ({content})", "a token with an integer id of 0 or more", token_id)
    for flag in ("lstrip", "rstrip", "single_word"):
        if node.get(flag, False) is not False:
            raise wrong(path, f"{name} ({content}): {flag}", "false", node[flag])
    return AddedToken(content, int(token_id), bool(node.get("special", True)))  # type: ignore[call-overload] # checked above


def check_spelling(name: str, spelling: str) -> None:
    """Refuse a token that no text can spell.

    Raises:
        TokenizerError: the spelling is empty or has half of a surrogate pair.
    """
    if not spelling:
        raise TokenizerError(f"{name}: a token must have a spelling; found an empty string. Leave it out")
    half = next((character for character in spelling if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise TokenizerError(
            f"{name}: a token must be spelled in whole characters; found {spelling!r} with U+{ord(half):04X}, half a pair. "
            "Use the tokenizer files published with the DBRX checkpoint"
        )


def pattern_notice(source: object, pattern: str) -> str | None:
    """What to tell the user of a pattern that is not DBRX's; None where it is."""
    if pattern == DBRX_PATTERN:
        return None
    whose = (
        "with GPT-2's pattern, which transformers 5 writes where it read the tokenizer as GPT2Tokenizer"
        if pattern == _GPT2_PATTERN
        else (f"with the pattern {pattern[:60]!r}")
    )
    return (
        f"{source}: splits a text {whose}; DBRX was trained with that of cl100k_base, so ids differ. Use the tokenizer.json of the "
        "original checkpoint, or save it from PreTrainedTokenizerFast.from_pretrained"
    )


def read_tokenizer_json(path: Path) -> TokenizerFile:
    """The byte-level BPE in `path`.

    Raises:
        TokenizerError: the JSON is malformed, or tiktoken would encode some text otherwise than the file says.
    """
    return parse_tokenizer(path, read_json(path))


def parse_tokenizer(path: Path, data: Mapping[str, Any]) -> TokenizerFile:
    """The byte-level BPE of a tokenizer.json in memory; `path` names its origin in errors, which are those of `read_tokenizer_json`."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise wrong(path, "model.type", "'BPE'", model.get("type") if isinstance(model, dict) else model)
    if data.get("normalizer") is not None:
        raise wrong(path, "normalizer", "null (tiktoken encodes the text as it is)", data["normalizer"])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise wrong(path, f"model.{name}", "absent, null or false", model[name])
    if not _adds_nothing(data.get("post_processor")):
        rule = "null, of type ByteLevel, or a TemplateProcessing of the texts alone (no token is added to a text)"
        raise wrong(path, "post_processor", rule, data.get("post_processor"))
    if _kind(data.get("decoder")) != "ByteLevel":
        raise wrong(path, "decoder", "of type ByteLevel", data.get("decoder"))
    pattern = _read_pattern(path, data.get("pre_tokenizer"))
    nodes = data.get("added_tokens") or []
    if not isinstance(nodes, list):
        raise wrong(path, "added_tokens", "a list", nodes)
    added = [parse_added_token(path, "added_tokens", node, node.get("id") if isinstance(node, dict) else None) for node in nodes]
    vocab = _read_vocab(path, model.get("vocab"), {token.content: token.id for token in added})
    _check_merges(path, vocab, model.get("merges"), bool(model.get("ignore_merges")))
    to_byte = byte_of_character()
    ranks = {bytes(map(to_byte.__getitem__, token)): rank for token, rank in vocab.items()}
    return TokenizerFile(ranks, pattern, added, bool(model.get("ignore_merges")), _trims_offsets(data.get("post_processor")))


def _adds_nothing(node: object) -> bool:
    """Whether a post-processor leaves the ids of a text and of a pair as they are."""
    if node is None or _kind(node) == "ByteLevel":
        return True
    if not isinstance(node, dict):
        return False
    if node.get("type") == "Sequence":
        steps = node.get("processors")
        return isinstance(steps, list) and all(step is not None and _adds_nothing(step) for step in steps)
    if node.get("type") != "TemplateProcessing":
        return False
    templates = node.get("single"), node.get("pair")
    wanted = ["A"], ["A", "B"]
    for template, names in zip(templates, wanted, strict=True):
        pieces = template if isinstance(template, list) else []
        sequences = [piece.get("Sequence") if isinstance(piece, dict) and len(piece) == 1 else None for piece in pieces]
        if [sequence.get("id") if isinstance(sequence, dict) else None for sequence in sequences] != names:
            return False
    return True


def _trims_offsets(node: object) -> bool:
    if not isinstance(node, dict):
        return False
    if node.get("type") == "Sequence":
        return any(_trims_offsets(step) for step in node.get("processors", []))
    return node.get("type") == "ByteLevel" and node.get("trim_offsets", True) is not False


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kind(node: object) -> object:
    return node.get("type", "") if isinstance(node, dict) else node


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: a printable Latin-1 character stands for its byte, U+0100 onwards for the other bytes in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _read_pattern(path: Path, node: object) -> str:
    steps = node.get("pretokenizers") if isinstance(node, dict) and node.get("type") == "Sequence" else [node]
    kinds = [_kind(step) for step in steps] if isinstance(steps, list) else []
    if kinds not in (["Split", "ByteLevel"], ["ByteLevel"]):
        raise wrong(path, "pre_tokenizer", "Split then ByteLevel, or ByteLevel alone", node)
    assert isinstance(steps, list)
    split, byte_level = steps[0], steps[-1]
    if byte_level.get("add_prefix_space", True) is not False:
        raise wrong(path, "pre_tokenizer: add_prefix_space", "false", byte_level.get("add_prefix_space", True))
    alone = len(steps) == 1
    if byte_level.get("use_regex", True) is not alone:
        where = "without a Split before ByteLevel" if alone else "after a Split"
        raise wrong(path, "pre_tokenizer: use_regex", f"{str(alone).lower()} {where}", byte_level.get("use_regex", True))
    if alone:
        return _GPT2_PATTERN
    pattern = split.get("pattern")
    pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(pattern, str) or not pattern:
        raise wrong(path, "pre_tokenizer: pattern", "an object with a string 'Regex'", split.get("pattern"))
    if (split.get("behavior"), split.get("invert", False)) not in _SPLITS:
        rule = "Isolated with invert false, or Removed with invert true"
        raise wrong(path, "pre_tokenizer: behavior and invert", rule, (split.get("behavior"), split.get("invert", False)))
    outside_classes = re.sub(r"\[(?:\\.|[^\]\\])*\]|\\.", "", pattern)
    if re.search(r"[$^]|\{\d*,?\d*\}\+", outside_classes):
        # "{1,3}+" is possessive in tiktoken and a repeated group in tokenizers; "$" is the end of the text in one, of a line in the other
        raise wrong(path, "pre_tokenizer: pattern", "free of '^', '$' and '}+', which the two libraries read differently", pattern)
    return pattern


def _read_vocab(path: Path, node: object, added: Mapping[str, int]) -> dict[str, int]:
    """Id of every ordinary token, that is, of all but the added ones, by its byte-level string."""
    if not isinstance(node, dict) or not node:
        raise wrong(path, "model.vocab", "a non-empty object", node)
    alphabet = set(byte_of_character())
    owners: dict[int, str] = {}
    for token, token_id in node.items():
        if not _is_id(token_id):
            raise wrong(path, f"model.vocab[{token!r}]", "an integer id of 0 or more", token_id)
        if owners.setdefault(token_id, token) != token:
            raise wrong(path, f"model.vocab: id {token_id}", "the id of one token", [owners[token_id], token])
        if token in added:
            if added[token] != token_id:
                raise wrong(path, f"added_tokens ({token}): id", f"{token_id}, as in model.vocab", added[token])
        elif not token or not alphabet.issuperset(token):
            raise wrong(path, "model.vocab", "non-empty byte-level strings", token)
    vocab = {token: token_id for token, token_id in node.items() if token not in added}
    missing = sorted(byte for character, byte in byte_of_character().items() if character not in vocab)
    if missing:
        raise wrong(path, "bytes missing from model.vocab", "none of the 256", [f"{byte:#04x}" for byte in missing])
    return vocab


def _check_merges(path: Path, vocab: Mapping[str, int], node: object, ignore_merges: bool) -> None:
    if not isinstance(node, list):
        raise wrong(path, "model.merges", "a list", node)
    listed: set[tuple[str, str]] = set()
    previous_rank = -1
    for index, merge in enumerate(node):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise wrong(path, f"model.merges[{index}]", "'a b' or ['a', 'b']", merge)
        left, right = pair
        for token in (left, right, left + right):
            if token not in vocab:
                raise wrong(path, f"model.merges[{index}]", "made of ordinary tokens of model.vocab, its result included", merge)
        rank = vocab[left + right]
        if rank < previous_rank:
            rule = (
                f"in non-decreasing order of the resulting id (the merge before gives {previous_rank}), because tiktoken's rank is the id"
            )
            raise wrong(path, f"model.merges[{index}]", rule, f"{merge!r} -> {rank}")
        previous_rank = rank
        listed.add((left, right))
    for token, rank in vocab.items():
        if len(token) == 1:
            continue
        parts = parts_below(token, rank, vocab)
        if len(parts) == 2 and (parts[0], parts[1]) not in listed:
            raise wrong(path, "model.merges", f"a list with {parts}, from which tiktoken builds {token!r}", "no such merge")
        if len(parts) != 2 and not ignore_merges:
            rule = f"a list that builds every token, because tiktoken takes a piece that equals {token!r} as that token"
            raise wrong(path, "model.merges", rule, f"merges that stop at {parts}")


def parts_below(token: str, rank: int, vocab: Mapping[str, int]) -> list[str]:
    """The parts of `token`, byte-level strings, after all merges of ranks below its own."""
    parts = list(token)
    while len(parts) > 2:
        best_rank, best = rank, -1
        for index in range(len(parts) - 1):
            merged_rank = vocab.get(parts[index] + parts[index + 1], best_rank)
            if merged_rank < best_rank:
                best_rank, best = merged_rank, index
        if best < 0:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
