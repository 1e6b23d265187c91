"""Limits of this process (`ulimit`) that are checked before a command runs, because libraries end the process where they meet them."""

from __future__ import annotations

import os
import re
import sys
import threading

from dbrx_q.planning.sizes import format_size

__all__ = ["check_limits", "memory_message", "uses_models"]

# Bytes that Python, the libraries and the code they compile take at least, measured with two threads. Below it, OpenBLAS, C++ and LLVM
# end the process without an exception.
_DATA_OF_LIBRARIES = 300_000_000
_DATA_OF_MODELS = 470_000_000
_FILES_IN_ADDRESS_SPACE = 1_500_000_000  # that the libraries map; RLIMIT_AS counts them, RLIMIT_DATA does not
_THREAD_STACK = 8 << 20
_WITHOUT_MODELS = frozenset({"inspect", "verify", "plan", "simulate"})
_SMALL_STACK = 1 << 16
_FEW_THREADS = 8

_NO_MEMORY = "not enough memory for this{wanted}; give a smaller model, a shorter context or free some"
_NO_THREADS = (
    "the system refused to start a thread: this user's processes (`ulimit -u`), this container (`pids.max`) or memory (`ulimit -d`, "
    "`ulimit -v`) are at a limit. Raise it, or set OMP_NUM_THREADS=1 to need fewer threads"
)
_WANTED_BYTES = re.compile(r"you tried to allocate (\d+) bytes")
_WANTED_SIZE = re.compile(r"Unable to allocate ([\d.]+ [KMGT]?i?B)")
_MEMORY_WORDS = ("can't allocate memory", "could not create a primitive", "could not create a memory", "std::bad_alloc", "bad allocation")
_IMPORT_WORDS = ("failed to map segment", "cannot allocate memory", "cannot create shared object descriptor")


def memory_message(error: BaseException) -> str | None:
    """What to say of an error that a lack of memory or threads raised, with the bytes that were wanted where it has them.

    Returns:
        None for any other error.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return _NO_THREADS
    lacks = isinstance(error, MemoryError)
    lacks = lacks or (isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS))
    lacks = lacks or (isinstance(error, ImportError | OSError) and any(words in text.lower() for words in _IMPORT_WORDS))
    if not lacks:
        return None
    if count := _WANTED_BYTES.search(text):
        return _NO_MEMORY.format(wanted=f", which asked for {format_size(int(count[1]))} more")
    if size := _WANTED_SIZE.search(text):
        return _NO_MEMORY.format(wanted=f", which asked for {size[1]} more")
    return _NO_MEMORY.format(wanted="")


def check_limits(arguments: list[str]) -> str | None:
    """Whether the limits of this process allow a command to begin: None, or the error to print.

    Args:
        arguments: of the command line; none that only prints help is checked.
    """
    if sys.platform != "linux" or not _runs(arguments):
        return None
    import resource

    data = (_DATA_OF_MODELS if uses_models(arguments) else _DATA_OF_LIBRARIES) + _THREAD_STACK * (_threads() - _FEW_THREADS)
    limits = (("-d", resource.RLIMIT_DATA, data), ("-v", resource.RLIMIT_AS, data + _FILES_IN_ADDRESS_SPACE))
    for option, kind, needed in limits:
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and limit < needed:
            return (
                f"`ulimit {option}` must allow {format_size(needed)} at least for Python, the libraries and the code that they compile, "
                f"and the model's memory beyond; found {format_size(limit)}. Raise it, or limit the model alone with --ram or --memory"
            )
    if resource.getrlimit(resource.RLIMIT_NPROC)[0] != resource.RLIM_INFINITY and not _can_start_threads(_threads()):
        return _NO_THREADS
    return None


def uses_models(arguments: list[str]) -> bool:
    """Whether a command line runs a command that computes with weights, which imports torch."""
    return _runs(arguments) and arguments[0] not in _WITHOUT_MODELS


def _runs(arguments: list[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)


def _threads() -> int:
    """Threads that the libraries start: as many as cores each for OpenBLAS and OpenMP, and a few that read files."""
    cores = os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return _FEW_THREADS + 2 * (int(wanted) if wanted.isdecimal() else cores)


def _can_start_threads(count: int) -> bool:
    """Whether the system lets this process have so many threads more at the same time."""
    end = threading.Event()
    threads: list[threading.Thread] = []
    stack = threading.stack_size(_SMALL_STACK)
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        return False
    finally:
        threading.stack_size(stack)
        end.set()
        for thread in threads:
            thread.join()
    return True
