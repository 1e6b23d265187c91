"""`dbrx-q bench` and its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dbrx_q.planning.policy_names import DEFAULT_POLICY

from . import bench_gpu, memory_budget, options, terminal
from .help import Command, CommandGroup, example
from .measurement import named_dtype
from .options import MEMORY, OUTPUT, WORK, argument, option

__all__ = ["app"]


class _ModelUnlessNamed(CommandGroup):
    """`dbrx-q bench PATH` runs `dbrx-q bench model PATH`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["model", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="bench",
    cls=_ModelUnlessNamed,
    help="Measure speed and memory.\n\n`dbrx-q bench PATH` measures a model: it is short for `dbrx-q bench model PATH`, whose --help "
    "lists the options.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    subcommand_metavar="PATH | COMMAND [ARGS]...",
)

_Sizes = list[str] | None
_Repeats = Annotated[int, option(WORK, "Counted runs of each row, after an uncounted one.", "--repeats", "-r", metavar="N")]


@app.command(cls=Command, epilog=example("dbrx-q bench dbrx-int4", "dbrx-q bench dbrx-int4 -p 512,4096 -n 128 -b 1,4 --out results"))
def model(
    path: Annotated[str, argument("PATH", "What to measure: a folder, a hub id or a GGUF file.")],
    prompt: Annotated[
        _Sizes, option(WORK, "Prompt lengths, the rows pp; 0 for none.", "--n-prompt", "-p", metavar="N,N..", default="512")
    ] = None,
    gen: Annotated[
        _Sizes, option(WORK, "Tokens to decode, the rows tg; 0 for none.", "--n-gen", "-n", metavar="N,N..", default="128")
    ] = None,
    batch: Annotated[_Sizes, option(WORK, "Sequences that run together.", "--batch", "-b", metavar="N,N..", default="1")] = None,
    depth: Annotated[_Sizes, option(WORK, "Tokens in the KV cache before each row.", "--depth", "-d", metavar="N,N..", default="0")] = None,
    repeats: _Repeats = 5,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    kv: options.Kv = "plain",
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    mmap: options.Mmap = True,
    fallback: options.Fallback = False,
    out: options.OutFolder = None,
    json: options.Json = False,
) -> None:
    """Measure tokens per second as llama-bench names them (pp512, tg128), time to first token and memory.

    Beside each speed stands what memory bandwidth and the matmul rate allow. Every prompt length, number of tokens, batch size and depth is
    combined. The rows pp compute the output of every token, as llama-bench -embd 1 does; the time to first token is what a prompt costs,
    with the last layer's experts for the last token alone. An interruption prints and writes the rows that are finished.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.model import bench_model, check_tests, speed_tests
    from dbrx_q.eval.bench.report import FILES, KEYS, markdown, write_report
    from dbrx_q.eval.provenance import command_line
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.folder import NativeFolder
    from dbrx_q.sources.open import open_source

    tests = speed_tests(
        _sizes("--n-prompt", prompt, 512, least=0),
        _sizes("--n-gen", gen, 128, least=0),
        _sizes("--batch", batch, 1, least=1),
        _sizes("--depth", depth, 0, least=0),
    )
    if repeats < 1:
        raise RequestError(f"--repeats must be at least 1; found {repeats}")
    torch_device = check_device(device)
    if out is not None:
        check_report_folder(out, FILES, KEYS)
    source = open_source(path, fallback=fallback)
    check_tests(tests, source.config)
    longest = max(test.depth + test.tokens + (test.kind == "pp") for test in tests)  # one token follows a prompt
    widest = max(test.batch for test in tests)
    source.budget = memory_budget.budget_of(ram, gpu, context=longest, batch=widest, kv_format=kv, fallback=fallback)
    source.use_mmap = mmap
    if source.budget is not None and not isinstance(source, NativeFolder):
        raise RequestError(f"{path}: --ram and --gpu measure what dbrx_q quantized; this is {source.format}. Leave them out")
    with terminal.progress("rows") as report:
        result = bench_model(
            source,
            tests,
            device=torch_device,
            dtype=named_dtype(dtype),
            kv_format=kv,
            repeats=repeats,
            command=command_line(),
            report=report,
        )
    if json:
        terminal.print_json(result.to_dict())
    else:
        print(markdown(result), end="", flush=True)
    if out is not None:
        write_report(result, out)
    if not result.complete:
        done = len(result.rows) + len(result.first_token)
        raise terminal.failed(f"interrupted after {done} of {result.planned} rows; the figures are of these alone")


@app.command(cls=Command, epilog=example("dbrx-q bench synthetic /tmp/dbrx-layer", "dbrx-q quantize /tmp/dbrx-layer /tmp/dbrx-layer-int4"))
def synthetic(
    destination: Annotated[Path, argument("DST", "Folder to write; new or empty.")],
    layers: Annotated[int, option(OUTPUT, "Layers of DBRX's dimensions, 6.6 GB each.", metavar="N")] = 1,
    seed: Annotated[int, option(OUTPUT, "Seed of the weights; the same seed writes the same bytes.", metavar="N")] = 0,
) -> None:
    """Write a bfloat16 checkpoint of DBRX's dimensions with random weights, to measure on."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.synthetic import dbrx_layer_config, write_checkpoint

    if layers < 1:
        raise RequestError(f"--layers must be at least 1; found {layers}")
    write_checkpoint(dbrx_layer_config(layers), destination, seed=seed)


