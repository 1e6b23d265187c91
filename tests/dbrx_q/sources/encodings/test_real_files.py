"""Files that the real tools wrote: the values that each tool computes, and every exact format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.json_file import read_json_object
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.sources.encodings.base import Encoding, LoadedParts, StoredLinear
from dbrx_q.sources.encodings.choose import encodings_of

_LAYOUTS = Path(__file__).parents[3] / "data" / "layouts"
_D, _F, _VOCABULARY, _EXPERTS = 128, 256, 320, 3
_ROWS = {"w1": _F, "v1": _F, "w2": _D, "layer": _EXPERTS, "Wqkv": 256, "q_proj": _D, "k_proj": 64, "v_proj": 64, "out_proj": _D}
# The format that holds the layers of each folder, by config.json; None where there is none.
_EXACT = {
    "awq-4bit-g64": {"int4:64"},
    "bitsandbytes-nf4-double-converted": {"nf4:64"},
    "gptq-4bit-g128": {"int4:128"},
    "gptq-4bit-g32-asym": {"int4:32"},
    "gptq-4bit-g64-act-order": {None},
    "gptq-8bit-g128": {"int8:128"},
    "gptq-v2-4bit-g32-asym": {"int4:32"},
    "mlx-3bit-g32": {"affine4-bf16:32"},
    "mlx-4bit-g64": {"affine4-bf16:64"},
    "mlx-6bit-g64-float16": {"affine8:64"},
    "mlx-mixed": {"affine4-bf16:64", "affine8-bf16:64"},
    "mlx-mxfp4": {"affine8-bf16:32"},
}


def _layers(folder: Path) -> Iterator[tuple[Encoding, StoredLinear, dict[str, torch.Tensor]]]:
    """Every quantized layer of a folder."""
    path = folder / "quantize_config.json"
    quantize_config = read_json_object(path) if path.is_file() else None
    _, encoding = encodings_of(read_json_object(folder / "config.json"), quantize_config, str(folder / "config.json"))
    suffixes = sorted(encoding.suffixes | encoding.optional, key=len, reverse=True)
    with SafetensorsFile(folder / "model.safetensors") as file:
        modules: dict[str, list[str]] = {}
        for name in file.tensors:
            suffix = next((suffix for suffix in suffixes if name.endswith(f".{suffix}")), None)
            if suffix is not None:
                modules.setdefault(name.removesuffix(f".{suffix}"), []).append(suffix)
        for module, found in modules.items():
            if encoding.suffixes <= set(found):
                role = module.rpartition(".")[2]
                infos = {suffix: file.tensors[f"{module}.{suffix}"] for suffix in found}
                shape = (_ROWS.get(role, _VOCABULARY), _F if role == "w2" else _D)
                yield encoding, StoredLinear(module, shape, infos, file.path), {s: file.read(f"{module}.{s}") for s in found}


@pytest.mark.parametrize(
    "folder", [path.name for path in sorted(_LAYOUTS.iterdir()) if path.name.startswith(("awq", "bits", "gptq", "mlx"))]
)
def test_values_are_the_tools_and_exact_formats_hold_them(folder: str) -> None:
    with np.load(_LAYOUTS / folder / "reference.npz") as stored:
        reference = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "logits"}
    formats, layers = set(), 0
    for encoding, linear, parts in _layers(_LAYOUTS / folder):
        encoding.check(linear)
        encoding.check_statistics(linear, LoadedParts(parts))
        values = encoding.dequantize(linear, parts)
        assert (values.shape, values.dtype) == (linear.shape, encoding.dtype(linear))
        assert torch.equal(encoding.read_rows(linear, LoadedParts(parts), 1, 2), values[1:3])
        expected = reference.pop(linear.module, values)
        assert torch.equal(values[: len(expected)], expected), linear.module
        fmt = encoding.exact_format(linear)
        formats.add(None if fmt is None else str(fmt))
        if fmt is not None:
            held = dequantize(encoding.repack(linear, parts))
            if fmt.format == "nf4":  # bitsandbytes rounds the values to the dtype of the model
                held = held.bfloat16().float()
            assert torch.equal(held.view(torch.int32), values.view(torch.int32)), linear.module
        layers += 1
    assert formats == _EXACT[folder]
    assert layers >= 2 * (3 * _EXPERTS + 2)
    assert all(name.endswith(("router.layer", "wte")) for name in reference), "plain in this folder"
