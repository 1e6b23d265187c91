"""What the commands that load a model share: the options that say how much memory it may take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbrx_q.planning.policy_names import DEFAULT_POLICY, CachePolicyName, MissPolicy
from dbrx_q.planning.sizes import parse_size

if TYPE_CHECKING:
    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Gpu
    from dbrx_q.sources.base import Source

__all__ = [
    "FALLBACK_HELP",
    "MISS_HELP",
    "PLANNED_GPU_HELP",
    "POLICY_HELP",
    "PREFETCH_HELP",
    "PROFILE_HELP",
    "Fallback",
    "GpuSizes",
    "Ram",
    "budget_of",
    "give",
    "planned_gpus",
    "rate",
]

RAM_HELP = "Host memory that the model may take, as 64GiB: weights, KV cache and workspace; Python and its libraries take 0.4 GB besides."
GPU_HELP = (
    "Memory of a GPU that may be taken, as 22GiB; once for each GPU, or auto for all that is free on all. After commas what `plan` takes: "
    "desktop, link=25GB, bandwidth=900GB."
)
PLANNED_GPU_HELP = (
    "Memory of a GPU, as 24GiB; once for each, or auto for this machine's. After commas: desktop for one that shows a desktop, "
    "link=25GB and bandwidth=900GB for bytes a second from the host and of its memory."
)
POLICY_HELP = "With --ram or --gpu, which expert gives way to another; static pins what --profile used most."
MISS_HELP = "With --gpu, an expert that is not on its gpu: computed by the CPU where it lies, copied, or whichever mix ends first."
PROFILE_HELP = "A trace of a text, by `dbrx-q trace`, whose most used experts are held first."
PREFETCH_HELP = "With --ram or --gpu, whether experts are fetched before they are needed, as the next layer's router predicts them."


FALLBACK_HELP = (
    "With --ram or --gpu, let the fallback copy that the checkpoint carries (`quantize "
    "--fallback-format`) answer for experts on disk: faster, and "
    "less exact."
)


Fallback = Annotated[bool, typer.Option("--fallback", help=FALLBACK_HELP)]
Ram = Annotated[str | None, typer.Option(metavar="SIZE", help=RAM_HELP, show_default=False)]
GpuSizes = Annotated[list[str] | None, typer.Option(metavar="SIZE", help=GPU_HELP, show_default=False)]


def budget_of(
    ram: str | None,
    gpu: list[str] | None,
    *,
    context: int | None = None,
    batch: int = 1,
    kv_format: str = "plain",
    step_tokens: int | None = None,
    policy: CachePolicyName = DEFAULT_POLICY,
    profile: Path | None = None,
    prefetch: bool = True,
    miss_policy: MissPolicy = MissPolicy.hybrid,
    fallback: bool = False,
) -> Budget | None:
    """What the options allow; None where neither --ram nor --gpu was given.

    Raises:
        RequestError: a size that is none, a GPU that is not there, or options that need --ram or --gpu.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Machine

    if not gpu and miss_policy is not MissPolicy.hybrid:
        raise RequestError(f"--miss-policy is for experts that are not on their GPU; found {miss_policy.value} without --gpu")
    if ram is None and not gpu:
        if policy is not DEFAULT_POLICY or profile is not None or not prefetch:
            raise RequestError("--policy, --profile and --no-prefetch need a cache of experts; add --ram or --gpu")
        if fallback:
            raise RequestError("--fallback answers for experts that memory does not hold; found no limit to memory. Add --ram or --gpu")
        return None
    if policy is CachePolicyName.static and profile is None:
        raise RequestError("--policy static pins what a profile used most; found no --profile. Record one with `dbrx-q trace`")
    limits: dict[int | str, int | str] = {} if ram is None else {"cpu": parse_size(ram)}
    gpus = planned_gpus(gpu)
    machine = Machine.detect(limits | {i: gpu.memory for i, gpu in enumerate(gpus)})
    return Budget(
        replace(machine, gpus=gpus),
        context,
        batch,
        kv_format,
        step_tokens,
        cache_policy=policy.value,
        profile=profile,
        prefetch=prefetch,
        miss_policy=miss_policy.value,
        fallback=fallback,
    )


def give(
    source: Source,
    ram: str | None,
    gpu: list[str] | None,
    *,
    context: int,
    caches: int = 1,
    kv_format: str = "plain",
    fallback: bool = False,
) -> None:
    """Let a checkpoint that is measured on windows of `context` tokens take what the options allow; errors as for `budget_of`.

    caches: of keys and values that are held together. fallback: whether its fallback copy answers; what memory holds at full bits then
    stays, so that figures repeat.
    """
    from dataclasses import replace

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.observe import LOGIT_TOKENS, STEP_TOKENS
    from dbrx_q.sources.folder import PackedFolder

    if fallback and not isinstance(source, PackedFolder):
        raise RequestError(f"{source.name}: --fallback is for checkpoints that dbrx_q quantized; this one is {source.format}. Leave it out")
    batch = caches * max(1, STEP_TOKENS // context)
    found = budget_of(ram, gpu, context=context, batch=batch, kv_format=kv_format, step_tokens=max(context, STEP_TOKENS), fallback=fallback)
    if found is not None:  # logits are held in float32 and in float64
        source.budget = replace(found, logit_rows=3 * LOGIT_TOKENS, upgrade=False)


def planned_gpus(gpu: list[str] | None) -> tuple[Gpu, ...]:
    """The GPUs of a machine, which need not be this machine's.

    Raises:
        RequestError: what is no size, or a property that no GPU has.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.machine import Gpu

    if gpu and _is_auto(gpu):
        return _all_gpus()
    gpus = []
    for text in gpu or ():
        size, *rest = text.split(",")
        properties = {"memory": parse_size(size)}
        for item in rest:
            name, _, value = item.partition("=")
            if name in ("link", "bandwidth") and value:
                properties[name] = rate(value)  # type: ignore[assignment] # bytes are whole numbers, rates are not
            elif item == "desktop":
                properties["desktop"] = True
            else:
                raise RequestError(f"--gpu takes a size, and after commas desktop, link=25GB or bandwidth=900GB; found {item!r}")
        gpus.append(Gpu(**properties))  # type: ignore[arg-type] # by name
    return tuple(gpus)


def rate(text: str) -> float:
    """Bytes a second of a size such as 25GB.

    Raises:
        RequestError: what is no size, or nothing.
    """
    from dbrx_q.errors import RequestError

    found = parse_size(text.removesuffix("/s"))
    if found <= 0:
        raise RequestError(f"a bandwidth must be more than nothing; found {text!r}")
    return float(found)


def _all_gpus() -> tuple[Gpu, ...]:
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.machine import Machine

    gpus = Machine.detect().gpus
    if not gpus:
        raise RequestError("--gpu auto takes the GPUs that torch sees; it sees none. Check the driver, or leave it out")
    return gpus


def _is_auto(gpu: list[str]) -> bool:
    from dbrx_q.errors import RequestError

    if "auto" in gpu and len(gpu) > 1:
        raise RequestError(f"--gpu auto takes all GPUs and goes with no other --gpu; found {', '.join(gpu)}")
    return gpu == ["auto"]
