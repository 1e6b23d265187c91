"""What a DBRX checkpoint holds, and what it is called: the only place that knows names, orientations and packed parts.

A plain checkpoint has the names of the published one (`transformer.blocks.0.ffn.experts.mlp.w1` ...). In a quantized checkpoint a tensor
X becomes the parts `X.qweight`, `X.scales` and, for int4, `X.zeros`, or for nf4 `X.qweight` and `X.absmax`, and for nf4-double also
`X.nested_absmax` and `X.offset`; an expert matrix becomes such parts per expert, `X.0.qweight`, `X.1.qweight` ..., each with its
reduction axis last. One expert's parts lie next to each other in the file.

Dimension letters: `E` experts, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis, `G` group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.nf4 import Nf4DoubleWeight, Nf4Weight
from dbrx_q.kernels.formats.weights import PackedFormat

__all__ = [
    "GROUP_SIZES",
    "DenseTensor",
    "Part",
    "TensorFormat",
    "dense_tensors",
    "kind_of",
    "matrix_parts",
    "oriented",
    "pack_parts",
    "parts_of",
    "tensor_formats",
    "tensors_by_role",
    "unpacked_experts",
]

GROUP_SIZES = {"int4": int4.GROUP_SIZES, "int8": int8.GROUP_SIZES, "nf4": nf4.GROUP_SIZES, "nf4-double": nf4.GROUP_SIZES}
"""The formats on offer and their group sizes."""

KINDS = ("experts", "attention", "embedding", "head", "router", "norms")
_ROLES = {"wte": "embedding", "layer": "router", "lm_head": "head"}  # of other tensors the last part of the name
_PACKED_KINDS = ("experts", "attention", "embedding", "head")


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a plain checkpoint. experts: E where it stacks the matrices of all experts, else 0. layer: -1 outside the blocks."""

    name: str
    shape: tuple[int, ...]
    layer: int
    experts: int = 0

    @property
    def matrix(self) -> tuple[int, int]:
        """[N, K] of the matrix (of one expert's matrix), its reduction axis last."""
        if not self.experts:
            return self.shape[0], self.shape[1]
        rows = self.shape[0] // self.experts
        return (self.shape[1], rows) if self.name.endswith(".w2") else (rows, self.shape[1])

    @property
    def role(self) -> str:
        """One of "embedding", "norm_1", "Wqkv", "out_proj", "norm_2", "router", "w1", "v1", "w2", "norm_f" or "head"."""
        last = self.name.removesuffix(".weight").rsplit(".", 1)[-1]
        return _ROLES.get(last, last)


@dataclass(frozen=True)
class TensorFormat:
    """How a tensor is packed: one of `GROUP_SIZES`, and its group size."""

    format: str
    group_size: int

    @property
    def in_memory(self) -> TensorFormat:
        """What `pack_parts` makes of it, whose parts take more than is stored where scales are decoded."""
        return TensorFormat("nf4", self.group_size) if self.format == "nf4-double" else self


