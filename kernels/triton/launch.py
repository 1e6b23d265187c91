"""Launches Triton kernels, or records the launches: the chip, the kernel and its arguments.

All kernels are launched by `launch`, so that `recording` sees the same calls as a real run. With tensors on the `meta` device the launchers
compute tile choices and arguments, and nothing runs.

Programmatic dependent launch: on NVIDIA from sm_90 on, a kernel that takes the constant PDL is launched so that it may begin while the
kernel before it in the stream still runs. What one kernel wrote or still reads is then safe from the next under one rule: **every program
of a kernel that takes PDL calls `wait_for_previous` before its first load from global memory, its first store and its first atomic**, also
a program that returns early. All that it may do before is to request bytes into the L2 cache. A kernel that has ended has therefore waited
for the end of the one before it, and so on: behind the wait, all kernels before it have ended, and their scratch memory, counters and
outputs may be read and overwritten. Kernels without PDL, such as torch's, begin when all work before them has ended. DBRX_Q_PDL=0 turns
it off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dbrx_q.kernels.formats.cache_folders import can_write, home, temporary_cache, warn_once
from dbrx_q.kernels.formats.errors import DbrxError

from .repeated_launch import Key, keep, key_of, repeatable

__all__ = [
    "CHIPS",
    "INTERPRETER",
    "Chip",
    "Launch",
    "Observed",
    "chip_of",
    "compiler_options",
    "current_stream",
    "dependent_launch_wanted",
    "drains_stores",
    "find_cache",
    "interpreting",
    "is_recording",
    "launch",
    "observing",
    "recording",
    "refused_kernel",
    "triton_version",
]


@dataclass(frozen=True)
class Chip:
    """The properties of a device that tile choices depend on."""

    name: str
    """Such as "sm_86" or "gfx1100"."""
    vendor: str
    """ "cuda", "hip" or "interpreter"."""
    multiprocessors: int
    """The multiprocessors that share the programs of a grid."""
    shared_memory: int
    """The most bytes of shared memory that one program may use."""

    @property
    def smallest_dot(self) -> int:
        """Fewest columns of a `tl.dot` that the matrix units and the compiler take: 8 on NVIDIA from Triton 3.5 on, 16 elsewhere."""
        return 16 if self.vendor == "hip" or triton_version() < (3, 5) else 8

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may begin before the one before it ends; NVIDIA's chips from sm_90 on can, if Triton and CUDA know of it.

        Raises:
            DbrxError: another value of DBRX_Q_PDL than 0 and 1.
        """
        return self.vendor == "cuda" and int(self.name.removeprefix("sm_")) >= 90 and _dependent_launch_known()


_KB = 1024
# Multiprocessors of the part that most users own. Shared memory: CUDA C++ Programming Guide, technical specifications per compute
# capability (what one block may opt in to); RDNA3 and CDNA3 ISA guides for AMD.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 108, 163 * _KB),  # A100
        Chip("sm_86", "cuda", 82, 99 * _KB),  # RTX 3090
        Chip("sm_89", "cuda", 128, 99 * _KB),  # RTX 4090
        Chip("sm_90", "cuda", 132, 227 * _KB),  # H100, H200
        Chip("sm_120", "cuda", 170, 99 * _KB),  # RTX 5090
        Chip("gfx1100", "hip", 96, 64 * _KB),  # RX 7900 XTX
        Chip("gfx942", "hip", 304, 64 * _KB),  # MI300X
    )
}
INTERPRETER = Chip("interpreter", "interpreter", 4, 99 * _KB)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    """The Triton function."""
    grid: tuple[int, ...]
    """Programs along each axis."""
    arguments: tuple[Any, ...]
    """The arguments by position."""
    constants: dict[str, Any]
    """The compile-time constants by name."""
    warps: int
    """Warps of a program."""
    stages: int
    """Stages of its pipeline."""
    fusion: bool = True
    """Whether a product and a sum may be rounded as one."""
    pdl: bool = False
    """Whether it may begin while the kernel before it still runs: programmatic dependent launch."""


# The handle of a device's current stream, as Triton's driver asks for it. A torch without CUDA lacks it.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)

_RECORD: ContextVar[tuple[Chip, list[Launch]] | None] = ContextVar("record", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int, fusion: bool = True, **constants: Any) -> None:
    """Run `kernel` on `grid`, or only record the launch within `recording`. An empty grid runs nothing."""
    if 0 in grid:
        return
    record = _RECORD.get()
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    chip, pdl = chip_of(device), False
    if "PDL" in kernel.arg_names:
        constants["PDL"] = pdl = chip.dependent_launch
    if record is not None:
        record[1].append(Launch(kernel, grid, arguments, constants, warps, stages, fusion, pdl))
        return
    key: Key | None = None
    if chip.vendor == "cuda":
        key = key_of(kernel, device.index, arguments, constants, (warps, stages, fusion))
        observed = _OBSERVED.get()
        if observed is not None:
            observed.append((key, grid, arguments))
        known = repeatable(key)
        if known is not None and (device.index is None or torch.cuda.current_device() == device.index):
            known(grid, current_stream(device.index or 0), arguments)
            return
    find_cache()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current device
        try:
            compiled = kernel[grid](*arguments, **constants, **compiler_options(warps, stages, fusion, pdl, _amd_chip(device)))
        except Exception as error:
            error.__dict__[_KERNEL] = kernel.__name__
            raise
    if key is not None:
        keep(key, kernel, compiled, arguments, constants)


