"""`dbrx-q tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import measurement, memory_budget, options, terminal
from .help import example
from .options import OUTPUT, TASKS, option

if TYPE_CHECKING:
    import typer

    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.tasks.run import TaskResults
    from dbrx_q.sources.base import Source

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example(
    "dbrx-q tasks dbrx-int4 --tasks hellaswag,arc_easy --batch 8",
    "dbrx-q tasks dbrx-int4 --tasks gsm8k --limit 100 --chat",
)


def command(
    path: options.Checkpoint,
    tasks: Annotated[str, option(TASKS, "Tasks of lm-evaluation-harness, separated by commas.", metavar="NAMES", default=False)],
    tasks_path: Annotated[Path | None, option(TASKS, "Folder of your own task YAMLs, which take precedence.", metavar="DIR")] = None,
    num_fewshot: Annotated[
        int | None, option(TASKS, "Examples before each question.", metavar="N", default="each task's own", least=0)
    ] = None,
    limit: Annotated[int | None, option(TASKS, "Most documents of each task, for a trial.", metavar="N", default="all", least=1)] = None,
    batch: Annotated[int, option(TASKS, "Requests that run together.", metavar="N", least=1)] = 8,
    chat: Annotated[bool, option(TASKS, "Put prompts into the chat template, with examples as turns.", "--chat")] = False,
    device: options.Device = "cpu",
    dtype: options.MeasuredDtype = None,
    kv: options.Kv = "plain",
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    mmap: options.Mmap = True,
    fallback: options.Fallback = False,
    out: Annotated[Path | None, option(OUTPUT, "File for the JSON object that --json prints.", metavar="FILE")] = None,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Measure a checkpoint on downstream tasks of lm-evaluation-harness (pip install 'dbrx_q[tasks]')."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.provenance import command_line, provenance
    from dbrx_q.eval.report_folder import write_files
    from dbrx_q.eval.tasks.answers import Answers
    from dbrx_q.eval.tasks.run import find_tasks, run_tasks
    from dbrx_q.eval.tasks.shared_prefix import CACHES
    from dbrx_q.model.devices import check_device
    from dbrx_q.planning.budget import DEFAULT_CONTEXT
    from dbrx_q.sources.open import open_source

    torch_device = check_device(device)
    if out is not None:
        _check_out(out)
    source = open_source(path, fallback=fallback)
    tokenizer = source.tokenizer()
    if chat and tokenizer.chat_template is None:
        raise RequestError(f"{path}: --chat needs a chat template; the checkpoint has none. Leave --chat out")
    selection = find_tasks([name.strip() for name in tasks.split(",") if name.strip()], tasks_path)
    checkpoint = source.sha256()
    torch_dtype = measurement.dtype_of(dtype, torch_device)
    context = min(DEFAULT_CONTEXT, source.config.max_seq_len)
    memory_budget.give_budget(source, ram, gpu, context=context, caches=CACHES, kv_format=kv, fallback=fallback)
    source.use_mmap = mmap
    request = {"tasks": list(selection.names), "num_fewshot": num_fewshot, "limit": limit, "batch": batch, "chat": chat, "kv": kv}
    origin = provenance(torch_device, command_line())
    state = _run_state(source, checkpoint, request, origin, dtype=str(torch_dtype), fallback=fallback)
    if not resume:
        state.clear()
    answers = Answers(state)
    try:
        with terminal.progress("requests") as on_done:
            result = run_tasks(
                selection,
                lambda: source.load(dtype=torch_dtype, device=torch_device),
                tokenizer,
                source.config,
                name=path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch,
                kv_format=kv,
                chat=chat,
                answers=answers,
                on_done=on_done,
            )
    except KeyboardInterrupt:
        if not answers.done:
            raise
        raise _interrupted(answers.done, answers.total, kept=state.path.exists()) from None
    origin["versions"] |= result.versions
    report = _as_dict(result, source, path, checkpoint, request, origin)
    if json:
        terminal.print_json(report)
    else:
        _print(result, source, path, checkpoint, str(origin["device"]))
    _say_truncated(result, source)
    if out is not None:
        write_files(out.parent, {out.name: _encoded(report)})
    state.clear()


def _run_state(source: Source, checkpoint: str, request: dict[str, Any], origin: dict[str, Any], *, dtype: str, fallback: bool) -> RunState:
    """Where answers are saved: a file for everything that determines them."""
    from dbrx_q.eval.provenance import fallback_of
    from dbrx_q.eval.resume import RunState

    key: dict[str, Any] = {"fallback": fallback_of(source)} if fallback else {}
    key |= {"kind": "tasks", "config": source.config.to_dict(), "checkpoint": checkpoint, "dtype": dtype}
    return RunState(request | key | {name: origin[name] for name in ("versions", "device", "threads")})


def _as_dict(
    result: TaskResults, source: Source, path: str, checkpoint: str, request: dict[str, Any], origin: dict[str, Any]
) -> dict[str, Any]:
    return {
        "checkpoint": path,
        "checkpoint_sha256": checkpoint,
        "format": source.format,
        "bits_per_weight": source.bits_per_weight,
        **result.values,
        **request,
        "dtype": result.dtype,
        "requested_tokens": result.requested_tokens,
        "prefilled_tokens": result.prefilled_tokens,
        "truncated_contexts": result.truncated_contexts,
        "requests_sha256": result.requests_sha256,
        "seeds": result.seeds,
        "provenance": origin,
    }


def _print(result: TaskResults, source: Source, path: str, checkpoint: str, device: str) -> None:
    print(result.table())
    print(
        f"\n{path}  ({source.format}, {source.bits_per_weight:.3f} bits per weight, sha256 {checkpoint[:16]})\n"
        f"{result.prefilled_tokens:,} tokens of prompts were computed for {result.requested_tokens:,}: the rest were shared prefixes\n"
        f"{device}, {result.dtype}, lm_eval {result.versions['lm_eval']}",
        flush=True,
    )


def _say_truncated(result: TaskResults, source: Source) -> None:
    if result.truncated_contexts:
        window = source.config.max_seq_len
        terminal.say(
            f"{result.truncated_contexts:,} contexts were truncated at their beginning: they are longer than the model's {window:,} tokens"
        )


def _check_out(path: Path) -> None:
    """Refuse a file that could not be written at the end of the run, and one that this command did not write."""
    import os

    from dbrx_q.errors import RequestError

    if path.is_dir() or not path.parent.is_dir():
        raise RequestError(f"{path}: must be a file in a folder that exists. Make the folder, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"{path}: must be in a folder that can be written to; {path.parent} cannot. Name another file")
    if path.exists() and not _is_result(path):
        raise RequestError(f"{path}: only a former result of this command is replaced; this file is none. Name another, or move it")


def _is_result(path: Path) -> bool:
    import json

    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"checkpoint_sha256", "tasks", "results", "requested_tokens"} <= data.keys()


def _encoded(result: dict[str, Any]) -> bytes:
    """JSON; a number that is not finite, which JSON cannot express, becomes null."""
    import json

    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return (json.dumps(finite, indent=2, allow_nan=False) + "\n").encode()


def _interrupted(done: int, total: int, *, kept: bool) -> typer.Exit:
    """Print on stderr how far the run got and whether --resume can continue it; raise the result."""
    resume = "the same command with --resume continues" if kept else "their answers could not be kept for --resume"
    return terminal.failed(f"interrupted after {done:,} of {total:,} requests; {resume}")
