"""`dbrx-q quantize`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import output

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q quantize databricks/dbrx-instruct dbrx-int4 --format int4 --group-size 64")


class Format(str, Enum):
    """Formats for the experts."""

    int4 = "int4"
    int8 = "int8"
    nf4 = "nf4"


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint to quantize: a folder or a hub id.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new or empty.", show_default=False)],
    format: Annotated[Format, typer.Option(help="Format of the experts; embedding, attention and head become int8.")] = Format.int4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128; nf4 has 64 alone.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Write a quantized copy of a checkpoint, in memory bounded by one tensor and its result."""
    import time

    from dbrx_q.hub import resolve_folder
    from dbrx_q.layout import TensorFormat
    from dbrx_q.quantize.pipeline import quantize_checkpoint
    from dbrx_q.quantize.recipe import default_recipe

    folder = resolve_folder(source, revision=revision)
    experts = TensorFormat(format.value, group_size)
    started = time.perf_counter()
    with output.progress("quantizing", unit_bytes=True) as on_bytes:
        report = quantize_checkpoint(folder, destination, lambda c: default_recipe(c.config, experts), on_bytes=on_bytes)
    seconds = time.perf_counter() - started
    before, after = (8 * n / report.parameters for n in (report.bytes_in, report.bytes_out))
    if json:
        output.print_json(
            {
                "source": str(folder),
                "destination": str(destination),
                "format": format.value,
                "group_size": group_size,
                "parameters": report.parameters,
                "bytes_in": report.bytes_in,
                "bytes_out": report.bytes_out,
                "bits_per_weight_in": before,
                "bits_per_weight_out": after,
                "shards": report.shards,
                "seconds": seconds,
            }
        )
        return
    speed = output.size(report.bytes_in / seconds)
    print(f"before  {output.size(report.bytes_in):>10}  {before:6.3f} bits per weight  {folder}")
    print(f"after   {output.size(report.bytes_out):>10}  {after:6.3f} bits per weight  {destination}")
    print(f"{report.shards} shard(s) in {seconds:.1f} s, {speed}/s")
