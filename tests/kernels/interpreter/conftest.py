"""Triton's kernels in its interpreter: collected only if the whole process runs with TRITON_INTERPRET=1 (`make interpreter`)."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """In every test here, memory that no kernel wrote holds NaN."""
