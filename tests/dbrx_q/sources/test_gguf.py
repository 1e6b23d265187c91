"""GGUF files compared with weights that this test dequantizes, in transformers' model; damaged and unsupported files."""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from dbrx_q.errors import CheckpointError, DbrxError, UnsupportedError
from dbrx_q.eval.perplexity import perplexity
from dbrx_q.eval.windows import Protocol
from dbrx_q.kernels.formats import weights as packed_weights
from dbrx_q.model.layers import PackedWeight
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.sources.gguf_config import config_of
from dbrx_q.sources.gguf_file import GgufParts, open_parts
from dbrx_q.sources.gguf_tokenizer import tokenizer_of
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import ConvertedSource, StreamedExpertStore
from dbrx_q.sources.tokenizers_agree import check_same_tokenizer
from dbrx_q.tokenizer.bpe_file import TokenizerWarning
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
Q4_0 = DATA / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf"
CPU = torch.device("cpu")
BOOK = (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8")
HARD = [
    "",
    "👩‍👩‍👧‍👦👍🏽 🏴‍☠️🇩🇪 a👩‍🚀b",
    "e\u0301 a\u030a\u0323 \u0301start नि क्षि 각",
    "a\r\nb\r\n\r\n  c\r\rd\n\r\n \r\n",
    " " * 300 + "x\tif x:\n\t\treturn\t\t1\n \t \t",
    "a\u0085b\u00a0c\u2028d\u3000e \u200b\ufeff x\x1c\x1d\x0b\x0c",
    "it'ſ 'ſ 'S 'Ll 'VE don'T we'rE I'M '' ''s'''t",
    "0123456789 1 12 1234 3.14159 1,000,000 ½ ⅷ ²³ 𝟙𝟚𝟛 ๑๒๓ ١٢٣٤٥",
    "\0a\0 \x7f\x01 \u0378 \ue000",
    "<|im_end|><|endoftext|> <|im_end <|pad|>",
    "^" * 100 + "\n" * 20 + "!?" * 30,
]
NAMES = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
    "attn_norm": "norm_attn_norm.norm_1",
    "attn_output_norm": "norm_attn_norm.norm_2",
    "attn_qkv": "norm_attn_norm.attn.Wqkv",
    "attn_output": "norm_attn_norm.attn.out_proj",
    "ffn_gate_inp": "ffn.router.layer",
    "ffn_gate_exps": "ffn.experts.mlp.w1",
    "ffn_up_exps": "ffn.experts.mlp.v1",
    "ffn_down_exps": "ffn.experts.mlp.w2",
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def dequantize(data: np.ndarray, kind: str) -> np.ndarray:
    """Dequantize llama.cpp's blocks of 32, as in its ggml-common.h: a float16 scale, then 4 bits (low halves first, minus 8) or int8."""
    if kind == "F32":
        return data
    blocks = data.reshape(-1, {"Q4_0": 18, "Q8_0": 34}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, 2:]
    values = np.concatenate([codes & 15, codes >> 4], 1).astype(np.int8) - 8 if kind == "Q4_0" else codes.view(np.int8)
    return (scale * values.astype(np.float32)).reshape(*data.shape[:-1], -1)


@pytest.fixture(scope="module")
def dequantized() -> dict[str, torch.Tensor]:
    weights = {}
    for tensor in gguf.GGUFReader(Q4_0).tensors:
        values = dequantize(np.asarray(tensor.data), tensor.tensor_type.name)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            layer, name = name.removeprefix("blk.").split(".")
            plain = f"transformer.blocks.{layer}.{NAMES[name]}"
        else:
            plain = NAMES[name]
        if name.endswith("_exps"):
            experts = values.transpose(0, 2, 1) if name == "ffn_down_exps" else values
            values = experts.reshape(-1, experts.shape[-1])
        weights[plain if name.endswith("_exps") else f"{plain}.weight"] = torch.from_numpy(values.copy())
    return weights


@pytest.fixture(scope="module")
def oracle(dequantized: dict[str, torch.Tensor]) -> transformers.DbrxForCausalLM:
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    model = transformers.DbrxForCausalLM(config).float().eval()
    model.load_state_dict(dequantized)
    return model


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return open_source(Q4_0).load(dtype=None, device=CPU)


Change = Callable[[dict[str, tuple[Any, Any]], dict[str, tuple[np.ndarray, Any]]], None]


@functools.cache
def bundled() -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[np.ndarray, Any]]]:
    """Metadata (value, types) and tensors (data, type) of the bundled file."""
    reader = gguf.GGUFReader(Q4_0)
    fields = {name: (field.contents(), field.types) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: (np.asarray(tensor.data), tensor.tensor_type) for tensor in reader.tensors}


