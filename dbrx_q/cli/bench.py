"""`dbrx-q bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output

__all__ = ["app"]

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(epilog=output.example("dbrx-q bench synthetic /tmp/dbrx-layer", "dbrx-q quantize /tmp/dbrx-layer /tmp/dbrx-layer-int4"))
def synthetic(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new or empty.", show_default=False)],
    layers: Annotated[int, typer.Option(help="Layers of DBRX's own dimensions; 6.6 GB each.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a bfloat16 checkpoint of DBRX's dimensions with random weights, to measure on."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.synthetic import dbrx_layer_config, write_checkpoint

    if layers < 1:
        raise RequestError(f"--layers must be at least 1; found {layers}")
    write_checkpoint(dbrx_layer_config(layers), destination, seed=seed)


@app.command(epilog=output.example("dbrx-q bench cpu /tmp/dbrx-layer-int4"))
def cpu(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint to measure.", show_default=False)],
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(help="Counted runs; medians are printed.")] = 5,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Resident and peak memory, prefill and decode speed on the CPU, beside the read bandwidth of the same run."""
    from dataclasses import asdict

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench_cpu import bench_cpu

    for option, count in (("--prefill", prefill), ("--decode", decode), ("--repeats", repeats)):
        if count < 1:
            raise RequestError(f"{option} must be at least 1; found {count}")
    result = bench_cpu(path, prefill_tokens=prefill, decode_tokens=decode, repeats=repeats)
    if json:
        output.print_json(asdict(result))
        return
    rows = [
        ("stored tensors", output.size(result.bytes)),
        ("resident after loading", f"{output.size(result.loaded_memory)}, {result.loaded_memory / result.bytes:.3f} of stored"),
        ("peak while loading", f"{output.size(result.peak_memory)}, {result.peak_memory / result.bytes:.3f} of stored"),
        ("load time", f"{result.load_seconds:.1f} s"),
        (f"prefill of {result.prefill_tokens}", f"{result.prefill_speed:.1f} tokens/s"),
        (f"decode of {result.decode_tokens}", f"{result.decode_speed:.1f} tokens/s"),
        ("decode bandwidth", f"{output.size(result.decode_bandwidth)}/s, {result.decode_bandwidth / result.read_bandwidth:.2f} of reading"),
        ("plain read", f"{output.size(result.read_bandwidth)}/s"),
    ]
    for name, value in rows:
        print(f"{name:24}{value}")


@app.command(epilog=output.example("dbrx-q bench kernels --out results", "dbrx-q bench kernels --model /tmp/dbrx-2-layers-int4 --json"))
def kernels(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for kernels.json and kernels.md.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="PATH", help="Checkpoint whose whole decode step is measured too.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted turns; medians are printed.")] = 20,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """The GPU kernels at DBRX's shapes, beside this GPU's copy bandwidth and matmul rate and what else does the same work."""
    import shlex
    import sys
    from json import dumps

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench_kernels import bench_kernels, markdown
    from dbrx_q.eval.device_timing import device_or_error

    if repeats < 1:
        raise RequestError(f"--repeats must be at least 1; found {repeats}")
    device = device_or_error("dbrx-q bench kernels")
    command = shlex.join(["dbrx-q", *sys.argv[1:]])
    with output.progress("kernels") as report:
        result = bench_kernels(device, command, model=model, repeats=repeats, report=report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.json").write_text(dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
        (out / "kernels.md").write_text(markdown(result), encoding="utf-8")
    if json:
        output.print_json(result.as_json())
    else:
        print(markdown(result), end="")


@app.command(epilog=output.example("dbrx-q bench tune"))
def tune(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write; the user's cache, where loading finds it.")] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Measure every candidate; hours.")] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Measure which tiles are the fastest for the kernels on this GPU, and keep them."""
    from dataclasses import asdict

    from dbrx_q.eval import tune as tuner
    from dbrx_q.eval.device_timing import device_or_error
    from dbrx_q.tuning import tuning_path, write_tuning

    device = device_or_error("dbrx-q bench tune")
    with output.progress("tiles") as report:
        tuning, failures = tuner.tune(device, thorough=thorough, report=report)
    path = out or tuning_path(tuning.chip)
    write_tuning(tuning, path)
    if json:
        output.print_json({"path": str(path), **asdict(tuning), "failures": [asdict(failure) for failure in failures]})
        return
    for choice in tuning.choices:
        problem = choice.problem
        name = f"{problem.op} {problem.bits} bits, {problem.tokens} x {problem.N} x {problem.K}"
        print(f"{name:44}{choice.seconds * 1e6:10.1f} us, the default {choice.default_seconds * 1e6:.1f} us, of {choice.candidates}")
    for failure in failures:
        output.stderr().print(f"not measured: {failure.problem} with {failure.tiles}: {failure.reason}", markup=False)
    print(path)


@app.command(epilog=output.example("dbrx-q bench resources --out docs/kernels.md", "dbrx-q bench resources --chip sm_86"))
def resources(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Document whose table is replaced; otherwise it is printed.")] = None,
    chip: Annotated[list[str] | None, typer.Option(help="sm_86, gfx1100 ...; may be given again. All where none is.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also kernels that differ from others only around their main loop.")] = False,
    processes: Annotated[int, typer.Option(help="That compile at the same time.")] = 2,
) -> None:
    """Compile every GPU kernel at DBRX's shapes, without a GPU: registers, shared memory and spills on each chip."""
    from dbrx_q.errors import DbrxError, RequestError
    from dbrx_q.eval.kernel_report import document, problems, write_report
    from dbrx_q.eval.kernel_report import resources as compiled
    from dbrx_q.kernels.launch import CHIPS

    if processes < 1:
        raise RequestError(f"--processes must be at least 1; found {processes}")
    with output.progress("kernels") as report:
        rows = list(compiled(tuple(chip or CHIPS), everything=everything, processes=processes, report=report))
    text = document(rows)
    if out is None:
        print(text)
    else:
        write_report(out, text)
    broken = [(row, problem) for row in rows for problem in problems(row, CHIPS[row.resources.chip])]
    if broken:
        lines = [f"{row.resources.kernel}, {row.case}, {row.resources.chip}: {problem}" for row, problem in broken]
        raise DbrxError("every kernel must fit its chip; these do not:\n" + "\n".join(lines))
