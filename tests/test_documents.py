"""The documents: lines of prose end at 120 columns, and every file, command and table that they name exists."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "findings/**/*.md", "tests/*/*.md")
    for path in ROOT.glob(pattern)
    if not path.is_relative_to(ROOT / "demo-out")
)
PROSE_COLUMNS = 120
# A path of this project: these suffixes belong to no file of a checkpoint or of a report.
_PATH = re.compile(r"(?<![\w./<*-])((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|toml|html)|(?:[\w.-]+/)+[\w.-]+\.(?:md|png|txt))(?![\w/*-])")
_FOLDER = re.compile(r"(?<![\w./<*~-])((?:dbrx_q|kernels|quantize|eval|tests|docs|findings)/(?:[\w.-]+/)*)(?![\w.*<-])")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)")
_CODE = re.compile(r"`([^`]+)`")
# Files of other projects and of results, which documents name without a folder of this project.
ELSEWHERE = {
    "modeling_dbrx.py": "transformers and the published checkpoint",
    "tiktoken.py": "the published checkpoint",
    "report.html": "a result of `dbrx-q compare`",
    "parcel/run.sh": "the archive that `make parcel` writes",
}


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) for each line that is neither in a table nor in a block of code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("|"):
            yield number, line


def too_long(text: str) -> list[int]:
    """Numbers of the lines of prose beyond the limit, except lines that one long word, such as a link, makes too long."""
    return [number for number, line in prose(text) if len(line) > PROSE_COLUMNS and " " in line[:PROSE_COLUMNS].strip(" -*")]


def paths(text: str) -> set[str]:
    """Files and folders of this project that a text names in backticks or in blocks of code."""
    code = [span for _, line in prose(text) for span in _CODE.findall(line)]
    code += [span for line in text.splitlines() if line.startswith("|") for span in _CODE.findall(line)]
    return {
        match for span in code for pattern in (_PATH, _FOLDER) for match in pattern.findall(span) if "NAME" not in match
    } - ELSEWHERE.keys()


def commands(text: str) -> list[str]:
    """Every `dbrx-q` command line of a text: in blocks of code, in backticks, and in the first column of README's table."""
    lines: list[str] = []
    fenced = False
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            lines += [span.strip() for span in re.findall(r"(?:^|\s)(dbrx-q [^#;|&]*)", line)]
        else:
            lines += [span for span in _CODE.findall(line) if span.startswith("dbrx-q ")]
            if (row := re.match(r"\| `([^`]+)`", line)) and row.group(1).split()[0] in application().commands:
                lines.append("dbrx-q " + row.group(1).replace(r"\|", "|"))
    return [part for command in lines for part in re.split(r";\s*(?=dbrx-q )", command.rstrip("; ")) if part.strip() != "dbrx-q"]


@cache
def application() -> Any:
    """The whole command line, as click's group (typer brings its own copy of click, so that classes are not compared)."""
    from dbrx_q.cli import entry

    return typer.main.get_command(entry._app())


