"""Our reader and writer against the safetensors package."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from dbrx_q.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter, parse_header, safetensors_header
from dbrx_q.errors import CheckpointError

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
            values = file.read(name)
            assert values.dtype == tensor.dtype
            assert torch.equal(values, tensor), name
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


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": None}, {"__metadata__": {"format": "mlx"}}], ids=["none", "null", "mlx"])
@pytest.mark.parametrize("padding", range(4))
@pytest.mark.parametrize("remote", [False, True])
def test_headers_as_mlx_writes_them(metadata: dict[str, object], padding: int, remote: bool, tmp_path: Path) -> None:
    # Entries in the order of a hash table, no padding to 8 bytes, and a byte before the floats: every tensor is misaligned.
    values = {"bytes": torch.tensor([7], dtype=torch.uint8), "w": torch.arange(6.0).bfloat16().view(3, 2), "b": torch.tensor([1.5])}
    entries = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [13, 17]},
        "w": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [1, 13]},
        "bytes": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    header = json.dumps(metadata | entries, separators=(",", ":")).encode() + b" " * padding
    body = b"".join(bytes(tensor.view(-1).view(torch.uint8).tolist()) for tensor in values.values())
    path = tmp_path / "model.safetensors"
    data = len(header).to_bytes(8, "little") + header + body
    path.write_bytes(data)
    with SafetensorsFile(path) as file:
        if remote:
            assert parse_header(path, len(data), lambda first, count: data[first : first + count])[0] == file.tensors
        for name, tensor in values.items():
            assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read_rows("w", 1, 2), values["w"][1:])


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(path, [])
    assert path.read_text() == "mine"


def write_header(path: Path, header: str, body: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + body)


def test_the_metadata_is_what_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for header, expected in [
        ('{"__metadata__":null}', {}),  # as MLX writes it
        ("{}", {}),
        ('{"__metadata__":{"a":"1","b":"x"}}', {"a": "1", "b": "x"}),
    ]:
        write_header(path, header)
        with SafetensorsFile(path) as file:
            assert (file.metadata, file.tensors) == (expected, {})
    write_header(path, '{"__metadata__":{"a":1}}')
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        SafetensorsFile(path)


def test_float8_is_read_and_types_without_a_torch_dtype_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"e4m3": torch.randn(3, 5).to(torch.float8_e4m3fn), "uint16": torch.arange(7, dtype=torch.int32).to(torch.uint16)}
    safetensors.torch.save_file(tensors, path)
    with SafetensorsFile(path) as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name).view(torch.uint8), tensor.view(torch.uint8)), name
    write_header(
        path, '{"f4":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]},"z":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}', b"abcde"
    )
    with SafetensorsFile(path) as file:
        assert file.read("z").tolist() == [ord("e")]
        assert file.tensors["f4"].dtype_label == "F4"
        assert not file.tensors["f4"].has_dtype(torch.uint8, torch.bfloat16)
        for read in (lambda: file.read("f4"), lambda: file.read_rows("f4", 0, 1)):
            with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor f4: .* found F4"):
                read()


def test_a_header_without_its_file_takes_a_sparse_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    size = 1 << 40
    header, infos = safetensors_header([("large", torch.uint8, (size,))])
    tensors, metadata = parse_header(Path("x"), len(header) + size, lambda first, count: header[first : first + count])
    assert (tensors, metadata) == (infos, {"format": "pt"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        parse_header(Path("x"), len(header) + size - 1, lambda first, count: header[first : first + count])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="Set TMPDIR"):
        parse_header(Path("x"), len(header) + size, lambda first, count: header[first : first + count])


def test_a_header_of_absurd_length_is_not_fetched() -> None:
    requested_ranges = []

    def read(first: int, count: int) -> bytes:
        requested_ranges.append((first, count))
        return (200_000_000).to_bytes(8, "little")[:count]

    with pytest.raises(CheckpointError, match="a header of 200000000 bytes in a file of 1000000000"):
        parse_header(Path("x"), 1_000_000_000, read)
    assert requested_ranges == [(0, 8)]
