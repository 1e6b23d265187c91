"""The command line, `dbrx-q`: one file per subcommand, heavy imports inside the functions.

Exit codes: 0 done, 1 `verify` found a difference, 2 an error that the message explains (an interruption by Ctrl-C included).
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    import typer

__all__ = ["main", "run"]

_INTERRUPTED = "interrupted; nothing was left half-written"
_TYPER_INTERRUPTED = 130
_NO_MEMORY = "not enough memory for this; give a smaller model, a shorter context or free some"
_NO_DEVICE_MEMORY = "not enough memory on the GPU for this; give a shorter context, a smaller batch or --device cpu"
_AGAIN_SECONDS = 0.005
_ONE_PRESS_SECONDS = 1.0  # a key that is pressed several times means the same; the first press is being answered


def main() -> None:
    """Run the command line and exit."""
    interrupted = False
    raised = -math.inf

    def on_interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal interrupted, raised
        interrupted = True
        if _imports(frame):  # extension modules swallow an interruption of their import, or make another error of it
            come_again()
        elif time.monotonic() - raised > _ONE_PRESS_SECONDS:
            raised = time.monotonic()
            raise KeyboardInterrupt

    def on_unraisable(problem: sys.UnraisableHookArgs) -> None:
        nonlocal raised
        if isinstance(problem.exc_value, KeyboardInterrupt):  # it came where C called back, which cannot raise
            raised = -math.inf
            come_again()
        else:
            sys.__unraisablehook__(problem)

    def come_again() -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    sys.unraisablehook = on_unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character of the model's shows another
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, on_interrupt)
    try:
        code = run(sys.argv[1:])
    except BaseException:
        if not interrupted:
            raise
        code = _fail(_INTERRUPTED)
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    if interrupted:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code or _fail(_INTERRUPTED))  # without waiting for a download's threads
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. Errors become a message on stderr, never a traceback."""
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED)


def _dispatch(arguments: list[str]) -> int:
    from dbrx_q.errors import DbrxError

    try:
        _app()(arguments, prog_name="dbrx-q")
    except SystemExit as done:  # typer prints its messages on wrong usage and always exits
        if done.code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt from None
        return done.code if isinstance(done.code, int) else 0
    except DbrxError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except MemoryError:
        return _fail(_NO_MEMORY)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; without importing torch
            return _fail(_NO_DEVICE_MEMORY)
        if "can't allocate memory" not in str(error):  # torch's MemoryError
            raise
        return _fail(_NO_MEMORY)
    return 0


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _fail(message: str) -> int:
    print(f"dbrx-q: error: {message}", file=sys.stderr, flush=True)
    return 2


def _app() -> typer.Typer:
    import typer

    from . import bench, compare, generate, inspect, perplexity, plan, quantize, reference, sensitivity, simulate, tasks, trace, verify

    app = typer.Typer(
        name="dbrx-q",
        help="Quantize DBRX, run it, and measure what was lost.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in (quantize, inspect, verify, plan, generate, perplexity, compare, reference, sensitivity, tasks, trace, simulate):
        app.command(name=module.__name__.rsplit(".", 1)[1], epilog=module.EXAMPLE)(module.command)
    app.add_typer(bench.app, name="bench")
    return app