def wrong(line: str) -> str | None:
    """What is wrong with one `dbrx-q` line: an unknown subcommand or option, or an invalid choice; None if it parses."""
    command = application()
    words = shlex.split(line.replace("[", " ").replace("]", " "))[1:]
    if words[0] in ("-h", "--help"):
        return None
    while subcommands := getattr(command, "commands", None):
        if words and words[0] in subcommands:
            words, command = words[1:], subcommands[words[0]]
        elif command.name == "bench":
            command = subcommands["model"]  # for which `bench PATH` is short
        else:
            return f"no subcommand {' '.join(words)}"
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if not re.fullmatch(r"-[a-z]|--[a-z][a-z0-9-]*", name) or name in ("-h", "--help"):
            continue
        if name not in options:
            return f"no option {name} of {command.name}"
        parse = options[name].type_descriptor.parameter_info.parser
        named = value or following
        if parse is not None and re.fullmatch(r"[a-z0-9|:-]+", named):
            for choice in named.split("|"):
                try:
                    parse(choice)
                except typer.BadParameter as problem:
                    return f"{name} of {command.name} {problem}"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_prose_end_at_120_columns(path: Path) -> None:
    assert too_long(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    """A path from the root or from the document; a name alone may stand for a file of any folder that the document names."""
    text = path.read_text(encoding="utf-8")
    named = paths(text)
    folders = {ROOT, path.parent, *(folder for name in named if (folder := (ROOT / name).parent).is_dir() and "/" in name)}
    folders |= {ROOT / name for name in named if name.endswith("/")}
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    links = [link for link in _LINK.findall(text) if "://" not in link and not (path.parent / link).exists()]
    assert sorted(missing) + links == []


def test_every_file_that_an_overview_names_exists() -> None:
    overviews = [
        path
        for floor in ("dbrx_q", "kernels", "quantize", "eval")
        for path in (ROOT / floor).rglob("__init__.py")
        if not any(parent.is_symlink() for parent in path.parents if parent != ROOT)
    ]
    assert len(overviews) > 15
    for path in overviews:
        text = path.read_text(encoding="utf-8").split('"""')[1] if '"""' in path.read_text(encoding="utf-8") else ""
        for name in paths(text):
            folders = (path.parent, path.parent.parent, ROOT)  # the room, its floor, the root
            assert any((folder / name).exists() for folder in folders), f"{path}: names {name}, which does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_of_a_document_parses(path: Path) -> None:
    assert [f"{line}: {problem}" for line in commands(path.read_text(encoding="utf-8")) if (problem := wrong(line))] == []


def test_every_make_target_of_a_document_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        target
        for path in DOCUMENTS
        for span in _CODE.findall(path.read_text(encoding="utf-8"))
        for target in re.findall(r"^make ([a-z]+)", span)
    }
    assert {"demo", "test"} <= named <= targets


