"""Trellis-coded weights: 2, 3 or 4 bits per element and one float16 scale per row, after a rotation of the inputs.

An element is not rounded by itself. The codes of 128 rows of one input form a circular stream of 128 k bits, and the level of a row is a
function of the 14 bits that begin at its place, so neighbours share bits; `viterbi.py` searches the stream of least error. This is trellis
coded quantization (Marcellin and Fischer 1990) on a bit-shift trellis (QTIP, Tseng et al. 2024), with streams along the rows instead of in
tiles of 16 x 16, so that GPTQ can round one input after the other.

    W V^T = scale[row] * level,  level = LEVELS[index(state)],  state = bits k p .. k p + 13 of the stream, the first bit lowest

V is the rotation of `rotation.py`; `trellis_codes.py` has the levels and the index map. Row 16 v + i of a tile of 128 rows has position
p = 8 i + v, so byte j of lane i, below, begins the states of lane i. Four neighbouring inputs, c = 0..3, lie together:

    qweight  uint8 [..., N/128, K/4 * 64 k]: by tile of 128 rows (the last is filled up), then by four inputs, then
             | byte 0 of lanes 0..15 | byte 1 of lanes 0..15 | ... byte k - 1 |     each of the 16 lanes is | c0 c1 c2 c3 |
             byte j of lane i holds bits 8 (k i + j) .. 8 (k i + j) + 7 of the streams
    scales   float16 [..., N, 1]: of a row; levels are whole numbers up to 127

    bits per element: k + 16/K

The `-fast` formats have states of 10 bits and levels of their own; their layout is the same, and the search takes an eighth of the time.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` inputs of one Hadamard matrix, `k` bits per
element; `...` is any number of leading axes, such as the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from .format import Format, Part
from .groups import check_group_size, check_scales, check_weight, steps_of
from .quantized_weight import QuantizedWeight
from .rotation import rotate, rotate_back
from .trellis_codes import CODES, TrellisCode
from .viterbi import COST_UNIT, ROWS, encode_reference

__all__ = [
    "FORMATS",
    "GROUP_SIZES",
    "WEIGHTS",
    "TrellisWeight",
    "by_position",
    "cost_units",
    "dequantize",
    "encode",
    "first_scales",
    "fitted_scales",
    "levels_of",
    "pack",
    "quantize",
]

GROUP_SIZES = (128, 64)
LANES = 16
"""Lanes of a tile; a lane has eight rows."""
_TURNS = ROWS // LANES
_PIECE_ELEMENTS = 1 << 22  # dequantized together: temporaries of 30 bytes for each


@dataclass(frozen=True)
class TrellisWeight(QuantizedWeight):
    """A weight [..., N, K] in k bits per element and 16 bits per row; the module draws its layout."""

    part_names: ClassVar[tuple[str, ...]] = ("qweight", "scales")
    row_units: ClassVar[dict[str, int]] = {"qweight": ROWS}
    code: ClassVar[TrellisCode]
    """The code of the streams."""

    qweight: torch.Tensor
    """The streams."""
    scales: torch.Tensor
    """The scale of each row."""
    group_size: int
    """G, inputs that are rotated together."""

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""
        return torch.Size((*self.scales.shape[:-1], self.qweight.shape[-1] // (LANES * self.code.bits)))


def encode(rotated: torch.Tensor, scales: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """`dbrx_q.kernels.trellis.encode` in plain torch."""
    units = by_position(cost_units(scales, code))
    x = torch.nn.functional.pad(rotated / steps_of(scales)[:, None], (0, 0, 0, -len(rotated) % ROWS))
    tiles = zip(x.split(ROWS), units, strict=True)
    return torch.stack([encode_reference(by_position(tile.T), unit.expand(tile.shape[1], -1), code) for tile, unit in tiles])


def quantize(
    weight: torch.Tensor,
    group_size: int = 128,
    *,
    kind: type[TrellisWeight],
    search: Callable[[torch.Tensor, torch.Tensor, TrellisCode], torch.Tensor] = encode,
) -> TrellisWeight:
    """`weight` with the streams of least squared error, every input by itself, and a scale fitted to each row.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 128 or 64; divides K.
        kind: the class of the result, which has the code.
        search: gives the streams of a rotated weight [N, K], its scales and a code, as `dbrx_q.kernels.trellis.encode`.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a row too large for float16 scales.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    wide = rotate(check_weight(weight), group_size)
    flat = wide.reshape(-1, *wide.shape[-2:])
    packed = [_quantize_matrix(matrix, group_size, kind, search) for matrix in flat]
    parts = {name: torch.stack([one.parts[name] for one in packed]) for name in kind.part_names}
    return kind.of({name: part.view(*weight.shape[:-2], *part.shape[1:]) for name, part in parts.items()}, group_size)


