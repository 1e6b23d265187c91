"""Triton's kernels in its interpreter: the whole process runs with TRITON_INTERPRET=1 (`make interpreter`), or these tests are left out."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was never written shows: NaN in floating point, 77 elsewhere."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out: torch.Tensor = real(*args, **kwargs)  # type: ignore[call-overload] # passes on what came
        if out.is_meta:
            return out
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)
