"""What the subcommands share: JSON on stdout, everything else on stderr, sizes and progress bars."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JSON_HELP", "example", "print_json", "progress", "stderr"]

JSON_HELP = "Print one JSON object on stdout and nothing else."


def example(*lines: str) -> str:
    """The epilog of a --help: commands that can be run as they stand."""
    return "Example:\n\n" + "\n\n".join(f"  [bold]{line}[/bold]" for line in lines)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout; null for a number that is not finite, for which JSON has no word."""
    json.dump(_finite(data), sys.stdout, indent=2, allow_nan=False)
    print(flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stderr() -> Console:
    """A console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def progress(what: str, *, unit_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; call what it gives with (done, total)."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [DownloadColumn(), TransferSpeedColumn()] if unit_bytes else [MofNCompleteColumn()]
    with Progress(TextColumn(what), BarColumn(), *columns, TimeRemainingColumn(), console=stderr(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
