"""The floors and the rooms on them: imports only go down, and importing has no side effects."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "dbrx_q", "quantize", "eval")
# What no file of a floor may import. The command line may import everything inside its functions.
FORBIDDEN = {
    "kernels": ("dbrx_q", "dbrx_q.quantize", "dbrx_q.eval"),
    "dbrx_q": ("dbrx_q.quantize", "dbrx_q.eval"),
    "quantize": ("dbrx_q.eval",),
    "eval": ("dbrx_q.quantize",),
}
# The rooms, from the lowest floor up. A room imports rooms of earlier lines only: planning never imports experts, checkpoint never imports
# model.
LEVELS = (
    ("kernels/formats", "quantize"),
    ("kernels/cpu", "kernels/triton", "dbrx_q"),
    ("kernels", "dbrx_q/checkpoint"),
    ("dbrx_q/planning", "dbrx_q/tokenizer", "dbrx_q/sources/encodings", "quantize/methods"),
    ("dbrx_q/experts",),
    ("dbrx_q/model",),
    ("dbrx_q/generation", "dbrx_q/sources", "dbrx_q/transformers", "quantize/calibration"),
    ("eval", "quantize/export", "quantize/pipeline"),
    ("eval/bench", "eval/compare", "eval/sensitivity", "eval/tasks"),
    ("eval/gpu_run",),
    ("dbrx_q/cli",),
)
_OVERVIEW_LINES = range(10, 31)


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    """The module `tests/rooms.py`, which derives rooms, floors and circles from imports."""
    spec = importlib.util.spec_from_file_location("rooms", Path(__file__).with_name("rooms.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rooms"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down_a_floor(rooms: ModuleType, floor: str) -> None:
    names = rooms.modules(ROOT)
    checked = 0
    for item in rooms.imports(ROOT):
        room = rooms.room_of(item.importer, names)
        if room.split("/")[0] != floor:
            continue
        checked += 1
        assert not item.imported.startswith(("kernels", "quantize.", "eval.")), f"{item.importer} imports {item.imported}, not dbrx_q"
        if item.imported not in names:
            assert not item.imported.startswith("dbrx_q"), f"{item.importer} imports {item.imported}, which does not exist"
            continue
        imported = rooms.room_of(item.imported, names).split("/")[0]
        name = "dbrx_q" if imported == "dbrx_q" else f"dbrx_q.{imported}"
        lazy_command_line = room == "dbrx_q/cli" and not item.at_top
        assert name not in FORBIDDEN[floor] or lazy_command_line, f"{item.importer}: {floor} must not import {item.imported}"
    assert checked > 50


def test_every_room_imports_lower_rooms_only(rooms: ModuleType) -> None:
    names = rooms.modules(ROOT)
    level = {room: number for number, line in enumerate(LEVELS) for room in line}
    assert level.keys() == {rooms.room_of(module, names) for module in names}
    for item in rooms.imports(ROOT):
        if item.imported in names and not item.mirrored:
            above, below = rooms.room_of(item.importer, names), rooms.room_of(item.imported, names)
            assert above == below or level[below] < level[above], f"{item.importer}: {above} must not import {item.imported}"


def test_no_files_import_each_other_in_a_circle(rooms: ModuleType) -> None:
    """Except in `from_pretrained` and `generate`: a model loads itself and generates by itself, as in transformers."""
    names = rooms.modules(ROOT)
    internal = [item for item in rooms.imports(ROOT) if item.imported in names]
    assert rooms.circles(names, {(item.importer, item.imported) for item in internal if not item.mirrored}) == []
    everything = {(item.importer, item.imported) for item in internal}
    [circle] = rooms.circles(names, everything)
    assert {"dbrx_q.model.loading", "dbrx_q.model.modeling", "dbrx_q.model.pretrained", "dbrx_q.generation.model_generate"} <= set(circle)
    assert {rooms.room_of(module, names) for module in circle} == {"dbrx_q/model", "dbrx_q/generation"}


def test_circles_and_floors_are_computed(rooms: ModuleType) -> None:
    """For five rooms with one circle."""
    arrows = {("a", "b"), ("b", "c"), ("c", "b"), ("d", "a"), ("d", "e")}
    assert rooms.circles("abcde", arrows) == [["b", "c"]]
    assert rooms.floors("abcde", arrows) == {"a": 2, "b": 1, "c": 1, "d": 3, "e": 1}


def test_every_room_begins_with_an_overview(rooms: ModuleType) -> None:
    for module, path in rooms.modules(ROOT).items():
        if path.name == "__init__.py" and module != "dbrx_q":
            doc = path.read_text(encoding="utf-8").split('"""')[1]
            assert doc.count("\n") + 1 in _OVERVIEW_LINES, f"{path}: an overview has ten to thirty lines"
            files = [file.name for file in path.parent.glob("*.py") if file.name != "__init__.py"]
            assert [name for name in files if name not in doc] == [], f"{path}: an overview names every file of its folder"


def test_importing_is_light_and_has_no_side_effects() -> None:
    check = (
        "import os, sys; before = dict(os.environ); import dbrx_q, dbrx_q.cli\n"
        "heavy = [m for m in ('torch', 'numba', 'triton', 'transformers', 'tiktoken', 'huggingface_hub', 'typer') if m in sys.modules]\n"
        "assert not heavy, heavy; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_public_names_resolve() -> None:
    import dbrx_q

    for name in dbrx_q.__all__:
        assert getattr(dbrx_q, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dbrx_q.nothing


def test_public_functions_still_resolve_after_their_modules() -> None:
    """A module must not hide a function of the same name."""
    check = "import dbrx_q.generation.generate, dbrx_q.cli.generate, dbrx_q; assert callable(dbrx_q.generate)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_module_lists_its_public_names(rooms: ModuleType) -> None:
    for path in rooms.modules(ROOT).values():
        assert "__all__" in path.read_text(encoding="utf-8") or path.name == "__init__.py", path
