"""The tokens of a tokenizer, on tiktoken: text to ids and back, spellings, offsets. Immutable."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dbrx_q.errors import TokenizerError

from .bpe_file import AddedToken, byte_of_character

if TYPE_CHECKING:
    import tiktoken

__all__ = ["Vocabulary"]

# fancy_regex, tiktoken's engine, fails at 1,000,000 steps that it could take back; each blank of a run is one. DBRX's pattern takes line
# ends before it comes to the alternative that steps back.
_LONGEST_RUN = 950_000
_LONG_RUN = re.compile(rf"\s{{{_LONGEST_RUN}}}")
_LONG_RUN_IN_A_LINE = re.compile(rf"[^\S\r\n]{{{_LONGEST_RUN}}}")
_LINE_ENDS = r"\s*[\r\n]+"


class Vocabulary:
    """Ordinary tokens, which tiktoken merges from bytes, and added tokens, which a text spells as they are.

    Nothing changes a vocabulary, so threads may share it; `with_tokens` makes another one.
    """

    encoding: tiktoken.Encoding
    """tiktoken's encoding of the ordinary tokens."""
    added: dict[str, int]
    """Id of every added token, by its spelling."""
    special_ids: dict[str, int]
    """Id of every special token, by its spelling; decoding can skip these."""
    ordinary_size: int
    """Number of ordinary tokens."""
    size: int
    """The largest id plus one; some ids below it may have no token."""
    ignores_merges: bool
    """Whether tokenizer.json says that a piece that is a token needs no merges."""

    def __init__(self, encoding: tiktoken.Encoding, added_tokens: Iterable[AddedToken] = (), *, ignores_merges: bool = False) -> None:
        """
        Args:
            encoding: of the ordinary tokens.
            added_tokens: tokens beside those of the encoding; a token that it has already may be repeated.
            ignores_merges: see the attribute.

        Raises:
            TokenizerError: two tokens have the same id or spelling.
        """
        self.encoding = encoding
        self.ignores_merges = ignores_merges
        self._bytes: dict[int, bytes] = {}
        for token_id in range(encoding.n_vocab):
            try:
                self._bytes[token_id] = encoding.decode_single_token_bytes(token_id)
            except KeyError:  # a gap between the ordinary tokens and the special ones
                continue
        self.added = {special: encoding.encode_single_token(special) for special in sorted(encoding.special_tokens_set)}
        self.ordinary_size = len(self._bytes) - len(self.added)
        unmarked: set[str] = set()
        for token in added_tokens:
            if self.added.setdefault(token.content, token.id) != token.id:
                raise TokenizerError(f"a special token must have one id; {token.content!r} has {self.added[token.content]} and {token.id}")
            if self._bytes.setdefault(token.id, token.content.encode()) != token.content.encode():
                taken = self._bytes[token.id].decode(errors="replace")
                raise TokenizerError(f"an id must belong to one token; {token.id} is both {taken!r} and {token.content!r}")
            if not token.special:
                unmarked.add(token.content)
        self.size = max(self._bytes) + 1
        self.special_ids = {spelling: token_id for spelling, token_id in self.added.items() if spelling not in unmarked}
        self._skipped = frozenset(self.special_ids.values())
        self._any_added = _alternatives(self.added)
        self._not_special = _alternatives(unmarked)
        self._characters = {byte: character for character, byte in byte_of_character().items()}
        self._long_run = _LONG_RUN_IN_A_LINE if _LINE_ENDS in encoding._pat_str else _LONG_RUN
        self._spellings = {token_id: spelling for spelling, token_id in self.added.items()}

    def with_tokens(self, tokens: Iterable[AddedToken]) -> Vocabulary:
        """This vocabulary and more added tokens; errors as for the constructor."""
        return Vocabulary(self.encoding, [*self.added_tokens(), *tokens], ignores_merges=self.ignores_merges)

    def added_tokens(self) -> list[AddedToken]:
        """The added tokens, in the order of their ids."""
        ordered = sorted(self.added.items(), key=lambda item: item[1])
        return [AddedToken(spelling, token_id, spelling in self.special_ids) for spelling, token_id in ordered]

    def encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: any string. A lone surrogate becomes U+FFFD.
            split_special_tokens: whether the spelling of a special token is plain text and not that token.

        Raises:
            TokenizerError: `text` holds a run of blanks so long that tiktoken fails.
        """
        pattern = self._not_special if split_special_tokens else self._any_added
        if pattern is None:
            return self.encode_plain(text)
        ids: list[int] = []
        for index, piece in enumerate(pattern.split(text)):
            if index % 2:  # the pattern is a group, so odd pieces are its matches
                ids.append(self.added[piece])
            elif piece:
                ids.extend(self.encode_plain(piece))
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text` in which every spelling of an added token is plain text; errors as for `encode`."""
        if len(text) >= _LONGEST_RUN and self._long_run.search(text):  # before the engine prints why it panics
            raise _too_many_blanks(text)
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:
            # pyo3's PanicException is no subclass of Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise _too_many_blanks(text) from None

    def offsets(self, text: str, ids: Iterable[int]) -> list[tuple[int, int]]:
        """(first character, last character + 1) in `text` of each of its tokens, which may share a character."""
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        character_of_byte = [index for index, character in enumerate(clean) for _ in range(len(character.encode()))]
        spans: list[tuple[int, int]] = []
        start = 0
        for token_id in ids:
            end = start + len(self._bytes[token_id])
            spans.append((character_of_byte[start], character_of_byte[end - 1] + 1))
            start = end
        return spans

    def token_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of `ids`, joined.

        Raises:
            TokenizerError: no token has an id of `ids`.
        """
        pieces: list[bytes] = []
        for token_id in ids:
            piece = self._bytes.get(token_id)
            if piece is None:
                raise TokenizerError(
                    f"a token id must be an integer below {self.size} that a token has; found {token_id!r}. "
                    "Mask the padding rows of the vocabulary before sampling, and replace -100 in labels before decoding"
                )
            if not (skip_special_tokens and token_id in self._skipped):
                pieces.append(piece)
        return b"".join(pieces)

    def has_token(self, token_id: object) -> bool:
        """Whether a token has this id; rows that pad the vocabulary are no tokens."""
        return token_id in self._bytes

    def spelling_of(self, token_id: int) -> str | None:
        """The token as tokenizer.json spells it, byte by byte ("Ġthe" for " the"); None where no token has the id."""
        if token_id in self._spellings:
            return self._spellings[token_id]
        raw = self._bytes.get(token_id)
        return None if raw is None else "".join(map(self._characters.__getitem__, raw))

    def id_of(self, spelling: str) -> int | None:
        """The id of a token in the spelling of `spelling_of`; None where there is none."""
        if spelling in self.added:
            return self.added[spelling]
        raw = self.bytes_of_spelling(spelling)
        if raw is None:
            return None
        try:
            return self.encoding.encode_single_token(raw)
        except KeyError:
            return None

    def bytes_of_spelling(self, spelling: str) -> bytes | None:
        """The bytes that the byte-level `spelling` stands for; None where it has a character that stands for no byte."""
        bytes_by_character = byte_of_character()
        if all(character in bytes_by_character for character in spelling):
            return bytes(map(bytes_by_character.__getitem__, spelling))
        return None

    def spellings(self) -> Iterator[tuple[str, int]]:
        """(spelling, id) of every token, in the order of the ids."""
        for token_id in sorted(self._bytes):
            spelling = self.spelling_of(token_id)
            assert spelling is not None
            yield spelling, token_id


def _alternatives(spellings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of one group that matches the longest of `spellings`; None without spellings."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _too_many_blanks(text: str) -> TokenizerError:
    return TokenizerError(
        f"text must not hold {_LONGEST_RUN:,} blanks or more in a row, on which tiktoken fails; found a run in {len(text):,} characters. "
        "Split the text there"
    )