@dataclass(frozen=True)
class Part:
    """A tensor of a quantized checkpoint that is a piece of a packed weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def dense_tensors(config: DbrxConfig) -> list[DenseTensor]:
    """Every tensor of a plain checkpoint, in the order of the model."""
    D, V = config.d_model, config.vocab_size
    E, F = config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size
    kv = config.attn_config.kv_n_heads * config.head_dim
    found = [DenseTensor("transformer.wte.weight", (V, D), -1)]
    for layer in range(config.n_layers):
        block = f"transformer.blocks.{layer}"
        found += [
            DenseTensor(f"{block}.norm_attn_norm.norm_1.weight", (D,), layer),
            DenseTensor(f"{block}.norm_attn_norm.attn.Wqkv.weight", (D + 2 * kv, D), layer),
            DenseTensor(f"{block}.norm_attn_norm.attn.out_proj.weight", (D, D), layer),
            DenseTensor(f"{block}.norm_attn_norm.norm_2.weight", (D,), layer),
            DenseTensor(f"{block}.ffn.router.layer.weight", (E, D), layer),
            *(DenseTensor(f"{block}.ffn.experts.mlp.{matrix}", (E * F, D), layer, E) for matrix in ("w1", "v1", "w2")),
        ]
    return [*found, DenseTensor("transformer.norm_f.weight", (D,), -1), DenseTensor("lm_head.weight", (V, D), -1)]


def tensors_by_role(config: DbrxConfig, layer: int) -> dict[str, DenseTensor]:
    """The tensors of a layer by their roles; those outside the blocks for -1."""
    return {tensor.role: tensor for tensor in dense_tensors(config) if tensor.layer == layer}


def kind_of(name: str) -> str:
    """One of `KINDS` for the name of a tensor or of a part of one."""
    if ".experts." in name:
        return "experts"
    if ".attn." in name:
        return "attention"
    if ".router." in name:
        return "router"
    if ".wte." in name:
        return "embedding"
    return "head" if name.startswith("lm_head.") else "norms"


def oriented(stacked: torch.Tensor, tensor: DenseTensor) -> torch.Tensor:
    """The rows of one or several experts [.., D] as [experts, N, K], reduction axis last; a view. DBRX stores w2 as [F, D]."""
    rows = tensor.shape[0] // tensor.experts
    matrices = stacked.view(-1, rows, stacked.shape[-1])
    return matrices.transpose(1, 2) if tensor.name.endswith(".w2") else matrices


def tensor_formats(config: DbrxConfig, source: str) -> dict[str, TensorFormat]:
    """The format of every packed tensor of a checkpoint; empty for a plain one.

    Raises:
        CheckpointError: a quantization_config that this version did not write.
    """
    if config.quantization_config is None:
        return {}
    method, version = config.quantization_config.get("quant_method"), config.quantization_config.get("format_version")
    if (method, version) != ("dbrx_q", 1):
        raise CheckpointError(
            f"{source}: quantization_config must have quant_method 'dbrx_q' and format_version 1; found {method!r} and {version!r}. "
            "Quantize the original checkpoint with `dbrx-q quantize`"
        )
    known = {tensor.name for tensor in dense_tensors(config) if kind_of(tensor.name) in _PACKED_KINDS}
    found = {}
    entries = config.quantization_config.get("tensors")
    for name, entry in (entries if isinstance(entries, Mapping) else {}).items():
        found[name] = _format(name, entry, source)
        if name not in known:
            raise CheckpointError(f"{source}: quantization_config names {name!r}, which is no matrix of this model that can be packed")
        if kind_of(name) == "embedding" and found[name].format != "int8":
            raise CheckpointError(f"{source}: {name}: the embedding must be int8 or plain; found {found[name].format}")
    if not found:
        raise CheckpointError(f"{source}: quantization_config must list the packed tensors under 'tensors'; found none")
    return found


def _format(name: str, entry: Any, source: str) -> TensorFormat:
    kind, group_size = (entry.get("format"), entry.get("group_size")) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES.get(str(kind), ()):
        rule = "format must be int4 or int8 with a group size of 32, 64 or 128, or nf4 or nf4-double with 64"
        raise CheckpointError(f"{source}: {name}: {rule}; found {entry!r}")
    return TensorFormat(str(kind), group_size)


def unpacked_experts(config: DbrxConfig, formats: Mapping[str, TensorFormat]) -> list[str]:
    """Expert matrices of any layer that have no format; empty for a checkpoint whose experts are all packed."""
    return [tensor.name for tensor in dense_tensors(config) if tensor.experts and tensor.name not in formats]


def parts_of(tensor: DenseTensor, fmt: TensorFormat) -> Iterator[Part]:
    """The parts that `tensor` becomes in `fmt`, expert by expert."""
    for prefix in [f"{tensor.name}.{e}" for e in range(tensor.experts)] if tensor.experts else [tensor.name]:
        for part in matrix_parts(tensor, fmt):
            yield Part(f"{prefix}.{part.name}", part.dtype, part.shape)


def matrix_parts(tensor: DenseTensor, fmt: TensorFormat) -> list[Part]:
    """The parts of one matrix (of one expert's matrix) of `tensor` in `fmt`, by their last names."""
    N, K = tensor.matrix
    groups = K // fmt.group_size
    if fmt.format == "int8":
        return [Part("qweight", torch.int8, (N, K)), Part("scales", torch.float16, (N, groups))]
    codes = Part("qweight", torch.uint8, (N, K // 2))
    if fmt.format == "int4":
        return [codes, Part("scales", torch.float16, (N, groups)), Part("zeros", torch.uint8, (N, (groups + 1) // 2))]
    if fmt.format == "nf4":
        return [codes, Part("absmax", torch.float32, (N, groups))]
    blocks = -(-N * groups // nf4.NESTED_BLOCK)
    nested = Part("nested_absmax", torch.float32, (blocks,)), Part("offset", torch.float32, (1,))
    return [codes, Part("absmax", torch.uint8, (N, groups)), *nested]


def pack_parts(parts: Mapping[str, torch.Tensor], fmt: TensorFormat) -> PackedFormat:
    """A packed weight from its parts by their last name, as `parts_of` gives them, each perhaps with leading axes."""
    if fmt.format == "int4":
        return Int4Weight(parts["qweight"], parts["scales"], parts["zeros"], fmt.group_size)
    if fmt.format == "nf4":
        return Nf4Weight(parts["qweight"], parts["absmax"], fmt.group_size)
    if fmt.format == "nf4-double":
        return Nf4DoubleWeight(parts["qweight"], parts["absmax"], parts["nested_absmax"], parts["offset"], fmt.group_size).decoded()
    return Int8Weight(parts["qweight"], parts["scales"], fmt.group_size)
