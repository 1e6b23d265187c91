"""The examples of transformers' documentation, as docs/transformers.md has them: this project's import, and a path of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import UnsupportedError
from dbrx_q.model.modeling import DbrxForCausalLM, DbrxModel
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

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


@pytest.mark.parametrize("number", [0, 1], ids=["default attention", "sdpa"])
def test_a_chat_is_answered(number: int, quantized_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = examples()[number]
    assert ("sdpa" in example) == (number == 1)
    names = run(example, quantized_nano)
    printed = capsys.readouterr().out
    prompt, outputs = names["input_ids"]["input_ids"], names["outputs"]
    assert isinstance(names["model"], DbrxForCausalLM)
    assert outputs[:, : prompt.shape[1]].equal(prompt)
    ended = int(outputs[0, -1]) in names["model"].eos_token_ids
    assert outputs.shape[1] == prompt.shape[1] + 200 or ended
    assert printed.startswith(names["tokenizer"].decode(prompt[0]))
    assert "What does it take to build a great LLM?" in printed


def test_flash_attention_without_a_gpu_is_an_error_and_no_other_attention(quantized_nano: Path) -> None:
    example = examples()[2]
    with pytest.raises(UnsupportedError, match=r"flash_attention_2.*sdpa"):
        run(example, quantized_nano)


def test_a_configuration_makes_a_model() -> None:
    names = run(examples()[3], Path())
    assert isinstance(names["model"], DbrxModel)
    assert (names["configuration"].d_model, names["configuration"].n_layers, names["configuration"].vocab_size) == (256, 2, 128)


def test_a_prompt_is_continued(quantized_nano: Path) -> None:
    names = run(examples()[4], quantized_nano)
    assert isinstance(names["tokenizer"], DbrxTokenizer)
    length = names["inputs"].input_ids.shape[1]
    assert length < names["generate_ids"].shape[1] <= 30
    assert names["tokenizer"].decode(names["generate_ids"][0], skip_special_tokens=True).startswith(names["prompt"])


def test_the_page_has_no_other_example() -> None:
    assert len(examples()) == 5
