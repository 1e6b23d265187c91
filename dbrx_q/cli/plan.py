"""`dbrx-q plan`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_q.planning.sizes import format_size, parse_size

from . import budgets, output
from .generate import KV_HELP, KvFormat
from .quantize import FormatName

if TYPE_CHECKING:
    from dbrx_q.planning.machine import Placement
    from dbrx_q.planning.speed import SpeedBounds, Term

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q plan databricks/dbrx-instruct --format int4 --gpu 24GiB --gpu 24GiB --ram 64GiB --context 8192")

FALLBACK_HELP = "Plan for the fallback copy that the checkpoint carries, or that --fallback-format names, to answer for experts on disk."

_KINDS = ("dense", "experts", "fallback", "kv_cache", "workspace", "reserve")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    gpu: Annotated[list[str] | None, typer.Option(help=budgets.PLANNED_GPU_HELP, show_default=False)] = None,
    ram: Annotated[str | None, typer.Option(help=f"{budgets.RAM_HELP} As much as it needs unless given.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; 4096, or the model's context where that is shorter.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    format: Annotated[FormatName | None, typer.Option(help="Plan for what `quantize` would make of a plain checkpoint.")] = None,
    group_size: Annotated[int | None, typer.Option(help="With --format, its group size; 64 unless given.", show_default=False)] = None,
    fallback: Annotated[bool, typer.Option("--fallback", help=FALLBACK_HELP)] = False,
    fallback_format: Annotated[
        FormatName | None, typer.Option(help="With --format and --fallback, the format of the fallback copy.", show_default=False)
    ] = None,
    host_bandwidth: Annotated[str, typer.Option(help="What host memory gives in a second.")] = "60GB",
    disk_bandwidth: Annotated[str, typer.Option(help="What the disk gives in a second.")] = "5GB",
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Say where a model would lie on a machine and how fast that can be, before any weight is downloaded; reads config.json alone."""
    from dbrx_q.checkpoint.layout import TensorFormat, tensor_formats
    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import RequestError
    from dbrx_q.experts.fallback import carried_formats, check_fallback
    from dbrx_q.planning.advice import advice
    from dbrx_q.planning.budget import DEFAULT_CONTEXT
    from dbrx_q.planning.footprint import MemoryRequest
    from dbrx_q.planning.machine import Machine
    from dbrx_q.planning.placement import place
    from dbrx_q.planning.speed import speed_bounds
    from dbrx_q.quantize.pipeline.format_assignment import default_formats

    config = DbrxConfig.from_pretrained(path)
    formats = tensor_formats(config, path)
    if format is None and group_size is not None:
        raise RequestError(f"--group-size goes with --format; found {group_size} alone. Add --format int4, int8, nf4 or nf4-double")
    if format is not None:
        if formats:
            raise RequestError(f"--format is for a plain checkpoint; {path} is quantized already. Leave it out")
        formats = default_formats(config, TensorFormat(format.value, 64 if group_size is None else group_size))
    if fallback_format is not None and (format is None or not fallback):
        raise RequestError(
            f"--fallback-format goes with --format and --fallback; found {fallback_format.value} without. Add them, or leave it out"
        )
    copy = None
    if fallback_format is not None:
        copy = default_formats(config, TensorFormat(fallback_format.value, 64))
        check_fallback(config, formats, copy, path)
    elif fallback:
        copy = carried_formats(path, config, formats)
    context = min(DEFAULT_CONTEXT, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    if batch < 1:
        raise RequestError(f"--batch must be at least 1; found {batch}")
    machine = Machine(
        None if ram is None else parse_size(ram), budgets.planned_gpus(gpu), budgets.rate(host_bandwidth), budgets.rate(disk_bandwidth)
    )
    request = MemoryRequest(context, batch, kv.value, fallback=copy)
    plan = place(config, formats, machine, request)
    ffn = config.ffn_config
    bounds = speed_bounds(plan, machine, n_experts=ffn.moe_num_experts, top_k=ffn.moe_top_k)
    sentence = advice(config, formats, machine, request)
    if json:
        output.print_json(_as_dict(plan, bounds) | {"advice": sentence})
        return
    _print(plan, bounds)
    print(sentence)


def _as_dict(plan: Placement, bounds: SpeedBounds) -> dict[str, Any]:
    def device(found: Any) -> dict[str, Any]:
        bytes_of = {kind: getattr(found, kind) for kind in (*_KINDS, "total")}
        return {"device": found.device, "budget": found.budget, "layers": list(found.layers), **bytes_of, "expert_slots": found.n_slots}

    def listed(terms: Iterable[Term]) -> list[dict[str, Any]]:
        return [{"path": t.path, "data": t.data, "bytes": t.nbytes, "bytes_per_second": t.bandwidth, "seconds": t.seconds} for t in terms]

    return {
        "fits": plan.fits,
        "shortfall": plan.shortfall,
        "short_device": plan.short_device,
        "devices": [device(found) for found in plan.devices],
        "experts": plan.experts,
        "expert_bytes": plan.expert_bytes,
        "disk_experts": plan.disk_experts,
        "hit_rate": bounds.hit_rate,
        "tokens_per_second": {"lower": bounds.lower, "expected": bounds.expected, "upper": bounds.upper},
        "per_token": listed(bounds.terms),
        "per_token_lower": listed(bounds.lower_terms),
        "per_token_upper": listed(bounds.upper_terms),
    }


def _print(plan: Placement, bounds: SpeedBounds) -> None:
    devices = [found for found in plan.devices if found.total or found.layers[1] > found.layers[0]]
    print(f"{'':12}" + "".join(f"{found.device:>14}" for found in devices))
    for kind in _KINDS:
        if any(getattr(found, kind) for found in devices):
            print(f"{kind.replace('_', ' '):12}" + "".join(f"{format_size(getattr(found, kind)):>14}" for found in devices))
    print(f"{'total':12}" + "".join(f"{format_size(found.total):>14}" for found in devices))
    print(f"{'budget':12}" + "".join(f"{'none' if found.budget is None else format_size(found.budget):>14}" for found in devices))
    print(f"{'layers':12}" + "".join(f"{f'{found.layers[0]}-{found.layers[1] - 1}' if found.layers[1] else '':>14}" for found in devices))
    print(f"{'experts held':12}" + "".join(f"{found.n_slots:>14}" for found in devices))
    rest = f"; {plan.disk_experts} lie on disk alone" if plan.disk_experts else ""
    print(f"of {plan.experts} experts ({format_size(plan.expert_bytes)}){rest}")
    if not plan.fits:
        print(f"does not fit: {plan.shortfall:,} bytes more are needed on {plan.short_device}")
        return
    print(f"fits; expected hit rate {bounds.hit_rate:.1%} (experts chosen by chance; the policies of the cache do better on text)")
    worst, best = "all misses that can be", "every slot hits"
    if plan.host.fallback and not plan.gpus:  # a fallback copy is read faster than an expert
        worst, best = best, worst
    for what, terms in (
        (f"tokens/s at batch 1: {bounds.expected:.2f} expected", bounds.terms),
        (f"at least {bounds.lower:.2f} ({worst}, one thing after the other)", bounds.lower_terms),
        (f"at most {bounds.upper:.2f} ({best}, everything at once: the busiest path counts)", bounds.upper_terms),
    ):
        print(what)
        for term in terms:
            rate = f"{format_size(term.nbytes)} / {format_size(term.bandwidth)}/s"
            print(f"  {term.data} ({term.path}): {rate} = {1000 * term.seconds:.2f} ms a token")
