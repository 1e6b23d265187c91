"""The calibration tokens: sequences of one length from a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError

__all__ = ["sequences_of"]


def sequences_of(ids: Sequence[int], *, count: int, length: int, seed: int) -> torch.Tensor:
    """int64 [B, length]: adjacent windows of the text, drawn without repetition, in the order of the text.

    Args:
        ids: the tokens of the text.
        count: B, or more than the text has windows, all of which are then taken.
        length: tokens of each sequence.
        seed: of the draw.

    Raises:
        RequestError: a count or length below 1, a seed of more than 63 bits, or a text shorter than one sequence.
    """
    if count < 1 or length < 2:
        raise RequestError(f"calibration must have at least 1 sequence of at least 2 tokens; found {count} of {length}")
    windows = len(ids) // length
    if not windows:
        raise RequestError(
            f"a calibration text must hold at least one sequence of {length} tokens; found {len(ids)}. Give a longer text, or a smaller "
            "--length"
        )
    if not 0 <= seed < 1 << 63:
        raise RequestError(f"the seed of a calibration must be from 0 to 2^63 - 1; found {shortened(seed)}")
    drawn = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.tensor(ids[: windows * length]).view(windows, length)[drawn]
