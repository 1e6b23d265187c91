"""What the tests of packed checkpoints in transformers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PROMPT = ((11, 280, 260, 396, 2174, 315, 279, 301), (995, 286, 260, 1244, 278, 260, 220, 802))


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Token ids of two sequences, [2, 8]."""
    return torch.tensor(PROMPT)


@pytest.fixture(scope="session")
def in_transformers(quantized_nano: Path) -> Any:
    """The packed checkpoint in transformers, in float32; tests leave it as it is."""
    from transformers import AutoModelForCausalLM

    import dbrx_q.transformers  # noqa: F401 # registers the quantization method

    return AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)
