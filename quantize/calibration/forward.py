"""Tokens that run through several models at the same time, layer by layer, while the matrices of the models come one after the other.

The models are forms of one checkpoint: the original one, the quantized one so far, and others that are compared with them. Weights are in
memory one matrix at a time, or the three matrices of one expert; activations are in memory or in files.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `D` d_model, `F` ffn hidden, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.checkpoint.layout import DenseTensor, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.model.block import expert_hidden, normed, rotation_of, routed
from dbrx_q.quantize.methods.products import Products

from .activations import ActivationStore
from .attention import attention_heads

__all__ = ["ORIGINAL", "PIECE_TOKENS", "QUANTIZED", "LayerwiseForward", "ModelState"]

QUANTIZED, ORIGINAL = "quantized", "original"
"""The names of the two models that every run has."""

PIECE_TOKENS = 4096
"""Tokens whose activations are in memory at a time, beside the stored ones."""


@dataclass
class ModelState:
    """The activations of one of the models at the matrix that comes next."""

    stream: ActivationStore
    """float32 [T, D]: the residual stream."""
    inputs: ActivationStore
    """float32 [T, D]: the input of the next matrix; within the experts of a layer, of their w1 and v1."""
    expert: dict[str, torch.Tensor]
    """The matrices [N, K] of the current expert so far, by role."""
    routing: Routing | None = None
    """The router's decision in the current layer."""

    @property
    def chosen(self) -> Routing:
        """The router's decision, which precedes the experts."""
        assert self.routing is not None, "the router precedes the experts"
        return self.routing


