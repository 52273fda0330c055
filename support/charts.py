"""The curves of the log as charts in HTML, which follow the size and colours of the page that holds them."""

import math
from html import escape

import numpy as np

from support.plots import CURVES, MEASURED_CURVES

POINTS = 250  # of a curve, at most
WIDTH, HEIGHT = 2000, 1000  # of a chart, in units that the browser stretches to its size
CHARTS = (  # title, top of the axis (None: of the values), whether to smooth, curves: column, colour, legend
    ("Losses: binary cross-entropy (nats)", None, True, [curve[1:] for curve in CURVES if curve[0] == 0]),
    ("Mean probability of being real", 1, True, [curve[1:] for curve in CURVES if curve[0] == 1]),
    *((curve[2][0].upper() + curve[2][1:].replace("\n", " "), None, False, [curve]) for curve in MEASURED_CURVES),
)


def draw_charts(rows, steps_per_epoch):
    """Return the charts of the rows of a log, over the epochs."""
    return "".join(draw_chart(*chart, rows, steps_per_epoch) for chart in CHARTS)


def draw_chart(title, top, smooth, curves, rows, steps_per_epoch):
    """Return a chart of columns of the log, or "" if the log has none of them."""
    drawn = [(*curve[1:], *points(rows, curve[0], steps_per_epoch)) for curve in curves]
    drawn = [curve for curve in drawn if len(curve[2])]
    if not drawn:
        return ""
    title, right = escape(title), rows[-1]["step"] / steps_per_epoch
    top = top or 1.05 * max(1e-6, *(y.max() for *_, y in drawn))
    lines, legend = [], []
    for colour, label, x, y in drawn:
        colour, window = colour.removeprefix("tab:"), max(1, len(y) // 50 if smooth else 1)
        if window > 1:
            lines.append(polyline(f"pale {colour}", x / right, y / top))
            x, y = (np.convolve(values, np.ones(window) / window, "valid") for values in (x, y))
        lines.append(polyline(colour, x / right, y / top))
        legend.append(f'<li class="{colour}">{escape(label)} <b>{y[-1]:.3g}</b></li>')
    across, up = ticks(right), ticks(top)
    grid = "".join(f"M0 {HEIGHT * (1 - tick / top):.0f}h{WIDTH}" for tick in up)
    labels = [f'<span class="y" style="bottom:{100 * tick / top:.1f}%">{tick:g}</span>' for tick in up]
    labels += [f'<span class="x" style="left:{100 * tick / right:.1f}%">{tick:g}</span>' for tick in across]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{title}"'
    svg += f' data-epochs="{right:.6g}"><path class="grid" d="{grid}"/><path class="mark"/>{"".join(lines)}</svg>'
    plot = f'<div class="plot">{svg}{"".join(labels)}</div><p class="dim">epochs</p>'
    names = "".join(legend) if len(curves) > 1 else ""  # the title names a single one
    return f"<figure><figcaption>{title}</figcaption><ul>{names}</ul>{plot}</figure>"


def points(rows, column, steps_per_epoch):
    """Return arrays of the epochs and values of a column: of each row, or as POINTS means over equally many rows."""
    pairs = [(row["step"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]
    values = np.array(pairs, dtype=float).reshape(-1, 2) / (steps_per_epoch, 1)
    if len(values) > POINTS:
        starts = np.linspace(0, len(values), POINTS, endpoint=False).astype(int)
        values = np.add.reduceat(values, starts) / np.diff(starts, append=len(values))[:, None]
    return values.T


def polyline(classes, x, y):
    """Return a curve through points x, y in [0, 1], the ends of the axes. Few points are also marked by dots."""
    pairs = [f"{round(WIDTH * a)},{round(HEIGHT * (1 - b))}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    dots = "".join(f"M{pair}h0" for pair in pairs) if len(pairs) <= 30 else ""
    curve = f'<polyline class="{classes}" points="{" ".join(pairs)}"/>'
    return curve + (f'<path class="dots {classes}" d="{dots}"/>' if dots else "")


def ticks(top):
    """Return three to seven round numbers from 0 to at most `top`."""
    step = 10 ** math.floor(math.log10(top / 2))
    step *= next(factor for factor in (5, 2, 1, 0.5) if top / (factor * step) >= 2.5)
    return [round(i * step, 10) for i in range(math.floor(top / step * (1 + 1e-9)) + 1)]
