"""Triton's kernels in its interpreter: collected only if the whole process runs with TRITON_INTERPRET=1 (`make interpreter`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """In every test here, memory that no kernel wrote holds NaN."""


@pytest.fixture(autouse=True)
def _bounds() -> Iterator[None]:
    """In every test here, a kernel that accesses memory outside its arguments fails."""
    from tests.kernels.interpreter.bounds import checked_accesses

    with checked_accesses():
        yield
