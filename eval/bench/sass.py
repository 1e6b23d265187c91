"""Reads NVIDIA's machine code: the instructions of a listing of `cuobjdump -sass`, their loops, and the pipe that executes each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Instruction", "Loop", "Pipe", "code_outside", "loops_of", "multiply_adds", "parse", "pipe_of", "pipes", "product_loops"]

# The second half of the 128 bits of an instruction, if it is there, has a line of its own.
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* (0x[0-9a-f]{16}) \*/)?")
_SCHEDULING = re.compile(r"\s+[?&](?:trans|WAIT|req|rd|wr).*")  # which some versions print behind the operands for Blackwell
_GUARD = re.compile(r"@(!?U?P(?:T|\d+))\s+")
_TARGET = re.compile(r"\b(0x[0-9a-f]+)\s*$")


class Pipe(StrEnum):
    """The units that instructions are issued to."""

    ALU = "alu"
    """Integer and logic, comparisons, selections and the packing of float32 to 16 bits (F2FP): 16 lanes of each quarter of a multiprocessor
    (Nsight Compute, "Pipelines")."""
    FMA = "fma"
    """float32 and packed 16-bit arithmetic, and integer products (IMAD), which also move registers."""
    MEMORY = "memory"
    """Loads and stores of every memory, shuffles, and matrix loads from shared memory."""
    MMA = "mma"
    """The tensor cores."""
    UNIFORM = "uniform"
    """One result for a warp."""
    OTHER = "other"
    """Branches, barriers, all other conversions and special functions."""


_OPCODES = {
    Pipe.ALU: (
        "BMSK F2FP FCHK FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSETP2 I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP LOP3 MOV P2R PLOP3 "
        "PRMT PSETP R2P SEL SGXT SHF SHL SHR VABSDIFF VABSDIFF4 VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE VOTEU"
    ),
    Pipe.FMA: "FADD FADD2 FFMA FFMA2 FMUL FMUL2 FSWZADD HADD2 HFMA2 HMUL2 IDP IDP4A IMAD IMUL",
    Pipe.MEMORY: (
        "ATOM ATOMG ATOMS CCTL LD LDC LDG LDGSTS LDL LDS LDSM MATCH MOVM RED REDG REDUX SHFL ST STG STL STS STSM SULD SUST TEX TLD UBLKCP "
        "UTMALDG UTMASTG"
    ),
    Pipe.MMA: "BMMA DMMA HGMMA HMMA IGMMA IMMA OMMA QGMMA QMMA",
}
_PIPE_OF = {name: pipe for pipe, names in _OPCODES.items() for name in names.split()}
_SHAPE = re.compile(r"^[A-Z]+\.(?:SP\.)?(?:(\d+)x(\d+)x(\d+)|(\d{4,5}))\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    """Bytes from the beginning of the kernel."""
    opcode: str
    """With its modifiers, as LDG.E.128."""
    guard: str
    """The predicate under which it has an effect, such as "!P0"; empty for none. Its slot is spent either way."""
    target: int | None
    """Where a branch or call jumps to; None for all others."""
    conditional: bool
    """Whether it is guarded, or a branch whose operands name a condition."""
    operands: str = ""
    """As the listing has them."""
    control: int = 0
    """What the scheduler reads: 4 bits of clocks to wait, a hint, two scoreboards of 3 bits, and 6 bits of those to wait for."""

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """A natural loop."""

    head: int
    """Index of the instruction that every iteration begins with."""
    members: frozenset[int]
    """Indices of all its instructions."""
    body: tuple[Instruction, ...]
    """Its instructions, those of inner loops excluded."""
    inner: tuple[Loop, ...]
    """Loops inside it, in order."""

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Its instructions in order, those of inner loops counted once."""
        parts = self.body + tuple(part for loop in self.inner for part in loop.instructions)
        return tuple(sorted(parts, key=lambda part: part.address))

    def multiplies(self) -> bool:
        """Whether it, or a loop inside it, has matrix instructions."""
        return any(pipe_of(part) is Pipe.MMA for part in self.body) or any(loop.multiplies() for loop in self.inner)


def parse(listing: str) -> tuple[Instruction, ...]:
    """The instructions of the only kernel of a listing, in order, without the padding behind the last one."""
    instructions = []
    for match in _LINE.finditer(listing):
        address, text = int(match[1], 16), _SCHEDULING.sub("", match[2]).strip()
        guard = _GUARD.match(text)
        if guard:
            text = text[guard.end() :]
        opcode, _, operands = text.partition(" ")
        jump = _TARGET.search(operands) if opcode.split(".")[0] in ("BRA", "CALL", "JMP") else None
        conditional = guard is not None or (jump is not None and jump.start() > 0)
        target, control = int(jump[1], 16) if jump else None, int(match[3], 16) >> 41 & 0x1FFFF if match[3] else 0
        instructions.append(Instruction(address, opcode, guard[1] if guard else "", target, conditional, operands, control))
    traps = [number for number, part in enumerate(instructions) if part.target == part.address]
    return tuple(instructions[: traps[-1]] if traps else instructions)  # a branch to itself ends a kernel; NOPs follow


