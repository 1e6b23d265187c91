"""Plain checkpoints that `export` writes: transformers loads them as they are, and computes our logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.export.transformers import TransformersTarget
from dbrx_q.sources.open_weights import open_weights
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
IDS = torch.tensor([[5, 300, 17, 2048, 9, 64, 4000, 1]])


def export(source: Path, destination: Path, **settings: Any) -> list[str]:
    """The names of the files of weights."""
    target = TransformersTarget(**settings)
    with open_weights(source) as weights:
        return list(target.write(weights, target.plan(weights), destination).files)


@pytest.mark.usefixtures("transformers_alone")
def test_transformers_computes_our_logits(nano: Path, tmp_path: Path) -> None:
    """With the base of the rotary embedding that transformers ignores in the published file."""
    from transformers import AutoModelForCausalLM

    export(nano, tmp_path / "plain", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert theirs.config.rope_parameters["rope_theta"] == 500000
    ours = DbrxForCausalLM.from_pretrained(nano, dtype=torch.float32)
    with torch.no_grad():
        expected = ours(IDS).logits
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_plain_checkpoint_stays_as_it_is(small: Path, tmp_path: Path) -> None:
    files = export(small, tmp_path / "out", shard_bytes=300_000)
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    with Checkpoint(small) as before, Checkpoint(tmp_path / "out") as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
        assert after.config.rope_theta == before.config.rope_theta
    assert DbrxTokenizer.from_pretrained(tmp_path / "out").encode("A text") == DbrxTokenizer.from_pretrained(small).encode("A text")
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_auto_keeps_the_dtype_of_each_tensor(quantized_small: Path, tmp_path: Path) -> None:
    export(quantized_small, tmp_path / "out", dtype=None)
    with Checkpoint(quantized_small) as packed, Checkpoint(tmp_path / "out") as plain:
        assert {plain.dtype_of(name) for name in plain.tensors} == {torch.bfloat16}
        assert all(torch.equal(plain.read(name), packed.read(name).bfloat16()) for name in plain.tensors)


def test_auto_gives_weights_that_another_program_quantized_the_dtype_of_the_model(tmp_path: Path) -> None:
    export(LAYOUTS / "gptq-4bit-g128", tmp_path / "out", dtype=None)
    with Checkpoint(tmp_path / "out") as plain:
        assert {plain.dtype_of(name) for name in plain.tensors} == {torch.bfloat16}


def test_float32_holds_the_dequantized_weights_exactly(quantized_small: Path, tmp_path: Path) -> None:
    export(quantized_small, tmp_path / "out", dtype=torch.float32)
    with Checkpoint(quantized_small) as packed, Checkpoint(tmp_path / "out") as plain:
        for name in packed.formats:
            tensor = packed.tensors[name]
            matrices = [dequantize(packed.packed(name, e)) for e in range(tensor.experts)] or [dequantize(packed.packed(name))]
            assert torch.equal(plain.read(name), torch.cat([m.T if tensor.transposed else m for m in matrices])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_weights_are_rounded_once(dtype: torch.dtype, quantized_small: Path, tmp_path: Path) -> None:
    """Not to the model's bfloat16 before the dtype that is asked for."""
    export(quantized_small, tmp_path / "out", dtype=dtype)
    with Checkpoint(quantized_small) as packed, Checkpoint(tmp_path / "out") as plain:
        assert packed.formats
        for name in packed.formats:
            tensor = packed.tensors[name]
            experts = range(tensor.experts) if tensor.experts else [-1]
            matrices = [dequantize(packed.packed(name, expert), torch.float32) for expert in experts]
            expected = torch.cat([matrix.T if tensor.transposed else matrix for matrix in matrices]).to(dtype)
            assert torch.equal(plain.read(name), expected), name


def test_config_json_says_nothing_of_the_packed_weights(quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("export", quantized_small, tmp_path / "out", "--to", "transformers", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["layout"], result["files"], result["rounding"]) == ("transformers", ["model.safetensors"], None)
    assert result["bits_per_weight"] == 16
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config.keys().isdisjoint({"quantization_config", "auto_map", "transformers_weights"})
    assert config["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "modeling_dbrx_q.py").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("layout", ["gptq-4bit-g64-act-order", "awq-4bit-g64", "mlx-3bit-g32", "gguf-blocks-of-256/dbrx-tiny.gguf"])
def test_weights_of_other_programs_are_dequantized(layout: str, tmp_path: Path) -> None:
    export(LAYOUTS / layout, tmp_path / "out")
    with open_weights(LAYOUTS / layout) as packed, Checkpoint(tmp_path / "out") as plain:
        assert all(torch.equal(plain.read(name), packed.read(name).bfloat16()) for name in plain.tensors)
