"""Checkpoints in trellis formats do what others do: loading, tiers of memory, saving, transformers, verifying and export.

Their streams are random; `tests/quantize` quantizes real ones.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import Budget, DbrxForCausalLM, Machine, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, tensor_formats
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.experts.cpu_store import CpuExpertStore
from dbrx_q.experts.fallback import FALLBACK_FOLDER
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.kernels.formats.registry import FORMATS, offered_formats
from dbrx_q.kernels.formats.trellis import GROUP_SIZES
from dbrx_q.kernels.formats.weights import dequantize, dequantize_range
from dbrx_q.planning.machine import Gpu
from dbrx_q.planning.offloading import pinned_bytes

from .trellis_checkpoints import mixed, random_streams, write_plain

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"
PROMPT = [5, 17, 200, 3, 901, 44, 7]
IDS = torch.tensor([PROMPT])
TRELLIS = [name for name, record in FORMATS.items() if record.trellis]
RULES = ("w1=trellis2", "v1=trellis3-fast", "w2=trellis4:64", "blocks.1.experts=trellis3:64", "attention=trellis4", "head=trellis3:64")


@pytest.fixture(scope="module")
def plain(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small plain checkpoint."""
    return write_plain(tmp_path_factory.mktemp("trellis") / "plain", nano)


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    """Its copy with trellis formats of all bits, of both group sizes, in two layers of different kinds; the embedding is int8."""
    return random_streams(plain, plain.parent / "packed", mixed(*RULES, "embedding=int8:64"))


