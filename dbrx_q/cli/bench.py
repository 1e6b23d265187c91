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
