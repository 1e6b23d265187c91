"""GGUF files read in pieces, and repacked without rounding: the bits of what the gguf package dequantizes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors, oriented
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.cpu.repack_gguf import REPACKED, repack
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.model.loading import eos_ids
from dbrx_q.sources.gguf_header import can_dequantize, read_header
from dbrx_q.sources.gguf_names import gguf_name, gguf_shape
from dbrx_q.sources.gguf_weights import GgufWeights
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
Q4_0 = DATA / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf"
KINDS = [kind.name for kind in GGMLQuantizationType if can_dequantize(kind)]
HARD = "<|im_start|>user\nit's π≈3.14159, 1234567 \t\n\n  x\r\n<|im_end|>\n"
# What llama-tokenize (build 0c1e570) prints for the bundled file and this text; the whole book has the same 92757 ids there as here.
LLAMA_CPP_IDS = [4093, 415, 267, 198, 272, 405, 220, 139, 222, 158, 231, 230, 18, 13, 2789, 16, 20, 24, 11, 220, 1960, 18, 19, 20, 21, 22]
LLAMA_CPP_IDS += [220, 197, 298, 220, 220, 87, 201, 198, 4094, 198]
V, D, F, E = 8, 256, 512, 3
NUMBERS = {
    "embedding_length": D,
    "block_count": 1,
    "feed_forward_length": F,
    "expert_count": E,
    "expert_used_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}


@functools.cache
def metadata() -> dict[str, tuple[Any, Any]]:
    """Values and types of the bundled file's keys, for the sizes above and a vocabulary of 8."""
    fields = {name: (field.contents(), field.types) for name, field in gguf.GGUFReader(Q4_0).fields.items() if name[:5] != "GGUF."}
    for name in ("tokens", "token_type", "merges"):
        fields[f"tokenizer.ggml.{name}"] = fields[f"tokenizer.ggml.{name}"][0][:V], fields[f"tokenizer.ggml.{name}"][1]
    for name, value in NUMBERS.items():
        fields[f"dbrx.{name}"] = value, fields[f"dbrx.{name}"][1]
    return fields


def tensors() -> list[DenseTensor]:
    sizes = {"ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": 2}
    return dense_tensors(DbrxConfig(d_model=D, n_heads=4, n_layers=1, vocab_size=V, attn_config={"kv_n_heads": 2}, ffn_config=sizes))


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random bytes [.., bytes of a row] as blocks of a type; no float16 in them is NaN or infinite."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // block * block_bytes), dtype=np.uint8)
    return data & 0xBB  # clears a bit of the exponent of any float16, bfloat16 and float32


