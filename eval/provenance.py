"""What has to be known to repeat a measurement."""

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
from dbrx_q.experts.fallback import open_fallback
from dbrx_q.planning.budget import plan_within
from dbrx_q.sources.weights_hash import weights_sha256

from .windows import Protocol

if TYPE_CHECKING:
    from dbrx_q.sources.base import Source

__all__ = ["command_line", "fallback_of", "ids_sha256", "provenance", "run_key"]

_PACKAGES = ("dbrx_q", "torch", "triton", "numba", "bitsandbytes", "gguf", "numpy")


def command_line() -> str:
    """The command that runs, as it could be typed again; a run that was interrupted gives what the whole one would."""
    return shlex.join(["dbrx-q", *(argument for argument in sys.argv[1:] if argument != "--resume")])


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
    """What decides the figures of a run, for `resume.RunState`.

    Args:
        kind: what is measured.
        reference: what it is measured against; empty for nothing.
        source: the checkpoint.
        checkpoint: its SHA-256.
        ids: the text's tokens.
        protocol: how the text is cut.
        dtype: of activations, None for the checkpoint's.
        kv_format: of keys and values.
        device: where it runs.
    """
    where = provenance(device, "")
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
    } | {name: where[name] for name in ("versions", "device", "threads")}


def fallback_of(source: Source) -> str:
    """What decides which answers are a fallback copy's: the copy, and how many experts memory holds where; empty without one."""
    budget = source.budget
    if budget is None or not budget.fallback:
        return ""
    with Checkpoint(source.path) as checkpoint, open_fallback(checkpoint) as fallback:
        plan = plan_within(budget, checkpoint.config, checkpoint.formats, source.name, fallback=fallback.formats)
        manifest = fallback.folder / MANIFEST_NAME
        copy = sha256_of(manifest) if manifest.is_file() else weights_sha256(fallback.shards)
    return f"{copy} {[there.n_slots for there in plan.devices]}"


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
