"""The models of transformers' DBRX with packed weights."""

from __future__ import annotations

from typing import Any

import transformers

from .availability import check_transformers

__all__ = ["DbrxForCausalLM", "DbrxModel", "as_packed"]

check_transformers()


class DbrxForCausalLM(transformers.DbrxForCausalLM):
    pass


class DbrxModel(transformers.DbrxModel):
    pass


def as_packed(model: Any) -> None:
    pass
