"""How all numba functions are compiled: once, and kept on the disk wherever a folder for it can be written.

numba looks for a folder in NUMBA_CACHE_DIR, beside the source file and in the user's cache, and raises an error if it can write none of
them. Here the compiled code then goes to a private temporary folder or, without one, is compiled in every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.runtime import _nrt_python  # type: ignore[attr-defined] # an extension module without stubs

from dbrx_q.kernels.formats import trellis_codes, viterbi
from dbrx_q.kernels.formats.cache_folders import home, temporary_cache, warn_once

from .addresses import call

__all__ = ["compiled", "compiled_address", "for_each"]

_COST = "compiling them takes every command 10 seconds or more"
_CALLBACKS: list[Any] = []  # keeps their machine code in memory
_CURE = "set NUMBA_CACHE_DIR to a folder that you may write to"


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the global interpreter lock, with a cache where there is a folder for it; `options` are numba's."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        stored = _cache_of(function)
        if stored is not None:
            dispatcher._cache = stored
        return dispatcher

    return decorate


def compiled_address(function: Callable[..., Any], arguments: int) -> int:
    """The address of machine code that other compiled code can call: a function of so many int64 that returns an int64.

    Kept on the disk as by `compiled`, for every set of numbers that `function` closes over.
    """
    callback: Any = CFunc(function, ((types.int64,) * arguments, types.int64), {}, {})
    stored = _cache_of(function)
    if stored is not None:
        callback._cache = stored
    callback.compile()
    _CALLBACKS.append(callback)
    return int(callback.address)


class _Cache(FunctionCache):
    """numba's cache of one function, to which a full disk or a damaged file is no error: the function is compiled.

    A change of any file beside the function's, or of the trellis codes or their search, makes it compile again, since functions use each
    other's code; numba looks at its own alone.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_stamp(Path(function.__code__.co_filename).parent),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            _register_runtime()
            return self._load_overload(sig, target_context)
        except Exception:  # whatever unpickling a damaged file raises
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warn_once(f"{self.cache_path}: compiled kernels cannot be stored here ({error.strerror}); {_COST}. Free some, or {_CURE}")


@cache
def _stamp(folder: Path) -> tuple[tuple[str, float, int], ...]:
    """Name, time of the last change and size of every source file of a folder, and of those whose constants are compiled in."""
    constants = [Path(str(module.__file__)) for module in (trellis_codes, viterbi)]
    stats = ((path.name, path.stat()) for path in [*sorted(folder.glob("*.py")), *constants])
    return tuple((name, stat.st_mtime, stat.st_size) for name, stat in stats)


@cache
def _register_runtime() -> None:
    """Register the functions of numba's runtime that stored code calls.

    numba registers them in `refresh`, which its own `load_overload` calls first. That also imports what only a compilation needs
    (scipy, all typing rules) and compiles runtime functions, which stored code already contains; numba refreshes again before it compiles.
    """
    for name, address in _nrt_python.c_helpers.items():
        llvm.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


def _cache_of(function: Callable[..., Any]) -> _Cache | None:
    """The cache of a function; None where no folder for it can be written."""
    config: Any = numba.config
    # Without a home, numba would make a folder named "~" in the current folder.
    if config.CACHE_DIR or home() is not None:
        with suppress(RuntimeError):  # numba's error where it can write no folder
            return _Cache(function)
    temporary = temporary_cache()
    if temporary is None:
        warn_once(f"numba can write no cache folder for compiled kernels; {_COST}. To avoid it, {_CURE}")
        return None
    warn_once(f"numba can write no cache folder; compiled kernels are kept in {temporary}. Where that is cleared, {_COST}: {_CURE}")
    before, config.CACHE_DIR = config.CACHE_DIR, os.fspath(Path(temporary) / "numba")
    try:
        with suppress(RuntimeError):
            return _Cache(function)
    finally:
        config.CACHE_DIR = before
    return None


@compiled(parallel=True)
def for_each(function, arguments, count):
    """Call a function of `compiled_address` with (arguments, i, 0) for i from 0 to count - 1, on numba's current number of threads."""
    for i in numba.prange(count):
        call(function, arguments, i, 0)
