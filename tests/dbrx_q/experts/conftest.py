"""Models on GPUs that are parts of host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import pinned_bytes


@pytest.fixture(scope="session")
def gpus() -> Callable[..., Budget]:
    """Makes budgets of GPUs with so many megabytes beside the reserve of a real one, which the planner subtracts."""

    def budget(*megabytes: float, ram: float, **options: Any) -> Budget:
        reserve = Gpu(0).reserve
        machine = Machine(
            int(ram * 1e6) + len(megabytes) * pinned_bytes(Gpu.link), tuple(Gpu(int(size * 1e6) + reserve) for size in megabytes)
        )
        return Budget(machine, context=64, step_tokens=40, devices=(torch.device("cpu"),) * len(megabytes), direct=False, **options)

    return budget


@pytest.fixture
def loaded(quantized_nano: Path) -> Iterator[Callable[..., DbrxForCausalLM]]:
    """Loads models, and closes them after the test."""
    opened: list[DbrxForCausalLM] = []

    def load(budget: Budget, folder: Path = quantized_nano) -> DbrxForCausalLM:
        opened.append(load_model(folder, budget=budget))
        return opened[-1]

    yield load
    for model in opened:
        model.close()
