"""The examples of transformers' documentation, as docs/transformers.md has them: this project's import, and a path of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import UnsupportedError
from dbrx_q.model.modeling import DbrxModel

PAGE = Path(__file__).parents[2] / "docs/transformers.md"


def examples() -> list[str]:
    """The blocks of Python code under the page's heading `Moving over`, in order."""
    (section,) = re.findall(r"^## Moving over\n(.*?)^## ", PAGE.read_text(encoding="utf-8") + "\n## ", re.MULTILINE | re.DOTALL)[:1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def run(example: str, folder: Path) -> dict[str, Any]:
    """The names that an example defines, once it ran on the checkpoint in `folder`."""
    names: dict[str, Any] = {}
    exec(compile(example.replace('"dbrx-int4"', repr(str(folder))), str(PAGE), "exec"), names)
    return names


def test_flash_attention_without_a_gpu_is_an_error_and_no_other_attention(quantized_nano: Path) -> None:
    example = examples()[2]
    with pytest.raises(UnsupportedError, match=r"flash_attention_2.*sdpa"):
        run(example, quantized_nano)


def test_a_configuration_makes_a_model() -> None:
    names = run(examples()[3], Path())
    assert isinstance(names["model"], DbrxModel)
    assert (names["configuration"].d_model, names["configuration"].n_layers, names["configuration"].vocab_size) == (256, 2, 128)


def test_the_page_has_no_other_example() -> None:
    assert len(examples()) == 5