@pytest.fixture(scope="module")
def logits(packed: Path) -> torch.Tensor:
    """Of `IDS`, in float32."""
    return DbrxForCausalLM.from_pretrained(packed, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("name", TRELLIS)
def test_any_rows_of_a_weight_are_dequantized(name: str) -> None:
    record = FORMATS[name]
    parts = {
        part.name: torch.randint(0, 256, part.shape, dtype=torch.uint8) if part.name == "qweight" else torch.rand(part.shape).half()
        for part in record.parts(300, 128, 64)
    }
    weight = record.weight.of(parts, 64)
    whole = dequantize(weight)
    for first, end in ((0, 300), (0, 1), (127, 129), (128, 256), (130, 131), (299, 300), (256, 300)):
        rows = dequantize_range(weight, first, end)
        assert rows.shape == (end - first, 128)
        assert torch.equal(rows, whole[first:end])


@pytest.mark.parametrize("name", TRELLIS)
def test_stacks_and_large_weights_are_dequantized_some_tiles_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = FORMATS[name]
    stack = {
        part.name: torch.randint(0, 256, (2, 3, *part.shape), dtype=torch.uint8)
        if part.name == "qweight"
        else torch.rand(2, 3, *part.shape).half()
        for part in record.parts(300, 64, 64)
    }
    weight = record.weight.of(stack, 64)
    whole = dequantize(weight)
    assert whole.shape == weight.shape == (2, 3, 300, 64)
    assert torch.equal(dequantize(weight[1][2]), whole[1, 2])
    monkeypatch.setattr("dbrx_q.kernels.formats.trellis._PIECE_ELEMENTS", 1)
    assert torch.equal(dequantize(weight), whole)


@pytest.mark.parametrize("name", TRELLIS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bits_per_weight_are_those_of_the_code_and_16_per_row(name: str, group_size: int) -> None:
    record = FORMATS[name]

    def bits(N: int, K: int) -> float:
        return 8 * sum(part.nbytes for part in record.parts(N, K, group_size)) / (N * K)

    assert bits(10752, 6144) == record.bits + 16 / 6144  # DBRX's w1 and v1
    assert bits(6144, 10752) == record.bits + 16 / 10752
    assert bits(192, 128) == record.bits * 256 / 192 + 16 / 128  # the last tile is filled up


def documented_indices() -> dict[str, Any]:
    """The formulas of the table in docs/formats.md, by format."""
    rows = re.findall(r"^\| (trellis\S+) \| (\d+) \| (\d+) \| `(.+)` \|$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    return {name: (int(bits), int(levels), compile(formula, name, "eval")) for name, bits, levels, formula in rows}


def documented_levels() -> dict[str, tuple[int, ...]]:
    """The lists of levels in docs/formats.md, by format."""
    lists = re.findall(r"^(trellis\S+):((?:\s+-?\d+)+)$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    return {name: tuple(map(int, levels.split())) for name, levels in lists}


@pytest.mark.parametrize("name", TRELLIS)
def test_a_reader_of_the_document_decodes_the_same_weight(name: str) -> None:
    """In whole numbers, by the words of docs/formats.md alone."""
    record, (state_bits, n_levels, formula) = FORMATS[name], documented_indices()[name]
    assert record.trellis is not None
    levels, k, (N, K, G) = documented_levels()[name], record.bits, (140, 128, 64)
    assert levels == record.trellis.levels
    assert len(levels) == n_levels
    generator = torch.Generator().manual_seed(2)
    qweight = torch.randint(0, 256, (2, 16 * k * K), dtype=torch.uint8, generator=generator)
    scales = torch.rand(N, 1, generator=generator).half()
    rotated = torch.empty(N, K, dtype=torch.float64)
    for column in range(K):
        q, c = divmod(column, 4)
        for tile in range(2):
            stream = 0
            for i in range(16):
                for j in range(k):
                    stream |= int(qweight[tile, 64 * k * q + 64 * j + 4 * i + c]) << 8 * (k * i + j)
            stream |= stream << 128 * k  # circular
            for row in range(128 * tile, min(N, 128 * tile + 128)):
                v, i = divmod(row - 128 * tile, 16)
                state = stream >> k * (8 * i + v) & (1 << state_bits) - 1
                rotated[row, column] = levels[eval(formula, {"s": state})]
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < G:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    expected = (rotated * scales.double()).view(N, -1, G) @ hadamard / G**0.5
    signs = torch.tensor([-1.0 if lowbias32(j) & 1 else 1.0 for j in range(K)], dtype=torch.float64)
    weight = dequantize(record.weight.of({"qweight": qweight, "scales": scales}, G))
    torch.testing.assert_close(weight.double(), expected.reshape(N, K) * signs, rtol=1e-5, atol=1e-5)


def lowbias32(j: int) -> int:
    """As docs/formats.md has it."""
    j ^= j >> 16
    j = j * 0x7FEB352D % 2**32
    j ^= j >> 15
    j = j * 0x846CA68B % 2**32
    return j ^ j >> 16


def test_mapped_and_read_weights_generate_the_same(packed: Path) -> None:
    mapped, read = (DbrxForCausalLM.from_pretrained(packed, use_mmap=use_mmap) for use_mmap in (True, False))
    assert mapped(IDS).logits.equal(read(IDS).logits)
    tokens = [generate(model, [PROMPT], max_new_tokens=4)[0].token_ids for model in (mapped, read)]
    assert tokens[0] == tokens[1]


def test_float32_export_has_the_original_basis_bit_for_bit(
    packed: Path, logits: torch.Tensor, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    assert cli("export", packed, tmp_path / "out", "--to", "transformers", "--dtype", "float32").code == 0
    with Checkpoint(packed) as streams, Checkpoint(tmp_path / "out") as exported:
        assert len(streams.formats) == 12
        for name in streams.formats:
            tensor = streams.tensors[name]
            matrices = [dequantize(streams.packed(name, expert)) for expert in (range(tensor.experts) if tensor.experts else [-1])]
            expected = torch.cat([matrix.T if tensor.transposed else matrix for matrix in matrices])
            assert torch.equal(exported.read(name), expected), name
            if not tensor.experts:
                assert torch.equal(streams.read_rows(name, 101, 27), expected[101:128])
    plain = DbrxForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert (plain - logits).abs().max() <= 1e-3 * plain.abs().max()  # activations are rounded to 16 bits for products with levels


def test_exports_in_other_formats_need_the_original(packed: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    for arguments in (("--to", "gguf"), ("--to", "gguf", "--type", "q4_0"), ("--to", "mlx", "--bits", 4), ("--to", "mlx")):
        outcome = cli("export", packed, tmp_path / "out", *arguments)
        assert outcome.code == 2, arguments
        assert "original" in outcome.err
    assert not (tmp_path / "out").exists()


def on_host(experts: int, folder: Path, **options: Any) -> Budget:
    """A budget of host memory that leaves so many experts on disk."""
    whole = Budget(Machine(1 << 30), context=64, step_tokens=8, direct=False, **options)
    model = DbrxForCausalLM.from_pretrained(folder, budget=whole)
    placement = model.placement
    model.close()
    assert placement is not None
    return replace(whole, machine=Machine(placement.host.total - experts * placement.expert_bytes // placement.experts))


def test_experts_on_disk_give_the_bits_of_resident_ones(packed: Path) -> None:
    """Slots hold the experts of either layer, whose parts differ."""
    resident = DbrxForCausalLM.from_pretrained(packed)
    with closing(DbrxForCausalLM.from_pretrained(packed, budget=on_host(8, packed))) as model:
        assert isinstance(model.expert_store, CpuExpertStore)
        assert model.placement is not None
        assert model.placement.disk_experts >= 8
        for token in (5, 900):
            ids = torch.tensor([[token]])
            assert torch.equal(model(ids).logits, resident(ids).logits)
        assert model.expert_store.stats().disk_bytes > 0


@pytest.mark.parametrize("miss_policy", ["hybrid", "copy", "cpu"])
def test_slots_on_gpus_give_the_bits_of_resident_experts(packed: Path, miss_policy: str) -> None:
    """The GPU is a part of host memory."""
    whole = Budget(Machine(1 << 30, (Gpu(1 << 32),)), context=64, step_tokens=8, devices=(torch.device("cpu"),), direct=False)
    with closing(DbrxForCausalLM.from_pretrained(packed, budget=whole)) as model:
        assert model.placement is not None
        needed, expert = model.placement.gpus[0].total, model.placement.expert_bytes // model.placement.experts
    machine = Machine(pinned_bytes(Gpu.link) + 500_000, (Gpu(needed - 3 * expert),))
    budget = replace(whole, machine=machine, miss_policy=miss_policy)
    resident = DbrxForCausalLM.from_pretrained(packed)
    with closing(DbrxForCausalLM.from_pretrained(packed, budget=budget)) as model:
        assert isinstance(model.expert_store, GpuExpertStore)
        for token in (5, 900):
            ids = torch.tensor([[token]])
            assert torch.equal(model(ids).logits, resident(ids).logits)


def test_trellis2_is_a_fallback_copy_of_int4(plain: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = random_streams(plain, tmp_path / "int4", mixed("experts=int4:64"))
    random_streams(plain, folder / FALLBACK_FOLDER, mixed("w1=trellis2", "v1=trellis2", "w2=trellis2:64"))
    budget = on_host(3, folder, fallback=True)
    budget = replace(budget, upgrade=False)
    with closing(DbrxForCausalLM.from_pretrained(folder, budget=budget)) as model:
        before = model.expert_store.stats()
        for token in (5, 900):
            assert model(torch.tensor([[token]])).logits.isfinite().all()
        stats = model.expert_store.stats() - before
        assert stats.fallback_hits > 0
        assert stats.disk_bytes == 0
    assert cli("verify", folder).code == 0


def test_save_pretrained_writes_the_same_bytes(packed: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    DbrxForCausalLM.from_pretrained(packed).save_pretrained(tmp_path / "saved")
    for shard in packed.glob("*.safetensors"):
        assert (tmp_path / "saved" / shard.name).read_bytes() == shard.read_bytes()
    assert cli("verify", tmp_path / "saved").code == 0


def test_transformers_loads_computes_and_saves(packed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import dbrx_q.transformers  # noqa: F401 # registers the quantization method

    theirs = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(theirs(IDS).logits, DbrxForCausalLM.from_pretrained(packed)(IDS).logits)
    theirs.save_pretrained(tmp_path / "saved")
    for shard in packed.glob("*.safetensors"):
        assert (tmp_path / "saved" / shard.name).read_bytes() == shard.read_bytes()


def test_a_corrupted_stream_is_some_weight_and_verify_finds_it(packed: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Every pattern of bits decodes, so that the hash alone can tell."""
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    (shard,) = folder.glob("*.safetensors")
    name = "transformer.blocks.0.ffn.experts.mlp.w1.2.qweight"
    with SafetensorsFile(shard) as file:
        offset, nbytes = file.tensors[name].offset, file.tensors[name].nbytes
    data = bytearray(shard.read_bytes())
    data[offset : offset + nbytes] = bytes(255 - byte for byte in data[offset : offset + nbytes])
    shard.write_bytes(data)
    assert DbrxForCausalLM.from_pretrained(folder)(IDS).logits.isfinite().all()
    outcome = cli("verify", folder)
    assert outcome.code == 1
    assert f"{shard.name}: differs" in outcome.err


def test_a_format_of_a_newer_version_is_named(packed: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    original = json.dumps(config)
    config["quantization_config"]["tensors"]["lm_head.weight"] = {"format": "trellis5", "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight': format and group_size must be one of int4:32, .*trellis2:128.*trellis5.*newer version"
    ):
        DbrxForCausalLM.from_pretrained(folder)
    for command in ("inspect", "plan"):
        outcome = cli(command, folder)
        assert outcome.code == 2
        assert "pip install -U dbrx_q" in outcome.err
    for keys, message in (
        ({"format_version": 2}, "found 'dbrx_q' and 2"),
        ({"tensors": {"lm_head.weight": {"format": "trellis2", "group_size": 64, "state_bits": 16}}}, "found 'state_bits'"),
    ):
        config = json.loads(original)
        config["quantization_config"] |= keys
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"{message}\. .*newer version.*pip install -U"):
            DbrxForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("fmt", offered_formats(), ids=str)
def test_a_group_size_that_does_not_divide_the_inputs_is_refused(fmt: TensorFormat) -> None:
    """By config.json alone: the parts of trellis formats have the same shapes with every group size."""
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    entry = {"format": fmt.format, "group_size": fmt.group_size}
    for inputs in (96, 192, 128):
        config = DbrxConfig(d_model=inputs, n_heads=2, n_layers=1, attn_config={"kv_n_heads": 1})
        config.quantization_config = {"quant_method": "dbrx_q", "format_version": 1, "tensors": {name: entry}}
        if inputs % fmt.group_size == 0:
            assert tensor_formats(config, "config.json") == {name: fmt}
        else:
            message = f"found group size {fmt.group_size} and {inputs} elements"
            with pytest.raises(CheckpointError, match=rf"config\.json: {name}: the group size must divide the reduction axis; {message}"):
                tensor_formats(config, "config.json")
