"""Which device a model runs on."""

from __future__ import annotations

import torch

from dbrx_q.errors import RequestError

__all__ = ["check_device"]


def check_device(device: str | torch.device | None) -> torch.device:
    """The device that a model is asked for, None for the CPU; needs no model.

    Raises:
        RequestError: no device of this name, or one that is not there.
    """
    try:
        place = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise RequestError(f"device must be 'cpu', 'cuda' or 'cuda:N'; found {device!r}") from None
    if place.type not in ("cpu", "cuda"):
        raise RequestError(f"device must be 'cpu', 'cuda' or 'cuda:N'; found {str(device)!r}")
    if place.type == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index: int = (torch.cuda.current_device() if seen else 0) if ":" not in str(place) else place.index
        if index >= seen:
            raise RequestError(
                f"device {str(device)!r} must be a GPU that torch sees; it sees {seen}. Check the driver, and that torch is a GPU build, "
                "or leave the device out to run on the CPU"
            )
        place = torch.device("cuda", index)
    return place
