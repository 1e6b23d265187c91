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


@pytest.fixture
def small_config() -> Any:
    """transformers' configuration of a small model with random weights."""
    from transformers import DbrxConfig

    return DbrxConfig(
        d_model=64,
        n_heads=2,
        n_layers=2,
        max_seq_len=64,
        vocab_size=64,
        attn_config={"kv_n_heads": 1, "rope_theta": 500000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    )
