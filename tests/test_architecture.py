"""The four floors: imports only go down; importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each floor may import of this project. The command line may use everything, lazily.
FLOORS = {
    "kernels": ("dbrx_q.kernels",),
    "dbrx_q": ("dbrx_q",),
    "quantize": ("dbrx_q",),
    "eval": ("dbrx_q",),
}
FORBIDDEN = {"dbrx_q": ("dbrx_q.eval", "dbrx_q.quantize"), "quantize": ("dbrx_q.eval",), "eval": ("dbrx_q.quantize",), "kernels": ()}


def imports_of(path: Path, package: str) -> list[tuple[str, bool]]:
    """(absolute module, whether at the top level) of every import that runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for child in ast.walk(node)}
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    typing = {child for node in guards for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = node.module or "" if node.level == 0 else ".".join([*parents, *([node.module] if node.module else [])])
            found.append((base, node not in lazy))
            found += [(f"{base}.{alias.name}", node not in lazy) for alias in node.names]
    return found


def sources(floor: str) -> list[tuple[Path, str]]:
    """(file, its package) of a floor; symbolic links to the other floors are not followed."""
    base = "dbrx_q" if floor == "dbrx_q" else f"dbrx_q.{floor}"
    files = [path for path in (ROOT / floor).rglob("*.py") if not any(parent.is_symlink() for parent in path.parents if parent != ROOT)]
    return [(path, ".".join([base, *path.parent.relative_to(ROOT / floor).parts])) for path in files]


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor: str) -> None:
    files = sources(floor)
    assert len(files) >= 3
    for path, package in files:
        for module, at_top in imports_of(path, package):
            ours = module == "dbrx_q" or module.startswith("dbrx_q.")
            assert not module.startswith(("kernels", "quantize.", "eval.")), f"{path}: import {module} by its installed name"
            if ours:
                assert module.startswith(FLOORS[floor]), f"{path}: {floor} must not import {module}"
            upward = module.startswith(FORBIDDEN[floor]) if FORBIDDEN[floor] else False
            lazy_command_line = package.startswith("dbrx_q.cli") and not at_top
            assert not upward or lazy_command_line, f"{path}: {floor} must not import {module}"


def test_importing_is_light_and_does_nothing() -> None:
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
    check = "import dbrx_q.generation, dbrx_q.cli.generate, dbrx_q; assert callable(dbrx_q.generate)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_module_names_what_it_offers() -> None:
    for floor in FLOORS:
        for path, _ in sources(floor):
            text = path.read_text(encoding="utf-8")
            assert "__all__" in text or path.name == "__init__.py", path
