"""Programmatic dependent launch inside a kernel (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization").

A kernel that is launched so may begin while the kernel before it in the stream still runs. It calls, in this order,

1. `start_next`: the kernel after it may begin as soon as all its own programs have;
2. `prefetch_weight`, where the rows of a weight are known already: their bytes go on the way to the L2 cache;
3. `wait_for_previous`: returns when the kernel before has ended, and with it all kernels before that.

`launch.py` has the rule that this order obeys, and decides whether PDL is set. Without it all three are nothing.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda as _cuda

from .codes import INT4, INT8, NF4

__all__ = ["prefetch_plain", "prefetch_vector", "prefetch_weight", "start_next", "wait_for_previous"]

# None in a Triton without them, where PDL is never set.
_gdc_wait: Any = getattr(_cuda, "gdc_wait", None)
_gdc_launch_dependents: Any = getattr(_cuda, "gdc_launch_dependents", None)
_num_threads: Any = getattr(_cuda, "num_threads", None)

# Of each row of a program. With DBRX's Wqkv in int8 the programs request 16 MB in all, which arrive in the 4 us that the kernels before
# take to end; a half of an H200's L2 cache holds 25 MB.
_MOST_BYTES = tl.constexpr(2048)
_UNIT = tl.constexpr(16)  # a bulk prefetch takes whole units of 16 bytes


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel of the stream begin once every program of this kernel has come here."""
    if PDL:
        _gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are visible."""
    if PDL:
        _gdc_wait()


@triton.jit
def prefetch_weight(
    q,  # first code of the matrix [N, K]
    s,
    rows,  # [BN]
    first,  # element of each row
    COUNT: tl.constexpr,
    N,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Request the first bytes of COUNT elements of each row, codes and scales, into the L2 cache; changes no memory that a kernel sees."""
    if PDL:
        if FORMAT == INT8:
            _prefetch_rows(q, rows, first, COUNT, N, K)
            _prefetch_rows(s, rows, first // GROUP * 2, COUNT // GROUP * 2, N, K // GROUP * 2)
        elif (FORMAT == INT4) | (FORMAT == NF4):
            _prefetch_rows(q, rows, first // 2, COUNT // 2, N, K // 2)
            _prefetch_rows(s, rows, first // GROUP * 2, COUNT // GROUP * 2, N, K // GROUP * 2)


@triton.jit
def prefetch_plain(base, rows, first, COUNT: tl.constexpr, N, K: tl.constexpr, PDL: tl.constexpr):
    """The same for a plain matrix [N, K]."""
    if PDL:
        SIZE: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
        _prefetch_rows(base, rows, first * SIZE, COUNT * SIZE, N, K * SIZE)


@triton.jit
def prefetch_vector(base, K: tl.constexpr, PDL: tl.constexpr):
    """The same for K elements, which several threads share."""
    if PDL and K % 8 == 0:
        prefetch_plain(base, tl.arange(0, 8), 0, K // 8, 8, K // 8, PDL)


@triton.jit
def _prefetch_rows(base, rows, first, BYTES: tl.constexpr, N, WIDTH: tl.constexpr):
    """Request bytes `first` to `first` + BYTES of rows of WIDTH bytes, as far as they are whole units."""
    BN: tl.constexpr = rows.shape[0]
    LIMIT: tl.constexpr = BYTES if BYTES < _MOST_BYTES else _MOST_BYTES
    # As many pieces as threads, so that no two threads hold the same.
    PIECES: tl.constexpr = 1 if _num_threads() <= BN else _num_threads() // BN
    PIECE: tl.constexpr = LIMIT // PIECES // _UNIT * _UNIT
    if (PIECE > 0) & (WIDTH % _UNIT == 0):
        place = first // _UNIT * _UNIT + tl.arange(0, PIECES) * PIECE
        inside = (rows < N)[:, None] & (place + PIECE <= WIDTH)[None, :]
        address = base.to(tl.uint64, bitcast=True) + rows.to(tl.uint64)[:, None] * WIDTH + place.to(tl.uint64)[None, :]
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b64 a;
            setp.ne.s32 p, $2, 0;
            and.b64 a, $1, 0xFFFFFFFFFFFFFFF0;
            @p cp.async.bulk.prefetch.L2.global [a], $3;
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r",
            [address, inside.to(tl.int32), PIECE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
