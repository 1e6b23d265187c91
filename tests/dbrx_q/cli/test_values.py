"""Plain values of options are converted as typer converts them, without pydantic; refused values get typer's words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from dbrx_q.cli.help import Command
from dbrx_q.cli.values import _Values

VALUES = ("0", "-3", "007", "+7", "1_000", "1e3", "2.50", ".5", "nan", "x", "", " 1", "9" * 15, "9" * 30, "1" * 5000)


def converted(value: str, kind: Any, info: dict[str, Any], *, plainly: bool) -> tuple[str, str]:
    """What a command gets for `--value VALUE`, with its type; or the error."""
    results: list[Any] = []
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    def command(value: Any) -> None:
        results.append(value)

    command.__annotations__ = {"value": Annotated[kind, typer.Option(**info)], "return": None}
    app.command(cls=Command if plainly else None)(command)
    try:
        typer.main.get_command(app)([f"--value={value}"], standalone_mode=False)
    except Exception as error:
        return type(error).__name__, str(error)
    return type(results[0]).__name__, repr(results[0])


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:12])
@pytest.mark.parametrize(
    ("kind", "info"),
    [(int, {}), (int, {"min": 1}), (int, {"min": 0, "max": 5}), (float, {}), (float, {"min": 0.5}), (str, {}), (list[str], {}), (Path, {})],
    ids=["int", "int from 1", "int to 5", "float", "float from 0.5", "str", "list", "path"],
)
def test_a_value_becomes_what_typer_makes_of_it(kind: Any, info: dict[str, Any], value: str) -> None:
    assert converted(value, kind, info, plainly=True) == converted(value, kind, info, plainly=False)


def test_a_parser_converts_and_refuses_as_with_typer() -> None:
    def parse(text: str) -> str:
        if text == "bad":
            raise ValueError("must be good; found bad")
        return text.upper()

    for value in ("good", "bad"):
        assert converted(value, str, {"parser": parse}, plainly=True) == converted(value, str, {"parser": parse}, plainly=False)


def test_the_installed_typer_takes_the_conversion(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, nano: Path) -> None:
    seen: list[Any] = []
    original = _Values.coerce
    monkeypatch.setattr(_Values, "coerce", lambda self, value, **context: (seen.append(value), original(self, value, **context))[1])
    assert cli("generate", nano, "--prompt", "a", "--max-new-tokens", "1").code == 0
    assert "a" in seen


def test_a_generation_imports_no_pydantic(nano: Path) -> None:
    check = (
        "import sys; from dbrx_q.cli import run\n"
        f"assert run(['generate', {str(nano)!r}, '--prompt', 'a', '--max-new-tokens', '1']) == 0\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)
