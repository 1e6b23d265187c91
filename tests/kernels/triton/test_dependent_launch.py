"""Programmatic dependent launch: the rule of `launch.py` in a model of the scheduler, the search for accesses before the wait, the switch.

The model lets programs run in any order that CUDA allows: a kernel's programs may begin once every program of the kernel before has called
`start_next` or ended; `wait_for_previous` returns once all programs of the kernel before have ended.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from dbrx_q.eval.bench.kernel_resources import early_accesses
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.triton import launch as triton_launch
from dbrx_q.kernels.triton.launch import CHIPS, recording

START, WAIT, READ, WRITE = "start next", "wait", "read", "write"
Program = tuple[tuple[str, str], ...]


def step(reads: str, writes: str, *, waits: bool = True, wait_first: bool = False) -> Program:
    start, wait = (START, ""), ((WAIT, ""),) * waits
    begin = (*wait, start) if wait_first else (start, *wait)
    return (*begin, *((READ, name) for name in reads), *((WRITE, name) for name in writes))


def run(kernels: list[list[Program]], order: random.Random) -> tuple[str, ...]:
    """What each read saw, in an order that CUDA allows: the number of the kernel that last wrote the buffer; programs in turn."""
    at = [[0] * len(programs) for programs in kernels]
    contents: dict[str, int] = {}
    seen: dict[tuple[int, int, int], int] = {}

    def ended(k: int) -> bool:
        return all(place == len(program) for place, program in zip(at[k], kernels[k], strict=True))

    def started(k: int) -> bool:
        return all((START, "") in program[:place] or place == len(program) for place, program in zip(at[k], kernels[k], strict=True))

    def ready() -> Iterator[tuple[int, int]]:
        for k, programs in enumerate(kernels):
            if k and not started(k - 1):
                return
            for p, program in enumerate(programs):
                if at[k][p] < len(program) and (program[at[k][p]][0] != WAIT or k == 0 or ended(k - 1)):
                    yield k, p

    while choices := list(ready()):
        k, p = order.choice(choices)
        kind, name = kernels[k][p][at[k][p]]
        if kind == READ:
            seen[k, p, at[k][p]] = contents.get(name, -1)
        elif kind == WRITE:
            contents[name] = k
        at[k][p] += 1
    assert all(ended(k) for k in range(len(kernels))), "a program waits forever"
    return tuple(f"{place}: {value}" for place, value in sorted(seen.items()))


def outcomes(kernels: list[list[Program]]) -> set[tuple[str, ...]]:
    return {run(kernels, random.Random(seed)) for seed in range(300)}


# Scratch "s" is written by one kernel, read by the next, and written again two kernels later.
STREAM = [[step("x", "s")] * 2, [step("s", "y")] * 2, [step("y", "z")], [step("z", "s")] * 2, [step("s", "x")]]


def test_where_every_program_waits_first_kernels_see_what_they_would_one_after_the_other() -> None:
    assert len(outcomes(STREAM)) == 1
    assert len(outcomes([[step("x", "s", wait_first=True)] * 2, *STREAM[1:]])) == 1


@pytest.mark.parametrize(
    ("kernel", "program"),
    [
        pytest.param(1, step("s", "y", waits=False), id="no wait"),
        pytest.param(3, step("z", "s", waits=False), id="scratch overwritten while an earlier kernel reads it"),
        pytest.param(1, ((START, ""), (READ, "s"), (WAIT, ""), (WRITE, "y")), id="a load before the wait"),
        pytest.param(3, ((START, ""), (WRITE, "s"), (WAIT, "")), id="a store before the wait"),
    ],
)
def test_the_model_finds_programs_that_break_the_rule(kernel: int, program: Program) -> None:
    broken = [list(programs) for programs in STREAM]
    broken[kernel][-1] = program
    assert len(outcomes(broken)) > 1


def test_a_kernel_whose_programs_all_return_early_without_a_wait_lets_the_next_overtake_the_one_before() -> None:
    assert len(outcomes([STREAM[0], [()], [step("s", "y")]])) > 1
    assert len(outcomes([STREAM[0], [((WAIT, ""),)], [step("s", "y")]])) == 1


WAITS = "ld.param.b64 %rd1, [p];\ngriddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nld.global.b32 %r1, [%rd1];\n"
SASS_WAITS = "/*0010*/ PREEXIT ;\n/*0020*/ @P1 BRA.U.ANY 0x10 ;\n/*0030*/ ACQBULK ;\n/*0040*/ LDG.E R1, [R2] ;\n"


@pytest.mark.parametrize(
    ("ptx", "sass", "early"),
    [
        pytest.param(WAITS, SASS_WAITS, [], id="waits first"),
        pytest.param("ld.global.b32 %r0, [%rd1];\n" + WAITS, SASS_WAITS, ["ld.global.b32 %r0, [%rd1];"], id="a load in PTX"),
        pytest.param("@%p1 bra $L1;\n" + WAITS, SASS_WAITS, ["@%p1 bra $L1;"], id="a branch in PTX"),
        pytest.param("atom.add.u32 %r0, [%rd1], 1;\n" + WAITS, SASS_WAITS, ["atom.add.u32 %r0, [%rd1], 1;"], id="an atomic in PTX"),
        pytest.param(WAITS, "/*0000*/ LDG.E R1, [R2] ;\n" + SASS_WAITS, ["LDG.E R1, [R2]"], id="a load that ptxas moved"),
        pytest.param(WAITS, "/*0000*/ @P0 BRA 0x40 ;\n" + SASS_WAITS, ["@P0 BRA 0x40"], id="a branch past the wait"),
        pytest.param(WAITS, "/*0000*/ @P0 EXIT ;\n" + SASS_WAITS, ["@P0 EXIT"], id="an early end"),
        pytest.param("ret;", SASS_WAITS, ["no griddepcontrol.wait"], id="no wait"),
        pytest.param(WAITS, "/*0000*/ EXIT ;", ["EXIT", "no ACQBULK"], id="a wait that ptxas dropped"),
    ],
)
def test_accesses_before_the_wait_are_found(ptx: str, sass: str, early: list[str]) -> None:
    assert early_accesses(ptx, sass, pdl=True) == early


def test_kernels_without_pdl_have_none_of_its_instructions() -> None:
    assert early_accesses(WAITS, SASS_WAITS, pdl=False) == ["griddepcontrol.launch_dependents", "griddepcontrol.wait", "PREEXIT", "ACQBULK"]
    assert early_accesses("ret;", "/*0000*/ EXIT ;", pdl=False) == []


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    triton_launch._dependent_launch_known.cache_clear()
    yield
    triton_launch._dependent_launch_known.cache_clear()


@pytest.mark.parametrize(
    ("chip", "switch", "pdl"),
    [("sm_90", "1", True), ("sm_120", "1", True), ("sm_89", "1", False), ("gfx1100", "1", False), ("sm_90", "0", False)],
)
@pytest.mark.usefixtures("fresh_choice")
def test_pdl_is_set_where_the_chip_has_it(monkeypatch: pytest.MonkeyPatch, chip: str, switch: str, pdl: bool) -> None:
    monkeypatch.setenv("DBRX_Q_PDL", switch)
    x = torch.empty(1, 64, dtype=torch.bfloat16, device="meta")
    with recording(CHIPS[chip]) as launches:
        add_norm(x, None, x[0], 1e-5, backend=Backend.TRITON)
    assert [(launch.pdl, launch.constants["PDL"]) for launch in launches] == [(pdl, pdl)]


@pytest.mark.usefixtures("fresh_choice")
def test_another_value_of_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBRX_Q_PDL", "off")
    with pytest.raises(Exception, match="DBRX_Q_PDL must be 0 or 1; found 'off'"):
        CHIPS["sm_90"].dependent_launch  # noqa: B018 # reads the environment
