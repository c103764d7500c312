"""Draw what was measured as PNG files: speed, training curves, recall, quality by position. Needs matplotlib, the extra `plots`.

Figures are drawn on their own canvas, never through pyplot, so that a program which imports this keeps its matplotlib backend. All are made to
be read at a width of 800 pixels; the files have twice that.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnconvert.convert.report import head_usage
from attnconvert.distill.loop import write_atomic
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEACHER_COLOUR, STUDENT_COLOUR = "#7f7f7f", "#0b6fb8"
# Okabe-Ito: these can be told apart with every common kind of colour blindness
OTHER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _GRID = "#222222", "#e3e3e3"
# one kind of line and marker per batch size
_BATCH_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_WIDTH_INCHES, _DPI = 8.0, 200
_FONT_SIZE = 11.5
# behind text that may lie on a line
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


# ---------------------------------------------------------------- figures and files


def _figure(height: float) -> Figure:
    """An empty figure, 8 inches wide.

    Raises:
        AttnConvertError: `missing-extra`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AttnConvertError("missing-extra", "plots need matplotlib, which is not installed", hint="`pip install 'attnconvert[plots]'`") from error
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    """Write a PNG, complete or not at all; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return path


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=_FONT_SIZE + 2, fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel(x_label, fontsize=_FONT_SIZE, color=_INK)
    axes.set_ylabel(y_label, fontsize=_FONT_SIZE, color=_INK)
    axes.tick_params(labelsize=_FONT_SIZE - 1, colors=_INK, which="both", length=0)
    axes.grid(True, which="major", color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b5b5b5")


def _colours(names: Iterable[str]) -> dict[str, str]:
    fixed = {"teacher": TEACHER_COLOUR, "student": STUDENT_COLOUR}
    others = [name for name in dict.fromkeys(names) if name not in fixed]
    return {**fixed, **{name: OTHER_COLOURS[number % len(OTHER_COLOURS)] for number, name in enumerate(others)}}


def _tokens(value: float) -> str:
    """`512`, `8k`, `128k`, `1M`: binary thousands where they are whole, as lengths are."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value:,.0f}"


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def _log_axis(axis: Any, low: float, high: float, label: Callable[[float], str], *, binary: bool) -> None:
    """Few round ticks on a log axis, in plain numbers: powers of two, or 1-2-5, thinned out to at most eight."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if binary:
        steps = [2.0**power for power in range(0, 60)]
    else:
        steps = [lead * 10.0**power for power in range(-6, 16) for lead in (1, 2, 5)]
    inside = [step for step in steps if low <= step <= high]
    stride = -(-len(inside) // 8)
    if not binary and stride > 1:  # thinned 1-2-5 steps would be uneven
        inside = [10.0**power for power in range(-6, 16) if low <= 10.0**power <= high]
        stride = -(-len(inside) // 8)
    axis.set_major_locator(FixedLocator(inside[::-1][:: max(1, stride)][::-1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


# ---------------------------------------------------------------- speed


def draw_report(directory: Path) -> list[Path]:
    """Plot what a checkpoint's report.json and metrics.jsonl hold into DIR/plots: training, positions, needles, use of routed heads, attention maps. `draw_bench` has speed.

    Args:
        directory: a checkpoint with report.json; what was not measured is left out.

    Returns:
        The files.

    Raises:
        AttnConvertError: `missing-extra`, `cannot-write`.
    """
    from attnconvert.convert.fidelity import draw_maps

    document = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    evaluation, conversion = document["evaluation"], document.get("conversion", {})
    usage = head_usage(conversion["plan"], conversion.get("heads")) if conversion.get("plan") else []
    metrics, folder = directory / "attnconvert" / "metrics.jsonl", directory / "plots"
    drawings: list[tuple[str, bool, Callable[[Path], object]]] = [
        ("training.png", metrics.is_file() and metrics.stat().st_size > 0, lambda path: draw_training(metrics, path)),
        ("positions.png", bool(evaluation.get("positions")), lambda path: draw_positions(evaluation["positions"], path)),
        ("needles.png", bool(evaluation.get("needles")), lambda path: draw_needles(evaluation["needles"], path)),
        ("heads.png", bool(usage), lambda path: draw_heads(usage, path)),
        ("attention-maps.png", bool((evaluation.get("fidelity") or {}).get("maps")), lambda path: draw_maps(evaluation["fidelity"], path)),
    ]
    drawn = []
    for name, has_data, draw in drawings:
        if has_data:
            folder.mkdir(exist_ok=True)
            draw(folder / name)
            drawn.append(folder / name)
    return drawn


def draw_bench(bench: Mapping[str, Any], folder: Path) -> list[Path]:
    """Plot a benchmark against prompt length: `bench-decode.png`, `bench-prefill.png` (tokens per second), `bench-memory.png`, `bench-cache.png` (bytes).

    Bars show the smallest and the largest repeat. A dotted line marks the length from which the student is better (at the smallest batch
    size), a cross where a series ended for want of memory.

    Args:
        bench: the key `bench` of report.json; anything but `rows` may be missing.
        folder: where the files go; made if need be.

    Returns:
        The files; none when there are no rows.

    Raises:
        AttnConvertError: `missing-extra`, `cannot-write`.
    """
    rows = [row for row in bench.get("rows") or [] if row.get("tokens_per_second")]
    if not rows:
        return []
    where = ", ".join(str(bench[key]) for key in ("device", "dtype") if bench.get(key))
    parts = (
        ("decode", "bench-decode.png", "Decoding speed", "tokens/s, all rows of the batch", "tokens_per_second", _count),
        ("prefill", "bench-prefill.png", "Prefill speed", "tokens/s", "tokens_per_second", _count),
        ("memory", "bench-memory.png", "Peak memory of the prefill", "bytes, weights included", "peak_memory_bytes", _bytes),
        ("cache", "bench-cache.png", "Decode cache after the prompt", "bytes, all rows of the batch", "cache_bytes", _bytes),
    )
    paths = []
    for measure, name, title, y_label, key, label in parts:
        phase = "decode" if measure == "decode" else "prefill"
        chosen = [row for row in rows if row["phase"] == phase and row.get(key)]
        if chosen:
            since = (bench.get("crossover") or {}).get(measure)
            paths.append(_save(_draw_lines(chosen, key, title, where, y_label, label, measure, since, bench.get("stopped") or ()), folder / name))
    return paths


def _draw_lines(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    where: str,
    y_label: str,
    label: Callable[[float], str],
    measure: str,
    since: int | None,
    stopped: Sequence[Mapping[str, Any]],
) -> Figure:
    figure = _figure(5.0)
    axes = figure.add_subplot()
    _dress(axes, title, "prompt length in tokens", y_label)
    if where:
        axes.text(0.0, 1.0, where, transform=axes.transAxes, fontsize=_FONT_SIZE - 2.5, color="#666666", va="bottom")
        axes.set_title(title, loc="left", fontsize=_FONT_SIZE + 2, fontweight="bold", color=_INK, pad=20)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({row["batch_size"] for row in rows})
    colours = _colours(row["model"] for row in rows)
    right = 1.15 * max(row["length"] for row in rows)
    for size in sizes:
        line, marker = _BATCH_STYLES[sizes.index(size) % len(_BATCH_STYLES)]
        for name in dict.fromkeys(row["model"] for row in rows):
            series = sorted((row for row in rows if (row["model"], row["batch_size"]) == (name, size)), key=lambda row: int(row["length"]))
            if not series:
                continue
            xs, ys = [row["length"] for row in series], [row[key] for row in series]
            text = name if len(sizes) == 1 else f"{name}, batch {size}"
            axes.plot(xs, ys, line, marker=marker, color=colours[name], linewidth=2.2, markersize=6, label=text, zorder=3 if name == "student" else 2)
            if key == "tokens_per_second":
                axes.vlines(xs, [row.get(f"{key}_min", row[key]) for row in series], [row.get(f"{key}_max", row[key]) for row in series], color=colours[name])
            ended = [stop for stop in stopped if (stop["model"], stop["batch_size"], stop["reason"]) == (name, size, "out of memory")]
            if ended:
                axes.plot(xs[-1:], ys[-1:], marker="x", color=colours[name], markersize=13, markeredgewidth=2.5, zorder=4)
                axes.annotate(
                    f"out of memory\nat {_tokens(ended[0]['length'])}", (xs[-1], ys[-1]), (11, 0), textcoords="offset points", ha="left", va="center",
                    fontsize=_FONT_SIZE - 2, color=colours[name], linespacing=1.1, bbox=_PAPER, zorder=5,
                )  # fmt: skip
                right = max(right, 2.4 * xs[-1])
    lengths = [row["length"] for row in rows]
    values = [float(row.get(f"{key}{end}", row[key])) for row in rows for end in ("_min", "_max")]
    # wide enough that noise does not fill the picture, and a strip below for the crossover's label
    low, high = min(values) / 1.25, max(values) * 1.25
    if high / low < 4:
        low, high = low / 1.4, high * 1.4
    low /= (high / low) ** (0.14 if since is not None else 0.0)
    axes.set_ylim(low, high)
    axes.set_xlim(min(lengths) / 1.15, right)
    _log_axis(axes.xaxis, min(lengths) / 1.15, right, _tokens, binary=True)
    _log_axis(axes.yaxis, low, high, label, binary=measure in ("cache", "memory"))
    if since is not None:
        better = "smaller" if measure == "cache" else "faster"
        batch = f" (batch {sizes[0]})" if len(sizes) > 1 else ""
        if since <= min(lengths):
            text = f"student {better} at every length{batch}"
        else:
            text = f"student {better} from {_tokens(since)}{batch}"
        axes.axvline(since, color=STUDENT_COLOUR, linestyle=(0, (1, 2)), linewidth=1.8, zorder=1)
        right_half = since * since > min(lengths) * max(lengths)
        axes.annotate(
            text, (since, 0.025), (-6 if right_half else 6, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="right" if right_half else "left", va="bottom", fontsize=_FONT_SIZE - 1, color=STUDENT_COLOUR,
        )  # fmt: skip
    # below the picture, where it can hide nothing
    figure.legend(loc="outside lower center", fontsize=_FONT_SIZE - 1, frameon=False, labelcolor=_INK, ncols=4 if len(sizes) < 3 else 3)
    return figure


# ---------------------------------------------------------------- training


def read_metrics(metrics_jsonl: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Stage -> its lines of metrics.jsonl, in order; a last line that was cut off is left out.

    Raises:
        AttnConvertError: `no-metrics` when the file is missing or has no line with a loss.
    """
    stages: dict[str, list[Mapping[str, Any]]] = {}
    try:
        lines = metrics_jsonl.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the run was killed while it wrote
            continue
        if isinstance(entry, dict) and entry.get("loss") is not None:
            stages.setdefault(str(entry.get("stage", "training")), []).append(entry)
    if not stages:
        raise AttnConvertError("no-metrics", "there are no training curves to draw", where=str(metrics_jsonl), expected="the metrics.jsonl of a conversion")
    return stages


