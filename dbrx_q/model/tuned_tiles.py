"""Tiles of the Triton kernels that `dbrx-q bench tune` measured: one file per chip and Triton version in the user's cache folder.

A file is used only on the chip that it was measured on, and only with the Triton, by major and minor version, that compiled the measured
code. Chips of one name may differ in how many multiprocessors share the work, so both the name and the number of multiprocessors must
match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.user_cache import user_cache, write_to_cache
from dbrx_q.kernels.triton.launch import Chip, triton_version
from dbrx_q.kernels.triton.tiles import Problem, Tiles, use_measured

__all__ = ["TileChoice", "Tuning", "load_tuning", "read_tuning", "tuning_path", "unused_files", "write_tuning"]


@dataclass(frozen=True)
class TileChoice:
    """The fastest tiles that were measured for a problem."""

    problem: Problem
    """Shape and format of the product."""
    tiles: Tiles
    """The fastest tiles."""
    seconds: float
    """Time of the product with these tiles."""
    default_seconds: float
    """Time of the product with the default tiles."""
    candidates: int
    """Number of tiles that were measured."""


@dataclass(frozen=True)
class Tuning:
    """The result of one sweep over problems and tiles."""

    chip: str
    """Name of the architecture, such as "sm_90"."""
    multiprocessors: int
    """Streaming multiprocessors (compute units on ROCm) of the device."""
    device: str
    """Product name of the device."""
    date: str
    """When the sweep ran, in ISO 8601."""
    versions: dict[str, str]
    """Versions of torch, triton and the driver."""
    choices: tuple[TileChoice, ...]
    """The fastest tiles of every problem."""


def tuning_path(chip: str) -> Path:
    """The file for a chip and the installed Triton in the user's cache folder."""
    return user_cache() / "tuning" / f"{chip}-triton{_installed()}.json"


def unused_files(chip: str) -> list[Path]:
    """Files for a chip in the user's cache folder that were measured with another Triton than the installed one."""
    folder, used = user_cache() / "tuning", tuning_path(chip)
    return sorted(path for pattern in (f"{chip}.json", f"{chip}-triton*.json") for path in folder.glob(pattern) if path != used)


def load_tuning(chip: Chip) -> Path | None:
    """From now on, use the tiles that were measured on `chip` in place of the default ones.

    Returns:
        The file that they were read from; None if there is none for this chip and the installed Triton.

    Raises:
        RequestError: the file is damaged.
    """
    path = tuning_path(chip.name)
    if not path.exists():
        return None
    tuning = read_tuning(path)
    if (tuning.chip, tuning.multiprocessors) != (chip.name, chip.multiprocessors):
        return None
    if _major_minor(str(tuning.versions.get("triton"))) != _installed():
        return None
    usable = [choice for choice in tuning.choices if choice.tiles.tokens >= chip.smallest_dot]
    use_measured({(chip.name, choice.problem): choice.tiles for choice in usable})
    return path


def write_tuning(tuning: Tuning, path: Path) -> None:
    """Write `tuning` as JSON; the file appears whole or not at all.

    Raises:
        RequestError: it cannot be written.
    """
    if not write_to_cache(path, (json.dumps(asdict(tuning), indent=1) + "\n").encode()):
        raise RequestError(f"{path}: measured tiles must be written to a folder that you may write to. Name another file with --out")


def read_tuning(path: Path) -> Tuning:
    """Read a file that `write_tuning` wrote.

    Raises:
        RequestError: the file cannot be read, or holds values that no sweep measures.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _tuning(data)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RequestError(
            f"{path}: measured tiles must be a file that `dbrx-q bench tune` wrote; {_reason(error)}. Remove it or run the sweep again"
        ) from None


def _tuning(data: Any) -> Tuning:
    values = _values(Tuning, data)
    choices = values["choices"]
    if not isinstance(choices, list):
        raise ValueError("'choices' must be a list")
    values["choices"] = tuple(_choice(choice) for choice in choices)
    _check_types(values, {"chip": str, "multiprocessors": int, "device": str, "date": str, "versions": dict})
    return Tuning(**values)


def _choice(data: Any) -> TileChoice:
    values = _values(TileChoice, data)
    problem, tiles = _values(Problem, values["problem"]), _values(Tiles, values["tiles"])
    _check_types(problem, {field.name: str if field.name == "op" else int for field in fields(Problem) if field.name in problem})
    _check_types(tiles, {field.name: int for field in fields(Tiles)})
    _check_types(values, {"seconds": float, "default_seconds": float, "candidates": int})
    choice = TileChoice(Problem(**problem), Tiles(**tiles), values["seconds"], values["default_seconds"], values["candidates"])
    _check_tiles(choice.problem, choice.tiles)
    return choice


def _check_tiles(problem: Problem, tiles: Tiles) -> None:
    """Refuse tiles with which a kernel would compute a wrong result or none."""
    if any(value < 1 for value in (*vars(tiles).values(), problem.tokens, problem.N, problem.K, problem.group, problem.row_unit)):
        raise ValueError(f"every number of {tiles} and {problem} must be at least 1")
    powers = tiles.rows, tiles.tokens, tiles.depth, tiles.warps
    if any(value & (value - 1) for value in powers):
        raise ValueError(f"rows, tokens, depth and warps must be powers of two; found {powers}")
    if tiles.rows % problem.row_unit:
        raise ValueError(f"rows must be a multiple of {problem.row_unit}, which are dequantized together; found {tiles.rows}")
    if tiles.depth % problem.group:
        raise ValueError(f"depth must be a multiple of the group size {problem.group}; found {tiles.depth}")
    if problem.run_groups and tiles.depth % (problem.group * problem.run_groups):
        raise ValueError(f"depth must be a multiple of {problem.run_groups} groups of {problem.group}; found {tiles.depth}")
    if problem.run_groups and problem.op != "linear" and tiles.rows < 32:
        raise ValueError(f"tiles of experts that are scaled by groups must have at least 32 rows; found {tiles.rows}")
    if problem.decode and tiles.tokens < problem.tokens:
        raise ValueError(f"a tile must hold the {problem.tokens} tokens of a decode step; found {tiles.tokens}")
    if not problem.decode and tiles.splits != 1:
        raise ValueError(f"splits must be 1 for more tokens than a decode step has; found {tiles.splits}")


def _installed() -> str:
    """Major and minor version of the installed Triton."""
    return ".".join(map(str, triton_version()))


def _major_minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


_T = TypeVar("_T")


def _values(kind: type[_T], data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} must be an object; found {type(data).__name__}")
    known = fields(kind)  # type: ignore[arg-type] # every kind that is passed is a dataclass
    expected = {field.name for field in known}
    if not {field.name for field in known if field.default is MISSING} <= set(data) <= expected:
        raise ValueError(f"{kind.__name__} must have {', '.join(sorted(expected))}; found {', '.join(sorted(map(str, data)))}")
    return dict(data)


def _check_types(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        value = values[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name!r} must be of type {kind.__name__}; found {value!r}")


def _reason(error: Exception) -> str:
    return error.strerror or "" if isinstance(error, OSError) else str(error)
