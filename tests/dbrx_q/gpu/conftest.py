"""The whole model on a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """In every test here, memory that no kernel wrote holds NaN."""
