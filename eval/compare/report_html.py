"""Writes a comparison as one HTML page that loads no other file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.plots import inline_svg

from .report_markdown import cut, headline
from .report_text import four_digits, printable, short_names, visible
from .result import Comparison, QuantResult, WorstToken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["html"]

_TEMPLATE = Path(__file__).with_name("report_template.html")


def html(comparison: Comparison, divergence: Figure, layers: Figure) -> str:
    """The page, with the plots `divergence` and `layers` inlined."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"printable": printable, "size": _size}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    provenance = comparison.provenance
    names = short_names([row.path for row in comparison.results])
    return template.render(
        comparison=comparison,
        sentences=headline(comparison),
        cut=cut(comparison),
        columns=_columns(comparison.results),
        divergence=inline_svg(divergence, "divergence-plot", "Mean KL divergence of each checkpoint over its bits per weight"),
        layers=inline_svg(layers, "layers-plot", "Error of the hidden states after every block, a line per checkpoint"),
        names=names,
        heat=[_heat(row, name) for row, name in zip(comparison.results, names, strict=True)],
        layer_count=len(comparison.results[0].router_agreement),
        tokens=[(printable(row.path), [_token(token) for token in row.worst_tokens]) for row in comparison.results],
        versions=provenance.get("versions", {}),
        provenance=provenance,
    )


def _columns(results: list[QuantResult]) -> list[dict[str, Any]]:
    """Columns of the table: a title, a hint, a cell per checkpoint, and which cells are the best of the column."""

    def column(title: str, hint: str, cells: list[str], values: list[float] | None = None, *, high: bool = False) -> dict[str, Any]:
        finite = [value for value in values or [] if math.isfinite(value)]
        best = (max if high else min)(finite) if len(finite) > 1 else None
        return {"title": title, "hint": hint, "cells": cells, "best": [value == best for value in values or [math.nan] * len(cells)]}

    def kl(title: str, name: str) -> dict[str, Any]:
        values = [getattr(row, name) for row in results]
        return column(title, f"{title}, nats", [four_digits(value) for value in values], values)

    def share(title: str, hint: str, name: str, *, high: bool) -> dict[str, Any]:
        values = [getattr(row, name) for row in results]
        return column(title, hint, [f"{value:.2%}" for value in values], values, high=high)

    return [
        column("format", "of the weights", [row.format for row in results]),
        column(
            "bits per weight",
            "stored bits over parameters, scales included",
            [f"{row.bits_per_weight:.3f}" for row in results],
            [row.bits_per_weight for row in results],
        ),
        column(
            "mean KL",
            "nats, with its standard error",
            [f"{four_digits(row.mean_kl)} ± {row.mean_kl_stderr:.1g}" for row in results],
            [row.mean_kl for row in results],
        ),
        column(
            "perplexity",
            "with its standard error",
            [f"{row.perplexity:.4f} ± {row.perplexity_stderr:.4f}" for row in results],
        ),
        column(
            "change of ln PPL",
            "paired, with its standard error",
            [f"{row.delta_ln_ppl:+.5f} ± {row.delta_ln_ppl_stderr:.5f}" for row in results],
            [abs(row.delta_ln_ppl) for row in results],  # a change below zero is as large a difference as one above
        ),
        kl("median KL", "median_kl"),
        kl("90 % KL", "p90_kl"),
        kl("99 % KL", "p99_kl"),
        kl("99.9 % KL", "p999_kl"),
        kl("maximum KL", "max_kl"),
        share("same top token", "share of tokens", "top1_agreement", high=True),
        share("same top five", "mean share of the reference's five", "top5_agreement", high=True),
        share("RMS of Δp", "of the probability of the actual token", "rms_dp", high=False),
        column("size", "of all tensors", [_size(row.bytes) for row in results], [float(row.bytes) for row in results]),
    ]


def _heat(row: QuantResult, name: str) -> dict[str, Any]:
    """Cells of the heat map: the strength of the colour, from 0 for full agreement to 1 for 70 % and less, and the text."""
    cells = [
        {"strength": round(min(1.0, (1 - share) / 0.3), 3), "share": f"{share:.1%}", "jaccard": f"{jaccard:.3f}"}
        for share, jaccard in zip(row.router_agreement, row.router_jaccard, strict=True)
    ]
    return {"path": printable(row.path), "name": name, "cells": cells}


def _token(token: WorstToken) -> dict[str, Any]:
    return {
        "position": f"{token.position:,}",
        "before": visible(token.before),
        "token": visible(token.token),
        "kl": four_digits(token.kl),
        "reference_top": visible(token.reference_top),
        "quant_top": visible(token.quant_top),
        "reference_probability": f"{token.reference_probability:.2%}",
        "quant_probability": f"{token.quant_probability:.2%}",
    }


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
