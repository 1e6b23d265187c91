"""Modules that hold packed weights in a transformers model: `PackedWeight`, and the linear layer and the embedding that compute with it.

A packed weight is read from the files after transformers has read the others (`loading.py`); until then its module is empty.

Dimension letters: `N` output features, `K` input features, `V` vocabulary, `D` d_model, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat
from dbrx_q.errors import UnsupportedError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize, gather_rows
from dbrx_q.kernels.linear import linear

__all__ = ["PackedEmbedding", "PackedLinear", "PackedWeight", "packed_weights"]


class PackedWeight(nn.Module):
    """A packed matrix [N, K], or the matrices [E, N, K] of all experts, in place of a parameter.

    Its tensors are buffers. `state_dict` names them as the checkpoint does: `weight.qweight`, and for experts `w1.0.qweight`.

    Args:
        tensor: which tensor of a checkpoint it is.
        fmt: its format on disk.
    """

    def __init__(self, tensor: DenseTensor, fmt: TensorFormat) -> None:
        super().__init__()
        self.tensor, self.format = tensor, fmt
        self.held: QuantizedWeight | None = None
        # Counts the weight's bytes where transformers divides a model among devices, before the weight is read.
        self.register_buffer("placeholder", torch.empty(1, dtype=torch.uint8), persistent=False)

    @property
    def value(self) -> QuantizedWeight:
        """The weight.

        Raises:
            UnsupportedError: it was never read.
        """
        if self.held is None:
            raise UnsupportedError(
                f"{self.tensor.name} must be read from a checkpoint; found a model made from a config. Load it with from_pretrained"
            )
        return self.held

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in memory."""
        parts = self.format.in_memory.parts(*self.tensor.matrix)
        return sum(part.nbytes for part in parts) * max(1, self.tensor.experts)

    def put(self, value: QuantizedWeight) -> None:
        """Hold a weight that was read."""
        self.held = value
        self._buffers.clear()
        for name, part in value.parts.items():
            self.register_buffer(name, part, persistent=False)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain weight."""
        return dequantize(self.value, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        """Move the parts; their dtypes belong to the format, so a conversion of the model leaves them."""
        if self.held is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self

        def moved(part: torch.Tensor) -> torch.Tensor:
            result = fn(part)
            return result if result.dtype == part.dtype else part.to(result.device)

        parts = {name: moved(part) for name, part in self.held.parts.items()}
        self.put(type(self.held).of(parts, self.held.group_size))
        return self

    def _named_parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of every matrix by their names in `state_dict`; views."""
        if self.held is None:
            return
        for e in range(self.tensor.experts or 1):
            for name, part in self.held.parts.items():
                yield (f"{e}.{name}", part[e]) if self.tensor.experts else (name, part)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in self._named_parts():
            destination[prefix + name] = part

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parts = dict(self._named_parts())
        for name, part in parts.items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif given.shape != part.shape or given.dtype != part.dtype:
                error_msgs.append(
                    f"{prefix}{name} must be {part.dtype} {list(part.shape)}; found {given.dtype} {list(given.shape)}. "
                    "Is it of another format?"
                )
            else:
                part.copy_(given)
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in parts]

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.tensor.matrix)}"


class PackedLinear(nn.Module):
    """y = x @ weight.T, weight [N, K] packed. It has no gradient."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.tensor.matrix
        self.bias = None

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.value)


class PackedEmbedding(nn.Module):
    """Looks up rows of weight [V, D], packed."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__()
        self.weight, self.dtype, self.padding_idx = weight, dtype, padding_idx
        self.num_embeddings, self.embedding_dim = weight.tensor.matrix

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return gather_rows(self.weight.value, ids.flatten(), self.dtype).view(*ids.shape, -1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedEmbedding:
        """Looked-up rows get the dtype that a conversion of the model asks for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by the checkpoint's names."""
    return {module.tensor.name: module for module in model.modules() if isinstance(module, PackedWeight)}
