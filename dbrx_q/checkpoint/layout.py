"""Names, orientations and stored parts of the tensors of a DBRX checkpoint. Other modules ask for tensors by their roles.

A plain checkpoint has the names of the published one (`transformer.blocks.0.ffn.experts.mlp.w1` ...). In a quantized checkpoint a tensor
X becomes the parts of its format, such as `X.qweight` and `X.scales`; a stack of experts becomes such parts per expert, `X.0.qweight`,
`X.1.qweight` ..., each with its reduction axis last. The parts of one expert are adjacent in the file.

Dimension letters: `E` experts, `D` d_model, `F` ffn hidden, `V` vocabulary, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.config_values import shortened
from dbrx_q.errors import OF_ANOTHER_PROGRAM, CheckpointError, FormatError
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.format import Part
from dbrx_q.kernels.formats.registry import FORMATS, PLAIN, TensorFormat, offered_formats
from dbrx_q.kernels.formats.weights import Weight

__all__ = [
    "ATTENTION_MATRICES",
    "EMBEDDING",
    "EXPERT_MATRICES",
    "HEAD",
    "KINDS",
    "PLAIN_KINDS",
    "DenseTensor",
    "Part",
    "TensorFormat",
    "dense_tensors",
    "embedding_formats",
    "expert_name",
    "expert_of",
    "expert_weights",
    "inner_name",
    "is_packed_part",
    "kind_of",
    "layer_of",
    "may_have",
    "oriented",
    "part_name",
    "parts_of",
    "role_of",
    "router_name",
    "tensor_formats",
    "tensors_by_role",
    "unpacked_experts",
]

EMBEDDING = "transformer.wte.weight"
"""The embedding [V, D]."""
HEAD = "lm_head.weight"
"""The head [V, D]."""
ATTENTION_MATRICES = ("Wqkv", "out_proj")
"""The roles of the matrices of attention."""
EXPERT_MATRICES = ("w1", "v1", "w2")
"""The roles of the stacks of expert matrices: gate, up and down."""
KINDS = ("experts", "attention", "embedding", "head", "router", "norms")
"""The kinds of tensors, by which formats are assigned and reported."""
PLAIN_KINDS = ("router", "norms")
"""The kinds that are never packed."""
_TRANSFORMER = "transformer."  # all tensors but the head
_TRANSPOSED = ("w2",)  # roles whose matrices a plain checkpoint stores [K, N]: w2 as [F, D]
_NEWER = "A format of a newer version needs that version: pip install -U dbrx_q; otherwise fetch config.json again"
_CODES = re.compile(r"\.(weight|(w1|v1|w2)\.\d+)\.qweight$")
_ROLES = {"wte": "embedding", "layer": "router", "lm_head": "head"}  # the role of any other tensor is the last part of its name


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a plain checkpoint."""

    name: str
    """Its name there."""
    shape: tuple[int, ...]
    """Its shape there."""
    layer: int
    """Of the block; -1 outside the blocks."""
    experts: int = 0
    """E where it stacks the matrices of all experts, else 0."""

    @property
    def matrix(self) -> tuple[int, int]:
        """[N, K] of the matrix (of one expert's matrix), its reduction axis last."""
        if not self.experts:
            return self.shape[0], self.shape[1]
        rows = self.shape[0] // self.experts
        return (self.shape[1], rows) if self.transposed else (rows, self.shape[1])

    @property
    def role(self) -> str:
        """See `role_of`."""
        return role_of(self.name)

    @property
    def transposed(self) -> bool:
        """Whether a plain checkpoint stores the matrices [K, N]."""
        return self.role in _TRANSPOSED


def dense_tensors(config: DbrxConfig) -> list[DenseTensor]:
    """Every tensor of a plain checkpoint, in the order of the model."""
    D, V = config.d_model, config.vocab_size
    E, F = config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size
    kv = config.attn_config.kv_n_heads * config.head_dim
    tensors = [DenseTensor(EMBEDDING, (V, D), -1)]
    for layer in range(config.n_layers):
        block = f"transformer.blocks.{layer}"
        tensors += [
            DenseTensor(f"{block}.norm_attn_norm.norm_1.weight", (D,), layer),
            DenseTensor(f"{block}.norm_attn_norm.attn.Wqkv.weight", (D + 2 * kv, D), layer),
            DenseTensor(f"{block}.norm_attn_norm.attn.out_proj.weight", (D, D), layer),
            DenseTensor(f"{block}.norm_attn_norm.norm_2.weight", (D,), layer),
            DenseTensor(router_name(layer), (E, D), layer),
            *(DenseTensor(expert_name(layer, matrix), (E * F, D), layer, E) for matrix in EXPERT_MATRICES),
        ]
    return [*tensors, DenseTensor("transformer.norm_f.weight", (D,), -1), DenseTensor(HEAD, (V, D), -1)]


def tensors_by_role(config: DbrxConfig, layer: int) -> dict[str, DenseTensor]:
    """The tensors of a layer by their roles; those outside the blocks for -1."""
    return {tensor.role: tensor for tensor in dense_tensors(config) if tensor.layer == layer}


def router_name(layer: int) -> str:
    """The name of a layer's router [E, D]."""
    return f"transformer.blocks.{layer}.ffn.router.layer.weight"


def expert_name(layer: int, matrix: str, expert: int | None = None, part: str = "") -> str:
    """The name of a stack of expert matrices, or in a quantized checkpoint of one expert's part."""
    name = f"transformer.blocks.{layer}.ffn.experts.mlp.{matrix}"
    return f"{name}.{expert}.{part}" if part else name


