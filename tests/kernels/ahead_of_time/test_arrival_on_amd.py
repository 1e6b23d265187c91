"""On AMD every wavefront of a program has stored its partial results before one of them arrives at the counter."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from dbrx_q.errors import DbrxError
from dbrx_q.eval.bench.kernel_resources import compile_launch
from dbrx_q.eval.bench.kernel_shapes import empty_weight
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.triton import launch as launching
from dbrx_q.kernels.triton.launch import CHIPS, Launch, drains_stores, recording
from dbrx_q.kernels.triton.linear import linear
from dbrx_q.kernels.triton.router import route

META = torch.device("meta")
# Stores and atomics that gfx9 counts in vmcnt, and gfx11 in vscnt.
STORE = re.compile(r"(buffer|global|flat)_(store|atomic)")
WAIT = re.compile(r"s_waitcnt(_vscnt null, 0x0|.*vmcnt\(0\))")


def undrained_barriers(assembly: str) -> list[int]:
    """Line numbers of barriers that a wavefront may reach while one of its stores is not done, whatever branches it took."""
    late, pending = [], False
    for number, line in enumerate(assembly.splitlines()):
        instruction = line.split(";")[0].strip()
        if STORE.match(instruction):
            pending = True
        elif WAIT.match(instruction):
            pending = False
        elif instruction == "s_barrier" and pending:
            late.append(number)
    return late


def launches(chip: str) -> list[Launch]:
    """Kernels whose programs share a sum."""
    with recording(CHIPS[chip]) as recorded:
        route(torch.zeros(1, 6144, dtype=torch.bfloat16, device=META), torch.zeros(16, 6144, dtype=torch.bfloat16, device=META), 4, 1.0)
        linear(torch.zeros(1, 6144, dtype=torch.bfloat16, device=META), empty_weight(TensorFormat("int8", 64), 512, 6144))
    assert all(launch.constants["SPLITS"] > 1 for launch in recorded)
    return recorded


@pytest.mark.parametrize("chip", ["gfx942", "gfx1100"])
def test_stores_are_done_before_the_barrier_that_precedes_the_signal(chip: str) -> None:
    if chip == "gfx942" and not drains_stores():
        pytest.skip("this Triton cannot be told to wait, and the chip is refused")
    for launch in launches(chip):
        assembly = compile_launch(launch, CHIPS[chip]).assembly
        assert "s_barrier" in assembly
        assert "atomic_add" in assembly
        assert undrained_barriers(assembly) == []


def test_gfx942_does_not_wait_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "drains_stores", lambda: False)
    assert undrained_barriers(compile_launch(launches("gfx942")[0], CHIPS["gfx942"]).assembly)


@pytest.mark.parametrize(("name", "drains", "accepted"), [("gfx942", True, True), ("gfx942", False, False), ("gfx90a", True, False)])
def test_chips_that_could_lose_partial_sums_are_refused(name: str, drains: bool, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="AMD Instinct", gcnArchName=f"{name}:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(launching, "drains_stores", lambda: drains)
    if accepted:
        assert launching._chip.__wrapped__(0).name == name
        return
    with pytest.raises(DbrxError, match=f"announce partial sums before they are stored; AMD Instinct is {name}"):
        launching._chip.__wrapped__(0)
