"""`quantize --keep`: stored codes become a checkpoint of ours without being rounded again, and the rest is rounded as usual."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.errors import RequestError
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline.format_assignment import default_formats, kept_or_default, override
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.sources.open import open_runnable, open_source
from dbrx_q.sources.open_weights import open_weights

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
KEPT = {
    "awq-4bit-g64": "int4:64",
    "bitsandbytes-nf4-double-converted": "nf4:64",
    "gptq-4bit-g128": "int4:128",
    "gptq-4bit-g32-asym": "int4:32",
    "gptq-8bit-g128": "int8:128",
    "gptq-v2-4bit-g32-asym": "int4:32",
    "mlx-3bit-g32": "affine4-bf16:32",
    "mlx-4bit-g64": "affine4-bf16:64",
    "mlx-6bit-g64-float16": "affine8:64",
    "mlx-mixed": "affine4-bf16:64",
}
"""The format that holds the experts of a folder."""


def keep(*rules: str, experts: str = "int4:32", method: str = "rtn", sequences: CalibrationSequences | None = None) -> QuantizationRequest:
    def assign(weights: StoredWeights) -> dict[str, TensorFormat]:
        defaults = default_formats(weights.config, TensorFormat.parse(experts))
        return override(kept_or_default(weights, defaults), weights.config, rules)

    return QuantizationRequest(assign, keep=True, method=method, sequences=sequences, about={} if sequences is not None else None)


@pytest.mark.parametrize("name", KEPT)
def test_every_value_of_the_source_is_kept(name: str, tmp_path: Path) -> None:
    record = quantize_checkpoint(LAYOUTS / name, tmp_path / "out", keep())
    with open_weights(LAYOUTS / name) as source, Checkpoint(tmp_path / "out") as result:
        assert {str(result.formats[t.name]) for t in result.tensors.values() if t.experts} == {KEPT[name]}
        for tensor in source.tensors.values():
            stored = source.read(tensor.name)
            ours = result.read(tensor.name) if tensor.name not in result.formats else _dequantized(result, tensor.name)
            if name.startswith("bitsandbytes"):  # which rounds its values to bfloat16
                stored, ours = stored.bfloat16(), ours.bfloat16()
            assert torch.equal(ours.float(), stored.float()), tensor.name
    assert record.kept == sum(":" in matrix.format for matrix in record.records) > 0
    assert record.rounded_again == {}
    assert record.options["kept"] == sorted(_quantized_labels(LAYOUTS / name))
    assert "repacked without rounding" in (tmp_path / "out" / "quantization_report.md").read_text()


def _quantized_labels(location: Path) -> set[str]:
    with open_weights(location) as weights:
        return {weights.label_of(t.name) for t in weights.tensors.values() if ".router." not in t.name and not weights.is_plain(t.name)}


def _dequantized(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """From the parts, not by `Checkpoint.read`."""
    from dbrx_q.kernels.formats.weights import dequantize

    tensor = checkpoint.tensors[name]
    if not tensor.experts:
        return dequantize(checkpoint.packed(name))
    matrices = [dequantize(checkpoint.packed(name, e)) for e in range(tensor.experts)]
    return torch.cat([matrix.T if tensor.transposed else matrix for matrix in matrices])


def test_the_copy_and_the_source_give_the_same_logits(tmp_path: Path) -> None:
    quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "out", keep())
    ids = torch.tensor([list(range(3, 40))])
    models = [
        open_runnable(path).load(dtype=torch.float32, device=torch.device("cpu")) for path in (LAYOUTS / "gptq-4bit-g128", tmp_path / "out")
    ]
    assert torch.equal(*(model(ids).logits for model in models))


def test_without_keep_everything_is_rounded_again_and_it_is_said(tmp_path: Path) -> None:
    request = QuantizationRequest(lambda weights: default_formats(weights.config, TensorFormat("int4", 32)))
    record = quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "out", request)
    assert record.kept == 0
    assert record.rounded_again == {"GPTQ int4:128": 2 * (3 * 3 + 2)}
    assert "kept" not in record.options
    assert "rounded again: 22 of GPTQ int4:128" in (tmp_path / "out" / "quantization_report.md").read_text()


def test_what_no_format_holds_is_rounded(tmp_path: Path) -> None:
    """A rule of the user goes before the kept format; the other matrices of the expert are kept."""
    record = quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "out", keep("w2=int8:64", "head=int8:64"))
    formats = {(r.name.rsplit(".", 1)[-1], r.format, r.kept) for r in record.records if r.expert >= 0}
    assert formats == {("w1", "int4:128", True), ("v1", "int4:128", True), ("w2", "int8:64", False)}
    assert record.rounded_again == {"GPTQ int4:128": 6}


def test_a_matrix_is_kept_beside_others_of_its_layer_that_are_not(tmp_path: Path) -> None:
    """In memory the three matrices of an expert are packed or none is; a copy packs them all, so each is kept by itself."""
    source = shutil.copytree(LAYOUTS / "gptq-4bit-g128", tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors |= {name: scales.float() for name, scales in tensors.items() if name.endswith("mlp.1.w2.scales")}
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    record = quantize_checkpoint(source, tmp_path / "out", keep())
    assert {(r.name.rsplit(".", 1)[-1], r.format, r.kept) for r in record.records if r.expert >= 0} == {
        ("w1", "int4:128", True),
        ("v1", "int4:128", True),
        ("w2", "int4:32", False),
    }
    assert open_runnable(source).load(dtype=None, device=torch.device("cpu")) is not None


def test_a_run_does_not_continue_where_config_json_reads_the_source_otherwise(tmp_path: Path) -> None:
    """Version 2 of GPTQ's layout gives the same codes other zero-points."""
    source = shutil.copytree(LAYOUTS / "gptq-4bit-g128", tmp_path / "source")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", keep(), on_bytes=stop)
    for name in ("config.json", "quantize_config.json"):
        text = (source / name).read_text(encoding="utf-8")
        (source / name).write_text(re.sub(r'format": "gptq"', 'format": "gptq_v2"', text), encoding="utf-8")
    with pytest.raises(RequestError, match="--resume continues with the checkpoint that the run began with"):
        quantize_checkpoint(source, tmp_path / "out", keep(), resume=True)


