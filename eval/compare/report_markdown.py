"""Writes a comparison as a Markdown document."""

from __future__ import annotations

import math
import re

from .report_text import four_digits, printable, short_names
from .result import Comparison, QuantResult

__all__ = ["cut", "front", "headline", "layers", "markdown", "table"]


def headline(comparison: Comparison) -> list[str]:
    """The main results, in sentences."""
    if comparison.complete:
        tokens = f"{comparison.tokens:,} tokens predicted"
    else:
        tokens = f"interrupted: figures of the first {comparison.tokens:,} of {comparison.total_tokens:,} tokens"
    checkpoints = f"{len(comparison.results)} checkpoint{'s' if len(comparison.results) > 1 else ''}"
    sentences = [
        f"{checkpoints} compared with {printable(comparison.reference)} ({comparison.reference_format}, "
        f"{comparison.reference_bits_per_weight:.2f} bits per weight, "
        f"perplexity {comparison.reference_perplexity:.4f} ± {comparison.reference_perplexity_stderr:.4f}) on "
        f"{printable(comparison.text)}: {tokens}, "
        f"{cut(comparison)}."
    ]
    if comparison.approximation:
        sentences.append(f"Note: {comparison.approximation}.")
    names = short_names([row.path for row in comparison.results])
    finite = [(row, name) for row, name in zip(comparison.results, names, strict=True) if math.isfinite(row.mean_kl)]
    if finite:
        closest, name = min(finite, key=lambda item: item[0].mean_kl)
        sentences.append(
            f"{name} {'is the closest, with' if len(names) > 1 else 'has'} a mean KL divergence of {four_digits(closest.mean_kl)} at "
            f"{closest.bits_per_weight:.2f} bits per weight, and the same likeliest token for {closest.top1_agreement:.2%}."
        )
    better = [name for row, name in zip(comparison.results, names, strict=True) if front(row, comparison.results)]
    if len(names) > 1 and better:
        sentences.append(f"Least divergence for their bits per weight, as no other is both smaller and closer: {', '.join(better)}.")
    return sentences


def front(row: QuantResult, results: list[QuantResult]) -> bool:
    """Whether no other result has at most as many bits and less divergence, or fewer bits and at most as much."""
    return math.isfinite(row.mean_kl) and not any(
        (other.bits_per_weight <= row.bits_per_weight and other.mean_kl < row.mean_kl)
        or (other.bits_per_weight < row.bits_per_weight and other.mean_kl <= row.mean_kl)
        for other in results
    )


def cut(comparison: Comparison) -> str:
    """How the text was cut into windows, in words."""
    stride = f", stride {comparison.stride}" if comparison.protocol == "strided" else ""
    return f"{comparison.protocol} windows, context {comparison.context}{stride}"


def table(comparison: Comparison) -> str:
    """The figures of all checkpoints, one row each, the reference in the first row."""
    columns = ["checkpoint", "format", "bits per weight", "perplexity", "change of ln PPL", "mean KL", "median", "90 %", "99 %", "99.9 %"]
    columns += ["max", "top token", "top five", "RMS of dp"]
    timed = any(row.quantize_seconds is not None for row in comparison.results)
    columns += ["quantized in"] if timed else []
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    lines.append(
        f"| {_safe(short_names([comparison.reference])[0])} | {_safe(comparison.reference_format)} | "
        f"{comparison.reference_bits_per_weight:.2f} | "
        f"{comparison.reference_perplexity:.4f} ± {comparison.reference_perplexity_stderr:.4f} |" + " |" * (len(columns) - 4)
    )
    for row, name in zip(comparison.results, short_names([row.path for row in comparison.results]), strict=True):
        kls = (row.mean_kl, row.median_kl, row.p90_kl, row.p99_kl, row.p999_kl, row.max_kl)
        lines.append(
            f"| {_safe(name)}{_part(comparison, row)} | {_safe(row.format)} | {row.bits_per_weight:.2f} | "
            f"{row.perplexity:.4f} ± {row.perplexity_stderr:.4f} | "
            f"{row.delta_ln_ppl:+.5f} ± {row.delta_ln_ppl_stderr:.5f} | "
            + " | ".join(four_digits(kl) for kl in kls)
            + f" | {row.top1_agreement:.2%} | {row.top5_agreement:.2%} | {row.rms_dp:.2%} |"
            + ("" if not timed else " |" if row.quantize_seconds is None else f" {row.quantize_seconds:.1f} s |")
        )
    return "\n".join(lines)


def layers(comparison: Comparison) -> str:
    """Agreement of the routers and error of the hidden states, two rows per checkpoint and a column per layer."""
    count = len(comparison.results[0].hidden_error)
    lines = ["| checkpoint | |" + "".join(f" {layer} |" for layer in range(count)), "|---|---|" + "---:|" * count]
    for row, name in zip(comparison.results, short_names([row.path for row in comparison.results]), strict=True):
        lines.append(f"| {_safe(name)} | same experts |" + "".join(f" {share:.2%} |" for share in row.router_agreement))
        lines.append("| | error of hidden states |" + "".join(f" {error:.4f} |" for error in row.hidden_error))
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """The whole document; it shows divergence.png, which must be in the same folder."""
    record = comparison.provenance
    device = ", ".join(str(record.get(name, "")) for name in ("device", "system")) + f", {record.get('threads', '')} threads"
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    hashes = [f"- {_safe(row.path)}: SHA-256 {row.sha256}" for row in comparison.results]
    command = str(record.get("command", ""))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    parts = [
        "# Divergence from a reference",
        *([] if comparison.complete else ["**The run was interrupted: these figures are partial.**"]),
        _safe(" ".join(headline(comparison))),
        table(comparison),
        "KL(reference || checkpoint) per predicted token, in nats; change of ln PPL paired, with its standard error; top token, top five: "
        "agreement with the reference; RMS of dp: root mean square of the difference in the probability of the actual token.",
        "![mean KL divergence over bits per weight](divergence.png)",
        "## By layer",
        layers(comparison),
        "## How to repeat it",
        f"{fence}sh\n{command}\n{fence}",
        "\n".join(
            [
                f"- device: {device}",
                f"- versions: {versions}",
                f"- reference: SHA-256 {record.get('reference_sha256', '')}",
                f"- text: SHA-256 {record.get('text_sha256', '')}",
                *hashes,
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _part(comparison: Comparison, row: QuantResult) -> str:
    return "" if row.tokens == comparison.total_tokens else f" (first {row.tokens:,} tokens)"


def _safe(text: str) -> str:
    """Text escaped so that Markdown and HTML show it unchanged, within one table cell."""
    return re.sub(r"([\\|`*$\[\]~])", r"\\\1", printable(text)).replace("&", "&amp;").replace("<", "&lt;")
