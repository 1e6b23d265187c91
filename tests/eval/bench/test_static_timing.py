"""The simulated issue of a multiprocessor, on loops whose clocks were computed by hand."""

from __future__ import annotations

import pytest

from dbrx_q.eval.bench.gpu_specs import GPUS
from dbrx_q.eval.bench.sass import Instruction, parse
from dbrx_q.eval.bench.warp_timing import clocks_of_an_iteration

GPU = GPUS["sm_90"]
NONE = 7  # no scoreboard


def encoded(*lines: tuple[str, int, int, int]) -> tuple[Instruction, ...]:
    """Instructions of (text, clocks to wait, scoreboard of the result, mask of scoreboards to wait for), through a listing's 128 bits."""
    parts = []
    for number, (text, stall, result, waits) in enumerate(lines):
        high = (stall | result << 5 | NONE << 8 | waits << 11) << 41
        parts.append(f"/*{16 * number:04x}*/  {text} ;  /* 0x0000000000007918 */\n    /* 0x{high:016x} */")
    return parse("\n".join(parts))


def clocks(body: tuple[Instruction, ...], programs: int = 1, warps: int = 1, dram_clocks: int = 1000) -> float:
    return clocks_of_an_iteration(body, GPU, programs=programs, warps=warps, dram_latency=dram_clocks / GPU.clock)


def test_control_codes_of_a_real_instruction() -> None:
    """From a kernel for sm_86: it waits for scoreboard 2, holds 0 until its result is there, and 1 clock."""
    text = "/*1210*/ LDG.E.U8 R26, desc[UR12][R24.64] ; /* 0x0000000c181a0981 */\n /* 0x004e220000000000 */"
    [instruction] = parse(text)
    assert instruction.control == 0x004E220000000000 >> 41 & 0x1FFFF
    assert (instruction.control & 15, instruction.control >> 5 & 7, instruction.control >> 11) == (1, 0, 4)


@pytest.mark.parametrize(
    ("programs", "warps", "expected"),
    [
        (1, 1, 12),  # one warp waits for each result
        (1, 4, 12),  # each of four quarters has one warp
        (4, 4, 12),  # four warps of a quarter fill its 12 clocks
        (8, 4, 24),  # eight need two clocks an instruction
    ],
)
def test_a_dependent_chain_is_hidden_by_other_warps(programs: int, warps: int, expected: int) -> None:
    chain = encoded(*[("FFMA R1, R1, R2, R3", 4, NONE, 0)] * 3)
    assert clocks(chain, programs, warps) == pytest.approx(expected, rel=0.1)


def test_a_pipe_of_half_the_lanes_takes_two_clocks() -> None:
    assert clocks(encoded(*[("LOP3.LUT R1, R1, R2, R3", 1, NONE, 0)] * 4)) == 8
    assert clocks(encoded(*[("FFMA R1, R1, R2, R3", 1, NONE, 0)] * 4)) == 4
    assert clocks(encoded(*[("IMAD R1, R1, R2, R3", 1, NONE, 0)] * 4)) == 8
    # 16 bytes of each lane take 4 clocks of the data path, which all quarters share.
    assert clocks(encoded(*[("LDS.128 R4, [R1]", 1, NONE, 0)] * 2), 1, 4) == 32


def test_a_scoreboard_is_waited_for() -> None:
    body = encoded(("LDS R4, [R1]", 1, 2, 0), ("FADD R5, R5, R4", 4, NONE, 1 << 2))
    assert clocks(body) == 30 + 4


def test_asynchronous_copies_are_waited_for_by_groups() -> None:
    """One group an iteration of which one may be incomplete: two iterations take the latency of a copy."""
    body = encoded(("DEPBAR.LE SB0, 0x1", 4, NONE, 0), ("LDGDEPBAR", 1, 0, 0))
    assert clocks(body, dram_clocks=1000) == pytest.approx(500, rel=0.05)


def test_matrix_products_of_a_warpgroup_are_waited_for() -> None:
    products = ("HGMMA.64x128x16.F32.BF16 R24, R160, gdesc[UR12], R24, gsb0", 1, NONE, 0)
    # 32,768 products of a warp at 512 a clock and quarter are 64 clocks; the result comes 32 later.
    assert clocks(encoded(products, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, NONE, 0)), 1, 4) == 64 + 32 + 1
    assert clocks(encoded(products, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, NONE, 0)), 2, 4) == pytest.approx(128, rel=0.05)


def test_a_warp_goes_on_while_its_matrix_products_wait_for_each_other() -> None:
    text = "HGMMA.64x128x16.F32.BF16 R24, R160, gdesc[UR12], R24"
    products = (text, 1, NONE, 0), (text + ", gsb0", 1, NONE, 0)
    others = [("FFMA R1, R1, R2, R3", 1, NONE, 0)] * 150
    # The products take 2 * 64 + 32 clocks, and the other instructions 150 of them.
    assert clocks(encoded(*products, *others, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, NONE, 0)), 1, 4) == pytest.approx(160, abs=4)


def test_a_barrier_waits_for_the_slowest_warp() -> None:
    body = encoded(("BAR.SYNC.DEFER_BLOCKING 0x0", 1, NONE, 0), ("LDS.128 R4, [R1]", 1, NONE, 0))
    # The four warps meet, and leave after 20 clocks; their loads take 4 clocks each, so the last one begins 12 later.
    assert clocks(body, 1, 4) == pytest.approx(20 + 12 + 1, abs=1)
