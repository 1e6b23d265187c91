"""Files that other programs wrote (tests/data/layouts): weights and logits are those of the program, and every command takes every file."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.sources.gguf_names import gguf_name
from dbrx_q.sources.open import open_runnable
from dbrx_q.sources.open_weights import open_weights, planned_weights

TESTS = Path(__file__).parents[2]
LAYOUTS = TESTS / "data" / "layouts"
TEXT = TESTS / "data" / "war-of-the-worlds.txt"
TOKENS = json.loads((LAYOUTS / "tokens.json").read_text(encoding="utf-8"))

LABELS = {
    "awq-4bit-g64": "AWQ int4:64",
    "bitsandbytes-nf4-double-converted": "bitsandbytes nf4-double",
    "gguf-blocks-of-256": "GGUF Q4_K + GGUF Q5_K + GGUF IQ4_XS",
    "gguf-blocks-of-32": "GGUF Q4_0 + GGUF Q4_1 + GGUF IQ4_NL + GGUF MXFP4 + GGUF NVFP4",
    "gptq-4bit-g128": "GPTQ int4:128",
    "gptq-4bit-g32-asym": "GPTQ int4:32",
    "gptq-4bit-g64-act-order": "GPTQ int4:64 act-order",
    "gptq-8bit-g128": "GPTQ int8:128",
    "gptq-v2-4bit-g32-asym": "GPTQ int4:32",
    "mlx-3bit-g32": "MLX affine3:32",
    "mlx-4bit-g64": "MLX affine4:64",
    "mlx-6bit-g64-float16": "MLX affine6:64",
    "mlx-mixed": "MLX affine4:64",
    "mlx-mxfp4": "MLX mxfp4",
    "published": "bfloat16",
}
"""What `inspect` says of the experts in each folder."""
WHOLLY_KEPT = {
    *("awq-4bit-g64", "gptq-4bit-g128", "gptq-4bit-g32-asym", "gptq-8bit-g128", "gptq-v2-4bit-g32-asym"),
    *("mlx-3bit-g32", "mlx-4bit-g64", "mlx-6bit-g64-float16", "mlx-mixed", "mlx-mxfp4"),
}
"""Folders of which `quantize --keep` rounds nothing."""
PARTLY_KEPT = {"gguf-blocks-of-32", "bitsandbytes-nf4-double-converted"}
WITH_LOGITS = [name for name in LABELS if not name.startswith(("gguf", "published"))]


def location(name: str) -> Path:
    """The folder, or the GGUF file, of which one is the first of three parts."""
    folder = LAYOUTS / name
    return min(folder.glob("*.gguf")) if name.startswith("gguf") else folder


def logits(path: Path) -> torch.Tensor:
    """The logits [T, V] of TOKENS."""
    model = open_runnable(path).load(dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


def all_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in float32; packed matrices by their parts, not by `read`."""
    with open_weights(path) as weights:
        return {name: _values(weights, tensor) for name, tensor in weights.tensors.items()}


def _values(weights: StoredWeights, tensor: DenseTensor) -> torch.Tensor:
    if weights.exact_format(tensor.name) is None:
        return weights.read(tensor.name).float()
    experts = range(tensor.experts) if tensor.experts else [-1]
    matrices = [dequantize(weights.packed(tensor.name, expert), torch.float32) for expert in experts]
    return torch.cat([matrix.T if tensor.transposed else matrix for matrix in matrices])


