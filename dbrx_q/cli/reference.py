"""`dbrx-q reference`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dbrx_q.planning.sizes import format_size

from . import measurement, memory_budget, options, terminal
from .help import example
from .options import OUTPUT, argument, option

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example(
    "dbrx-q reference databricks/dbrx-instruct wiki.safetensors --text wiki.test.txt --context 512 --top-k 256",
    "dbrx-q compare wiki.safetensors dbrx-int4 --text wiki.test.txt",
)


def command(
    path: options.Checkpoint,
    destination: Annotated[Path, argument("FILE", "The .safetensors file to write; must not exist.")],
    text: options.Text,
    context: options.Window = None,
    protocol: options.Protocol = None,
    stride: options.Stride = None,
    limit: options.Limit = None,
    device: options.Device = "cpu",
    dtype: options.MeasuredDtype = None,
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    top_k: Annotated[
        int | None, option(OUTPUT, "Save the K most probable tokens, 8 bytes each.", metavar="K", default="all, 2 bytes each")
    ] = None,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Save a model's predictions for a text, to compare checkpoints with them on a machine that cannot hold the model."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.compare.reference import ModelReference
    from dbrx_q.eval.compare.reference_writer import check_destination, save_reference
    from dbrx_q.eval.provenance import command_line, provenance
    from dbrx_q.eval.texts import load_text
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

    torch_device = check_device(device)
    loaded_text = load_text(text)
    source = open_source(path)
    ids = source.tokenizer().encode(loaded_text.text, split_special_tokens=True)
    windowing = measurement.protocol_of(protocol, context, stride, limit, source.config)
    windowing.check(len(ids), source.config, source=text)
    if destination.suffix != ".safetensors":
        raise RequestError(f"{destination}: a saved reference is a .safetensors file; found the ending {destination.suffix!r}. Change it")
    check_destination(destination, source.config, len(ids), windowing, top_k)
    memory_budget.give_budget(source, ram, gpu, context=windowing.context)
    reference = ModelReference(source, source.load(dtype=measurement.dtype_of(dtype, torch_device), device=torch_device))
    about = {"text": text, "text_sha256": loaded_text.sha256, "provenance": provenance(torch_device, command_line())}
    with terminal.progress("windows") as on_window:
        done, total = save_reference(reference, ids, windowing, destination, about=about, top_k=top_k, resume=resume, on_window=on_window)
    if done < total:
        raise measurement.interrupted(done, total, kept=True)
    size = destination.stat().st_size
    if json:
        terminal.print_json(
            {
                "path": str(destination),
                "bytes": size,
                "tokens": total,
                "protocol": windowing.name,
                "context": windowing.context,
                "top_k": top_k,
            }
        )
        return
    print(f"{destination}  {format_size(size)}, {total:,} tokens predicted, {windowing.name}, context {windowing.context}")
