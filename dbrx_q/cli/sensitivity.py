"""`dbrx-q sensitivity`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import budgets, measuring, output
from .budgets import GpuSizes, Ram
from .generate import DEVICE_HELP, Dtype

if TYPE_CHECKING:
    from dbrx_q.eval.sensitivity.measure import Sensitivity

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
    nf4_double = "nf4-double"


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
    ram: Ram = None,
    gpu: GpuSizes = None,
    resume: Annotated[bool, typer.Option("--resume", help=measuring.RESUME_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Round one part of a model at a time and measure how far its predictions move: where bits are worth most."""
    from dataclasses import asdict

    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.provenance import command_line, provenance, run_key
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.sensitivity.measure import check_formats, measurable, sensitivity, units_of
    from dbrx_q.eval.sensitivity.report import FILES, KEYS, without_figures, write_report
    from dbrx_q.eval.texts import load_text
    from dbrx_q.eval.windows import Protocol
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

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
    chosen = measuring.dtype_of(dtype, place)
    key = run_key("sensitivity", {}, source, checkpoint, ids, how, dtype=chosen, kv_format="plain", device=place)
    state = RunState(key | {"by": by.value, "formats": [asdict(fmt) for fmt in wanted]})
    if not resume:
        state.clear()
    try:
        budgets.give(source, ram, gpu, context=how.context)
        model = source.load(dtype=chosen, device=place)
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
                state=state,
                on_run=on_run,
            )
    except Exception:  # whatever it is, it is explained after this
        if state.path.exists():
            _say("what was measured is kept: the same command with --resume goes on")
        raise
    if json:
        output.print_json(found.to_dict())
    else:
        _print(found)
    for note in without_figures(found):
        _say(note)
    if out is not None:
        write_report(found, out)
        _say(str(out / "sensitivity.md"))
    total = len(measurable(units, wanted)[0])
    if not found.complete:
        how_on = "the same command with --resume goes on" if state.path.exists() else "they could not be kept for --resume"
        _say(f"dbrx-q: error: interrupted after {len(found.units)} of {total} parts; the figures are of these alone, and {how_on}")
        raise typer.Exit(2)
    state.clear()
    if found.failed:
        _say(f"dbrx-q: error: {len(found.failed)} of {total} parts could not be measured; the figures are of all others")
        raise typer.Exit(2)


def _say(message: str) -> None:
    output.stderr().print(message, markup=False, soft_wrap=True)


def _print(found: Sensitivity) -> None:
    from dbrx_q.eval.sensitivity.report import table

    rows = table(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    part = "" if found.complete else "partial: "
    tokens = f"{found.windows} windows of {found.context} tokens, {found.tokens:,} predicted"
    print(f"\n{part}{tokens}; perplexity as it is {found.perplexity:.4f}", flush=True)
