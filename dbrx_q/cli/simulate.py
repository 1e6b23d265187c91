"""`dbrx-q simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dbrx_q.planning.policy_names import MissPolicy

from . import memory_budget, options, terminal
from .help import example
from .options import TEXT, argument, option

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q simulate trace.npz --gpu 24GiB --ram 64GiB --out simulation")


def command(
    path: Annotated[Path, argument("TRACE", "Trace that `dbrx-q trace` wrote.")],
    gpu: options.PlannedGpus = None,
    ram: options.PlannedRam = None,
    host_bandwidth: options.HostBandwidth = None,
    disk_bandwidth: options.DiskBandwidth = None,
    context: options.PlannedContext = None,
    kv: options.Kv = "plain",
    miss_policy: options.MissPolicy = MissPolicy.hybrid.value,
    tokens: Annotated[int, option(TEXT, "Tokens from the start of the trace.", metavar="N")] = 256,
    recorded: Annotated[bool, option(TEXT, "Replay the recorded steps, not token by token.", "--recorded")] = False,
    out: options.OutFolder = None,
    json: options.Json = False,
) -> None:
    """Replay a trace through every cache policy on a machine, and print hits, expert loads and tokens/s.

    With --out the report shows other cache sizes too.
    """
    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.simulation_report import FILES, KEYS, files, markdown
    from dbrx_q.eval.report_folder import check_report_folder, write_files
    from dbrx_q.experts.sweep import sweep
    from dbrx_q.experts.trace import Trace
    from dbrx_q.planning.budget import DEFAULT_CONTEXT
    from dbrx_q.planning.footprint import MemoryRequest

    if out is not None:
        check_report_folder(out, FILES, KEYS)
    trace = Trace.read(path)
    config = DbrxConfig.from_dict(trace.config)
    context = min(DEFAULT_CONTEXT, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    machine = memory_budget.machine_of(ram, gpu, host_bandwidth, disk_bandwidth)
    request = MemoryRequest(context, 1, kv)
    with terminal.progress("runs") as on_run:
        result = sweep(
            trace,
            machine,
            request,
            tokens=tokens,
            miss_policy=MissPolicy(miss_policy),
            token_by_token=not recorded,
            curve=out is not None,
            on_run=on_run,
        )
    if json:
        terminal.print_json(result.to_dict())
    else:
        print(markdown(result), end="")
    if out is not None:
        write_files(out, files(result))
        terminal.say(str(out / "simulation.png"))
