"""Places for the labels of a scatter: beside their marks, over no other label, mark or leader line."""

from __future__ import annotations

import math
from collections.abc import Sequence

Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

_AIR = 1.5  # between boxes
_RADII = (5.0, 9.0, 14.0, 20.0, 27.0, 36.0, 46.0, 58.0, 72.0, 90.0, 110.0)
_ANGLES = (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240, 15, 345, 165, 195, 45, 315, 135, 225)
_NEAR = 60.0  # marks that are closer form a crowd
_LEADER = 11.0  # a label that is farther away than this has a line to its mark


def place(marks: Sequence[Place], sizes: Sequence[Place], avoided: Sequence[Box], frame: Box) -> list[Box | None]:
    """A box for the label of each mark; None for a label without room in the frame.

    Labels are placed greedily, in several orders; the best result counts. `sizes` are widths and heights of the labels,
    `avoided` boxes that no label may cover, those of the marks included.
    """
    crowd = [sum(math.dist(mark, other) < _NEAR for other in marks) for mark in marks]
    orders = [
        sorted(range(len(marks)), key=key)
        for key in (
            lambda at: (crowd[at], at),
            lambda at: (-crowd[at], at),
            lambda at: (marks[at][1], at),
            lambda at: (-marks[at][1], at),
            lambda at: (-sizes[at][0], at),
        )
    ]
    tried = [_in_order(order, marks, sizes, avoided, frame) for order in orders]
    return min(tried, key=lambda placed: _effort(marks, placed))


def _effort(marks: Sequence[Place], placed: Sequence[Box | None]) -> tuple[int, float]:
    """The number of labels without a place, and the total length of leader lines."""
    far = (math.dist(*line) for mark, box in zip(marks, placed, strict=True) if box and (line := leader(mark, box)))
    return list(placed).count(None), sum(far)


def _in_order(
    order: Sequence[int], marks: Sequence[Place], sizes: Sequence[Place], avoided: Sequence[Box], frame: Box
) -> list[Box | None]:
    """Each label in turn at the nearest free place."""
    boxes: list[Box] = []
    lines: list[tuple[Place, Place]] = []
    placed: list[Box | None] = [None] * len(marks)
    for lines_cross in ("nothing", "marks", "labels"):  # each round allows more, rather than leave a label out
        for at in (each for each in order if placed[each] is None):
            over = _others(marks[at], avoided) if lines_cross == "nothing" else []
            for box in _candidates(marks[at], sizes[at]):
                line = leader(marks[at], box)
                if not _inside(box, frame) or any(_overlap(box, other) for other in (*boxes, *avoided)):
                    continue
                crossed = any(_crosses(other, box) for other in lines)
                crossed |= line is not None and any(_crosses(line, other) for other in (*boxes, *over))
                if not crossed or lines_cross == "labels":
                    placed[at] = box
                    boxes.append(box)
                    lines += [line] if line else []
                    break
    return placed


def _others(mark: Place, avoided: Sequence[Box]) -> list[Box]:
    """The boxes that a line from a mark should not cross: all but those of the mark itself."""
    return [box for box in avoided if not (box[0] <= mark[0] <= box[2] and box[1] <= mark[1] <= box[3])]


def leader(mark: Place, box: Box) -> tuple[Place, Place] | None:
    """The line from a mark to its label; None for a label beside its mark."""
    near = (min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3]))
    return (mark, near) if math.dist(mark, near) > _LEADER else None


def _candidates(mark: Place, size: Place) -> Sequence[Box]:
    """Boxes around a mark, the nearest first."""
    found = []
    for radius in _RADII:
        for angle in _ANGLES:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            x, y = mark[0] + across * (radius + size[0] / 2), mark[1] + up * (radius + size[1] / 2)
            found.append((x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2))
    return found


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return (
        one[0] < other[2] + _AIR and other[0] < one[2] + _AIR and one[1] < other[3] + _AIR and other[1] < one[3] + _AIR
    )


def _crosses(line: tuple[Place, Place], box: Box) -> bool:
    """Whether a line passes through a box: line clipping by Liang and Barsky (1984)."""
    (x, y), (to_x, to_y) = line
    enters, leaves = 0.0, 1.0
    for step, distance in (
        (x - to_x, x - box[0]),
        (to_x - x, box[2] - x),
        (y - to_y, y - box[1]),
        (to_y - y, box[3] - y),
    ):
        if step == 0 and distance < 0:
            return False
        if step < 0:
            enters = max(enters, distance / step)
        elif step > 0:
            leaves = min(leaves, distance / step)
    return enters < leaves
