"""Which library multiplies plain float32 matrices, and that both give the product."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dbrx_q.kernels.cpu import float32
from dbrx_q.kernels.cpu import linear as cpu
from dbrx_q.kernels.cpu.choice import matmul, padded
from dbrx_q.kernels.cpu.float32 import SWITCH, Library, library, library_for, product
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.weights import dequantize

needs_onednn = pytest.mark.skipif(not float32._has_onednn(), reason="torch has no oneDNN here")


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of measurements, without any; nothing of an earlier test is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    float32._measured.cache_clear()
    yield tmp_path / "dbrx_q" / "float32"
    float32._measured.cache_clear()


def matrices(T: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return torch.randn(T, K, generator=generator), torch.randn(N, K, generator=generator)


@needs_onednn
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_onednn_multiplies_weights_as_they_are_stored(layout: str) -> None:
    """Rows have the bits that they have alone in a smaller padded product, on any number of threads."""
    x, weight = matrices(208, 1024, 1536)
    weight = weight if layout == "rows" else weight.T.contiguous().T
    reference = x.double() @ weight.double().T
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = product(x, weight, Library.ONEDNN)
        torch.set_num_threads(3)
        assert torch.equal(product(x, weight, Library.ONEDNN), y)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=3e-6 * float(reference.abs().max()))
    assert torch.equal(product(x[:48], weight, Library.ONEDNN), y[:48])


@needs_onednn
def test_large_products_go_to_the_named_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only oneDNN gets rows of zeros, so that it compiles code for few numbers of rows."""
    x, weight = matrices(33, 1024, 1024)
    monkeypatch.setenv(SWITCH, "onednn")
    assert library_for(33, 1024, 1024) is Library.ONEDNN
    assert len(padded(x, 1024)[0]) == 48
    assert torch.equal(matmul(x, weight), product(torch.nn.functional.pad(x, (0, 0, 0, 15)), weight, Library.ONEDNN)[:33])
    packed = nf4.quantize(weight)
    tiles = cpu.linear(x, packed)
    reference = x.double() @ dequantize(packed).double().T
    torch.testing.assert_close(tiles.double(), reference, rtol=0, atol=3e-6 * float(reference.abs().max()))
    monkeypatch.setenv(SWITCH, "torch")
    assert padded(x, 1024) == (x, Library.TORCH)
    assert torch.equal(matmul(x, weight), x @ weight.T)
    assert not torch.equal(cpu.linear(x, packed), tiles)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", [int4, int8])
def test_many_tokens_of_float32_err_as_float32_matrices_do(kind: ModuleType, group_size: int) -> None:
    """With packed weights, whichever way they are multiplied; a token has the same bits among others."""
    x, weight = matrices(100, 70, 1024)
    x = x * torch.logspace(-3, 3, 1024)  # features of very different sizes
    x[3], x[4, ::2] = 0.0, 1.0
    packed = kind.quantize(weight / torch.logspace(-3, 3, 1024), group_size=group_size)
    reference = x.double() @ dequantize(packed).double().T
    theirs = x @ dequantize(packed).T
    errors = [(y.double() - reference).norm() for y in (cpu.linear(x, packed), theirs)]
    assert errors[0] <= 2 * errors[1] + 1e-7 * reference.norm()
    assert torch.equal(cpu.linear(x[:50], packed), cpu.linear(x, packed)[:50])


def test_small_products_are_not_measured(unmeasured: Path) -> None:
    assert {library_for(*shape) for shape in [(15, 4096, 4096), (512, 128, 1024), (0, 4096, 4096)]} == {Library.TORCH}
    assert not unmeasured.exists()


def test_a_chip_is_measured_once(unmeasured: Path) -> None:
    threads = torch.get_num_threads()
    chosen = library_for(64, 1024, 1024)
    assert torch.get_num_threads() == threads
    if not float32._has_onednn():
        assert chosen is Library.TORCH
        return
    [path] = unmeasured.glob("*.json")
    stored = json.loads(path.read_text())
    assert stored["library"] == chosen.value
    gain = stored["seconds"]["torch"] / stored["seconds"]["onednn"]
    assert (chosen is Library.ONEDNN) == (gain > float32._LEAST_GAIN)
    other = next(member for member in Library if member is not chosen)
    path.write_text(json.dumps(stored | {"library": other.value}))
    assert library() is chosen  # a process does not change its mind
    float32._measured.cache_clear()
    assert library() is other
    path.write_text('{"library": "blas"}')
    float32._measured.cache_clear()
    library()
    assert json.loads(path.read_text())["library"] in ("torch", "onednn")


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "mkl")
    with pytest.raises(FormatError, match=r"DBRX_Q_FLOAT32 must be one of torch, onednn; found 'mkl'"):
        library_for(64, 1024, 1024)
