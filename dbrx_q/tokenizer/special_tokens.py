"""The named tokens of a tokenizer, such as `eos_token`, and the tokens that a user adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from dbrx_q.errors import TokenizerError

from .bpe_file import AddedToken, check_spelling
from .tokenizer_config import NAMED_TOKENS
from .vocabulary import Vocabulary

__all__ = ["SpecialTokens"]


class _NamedToken:
    """The spelling of a named token, or None; setting it takes a token that the vocabulary has."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokens: None, owner: type) -> _NamedToken: ...

    @overload
    def __get__(self, tokens: SpecialTokens, owner: type) -> str | None: ...

    def __get__(self, tokens: SpecialTokens | None, owner: type) -> _NamedToken | str | None:
        return self if tokens is None else tokens._names.get(self.name)

    def __set__(self, tokens: SpecialTokens, value: str | None) -> None:
        tokens._set_name(self.name, value)


class _NamedTokenId:
    """The id of a named token, or None; setting it names the token with that id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    @overload
    def __get__(self, tokens: None, owner: type) -> _NamedTokenId: ...

    @overload
    def __get__(self, tokens: SpecialTokens, owner: type) -> int | None: ...

    def __get__(self, tokens: SpecialTokens | None, owner: type) -> _NamedTokenId | int | None:
        if tokens is None:
            return self
        spelling = tokens._names.get(self.name)
        return None if spelling is None else tokens.vocabulary.id_of(spelling)

    def __set__(self, tokens: SpecialTokens, value: int | None) -> None:
        spelling = None if value is None else tokens.vocabulary.spelling_of(value)
        if value is not None and spelling is None:
            raise TokenizerError(f"{self.name}_id must be the id of a token; found {value!r}. Add the token with add_special_tokens")
        tokens._set_name(self.name, spelling)


class SpecialTokens:
    """The part of `DbrxTokenizer` that knows special and added tokens; names are those of transformers."""

    vocabulary: Vocabulary
    """The tokens; replaced where tokens are added."""
    extra_special_tokens: list[str]
    """Spellings of special tokens without a name, as tokenizer_config.json lists them."""

    bos_token, bos_token_id = _NamedToken(), _NamedTokenId()
    eos_token, eos_token_id = _NamedToken(), _NamedTokenId()
    unk_token, unk_token_id = _NamedToken(), _NamedTokenId()
    sep_token, sep_token_id = _NamedToken(), _NamedTokenId()
    pad_token, pad_token_id = _NamedToken(), _NamedTokenId()
    cls_token, cls_token_id = _NamedToken(), _NamedTokenId()
    mask_token, mask_token_id = _NamedToken(), _NamedTokenId()

    def __init__(self, vocabulary: Vocabulary, names: Mapping[str, str], extra: Iterable[str] = ()) -> None:
        """
        Args:
            vocabulary: the tokens.
            names: spellings of named tokens, such as {"pad_token": "<|pad|>"}.
            extra: see `extra_special_tokens`.

        Raises:
            TokenizerError: a named token is not in the vocabulary.
        """
        self.vocabulary = vocabulary
        self._names: dict[str, str] = {}
        for name, spelling in names.items():
            self._set_name(name, spelling)
        self.extra_special_tokens = list(extra)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Id of every special token, by its spelling."""
        return dict(self.vocabulary.special_ids)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Spelling of every named token that is set, such as {"eos_token": "<|endoftext|>"}."""
        return {name: self._names[name] for name in NAMED_TOKENS if name in self._names}

    @property
    def all_special_tokens(self) -> list[str]:
        """Spellings of the named tokens and of `extra_special_tokens`; `special_tokens` has more, such as <|im_end|>."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        ids = [self.vocabulary.id_of(spelling) for spelling in self.all_special_tokens]
        return [token_id for token_id in ids if token_id is not None]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The name of `extra_special_tokens` before transformers 5."""
        return self.extra_special_tokens

    @additional_special_tokens.setter
    def additional_special_tokens(self, value: Sequence[str]) -> None:
        self.extra_special_tokens = list(value)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Every added token, by its id."""
        return {token.id: token for token in self.vocabulary.added_tokens()}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Id of every added token, by its spelling."""
        return {token.content: token.id for token in self.vocabulary.added_tokens()}

    def get_added_vocab(self) -> dict[str, int]:
        """Id of every added token, by its spelling."""
        return self.added_tokens_encoder

    def add_tokens(self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Add tokens with the next free ids; a model needs `resize_token_embeddings(len(tokenizer))` for ids beyond its vocabulary.

        Args:
            new_tokens: spellings; one that is a token already keeps its id.
            special_tokens: whether decoding can skip them.

        Returns:
            How many tokens were added.

        Raises:
            TokenizerError: an empty spelling, or one with a lone surrogate.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) or not isinstance(new_tokens, (list, tuple)) else list(new_tokens)
        if isinstance(new_tokens, AddedToken):
            tokens = [new_tokens]
        added: list[AddedToken] = []
        next_id = self.vocabulary.size
        known = set(self.vocabulary.added)
        for token in tokens:
            spelling = str(getattr(token, "content", token))
            check_spelling("a new token", spelling)
            if spelling in known:
                continue
            known.add(spelling)
            token_id = self.vocabulary.id_of(spelling)
            if token_id is None:
                token_id, next_id = next_id, next_id + 1
            added.append(AddedToken(spelling, token_id, special_tokens or bool(getattr(token, "special", False))))
        if added:
            self.vocabulary = self.vocabulary.with_tokens(added)
        return len(added)

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Name tokens, and add those that the vocabulary lacks.

        Args:
            special_tokens_dict: such as {"pad_token": "[PAD]", "extra_special_tokens": ["<a>"]}.
            replace_extra_special_tokens: whether the listed extra tokens take the place of those that the tokenizer lists.

        Returns:
            How many tokens were added.

        Raises:
            TokenizerError: a name that no token has.
        """
        count = 0
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                spellings = [str(getattr(token, "content", token)) for token in value]
                count += self.add_tokens(spellings, special_tokens=True)
                kept = [] if replace_extra_special_tokens else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*kept, *spellings]))
            elif name in NAMED_TOKENS:
                spelling = str(getattr(value, "content", value))
                count += self.add_tokens(spelling, special_tokens=True)
                self._set_name(name, spelling)
            else:
                rule = f"a named token must be one of {', '.join(NAMED_TOKENS)} or extra_special_tokens"
                raise TokenizerError(f"{rule}; found {name!r}. Put a token without a name into extra_special_tokens")
        return count

    def _set_name(self, name: str, value: object) -> None:
        spelling = None if value is None else getattr(value, "content", value)
        if spelling is None:
            self._names.pop(name, None)
        elif not isinstance(spelling, str) or self.vocabulary.id_of(spelling) is None:
            raise TokenizerError(
                f"{name} must be a token of the vocabulary; found {spelling!r}. Correct tokenizer_config.json, or add the token with "
                f"add_special_tokens({{{name!r}: {spelling!r}}})"
            )
        else:
            self._names[name] = spelling