def loops_of(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The outermost natural loops of a kernel, in order of their first instructions, each with the loops inside it.

    A branch to an instruction that every path to the branch passes makes a loop: all instructions from which the branch is reached without
    passing its target again. Branches to one target are one loop. Both sides of a branch inside a loop count as executed.
    """
    flow = _successors(instructions)
    before: list[list[int]] = [[] for _ in instructions]
    for number, following in enumerate(flow):
        for successor in following:
            before[successor].append(number)
    index = {part.address: number for number, part in enumerate(instructions)}
    members: dict[int, set[int]] = {}
    for number, part in enumerate(instructions):
        if part.target in index and part.name != "CALL":
            head = index[part.target]
            if number not in _reached(flow, 0, head) and number in _reached(flow, head, None):
                members.setdefault(head, {head}).update(_reached(before, number, head))
    return _nested(instructions, sorted(members.items(), key=lambda loop: -len(loop[1])))


def product_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops with matrix instructions, in order; of nested ones the innermost."""

    def innermost(loops: Iterable[Loop]) -> list[Loop]:
        return [part for loop in loops if loop.multiplies() for part in innermost(loop.inner) or [loop]]

    return innermost(loops_of(instructions))


def code_outside(instructions: Sequence[Instruction], loops: Iterable[Loop]) -> tuple[Instruction, ...]:
    """The instructions outside of all `loops`."""
    covered = frozenset().union(*(loop.members for loop in loops))
    return tuple(part for number, part in enumerate(instructions) if number not in covered)


def pipe_of(instruction: Instruction) -> Pipe:
    """The pipe that executes an instruction. Names that begin with U and are in no list are of the uniform datapath."""
    name = instruction.name
    if name in _PIPE_OF:
        return _PIPE_OF[name]
    return Pipe.UNIFORM if name.startswith("U") or name in ("R2UR", "S2UR") else Pipe.OTHER


def pipes(instructions: Iterable[Instruction]) -> Counter[Pipe]:
    """How many instructions each pipe executes."""
    return Counter(pipe_of(part) for part in instructions)


def multiply_adds(instruction: Instruction) -> int:
    """Products that one warp adds up by a matrix instruction: M * N * K of its shape, a quarter of that for a warpgroup's; 0 for others."""
    if pipe_of(instruction) is not Pipe.MMA:
        return 0
    shape = _SHAPE.match(instruction.opcode)
    if shape is None:
        return 0
    if shape[4]:  # HMMA.16816 is 16 x 8 x 16, IMMA.16832 is 16 x 8 x 32
        return int(shape[4][:2]) * int(shape[4][2]) * int(shape[4][3:])
    return int(shape[1]) * int(shape[2]) * int(shape[3]) // (4 if "GMMA" in instruction.name else 1)


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Indices of the instructions that may follow each."""
    index = {part.address: number for number, part in enumerate(instructions)}
    flow = []
    for number, part in enumerate(instructions):
        ends = not part.conditional and part.name in ("BRA", "BRX", "JMP", "EXIT", "RET")
        following = [] if ends or number + 1 == len(instructions) else [number + 1]
        if part.target in index:
            following.append(index[part.target])
        flow.append(following)
    return flow


def _reached(flow: Sequence[Sequence[int]], start: int, removed: int | None) -> set[int]:
    """Indices reached from `start`, itself included, by paths that do not enter `removed`."""
    open_ends = [start] if start != removed else []
    reached = set(open_ends)
    while open_ends:
        for successor in flow[open_ends.pop()]:
            if successor != removed and successor not in reached:
                reached.add(successor)
                open_ends.append(successor)
    return reached


def _nested(instructions: Sequence[Instruction], members: list[tuple[int, set[int]]]) -> tuple[Loop, ...]:
    """The loops of `members` (head, indices), the largest first."""
    loops: list[Loop] = []
    while members:
        head, inside = members.pop(0)
        within = [loop for loop in members if loop[0] in inside]
        members = [loop for loop in members if loop[0] not in inside]
        inner = _nested(instructions, within)
        own = inside.difference(*(loop.members for loop in inner))
        loops.append(Loop(head, frozenset(inside), tuple(instructions[number] for number in sorted(own)), inner))
    return tuple(sorted(loops, key=lambda loop: loop.head))
