"""Formats that differ by layer and by matrix: rules select them, the quantizer writes them, and the model computes with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxConfig, DbrxForCausalLM
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, parts_of
from dbrx_q.errors import FormatError, RequestError
from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.model.loading import model_of_weights
from dbrx_q.quantize.pipeline.format_assignment import default_formats, override
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

RULES = [
    "w1=int4:128",
    "v1=int4:32",
    "w2=int8:64",
    "blocks.1.v1=int8:128",
    "blocks.1.w2=nf4",
    "blocks.2-3.experts=int8:32",
    "blocks.2.w1=nf4",
    "blocks.3.w2=int4:128",
    "attention=int4:64",
    "blocks.0.out_proj=nf4-double",
    "blocks.1-2.out_proj=plain",
    "blocks.3.Wqkv=nf4",
    "head=int4:32",
]


def mixed(config: DbrxConfig, *more: str) -> dict[str, TensorFormat]:
    return override(default_formats(config, TensorFormat("int4", 64)), config, [*RULES, *more])


@pytest.fixture(scope="module", params=["int8:128", "plain"], ids=lambda fmt: f"embedding={fmt}")
def checkpoint(request: pytest.FixtureRequest, nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "nano"
    quantize_checkpoint(nano, folder, QuantizationRequest(lambda source: mixed(source.config, f"embedding={request.param}")))
    return folder


def dequantized(folder: Path) -> DbrxForCausalLM:
    """The same model with every weight dequantized to float32."""
    with Checkpoint(folder) as checkpoint:

        def read(tensor: DenseTensor) -> torch.Tensor:
            fmt = checkpoint.formats.get(tensor.name)
            if fmt is None:
                return checkpoint.read(tensor.name).float()
            matrices: dict[str, dict[str, torch.Tensor]] = {}
            for part in parts_of(tensor, fmt):
                prefix, last = part.name.rsplit(".", 1)
                matrices.setdefault(prefix, {})[last] = checkpoint.read(part.name)
            plain = [dequantize(fmt.load(parts)) for parts in matrices.values()]
            return torch.cat([matrix.T if tensor.name.endswith(".w2") else matrix for matrix in plain]).reshape(tensor.shape)

        return model_of_weights(checkpoint.config, read, dtype=torch.float32)


def test_logits_of_mixed_formats_equal_those_of_the_dequantized_weights(checkpoint: Path) -> None:
    packed, plain = DbrxForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), dequantized(checkpoint)
    for tokens in (1, 7, 90):  # 90 tokens reach some experts often enough for tiles and others seldom enough for dot products
        ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.inference_mode():
            truth, logits = (model(ids).logits for model in (plain, packed))
        assert (logits - truth).abs().max() <= 1e-3 * truth.abs().max()


def test_inspect_plan_and_verify_know_every_format(checkpoint: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("inspect", checkpoint, "--json")
    kinds = json.loads(outcome.out)["kinds"]
    assert set(kinds["experts"]["format"].split(" + ")) == {"int4:128", "int4:32", "int8:64", "int8:128", "nf4:64", "int8:32"}
    assert set(kinds["attention"]["format"].split(" + ")) == {"int4:64", "bfloat16", "nf4:64", "nf4-double:64"}
    assert kinds["head"]["format"] == "int4:32"
    plan = json.loads(cli("plan", checkpoint, "--json").out)
    assert plan["expert_bytes"] == kinds["experts"]["bytes"]
    assert cli("verify", checkpoint).code == 0


def test_the_last_rule_for_a_tensor_applies(nano: Path) -> None:
    config = DbrxConfig.from_pretrained(str(nano))
    formats = mixed(config)
    assert list(formats) == [tensor.name for tensor in dense_tensors(config) if tensor.name in formats]
    expected = {
        "transformer.wte.weight": TensorFormat("int8", 64),
        "transformer.blocks.0.ffn.experts.mlp.w2": TensorFormat("int8", 64),
        "transformer.blocks.1.ffn.experts.mlp.w2": TensorFormat("nf4", 64),
        "transformer.blocks.2.ffn.experts.mlp.v1": TensorFormat("int8", 32),
        "transformer.blocks.3.norm_attn_norm.attn.out_proj.weight": TensorFormat("int4", 64),
    }
    assert {name: formats[name] for name in expected} == expected
    assert "transformer.blocks.1.norm_attn_norm.attn.out_proj.weight" not in formats
    assert override(formats, config, []) == formats


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("w2", "must read NAME=FORMAT"),
        ("w2=int4:64:2", "must read NAME=FORMAT"),
        ("blocks.0-3.=int8:64", "must read NAME=FORMAT"),
        ("w3=int8:64", "must name one of w1, v1"),
        ("router=int8:64", "must name one of w1, v1"),
        ("w2=int5:64", "must be one of int4:32"),
        ("w2=int4", "must be one of int4:32"),
        ("w2=int4:16", "must be one of int4:32"),
        ("w2=nf4-double:32", "nf4:64, nf4-double:64, affine4:32"),
        ("embedding=nf4-double", "int2 or plain"),
        ("head=plain:64", "must be one of int4:32"),
        ("blocks.2-4.w2=int8:64", "within 0-3"),
        ("blocks.3-2.w2=int8:64", "within 0-3"),
        ("blocks.0.head=int8:64", "matches none"),
        ("blocks.0-3.embedding=plain", "matches none"),
        ("experts=plain", "experts must be packed"),
        ("embedding=nf4:64", "int2 or plain"),
        ("w2=q4_0:64", "or plain; found 'q4_0:64'"),
        ("w2=trellis2:32", "trellis2:128, trellis2:64, "),
        ("embedding=trellis4", "the embedding must be int4, int8"),
    ],
)
def test_invalid_rules_are_refused(nano: Path, rule: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        mixed(DbrxConfig.from_pretrained(str(nano)), rule)
    assert message in str(refused.value)
    assert rule in str(refused.value)


@pytest.mark.parametrize(("group_size", "int8_group"), [(16, 32), (32, 32), (48, 32), (64, 64), (128, 64), (256, 64)])
def test_other_matrices_are_int8_beside_experts_of_any_group_size(
    monkeypatch: pytest.MonkeyPatch, nano: Path, group_size: int, int8_group: int
) -> None:
    monkeypatch.setitem(FORMATS, "int4", replace(FORMATS["int4"], group_sizes=(group_size,)))
    monkeypatch.setattr(TensorFormat, "check", lambda fmt, K: None)  # the bundled model has no multiple of 48 and 256
    formats = default_formats(DbrxConfig.from_pretrained(str(nano)), TensorFormat("int4", group_size))
    assert set(formats.values()) == {TensorFormat("int4", group_size), TensorFormat("int8", int8_group)}


def test_a_group_size_that_does_not_divide_is_refused_and_names_the_tensor() -> None:
    ffn = {"ffn_hidden_size": 192, "moe_num_experts": 2, "moe_top_k": 1}
    config = DbrxConfig(d_model=128, n_heads=4, n_layers=1, vocab_size=100, attn_config={"kv_n_heads": 2}, ffn_config=ffn)
    formats = default_formats(config, TensorFormat("int4", 64))
    assert override(formats, config, ["w1=int8:128"])["transformer.blocks.0.ffn.experts.mlp.w1"] == TensorFormat("int8", 128)
    with pytest.raises(RequestError, match=r"mlp\.w2: the group size must divide .* 128 and 192"):
        override(formats, config, ["experts=int8:128"])


@pytest.mark.parametrize(
    ("size", "experts", "fitting"),
    [
        (192, "trellis2:128", "192 elements (trellis2:64 fits)"),
        (96, "trellis3:64", "96 elements (int4:32, int8:32, affine4:32, "),
        (144, "trellis3:64", "144 elements (no format fits)"),
    ],
)
def test_the_formats_that_fit_a_dimension_are_named(size: int, experts: str, fitting: str) -> None:
    config = DbrxConfig(
        d_model=128, n_heads=2, n_layers=1, vocab_size=64, attn_config={"kv_n_heads": 1}, ffn_config={"ffn_hidden_size": size}
    )
    with pytest.raises(FormatError) as refused:
        default_formats(config, TensorFormat.parse(experts))
    assert str(refused.value).startswith("transformer.blocks.0.ffn.experts.mlp.w2: the group size must divide the reduction axis; ")
    assert fitting in str(refused.value)
    assert str(refused.value).endswith("Choose another --group-size or --format")
    with pytest.raises(RequestError, match=re.escape(fitting)):
        override({}, config, [f"w2={experts}"])


@pytest.mark.parametrize(
    ("fmt", "K", "told"),
    [
        (TensorFormat("trellis2", 32), 96, r"must be one of 64, 128; found 32 \(int4:32, .*, int2:32 fit\)$"),
        (TensorFormat("nf4", 32), 96, r"must be one of 64; found 32 \(int4:32, .* fit\)$"),
        (TensorFormat("trellis2", 32), 192, r"must be one of 64, 128; found 32$"),
    ],
)
def test_a_group_size_that_is_not_offered_is_refused_with_formats_where_no_other_group_size_fits(
    fmt: TensorFormat, K: int, told: str
) -> None:
    with pytest.raises(FormatError, match=told):
        fmt.check(K)


def test_trellis_formats_of_rules_rotate_128_inputs_where_none_are_named() -> None:
    config = DbrxConfig(
        d_model=128, n_heads=2, n_layers=1, vocab_size=64, attn_config={"kv_n_heads": 1}, ffn_config={"ffn_hidden_size": 192}
    )
    formats = override(default_formats(config, TensorFormat.of("trellis2", 64)), config, ["attention=trellis4", "head=trellis3:64"])
    assert {str(fmt) for fmt in formats.values()} == {"trellis2:64", "trellis4:128", "trellis3:64", "int8:64"}
    assert TensorFormat.of("trellis2") == TensorFormat.parse("trellis2") == TensorFormat("trellis2", 128)
