"""The search for the best stream of a trellis code, in plain torch, and its arithmetic, which every implementation shares bit for bit.

A column of 128 rows is one circular stream of k bits per row (`trellis.py`). Its states are the windows of L bits, so the state of position
p - 1 is (state of p << k | the k bits of position p - 1) mod 2^L. Positions are visited from the last to the first; the Viterbi algorithm
keeps for each of the Q = 2^(L-k) ends that states share the path of least cost.

Costs are whole numbers. Level l of a row costs min(CAP, floor(unit (x - l)^2 + 1/2) - the least of these), in float32, x the element in
units of the row's scale. Sums have 16 bits and saturate; after every eighth position the least sum is subtracted. Of equal costs the state
with the lower predecessor wins.

The stream is circular: the bits above the last position's are those of the first. A first pass begins at the middle of the column with all
states alike, goes around once, and its bits at position 0 are taken for good; the second pass begins and ends with them. The first pass
needs no accuracy, so its costs and sums are bytes: a cost c becomes min(NARROW_CAP, floor((c + 32) / 64)), and the least sum is subtracted
after every second position.

Dimension letters: `B` columns of 128 rows, `S` states, `Q` states without their last k bits, `n` levels.
"""

from __future__ import annotations

import torch

from .trellis_codes import TrellisCode

__all__ = ["CAP", "COST_UNIT", "NARROW_CAP", "NARROW_RENEW", "NARROW_SHIFT", "RENEW", "ROWS", "encode_reference", "level_costs"]

ROWS = 128
"""Positions of a stream."""
COST_UNIT = 4096
"""The cost of an error whose square is the mean square of a row."""
CAP = 8191
"""The largest cost of one element."""
RENEW = 8
"""Positions after which the least sum is subtracted; so many costs fit a sum."""
NARROW_SHIFT = 6
"""Bits that costs lose in the first pass."""
NARROW_CAP = 127
"""The largest cost of one element in the first pass."""
NARROW_RENEW = 2
"""`RENEW` of the first pass."""


def level_costs(x: torch.Tensor, unit: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """int32 [..., n]: the costs of all levels for elements `x` [...] in units of the rows' scales; unit: float32 [...]."""
    away = x.float().unsqueeze(-1) - code.level_table(x.device).float()
    costs = (away * away * unit.unsqueeze(-1) + 0.5).floor()
    return (costs - costs.amin(-1, keepdim=True)).clamp(max=CAP).int()


def encode_reference(x: torch.Tensor, unit: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """The k bits of each position, uint8 [B, 128], of the streams that the search finds.

    Args:
        x: float32 [B, 128], by position, in units of the rows' scales.
        unit: float32 [B, 128], costs per squared unit.
        code: the code.
    """
    costs = level_costs(x, unit, code)
    middle = ROWS // 2
    first = torch.cat((torch.arange(middle - 1, -1, -1), torch.arange(ROWS - 1, middle - 1, -1)))
    narrow = ((costs[:, first] + (1 << NARROW_SHIFT - 1)) >> NARROW_SHIFT).clamp(max=NARROW_CAP)
    states = _pass(narrow, code, None, 255, NARROW_RENEW)
    ends = states[:, middle - 1] & (code.ends - 1)
    states = _pass(costs.flip(1), code, ends, 65535, RENEW)
    return (states.flip(1) & (2**code.bits - 1)).to(torch.uint8)


def _pass(costs: torch.Tensor, code: TrellisCode, ends: torch.Tensor | None, most: int, renew: int) -> torch.Tensor:
    """int64 [B, T]: the states of the cheapest path, in the order of `costs` [B, T, n].

    ends: the bits [B] with which the path begins and ends; None for the best of all, of equals the lowest. most: the largest sum. renew:
    positions after which the least sum is subtracted.
    """
    B, T = costs.shape[:2]
    Q, choices = code.ends, 2**code.bits
    index = code.index_table(costs.device).long()
    lower = torch.arange(choices, dtype=torch.int32)[:, None]  # decides between equal costs
    if ends is None:
        sums = torch.zeros(B, Q, dtype=torch.int32)
    else:
        sums = torch.full((B, Q), most, dtype=torch.int32).scatter_(1, ends[:, None], 0)
    chosen = torch.empty(T, B, Q, dtype=torch.uint8)
    for t in range(T):
        totals = (sums.repeat_interleave(choices, 1) + costs[:, t][:, index]).clamp_(max=most)
        least = (totals.view(B, choices, Q) * choices + lower).amin(1)
        sums, chosen[t] = least // choices, least % choices
        if t % renew == renew - 1:
            sums -= sums.amin(1, keepdim=True)
    end = (sums * Q + torch.arange(Q, dtype=torch.int32)).amin(1).long() % Q if ends is None else ends
    states = torch.empty(B, T, dtype=torch.int64)
    for t in range(T - 1, -1, -1):
        states[:, t] = chosen[t].gather(1, end[:, None])[:, 0].long() * Q + end
        end = states[:, t] >> code.bits
    return states
