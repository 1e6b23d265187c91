"""A comparison as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .comparison import Comparison, QuantResult

__all__ = ["cut", "front", "headline", "layers", "markdown", "short_names", "table"]


def headline(found: Comparison) -> list[str]:
    """What it says, in sentences."""
    if found.complete:
        tokens = f"{found.tokens:,} tokens predicted"
    else:
        tokens = f"interrupted: these are the figures of the first {found.tokens:,} of {found.total_tokens:,} tokens"
    sentences = [
        f"{len(found.results)} checkpoint{'s' if len(found.results) > 1 else ''} beside {found.reference} ({found.reference_format}, "
        f"{found.reference_bits_per_weight:.2f} bits per weight, perplexity {found.reference_perplexity:.4f} +- "
        f"{found.reference_perplexity_stderr:.4f}) on {found.text}: {tokens}, {cut(found)}."
    ]
    if found.approximation:
        sentences.append(f"Note: {found.approximation}.")
    closest = min(found.results, key=lambda row: row.mean_kl)
    sentences.append(
        f"{closest.path} is the closest: mean KL divergence {closest.mean_kl:.5f} at {closest.bits_per_weight:.2f} bits per weight, "
        f"the same likeliest token for {closest.top1_agreement:.2%}."
    )
    better = [row.path for row in found.results if front(row, found.results)]
    if len(found.results) > 1:
        sentences.append(f"No other has both fewer bits and less divergence than: {', '.join(better)}.")
    return sentences


def front(row: QuantResult, results: list[QuantResult]) -> bool:
    """Whether no other result has at most as many bits and less divergence, or fewer bits and at most as much."""
    return not any(
        (other.bits_per_weight <= row.bits_per_weight and other.mean_kl < row.mean_kl)
        or (other.bits_per_weight < row.bits_per_weight and other.mean_kl <= row.mean_kl)
        for other in results
    )


def cut(found: Comparison) -> str:
    """How the text was cut."""
    stride = f", stride {found.stride}" if found.protocol == "strided" else ""
    return f"{found.protocol} windows, context {found.context}{stride}"


def table(found: Comparison) -> str:
    """The figures of all checkpoints, a row each, the reference's first."""
    columns = ["checkpoint", "format", "bits per weight", "perplexity", "change of ln PPL", "mean KL", "median", "99 %", "99.9 %", "max"]
    columns += ["top token", "top five", "RMS of dp"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * 11]
    lines.append(
        f"| {_safe(found.reference)} | {_safe(found.reference_format)} | {found.reference_bits_per_weight:.2f} | "
        f"{found.reference_perplexity:.4f} ± {found.reference_perplexity_stderr:.4f} |" + " |" * 9
    )
    for row in found.results:
        kls = (row.mean_kl, row.median_kl, row.p99_kl, row.p999_kl, row.max_kl)
        lines.append(
            f"| {_safe(row.path)} | {_safe(row.format)} | {row.bits_per_weight:.2f} | {row.perplexity:.4f} ± {row.perplexity_stderr:.4f} | "
            f"{row.delta_ln_ppl:+.5f} ± {row.delta_ln_ppl_stderr:.5f} | "
            + " | ".join(f"{kl:.4g}" for kl in kls)
            + f" | {row.top1_agreement:.2%} | {row.top5_agreement:.2%} | {row.rms_dp:.2%} |"
        )
    return "\n".join(lines)


def layers(found: Comparison) -> str:
    """Agreement of the routers and error of the hidden states, a row per checkpoint and a column per layer."""
    count = len(found.results[0].hidden_error)
    lines = ["| checkpoint | |" + "".join(f" {layer} |" for layer in range(count)), "|---|---|" + "---:|" * count]
    for row in found.results:
        lines.append(f"| {_safe(row.path)} | same experts |" + "".join(f" {share:.2%} |" for share in row.router_agreement))
        lines.append("| | error of hidden states |" + "".join(f" {error:.4f} |" for error in row.hidden_error))
    return "\n".join(lines)


def markdown(found: Comparison) -> str:
    """The whole document; its plot is divergence.png beside it."""
    known = found.provenance
    where = ", ".join(str(known.get(name, "")) for name in ("device", "system")) + f", {known.get('threads', '')} threads"
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    hashes = [f"- {row.path}: SHA-256 {row.sha256}" for row in found.results]
    parts = [
        "# Divergence from a reference",
        " ".join(headline(found)),
        table(found),
        "KL(reference || checkpoint) per predicted token, in nats; change of ln PPL paired, with its standard error; top token, top five: "
        "agreement with the reference; RMS of dp: root mean square of the difference of the probability of the token that came.",
        "![mean KL divergence over bits per weight](divergence.png)",
        "## By layer",
        layers(found),
        "## To repeat it",
        "\n".join(
            [
                f"- command: `{known.get('command', '')}`",
                f"- device: {where}",
                f"- versions: {versions}",
                f"- reference: SHA-256 {known.get('reference_sha256', '')}",
                f"- text: SHA-256 {known.get('text_sha256', '')}",
                *hashes,
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _safe(text: str) -> str:
    """Text that stays in its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path where these differ, else the whole."""
    last = [Path(path).name or path for path in paths]
    return [name if last.count(name) == 1 else path for name, path in zip(last, paths, strict=True)]
