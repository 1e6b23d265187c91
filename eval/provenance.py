"""Records what a measurement depends on, so that it can be repeated."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, sha256_of
from dbrx_q.checkpoint.weights_hash import weights_sha256
from dbrx_q.experts.fallback import open_fallback
from dbrx_q.planning.budget import plan_within

from .windows import Protocol

if TYPE_CHECKING:
    from dbrx_q.sources.base import Source

__all__ = ["command_line", "fallback_of", "ids_sha256", "provenance", "run_key"]

_PACKAGES = ("dbrx_q", "torch", "triton", "numba", "bitsandbytes", "gguf", "numpy")


def command_line() -> str:
    """The running command as a shell line, without `--resume`: a resumed run gives the same figures as an uninterrupted one."""
    return shlex.join(["dbrx-q", *(argument for argument in sys.argv[1:] if argument != "--resume")])


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Versions, device and command line."""
    return {
        "command": command,
        "versions": {"python": platform.python_version()} | {name: installed for name in _PACKAGES if (installed := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def ids_sha256(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def run_key(
    kind: str,
    reference: Mapping[str, Any],
    source: Source,
    checkpoint: str,
    ids: Sequence[int],
    protocol: Protocol,
    *,
    dtype: torch.dtype | None,
    kv_format: str,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that determines the figures of a run; the key of its `resume.RunState`.

    Args:
        kind: what is measured, such as "perplexity".
        reference: what the checkpoint is measured against; empty for nothing.
        source: the checkpoint.
        checkpoint: the checkpoint's SHA-256.
        ids: the text's token ids.
        protocol: how the text is cut into windows.
        dtype: of activations, None for the checkpoint's.
        kv_format: of keys and values.
        device: where the model runs.
    """
    environment = provenance(device, "")
    return {
        "kind": kind,
        "reference": dict(reference),
        "config": source.config.to_dict(),
        "fallback": fallback_of(source),
        "checkpoint": checkpoint,
        "ids": ids_sha256(ids),
        "protocol": asdict(protocol),
        "dtype": str(dtype),
        "kv_format": kv_format,
    } | {name: environment[name] for name in ("versions", "device", "threads")}


def fallback_of(source: Source) -> str:
    """What determines the answers of a fallback copy: its hash, and the expert slots of each device; empty without a copy."""
    budget = source.budget
    if budget is None or not budget.fallback:
        return ""
    with Checkpoint(source.path) as checkpoint, open_fallback(checkpoint) as fallback:
        plan = plan_within(budget, checkpoint.config, checkpoint.formats, source.name, fallback=fallback.formats)
        manifest = fallback.folder / MANIFEST_NAME
        copy = sha256_of(manifest) if manifest.is_file() else weights_sha256(fallback.shards)
    return f"{copy} {[device.n_slots for device in plan.devices]}"


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
