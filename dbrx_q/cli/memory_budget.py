"""The budget that --ram, --gpu and the options about missed experts make, and the machine that `plan` and `simulate` assume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_q.planning.policy_names import DEFAULT_POLICY, MissPolicy
from dbrx_q.planning.sizes import parse_size

if TYPE_CHECKING:
    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Gpu, Machine
    from dbrx_q.sources.base import Source

__all__ = ["budget_of", "give_budget", "machine_of"]


def budget_of(
    ram: str | None,
    gpu: list[str] | None,
    *,
    context: int | None = None,
    batch: int = 1,
    kv_format: str = "plain",
    step_tokens: int | None = None,
    policy: str = DEFAULT_POLICY,
    profile: Path | None = None,
    prefetch: bool = True,
    miss_policy: str = MissPolicy.hybrid,
    fallback: bool = False,
) -> Budget | None:
    """What the options allow; None where neither --ram nor --gpu was given.

    Raises:
        RequestError: a malformed size, a GPU that this machine lacks, or options that need --ram or --gpu.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Machine

    if not gpu and miss_policy != MissPolicy.hybrid:
        raise RequestError(f"--miss-policy is for experts that are not on their GPU; found {miss_policy} without --gpu. Leave it out")
    if ram is None and not gpu:
        if policy != DEFAULT_POLICY or profile is not None or not prefetch:
            raise RequestError("--policy, --profile and --no-prefetch need a cache of experts; add --ram or --gpu")
        if fallback:
            raise RequestError("--fallback answers for experts that memory does not hold; found no limit to memory. Add --ram or --gpu")
        return None
    if policy == "static" and profile is None:
        raise RequestError("--policy static pins what a profile used most; found no --profile. Record one with `dbrx-q trace`")
    limits: dict[int | str, int | str] = {} if ram is None else {"cpu": parse_size(ram)}
    gpus = _gpus(gpu)
    machine = Machine.detect(limits | {i: gpu.memory for i, gpu in enumerate(gpus)})
    return Budget(
        replace(machine, gpus=gpus),
        context,
        batch,
        kv_format,
        step_tokens,
        cache_policy=policy,
        profile=profile,
        prefetch=prefetch,
        miss_policy=miss_policy,
        fallback=fallback,
    )


def give_budget(
    source: Source,
    ram: str | None,
    gpu: list[str] | None,
    *,
    context: int,
    caches: int = 1,
    kv_format: str = "plain",
    fallback: bool = False,
    shares: int = 1,
) -> None:
    """Give a checkpoint that is measured on windows of `context` tokens the budget that the options name.

    Args:
        source: the checkpoint.
        ram: as `budget_of` takes it.
        gpu: as `budget_of` takes it.
        context: tokens of a window.
        caches: KV caches that are held together.
        kv_format: their format.
        fallback: whether the checkpoint's fallback copy answers for experts on disk. Experts that memory holds at full bits are then
            not evicted, so that figures repeat.
        shares: models that are in memory together, each of which gets an equal share of every device.

    Raises:
        RequestError: as for `budget_of`, or --fallback for a checkpoint that has no fallback copy by its kind.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.observe import LOGIT_TOKENS, STEP_TOKENS
    from dbrx_q.sources.folder import NativeFolder

    if fallback and not isinstance(source, NativeFolder):
        raise RequestError(f"{source.name}: --fallback is for checkpoints that dbrx_q quantized; this one is {source.format}. Leave it out")
    batch = caches * max(1, STEP_TOKENS // context)
    step_tokens = max(context, STEP_TOKENS)
    budget = budget_of(ram, gpu, context=context, batch=batch, kv_format=kv_format, step_tokens=step_tokens, fallback=fallback)
    if budget is not None:  # logits are held in float32 and in float64
        source.budget = replace(budget, machine=_share(budget.machine, shares), shares=shares, logit_rows=3 * LOGIT_TOKENS, upgrade=False)


def _share(machine: Machine, shares: int) -> Machine:
    """The machine with an equal share of each device's memory for one of `shares` models."""
    ram = None if machine.ram is None else machine.ram // shares
    return replace(machine, ram=ram, gpus=tuple(replace(gpu, memory=gpu.memory // shares) for gpu in machine.gpus))


def machine_of(ram: str | None, gpu: list[str] | None, host_bandwidth: str | None, disk_bandwidth: str | None) -> Machine:
    """The machine that --ram, --gpu, --host-bandwidth and --disk-bandwidth describe, which need not be this one.

    Bandwidths that are not named are those that were measured on this machine, if it can be this one, or assumed.

    Raises:
        RequestError: a malformed size, or a property that no GPU has.
    """
    from dbrx_q.planning.machine import Machine

    machine = Machine(None if ram is None else parse_size(ram), _gpus(gpu)).as_measured()
    if host_bandwidth is not None:
        machine = replace(machine, host_bandwidth=_rate(host_bandwidth))
    return machine if disk_bandwidth is None else replace(machine, disk_bandwidth=_rate(disk_bandwidth))


def _gpus(gpu: list[str] | None) -> tuple[Gpu, ...]:
    """One GPU for each --gpu, such as `24GiB` or `24GiB,desktop,link=25GB,bandwidth=900GB`; all of this machine for `auto`."""
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.machine import Gpu

    if gpu and "auto" in gpu:
        return _all_gpus(gpu)
    gpus = []
    for text in gpu or ():
        size, *items = text.split(",")
        properties = {"memory": parse_size(size)}
        for item in items:
            name, _, value = item.partition("=")
            if name in ("link", "bandwidth") and value:
                properties[name] = _rate(value)  # type: ignore[assignment] # sizes are int, rates are float
            elif item == "desktop":
                properties["desktop"] = True
            else:
                raise RequestError(f"--gpu takes a size, and after commas desktop, link=25GB or bandwidth=900GB; found {item!r}")
        gpus.append(Gpu(**properties))  # type: ignore[arg-type] # the dictionary mixes the fields' types
    return tuple(gpus)


def _all_gpus(gpu: list[str]) -> tuple[Gpu, ...]:
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.machine import Machine

    if len(gpu) > 1:
        raise RequestError(f"--gpu auto takes all GPUs and excludes every other --gpu; found {', '.join(gpu)}")
    gpus = Machine.detect().gpus
    if not gpus:
        raise RequestError("--gpu auto takes the GPUs that torch sees; it sees none. Check the driver, or leave it out")
    return gpus


def _rate(text: str) -> float:
    """Bytes a second, of a size such as 25GB."""
    from dbrx_q.errors import RequestError

    rate = parse_size(text.removesuffix("/s"))
    if rate <= 0:
        raise RequestError(f"a bandwidth must be more than nothing; found {text!r}")
    return float(rate)
