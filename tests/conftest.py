"""Fixtures that several floors use."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def nano() -> Path:
    """The bundled model: plain, bfloat16, trained."""
    return DATA / "dbrx-nano"


@pytest.fixture(scope="session")
def quantized_nano(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with int4 experts in groups of 64 and the rest int8."""
    from dbrx_q.layout import TensorFormat
    from dbrx_q.quantize.pipeline import quantize_checkpoint
    from dbrx_q.quantize.recipe import default_recipe

    folder = tmp_path_factory.mktemp("quantized") / "dbrx-nano-int4"
    quantize_checkpoint(nano, folder, lambda checkpoint: default_recipe(checkpoint.config, TensorFormat("int4", 64)))
    return folder
