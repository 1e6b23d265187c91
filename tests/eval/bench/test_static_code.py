"""Instructions, loops and pipes of listings that were counted by hand, and programs of a multiprocessor by NVIDIA's occupancy rules."""

from __future__ import annotations

import pytest

from dbrx_q.eval.bench.gpu_specs import GPUS
from dbrx_q.eval.bench.occupancy import Occupancy, occupancy, spread
from dbrx_q.eval.bench.sass import Pipe, code_outside, loops_of, multiply_adds, parse, pipes, product_loops
from dbrx_q.kernels.triton.launch import CHIPS


def listing(*lines: str) -> str:
    """A listing as `cuobjdump -sass` prints it: addresses are multiples of 16."""
    return "\n".join(f"        /*{16 * number:04x}*/    {line} ;     /* 0x0000000000007918 */" for number, line in enumerate(lines))


TWO_LOOPS = listing(
    "MOV R1, c[0x0][0x28]",  # 0x00
    "LOP3.LUT R4, R5, 0xf",  # 0x10: the first loop
    "@!P0 PRMT R6, R4, 0x7650, R7",  # 0x20: a loop inside it, with a predicated instruction
    "FADD R6, R6, R7",  # 0x30
    "@P1 BRA 0x20",  # 0x40
    "HMMA.16816.F32.BF16 R8, R4, R6, R8",  # 0x50
    "@P3 BRA 0x80",  # 0x60: a branch over one instruction stays inside the loop
    "LDS R3, [R2]",  # 0x70
    "@P2 BRA 0x10",  # 0x80
    "UIADD3 UR4, UR4, 0x1, URZ",  # 0x90: the second loop ends with an unconditional branch and is left from inside
    "@P4 BRA 0xc0",  # 0xa0
    "BRA 0x90",  # 0xb0
    "MUFU.EX2 R3, R3",  # 0xc0
    "@P5 BRA 0x100",  # 0xd0: to code behind the end, which jumps back: no loop
    "STG.E [R2], R3",  # 0xe0
    "EXIT",  # 0xf0
    "IADD3 R3, R3, 0x1, RZ",  # 0x100
    "BRA 0xe0",  # 0x110
    "BRA 0x120",  # 0x120: the trap behind the last instruction
    "NOP",
)


def test_loops_of_a_listing_counted_by_hand() -> None:
    instructions = parse(TWO_LOOPS)
    assert len(instructions) == 18
    assert instructions[2].guard == "!P0"
    first, second = loops_of(instructions)
    assert [part.name for part in first.body] == ["LOP3", "HMMA", "BRA", "LDS", "BRA"]
    [inner] = first.inner
    assert [part.name for part in inner.body] == ["PRMT", "FADD", "BRA"]
    assert [part.name for part in second.body] == ["UIADD3", "BRA", "BRA"]
    assert (first.multiplies(), inner.multiplies(), second.multiplies()) == (True, False, False)
    assert [part.name for part in first.instructions] == ["LOP3", "PRMT", "FADD", "BRA", "HMMA", "BRA", "LDS", "BRA"]
    assert product_loops(instructions) == [first]
    outside = [part.name for part in code_outside(instructions, (first, second))]
    assert outside == ["MOV", "MUFU", "BRA", "STG", "EXIT", "IADD3", "BRA"]


