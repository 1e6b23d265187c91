"""`dbrx-q compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dbrx_q.planning.sizes import format_size

from . import budgets, measuring, output
from .budgets import GpuSizes, Ram
from .generate import DEVICE_HELP, Dtype, KvFormat
from .measuring import ProtocolName

if TYPE_CHECKING:
    from dbrx_q.eval.compare.result import Comparison

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example(
    "dbrx-q compare databricks/dbrx-instruct dbrx-int4 dbrx.Q4_K_M.gguf --text wiki.test.txt --context 512 --out report",
)


def command(
    reference: Annotated[
        str,
        typer.Argument(metavar="REF", help="What is measured against: a checkpoint, or a file of `dbrx-q reference`.", show_default=False),
    ],
    quants: Annotated[list[str], typer.Argument(metavar="QUANT...", help=measuring.CHECKPOINT_HELP, show_default=False)],
    text: Annotated[str, typer.Option(metavar="FILE", help=measuring.TEXT_HELP, show_default=False)],
    context: Annotated[int | None, typer.Option(help=measuring.CONTEXT_HELP, show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(help=measuring.STRIDE_HELP, show_default=False)] = None,
    protocol: Annotated[ProtocolName | None, typer.Option(help=measuring.PROTOCOL_HELP, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(metavar="WINDOWS", help=measuring.LIMIT_HELP, show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the report: Markdown, JSON, plot and HTML.", show_default=False)
    ] = None,
    document: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown document whose table is replaced.", show_default=False)
    ] = None,
    section: Annotated[
        str | None,
        typer.Option(help="Which table of --document: between its marker lines of this name; divergence unless given.", show_default=False),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help=measuring.DTYPE_HELP, show_default=False)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ram: Ram = None,
    gpu: GpuSizes = None,
    fallback: Annotated[bool, typer.Option("--fallback", help=f"{budgets.FALLBACK_HELP} Of every QUANT, not of REF.")] = False,
    kv: Annotated[KvFormat, typer.Option(help="Format of the KV cache of every QUANT; REF's is plain.")] = KvFormat.plain,
    resume: Annotated[bool, typer.Option("--resume", help=measuring.RESUME_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Measure how far checkpoints are from a reference on the same tokens: KL divergence, perplexity, agreement of tokens and experts."""

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.compare.reference_file import ReferenceFile
    from dbrx_q.eval.compare.report import FILES, KEYS, write_report
    from dbrx_q.eval.compare.report_markdown import layers, table
    from dbrx_q.eval.compare.run import compare_checkpoints, open_reference
    from dbrx_q.eval.document import check_section, replace_section
    from dbrx_q.eval.provenance import command_line
    from dbrx_q.eval.report_folder import check_report_folder
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.texts import load_text
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

    if out is not None:
        check_report_folder(out, FILES, KEYS)
    if section is not None and document is None:
        raise RequestError(f"a section is one of a document; found --section {section} alone. Give --document, or leave it out")
    if document is not None:
        check_section(document, *_markers(section or "divergence"))
    place = check_device(device)
    words = load_text(text)
    against = open_reference(reference)
    sources = [open_source(quant, fallback=fallback) for quant in quants]
    if isinstance(against, ReferenceFile) and (protocol, context, stride, limit) == (None, None, None, None):
        how = against.protocol
    else:
        how = measuring.protocol_of(protocol, context, stride, limit, against.config)
    for source in sources:
        budgets.give(source, ram, gpu, context=how.context, kv_format=kv.value, fallback=fallback)
    if not isinstance(against, ReferenceFile):
        budgets.give(against, ram, gpu, context=how.context)
    kept: list[RunState] = []
    with output.progress("windows") as on_window:
        found = compare_checkpoints(
            against,
            sources,
            words,
            how,
            dtype=measuring.dtype_of(dtype, place),
            device=place,
            kv_format=kv.value,
            resume=resume,
            command=command_line(),
            kept=kept,
            on_window=on_window,
        )
    if json:
        output.print_json(found.to_dict())
    else:
        _print(found)
    if out is not None:
        write_report(found, out)
        output.stderr().print(str(out / "report.html"), markup=False, soft_wrap=True)
    if not found.complete:
        raise measuring.interrupted(found.tokens, found.total_tokens, kept=any(state.path.exists() for state in kept))
    if document is not None:
        replace_section(document, *_markers(section or "divergence"), f"{table(found)}\n\n{layers(found)}")
    for state in kept:
        state.clear()


def _markers(section: str) -> tuple[str, str]:
    return f"<!-- begin: {section} -->", f"<!-- end: {section} -->"


def _print(found: Comparison) -> None:
    tokens = f"{found.tokens:,} tokens predicted" if found.complete else f"the first {found.tokens:,} of {found.total_tokens:,} tokens"
    stride = f", stride {found.stride}" if found.protocol == "strided" else ""
    print(f"reference   {found.reference}  ({found.reference_format}, {found.reference_bits_per_weight:.2f} bits per weight)")
    print(f"text        {found.text}  ({tokens}, {found.protocol}, context {found.context}{stride})")
    print(f"perplexity  {found.reference_perplexity:.4f} +- {found.reference_perplexity_stderr:.4f}")
    if found.approximation:
        print(f"note        {found.approximation}")
    for row in found.results:
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