def rewrite(path: Path, change: Change, *, full_vocabulary: bool = False, split: int = 0) -> Path:
    """Write the bundled file after `change` with the gguf package; with a vocabulary of 8, which opens faster, unless `full_vocabulary`."""
    fields, tensors = copy.deepcopy(bundled()[0]), dict(bundled()[1])
    if not full_vocabulary:
        for name in ("tokens", "token_type", "merges"):
            key = f"tokenizer.ggml.{name}"
            fields[key] = fields[key][0][:8], fields[key][1]
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = tensors[name][0][:8], tensors[name][1]
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture")[0], split_max_tensors=split)
    for name, (value, types) in fields.items():
        writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def setting(key: str, value: object) -> Change:
    return lambda fields, tensors: fields.update({key: (value, fields[key][1] if key in fields else [gguf.GGUFValueType.STRING])})


def typed(key: str, value: float) -> Change:
    """A key with GGUF's type of its value."""
    kind = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}[type(value)]
    return lambda fields, tensors: fields.update({key: (value, [kind])})


def without(name: str) -> Change:
    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        assert fields.pop(name, None) or tensors.pop(name, None)

    return change


def with_tensor(name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType | None = None) -> Change:
    return lambda fields, tensors: tensors.update({name: (data, kind)})


def test_every_weight_equals_the_dequantized_one(model: DbrxForCausalLM, dequantized: dict[str, torch.Tensor]) -> None:
    loaded = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):  # its codes are those of the file
            values = packed_weights.dequantize(module.value)
            loaded[name] = (values.transpose(1, 2) if name.endswith("w2") else values).reshape(dequantized[name].shape)
    assert loaded.keys() == dequantized.keys()
    for name, values in dequantized.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], values), name


def test_logits_and_perplexity_equal_transformers(model: DbrxForCausalLM, oracle: transformers.DbrxForCausalLM) -> None:
    source = open_source(Q4_0)
    ids = source.tokenizer().encode(BOOK[:3000])
    context = 128
    losses = []
    for first in range(0, len(ids) - context + 1, context):
        window = torch.tensor([ids[first : first + context]])
        with torch.no_grad():
            logits = oracle(window).logits
        torch.testing.assert_close(model(window).logits, logits, rtol=1e-4, atol=1e-3)
        losses.append(-logits[0, :-1].double().log_softmax(-1).gather(1, window[0, 1:, None])[:, 0])
    expected = float(torch.cat(losses).mean().exp())
    assert math.isclose(perplexity(model, ids, Protocol.of(context)).perplexity, expected, rel_tol=1e-4)


def test_experts_dequantized_layer_by_layer_give_the_same_bits(model: DbrxForCausalLM) -> None:
    streamed = open_source(Q4_0).load(dtype=None, device=CPU, stream=True)
    assert isinstance(streamed.transformer.expert_store, StreamedExpertStore)
    ids = torch.tensor([DbrxTokenizer.from_pretrained(NANO).encode(BOOK[:600])])
    assert torch.equal(streamed(ids).logits, model(ids).logits)


def test_properties_are_known_before_loading() -> None:
    source = open_source(Q4_0)
    plain = open_source(NANO)
    for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "rope_theta", "attn_config", "ffn_config"):
        ours, theirs = getattr(source.config, name), getattr(plain.config, name)
        if name == "ffn_config":  # training's values are not in a GGUF file
            ours, theirs = ((c.ffn_hidden_size, c.moe_num_experts, c.moe_top_k, c.moe_normalize_expert_weights) for c in (ours, theirs))
        assert ours == theirs, name
    assert source.parameters == plain.parameters
    bits = {"F32": 32, "Q4_0": 4.5, "Q8_0": 8.5}
    stored = sum(bits[tensor.tensor_type.name] * int(tensor.n_elements) for tensor in gguf.GGUFReader(Q4_0).tensors)
    assert source.bits_per_weight == stored / plain.parameters
    assert round(source.bits_per_weight, 2) == 4.81  # as llama.cpp prints it
    assert source.format == "GGUF Q4_0"
    assert isinstance(source, ConvertedSource)
    assert source.load(dtype=torch.bfloat16, device=CPU, stream=True).eos_token_ids == (4092, 4094)


def test_without_a_file_type_the_format_is_the_most_common_one(tmp_path: Path) -> None:
    assert open_source(rewrite(tmp_path / "a.gguf", without("general.file_type"))).format == "GGUF Q4_0"
    assert open_source(rewrite(tmp_path / "b.gguf", setting("general.file_type", 15))).format == "GGUF Q4_K_M"
    assert open_source(rewrite(tmp_path / "c.gguf", setting("general.file_type", 1024 + 30))).format == "GGUF IQ4_XS"
    assert open_source(rewrite(tmp_path / "d.gguf", setting("general.file_type", 999))).format == "GGUF Q4_0"


