"""`dbrx-q trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import budgets, measuring, output
from .budgets import GpuSizes, Ram
from .generate import DEVICE_HELP, Dtype

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q trace dbrx-int4 --text wiki.test.txt --out trace.npz --tokens 4096")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id, plain or quantized.", show_default=False)],
    text: Annotated[str, typer.Option(metavar="FILE", help=measuring.TEXT_HELP, show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The trace, an .npz file.", show_default=False)],
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; 2048, or the model's context where that is shorter.", show_default=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens from the start of the text; all unless given.", show_default=False)] = None,
    step: Annotated[int, typer.Option(help="Tokens of a forward pass at most; 1 for what decoding does.")] = 512,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of activations; auto takes the checkpoint's.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ram: Ram = None,
    gpu: GpuSizes = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Record which experts every token of a text chooses, for `simulate` and for `generate --profile`."""
    import torch

    from dbrx_q.checkpoint.hub import resolve_folder
    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.texts import load_text
    from dbrx_q.generation.tracing import record
    from dbrx_q.model.devices import check_device
    from dbrx_q.model.loading import load_pretrained
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

    place = check_device(device)
    if out.suffix != ".npz":
        raise RequestError(f"{out}: a trace is an .npz file; found the ending {out.suffix!r}. Change it")
    if out.parent != Path() and not out.parent.is_dir():
        raise RequestError(f"{out}: the folder of a trace must exist; make {out.parent}")
    if tokens is not None and tokens < 1:
        raise RequestError(f"--tokens must be at least 1; found {tokens}")
    if step < 1:
        raise RequestError(f"--step must be at least 1; found {step}")
    words = load_text(text)
    folder = resolve_folder(path)
    config = DbrxConfig.from_pretrained(folder)
    context = min(2048, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    ids = DbrxTokenizer.from_pretrained(folder).encode(words.text)[:tokens]
    budget = budgets.budget_of(ram, gpu, context=context, step_tokens=min(step, context))
    model = load_pretrained(folder, budget=budget, device=place, dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value))
    with output.progress("tokens") as on_tokens:
        trace = record(model, ids, context=context, step=step, on_tokens=on_tokens)
    trace.write(out)
    L, A = trace.experts.shape[1:]
    if json:
        output.print_json({"tokens": len(ids), "layers": L, "active_experts": A, "file": str(out), "bytes": out.stat().st_size})
    else:
        print(f"{out}  {len(ids):,} tokens, {A} of {trace.n_experts} experts in {L} layers")
