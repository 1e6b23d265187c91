"""Launches a kernel again without what Triton does in Python for every call.

Triton binds the arguments, derives what the machine code depends on, and looks the compiled kernel up by the text of that: some 20 us a
launch. Here the same is derived as a tuple, by which the compiled kernel of an earlier launch is found; the call then goes to Triton's
launcher, with the same arguments.

What machine code depends on (`triton/runtime/jit.py`, Triton 3.6 to 3.9): constants; of a tensor its dtype and whether its address is
divisible by 16; of a whole number its width and, unless the kernel says `do_not_specialize`, whether it is 1 or divisible by 16 (here: its
value, which is finer); of a float nothing. Launches on AMD, where it is more, and those that a profiler watches, take Triton's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["Key", "Repeatable", "keep", "key_of", "profiled", "repeatable"]

Key = tuple[Any, ...]
"""Equal for launches of the same machine code."""

_KEPT: dict[Key, Repeatable] = {}


@dataclass(frozen=True)
class Repeatable:
    """A compiled kernel, loaded on a device, and what its launches have in common."""

    run: Callable[..., object]
    """Triton's launcher."""
    handle: object
    """Of the function on the device."""
    metadata: object
    """That the launcher takes."""
    constants: tuple[Any, ...]
    """The constants in the order of the kernel's parameters, which follow the arguments."""

    def __call__(self, grid: tuple[int, ...], stream: int, arguments: Sequence[Any]) -> None:
        """Launch on `stream`, the handle of a stream of the current device, with programs along up to three axes."""
        x, y, z = (*grid, 1, 1)[:3]
        self.run(x, y, z, stream, self.handle, self.metadata, None, None, None, *arguments, *self.constants)


def key_of(kernel: Any, device: int | None, arguments: Sequence[Any], constants: dict[str, Any], options: tuple[Any, ...]) -> Key:
    """What the machine code of a launch depends on.

    Args:
        kernel: the Triton function.
        device: index of the device.
        arguments: by position.
        constants: by name, all of them after the arguments among the kernel's parameters.
        options: what Triton is told beside.
    """
    parts: list[Any] = [id(kernel), device, options, tuple(constants), tuple(constants.values())]
    for argument, specialized in zip(arguments, _specialized(kernel), strict=False):
        if isinstance(argument, torch.Tensor):
            parts.append(argument.dtype)
            parts.append(argument.data_ptr() & 15 == 0)
        elif isinstance(argument, float):
            parts.append(float)
        elif specialized:
            parts.append(argument)
        else:
            parts.append(-(1 << 31) <= argument < 1 << 31)
    return tuple(parts)


def repeatable(key: Key) -> Repeatable | None:
    """The compiled kernel of an earlier launch with this key; None if there was none, or while a profiler watches launches."""
    return None if profiled() else _KEPT.get(key)


def profiled() -> bool:
    """Whether launches must take Triton's own way: a profiler watches them, or Triton is too old."""
    chains = _hooks()
    return chains is None or bool(chains[0].calls or chains[1].calls)


def keep(key: Key, kernel: Any, compiled: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
    """Remember what Triton returned for a launch with this key; nothing where its launches cannot be repeated so."""
    rest = kernel.arg_names[len(arguments) :]
    if _hooks() is None or compiled is None or set(rest) != set(constants):
        return
    ordered = tuple(constants[name] for name in rest)
    _KEPT[key] = Repeatable(compiled.run, compiled.function, compiled.packed_metadata, ordered)


@cache
def _hooks() -> tuple[Any, Any] | None:
    """Triton's lists of functions that watch launches; None in a Triton whose launcher is not known here."""
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return None
    chains = tuple(getattr(triton.knobs.runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook"))
    return (chains[0], chains[1]) if all(hasattr(chain, "calls") for chain in chains) else None


_SPECIALIZED: dict[int, tuple[bool, ...]] = {}  # by identity of the kernel: kernels are never freed, and Triton hashes their source


def _specialized(kernel: Any) -> tuple[bool, ...]:
    """Whether machine code may depend on the value of each parameter."""
    known = _SPECIALIZED.get(id(kernel))
    if known is None:
        known = _SPECIALIZED[id(kernel)] = tuple(not parameter.do_not_specialize for parameter in kernel.params)
    return known
