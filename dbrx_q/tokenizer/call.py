"""Calls of a tokenizer: texts and pairs to ids, truncation, padding, and what is returned beside the ids.

Dimension letters: `B` texts of a batch, `S` tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from dbrx_q.errors import RequestError, TokenizerError, UnsupportedError

from .batch_encoding import BatchEncoding

if TYPE_CHECKING:
    from .text_calls import CallableTokenizer

__all__ = ["CallOptions", "EncodedText", "batch_of", "call_options", "encode_text", "pad_rows", "padding_of", "truncated"]

# A `model_max_length` above this one is none: transformers writes 1e30 for "no limit".
_NO_LIMIT = 10**20
_SIDES = ("left", "right")
_PADDINGS = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
_TRUNCATIONS = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}


@dataclass(frozen=True)
class CallOptions:
    """The keyword arguments of a call, checked. Names, meanings and defaults are those of transformers."""

    add_special_tokens: bool = True
    """Whether tokens are added around a text. DBRX adds none, so both values give the same ids."""
    padding: Any = False
    """True or "longest" to pad to the longest text, "max_length" to `max_length`, False for none."""
    truncation: Any = None
    """True or "longest_first", "only_first" or "only_second" to cut to `max_length`, False for no cut. None cuts where `max_length` is
    given without padding."""
    max_length: int | None = None
    """Tokens to cut or to pad to; None for the tokenizer's `model_max_length`."""
    stride: int = 0
    """Tokens that overflowing parts share; these are not returned, so it has no effect."""
    pad_to_multiple_of: int | None = None
    """A number whose multiple the padded length is."""
    padding_side: str | None = None
    """"left" or "right"; None for the tokenizer's."""
    return_tensors: str | None = None
    """"pt" for torch, "np" for numpy, None for lists."""
    return_token_type_ids: bool | None = None
    """Whether to return 0 for tokens of a text and 1 for those of the second of a pair; None where `model_input_names` has it."""
    return_attention_mask: bool | None = None
    """Whether to return 0 on padding and 1 elsewhere; None where `model_input_names` has it."""
    return_special_tokens_mask: bool = False
    """Whether to return 1 on tokens that the tokenizer added, that is, on padding."""
    return_offsets_mapping: bool = False
    """Whether to return (first character, last character + 1) of each token."""
    return_length: bool = False
    """Whether to return the number of tokens of each text, padding included."""
    return_overflowing_tokens: bool = False
    """Must be False: what is cut is not returned."""
    is_split_into_words: bool = False
    """Must be False: a text is not given as a list of words."""
    split_special_tokens: bool | None = None
    """Whether the spelling of a special token in a text is plain text; None for the tokenizer's."""
    return_dict: bool = True
    """False to return the ids alone."""
    verbose: bool = True
    """Has no effect: nothing is printed."""


