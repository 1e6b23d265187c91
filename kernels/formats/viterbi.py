"""The search for the best stream of a trellis code, in plain torch, and its arithmetic, which every implementation shares bit for bit.

A column of 128 rows is one circular stream of k bits per row (`trellis.py`). Its states are the windows of L bits, so the state of position
p - 1 is (state of p << k | the k bits of position p - 1) mod 2^L. Positions are visited from the last to the first; the Viterbi algorithm
keeps for each of the Q = 2^(L-k) ends that states share the path of least cost.

Costs are whole numbers. Level l of a row costs min(CAP, floor(unit (x - l)^2 + 1/2) - the least of these), in float32, x the element in
units of the row's scale. Sums saturate at 65535, and after every fourth position the least sum is subtracted. Of equal costs the state with
the lower predecessor wins.

The stream is circular: the bits above the last position's are those of the first. A first pass begins at the middle of the column with all
states alike, goes around once, and its bits at position 0 are taken for good; the second pass begins and ends with them.

Dimension letters: `B` columns of 128 rows, `S` states, `Q` states without their last k bits, `n` levels.
"""

from __future__ import annotations

import torch

from .trellis_codes import TrellisCode

__all__ = ["CAP", "COST_UNIT", "ROWS", "encode_reference", "level_costs"]

ROWS = 128
"""Positions of a stream."""
COST_UNIT = 4096
"""The cost of an error whose square is the mean square of a row."""
CAP = 8191
"""The largest cost of one element."""
_MOST = 65535
_RENEW = 4


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
    states = _pass(costs[:, first], code, None)
    ends = states[:, middle - 1] & (code.ends - 1)
    states = _pass(costs.flip(1), code, ends)
    return (states.flip(1) & (2**code.bits - 1)).to(torch.uint8)


def _pass(costs: torch.Tensor, code: TrellisCode, ends: torch.Tensor | None) -> torch.Tensor:
    """int64 [B, T]: the states of the cheapest path, in the order of `costs` [B, T, n]; it begins and ends with the bits `ends`, [B]."""
    B, T = costs.shape[:2]
    Q, choices = code.ends, 2**code.bits
    index = code.index_table(costs.device).long()
    lower = torch.arange(choices, dtype=torch.int32)[:, None]  # decides between equal costs
    if ends is None:
        sums = torch.zeros(B, Q, dtype=torch.int32)
    else:
        sums = torch.full((B, Q), _MOST, dtype=torch.int32).scatter_(1, ends[:, None], 0)
    chosen = torch.empty(T, B, Q, dtype=torch.uint8)
    totals = torch.empty(B, 0)
    for t in range(T):
        totals = (sums.repeat_interleave(choices, 1) + costs[:, t][:, index]).clamp_(max=_MOST)
        least = (totals.view(B, choices, Q) * choices + lower).amin(1)
        sums, chosen[t] = least // choices, least % choices
        if t % _RENEW == _RENEW - 1:
            sums -= sums.amin(1, keepdim=True)
    if ends is None:
        state = (totals.long() * totals.shape[1] + torch.arange(totals.shape[1])).amin(1) % totals.shape[1]
    else:
        state = chosen[T - 1].gather(1, ends[:, None])[:, 0].long() * Q + ends
    states = torch.empty(B, T, dtype=torch.int64)
    for t in range(T - 1, -1, -1):
        states[:, t] = state
        if t:
            end = state >> code.bits
            state = chosen[t - 1].gather(1, end[:, None])[:, 0].long() * Q + end
    return states
