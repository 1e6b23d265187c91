"""`dbrx-q bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dbrx_q.planning.policy_names import DEFAULT_POLICY, CachePolicyName

from . import budgets, output
from .budgets import Fallback, GpuSizes, Ram
from .generate import DEVICE_HELP, KV_HELP, Dtype, KvFormat

__all__ = ["app"]


class _ModelUnlessNamed(TyperGroup):
    """`dbrx-q bench PATH` is `dbrx-q bench model PATH`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["model", *args]
        return super().parse_args(ctx, args)


SHARE_HELP = "Experts that have a slot in memory. [25, 50, 75; with --fallback 75, 90]"

app = typer.Typer(
    cls=_ModelUnlessNamed,
    help="Measure speed and memory. [bold]dbrx-q bench PATH[/bold] measures a model: it is short for [bold]dbrx-q bench model PATH[/bold], "
    "whose --help shows the options.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    subcommand_metavar="PATH | COMMAND [ARGS]...",
)


@app.command(epilog=output.example("dbrx-q bench dbrx-int4", "dbrx-q bench dbrx-int4 -p 512,4096 -n 128 -b 1,4 --out results"))
def model(
    path: Annotated[str, typer.Argument(metavar="PATH", help="What to measure: a folder, a hub id or a GGUF file.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option("--n-prompt", "-p", metavar="N,N...", help="Tokens of a prompt, the rows pp; 0 for none. [512]")
    ] = None,
    gen: Annotated[
        list[str] | None, typer.Option("--n-gen", "-n", metavar="N,N...", help="Tokens to decode, the rows tg; 0 for none. [128]")
    ] = None,
    depth: Annotated[
        list[str] | None, typer.Option("--depth", "-d", metavar="N,N...", help="Tokens that a sequence holds before. [0]")
    ] = None,
    batch: Annotated[list[str] | None, typer.Option("--batch", "-b", metavar="N,N...", help="Sequences that run together. [1]")] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Counted runs of each row, after one that does not count.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of activations; auto takes the checkpoint's.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    ram: Ram = None,
    gpu: GpuSizes = None,
    fallback: Fallback = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for bench.json, bench.md, bench.png and bench.svg.")] = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Tokens per second as llama-bench names them (pp512, tg128), beside what memory and matmul allow; time to first token, memory.

    Every prompt, number of tokens, batch size and depth is combined. An interruption prints and writes the rows that are finished.
    """
    import sys

    import torch

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.model import bench_model, check_tests, speed_tests
    from dbrx_q.eval.bench.report import FILES, KEYS, markdown, write_report
    from dbrx_q.eval.provenance import command_line
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.folder import PackedFolder
    from dbrx_q.sources.open import open_source

    tests = speed_tests(
        _sizes("--n-prompt", prompt, 512, least=0),
        _sizes("--n-gen", gen, 128, least=0),
        _sizes("--batch", batch, 1, least=1),
        _sizes("--depth", depth, 0, least=0),
    )
    if repeats < 1:
        raise RequestError(f"--repeats must be at least 1; found {repeats}")
    place = check_device(device)
    if out is not None:
        check_report_folder(out, FILES, KEYS)
    source = open_source(path, fallback=fallback)
    check_tests(tests, source.config)
    longest = max(test.depth + test.tokens + (test.kind == "pp") for test in tests)  # one token follows a prompt
    widest = max(test.batch for test in tests)
    source.budget = budgets.budget_of(ram, gpu, context=longest, batch=widest, kv_format=kv.value, fallback=fallback)
    if source.budget is not None and not isinstance(source, PackedFolder):
        raise RequestError(f"{path}: --ram and --gpu measure what dbrx_q quantized; this is {source.format}. Leave them out")
    with output.progress("rows") as report:
        result = bench_model(
            source,
            tests,
            device=place,
            dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value),
            kv_format=kv.value,
            repeats=repeats,
            command=command_line(),
            report=report,
        )
    if json:
        output.print_json(result.to_dict())
    else:
        print(markdown(result), end="", flush=True)
    if out is not None:
        write_report(result, out)
    if not result.complete:
        done = len(result.rows) + len(result.first_token)
        print(
            f"dbrx-q: error: interrupted after {done} of {result.planned} rows; the figures are of these alone", file=sys.stderr, flush=True
        )
        raise typer.Exit(2)


@app.command(epilog=output.example("dbrx-q bench synthetic /tmp/dbrx-layer", "dbrx-q quantize /tmp/dbrx-layer /tmp/dbrx-layer-int4"))
def synthetic(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new or empty.", show_default=False)],
    layers: Annotated[int, typer.Option(help="Layers of DBRX's own dimensions; 6.6 GB each.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a bfloat16 checkpoint of DBRX's dimensions with random weights, to measure on."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.synthetic import dbrx_layer_config, write_checkpoint

    if layers < 1:
        raise RequestError(f"--layers must be at least 1; found {layers}")
    write_checkpoint(dbrx_layer_config(layers), destination, seed=seed)


@app.command(epilog=output.example("dbrx-q bench offload dbrx-int4 --share 25 --share 50 --out results"))
def offload(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    share: Annotated[list[float] | None, typer.Option(metavar="PERCENT", help=SHARE_HELP)] = None,
    gen: Annotated[int, typer.Option("--n-gen", "-n", help="Tokens to decode, the rows tg; 0 for none.")] = 24,
    prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Tokens of a prompt, the rows pp; 0 for none.")] = 512,
    policy: Annotated[CachePolicyName, typer.Option(help=budgets.POLICY_HELP)] = DEFAULT_POLICY,
    page_cache: Annotated[bool, typer.Option("--page-cache", help="Read through the page cache, not past it.")] = False,
    fallback: Annotated[bool, typer.Option("--fallback", help="Also with the fallback copy, in the same memory.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for offload.json and offload.md.")] = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Speed with experts on disk, beside what the bytes that are missed and the disk's bandwidth allow, measured in the same run.

    Where there is a GPU also with experts in host memory under it, by every miss policy.
    """
    import torch

    from dbrx_q.checkpoint.hub import resolve_folder
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.offload import FILES, KEYS, bench_gpu, bench_offload, files, markdown
    from dbrx_q.eval.provenance import command_line
    from dbrx_q.eval.report_folder import check_report_folder, write_files

    shares = share or ([75.0, 90.0] if fallback else [25.0, 50.0, 75.0])  # less does not hold a copy of half the bits
    if not all(0 < percent < 100 for percent in shares):
        raise RequestError(f"--share must be above 0 and below 100 percent; found {', '.join(f'{percent:g}' for percent in shares)}")
    if policy is CachePolicyName.static:
        raise RequestError("random tokens have no profile; found --policy static. Choose another")
    if out is not None:
        check_report_folder(out, FILES, KEYS)
    with output.progress("rows") as on_row:
        found = bench_offload(
            resolve_folder(path, fallback=fallback),
            [percent / 100 for percent in shares],
            tokens=gen,
            prompt=prompt,
            policy=policy.value,
            direct=False if page_cache else None,
            fallback=fallback,
            command=command_line(),
            on_row=on_row,
        )
    if gen and torch.cuda.is_available():
        with output.progress("rows on the GPU") as on_row:
            shares_of_one = [percent / 100 for percent in shares]
            device = torch.device("cuda", 0)
            found.gpus = bench_gpu(resolve_folder(path), shares_of_one, device, tokens=gen, policy=policy.value, on_row=on_row)
    if json:
        output.print_json(found.to_dict())
    else:
        print(markdown(found), end="")
    if out is not None:
        write_files(out, files(found))


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
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.eval.bench.kernels import bench_kernels, markdown

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

    from dbrx_q.eval.bench import tune as tuner
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.model.tuned_tiles import tuning_path, write_tuning

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


@app.command(epilog=output.example("dbrx-q bench resources --out docs/notes/kernel-resources.md", "dbrx-q bench resources --chip sm_86"))
def resources(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Document whose table is replaced; otherwise it is printed.")] = None,
    chip: Annotated[list[str] | None, typer.Option(help="sm_86, gfx1100 ...; may be given again. All where none is.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also kernels that differ from others only around their main loop.")] = False,
    processes: Annotated[int, typer.Option(help="That compile at the same time.")] = 2,
) -> None:
    """Compile every GPU kernel at DBRX's shapes, without a GPU: registers, shared memory and spills on each chip."""
    from dbrx_q.errors import DbrxError, RequestError
    from dbrx_q.eval.bench.kernel_report import document, problems, write_report
    from dbrx_q.eval.bench.kernel_report import resources as compiled
    from dbrx_q.kernels.triton.launch import CHIPS

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


def _sizes(option: str, values: list[str] | None, default: int, *, least: int) -> list[int]:
    """Whole numbers, each once: an option may be given again, and hold several."""
    from dbrx_q.errors import RequestError

    found = []
    for word in (word.strip() for value in values or [str(default)] for word in value.split(",")):
        if not (word.isascii() and word.isdecimal() and len(word) < 16) or int(word) < least:
            raise RequestError(f"{option} must be whole numbers of at least {least}, as 512 or 128,512; found {word!r:.40}")
        found.append(int(word))
    return list(dict.fromkeys(found))
