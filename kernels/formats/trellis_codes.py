"""The codes of the trellis formats: which level a state stands for.

A state s of L bits has the index s ^ (s >> a) ^ (s >> b) ^ ((s >> i) << c), of which the lowest i bits count; each code has its own shifts.
The index map is linear over GF(2), so a CPU computes it with bit matrices and a GPU on several states of a word at once. Levels were
trained on normal values (`tests/methods/trellis_codes.py`): every level is the mean of the values that the search gives to it, as a whole
number up to 127; `step` is the unit of these numbers where the values have a mean square of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["CODES", "TrellisCode"]


@dataclass(frozen=True)
class TrellisCode:
    """A code: k bits per element, states of L bits, 2^i levels."""

    bits: int
    """k."""
    state_bits: int
    """L."""
    index_bits: int
    """i."""
    shifts: tuple[int, ...]
    """By which copies of the state are shifted right before the copies are added without carry; -c stands for (s >> i) << c."""
    step: float
    """The unit of the levels, where the values have a mean square of 1."""
    relative_error: float
    """Mean squared error of normal values over their mean square, each input by itself. Rotated weights come close to it."""
    levels: tuple[int, ...]
    """By index, -127 to 127."""

    @property
    def states(self) -> int:
        """2^L."""
        return 1 << self.state_bits

    @property
    def ends(self) -> int:
        """Q = 2^(L-k): what states share with the next one."""
        return 1 << (self.state_bits - self.bits)

    def index_of(self, state: torch.Tensor) -> torch.Tensor:
        """The indices of states, int64 [...]."""
        index = state.clone()
        for shift in self.shifts:
            index ^= state >> shift if shift > 0 else (state >> self.index_bits) << -shift
        return index & (2**self.index_bits - 1)

    def columns(self) -> tuple[int, ...]:
        """The index map as a bit matrix: the index of each state with a single bit set, the lowest bit first."""
        return tuple(self.index_of(1 << torch.arange(self.state_bits)).tolist())

    @cache  # noqa: B019 # codes are constants
    def index_table(self, device: torch.device) -> torch.Tensor:
        """int16 [2^L]: the index of every state."""
        return self.index_of(torch.arange(self.states)).to(torch.int16).to(device)

    @cache  # noqa: B019
    def level_table(self, device: torch.device) -> torch.Tensor:
        """int8 [2^i]: the levels."""
        return torch.tensor(self.levels, dtype=torch.int8, device=device)


# fmt: off
CODES = {
    "trellis2": TrellisCode(
        bits=2,
        state_bits=14,
        index_bits=6,
        shifts=(-3, 2, 9),
        step=0.020425235453797954,
        relative_error=0.0712,
        levels=(
            -54, -47, 51, 6, 17, 16, 58, 34, 27, 61, -65, 95, -25, 16, -26, -35,
            19, -36, -19, -65, 88, -6, -9, 10, -20, 67, 37, -4, 10, 71, 46, 31,
            27, -73, 12, -26, -95, 1, 4, -15, 25, -25, -89, 127, -42, -59, -12, -125,
            -1, 30, -44, 13, 41, 59, 39, -43, -46, -31, 81, -10, 52, -7, -79, -7,
        ),
    ),
    "trellis3": TrellisCode(
        bits=3,
        state_bits=14,
        index_bits=7,
        shifts=(3, 9, 10),
        step=0.023584456856795184,
        relative_error=0.0182,
        levels=(
            -38, 28, 10, -54, -18, 61, -16, -6, 21, -23, 35, -93, 49, -29, -52, -2,
            1, -43, -71, -28, 57, -41, 6, -18, 2, 44, -10, -56, 86, 13, -75, -31,
            -28, -24, 2, -50, 15, 33, 21, -21, -22, -34, -2, 6, 23, 56, -53, -10,
            -14, 0, 14, 37, 43, -60, 58, 18, -34, -25, -4, 49, 53, 73, -7, 28,
            10, 50, 26, -69, -45, 29, -66, 94, -43, 16, -23, 36, 23, 64, -5, -63,
            77, -77, -103, -47, -17, 8, -125, 5, -31, -36, -17, 73, -86, 33, 40, 21,
            106, 82, 23, -59, -11, 11, 67, 30, 9, 15, -49, 2, -82, -14, -37, 21,
            64, 46, -7, -6, -40, 43, -31, 33, 33, 12, -3, 127, -16, -14, 41, 3,
        ),
    ),
    "trellis4": TrellisCode(
        bits=4,
        state_bits=14,
        index_bits=8,
        shifts=(9, 11, 12),
        step=0.026019227936511905,
        relative_error=0.00477,
        levels=(
            108, 12, 7, 88, 37, 50, 27, -15, -47, -8, -21, 11, -53, 20, 5, -58,
            -110, -21, 29, 40, -30, -48, 31, -35, -11, -74, -8, -35, -59, -1, 19, -20,
            -11, 1, 39, 11, -40, 63, 52, 36, 16, -37, 68, -5, -13, -40, 34, 7,
            -55, 37, 3, 1, -4, 31, 127, 45, 80, 26, -41, -127, -13, -30, -18, -11,
            65, -31, 59, 34, -69, 14, 71, 1, -93, 3, -84, -8, 7, -42, -81, 22,
            -70, 5, 24, 73, -25, 11, 36, 16, 41, -8, -25, -18, -15, -43, 19, -46,
            22, 8, 56, -25, 6, 9, 19, 44, -34, -11, 24, 73, -26, 54, 1, 58,
            32, 48, -63, 30, -50, -29, 26, 5, -7, -88, 11, -55, 14, -99, 21, 57,
            -58, -46, 41, 23, -16, -19, 59, 47, -40, 14, 34, 17, -30, 15, -80, 1,
            25, 27, -16, 51, -36, 5, -1, -44, -11, 63, -48, -10, 0, -25, -40, 85,
            16, 40, 52, -36, -14, -19, 0, 91, -38, 32, 29, 7, -16, -31, 10, 0,
            -31, 29, -17, 38, -27, 5, 48, 13, -54, 3, 20, 70, -3, -27, 61, 28,
            -29, -25, -37, 17, -22, -60, -50, 23, -1, 43, -7, -28, 48, 34, -43, 21,
            -53, -4, -33, -21, -9, -23, -15, -13, 76, -3, -66, -66, 46, 65, -18, -5,
            -46, -76, 42, -2, -21, 98, -65, 44, 54, 39, 78, -3, 25, -36, 9, -25,
            -62, 16, -7, -72, 10, -23, -7, -15, 29, 24, 7, -5, 13, 17, -51, -32,
        ),
    ),
    "trellis2-fast": TrellisCode(
        bits=2,
        state_bits=10,
        index_bits=6,
        shifts=(-2, 4, 8),
        step=0.020594575167600115,
        relative_error=0.0769,
        levels=(
            25, -60, -21, -2, 66, -48, 31, -86, -18, -83, 8, -53, -30, -2, 20, 40,
            -30, -1, 61, 28, -52, -1, 37, -28, -71, 86, -9, 49, 69, 34, 11, -28,
            50, 18, -8, -46, 49, -7, 100, -58, 2, -94, -47, -21, -25, 77, 38, 7,
            -125, 15, 59, -45, 27, -27, 4, 83, -40, -5, 9, 31, -23, 35, 127, -79,
        ),
    ),
    "trellis3-fast": TrellisCode(
        bits=3,
        state_bits=10,
        index_bits=6,
        shifts=(-4, -3, 4),
        step=0.022171290112658976,
        relative_error=0.0204,
        levels=(
            15, -50, -19, -1, 68, -61, 35, -78, -14, -75, -1, -59, -24, 6, 17, 30,
            -29, 9, 57, 37, -48, -5, 44, -33, -67, 75, -9, 57, 60, 38, 21, -27,
            42, 16, -5, -36, 53, -16, 100, -53, -7, -100, -41, -22, -13, 77, 33, 9,
            -126, 28, 50, -47, 20, -25, 3, 86, -42, -4, 10, 19, -29, 29, 127, -89,
        ),
    ),
    "trellis4-fast": TrellisCode(
        bits=4,
        state_bits=10,
        index_bits=8,
        shifts=(-2, 6, 7),
        step=0.025829221091024108,
        relative_error=0.0057,
        levels=(
            -41, 19, 28, -11, -51, 127, 1, 43, -46, -35, 12, -33, 35, -2, -100, 23,
            -64, -27, -50, -43, 44, -36, 55, 18, -26, 8, 14, -49, -17, 7, 8, -86,
            40, 16, 32, -22, -18, -32, -7, -42, 47, 23, -15, -81, -25, -3, -47, 28,
            -24, 44, 4, -37, 23, -31, -6, 29, 39, -26, 26, -12, 11, 5, 19, 54,
            -24, 5, 66, 16, 38, -60, 4, 81, 45, -27, 9, -6, -13, 25, -73, 50,
            -11, -45, 109, -6, 27, -2, -31, -17, 56, 15, 42, 35, 29, 0, 39, 75,
            11, 27, -7, 0, 43, -48, -24, 7, -17, 89, 74, -37, 6, -41, 35, 23,
            72, -9, -25, 0, 10, 49, -8, 17, -10, 82, -18, 32, 1, -55, -2, -41,
            -29, -11, -21, -5, -64, 76, -46, -32, -17, -55, 15, 7, 50, 3, 33, 32,
            -17, -80, -7, 4, -20, 35, -28, -23, 51, 21, -15, -63, -56, 63, 16, 41,
            -109, -41, 23, 7, -3, -54, 62, 15, -40, -19, -73, 58, -32, -13, 22, -89,
            38, 59, 33, -17, 65, 37, -13, -4, 51, 6, -34, -30, 12, 27, -16, 1,
            -73, -60, 32, -14, 19, -1, -51, 28, -13, -6, -42, -4, -20, 3, -35, -82,
            24, 3, -72, 12, 58, 26, 20, 51, 95, -22, -36, 13, -67, 1, 69, 46,
            -33, 7, -12, -65, 47, 28, -25, -68, 17, -55, 36, 10, 11, -7, 102, 0,
            -55, -7, 88, -59, 71, -93, -124, 53, 66, 20, -48, 59, -36, -24, 13, -30,
        ),
    ),
}
# fmt: on
"""The codes by the names of their formats."""