@app.command(cls=Command, epilog=example("dbrx-q bench offload dbrx-int4 --share 25 --share 50 --out results"))
def offload(
    path: options.Folder,
    share: Annotated[
        list[float] | None,
        option(WORK, "Share of the experts that memory holds; may be given again.", metavar="PERCENT", default="25, 50, 75"),
    ] = None,
    gen: Annotated[int, option(WORK, "Tokens to decode, the rows tg; 0 for none.", "--n-gen", "-n", metavar="N")] = 24,
    prompt: Annotated[int, option(WORK, "Prompt length, the rows pp; 0 for none.", "--n-prompt", "-p", metavar="N")] = 512,
    policy: options.Policy = DEFAULT_POLICY.value,
    fallback: Annotated[
        bool, option(MEMORY, "Measure also with the fallback copy in the same memory (--share 75, 90).", "--fallback")
    ] = False,
    page_cache: Annotated[bool, option(MEMORY, "Read through the page cache instead of past it.", "--page-cache")] = False,
    out: options.OutFolder = None,
    json: options.Json = False,
) -> None:
    """Measure decode and prefill with some experts on disk, beside what the disk's bandwidth allows for the bytes that miss.

    On a machine with a GPU also with experts in host memory, by every miss policy.
    """
    import torch

    from dbrx_q.checkpoint.hub import resolve_folder
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.offload import bench_gpu, bench_offload
    from dbrx_q.eval.bench.offload_report import FILES, KEYS, files, markdown
    from dbrx_q.eval.provenance import command_line
    from dbrx_q.eval.report_folder import check_report_folder, write_files

    shares = share or ([75.0, 90.0] if fallback else [25.0, 50.0, 75.0])  # less does not hold a copy of half the bits
    if not all(0 < percent < 100 for percent in shares):
        raise RequestError(f"--share must be above 0 and below 100 percent; found {', '.join(f'{percent:g}' for percent in shares)}")
    if policy == "static":
        raise RequestError("random tokens have no profile; found --policy static. Choose another policy")
    if out is not None:
        check_report_folder(out, FILES, KEYS)
    fractions = [percent / 100 for percent in shares]
    with terminal.progress("rows") as on_row:
        result = bench_offload(
            resolve_folder(path, fallback=fallback),
            fractions,
            tokens=gen,
            prompt=prompt,
            policy=policy,
            direct=False if page_cache else None,
            fallback=fallback,
            command=command_line(),
            on_row=on_row,
        )
    if gen and torch.cuda.is_available():
        with terminal.progress("rows on the GPU") as on_row:
            device = torch.device("cuda", 0)
            result.gpus = bench_gpu(resolve_folder(path), fractions, device, tokens=gen, policy=policy, on_row=on_row)
    if json:
        terminal.print_json(result.to_dict())
    else:
        print(markdown(result), end="")
    if out is not None:
        write_files(out, files(result))


