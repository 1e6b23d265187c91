"""What has to be known to repeat a measurement."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

__all__ = ["command_line", "ids_sha256", "provenance"]

_PACKAGES = ("dbrx_q", "torch", "triton", "numba", "bitsandbytes", "gguf", "numpy")


def command_line() -> str:
    """The command that runs, as it could be typed again."""
    return shlex.join(["dbrx-q", *sys.argv[1:]])


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Versions, device and command line."""
    return {
        "command": command,
        "versions": {"python": platform.python_version()} | {name: found for name in _PACKAGES if (found := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def ids_sha256(ids: Sequence[int]) -> str:
    """Of token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The CPU's name and the vector units that torch uses."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
