"""What `dbrx-q quantize` prints: the plan of a dry run, and the result of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dbrx_q.planning.sizes import format_size

from . import terminal
from .self_calibration import Sampling, sampling_as_dict, show_sampling

if TYPE_CHECKING:
    from dbrx_q.quantize.calibration.sources import CalibrationSequences
    from dbrx_q.quantize.pipeline.accelerator import Accelerator
    from dbrx_q.quantize.pipeline.plan import RunPlan
    from dbrx_q.quantize.pipeline.records import RunRecord

__all__ = ["check_no_worse", "run_as_dict", "show_plans", "show_runs"]


def show_plans(
    plans: Sequence[RunPlan], accelerator: Accelerator | None, sampling: Sampling, sequences: CalibrationSequences | None, *, json: bool
) -> None:
    """Print the plan of the checkpoint and, if there are, of its fallback copy, the calibration sequences and their sampling."""
    from dataclasses import asdict

    from dbrx_q.quantize.pipeline.plan import seconds_of

    seconds = [seconds_of(plan) for plan in plans]
    bits = [8 * plan.bytes_out / plan.parameters for plan in plans]
    if json:
        checkpoint, *fallback = (
            asdict(plan) | {"peak_memory": plan.peak_memory, "bits_per_weight_out": plan_bits, "seconds": plan_seconds}
            for plan, plan_bits, plan_seconds in zip(plans, bits, seconds, strict=True)
        )
        planned = {} if sampling.plan is None else {"sampling": sampling_as_dict(sampling)}
        drawn = {"calibration": [source._asdict() for source in sources]} if (sources := _drawn(sequences)) else {}
        terminal.print_json(checkpoint | drawn | planned | ({"fallback": fallback[0]} if fallback else {}))
        return
    for n, plan in enumerate(plans):
        if n:
            print("\nfallback copy:")
        _show_plan(plan, accelerator, bits[n], seconds[n])
    for source in _drawn(sequences):
        print(f"calibration {source.sequences:>10,}  sequences of {source.name}, and {source.held_out:,} held out")
    show_sampling(sampling)


class _Drawn(NamedTuple):
    """What calibration takes of one source."""

    name: str
    """As it was given."""
    weight: float
    """Of 1 in all."""
    sequences: int
    """That calibrate."""
    held_out: int
    """That only measure."""


def _drawn(sequences: CalibrationSequences | None) -> list[_Drawn]:
    if sequences is None:
        return []
    return [
        _Drawn(*figures) for figures in zip(sequences.names, sequences.weights, sequences.counts, sequences.held_out_counts, strict=True)
    ]


def _show_plan(plan: RunPlan, accelerator: Accelerator | None, bits: float, seconds: float) -> None:
    from dbrx_q.quantize.pipeline.plan import check_seconds

    print(f"reads       {format_size(plan.bytes_in):>10}  {8 * plan.bytes_in / plan.parameters:6.3f} bits per weight")
    print(f"writes      {format_size(plan.bytes_out):>10}  {bits:6.3f} bits per weight")
    for kind, kind_bits in plan.bits.items():
        print(f"  {kind:22}{kind_bits:6.3f} bits per weight")
    where = "in files" if plan.in_files else "in memory"
    print(
        f"memory      {format_size(plan.peak_memory):>10}  at most"
        + (f", activations of {format_size(plan.activations)} {where}" if plan.activations else "")
    )
    if plan.held_out_tokens:
        print(f"held out    {plan.held_out_tokens:>10,}  tokens, which run through this model, the result and one rounded to nearest")
    if plan.checked_tokens:
        print(f"check texts {plan.checked_tokens:>10,}  tokens, which take about {_duration(check_seconds(plan))} of the time below")
    if accelerator is not None:
        where = f"at most on {accelerator.name}, which quantizes {plan.accelerated:,} of {plan.matrices:,} matrices"
        print(f"GPU memory  {format_size(accelerator.memory):>10}  {where}")
    if plan.fetch:
        print(f"downloads   {format_size(plan.fetch):>10}  which take at most {format_size(plan.fetch_disk)} of disk at a time")
    print(f"disk        {format_size(plan.disk):>10}  must be free where it is written")
    print(f"time        {_duration(seconds):>10}  about, by the speed that this machine just showed")


def show_runs(runs: dict[Path, RunRecord], *, json: bool) -> None:
    """Print the result of every run: of the checkpoint and of its fallback copy."""
    if json and runs:
        checkpoint, *fallback = (run_as_dict(run, folder) for folder, run in runs.items())
        terminal.print_json(checkpoint | ({"fallback": fallback[0]} if fallback else {}))
        return
    for folder, run in runs.items():
        _show_run(run, folder)


def check_no_worse(runs: Mapping[Path, RunRecord], push: str | None) -> None:
    """Say where a result is worse than rounding to nearest that was not to be; it stays where it is, and is not uploaded.

    Raises:
        typer.Exit: exit code 1.
    """
    import typer

    from dbrx_q.quantize.pipeline.report_held_out import still_worse

    problems = {folder: problem for folder, run in runs.items() if (problem := still_worse(run)) is not None}
    for folder, problem in problems.items():
        terminal.say(f"dbrx-q: error: {folder}: {problem}" + (f". It was not uploaded to {push}" if push is not None else ""))
    if problems:
        raise typer.Exit(1)


def run_as_dict(run: RunRecord, destination: Path) -> dict[str, Any]:
    """The JSON object of a run."""
    from dataclasses import asdict

    return {
        "source": run.source,
        "destination": str(destination),
        "method": run.method,
        "calibration": run.options.get("calibration"),
        "undersampled_experts": _undersampled(run),
        "unreached_experts": run.unreached_experts,
        "held_out": [asdict(record) for record in run.held_out],
        "nearest_instead": run.nearest_instead,
        "kept": run.kept,
        "rounded_again": run.rounded_again,
        "parameters": run.parameters,
        "bytes_in": run.bytes_in,
        "bytes_out": run.bytes_out,
        "bits_per_weight_in": 8 * run.bytes_in / run.parameters,
        "bits_per_weight_out": 8 * run.bytes_out / run.parameters,
        "shards": run.shards,
        "seconds": run.seconds,
        "resumed_seconds": run.resumed_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "device": run.device,
        "peak_device_bytes": run.peak_device_bytes,
    }


def _undersampled(run: RunRecord) -> list[tuple[int, int]]:
    return sorted({(record.layer, record.expert) for record in run.undersampled})


def _show_run(run: RunRecord, destination: Path) -> None:
    before, after = (8 * n / run.parameters for n in (run.bytes_in, run.bytes_out))
    undersampled, calibration = _undersampled(run), run.options.get("calibration")
    print(f"before  {format_size(run.bytes_in):>10}  {before:6.3f} bits per weight  {run.source}")
    print(f"after   {format_size(run.bytes_out):>10}  {after:6.3f} bits per weight  {destination}")
    if calibration is not None:
        print(f"calibrated with {calibration['sequences']} sequences of {calibration['length']} tokens")
        _show_sources(run, calibration.get("sources", []))
    if run.kept:
        print(f"{run.kept:,} of {len(run.records):,} matrices repacked without rounding: {', '.join(run.options['kept'])}")
    if run.rounded_again:
        again = ", ".join(f"{count:,} of {label}" for label, count in run.rounded_again.items())
        print(f"rounded again, as SRC had rounded them already: {again}")
    if undersampled:
        print(f"{len(undersampled)} expert(s) were reached by too few tokens, and took all of their layer's, weighted by the router")
    for line in _held_out_lines(run):
        print(line)
    earlier = f", after {_duration(run.resumed_seconds)} of earlier runs" if run.resumed_seconds else ""
    speed = "" if run.resumed_seconds else f", {format_size(run.bytes_in / run.seconds)}/s"
    gpu = f", on {run.device} {format_size(run.peak_device_bytes)}" if run.device != "cpu" else ""
    print(f"{run.shards} shard(s) in {_duration(run.seconds)}{earlier}{speed}; peak memory {format_size(run.peak_memory_bytes)}{gpu}")


def _held_out_lines(run: RunRecord) -> list[str]:
    """What tokens to which nothing is fitted say of the result: of check texts, fallbacks, where calibration hurt, and what to do then."""
    from dbrx_q.quantize.pipeline.report_held_out import check_lines, hurt_line, nearest_line

    return [*check_lines(run), *(line for line in (nearest_line(run), hurt_line(run), _advice(run)) if line is not None)]


def _advice(run: RunRecord) -> str | None:
    """What to do where calibration hurt, or where only the kinds of text that calibrate are measured; None where nothing is to be done."""
    from dbrx_q.quantize.calibration.held_out import HELD_OUT
    from dbrx_q.quantize.methods.choose import METHODS

    if not run.held_out or not METHODS[run.method].calibrated:
        return None
    if any(record.hurts for record in run.held_out):
        mend = "calibrate with a source of that kind of text too, or add --no-worse-than-rtn"
        return None if run.falls_back else mend  # `check_no_worse` says what to do after a fallback
    if all(record.kind == HELD_OUT for record in run.held_out):
        return "other kinds of text are not measured; --check-text FILE measures one"
    return None


def _show_sources(run: RunRecord, sources: Sequence[Mapping[str, Any]]) -> None:
    """A line for each of several sources: its sequences, and the experts that it never reaches."""
    width = max((len(source["name"]) for source in sources), default=0)
    unreached = list(run.unreached_experts.values())
    experts = sum(map(len, run.expert_tokens.values()))
    for source in sources:
        line = f"  {source['name']:{width}}  {source['sequences']:>5} sequences, {source['held_out']:>3} held out"
        if source["sequences"] and unreached:
            line += f"; {len(unreached.pop(0))} of {experts} experts get none of its tokens"
        print(line)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
