"""`dbrx-q trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import memory_budget, options, terminal
from .help import example
from .measurement import named_dtype
from .options import TEXT, option
from .running import load_to_run

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q trace dbrx-int4 --text wiki.test.txt --out trace.npz --tokens 4096")


def command(
    path: options.Checkpoint,
    text: options.Text,
    out: options.OutFile,
    context: Annotated[int | None, option(TEXT, "Tokens of a window.", metavar="N", default="2048, at most the model's")] = None,
    tokens: Annotated[int | None, option(TEXT, "Tokens from the start of the text.", metavar="N", default="all")] = None,
    step: Annotated[int, option(TEXT, "Most tokens of a forward pass; 1 records what decoding does.", metavar="N")] = 512,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    json: options.Json = False,
) -> None:
    """Record which experts every token of a text chooses, for `simulate` and for `generate --profile`."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.texts import load_text
    from dbrx_q.generation.tracing import record
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_runnable

    torch_device = check_device(device)
    if out.suffix != ".npz":
        raise RequestError(f"{out}: a trace is an .npz file; found the ending {out.suffix!r}. Change it")
    if out.parent != Path() and not out.parent.is_dir():
        raise RequestError(f"{out}: the folder of a trace must exist; make {out.parent}")
    if tokens is not None and tokens < 1:
        raise RequestError(f"--tokens must be at least 1; found {tokens}")
    if step < 1:
        raise RequestError(f"--step must be at least 1; found {step}")
    loaded_text = load_text(text)
    source = open_runnable(path)
    config = source.config
    context = min(2048, config.max_seq_len) if context is None else context
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"--context must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    ids = source.tokenizer().encode(loaded_text.text, split_special_tokens=True)[:tokens]
    source.budget = memory_budget.budget_of(ram, gpu, context=context, step_tokens=min(step, context))
    model = load_to_run(source, dtype=named_dtype(dtype), device=torch_device)
    with terminal.progress("tokens") as on_tokens:
        trace = record(model, ids, context=context, step=step, on_tokens=on_tokens)
    trace.write(out)
    L, A = trace.experts.shape[1:]
    if json:
        terminal.print_json({"tokens": len(ids), "layers": L, "active_experts": A, "file": str(out), "bytes": out.stat().st_size})
    else:
        print(f"{out}  {len(ids):,} tokens, {A} of {trace.n_experts} experts in {L} layers")
