"""`dbrx-q tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import budgets, measuring, output
from .budgets import Fallback, GpuSizes, Ram
from .generate import DEVICE_HELP, KV_HELP, Dtype, KvFormat

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example(
    "dbrx-q tasks dbrx-int4 --tasks hellaswag,arc_easy --batch 8",
    "dbrx-q tasks dbrx-int4 --tasks gsm8k --limit 100 --chat",
)


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help=measuring.CHECKPOINT_HELP, show_default=False)],
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Tasks of lm-evaluation-harness, by commas.", show_default=False)],
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with task YAMLs of your own; they come first.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; each task's own number unless given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="DOCUMENTS", help="Only so many of each task, for a trial.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the checkpoint's chat template, examples as turns.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what --json prints here too.", show_default=False)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=measuring.DTYPE_HELP, show_default=False)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ram: Ram = None,
    gpu: GpuSizes = None,
    fallback: Fallback = False,
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    resume: Annotated[bool, typer.Option("--resume", help=measuring.RESUME_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Measure a checkpoint on downstream tasks of lm-evaluation-harness (pip install 'dbrx_q[tasks]')."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.provenance import command_line, fallback_of, provenance
    from dbrx_q.eval.report_folder import write_files
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.tasks.answers import Answers
    from dbrx_q.eval.tasks.run import find_tasks, run_tasks
    from dbrx_q.eval.tasks.shared_prefix import CACHES
    from dbrx_q.model.devices import check_device
    from dbrx_q.planning.budget import DEFAULT_CONTEXT
    from dbrx_q.sources.open import open_source

    place = check_device(device)
    if out is not None:
        _check_out(out)
    source = open_source(path, fallback=fallback)
    tokenizer = source.tokenizer()
    if chat and tokenizer.chat_template is None:
        raise RequestError(f"{path}: --chat needs a chat template; the checkpoint has none. Leave --chat out")
    chosen = find_tasks([name.strip() for name in tasks.split(",") if name.strip()], tasks_path)
    checkpoint = source.sha256()
    chosen_dtype = measuring.dtype_of(dtype, place)
    context = min(DEFAULT_CONTEXT, source.config.max_seq_len)
    budgets.give(source, ram, gpu, context=context, caches=CACHES, kv_format=kv.value, fallback=fallback)
    asked = {"tasks": list(chosen.names), "num_fewshot": num_fewshot, "limit": limit, "batch": batch, "chat": chat, "kv": kv.value}
    where = provenance(place, command_line())
    decides: dict[str, Any] = {"fallback": fallback_of(source)} if fallback else {}
    decides |= {"kind": "tasks", "config": source.config.to_dict(), "checkpoint": checkpoint, "dtype": str(chosen_dtype)}
    state = RunState(asked | decides | {name: where[name] for name in ("versions", "device", "threads")})
    if not resume:
        state.clear()
    answers = Answers(state)
    try:
        with output.progress("requests") as on_done:
            found = run_tasks(
                chosen,
                lambda: source.load(dtype=chosen_dtype, device=place),
                tokenizer,
                source.config,
                name=path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch,
                kv_format=kv.value,
                chat=chat,
                answers=answers,
                on_done=on_done,
            )
    except KeyboardInterrupt:
        if not answers.done:
            raise
        raise _interrupted(answers.done, answers.total, kept=state.path.exists()) from None
    where["versions"] |= found.versions
    result = {
        "checkpoint": path,
        "checkpoint_sha256": checkpoint,
        "format": source.format,
        "bits_per_weight": source.bits_per_weight,
        **found.values,
        **asked,
        "dtype": found.dtype,
        "requested_tokens": found.requested_tokens,
        "prefilled_tokens": found.prefilled_tokens,
        "cut_contexts": found.cut_contexts,
        "requests_sha256": found.requests_sha256,
        "seeds": found.seeds,
        "provenance": where,
    }
    if json:
        output.print_json(result)
    else:
        print(found.table())
        print(
            f"\n{path}  ({source.format}, {source.bits_per_weight:.3f} bits per weight, sha256 {checkpoint[:16]})\n"
            f"{found.prefilled_tokens:,} tokens of prompts were computed for {found.requested_tokens:,}: the rest were shared prefixes\n"
            f"{where['device']}, {found.dtype}, lm_eval {found.versions['lm_eval']}",
            flush=True,
        )
    if found.cut_contexts:
        message = (
            f"the beginning of {found.cut_contexts:,} contexts was left out: they are longer than the model's {source.config.max_seq_len:,}"
        )
        output.stderr().print(message, markup=False, soft_wrap=True)
    if out is not None:
        write_files(out.parent, {out.name: _encoded(result)})
    state.clear()


def _check_out(path: Path) -> None:
    """Refuse what could not be written at the end, and what a former run did not write."""
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
    """JSON, with null for a number that is not finite, for which it has no word."""
    import json

    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return (json.dumps(finite, indent=2, allow_nan=False) + "\n").encode()


def _interrupted(done: int, total: int, *, kept: bool) -> typer.Exit:
    """Says on stderr how far the run came and whether it can go on; raise what it gives."""
    how = "the same command with --resume goes on" if kept else "their answers could not be kept for --resume"
    output.stderr().print(f"dbrx-q: error: interrupted after {done:,} of {total:,} requests; {how}", markup=False, soft_wrap=True)
    return typer.Exit(2)
