"""Dequantized models whose experts are read layer by layer: when that happens, and what is held."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file

from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.experts import ResidentExpertStore
from dbrx_q.sources import streamed
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import StreamedExpertStore, resident_bytes, streams

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
CPU = torch.device("cpu")


def test_experts_are_streamed_where_the_model_would_not_fit() -> None:
    config = DbrxConfig.from_pretrained(NANO)
    tensors = load_file(NANO / "model.safetensors")
    all_weights = sum(tensor.numel() for tensor in tensors.values()) * 4
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name) * 4
    least = all_weights - experts * 3 // 4  # one of four layers' experts is held
    largest = 4 * max(tensor.numel() for tensor in tensors.values())
    assert resident_bytes(config, torch.float32, stream=False) == all_weights
    assert resident_bytes(config, torch.float32, stream=True) == least
    assert not streams(config, torch.float32, all_weights * 5 // 4 + 8, source="x")
    assert streams(config, torch.float32, all_weights * 5 // 4 - 8, source="x")
    assert streams(config, torch.float32, (least + largest) * 5 // 4 + 8, source="x")
    assert not streams(config, torch.bfloat16, all_weights * 5 // 8 + 8, source="x")
    with pytest.raises(RequestError, match=r"x: the weights without experts.*in 80% of the memory that is free;.* MB are free\. Free some"):
        streams(config, torch.float32, (least + largest) * 5 // 4 - 8, source="x")


def test_a_streamed_model_reserves_memory_for_its_layer_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(NANO)
    assert isinstance(source, streamed.ConvertedSource)
    available_bytes: list[int] = []

    def record(config: DbrxConfig, dtype: torch.dtype, available: int, *, source: str, formats: object, shares: int | None) -> bool:
        available_bytes.append(available)
        return True

    monkeypatch.setattr(streamed, "_stores", WeakSet())
    monkeypatch.setattr(streamed, "available_memory", lambda device: 1 << 40)
    monkeypatch.setattr(streamed, "streams", record)
    first = source.load(dtype=torch.float32, device=CPU)
    layer = 16 * 3 * 256 * 128 * 4
    second = source.load(dtype=torch.float32, device=CPU)
    assert available_bytes == [1 << 40, (1 << 40) - layer]
    first(torch.tensor([[1, 2]]))
    third = source.load(dtype=torch.float32, device=CPU)
    assert available_bytes[2] == (1 << 40) - layer  # the second model's layer
    del second, third
    gc.collect()
    source.load(dtype=torch.float32, device=CPU)
    assert available_bytes[3] == 1 << 40


def test_loading_chooses_by_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(NANO)
    assert isinstance(source.load(dtype=None, device=CPU).transformer.expert_store, ResidentExpertStore)
    monkeypatch.setattr(streamed, "available_memory", lambda device: resident_bytes(source.config, torch.bfloat16, stream=False))
    model = source.load(dtype=None, device=CPU)
    assert isinstance(model.transformer.expert_store, StreamedExpertStore)
    assert all(parameter.is_meta == (".experts." in name) for name, parameter in model.named_parameters())


def test_one_layer_is_held_until_another_is_requested() -> None:
    source = open_source(NANO)
    assert isinstance(source, streamed.ConvertedSource)
    read_names: list[str] = []

    class RecordedReader:
        def __enter__(self) -> streamed.Reader:
            self.inner = source.reader()
            read = self.inner.__enter__()

            def record(tensor: DenseTensor) -> torch.Tensor:
                read_names.append(tensor.name)
                return read(tensor)

            return record

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

    store = StreamedExpertStore(source.config, RecordedReader, torch.float32, CPU)  # type: ignore[arg-type] # a context manager by its methods
    resident = source.load(dtype=torch.float32, device=CPU, stream=False).transformer.expert_store
    assert resident is not None
    names = [[tensor.name for tensor in dense_tensors(source.config) if tensor.experts and tensor.layer == layer] for layer in range(4)]
    chosen = torch.zeros(1, 4, dtype=torch.int64)
    for layer in (0, 0, 1, 3, 0):
        weights, expected = store.layer(layer, chosen), resident.layer(layer, chosen)
        for matrix in ("w1", "v1", "w2"):
            a, b = getattr(weights, matrix), getattr(expected, matrix)
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert read_names == names[0] + names[1] + names[3] + names[0]