def script(name: str) -> ModuleType:
    """A script of tests/models/layouts as a module."""
    spec = importlib.util.spec_from_file_location(f"layouts_{name}", TESTS / "models" / "layouts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of_module(weights: StoredWeights, module: str) -> torch.Tensor:
    """The matrix [N, K] that a program keeps in a module of this name, from the tensors of a plain checkpoint."""
    config = weights.config
    if expert := re.fullmatch(r"(.*experts)(?:\.mlp)?\.(\d+)\.(w1|v1|w2)", module):
        stack = weights.read(f"{expert[1]}.mlp.{expert[3]}")
        matrix = stack.view(config.ffn_config.moe_num_experts, -1, config.d_model)[int(expert[2])]
        return matrix.T if expert[3] == "w2" else matrix
    if module.endswith("k_proj"):
        fused = weights.read(module.replace("k_proj", "Wqkv.weight"))
        return fused[config.d_model : config.d_model + config.attn_config.kv_n_heads * config.head_dim]
    return weights.read(f"{module}.weight")


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_logits_are_those_that_the_program_computes(name: str) -> None:
    expected = np.load(LAYOUTS / name / "reference.npz")["logits"]
    assert np.abs(expected).max() > 5
    # An expert of few tokens multiplies packed weights with activations of 16 bits, which moves logits by some 1e-4.
    np.testing.assert_allclose(logits(location(name)).numpy(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_weights_are_those_that_the_program_dequantizes(name: str) -> None:
    reference = dict(np.load(LAYOUTS / name / "reference.npz"))
    del reference["logits"]
    assert len(reference) >= 2
    with open_weights(location(name)) as weights:
        for module, rows in reference.items():
            np.testing.assert_array_equal(rows_of_module(weights, module)[: len(rows)].float().numpy(), rows, err_msg=module)


@pytest.mark.parametrize("name", ["gguf-blocks-of-256", "gguf-blocks-of-32"])
def test_weights_are_those_that_ggml_dequantizes(name: str) -> None:
    reference = dict(np.load(LAYOUTS / name / "reference.npz"))
    with open_weights(location(name)) as weights:
        for tensor in weights.tensors.values():
            rows = reference.pop(gguf_name(tensor.name), None)
            if rows is None:
                continue
            matrix = weights.read(tensor.name)
            if tensor.experts:
                matrix = matrix.view(tensor.experts, -1, tensor.shape[1])[-1]
                matrix = matrix.T if tensor.transposed else matrix
            np.testing.assert_array_equal(matrix[-len(rows) :].numpy(), rows, err_msg=tensor.name)
    assert not reference


@pytest.mark.parametrize("kin", ["converted", "whole-qkv", "experts", "experts-mlp-experts"])
def test_converted_names_are_the_same_model(kin: str, tmp_path: Path) -> None:
    script("convert").convert(LAYOUTS / "published", tmp_path / kin, kin)
    expected, actual = all_weights(LAYOUTS / "published"), all_weights(tmp_path / kin)
    assert actual.keys() == expected.keys()
    for tensor, weight in expected.items():
        assert torch.equal(actual[tensor], weight), tensor
    assert torch.equal(logits(tmp_path / kin), logits(LAYOUTS / "published"))


def _changed(name: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a folder, with other tensors."""
    shutil.copytree(LAYOUTS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_divided_attention_beside_fused_experts_is_the_same_model(tmp_path: Path) -> None:
    def divide(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("Wqkv.weight")]:
            for projection, rows in zip("qkv", tensors.pop(name).split([128, 64, 64]), strict=True):
                tensors[name.replace("Wqkv", f"{projection}_proj")] = rows.contiguous()

    expected, actual = all_weights(LAYOUTS / "published"), all_weights(_changed("published", tmp_path / "divided", divide))
    assert all(torch.equal(actual[tensor], weight) for tensor, weight in expected.items())


def test_a_weight_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    """One of the two would be ignored."""
    folder = _changed("gptq-4bit-g128", tmp_path / "twice", lambda tensors: tensors.update({"lm_head": torch.zeros(320, 128)}))
    with pytest.raises(CheckpointError, match=r"twice: a weight must be stored once; found the tensors lm_head(\.weight)? and lm_head"):
        open_weights(folder)


def test_configurations_that_contradict_the_tensors_are_refused(tmp_path: Path) -> None:
    for name, quantization, message in (
        ("gptq-4bit-g128", None, r"must have the quantization_config of quantized weights, .*found the tensor .*\. Fetch"),
        ("published", {"quant_method": "gptq"}, r"config.json: says that weights are quantized, .*found none\. Remove"),
    ):
        folder = shutil.copytree(LAYOUTS / name, tmp_path / name)
        (folder / "quantize_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            open_weights(folder)


def test_a_quantize_config_alone_says_it_all(tmp_path: Path) -> None:
    """AutoGPTQ wrote no quantization_config into config.json."""
    folder = tmp_path / "autogptq"
    shutil.copytree(LAYOUTS / "gptq-4bit-g32-asym", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "true_sequential": True, "model_file_base_name": "model"}
    (folder / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    expected = all_weights(LAYOUTS / "gptq-4bit-g32-asym")
    assert all(torch.equal(weight, expected[tensor]) for tensor, weight in all_weights(folder).items())
    assert planned_weights(str(folder)).formats == planned_weights(str(LAYOUTS / "gptq-4bit-g32-asym")).formats


@pytest.mark.filterwarnings("ignore:.*splits a text with GPT-2's pattern")
def test_a_target_counts_bits_as_they_are_written(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A matrix that stays plain is written dequantized, in more bits than it has in the file."""
    calibration = ["--calibration", TEXT, "--sequences", "2", "--length", "64"]
    outcome = cli("quantize", location("mlx-4bit-g64"), tmp_path / "quantized", "--target-bpw", "6", *calibration, "--json")
    assert outcome.code == 0, outcome.err
    assert 5.5 < json.loads(outcome.out)["bits_per_weight_out"] <= 6


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.filterwarnings("ignore:.*splits a text with GPT-2's pattern")  # as transformers 5 saves DBRX's tokenizer
def test_every_command_takes_it(name: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, text = location(name), ["--text", TEXT, "--context", "64", "--limit", "1"]

    def result(*arguments: object) -> dict[str, Any]:
        outcome = cli(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        return dict(json.loads(outcome.out))

    assert result("inspect", path)["kinds"]["experts"]["format"] == LABELS[name]
    assert result("plan", path, "--ram", "1GB")["fits"]
    generated = result("generate", path, "--prompt", "The Martians", "--max-new-tokens", "2")
    assert generated["new_tokens"] == 2

    result("export", path, tmp_path / "plain", "--to", "transformers", "--dtype", "float32")
    with open_weights(path) as weights, Checkpoint(tmp_path / "plain") as plain:
        assert [tensor for tensor in weights.tensors if not torch.equal(plain.read(tensor), weights.read(tensor).float())] == []

    destination = tmp_path / "quantized"
    keep = ["--keep"] if name in WHOLLY_KEPT | PARTLY_KEPT else []
    written = result("quantize", path, destination, "--format", "int8", *keep)
    assert (written.get("kept", 0) > 0) == bool(keep)
    if not keep and name != "published":
        assert cli("quantize", path, tmp_path / "kept", "--keep").code == 2
    compared = result("compare", path, destination, *text)
    assert compared["reference_perplexity"] == result("perplexity", path, *text)["perplexity"]
    if name in WHOLLY_KEPT:
        assert compared["results"][0]["max_kl"] == 0
        actual = all_weights(destination)
        with open_weights(path) as weights:
            assert [tensor for tensor in weights.tensors if not torch.equal(actual[tensor], weights.read(tensor).float())] == []
        assert result("generate", destination, "--prompt", "The Martians", "--max-new-tokens", "2")["text"] == generated["text"]
    else:
        assert 0 < compared["results"][0]["mean_kl"] < 0.05


def test_the_plan_says_what_it_is_of(cli: Callable[..., Any]) -> None:
    kept = cli("plan", LAYOUTS / "gptq-4bit-g128", "--ram", "64MB").out
    assert "the plan of the copy that `dbrx-q quantize" in kept
    assert "(GPTQ int4:128) is loaded whole" in kept
    rounded = cli("plan", LAYOUTS / "gptq-4bit-g64-act-order", "--ram", "64MB").out
    assert "is GPTQ int4:64 act-order, whose experts are dequantized" in rounded
    assert "--format int4 plans a quantized copy" in rounded
    as_run = cli("plan", LAYOUTS / "bitsandbytes-nf4-double-converted", "--ram", "64MB", "--json").out
    assert json.loads(as_run)["expert_bytes"] == 2 * 3 * 3 * 256 * 128 * 2  # bitsandbytes' values are run dequantized, in bfloat16
    for arguments in ((LAYOUTS / "published",), (LAYOUTS / "gptq-4bit-g128", "--format", "int4")):
        assert "plan of the copy" not in cli("plan", *arguments, "--ram", "64MB").out


def test_what_another_programs_files_do_not_take_is_refused_before_they_are_read(cli: Callable[..., Any], tmp_path: Path) -> None:
    source = shutil.copytree(LAYOUTS / "gptq-4bit-g128", tmp_path / "source")
    before = sorted(source.iterdir())
    for arguments, message in (
        (("generate", source, "--prompt", "a", "--prompt-cache", tmp_path / "saved"), "source is GPTQ int4:128. Leave it out, or make"),
        (("export", source, source / "out", "--to", "transformers"), "out: the destination must be outside the source"),
        (("quantize", source, source / "out"), "out: the destination must be outside the source"),
    ):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
    assert sorted(source.iterdir()) == before


def test_a_command_that_is_advised_can_be_copied_into_a_shell(cli: Callable[..., Any], tmp_path: Path) -> None:
    source = shutil.copytree(LAYOUTS / "gptq-4bit-g128", tmp_path / "with a space")
    assert f"`dbrx-q quantize '{source}' DST --keep`" in cli("plan", source, "--ram", "1GB").out


@pytest.mark.parametrize("option", [("--policy", "lru"), ("--no-prefetch",)], ids=" ".join)
def test_options_of_the_expert_cache_are_refused(option: tuple[str, ...], cli: Callable[..., Any]) -> None:
    outcome = cli("generate", LAYOUTS / "awq-4bit-g64", "--prompt", "a", "--ram", "1GiB", *option)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{option[0]} is for experts in a cache, which files of other programs do not have" in " ".join(outcome.err.split())
