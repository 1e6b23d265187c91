"""`dbrx-q plan`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dbrx_q.planning.sizes import format_size

from . import memory_budget, options, terminal
from .choices import WEIGHT_FORMATS
from .help import example
from .options import FORMATS, MACHINE, MODEL, option

if TYPE_CHECKING:
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.config import DbrxConfig
    from dbrx_q.planning.machine import DevicePlan, Placement
    from dbrx_q.planning.speed import SpeedBounds, Term
    from dbrx_q.sources.open_weights import PlannedWeights

__all__ = ["EXAMPLE", "command"]

_DECODING = (
    " alone; a trellis format takes more instructions for each byte than int4, so a GPU, and a CPU with few cores or without AVX-512, may "
    "be slower than that"
)
EXAMPLE = example("dbrx-q plan databricks/dbrx-instruct --format int4 --gpu 24GiB --gpu 24GiB --ram 64GiB --context 8192")

_KINDS = ("dense", "experts", "fallback", "kv_cache", "workspace", "reserve")


def command(
    path: options.Checkpoint,
    gpu: options.PlannedGpus = None,
    ram: options.PlannedRam = None,
    host_bandwidth: options.HostBandwidth = None,
    disk_bandwidth: options.DiskBandwidth = None,
    context: options.PlannedContext = None,
    batch: Annotated[int, option(MODEL, "Sequences that run together.", metavar="N")] = 1,
    kv: options.Kv = "plain",
    format: Annotated[
        str | None, option(FORMATS, "Plan for a plain checkpoint quantized to {}.", metavar="FORMAT", one_of=WEIGHT_FORMATS)
    ] = None,
    group_size: options.GroupSize = None,
    fallback: Annotated[bool, option(FORMATS, "Plan for a fallback copy that answers for experts on disk.", "--fallback")] = False,
    fallback_format: Annotated[
        str | None,
        option(
            FORMATS,
            "With --format, the format of that copy: {}.",
            metavar="FORMAT",
            one_of=WEIGHT_FORMATS,
        ),
    ] = None,
    measure: Annotated[bool, option(MACHINE, "Measure the bandwidths of this machine, for this and later runs.", "--measure")] = False,
    json: options.Json = False,
) -> None:
    """Print where a model's weights would be held on a machine and how fast it can run there, before any weight is downloaded.

    Reads config.json alone, and of files of other programs the headers.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.advice import advice
    from dbrx_q.planning.bandwidths import measure_bandwidths
    from dbrx_q.planning.budget import DEFAULT_CONTEXT
    from dbrx_q.planning.footprint import MemoryRequest
    from dbrx_q.planning.placement import place
    from dbrx_q.planning.speed import speed_bounds
    from dbrx_q.sources.open_weights import planned_weights

    planned = planned_weights(path)
    config, stored = planned.config, planned.formats
    formats = _planned_formats(config, path, stored, format, group_size)
    if fallback_format is not None and (format is None or not fallback):
        raise RequestError(f"--fallback-format needs --format and --fallback; found {fallback_format} without. Add them, or leave it out")
    copy_formats = _fallback_formats(config, path, formats, fallback_format) if fallback else None
    context = min(DEFAULT_CONTEXT, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    if batch < 1:
        raise RequestError(f"--batch must be at least 1; found {batch}")
    if measure:
        folder = Path(path).expanduser()
        measure_bandwidths(folder if folder.is_dir() else None)
    machine = memory_budget.machine_of(ram, gpu, host_bandwidth, disk_bandwidth)
    request = MemoryRequest(context, batch, kv, fallback=copy_formats)
    placement = place(config, formats, machine, request)
    ffn = config.ffn_config
    bounds = speed_bounds(placement, machine, n_experts=ffn.moe_num_experts, top_k=ffn.moe_top_k)
    sentence = advice(config, formats, machine, request)
    note = _note(path, planned) if planned.label and format is None else ""
    assumption = "tokens/s count bytes over bandwidths" + (_DECODING if any(fmt.record.trellis for fmt in formats.values()) else "")
    if json:
        rates = {"host": machine.host_bandwidth, "disk": machine.disk_bandwidth, "measured": machine.measured or None}
        notes = {"assumption": assumption} | ({"note": note} if note else {})
        terminal.print_json(_as_dict(placement, bounds) | {"bandwidths": rates, "advice": sentence} | notes)
        return
    _print(placement, bounds)
    print(
        f"bandwidths measured on this machine at {machine.measured}"
        if machine.measured
        else "bandwidths are assumed where no option names them; --measure measures those of this machine"
    )
    if any(fmt.record.trellis for fmt in formats.values()):
        print(assumption)
    print(sentence)
    if note:
        print(note)


def _note(path: str, planned: PlannedWeights) -> str:
    """What the plan is of, where the weights are of another program: the copy that can be made of them."""
    import torch

    from dbrx_q.checkpoint.layout import dense_tensors
    from dbrx_q.sources.streamed import resident_bytes

    size = format_size(resident_bytes(planned.config, torch.bfloat16, stream=False, formats=planned.formats))
    experts = [tensor.name for tensor in dense_tensors(planned.config) if tensor.experts]
    rest = f"{size} of one device's memory; experts that do not fit are read from the file for every token."
    if all(name in planned.formats for name in experts):
        copy = f"This is the plan of the copy that `dbrx-q quantize {shlex.quote(path)} DST --keep` makes."
        return f"{copy} {path} itself ({planned.label}) is loaded whole: {rest}"
    return f"{path} is {planned.label}, whose experts are dequantized: {rest} --format int4 plans a quantized copy."


def _planned_formats(
    config: DbrxConfig, path: str, stored: dict[str, TensorFormat], format: str | None, group_size: int | None
) -> dict[str, TensorFormat]:
    """Tensor name to format: as stored, or as `quantize --format` would store them."""
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.errors import RequestError
    from dbrx_q.quantize.pipeline.format_assignment import default_formats

    if format is None:
        if group_size is not None:
            raise RequestError(f"--group-size needs --format; found {group_size} alone. Add --format {WEIGHT_FORMATS}")
        return stored
    if config.quantization_config is not None:
        raise RequestError(f"--format is for a checkpoint that dbrx_q has not quantized; {path} is. Leave it out")
    return default_formats(config, TensorFormat.of(format, group_size))


def _fallback_formats(
    config: DbrxConfig, path: str, formats: dict[str, TensorFormat], fallback_format: str | None
) -> dict[str, TensorFormat]:
    """Tensor name to format of the fallback copy: of the one that `path` carries, or of --fallback-format."""
    from dbrx_q.experts.fallback import carried_formats, check_fallback
    from dbrx_q.quantize.pipeline.format_assignment import fallback_formats

    if fallback_format is None:
        return carried_formats(path, config, formats)
    copy_formats = fallback_formats(config, fallback_format)
    check_fallback(config, formats, copy_formats, path)
    return copy_formats


def _as_dict(placement: Placement, bounds: SpeedBounds) -> dict[str, Any]:
    def as_dict(device: DevicePlan) -> dict[str, Any]:
        bytes_of = {kind: getattr(device, kind) for kind in (*_KINDS, "total")}
        return {"device": device.device, "budget": device.budget, "layers": list(device.layers), **bytes_of, "expert_slots": device.n_slots}

    def listed(terms: Iterable[Term]) -> list[dict[str, Any]]:
        return [{"path": t.path, "data": t.data, "bytes": t.nbytes, "bytes_per_second": t.bandwidth, "seconds": t.seconds} for t in terms]

    return {
        "fits": placement.fits,
        "shortfall": placement.shortfall,
        "short_device": placement.short_device,
        "devices": [as_dict(device) for device in placement.devices],
        "experts": placement.experts,
        "expert_bytes": placement.expert_bytes,
        "disk_experts": placement.disk_experts,
        "hit_rate": bounds.hit_rate,
        "tokens_per_second": {"lower": bounds.lower, "expected": bounds.expected, "upper": bounds.upper},
        "per_token": listed(bounds.terms),
        "per_token_lower": listed(bounds.lower_terms),
        "per_token_upper": listed(bounds.upper_terms),
    }


def _print(placement: Placement, bounds: SpeedBounds) -> None:
    devices = [device for device in placement.devices if device.total or device.layers[1] > device.layers[0]]
    print(f"{'':12}" + "".join(f"{device.device:>14}" for device in devices))
    for kind in _KINDS:
        if any(getattr(device, kind) for device in devices):
            print(f"{kind.replace('_', ' '):12}" + "".join(f"{format_size(getattr(device, kind)):>14}" for device in devices))
    print(f"{'total':12}" + "".join(f"{format_size(device.total):>14}" for device in devices))
    print(f"{'budget':12}" + "".join(f"{'none' if device.budget is None else format_size(device.budget):>14}" for device in devices))
    print(
        f"{'layers':12}" + "".join(f"{f'{device.layers[0]}-{device.layers[1] - 1}' if device.layers[1] else '':>14}" for device in devices)
    )
    print(f"{'experts held':12}" + "".join(f"{device.n_slots:>14}" for device in devices))
    rest = f"; {placement.disk_experts} are on disk alone" if placement.disk_experts else ""
    print(f"of {placement.experts} experts ({format_size(placement.expert_bytes)}){rest}")
    if not placement.fits:
        print(f"does not fit: {placement.shortfall:,} bytes more are needed on {placement.short_device}")
        return
    print(f"fits; expected hit rate {bounds.hit_rate:.1%} (experts chosen by chance; the policies of the cache do better on text)")
    worst, best = "the most misses possible", "every slot hits"
    if placement.host.fallback and not placement.gpus:  # a fallback copy is read faster than an expert
        worst, best = best, worst
    for what, terms in (
        (f"tokens/s at batch 1: {bounds.expected:.2f} expected", bounds.terms),
        (f"at least {bounds.lower:.2f} ({worst}, one step after the other)", bounds.lower_terms),
        (f"at most {bounds.upper:.2f} ({best}, all steps at once, as long as the busiest path takes)", bounds.upper_terms),
    ):
        print(what)
        for term in terms:
            rate = f"{format_size(term.nbytes)} / {format_size(term.bandwidth)}/s"
            print(f"  {term.data} ({term.path}): {rate} = {1000 * term.seconds:.2f} ms a token")