def compiler_options(warps: int, stages: int, fusion: bool, pdl: bool, chip: Chip | None = None) -> dict[str, Any]:
    """What Triton is told of a launch beside its arguments; fields of `Launch`.

    On gfx942 a wavefront may reach a barrier before its stores are done, so LLVM leaves out the wait for them there. `arrive` needs it: its
    barrier is followed by the signal that all partial results are stored. Without the feature LLVM waits before every barrier.

    Args:
        warps, stages, fusion, pdl: of the launch.
        chip: that runs it; None for any chip of NVIDIA.
    """
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    if pdl:
        options["launch_pdl"] = True
    if chip is not None and chip.name == "gfx942" and drains_stores():
        options["llvm_fn_attrs"] = "target-features=-back-off-barrier"
    return options


@cache
def drains_stores() -> bool:
    """Whether Triton can be told to wait for stores before barriers on gfx942; 3.9 can."""
    from triton.backends.amd.compiler import HIPOptions

    return "llvm_fn_attrs" in HIPOptions.__dataclass_fields__


def _amd_chip(device: torch.device) -> Chip | None:
    return chip_of(device) if torch.version.hip else None


def refused_kernel(error: Exception) -> str:
    """The name of the kernel that `launch` could not start because it needs more than the chip has; "" of any other error."""
    from triton.runtime.errors import OutOfResources

    return str(error.__dict__.get(_KERNEL, "")) if isinstance(error, OutOfResources) else ""


_KERNEL = "dbrx_q_kernel"  # the attribute of an error that says which kernel was launched


@cache
def find_cache() -> None:
    """Give Triton a folder for compiled kernels where its own, in the user's home, cannot be written."""
    base = os.environ.get("TRITON_HOME") or home()
    if os.environ.get("TRITON_CACHE_DIR") or (base and can_write(Path(base) / ".triton" / "cache")):
        return
    temporary = temporary_cache()
    if temporary is not None:
        os.environ["TRITON_CACHE_DIR"] = os.fspath(temporary / "triton")
    place = temporary or "no folder"
    warn_once(
        f"Triton can write no cache in the home folder; compiled kernels are kept in {place}. Where that is cleared, compiling them takes "
        "every command a minute or more: set TRITON_CACHE_DIR to a folder that you may write to"
    )


Observed = tuple[Key, tuple[int, ...], tuple[Any, ...]]
"""What the machine code of a launch depends on, its grid and its arguments."""

_OBSERVED: ContextVar[list[Observed] | None] = ContextVar("observed", default=None)


@contextmanager
def observing() -> Iterator[list[Observed]]:
    """List the launches of this thread on NVIDIA, which run."""
    launches: list[Observed] = []
    token = _OBSERVED.set(launches)
    try:
        yield launches
    finally:
        _OBSERVED.reset(token)


@contextmanager
def recording(chip: Chip) -> Iterator[list[Launch]]:
    """Record launches on any device, as `chip` would get them, and do not run them."""
    launches: list[Launch] = []
    token = _RECORD.set((chip, launches))
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def is_recording() -> bool:
    """Whether launches are recorded and not run."""
    return _RECORD.get() is not None


def chip_of(device: torch.device) -> Chip:
    """The chip of `device`; within `recording`, the chip that launches are recorded for.

    Raises:
        DbrxError: a device that Triton kernels cannot run on.
    """
    record = _RECORD.get()
    if record is not None:
        return record[0]
    if device.type == "cpu" and interpreting():
        return INTERPRETER
    if device.type != "cuda":
        raise DbrxError(f"Triton kernels run on a CUDA or ROCm device; found {str(device)!r}")
    return _chip(device.index if device.index is not None else torch.cuda.current_device())


@cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU, which holds for a whole process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def triton_version() -> tuple[int, ...]:
    """Major and minor version of Triton, whose compiler decides what a tile costs."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def dependent_launch_wanted() -> bool:
    """The switch DBRX_Q_PDL.

    Raises:
        DbrxError: another value than 0 and 1.
    """
    wanted = os.environ.get("DBRX_Q_PDL", "1")
    if wanted not in ("0", "1"):
        raise DbrxError(f"DBRX_Q_PDL must be 0 or 1; found {wanted!r}. Set one of them, or unset it")
    return wanted == "1"


@cache
def _dependent_launch_known() -> bool:
    """Whether Triton can compile and launch kernels with PDL, and CUDA can capture them: CUDA graphs know such edges from 12.3 on."""
    if not dependent_launch_wanted():
        return False
    from triton.backends.nvidia import compiler
    from triton.language.extra import cuda

    if not hasattr(cuda, "gdc_wait") or "launch_pdl" not in compiler.CUDAOptions.__dataclass_fields__:
        return False
    if not torch.cuda.is_available():  # kernels are recorded or compiled for another machine
        return True
    runtime = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined] # only torch with CUDA has it
    return runtime >= (12, 3) and driver >= 12030


@cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        if name.startswith("gfx9") and (name != "gfx942" or not drains_stores()):
            # There a wavefront does not wait for its stores before it lets another one signal them: partial sums could be lost.
            raise DbrxError(
                "the GPU must be of RDNA3 (gfx11) or newer, or gfx942 with Triton 3.9 or newer: elsewhere the compiler lets a program "
                f"announce partial sums before they are stored; {properties.name} is {name}, with Triton "
                f"{'.'.join(map(str, triton_version()))}. Use device='cpu'"
            )
        return Chip(name, "hip", properties.multi_processor_count, 64 * _KB)
    if properties.major < 8:
        raise DbrxError(
            f"the GPU must have compute capability 8.0 or newer (Ampere); {properties.name} has {properties.major}.{properties.minor}. "
            "Use device='cpu'"
        )
    name = f"sm_{properties.major}{properties.minor}"
    known = CHIPS.get(name, CHIPS["sm_86"])  # sm_86 has the least of NVIDIA's
    return Chip(name, "cuda", properties.multi_processor_count, known.shared_memory)