def dequantize(weight: TrellisWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [..., N, K]: scale * level, exact in float32, rotated back in float32, then rounded to `dtype`.

    Some tiles are decoded at a time, so that the temporaries take little beside the result.
    """
    N, K = weight.shape[-2:]
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    matrices = weight._map(lambda part: part.reshape(-1, *part.shape[-2:]))
    step = ROWS * max(1, _PIECE_ELEMENTS // (ROWS * K))
    for matrix, target in enumerate(out.view(-1, N, K)):
        for first in range(0, N, step):
            rows = matrices[matrix].rows(first, min(first + step, N))
            target[first : first + step] = rotate_back(levels_of(rows).float() * rows.scales.float(), weight.group_size)
    return out


def levels_of(weight: TrellisWeight) -> torch.Tensor:
    """int8 [..., N, K]: the levels of a weight, in the rotated basis."""
    code, (N, K) = weight.code, weight.shape[-2:]
    k, lead = code.bits, weight.qweight.shape[:-1]  # lead: [..., tiles]
    octets = weight.qweight.view(*lead, K // 4, k, LANES, 4).long()
    shifts = 8 * torch.arange(k, device=weight.device)
    words = (octets << shifts[:, None, None]).sum(-3)  # [..., tiles, K/4, lanes, 4], 8 k bits
    words |= words.roll(-1, -2) << 8 * k
    windows = torch.stack([words >> k * turn for turn in range(_TURNS)], -4) & (code.states - 1)  # [..., tiles, turns, K/4, lanes, 4]
    levels = code.level_table(weight.device)[code.index_table(weight.device)[windows].long()]
    return levels.movedim(-2, -3).reshape(*lead[:-1], -1, K)[..., :N, :].contiguous()


def pack(symbols: torch.Tensor, scales: torch.Tensor, group_size: int, kind: type[TrellisWeight]) -> TrellisWeight:
    """A weight [N, K] from its streams.

    Args:
        symbols: uint8 [ceil(N/128), K, 128]: the k bits of each position.
        scales: float16 [N].
        group_size: G.
        kind: the class of the result.
    """
    k, (tiles, K) = kind.code.bits, symbols.shape[:2]
    shifts = k * torch.arange(_TURNS, device=symbols.device)
    words = (symbols.view(tiles, K // 4, 4, LANES, _TURNS).long() << shifts).sum(-1)  # [tiles, K/4, 4, lanes]
    octets = torch.stack([words >> 8 * j & 255 for j in range(k)], 2)  # [tiles, K/4, k, 4, lanes]
    qweight = octets.transpose(-1, -2).to(torch.uint8).reshape(tiles, -1)
    return kind(qweight, scales[:, None].contiguous(), group_size)


def by_position(rows: torch.Tensor) -> torch.Tensor:
    """[..., 128] in the order of positions, from the order of rows within a tile."""
    return rows.unflatten(-1, (_TURNS, LANES)).transpose(-1, -2).flatten(-2)


def first_scales(rotated: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """float16 [N]: the scales with which the levels have the mean square of each row of a rotated weight [N, K].

    Raises:
        FormatError: a scale above 65504, float16's largest value.
    """
    scales = (rotated.square().mean(-1).sqrt() * code.step).half()
    check_scales(scales)
    return scales


def fitted_scales(levels: torch.Tensor, weighted: torch.Tensor, target: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float16 [N]: s = u H t^T / u H u^T, the scale of least error (s u - t) H (s u - t)^T of each row.

    Args:
        levels: float32 [N, K], u.
        weighted: float32 [N, K], u H; the levels themselves where all inputs weigh alike.
        target: float32 [N, K], t.
        scales: float16 [N], those that the levels were searched with; a fitted one is at most twice as large, and not negative.

    Raises:
        FormatError: a scale above 65504, float16's largest value.
    """
    before = scales.float()
    fitted = (weighted * target).sum(-1) / (weighted * levels).sum(-1)
    fitted = torch.where(fitted.isnan(), before, fitted.clamp(min=0).minimum(2 * before)).half()
    check_scales(fitted)
    return fitted


def cost_units(scales: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """float32 [tiles, 128]: what a squared error of one level costs in each row, from the scales float16 [N] of the rows.

    A tile's rows weigh as the squares of their scales, in the mean as one error of the mean square that costs `COST_UNIT`. Rows that fill
    up the last tile cost nothing.
    """
    wide = torch.nn.functional.pad(scales.float(), (0, -len(scales) % ROWS)).view(-1, ROWS)
    weights = wide.double().square()  # whose sums are the same in any order
    means = weights.sum(-1, keepdim=True) / (wide > 0).sum(-1, keepdim=True).clamp(min=1)
    return (weights / torch.where(means == 0, 1.0, means) * (COST_UNIT * code.step**2)).float()


def _quantize_matrix(
    rotated: torch.Tensor,
    group_size: int,
    kind: type[TrellisWeight],
    search: Callable[[torch.Tensor, torch.Tensor, TrellisCode], torch.Tensor],
) -> TrellisWeight:
    scales = first_scales(rotated, kind.code)
    symbols = search(rotated, scales, kind.code)
    levels = levels_of(pack(symbols, scales, group_size, kind)).float()
    return pack(symbols, fitted_scales(levels, levels, rotated, scales), group_size, kind)


def _parts(N: int, K: int, group_size: int, *, kind: type[TrellisWeight]) -> tuple[Part, ...]:
    tiles = -(-N // ROWS)
    return Part("qweight", torch.uint8, (tiles, K * LANES * kind.code.bits)), Part("scales", torch.float16, (N, 1))


def _kind(name: str, code: TrellisCode) -> type[TrellisWeight]:
    members = {"format": name, "code": code, "__doc__": f"A weight in the format {name}.", "__module__": __name__}
    return type(f"{name.title().replace('-', '')}Weight", (TrellisWeight,), members)


def _format(kind: type[TrellisWeight]) -> Format:
    return Format(
        name=kind.format,
        bits=kind.code.bits,
        group_sizes=GROUP_SIZES,
        weight=kind,
        parts=partial(_parts, kind=kind),
        quantize=partial(quantize, kind=kind),
        dequantize=dequantize,
        trellis=kind.code,
        fast=f"{kind.format}-fast" if f"{kind.format}-fast" in CODES else None,
    )


WEIGHTS = {name: _kind(name, code) for name, code in CODES.items()}
"""The classes of the weights, by format."""
FORMATS = tuple(_format(kind) for kind in WEIGHTS.values())
