"""The search for the best stream of a trellis code, in plain torch, and its arithmetic, which every implementation shares bit for bit.

A column of 128 rows is one circular stream of k bits per row (`trellis.py`). Its states are the windows of L bits, so the state of position
p - 1 is (state of p << k | the k bits of position p - 1) mod 2^L. Positions are visited from the last to the first; the Viterbi algorithm
keeps for each of the Q = 2^(L-k) ends that states share the path of least cost.

Costs are whole numbers. Level l of a row costs min(cap, floor(unit (x - l)^2 + 1/2) - the least of these), in float32, x the element in
units of the row's scale. A sum of costs and the choice, which are the highest k bits of a state, share a word of 16 bits, sum * 2^k +
choice. The least word of the states that lead to an end wins, so of equal sums the lowest choice; a winning word above 65535 - cap * 2^k
becomes that, choice and all. After every fourth position the least sum is subtracted from all. The cap is a fifth of the largest sum.

The stream is circular: the bits above the last position's are those of the first. A first pass begins at the middle of the column with all
states alike, goes around once, and its bits at position 0 are taken for good; the second pass begins and ends with them. With 2 bits per
element the first pass works in bytes, which is as good there: a cost c becomes min(127, floor((c + 16) / 32)), sums saturate at 255, the
lowest choice of the least sum wins, and the least sum is subtracted after every second position.

Dimension letters: `B` columns of 128 rows, `S` states, `Q` states without their last k bits, `n` levels.
"""

from __future__ import annotations

import torch

from .trellis_codes import TrellisCode

__all__ = [
    "COST_UNIT",
    "NARROW_BITS",
    "NARROW_CAP",
    "NARROW_MOST",
    "NARROW_RENEW",
    "NARROW_SHIFT",
    "RENEW",
    "ROWS",
    "cost_cap",
    "encode_reference",
    "level_costs",
    "most_word",
]

ROWS = 128
"""Positions of a stream."""
COST_UNIT = 2048
"""The cost of an error whose square is the mean square of a row."""
RENEW = 4
"""Positions after which the least sum is subtracted."""


NARROW_BITS = 2
"""Bits per element of the codes whose first pass works in bytes."""
NARROW_SHIFT = 5
"""Bits that costs lose there."""
NARROW_CAP = 127
"""The largest cost there."""
NARROW_RENEW = 2
"""`RENEW` there."""
NARROW_MOST = 255
"""The largest sum there."""


def cost_cap(bits: int) -> int:
    """The largest cost of one element in a code of so many bits per element: the costs of `RENEW` positions and one more fit a sum."""
    return (65535 >> bits) // (RENEW + 1)


def most_word(bits: int) -> int:
    """The largest word of a sum and a choice, to which any cost can be added."""
    return 65535 - (cost_cap(bits) << bits)


def level_costs(x: torch.Tensor, unit: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """int32 [..., n]: the costs of all levels for elements `x` [...] in units of the rows' scales; unit: float32 [...]."""
    away = x.float().unsqueeze(-1) - code.level_table(x.device).float()
    costs = (away * away * unit.unsqueeze(-1) + 0.5).floor()
    return (costs - costs.amin(-1, keepdim=True)).clamp(max=cost_cap(code.bits)).int()


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
    if code.bits == NARROW_BITS:
        narrow = (costs[:, first] + (1 << NARROW_SHIFT - 1)) >> NARROW_SHIFT
        states = _pass(narrow.clamp(max=NARROW_CAP), code, None, narrow=True)
    else:
        states = _pass(costs[:, first], code, None)
    ends = states[:, middle - 1] & (code.ends - 1)
    states = _pass(costs.flip(1), code, ends)
    return (states.flip(1) & (2**code.bits - 1)).to(torch.uint8)


def _pass(costs: torch.Tensor, code: TrellisCode, ends: torch.Tensor | None, *, narrow: bool = False) -> torch.Tensor:
    """int64 [B, T]: the states of the cheapest path, in the order of `costs` [B, T, n].

    ends: the bits [B] with which the path begins and ends; None for those of the least sum, of equals the lowest. narrow: in
    bytes.
    """
    B, T = costs.shape[:2]
    Q, choices, most, renew = code.ends, 2**code.bits, most_word(code.bits), NARROW_RENEW if narrow else RENEW
    index = code.index_table(costs.device).long()
    choice = torch.arange(choices, dtype=torch.int32, device=costs.device)[:, None]
    if ends is None:
        sums = torch.zeros(B, Q, dtype=torch.int32, device=costs.device)
    else:
        sums = torch.full((B, Q), most >> code.bits, dtype=torch.int32, device=costs.device).scatter_(1, ends[:, None], 0)
    chosen = torch.empty(T, B, Q, dtype=torch.uint8, device=costs.device)
    for t in range(T):
        totals = (sums.repeat_interleave(choices, 1) + costs[:, t][:, index]).view(B, choices, Q)
        if narrow:
            totals.clamp_(max=NARROW_MOST)
        words = (totals * choices + choice).amin(1)
        if not narrow:
            words.clamp_(max=most)
        sums, chosen[t] = words // choices, words % choices
        if t % renew == renew - 1:
            sums -= sums.amin(1, keepdim=True)
    numbers = torch.arange(Q, dtype=torch.int32, device=costs.device)
    end = (sums * Q + numbers).amin(1).long() % Q if ends is None else ends
    states = torch.empty(B, T, dtype=torch.int64, device=costs.device)
    for t in range(T - 1, -1, -1):
        states[:, t] = chosen[t].gather(1, end[:, None])[:, 0].long() * Q + end
        end = states[:, t] >> code.bits
    return states