def test_the_tokenizer_equals_that_of_the_checkpoint() -> None:
    ours, theirs = open_source(Q4_0).tokenizer(), DbrxTokenizer.from_pretrained(NANO)
    check_same_tokenizer(theirs, ours, BOOK)
    for text in HARD:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, split_special_tokens=True) == theirs.encode(text, split_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_padding_rows_are_no_tokens(tmp_path: Path) -> None:
    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        tokens, types = fields["tokenizer.ggml.tokens"][0], fields["tokenizer.ggml.token_type"][0]
        tokens[4093], types[4093] = "[PAD4093]", 4
        tokens[4094], types[4094] = "[PAD4094]", 5

    tokenizer = open_source(rewrite(tmp_path / "padded.gguf", change, full_vocabulary=True)).tokenizer()
    assert [tokenizer.has_token(token_id) for token_id in (4092, 4093, 4094, 4095)] == [True, False, False, True]


def test_a_split_file(tmp_path: Path, model: DbrxForCausalLM) -> None:
    rewrite(tmp_path / "nano.gguf", lambda fields, tensors: None, full_vocabulary=True, split=12)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"nano-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    ids = torch.arange(64)[None]
    expected = model(ids).logits
    first, last = open_source(parts[0]), open_source(parts[2])
    assert torch.equal(first.load(dtype=None, device=CPU).forward(ids).logits, expected)
    assert (first.sha256(), first.nbytes, first.format) == (last.sha256(), last.nbytes, last.format)
    assert first.nbytes == open_source(Q4_0).nbytes
    parts[2].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"nano-00003-of-00003\.gguf is not"):
        open_source(parts[0])
    with pytest.raises(CheckpointError, match=r"alone.gguf: must be part 1 of 1 by its name; its metadata says part 2 \(from 0\) of 3"):
        open_source(tmp_path / "alone.gguf")


BAD = {
    "architecture": (setting("general.architecture", "llama"), "general.architecture must be 'dbrx'; found 'llama'"),
    "no key": (without("dbrx.expert_count"), "dbrx.expert_count must be a whole number; found None"),
    "impossible": (setting("dbrx.expert_used_count", 99), "moe_top_k must not exceed"),
    "layers": (setting("dbrx.block_count", 1 << 30), "dbrx.block_count says 1073741824 layers; found 35 tensors"),
    "epsilon": (setting("dbrx.attention.layer_norm_epsilon", 1e-6), "layer_norm_epsilon must be DBRX's 1e-05"),
    "rope": (setting("dbrx.rope.scaling.type", "longrope"), "rope.scaling.type must be 'none', 'linear' or 'yarn'; found 'longrope'"),
    "rope factor": (typed("dbrx.rope.scaling.factor", -2.0), r"rope.scaling.factor must be a finite number above 0; found -2\.0"),
    "rotated channels": (
        typed("dbrx.rope.dimension_count", 16),
        "rope.dimension_count must be 32, the channels of a head.*; found 16",
    ),
    "key length": (typed("dbrx.attention.key_length", 64), "attention.key_length must be 32"),
    "not causal": (typed("dbrx.attention.causal", False), "attention.causal must be absent or True, as for DBRX; found False"),
    "unknown rope": (typed("dbrx.rope.dimension_sections", 3), "rope.dimension_sections is no key of a DBRX; found 3"),
    "yarn multiplier": (typed("dbrx.rope.scaling.yarn_log_multiplier", 0.1), "yarn_log_multiplier must be absent or 0"),
    "huge context": (setting("dbrx.context_length", (1 << 32) - 1), "max_seq_len must be at most 16,777,216"),
    "tensor missing": (without("blk.2.ffn_up_exps.weight"), "blk.2.ffn_up_exps.weight is missing"),
    "tensor unknown": (with_tensor("rope_freqs.weight", np.ones(16, np.float32)), "rope_freqs.weight is in no DBRX"),
    "shape": (with_tensor("output_norm.weight", np.ones(64, np.float32)), r"output_norm.weight must have the shape \[128\] by.*\[64\]"),
    "type": (with_tensor("output_norm.weight", np.ones(128, np.float64)), "a type that the gguf package can dequantize; found F64"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_of_other_models_are_refused(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    with pytest.raises(DbrxError, match=message) as caught:
        open_source(rewrite(tmp_path / "bad.gguf", change))
    assert "bad.gguf" in str(caught.value)


@pytest.fixture(scope="module")
def parts() -> GgufParts:
    return open_parts(Q4_0)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"dbrx.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"dbrx.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"dbrx.rope.scale_linear": 2.0, "dbrx.rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"dbrx.rope.scaling.type": "linear", "dbrx.rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"dbrx.rope.scaling.type": "none", "dbrx.rope.scaling.factor": 8.0}, {"rope_type": "default"}),
        ({"dbrx.rope.scaling.factor": 0.0, "dbrx.rope.dimension_count": 32}, {"rope_type": "default"}),
        (
            {"dbrx.rope.scaling.type": "yarn", "dbrx.rope.scaling.factor": 4.0, "dbrx.rope.scaling.original_context_length": 512},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            {"dbrx.rope.scaling.type": "yarn", "dbrx.rope.scaling.factor": 4.0, "dbrx.rope.scaling.yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0},
        ),
    ],
    ids=lambda value: "+".join(value),
)
def test_scalings_of_the_rotary_embedding_are_applied(keys: dict[str, Any], rope: dict[str, Any], parts: GgufParts) -> None:
    assert config_of(replace(parts, metadata=parts.metadata | keys)).rope_parameters == rope | {"rope_theta": 500000.0}


