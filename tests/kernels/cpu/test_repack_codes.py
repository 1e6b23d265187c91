"""Packed codes in other orders: every code by its definition, for shapes that fill no block of the compiled code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbrx_q.kernels.cpu.repack_codes import rows_of_awq, unpack_codes, unpack_nibbles
from dbrx_q.kernels.formats import int4


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("N", "K"), [(1, 8), (2, 8), (3, 40), (5, 1024), (2, 24)])
def test_codes_are_bits_of_their_row(N: int, K: int, bits: int) -> None:
    packed = np.random.default_rng(bits * K).integers(0, 256, (N, K * bits // 8), dtype=np.uint8)
    expected = np.zeros((N, K), dtype=np.uint8)
    for n in range(N):
        row = int.from_bytes(packed[n].tobytes(), "little")
        for k in range(K):
            expected[n, k] = row >> (k * bits) & ((1 << bits) - 1)
    assert torch.equal(unpack_codes(torch.from_numpy(packed), bits), torch.from_numpy(expected))
    if bits < 4:
        assert torch.equal(unpack_nibbles(torch.from_numpy(packed), bits), int4.pack(torch.from_numpy(expected)))


@pytest.mark.parametrize(("K", "M"), [(8, 1), (16, 2), (24, 3), (40, 16), (520, 5), (1024, 18)])
def test_rows_of_awq_hold_the_codes_of_an_output(K: int, M: int) -> None:
    words = np.random.default_rng(K).integers(0, 2**32, (K, M), dtype=np.uint32)
    codes = np.zeros((8 * M, K), dtype=np.uint8)
    for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        codes[output::8] = (words >> np.uint32(4 * nibble) & np.uint32(15)).T
    packed = rows_of_awq(torch.from_numpy(words.view(np.int32)))
    assert packed.is_contiguous()
    assert torch.equal(packed, int4.pack(torch.from_numpy(codes)))
    columns = torch.from_numpy(words.view(np.int32))[:, M // 2 :]  # not contiguous
    assert torch.equal(rows_of_awq(columns), int4.pack(torch.from_numpy(codes[8 * (M // 2) :])))
