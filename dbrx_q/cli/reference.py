"""`dbrx-q reference`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dbrx_q.planning.sizes import format_size

from . import budgets, measuring, output
from .budgets import GpuSizes, Ram
from .generate import DEVICE_HELP, Dtype
from .measuring import ProtocolName

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example(
    "dbrx-q reference databricks/dbrx-instruct wiki.safetensors --text wiki.test.txt --context 512 --top-k 256",
    "dbrx-q compare wiki.safetensors dbrx-int4 --text wiki.test.txt",
)


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help=measuring.CHECKPOINT_HELP, show_default=False)],
    destination: Annotated[
        Path, typer.Argument(metavar="FILE", help="The .safetensors file to write; must not exist.", show_default=False)
    ],
    text: Annotated[str, typer.Option(metavar="FILE", help=measuring.TEXT_HELP, show_default=False)],
    context: Annotated[int | None, typer.Option(help=measuring.CONTEXT_HELP, show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(help=measuring.STRIDE_HELP, show_default=False)] = None,
    protocol: Annotated[ProtocolName | None, typer.Option(help=measuring.PROTOCOL_HELP, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(metavar="WINDOWS", help=measuring.LIMIT_HELP, show_default=False)] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Keep this many of the likeliest tokens, 8 bytes each; the whole vocabulary, 2 bytes each, unless given.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=measuring.DTYPE_HELP, show_default=False)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ram: Ram = None,
    gpu: GpuSizes = None,
    resume: Annotated[bool, typer.Option("--resume", help=measuring.RESUME_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Save what a model predicts for a text, so that checkpoints can be compared with it where it does not fit."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.compare.reference import ModelReference
    from dbrx_q.eval.compare.reference_writer import check_destination, save_reference
    from dbrx_q.eval.provenance import command_line, provenance
    from dbrx_q.eval.texts import load_text
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

    place = check_device(device)
    words = load_text(text)
    source = open_source(path)
    ids = source.tokenizer().encode(words.text)
    how = measuring.protocol_of(protocol, context, stride, limit, source.config)
    how.check(len(ids), source.config, source=text)
    if destination.suffix != ".safetensors":
        raise RequestError(f"{destination}: a saved reference is a .safetensors file; found the ending {destination.suffix!r}. Change it")
    check_destination(destination, source.config, len(ids), how, top_k)
    budgets.give(source, ram, gpu, context=how.context)
    reference = ModelReference(source, source.load(dtype=measuring.dtype_of(dtype, place), device=place))
    about = {"text": text, "text_sha256": words.sha256, "provenance": provenance(place, command_line())}
    with output.progress("windows") as on_window:
        done, total = save_reference(reference, ids, how, destination, about=about, top_k=top_k, resume=resume, on_window=on_window)
    if done < total:
        raise measuring.interrupted(done, total, kept=True)
    size = destination.stat().st_size
    if json:
        output.print_json(
            {"path": str(destination), "bytes": size, "tokens": total, "protocol": how.name, "context": how.context, "top_k": top_k}
        )
        return
    print(f"{destination}  {format_size(size)}, {total:,} tokens predicted, {how.name}, context {how.context}")
