"""`dbrx-q perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .generate import DEVICE_HELP, KV_HELP, Dtype, KvFormat

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q perplexity dbrx-int4 --text wiki.test.txt --context 2048")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to predict.", show_default=False)],
    context: Annotated[int | None, typer.Option(help="Tokens of a window; 2048, or the model's context where that is shorter.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; the context (windows do not overlap) unless given.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of activations; float32, which adds no noise of its own, on the CPU and auto on a GPU.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Measure perplexity on a text: exp(total negative log-likelihood / predicted tokens)."""
    from dataclasses import asdict

    from dbrx_q.config import DbrxConfig
    from dbrx_q.eval.perplexity import check_windows, perplexity, read_text
    from dbrx_q.hub import resolve_folder
    from dbrx_q.model import DbrxForCausalLM, check_device
    from dbrx_q.tokenizer import DbrxTokenizer

    place = check_device(device)
    chosen = dtype or (Dtype.float32 if place.type == "cpu" else Dtype.auto)
    words = read_text(text)
    folder = resolve_folder(path)
    ids = DbrxTokenizer.from_pretrained(folder).encode(words)
    config = DbrxConfig.from_pretrained(folder)
    context = min(2048, config.max_seq_len) if context is None else context
    check_windows(len(ids), context, stride, config, source=str(text))
    model = DbrxForCausalLM.from_pretrained(folder, device=place, dtype=None if chosen is Dtype.auto else chosen.value)
    with output.progress("windows") as on_window:
        result = perplexity(model, ids, context=context, stride=stride, kv_format=kv.value, on_window=on_window)
    if json:
        how = {"text": str(text), "dtype": str(model.dtype).removeprefix("torch."), "device": str(place), "kv": kv.value}
        output.print_json(asdict(result) | how)
        return
    protocol = f"{result.tokens:,} tokens predicted, {result.protocol}, context {context}"
    print(f"perplexity {result.perplexity:.4f} +- {result.stderr:.4f}  ({protocol})")
