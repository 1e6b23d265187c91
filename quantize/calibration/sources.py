"""The sources that calibrate, and how many sequences are drawn of each.

Dimension letters: `B` sequences, `H` sequences that are held out, `S` tokens of one, `n` sequences of one source.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError

__all__ = ["CalibrationSequences", "CalibrationSource", "CalibrationWarning", "draw", "sequences_to_sample"]

_HELD_OUT_SHARE = 16
"""One held-out sequence for so many that calibrate."""
_LEAST_HELD_OUT = 2
_WINDOWS_FOR_TWO, _WINDOWS_FOR_ONE = 8, 4
"""A source with fewer windows has one sequence held out, or none."""


class CalibrationWarning(UserWarning):
    """A source gives less than was asked for, or tokens that calibrate badly."""


@dataclass(frozen=True)
class CalibrationSource:
    """Tokens that calibrate, or that only measure."""

    name: str
    """As given: a file, a data set or "self"."""
    weight: float
    """The share of the sequences, relative to the weights of the other sources: 0 or more. A source of weight 0 is only measured."""
    ids: Sequence[int] | torch.Tensor
    """Its tokens, of which adjacent windows are cut; or int64 [n, S], sequences that are drawn whole."""


@dataclass(frozen=True)
class CalibrationSequences:
    """The sequences that `draw` took of all sources."""

    ids: torch.Tensor
    """int64 [B, S]: the sequences of one source stand together, in the order of the sources."""
    counts: tuple[int, ...]
    """For each source, its sequences in `ids`; 0 for a weight of 0."""
    names: tuple[str, ...]
    """Of the sources."""
    weights: tuple[float, ...]
    """Of the sources, with a sum of 1."""
    held_out: torch.Tensor
    """int64 [H, S]: sequences that nothing is fitted to, ordered as in `ids`; of a source of weight 0, all that is drawn of it."""
    held_out_counts: tuple[int, ...]
    """For each source, its sequences in `held_out`."""

    @classmethod
    def single(cls, ids: torch.Tensor, name: str = "tokens") -> CalibrationSequences:
        """Sequences [B, S] of one source, with none held out."""
        return cls(ids, (len(ids),), (name,), (1.0,), ids[:0], (0,))

    @property
    def spans(self) -> tuple[slice, ...]:
        """For each source, where its sequences are in `ids`."""
        return _spans(self.counts)

    @property
    def interleaved(self) -> tuple[torch.Tensor, list[int]]:
        """(`ids` [B, S], ordered so that each beginning has about the proportions of all, and at least a sequence of every source; the
        number of each sequence's source).
        """
        places = [(k / count, source) for source, count in enumerate(self.counts) for k in range(count)]
        order = sorted(range(len(places)), key=places.__getitem__)
        return self.ids[order], [places[n][1] for n in order]

    @property
    def held_out_spans(self) -> tuple[slice, ...]:
        """For each source, where its sequences are in `held_out`."""
        return _spans(self.held_out_counts)


def draw(sources: Sequence[CalibrationSource], *, count: int, length: int, seed: int) -> CalibrationSequences:
    """Draw sequences of all sources, by their weights and without repetition.

    The counts of the sources are proportional to their weights, rounded by largest remainders, at least 1 each and at most what a source
    has; what one source lacks is drawn of the others. Beside them, each source has a sixteenth of its share held out, at least two
    sequences where it has 8 windows or more. Of several sources the held-out sequences are taken first; a source that calibrates alone
    gives the same sequences as `sequences_of`, and has held out what these leave.

    Args:
        sources: at least one of positive weight.
        count: sequences to draw for calibration, or more than the sources have, all of which are then taken.
        length: tokens of each sequence.
        seed: of the draw, which is made for each source by itself.

    Raises:
        RequestError: a count or length below 1, fewer sequences than sources of positive weight, a seed of more than 63 bits, weights
            that are negative, not finite or all 0, two sources of one name, or a source without one whole sequence.
    """
    _check(sources, count, length, seed)
    orders, windows = [], []
    for source in sources:
        cut = _windows(source, length)
        windows.append(cut)
        orders.append(torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed)))
    total = math.fsum(source.weight for source in sources)
    weights = [source.weight / total for source in sources]
    fitted = [n for n, weight in enumerate(weights) if weight > 0]
    held_out = [_held_out(len(cut), count, weight) for cut, weight in zip(windows, weights, strict=True)]
    if len(fitted) == 1:
        (only,) = fitted
        counts = [min(count, len(cut)) if n == only else 0 for n, cut in enumerate(windows)]
        held_out[only] = min(held_out[only], len(windows[only]) - counts[only])
    else:
        shares = _apportion(count, [weights[n] for n in fitted], [len(windows[n]) - held_out[n] for n in fitted])
        counts = [0] * len(weights)
        for n, share in zip(fitted, shares, strict=True):
            counts[n] = share
    _warn(sources, windows, weights, counts, held_out, count)
    taken = [cut[order[:n].sort().values] for cut, order, n in zip(windows, orders, counts, strict=True)]
    left = [cut[order[n : n + h].sort().values] for cut, order, n, h in zip(windows, orders, counts, held_out, strict=True)]
    names = tuple(source.name for source in sources)
    return CalibrationSequences(torch.cat(taken), tuple(counts), names, tuple(weights), torch.cat(left), tuple(held_out))


def sequences_to_sample(count: int, share: float) -> int:
    """How many sequences a source must have that is sampled for `draw`, so that it gives its share and holds as many out as others do.

    Args:
        count: of all sources, as for `draw`.
        share: of the source, its weight over the sum of all; 0 for a source that is only measured.
    """
    if not share:
        return max(_LEAST_HELD_OUT, round(count / _HELD_OUT_SHARE))
    return max(_WINDOWS_FOR_TWO, math.ceil(count * share) + max(_LEAST_HELD_OUT, round(count * share / _HELD_OUT_SHARE)))


def _check(sources: Sequence[CalibrationSource], count: int, length: int, seed: int) -> None:
    if count < 1 or length < 2:
        raise RequestError(f"calibration must have at least 1 sequence of at least 2 tokens; found {count} of {length}")
    if not 0 <= seed < 1 << 63:
        raise RequestError(f"the seed of a calibration must be from 0 to 2^63 - 1; found {shortened(seed)}")
    for source in sources:
        if not 0 <= source.weight < math.inf:
            raise RequestError(
                f"{source.name}: the weight of a calibration source must be a finite number, 0 or more; found {source.weight}. Give a "
                "weight such as 2 or 0.5"
            )
    fitted = [source for source in sources if source.weight > 0]
    if not fitted:
        raise RequestError(
            f"calibration must have at least one source of positive weight; found {len(sources)} of weight 0, which are only measured. "
            "Give one of them a weight"
        )
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"each calibration source must be given once; found {name} twice. Give it once, with a larger weight")
    if count < len(fitted):
        raise RequestError(
            f"each source of positive weight must give at least one sequence; found {len(fitted)} sources for {count} sequence(s). Give a "
            "larger --sequences"
        )


def _windows(source: CalibrationSource, length: int) -> torch.Tensor:
    """int64 [n, length]: the windows of a source."""
    ids = source.ids
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        if len(ids) and ids.shape[1] == length:
            return ids
        raise RequestError(
            f"{source.name}: its sequences must have {length} tokens; found {len(ids)} sequences of {ids.shape[1]}. Give "
            f"--length {ids.shape[1]}, or sample them again"
        )
    n = len(ids) // length
    if not n:
        raise RequestError(
            f"{source.name}: a calibration text must hold at least one sequence of {length} tokens; found {len(ids)} tokens. Give a "
            "longer text, or a smaller --length"
        )
    return torch.as_tensor(ids[: n * length], dtype=torch.int64).view(n, length)


def _held_out(windows: int, count: int, weight: float) -> int:
    """How many sequences of a source are held out, if it has them to spare."""
    if windows < _WINDOWS_FOR_TWO and weight > 0:
        return int(windows >= _WINDOWS_FOR_ONE)
    share = round(count * (weight or 1.0) / _HELD_OUT_SHARE)
    most = windows // _WINDOWS_FOR_TWO if weight > 0 else windows  # a small source calibrates first
    return min(windows, max(_LEAST_HELD_OUT, min(share, most)))


def _apportion(count: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Whole numbers with the sum `count`, proportional to weights between 1 and `most`, by largest remainders.

    Quotas are min(most, max(1, weight * scale)) for the scale at which their sum is `count`.
    """
    if sum(most) <= count:
        return list(most)
    low, high = 0.0, count / min(weights)
    for _ in range(100):
        scale = (low + high) / 2
        total = math.fsum(min(top, max(1.0, weight * scale)) for weight, top in zip(weights, most, strict=True))
        low, high = (scale, high) if total < count else (low, scale)
    quotas = [round(min(top, max(1.0, weight * high)), 9) for weight, top in zip(weights, most, strict=True)]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda n: counts[n] - quotas[n])
    for n in by_remainder[: count - sum(counts)]:
        counts[n] += 1
    return counts


