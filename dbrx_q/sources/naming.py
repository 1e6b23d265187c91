"""Under which names the programs that write DBRX store a tensor: as published, or divided into linear layers.

| tensor | published | converted, and its kin |
|---|---|---|
| `Wqkv` [D + 2 kv, D] | `norm_attn_norm.attn.Wqkv.weight` | `norm_attn_norm.attn.{q,k,v}_proj.weight`, or as published |
| `w1`, `v1` [E F, D] | `ffn.experts.mlp.w1` | `ffn.experts.mlp.{e}.w1.weight` [F, D], one for each expert |
| `w2` [E F, D] | `ffn.experts.mlp.w2` | `ffn.experts.mlp.{e}.w2.weight` [D, F]: of a linear layer, so transposed |

`ffn.experts.{e}` (MLX) and `ffn.experts.mlp.experts.{e}` stand for `ffn.experts.mlp.{e}` in some. Dimension letters: `E` experts, `D`
d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dbrx_q.checkpoint.layout import DenseTensor
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError

__all__ = ["Module", "Names", "are_published", "mlx_module", "modules_of"]

_EXPERTS = ("experts.mlp.{e}.", "experts.{e}.", "experts.mlp.experts.{e}.")
_PUBLISHED = "experts.mlp."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_IGNORED = ("rotary_emb.inv_freq",)  # computed from config.json
_WEIGHT = "weight"


@dataclass(frozen=True)
class Module:
    """A layer in a file: it holds some rows of a tensor of a plain checkpoint."""

    name: str
    """Without the suffixes of its parts."""
    shape: tuple[int, ...]
    """Of its weight, the reduction axis last; of a norm, [D]."""
    first: int
    """The first row of the tensor that it holds."""
    rows: int
    """The rows of the tensor that it holds."""
    transposed: bool = False
    """Whether the tensor's rows are its columns."""


class Names:
    """The stored names of a checkpoint, divided into modules and suffixes.

    Args:
        names: of the stored tensors.
        suffixes: that parts of a module may have, such as "weight" and "qweight".
        folder: that holds them, for messages.

    Raises:
        CheckpointError: two names are of one part.
    """

    def __init__(self, names: Iterable[str], suffixes: Collection[str], folder: Path) -> None:
        longest_first = sorted(suffixes, key=len, reverse=True)
        self.modules: dict[str, dict[str, str]] = {}
        """Module to suffix to stored name."""
        for stored in names:
            if not stored.endswith(_IGNORED):
                module, suffix = _split(stored, longest_first)
                parts = self.modules.setdefault(module, {})
                if suffix in parts:
                    raise CheckpointError(
                        f"{folder}: a weight must be stored once; found the tensors {parts[suffix]} and {stored}. Remove the one that is "
                        "not the model's, or fetch the checkpoint again"
                    )
                parts[suffix] = stored

    def unused(self, used: Collection[str]) -> Iterator[str]:
        """Stored names that belong to none of the used modules."""
        for module, parts in self.modules.items():
            if module not in used:
                yield from parts.values()


def _split(stored: str, suffixes: list[str]) -> tuple[str, str]:
    """(module, suffix) of a stored name; the published stacks of experts have no ".weight" in their names."""
    for suffix in suffixes:
        if stored.endswith(f".{suffix}"):
            return stored[: -len(suffix) - 1], suffix
    for suffix in suffixes:
        tail = suffix.removeprefix(_WEIGHT)
        if tail and tail != suffix and stored.endswith(tail):
            return stored.removesuffix(tail), suffix
    return stored, _WEIGHT


def modules_of(tensor: DenseTensor, config: DbrxConfig, names: Names) -> list[Module]:
    """The modules that hold a tensor, in the order of its rows; those of the published layout where none of the others is stored."""
    name = tensor.name.removesuffix(f".{_WEIGHT}")
    published = [Module(name, tensor.shape, 0, tensor.shape[0])]
    if name in names.modules:
        return published
    others = _of_attention(tensor, config) if tensor.role == "Wqkv" else _of_experts(tensor, names) if tensor.experts else []
    return others if any(module.name in names.modules for module in others) else published


def mlx_module(tensor: DenseTensor, expert: int = -1) -> str:
    """The name of the layer in which MLX holds a tensor, or one expert of a stack."""
    name = tensor.name.removesuffix(f".{_WEIGHT}")
    return name.replace(_PUBLISHED, _EXPERTS[1].format(e=expert)) if tensor.experts else name


def _of_attention(tensor: DenseTensor, config: DbrxConfig) -> list[Module]:
    D, kv = config.d_model, config.attn_config.kv_n_heads * config.head_dim
    prefix = tensor.name.rsplit(".", 2)[0]
    modules, first = [], 0
    for projection, rows in zip(_PROJECTIONS, (D, kv, kv), strict=True):
        modules.append(Module(f"{prefix}.{projection}", (rows, D), first, rows))
        first += rows
    return modules


def _of_experts(tensor: DenseTensor, names: Names) -> list[Module]:
    before, _, role = tensor.name.partition(_PUBLISHED)
    rows = tensor.shape[0] // tensor.experts
    for template in _EXPERTS:
        if before + template.format(e=0) + role in names.modules:
            return [
                Module(before + template.format(e=e) + role, tensor.matrix, e * rows, rows, tensor.transposed)
                for e in range(tensor.experts)
            ]
    return []


def are_published(names: Collection[str]) -> bool:
    """Whether stored names are those of the published layout: stacks of experts, and no attention that is divided."""
    stacks = any(name.rpartition(".")[0].endswith(f".{_PUBLISHED[:-1]}") for name in names)
    return stacks and not any(name.endswith(f".{_PROJECTIONS[0]}.{_WEIGHT}") for name in names)