@app.command(
    cls=Command, epilog=example("dbrx-q bench kernels --out results", "dbrx-q bench kernels --model /tmp/dbrx-2-layers-int4 --json")
)
def kernels(
    model: Annotated[Path | None, option(WORK, "Checkpoint whose decode step is measured too.", metavar="PATH")] = None,
    repeats: Annotated[int, option(WORK, "Counted runs; medians are printed.", metavar="N")] = 20,
    out: options.OutFolder = None,
    json: options.Json = False,
) -> None:
    """Measure the GPU kernels at DBRX's shapes, beside this GPU's copy bandwidth, its matmul rate and other libraries' kernels."""
    import shlex
    import sys
    from json import dumps

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.eval.bench.kernel_resources import check_compiler
    from dbrx_q.eval.bench.kernels import bench_kernels, markdown
    from dbrx_q.eval.document import check_writable
    from dbrx_q.eval.report_folder import write_files

    if repeats < 1:
        raise RequestError(f"--repeats must be at least 1; found {repeats}")
    if out is not None:
        check_writable(out / "kernels.json")
        check_writable(out / "kernels.md")
    device = device_or_error("dbrx-q bench kernels")
    check_compiler()
    command = shlex.join(["dbrx-q", *sys.argv[1:]])
    with terminal.progress("kernels") as report:
        result = bench_kernels(device, command, model=model, repeats=repeats, report=report)
    if out is not None:
        figures = dumps(result.as_json(), indent=2) + "\n"
        write_files(out, {"kernels.json": figures.encode(), "kernels.md": markdown(result).encode()})
    if json:
        terminal.print_json(result.as_json())
    else:
        print(markdown(result), end="")


app.command(name="gpu", cls=Command, epilog=example("dbrx-q bench gpu --minutes 12 --out run", "dbrx-q bench gpu --device meta --out dry"))(
    bench_gpu.gpu
)
app.command(name="gpu-report", cls=Command, epilog=example("dbrx-q bench gpu-report run --out docs/benchmarks/2026-12-01-h200.md"))(
    bench_gpu.gpu_report
)


@app.command(cls=Command, epilog=example("dbrx-q bench tune"))
def tune(
    thorough: Annotated[bool, option(WORK, "Measure every candidate, for hours.", "--thorough")] = False,
    out: Annotated[Path | None, option(OUTPUT, "File to write.", metavar="FILE", default="the user's cache, which loading reads")] = None,
    json: options.Json = False,
) -> None:
    """Measure which tiles are the fastest for the kernels on this GPU, and save them."""
    from dataclasses import asdict

    from dbrx_q.eval.bench import tune as tuner
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.eval.bench.kernel_resources import check_compiler
    from dbrx_q.eval.document import check_writable
    from dbrx_q.model.tuned_tiles import tuning_path, unused_files, write_tuning

    if out is not None:
        check_writable(out)
    device = device_or_error("dbrx-q bench tune")
    check_compiler()
    with terminal.progress("tiles") as report:
        tuning, failures = tuner.tune(device, thorough=thorough, report=report)
    path = out or tuning_path(tuning.chip)
    write_tuning(tuning, path)
    if json:
        terminal.print_json({"path": str(path), **asdict(tuning), "failures": [asdict(failure) for failure in failures]})
        return
    for choice in tuning.choices:
        problem = choice.problem
        name = f"{problem.op} {problem.bits} bits, {problem.tokens} x {problem.N} x {problem.K}"
        print(f"{name:44}{choice.seconds * 1e6:10.1f} us, the default {choice.default_seconds * 1e6:.1f} us, of {choice.candidates}")
    for failure in failures:
        terminal.say(f"not measured: {failure.problem} with {failure.tiles}: {failure.reason}")
    for unused in unused_files(tuning.chip):
        terminal.say(f"not used: {unused} was measured with another version of Triton")
    print(path)


