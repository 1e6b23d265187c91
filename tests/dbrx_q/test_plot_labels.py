"""Colours and marks of series, and names written at points and at the ends of lines."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import pytest

from dbrx_q.plot_labels import NamedPoint, label_line_ends, label_points
from dbrx_q.plots import figure, style

pytest.importorskip("matplotlib")
DOZEN = [f"checkpoint-{number}" for number in range(12)]


def boxes_of(axes: Any) -> dict[str, Any]:
    """The box of each name in pixels, without the line that leads to it."""
    from matplotlib.text import Text

    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert sorted(boxes) == sorted(DOZEN)
    return boxes


def overlapping(boxes: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of names that hide a part of each other."""
    return [(name, other) for name, other in combinations(boxes, 2) if boxes[name].overlaps(boxes[other])]


def test_a_dozen_series_differ_in_colour_and_in_marker() -> None:
    looks = [style(number) for number in range(144)]
    assert len({look.colour for look in looks[:12]}) == 12
    assert len({look.marker for look in looks[:12]}) == 12
    assert len({(look.colour, look.marker) for look in looks}) == 144
    for look, neighbour in pairwise(looks):
        assert look.dash != neighbour.dash


@pytest.mark.parametrize("spread", [0.02, 0.1, 1.0])
def test_names_of_a_crowd_of_points_hide_none_of_each_other(spread: float) -> None:
    drawing, axes = figure()
    points = [(0.5 + spread * math.cos(n), 0.5 + spread * math.sin(2 * n)) for n in range(12)]
    axes.scatter(*zip(*points, strict=True))
    axes.set_xlim(-1, 2)
    axes.set_ylim(-1, 2)
    label_points(drawing, axes, [NamedPoint(x, y, name, "black") for (x, y), name in zip(points, DOZEN, strict=True)])
    drawing.draw_without_rendering()
    assert overlapping(boxes_of(axes)) == []


def test_names_at_the_ends_of_lines_hide_none_of_each_other_and_keep_their_order() -> None:
    drawing, axes = figure()
    heights = [0.5, 0.51, 0.52, 0.5, 0.1, 0.9, 0.91, 0.92, 1.0, 1.0, 0.0, math.nan]
    for height in heights:
        axes.plot([0, 1], [0.3, height])
    label_line_ends(drawing, axes, [NamedPoint(1, height, name, "black") for height, name in zip(heights, DOZEN, strict=True)])
    drawing.draw_without_rendering()
    drawn = boxes_of(axes)
    assert overlapping(drawn) == []
    inside = axes.get_window_extent()
    for box in drawn.values():
        assert inside.y0 - 3 <= box.y0
        assert box.y1 <= inside.y1 + 3
    for (low, lower), (high, higher) in combinations([pair for pair in zip(heights, DOZEN, strict=True) if math.isfinite(pair[0])], 2):
        if low < high:
            assert drawn[lower].y0 < drawn[higher].y0
