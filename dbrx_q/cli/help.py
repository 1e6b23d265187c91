"""How `--help` is laid out, and how a command's file is imported only when that command runs.

Options are printed in the panels that `options.py` puts them in, as plain text: nothing in a help text is markup, so that every bracket of
it is printed, and no library for coloured text is loaded for it. Examples are printed unwrapped, so that they can be copied.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from .options import OUTPUT
from .values import convert_plainly

__all__ = ["CONTEXT", "Command", "CommandGroup", "LazyCommands", "example"]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
_WIDEST_OPTION = 28  # a longer one has its help on the next line


def example(*lines: str) -> str:
    """The end of a `--help`: commands that run as they are printed."""
    return "\n".join(lines)


_SPACE, _HYPHEN = "\u00a0", "\u2011"  # at which click wraps no line


class Command(TyperCommand):
    """A command whose `--help` lists its options in panels."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, which convert plain values without pydantic."""
        return convert_plainly(super().get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for the arguments and one for each panel, in the order in which the function names them."""
        _write_panels(self, ctx, formatter, OUTPUT)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The line `Usage:` names every argument."""
        return ["[OPTIONS]", *_arguments(self, ctx)]

    def get_help(self, ctx: Any) -> str:
        """The text that `--help` prints."""
        return _breakable(super().get_help(ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example."""
        _write_example(self, formatter)


class CommandGroup(TyperGroup):
    """A command that has commands of its own, such as `dbrx-q` and `dbrx-q bench`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, which convert plain values without pydantic."""
        return convert_plainly(super().get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, with the first sentence on each, and the options."""
        rows = [(name, _unbreakable(self.summary(name))) for name in self.list_commands(ctx)]
        with formatter.section(_heading("Commands")):
            formatter.write_dl(rows)
        _write_panels(self, ctx, formatter, "Options")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example."""
        _write_example(self, formatter)

    def get_help(self, ctx: Any) -> str:
        """The text that `--help` prints."""
        return _breakable(super().get_help(ctx))

    def summary(self, name: str) -> str:
        """The first paragraph of a command's help."""
        return " ".join((self.commands[name].help or "").split("\n\n")[0].split())


class LazyCommands(CommandGroup):
    """The commands of `dbrx-q`, each in a file of its name, which is imported when the command runs or its `--help` is asked for."""

    summaries: ClassVar[Mapping[str, str]] = {}
    """What `dbrx-q --help` says of each command, in its order: the first paragraph of the command's docstring."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Modules(self.summaries)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, without an import."""
        return list(self.summaries)

    def summary(self, name: str) -> str:
        """What `--help` says of a command, without an import."""
        return self.summaries[name]


class _Modules(MutableMapping[str, Any]):
    """Name to command, each built when it is looked up."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        module = importlib.import_module(f"dbrx_q.cli.{name}")
        app = getattr(module, "app", None)  # of a command with commands of its own
        if app is None:
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(name, cls=Command, epilog=module.EXAMPLE)(module.command)
        return typer.main.get_command(app)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __setitem__(self, name: str, command: Any) -> None:
        raise TypeError(f"{name}: a command is added to `summaries`")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: a command is removed from `summaries`")


def _write_panels(command: Any, ctx: Any, formatter: Any, default_panel: str) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if parameter.param_type_name == "argument":
            panels.setdefault("Arguments", []).append((parameter.metavar, parameter.help))
        elif row := parameter.get_help_record(ctx):
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or default_panel, []).append(row)
    panels |= {OUTPUT: panels.pop(OUTPUT)} if OUTPUT in panels else {}  # last, wherever its first option stands
    width = max((len(first) for rows in panels.values() for first, _ in rows if len(first) <= _WIDEST_OPTION), default=0)
    for panel, rows in panels.items():
        with formatter.section(_heading(panel)):
            formatter.write_dl([(first.ljust(width), _unbreakable(text)) for first, text in rows], col_max=_WIDEST_OPTION)


def _unbreakable(text: str) -> str:
    """No line ends inside a word with a hyphen, such as `--max-new-tokens`, or inside a default."""
    return re.sub(r"\[default: [^\]]*\]", lambda match: match[0].replace(" ", _SPACE), text).replace("-", _HYPHEN)


def _breakable(text: str) -> str:
    return text.replace(_SPACE, " ").replace(_HYPHEN, "-")


def _arguments(command: Any, ctx: Any) -> list[str]:
    return [parameter.metavar for parameter in command.get_params(ctx) if parameter.param_type_name == "argument"]


def _write_example(command: Any, formatter: Any) -> None:
    if command.epilog:
        formatter.write_paragraph()
        formatter.write_heading(_heading("Example"))
        formatter.write("".join(f"  {line}\n" for line in command.epilog.splitlines()))


def _heading(text: str) -> str:
    return typer.style(text, bold=True)
