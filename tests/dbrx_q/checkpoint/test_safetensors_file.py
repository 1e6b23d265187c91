"""Our reader and writer against the safetensors package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from dbrx_q.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter

TENSORS = {
    "a": torch.randn(7, 5).bfloat16(),
    "b": torch.randint(-128, 128, (3, 4, 2)).to(torch.int8),
    "empty": torch.empty(0, 9),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(6).half(),
    "bytes": torch.randint(0, 256, (11,)).to(torch.uint8),
}


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()])
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    digest = writer.close()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert writer.nbytes == path.stat().st_size
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.offset_keys()) != []
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor), name


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert set(file.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = file.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name
        assert torch.equal(file.read_rows("a", 2, 3), TENSORS["a"][2:5])
        into = torch.empty(7, 5, dtype=torch.bfloat16)
        assert file.read("a", into) is into
        assert torch.equal(into, TENSORS["a"])


def test_a_non_contiguous_tensor_is_written_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.randn(5, 7).T
    writer = SafetensorsWriter(path, [("t", tensor.dtype, tuple(tensor.shape))])
    writer.write("t", tensor)
    writer.close()
    assert torch.equal(safetensors.torch.load_file(path)["t"], tensor)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(path, [])
    assert path.read_text() == "mine"
