"""nf4-double: written, resumed and loaded with the same bits as bitsandbytes' double quantization."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxConfig, DbrxForCausalLM
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.inventory import take_inventory
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, oriented, parts_of
from dbrx_q.checkpoint.manifest import Manifest, sha256_of
from dbrx_q.errors import FormatError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.kernels.formats import nf4
from dbrx_q.model.layers import PackedWeight
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Machine
from dbrx_q.planning.placement import place
from dbrx_q.quantize.pipeline.format_assignment import default_formats, override
from dbrx_q.quantize.pipeline.report import NAME as REPORT_NAME
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.sources.folder import NativeFolder

DOUBLE = TensorFormat("nf4-double", 64)
REQUEST = QuantizationRequest(
    lambda checkpoint: override(default_formats(checkpoint.config, DOUBLE), checkpoint.config, ["Wqkv=nf4-double", "head=nf4-double"])
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """d_model 128, 3 experts of width 192: an expert's matrix has 384 scales, Wqkv 512 and the head 200."""
    folder = tmp_path_factory.mktemp("source") / "plain"
    sizes = {"d_model": 128, "n_heads": 4, "n_layers": 2, "vocab_size": 100}
    ffn = {"ffn_hidden_size": 192, "moe_num_experts": 3, "moe_top_k": 2}
    write_checkpoint(DbrxConfig(**sizes, attn_config={"kv_n_heads": 2}, ffn_config=ffn, torch_dtype="bfloat16"), folder, seed=6)  # type: ignore[arg-type] # sizes are whole numbers
    return folder


