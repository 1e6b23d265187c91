"""Compiles recorded launches as the JIT does: by its own code, for a chip that need not be there, into the cache that it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from dbrx_q.eval.bench.kernel_resources import launch_key
from dbrx_q.kernels.triton.launch import Chip, Launch, compiler_options, find_cache

__all__ = ["CompileRequest", "Pointer", "compile_as_the_jit", "compile_requests"]

_ALIGNMENT = 16  # bytes; what the compiler is told of a pointer


@dataclass(frozen=True)
class Pointer:
    """What the JIT looks at in a tensor."""

    dtype: torch.dtype
    """Of its elements."""
    offset: int
    """Elements after an aligned address."""


@dataclass(frozen=True)
class CompileRequest:
    """What the JIT looks at in a launch, in values that another process can be sent."""

    module: str
    """That defines the kernel."""
    kernel: str
    """Name of its function."""
    arguments: tuple[Any, ...]
    """By position: numbers, and `Pointer` for tensors."""
    constants: dict[str, Any]
    """The compile-time constants by name."""
    options: dict[str, Any]
    """See `compiler_options`."""


def compile_requests(launches: Iterable[Launch]) -> list[CompileRequest]:
    """One request for all launches that compile to the same code, in the order of the launches."""
    distinct: dict[tuple[Any, ...], CompileRequest] = {}
    for item in launches:
        options = compiler_options(item.warps, item.stages, item.fusion, item.pdl)
        key = (*launch_key(item), str(options))
        if key not in distinct:
            arguments = tuple(_described(argument) for argument in item.arguments)
            distinct[key] = CompileRequest(item.kernel.__module__, item.kernel.__name__, arguments, item.constants, options)
    return list(distinct.values())


def compile_as_the_jit(request: CompileRequest, chip: Chip) -> Any:
    """Compile a kernel, or read it from Triton's cache: what the JIT does with a launch on `chip`, up to loading the code.

    From then on, this process takes `chip` for its GPU: it must run no kernel.
    """
    from triton.runtime.driver import driver

    kernel = getattr(import_module(request.module), request.kernel)
    find_cache()
    driver.set_active(_DriverOf(chip))
    return kernel.warmup(*map(_argument, request.arguments), grid=(1,), **request.constants, **request.options)


class _DriverOf:
    """What the JIT asks of a driver before it compiles, answered for a chip that need not be there."""

    def __init__(self, chip: Chip) -> None:
        self._chip = chip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self._chip.vendor == "hip":
            return GPUTarget("hip", self._chip.name, 64 if self._chip.name.startswith("gfx9") else 32)
        return GPUTarget("cuda", int(self._chip.name.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def _described(argument: Any) -> Any:
    return Pointer(argument.dtype, int(argument.storage_offset()) % _ALIGNMENT) if isinstance(argument, torch.Tensor) else argument


def _argument(described: Any) -> Any:
    if not isinstance(described, Pointer):
        return described
    return torch.empty(_ALIGNMENT, dtype=described.dtype, device="meta")[described.offset :]