def draw_training(metrics_jsonl: Path, path: Path) -> Path:
    """Plot the loss of each training stage against tokens: every step in a light line, their running mean in a dark one.

    Raises:
        AttnConvertError: `no-metrics`, `missing-extra`, `cannot-write`.
    """
    stages = read_metrics(metrics_jsonl)
    figure = _figure(3.8)
    for number, (stage, entries) in enumerate(stages.items()):
        axes = figure.add_subplot(1, len(stages), number + 1)
        steps = [float(entry.get("tokens") or entry["step"]) for entry in entries]
        losses = [float(entry["loss"]) for entry in entries]
        _dress(axes, stage, "tokens" if entries[0].get("tokens") else "steps", "loss")
        many = len(losses) > 8
        axes.plot(steps, losses, color=STUDENT_COLOUR, alpha=0.3 if many else 1.0, linewidth=1.2 if many else 2.2)
        smooth = _running_mean(losses, max(2, len(losses) // 25)) if many else losses
        axes.plot(steps, smooth, color=STUDENT_COLOUR, linewidth=2.2)
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        if min(losses) > 0 and max(losses) / min(losses) > 8:
            low, high = min(losses) / 1.2, max(losses) * 1.2
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            _log_axis(axes.yaxis, low, high, lambda value: f"{value:g}", binary=False)
        axes.annotate(
            f"{smooth[-1]:#.3g}", (steps[-1], smooth[-1]), (0, 9), textcoords="offset points", ha="right",
            fontsize=_FONT_SIZE - 1, fontweight="bold", color=STUDENT_COLOUR, bbox=_PAPER,
        )  # fmt: skip
    return _save(figure, path)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over `width` values before and after each; fewer at the ends."""
    means = []
    for index in range(len(values)):
        near = values[max(0, index - width) : index + width + 1]
        means.append(sum(near) / len(near))
    return means


# ---------------------------------------------------------------- recall


def draw_needles(needles: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plot recall as heat maps of length by depth, one for each model, side by side; one row of maps for each number of needles.

    A dot marks cells whose needle lies beyond the window.

    Args:
        needles: the key `needles` of an evaluation.
        path: the file.

    Raises:
        AttnConvertError: `nothing-to-draw`, `missing-extra`, `cannot-write`.
    """
    if not needles:
        raise AttnConvertError("nothing-to-draw", "there are no recall figures to draw", expected="the key `needles` of an evaluation")
    names = sorted(dict.fromkeys(str(row["name"]) for row in needles), key=lambda name: {"teacher": 0, "student": 1}.get(name, 2))
    counts = sorted({int(row["num_needles"]) for row in needles})
    lengths = sorted({int(row["length"]) for row in needles})
    depths = sorted({float(row["depth"]) for row in needles})
    figure = _figure(0.9 + len(counts) * (1.1 + 0.42 * len(depths)))
    grid = figure.subplots(len(counts), len(names), squeeze=False, sharex=True, sharey=True)
    image = None
    small = _FONT_SIZE - 1.5 - 0.5 * max(0, len(names) * len(lengths) - 10) / 2
    for row_number, count in enumerate(counts):
        for column, name in enumerate(names):
            axes = grid[row_number][column]
            cells = {(float(row["depth"]), int(row["length"])): row for row in needles if row["name"] == name and row["num_needles"] == count}
            values = [[float(cells[depth, length]["accuracy"]) if (depth, length) in cells else float("nan") for length in lengths] for depth in depths]
            image = axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
            for y, depth in enumerate(depths):
                for x, length in enumerate(lengths):
                    if (depth, length) not in cells:
                        continue
                    accuracy = values[y][x]
                    text = f"{accuracy:.2f}" + (" \u2022" if cells[depth, length].get("beyond_window") else "")
                    axes.text(x, y, text, ha="center", va="center", fontsize=max(6.0, small), color="white" if accuracy < 0.55 else "black")
            if row_number == 0:
                title = textwrap.fill(name, max(10, 56 // len(names)))
                axes.set_title(title, fontsize=_FONT_SIZE, fontweight="bold", color=_INK)
            axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            axes.tick_params(labelsize=_FONT_SIZE - 1.5, colors=_INK, length=0)
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel("depth of the needle" if count == 1 else f"depth of the needle,\none of {count}", fontsize=_FONT_SIZE - 0.5, color=_INK)
            if row_number == len(counts) - 1:
                axes.set_xlabel("length in tokens", fontsize=_FONT_SIZE - 0.5, color=_INK)
    assert image is not None
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.9, pad=0.015)
    bar.set_label("right of ten (chance 0.1)", fontsize=_FONT_SIZE - 1, color=_INK)
    bar.ax.tick_params(labelsize=_FONT_SIZE - 2, colors=_INK, length=0)
    bar.outline.set_visible(False)
    if any(row.get("beyond_window") for row in needles):
        figure.supxlabel("\u2022 the needle lies beyond the window", fontsize=_FONT_SIZE - 2, color="#555555")
    return _save(figure, path)


# ---------------------------------------------------------------- routed heads


def draw_heads(usage: Sequence[tuple[int, Sequence[float], Collection[int]]], path: Path) -> Path:
    """Plot how many tokens use each routed unit as a map of layers by units; shared units, which all tokens use, have a dot.

    Args:
        usage: from `report.head_usage`.
        path: the file.

    Raises:
        AttnConvertError: `missing-extra`, `cannot-write`.
    """
    width = max(len(shares) for _, shares, _ in usage)
    figure = _figure(1.6 + 0.26 * len(usage))
    axes = figure.add_subplot()
    _dress(axes, "Tokens that use each unit (\u2022 shared: all)", "unit", "layer")
    image = axes.imshow([[*shares, *[math.nan] * (width - len(shares))] for _, shares, _ in usage], cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    for y, (_, _, shared) in enumerate(usage):
        for x in shared:
            axes.text(x, y, "\u2022", ha="center", va="center", color="black")
    every = max(1, -(-len(usage) // 16))
    axes.set_yticks(range(0, len(usage), every), [str(idx) for idx, _, _ in usage[::every]])
    axes.set_xticks(range(0, width, max(1, -(-width // 16))))
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015)
    bar.set_label("share of the tokens", fontsize=_FONT_SIZE - 1, color=_INK)
    bar.ax.tick_params(labelsize=_FONT_SIZE - 2, colors=_INK, length=0)
    bar.outline.set_visible(False)
    return _save(figure, path)


# ---------------------------------------------------------------- quality by position


def draw_positions(positions: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plot perplexity by position in the document: as a ratio to the teacher's where there is one, else as it is.

    Args:
        positions: the key `positions` of an evaluation.
        path: the file.

    Raises:
        AttnConvertError: `nothing-to-draw`, `missing-extra`, `cannot-write`.
    """
    has_ratio = any(row.get("ppl_ratio") is not None for row in positions)
    key = "ppl_ratio" if has_ratio else "ppl"
    rows = [row for row in positions if row.get(key) is not None]
    if not rows:
        raise AttnConvertError("nothing-to-draw", "there are no figures by position to draw", expected="the key `positions` of an evaluation")
    figure = _figure(4.2)
    axes = figure.add_subplot()
    title = "Perplexity by position, relative to the teacher" if has_ratio else "Perplexity by position"
    _dress(axes, title, "position in the document, tokens", "perplexity ratio" if has_ratio else "perplexity")
    if has_ratio:
        axes.axhline(1.0, color=TEACHER_COLOUR, linewidth=2.2, label="teacher")
    names = [name for name in dict.fromkeys(str(row["name"]) for row in rows) if not (has_ratio and name == "teacher")]
    colours = _colours(names)
    edges = sorted({int(row["start"]) for row in rows} | {int(row["stop"]) for row in rows})
    highest, lowest = 1.0 if has_ratio else 0.0, 1.0
    for name in names:
        series = sorted((row for row in rows if row["name"] == name), key=lambda row: int(row["start"]))
        values = [float(row[key]) for row in series]
        highest, lowest = max(highest, *values), min(lowest, *values)
        # buckets are drawn as wide as they are, and joined where they meet
        xs = [float(edge) for row in series for edge in (row["start"], row["stop"])]
        ys = [value for value in values for _ in range(2)]
        axes.plot([max(x, 0.5 * edges[1]) for x in xs], ys, color=colours[name], linewidth=2.4, label=name, zorder=3 if name == "student" else 2)
    axes.set_xscale("log")
    low, high = max(edges[0], 0.5 * edges[1]), edges[-1]
    axes.set_xlim(low, high * 1.02)
    _log_axis(axes.xaxis, low, high * 1.02, _tokens, binary=True)
    if has_ratio:
        span = max(highest - lowest, 0.05)
        axes.set_ylim(lowest - 0.1 * span, highest + 0.15 * span)
    axes.legend(fontsize=_FONT_SIZE - 1, framealpha=0.9, edgecolor="none", labelcolor=_INK)
    return _save(figure, path)