class Padding(NamedTuple):
    """How rows are padded."""

    length: int | None
    """Tokens of a padded row; None for the longest row's."""
    multiple: int | None
    """A number whose multiple the length is."""
    side: str
    """"left" or "right"."""
    pad_id: int
    """Id of the padding token."""


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text, or of a pair."""

    ids: list[int]
    """Token ids."""
    type_ids: list[int]
    """0 for a token of the first text, 1 for one of the second."""
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """(first character, last character + 1) of each token in its text; empty where not asked for."""
    attention: list[int] = field(default_factory=list)
    """0 on padding, 1 elsewhere."""


def call_options(arguments: dict[str, Any]) -> CallOptions:
    """The options in keyword arguments.

    Raises:
        TypeError: a name that is no option; the message has the nearest one.
        UnsupportedError: words or overflowing parts are asked for.
    """
    names = list(CallOptions.__dataclass_fields__)
    for name in arguments:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            guess = f"Did you mean {near[0]!r}?" if near else f"Options are {', '.join(names)}"
            raise TypeError(f"a call of the tokenizer has no keyword argument {name!r}. {guess}")
    options = CallOptions(**arguments)
    if options.return_overflowing_tokens:
        raise UnsupportedError("return_overflowing_tokens must be False: what is cut is not returned. Split the ids yourself")
    if options.is_split_into_words:
        raise UnsupportedError("is_split_into_words must be False: a text must be one string. Join the words with blanks first")
    if options.padding_side not in (None, *_SIDES):
        raise RequestError(f"padding_side must be 'left' or 'right'; found {options.padding_side!r}. Name a side")
    for name in ("max_length", "pad_to_multiple_of"):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < (name == "pad_to_multiple_of")):
            raise RequestError(f"{name} must be a whole number of tokens or None; found {value!r}. Give a number")
    return options


def encode_text(tokenizer: CallableTokenizer, text: str, pair: str | None, options: CallOptions) -> EncodedText:
    """One text, or a pair, whose tokens follow each other; not yet cut or padded.

    Raises:
        TokenizerError: a text is no string or cannot be encoded.
    """
    parts: list[EncodedText] = []
    split = tokenizer.split_special_tokens if options.split_special_tokens is None else options.split_special_tokens
    for number, part in enumerate((text,) if pair is None else (text, pair)):
        if not isinstance(part, str):
            raise TokenizerError(f"text must be a string; found {type(part).__name__}. Decode bytes, or give a list of strings")
        ids = tokenizer.vocabulary.encode(part, split_special_tokens=split)
        offsets = tokenizer.offsets_of(part, ids) if options.return_offsets_mapping else []
        parts.append(EncodedText(ids, [number] * len(ids), offsets))
    if len(parts) > 1:
        parts = _cut_pair(parts[0], parts[1], tokenizer, options)
    joined = parts if len(parts) == 1 else [_joined(parts)]
    limit = _limit(tokenizer, options)
    if pair is None and limit is not None and len(joined[0].ids) > limit:
        if _truncation(options) == "only_second":
            raise RequestError("truncation='only_second' must have a pair of texts; found one text. Use truncation=True")
        joined = [_cut(joined[0], limit, tokenizer.truncation_side)]
    return replace(joined[0], attention=[1] * len(joined[0].ids))


def truncated(tokenizer: CallableTokenizer, row: EncodedText, options: CallOptions) -> EncodedText:
    """`row`, of one text, cut as `options` say."""
    limit = _limit(tokenizer, options)
    cut = row if limit is None else _cut(row, limit, tokenizer.truncation_side)
    return replace(cut, attention=[1] * len(cut.ids))


def padding_of(tokenizer: CallableTokenizer, options: CallOptions) -> Padding | None:
    """How the rows of a call are padded; None for not at all.

    Raises:
        RequestError: no such strategy, or a length that is no multiple of `pad_to_multiple_of`.
        TokenizerError: the tokenizer has no padding token.
    """
    strategy = _named(options.padding, _PADDINGS, ("longest", "max_length", "do_not_pad"), "padding")
    length = options.max_length
    if strategy == "max_length" and length is None:
        if tokenizer.model_max_length > _NO_LIMIT:
            strategy = "do_not_pad"
        length = tokenizer.model_max_length
    if strategy == "do_not_pad":
        return None
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        raise TokenizerError(
            "padding must have a padding token; the tokenizer names none. Set one, such as tokenizer.pad_token = tokenizer.eos_token"
        )
    multiple, limit = options.pad_to_multiple_of, _limit(tokenizer, options)
    if limit is not None and multiple is not None and limit % multiple:
        raise RequestError(f"max_length must be a multiple of pad_to_multiple_of={multiple} where texts are cut; found {limit}. Change one")
    side = options.padding_side or tokenizer.padding_side
    return Padding(length if strategy == "max_length" else None, multiple, side, pad_id)


def pad_rows(rows: Sequence[EncodedText], padding: Padding | None) -> list[EncodedText]:
    """`rows`, padded to one length. A row that is longer stays as it is."""
    if padding is None:
        return list(rows)
    length = max((len(row.ids) for row in rows), default=0) if padding.length is None else padding.length
    if padding.multiple:
        length = -(-length // padding.multiple) * padding.multiple
    return [_padded(row, max(0, length - len(row.ids)), padding) for row in rows]


def batch_of(tokenizer: CallableTokenizer, rows: Sequence[EncodedText], options: CallOptions, *, is_batch: bool) -> BatchEncoding:
    """What a call returns for `rows`; the values of one text are not lists of lists, unless tensors are asked for."""
    names = tokenizer.model_input_names
    has_types = "token_type_ids" in names if options.return_token_type_ids is None else options.return_token_type_ids
    has_mask = "attention_mask" in names if options.return_attention_mask is None else options.return_attention_mask
    data: dict[str, list[Any]] = {"input_ids": [row.ids for row in rows]}
    if has_types:
        data["token_type_ids"] = [row.type_ids for row in rows]
    if has_mask:
        data["attention_mask"] = [row.attention for row in rows]
    if options.return_special_tokens_mask:
        data["special_tokens_mask"] = [[1 - seen for seen in row.attention] for row in rows]
    if options.return_offsets_mapping:
        data["offset_mapping"] = [row.offsets for row in rows]
    if options.return_length:
        data["length"] = [len(row.ids) for row in rows]
    if not is_batch and options.return_tensors is None:
        data = {name: values if name == "length" else values[0] for name, values in data.items()}
    spelled = _Spellings(tokenizer, rows)
    return BatchEncoding(data, tensor_type=options.return_tensors, tokens=spelled)


class _Spellings(Sequence[list[str]]):
    """The tokens of every row, spelled when they are asked for."""

    def __init__(self, tokenizer: CallableTokenizer, rows: Sequence[EncodedText]) -> None:
        self._vocabulary, self._rows = tokenizer.vocabulary, [row.ids for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return [self._vocabulary.spelling_of(token_id) for token_id in self._rows[index]]


def _named(value: Any, names: dict[Any, str], allowed: Sequence[str], option: str) -> str:
    value = getattr(value, "value", value)  # the enums of transformers
    name = names[value] if value is None or isinstance(value, bool) else value
    if name not in allowed:
        raise RequestError(f"{option} must be True, False or one of {', '.join(map(repr, allowed))}; found {value!r}. Choose one")
    return str(name)


def _truncation(options: CallOptions) -> str:
    if options.truncation is None and options.padding is False and options.max_length is not None:
        return "longest_first"
    allowed = ("longest_first", "only_first", "only_second", "do_not_truncate")
    return _named(options.truncation, _TRUNCATIONS, allowed, "truncation")


def _limit(tokenizer: CallableTokenizer, options: CallOptions) -> int | None:
    """Tokens that a row is cut to; None for no cut."""
    if _truncation(options) == "do_not_truncate":
        return None
    limit = tokenizer.model_max_length if options.max_length is None else options.max_length
    return None if limit > _NO_LIMIT else limit


def _cut(row: EncodedText, length: int, side: str) -> EncodedText:
    kept = slice(0, length) if side == "right" else slice(max(0, len(row.ids) - length), None)
    return EncodedText(row.ids[kept], row.type_ids[kept], row.offsets[kept])


def _cut_pair(first: EncodedText, second: EncodedText, tokenizer: CallableTokenizer, options: CallOptions) -> list[EncodedText]:
    """Both texts of a pair, cut so that together they have the tokens that `options` allow."""
    limit, strategy = _limit(tokenizer, options), _truncation(options)
    excess = 0 if limit is None else len(first.ids) + len(second.ids) - limit
    if limit is None or excess <= 0:
        return [first, second]
    lengths = [len(first.ids), len(second.ids)]
    if strategy == "longest_first":
        shorter, longer = sorted(lengths)
        longer = shorter if shorter > limit else max(shorter, limit - shorter)
        if shorter + longer > limit:
            shorter, longer = limit // 2, limit - limit // 2
        lengths = [longer, shorter] if lengths[0] > lengths[1] else [shorter, longer]
    else:
        which = ("only_first", "only_second").index(strategy)
        if lengths[which] <= excess:
            raise RequestError(
                f"truncation={strategy!r} must have more tokens than it cuts; found {lengths[which]}, {excess} to cut. Use truncation=True"
            )
        lengths[which] -= excess
    return [_cut(part, length, tokenizer.truncation_side) for part, length in zip((first, second), lengths, strict=True)]


def _joined(parts: Sequence[EncodedText]) -> EncodedText:
    def chained(values: Any) -> list[Any]:
        return list(chain.from_iterable(values))

    return EncodedText(
        chained(part.ids for part in parts), chained(part.type_ids for part in parts), chained(part.offsets for part in parts)
    )


def _padded(row: EncodedText, count: int, padding: Padding) -> EncodedText:
    def extended(values: list[Any], filler: Any) -> list[Any]:
        return [filler] * count + values if padding.side == "left" else values + [filler] * count

    offsets = extended(row.offsets, (0, 0)) if row.offsets or not row.ids else row.offsets
    return EncodedText(extended(row.ids, padding.pad_id), extended(row.type_ids, 0), offsets, extended(row.attention, 0))
