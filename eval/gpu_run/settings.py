"""Where a run takes place, and at which sizes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import dbrx_q
from dbrx_q.eval.bench.kernel_shapes import DBRX, Shapes
from dbrx_q.kernels.triton.launch import CHIPS, Chip, dependent_launch_wanted

__all__ = ["DRY_CHIP", "SMALL", "Settings", "code_version", "tree"]

SMALL = Shapes(width=256, heads=4, kv_heads=2, channels=64, experts=4, active=2, hidden=256, vocabulary=512, context=128)
"""Sizes at which a run without a GPU, and a memory checker, call every op."""
DRY_CHIP: Chip = CHIPS["sm_90"]
"""The chip that a run without a GPU compiles for."""


@dataclass(frozen=True)
class Settings:
    """What all processes of a run agree on."""

    device: str
    """ "cuda", or "meta" for a run without a GPU."""
    folder: Path
    """Of the results."""

    @property
    def dry(self) -> bool:
        """Whether launches are recorded on tensors without memory, and nothing is timed."""
        return self.device == "meta"

    @property
    def torch_device(self) -> torch.device:
        """Where tensors are: the first GPU, or "meta"."""
        return torch.device("meta") if self.dry else torch.device("cuda", 0)

    @property
    def shapes(self) -> Shapes:
        """DBRX's, or small ones."""
        return SMALL if self.dry else DBRX


def tree() -> Path | None:
    """The folder of the source tree that this package runs from; None where it was installed without its tests."""
    root = Path(dbrx_q.__file__).resolve().parent.parent
    return root if (root / "tests" / "kernels" / "gpu").is_dir() else None


@cache
def code_version() -> str:
    """A hash of what results depend on: the sources of kernels, model and benchmarks, and the versions of torch and Triton, and
    the switch of programmatic dependent launch."""
    package = Path(dbrx_q.__file__).resolve().parent
    digest = hashlib.sha256()
    for room in ("kernels", "eval/bench", "checkpoint", "experts", "generation", "model", "planning"):
        for folder, _, names in sorted(os.walk(package / room)):
            for name in sorted(name for name in names if name.endswith(".py")):
                digest.update((Path(folder) / name).read_bytes())
    for name in ("torch", "triton"):
        try:
            digest.update(version(name).encode())
        except PackageNotFoundError:
            digest.update(b"none")
    digest.update(b"%d" % dependent_launch_wanted())
    return digest.hexdigest()[:12]
