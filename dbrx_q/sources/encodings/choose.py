"""`encodings_of`: which encodings the layers of a checkpoint may have, by what config.json says about its quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbrx_q.config_values import shortened
from dbrx_q.errors import CheckpointError

from .awq import Awq
from .base import Encoding
from .bitsandbytes import Bitsandbytes
from .gptq import Gptq, named_layout
from .mlx import Mlx
from .plain import Plain

__all__ = ["GPTQ_CONFIG_NAME", "encodings_of", "quantization_of"]

GPTQ_CONFIG_NAME = "quantize_config.json"
"""AutoGPTQ's file beside config.json, which may stand for `quantization_config`."""

_READ = "GPTQ, AWQ, bitsandbytes' 4 bits, MLX or GGUF"
_LONGEST_NAME = 80  # characters of an unknown quantization that are shown as they are
_ORIGINAL = f"Use the bfloat16 weights that it was made from, or a {_READ} file of them"
_DEQUANTIZED = f"{_ORIGINAL}; or load it with transformers, call model.dequantize() and save it"
_ADVICE = {
    "fp8": _DEQUANTIZED,
    "compressed-tensors": _DEQUANTIZED,
    "exl2": f"{_ORIGINAL}; only ExLlamaV2's CUDA kernels read it",
    "exl3": f"{_ORIGINAL}; only ExLlamaV3's CUDA kernels read it",
    "auto-round": f"{_ORIGINAL}; AutoRound writes GPTQ with format=auto_gptq and AWQ with format=auto_awq",
}
"""What to do about a quantization, by its quant_method; `_ORIGINAL` for all others."""
_NAMES = {"fp8": "FP8", "exl2": "EXL2", "exl3": "EXL3", "aqlm": "AQLM", "hqq": "HQQ", "fbgemm-fp8": "FP8 (FBGEMM)", "modelopt": "ModelOpt"}


def encodings_of(config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None, source: str) -> tuple[Encoding, ...]:
    """The encodings that the layers of a checkpoint may have; those that were left unquantized are plain, so `Plain` is always among them.

    Args:
        config: config.json.
        quantize_config: AutoGPTQ's quantize_config.json; None where there is none. config.json comes first.
        source: the path of config.json, for messages.

    Raises:
        CheckpointError: a quantization that dbrx_q does not read, with what to do instead.
    """
    quantization = quantization_of(config)
    if quantization is None and quantize_config is not None:
        path = source.removesuffix("config.json") + GPTQ_CONFIG_NAME
        return encodings_of({"quantization_config": {"quant_method": "gptq", **quantize_config}}, None, path)
    if quantization is None:
        return (Plain(),)
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"{source}: quantization_config must be an object; found {shortened(quantization)}. Fetch config.json again, or remove the key "
            "if the weights are plain"
        )
    method = _method(quantization)
    if method == "gptq":
        _check_one_layout(quantization, quantize_config or {}, source)
        return Plain(), Gptq(quantization, source)
    if method == "awq":
        return Plain(), Awq(quantization, source)
    if method == "mlx":
        return Plain(), Mlx()
    if method == "bitsandbytes":
        return Plain(), Bitsandbytes(quantization, source)
    name = _NAMES.get(method, method)
    stated = name if len(name) < _LONGEST_NAME else shortened(name)
    raise CheckpointError(f"{source}: a quantized checkpoint must be {_READ}; found {stated}. {_ADVICE.get(method, _ORIGINAL)}")


def _check_one_layout(quantization: Mapping[str, Any], quantize_config: Mapping[str, Any], source: str) -> None:
    """Refuse GPTQ files of which one says that zero-points are stored minus 1 and the other that they are not."""
    named, other = named_layout(quantization), named_layout(quantize_config)
    if named is not None and other is not None and named != other:
        raise CheckpointError(
            f"{source}: checkpoint_format must be that of quantize_config.json beside it; found {shortened(named)} and {shortened(other)}, "
            "which store zero-points differently. Fetch both files again"
        )


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What config.json says about a quantization, under MLX's key where the usual one is absent; None for plain weights."""
    quantization = config.get("quantization_config")
    return config.get("quantization") if quantization is None else quantization


def _method(quantization: Mapping[str, Any]) -> str:
    """The method in lower case; of a section that names none, MLX's, or GPTQ's where it has `desc_act` or `sym`."""
    method = quantization.get("quant_method", quantization.get("method"))
    if method is None and "bits" in quantization and "group_size" in quantization:
        return "gptq" if "desc_act" in quantization or "sym" in quantization else "mlx"
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        return "bitsandbytes"  # transformers before 4.38
    name = str(method).lower().replace("_", "-") if method is not None else "a quantization without a quant_method"
    return {"intel/auto-round": "auto-round", "autoround": "auto-round"}.get(name, name)
