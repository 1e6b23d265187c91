"""The work of a recorded launch, from its constants and arguments alone: programs, iterations of their loops, and bytes of DRAM.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model, `F` ffn hidden, `N` output features, `K` input
features, `P` pairs of a token and an expert; of attention `B` sequences, `H`/`G` query and key/value heads, `L` capacity in tokens, `C`
channels of a head; letters of tiles as in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dbrx_q.kernels.triton.launch import Launch

__all__ = ["LaunchWork", "work_of"]


@dataclass(frozen=True)
class LaunchWork:
    """What the programs of a launch do."""

    programs: float
    """Programs that compute; the others of the grid return at once. Expected numbers for random routing."""
    iterations: tuple[float, ...]
    """Of each loop with matrix instructions, in the order of the source: iterations of an average program."""
    packed_bytes: tuple[int, ...]
    """Bytes of packed codes that a program reads in an iteration of each."""
    dram_bytes: float
    """Bytes that the launch must move from and to DRAM."""
    operations: float
    """Floating-point operations of the products, two for each weight and token."""


def work_of(launch: Launch, *, new_tokens: int = 1) -> LaunchWork:
    """The work of a launch.

    Args:
        launch: recorded at the shapes of a model; tensors have their sizes and no values.
        new_tokens: of a sequence in prefill of attention, the last of the cache; every sequence fills its cache.
    """
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    name = launch.kernel.__name__
    if name in _WORK:
        return _WORK[name](launch, values)
    if name == "prefill_kernel":
        return _attention_prefill(launch, values, new_tokens)
    written_and_read = {id(part): part.nbytes for part in launch.arguments if isinstance(part, torch.Tensor)}
    return LaunchWork(math.prod(launch.grid), (), (), sum(written_and_read.values()), 0)


def _linear(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    T, N, K = v["T"], v["N"], v["K"]
    steps = -(-K // v["BK"])
    nbytes = _bytes(v, "q", "s", "z") + 2 * T * (K + N * (1 + v["RESIDUAL"]))
    packed = _packed(v["q"], N * K, v)
    return LaunchWork(math.prod(launch.grid), (steps / v["SPLITS"],), (packed,), nbytes, 2 * T * N * K)


def _gate_up_decode(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    T, D, F, E = v["T"], v["D"], v["F"], v["E"]
    active = _active(T, v)
    codes = [_packed(v["q" + matrix], E * F * D, v) for matrix in "12"]
    nbytes = _bytes(v, "q1", "s1", "z1", "q2", "s2", "z2") * active / E + 2 * T * (D + v["A"] * F)
    steps = -(-D // v["BK"])
    return LaunchWork(launch.grid[0] * active, *_two_matrices(steps, codes, v), nbytes, 4 * T * v["A"] * D * F)


def _down_decode(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    T, D, F, E = v["T"], v["D"], v["F"], v["E"]
    active = _active(T, v)
    nbytes = _bytes(v, "q", "s", "z") * active / E + 2 * T * (D + v["A"] * F)
    steps = -(-F // v["BK"]) / v["SPLITS"]
    programs = launch.grid[0] * active * v["SPLITS"]
    return LaunchWork(programs, (steps,), (_packed(v["q"], E * D * F, v),), nbytes, 2 * T * v["A"] * D * F)


def _gate_up_prefill(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    P, D, F, E = v["order"].numel(), v["D"], v["F"], v["E"]
    codes = [_packed(v["q" + matrix], E * F * D, v) for matrix in "12"]
    nbytes = _bytes(v, "q1", "s1", "z1", "q2", "s2", "z2") + 2 * P * (D // v["A"] + F)
    programs = _token_tiles(P, v) * -(-F // v["BN"])
    return LaunchWork(programs, *_two_matrices(-(-D // v["BK"]), codes, v), nbytes, 4 * P * D * F)


def _down_prefill(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    P, D, F, E = v["order"].numel(), v["D"], v["F"], v["E"]
    nbytes = _bytes(v, "q", "s", "z") + 2 * P * (D + F)
    programs = _token_tiles(P, v) * -(-D // v["BN"])
    return LaunchWork(programs, (-(-F // v["BK"]),), (_packed(v["q"], E * D * F, v),), nbytes, 2 * P * D * F)


def _attention_decode(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    B, G, L, C = v["lengths"].shape[0], v["G"], v["L"], v["C"]
    blocks = -(-L // v["BL"])
    blocks_of_a_split = -(-blocks // v["SPLITS"])
    busy = -(-blocks // blocks_of_a_split)
    packed = 2 * v["BL"] * v["keys"].shape[-1] * v["keys"].itemsize
    nbytes = _bytes(v, "keys", "values", "key_scales", "value_scales")
    return LaunchWork(busy * G * B, (blocks / busy,), (packed,), nbytes, 4 * B * L * v["H"] * C)


def _attention_prefill(launch: Launch, v: dict[str, Any], new_tokens: int) -> LaunchWork:
    B, H, L, C, BM, BL = v["lengths"].shape[0], v["H"], v["L"], v["C"], v["BM"], v["BL"]
    tiles = range(0, new_tokens, BM)
    clear, masked = 0, 0
    for first in tiles:
        seen = min(L - new_tokens + first + BM, L)
        unmasked = min(L - new_tokens + first + 1, seen) // BL
        clear, masked = clear + unmasked, masked + -(-seen // BL) - unmasked
    packed = 2 * BL * v["keys"].shape[-1] * v["keys"].itemsize
    pairs = new_tokens * (L - new_tokens) + new_tokens * (new_tokens + 1) // 2
    nbytes = _bytes(v, "keys", "values", "key_scales", "value_scales") + 4 * B * new_tokens * H * C
    iterations = (clear / len(tiles), masked / len(tiles))
    return LaunchWork(B * H * len(tiles), iterations, (packed, packed), nbytes, 4 * B * H * C * pairs)


def _store(launch: Launch, v: dict[str, Any]) -> LaunchWork:
    return LaunchWork(math.prod(launch.grid), (), (), 2 * v["qkv"].nbytes, 0)


_WORK: dict[str, Callable[[Launch, dict[str, Any]], LaunchWork]] = {
    "linear_kernel": _linear,
    "gate_up_decode_kernel": _gate_up_decode,
    "down_decode_kernel": _down_decode,
    "gate_up_prefill_kernel": _gate_up_prefill,
    "down_prefill_kernel": _down_prefill,
    "decode_kernel": _attention_decode,
    "qkv_kernel": _store,
}


def _two_matrices(steps: int, codes: list[int], v: dict[str, Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """(iterations, packed bytes) of the loops over gate and up: one for both, or one after the other in a trellis format's decode."""
    from dbrx_q.kernels.triton.codes import TRELLIS

    if "order" not in v and TRELLIS.value in (v["FORMAT1"], v["FORMAT2"]):
        return (steps, steps), (codes[0], codes[1])
    return (steps,), (sum(codes),)


def _active(T: int, v: dict[str, Any]) -> float:
    """Experts that are expected to have tokens if every token chooses A of E at random."""
    E, A = v["E"], v["A"]
    return float(E * (1 - (1 - A / E) ** T))


def _token_tiles(P: int, v: dict[str, Any]) -> float:
    """Tiles of tokens of all experts: the last one of each is half full on average."""
    return float(v["E"] * max(1.0, P / v["E"] / v["BT"] + 0.5))


def _bytes(v: dict[str, Any], *names: str) -> int:
    """Bytes of tensors, each counted once: an argument repeats another where a format lacks zero-points or scales."""
    return sum({id(v[name]): v[name].nbytes for name in names if isinstance(v[name], torch.Tensor)}.values())


def _packed(q: torch.Tensor, weights: int, v: dict[str, Any]) -> int:
    """Bytes of codes in a tile of BN rows and BK inputs, of a tensor that holds `weights`."""
    return round(q.nbytes / weights * v["BN"] * v["BK"])