def inner_name(name: str) -> str | None:
    """The name of a tensor, or of a part of one, within the transformer without its head; None for the head."""
    inner = name.removeprefix(_TRANSFORMER)
    return None if inner == name else inner


def layer_of(name: str) -> int:
    """The layer of a tensor or a part of one, by its name; -1 outside the blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["transformer", "blocks"] else -1


def role_of(name: str) -> str:
    """The role of a tensor: "embedding", "norm_1", "Wqkv", "out_proj", "norm_2", "router", "w1", "v1", "w2", "norm_f" or "head"."""
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return _ROLES.get(last, last)


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
    """The rows of one or several experts [.., D] as [experts, N, K], reduction axis last; a view."""
    rows = tensor.shape[0] // tensor.experts
    matrices = stacked.view(-1, rows, stacked.shape[-1])
    return matrices.transpose(1, 2) if tensor.transposed else matrices


def expert_weights(stacks: Mapping[str, Weight]) -> ExpertWeights:
    """The experts of a layer as kernels take them, every matrix with its reduction axis last; no copy.

    Args:
        stacks: by the roles of `EXPERT_MATRICES`: [S, F, D] as a plain checkpoint stores them, or packed with the reduction axis last.
    """

    def oriented_stack(role: str) -> Weight:
        stack = stacks[role]
        return stack.transpose(1, 2) if role in _TRANSPOSED and isinstance(stack, torch.Tensor) else stack

    w1, v1, w2 = (oriented_stack(role) for role in EXPERT_MATRICES)
    return ExpertWeights(w1, v1, w2)


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
            f"{source}: quantization_config must have quant_method 'dbrx_q' and format_version 1; found {shortened(method)} and "
            f"{shortened(version)}. {_NEWER if method == 'dbrx_q' else OF_ANOTHER_PROGRAM}"
        )
    known = {tensor.name: tensor for tensor in dense_tensors(config) if kind_of(tensor.name) not in PLAIN_KINDS}
    formats = {}
    entries = config.quantization_config.get("tensors")
    for name, entry in (entries if isinstance(entries, Mapping) else {}).items():
        formats[name] = _format(name, entry, source)
        if name not in known:
            raise CheckpointError(
                f"{source}: quantization_config must name packable matrices of this model; found {shortened(name)}. Fetch config.json again"
            )
        if not may_have(name, formats[name]):
            raise CheckpointError(f"{source}: {name}: the embedding must be {embedding_formats()}; found {formats[name].format}")
        try:
            formats[name].check(known[name].matrix[1])
        except FormatError as error:  # the shapes of trellis parts do not tell
            raise CheckpointError(f"{source}: {name}: {error}. Fetch config.json again") from None
    if not formats:
        raise CheckpointError(f"{source}: quantization_config must list the packed tensors under 'tensors'; found none")
    return formats


def _format(name: str, entry: Any, source: str) -> TensorFormat:
    name_and_size = (entry.get("format"), entry.get("group_size")) if isinstance(entry, Mapping) else (None, None)
    fmt = next((fmt for fmt in offered_formats() if (fmt.format, fmt.group_size) == name_and_size), None)
    if fmt is None or not isinstance(name_and_size[1], int):
        rule = f"format and group_size must be one of {', '.join(map(str, offered_formats()))}"
        raise CheckpointError(f"{source}: {shortened(name)}: {rule}; found {shortened(entry)}. {_NEWER}")
    if unknown := sorted(map(str, entry.keys() - {"format", "group_size"})):
        raise CheckpointError(
            f"{source}: {shortened(name)}: an entry must have the keys format and group_size alone; found {shortened(unknown[0])}. {_NEWER}"
        )
    return fmt


def may_have(name: str, fmt: TensorFormat) -> bool:
    """Whether a tensor may have a format: routers and norms stay plain, and the embedding needs one whose rows can be looked up."""
    kind = kind_of(name)
    return kind not in PLAIN_KINDS and (kind != "embedding" or fmt.record.embedding)


def embedding_formats() -> str:
    """The formats that the embedding may have, as error messages list them: "int4, int8 or plain"."""
    return f"{', '.join(name for name, record in FORMATS.items() if record.embedding)} or {PLAIN}"


def unpacked_experts(config: DbrxConfig, formats: Mapping[str, TensorFormat]) -> list[str]:
    """Expert matrices of any layer that have no format; empty for a checkpoint whose experts are all packed."""
    return [tensor.name for tensor in dense_tensors(config) if tensor.experts and tensor.name not in formats]


def parts_of(tensor: DenseTensor, fmt: TensorFormat) -> Iterator[Part]:
    """The parts that `tensor` becomes in `fmt`, expert by expert."""
    for prefix in [f"{tensor.name}.{e}" for e in range(tensor.experts)] if tensor.experts else [tensor.name]:
        for part in fmt.parts(*tensor.matrix):
            yield Part(f"{prefix}.{part.name}", part.dtype, part.shape)


def expert_of(part: Part) -> int:
    """The expert of a part of a stack."""
    return int(part.name.rsplit(".", 2)[1])


def is_packed_part(name: str) -> bool:
    """Whether a stored tensor holds the codes of a packed weight, by its name: every format has such a part."""
    return _CODES.search(name) is not None


def part_name(part: Part) -> str:
    """The last name of a part of `parts_of`, by which `TensorFormat.load` takes it."""
    return part.name.rsplit(".", 1)[1]
