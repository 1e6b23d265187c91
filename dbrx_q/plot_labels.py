"""Names written beside the points of a plot, or at the ends of its lines, so that no reader has to look colours up in a legend.

Places are found in pixels, by the size of the plot as it is laid out when a function here is called: call it last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plots import quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NamedPoint", "label_line_ends", "label_points"]

_FONT_SIZE = 9.0  # points
_LINE_SPACING = 1.25  # distance of names under one another, in font sizes
_MARKER_RADIUS = 5.0  # points around a marker that a name keeps free
_RADII = (7.0, 10.0, 14.0, 18.0, 24.0, 30.0, 38.0, 48.0, 60.0, 75.0)  # points between a marker and its name, nearest first
_DIRECTIONS = 16
_LEADER_FROM = 10.0  # radius from which a line joins a marker and its name
_PASSES = 3  # a name placed early is placed again when the others are known
# Costs, in points² of a marker or of another name that a name hides. At 2 a point, names stayed on markers of a crowd of nine.
_COST_PER_POINT = 0.1  # of the distance from the marker
_COST_OF_CROSSING = 40.0  # of a leader line across a name, a marker or another leader
_LINE_LABEL_AT = 1.03  # where the names of lines begin, as a share of the plot's width

_Box = tuple[float, float, float, float]
"""left, bottom, right, top; pixels."""
_Segment = tuple[float, float, float, float]
"""x and y of one end, x and y of the other; pixels."""


@dataclass(frozen=True)
class NamedPoint:
    """A point of a plot that has a name."""

    x: float
    """In the axes' data coordinates."""
    y: float
    """In the axes' data coordinates; not finite where the plot cannot show the value."""
    name: str
    """Written as it is spelled: nothing in it is markup."""
    colour: str
    """Of the name, and of the line that leads to it."""


@dataclass(frozen=True)
class _Place:
    """One place for a name beside its marker."""

    dx: float
    """Points from the marker to the name's anchor, to the right."""
    dy: float
    """Points from the marker to the name's anchor, upwards."""
    horizontal: str
    """matplotlib's `ha` of the name at its anchor."""
    vertical: str
    """matplotlib's `va` of the name at its anchor."""
    radius: float
    """Points between marker and anchor."""

    @property
    def anchor(self) -> tuple[float, float]:
        """Where the anchor is in the name's box, as shares of its width and height."""
        return {"left": 0.0, "center": 0.5, "right": 1.0}[self.horizontal], {"bottom": 0.0, "center": 0.5, "top": 1.0}[self.vertical]

    def box(self, x: float, y: float, width: float, height: float, pixels: float) -> _Box:
        """What a name of width x height pixels covers, with its marker at (x, y); `pixels` per point."""
        left, bottom = x + self.dx * pixels - width * self.anchor[0], y + self.dy * pixels - height * self.anchor[1]
        return left, bottom, left + width, bottom + height

    def leader(self, x: float, y: float, pixels: float) -> _Segment | None:
        """The line from the marker at (x, y) to the anchor, if this place needs one."""
        return (x, y, x + self.dx * pixels, y + self.dy * pixels) if self.radius >= _LEADER_FROM else None


def label_points(drawing: Figure, axes: Axes, points: Sequence[NamedPoint]) -> None:
    """Write each name beside its point, where it hides no other name, no marker and no leader line, as far as there is room.

    A name that has to stand further away is joined to its marker by a thin line.
    """
    with quiet():
        drawing.draw_without_rendering()  # lays the axes out, so that data coordinates have their place
        pixels = drawing.dpi / 72
        inside = axes.get_window_extent()
        room = (inside.x0, inside.y0, inside.x1, inside.y1)
        centres = [_pixels(axes, point) for point in points]
        sizes = [_text_size(axes, point.name) for point in points]
        for point, place in zip(points, _places(centres, sizes, room, pixels), strict=True):
            leader = {"arrowstyle": "-", "color": point.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1, "relpos": place.anchor}
            axes.annotate(
                point.name,
                (point.x, point.y),
                xytext=(place.dx, place.dy),
                textcoords="offset points",
                ha=place.horizontal,
                va=place.vertical,
                color=point.colour,
                fontsize=_FONT_SIZE,
                parse_math=False,
                arrowprops=leader if place.radius >= _LEADER_FROM else None,
            )


def label_line_ends(drawing: Figure, axes: Axes, ends: Sequence[NamedPoint]) -> None:
    """Write the name of each line to the right of the plot, level with the line's last point or as near as other names leave room.

    A thin line joins the two. The name of a line without a finite point stands at the bottom.
    """
    if not ends:
        return
    with quiet():
        drawing.draw_without_rendering()
        inside = axes.get_window_extent()
        points_high = inside.height / (drawing.dpi / 72)
        font_size = min(_FONT_SIZE, points_high / (_LINE_SPACING * len(ends)))
        spacing = font_size * _LINE_SPACING / points_high
        drawn = [math.isfinite(end.x) and math.isfinite(end.y) for end in ends]
        wanted = [(_pixels(axes, end)[1] - inside.y0) / inside.height if shown else 0.0 for end, shown in zip(ends, drawn, strict=True)]
        for end, shown, height in zip(ends, drawn, _spread(wanted, spacing), strict=True):
            leader = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
            axes.annotate(
                end.name,
                (end.x, end.y) if shown else (1.0, height),
                xycoords="data" if shown else "axes fraction",
                xytext=(_LINE_LABEL_AT, height),
                textcoords="axes fraction",
                ha="left",
                va="center",
                color=end.colour,
                fontsize=font_size,
                parse_math=False,
                annotation_clip=False,
                arrowprops=leader if shown else None,
            )


