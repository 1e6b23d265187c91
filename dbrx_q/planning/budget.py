"""What a model may take of a machine's memory, as its user says it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.errors import RequestError

from .host_memory import available_bytes
from .machine import Gpu, Machine, Placement
from .policy_names import DEFAULT_POLICY, MissPolicy
from .sizes import format_size, parse_size

__all__ = ["DEFAULT_CONTEXT", "Budget", "check_fits", "check_free", "machine_of"]

DEFAULT_CONTEXT = 4096
"""Tokens that keys and values are kept room for unless the user says otherwise."""

# Of what the machine could give now, what stays with it and with the process itself.
_HOST_MARGIN = 0.1


@dataclass(frozen=True)
class Budget:
    """A machine, and how a model is to use it.

    machine: what may be taken. context, batch, kv_format: what keys and values are kept room for; context None is 4096 tokens, or the
    model's
    context where that is shorter. step_tokens, logit_rows: as of `footprint.Request`. policy: which expert gives way,
    a `CachePolicyName`. profile: a trace whose counts say which experts are used most; "static" needs one. prefetch: whether experts are
    read before they are needed, as the next layer's router predicts them. direct: whether experts are read past the page cache; None for
    whichever is measured to be faster. miss_policy: how an expert is served that is not on its GPU. devices: the GPUs; None for cuda:0,
    cuda:1 ... dtype: of activations; None for the checkpoint's. fallback: whether the fallback copy that the checkpoint carries answers for
    experts on disk. upgrade: with that, as of `FallbackCopy`.
    """

    machine: Machine
    context: int | None = None
    batch: int = 1
    kv_format: str = "plain"
    step_tokens: int | None = None
    logit_rows: int | None = None
    policy: str = DEFAULT_POLICY.value
    profile: Path | None = None
    prefetch: bool = True
    direct: bool | None = None
    miss_policy: MissPolicy = MissPolicy.hybrid
    devices: tuple[torch.device, ...] | None = None
    dtype: torch.dtype | None = None
    fallback: bool = False
    upgrade: bool = True

    @property
    def gpus(self) -> tuple[torch.device, ...]:
        """The devices of the machine's GPUs, in their order."""
        return tuple(torch.device("cuda", i) for i in range(len(self.machine.gpus))) if self.devices is None else self.devices


def machine_of(max_memory: Mapping[int | str, int | str] | None) -> Machine:
    """The machine that `max_memory` allows, or, for None, all of it that is free now.

    Args:
        max_memory: bytes, or a size such as "22GiB", by index of a GPU and by "cpu". GPUs that are not named are not used; without "cpu" as
            much of the host's memory as is free.

    Raises:
        RequestError: another key, a GPU that does not exist, or a size that is none.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if max_memory is None:
        return Machine(_free_host(), tuple(Gpu(torch.cuda.mem_get_info(i)[0]) for i in range(seen)))
    gpus = []
    ram = _free_host()
    for key, value in max_memory.items():
        size = parse_size(value) if isinstance(value, str) else value
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise RequestError(f"max_memory[{key!r}] must be a number of bytes or a size such as '22GiB'; found {value!r}")
        if key == "cpu":
            ram = size
        elif isinstance(key, int) and not isinstance(key, bool) and key >= 0:
            gpus.append((key, size))
        else:
            raise RequestError(f"a key of max_memory must be the index of a GPU or 'cpu'; found {key!r}. The disk has no limit")
    check_gpus([key for key, _ in gpus], seen)
    return Machine(ram, tuple(Gpu(size) for _, size in sorted(gpus)))


def check_gpus(indices: Sequence[int], seen: int) -> None:
    """Refuse GPUs that are not there.

    Raises:
        RequestError: an index that torch does not see, or one that is skipped.
    """
    for index in indices:
        if index >= seen:
            raise RequestError(
                f"GPU {index} must be one that torch sees; it sees {seen}. Check the driver, and that torch is a GPU build, or leave it out"
            )
    if sorted(indices) != list(range(len(indices))):
        raise RequestError(f"GPUs must be named from 0 on; found {sorted(indices)}. Choose others with CUDA_VISIBLE_DEVICES")


def check_fits(placement: Placement, source: str) -> None:
    """Refuse a plan that does not fit.

    Raises:
        RequestError: with the bytes that are missing and the smallest budget that works.
    """
    if placement.fits:
        return
    parts = [
        f"{'the host' if short.device == 'cpu' else short.device} must hold {short.total:,} bytes ({format_size(short.total)}) at least: "
        f"{format_size(short.dense)} of weights that every token reads, {format_size(short.kv_cache)} of KV cache, "
        f"{f'{format_size(short.fallback)} of a fallback copy, ' if short.fallback else ''}"
        f"{format_size(short.workspace + short.reserve)} of workspace and reserve, and an expert; the budget is {short.budget:,} bytes"
        for short in placement.over_budget
    ]
    raise RequestError(f"{source}: {'; '.join(parts)}. Give more, or shorten the context")


def check_free(placement: Placement, gpus: Sequence[torch.device], source: str) -> None:
    """Refuse a plan for memory that is not free any more.

    Raises:
        RequestError: with what is free on the device that is short, and the budget that would do.
    """

    def free_on(device: torch.device) -> int:
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()

    for plan, device in [*zip(placement.gpus, gpus, strict=True), (placement.host, torch.device("cpu"))]:
        wanted = plan.total - (plan.reserve if device.type == "cuda" else 0)
        if wanted > free_on(device):  # a model that nobody uses any more may not have been given back yet
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if wanted > (free := free_on(device)):
            name = "host memory" if plan.device == "cpu" else plan.device
            raise RequestError(
                f"{source}: the plan takes {format_size(wanted)} of {name}, of which {format_size(free)} are free now: another program "
                f"took the rest. Free some, or give at most {free:,} bytes"
            )


def _free_host() -> int:
    return int(available_bytes() * (1 - _HOST_MARGIN))
