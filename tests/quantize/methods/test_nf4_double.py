"""nf4-double: what bitsandbytes makes of a matrix with double quantization, written, gone on with and loaded to the same bits."""

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
from dbrx_q.sources.folder import PackedFolder

DOUBLE = TensorFormat("nf4-double", 64)
REQUEST = QuantizationRequest(
    lambda checkpoint: override(default_formats(checkpoint.config, DOUBLE), checkpoint.config, ["Wqkv=nf4-double", "head=nf4-double"])
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 wide, 3 experts of 192: 384 scales of an expert's matrix, 512 of a Wqkv and 200 of the head."""
    folder = tmp_path_factory.mktemp("source") / "plain"
    sizes = {"d_model": 128, "n_heads": 4, "n_layers": 2, "vocab_size": 100}
    ffn = {"ffn_hidden_size": 192, "moe_num_experts": 3, "moe_top_k": 2}
    write_checkpoint(DbrxConfig(**sizes, attn_config={"kv_n_heads": 2}, ffn_config=ffn, torch_dtype="bfloat16"), folder, seed=6)  # type: ignore[arg-type] # sizes are whole numbers
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From blocks of 37 rows (experts' matrices come whole), in pieces of 7 rows of w1 and v1 and of 5 of w2."""
    folder = tmp_path_factory.mktemp("made") / "nf4-double"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbrx_q.quantize.pipeline.jobs._STEP_BYTES", 37 * 2 * 128)
        patch.setattr("dbrx_q.quantize.methods.rtn._PIECE_ELEMENTS", 7 * 128 + 100)
        quantize_checkpoint(source, folder, REQUEST)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same from whole matrices."""
    folder = tmp_path_factory.mktemp("whole") / "nf4-double"
    quantize_checkpoint(source, folder, REQUEST)
    return folder


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if not path.name.startswith(REPORT_NAME)}


def matrices(checkpoint: Checkpoint, tensor: DenseTensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(label, plain [N, K]) of a tensor's matrices."""
    stacked = checkpoint.read(tensor.name)
    for e, matrix in enumerate(oriented(stacked, tensor) if tensor.experts else [stacked]):
        yield f"{tensor.name}.{e}" if tensor.experts else tensor.name, matrix.float().contiguous()


def test_stored_and_loaded_bits_are_those_of_bitsandbytes(source: Path, made: Path) -> None:
    functional = nf4.bitsandbytes_functional()
    model = DbrxForCausalLM.from_pretrained(made)
    manifest = Manifest.read(made)
    assert manifest is not None
    seen = 0
    with Checkpoint(source) as plain, Checkpoint(made) as checkpoint:
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
                decoded = functional.dequantize_4bit(codes, state)
                found = nf4.dequantize(loaded[e] if tensor.experts else loaded)
                assert torch.equal(found.view(torch.int32), decoded.view(torch.int32)), label
                error = float((decoded - matrix).double().norm() / matrix.double().norm())
                assert manifest.tensors[label]["relative_error"] == pytest.approx(error, rel=1e-6)
                seen += 1
    assert seen == 2 * (3 * 3 + 1) + 1


def test_bits_are_those_stored_and_memory_is_that_of_decoded_scales(made: Path) -> None:
    with Checkpoint(made) as checkpoint:
        experts = take_inventory(checkpoint).kinds["experts"]
        bits = 4 + 8 / 64 + (2 + 1) * 32 / (192 * 128)  # codes, scales, and of 384 scales two nested ones and an offset
        assert (experts.format, experts.bits_per_weight) == ("nf4-double:64", bits)
        plan = place(checkpoint.config, checkpoint.formats, Machine(), MemoryRequest(context=10)).host
    assert plan.experts == (4 + 32 / 64) * experts.parameters / 8
    model = DbrxForCausalLM.from_pretrained(made)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert plan.dense + plan.experts == held
    assert PackedFolder(made.name, made).loaded_bytes == held


def test_all_parts_of_an_expert_lie_back_to_back(made: Path) -> None:
    with Checkpoint(made) as checkpoint:
        for e in range(3):
            w1, v1, w2 = (checkpoint.tensors[f"transformer.blocks.0.ffn.experts.mlp.{matrix}"] for matrix in ("w1", "v1", "w2"))
            names = [
                part.name for tensor in (w1, v1, w2) for part in parts_of(tensor, DOUBLE) if f".{e}." in part.name.rpartition("mlp.")[2]
            ]
            assert len(names) == 12
            places = [checkpoint.infos[name] for name in names]
            assert all(one.offset + one.nbytes == other.offset for one, other in pairwise(places))


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("tensors", [3, 12, 30])
def test_a_stopped_run_goes_on_to_the_same_bytes(source: Path, made: Path, whole: Path, tmp_path: Path, tensors: int) -> None:
    heard = 0

    def stop(done: int, total: int) -> None:
        nonlocal heard
        heard += 1
        if heard == tensors:
            raise StoppedError

    out = tmp_path / whole.name  # the model card names it
    with pytest.raises(StoppedError):
        quantize_checkpoint(source, out, REQUEST, on_bytes=stop)
    record = quantize_checkpoint(source, out, REQUEST, resume=True)
    assert record.resumed_seconds > 0
    assert sums(out) == sums(whole)
    assert [sha256_of(shard) for shard in sorted(made.glob("*.safetensors"))] == [
        sha256_of(shard) for shard in sorted(whole.glob("*.safetensors"))
    ]


def test_scales_whose_sum_is_infinite_are_refused_with_the_tensor(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    config = DbrxConfig.from_pretrained(str(source))
    write_checkpoint(config, folder, seed=6)
    with Checkpoint(folder) as checkpoint:
        path, info = checkpoint.path_of("lm_head.weight"), checkpoint.infos["lm_head.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + info.nbytes] = torch.full((info.nbytes // 2,), 3e38).bfloat16().view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor lm_head\.weight: the sum of a matrix' scales must stay below 3\.4e38"):
        quantize_checkpoint(folder, tmp_path / "out", REQUEST)


def test_a_quantization_config_names_the_format(made: Path) -> None:
    tensors = json.loads((made / "config.json").read_text())["quantization_config"]["tensors"]
    assert tensors["lm_head.weight"] == {"format": "nf4-double", "group_size": 64}
