"""The streams of trellis formats: searched in compiled code on the CPU, by a Triton kernel on a GPU, in plain torch on one without Triton.

All three find the same streams.

`formats/trellis.py` draws the streams, `formats/viterbi.py` defines the search. Rows are taken in tiles of 128; the last is filled up.

Dimension letters: `B` columns of a block, `N` rows, `K` input features. Blocks are transposed, [B, N].
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.cpu import viterbi as cpu_viterbi
from dbrx_q.kernels.formats.groups import steps_of
from dbrx_q.kernels.formats.trellis import by_position, cost_units
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import ROWS, encode_reference

from .backend import Backend, has_triton, pick

__all__ = ["encode", "stream_levels", "stream_states", "trellis_block", "trellis_block_reference"]

_COLUMNS = 128  # columns of a weight that are transposed together


def trellis_block(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, code: TrellisCode, *, backend: Backend | None = None
) -> torch.Tensor:
    """The bits of all positions, uint8 [ceil(N/128), B, 128], chosen column by column; later columns of the block compensate each error.

    On return `columns` holds the errors over the factor's diagonal. The caller subtracts from the columns after the block the factor's
    columns @ errors. All steps are rounded to float32: (column - scale * level) / diagonal, then column - factor * error.

    Args:
        columns: float32 [B, N] of a rotated weight, contiguous; overwritten.
        factor: float32 [B, B], the block of the upper Cholesky factor.
        scales: float16 [N], of the rows; a scale of 0 stands for values of 0.
        code: the code of the format.
        backend: None picks by the device of `columns`.
    """
    match backend or _pick(columns.device):
        case Backend.CPU:
            return cpu_viterbi.trellis_block(columns, factor, scales, code)
        case Backend.TRITON:
            from dbrx_q.kernels.triton import viterbi as triton_viterbi

            return triton_viterbi.trellis_block(columns, factor, scales, code)
    return trellis_block_reference(columns, factor, scales, code)


def encode(rotated: torch.Tensor, scales: torch.Tensor, code: TrellisCode, *, backend: Backend | None = None) -> torch.Tensor:
    """The bits of all positions, uint8 [ceil(N/128), K, 128]: for every column the stream of least squared error.

    Args:
        rotated: float32 [N, K], a rotated weight.
        scales: float16 [N], of the rows; a scale of 0 stands for values of 0.
        code: the code of the format.
        backend: None picks by the device of `rotated`.
    """
    backend = backend or _pick(rotated.device)
    if backend is Backend.TRITON:
        from dbrx_q.kernels.triton import viterbi as triton_viterbi

        return triton_viterbi.encode(rotated, scales, code)
    block = cpu_viterbi.trellis_block if backend is Backend.CPU else trellis_block_reference
    parts = [block(part.T.contiguous(), None, scales, code) for part in rotated.split(_COLUMNS, 1)]
    return torch.cat(parts, 1)


def _pick(device: torch.device) -> Backend:
    backend = pick(device)
    return Backend.REFERENCE if backend is Backend.TRITON and not has_triton() else backend


def trellis_block_reference(columns: torch.Tensor, factor: torch.Tensor | None, scales: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """`trellis_block` in plain torch, on any device; without a factor, columns are searched by themselves and left as they are."""
    B, N = columns.shape
    units = by_position(cost_units(scales, code))
    steps, values = steps_of(scales), scales.float()
    chosen = []
    for i in range(B):
        x = torch.nn.functional.pad(columns[i] / steps, (0, -N % ROWS)).view(-1, ROWS)
        symbols = encode_reference(by_position(x), units, code)
        chosen.append(symbols)
        if factor is not None:
            columns[i] = (columns[i] - values * stream_levels(symbols, code).flatten()[:N].float()) / factor[i, i]
            columns[i + 1 :] -= factor[i, i + 1 :, None] * columns[i]
    return torch.stack(chosen, 1)


def stream_levels(symbols: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """int8 [..., 128]: the levels of the rows of a tile, from the bits of each position, uint8 [..., 128]."""
    levels = code.level_table(symbols.device)[code.index_table(symbols.device)[stream_states(symbols, code)].long()]
    return levels.unflatten(-1, (16, 8)).transpose(-1, -2).flatten(-2)


def stream_states(symbols: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """int64 [..., 128]: the states of all positions, from the bits of each position, uint8 [..., 128]."""
    states = torch.zeros_like(symbols, dtype=torch.int64)
    for place in range(-(-code.state_bits // code.bits)):
        states |= symbols.long().roll(-place, -1) << code.bits * place
    return states & (code.states - 1)
