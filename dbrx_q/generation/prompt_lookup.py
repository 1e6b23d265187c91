"""Tokens that are copied from an earlier match in the sequence (prompt lookup decoding, Saxena 2023), for one step to verify."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["candidates"]


def candidates(ids: Sequence[int], count: int, longest_match: int, ends: Collection[int], room: int) -> list[int]:
    """The tokens that followed the first earlier occurrence of the last tokens of `ids`; longer matches go first.

    Args:
        ids: the sequence so far.
        count: most tokens to return.
        longest_match: tokens of the longest match.
        ends: a candidate of these ends the result, without it.
        room: most tokens that the sequence may still get.
    """
    n = len(ids)
    for size in range(min(longest_match, n - 1), 0, -1):
        end = list(ids[n - size :])
        for start in range(n - size):
            if list(ids[start : start + size]) == end:
                copied = list(ids[start + size : start + size + min(count, max(0, room - 1))])
                stop = next((i for i, token in enumerate(copied) if token in ends), len(copied))
                return copied[:stop]
    return []