def test_a_matrix_is_kept_though_another_of_its_expert_is_rounded(tmp_path: Path) -> None:
    """The second layer of the file has w1 in MXFP4, v1 in NVFP4, which no format holds, and w2 in Q4_0."""
    [location] = (LAYOUTS / "gguf-blocks-of-32").glob("*-00001-of-*.gguf")
    record = quantize_checkpoint(location, tmp_path / "out", keep())
    assert {(r.name, r.kept) for r in record.records if r.expert == 0 and r.layer == 1} == {
        (f"transformer.blocks.1.ffn.experts.mlp.{role}", role != "v1") for role in ("w1", "v1", "w2")
    }
    with open_weights(location) as source, Checkpoint(tmp_path / "out") as result:
        exact = [name for name in source.tensors if source.exact_format(name) is not None]
        assert len(exact) == 11
        for name in exact:
            assert torch.equal(_dequantized(result, name), source.read(name)), name
    assert record.rounded_again == {"GGUF NVFP4": 3}


def test_a_source_without_exact_codes_cannot_be_kept(tmp_path: Path) -> None:
    for name, label in (("published", "bfloat16"), ("gptq-4bit-g64-act-order", "GPTQ int4:64 act-order")):
        with pytest.raises(RequestError, match=rf"{name}: --keep repacks weights whose codes a format holds exactly; found {label}. Leave"):
            quantize_checkpoint(LAYOUTS / name, tmp_path / "out", keep())
    assert not (tmp_path / "out").exists()


def test_a_run_that_keeps_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "whole", keep())

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "resumed", keep(), on_bytes=stop)
    quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "resumed", keep(), resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_kept_matrices_take_part_in_the_calibration_of_the_others(tmp_path: Path) -> None:
    """With gptq for w2, the kept w1 and v1 and attention carry the tokens; the bytes of what is kept do not change."""
    ids = torch.randint(0, 316, (8, 32), generator=torch.Generator().manual_seed(0))
    request = keep("w2=int8:64", method="best", sequences=CalibrationSequences.single(ids))
    record = quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "fitted", request)
    assert {r.calibrated_by for r in record.records if r.expert >= 0 and not r.kept} <= {"tokens", "layer"}
    assert all(r.root_mean_square for r in record.records)
    quantize_checkpoint(LAYOUTS / "gptq-4bit-g128", tmp_path / "kept", keep())
    fitted, kept = (safetensors.torch.load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("fitted", "kept"))
    same = [name for name in kept if ".w1." in name or ".v1." in name or ".attn." in name]
    assert same
    assert all(torch.equal(fitted[name], kept[name]) for name in same)


def test_the_copy_of_a_folder_of_another_program_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    quantize_checkpoint(LAYOUTS / "awq-4bit-g64", tmp_path / "out", keep())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "dbrx_q"
    assert "quantization" not in config
    assert open_source(tmp_path / "out").tokenizer().encode("a tiny text") == open_source(LAYOUTS / "awq-4bit-g64").tokenizer().encode(
        "a tiny text"
    )