@app.command(
    cls=Command, epilog=example("dbrx-q bench resources --out docs/notes/kernel-resources.md", "dbrx-q bench resources --chip sm_86")
)
def resources(
    chip: Annotated[list[str] | None, option(WORK, "sm_86, gfx1100 ...; may be given again.", metavar="CHIP", default="all")] = None,
    everything: Annotated[bool, option(WORK, "Compile also kernels that differ only outside their main loop.", "--all")] = False,
    processes: Annotated[int, option(WORK, "Processes that compile at the same time.", metavar="N")] = 2,
    out: Annotated[
        Path | None, option(OUTPUT, "Markdown document whose table is replaced.", metavar="FILE", default="print the table")
    ] = None,
) -> None:
    """Compile every GPU kernel at DBRX's shapes, without a GPU, and report registers, shared memory and spills on each chip."""
    from dbrx_q.errors import DbrxError, RequestError
    from dbrx_q.eval.bench.kernel_report import check_report, document, problems, write_report
    from dbrx_q.eval.bench.kernel_report import resources as compiled
    from dbrx_q.eval.bench.kernel_resources import check_compiler
    from dbrx_q.kernels.triton.launch import CHIPS

    if processes < 1:
        raise RequestError(f"--processes must be at least 1; found {processes}")
    if out is not None:
        check_report(out)
    check_compiler()
    with terminal.progress("kernels") as report:
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


@app.command(
    cls=Command, epilog=example("dbrx-q bench static --chip sm_90 --case int4", "dbrx-q bench static --chip sm_86 --chip sm_90 --json")
)
def static(
    chip: Annotated[
        list[str] | None,
        option(
            WORK,
            "sm_80 (A100), sm_86 (RTX 3090), sm_89 (RTX 4090), sm_90 (H200) or sm_120 (RTX 5090); may be given again.",
            metavar="CHIP",
            default="all",
        ),
    ] = None,
    case: Annotated[
        list[str] | None,
        option(
            WORK,
            "moe, linear, attention, small, step, or a part of a case's name, such as int4; may be given again.",
            metavar="WORD",
            default="all cases",
        ),
    ] = None,
    everything: Annotated[bool, option(WORK, "More formats, numbers of tokens and batch sizes.", "--all")] = False,
    processes: Annotated[int, option(WORK, "Processes that compile at the same time.", metavar="N")] = 2,
    out: Annotated[
        Path | None, option(OUTPUT, "Markdown document whose table is replaced.", metavar="FILE", default="print the table")
    ] = None,
    record: Annotated[
        Path | None,
        option(OUTPUT, "Count only the loops that the tests compare with this file, and write it.", metavar="FILE", default="none"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compute how long the GPU kernels should take at DBRX's shapes, without a GPU: compile them and count their instructions.

    Nothing is measured. docs/notes/kernel-roofline.md explains the bounds and the columns of the table.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.gpu_specs import GPUS
    from dbrx_q.eval.bench.kernel_resources import check_compiler
    from dbrx_q.eval.bench.static_report import as_json, check_report, document, static_rows, write_report
    from dbrx_q.eval.document import check_writable

    if record is not None:
        from dbrx_q.eval.bench.loop_record import write_record

        others = {"--chip": chip, "--case": case, "--all": everything, "--processes": processes != 2, "--out": out, "--json": json}
        given = [name for name, value in others.items() if value]
        if given:
            raise RequestError(
                f"--record has chips and cases of its own and prints no table; found also {', '.join(given)}. Leave them out"
            )
        check_writable(record)
        check_compiler()
        write_record(record)
        print(record)
        return
    if processes < 1:
        raise RequestError(f"--processes must be at least 1; found {processes}")
    if out is not None:
        check_report(out)
    check_compiler()
    with terminal.progress("cases") as report:
        rows = list(static_rows(tuple(chip or GPUS), words=case or (), everything=everything, processes=processes, report=report))
    if out is not None:
        write_report(out, document(rows))
    if json:
        terminal.print_json(as_json(rows))
    elif out is None:
        print(document(rows))


def _sizes(option: str, values: list[str] | None, default: int, *, least: int) -> list[int]:
    """Whole numbers, each once: an option may be given again, and hold several."""
    from dbrx_q.errors import RequestError

    sizes = []
    for word in (word.strip() for value in values or [str(default)] for word in value.split(",")):
        if not (word.isascii() and word.isdecimal() and len(word) < 16) or int(word) < least:
            raise RequestError(f"{option} must be whole numbers of at least {least}, as 512 or 128,512; found {word!r:.40}")
        sizes.append(int(word))
    return list(dict.fromkeys(sizes))
