"""`dbrx-q sensitivity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from . import measurement, memory_budget, options, terminal
from .choices import PARTS, WEIGHT_FORMATS
from .help import example
from .options import FORMATS, TEXT, argument, option

if TYPE_CHECKING:
    from pathlib import Path

    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.sensitivity.result import Sensitivity
    from dbrx_q.sources.base import Source

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q sensitivity databricks/dbrx-instruct --text wiki.test.txt --by layer --out sensitivity")
_PLAIN_BITS = 16


def command(
    path: Annotated[str, argument("PATH", "Plain checkpoint: a folder or a hub id.")],
    text: options.Text,
    context: Annotated[int | None, option(TEXT, "Tokens of a window.", metavar="N", default="512, at most the model's")] = None,
    windows: Annotated[int, option(TEXT, "Most windows to measure, from the start of the text.", metavar="N")] = 16,
    by: Annotated[str, option(FORMATS, "What is quantized at a time: a {}.", metavar="PART", one_of=PARTS)] = "tensor",
    formats: Annotated[
        list[str] | None,
        option(FORMATS, "Format to try: {}; may be given again.", "--format", metavar="FORMAT", one_of=WEIGHT_FORMATS, default="int4"),
    ] = None,
    group_size: options.GroupSize = None,
    device: options.Device = "cpu",
    dtype: options.MeasuredDtype = None,
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    out: options.OutFolder = None,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Quantize one part of a model at a time and measure how far its predictions move, which shows where bits matter most."""
    from dataclasses import asdict

    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.eval.provenance import command_line, provenance, run_key
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.sensitivity.measure import check_formats, measurable, sensitivity, units_of
    from dbrx_q.eval.sensitivity.report import FILES, KEYS
    from dbrx_q.eval.texts import load_text
    from dbrx_q.eval.windows import Protocol
    from dbrx_q.model.devices import check_device

    if out is not None:
        check_report_folder(out, FILES, KEYS)
    torch_device = check_device(device)
    loaded_text = load_text(text)
    source = _plain_source(path)
    windowing = Protocol.of(min(512, source.config.max_seq_len) if context is None else context, limit=windows)
    ids = source.tokenizer().encode(loaded_text.text, split_special_tokens=True)
    windowing.check(len(ids), source.config, source=text)
    units = units_of(source.config, by)
    tensor_formats = [TensorFormat.of(name, group_size) for name in dict.fromkeys(formats or ["int4"])]
    check_formats(source.config, units, tensor_formats)
    checkpoint = source.sha256()
    torch_dtype = measurement.dtype_of(dtype, torch_device)
    key = run_key("sensitivity", {}, source, checkpoint, ids, windowing, dtype=torch_dtype, kv_format="plain", device=torch_device)
    state = RunState(key | {"by": by, "formats": [asdict(fmt) for fmt in tensor_formats]})
    if not resume:
        state.clear()
    try:
        memory_budget.give_budget(source, ram, gpu, context=windowing.context)
        model = source.load(dtype=torch_dtype, device=torch_device)
        with terminal.progress("parts") as on_run:
            result = sensitivity(
                model,
                ids,
                windowing,
                units,
                tensor_formats,
                checkpoint=path,
                sha256=checkpoint,
                text=loaded_text,
                by=by,
                provenance=provenance(torch_device, command_line()),
                state=state,
                on_run=on_run,
            )
    except Exception:  # the caller prints any error
        if state.path.exists():
            terminal.say("what was measured is kept: the same command with --resume continues")
        raise
    _report(result, out, json=json)
    total = len(measurable(units, tensor_formats)[0])
    _check_complete(result, total, state)
    state.clear()
    if result.failed:
        raise terminal.failed(f"{len(result.failed)} of {total} parts could not be measured; the figures are of all others")


def _plain_source(path: str) -> Source:
    """Open a checkpoint, and refuse one that is quantized."""
    from dbrx_q.errors import RequestError
    from dbrx_q.sources.open import open_source

    source = open_source(path)
    if source.bits_per_weight < _PLAIN_BITS:
        raise RequestError(
            f"{path}: sensitivity must start from plain weights; found {source.format}, {source.bits_per_weight:.2f} bits per weight. "
            "Give the checkpoint that it was made from"
        )
    return source


def _check_complete(result: Sensitivity, total: int, state: RunState) -> None:
    """End the command with an error if the run was interrupted. `total` counts the parts of a complete run."""
    if not result.complete:
        resumable = "the same command with --resume continues" if state.path.exists() else "they could not be kept for --resume"
        raise terminal.failed(f"interrupted after {len(result.units)} of {total} parts; the figures are of these alone, and {resumable}")


def _report(result: Sensitivity, out: Path | None, *, json: bool) -> None:
    """Print the figures and write them to the folder."""
    from dbrx_q.eval.sensitivity.report import without_figures, write_report

    if json:
        terminal.print_json(result.to_dict())
    else:
        _print(result)
    for note in without_figures(result):
        terminal.say(note)
    if out is not None:
        write_report(result, out)
        terminal.say(str(out / "sensitivity.md"))


def _print(result: Sensitivity) -> None:
    from dbrx_q.eval.sensitivity.report import table

    rows = table(result)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    part = "" if result.complete else "partial: "
    tokens = f"{result.windows} windows of {result.context} tokens, {result.tokens:,} predicted"
    print(f"\n{part}{tokens}; perplexity as it is {result.perplexity:.4f}", flush=True)
