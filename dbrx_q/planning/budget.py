"""The memory that a user grants to a model, and the placement that follows from it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.kv import KV_FORMATS

from .footprint import MemoryRequest
from .host_memory import available_bytes
from .machine import Machine, Placement, check_visible
from .placement import place
from .policy_names import DEFAULT_POLICY, CachePolicyName, MissPolicy
from .sizes import format_size

__all__ = ["DEFAULT_CONTEXT", "Budget", "check_fits", "check_free", "plan_within", "share_note"]

DEFAULT_CONTEXT = 4096
"""Tokens of a sequence that the KV cache has room for unless the user asks for another number."""


@dataclass(frozen=True)
class Budget:
    """How much memory a model may take, and how it uses that memory.

    - `machine` limits the memory of each device.
    - `context`, `batch` and `kv_format` size the KV cache; `step_tokens` and `logit_rows` size the workspace. Experts get the rest.
    - `cache_policy`, `profile`, `prefetch`, `miss_policy` and `direct` control how experts move when they do not all fit.
    - `fallback` and `upgrade` let a smaller copy of the experts answer instead of the disk.

    A model that takes 22 GiB of one GPU and 48 GiB of host memory, with room for two sequences of 8,192 tokens in an int8 KV cache:

        budget = Budget(Machine.detect({0: "22GiB", "cpu": "48GiB"}), context=8192, batch=2, kv_format="int8")
        model = DbrxForCausalLM.from_pretrained("dbrx-int4", budget=budget)

    Raises:
        RequestError: an unknown format or policy.
    """

    machine: Machine
    """The memory that may be taken: `Machine.detect()` for what is free on this machine, or a `Machine` with sizes in bytes."""
    context: int | None = None
    """Tokens of each sequence in the KV cache; None for 4,096, or the model's context if that is shorter."""
    batch: int = 1
    """Sequences in the KV cache."""
    kv_format: str = "plain"
    """Format of keys and values: "plain" (the dtype of activations), "int8" or "int4"."""
    step_tokens: int | None = None
    """Most tokens of one forward pass, all sequences together; None for a prefill step (512 on a CPU, 2,048 on a GPU)."""
    logit_rows: int | None = None
    """Tokens whose logits are held at once; None for one token of each sequence."""
    cache_policy: str = DEFAULT_POLICY.value
    """Which expert is evicted when a slot is needed: "least-stale", "lru", "lfu", or "static", which keeps the experts that `profile` used
    most."""
    profile: Path | None = None
    """A trace of `dbrx-q trace`; the experts that it used most are loaded first. "static" needs one."""
    prefetch: bool = True
    """Whether experts are fetched before they are needed, as predicted by the next layer's router."""
    direct: bool | None = None
    """Whether experts are read past the page cache (O_DIRECT); None for whichever is measured to be faster."""
    miss_policy: str = MissPolicy.hybrid.value
    """How an expert that is not on its GPU is served: computed by the CPU ("cpu"), copied to the GPU ("copy"), or split between the two so
    that both finish together ("hybrid")."""
    devices: tuple[torch.device, ...] | None = None
    """The torch device of each GPU of `machine`; None for cuda:0, cuda:1 and so on."""
    fallback: bool = False
    """Whether the fallback copy in the checkpoint answers for experts that would have to be read from disk."""
    upgrade: bool = True
    """With `fallback`, whether an expert that the copy answered for is read from disk afterwards, so that the next answer is exact."""
    shares: int = 1
    """Models that are in memory together and divide the user's limits equally; `machine` has the share of one. Errors name it."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kv_format", self.kv_format, KV_FORMATS),
            ("cache_policy", self.cache_policy, [policy.value for policy in CachePolicyName]),
            ("miss_policy", self.miss_policy, [policy.value for policy in MissPolicy]),
        ):
            if value not in list(choices):
                raise RequestError(f"{name} of a budget must be one of {', '.join(choices)}; found {value!r}")

    @property
    def gpus(self) -> tuple[torch.device, ...]:
        """The torch device of each GPU of the machine, in its order."""
        return tuple(torch.device("cuda", i) for i in range(len(self.machine.gpus))) if self.devices is None else self.devices

    def request(
        self, config: DbrxConfig, dtype: torch.dtype | None = None, fallback: Mapping[str, TensorFormat] | None = None
    ) -> MemoryRequest:
        """What memory must be reserved for.

        Args:
            config: of the model.
            dtype: of activations; None for the checkpoint's.
            fallback: the format of every tensor of the fallback copy; None without one.
        """
        context = min(DEFAULT_CONTEXT, config.max_seq_len) if self.context is None else self.context
        return MemoryRequest(context, self.batch, self.kv_format, self.step_tokens, self.logit_rows, dtype, fallback)


def plan_within(
    budget: Budget,
    config: DbrxConfig,
    formats: Mapping[str, TensorFormat],
    source: str,
    *,
    dtype: torch.dtype | None = None,
    fallback: Mapping[str, TensorFormat] | None = None,
) -> Placement:
    """The placement that a model is loaded by.

    Args:
        budget: the memory that may be taken.
        config: of the model.
        formats: of every packed tensor of the checkpoint.
        source: the checkpoint's name in errors.
        dtype: of activations; None for the checkpoint's.
        fallback: the format of every tensor of the fallback copy; None without one.

    Raises:
        RequestError: the model does not fit the budget, the budget is more than is free now, torch does not see one of its GPUs, its
            devices are not as many as its GPUs, or the model cannot have such a context, batch or step.
    """
    if budget.devices is None:
        check_visible(range(len(budget.machine.gpus)))
    elif len(budget.devices) != len(budget.machine.gpus):
        raise RequestError(
            f"devices of a budget must name one for each of its machine's {len(budget.machine.gpus)} GPUs; found {len(budget.devices)}"
        )
    request = budget.request(config, dtype, fallback)
    for name, value, most in (
        ("context", request.context, config.max_seq_len),
        ("batch", budget.batch, None),
        ("step_tokens", 1 if budget.step_tokens is None else budget.step_tokens, None),
        ("logit_rows", 1 if budget.logit_rows is None else budget.logit_rows, None),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            limit = "of at least 1" if most is None else f"from 1 to the model's {most:,} tokens"
            raise RequestError(f"{source}: {name} must be a whole number {limit}; found {value!r}")
    placement = place(config, formats, budget.machine, request)
    check_fits(placement, source, shares=budget.shares)
    check_free(placement, budget.gpus, source, shares=budget.shares)
    return placement


def check_fits(placement: Placement, source: str, *, shares: int = 1) -> None:
    """Refuse a placement that exceeds its budget.

    Args:
        placement: of one model.
        source: the checkpoint's name in errors.
        shares: models that divide the user's limits equally.

    Raises:
        RequestError: with the bytes that each device lacks and the smallest budget that works.
    """
    if placement.fits:
        return
    parts = [
        f"{'the host' if short.device == 'cpu' else short.device} must hold {short.total:,} bytes ({format_size(short.total)}) at least: "
        f"{format_size(short.dense)} of weights that every token reads, {format_size(short.kv_cache)} of KV cache, "
        f"{f'{format_size(short.fallback)} of a fallback copy, ' if short.fallback else ''}"
        f"{format_size(short.workspace + short.reserve)} of workspace and reserve, and an expert; the budget is {short.budget:,} bytes"
        f"{share_note(shares)}"
        for short in placement.over_budget
    ]
    raise RequestError(f"{source}: {'; '.join(parts)}. Give more, or shorten the context")


def share_note(shares: int) -> str:
    """What an error adds to a share of the user's limits; empty if one model has them whole."""
    return "" if shares == 1 else f", which is 1/{shares} of the limit, since {shares} models are in memory together"


def check_free(placement: Placement, gpus: Sequence[torch.device], source: str, *, shares: int = 1) -> None:
    """Refuse a placement that takes more memory than is free now.

    Args:
        placement: of one model.
        gpus: the torch device of each of its GPUs.
        source: the checkpoint's name in errors.
        shares: models that divide the user's limits equally; some may be in memory already.

    Raises:
        RequestError: with the bytes that are free on the device that lacks memory, and the budget that would fit.
    """

    def free_on(device: torch.device) -> int:
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()

    for plan, device in [*zip(placement.gpus, gpus, strict=True), (placement.host, torch.device("cpu"))]:
        wanted = plan.total - (plan.reserve if device.type == "cuda" else 0)
        if wanted > free_on(device):  # the memory of an unreachable model may not have been returned yet
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if wanted > (free := free_on(device)):
            name = "host memory" if plan.device == "cpu" else plan.device
            holder = "another program" if shares == 1 else "another program, or a model of this command,"
            raise RequestError(
                f"{source}: the plan takes {format_size(wanted)} of {name}, of which {format_size(free)} are free now: {holder} "
                f"took the rest. Free some, or give at most {shares * free:,} bytes"
            )
