"""`dbrx-q perplexity`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import budgets, measuring, output
from .budgets import Fallback, GpuSizes, Ram
from .generate import DEVICE_HELP, KV_HELP, Dtype, KvFormat
from .measuring import ProtocolName

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q perplexity dbrx-int4 --text wiki.test.txt --context 2048")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help=measuring.CHECKPOINT_HELP, show_default=False)],
    text: Annotated[str, typer.Option(metavar="FILE", help=measuring.TEXT_HELP, show_default=False)],
    context: Annotated[int | None, typer.Option(help=measuring.CONTEXT_HELP, show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(help=measuring.STRIDE_HELP, show_default=False)] = None,
    protocol: Annotated[ProtocolName | None, typer.Option(help=measuring.PROTOCOL_HELP, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(metavar="WINDOWS", help=measuring.LIMIT_HELP, show_default=False)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=measuring.DTYPE_HELP, show_default=False)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ram: Ram = None,
    gpu: GpuSizes = None,
    fallback: Fallback = False,
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    resume: Annotated[bool, typer.Option("--resume", help=measuring.RESUME_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Measure perplexity on a text: exp(total negative log-likelihood / predicted tokens)."""
    from dataclasses import asdict

    from dbrx_q.eval.perplexity import perplexity
    from dbrx_q.eval.provenance import command_line, provenance, run_key
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.texts import load_text
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

    place = check_device(device)
    words = load_text(text)
    source = open_source(path, fallback=fallback)
    ids = source.tokenizer().encode(words.text)
    how = measuring.protocol_of(protocol, context, stride, limit, source.config)
    how.check(len(ids), source.config, source=text)
    chosen = measuring.dtype_of(dtype, place)
    checkpoint = source.sha256()
    budgets.give(source, ram, gpu, context=how.context, kv_format=kv.value, fallback=fallback)
    key = run_key("perplexity", {}, source, checkpoint, ids, how, dtype=chosen, kv_format=kv.value, device=place)
    state = RunState(key)
    if not resume:
        state.clear()
    model = source.load(dtype=chosen, device=place)
    with output.progress("windows") as on_window:
        result = perplexity(model, ids, how, kv_format=kv.value, state=state, on_window=on_window)
    if json:
        shown = {"checkpoint": path, "checkpoint_sha256": checkpoint, "format": source.format, "bits_per_weight": source.bits_per_weight}
        shown |= {"text": text, "text_sha256": words.sha256, "dtype": str(model.dtype).removeprefix("torch."), "kv": kv.value}
        output.print_json(asdict(result) | shown | {"provenance": provenance(place, command_line())})
    else:
        tokens = (
            f"{result.tokens:,} tokens predicted" if result.complete else f"the first {result.tokens:,} of {result.total_tokens:,} tokens"
        )
        apart = f", stride {result.stride}" if result.protocol == "strided" else ""
        cut = f"{result.protocol}, context {result.context}{apart}"
        print(f"perplexity {result.perplexity:.4f} +- {result.stderr:.4f}  ({tokens}, {cut})")
        if fallback:
            print(f"the fallback copy answered {result.fallback_share:.1%} of the requests for experts")
    if not result.complete:
        raise measuring.interrupted(result.tokens, result.total_tokens, kept=state.path.exists())
