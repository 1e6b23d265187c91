"""Which encodings a configuration calls for, and what is refused with which advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import CheckpointError
from dbrx_q.sources.encodings.choose import encodings_of

_LAYOUTS = Path(__file__).parents[3] / "data" / "layouts"
_MLX = {"group_size": 64, "bits": 4, "mode": "affine"}


def _names(config: dict[str, Any], quantize_config: dict[str, Any] | None = None) -> list[str]:
    return [type(encoding).__name__ for encoding in encodings_of(config, quantize_config, "folder/config.json")]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ["Plain"]),
        ({"quantization_config": None}, ["Plain"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["Plain", "Gptq"]),
        ({"quantization_config": {"method": "gptq", "bits": 4}}, ["Plain", "Gptq"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["Plain", "Awq"]),
        ({"quantization": _MLX}, ["Plain", "Mlx"]),
        ({"quantization_config": {"bits": 4, "group_size": 128, "desc_act": False}}, ["Plain", "Gptq"]),
        ({"quantization_config": {"bits": 4, "group_size": 128, "sym": True}}, ["Plain", "Gptq"]),
        ({"quantization": _MLX, "quantization_config": _MLX}, ["Plain", "Mlx"]),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ["Plain", "Bitsandbytes"]),
        ({"quantization_config": {"load_in_4bit": True}}, ["Plain", "Bitsandbytes"]),
    ],
)
def test_config_json_says_the_encodings(config: dict[str, Any], names: list[str]) -> None:
    assert _names(config) == names


def test_quantize_config_json_is_read_where_config_json_says_nothing() -> None:
    """As early AutoGPTQ wrote it."""
    assert _names({}, {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}) == ["Plain", "Gptq"]
    assert _names({"quantization_config": {"quant_method": "awq"}}, {"bits": 4}) == ["Plain", "Awq"]
    assert _names({}, {"bits": 4, "quant_method": "awq"}) == ["Plain", "Awq"]
    with pytest.raises(CheckpointError, match=r"folder/quantize_config.json: a GPTQ checkpoint must have the checkpoint_format"):
        _names({}, {"bits": 4, "checkpoint_format": "marlin"})


@pytest.mark.parametrize("folder", sorted(path.name for path in _LAYOUTS.iterdir() if path.name.startswith(("mlx-", "gptq-", "awq-"))))
def test_the_programs_own_configurations_are_read(folder: str) -> None:
    config = json.loads((_LAYOUTS / folder / "config.json").read_text())
    path = _LAYOUTS / folder / "quantize_config.json"
    assert _names(config, json.loads(path.read_text()) if path.exists() else None) == ["Plain", folder.partition("-")[0].capitalize()]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, r"found FP8\. Use the bfloat16 weights .* model\.dequantize\(\) and save it"),
        ({"quant_method": "fbgemm_fp8"}, r"found FP8 \(FBGEMM\)\. Use the bfloat16"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            r"found compressed-tensors\. .* model\.dequantize\(\) and save",
        ),
        ({"quant_method": "exl2", "bits": 4.0}, r"found EXL2\. Use the bfloat16 weights .*; only ExLlamaV2's CUDA kernels read it"),
        ({"quant_method": "exl3", "bits": 4.0}, r"found EXL3\. Use the bfloat16 weights .*; only ExLlamaV3's CUDA kernels read it"),
        ({"quant_method": "aqlm"}, r"found AQLM\. Use the bfloat16 weights that it was made from, or a GPTQ, AWQ,"),
        ({"quant_method": "hqq"}, r"found HQQ\. Use the bfloat16 weights"),
        ({"quant_method": "torchao"}, r"found torchao\. Use the bfloat16 weights"),
        ({"quant_method": "quanto"}, r"found quanto\. Use the bfloat16 weights"),
        ({"quant_method": "auto-round", "bits": 4}, r"found auto-round\. .*AutoRound writes GPTQ with format=auto_gptq"),
        ({"quant_method": "intel/auto-round", "bits": 4}, r"found auto-round\. "),
        ({"quant_method": "new-method"}, r"found new-method\. Use the bfloat16 weights"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            r"4-bit formats are read; found load_in_8bit\. Save the model with load_in_4bit",
        ),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, r"found 'marlin'\. Quantize the original weights again"),
        ({"quant_method": "awq", "version": "gemv"}, r"found 'gemv'\. Quantize the original weights again"),
        ({}, "must be GPTQ, .* found a quantization without a quant_method"),
        ([1], r"quantization_config must be an object; found \[1\]\. Fetch config.json again"),
    ],
)
def test_other_quantizations_are_refused_with_advice(config: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^folder/config.json: .*{message}"):
        _names({"quantization_config": config})


def test_files_that_store_zero_points_differently_are_refused() -> None:
    config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq"}}
    assert _names(config, {"bits": 4, "checkpoint_format": "gptq"}) == _names(config, {"bits": 4}) == ["Plain", "Gptq"]
    with pytest.raises(CheckpointError, match=r"that of quantize_config.json beside it; found 'gptq' and 'gptq_v2', .*Fetch both"):
        _names(config, {"bits": 4, "checkpoint_format": "gptq_v2"})
