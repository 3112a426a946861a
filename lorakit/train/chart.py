"""Place loss curves in an SVG's coordinates: points, ticks and the best value. `report.html.jinja` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

WIDTH, HEIGHT = 800, 320
LEFT, RIGHT, TOP, BOTTOM = 84, 22, 16, 66  # margins: room for ticks and axis labels in the larger type of a phone
MOST_POINTS = 1000  # a longer curve is drawn as means of equally many steps

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Two curves of a run in an SVG of WIDTH x HEIGHT.

    train, held: their points; each: how many steps one point of `train` is the mean of; best: the lowest held-out loss.
    """

    train: list[Point]
    held: list[Point]
    best: Point | None
    steps: list[Tick]
    losses: list[Tick]
    each: int

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM  # the plot's edges


def chart(train: Sequence[tuple[int, float]], held: Sequence[tuple[int, float]]) -> Chart | None:
    """Place the curves of (step, loss); None without a finite loss."""
    train, held = ([(x, y) for x, y in curve if math.isfinite(y)] for curve in (train, held))
    if not train and not held:
        return None
    each = -(-len(train) // MOST_POINTS) or 1
    thinned = [(chunk[-1][0], fmean(y for _, y in chunk)) for chunk in _chunks(train, each)]
    points = [*thinned, *held]
    low, high = min(y for _, y in points), max(y for _, y in points)
    losses = ticks(low, high) if high > low else [low]
    low, high = min(low, *losses), max(high, *losses)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    first = 0 if last > 1 else first

    def place(point: tuple[float, float]) -> Point:
        x = (point[0] - first) / ((last - first) or 1)
        y = (high - point[1]) / ((high - low) or 1)
        return (round(LEFT + (WIDTH - LEFT - RIGHT) * x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * y, 1))

    steps = [t for t in ticks(first, last, whole=True) if first <= t <= last] if last > first else [last]
    digits = _digits(losses)
    return Chart(
        [place(p) for p in thinned],
        [place(p) for p in held],
        place(min(held, key=lambda p: p[1])) if held else None,
        [Tick(place((t, low))[0], f"{t:,.0f}") for t in steps],
        [Tick(place((first, t))[1], f"{t:,.{digits}f}") for t in losses],
        each,
    )


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Return at most `most` round numbers (1, 2 or 5 times a power of ten apart) around low < high.

    whole: only integers.
    """
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    apart = max(1.0, apart) if whole else apart
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    while last - first + 1 > most + 1:
        apart *= 2
        first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [float(f"{i * apart:.10g}") for i in range(first, last + 1)]


def _digits(losses: Sequence[float]) -> int:
    """How many digits after the point keep the ticks apart."""
    apart = min((b - a for a, b in pairwise(losses)), default=0.0)
    return 3 if apart <= 0 else max(0, min(8, -math.floor(math.log10(apart) + 1e-9)))


def _chunks(points: Sequence[tuple[int, float]], size: int) -> list[Sequence[tuple[int, float]]]:
    return [points[i : i + size] for i in range(0, len(points), size)]
