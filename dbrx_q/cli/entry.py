"""`main` and `run`: one command, its errors as messages and exit codes, and an orderly end when it is interrupted."""

from __future__ import annotations

import gc
import io
import math
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from dbrx_q.deferred_torch import SWITCH, defer, is_wanted, preload

if TYPE_CHECKING:
    from types import FrameType
    from typing import TextIO

    import typer

__all__ = ["main", "run"]

_INTERRUPTED = "interrupted; nothing was left half-written"
_TYPER_INTERRUPTED = 130
_NO_DEVICE_MEMORY = "not enough memory on the GPU for this; give a shorter context, a smaller batch or --device cpu"
_AGAIN_SECONDS = 0.005
# Importing torch makes many objects, of which none is garbage. One token of the bundled model takes 2.1 s with Python's own threshold of
# 700 objects, 1.85 s with this one, 1.7 s without any collection (medians of 4, two cores).
_COLLECT_EVERY = 10_000
_COLLECT_EVERY_WHILE_IMPORTING = 200_000
_ONE_PRESS_SECONDS = 1.0  # further presses of Ctrl-C within it are ignored, while the command answers the first

_SUMMARIES = {
    "quantize": "Write a quantized copy of a checkpoint. An interrupted run keeps what is finished, and --resume continues it.",
    "export": "Write a checkpoint in the layout of another program: GGUF for llama.cpp, MLX, or plain weights for transformers.",
    "inspect": "List the tensors by kind: count, format, bits per weight and bytes; downloads no weights.",
    "verify": "Recompute the SHA-256 of every file and compare it with the manifest.",
    "plan": "Print where a model's weights would be held on a machine and how fast it can run there, before any weight is downloaded.",
    "generate": "Continue a prompt and stream the text to stdout.",
    "perplexity": "Measure the perplexity of a text: exp(total negative log-likelihood / predicted tokens).",
    "compare": "Measure how far checkpoints are from a reference: KL divergence, perplexity, agreement of tokens and experts.",
    "reference": "Save a model's predictions for a text, to compare checkpoints with them on a machine that cannot hold the model.",
    "sensitivity": "Quantize one part of a model at a time and measure how far its predictions move, which shows where bits matter most.",
    "tasks": "Measure a checkpoint on downstream tasks of lm-evaluation-harness (pip install 'dbrx_q[tasks]').",
    "trace": "Record which experts every token of a text chooses, for `simulate` and for `generate --profile`.",
    "simulate": "Replay a trace through every cache policy on a machine, and print hits, expert loads and tokens/s.",
    "bench": "Measure speed and memory.",
}
"""Command to the first paragraph of its help, which a test holds to the command's docstring; `dbrx-q --help` imports no command."""


def main() -> None:
    """Run the command line and exit."""
    _import_fast(sys.argv[1:])
    interrupted = False
    raised = -math.inf

    def on_interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal interrupted, raised
        interrupted = True
        if _imports(frame):  # extension modules swallow an interruption of their import, or turn it into another error
            interrupt_again()
        elif time.monotonic() - raised > _ONE_PRESS_SECONDS:
            raised = time.monotonic()
            raise KeyboardInterrupt

    def on_unraisable(problem: sys.UnraisableHookArgs) -> None:
        nonlocal raised
        if isinstance(problem.exc_value, KeyboardInterrupt):  # raised in a callback from C, which cannot pass it on
            raised = -math.inf
            interrupt_again()
        else:
            sys.__unraisablehook__(problem)

    def interrupt_again() -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    sys.unraisablehook = on_unraisable
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal shows a replacement for a character that it cannot show
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
        os._exit(code or _fail(_INTERRUPTED))  # does not wait for the threads of a download
    if "triton" not in sys.modules:  # its library prints a page of objects as leaked if they are not collected
        gc.freeze()  # Python's end would look for garbage among all objects of the libraries, three times
    sys.exit(code)


def _import_fast(arguments: list[str]) -> None:
    """Leave out of `import torch` what the command does not use, unless it uses a GPU; collect little garbage, since imports make none."""
    gc.set_threshold(_COLLECT_EVERY, *gc.get_threshold()[1:])
    if is_wanted(default=not any(argument.startswith(("cuda", "--gpu", "--device=cuda")) for argument in arguments)):
        gc.set_threshold(_COLLECT_EVERY_WHILE_IMPORTING)
        defer(_restart_with_plain_torch, _collect_from_now_on)


def _collect_from_now_on() -> None:
    gc.freeze()  # later collections do not visit the objects of torch
    gc.set_threshold(_COLLECT_EVERY)


def _restart_with_plain_torch() -> None:
    """Run this command again from its beginning, and import torch plainly. Commands import torch before they read or write anything."""
    os.execve(sys.executable, sys.orig_argv, os.environ | {SWITCH: "0"})


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """As `warnings.showwarning`; a warning of this project is one line, without the place in the code."""
    own = category.__module__.split(".")[0] == "dbrx_q"
    text = f"dbrx-q: note: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. Errors become a message on stderr, never a traceback."""
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED)


def _dispatch(arguments: list[str]) -> int:
    from dbrx_q.errors import DbrxError

    from .limits import check_limits, memory_message, uses_models

    refusal = check_limits(arguments)
    if refusal is not None:
        return _fail(refusal)
    if uses_models(arguments):
        preload()
    try:
        _app()(arguments, prog_name="dbrx-q")
    except SystemExit as termination:  # typer prints its messages on wrong usage and always exits
        if termination.code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt from None
        return termination.code if isinstance(termination.code, int) else 0
    except DbrxError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; without importing torch
            return _fail(_NO_DEVICE_MEMORY)
        message = memory_message(error)
        if message is None and isinstance(error, OSError):
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
        if message is None:
            raise
        return _fail(message)
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

    from .help import CONTEXT, LazyCommands

    class Commands(LazyCommands):
        summaries = _SUMMARIES

    app = typer.Typer(
        name="dbrx-q",
        cls=Commands,
        help="Quantize DBRX, run it, and measure what was lost.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=CONTEXT,
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            from dbrx_q import __version__

            print(f"dbrx-q {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", callback=print_version, is_eager=True, help="Print the version.", show_default=False
        ),
    ) -> None:
        pass

    return app
