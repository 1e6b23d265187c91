"""`dbrx-q simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbrx_q.planning.policy_names import MissPolicy
from dbrx_q.planning.sizes import parse_size

from . import budgets, output
from .generate import KV_HELP, KvFormat

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q simulate trace.npz --gpu 24GiB --ram 64GiB --out simulation")


def command(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="What `dbrx-q trace` wrote.", show_default=False)],
    gpu: Annotated[list[str] | None, typer.Option(help=budgets.PLANNED_GPU_HELP, show_default=False)] = None,
    ram: Annotated[str | None, typer.Option(help=budgets.RAM_HELP, show_default=False)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; 4096, or the model's context where that is shorter.")] = None,
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    tokens: Annotated[int, typer.Option(help="Tokens from the start of the trace.")] = 256,
    recorded: Annotated[bool, typer.Option("--recorded", help="In the steps of the recording, not token by token.")] = False,
    miss_policy: Annotated[MissPolicy, typer.Option(help=budgets.MISS_HELP)] = MissPolicy.hybrid,
    host_bandwidth: Annotated[str, typer.Option(help="What host memory gives in a second.")] = "60GB",
    disk_bandwidth: Annotated[str, typer.Option(help="What the disk gives in a second.")] = "5GB",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the table, the figures as JSON, and the plot.")] = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Replay a trace through every cache policy on a machine: hits, experts brought, tokens/s; with --out also with caches of other
    sizes."""
    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.simulation_report import FILES, KEYS, files, markdown
    from dbrx_q.eval.report_folder import check_report_folder, write_files
    from dbrx_q.experts.sweep import sweep
    from dbrx_q.experts.trace import Trace
    from dbrx_q.planning.budget import DEFAULT_CONTEXT
    from dbrx_q.planning.footprint import MemoryRequest
    from dbrx_q.planning.machine import Machine

    if out is not None:
        check_report_folder(out, FILES, KEYS)
    trace = Trace.read(path)
    config = DbrxConfig.from_dict(trace.config)
    context = min(DEFAULT_CONTEXT, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    limit = None if ram is None else parse_size(ram)
    machine = Machine(limit, budgets.planned_gpus(gpu), budgets.rate(host_bandwidth), budgets.rate(disk_bandwidth))
    request = MemoryRequest(context, 1, kv.value)
    with output.progress("runs") as on_run:
        found = sweep(
            trace,
            machine,
            request,
            tokens=tokens,
            one_by_one=not recorded,
            miss_policy=miss_policy,
            curve=out is not None,
            on_run=on_run,
        )
    if json:
        output.print_json(found.to_dict())
    else:
        print(markdown(found), end="")
    if out is not None:
        write_files(out, files(found))
        output.stderr().print(str(out / "simulation.png"), markup=False, soft_wrap=True)
