"""Folders that `export` writes for mlx-lm: its names and shapes, the routers plain, and the values of our formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.quantize.export.mlx import MlxTarget
from dbrx_q.quantize.pipeline.format_assignment import default_formats, override
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.sources.open_weights import open_weights

WRITTEN_BY_MLX = Path(__file__).parents[2] / "data" / "layouts" / "mlx-4bit-g64"
W2 = "transformer.blocks.0.ffn.experts.mlp.w2"


@pytest.fixture(scope="module")
def source(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small plain model of which mlx-lm computes all."""
    config = DbrxConfig(
        d_model=64,
        n_heads=2,
        n_layers=2,
        max_seq_len=64,
        vocab_size=4096,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 500000.0},
        ffn_config={"ffn_hidden_size": 128, "moe_num_experts": 3, "moe_top_k": 2},
        torch_dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("mlx") / "dbrx-tiny"
    write_checkpoint(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(nano / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in formats that MLX holds: 4 bits in groups of 64, attention in 8 bits and groups of 32."""

    def assigned(checkpoint: Any) -> dict[str, TensorFormat]:
        formats = default_formats(checkpoint.config, TensorFormat("affine4-bf16", 64))
        return override(formats, checkpoint.config, ["attention=affine8-bf16:32", "embedding=affine4-bf16:64", "head=plain"])

    folder = tmp_path_factory.mktemp("mlx-packed") / "dbrx-tiny-affine4"
    quantize_checkpoint(source, folder, QuantizationRequest(assigned))
    return folder


def export(source: Path, destination: Path, bits: int | None = None, **settings: Any) -> None:
    target = MlxTarget(bits, **settings)
    with open_weights(source) as weights:
        target.write(weights, target.plan(weights), destination)


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every stored tensor."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "mlx"
            tensors |= {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 # no dictionary
    return tensors


def test_names_dtypes_and_shapes_are_those_of_mlx_lm(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Of a folder that mlx-lm wrote, exported without rounding; its routers are quantized, ours are plain."""
    outcome = cli("export", WRITTEN_BY_MLX, tmp_path / "out", "--to", "mlx")
    assert outcome.code == 0, outcome.err
    ours, theirs = stored(tmp_path / "out"), stored(WRITTEN_BY_MLX)
    routers = {name for name in ours | theirs if ".router." in name}
    assert {name: ours[name] for name in ours.keys() - routers} == {name: theirs[name] for name in theirs.keys() - routers}
    router = "transformer.blocks.{}.ffn.router.layer.weight"
    assert {name: ours[name] for name in ours.keys() & routers} == {router.format(layer): ("BF16", [3, 128]) for layer in (0, 1)}
    before, after = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (WRITTEN_BY_MLX, tmp_path / "out"))
    assert after["quantization"] == after["quantization_config"] == before["quantization"]
    with open_weights(WRITTEN_BY_MLX) as theirs_read, open_weights(tmp_path / "out") as ours_read:
        for name in theirs_read.tensors:
            if kind_of(name) != "router":
                assert torch.equal(ours_read.read(name), theirs_read.read(name)), name


def test_formats_that_mlx_holds_are_not_rounded_again(packed: Path, tmp_path: Path) -> None:
    export(packed, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    attention = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"} | {
        f"transformer.blocks.{layer}.norm_attn_norm.attn.{matrix}": attention for layer in (0, 1) for matrix in ("Wqkv", "out_proj")
    }
    with Checkpoint(packed) as ours, open_weights(tmp_path / "out") as written:
        for name in ours.tensors:
            assert torch.equal(written.read(name).to(ours.dtype_of(name)), ours.read(name)), name
        assert written.label_of(W2) == "MLX affine4:64"
        assert written.label_of("lm_head.weight") == "bfloat16"


def test_a_plain_model_stays_plain(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", shard_bytes=300_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    names = stored(tmp_path / "out")
    assert names["transformer.blocks.1.ffn.experts.2.w2.weight"] == ("BF16", [64, 128])
    with Checkpoint(source) as before, open_weights(tmp_path / "out") as after:
        assert all(torch.equal(after.read(name), before.read(name)) for name in before.tensors)


@pytest.mark.parametrize(("bits", "dtype", "bound"), [(4, "bfloat16", 0.02), (8, "float16", 1e-4)])
def test_the_command_rounds_all_but_the_routers(
    bits: int, dtype: str, bound: float, source: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    outcome = cli("export", source, tmp_path / "out", "--to", "mlx", "--bits", bits, "--group-size", 32, "--dtype", dtype)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with Checkpoint(source) as before, open_weights(tmp_path / "out") as after:
        for tensor in dense_tensors(before.config):
            plain = kind_of(tensor.name) in ("norms", "router")
            assert after.label_of(tensor.name) == (dtype if plain else f"MLX affine{bits}:32")
            expected = before.read(tensor.name).float()
            error = (after.read(tensor.name).float() - expected).square().sum() / expected.square().sum()
            assert error < (1e-6 if plain else bound), tensor.name


def test_what_mlx_does_not_hold_is_refused_with_the_way(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(
        source, tmp_path / "int4", QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, TensorFormat("int4", 64)))
    )
    with pytest.raises(RequestError, match=r"affine mode holds exactly; .* is int8:64\. Give --bits 4 .* export the original with --bits"):
        export(tmp_path / "int4", tmp_path / "out")


def test_a_model_that_mlx_lm_does_not_compute_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"mlx-lm needs attn_config\.clip_qkv"):
        export(small, tmp_path / "out", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "mlx", "--bits", "3"], "--bits must be one of 4, 8; found 3"),
        (["--to", "mlx", "--group-size", "64"], "--group-size must be one of 32, 64, 128, beside --bits; found 64"),
        (["--to", "gguf", "--bits", "4"], "--bits is an option of --to mlx; found 4 with --to gguf"),
    ],
)
def test_options_are_checked(options: list[str], message: str, source: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("export", source, tmp_path / "out", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []
