"""What a command writes: JSON on stdout, and messages and progress bars on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

__all__ = ["failed", "print_json", "progress", "say"]


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout; a number that is not finite, which JSON cannot express, becomes null."""
    json.dump(_finite(data), sys.stdout, indent=2, allow_nan=False)
    print(flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(message: str) -> None:
    """Print a message on stderr, as it is."""
    print(message, file=sys.stderr, flush=True)


def failed(message: str) -> typer.Exit:
    """Print an error on stderr; raise the result, which ends the command with exit code 2."""
    import typer

    say(f"dbrx-q: error: {message}")
    return typer.Exit(2)


@contextmanager
def progress(label: str, *, unit_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr until the block ends.

    Yields:
        A function that takes (done, total), in bytes or in pieces of work.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [DownloadColumn(), TransferSpeedColumn()] if unit_bytes else [MofNCompleteColumn()]
    console = Console(stderr=True, highlight=False)
    with Progress(TextColumn(label, markup=False), BarColumn(), *columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
