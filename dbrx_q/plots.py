"""What every plot of this project shares: one look, colours that colour-blind people tell apart, PNG and SVG.

Series differ by colour, marker and dash, so that no plot depends on colour alone.
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
    "label_points",
    "log_axis",
    "panels",
    "render",
    "style",
]

INK, MUTED, GRID = "#1f2329", "#5a626d", "#d9dde3"
# Each has a contrast of at least 4.5 with white.
_COLOURS = ("#0067a5", "#c04a00", "#00785a", "#a3428a", "#86640a", "#4c5360")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "*")
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
_FONTS = ["DejaVu Sans", "sans-serif"]
_SETTINGS: Any = {
    "font.family": _FONTS,
    "svg.hashsalt": "dbrx_q",  # otherwise every file has other ids
    "axes.unicode_minus": False,
}
_TEXT_GAP = 7.0  # points between a marker and its label


@dataclass(frozen=True)
class Style:
    """How the series of one number is drawn: a colour, a marker of matplotlib's, a dash of matplotlib's."""

    colour: str
    marker: str
    dash: str | tuple[int, tuple[float, ...]]


def style(number: int) -> Style:
    """Of series 0, 1, 2 ...: no two of the first twelve share a marker, no two of the first eighteen colour and dash."""
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return Style(_COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], dash)


def check_plot_extra(what: str = "a plot") -> None:
    """Refuse to begin what cannot be drawn at the end.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - whether it is there is the question
    except ImportError:
        raise UnsupportedError(f"{what} needs matplotlib, which is not installed: pip install 'dbrx_q[eval]'") from None


def figure(width: float = 8.0, height: float = 4.6) -> tuple[Figure, Axes]:
    """An empty plot of width x height inches: grid behind, no frame at the top and right. No state is shared with pyplot.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    drawing, [axes] = panels(1, width, height)
    return drawing, axes


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` such plots side by side in one of width x height inches; errors as for `figure`."""
    check_plot_extra()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        drawing = Figure(figsize=(width, height), layout="constrained")
        every = [drawing.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in every:
        _dress(axes)
    return drawing, every


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
    """Make the y axis logarithmic over `values`, of which some or all may be 0; gives the height at which a 0 is to be drawn.

    That height stands below every other value, marked "0" and cut off by a dotted line. Values that are not finite have no height.
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


def label_points(drawing: Figure, axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write a label beside each point (data coordinates), where it hides no other label and no point, as far as there is room."""
    from matplotlib.transforms import Bbox

    gap, near = _TEXT_GAP, _TEXT_GAP * 0.7
    places = [
        (gap, 0.0, "left", "center"),
        (-gap, 0.0, "right", "center"),
        (0.0, gap, "center", "bottom"),
        (0.0, -gap, "center", "top"),
        (near, near, "left", "bottom"),
        (-near, near, "right", "bottom"),
        (near, -near, "left", "top"),
        (-near, -near, "right", "top"),
        (gap, 2 * gap, "left", "bottom"),
        (gap, -2 * gap, "left", "top"),
        (-gap, 2 * gap, "right", "bottom"),
        (-gap, -2 * gap, "right", "top"),
    ]
    with _quiet():
        drawing.draw_without_rendering()  # lays the axes out, so that data coordinates have their place
        around = drawing.dpi / 72 * 5
        centres = [axes.transData.transform(point) for point in points]
        taken = [Bbox.from_extents(x - around, y - around, x + around, y + around) for x, y in centres]
        room = axes.get_window_extent()
        for point, text in zip(points, labels, strict=True):
            written = axes.annotate(text, point, xytext=(gap, 0), textcoords="offset points", color=INK, fontsize=9, parse_math=False)
            best, least = places[0], float("inf")
            for place in places:
                _put(written, place)
                box = written.get_window_extent()
                hidden = sum(_shared(box, other) for other in taken) + 4 * (_area(box) - _shared(box, room))
                if hidden < least:
                    best, least = place, hidden
                if least <= 0:
                    break
            _put(written, best)
            taken.append(written.get_window_extent())


def render(drawing: Figure, kind: str) -> bytes:
    """The bytes of a "png" (200 dots per inch) or an "svg" file with a white background. The same drawing gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(_SETTINGS | {"svg.fonttype": "path"}), _quiet():
        drawing.savefig(file, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return file.getvalue()


def inline_svg(drawing: Figure, prefix: str, description: str) -> str:
    """An `<svg>` element for a page: as wide as its place, in the page's colours, with no address of another file.

    The colours of `style`, INK, MUTED and GRID become `var(--series-0)` ... `var(--series-5)`, `currentColor`, `var(--muted)` and
    `var(--line)`, so that the page decides what they are, for light and dark.

    Args:
        prefix: put before every id, as ids are unique in a page.
        description: what is read aloud instead.
    """
    from html import escape

    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_SETTINGS | {"svg.fonttype": "none"}), _quiet():
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # The page has its own fonts, and a rule for "*" would hold in all of it.
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
def _quiet() -> Iterator[None]:
    """A character that the font lacks is drawn as a box; that is no reason to fail or to write a warning per character."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield


def _put(written: Any, place: tuple[float, float, str, str]) -> None:
    x, y, horizontal, vertical = place
    written.set(position=(x, y), ha=horizontal, va=vertical)


def _area(box: Any) -> float:
    return float(box.width * box.height)


def _shared(one: Any, other: Any) -> float:
    from matplotlib.transforms import Bbox

    both = Bbox.intersection(one, other)
    return _area(both) if both is not None else 0.0
