"""Triton's kernels in its interpreter: collected only if the whole process runs with TRITON_INTERPRET=1 (`make interpreter`)."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN (integers: 77), so that memory that is never written shows."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out: torch.Tensor = real(*args, **kwargs)  # type: ignore[call-overload] # forwards its arguments
        if out.is_meta:
            return out
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)
