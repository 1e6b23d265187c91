"""The choice of an op's implementation: made once, from the device, never by trying one after another."""

from __future__ import annotations

from enum import Enum
from functools import cache
from importlib.util import find_spec

import torch

from dbrx_q.kernels.formats.errors import DbrxError
from dbrx_q.kernels.triton.launch import interpreting, is_recording

__all__ = ["Backend", "has_triton", "pick"]


class Backend(Enum):
    """The implementations of every op."""

    REFERENCE = "reference"
    """float32 torch code, short and slow, against which the others are tested. Runs on any device."""
    CPU = "cpu"
    """Compiled for this machine's vector units."""
    TRITON = "triton"
    """For NVIDIA and AMD GPUs. With TRITON_INTERPRET=1 in the environment it runs in Triton's interpreter on the CPU."""


def pick(device: torch.device) -> Backend:
    """The backend for tensors on `device`; those without memory, on "meta", have Triton's while launches are recorded.

    Raises:
        DbrxError: a device that no backend serves.
    """
    if device.type == "cuda" or (device.type in ("cpu", "meta") and interpreting()) or (device.type == "meta" and is_recording()):
        return Backend.TRITON
    if device.type == "cpu":
        return Backend.CPU
    raise DbrxError(f"the kernels run on 'cpu' and 'cuda' devices; found {str(device)!r}")


@cache
def has_triton() -> bool:
    """Whether Triton is installed; torch for some GPUs comes without it."""
    return find_spec("triton") is not None