def test_every_table_that_a_command_writes_has_its_markers() -> None:
    """The documents of the Makefile's comparisons, and the one that `dbrx-q bench resources` gives as its example."""
    from dbrx_q.cli import bench
    from dbrx_q.eval.bench.kernel_report import BEGIN, END

    sections = re.findall(r"--document (\S+) --section (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(sections) == 4
    for document, section in sections:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert text.count(f"<!-- begin: {section} -->") == text.count(f"<!-- end: {section} -->") == 1, f"{document}: {section}"
    [example] = [command.epilog for command in bench.app.registered_commands if command.callback is bench.resources]
    document = re.findall(r"bench resources --out (\S+\.md)", str(example))[0]
    text = (ROOT / document).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, document


def test_the_picture_of_the_rooms_agrees_with_the_imports() -> None:
    """Every room of `docs/architecture.md`, and every arrow that no path of other arrows implies, as `tests/rooms.py` finds them."""
    spec = importlib.util.spec_from_file_location("rooms_of_documents", Path(__file__).with_name("rooms.py"))
    assert spec is not None
    assert spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = rooms  # dataclasses look their module up
    spec.loader.exec_module(rooms)
    names = rooms.modules(ROOT)
    imports = [item for item in rooms.imports(ROOT) if item.imported in names and not item.mirrored]
    arrows = {(rooms.room_of(item.importer, names), rooms.room_of(item.imported, names)) for item in imports}
    below: dict[str, set[str]] = {}
    for above, room in arrows:
        if above != room:
            below.setdefault(above, set()).add(room)

    def reached(room: str) -> set[str]:
        return below.get(room, set()).union(*(reached(lower) for lower in below.get(room, ())))

    needed = {(above, room) for above, lower in below.items() for room in lower if not any(room in reached(other) for other in lower)}
    picture = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    boxes = dict(re.findall(r'^ +(\w+)\["([\w/]+)<br>', picture, re.MULTILINE))
    drawn = {
        (boxes[above], boxes[room])
        for above, lower in re.findall(r"^ +(\w+) --> (.*)$", picture, re.MULTILINE)
        for room in lower.split(" & ")
    }
    assert drawn == needed
    assert set(boxes.values()) == {room for arrow in needed for room in arrow}


def test_every_finding_is_listed_and_runs_without_this_project() -> None:
    listed = re.findall(r"^\| `([\w-]+\.sh)` \|", (ROOT / "findings/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert listed == [path.name for path in scripts]
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n# "), f"{path.name}: a head comment says what happens"
        assert re.search(r"^# Seen on \d{4}-\d\d-\d\d", text, re.MULTILINE), f"{path.name}: the head comment says when it was run"
        assert "set -euo pipefail\nfolder=$(mktemp -d)\ntrap 'rm -rf \"$folder\"' EXIT\n" in text, f"{path.name}: it leaves nothing behind"
        packages = re.findall(r"pip\" install --quiet (.*)", text)[0].split()
        assert all("==" in package for package in packages), f"{path.name}: versions are exact"
        assert "import dbrx_q" not in text, f"{path.name}: it shows other software alone"


def rows_of_tests(text: str) -> dict[str, list[tuple[list[str], list[str]]]]:
    """By heading: (names in the first cell, tests in the last) of each row of the tables whose last column is `tests`."""
    rows: dict[str, list[tuple[list[str], list[str]]]] = {}
    heading, in_table = "", False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
        elif line.startswith("|") and cells[-1] == "tests":
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not cells[0].startswith("---"):
            rows.setdefault(heading, []).append((_CODE.findall(cells[0]), _CODE.findall(cells[-1])))
    return rows


def test_every_argument_and_output_of_transformers_has_a_row_and_its_tests_exist() -> None:
    from dbrx_q.generation.model_generate import generate_tokens
    from dbrx_q.model.generation_config import GenerationConfig
    from dbrx_q.model.modeling import DbrxForCausalLM, DbrxModel
    from dbrx_q.model.outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

    rows = rows_of_tests((ROOT / "docs/transformers.md").read_text(encoding="utf-8"))
    existing = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))}
    named = {heading: {name for names, _ in table for name in names} for heading, table in rows.items()}
    assert all(tests for table in rows.values() for _, tests in table), "every row names a test"
    assert {test for table in rows.values() for _, tests in table for test in tests} - existing == set()
    parameters = {
        "forward": [DbrxModel.forward, DbrxForCausalLM.forward],
        "from_pretrained": [DbrxForCausalLM.from_pretrained],
    }
    for heading, functions in parameters.items():
        expected = [p.name for function in functions for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert set(expected) - named[heading] - {"self"} == set()
    arguments = [*inspect.signature(generate_tokens).parameters, *(field.name for field in dataclasses.fields(GenerationConfig))]
    assert set(arguments) - named["generate"] - {"model", "options", "others"} == set()
    outputs = [field.name for output in (MoeModelOutputWithPast, MoeCausalLMOutputWithPast) for field in dataclasses.fields(output)]
    assert set(outputs) - named["forward"] == set()


def test_the_checks_detect_mistakes() -> None:
    """In texts with one mistake each."""
    assert too_long("word " * 24 + "\n" + "word " * 25 + "\n| " + "cell " * 40 + "\n```\n" + "code " * 40 + "\n```\n") == [2]
    assert too_long("https://example.org/" + "a" * 120) == []
    assert paths("see `kernels/formats/int4.py`, `dbrx_q/checkpoint/`, `config.json` and `tests/x/`") == {
        "kernels/formats/int4.py",
        "dbrx_q/checkpoint/",
        "tests/x/",
    }
    text = "```sh\ndbrx-q inspect M   # what\ndbrx-q quantize A \\\n  B --format int4\n```\n`dbrx-q plan M --ram 1GiB; dbrx-q verify M`"
    assert commands(text) == ["dbrx-q inspect M", "dbrx-q quantize A B --format int4", "dbrx-q plan M --ram 1GiB", "dbrx-q verify M"]
    assert wrong("dbrx-q quantize A B --format int4") is None
    assert wrong("dbrx-q bench kernels --out DIR") is None
    assert wrong("dbrx-q bench A -p 512") is None
    assert "no option --formats" in str(wrong("dbrx-q quantize A B --formats int4"))
    assert "found 'int5'" in str(wrong("dbrx-q quantize A B [--format int4|int5]"))
    assert "no subcommand" in str(wrong("dbrx-q quantise A B"))
