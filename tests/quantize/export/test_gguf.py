"""GGUF files that `export` writes: the metadata of llama.cpp's converter, and blocks with the values of our formats, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.kernels.formats.int4 import Int4Weight, pack
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.export.gguf import GgufTarget
from dbrx_q.quantize.export.gguf_types import GGUF_TYPES, holds
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.sources.gguf_names import gguf_name
from dbrx_q.sources.open_weights import open_weights
from dbrx_q.tokenizer.bpe_file import TokenizerWarning

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"

BUNDLED = Path(__file__).parents[2] / "data" / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf"
HELD = [
    *(("q4_0", fmt) for fmt in ("q4_0:32",)),
    *(("q4_1", fmt) for fmt in ("affine4:32", "affine4:64", "affine4:128")),
    *(("q8_0", fmt) for fmt in ("int8:32", "int8:64", "int8:128")),
]


def export(source: Path, destination: Path, kind: str | None, **settings: Any) -> Path:
    """The first file of an export without rounding."""
    target = GgufTarget(kind, "model", **settings)
    with open_weights(source) as weights:
        record = target.write(weights, target.plan(weights), destination)
    assert record.nbytes == sum(tensor.n_bytes for name in record.files for tensor in gguf.GGUFReader(destination / name).tensors)
    return destination / record.files[0]


def fields(path: Path) -> dict[str, tuple[Any, Any]]:
    """Values and types of the metadata, without the header."""
    reader = gguf.GGUFReader(path)
    return {name: (field.contents(), field.types) for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of the tensors of a file."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes()) for tensor in reader.tensors}


# Blocks


@pytest.mark.parametrize(("name", "spelling"), HELD)
def test_blocks_have_the_values_of_the_format(name: str, spelling: str) -> None:
    fmt, kind = TensorFormat.parse(spelling), GGUF_TYPES[name]
    matrix = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    weight = fmt.record.quantize(matrix, fmt.group_size)
    assert holds(kind, fmt, weight)
    assert kind.blocks is not None
    blocks = kind.blocks(weight)
    assert blocks.shape == (5, 256 // 32 * kind.block_bytes)
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    assert torch.equal(torch.from_numpy(values), dequantize(weight))


def test_a_zero_point_of_7_is_a_negative_scale_and_one_of_8_keeps_the_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 4)  # [2, 64]
    scales = torch.tensor([[0.5, 0.25], [-0.5, 3.0]]).half()
    weight = Int4Weight(pack(codes), scales, pack(torch.tensor([[8, 7], [7, 8]], dtype=torch.uint8)), 32)
    kind = GGUF_TYPES["q4_0"]
    assert holds(kind, TensorFormat("int4", 32), weight)
    assert kind.blocks is not None
    blocks = kind.blocks(weight).reshape(2, 2, 18)
    assert blocks[..., :2].copy().view(np.float16).squeeze(-1).tolist() == [[0.5, -0.25], [0.5, 3.0]]
    assert np.array_equal(blocks[0, 0, 2:] & 15, codes[0, :16].numpy())
    assert np.array_equal(blocks[0, 1, 2:] & 15, 15 - codes[0, :16].numpy())
    values = gguf.dequantize(kind.blocks(weight), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(values), dequantize(weight))


def test_other_zero_points_are_no_q4_0() -> None:
    fmt = TensorFormat("int4", 32)
    weight = fmt.record.quantize(torch.rand(4, 64), 32)  # zero-points 0
    assert not holds(GGUF_TYPES["q4_0"], fmt, weight)


# Files


def test_metadata_are_those_of_llama_cpps_converter(nano: Path, tmp_path: Path) -> None:
    found, expected = fields(export(nano, tmp_path / "out", None)), fields(BUNDLED)
    assert found["general.file_type"][0] == gguf.LlamaFileType.MOSTLY_BF16
    assert found["general.name"][0] == "model"
    assert list(found) == list(expected)
    for name in expected.keys() - {"general.file_type", "general.name"}:
        assert found[name] == expected[name], name


def test_a_file_has_the_licence_and_what_the_model_card_says(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "dbrx"
    shutil.copytree(small, source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: databricks-open-model-license\n---\n# DBRX\n", encoding="utf-8")
    (source / "LICENSE").write_text("the licence", encoding="utf-8")
    path = export(source, tmp_path / "out", None)
    assert fields(path)["general.license"][0] == "other"
    assert fields(path)["general.license.name"][0] == "databricks-open-model-license"
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "the licence"


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_a_plain_file_has_the_values_of_the_checkpoint(kind: str, small: Path, tmp_path: Path) -> None:
    path = export(small, tmp_path / "out", kind)
    with Checkpoint(small) as plain, open_weights(path) as written:
        for name in plain.tensors:
            label = "F32" if kind_of(name) in ("norms", "router") else kind.upper()
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[label]
            assert torch.equal(written.read(name), plain.read(name).to(dtype)), name
            assert written.label_of(name) == f"GGUF {label}"


def test_parts_of_a_split_file_are_named_as_llama_gguf_split_names_them(small: Path, tmp_path: Path) -> None:
    path = export(small, tmp_path / "split", "f16", split_bytes=300_000)
    count = len(list(path.parent.iterdir()))
    assert count > 1
    assert path.name == f"model-F16-00001-of-{count:05}.gguf"
    whole = export(small, tmp_path / "whole", "f16")
    with open_weights(path) as parts, open_weights(whole) as one:
        assert len(parts.shards) == count
        assert all(torch.equal(parts.read(name), one.read(name)) for name in one.tensors)


def test_what_gguf_holds_is_repacked_and_dequantizes_alike(small: Path, tmp_path: Path) -> None:
    formats = {"w1": "q4_0:32", "v1": "affine4:64", "w2": "int8:64", "Wqkv": "int8:32", "wte": "q4_0:32", "lm_head": "affine4:32"}

    def assigned(checkpoint: Any) -> dict[str, TensorFormat]:
        parts = {name: name.removesuffix(".weight").rsplit(".", 1)[-1] for name in checkpoint.tensors}
        return {name: TensorFormat.parse(formats[part]) for name, part in parts.items() if part in formats}

    quantize_checkpoint(small, tmp_path / "packed", QuantizationRequest(assigned))
    path = export(tmp_path / "packed", tmp_path / "out", None)
    with Checkpoint(tmp_path / "packed") as packed, open_weights(path) as written:
        for name, tensor in packed.tensors.items():
            expert = 0 if tensor.experts else -1
            ours = dequantize(packed.packed(name, expert)) if name in packed.formats else packed.read(name).float()
            theirs = written.read(name).float()
            if name in packed.formats:
                theirs = theirs[: ours.shape[1]].T if tensor.transposed else theirs[: ours.shape[0]]
            assert torch.equal(theirs, ours), name
        assert written.label_of("transformer.blocks.0.ffn.experts.mlp.w1") == "GGUF Q4_0"
        assert written.label_of("transformer.blocks.0.norm_attn_norm.attn.out_proj.weight") == "GGUF BF16"


@pytest.mark.parametrize(("layout", "label"), [("gptq-4bit-g128", "GGUF Q4_0"), ("gptq-8bit-g128", "GGUF Q8_0")])
def test_symmetric_gptq_is_not_rounded_again(layout: str, label: str, tmp_path: Path) -> None:
    source = BUNDLED.parents[1] / "layouts" / layout
    with pytest.warns(TokenizerWarning, match=r"GPT-2's pattern.*llama\.cpp splits texts by DBRX's"):  # as transformers 5 saved it
        path = export(source, tmp_path / "out", None)
    with open_weights(source) as before, open_weights(path) as after:
        for name, tensor in before.tensors.items():
            assert torch.equal(after.read(name).float(), before.read(name).float()), name
            assert not tensor.experts or after.label_of(name) == label


def test_a_format_that_no_type_holds_needs_a_type(quantized_small: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError,
        match=r"of a format that q4_0, q4_1, .* hold exactly; .*w1 is int4:64\. Give --type, .* export the original with --type",
    ):
        export(quantized_small, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_limit_of_memory_that_is_too_small_is_refused(small: Path, tmp_path: Path) -> None:
    target = GgufTarget("f16", "model")
    with Checkpoint(small) as weights, pytest.raises(RequestError, match=r"takes .* of memory.*found a limit of 1\.0. MB"):
        target.write(weights, target.plan(weights), tmp_path / "out", memory=1 << 20)


def test_rows_that_are_no_whole_blocks_stay_float16(tmp_path: Path) -> None:
    config = DbrxConfig(
        d_model=64,
        n_heads=2,
        n_layers=1,
        max_seq_len=64,
        vocab_size=64,
        attn_config={"kv_n_heads": 1},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, tmp_path / "source")
    with Checkpoint(tmp_path / "source") as weights:
        types = GgufTarget("q4_0", "model").plan(weights).types
    assert {kind for name, kind in types.items() if name.endswith(".w2")} == {"f16"}
    assert {kind for name, kind in types.items() if name.endswith((".w1", ".v1"))} == {"q4_0"}


# From GGUF to dbrx_q and back


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"])
def test_a_round_trip_changes_no_byte_of_a_tensor(name: str, small: Path, tmp_path: Path) -> None:
    """The gguf package rounds; experts of a plain type are rounded by us, as all experts of a quantized checkpoint are packed."""
    original = tmp_path / "original.gguf"
    shutil.copyfile(export(small, tmp_path / "plain", "f32"), original)
    reader, kind = gguf.GGUFReader(original), gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "dbrx")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        plain = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        data = tensor.data if plain else gguf.quantize(tensor.data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.F32 if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = tmp_path / "source.gguf"

    def kept(weights: Any) -> dict[str, TensorFormat]:
        formats = {
            key: weights.exact_format(key) or TensorFormat("int8", 32) for key in default_formats(weights.config, TensorFormat("int8", 32))
        }
        return {key: fmt for key, fmt in formats.items() if weights.exact_format(key) is not None or weights.tensors[key].experts}

    quantize_checkpoint(source, tmp_path / "ours", QuantizationRequest(kept, keep=True))
    before, after = tensors(source), tensors(export(tmp_path / "ours", tmp_path / "back", None))
    assert before.keys() == after.keys()
    rounded = (
        {gguf_name(f"transformer.blocks.0.ffn.experts.mlp.{matrix}") for matrix in ("w1", "v1", "w2")}
        if name in ("F16", "BF16", "F32")
        else set()
    )
    for key in before.keys() - rounded:
        assert after[key] == before[key], key
    direct = tensors(export(source, tmp_path / "direct", None))
    assert direct == before


# The command


def test_the_command_rounds_into_the_grid_of_the_type(small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("export", small, tmp_path / "out", "--to", "gguf", "--type", "q4_0", "--method", "clip")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    path = tmp_path / "out" / "dbrx-small-Q4_0.gguf"
    with Checkpoint(small) as plain, open_weights(path) as written:
        for name in plain.tensors:
            kind = kind_of(name)
            wanted = "F32" if kind in ("norms", "router") else "Q8_0" if kind == "head" else "Q4_0"
            assert written.label_of(name) == f"GGUF {wanted}"
            before, after = plain.read(name).float(), written.read(name).float()
            error = float((after - before).square().sum() / before.square().sum())
            assert error < {"F32": 1e-12, "Q8_0": 1e-4, "Q4_0": 0.01}[wanted], name
    assert fields(path)["general.file_type"][0] == gguf.LlamaFileType.MOSTLY_Q4_0


def test_resume_takes_the_rounded_weights_of_a_run_whose_export_failed(small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    arguments = ["export", small, tmp_path / "out", "--to", "gguf", "--type", "q8_0"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "another program's").touch()
    assert cli(*arguments).code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.rounded"]
    shutil.rmtree(tmp_path / "out.partial")
    refused = cli(*arguments)
    assert refused.code == 2
    assert "out.rounded" in refused.err
    outcome = cli(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    assert "out.rounded is complete already" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "transformers", "--type", "q4_0"], "--type is an option of --to gguf"),
        (["--to", "gguf", "--dtype", "float16"], "--dtype is an option of --to transformers"),
        (["--to", "gguf", "--type", "f16", "--method", "best", "--calibration", "README.md"], "nothing is rounded"),
        (["--to", "gguf", "--type", "q4_0", "--method", "best"], "must have a text to calibrate with"),
    ],
)
def test_options_that_cannot_be_served_are_refused(
    options: list[str], message: str, small: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    outcome = cli("export", small, tmp_path / "out", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_weights_of_ours_that_must_be_rounded_again_are_refused_with_the_way(
    quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    outcome = cli("export", quantized_small, tmp_path / "out", "--to", "gguf", "--type", "q4_0")
    assert outcome.code == 2
    assert "transformer.wte.weight is int8:64 and would become q4_0:32. Leave --type or --bits out" in outcome.err
    assert "or give the original" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_run_rounded_is_taken_or_named(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out.rounded").mkdir()
    outcome = cli("export", LAYOUTS / "published", tmp_path / "out", "--to", "gguf", "--type", "Q4_0")
    assert outcome.code == 2
    assert "unless --resume takes what an earlier run has rounded there. Add --resume, or remove it" in " ".join(outcome.err.split())
