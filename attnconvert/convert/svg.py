"""Charts as inline SVG, and small pictures as PNG data URIs: text that needs no script, no font and no other file.

Every chart is drawn in a box of `WIDTH` units, about the width of a phone, and is meant to be scaled up by a third at most: labels then stay
readable at both ends. Colours come from the page's style sheet through the classes `s0` to `s5`, so that one chart serves light and dark; a
series also has its own dashes and its own marker, because colour must not be the only sign.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 360.0, 216.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 26.0, 38.0

NUM_STYLES = 6
"""Series styles that can be told apart: `s0` to `s5`."""
_DASHES = ("", "", "5 3", "2 3", "8 3 2 3", "1.5 2.5")

Scale = Literal["linear", "log"]
Cell = float | None


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for tooltips.
        style: 0 to NUM_STYLES - 1.
        points: (x, y) in drawing order; a NaN or infinite y breaks the line.
        intervals: (low, high) per point, drawn as whiskers; empty = none.
        faint: drawn thin and pale behind the others (unsmoothed data).
        markers: a marker with a tooltip on every point.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()
    faint: bool = False
    markers: bool = True


@dataclass(frozen=True)
class Mark:
    """A labelled reference line at `value` of an axis."""

    axis: Literal["x", "y"]
    value: float
    label: str


@dataclass(frozen=True)
class Block:
    """One layer in a strip: a letter, its style (None = drawn hollow), a tooltip, and the bar beneath (None = no bar)."""

    letter: str
    style: int | None
    tooltip: str
    bar: float | None = None


# ---------------------------------------------------------------- figures on axes


def compact(value: float) -> str:
    """A figure for an axis: `0.25`, `1,024`, `12k`, `3.5M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def token_label(length: float) -> str:
    """A length on an axis: `512`, `2k` (k = 1024), `1500`."""
    whole = round(length)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round figures that cover [low, high]."""
    assert high > low
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round figures for a logarithmic axis over [low, high], at least two."""
    assert 0 < low < high
    for factors in ((1,), (1, 3), (1, 2, 5)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 6)]
    # Less than about a factor of five: the round figures of a linear axis divide it better.
    return [tick for tick in linear_ticks(low, high, 4) if low * 0.999 <= tick <= high * 1.001] or [low, high]


def _axis(scale: Scale, low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """Maps [low, high] onto [start, stop]; a single value onto the middle."""
    if low == high:
        return lambda value: (start + stop) / 2
    if scale == "log":
        bottom, top = math.log(low), math.log(high)
        return lambda value: start + (math.log(max(value, low * 1e-6)) - bottom) / (top - bottom) * (stop - start)
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _n(value: float) -> str:
    """A coordinate: one decimal is a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


# ---------------------------------------------------------------- line charts


def line_chart(
    label: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over an x axis.

    Args:
        label: what a screen reader says.
        series: at least one with a finite point.
        x_label: beneath the axis.
        y_label: above the axis.
        x_scale: `log` needs x > 0.
        y_scale: `log` needs y > 0; other values break the line.
        y_range: limits of the y axis; None = from the data.
        x_ticks: (value, text); None = round figures.
        marks: reference lines; outside the axes they are left out.
    """
    usable = [[(x, y) for x, y in one.points if math.isfinite(y) and (y_scale == "linear" or y > 0)] for one in series]
    flat = [point for points in usable for point in points]
    assert flat, f"a chart without a point: {label}"
    low_x, high_x = _spread(min(x for x, _ in flat), max(x for x, _ in flat), x_scale)
    if y_range is None:
        # Faint lines are cut off at the frame rather than allowed to squeeze the ones that are to be read.
        read = [y for one, points in zip(series, usable, strict=True) if not one.faint for _, y in points] or [y for _, y in flat]
        read += [bound for one in series for pair in one.intervals if pair for bound in pair if math.isfinite(bound) and (y_scale == "linear" or bound > 0)]
        low_y, high_y = _spread(min(read), max(read), y_scale)
        if y_scale == "log":
            room = (high_y / low_y) ** 0.06
            low_y, high_y = low_y / room, high_y * room
    else:
        low_y, high_y = y_range
    y_ticks = linear_ticks(low_y, high_y) if y_scale == "linear" else log_ticks(low_y, high_y)
    if y_range is None and y_scale == "linear":
        low_y, high_y = y_ticks[0], y_ticks[-1]
    # Markers at the very ends would sit on the frame.
    inset = 8.0 if any(one.markers for one in series) else 0.0
    to_x = _axis(x_scale, low_x, high_x, _LEFT + inset, WIDTH - _RIGHT - inset)
    to_y = _axis(y_scale, low_y, high_y, HEIGHT - _BOTTOM, _TOP)
    if x_ticks is None:
        inside = linear_ticks(low_x, high_x) if x_scale == "linear" else log_ticks(low_x, high_x)
        x_ticks = [(tick, compact(tick)) for tick in inside if low_x <= tick <= high_x]
    parts = [_frame(x_label, y_label, [(to_x(v), t) for v, t in x_ticks], [(to_y(v), compact(v)) for v in y_ticks if low_y <= v <= high_y * 1.0001])]
    parts += _marks(marks, (low_x, high_x), (low_y, high_y), to_x, to_y)
    bottom, top = HEIGHT - _BOTTOM, _TOP
    for one in sorted(series, key=lambda one: not one.faint):
        coordinates = [(to_x(x), min(bottom, max(top, to_y(y)))) if math.isfinite(y) and (y_scale == "linear" or y > 0) else None for x, y in one.points]
        parts.append(_path(coordinates, one))
    shown = [one for one in series if one.markers and not one.faint]
    for position, one in enumerate(shown):
        # Side by side, or the whiskers of equal values hide one another.
        shift = (position - (len(shown) - 1) / 2) * 2.6 if any(one.intervals for one in shown) else 0.0
        for index, (x, y) in enumerate(one.points):
            if not math.isfinite(y) or (y_scale == "log" and y <= 0):
                continue
            interval = one.intervals[index] if one.intervals else None
            left, height = to_x(x) + shift, to_y(y)
            text = f"{one.name}: {compact_value(y)}"
            if interval is not None:
                low, high = (min(bottom, max(top, to_y(bound))) for bound in interval)
                parts.append(f'<path class="whisker s{one.style}" d="M{_n(left)} {_n(low)}V{_n(high)}"/>')
                text += f" [{compact_value(interval[0])}, {compact_value(interval[1])}]"
            parts.append(marker(one.style, left, height, text))
    return _svg(label, HEIGHT, parts)


def compact_value(value: float) -> str:
    """A figure in a tooltip: four digits."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _spread(low: float, high: float, scale: Scale) -> tuple[float, float]:
    """The same range, or a little room around a single value."""
    if high > low:
        return low, high
    if scale == "log":
        return low / 1.5, high * 1.5
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


def _path(coordinates: Sequence[tuple[float, float] | None], one: Series) -> str:
    commands, pen = [], "M"
    for pair in coordinates:
        if pair is None:
            pen = "M"
            continue
        commands.append(f"{pen}{_n(pair[0])} {_n(pair[1])}")
        pen = "L"
    dash = f' stroke-dasharray="{_DASHES[one.style]}"' if _DASHES[one.style] and not one.faint else ""
    return f'<path class="{"faint" if one.faint else "line"} s{one.style}"{dash} d="{"".join(commands)}"/>'


def marker(style: int, x: float, y: float, tooltip: str = "") -> str:
    """The marker of a series; each style has its own shape."""
    title = f"<title>{escape(tooltip)}</title>" if tooltip else ""
    shapes = (
        f"M{_n(x - 3)} {_n(y - 3)}h6v6h-6z",  # square
        "",  # circle
        f"M{_n(x)} {_n(y - 4.2)}l4 7h-8z",  # triangle up
        f"M{_n(x)} {_n(y - 4.4)}l4.4 4.4l-4.4 4.4l-4.4 -4.4z",  # diamond
        f"M{_n(x)} {_n(y + 4.2)}l4 -7h-8z",  # triangle down
        f"M{_n(x - 3.4)} {_n(y - 1.2)}h2.2v-2.2h2.4v2.2h2.2v2.4h-2.2v2.2h-2.4v-2.2h-2.2z",  # plus
    )
    if not shapes[style]:
        return f'<circle class="dot s{style}" cx="{_n(x)}" cy="{_n(y)}" r="3.4">{title}</circle>'
    return f'<path class="dot s{style}" d="{shapes[style]}">{title}</path>'


def swatch(style: int) -> str:
    """A piece of the series' line with its marker, for a legend."""
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] else ""
    return f'<svg class="swatch" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true"><path class="line s{style}"{dash} d="M0 6H26"/>{marker(style, 13, 6)}</svg>'


def _marks(
    marks: Sequence[Mark], x_range: tuple[float, float], y_range: tuple[float, float], to_x: Callable[[float], float], to_y: Callable[[float], float]
) -> list[str]:
    parts = []
    for mark in marks:
        low, high = x_range if mark.axis == "x" else y_range
        if not low <= mark.value <= high:
            continue
        if mark.axis == "x":
            x = to_x(mark.value)
            end = x > WIDTH * 0.6
            parts.append(f'<path class="mark" d="M{_n(x)} {_n(_TOP)}V{_n(HEIGHT - _BOTTOM)}"/>')
            # Halfway up: at the top there are the best results, at the bottom the labels of other lines.
            place = f'x="{_n(x - 4 if end else x + 4)}" y="{_n((_TOP + HEIGHT - _BOTTOM) / 2)}"'
            parts.append(f'<text class="note" {place}{_anchor("end" if end else "start")}>{escape(mark.label)}</text>')
        else:
            y = to_y(mark.value)
            parts.append(f'<path class="mark" d="M{_n(_LEFT)} {_n(y)}H{_n(WIDTH - _RIGHT)}"/>')
            parts.append(f'<text class="note" x="{_n(_LEFT + 4)}" y="{_n(y - 4)}">{escape(mark.label)}</text>')
    return parts


def _anchor(anchor: str) -> str:
    return "" if anchor == "start" else f' text-anchor="{anchor}"'


def _frame(
    x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], height: float = HEIGHT, top: float = 0.0
) -> str:
    bottom = height - _BOTTOM
    parts = [f'<text class="axis" x="0" y="{_n(top + 12)}">{escape(y_label)}</text>'] if y_label else []
    parts.append(f'<text class="axis" x="{_n((_LEFT + WIDTH - _RIGHT) / 2)}" y="{_n(height - 4)}" text-anchor="middle">{escape(x_label)}</text>')
    if y_ticks:
        parts.append('<path class="grid" d="' + "".join(f"M{_n(_LEFT)} {_n(y)}H{_n(WIDTH - _RIGHT)}" for y, _ in y_ticks) + '"/>')
    parts += [f'<text class="tick" x="{_n(_LEFT - 5)}" y="{_n(y + 4)}" text-anchor="end">{escape(text)}</text>' for y, text in y_ticks]
    parts.append(f'<path class="base" d="M{_n(_LEFT)} {_n(bottom)}H{_n(WIDTH - _RIGHT)}"/>')
    free_from = -math.inf
    for x, text in sorted(x_ticks):
        half = 3.5 * len(text)
        x_text = min(x, WIDTH - half)
        parts.append(f'<path class="base" d="M{_n(x)} {_n(bottom)}v3.5"/>')
        if x_text - half < free_from:
            continue  # a label on top of another is worse than none
        free_from = x_text + half + 4
        parts.append(f'<text class="tick" x="{_n(x_text)}" y="{_n(bottom + 15)}" text-anchor="middle">{escape(text)}</text>')
    return "".join(parts)


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_n(WIDTH)} {_n(height)}">{"".join(parts)}</svg>'


# ---------------------------------------------------------------- layers, scatter


def layer_strip(label: str, blocks: Sequence[Block], *, y_label: str, strip: bool = True) -> str:
    """Layers from left to right: a strip of blocks (`strip`) and a bar beneath each.

    Args:
        label: what a screen reader says.
        blocks: one per layer, in order; at least one.
        y_label: what the bars show; bars are left out when no block has one.
        strip: whether to draw the strip of methods above the bars.
    """
    assert blocks
    bars = [block.bar for block in blocks if block.bar is not None and math.isfinite(block.bar)]
    top = 30.0 if strip else 0.0
    height = top + (HEIGHT - 40 if bars else _BOTTOM + 2)
    pitch = (WIDTH - _RIGHT - _LEFT) / len(blocks)
    width = pitch - (2 if pitch > 8 else 0.6)
    bottom = height - _BOTTOM
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if pitch * step >= 14)
    x_ticks = [(_LEFT + pitch * (index + 0.5), str(index)) for index in range(0, len(blocks), every)]
    parts = []
    if bars:
        ticks = linear_ticks(0.0, max([*bars, 1e-9]), 4)
        to_y = _axis("linear", 0.0, ticks[-1], bottom, top + _TOP)
        parts.append(_frame("layer", y_label, x_ticks, [(to_y(tick), compact(tick)) for tick in ticks], height, top))
    else:
        parts.append(_frame("layer", "", x_ticks, [], height, top))
        to_y = _axis("linear", 0.0, 1.0, bottom, top)
    for index, block in enumerate(blocks):
        x = _LEFT + pitch * index + (pitch - width) / 2
        title = f"<title>{escape(block.tooltip)}</title>"
        kind = "kept" if block.style is None else f"block s{block.style}"
        if strip:
            letter = ""
            if pitch >= 8:
                letter = f'<text class="{"letter" if block.style is None else "letter on"}" x="{_n(x + width / 2)}" y="17" text-anchor="middle">{escape(block.letter)}</text>'
            parts.append(f'<g>{title}<rect class="{kind}" x="{_n(x)}" y="2" width="{_n(width)}" height="22" rx="1.5"/>{letter}</g>')
        if block.bar is not None and math.isfinite(block.bar):
            y = to_y(block.bar)
            parts.append(
                f'<rect class="bar s{block.style or 0}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(max(0.6, bottom - y))}">{title}</rect>'
            )
    return _svg(label, height, parts)


def scatter(label: str, points: Sequence[tuple[float, float, str]], *, x_label: str, y_label: str, style: int = 1) -> str:
    """Points with the line of equality. Both axes have the same range, from 0.

    Args:
        label: what a screen reader says.
        points: (x, y, tooltip), all finite; at least one. Beyond 400 the tooltips are left out to keep the file small.
        x_label: beneath the axis.
        y_label: above the axis.
        style: series style.
    """
    assert points
    ticks = linear_ticks(0.0, max(max(x, y) for x, y, _ in points) or 1.0, 4)
    height = 300.0
    to_x = _axis("linear", 0.0, ticks[-1], _LEFT, WIDTH - _RIGHT)
    to_y = _axis("linear", 0.0, ticks[-1], height - _BOTTOM, _TOP)
    parts = [_frame(x_label, y_label, [(to_x(tick), compact(tick)) for tick in ticks], [(to_y(tick), compact(tick)) for tick in ticks], height)]
    parts.append(f'<path class="mark" d="M{_n(to_x(0))} {_n(to_y(0))}L{_n(to_x(ticks[-1]))} {_n(to_y(ticks[-1]))}"/>')
    parts.append(f'<text class="note" x="{_n(to_x(ticks[-1]) - 26)}" y="{_n(to_y(ticks[-1]) + 10)}" text-anchor="end">equal</text>')
    if len(points) <= 400:
        parts += [
            f'<circle class="scatter s{style}" cx="{_n(to_x(x))}" cy="{_n(to_y(y))}" r="2.6"><title>{escape(text)}</title></circle>' for x, y, text in points
        ]
    else:
        # A line of no length with round ends is a dot, in a tenth of the bytes of a circle.
        parts.append(f'<path class="dots s{style}" d="' + "".join(f"M{_n(to_x(x))} {_n(to_y(y))}h0" for x, y, _ in points) + '"/>')
    return _svg(label, height, parts)


# ---------------------------------------------------------------- pictures

# White to dark blue, evenly spaced in lightness; in dark mode the page inverts it.
_RAMP = ((255, 255, 255), (205, 226, 251), (134, 182, 239), (42, 120, 214), (16, 66, 129), (7, 25, 56))
_SHADES = 64


def png_data_uri(values: Sequence[Sequence[Cell]], top: float) -> str:
    """A matrix as a picture, one pixel per value: white = 0, dark = `top` or more.

    Shades follow the square root of the value, because attention weights are a few large ones among very many small ones.

    Args:
        values: rows of equal length, at least 1 x 1; None and NaN are drawn as 0.
        top: the value of the darkest shade, > 0.

    Returns:
        `data:image/png;base64,...`, about 2 KB for 64 x 64.
    """
    width, height = len(values[0]), len(values)
    assert width > 0
    assert all(len(row) == width for row in values)
    assert top > 0
    rows = b"".join(b"\0" + bytes(_shade(value, top) for value in row) for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits per pixel, colours from a palette
    palette = b"".join(bytes(_ramp(shade / (_SHADES - 1))) for shade in range(_SHADES))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _shade(value: Cell, top: float) -> int:
    if value is None or not value > 0:
        return 0
    return round(min(1.0, math.sqrt(value / top)) * (_SHADES - 1))


def _ramp(share: float) -> tuple[int, int, int]:
    place = share * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True))
    return red, green, blue
