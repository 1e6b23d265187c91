"""A tokenizer as a function: calls, decoding, and the names of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dbrx_q.errors import TokenizerError

from .batch_encoding import BatchEncoding, as_lists
from .call import CallOptions, EncodedText, batch_of, call_options, encode_text, pad_rows, padding_of
from .special_tokens import SpecialTokens

__all__ = ["CallableTokenizer"]


class CallableTokenizer(SpecialTokens):
    """The part of `DbrxTokenizer` that turns texts into ids and back; names are those of transformers."""

    is_fast = True
    """As transformers says of tokenizers that know offsets."""
    padding_side: str
    """The side that calls pad, "left" or "right" (the default). Models that generate want "left"."""
    truncation_side: str
    """The side that calls cut, "left" or "right"."""
    model_max_length: int
    """Tokens that the model takes, by tokenizer_config.json; `int(1e30)` where it names none."""
    model_input_names: list[str]
    """What a call returns by default."""
    split_special_tokens: bool
    """Whether calls read the spelling of a special token as plain text by default."""
    clean_up_tokenization_spaces: bool
    """Kept and without effect, as in transformers for byte-level BPE."""
    trims_offsets: bool
    """Whether the offsets of a token leave out the blank that it begins with."""
    pad_token_type_id = 0
    """What `token_type_ids` holds on padding."""

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        text_pair: str | Sequence[str] | None = None,
        text_target: str | Sequence[str] | None = None,
        text_pair_target: str | Sequence[str] | None = None,
        **options: Any,
    ) -> BatchEncoding | Any:
        """Encode a text, a list of texts, or pairs of texts.

        Args:
            text: one text or a list of them; a list may hold pairs, as tuples.
            text_pair: the second text of a pair, or of every pair. Its tokens follow those of the first; DBRX puts none between them.
            text_target, text_pair_target: texts whose ids are returned as "labels".
            options: `CallOptions` documents them.

        Returns:
            input_ids and attention_mask, and what else `options` ask for: lists of one text, lists of lists of several, or tensors [B, S].

        Raises:
            TokenizerError: a text is no string, or a batch cannot be padded or made a tensor.
            RequestError: an option is out of range.
            TypeError: an unknown option.
        """
        if text is None and text_target is None:
            raise TokenizerError("a call must have text or text_target; found neither. Pass a string or a list of strings")
        if text is None:
            return self._encoded(text_target, text_pair_target, call_options(options))
        encoding = self._encoded(text, text_pair, call_options(options))
        if text_target is not None:
            encoding["labels"] = self._encoded(text_target, text_pair_target, call_options(options))["input_ids"]
        return encoding

    def _encoded(self, text: Any, pair: Any, options: CallOptions) -> Any:
        is_batch = isinstance(text, (list, tuple))
        texts = list(text) if is_batch else [text]
        pairs: list[Any] = list(pair) if isinstance(pair, (list, tuple)) else [pair] * (1 if not is_batch or pair is None else 0)
        if is_batch and pair is None:
            pairs = [item[1] if _is_pair(item) else None for item in texts]
            texts = [item[0] if _is_pair(item) else item for item in texts]
        if len(texts) != len(pairs):
            raise TokenizerError(f"text_pair must have a text for each of the {len(texts)} texts; found {len(pairs)}. Give as many")
        padding = padding_of(self, options)
        rows = pad_rows([encode_text(self, *both, options) for both in zip(texts, pairs, strict=True)], padding)
        encoding = batch_of(self, rows, options, is_batch=is_batch)
        return encoding if options.return_dict else encoding["input_ids"]

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The ids of a text: a list, or with `return_tensors` a tensor [1, S]. No token is added before or after them.

        The spelling of a special token in the text is that token; with `split_special_tokens=True` it is plain text, as texts of others
        should be.

        Args:
            text, text_pair, options: as for a call.

        Raises:
            TokenizerError: `text` is not a string, or holds a run of blanks so long (a million) that tiktoken fails.
        """
        if isinstance(text, str) and text_pair is None and not options.keys() - {"split_special_tokens", "add_special_tokens"}:
            split = options.get("split_special_tokens")
            return self.vocabulary.encode(text, split_special_tokens=self.split_special_tokens if split is None else split)
        return self(text, text_pair, **{**options, "return_dict": False})

    def batch_encode(self, texts: Sequence[Any], **options: Any) -> BatchEncoding:
        """A call that pads to the longest text and returns torch tensors, [B, S], unless `options` say otherwise."""
        if isinstance(texts, str):
            raise TokenizerError("texts must be a sequence of strings; found one string. Put it in a list")
        return self(list(texts), **{"padding": True, "return_tensors": "pt", **options})

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **options: Any) -> BatchEncoding:
        """A call with a list of texts or pairs, by its name before transformers 5."""
        return self(list(batch_text_or_text_pairs), **options)

    def encode_plus(self, text: str, text_pair: str | None = None, **options: Any) -> BatchEncoding:
        """A call with one text or pair, by its name before transformers 5."""
        return self(text, text_pair, **options)

    def tokenize(self, text: str, pair: str | None = None, **options: Any) -> list[str]:
        """The tokens of a text, as tokenizer.json spells them ("Ġthe" for " the")."""
        ids = self.encode(text, pair, **options)
        return [self.vocabulary.spelling_of(token_id) or "" for token_id in ids]

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad what calls returned, as a collator does.

        Args:
            encoded_inputs: an encoding, or a list of encodings of one text each. Values besides input_ids, attention_mask, token_type_ids
                and special_tokens_mask are returned as they are.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors: as for a call.
            verbose: has no effect.

        Raises:
            TokenizerError: there are no input_ids, or as for a call.
        """
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs:
            encoded_inputs = {name: [entry[name] for entry in encoded_inputs] for name in encoded_inputs[0]}
        if not isinstance(encoded_inputs, Mapping) or "input_ids" not in encoded_inputs:
            raise TokenizerError("pad must be given input_ids; found none. Give what a call of the tokenizer returned")
        data = {name: as_lists(value) for name, value in encoded_inputs.items()}
        is_batch = bool(data["input_ids"]) and isinstance(data["input_ids"][0], (list, tuple))
        if not is_batch:
            data = {name: [value] for name, value in data.items()}
        names = self.model_input_names
        has_mask = "attention_mask" in data or ("attention_mask" in names if return_attention_mask is None else return_attention_mask)
        options = call_options(
            {
                "padding": padding,
                "max_length": max_length,
                "truncation": False,
                "pad_to_multiple_of": pad_to_multiple_of,
                "padding_side": padding_side,
                "return_attention_mask": has_mask,
                "return_token_type_ids": "token_type_ids" in data,
                "return_special_tokens_mask": "special_tokens_mask" in data,
            }
        )
        rows = [
            EncodedText(
                list(ids),
                list(data["token_type_ids"][index]) if "token_type_ids" in data else [0] * len(ids),
                attention=list(data["attention_mask"][index]) if "attention_mask" in data else [1] * len(ids),
            )
            for index, ids in enumerate(data["input_ids"])
        ]
        padded = batch_of(self, pad_rows(rows, padding_of(self, options)), options, is_batch=True)
        result = {**data, **padded}
        if not is_batch:
            result = {name: value[0] for name, value in result.items()}
        return BatchEncoding(result, tensor_type=return_tensors)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None) -> Any:
        """The text of ids, or the texts of several rows. Invalid UTF-8 becomes U+FFFD.

        Args:
            token_ids: one id, a list, a tensor or an array of ids; or rows of them, for a list of texts.
            skip_special_tokens: whether to leave out special tokens.
            clean_up_tokenization_spaces: has no effect: blanks before punctuation stay, as in transformers for byte-level BPE.

        Raises:
            TokenizerError: no token has an id, such as one of a padding row of the embedding.
        """
        ids = as_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens) for row in ids]
        ids = ids if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
        return self.vocabulary.token_bytes(ids, skip_special_tokens=skip_special_tokens).decode("utf-8", errors="replace")

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The text of each row of `sequences`; arguments and errors as for `decode`."""
        rows = as_lists(sequences)
        rows = rows if not rows or isinstance(rows[0], (list, tuple)) else [rows]
        return [self.decode(row, skip_special_tokens) for row in rows]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The spelling of an id, or of each id, as tokenizer.json has it; None where no token has the id."""
        ids = as_lists(ids)
        if isinstance(ids, int):
            return self.vocabulary.spelling_of(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.vocabulary.spelling_of(int(token_id)) for token_id in ids if int(token_id) not in skipped]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token in the spelling of `convert_ids_to_tokens`, or of each; that of `unk_token` where there is no such token."""
        if isinstance(tokens, str):
            token_id = self.vocabulary.id_of(tokens)
            return self.unk_token_id if token_id is None else token_id
        return [self.convert_tokens_to_ids(str(token)) for token in tokens]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens in the spelling of `convert_ids_to_tokens`."""
        pieces = [token.encode() if token in self.vocabulary.added else self.vocabulary.bytes_of_spelling(token) for token in tokens]
        return b"".join(piece if piece is not None else token.encode() for piece, token in zip(pieces, tokens, strict=True)).decode(
            errors="replace"
        )

    def get_vocab(self) -> dict[str, int]:
        """Id of every token, by its spelling."""
        return dict(self.vocabulary.spellings())

    @property
    def vocab(self) -> dict[str, int]:
        """As `get_vocab`."""
        return self.get_vocab()

    @property
    def vocab_size(self) -> int:
        """Number of ordinary tokens; `len(tokenizer)` counts added ones too."""
        return self.vocabulary.ordinary_size

    def __len__(self) -> int:
        """The largest id plus one, added tokens included; some ids below it may have no token."""
        return self.vocabulary.size

    def __bool__(self) -> bool:
        return True

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """0: DBRX adds no token to a text or a pair."""
        return 0

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """The ids of a text or a pair, with no token added."""
        return token_ids_0 + (token_ids_1 or [])

    def get_special_tokens_mask(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each id of `all_special_ids`, 0 for others."""
        special = set(self.all_special_ids)
        return [int(int(token_id) in special) for token_id in [*token_ids_0, *(token_ids_1 or ())]]

    def offsets_of(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """(first character, last character + 1) of each token of `text`; without its first blank where `trims_offsets` says so."""
        spans = self.vocabulary.offsets(text, ids)
        if not self.trims_offsets:
            return spans
        trimmed = []
        for (first, last), token_id in zip(spans, ids, strict=True):
            spelling = self.vocabulary.spelling_of(token_id) or ""
            first = min(first + len(spelling) - len(spelling.lstrip("\u0120")), last)  # U+0120 spells a blank
            trailing = len(spelling) - len(spelling.rstrip("\u0120"))
            trimmed.append((first, max(last - trailing, first) if last >= trailing else last))
        return trimmed


def _is_pair(item: object) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2
