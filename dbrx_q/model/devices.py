"""Checks the device that a model is asked to run on."""

from __future__ import annotations

import torch

from dbrx_q.errors import RequestError

__all__ = ["check_device"]


def check_device(device: str | torch.device | None) -> torch.device:
    """The device with this name, with its index; None for the CPU.

    Raises:
        RequestError: an invalid name, or a GPU that torch does not see.
    """
    try:
        checked = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise RequestError(f"device must be 'cpu', 'cuda' or 'cuda:N'; found {device!r}") from None
    if checked.type not in ("cpu", "cuda"):
        raise RequestError(f"device must be 'cpu', 'cuda' or 'cuda:N'; found {str(device)!r}")
    if checked.type == "cuda":
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index: int = (torch.cuda.current_device() if visible else 0) if ":" not in str(checked) else checked.index
        if index >= visible:
            raise RequestError(
                f"device {str(device)!r} must be a GPU that torch sees; it sees {visible}. Check the driver, and that torch is a GPU "
                "build, or leave the device out to run on the CPU"
            )
        checked = torch.device("cuda", index)
    return checked
