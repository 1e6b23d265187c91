"""Arguments of `from_pretrained` by the names that transformers has, and what becomes of those that it has for other things."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dbrx_q.config import DTYPES, DbrxConfig
from dbrx_q.config_keys import nearest
from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError, UnsupportedError

__all__ = ["device_of_map", "foreign_arguments", "one_dtype"]

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that spread a model over all devices."""

_WITHOUT_EFFECT = {
    "low_cpu_mem_usage": "weights are always read straight into their final place",
    "use_safetensors": "safetensors files are all that is read",
    "weights_only": "safetensors files hold weights only",
    "resume_download": "the hub's client resumes by itself",
    "dduf_entries": "safetensors files are all that is read",
    "mirror": "HF_ENDPOINT names another hub",
    "_fast_init": "weights that are read are never initialised",
    "_from_auto": "the class is this one",
    "_commit_hash": "`revision` names a commit",
}
"""Arguments that are taken silently, because what they ask for is done in any case, or none of them changes a result."""
_SAID_ONCE = {
    "trust_remote_code": "no code of a checkpoint runs",
    "offload_folder": "experts that do not fit are read from the checkpoint's own files; no copy of them is written",
    "offload_state_dict": "weights are read straight into their final place",
    "offload_buffers": "a DBRX has no buffers to offload",
    "experts_implementation": "an expert store serves the experts; `budget` says how",
    "use_kernels": "the kernels are this package's own",
    "kernel_config": "the kernels are this package's own",
    "proxies": "the hub's client reads the variables HTTPS_PROXY and HTTP_PROXY",
}
"""Arguments that are taken and have no effect; a warning says why, once."""
_REFUSED = {
    "load_in_4bit": "quantize the checkpoint with `dbrx-q quantize --format nf4`, and load the result",
    "load_in_8bit": "quantize the checkpoint with `dbrx-q quantize --format int8`, and load the result",
    "quantization_config": "quantize the checkpoint with `dbrx-q quantize`, and load the result",
    "gguf_file": "`dbrx-q generate FILE.gguf` and the other commands read GGUF files",
    "variant": "rename the files to model.safetensors or model-0000N-of-0000N.safetensors",
    "from_tf": "convert the weights to safetensors",
    "from_flax": "convert the weights to safetensors",
    "ignore_mismatched_sizes": "weights of other shapes are never left random; mend config.json",
    "state_dict": "make a model with DbrxForCausalLM(config), and call load_state_dict",
    "key_mapping": "rename the tensors in the files",
    "tp_plan": "`device_map='auto'` spreads a model over GPUs by layers",
    "tp_size": "`device_map='auto'` spreads a model over GPUs by layers",
    "device_mesh": "`device_map='auto'` spreads a model over GPUs by layers",
    "distributed_config": "`device_map='auto'` spreads a model over GPUs by layers",
    "adapter_kwargs": "merge the adapter into the weights",
    "adapter_name": "merge the adapter into the weights",
}
"""Arguments that cannot be served unless they are None or False, and what to do instead."""


def foreign_arguments(
    owner: type, path_or_hub_id: str | os.PathLike[str], arguments: Mapping[str, Any]
) -> tuple[str | os.PathLike[str], dict[str, Any]]:
    """(the checkpoint's path or hub id, values in place of those in config.json).

    Args:
        owner: the class that is loaded, for errors.
        path_or_hub_id: as given.
        arguments: that `from_pretrained` does not name.

    Raises:
        RequestError: an argument that cannot be served.
        TypeError: an unknown argument.
    """
    overrides: dict[str, Any] = {}
    attributes = DbrxConfig()
    for name, value in arguments.items():
        if name in _REFUSED:
            if value not in (None, False):
                raise RequestError(f"{name} must be absent; found {shortened(value)}. Instead, {_REFUSED[name]}")
        elif name == "use_safetensors" and value is False:
            raise RequestError("use_safetensors must not be False: pickles are never read. Convert the weights to safetensors")
        elif name == "subfolder":
            path_or_hub_id = _inside(path_or_hub_id, value)
        elif name in _SAID_ONCE:
            if value not in (None, False):
                _say_once(name)
        elif name in _WITHOUT_EFFECT:
            continue
        elif hasattr(attributes, name) and not callable(getattr(attributes, name)):
            overrides[name] = value
        else:
            known = [*_REFUSED, *_SAID_ONCE, *_WITHOUT_EFFECT, *attributes.to_dict(), *_named(owner)]
            raise TypeError(f"{owner.__name__}.from_pretrained() got an unexpected keyword argument {name!r}{nearest(name, known)}")
    return path_or_hub_id, overrides


