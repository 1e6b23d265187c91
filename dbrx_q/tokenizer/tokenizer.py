"""DBRX's tokenizer, on tiktoken.

Dimension letters: `B` texts of a batch, `S` tokens of the longest one.

Two generations of files are read: a tokenizer.json (byte-level BPE), or the files of DBRX's launch, which name an encoding of tiktoken
(cl100k_base). `encode` reads special tokens from a text only on request. The pattern that splits a text into pieces is the file's.
transformers 5 uses GPT-2's pattern instead where tokenizer_class is GPT2Tokenizer, so its ids differ (".\\n", numbers); those of the
`tokenizers` library do not.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from dbrx_q.errors import TokenizerError

from .bpe_file import AddedToken, parse_tokenizer, read_json, read_tokenizer_json, wrong
from .chat_template import check_messages, render_chat, split_chat
from .tokenizer_config import named_encoding, read_added_tokens, read_chat_template, read_token_names

if TYPE_CHECKING:
    import tiktoken
    import torch

__all__ = ["DbrxTokenizer", "StreamDecoder", "TokenBatch"]

_DBRX_SPECIALS = [AddedToken("<|pad|>", 100277, True), AddedToken("<|im_start|>", 100278, True), AddedToken("<|im_end|>", 100279, True)]
# A character of every class that patterns distinguish. A character that the pattern leaves over would be lost silently.
_PROBE = "".join(map(chr, range(128))) + "é\u0301ǅʰ中١ⅷ½\u200d\u0085\u00a0\u2028\u3000€‿\U0001f600\ue000\u0378\U000e0001"


class TokenBatch(NamedTuple):
    """Encoded texts, padded on the left."""

    input_ids: torch.Tensor
    """[B, S] int64."""
    attention_mask: torch.Tensor
    """[B, S] int64, 0 on padding and 1 elsewhere."""


class StreamDecoder:
    """Turns the ids of one sequence into text, one by one; made by `DbrxTokenizer.stream_decoder`.

    The results of all `push` calls and of `flush`, joined, equal the `decode` of these ids.
    """

    def __init__(self, tokenizer: DbrxTokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character still lacks bytes.

        Raises:
            TokenizerError: no token has this id.
        """
        return self._utf8.decode(self._tokenizer.token_bytes([token_id], skip_special_tokens=self._skip_special_tokens))

    def flush(self) -> str:
        """U+FFFD if the last character lacks bytes, else "". The next `push` starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class DbrxTokenizer:
    """Text to ids and back. Made by `from_pretrained`; immutable, so threads may share it."""

    bos_token_id: int | None
    """Id of the token that begins a text, by tokenizer_config.json; None where it names none."""
    eos_token_id: int | None
    """Id of the token that ends a text, likewise."""
    pad_token_id: int | None
    """Id of the token that pads a batch, likewise."""
    chat_template: str | None
    """The checkpoint's Jinja template; None where there is none."""

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        *,
        added_tokens: Iterable[AddedToken] = (),
        token_names: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """
        Args:
            encoding: tiktoken's encoding of the ordinary tokens.
            added_tokens: tokens beside those of the encoding; a token that it has already may be repeated.
            token_names: spellings of named tokens, such as {"pad_token": "<|pad|>"}.
            chat_template: Jinja source.

        Raises:
            TokenizerError: two tokens have the same id or spelling, or a named token is not in the vocabulary.
        """
        self._encoding = encoding
        self._table: dict[int, bytes] = {}
        for token_id in range(encoding.n_vocab):
            try:
                self._table[token_id] = encoding.decode_single_token_bytes(token_id)
            except KeyError:  # a gap between the ordinary tokens and the special ones
                continue
        self._added = {special: encoding.encode_single_token(special) for special in sorted(encoding.special_tokens_set)}
        unmarked: set[str] = set()
        for token in added_tokens:
            if self._added.setdefault(token.content, token.id) != token.id:
                raise TokenizerError(f"a special token must have one id; {token.content!r} has {self._added[token.content]} and {token.id}")
            if self._table.setdefault(token.id, token.content.encode()) != token.content.encode():
                taken = self._table[token.id].decode(errors="replace")
                raise TokenizerError(f"an id must belong to one token; {token.id} is both {taken!r} and {token.content!r}")
            if not token.special:
                unmarked.add(token.content)
        self._vocab_size = max(self._table) + 1
        self._special_ids = {spelling: token_id for spelling, token_id in self._added.items() if spelling not in unmarked}
        self._skipped = frozenset(self._special_ids.values())
        self._spellings = _alternatives(self._added)
        self._token_names = dict(token_names or {})
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")
        self.chat_template = chat_template

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> DbrxTokenizer:
        """The tokenizer of a checkpoint.

        Named tokens, added tokens and the chat template are read from tokenizer_config.json; a file chat_template.jinja takes
        precedence over its template.

        Args:
            path: a local folder with tokenizer.json, or with a tokenizer_config.json of DBRX's launch that names a tiktoken encoding.

        Raises:
            TokenizerError: a file is missing or malformed, or describes a tokenizer that tiktoken cannot represent.
        """
        folder = Path(path)
        file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not file.is_file() and not config_file.is_file():
            raise TokenizerError(
                f"{folder}: must be a local folder with tokenizer.json or tokenizer_config.json; found neither. "
                "Copy the tokenizer files of the checkpoint there"
            )
        config = read_json(config_file) if config_file.is_file() else {}
        for name in ("add_bos_token", "add_eos_token", "add_prefix_space"):
            if config.get(name):
                raise wrong(config_file, name, "false or absent (nothing is added to a text)", config[name])
        added = read_added_tokens(config_file, config)
        if file.is_file():
            parsed = read_tokenizer_json(file)
            encoding = _build_encoding(file, parsed.pattern, parsed.ranks)
            added = parsed.added + added
        else:
            encoding = named_encoding(config_file, config)
            if not added and encoding.name == "cl100k_base":
                added = _DBRX_SPECIALS
        try:
            return cls(
                encoding,
                added_tokens=added,
                token_names=read_token_names(config_file, config),
                chat_template=read_chat_template(folder, config_file, config),
            )
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        *,
        source: Path,
        token_names: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> DbrxTokenizer:
        """The tokenizer of a tokenizer.json in memory, such as one built from the contents of another file.

        Args:
            data: the JSON object.
            source: the file that `data` is from, for errors.
            token_names, chat_template: as for the constructor.

        Raises:
            TokenizerError: as `from_pretrained`.
        """
        parsed = parse_tokenizer(source, data)
        encoding = _build_encoding(source, parsed.pattern, parsed.ranks)
        return cls(encoding, added_tokens=parsed.added, token_names=token_names, chat_template=chat_template)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`; no token is added before or after them.

        Args:
            text: any string. A lone surrogate becomes U+FFFD.
            allow_special: whether the spelling of an added token is read as that token, as in `tokenizers`, or as plain text.

        Raises:
            TokenizerError: `text` is not a string, or holds a run of blanks so long (hundreds of thousands) that tiktoken fails.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a string; found {type(text).__name__}. Decode bytes, or encode a list with batch_encode")
        if not allow_special or self._spellings is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for index, piece in enumerate(self._spellings.split(text)):
            if index % 2:  # the pattern is a group, so odd pieces are its matches
                ids.append(self._added[piece])
            elif piece:
                ids.extend(self._encode_ordinary(piece))
        return ids

    def batch_encode(self, texts: Sequence[str], *, allow_special: bool = False) -> TokenBatch:
        """Encode each text and pad it on the left with `pad_token_id`, so that the last column holds the last token of every text.

        Returns:
            input_ids and attention_mask, [B, S] int64.

        Raises:
            TokenizerError: as `encode`; `texts` is a single string; or lengths differ and there is no padding token.
        """
        import torch

        if isinstance(texts, str):
            raise TokenizerError("texts must be a sequence of strings; found one string. Put it in a list")
        rows = [self.encode(text, allow_special=allow_special) for text in texts]
        width = max(map(len, rows), default=0)
        pad = self.pad_token_id
        if pad is None:
            if any(len(row) < width for row in rows):
                raise TokenizerError("a batch of different lengths must have a padding token; tokenizer_config.json names none. Add one")
            pad = 0
        input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)  # [B, S]
        attention_mask = torch.zeros_like(input_ids)  # [B, S]
        for index, row in enumerate(rows):
            start = width - len(row)
            input_ids[index, start:] = torch.tensor(row, dtype=torch.int64)
            attention_mask[index, start:] = 1
        return TokenBatch(input_ids, attention_mask)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Invalid UTF-8 becomes U+FFFD; blanks before punctuation stay, whatever the config says.

        Raises:
            TokenizerError: no token has an id, such as one of a padding row of the embedding.
        """
        return self.token_bytes(ids, skip_special_tokens=skip_special_tokens).decode("utf-8", errors="replace")

    def has_token(self, token_id: int) -> bool:
        """Whether a token has this id; rows that pad the vocabulary are no tokens."""
        return token_id in self._table

    def token_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of `ids`, joined.

        Raises:
            TokenizerError: no token has an id of `ids`.
        """
        pieces: list[bytes] = []
        for token_id in ids:
            piece = self._table.get(token_id)
            if piece is None:
                raise TokenizerError(
                    f"a token id must be an integer below {self.vocab_size} that a token has; found {token_id!r}. "
                    "Mask the padding rows of the vocabulary before sampling"
                )
            if not (skip_special_tokens and token_id in self._skipped):
                pieces.append(piece)
        return b"".join(pieces)

    def stream_decoder(self, *, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder that takes ids one by one and returns whole characters only."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        tokenize: Literal[True] = True,
        template: str | None = None,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        tokenize: Literal[False],
        template: str | None = None,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        template: str | None = None,
    ) -> list[int] | str:
        """The prompt for a conversation. Only the template writes special tokens; one that a message spells stays text.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text}, ...].
            add_generation_prompt: whether to open the assistant's turn.
            tokenize: True for ids; False for the text, in which special tokens and text that spells one cannot be told apart.
            template: Jinja source to use instead of the checkpoint's.

        Raises:
            TokenizerError: there is no template, the messages have another form, or the template fails on them.
        """
        checked = check_messages(messages)
        template = self.chat_template if template is None else template
        if template is None:
            raise TokenizerError(
                "a chat must have a template; the checkpoint's tokenizer_config.json has no chat_template. "
                "Pass template=, add chat_template.jinja to the checkpoint, or write the prompt yourself and use encode"
            )
        if not tokenize:
            return render_chat(template, checked, add_generation_prompt=add_generation_prompt, token_names=self._token_names)
        segments = split_chat(
            template,
            checked,
            add_generation_prompt=add_generation_prompt,
            token_names=self._token_names,
            specials=self._added,
        )
        ids: list[int] = []
        for segment in segments:
            ids.extend([self._added[segment.text]] if segment.is_special else self.encode(segment.text))
        return ids

    def turn_end_ids(self, template: str | None = None) -> tuple[int, ...]:
        """Ids of the special token that ends the assistant's turn in a chat template; () where no special token does.

        Args:
            template: Jinja source to use instead of the checkpoint's.
        """
        template = self.chat_template if template is None else template
        if template is None:
            return ()
        probe = "Ninety-nine"
        messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": probe}]
        try:
            segments = split_chat(
                template, messages, add_generation_prompt=False, token_names=self._token_names, specials=self._special_ids
            )
        except TokenizerError:  # the template wants other messages; generation_config.json and the end token remain
            return ()
        last = max((index for index, segment in enumerate(segments) if probe in segment.text), default=len(segments))
        ends = [self._special_ids[segment.text] for segment in segments[last + 1 :] if segment.is_special]
        return tuple(ends[:1])

    @property
    def special_tokens(self) -> dict[str, int]:
        """Id of every special token, by its spelling."""
        return dict(self._special_ids)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, special tokens included; some ids below it may have no token."""
        return self._vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"DbrxTokenizer(vocab_size={self.vocab_size}, special_tokens={self._special_ids})"

    def _id_of(self, name: str) -> int | None:
        spelling = self._token_names.get(name)
        if spelling is None:
            return None
        try:
            return self._added[spelling] if spelling in self._added else self._encoding.encode_single_token(spelling)
        except KeyError:
            raise TokenizerError(f"{name} must be a token of the vocabulary; found {spelling!r}. Correct tokenizer_config.json") from None

    def _encode_ordinary(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's regex engine overflows its stack on such runs; pyo3's PanicException is no subclass of Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"text must not hold hundreds of thousands of blanks in a row; tiktoken failed on {len(text)} characters. Split the text"
            ) from None


def _alternatives(spellings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of one group that matches the longest of `spellings`; None without spellings."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _build_encoding(file: Path, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    import tiktoken

    try:
        encoding = tiktoken.Encoding("dbrx", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise wrong(file, "pre_tokenizer: pattern", f"a regular expression that tiktoken reads ({error})", pattern) from None
    for text in (_PROBE, *_PROBE):
        if encoding.decode_bytes(encoding.encode_ordinary(text)) != text.encode():
            raise wrong(file, "pre_tokenizer: pattern", f"one that leaves no character over, as it does in {text!r}", pattern)
    return encoding
