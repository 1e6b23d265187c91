"""Checks of single values of a configuration: their types, and bounds that no DBRX exceeds."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from .errors import ConfigError

__all__ = [
    "MOST_EXPERTS",
    "MOST_HEADS",
    "MOST_LAYERS",
    "MOST_POSITIONS",
    "MOST_TOKENS",
    "MOST_WIDTH",
    "any_number",
    "positive_float",
    "positive_int",
    "probability",
    "shortened",
    "token_ids",
]

# DBRX has 40 layers, 16 experts, 48 heads, a width of 6,144 (experts 10,752), 100,352 tokens and a context of 32,768. Larger models of its
# kind are admitted, up to sizes whose tables of tensors and experts stay small beside their weights.
MOST_LAYERS = 1_000
MOST_EXPERTS = 1_024
MOST_HEADS = 4_096
MOST_WIDTH = 1 << 18
MOST_TOKENS = 1 << 24
MOST_POSITIONS = 1 << 24  # up to here float32, in which angles are computed, has every whole number
_LARGEST = 1e15  # of a real number
_WORDS = 80  # characters of an offending value that an error shows


def shortened(value: Any) -> str:
    """The value as error messages show it, at most about a line long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length():,} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _WORDS
    short.maxlist = short.maxdict = short.maxtuple = 8
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 4 * _WORDS else f"{text[: 4 * _WORDS]}..."


def positive_int(name: str, value: Any, most: int) -> int:
    """The value of a key, a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; found {shortened(value)}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most:,}, far above that of any DBRX; found {shortened(value)}")
    return value


def positive_float(name: str, value: Any, most: float = _LARGEST) -> float:
    """The value of a key, a number above 0 and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:  # NaN compares as False
        raise ConfigError(f"{name} must be a finite number above 0; found {shortened(value)}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most:g}; found {shortened(value)}")
    return float(value)


def any_number(name: str, value: Any) -> float:
    """The value of a key, a finite number of either sign."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(f"{name} must be a number from {-_LARGEST:g} to {_LARGEST:g}; found {shortened(value)}")
    return value


def probability(name: str, value: Any) -> float:
    """The value of a key, a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a probability between 0 and 1; found {shortened(value)}")
    return float(value)


def token_ids(value: Any) -> Any:
    """The value of a key that names special tokens: None, a token id, or a list of them; -1 stands for no token."""
    for one in value if isinstance(value, list) else [value]:
        if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not -1 <= one < MOST_TOKENS):
            raise ConfigError(f"pad_token_id, bos_token_id and eos_token_id must be token ids; found {shortened(value)}")
    return value
