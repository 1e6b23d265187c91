"""`dbrx-q compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dbrx_q.planning.sizes import format_size

from . import measurement, memory_budget, options, terminal
from .choices import KV_FORMATS
from .help import example
from .options import MODEL, OUTPUT, argument, option

if TYPE_CHECKING:
    from dbrx_q.eval.compare.result import Comparison

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q compare databricks/dbrx-instruct dbrx-int4 dbrx.Q4_K_M.gguf --text wiki.test.txt --context 512 --out report")


def command(
    reference: Annotated[str, argument("REF", "Checkpoint to measure against, or a file that `dbrx-q reference` wrote.")],
    quants: Annotated[list[str], argument("QUANT...", "Checkpoints: folders, hub ids or GGUF files.")],
    text: options.Text,
    context: options.Window = None,
    protocol: options.Protocol = None,
    stride: options.Stride = None,
    limit: options.Limit = None,
    device: options.Device = "cpu",
    dtype: options.MeasuredDtype = None,
    kv: Annotated[
        str, option(MODEL, "Format of every QUANT's KV cache: {}; REF's is plain.", metavar="FORMAT", one_of=KV_FORMATS)
    ] = "plain",
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    mmap: options.Mmap = True,
    fallback: options.Fallback = False,
    out: options.OutFolder = None,
    document: Annotated[Path | None, option(OUTPUT, "Markdown document in which to replace a table.", metavar="FILE")] = None,
    section: Annotated[str | None, option(OUTPUT, "Marker lines of that table.", metavar="NAME", default="divergence")] = None,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Measure how far checkpoints are from a reference: KL divergence, perplexity, agreement of tokens and experts.

    --kv and --fallback apply to every QUANT and not to REF. --ram and --gpu limit the whole command: one QUANT is in memory at a time, with
    half of the limits beside REF, and with all of them if REF is a file.
    """
    from dbrx_q.eval.compare.reference_file import ReferenceFile
    from dbrx_q.eval.compare.report import FILES, KEYS
    from dbrx_q.eval.compare.report_markdown import layers, table
    from dbrx_q.eval.compare.run import compare_checkpoints, open_reference
    from dbrx_q.eval.document import replace_section
    from dbrx_q.eval.provenance import command_line
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.texts import load_text
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

    if out is not None:
        check_report_folder(out, FILES, KEYS)
    _check_document(document, section)
    torch_device = check_device(device)
    loaded_text = load_text(text)
    measured_against = open_reference(reference)
    sources = [open_source(quant, fallback=fallback) for quant in quants]
    if isinstance(measured_against, ReferenceFile) and (protocol, context, stride, limit) == (None, None, None, None):
        windowing = measured_against.protocol
    else:
        windowing = measurement.protocol_of(protocol, context, stride, limit, measured_against.config)
    # With a budget, `compare_checkpoints` loads one QUANT at a time, beside REF if that is a checkpoint.
    shares = 1 if isinstance(measured_against, ReferenceFile) else 2
    for source in sources:
        memory_budget.give_budget(source, ram, gpu, context=windowing.context, kv_format=kv, fallback=fallback, shares=shares)
        source.use_mmap = mmap
    if not isinstance(measured_against, ReferenceFile):
        measured_against.use_mmap = mmap
        memory_budget.give_budget(measured_against, ram, gpu, context=windowing.context, shares=shares)
    states: list[RunState] = []
    with terminal.progress("windows") as on_window:
        comparison = compare_checkpoints(
            measured_against,
            sources,
            loaded_text,
            windowing,
            dtype=measurement.dtype_of(dtype, torch_device),
            device=torch_device,
            kv_format=kv,
            resume=resume,
            command=command_line(),
            states=states,
            on_window=on_window,
        )
    _report(comparison, out, json=json)
    if not comparison.complete:
        raise measurement.interrupted(comparison.tokens, comparison.total_tokens, kept=any(state.path.exists() for state in states))
    if document is not None:
        replace_section(document, *_markers(section or "divergence"), f"{table(comparison)}\n\n{layers(comparison)}")
    for state in states:
        state.clear()


def _check_document(document: Path | None, section: str | None) -> None:
    """Refuse a section without a document, and a document in which it could not be replaced."""
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.document import check_section

    if section is not None and document is None:
        raise RequestError(f"a section is one of a document; found --section {section} alone. Give --document, or leave it out")
    if document is not None:
        check_section(document, *_markers(section or "divergence"))


def _markers(section: str) -> tuple[str, str]:
    return f"<!-- begin: {section} -->", f"<!-- end: {section} -->"


def _report(comparison: Comparison, out: Path | None, *, json: bool) -> None:
    """Print the figures and write them to the folder."""
    from dbrx_q.eval.compare.report import write_report

    if json:
        terminal.print_json(comparison.to_dict())
    else:
        _print(comparison)
    if out is not None:
        write_report(comparison, out)
        terminal.say(str(out / "report.html"))


def _print(comparison: Comparison) -> None:
    tokens = (
        f"{comparison.tokens:,} tokens predicted"
        if comparison.complete
        else f"the first {comparison.tokens:,} of {comparison.total_tokens:,} tokens"
    )
    stride = f", stride {comparison.stride}" if comparison.protocol == "strided" else ""
    print(
        f"reference   {comparison.reference}  ({comparison.reference_format}, {comparison.reference_bits_per_weight:.2f} bits per weight)"
    )
    print(f"text        {comparison.text}  ({tokens}, {comparison.protocol}, context {comparison.context}{stride})")
    print(f"perplexity  {comparison.reference_perplexity:.4f} +- {comparison.reference_perplexity_stderr:.4f}")
    if comparison.approximation:
        print(f"note        {comparison.approximation}")
    for row in comparison.results:
        print(f"\n{row.path}  ({row.format}, {row.bits_per_weight:.3f} bits per weight, {format_size(row.bytes)})")
        for name, value in (
            ("perplexity", f"{row.perplexity:.4f} +- {row.perplexity_stderr:.4f}"),
            ("change of ln PPL", f"{row.delta_ln_ppl:.6f} +- {row.delta_ln_ppl_stderr:.6f}"),
            ("mean KL", f"{row.mean_kl:.6f} +- {row.mean_kl_stderr:.6f}"),
            ("median KL", f"{row.median_kl:.6f}"),
            ("90 / 99 / 99.9 % KL", f"{row.p90_kl:.6f} / {row.p99_kl:.6f} / {row.p999_kl:.6f}"),
            ("maximum KL", f"{row.max_kl:.6f}"),
            ("same top token", f"{row.top1_agreement:.3%}"),
            ("same top five", f"{row.top5_agreement:.3%}"),
            ("RMS of p - p_ref", f"{row.rms_dp:.3%}"),
            ("same experts, by layer", "  ".join(f"{share:.2%}" for share in row.router_agreement)),
            ("error of hidden states", "  ".join(f"{error:.4f}" for error in row.hidden_error)),
        ):
            print(f"  {name:24}{value}")
