"""Running a text through a model, and what is kept of it: the states that predict, the experts chosen, a sample of the residual stream.

Dimension letters: `T` tokens of a step, `P` predicted tokens of a step, `S` sampled ones of them, `L` layers, `A` active experts,
`E` experts, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM, batch_of

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

_RENEWED_STEP_TOKENS = 32_768  # where each step decodes all experts again: about 6 GB of activations at DBRX's sizes in float32
STEP_TOKENS = 4096  # tokens that run together: enough to keep matrix units busy, few enough to bound the memory of a long window
LOGIT_TOKENS = 256  # predicted tokens whose logits are held at once; 100,352 float64 each are 205 MB
_SAMPLE_BYTES = 64 << 20
_SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class Observation:
    """What a model made of one step.

    first: how many tokens of the text were predicted before. targets: int64 [P], the tokens that came. hidden: [P, D], the last hidden
    states that predict them. experts: uint8 [L, P, A], ascending. states: float32 [S, L, D], the residual stream after every block.
    """

    first: int
    targets: torch.Tensor
    hidden: torch.Tensor
    experts: torch.Tensor
    states: torch.Tensor

    @property
    def sampled(self) -> int:
        """S."""
        return len(self.states)


@dataclass(frozen=True)
class _WindowPart:
    """Tokens first .. end-1 of the text, of a window of which `past` are known already; those from `scored` on are predicted."""

    first: int
    end: int
    past: int
    scored: int
    last: bool  # of its window

    @property
    def predicts(self) -> slice:
        """Places in the text of the tokens that this piece predicts: the one after each of its own that the window still holds."""
        return slice(max(self.scored, self.first + 1), self.end if self.last else self.end + 1)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        RequestError: with the token.
    """
    if ids and max(ids) >= vocab_size:
        raise RequestError(
            f"token ids must be below the model's vocabulary of {vocab_size}; found {max(ids)}. Is the tokenizer this model's?"
        )


def step_tokens(models: Iterable[DbrxForCausalLM]) -> int:
    """How many tokens run together through these models: more where the experts of one are decoded again for every step, unless another
    was given memory for so many."""
    models = list(models)
    if any(model.placement is not None for model in models):
        return STEP_TOKENS
    stores = [model.transformer.expert_store for model in models]
    return _RENEWED_STEP_TOKENS if any(store is not None and store.reloads_each_step for store in stores) else STEP_TOKENS


def batches(windows: Sequence[Window], step: int | None = None, done: Iterable[int] = ()) -> list[tuple[int, list[Window]]]:
    """(index of the first, windows that run together): as many as `step` tokens hold (`STEP_TOKENS` for None), at least one.

    A batch begins wherever so many windows are `done`, so that a run goes on there though its steps are of another size now.
    """
    found: list[tuple[int, list[Window]]] = []
    begins = set(done)
    tokens = 0
    for index, window in enumerate(windows):
        size = window.end - window.first
        if not found or index in begins or tokens + size > (step or STEP_TOKENS):
            found.append((index, []))
            tokens = 0
        found[-1][1].append(window)
        tokens += size
    return found


