"""Whether two tokenizers are the same, so that figures over their tokens can be compared."""

from __future__ import annotations

from dbrx_q.errors import RequestError
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

__all__ = ["check_same_tokenizer"]

_NEXT_STEP = "Compare checkpoints of one tokenizer"


def check_same_tokenizer(
    reference: DbrxTokenizer, other: DbrxTokenizer, text: str | None = None, *, names: tuple[str, str] = ("the reference", "the other")
) -> None:
    """Refuse two tokenizers that differ in a token, in which tokens are special, or in how they split `text`.

    Args:
        reference, other: the tokenizers.
        text: the text to be measured; without it, tokenizers that split words by different rules pass.
        names: of the two, for the error.

    Raises:
        RequestError: names the first difference.
    """
    for token_id in range(max(len(reference), len(other))):
        ours, theirs = _token(reference, token_id), _token(other, token_id)
        if ours != theirs:
            _refuse(f"token {token_id} is {ours} and {theirs}", names)
    if reference.special_tokens != other.special_tokens:
        pairs = set(reference.special_tokens.items()) ^ set(other.special_tokens.items())
        spelling, token_id = min(pairs, key=lambda pair: (pair[1], pair[0]))
        ours, theirs = ("special" if spelling in tokenizer.special_tokens else "not special" for tokenizer in (reference, other))
        _refuse(f"token {token_id} ({spelling!r}) is {ours} and {theirs}", names)
    if text is not None:
        _check_text(reference, other, text, names)


def _check_text(reference: DbrxTokenizer, other: DbrxTokenizer, text: str, names: tuple[str, str]) -> None:
    ours, theirs = (tokenizer.encode(text, split_special_tokens=True) for tokenizer in (reference, other))
    if ours == theirs:
        return
    # The bytes of both token lists are those of the text, so neither list is a prefix of the other.
    position = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    character = len(reference.token_bytes(ours[:position]).decode("utf-8", errors="ignore"))
    pieces = (
        f"{token_id} ({tokenizer.decode([token_id])!r})" for tokenizer, token_id in ((reference, ours[position]), (other, theirs[position]))
    )
    _refuse(f"they split the text differently at character {character}: token {position} is {' and '.join(pieces)}", names)


def _token(tokenizer: DbrxTokenizer, token_id: int) -> str:
    if not tokenizer.has_token(token_id):
        return "no token"
    raw = tokenizer.token_bytes([token_id])
    try:
        return repr(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(raw)


def _refuse(difference: str, names: tuple[str, str]) -> None:
    raise RequestError(f"the tokenizers of {names[0]} and {names[1]} must be the same; {difference}. {_NEXT_STEP}")
