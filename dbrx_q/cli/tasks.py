"""`dbrx-q tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import measuring, output
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
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Measure a checkpoint on downstream tasks of lm-evaluation-harness (pip install 'dbrx_q[tasks]')."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.provenance import command_line, provenance
    from dbrx_q.eval.sources import open_source
    from dbrx_q.eval.tasks import find_tasks, run_tasks
    from dbrx_q.model import check_device

    place = check_device(device)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise RequestError(f"{out}: must be a file in a folder that exists. Make the folder, or name another file")
    source = open_source(path)
    tokenizer = source.tokenizer()
    if chat and tokenizer.chat_template is None:
        raise RequestError(f"{path}: --chat needs a chat template; the checkpoint has none. Leave --chat out")
    chosen = find_tasks([name.strip() for name in tasks.split(",") if name.strip()], tasks_path)
    checkpoint = source.sha256()
    model = source.load(dtype=measuring.dtype_of(dtype, place), device=place)
    with output.progress("requests") as on_done:
        found = run_tasks(
            chosen,
            model,
            tokenizer,
            name=path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch,
            kv_format=kv.value,
            chat=chat,
            on_done=on_done,
        )
    where = provenance(place, command_line())
    where["versions"]["lm_eval"] = found.harness
    result = {
        "checkpoint": path,
        "checkpoint_sha256": checkpoint,
        "format": source.format,
        "bits_per_weight": source.bits_per_weight,
        "tasks": list(chosen.names),
        **found.values,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch": batch,
        "chat": chat,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv": kv.value,
        "requested_tokens": found.requested_tokens,
        "prefilled_tokens": found.prefilled_tokens,
        "provenance": where,
    }
    if out is not None:
        _write(result, out)
    if json:
        output.print_json(result)
        return
    print(found.table())
    print(
        f"\n{path}  ({source.format}, {source.bits_per_weight:.3f} bits per weight, sha256 {checkpoint[:16]})\n"
        f"{found.prefilled_tokens:,} tokens of prompts were computed for {found.requested_tokens:,}: the rest were shared prefixes\n"
        f"{where['device']}, {str(model.dtype).removeprefix('torch.')}, lm_eval {found.harness}"
    )


def _write(result: dict[str, Any], path: Path) -> None:
    """All of the file or nothing of it."""
    import json
    import os

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
