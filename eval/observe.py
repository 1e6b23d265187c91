"""Runs a text through a model and records the last hidden states, the experts chosen, and a sample of the residual stream.

Dimension letters: `T` tokens of a step, `P` predicted tokens of a step, `S` sampled ones of them, `L` layers, `A` active experts,
`E` experts, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.batch import batch_of
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import all_finite, finite_logits, overflow_error

from .windows import Window

__all__ = [
    "LOGIT_TOKENS",
    "STEP_TOKENS",
    "Observation",
    "Progress",
    "batches",
    "check_ids",
    "chunks",
    "logit_chunks",
    "observe",
    "sample_interval",
    "step_sizes",
    "step_tokens",
]

_RELOADING_STEP_TOKENS = 32_768  # where each step dequantizes all experts again: about 6 GB of activations for DBRX in float32
STEP_TOKENS = 4096  # tokens of one forward pass: enough to keep matrix units busy, few enough to bound the memory of a long window
LOGIT_TOKENS = 256  # predicted tokens whose logits are in memory at once; 100,352 float64 values each are 205 MB
_SAMPLE_BYTES = 64 << 20
_SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class Observation:
    """What `observe` records of one forward pass."""

    first: int
    """Tokens of the text that were predicted before this step."""
    targets: torch.Tensor
    """int64 [P], the actual tokens."""
    hidden: torch.Tensor
    """[P, D], the last hidden states, which predict `targets`."""
    experts: torch.Tensor
    """uint8 [L, P, A], the experts that the routers chose, ascending."""
    states: torch.Tensor
    """float32 [S, L, D], the residual stream after every block."""

    @property
    def sampled(self) -> int:
        """S."""
        return len(self.states)


@dataclass(frozen=True)
class _WindowPart:
    """The tokens of one window that run in one step."""

    first: int
    """Index in the text of its first token."""
    end: int
    """Index in the text one past its last token."""
    past: int
    """Tokens of the window that ran in earlier steps."""
    scored: int
    """Index in the text of the first token of the window that is predicted."""
    last: bool
    """Whether it ends the window."""

    @property
    def predicts(self) -> slice:
        """Indices in the text of the tokens that this part predicts: the successor of each of its tokens, within the window."""
        return slice(max(self.scored, self.first + 1), self.end if self.last else self.end + 1)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids without an embedding in the model.

    Raises:
        RequestError: with the token.
    """
    if ids and max(ids) >= vocab_size:
        raise RequestError(
            f"token ids must be below the model's vocabulary of {vocab_size}; found {max(ids)}. Is the tokenizer this model's?"
        )


def step_tokens(models: Iterable[DbrxForCausalLM]) -> int:
    """Tokens of one forward pass through these models.

    More if a model dequantizes its experts again in every step, except where a model's memory was planned for `STEP_TOKENS`.
    """
    models = list(models)
    if any(model.placement is not None for model in models):
        return STEP_TOKENS
    stores = [model.transformer.expert_store for model in models]
    return _RELOADING_STEP_TOKENS if any(store is not None and store.reloads_each_step for store in stores) else STEP_TOKENS


def batches(windows: Sequence[Window], step: int | None = None, done: Iterable[int] = ()) -> list[tuple[int, list[Window]]]:
    """(index of the first window, windows that run together): as many as fit in `step` tokens (`STEP_TOKENS` for None), at least one.

    Args:
        windows: of the text.
        step: tokens of one forward pass.
        done: numbers of windows that earlier runs finished; a batch begins after each, so that a run resumes there even if its steps have
            another size now.
    """
    groups: list[tuple[int, list[Window]]] = []
    begins = set(done)
    tokens = 0
    for index, window in enumerate(windows):
        size = window.end - window.first
        if not groups or index in begins or tokens + size > (step or STEP_TOKENS):
            groups.append((index, []))
            tokens = 0
        groups[-1][1].append(window)
        tokens += size
    return groups


