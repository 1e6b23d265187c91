"""The command line, `dbrx-q`: one file per subcommand, heavy imports inside the functions.

Exit codes: 0 done, 1 `verify` found a difference, 2 an error that the message explains (an interruption by Ctrl-C included).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer

__all__ = ["main", "run"]

_INTERRUPTED = "interrupted; nothing was left half-written"
_TYPER_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit."""
    interrupted = False

    def on_interrupt(*_: object) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def on_unraisable(problem: sys.UnraisableHookArgs) -> None:
        # Code that C calls back cannot raise: the interruption comes again when the program is likely to be elsewhere.
        if isinstance(problem.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            sys.__unraisablehook__(problem)

    signal.signal(signal.SIGALRM, on_interrupt)
    sys.unraisablehook = on_unraisable
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        code = run(sys.argv[1:])
    except BaseException:  # libraries make other errors of an interruption of their import
        if not interrupted:
            raise
        code = _fail(_INTERRUPTED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if interrupted:
        sys.stdout.flush()
        os._exit(code)  # threads of a download would be waited for
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
        if "can't allocate memory" not in str(error):  # torch's MemoryError
            raise
        return _fail(_NO_MEMORY)
    return 0


_NO_MEMORY = "not enough memory for this; give a smaller model, a shorter context or free some"


def _fail(message: str) -> int:
    print(f"dbrx-q: error: {message}", file=sys.stderr, flush=True)
    return 2


def _app() -> typer.Typer:
    import typer

    from . import bench, generate, inspect, perplexity, plan, quantize, verify

    app = typer.Typer(
        name="dbrx-q",
        help="Quantize DBRX, run it, and measure what was lost.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in (quantize, inspect, verify, plan, generate, perplexity):
        app.command(name=module.__name__.rsplit(".", 1)[1], epilog=module.EXAMPLE)(module.command)
    app.add_typer(bench.app, name="bench")
    return app