def test_a_branch_that_ends_beside_a_loop_joins_it() -> None:
    """Two backward branches to one target, and a branch whose condition is an operand."""
    [loop] = loops_of(parse(listing("MOV R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "FMUL R1, R1, R2", "BRA.U UP0, 0x10", "EXIT")))
    assert [part.name for part in loop.body] == ["FADD", "BRA", "FMUL", "BRA"]


def test_scheduling_that_is_printed_behind_the_operands_is_no_operand() -> None:
    """As `cuobjdump` of CUDA 12.8 prints it for sm_120."""
    lines = "LDG.E R4, desc[UR4][R2.64] &wr=0x2 ?trans1", "FADD R4, R4, R5 &req={2} ?WAIT5_END_GROUP", "BRA.U UP0, 0x0    ?trans6"
    instructions = parse(listing(*lines))
    assert [part.operands for part in instructions] == ["R4, desc[UR4][R2.64]", "R4, R4, R5", "UP0, 0x0"]
    assert len(loops_of(instructions)) == 1


def test_pipes_of_instructions() -> None:
    alu = ("LOP3.LUT", "PRMT", "SHF.R.U32.HI", "SEL", "IADD3.X", "ISETP.NE.U32.AND", "PLOP3.LUT", "VIMNMX.U32", "FSEL", "FMNMX", "LEA")
    alu += ("F2FP.BF16.F32.PACK_AB", "I2FP.F32.S32")
    fma = ("IMAD.MOV.U32", "IMAD.X", "FFMA", "HADD2.BF16_V2", "HFMA2.BF16_V2", "HADD2.F32")
    memory = ("LDGSTS.E.BYPASS.128", "LDS.128", "LDSM.16.M88.4", "LDG.E.U16.CONSTANT", "SHFL.IDX", "STS.64", "LDC.64")
    mma, uniform = ("HMMA.16816.F32.BF16", "HGMMA.64x128x16.F32.BF16"), ("UIADD3", "ULEA", "USEL", "R2UR", "UISETP.GE.U32.AND.EX")
    other = (
        "BRA",
        "BAR.SYNC.DEFER_BLOCKING",
        "LDGDEPBAR",
        "DEPBAR.LE",
        "NOP",
        "I2F.BF16.U16",
        "F2F.BF16.F32",
        "MUFU.EX2",
        "WARPGROUP.ARRIVE",
    )
    names = (*alu, *fma, *memory, *mma, *uniform, *other)
    counts = pipes(parse(listing(*(f"{name} R1, R2" for name in names))))
    expected = {"alu": alu, "fma": fma, "memory": memory, "mma": mma, "uniform": uniform, "other": other}
    assert counts == {Pipe(name): len(opcodes) for name, opcodes in expected.items()}


@pytest.mark.parametrize(
    ("opcode", "products"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.BF16", 16 * 8 * 8),
        ("IMMA.16832.S8.S8", 16 * 8 * 32),
        ("HGMMA.64x8x16.F32.BF16", 64 * 8 * 16 // 4),
        ("HGMMA.64x256x16.F32.BF16", 64 * 256 * 16 // 4),
        ("FFMA", 0),
    ],
)
def test_products_of_a_matrix_instruction(opcode: str, products: int) -> None:
    [instruction] = parse(listing(f"{opcode} R8, R4, R6, R8"))
    assert multiply_adds(instruction) == products


@pytest.mark.parametrize(
    ("chip", "warps", "registers", "shared_memory", "expected"),
    [
        # 128 registers: 4,096 of a warp, 16 warps in a file of 65,536.
        ("sm_90", 2, 128, 18560, Occupancy(8, "registers")),
        # 129 registers are allocated as 136: 4,352 of a warp, 3 warps in each of four files of 16,384.
        ("sm_90", 2, 129, 0, Occupancy(6, "registers")),
        ("sm_90", 3, 129, 0, Occupancy(4, "registers")),
        # 35,840 bytes and the 1,024 of the system: 100 KB hold two programs, 228 KB six.
        ("sm_86", 4, 96, 35840, Occupancy(2, "shared memory")),
        ("sm_90", 4, 32, 35840, Occupancy(6, "shared memory")),
        # 48 and 64 warps; 16, 24 and 32 programs.
        ("sm_86", 8, 32, 0, Occupancy(6, "warps")),
        ("sm_80", 8, 32, 0, Occupancy(8, "warps")),
        ("sm_86", 1, 32, 0, Occupancy(16, "blocks")),
        ("sm_89", 1, 32, 0, Occupancy(24, "blocks")),
        ("sm_120", 1, 32, 0, Occupancy(24, "blocks")),
        # The most that a program may use leaves no room for a second one.
        ("sm_120", 4, 32, 99 * 1024, Occupancy(1, "shared memory")),
    ],
)
def test_programs_of_a_multiprocessor(chip: str, warps: int, registers: int, shared_memory: int, expected: Occupancy) -> None:
    assert occupancy(GPUS[chip], warps=warps, registers=registers, shared_memory=shared_memory) == expected


def test_the_tail_of_a_grid() -> None:
    assert spread(264, 132) == 1.0
    assert spread(265, 132) == pytest.approx(3 * 132 / 265)  # one multiprocessor has three programs
    assert spread(1, 132) == 132.0


def test_the_data_of_chips_agrees() -> None:
    for name, gpu in GPUS.items():
        assert gpu.multiprocessors == CHIPS[name].multiprocessors
        assert gpu.shared_memory == CHIPS[name].shared_memory + 1024  # what one program may use, and the 1 KB of the system
    # Dense bfloat16 rates of NVIDIA's data sheets, in TFLOP/s, at the boost clocks that they name.
    for name, rate, clock in (("sm_80", 312, 1.41e9), ("sm_86", 71, 1.695e9), ("sm_89", 165.2, 2.52e9), ("sm_90", 989.4, 1.83e9)):
        assert GPUS[name].matmul_rate / GPUS[name].clock * clock == pytest.approx(rate * 1e12, rel=0.01)


@pytest.mark.parametrize(
    ("chip", "clock", "float32", "bfloat16"),
    [
        ("sm_80", 1.41e9, 19.5, 39.0),
        ("sm_86", 1.695e9, 35.6, 35.6),
        ("sm_89", 2.52e9, 82.6, 82.6),
        ("sm_90", 1.98e9, 66.9, 133.8),
        ("sm_120", 2.407e9, 104.8, 104.8),
    ],
)
def test_rates_without_tensor_cores_are_those_of_the_whitepapers(chip: str, clock: float, float32: float, bfloat16: float) -> None:
    """In TFLOP/s, at the boost clocks that the whitepapers name; integer products run at 64 lanes of a multiprocessor everywhere."""
    for opcode, lanes, rate in (("FFMA", 32, float32), ("HFMA2.BF16_V2", 64, bfloat16), ("HFMA2.MMA.BF16_V2", 64, bfloat16)):
        [instruction] = parse(listing(f"{opcode} R1, R2, R3, R4"))
        assert 2 * lanes / GPUS[chip].fma_clocks(instruction) * GPUS[chip].multiprocessors * clock == pytest.approx(rate * 1e12, rel=0.01)
    for opcode, expected in (("IMAD.WIDE.U32", 0.5), ("IDP.4A.S8.S8", 0.5), ("LOP3.LUT", 0.0)):
        [instruction] = parse(listing(f"{opcode} R1, R2, R3, R4"))
        assert GPUS[chip].fma_clocks(instruction) == expected
