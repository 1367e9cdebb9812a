"""Small line charts as SVG, so that a report needs no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 420, 220, 46


def line_chart(title: str, xs: Sequence[float], ys: Sequence[float], unit: str = "", limit: float | None = None) -> str:
    """One series of points as an SVG; `limit` is drawn as a dashed line. Raises ValueError for series of different length
    or none."""
    if not xs or len(xs) != len(ys):
        raise ValueError(f"{len(xs)} x and {len(ys)} y; give one y for each x, at least one.")
    low, high = min(0.0, *ys, limit or 0.0), max(0.0, *ys, limit or 0.0)
    high = high if high > low else low + 1
    left, right = min(xs), max(xs)
    x = lambda v: MARGIN + (v - left) / ((right - left) or 1) * (WIDTH - MARGIN - 16)  # noqa: E731
    y = lambda v: HEIGHT - 34 - (v - low) / (high - low) * (HEIGHT - 74)  # noqa: E731
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    dots = "".join(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.2"/>' for a, b in zip(xs, ys, strict=True))
    marks = "".join(
        f'<text x="{MARGIN - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}{escape(unit)}</text>'
        f'<line x1="{MARGIN}" x2="{WIDTH - 16}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e4e1ea"/>'
        for v in (low, high)
    )
    ends = "".join(
        f'<text x="{x(v):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{v:g}</text>' for v in sorted({left, right})
    )
    dashed = (
        f'<line x1="{MARGIN}" x2="{WIDTH - 16}" y1="{y(limit):.1f}" y2="{y(limit):.1f}" stroke="#c03a3a" stroke-dasharray="5 4"/>'
        if limit is not None
        else ""
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(title)}" font-size="12" fill="#6b6878">'
        f'<text x="{MARGIN}" y="18" font-size="14" fill="#23222b">{escape(title)}</text>{marks}{dashed}{ends}'
        f'<polyline points="{points}" fill="none" stroke="#6b3fc4" stroke-width="2"/><g fill="#6b3fc4">{dots}</g></svg>'
    )
