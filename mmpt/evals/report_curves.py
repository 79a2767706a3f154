"""Curves of a run as inline SVG, from its metrics.jsonl."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 170, 46, 8, 8, 22
TITLES = {
    "loss": "Loss",
    "logit_scale": "Logit scale (inverse temperature)",
    "learning_rate": "Learning rate",
    "samples_per_second": "Samples per second",
    "grad_norm": "Gradient norm",
    "data_wait_share": "Share of time waiting for data",
}
"""What is drawn when a run has recorded it, in this order; R@1 of every evaluation follows."""


class Curve(NamedTuple):
    """A named series of (step, value), without values that are not numbers."""

    title: str
    points: list[tuple[float, float]]


def read_curves(metrics: Path) -> list[Curve]:
    """The curves of a run, none where nothing was recorded. ValueError that names a line that is not a record."""
    records = []
    for number, line in enumerate(metrics.read_text().splitlines() if metrics.exists() else [], 1):
        try:
            records.append({"step": int(json.loads(line)["step"]), **json.loads(line)})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{metrics}:{number} is not a record of a step") from error
    names = {name for record in records for name in record}
    titles = TITLES | {
        name: name.removeprefix("eval/").replace("_", " ") for name in sorted(names) if name.endswith("_R@1")
    }
    curves = []
    for name, title in titles.items():
        values = [(float(record["step"]), record[name]) for record in records if name in record]
        points = [(step, float(value)) for step, value in values if value is not None and math.isfinite(value)]
        if len(points) > 1:
            curves.append(Curve(title, points))
    return curves


def draw(curve: Curve) -> str:
    """A figure: title, last value, axes with round ticks, and the line."""
    steps, values = [x for x, _ in curve.points], [y for _, y in curve.points]
    low, high = min(values), max(values)
    if low > 0 and low < 0.4 * high:
        low = 0.0
    if high == low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    ticks_y = round_ticks(low, high, 4)
    low, high = min(low, ticks_y[0]), max(high, ticks_y[-1])
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks_y:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in round_ticks(first, last, 4):
        if first <= tick <= last:
            parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{short(tick)}</text>')
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thin(curve.points))
    parts.append(f'<polyline class="curve" points="{line}"/>')
    parts.append(f'<circle class="dot" r="3" cx="{x(last):.1f}" cy="{y(values[-1]):.1f}"/>')
    return (
        f'<figure class="card"><figcaption>{escape(curve.title)} <span>{short(values[-1])}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve.title)} by step">'
        f"{''.join(parts)}</svg></figure>"
    )


def thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points, evenly spaced, the last one among them."""
    stride = max(1, len(points) // most)
    return [*points[:-1:stride], points[-1]]


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` multiples of 1, 2 or 5 times a power of ten that cover low .. high but for less than one step."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * 1.0001)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def short(value: float) -> str:
    """Three significant digits, in a few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return f"{value / 1000:.3g}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
