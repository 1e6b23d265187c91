"""What a run does, in order: most valuable first within each stage, every item with the time that it is expected to take and may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dbrx_q.eval.bench.kernel_work import dbrx_works
from dbrx_q.eval.bench.tune import dbrx_problems
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.triton.launch import Chip
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, Problem

from .settings import DRY_CHIP, Settings, tree

__all__ = ["CEILINGS", "FIRST_ROWS", "SOURCES", "TEST_FILES", "TITLES", "Item", "plan", "problem_name", "tuned_problems"]

TITLES = {
    "system": "Machine",
    "compile": "Compiling ahead of time",
    "memcheck": "Memory checker",
    "tests": "Tests",
    "ceilings": "Ceilings",
    "rows": "Kernels",
    "model": "Whole model",
    "offload": "Offloading",
    "tuning": "Tiles",
    "tuned": "Kernels with measured tiles",
}
"""Heading of each stage."""
SOURCES = {"all but tiles": ("rows", "model", "tests"), "tiles": ("tuning",)}
"""The stages whose launches are recorded and compiled by an item of the stage "compile"."""
TEST_FILES = (
    ("tests/kernels/gpu/test_products_on_gpu.py", 60, 180),
    ("tests/kernels/gpu/test_attention_on_gpu.py", 40, 120),
    ("tests/kernels/gpu/test_small_ops_on_gpu.py", 15, 60),
    ("tests/kernels/gpu/test_arrival_on_gpu.py", 20, 60),
    ("tests/dbrx_q/gpu/test_model_on_gpu.py", 60, 120),
    ("tests/dbrx_q/gpu/test_gpu_experts_on_gpu.py", 60, 120),
    ("tests/eval/gpu/test_speed_on_gpu.py", 30, 60),
    ("tests/quantize/gpu/test_quantize_on_gpu.py", 60, 120),
)
"""Files of tests that need a GPU, with the seconds that each is expected to take and may take. None has been timed on a GPU yet."""
CEILINGS = ("before", "after")
"""Copy bandwidth and matmul rate are measured before the first row and after the last."""
FIRST_ROWS = (
    "moe_experts int4:64 T=1",
    "Wqkv int8:64 T=1",
    "out_proj int8:64 T=1",
    "attention decode int8 B=1",
    "lm_head int8:64 T=1",
    "moe_experts int4:64 T=8",
    "moe_experts int4:64 T=4096",
    "Wqkv int4:64 T=1",
    "attention decode int8 B=8",
    "norm T=1",
    "norm and router T=1",
    "store T=1",
    "Wqkv int8:64 T=8",
    "Wqkv int8:64 T=4096",
    "attention prefill plain",
)
"""Rows of the kernel benchmark that the decode step and the targets depend on; the others follow."""
_TUNED = (
    ("gate_up", 1, 4),
    ("down", 1, 4),
    ("linear", 1, 8),
    ("gate_up", 8, 4),
    ("down", 8, 4),
    ("gate_up", 4096, 4),
    ("down", 4096, 4),
    ("linear", 1, 4),
)
_LARGEST = 1 << 29  # elements of a matrix to tune: the head, which takes long to measure, is last
_PROBLEMS = 15
_EARLY_TESTS = ("tests/kernels/", "tests/dbrx_q/")  # of what a GPU computes; the others are of programs around it
_TUNED_ROWS = ("moe_experts", "Wqkv", "out_proj")
_DRY_TESTS = "test_small_ops_on_gpu.py"


@dataclass(frozen=True)
class Item:
    """One result."""

    stage: str
    """Key of `TITLES`."""
    name: str
    """Within its stage."""
    expected: float
    """Seconds; it starts only if so many are left."""
    limit: float
    """Seconds after which it is killed."""
    again: bool = False
    """Whether every run does it, since another machine or process needs it anew."""

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.stage}/{self.name}"


def plan(settings: Settings, chip: Chip = DRY_CHIP) -> list[Item]:
    """All items, in order.

    Args:
        settings: of the run.
        chip: of its GPU.
    """
    if settings.dry:
        return list(_dry(settings))
    rows = _row_names(settings)
    first, others = rows[: len(FIRST_ROWS)], rows[len(FIRST_ROWS) :]
    tests = [Item("tests", name, expected, limit) for name, expected, limit in TEST_FILES if _exists(name)]
    late = [item for item in tests if not item.name.startswith(_EARLY_TESTS)]
    tuned = [name for name in first if name.startswith(_TUNED_ROWS)]
    return [
        Item("system", "versions", 10, 60, again=True),
        Item("compile", "all but tiles", 40, 150, again=True),
        Item("memcheck", "one call of each op", 45, 90),
        Item("ceilings", CEILINGS[0], 5, 30, again=True),
        *(Item("rows", name, 4, 30) for name in first),
        Item("model", "decode step", 45, 120),
        *(item for item in tests if item not in late),
        *(Item("rows", name, 4, 30) for name in others),
        Item("offload", "24 GB", 60, 150),
        Item("compile", "tiles", 15, 60, again=True),
        *(Item("tuning", problem_name(problem), 8, 25) for problem in tuned_problems(settings, chip)),
        *(Item("tuned", name, 4, 30) for name in tuned),
        Item("ceilings", CEILINGS[1], 5, 30, again=True),
        *late,
    ]


def problem_name(problem: Problem) -> str:
    """Names a problem of tiles in the journal."""
    return f"{problem.op} {problem.bits} bits T={problem.tokens} {problem.N}x{problem.K}"


def tuned_problems(settings: Settings, chip: Chip) -> list[Problem]:
    """The problems whose tiles a run measures: those of decoding first, the widest share of a token's time first."""
    formats = TensorFormat("int4", 64), TensorFormat("int8", 64)
    problems = dbrx_problems(chip, formats, settings.shapes)
    offered = [problem for problem in problems if problem.op != "linear" or problem.N * problem.K < _LARGEST]
    tokens = {True: 1, False: settings.shapes.active}  # prefill counts pairs of a token and an expert
    chosen = [
        problem
        for op, T, bits in _TUNED
        for problem in offered
        if (problem.op, problem.bits) == (op, bits) and problem.tokens == T * tokens[op == "linear" or T <= MATVEC_TOKENS]
    ]
    chosen += [problem for problem in offered if problem not in chosen and problem.tokens in (1, 8) and problem.op == "linear"]
    chosen += [problem for problem in offered if problem not in chosen and problem.tokens == 2]
    return chosen[: 2 if settings.dry else _PROBLEMS]


