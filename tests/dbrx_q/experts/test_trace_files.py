"""Files of traces: damaged, of another program, or in a place that cannot be written."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbrx_q.errors import ConfigError, RequestError
from dbrx_q.experts.trace import Trace

N, L, A, E = 6, 4, 4, 16


@pytest.fixture
def trace(nano: Path) -> Trace:
    generator = np.random.default_rng(0)
    chosen = np.stack([generator.permutation(E)[:A] for _ in range(N * L)]).reshape(N, L, A).astype(np.uint8)
    return Trace(np.sort(chosen, axis=-1), chosen, np.array([4, 1, 1]), json.loads((nano / "config.json").read_text()))


def test_a_trace_comes_back_as_it_was_written(trace: Trace, tmp_path: Path) -> None:
    trace.write(tmp_path / "t.npz")
    read = Trace.read(tmp_path / "t.npz")
    for name in ("experts", "predicted", "steps"):
        assert np.array_equal(getattr(read, name), getattr(trace, name))
        assert getattr(read, name).dtype == getattr(trace, name).dtype
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_any_damaged_byte_is_an_error_or_changes_nothing(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    trace.write(path)
    whole = path.read_bytes()
    drawn = random.Random(0)
    for position in drawn.sample(range(len(whole)), 150):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << drawn.randrange(8)]) + whole[position + 1 :])
        with suppress(RequestError, ConfigError):
            read = Trace.read(path)
            assert np.array_equal(read.experts, trace.experts)
            assert np.array_equal(read.steps, trace.steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"experts": t.experts.astype(np.int64)}, "must be uint8, and steps integers; found int64, uint8, int64"),
        (lambda t: {"experts": t.experts.astype(np.int8) - 20}, "found int8, uint8, int64"),
        (lambda t: {"experts": t.experts.astype(np.float32)}, "found float32"),
        (lambda t: {"predicted": t.predicted.astype("U2")}, "found uint8, str"),
        (lambda t: {"steps": t.steps.astype(np.float64)}, "found uint8, uint8, float64"),
        (lambda t: {"steps": np.array([8, -2])}, r"steps must be counts of tokens that add up to 6; found \[ 8 -2\]"),
        (lambda t: {"steps": np.array([6, 0])}, "steps must be counts"),
        (lambda t: {"steps": np.array(6)}, "steps must be counts"),
        (lambda t: {"experts": t.experts[0]}, r"must be \[tokens, layers, active\]"),
        (lambda t: {"experts": t.experts * 0}, "experts must be different experts of 16 for every token and layer"),
        (lambda t: {"predicted": t.predicted + np.uint8(16)}, "predicted must be different experts of 16"),
        (lambda t: {"config": [1]}, "it has other contents"),
        (lambda t: {"config": "x"}, "it has other contents"),
    ],
)
def test_arrays_that_no_trace_has_are_refused(
    change: Callable[[Trace], dict[str, Any]], message: str, trace: Trace, tmp_path: Path
) -> None:
    replace(trace, **change(trace)).write(tmp_path / "t.npz")
    with pytest.raises(RequestError, match=message):
        Trace.read(tmp_path / "t.npz")


@pytest.mark.parametrize("version", [1, [2, 2], "two", 2.5])
def test_another_version_is_refused(version: object, trace: Trace, tmp_path: Path) -> None:
    arrays = {"experts": trace.experts, "predicted": trace.predicted, "steps": trace.steps, "config": json.dumps(trace.config)}
    np.savez_compressed(tmp_path / "t.npz", version=version, **arrays)
    if version == 2.5:
        Trace.read(tmp_path / "t.npz")
        return
    with pytest.raises(RequestError, match=r"t\.npz: (a trace must be of version 2|must be a trace)"):
        Trace.read(tmp_path / "t.npz")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.npz")
    with pytest.raises(RequestError, match="must be a regular file; found a folder, a pipe or a device"):
        Trace.read(tmp_path / "t.npz")


def test_an_interrupted_write_leaves_nothing(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: Any, **arrays: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace.write(tmp_path / "t.npz")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)  # as in a read-only folder, also for root
    (tmp_path / "t.npz").mkdir()
    with pytest.raises(RequestError, match=r"t\.npz: a trace must be written there; Is a directory\. Choose another --out"):
        trace.write(tmp_path / "t.npz")