def sample_interval(windows: Sequence[Window], layers: int, width: int) -> int:
    """Distance in predicted tokens between two samples, so that at most 1,024 residual streams, of at most 64 MiB, are kept.

    The distance and the predicted tokens of a window have no common divisor. Otherwise all samples would fall on the same few positions of
    the windows, and a state after one token differs from a state after hundreds.
    """
    most = max(16, min(_SAMPLE_TOKENS, _SAMPLE_BYTES // (4 * layers * width)))
    interval = max(1, -(-sum(window.tokens for window in windows) // most))
    window_tokens = windows[len(windows) // 2].tokens
    while math.gcd(interval, window_tokens) != 1:
        interval += 1
    return interval


@torch.inference_mode()
def observe(
    model: DbrxForCausalLM,
    text: torch.Tensor,
    windows: Sequence[Window],
    *,
    first: int = 0,
    interval: int = 0,
    kv_format: str = "plain",
) -> Iterator[Observation]:
    """Run a batch of windows. A single window longer than `STEP_TOKENS` runs in parts through a KV cache, one observation each.

    Args:
        model: a loaded model.
        text: int64 [N], on the CPU.
        windows: a batch of `batches`.
        first: tokens of the text that were predicted before.
        interval: distance in predicted tokens between two samples of the residual stream; 0 for no samples.
        kv_format: "plain" attends to unquantized keys and values; "int8" and "int4" to keys and values quantized to that format.

    Raises:
        RequestError: hidden states that are not finite.
    """
    longest = max(window.end - window.first for window in windows)
    cache = None
    if kv_format != "plain" or (longest > STEP_TOKENS and len(windows) == 1):
        cache = KVCache(model.config, len(windows), longest, dtype=model.dtype, device=model.transformer.devices, format=kv_format)
    for parts in _steps(windows):
        targets = torch.cat([text[part.predicts] for part in parts])
        tokens = torch.cat([text[part.first : part.end] for part in parts])
        positions: list[int] = []  # in the step, of the tokens whose states predict
        start = 0
        for part in parts:
            predicts = part.predicts
            positions += range(start + predicts.start - 1 - part.first, start + predicts.stop - 1 - part.first)
            start += part.end - part.first
        rows = torch.tensor(positions, dtype=torch.int64)
        sampled = rows[(torch.arange(len(rows)) + first) % interval == 0] if interval else rows[:0]
        batch = batch_of([part.end - part.first for part in parts], [part.past for part in parts], cache, model.device)
        streams: list[torch.Tensor] = []  # float32 [sampled, D] of every block

        def keep(x: torch.Tensor, delta: torch.Tensor | None, streams: list[torch.Tensor] = streams, rows: torch.Tensor = sampled) -> None:
            local_rows = rows.to(x.device)  # blocks may be on different GPUs
            stream = x[local_rows].float()
            streams.append((stream if delta is None else stream + delta[local_rows].float()).cpu())

        hidden, logits = model.transformer.run(tokens.to(model.device), batch, keep)
        if not all_finite(hidden):
            raise overflow_error(model, partial(model.transformer.run, tokens.to(model.device), batch))
        if cache is not None:
            cache.advance([part.end - part.first for part in parts])
        top = model.config.ffn_config.moe_top_k
        experts = torch.stack([_chosen(layer[rows.to(layer.device)], top) for layer in logits])
        yield Observation(first, targets, hidden[rows.to(hidden.device)], experts, torch.stack(streams, 1))
        first += len(targets)


def step_sizes(windows: Sequence[Window]) -> list[int]:
    """P of every observation that `observe` yields for a batch of windows."""
    return [sum(max(0, part.predicts.stop - part.predicts.start) for part in parts) for parts in _steps(windows)]


def _steps(windows: Sequence[Window]) -> Iterator[list[_WindowPart]]:
    if len(windows) > 1 or windows[0].end - windows[0].first <= STEP_TOKENS:
        yield [_WindowPart(window.first, window.end, 0, window.scored, True) for window in windows]
        return
    window = windows[0]
    for first in range(window.first, window.end, STEP_TOKENS):
        end = min(first + STEP_TOKENS, window.end)
        yield [_WindowPart(first, end, first - window.first, window.scored, end == window.end)]


def _chosen(logits: torch.Tensor, top: int) -> torch.Tensor:
    """uint8 [P, A], ascending, from router logits [P, E]; ties go to the lower index, as in the router."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top].sort(-1).values.to(torch.uint8).cpu()


def chunks(tokens: int) -> Iterator[slice]:
    """Slices of a step's predicted tokens, at most `LOGIT_TOKENS` long."""
    for first in range(0, tokens, LOGIT_TOKENS):
        yield slice(first, min(first + LOGIT_TOKENS, tokens))


def logit_chunks(model: DbrxForCausalLM, step: Observation) -> Iterator[tuple[slice, torch.Tensor]]:
    """(slice of the step's predicted tokens, float64 logits [at most `LOGIT_TOKENS`, V]), which bounds the logits in memory."""
    for chunk in chunks(len(step.targets)):
        yield chunk, finite_logits(model, step.hidden[chunk]).double()


Progress = Callable[[int, int], None]
"""Called with (done, total)."""
