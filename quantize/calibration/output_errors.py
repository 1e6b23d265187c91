"""The change of a layer's output when one of its tensors is rounded, measured on some tokens of the plain model, layer by layer.

The errors of all tensors have one unit: the energy of the change of the residual stream after the block's attention or experts, relative
to the energy of the stream there, mean over the tokens of a source; of several sources the largest counts, so that formats are chosen for
the text that suffers most. The error grows in the later routers: a disturbance of relative amplitude a sends
tokens whose scores differ by less than a to other experts. Their share is proportional to a, and the error of each such token does not
depend on a. So a router turns the energy E into E + r sqrt(E); r is measured here, too. The energy at the end of the model is close to the
divergence that it causes: on the bundled model, for 86 tensors and formats, KL / E has a standard deviation of 0.45 in the logarithm, and
1.2 without the routers.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `D` d_model, `E` experts, `F` ffn hidden, `V` vocabulary, `N` rows,
`K` the reduction axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, kind_of, layer_of, oriented, tensors_by_role
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.model.block import activate, normed, rotation_of, routed
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.rtn import rtn
from dbrx_q.quantize.methods.workers import Workers

from .attention import attention_heads

__all__ = ["OutputErrors", "expected_change", "output_errors"]

_STEP_BYTES = 64 << 20  # rows of embedding and head that are read together
# Relative energy of the disturbance that measures a router. It reroutes a sixth of the bundled model's tokens and gives r = 0.017, 0.011,
# 0.015, 0.012 for its four layers; a tenth of it reroutes a third as many and gives 0.018, 0.013, 0.015, 0.013.
_DISTURBANCE = 1e-2
_LEAST_ENERGY = 2.0**-20  # of rounding activations to bfloat16, which disturbs the first router in any case


@dataclass(frozen=True)
class OutputErrors:
    """The measured errors, in the unit that the module describes."""

    errors: dict[str, list[float]]
    """For each tensor, the error in each of its candidate formats."""
    rerouting: list[float]
    """For each layer, r of its router."""

    def total(self, chosen: Mapping[str, float]) -> float:
        """The energy at the end of the model, given the error of every tensor: about the mean KL divergence in nats."""
        return self._propagate(chosen)[0]

    def weights(self, chosen: Mapping[str, float]) -> dict[str, float]:
        """The derivative of `total` by the error of each tensor."""
        return self._propagate(chosen)[1]

    def _propagate(self, chosen: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """(energy at the end of the model, its derivative by the error of each tensor)."""
        layers = len(self.rerouting)
        tensors: list[list[str]] = [[] for _ in range(layers + 2)]  # by the number of routers before them; the head is after all routers
        for name in chosen:
            tensors[_routers_before(name, layers)].append(name)
        energy, growth = 0.0, []
        for names, r in zip(tensors, [*self.rerouting, 0.0, 0.0], strict=True):
            energy += sum(chosen[name] for name in names)
            growth.append(1 + r / (2 * math.sqrt(max(energy, _LEAST_ENERGY))))
            energy += r * math.sqrt(energy)
        return energy, {name: math.prod(growth[place:]) for place, names in enumerate(tensors) for name in names}


def _routers_before(name: str, layers: int) -> int:
    kind = kind_of(name)
    if kind in ("embedding", "head"):
        return 0 if kind == "embedding" else layers + 1
    return layer_of(name) + (kind == "experts")


def output_errors(
    checkpoint: StoredWeights,
    sequences: torch.Tensor,
    candidates: Mapping[str, Sequence[TensorFormat]],
    *,
    sources: Sequence[int] | None = None,
    tokens: int = 2048,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> OutputErrors:
    """Round each tensor alone, to nearest, in each of its candidate formats, and measure the change of its layer's output.

    In trellis formats no stream is searched: the change is the one that is expected of the code (`expected_change`).

    Memory holds the weights of one expert at a time, or one matrix of another kind, and about 12 numbers per token and channel. The
    figures do not depend on the number of threads.

    Args:
        checkpoint: a plain one.
        sequences: int64 [B, S], token ids.
        candidates: formats by tensor; a tensor without candidates is not measured.
        sources: the number of each sequence's source; None for one source.
        tokens: the most tokens to use, as whole sequences from the first on; at least one sequence is used.
        on_layer: called with (layers done, layers in all).

    Raises:
        CheckpointError: a tensor cannot be read.
        FormatError: a format cannot hold a tensor.
    """
    with Workers() as workers:
        ids = sequences[: max(1, tokens // sequences.shape[1])]
        source = torch.tensor([0] * len(ids) if sources is None else list(sources[: len(ids)])).repeat_interleave(ids.shape[1])
        of_sources = [(source == number).nonzero(as_tuple=True)[0] for number in source.unique().tolist()]
        products = Products.fastest(workers, checkpoint.config.d_model)
        return _Measurement(checkpoint, ids, of_sources, candidates, products).run(on_layer)


def expected_change(weight: torch.Tensor, code: TrellisCode, noise: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: a change like that of `weight` by a trellis code, without the search, which would take hours for a large model.

    Streams are searched for rotated weights, which are close to normal, so that the relative error r is a constant of the code. Each level
    is the mean of the values that it stands for; an error e of a value v therefore has E[e^2] = r E[v^2] and E[e v] = -r E[v^2], which
    e = -r v + sqrt(r - r^2) * noise has, and the rotation changes neither.

    Args:
        weight: [N, K].
        code: of the format.
        noise: float32 [N, K], normal, with the mean square of each row of the weight.
    """
    r = code.relative_error
    return noise * math.sqrt(r - r * r) - weight.float() * r


