"""The second bundled model: what its README says of it, and its own training code as an independent reference."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dbrx_q import DbrxForCausalLM, DbrxTokenizer
from dbrx_q.eval.perplexity import perplexity
from dbrx_q.eval.windows import Protocol

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
MICRO = DATA / "dbrx-micro"
README = (HERE / "README.md").read_text(encoding="utf-8")
CONTEXT, WINDOWS = 512, 16


def script(name: str) -> ModuleType:
    """A script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(f"models_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(MICRO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> DbrxTokenizer:
    return DbrxTokenizer.from_pretrained(MICRO)


@pytest.mark.parametrize("name", ["war-of-the-worlds.txt", "wikitext2-test.txt"])
def test_perplexity_is_that_of_the_readme(model: DbrxForCausalLM, tokenizer: DbrxTokenizer, name: str) -> None:
    row = re.search(rf"\| `{re.escape(name)}` \| [^|]*\| ([\d.]+) \|", README)
    assert row is not None, f"the README has no row for the first {WINDOWS} windows of {name}"
    ids = tokenizer.encode((DATA / name).read_text(encoding="utf-8")[:60_000])
    result = perplexity(model, ids, Protocol.of(CONTEXT, limit=WINDOWS))
    assert result.tokens == WINDOWS * (CONTEXT - 1)
    assert math.isclose(result.perplexity, float(row[1]), rel_tol=1e-3)


def test_the_training_code_computes_the_same_loss_and_uses_all_experts(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    train = script("train")
    ids = np.array(tokenizer.encode((DATA / "wikitext2-test.txt").read_text(encoding="utf-8")[:20_000]), dtype=np.uint16)
    loss, tokens, expert_tokens = train.evaluate(train.Dbrx().load(MICRO), ids, CONTEXT, 4)
    result = perplexity(model, ids.tolist(), Protocol.of(CONTEXT, limit=4))
    assert result.tokens == tokens
    assert math.isclose(loss, result.nll / result.tokens, rel_tol=1e-5)
    shares = expert_tokens / expert_tokens.sum(1, keepdim=True)
    assert float(shares.min()) > 0.01  # 0.125 if all were used evenly


def test_it_generates_words_of_its_own(model: DbrxForCausalLM, tokenizer: DbrxTokenizer) -> None:
    prompt = tokenizer.encode("The history of the")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(output[0, len(prompt) :].tolist())
    assert re.search(r"[a-z]{3,} [a-z]{2,}", text), text


def test_its_files_are_small_and_its_dimensions_other_than_nanos(model: DbrxForCausalLM) -> None:
    assert (MICRO / "model.safetensors").stat().st_size < 20e6
    config = model.config
    assert (config.d_model, config.n_heads, config.n_layers, config.attn_config.kv_n_heads) == (192, 6, 3, 3)
    assert (config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k, config.ffn_config.ffn_hidden_size) == (8, 2, 384)


def test_the_readme_lists_every_package_with_its_licence() -> None:
    for source in script("training_texts").SOURCES:
        name = source.package.split(":", 1)[1].partition("=")[0].partition("@")[0]
        assert any(name in line and source.licence in line for line in README.splitlines()), source


def test_documents_that_measure_the_model_are_left_out() -> None:
    texts = script("training_texts")
    lines = (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8").splitlines()
    measured = texts.long_lines("\n".join(lines))
    assert texts.overlaps("\n".join(lines[500:800]), measured)
    assert not texts.overlaps("\n".join(f"A line of {i} words that no text of the measurement has" for i in range(300)), measured)