def _warn(
    sources: Sequence[CalibrationSource],
    windows: Sequence[torch.Tensor],
    weights: Sequence[float],
    counts: Sequence[int],
    held_out: Sequence[int],
    count: int,
) -> None:
    """Say which sources give less than their share, and of which too little is held out."""
    for source, cut, weight, taken, left in zip(sources, windows, weights, counts, held_out, strict=True):
        share = count * weight
        if taken < min(count, math.floor(share)):
            elsewhere = "the other sources give the rest" if sum(counts) == count else f"{sum(counts)} sequences calibrate in all"
            warnings.warn(
                f"{source.name}: {taken} sequences calibrate where its weight asks for {share:.4g}; it has {len(cut)} windows, and "
                f"{elsewhere}. Give a longer text for more",
                CalibrationWarning,
                stacklevel=3,
            )
        elif weight > 0 and left < _LEAST_HELD_OUT:
            warnings.warn(
                f"{source.name}: {left or 'no'} sequence(s) of its {len(cut)} are held out to measure, where {_LEAST_HELD_OUT} must be for "
                "errors on it that mean something. Give a longer text, or a smaller --sequences",
                CalibrationWarning,
                stacklevel=3,
            )


def _spans(counts: Sequence[int]) -> tuple[slice, ...]:
    ends = list(accumulate(counts))
    return tuple(slice(end - count, end) for end, count in zip(ends, counts, strict=True))