def sample_interval(windows: Sequence[Window], layers: int, width: int) -> int:
    """Every how many predicted tokens one is sampled, so that the residual streams of at most 1,024 take at most 64 MiB.

    It has no divisor in common with the predicted tokens of a window: otherwise samples would fall on few places of the windows, and a
    state that has seen one token is not like others.
    """
    most = max(16, min(_SAMPLE_TOKENS, _SAMPLE_BYTES // (4 * layers * width)))
    interval = max(1, -(-sum(window.tokens for window in windows) // most))
    each = windows[len(windows) // 2].tokens
    while math.gcd(interval, each) != 1:
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
    """Run a batch of windows; a single window longer than `STEP_TOKENS` goes in pieces through a KV cache, one observation each.

    Args:
        model: a loaded model.
        text: int64 [N], on the CPU.
        windows: one of `batches`.
        first: how many tokens of the text were predicted before.
        interval: every how many predicted tokens the residual stream is kept; 0 for none.
        kv_format: "plain" attends to keys and values as they are; "int8" and "int4" to what a cache of that format keeps of them.
    """
    longest = max(window.end - window.first for window in windows)
    cache = None
    if kv_format != "plain" or (longest > STEP_TOKENS and len(windows) == 1):
        cache = KVCache(model.config, len(windows), longest, dtype=model.dtype, device=model.transformer.devices, format=kv_format)
    for pieces in _steps(windows):
        targets = torch.cat([text[piece.predicts] for piece in pieces])
        tokens = torch.cat([text[piece.first : piece.end] for piece in pieces])
        places: list[int] = []
        start = 0
        for piece in pieces:
            predicts = piece.predicts
            places += range(start + predicts.start - 1 - piece.first, start + predicts.stop - 1 - piece.first)
            start += piece.end - piece.first
        rows = torch.tensor(places, dtype=torch.int64)
        kept = rows[(torch.arange(len(rows)) + first) % interval == 0] if interval else rows[:0]
        batch = batch_of([piece.end - piece.first for piece in pieces], [piece.past for piece in pieces], cache, model.device)
        with _residual_streams(model, kept) as streams:
            hidden, logits = model.transformer.run(tokens.to(model.device), batch)
        if cache is not None:
            cache.advance([piece.end - piece.first for piece in pieces])
        top = model.config.ffn_config.moe_top_k
        experts = torch.stack([_chosen(layer[rows.to(layer.device)], top) for layer in logits])
        yield Observation(first, targets, hidden[rows.to(hidden.device)], experts, torch.stack(streams, 1))
        first += len(targets)


def step_sizes(windows: Sequence[Window]) -> list[int]:
    """P of every observation that `observe` gives of a batch of windows."""
    return [sum(max(0, piece.predicts.stop - piece.predicts.start) for piece in pieces) for pieces in _steps(windows)]


def _steps(windows: Sequence[Window]) -> Iterator[list[_WindowPart]]:
    if len(windows) > 1 or windows[0].end - windows[0].first <= STEP_TOKENS:
        yield [_WindowPart(window.first, window.end, 0, window.scored, True) for window in windows]
        return
    window = windows[0]
    for first in range(window.first, window.end, STEP_TOKENS):
        end = min(first + STEP_TOKENS, window.end)
        yield [_WindowPart(first, end, first - window.first, window.scored, end == window.end)]


def _chosen(logits: torch.Tensor, top: int) -> torch.Tensor:
    """uint8 [P, A] in ascending order, of router logits [P, E]; as the router chooses, ties go to the lower index."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top].sort(-1).values.to(torch.uint8).cpu()


@contextmanager
def _residual_streams(model: DbrxForCausalLM, rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Fills a list with float32 [S, D] per block: what the block's output and what its experts add come to."""
    streams: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        x, delta, _logits = output
        own = rows.to(x.device)  # of several GPUs the block's
        streams.append((x[own].float() + delta[own].float()).cpu())

    handles = [block.register_forward_hook(keep) for block in model.transformer.blocks]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def chunks(tokens: int) -> Iterator[slice]:
    """Places of a step's predicted tokens, at most `LOGIT_TOKENS` together."""
    for first in range(0, tokens, LOGIT_TOKENS):
        yield slice(first, min(first + LOGIT_TOKENS, tokens))


def logit_chunks(model: DbrxForCausalLM, seen: Observation) -> Iterator[tuple[slice, torch.Tensor]]:
    """(places in the step, float64 logits [at most `LOGIT_TOKENS`, V]), so that no more logits are held at once."""
    for place in chunks(len(seen.targets)):
        yield place, model.lm_head(seen.hidden[place]).double()


Progress = Callable[[int, int], None]
"""Called with (done, in all)."""