def _dry(settings: Settings) -> Iterator[Item]:
    """A few items of every stage; expected times are those of two cores."""
    rows = _row_names(settings)[:3]
    yield Item("system", "versions", 1, 60, again=True)
    yield Item("compile", "all but tiles", 5, 120, again=True)
    yield Item("memcheck", "one call of each op", 5, 60)
    yield from (Item("tests", name, 5, 60) for name, _, _ in TEST_FILES if name.endswith(_DRY_TESTS) and _exists(name))
    yield Item("ceilings", CEILINGS[0], 5, 30, again=True)
    yield from (Item("rows", name, 5, 30) for name in rows)
    yield Item("model", "decode step", 5, 60)
    yield Item("offload", "24 GB", 5, 60)
    yield from (Item("tuning", problem_name(problem), 5, 30) for problem in tuned_problems(settings, DRY_CHIP))
    yield from (Item("tuned", name, 5, 30) for name in rows[:1])
    yield Item("ceilings", CEILINGS[1], 5, 30, again=True)


def _row_names(settings: Settings) -> list[str]:
    names = [work.name for work in dbrx_works(torch.device("meta"), settings.shapes)]
    return [*FIRST_ROWS, *(name for name in names if name not in FIRST_ROWS)]


def _exists(name: str) -> bool:
    root = tree()
    return root is not None and (root / name).is_file()