def _named(owner: type) -> list[str]:
    code = owner.from_pretrained.__func__.__code__  # type: ignore[attr-defined] # a class method
    return [*code.co_varnames[1 : 1 + code.co_argcount + code.co_kwonlyargcount]]


def _inside(path_or_hub_id: str | os.PathLike[str], subfolder: str | None) -> str | os.PathLike[str]:
    if not subfolder:
        return path_or_hub_id
    if not Path(path_or_hub_id).is_dir():
        raise RequestError(
            f"subfolder needs a local folder; found {str(path_or_hub_id)!r}. Fetch it with `hf download` and name the folder"
        )
    return Path(path_or_hub_id) / subfolder


@cache
def _say_once(name: str) -> None:
    warnings.warn(f"{name} has no effect here: {_SAID_ONCE[name]}", UserWarning, stacklevel=4)


def device_of_map(
    device: str | int | torch.device | None, device_map: str | int | torch.device | Mapping[str, Any] | None
) -> tuple[str | torch.device | None, bool]:
    """(the one device of the model, whether it is spread over all devices).

    Raises:
        RequestError: both are given, or a map of several devices.
    """
    works = "'auto', a device such as 'cpu' or 'cuda:0', or {'': device}"
    if device_map is None:
        return _device("device", device), False
    if device is not None:
        raise RequestError(f"device_map={device_map!r} chooses the devices; found device {str(device)!r} beside it. Leave one of them out")
    if isinstance(device_map, Mapping):
        devices = {str(_device("device_map", value)) for value in device_map.values()}
        if len(devices) != 1:
            raise RequestError(
                f"device_map must be {works}; found {shortened(dict(device_map))}. With 'auto', max_memory says how much each device takes"
            )
        return devices.pop(), False
    if device_map in SPREADING:
        return None, True
    if isinstance(device_map, str) and device_map.split(":")[0] not in ("cpu", "cuda"):
        raise RequestError(f"device_map must be {works}; found {device_map!r}")
    return _device("device_map", device_map), False


def _device(name: str, value: Any) -> str | torch.device | None:
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise RequestError(f"{name} must be a device such as 'cpu', 'cuda:0' or 0; found {value!r}")
    if value == "disk":
        raise RequestError(f"{name} must not be 'disk'. device_map='auto' with max_memory leaves experts that do not fit on the disk")
    return f"cuda:{value}" if isinstance(value, int) else value


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype under either name; None for the checkpoint's.

    Raises:
        RequestError: two different dtypes, or one that no model can have.
    """
    given = [_as_dtype(value) for value in (dtype, torch_dtype) if value is not None]
    if len(set(given)) > 1:
        raise RequestError(f"torch_dtype is another name for dtype and must equal it; found {torch_dtype!r} and {dtype!r}")
    return given[0] if given else None


def _as_dtype(value: Any) -> torch.dtype | None:
    if value == "auto":
        return None
    if isinstance(value, Mapping):
        raise UnsupportedError(f"dtype must be one for the whole model; found {shortened(dict(value))}")
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"dtype must be float32, float16 or bfloat16; found {shortened(value)}")
    named: torch.dtype = getattr(torch, name)
    return named