@pytest.fixture(scope="module")
def in_pieces(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized from blocks of 37 rows (experts' matrices are never split), in pieces of 7 rows of w1 and v1 and 5 of w2."""
    folder = tmp_path_factory.mktemp("pieces") / "nf4-double"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbrx_q.quantize.pipeline.jobs.STEP_BYTES", 37 * 2 * 128)
        patch.setattr("dbrx_q.quantize.methods.rtn._PIECE_ELEMENTS", 7 * 128 + 100)
        quantize_checkpoint(source, folder, REQUEST)
    return folder


@pytest.fixture(scope="module")
def at_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint, quantized one whole matrix at a time."""
    folder = tmp_path_factory.mktemp("at-once") / "nf4-double"
    quantize_checkpoint(source, folder, REQUEST)
    return folder


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if not path.name.startswith(REPORT_NAME)}


def matrices(checkpoint: Checkpoint, tensor: DenseTensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(label, plain float32 [N, K]) for each matrix of a tensor."""
    stacked = checkpoint.read(tensor.name)
    for e, matrix in enumerate(oriented(stacked, tensor) if tensor.experts else [stacked]):
        yield f"{tensor.name}.{e}" if tensor.experts else tensor.name, matrix.float().contiguous()


def test_stored_and_loaded_bits_equal_those_of_bitsandbytes(source: Path, in_pieces: Path) -> None:
    functional = nf4.bitsandbytes_functional()
    model = DbrxForCausalLM.from_pretrained(in_pieces)
    manifest = Manifest.read(in_pieces)
    assert manifest is not None
    n_matrices = 0
    with Checkpoint(source) as plain, Checkpoint(in_pieces) as checkpoint:
        doubled = [tensor for tensor in checkpoint.tensors.values() if checkpoint.formats.get(tensor.name) == DOUBLE]
        for tensor in doubled:
            holder = model.get_submodule(tensor.name)
            assert isinstance(holder, PackedWeight)
            loaded = holder.value
            assert isinstance(loaded, nf4.Nf4Weight)
            for e, (label, matrix) in enumerate(matrices(plain, tensor)):
                codes, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
                expected = {"qweight": codes, "absmax": state.absmax, "nested_absmax": state.state2.absmax, "offset": state.offset}
                for part, values in expected.items():
                    stored = checkpoint.read(f"{label}.{part}")
                    assert torch.equal(stored, values.view(stored.shape)), (label, part)
                expected_values = functional.dequantize_4bit(codes, state)
                dequantized = nf4.dequantize(loaded[e] if tensor.experts else loaded)
                assert torch.equal(dequantized.view(torch.int32), expected_values.view(torch.int32)), label
                error = float((expected_values - matrix).double().norm() / matrix.double().norm())
                assert manifest.tensors[label]["relative_error"] == pytest.approx(error, rel=1e-6)
                n_matrices += 1
    assert n_matrices == 2 * (3 * 3 + 1) + 1


def test_inventory_counts_stored_bits_and_plan_counts_dequantized_scales(in_pieces: Path) -> None:
    with Checkpoint(in_pieces) as checkpoint:
        experts = take_inventory(checkpoint).kinds["experts"]
        bits = 4 + 8 / 64 + (2 + 1) * 32 / (192 * 128)  # codes, scales, and for 384 scales two nested scales and an offset
        assert (experts.format, experts.bits_per_weight) == ("nf4-double:64", bits)
        plan = place(checkpoint.config, checkpoint.formats, Machine(), MemoryRequest(context=10)).host
    assert plan.experts == (4 + 32 / 64) * experts.parameters / 8
    model = DbrxForCausalLM.from_pretrained(in_pieces)
    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert plan.dense + plan.experts == resident
    assert NativeFolder(in_pieces.name, in_pieces).loaded_bytes == resident


def test_the_parts_of_an_expert_are_stored_contiguously(in_pieces: Path) -> None:
    with Checkpoint(in_pieces) as checkpoint:
        for e in range(3):
            w1, v1, w2 = (checkpoint.tensors[f"transformer.blocks.0.ffn.experts.mlp.{matrix}"] for matrix in ("w1", "v1", "w2"))
            names = [
                part.name for tensor in (w1, v1, w2) for part in parts_of(tensor, DOUBLE) if f".{e}." in part.name.rpartition("mlp.")[2]
            ]
            assert len(names) == 12
            infos = [checkpoint.infos[name] for name in names]
            assert all(info.offset + info.nbytes == following.offset for info, following in pairwise(infos))


class StoppedError(Exception):
    """Stops a run before its end."""


@pytest.mark.parametrize("tensors", [3, 12, 30])
def test_a_resumed_run_writes_the_same_bytes(source: Path, in_pieces: Path, at_once: Path, tmp_path: Path, tensors: int) -> None:
    calls = 0

    def stop(finished: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == tensors:
            raise StoppedError

    out = tmp_path / at_once.name  # the model card names it
    with pytest.raises(StoppedError):
        quantize_checkpoint(source, out, REQUEST, on_bytes=stop)
    record = quantize_checkpoint(source, out, REQUEST, resume=True)
    assert record.resumed_seconds > 0
    assert sums(out) == sums(at_once)
    assert [sha256_of(shard) for shard in sorted(in_pieces.glob("*.safetensors"))] == [
        sha256_of(shard) for shard in sorted(at_once.glob("*.safetensors"))
    ]


def test_an_infinite_sum_of_scales_is_refused_and_names_the_tensor(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    config = DbrxConfig.from_pretrained(str(source))
    write_checkpoint(config, folder, seed=6)
    with Checkpoint(folder) as checkpoint:
        path, info = checkpoint.path_of("lm_head.weight"), checkpoint.infos["lm_head.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + info.nbytes] = torch.full((info.nbytes // 2,), 3e38).bfloat16().view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor lm_head\.weight: the sum of a matrix's scales must stay below 3\.4e38"):
        quantize_checkpoint(folder, tmp_path / "out", REQUEST)


def test_the_quantization_config_names_the_format(in_pieces: Path) -> None:
    tensors = json.loads((in_pieces / "config.json").read_text())["quantization_config"]["tensors"]
    assert tensors["lm_head.weight"] == {"format": "nf4-double", "group_size": 64}
