"""Counts the rooms of this project, the floors they stand on and the circles among them, from the imports of its source files.

    python tests/rooms.py [CHECKOUT]

A room is a folder of modules. An arrow points from a room to each room that it imports, lazily or not; imports for type checkers alone are
left out. A room's floor is one above the highest room that it imports. Imports inside functions named `from_pretrained` and
`generate` are the documented exception: they are mirrored from transformers, where a model loads itself and generates by itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Import", "circles", "floors", "imports", "modules", "room_of"]

FLOORS = ("kernels", "quantize", "eval", "dbrx_q")


@dataclass(frozen=True)
class Import:
    """One module that a file imports."""

    importer: str
    """Dotted name of the importing module, such as `dbrx_q.kernels.linear`."""
    imported: str
    """Dotted name of the imported module, which may be of another project."""
    at_top: bool
    """Whether it runs when the file is imported, not inside a function."""
    mirrored: bool
    """Whether it runs inside a function named `from_pretrained` or `generate`."""


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file of every module of the project in `root`; packages have the name of their folder."""
    files = {}
    for floor in FLOORS:
        base = "dbrx_q" if floor == "dbrx_q" else f"dbrx_q.{floor}"
        for path in sorted((root / floor).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents if parent != root):
                continue
            parts = [base, *path.relative_to(root / floor).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(root: Path) -> Iterator[Import]:
    """Every import that can run, in the order of the files."""
    names = modules(root)
    for module, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        lazy = {child for function in functions for child in ast.walk(function)}
        documented = {child for function in functions if function.name in ("from_pretrained", "generate") for child in ast.walk(function)}
        guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
        for_types = {child for guard in guards for statement in guard.body for child in ast.walk(statement)}
        for node in ast.walk(tree):
            if node in for_types:
                continue
            for imported in _imported(node, package, names):
                yield Import(module, imported, node not in lazy, node in documented)


def _imported(node: ast.AST, package: str, names: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = (node.module or "") if node.level == 0 else ".".join([*parents, *([node.module] if node.module else [])])
        for alias in node.names:
            module = f"{base}.{alias.name}"
            yield module if module in names else base


def room_of(module: str, names: Mapping[str, Path]) -> str:
    """The folder of a module, as a path from the project's root."""
    package = module if names[module].name == "__init__.py" else module.rpartition(".")[0]
    first, _, rest = package.removeprefix("dbrx_q").lstrip(".").partition(".")
    parts = [first, *rest.split(".")] if first in FLOORS else ["dbrx_q", first, *rest.split(".")]
    return "/".join(part for part in parts if part)


def floors(nodes: Iterable[str], arrows: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The floor of each node, from 1; nodes that import each other in a circle share one."""
    nodes, arrows = list(nodes), set(arrows)
    group = {node: index for index, circle in enumerate(_strong(nodes, arrows)) for node in circle}
    below = {index: {group[b] for a, b in arrows if group[a] == index and group[b] != index} for index in set(group.values())}
    levels: dict[int, int] = {}

    def level(index: int) -> int:
        if index not in levels:
            levels[index] = 1 + max((level(other) for other in below[index]), default=0)
        return levels[index]

    return {node: level(group[node]) for node in nodes}


def circles(nodes: Iterable[str], arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The sets of nodes that reach each other through arrows."""
    return [sorted(circle) for circle in _strong(list(nodes), set(arrows)) if len(circle) > 1]


def _strong(nodes: list[str], arrows: set[tuple[str, str]]) -> list[set[str]]:
    """Strongly connected components: nodes that reach each other."""
    after: dict[str, set[str]] = {node: {b for a, b in arrows if a == node} for node in nodes}
    reach: dict[str, set[str]] = {}
    for node in nodes:
        seen, waiting = {node}, [node]
        while waiting:
            new = after[waiting.pop()] - seen
            seen |= new
            waiting += new
        reach[node] = seen
    components: list[set[str]] = []
    for node in nodes:
        if not any(node in component for component in components):
            components.append({other for other in reach[node] if node in reach[other]})
    return components


def main(root: Path) -> None:
    """Print the counts and, for every room, its floor and the rooms that it imports."""
    names = modules(root)
    internal = [item for item in imports(root) if item.imported in names and not item.mirrored]
    files = {(item.importer, item.imported) for item in internal if item.importer != item.imported}
    rooms = sorted({room_of(module, names) for module in names})
    arrows = {(a, b) for importer, imported in files if (a := room_of(importer, names)) != (b := room_of(imported, names))}
    level = floors(rooms, arrows)
    print(f"{len(rooms)} rooms on {max(level.values())} floors, {len(arrows)} arrows, {len(circles(rooms, arrows))} circles of rooms")
    print(f"{len(names)} files, {len(files)} arrows, {len(circles(names, files))} circles of files")
    for room in sorted(rooms, key=lambda room: (-level[room], room)):
        print(f"{level[room]:3} {room:24} -> {', '.join(sorted(b for a, b in arrows if a == room))}")
    for circle in [*circles(rooms, arrows), *circles(names, files)]:
        print(f"circle: {', '.join(circle)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent))
