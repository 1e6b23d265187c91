"""`--help` fits two screens, prints every word, imports little, and lists the values of the registries."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import dbrx_q
from dbrx_q.cli import choices, entry
from dbrx_q.cli.help import Command, CommandGroup, example
from dbrx_q.cli.options import OUTPUT, TEXT, option

SCREEN = 80, 45  # columns and lines
COMMANDS = tuple(entry._SUMMARIES)
BENCH = ("model", "synthetic", "offload", "kernels", "tune", "resources", "static", "gpu", "gpu-report")
ALL = [(), *((name,) for name in COMMANDS), *(("bench", name) for name in BENCH)]


def command_of(names: tuple[str, ...]) -> Any:
    command = typer.main.get_command(entry._app())
    for name in names:
        command = command.commands[name]
    return command


def options_of(command: Any) -> Iterator[Any]:
    return (parameter for parameter in command.params if parameter.param_type_name == "option")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


@pytest.mark.parametrize("names", [(), ("quantize",), ("generate",)], ids=" ".join)
def test_help_fits_two_screens(names: tuple[str, ...], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(SCREEN[0]))
    lines = cli(*names, "--help").out.splitlines()
    assert len(lines) <= 2 * SCREEN[1]
    before_example = lines[: lines.index("Example:")] if "Example:" in lines else lines
    assert max(map(len, before_example)) <= SCREEN[0]


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_every_word_of_a_help_is_printed(names: tuple[str, ...], columns: int, cli: Callable[..., Any]) -> None:
    """Brackets, which markup would consume, are printed too, and no word is divided."""
    shown = words(cli(*names, "--help").out)
    command = command_of(names)
    assert words(command.help or "") in shown
    for line in (command.epilog or "").splitlines():
        assert line in shown
    for parameter in command.params:
        assert words(parameter.help) in shown
    if isinstance(command, CommandGroup):
        assert all(words(command.summary(name)) in shown for name in command.list_commands(None))


def test_brackets_are_printed(cli: Callable[..., Any], small: Path) -> None:
    assert "pip install 'dbrx_q[tasks]'" in words(cli("tasks", "--help").out)
    assert "pip install 'dbrx_q[tasks]'" in words(cli("--help").out)
    for name in ("[bold]x[/bold]", "[/]", "[red]"):
        assert f"{name}: " in cli("inspect", name).err
        assert name in cli("quantize", small, "out", "--format", name).err
        assert name in cli(name).err


@pytest.mark.parametrize("names", ALL[1:], ids=" ".join)
def test_options_are_in_panels_and_show_their_defaults(names: tuple[str, ...], cli: Callable[..., Any]) -> None:
    command = command_of(names)
    if isinstance(command, CommandGroup):
        return
    shown = cli(*names, "--help").out
    panels = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert len(panels) == len(set(panels)), "a panel is interrupted by another"
    assert panels[-1] == "Example"
    if any("--json" in parameter.opts for parameter in options_of(command)):
        assert panels[-2] == OUTPUT
    for parameter in options_of(command):
        assert parameter.rich_help_panel, parameter.name
        assert re.fullmatch(r"[^.]*(\.[^.\s]+|\.\.\.|[^.])*\.(  \[default: .*\])?", parameter.help, re.DOTALL), (
            f"one sentence: {parameter.help}"
        )
        if parameter.default not in (None, False) and not parameter.is_flag:
            assert re.search(rf"\[default: {re.escape(str(parameter.default))}[];]", words(shown)), parameter.name


def test_summaries_equal_those_of_the_commands() -> None:
    for name, summary in entry._SUMMARIES.items():
        assert words((command_of((name,)).help or "").split("\n\n")[0]) == summary


def test_an_option_has_the_same_text_in_every_command() -> None:
    """Except for the listed options, whose meaning depends on the command, each with the number of its texts."""
    texts_of_others = {
        "--all": 2,
        "--batch": 3,
        "--chat": 2,
        "--chip": 2,
        "--context": 5,
        "--device": 3,
        "--dtype": 3,
        "--fallback": 3,
        "--fallback-format": 2,
        "--format": 3,
        "--gpu": 2,
        "--kv": 2,
        "--limit": 2,
        "--n-gen": 2,
        "--n-prompt": 2,
        "--out": 6,
        "--ram": 2,
        "--repeats": 2,
        "--seed": 3,
        "--tokens": 2,
        "--top-k": 2,
    }
    texts: dict[str, set[str]] = {}
    for names in ALL[1:]:
        for parameter in options_of(command_of(names)):
            texts.setdefault(parameter.opts[0], set()).add(parameter.help)
    assert {name: len(helps) for name, helps in texts.items() if len(helps) > 1} == texts_of_others


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *(([name, "--help"]) for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    check = (
        "import sys; from dbrx_q.cli import run\n"
        f"assert run({arguments!r}) == 0\n"
        "heavy = {'torch', 'numba', 'triton', 'numpy', 'rich', 'transformers', 'tiktoken', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        f"commands = [name for name in {COMMANDS!r} if f'dbrx_q.cli.{{name}}' in sys.modules]\n"
        f"assert commands == [name for name in {arguments!r} if not name.startswith('-')], commands"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_version_is_printed(cli: Callable[..., Any]) -> None:
    assert cli("--version").out == f"dbrx-q {dbrx_q.__version__}\n"
    assert cli("--version").code == 0


def test_a_mistyped_command_is_refused_with_a_suggestion(cli: Callable[..., Any]) -> None:
    outcome = cli("quantise", "a", "b")
    assert (outcome.code, outcome.out) == (2, "")
    assert "No such command 'quantise'. Did you mean 'quantize'?" in outcome.err


# Values


@pytest.mark.parametrize("choice", choices.ALL, ids=lambda choice: choice.registry)
def test_listed_choices_equal_the_registered_ones(choice: choices.Choice) -> None:
    registered = choice.registered()
    assert choice.names == tuple(name for name in registered if name not in choice.variants)
    assert set(choice.variants) < set(registered)


def test_every_choice_is_offered_by_a_command() -> None:
    offered = [parameter.help for names in ALL[1:] for parameter in options_of(command_of(names)) if parameter.help]
    for choice in choices.ALL:
        assert any(str(choice) in text for text in offered), choice


def test_a_value_is_looked_up_when_it_is_parsed(monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any], quantized_small: Path) -> None:
    """A format that only its registry knows passes the option and reaches the command's own checks."""
    module, _, name = choices.WEIGHT_FORMATS.registry.partition(":")
    registry = getattr(importlib.import_module(module), name)
    arguments = ("plan", quantized_small, "--format", "toy3")
    refused = words(cli(*arguments).err)
    assert f"must be {', '.join(choices.WEIGHT_FORMATS.names)}, " in refused
    assert "found 'toy3'" in refused
    monkeypatch.setitem(registry, "toy3", registry["int4"])
    assert "--format is for a checkpoint that dbrx_q has not quantized" in words(cli(*arguments).err)


def test_a_panel_keeps_markup_and_the_order_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    def command(
        first: Annotated[str, option(TEXT, "Text in [bold]brackets[/bold] and {}.", one_of=choices.KV_FORMATS)] = "plain",
        second: Annotated[int | None, option(OUTPUT, "Two.", metavar="N", default="three [words] here")] = None,
        third: Annotated[bool, option(TEXT, "Three.", "--third")] = False,
    ) -> None:
        """A command."""

    app.command(cls=Command, epilog=example("run me [now]"))(command)
    with pytest.raises(SystemExit):
        app(["--help"], prog_name="x")
    shown = capsys.readouterr().out
    assert "Text in [bold]brackets[/bold] and plain, int8 or int4." in words(shown)
    assert "[default: three [words] here]" in words(shown)
    assert shown.index("--first") < shown.index("--third") < shown.index("--second") < shown.index("run me [now]")
