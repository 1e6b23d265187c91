"""`store_qkv` in Triton's interpreter stores the bits of the reference.

Dimension letters: `T` tokens, `B` sequences, `H` query heads, `G` key/value heads, `L` capacity in tokens, `C` channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.kv import KV_FORMATS, KVLayer, allocate_kv
from dbrx_q.kernels.qkv import store_qkv, store_qkv_reference

B, L, C = 3, 9, 32


@dataclass(frozen=True)
class Case:
    """One call."""

    name: str
    """Shown in the test's id."""
    rows: tuple[int, ...]
    """Row of the cache of each token, -1 for none."""
    positions: tuple[int, ...]
    """Position of each token in its row."""
    H: int = 6
    """Query heads; a program takes eight."""
    G: int = 2
    """Key/value heads; a program takes eight."""
    clip: float | None = 1.5
    """Limit of queries, keys and values."""
    scale: float = 1.0
    """Of the random inputs."""

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("no tokens", (), ()),
    Case("one token", (2,), (8,)),
    Case("no clip", (0, 1), (0, 3), clip=None),
    Case("padded rows", (-1, 1, -1), (-1, 4, 0)),
    Case("a chunk", (1, 1, 1, 1), (2, 3, 4, 5)),
    Case("head remainders", (0, 2), (0, 7), H=18, G=9),
    Case("zeros", (0,), (0,), scale=0.0),
    Case("tiny", (0,), (0,), clip=None, scale=1e-6),
    Case("huge", (0,), (0,), clip=None, scale=1e4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_stored_bits_equal_those_of_the_reference(case: Case, format: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(case.name))
    T = len(case.rows)
    qkv = (torch.randn(T, (case.H + 2 * case.G) * C, generator=generator) * case.scale).to(dtype)
    angles = torch.rand(T, C // 2, generator=generator) * 6
    rows, positions = (torch.tensor(x, dtype=torch.int32) for x in (case.rows, case.positions))
    stored, expected = (allocate_kv(format, B, case.G, L, C, dtype, torch.device("cpu")) for _ in range(2))
    arguments = rows, positions, angles.cos(), angles.sin()
    q = store_qkv(qkv, stored, *arguments, heads=case.H, clip=case.clip, backend=Backend.TRITON)
    assert_same(q, store_qkv_reference(qkv, expected, *arguments, heads=case.H, clip=case.clip))
    for part, expected_part in zip(parts(stored), parts(expected), strict=True):
        assert_same(part, expected_part)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_only_the_given_positions_are_written(format: str) -> None:
    cache = allocate_kv(format, B, 2, L, C, torch.float32, torch.device("cpu"))
    for part in parts(cache):
        part.fill_(3)
    rows, positions = torch.tensor([1, -1], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    angles = torch.zeros(2, C // 2)
    store_qkv(torch.ones(2, 10 * C), cache, rows, positions, angles, angles, heads=6, clip=None, backend=Backend.TRITON)
    for part in parts(cache):
        part[1, :, 4] = 3
        assert (part == 3).all()


def parts(cache: KVLayer) -> list[torch.Tensor]:
    return [x for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if x is not None]


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