@pytest.mark.parametrize("name", [None, "default", "llama-bpe"])
def test_files_before_may_2024_are_split_by_the_pattern_of_dbrx(name: str | None, parts: GgufParts) -> None:
    metadata = {key: value for key, value in parts.metadata.items() if key != "tokenizer.ggml.pre"}
    metadata |= {} if name is None else {"tokenizer.ggml.pre": name}
    with pytest.warns(TokenizerWarning, match=f"should be 'dbrx'; found {name!r}"):
        tokenizer = tokenizer_of(replace(parts, metadata=metadata))
    check_same_tokenizer(DbrxTokenizer.from_pretrained(NANO), tokenizer, BOOK)


BAD_TOKENIZERS = {
    "model": (setting("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model must be 'gpt2'"),
    "pattern": (
        setting("tokenizer.ggml.pre", "llama3"),
        "tokenizer.ggml.pre must be 'dbrx'; found 'llama3'. Convert the model with a newer",
    ),
    "bos": (setting("tokenizer.ggml.add_bos_token", True), "add_bos_token must be false"),
    "merges": (setting("tokenizer.ggml.merges", ["h e", "Ġ t"]), "model.merges.1. must be in non-decreasing order"),
    "name": (setting("tokenizer.ggml.eos_token_id", 5000), "eos_token_id must be a token's id; found 5000"),
    "types": (setting("tokenizer.ggml.token_type", [1, 1]), "every token must have a type; found 2 for 4096"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_other_tokenizers_are_refused(case: str, parts: GgufParts) -> None:
    change, message = BAD_TOKENIZERS[case]
    fields = {name: (value, []) for name, value in parts.metadata.items()}
    change(fields, {})
    with pytest.raises(DbrxError, match=message) as caught:
        tokenizer_of(replace(parts, metadata={name: value for name, (value, _) in fields.items()}))
    assert Q4_0.name in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 4, 8, 20, 24, 100, 1000, 60_000, 200_000, Q4_0.stat().st_size - 1])
def test_truncated_files_are_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(Q4_0.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"short.gguf: (must be a whole GGUF file|a GGUF file must begin with)"):
        open_source(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    data = Q4_0.read_bytes()
    offset = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # the tensor's type, after its one dimension
    path = tmp_path / "type.gguf"
    path.write_bytes(data[:offset] + (250).to_bytes(4, "little") + data[offset + 4 :])
    with pytest.raises(CheckpointError, match=r"250\)? is not a valid GGMLQuantizationType"):
        open_source(path)
    path = tmp_path / "version.gguf"
    path.write_bytes(data[:4] + (9).to_bytes(4, "little") + data[8:])
    with pytest.raises(CheckpointError, match="version 9"):
        open_source(path)
    path = tmp_path / "count.gguf"
    path.write_bytes(data[:8] + b"\xff" * 16 + data[24:])
    with pytest.raises(CheckpointError, match="must be a whole GGUF file"):
        open_source(path)
    offset = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4 + 4  # the list's length, after two types
    path = tmp_path / "length.gguf"
    path.write_bytes(data[:offset] + (1 << 60).to_bytes(8, "little") + data[offset + 8 : offset + 1000])
    with pytest.raises(CheckpointError, match=f"ValueError: the file ends at byte {offset + 1000}, and {1 << 60} values"):
        open_source(path)
    path = rewrite(tmp_path / "nan.gguf", with_tensor("output_norm.weight", np.full(128, np.nan, np.float32)))
    with pytest.raises(CheckpointError, match=r"output_norm\.weight must be finite"):
        open_source(path).load(dtype=None, device=CPU)


def test_a_missing_gguf_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dbrx_q\[gguf\]'"):
        open_source(Q4_0)
