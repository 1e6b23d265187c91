"""`dbrx-q sensitivity`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import measuring, output
from .generate import DEVICE_HELP, Dtype

if TYPE_CHECKING:
    from dbrx_q.eval.sensitivity import Sensitivity

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q sensitivity databricks/dbrx-instruct --text wiki.test.txt --by layer --out sensitivity")
_PLAIN_BITS = 16


class By(str, Enum):
    """What is rounded at a time."""

    kind = "kind"
    layer = "layer"
    tensor = "tensor"


class RoundedFormat(str, Enum):
    """Formats of weights."""

    int4 = "int4"
    int8 = "int8"
    nf4 = "nf4"


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint with plain weights: a folder or a hub id.", show_default=False)],
    text: Annotated[str, typer.Option(metavar="FILE", help=measuring.TEXT_HELP, show_default=False)],
    by: Annotated[By, typer.Option(help="What is rounded at a time: a kind of tensor in all layers, a layer, or a tensor.")] = By.tensor,
    formats: Annotated[
        list[RoundedFormat] | None,
        typer.Option("--format", help="What it is rounded to; may be repeated. [default: int4]", show_default=False),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Neighbouring weights that share a scale.")] = 64,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; 512, or the model's context where that is shorter.", show_default=False)
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows from the start of the text that are measured on, at most.")] = 16,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for sensitivity.json, .md and .png.", show_default=False)] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=measuring.DTYPE_HELP, show_default=False)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Round one part of a model at a time and measure how far its predictions move: where bits are worth most."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.provenance import command_line, provenance
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.eval.sensitivity import check_formats, sensitivity, units_of
    from dbrx_q.eval.sensitivity_report import FILES, KEYS, write_report
    from dbrx_q.eval.sources import open_source
    from dbrx_q.eval.texts import load_text
    from dbrx_q.eval.windows import Protocol
    from dbrx_q.layout import TensorFormat
    from dbrx_q.model import check_device

    if out is not None:
        check_report_folder(out, FILES, KEYS)
    place = check_device(device)
    words = load_text(text)
    source = open_source(path)
    if source.bits_per_weight < _PLAIN_BITS:
        raise RequestError(
            f"{path}: sensitivity must start from plain weights; found {source.format}, {source.bits_per_weight:.2f} bits per weight. "
            "Give the checkpoint that it was made from"
        )
    how = Protocol.of(min(512, source.config.max_seq_len) if context is None else context, limit=windows)
    ids = source.tokenizer().encode(words.text)
    how.check(len(ids), source.config, source=text)
    units = units_of(source.config, by.value)
    wanted = [TensorFormat(name, group_size) for name in dict.fromkeys(fmt.value for fmt in formats or [RoundedFormat.int4])]
    check_formats(source.config, units, wanted)
    checkpoint = source.sha256()
    model = source.load(dtype=measuring.dtype_of(dtype, place), device=place)
    with output.progress("parts") as on_run:
        found = sensitivity(
            model,
            ids,
            how,
            units,
            wanted,
            checkpoint=path,
            sha256=checkpoint,
            text=words,
            by=by.value,
            provenance=provenance(place, command_line()),
            on_run=on_run,
        )
    if out is not None:
        write_report(found, out)
    if json:
        output.print_json(found.to_dict())
    else:
        _print(found, out)
    if not found.complete:
        done, total = len(found.units), len(units) * len(wanted)
        message = f"dbrx-q: error: interrupted; the figures are those of the {done} of {total} parts that were done"
        output.stderr().print(message, markup=False, soft_wrap=True)
        raise typer.Exit(2)


def _print(found: Sensitivity, out: Path | None) -> None:
    from dbrx_q.eval.sensitivity_report import table

    rows = table(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    part = "" if found.complete else "partial: "
    print(
        f"\n{part}{found.windows} windows of {found.context} tokens, {found.tokens:,} predicted; perplexity as it is {found.perplexity:.4f}"
    )
    if out is not None:
        print(out / "sensitivity.md")
