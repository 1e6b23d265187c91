"""Files of measured tiles: written, read back, refused when damaged, and used only on the chip that they were measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from dbrx_q.errors import RequestError
from dbrx_q.kernels.triton import tiles
from dbrx_q.kernels.triton.launch import CHIPS
from dbrx_q.kernels.triton.tiles import Problem, Tiles, choose
from dbrx_q.model import tuned_tiles
from dbrx_q.model.tuned_tiles import TileChoice, Tuning, load_tuning, read_tuning, tuning_path, unused_files, write_tuning

CHIP = CHIPS["sm_90"]
PROBLEM = Problem("linear", 4, 6144, 6144, 4, 64)
TUNING = Tuning(
    chip="sm_90",
    multiprocessors=CHIP.multiprocessors,
    device="NVIDIA H200",
    date="2026-11-22T10:00:00+00:00",
    versions={"torch": "2.13.0", "triton": triton.__version__},
    choices=(TileChoice(PROBLEM, Tiles(16, 8, 128, 2, 1, 5), 1.5e-5, 2e-5, 40),),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "_MEASURED", {})


def test_a_written_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sm_90.json"
    write_tuning(TUNING, path)
    assert read_tuning(path) == TUNING
    assert [file.name for file in path.parent.iterdir()] == ["sm_90.json"]


def test_measured_tiles_replace_the_default_for_every_number_of_tokens_in_their_bucket() -> None:
    default = choose(PROBLEM, CHIP)
    assert load_tuning(CHIP) is None
    write_tuning(TUNING, tuning_path("sm_90"))
    assert load_tuning(CHIP) == tuning_path("sm_90")
    assert choose(PROBLEM, CHIP) == choose(replace(PROBLEM, tokens=3), CHIP) == TUNING.choices[0].tiles != default
    assert choose(replace(PROBLEM, tokens=2), CHIP) == default


def test_another_chip_keeps_the_default() -> None:
    write_tuning(TUNING, tuning_path("sm_90"))
    smaller = replace(CHIP, multiprocessors=114)
    default = choose(PROBLEM, smaller)
    assert load_tuning(smaller) is None
    assert load_tuning(CHIPS["sm_86"]) is None
    assert choose(PROBLEM, smaller) == default


def test_a_file_of_another_triton_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    write_tuning(TUNING, tuning_path("sm_90"))
    measured = tuning_path("sm_90")
    default = choose(PROBLEM, CHIP)
    monkeypatch.setattr(tuned_tiles, "triton_version", lambda: (3, 99))
    assert load_tuning(CHIP) is None
    assert choose(PROBLEM, CHIP) == default
    assert unused_files("sm_90") == [measured]
    measured.rename(tuning_path("sm_90"))  # the name alone does not make it fit
    assert load_tuning(CHIP) is None
    assert choose(PROBLEM, CHIP) == default


def test_a_patch_release_of_triton_keeps_the_file() -> None:
    major, minor, *_ = triton.__version__.split(".")
    write_tuning(replace(TUNING, versions={"triton": f"{major}.{minor}.17"}), tuning_path("sm_90"))
    assert load_tuning(CHIP) == tuning_path("sm_90")
    assert choose(PROBLEM, CHIP) == TUNING.choices[0].tiles
    assert unused_files("sm_90") == []


def change(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Damage that overwrites fields of the tiles of the only choice."""
    return lambda data: data["choices"][0]["tiles"].update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("device"), "Tuning must have"),
        (lambda data: data.update(extra=1), "Tuning must have"),
        (lambda data: data.update(choices={}), "'choices' must be a list"),
        (lambda data: data.update(multiprocessors="132"), "'multiprocessors' must be of type int"),
        (change(depth=32), "depth must be a multiple of the group size 64; found 32"),
        (change(rows=24), "must be powers of two"),
        (change(tokens=2), "must hold the 4 tokens"),
        (lambda data: data["choices"][0]["problem"].update(row_unit=128), "rows must be a multiple of 128"),
        (lambda data: data["choices"][0]["problem"].pop("group"), "Problem must have"),
        (change(splits=0), "must be at least 1"),
        (change(warps=True), "'warps' must be of type int"),
        (lambda data: data["choices"][0]["problem"].update(tokens=64), "splits must be 1"),
        (lambda data: data["choices"][0]["problem"].update(op="down", run_groups=1), "at least 32 rows"),
        (lambda data: data["choices"].append(None), "Choice must be an object"),
    ],
    ids=[
        *(
            "missing",
            "unknown",
            "no list",
            "text for a number",
            "depth",
            "rows",
            "tokens",
            "row unit",
            "no group",
            "splits",
            "truth for a number",
        ),
        *("splits in prefill", "few rows of groups", "no object"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[dict[str, Any]], object], message: str) -> None:
    path = tuning_path("sm_90")
    write_tuning(TUNING, path)
    data = json.loads(path.read_text(encoding="utf-8"))
    damage(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RequestError, match=message) as raised:
        load_tuning(CHIP)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff", '{"choices": 1}'], ids=["empty", "cut", "list", "binary", "wrong"])
def test_a_file_that_is_no_tuning_is_refused(content: str) -> None:
    path = tuning_path("sm_90")
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match="Remove it or run the sweep again"):
        load_tuning(CHIP)


def test_a_problem_may_lack_what_has_a_default() -> None:
    """As a file does that an earlier version wrote."""
    path = tuning_path("sm_90")
    write_tuning(TUNING, path)
    data = json.loads(path.read_text())
    del data["choices"][0]["problem"]["row_unit"]
    path.write_text(json.dumps(data))
    assert read_tuning(path) == TUNING
