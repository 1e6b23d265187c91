"""The look that all plots of this project share, and how they become PNG and SVG; `plot_labels.py` writes names into them.

Each of the first twelve series has a colour and a marker of its own, and neighbours differ in their dashes too, so that no plot depends on
colour alone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "Style",
    "check_plot_extra",
    "figure",
    "inline_svg",
    "log_axis",
    "panels",
    "quiet",
    "render",
    "style",
]

INK, MUTED, GRID = "#1f2329", "#5a626d", "#d9dde3"
# Each has a contrast of at least 4.5 with white. The first six are told apart by colour-blind readers as well.
_COLOURS = (
    *("#0067a5", "#c04a00", "#00785a", "#a3428a", "#86640a", "#4c5360"),
    *("#c8102e", "#6a3fc9", "#007a8a", "#7a4a2b", "#4d7a00", "#1f2f86"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "d", "p")
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_FONTS = ["DejaVu Sans", "sans-serif"]
_SETTINGS: Any = {
    "font.family": _FONTS,
    "svg.hashsalt": "dbrx_q",  # otherwise every file has other ids
    "axes.unicode_minus": False,
}


@dataclass(frozen=True)
class Style:
    """How one series is drawn."""

    colour: str
    """Such as "#0067a5"."""
    marker: str
    """A name of matplotlib's."""
    dash: str | tuple[int, tuple[float, ...]]
    """A line style of matplotlib's."""


def style(number: int) -> Style:
    """The look of series 0, 1, 2 ...: no two of the first 12 share a colour or a marker, no two of the first 144 share both."""
    turn, place = divmod(number, len(_COLOURS))
    return Style(_COLOURS[place], _MARKERS[(place + turn) % len(_MARKERS)], _DASHES[number % len(_DASHES)])


def check_plot_extra(what: str = "a plot") -> None:
    """Refuse a plot before the work that it would show, if it cannot be drawn.

    Args:
        what: the subject of the error's sentence.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - only whether it is installed matters
    except ImportError:
        raise UnsupportedError(f"{what} needs matplotlib, which is not installed: pip install 'dbrx_q[eval]'") from None


def figure(width: float = 8.0, height: float = 4.6) -> tuple[Figure, Axes]:
    """An empty plot of width x height inches, with the grid behind the data and no frame at the top and right; pyplot is not used.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    drawing, [axes] = panels(1, width, height)
    return drawing, axes


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` plots like that of `figure` side by side, width x height inches together; errors as for `figure`."""
    check_plot_extra()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        drawing = Figure(figsize=(width, height), layout="constrained")
        plots = [drawing.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in plots:
        _dress(axes)
    return drawing, plots


def _dress(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)


def log_axis(axes: Axes, values: Sequence[float]) -> float:
    """Make the y axis logarithmic over `values`, of which some or all may be 0; the height at which to draw a 0.

    That height is below every other value, marked "0" and separated by a dotted line. Values that are not finite are left out.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for value in values if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1e-6, 1e-5)
    axes.set_yscale("log", nonpositive="clip")
    bottom, top = low / 1.7, high * 1.7
    if top / bottom < 10:  # at least a decade, so that the axis has a labelled tick
        middle = (bottom * top) ** 0.5
        bottom, top = middle / 10**0.5, middle * 10**0.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 300 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if len(positive) == len(values):
        axes.set_ylim(bottom, top)
        return bottom
    edge, floor = bottom, bottom / (top / bottom) ** 0.08
    axes.set_ylim(floor / (top / bottom) ** 0.06, top)
    axes.axhline(edge, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.annotate(
        "0", (0, floor), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", color=INK
    )
    for axis_ticks in ("major", "minor"):  # ticks below the edge would read as values
        ticks = [tick for tick in axes.get_yticks(minor=axis_ticks == "minor") if edge <= tick <= top]
        if axis_ticks == "major":
            axes.set_yticks(ticks)
        else:
            axes.set_yticks(ticks, minor=True, labels=[""] * len(ticks))
    return floor


def render(drawing: Figure, kind: str) -> bytes:
    """The bytes of a "png" (200 dots per inch) or an "svg" file with a white background. The same drawing gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(_SETTINGS | {"svg.fonttype": "path"}), quiet():
        drawing.savefig(file, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return file.getvalue()


def inline_svg(drawing: Figure, prefix: str, description: str) -> str:
    """An `<svg>` element for a page: as wide as its container, in the page's colours, without references to other files.

    The colours of `style`, INK, MUTED and GRID become `var(--series-0)` ... `var(--series-11)`, `currentColor`, `var(--muted)` and
    `var(--line)`, so that the page sets them for its light and its dark scheme.

    Args:
        prefix: put before every id, as ids are unique in a page.
        description: what a screen reader reads instead.
    """
    from html import escape

    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_SETTINGS | {"svg.fonttype": "none"}), quiet():
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # The page has its own fonts, and a rule for "*" would apply to all of it.
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*|font-family: [^;\"]*; ", "", file.getvalue(), flags=re.DOTALL)
    opening = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', text)
    assert opening
    body = text[opening.end() :]
    body = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", body)
    names = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)"}
    names |= {colour: f"var(--series-{number})" for number, colour in enumerate(_COLOURS)}
    for colour, name in names.items():
        body = body.replace(colour, name)
    return f'<svg viewBox="{opening[1]}" role="img" aria-label="{escape(description)}">{body}'


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warning for each character that the font lacks; it is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield
