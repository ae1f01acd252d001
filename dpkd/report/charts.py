"""Charts as SVG, for `report.html` and `ledger.md`: lines over an axis, means with their intervals, confusions.

They are 400 units wide, so that a telephone shows them well, and their colours differ for colour-blind readers too.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, LEFT, TOP, ROW = 400, 200, 50, 26, 16
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#997700", "#56b4e9", "#555555")
"""Those of Okabe and Ito (2008), with a darker yellow."""
HALO = "paint-order:stroke;stroke:#fff;stroke-width:3px"
STYLE = f"text{{font:11px sans-serif;fill:#222;{HALO}}}.grid{{stroke:#ccc}}path{{fill:none}}"

Point = tuple[float, float, float]
"""(x, y, half of the interval of y, or 0)."""


def line_chart(lines: Mapping[str, Sequence[Point]], *, title: str, x_title: str) -> str:
    """Lines by name over x, with their intervals as bars. There must be a point."""
    x_N, y_N, half_N = np.array([point for points in lines.values() for point in points], np.float64).T
    x_ticks, y_ticks = _ticks(x_N), _ticks(np.concatenate([y_N - half_N, y_N + half_N]))
    bottom, right = TOP + HEIGHT, WIDTH - 20

    def x_at(value: float) -> float:
        return round(float(np.interp(value, x_ticks[[0, -1]], [LEFT, right])), 1)

    def y_at(value: float) -> float:
        return round(float(np.interp(value, y_ticks[[0, -1]], [bottom, TOP])), 1)

    drawn = [f'<path class="grid" d="M{LEFT},{y_at(tick)}H{right}"/>' for tick in y_ticks]
    drawn += [_text(tick, LEFT - 6, y_at(tick) + 4, anchor="end") for tick in y_ticks]
    drawn += [_text(tick, x_at(tick), bottom + 15, anchor="middle") for tick in x_ticks]
    drawn.append(_text(x_title, right, bottom + 29, anchor="end"))
    for number, (name, points) in enumerate(lines.items()):
        colour, y_name = COLOURS[number % len(COLOURS)], bottom + 46 + ROW * number
        dash = "5 3" if number >= len(COLOURS) else "none"
        path = "L".join(f"{x_at(x)},{y_at(y)}" for x, y, _ in points)
        bars = "".join(f"M{x_at(x)},{y_at(y - half)}V{y_at(y + half)}" for x, y, half in points if half)
        line = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        drawn.append(f'<path d="M{path}{bars}M{LEFT},{y_name - 4}h18" {line}/>')
        drawn += [_dot(x_at(x), y_at(y), colour) for x, y, _ in points if len(points) < 12]
        drawn.append(_text(name, LEFT + 24, y_name))
    return _svg(title, drawn, height=bottom + 40 + ROW * len(lines))


def interval_chart(rows: Mapping[str, tuple[float, float]], *, title: str, gains: bool) -> str:
    """Means with half of their intervals by name, in percent; gains have a sign, and their 0 is marked."""
    low, high = (-math.inf, math.inf) if gains else (0.0, 100.0)  # a share ends at 0 and 100
    spans = {name: (max(low, mean - half), min(high, mean + half)) for name, (mean, half) in rows.items()}
    ends = [end for span in spans.values() for end in span]
    ticks, bottom = _ticks(np.array(ends + [0.0] * gains)), TOP + 2 * ROW * len(rows) + 4

    def x_at(value: float) -> float:
        return round(float(np.interp(value, ticks[[0, -1]], [12, WIDTH - 12])), 1)

    drawn = []
    for tick in ticks:
        strong = gains and abs(tick) < 1e-9
        drawn.append(f'<path class="grid" d="M{x_at(tick)},{TOP}V{bottom}" stroke-width="{3 if strong else 1}"/>')
        drawn.append(_text(tick, x_at(tick), bottom + 15, anchor="middle"))
    for number, (name, (mean, half)) in enumerate(rows.items()):
        y, words = TOP + 2 * ROW * number + 14, f"{mean:{'+' if gains else ''}.1f}" + (f" ± {half:.1f}" if half else "")
        interval = f'd="M{x_at(spans[name][0])},{y + 9}H{x_at(spans[name][1])}" stroke="{COLOURS[0]}" stroke-width="2"'
        drawn += [_text(name, 12, y), _text(words, WIDTH - 12, y, anchor="end")]
        drawn += [f"<path {interval}/>", _dot(x_at(mean), y + 9, COLOURS[0])]
    return _svg(title, drawn, height=bottom + 22)


def confusion_chart(names: Sequence[str], counts: Sequence[Sequence[int]], *, title: str) -> str:
    """A table of counts as shares of their rows in percent, dark where large; columns have the numbers of the rows."""
    left, top = 130, TOP + ROW
    side = (WIDTH - left - 12) / len(names)
    drawn = []
    for row, (name, line) in enumerate(zip(names, counts, strict=True)):
        short, y = name if len(name) <= 17 else f"{name[:16]}…", round(top + side * row, 1)
        drawn += [_text(f"{short} {row + 1}", left - 6, y + side / 2 + 4, anchor="end")]
        drawn += [_text(f"{row + 1}", left + side * (row + 0.5), top - 5, anchor="middle")]
        for column, count in enumerate(line):
            share, x = count / max(1, sum(line)), round(left + side * column, 1)
            fill = f'fill="{COLOURS[0] if row == column else COLOURS[1]}" fill-opacity="{share:.2f}" stroke="#ccc"'
            drawn.append(f'<rect x="{x}" y="{y}" width="{side:.1f}" height="{side:.1f}" {fill}/>')
            if share >= 0.005:
                drawn.append(_text(f"{100 * share:.0f}", x + side / 2, y + side / 2 + 4, anchor="middle"))
    return _svg(title, drawn, height=math.ceil(top + side * len(names) + 12))


def _ticks(value_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round numbers, at most seven, the first at or below all values and the last at or above them."""
    low, high = float(value_N.min()), float(value_N.max())
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** np.floor(np.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span <= 5 * power * factor)
    first = np.floor(low / step + 1e-9)
    return step * np.arange(first, max(first + 1, np.ceil(high / step - 1e-9)) + 1)


def _text(text: float | str, x: float, y: float, *, anchor: str = "start") -> str:
    words = escape(text if isinstance(text, str) else f"{text:,.10g}")
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>'


def _svg(title: str, drawn: Sequence[str], *, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
        f'<title>{escape(title)}</title><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="12" y="15" style="font-weight:bold">{escape(title)}</text>{"".join(drawn)}</svg>'
    )