class _Measurement:
    """Runs tokens through the plain model and measures one layer after the other.

    `of_sources` holds the tokens of each source, int64.
    """

    def __init__(
        self,
        checkpoint: StoredWeights,
        ids: torch.Tensor,
        of_sources: Sequence[torch.Tensor],
        candidates: Mapping[str, Sequence[TensorFormat]],
        products: Products,
    ) -> None:
        self._checkpoint, self._config, self._ids, self._products = checkpoint, checkpoint.config, ids, products
        self._of_sources = of_sources
        self._candidates = {tensor.name: tuple(candidates.get(tensor.name, ())) for tensor in dense_tensors(self._config)}
        self._rotation = rotation_of(torch.arange(ids.shape[1], dtype=torch.int32), self._config)
        self._generator, self._noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
        self._stream = torch.zeros(ids.numel(), self._config.d_model)  # [T, D]
        self._errors: dict[str, list[float]] = {}

    def run(self, on_layer: Callable[[int, int], None]) -> OutputErrors:
        layers = self._config.n_layers
        on_layer(0, layers)
        tensors = dense_tensors(self._config)
        self._checkpoint.expect([tensor.name for tensor in tensors])
        outside = tensors_by_role(self._config, -1)
        self._embed(outside["embedding"])
        self._release([outside["embedding"]])
        rerouting = []
        for layer in range(layers):
            block = tensors_by_role(self._config, layer)
            self._attend(block)
            rerouting.append(self._route_and_expand(block))
            self._release(block.values())
            on_layer(layer + 1, layers)
        self._finish(outside)
        return OutputErrors({name: self._errors[name] for name, formats in self._candidates.items() if formats}, rerouting)

    def _release(self, tensors: Iterable[DenseTensor]) -> None:
        """Tell the checkpoint that tensors have been read, so that shards fetched for them can be deleted."""
        for _ in tensors:
            self._checkpoint.done()

    def _embed(self, embedding: DenseTensor) -> None:
        name, ids = embedding.name, self._ids.flatten()
        energies = torch.zeros(len(self._candidates[name]), len(ids))
        for first, rows in self._rows(name):
            tokens = ((ids >= first) & (ids < first + len(rows))).nonzero(as_tuple=True)[0]
            used, place = (ids[tokens] - first).unique(return_inverse=True)
            self._stream[tokens] = rows[used].float()[place]
            for energy, change in zip(energies, self._changes(name, rows[used]), strict=True):
                energy[tokens] = _energy(change)[place]
        self._record(name, energies)

    def _attend(self, block: Mapping[str, DenseTensor]) -> None:
        linear = self._products.linear
        qkv_name, out_name = block["Wqkv"].name, block["out_proj"].name
        x = self._normed(block["norm_1"], self._stream)
        weight = self._checkpoint.read(qkv_name)
        qkv = linear(x, weight)
        heads = self._heads(qkv)
        head_changes = [self._heads(qkv + linear(x, change)).sub_(heads) for change in self._changes(qkv_name, weight)]
        weight = self._checkpoint.read(out_name)
        self._stream += linear(heads, weight)
        self._record(qkv_name, [_energy(linear(change, weight)) for change in head_changes])
        self._record(out_name, [_energy(linear(heads, change)) for change in self._changes(out_name, weight)])

    def _heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """[T, D]: the input of out_proj."""
        return attention_heads(qkv, self._rotation, self._config, self._products)

    def _route_and_expand(self, block: Mapping[str, DenseTensor]) -> float:
        """Run the tokens through the experts of a block; returns r of its router."""
        router = self._checkpoint.read(block["router"].name).float()
        x = self._normed(block["norm_2"], self._stream)
        gates, disturbed = self._gates(x, router), self._gates(self._normed(block["norm_2"], self._disturbed()), router)  # [T, E]
        rerouted = ((gates == 0) != (disturbed == 0)).any(1, keepdim=True)
        gate_changes = torch.where(rerouted, disturbed - gates, 0.0)  # [T, E]
        names = {role: block[role].name for role in ("w1", "v1", "w2")}
        energies = {role: torch.zeros(len(self._candidates[name]), len(x)) for role, name in names.items()}
        out, out_change = torch.zeros_like(x), torch.zeros_like(x)
        for expert in range(self._config.ffn_config.moe_num_experts):
            tokens = ((gates[:, expert] != 0) | (gate_changes[:, expert] != 0)).nonzero(as_tuple=True)[0]
            if len(tokens):
                y, errors = self._expert(names, expert, x[tokens])
                out.index_add_(0, tokens, y * gates[tokens, expert, None])
                out_change.index_add_(0, tokens, y * gate_changes[tokens, expert, None])
                for role, expert_errors in errors.items():
                    for energy, error in zip(energies[role], expert_errors, strict=True):
                        energy[tokens] += error * gates[tokens, expert].square()
        self._stream += out
        for role, name in names.items():
            self._record(name, energies[role])
        return self._relative(_energy(out_change)) / math.sqrt(_DISTURBANCE)

    def _gates(self, x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        """[T, E]: the weight of each expert for each token, 0 for experts that are not chosen."""
        routing = routed(x, router, self._config.ffn_config)
        return torch.zeros(routing.logits.shape).scatter_(1, routing.experts, routing.weights)

    def _expert(self, names: Mapping[str, str], expert: int, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """(output of an expert for x [t, D], for each of its matrices the energies [t] of the output's change in each candidate)."""
        w1, v1, w2 = (self._matrix(name, expert) for name in names.values())
        linear = self._products.linear
        gate, up = linear(x, w1), linear(x, v1)
        active = activate(gate)
        errors = {
            "w1": [_energy(linear((activate(gate + linear(x, change)) - active) * up, w2)) for change in self._changes(names["w1"], w1)],
            "v1": [_energy(linear(active * linear(x, change), w2)) for change in self._changes(names["v1"], v1)],
        }
        hidden = active * up
        errors["w2"] = [_energy(linear(hidden, change)) for change in self._changes(names["w2"], w2)]
        return linear(hidden, w2), errors

    def _finish(self, outside: Mapping[str, DenseTensor]) -> None:
        """Measure the head: the variance of the change of a token's logits relative to the variance of the logits; a shift that all logits
        of a token share changes no probability.
        """
        name = outside["head"].name
        x = self._normed(outside["norm_f"], self._stream)
        logits, changes = _Spread(len(x)), [_Spread(len(x)) for _ in self._candidates[name]]
        if changes:
            for _, rows in self._rows(name):
                logits.add(self._products.linear(x, rows))
                for spread, change in zip(changes, self._changes(name, rows), strict=True):
                    spread.add(self._products.linear(x, change))
        self._errors[name] = [self._worst_ratio(spread.energy(), logits.energy()) for spread in changes]

    def _normed(self, norm: DenseTensor, stream: torch.Tensor) -> torch.Tensor:
        return normed(stream, self._checkpoint.read(norm.name).float())[1]

    def _disturbed(self) -> torch.Tensor:
        """The stream with noise of the same relative energy for every token."""
        noise = torch.randn(self._stream.shape, generator=self._generator)
        return self._stream + noise * (_DISTURBANCE * _energy(self._stream) / _energy(noise)).sqrt().unsqueeze(1)

    def _rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a matrix [N, K], some rows at a time."""
        N, K = self._checkpoint.tensors[name].shape
        step = max(1, _STEP_BYTES // (2 * K))
        for first in range(0, N, step):
            yield first, self._checkpoint.read_rows(name, first, min(step, N - first))

    def _matrix(self, name: str, expert: int) -> torch.Tensor:
        """[N, K]: the matrix of one expert."""
        tensor = self._checkpoint.tensors[name]
        rows = tensor.shape[0] // tensor.experts
        return oriented(self._checkpoint.read_rows(name, expert * rows, rows), tensor)[0]

    def _changes(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """float32 [N, K] for each candidate of a tensor: its rows, rounded, minus `weight`."""
        noise: torch.Tensor | None = None
        for fmt in self._candidates[name]:
            code = fmt.record.trellis
            if code is None:
                yield dequantize(rtn(weight, fmt)[0]).sub_(weight)
                continue
            if noise is None:
                noise = torch.randn(weight.shape, generator=self._noise) * weight.float().square().mean(-1, keepdim=True).sqrt()
            yield expected_change(weight, code, noise)

    def _record(self, name: str, energies: Sequence[torch.Tensor] | torch.Tensor) -> None:
        self._errors[name] = [self._relative(energy) for energy in energies]

    def _relative(self, energy: torch.Tensor) -> float:
        return self._worst_ratio(energy, _energy(self._stream))

    def _worst_ratio(self, energies: torch.Tensor, references: torch.Tensor) -> float:
        """The largest of the sources' mean ratios."""
        return max(_mean_ratio(energies[tokens], references[tokens]) for tokens in self._of_sources)


class _Spread:
    """The sum of squared deviations from the mean, for each of `T` rows whose elements are added some at a time."""

    def __init__(self, T: int) -> None:
        self._count = 0
        self._sum, self._squares = torch.zeros(T, dtype=torch.float64), torch.zeros(T, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """values: [T, n]."""
        self._count += values.shape[1]
        self._sum += values.sum(1, dtype=torch.float64)
        self._squares += values.square().sum(1, dtype=torch.float64)

    def energy(self) -> torch.Tensor:
        """float64 [T]."""
        return self._squares - self._sum.square() / max(1, self._count)


def _energy(values: torch.Tensor) -> torch.Tensor:
    """[T]: the sum of squares of every row."""
    return values.square().sum(1)


def _mean_ratio(energies: torch.Tensor, references: torch.Tensor) -> float:
    """Mean over tokens of energy / reference, with references of at least the smallest normal float32."""
    return float((energies.double() / references.double().clamp_min(torch.finfo(torch.float32).tiny)).mean())
