"""Small files of a checkpoint: regular files of a bounded size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import CheckpointError
from dbrx_q.json_file import read_json_object


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_only_a_regular_file_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: must be a regular file; found a folder, a pipe or a device"):
        read_json_object(path)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse; to read it would take all memory
    with pytest.raises(CheckpointError, match=r"config\.json: must have at most 67,108,864 bytes; found 1,099,511,627,776"):
        read_json_object(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_generate_refuses_a_pipe_in_place_of_any_file(name: str, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantized_small, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    outcome = cli("generate", folder, "--prompt", "x", "--max-new-tokens", 1)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{name}: must be a regular file" in outcome.err


def test_verify_names_a_pipe_among_the_files(quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantized_small, folder)
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    outcome = cli("verify", folder)
    assert outcome.code == 1
    assert "README.md" in outcome.out + outcome.err
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    outcome = cli("verify", folder)
    assert (outcome.code, outcome.out) == (2, "")
    assert "manifest.json: must be a regular file" in outcome.err
