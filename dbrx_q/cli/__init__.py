"""The command line, `dbrx-q`: one file per subcommand, heavy imports inside the functions.

Exit codes: 0 done, 1 `verify` found a difference, 2 an error that the message explains (an interruption by Ctrl-C included).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. Errors become a message on stderr, never a traceback."""
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written")


def _dispatch(arguments: list[str]) -> int:
    import click

    from dbrx_q.errors import DbrxError

    try:
        code = _app()(arguments, standalone_mode=False)
    except click.ClickException as error:  # wrong usage
        error.show()
        return 2
    except click.Abort:  # Ctrl-C, as click reports it
        raise KeyboardInterrupt from None
    except DbrxError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, `| head` say
        sys.stderr.close()
        return 2
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except MemoryError:
        return _fail("not enough memory for this; give a smaller model, a shorter context or free some")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"dbrx-q: error: {message}", file=sys.stderr)
    return 2


def _app() -> typer.Typer:
    import typer

    from . import bench, generate, inspect, perplexity, quantize, verify

    app = typer.Typer(
        name="dbrx-q",
        help="Quantize DBRX, run it, and measure what was lost.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in (quantize, inspect, verify, generate, perplexity):
        app.command(name=module.__name__.rsplit(".", 1)[1], epilog=module.EXAMPLE)(module.command)
    app.add_typer(bench.app, name="bench")
    return app
