"""`dbrx-q plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import output
from .generate import KV_HELP, KvFormat
from .quantize import Format

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q plan databricks/dbrx-instruct --format int4 --ram 96GiB --context 8192")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    ram: Annotated[str | None, typer.Option(help="Memory that may be used, as 96GiB.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; 4096, or the model's context where that is shorter.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    format: Annotated[Format | None, typer.Option(help="Plan for what `quantize` would make of a plain checkpoint.")] = None,
    group_size: Annotated[int | None, typer.Option(help="With --format, its group size; 64 unless given.", show_default=False)] = None,
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Say what a model takes in memory on the CPU before any weight is downloaded; reads config.json alone."""
    from dataclasses import asdict

    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import RequestError
    from dbrx_q.layout import TensorFormat, tensor_formats
    from dbrx_q.placement import plan_memory
    from dbrx_q.quantize.recipe import default_recipe

    config = DbrxConfig.from_pretrained(path)
    formats = tensor_formats(config, path)
    if format is None and group_size is not None:
        raise RequestError(f"--group-size goes with --format; found {group_size} alone. Add --format int4, int8, nf4 or nf4-double")
    if format is not None:
        if formats:
            raise RequestError(f"--format is for a plain checkpoint; {path} is quantized already. Leave it out")
        formats = default_recipe(config, TensorFormat(format.value, 64 if group_size is None else group_size))
    context = min(4096, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    if batch < 1:
        raise RequestError(f"--batch must be at least 1; found {batch}")
    plan = plan_memory(
        config, formats, context=context, batch=batch, budget=None if ram is None else output.parse_size(ram), kv_format=kv.value
    )
    if json:
        output.print_json(asdict(plan) | {"total": plan.total, "fits": plan.fits})
        return
    for name in ("experts", "dense", "kv_cache", "workspace", "interpreter"):
        print(f"{name:12}{output.size(getattr(plan, name)):>12}")
    print(f"{'total':12}{output.size(plan.total):>12}")
    if plan.budget is not None:
        left = plan.budget - plan.total
        print(f"fits, {output.size(left)} to spare" if left >= 0 else f"does not fit: {-left:,} bytes more are needed")