def write(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Write a file with matrices of a type; returns what each tensor was written from, as GGUF stores it."""
    fields, stored = dict(metadata()), {}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture")[0])
    for name, (value, types) in fields.items():
        writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for seed, tensor in enumerate(tensors()):
        plain = len(tensor.shape) == 1 or tensor.role == "router"
        data = random_blocks("F32" if plain else kind, gguf_shape(tensor), seed)
        stored[tensor.name] = data.view(np.float32) if plain or kind == "F32" else data.view(np.float16) if kind == "F16" else data
        writer.add_tensor(gguf_name(tensor.name), stored[tensor.name], raw_dtype=None if plain else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def expected(tensor: DenseTensor, data: np.ndarray, kind: str) -> torch.Tensor:
    """The tensor of a plain checkpoint, in float32, by the gguf package."""
    plain = data.dtype == np.float32
    values = torch.from_numpy(data if plain else gguf.dequantize(data, GGMLQuantizationType[kind]))
    return (values.transpose(1, 2) if tensor.transposed else values).reshape(tensor.shape)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.float().contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_whole_and_in_pieces(kind: str, tmp_path: Path) -> None:
    stored = write(tmp_path / "x.gguf", kind)
    with GgufWeights(tmp_path / "x.gguf") as weights:
        for tensor in tensors():
            values = expected(tensor, stored[tensor.name], kind)
            read = weights.read(tensor.name)
            assert read.dtype == weights.dtype_of(tensor.name)
            assert torch.equal(bits(read), bits(values)), tensor.name
            rows = tensor.shape[0] // max(1, tensor.experts)
            for first, count in ((0, 1), (rows - 3, 3), (rows * max(0, tensor.experts - 1) + 1, rows - 2)):
                piece = weights.read_rows(tensor.name, first, count)
                assert piece.is_contiguous()
                assert torch.equal(bits(piece), bits(values[first : first + count])), (tensor.name, first, count)
        head = weights.label_of("lm_head.weight"), weights.nbytes_of("lm_head.weight")
        assert head == (f"GGUF {kind}", stored["lm_head.weight"].nbytes)
        assert weights.sizes == {"x.gguf": (tmp_path / "x.gguf").stat().st_size}


@pytest.mark.parametrize("kind", KINDS)
def test_types_with_an_exact_format_are_repacked(kind: str, tmp_path: Path) -> None:
    stored = write(tmp_path / "x.gguf", kind)
    with GgufWeights(tmp_path / "x.gguf") as weights:
        for tensor in tensors():
            fmt = weights.exact_format(tensor.name)
            if len(tensor.shape) == 1 or tensor.role == "router" or kind not in REPACKED:
                assert fmt is None
                continue
            assert fmt == REPACKED[kind]
            values = torch.from_numpy(gguf.dequantize(stored[tensor.name], GGMLQuantizationType[kind]))
            for expert in range(tensor.experts) if tensor.experts else (-1,):
                weight = weights.packed(tensor.name, expert)
                assert {name: (part.dtype, tuple(part.shape)) for name, part in weight.parts.items()} == {
                    part.name: (part.dtype, part.shape) for part in fmt.parts(*tensor.matrix)
                }
                assert torch.equal(bits(dequantize(weight, torch.float32)), bits(values[expert] if tensor.experts else values))


@pytest.mark.parametrize("kind", REPACKED)
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_repacked_blocks_have_the_bits_of_dequantized_ones(kind: str, groups: int) -> None:
    """All codes, scales of either sign, zero and subnormal, and what the gguf package itself quantizes."""
    rng = np.random.default_rng(groups)
    N, K, block_bytes = 40, 32 * groups, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = rng.integers(0, 256, (N, groups, block_bytes), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(0, 252, (N, groups))  # 2^-128 to 2^123
    else:
        halves = (rng.standard_normal((N, groups, 2)) * 10.0 ** rng.integers(-7, 4, (N, groups, 1))).astype(np.float16)
        halves[0], halves[1] = 0.0, -0.0
        floats = 4 if kind in ("Q4_1", "Q5_1") else 2
        blocks[..., :floats] = halves.view(np.uint8).reshape(N, groups, 4)[..., :floats]
    cases = [blocks.reshape(N, -1)]
    if kind != "IQ4_NL":  # which the package does not quantize to
        weights = rng.standard_normal((N, K)).astype(np.float32)
        weights[0], weights[1] = 0, np.abs(weights[1])
        cases.append(gguf.quantize(weights, GGMLQuantizationType[kind]))
    for data in cases:
        values = torch.from_numpy(gguf.dequantize(data, GGMLQuantizationType[kind]))
        assert torch.isfinite(values).all()
        assert torch.equal(bits(dequantize(repack(torch.from_numpy(data), kind, K), torch.float32)), bits(values))


@pytest.mark.parametrize("name", ["gguf-blocks-of-32", "gguf-blocks-of-256"])
def test_files_of_llama_cpp_have_the_bits_that_ggml_dequantizes(name: str) -> None:
    folder = DATA / "layouts" / name
    rows = np.load(folder / "reference.npz")  # the last rows of each tensor, by ggml's C code
    with GgufWeights(min(folder.glob("*.gguf"))) as weights:
        names = {gguf_name(tensor): tensor for tensor in weights.tensors}
        assert len(rows.files) >= 7
        for stored in rows.files:
            tensor = weights.tensors[names[stored]]
            values = weights.read(tensor.name)
            if tensor.experts:
                values = oriented(values, tensor).flatten(0, 1)
            assert torch.equal(bits(values[-len(rows[stored]) :]), bits(torch.from_numpy(rows[stored]))), stored
            if weights.exact_format(tensor.name) is not None:
                values = dequantize(weights.packed(tensor.name, tensor.experts - 1), torch.float32)
                assert torch.equal(bits(values[-len(rows[stored]) :]), bits(torch.from_numpy(rows[stored]))), stored


def test_metadata_are_what_the_package_reads() -> None:
    fields = gguf.GGUFReader(Q4_0).fields
    metadata, _ = read_header(Q4_0)
    assert metadata == {name: field.contents() for name, field in fields.items()}
    assert any(isinstance(value, list) for value in metadata.values())


def test_a_damaged_scale_is_refused_by_every_way_to_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, "Q4_0")
    with GgufWeights(path) as weights:
        name = "transformer.blocks.0.ffn.experts.mlp.v1"
        stored = weights.parts.tensors[gguf_name(name)]
        with open(path, "r+b") as file:
            file.seek(stored.offset + stored.nbytes // E)  # the first block of the second expert
            file.write(np.float16(np.inf).tobytes())
        weights.packed(name, 0)
        for read in (
            lambda: weights.packed(name, 1),
            lambda: weights.read(name),
            lambda: weights.read_rows(name, F, 1),
        ):
            with pytest.raises(CheckpointError, match=r"x\.gguf: tensor blk\.0\.ffn_up_exps\.weight must be finite"):
                read()
        weights.read_rows(name, F + 1, F - 1)
        with open(path, "r+b") as file:
            file.truncate(stored.offset + 5)
        with pytest.raises(CheckpointError, match=f"the file became shorter while it was read; byte {stored.offset + 5} is gone"):
            weights.read(name)


def test_files_are_read_and_not_mapped(tmp_path: Path) -> None:
    """Pages of a mapped file would count as memory of this process, which a file may exceed."""
    write(tmp_path / "x.gguf", "Q4_0")
    with GgufWeights(tmp_path / "x.gguf") as weights:
        weights.read("lm_head.weight")
        weights.packed("transformer.blocks.0.ffn.experts.mlp.w2", 0)
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(tmp_path) not in maps.read_text(encoding="utf-8")


def test_a_copy_gets_the_same_configuration_and_tokenizer(tmp_path: Path) -> None:
    with GgufWeights(Q4_0) as weights:
        assert weights.small_files is None
        assert DbrxConfig.from_dict(weights.raw_config, source="x") == weights.config
        assert weights.raw_config["torch_dtype"] == "bfloat16"
        weights.write_small_files(tmp_path)
        ours = weights.tokenizer
    copy, original = DbrxTokenizer.from_pretrained(tmp_path), DbrxTokenizer.from_pretrained(NANO)
    book = (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8")
    assert copy.encode(HARD) == LLAMA_CPP_IDS
    for text in (book, HARD):
        assert copy.encode(text) == ours.encode(text) == original.encode(text)
    assert copy.special_tokens == ours.special_tokens
    turns = [{"role": "user", "content": "Hello"}]
    assert copy.apply_chat_template(turns, tokenize=False) == original.apply_chat_template(turns, tokenize=False)
    assert eos_ids(tmp_path) == weights.eos_token_ids == (4092, 4094)
