"""A folder with both an index and a single file of weights: which is read, and when both are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbrx_q.checkpoint.folder import INDEX_NAME, SINGLE_NAME, Checkpoint
from dbrx_q.checkpoint.layout import HEAD
from dbrx_q.errors import CheckpointError
from dbrx_q.sources.open import open_source


@pytest.fixture
def both(small: Path, tmp_path: Path) -> Path:
    """The small checkpoint in two shards with their index, and beside them a single file, whose head holds ones."""
    folder = tmp_path / "both"
    shutil.copytree(small, folder)
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    save_file(tensors | {HEAD: torch.ones_like(tensors[HEAD])}, folder / SINGLE_NAME)
    return folder


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-0*.safetensors"))


def reads_single(folder: Path) -> bool:
    with Checkpoint(folder) as checkpoint:
        return bool((checkpoint.read(HEAD) == 1).all())


@pytest.mark.parametrize("open_folder", [Checkpoint, open_source], ids=["Checkpoint", "open_source"])
def test_two_whole_sets_of_weights_are_refused_by_name(open_folder: Callable[[Path], object], both: Path) -> None:
    message = (
        f"found {SINGLE_NAME} and, by {INDEX_NAME}, model-00001-of-00002.safetensors and 1 more. .* remove {SINGLE_NAME}, or the index"
    )
    with pytest.raises(CheckpointError, match=message):
        open_folder(both)


def test_the_rest_of_an_earlier_save_does_not_hide_the_single_file(both: Path) -> None:
    for shard in shards_of(both):  # one after the other
        shard.unlink()
        assert reads_single(both)


def test_a_single_file_is_read_without_an_index(both: Path) -> None:
    (both / INDEX_NAME).unlink()
    assert reads_single(both)


def test_shards_are_read_without_a_single_file(both: Path) -> None:
    (both / SINGLE_NAME).unlink()
    assert not reads_single(both)
    shards_of(both)[0].unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: shard not found"):
        Checkpoint(both)


def test_an_index_may_name_the_single_file(both: Path) -> None:
    index = both / INDEX_NAME
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_NAME)}))
    assert reads_single(both)


def test_a_fallback_copy_is_held_to_the_same_rule(both: Path, tmp_path: Path) -> None:
    shutil.move(both, tmp_path / "model" / "fallback")
    with pytest.raises(CheckpointError, match="a checkpoint must hold its weights once"):
        Checkpoint(tmp_path / "model" / "fallback")