def _spread(wanted: Sequence[float], spacing: float) -> list[float]:
    """Heights from 0 to 1, at least `spacing` apart in the order of `wanted`, and as near to it as that allows.

    Names that would overlap form a block around the mean of their wanted heights; blocks that touch are joined (pool adjacent violators,
    which minimises the sum of squared distances).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, int]] = []  # (height of the lowest name, names), from the bottom
    for i in order:
        bottom, count = wanted[i], 1
        while blocks and blocks[-1][0] + blocks[-1][1] * spacing > bottom:
            below, names = blocks.pop()
            bottom = (below * names + (bottom - names * spacing) * count) / (names + count)
            count += names
        blocks.append((bottom, count))
    heights = [bottom + k * spacing for bottom, count in blocks for k in range(count)]
    for k in range(len(heights)):  # upwards from the bottom edge, then downwards from the top edge
        heights[k] = max(heights[k], spacing / 2 if k == 0 else heights[k - 1] + spacing)
    for k in reversed(range(len(heights))):
        heights[k] = min(heights[k], 1 - spacing / 2 if k == len(heights) - 1 else heights[k + 1] - spacing)
    spread = [0.0] * len(wanted)
    for i, height in zip(order, heights, strict=True):
        spread[i] = height
    return spread


def _places(centres: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], room: _Box, pixels: float) -> list[_Place]:
    """A place for every name, each in turn at its cheapest given the others, the most crowded first."""
    candidates = list(_candidates())
    around = _MARKER_RADIUS * pixels
    markers = [(x - around, y - around, x + around, y + around) for x, y in centres]
    crowding = [sum(math.dist(a, b) < 80 * pixels for b in centres) for a in centres]
    order = sorted(range(len(centres)), key=lambda i: -crowding[i])
    chosen: dict[int, _Place] = {}
    for _ in range(_PASSES):
        for i in order:
            others = [k for k in chosen if k != i]
            boxes = [chosen[k].box(*centres[k], *sizes[k], pixels) for k in others]
            lines = [line for k in others if (line := chosen[k].leader(*centres[k], pixels))]
            apart = [markers[k] for k in range(len(markers)) if math.dist(centres[k], centres[i]) > 2 * around]

            def cost(
                place: _Place,
                i: int = i,
                boxes: list[_Box] = boxes,
                lines: list[_Segment] = lines,
                apart: list[_Box] = apart,
            ) -> float:
                box, leader = place.box(*centres[i], *sizes[i], pixels), place.leader(*centres[i], pixels)
                hidden = sum(_overlap(box, other) for other in (*boxes, *markers))
                outside = sizes[i][0] * sizes[i][1] - _overlap(box, room)
                crossings = sum(_crosses(line, box) for line in lines)
                if leader:
                    crossings += sum(_crosses(leader, other) for other in (*boxes, *apart)) + sum(_meet(leader, line) for line in lines)
                return (hidden + 4 * outside) / pixels**2 + _COST_OF_CROSSING * crossings + _COST_PER_POINT * place.radius

            chosen[i] = min(candidates, key=cost)
    return [chosen[i] for i in range(len(centres))]


def _candidates() -> Iterator[_Place]:
    """Nearest first; to the right, to the left, above and below before the directions between."""
    straight = (0, 8, 4, 12)
    for radius in _RADII:
        for direction in sorted(range(_DIRECTIONS), key=lambda k: k not in straight):
            angle = 2 * math.pi * direction / _DIRECTIONS
            right, up = math.cos(angle), math.sin(angle)
            horizontal = "left" if right > 0.3 else "right" if right < -0.3 else "center"
            vertical = "bottom" if up > 0.3 else "top" if up < -0.3 else "center"
            yield _Place(radius * right, radius * up, horizontal, vertical, radius)


def _pixels(axes: Axes, point: NamedPoint) -> tuple[float, float]:
    x, y = axes.transData.transform((point.x, point.y))
    return float(x), float(y)


def _text_size(axes: Axes, text: str) -> tuple[float, float]:
    """Width and height of a name in pixels."""
    written = axes.annotate(text, (0, 0), xycoords="axes fraction", fontsize=_FONT_SIZE, parse_math=False)
    extent = written.get_window_extent()
    written.remove()
    return float(extent.width), float(extent.height)


def _overlap(box: _Box, other: _Box) -> float:
    """Pixels² that two boxes share."""
    width, height = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _crosses(line: _Segment, box: _Box) -> bool:
    """Whether a line passes through a box."""
    left, bottom, right, top = box
    if any(left < line[k] < right and bottom < line[k + 1] < top for k in (0, 2)):
        return True
    return _meet(line, (left, bottom, right, top)) or _meet(line, (left, top, right, bottom))


def _meet(line: _Segment, other: _Segment) -> bool:
    """Whether two lines cross."""

    def side(of: _Segment, x: float, y: float) -> float:
        return (of[2] - of[0]) * (y - of[1]) - (of[3] - of[1]) * (x - of[0])

    return side(line, other[0], other[1]) * side(line, other[2], other[3]) < 0 and (
        side(other, line[0], line[1]) * side(other, line[2], line[3]) < 0
    )
