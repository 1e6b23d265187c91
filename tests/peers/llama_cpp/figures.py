"""The figures of a run, and the Markdown that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["BUSY", "SectionResult", "Spread", "markdown", "spread_of"]

BUSY = 0.1
"""Share of all processors' time above which the work of other programs makes a comparison useless."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one figure."""

    median: float
    """Of the samples."""
    low: float
    """The least."""
    high: float
    """The greatest."""

    def __str__(self) -> str:
        return f"{_short(self.median)} [{_short(self.low)}-{_short(self.high)}]"


def spread_of(samples: Sequence[float]) -> Spread:
    """Median and range of at least one sample."""
    return Spread(statistics.median(samples), min(samples), max(samples))


@dataclass
class SectionResult:
    """The turns of one section."""

    name: str
    """Key of `SECTIONS`."""
    title: str
    """Of the table."""
    note: str
    """What the two sides do."""
    unit: str
    """Of the figures."""
    higher_is_better: bool
    """Whether the figures are speeds."""
    cases: Sequence[str]
    """Columns."""
    kinds: dict[str, str] = field(default_factory=dict)
    """`Competitor.kind` by competitor."""
    beside: dict[str, str] = field(default_factory=dict)
    """`Competitor.beside` by competitor, where it is given."""
    figures: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """By competitor, case and turn."""
    rates: list[dict[str, float]] = field(default_factory=list)
    """Of the machine, measured by every process of dbrx_q."""
    other_work: list[float] = field(default_factory=list)
    """Share of all processors' time that other programs took, by turn."""

    def spread(self, competitor: str, case: str) -> Spread:
        """Median and range over the turns."""
        return spread_of(list(self.figures[competitor][case].values()))

    def best_peer(self, case: str) -> str | None:
        """The configuration of llama.cpp with the best median; None if there is none."""
        best = max if self.higher_is_better else min
        peers = (name for name, kind in self.kinds.items() if kind == "llama.cpp")
        return best(peers, key=lambda name: self.spread(name, case).median, default=None)

    def ratio(self, competitor: str, other: str, case: str) -> Spread:
        """How many times as fast a competitor is as another, from the turns that both ran."""
        mine, theirs = self.figures[competitor][case], self.figures[other][case]
        turns = mine.keys() & theirs.keys()
        return spread_of([mine[turn] / theirs[turn] if self.higher_is_better else theirs[turn] / mine[turn] for turn in turns])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def markdown(results: Sequence[SectionResult], facts: dict[str, Any]) -> str:
    """The document of a run."""
    lines = ["# dbrx_q beside llama.cpp", "", *(_fact(name, value) for name, value in facts.items()), ""]
    lines += [
        "Figures are medians [minimum-maximum] of turns, in which all programs run one after the other. A ratio is the median of the "
        "ratios of single turns; above 1 dbrx_q is faster.",
        "",
    ]
    for result in results:
        lines += [*_table(result), ""]
    return "\n".join(lines)


def _table(result: SectionResult) -> list[str]:
    lines = [f"## {result.title}", "", *([result.note, ""] if result.note else [])]
    lines += [f"| {result.unit} | " + " | ".join(result.cases) + " | turns |", "|---" * (len(result.cases) + 2) + "|"]
    for name, cases in result.figures.items():
        cells = [str(result.spread(name, case)) for case in result.cases]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(cases[result.cases[0]])} |")
    for name, kind in result.kinds.items():
        if kind == "dbrx_q" and "llama.cpp" in result.kinds.values():
            cells = [_ratio_cell(result, name, case) for case in result.cases]
            lines.append(f"| **{name} to the best of llama.cpp** | " + " | ".join(cells) + " | |")
    for name, other in result.beside.items():
        cells = [str(result.ratio(name, other, case)) for case in result.cases]
        lines.append(f"| {name} to {other} | " + " | ".join(cells) + " | |")
    machine = []
    if result.rates:
        rates = {name: spread_of([rates[name] for rates in result.rates]) for name in result.rates[0]}
        machine += [f"{name} {spread}" for name, spread in rates.items()]
    if result.other_work:
        worst = max(result.other_work)
        machine.append(
            f"time of all processors that other programs took {worst:.0%} at most" + ", **too much to compare**" * (worst > BUSY)
        )
    if machine:
        lines += ["", "The machine during these turns: " + "; ".join(machine) + "."]
    return lines


def _ratio_cell(result: SectionResult, name: str, case: str) -> str:
    best = result.best_peer(case)
    assert best is not None
    return f"**{result.ratio(name, best, case)}** ({best})"


def _fact(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"- {name}: " + ", ".join(f"{key} {item}" for key, item in value.items())
    return f"- {name}: {value:.3f}" if isinstance(value, float) else f"- {name}: {value}"


def _short(value: float) -> str:
    """Three significant digits, and all those of a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