class LayerwiseForward:
    """Runs tokens through the models; the caller gives each tensor in the order of the model, in the form that each model has of it.

    Args:
        config: of the models.
        ids: int64 [B, S], the sequences.
        products: multiplies.
        models: the names of the models.
        folder: keeps a snapshot of the residual streams at the current layer; None for no snapshots.
        in_files: whether activations are stored in files in that folder, not in memory.
        prefix: begins the names of those files, for several such runs in one folder.
    """

    def __init__(
        self,
        config: DbrxConfig,
        ids: torch.Tensor,
        products: Products,
        *,
        models: Sequence[str],
        folder: Path | None = None,
        in_files: bool = False,
        prefix: str = "",
    ) -> None:
        self._config, self._ids, self._products, self._folder, self._prefix = config, ids, products, folder, prefix
        self._rotation = rotation_of(torch.arange(ids.shape[1], dtype=torch.int32), config)
        if folder is not None:
            folder.mkdir(exist_ok=True)

        def store(model: str, what: str) -> ActivationStore:
            path = folder / f"{prefix}{what}.{model}.bin" if in_files and folder is not None else None
            return ActivationStore(ids.numel(), config.d_model, path)

        self._states = {model: ModelState(store(model, "stream"), store(model, "inputs"), {}) for model in models}

    def close(self) -> None:
        """Free all activations."""
        for state in self._states.values():
            state.stream.close()
            state.inputs.close()

    @property
    def products(self) -> Products:
        """What multiplies."""
        return self._products

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that run."""
        return tuple(self._states)

    def check_finite(self, layer: int) -> None:
        """Refuse activations before a layer that are not finite, of which only NaN could come.

        Raises:
            CheckpointError: names the model.
        """
        for name, state in self._states.items():
            if not all(math.isfinite(float(piece.sum(dtype=torch.float64))) for _, piece in state.stream.pieces(PIECE_TOKENS)):
                raise CheckpointError(
                    f"the activations of the {name} model must be finite; found NaN or infinity before layer {layer}. Its weights are "
                    "damaged or too large: check the checkpoint, or choose a method without calibration"
                )

    def save_snapshot(self, layer: int) -> None:
        """Write the residual streams at the beginning of a layer; one that exists, as in a run that was resumed from it, is kept."""
        if self._folder is None or layer < 1:
            return
        for name, state in self._states.items():
            path = self._snapshot(layer, name)
            if not path.exists():
                state.stream.save(path)

    def remove_snapshot(self, layer: int) -> None:
        """Delete the snapshot at the beginning of a layer, if there is one."""
        if self._folder is not None:
            for name in self._states:
                self._snapshot(layer, name).unlink(missing_ok=True)

    def has_snapshot(self, layer: int) -> bool:
        """Whether the residual streams of all models at the beginning of this layer have been saved."""
        return self._folder is not None and all(self._snapshot(layer, name).exists() for name in self._states)

    def load_snapshot(self, layer: int) -> None:
        """Continue at the beginning of a layer that has a snapshot."""
        for name, state in self._states.items():
            state.stream.load(self._snapshot(layer, name))

    def embed(self, first: int, rows: Mapping[str, torch.Tensor]) -> None:
        """Look up the tokens of rows first .. of the embedding, [n, D] for each model; all rows are given in their order."""
        ids = self._ids.flatten()
        for name, state in self._states.items():
            matching = ((ids >= first) & (ids < first + len(rows[name]))).nonzero(as_tuple=True)[0]
            for tokens in matching.split(PIECE_TOKENS):
                state.stream.add(tokens, rows[name][ids[tokens] - first].float())

    def advance_plain(self, tensor: DenseTensor, values: torch.Tensor) -> None:
        """Run the tokens through a tensor that is the same in all models: a norm, a router, or a matrix that stays plain."""
        kind = kind_of(tensor.name)
        if kind == "norms":
            for state in self._states.values():
                self._normalize(state, values.float())
        elif kind == "router":
            self._route(tensor.layer, values.float())
        elif kind == "embedding":
            self.embed(0, dict.fromkeys(self._states, values))
        else:
            self.advance(tensor, -1, dict.fromkeys(self._states, values))

    def advance(self, tensor: DenseTensor, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Run the tokens through a matrix of a block, or of one of its experts.

        Args:
            tensor: the matrix or the stack that it is from.
            expert: -1 where the tensor is not a stack.
            weights: the matrix [N, K] of each model, best as `Products.prepared` gives it.
        """
        for name, state in self._states.items():
            weight = self._products.prepared(weights[name])
            if tensor.role == "Wqkv":
                self._attend(state, weight)
            elif tensor.role == "out_proj":
                self._add_attention(state, weight)
            elif expert >= 0:
                state.expert[tensor.role] = weight
                if tensor.role == "w2":
                    self._add_expert(state, expert)
                    state.expert.clear()

    def _snapshot(self, layer: int, model: str) -> Path:
        return (self._folder or Path()) / f"{self._prefix}layer-{layer}.{model}.bin"

    def _normalize(self, state: ModelState, weight: torch.Tensor) -> None:
        def outputs(first: int, n: int) -> torch.Tensor:
            return normed(state.stream.read(first, n), weight)[1]

        state.inputs.fill(PIECE_TOKENS, outputs)

    def _attend(self, state: ModelState, weight: torch.Tensor) -> None:
        """Replace the inputs of Wqkv by those of out_proj, some whole sequences at a time."""
        S = self._ids.shape[1]

        def outputs(first: int, n: int) -> torch.Tensor:
            qkv = self._products.linear(state.inputs.read(first, n), weight)
            return attention_heads(qkv, self._rotation, self._config, self._products)

        state.inputs.fill(max(1, PIECE_TOKENS // S) * S, outputs)

    def _add_attention(self, state: ModelState, weight: torch.Tensor) -> None:
        def outputs(first: int, n: int) -> torch.Tensor:
            return state.stream.read(first, n) + self._products.linear(state.inputs.read(first, n), weight).cpu()

        state.stream.fill(PIECE_TOKENS, outputs)

    def _route(self, layer: int, router: torch.Tensor) -> None:
        for state in self._states.values():
            parts = [routed(x, router, self._config.ffn_config) for _, x in state.inputs.pieces(PIECE_TOKENS)]
            state.routing = Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "experts", "weights")))

    def _add_expert(self, state: ModelState, expert: int) -> None:
        """Add the output of an expert to the residual stream; the inputs of the other experts are stored apart from the stream."""
        tokens, rank = (state.chosen.experts == expert).nonzero(as_tuple=True)
        for piece, gate in zip(tokens.split(PIECE_TOKENS), state.chosen.weights[tokens, rank].split(PIECE_TOKENS), strict=True):
            hidden = self._hidden_of(state, piece)
            state.stream.add(piece, self._products.linear(hidden, state.expert["w2"]).cpu().mul_(gate[:, None]))

    def _hidden_of(self, state: ModelState, tokens: torch.Tensor) -> torch.Tensor:
        """[t, F]: the inputs of the current expert's w2."""
        return expert_hidden(state.inputs.gather(tokens), state.expert["w1"], state.expert["v1"], self._products.linear)
