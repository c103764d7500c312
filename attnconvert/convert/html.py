"""`report.html`: the whole report as one page that needs no other file, no script and no network.

The page is read on a phone, on a desktop and on paper, in light and dark. Sections without data are left out. Text that comes from JSON is
escaped at one place: helpers escape every `str` they are given, except `Html`, which only this file makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from attnconvert.convert.report import (
    compact_settings,
    format_bytes,
    format_seconds,
    head_usage,
    kept_shares,
    not_compared,
    ranges,
    same_in_all_heads,
    span_lengths,
)
from attnconvert.convert.svg import NUM_STYLES, Block, Mark, Series, layer_strip, line_chart, png_data_uri, scatter, swatch, token_label
from attnconvert.convert.verdict import row_name
from attnconvert.errors import AttnConvertError

FOLDER = "attnconvert"
"""The subfolder of a checkpoint that holds the record of its making."""

Row = Mapping[str, Any]

_PASSKEY_CHANCE = 0.1
_MAX_POINTS = 300
_DOT = " \u00b7 "
_TIMES = "\u00d7"
_LEVEL_RANK = {"warn": 1, "bad": 2}
_LEVEL_WORDS = {"bad": "Bad", "warn": "Warning"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


# ---------------------------------------------------------------- the two entries


def write_html(directory: Path) -> Path:
    """Write `report.html` beside `report.json`, complete or not at all.

    Args:
        directory: a checkpoint with report.json; of attnconvert/{metrics.jsonl,recipe.yaml,run.json} what is missing is left out of the page.

    Returns:
        The path of the page.

    Raises:
        AttnConvertError: `no-report`, `bad-report`, `cannot-write`.
    """
    from attnconvert.distill.loop import write_atomic

    document = read_report(directory)
    facts = directory / FOLDER
    run = _read_json(facts / "run.json")
    if run is not None:
        made = {key: run[key] for key in ("plan", "stages", "data", "command", "versions", "device") if run.get(key)}
        if isinstance(run.get("seconds"), Mapping):
            made["seconds"] = sum(run["seconds"].values())
        known = {key: value for key, value in _mapping(document.get("conversion")).items() if value is not None}
        document = {**document, "conversion": {**made, **known}}
    metrics = []
    for line in (_read_text(facts / "metrics.jsonl") or "").splitlines():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that was killed
    page = render_html(document, metrics=[row for row in metrics if isinstance(row, Mapping)], recipe_text=_read_text(facts / "recipe.yaml"))
    path = directory / "report.html"
    write_atomic(path, page.encode())
    return path


def read_report(directory: Path) -> dict[str, Any]:
    """The contents of `report.json` of a converted checkpoint.

    Raises:
        AttnConvertError: `not-converted` when the folder is none of a conversion, `no-report` when it was not measured, `bad-report` when
            the file cannot be read.
    """
    path = directory / "report.json"
    if not path.is_file():
        if not any((directory / name).is_file() for name in (f"{FOLDER}/run.json", "attnconvert.json")):
            what = "is not the result of a conversion" if directory.is_dir() else "does not exist"
            raise AttnConvertError(
                "not-converted", f"the folder {str(directory)!r} {what}", expected="a folder that `attnconvert linearize` or `attnconvert convert` wrote"
            )
        raise AttnConvertError(
            "no-report", f"{str(directory)!r} has not been measured yet", where=str(path), hint=f"`attnconvert evaluate-converted {directory}` measures it"
        )
    document = _read_json(path)
    if document is None or not isinstance(document.get("evaluation"), Mapping) or not isinstance(document.get("conversion"), Mapping):
        raise AttnConvertError(
            "bad-report",
            f"'{path.name}' is not a report of attnconvert",
            where=str(path),
            expected="JSON with the keys conversion and evaluation",
            hint=f"`attnconvert evaluate-converted {directory}` writes it anew",
        )
    return dict(document)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _read_json(path: Path) -> Mapping[str, Any] | None:
    try:
        value = json.loads(_read_text(path) or "")
    except ValueError:
        return None
    return value if isinstance(value, Mapping) else None


def render_html(document: Mapping[str, Any], *, metrics: Sequence[Row] = (), recipe_text: str | None = None) -> str:
    """The page.

    Args:
        document: the contents of report.json; keys that are missing or empty leave their part of the page out.
        metrics: the lines of metrics.jsonl.
        recipe_text: the recipe as YAML; None = the resolved recipe in the document, if there is one.
    """
    conversion, evaluation, bench = (_mapping(document.get(key)) for key in ("conversion", "evaluation", "bench"))
    findings = _rows(evaluation, "findings")
    styles = _variant_styles(evaluation)
    base = conversion.get("base_model")
    title = f"{base}, converted" if base else "Conversion report"
    sections = [
        ("converted", "What was converted", _converted(conversion)),
        ("training", "Training", _training(conversion, metrics)),
        ("quality", "Quality", _quality(evaluation, findings)),
        ("tasks", "Tasks", _tasks(evaluation, findings)),
        ("positions", "Quality by position", _positions(evaluation, findings, styles)),
        ("recall", "Recall", _recall(evaluation, findings, styles)),
        ("fidelity", "Attention compared", _fidelity(evaluation, findings)),
        ("memory", "Decode cache", _state(evaluation, findings, styles)),
        ("speed", "Speed and memory", _bench(bench, styles)),
        ("generation", "Text side by side", _generation(evaluation)),
        ("limits", "What these figures do not say", _limits(conversion, evaluation)),
        ("provenance", "How it was made", _provenance(conversion, evaluation, recipe_text)),
    ]
    shown = [(ident, heading, body) for ident, heading, body in sections if body]
    links = "".join(f'<li><a href="#{ident}">{escape(heading)}</a></li>' for ident, heading, _ in shown)
    body = [
        f"<header><h1>{escape(title)}</h1>{_subtitle(conversion)}</header>",
        _cards(conversion, evaluation, bench),
        _findings(evaluation, findings),
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(shown) > 2 else "",
        *(f'<section id="{ident}" aria-labelledby="{ident}-h"><h2 id="{ident}-h">{escape(heading)}</h2>{text}</section>' for ident, heading, text in shown),
        "<footer>Every figure in full precision: <code>report.json</code>, in the same folder.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- values


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(parent: Mapping[str, Any], key: str) -> list[Row]:
    value = parent.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, (list, tuple)) else []


def _f(value: object) -> float:
    """A figure, NaN when there is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _figure(value: object, digits: int) -> str:
    """`17.28`; `-` for a figure that is missing or not finite."""
    number = _f(value)
    if not math.isfinite(number):
        return "-"
    return f"{number:.3g}" if abs(number) >= 1e5 else f"{number:,.{digits}f}"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _whole(value: object) -> str:
    number = _f(value)
    return f"{number:,.0f}" if math.isfinite(number) else "-"


def _bytes(value: object) -> str:
    number = _f(value)
    return format_bytes(number) if math.isfinite(number) else "-"


def _seconds(value: object) -> str:
    number = _f(value)
    return format_seconds(number) if math.isfinite(number) else "-"


def _percent(value: object) -> str:
    number = _f(value)
    return f"{100 * number:.1f} %" if math.isfinite(number) else "-"


def _pair(value: object) -> tuple[float, float] | None:
    """An interval with two finite ends."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(math.isfinite(_f(end)) for end in value):
        return _f(value[0]), _f(value[1])
    return None


def _with_interval(value: object, ci95: object, digits: int) -> Html:
    pair = _pair(ci95)
    text = escape(_figure(value, digits))
    return Html(f'{text} <span class="ci">[{_figure(pair[0], digits)}, {_figure(pair[1], digits)}]</span>' if pair else text)


def _estimate(value: object, digits: int) -> Html:
    """An Estimate as JSON: its value and interval."""
    estimate = _mapping(value)
    return _with_interval(estimate.get("value"), estimate.get("ci95"), digits)


def _names(*lists: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["name"]) for rows in lists for row in rows if row.get("name") is not None))


def _variant_styles(evaluation: Mapping[str, Any]) -> dict[str, int]:
    """Model name -> series style, the same in every chart: teacher 0, student 1, then the others in order."""
    names = _names(*(_rows(evaluation, key) for key in ("quality", "positions", "passkey", "needles", "mqar")))
    others = [name for name in names if name not in ("teacher", "student")]
    return {"teacher": 0, "student": 1, **{name: 2 + index % (NUM_STYLES - 2) for index, name in enumerate(others)}}


def _level(findings: Sequence[Row], section: str, row: Row) -> str:
    """The worst level among the findings about this row of a section; empty when there is none."""
    try:
        name = row_name(section, row)
    except KeyError:
        return ""
    return _worst(*(str(finding.get("level")) for finding in findings if finding.get("section") == section and finding.get("row") == name))


def _worst(*levels: str) -> str:
    return max((level for level in levels if level in _LEVEL_RANK), key=lambda level: _LEVEL_RANK[level], default="")


# ---------------------------------------------------------------- building blocks


def _e(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, levels: Sequence[str] = (), text: Sequence[int] = ()) -> str:
    """A table in a box that scrolls.

    Args:
        caption: what it shows; also the name of the scroll box.
        columns: headings.
        rows: cells; the first of each row is its heading.
        levels: per row `bad`, `warn` or empty.
        text: columns that hold text, not figures; the first always does.
    """

    def kind(index: int) -> str:
        return ' class="text"' if index in text else ""

    head = "".join(f'<th scope="col"{kind(index)}>{_e(column)}</th>' for index, column in enumerate(columns))
    body = []
    for number, cells in enumerate(rows):
        level = levels[number] if levels else ""
        first = f'<th scope="row">{_e(cells[0])}{_tag(level)}</th>'
        rest = "".join(f"<td{kind(index)}>{_e(cell)}</td>" for index, cell in enumerate(cells[1:], start=1))
        body.append(f"<tr{f' class={chr(34)}{level}{chr(34)}' if level else ''}>{first}{rest}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _tag(level: str) -> str:
    return f' <span class="tag {level}">{_LEVEL_WORDS[level]}</span>' if level else ""


def _figure_box(title: str, chart: str, *, legend: Sequence[tuple[int, str]] = (), note: str = "") -> str:
    """A chart with its title above, and the legend between them."""
    entries = "".join(f"<li>{swatch(style)}{escape(name)}</li>" for style, name in legend)
    legend_text = f'<ul class="legend">{entries}</ul>' if entries else ""
    note_text = f'<p class="small">{_e(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend_text}{chart}{note_text}</figure>"


def _figures(boxes: Sequence[str]) -> str:
    shown = [box for box in boxes if box]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def _p(text: str) -> str:
    return f"<p>{_e(text)}</p>"


def _lengths_chart(
    title: str,
    rows: Sequence[Row],
    styles: Mapping[str, int],
    *,
    x: str,
    y: str,
    x_label: str,
    y_label: str,
    name: str = "name",
    y_scale: str = "linear",
    y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
    divide: float = 1.0,
    label_of: Callable[[float], str] = token_label,
    note: str = "",
) -> str:
    """A line per model over lengths (or another count that doubles), with whiskers where the rows have ci95; empty without a point.

    Args:
        title: above the chart.
        rows: one per model and length.
        styles: model -> style.
        x: key of the count, > 0.
        y: key of the figure.
        x_label: beneath the axis.
        y_label: above the axis.
        name: key of the model's name.
        y_scale: `linear` or `log`.
        y_range: limits of the y axis.
        marks: reference lines.
        divide: divisor of the figures, for units.
        label_of: text of a tick.
        note: beneath the chart.
    """
    series = []
    for who in dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None):
        own = sorted((row for row in rows if str(row.get(name)) == who and _f(row.get(x)) > 0 and math.isfinite(_f(row.get(y)))), key=lambda row: _f(row[x]))
        if own:
            points = [(_f(row[x]), _f(row[y]) / divide) for row in own]
            intervals = [_pair(row.get("ci95")) for row in own]
            series.append(Series(who, styles.get(who, NUM_STYLES - 1), points, intervals if any(intervals) else ()))
    if not any(y_scale == "linear" or value > 0 for one in series for _, value in one.points):
        return ""
    counts = sorted({value for one in series for value, _ in one.points})
    ends = "; ".join(
        f"{one.name} {one.points[0][1]:.3g} at {label_of(one.points[0][0])}, {one.points[-1][1]:.3g} at {label_of(one.points[-1][0])}" for one in series
    )
    chart = line_chart(
        f"{title}. {ends}",
        series,
        x_label=x_label,
        y_label=y_label,
        x_scale="log",
        y_scale="log" if y_scale == "log" else "linear",
        y_range=y_range,
        x_ticks=[(count, label_of(count)) for count in counts],
        marks=marks,
    )
    return _figure_box(title, chart, legend=[(one.style, one.name) for one in series], note=note)


# ---------------------------------------------------------------- top of the page


def _subtitle(conversion: Mapping[str, Any]) -> str:
    recipe = _mapping(conversion.get("recipe"))
    name = conversion.get("recipe_name") or recipe.get("name")
    parts = []
    if name:
        parts.append(f"Recipe <code>{escape(str(name))}</code>" + (f": {escape(str(recipe['description']))}" if recipe.get("description") else ""))
    reference = str(recipe.get("reference") or "")
    if reference.startswith("https://"):
        parts.append(f'method described in <a href="{escape(reference)}" rel="noreferrer">{escape(reference.removeprefix("https://"))}</a>')
    return f'<p class="lead">{_DOT.join(parts)}</p>' if parts else ""


def _card(name: str, value: str, detail: str, unit: str = "") -> str:
    unit_text = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<div class="card"><dt>{escape(name)}</dt><dd><span class="value">{escape(value)}{unit_text}</span><span class="detail">{_e(detail)}</span></dd></div>'
    )


def _cards(conversion: Mapping[str, Any], evaluation: Mapping[str, Any], bench: Mapping[str, Any]) -> str:
    by_name = {str(row.get("name")): row for row in _rows(evaluation, "quality")}
    student, teacher = by_name.get("student", {}), by_name.get("teacher", {})
    cards = []

    def interval(key: str, digits: int) -> str:
        pair = _pair(_mapping(student.get(key)).get("ci95"))
        return f"95 % interval {pair[0]:.{digits}f} to {pair[1]:.{digits}f}" if pair else ""

    def value(row: Row, key: str) -> float:
        return _f(_mapping(row.get(key)).get("value"))

    if math.isfinite(value(student, "ppl_ratio")):
        pair = f"{_figure(value(student, 'ppl'), 2)} against the original's {_figure(value(teacher, 'ppl'), 2)}"
        cards.append(_card("Perplexity", f"{_TIMES} {_figure(value(student, 'ppl_ratio'), 3)}", "; ".join(filter(None, (pair, interval("ppl_ratio", 3))))))
    elif math.isfinite(value(student, "ppl")):
        cards.append(_card("Perplexity", _figure(value(student, "ppl"), 2), "the original was not measured"))
    if math.isfinite(value(student, "kl")):
        cards.append(_card("KL to the original", _figure(value(student, "kl"), 3), interval("kl", 3), "nats/token"))
    if math.isfinite(value(student, "agreement")):
        pair95 = _pair(_mapping(student.get("agreement")).get("ci95"))
        text = f"; 95 % interval {_percent(pair95[0])} to {_percent(pair95[1])}" if pair95 else ""
        cards.append(_card("Same next token", _percent(value(student, "agreement")), f"of positions{text}"))
    passkey = [row for row in _rows(evaluation, "passkey") if math.isfinite(_f(row.get("accuracy"))) and math.isfinite(_f(row.get("length")))]
    own = [row for row in passkey if row.get("name") == "student"]
    if own:
        last = max(own, key=lambda row: _f(row["length"]))
        others = {row.get("name"): row for row in passkey if row["length"] == last["length"]}
        compared = f"; the original {_figure(others['teacher']['accuracy'], 2)}" if "teacher" in others else ""
        cards.append(_card("Passkey found", _figure(last["accuracy"], 2), f"at {_whole(last['length'])} tokens{compared}; chance 0.10"))
    state = [row for row in _rows(evaluation, "state_bytes") if _f(row.get("student")) > 0 and _f(row.get("teacher")) > 0]
    if state:
        last = max(state, key=lambda row: _f(row.get("length")))
        ratio = _f(last["teacher"]) / _f(last["student"])
        name, shown = ("Cache smaller by", ratio) if ratio >= 1 else ("Cache larger by", 1 / ratio)
        text = f"at {_whole(last.get('length'))} tokens: {_bytes(last['student'])} instead of {_bytes(last['teacher'])}"
        cards.append(_card(name, f"{_TIMES} {_figure(shown, 2)}", text))
    speed = decode_speed(bench)
    if speed is not None:
        length, batch_size, before, after = speed
        text = f"at {length:,} tokens, batch {batch_size}: {_figure(after, 1)} instead of {_figure(before, 1)} tokens/s"
        name, ratio = ("Decoding faster by", after / before) if after >= before else ("Decoding slower by", before / after)
        cards.append(_card(name, f"{_TIMES} {_figure(ratio, 2)}", text + (f", {bench['device']}" if bench.get("device") else "")))
    seconds = _f(conversion.get("seconds"))
    tokens = total_tokens(conversion)
    if math.isfinite(seconds) or tokens:
        facts = [f"{tokens:,} training tokens" if tokens else "", f"on {conversion['device']}" if conversion.get("device") else ""]
        cards.append(_card("Cost", _seconds(seconds), ", ".join(filter(None, facts))))
    return f'<dl class="cards">{"".join(cards)}</dl>' if cards else ""


def total_tokens(conversion: Mapping[str, Any]) -> int:
    """Training tokens of all stages, 0 when unknown."""
    return sum(int(_f(stage.get("tokens"))) for stage in _rows(conversion, "stages") if math.isfinite(_f(stage.get("tokens"))))


def decode_speed(bench: Mapping[str, Any]) -> tuple[int, int, float, float] | None:
    """(length, batch_size, teacher's tokens/s, student's) of decoding at the longest length, and there at the smallest batch, that both have."""
    speeds: dict[tuple[int, int], dict[str, float]] = {}
    for row in _rows(bench, "rows"):
        speed, length, batch_size = (_f(row.get(key)) for key in ("tokens_per_second", "length", "batch_size"))
        if row.get("phase") == "decode" and speed > 0 and length > 0 and batch_size > 0 and math.isfinite(speed):
            speeds.setdefault((int(length), int(batch_size)), {})[str(row.get("model"))] = speed
    both = [key for key, found in speeds.items() if {"teacher", "student"} <= found.keys()]
    if not both:
        return None
    length, batch_size = max(both, key=lambda key: (key[0], -key[1]))
    found = speeds[length, batch_size]
    return length, batch_size, found["teacher"], found["student"]


def _findings(evaluation: Mapping[str, Any], findings: Sequence[Row]) -> str:
    if "findings" not in evaluation:
        return ""
    ordered = sorted((row for row in findings if row.get("level") in _LEVEL_WORDS), key=lambda row: -_LEVEL_RANK[str(row["level"])])
    if not ordered:
        return '<p class="finding none">The automatic checks found nothing out of order.</p>'
    items = []
    for row in ordered:
        level = str(row["level"])
        place = ", ".join(escape(str(row[key])) for key in ("section", "row") if row.get(key))
        place_text = f'<span class="place">{place}</span>' if place else ""
        items.append(f'<li class="finding {level}"><span class="tag {level}">{_LEVEL_WORDS[level]}</span> {escape(str(row.get("text", "")))} {place_text}</li>')
    return f'<ul class="findings" aria-label="Findings">{"".join(items)}</ul>'


# ---------------------------------------------------------------- what was converted, training


def _layer_errors(conversion: Mapping[str, Any]) -> dict[int, float]:
    """Relative error of each layer's attention output, from the last stage that measured it."""
    for stage in reversed(_rows(conversion, "stages")):
        errors = {int(layer): _f(error) for layer, error in _mapping(stage.get("layer_errors")).items() if str(layer).isdecimal()}
        if errors:
            return errors
    return {}


def _converted(conversion: Mapping[str, Any]) -> str:
    layers = _rows(_mapping(conversion.get("plan")), "layers")
    if not layers:
        return ""
    errors = _layer_errors(conversion)
    kinds: dict[tuple[str | None, str], list[tuple[int, Row]]] = {}
    for position, row in enumerate(layers):
        index = int(_f(row["layer_idx"])) if math.isfinite(_f(row.get("layer_idx"))) else position
        method = None if row.get("method") is None else str(row["method"])
        kinds.setdefault((method, compact_settings(same_in_all_heads(_mapping(row.get("config"))))), []).append((index, row))
    methods = list(dict.fromkeys(method for method, _ in kinds if method is not None))
    letters: dict[tuple[str | None, str], str] = {}
    for kind in kinds:
        free = [letter for letter in f"{kind[0] or ''}abcdefghijklmnopqrstuvwxyz" if letter.isalpha() and letter not in letters.values()]
        letters[kind] = "S" if kind[0] is None else (free[0] if free else "?")

    def style(method: str | None) -> int | None:
        return None if method is None else 1 + methods.index(method) % (NUM_STYLES - 1)

    blocks, table = [], []
    placed = sorted(((index, row, kind) for kind, members in kinds.items() for index, row in members), key=lambda item: item[0])
    for index, row, kind in placed:
        method, settings = kind
        error = errors.get(index, math.nan)
        has_bar = method is not None and math.isfinite(error)
        reason = str(row.get("reason") or "")
        what = method if method is not None else "softmax, kept"
        shown = [f"layer {index}: {what}", settings, reason, f"relative error {error:.3g}" if has_bar else ""]
        blocks.append(Block(letters[kind], style(method), "; ".join(filter(None, shown)), error if has_bar else None))
        table.append((index, what, settings or "-", _figure(error if has_bar else None, 4), reason or "-"))
    num_kept = sum(row.get("method") is None for row in layers)
    entries = []
    for (method, settings), members in kinds.items():
        colour = style(method)
        box = '<span class="box kept" aria-hidden="true">S</span>'
        if colour is not None:
            box = f'<span class="box s{colour}" aria-hidden="true">{escape(letters[method, settings])}</span>'
        reasons = sorted({str(row["reason"]) for _, row in members if row.get("reason")})
        why = f' <span class="small">Why: {escape("; ".join(reasons))}.</span>' if method is None and reasons else ""
        settings_text = f' <span class="settings">{escape(settings)}</span>' if settings else ""
        name = "softmax attention, kept as it was" if method is None else method
        where = f"{len(members)} of {len(layers)} layers: {ranges([index for index, _ in members])}"
        entries.append(f"<li>{box}<div><strong>{escape(name)}</strong> <span>{escape(where)}.</span>{why}{settings_text}</div></li>")
    kind_of_model = conversion.get("base_model_type") or _mapping(conversion.get("plan")).get("base_model_type")
    intro = f"{len(layers) - num_kept} of {len(layers)} attention layers" + (f" of a {kind_of_model} model" if kind_of_model else "") + " got cheaper attention"
    intro += f"; {num_kept} kept softmax." if num_kept else "; none kept softmax."
    bars = any(block.bar is not None for block in blocks)
    if bars:
        intro += " The bars show how far a layer's attention output is from the original's after attention transfer, before any finetuning (0 = the same, 1 = as far as zero)."
    chart = layer_strip(intro, blocks, y_label="relative error after transfer" if bars else "")
    strip = _figure_box("Layer by layer", chart)
    return (
        _p(intro)
        + f'<div class="figures">{strip}<ul class="kinds">{"".join(entries)}</ul></div>'
        + _details("Table of layers", _table("Layers", ("layer", "attention", "settings", "relative error", "why"), table, text=(1, 2, 4)))
        + _spans(layers, _mapping(conversion.get("search")))
        + _heads(_mapping(conversion.get("plan")), _mapping(conversion.get("heads")))
    )


def _spans(layers: Sequence[Row], search: Mapping[str, Any]) -> str:
    """What every KV head keeps, layers down and heads across, as a table whose cells are shaded; at the longest length that was searched."""
    try:
        length = span_lengths(search)[-1]
        rows = [(row, shares) for row in layers if row.get("method") is not None and (shares := kept_shares(row, length))]
    except (AttributeError, KeyError, TypeError, ValueError):  # a report that lacks something shows the rest
        return ""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{head}</th>' for head in range(max(len(shares) for _, shares in rows)))
    body = []
    for row, shares in rows:
        cells = []
        for at, share in enumerate(shares):
            tip = f"layer {_text(row.get('layer_idx'))}, KV head {at}: {share:.0%} of the keys after {length:,} tokens"
            cells.append(f'<td{" class=on" if share > 0.85 else ""} style="--v:{share:.2f}" title="{escape(tip)}">{100 * share:.0f}</td>')
        body.append(f'<tr><th scope="row">{_text(row.get("layer_idx"))}</th>{"".join(cells)}</tr>')
    mean = sum(sum(shares) for _, shares in rows) / sum(len(shares) for _, shares in rows)
    caption = f"Attention spans: keys that each KV head keeps after {length:,} tokens, in % (mean {mean:.0%})"
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="heat"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">layer \\ KV head</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div></figure>'
    )


def _heads(plan: Mapping[str, Any], heads: Mapping[str, Any]) -> str:
    """How many tokens use each unit of routed heads, layers down and units across, as a table whose cells are shaded."""
    try:
        layers = head_usage(plan, heads)
    except (AttributeError, KeyError, TypeError, ValueError):  # a report that lacks something shows the rest
        return ""
    if not layers:
        return ""
    width = max(len(shares) for _, shares, _ in layers)
    head = "".join(f'<th scope="col">{unit}</th>' for unit in range(width))
    body = []
    for idx, shares, shared in layers:
        cells = []
        for unit, share in enumerate(shares):
            tip = f"layer {idx}, unit {unit}: used by {share:.1%} of the tokens" + (", as by all" if unit in shared else "")
            mark = "*" if unit in shared else ""
            cells.append(f'<td{" class=on" if share > 0.85 else ""} style="--v:{share:.2f}" title="{escape(tip)}">{100 * share:.0f}{mark}</td>')
        body.append(f'<tr><th scope="row">{idx}</th>{"".join(cells)}</tr>')
    mean = sum(sum(shares) for _, shares, _ in layers) / sum(len(shares) for _, shares, _ in layers)
    caption = f"Routed heads: held-out tokens that use each unit, in % (* = shared, used by all; mean {mean:.0%}, the rest is skipped)"
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="heat"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">layer \\ unit</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div></figure>'
    )


_STAGE_TITLES = {"transfer": "Attention transfer", "finetune": "Finetuning"}
_METRICS = (("loss", "loss", "loss"), ("kl", "KL to the original", "nats/token"), ("balance", "balance of the routed heads", "1 = all alike"))


def _training(conversion: Mapping[str, Any], metrics: Sequence[Row]) -> str:
    stages = list(dict.fromkeys(str(row.get("stage")) for row in metrics if row.get("stage")))
    boxes = []
    for stage in stages:
        for key, name, unit in _METRICS:
            points = [(_f(row.get("tokens")), _f(row.get(key))) for row in metrics if row.get("stage") == stage and math.isfinite(_f(row.get("tokens")))]
            boxes.append(_curve(f"{_STAGE_TITLES.get(stage, stage)}: {name}", points, unit))
    text = "Pale: every logged step, cut off at the frame. Bold: the mean over the steps around it." if any(boxes) else ""
    rows = [_stage_cells(stage) for stage in _rows(conversion, "stages")]
    table = _table("Stages", ("stage", "tokens", "steps", "time", "tokens/s", "final loss", "peak memory"), rows) if rows else ""
    return (table + _figures(boxes) + (f'<p class="small">{text}</p>' if text else "")) if rows or any(boxes) else ""


def _curve(title: str, points: Sequence[tuple[float, float]], unit: str) -> str:
    """Raw and smoothed values over training tokens; empty with fewer than two finite points."""
    finite = sorted((x, y) for x, y in points if math.isfinite(y))
    if len(finite) < 2:
        return ""
    half = max(3, len(finite) // 40)
    smooth = []
    for index in range(len(finite)):
        # At the start the loss falls fast, and only equally many steps on both sides leave it where it was; at the end noise is what matters.
        reach = min(half, index)
        around = [y for _, y in finite[index - reach : index + reach + 1]]
        smooth.append((finite[index][0], sum(around) / len(around)))
    values = [y for _, y in smooth]
    log = min(values) > 0 and max(values) > 20 * min(values)
    chart = line_chart(
        f"{title}, from {values[0]:.3g} to {values[-1]:.3g} over {finite[-1][0]:,.0f} tokens",
        [Series("every step", 1, _thin(finite), faint=True, markers=False), Series("smoothed", 1, _thin(smooth), markers=False)],
        x_label="training tokens",
        y_label=unit + (" (log)" if log else ""),
        y_scale="log" if log else "linear",
    )
    return _figure_box(title, chart)


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most _MAX_POINTS of them, evenly spread, the last one included."""
    if len(points) <= _MAX_POINTS:
        return points
    return [points[round(index * (len(points) - 1) / (_MAX_POINTS - 1))] for index in range(_MAX_POINTS)]


def _stage_cells(stage: Row) -> tuple[object, ...]:
    name = _STAGE_TITLES.get(str(stage.get("stage")), str(stage.get("stage", "-")))
    if stage.get("skipped"):
        return (name, f"skipped: {stage['skipped']}", "-", "-", "-", "-", "-")
    return (
        name,
        _whole(stage.get("tokens")),
        _whole(stage.get("steps")),
        _seconds(stage.get("seconds")),
        _whole(stage.get("tokens_per_second")),
        _figure(stage.get("final_loss"), 4),
        _bytes(stage.get("peak_memory_bytes")),
    )


# ---------------------------------------------------------------- quality


def _label(row: Row) -> str:
    return f"student, {row.get('name')}" if row.get("kind") == "ablation" else _text(row.get("name"))


def _quality(evaluation: Mapping[str, Any], findings: Sequence[Row]) -> str:
    quality = _rows(evaluation, "quality")
    if not quality:
        return ""
    rows = [
        (_label(row), _estimate(row.get("ppl"), 2), _estimate(row.get("ppl_ratio"), 3), _estimate(row.get("kl"), 4), _estimate(row.get("agreement"), 4))
        for row in quality
    ]
    levels = [_worst(*(_level(findings, section, row) for section in ("quality", "ablation"))) for row in quality]
    tokens = f"{_whole(evaluation.get('num_tokens'))} tokens of held-out text in {_whole(evaluation.get('num_rows'))} rows of {_whole(evaluation.get('row_length'))}. "
    text = tokens if math.isfinite(_f(evaluation.get("num_tokens"))) else ""
    text += "In brackets the 95 % interval from resampling rows. KL and agreement are against the teacher (the original model) at every position."
    if any(row.get("kind") == "ablation" for row in quality):
        text += " An ablation is the student with one part switched off and nothing retrained: the difference is what that part does."
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in evaluation.get("notes") or ())
    return (
        _p(text)
        + _table("Quality on held-out text", ("model", "perplexity", "ratio to teacher", "KL, nats/token", "top-1 agreement"), rows, levels=levels)
        + (f'<ul class="small">{notes}</ul>' if notes else "")
    )


def _tasks(evaluation: Mapping[str, Any], findings: Sequence[Row]) -> str:
    tasks = _rows(evaluation, "tasks")
    if not tasks:
        return ""

    def with_error(row: Row, who: str) -> str:
        error = _f(row.get(f"{who}_se"))
        return _figure(row.get(who), 4) + (f" \u00b1 {1.96 * error:.4f}" if math.isfinite(error) and math.isfinite(_f(row.get(who))) else "")

    def difference(row: Row) -> str:
        gap = _f(row.get("student")) - _f(row.get("teacher"))
        return f"{gap:+.4f}" if math.isfinite(gap) else "-"

    rows = [
        (
            _text(row.get("task")),
            _text(row.get("metric")),
            _whole(row.get("num_fewshot")),
            _whole(row.get("num_samples")),
            with_error(row, "teacher"),
            with_error(row, "student"),
            difference(row),
            _figure(row.get("chance"), 2),
        )
        for row in tasks
    ]
    levels = [_level(findings, "tasks", row) for row in tasks]
    columns = ("task", "metric", "examples shown", "questions", "teacher", "student", "difference", "chance")
    return _p("Scores of lm-evaluation-harness; \u00b1 is the 95 % interval.") + _table("Tasks", columns, rows, levels=levels, text=(1,))


def _positions(evaluation: Mapping[str, Any], findings: Sequence[Row], styles: Mapping[str, int]) -> str:
    positions = [
        row
        for row in _rows(evaluation, "positions")
        if row.get("name") is not None and math.isfinite(_f(row.get("start"))) and math.isfinite(_f(row.get("stop")))
    ]
    if not positions:
        return ""
    buckets = sorted({(_f(row["start"]), _f(row["stop"])) for row in positions})
    place = {bucket: index for index, bucket in enumerate(buckets)}
    boxes = []
    for key, title, unit in (
        ("ppl", "Perplexity", "perplexity"),
        ("ppl_ratio", "Perplexity against the teacher's", "ratio"),
        ("kl", "KL to the teacher", "nats/token"),
    ):
        series = []
        for name in _names(positions):
            own = sorted((place[_f(row["start"]), _f(row["stop"])], _f(row.get(key))) for row in positions if row.get("name") == name)
            points = [(float(index), value) for index, value in own if math.isfinite(value)]
            if points and not (key == "ppl_ratio" and name == "teacher"):
                series.append(Series(name, styles.get(name, NUM_STYLES - 1), points))
        if series:
            chart = line_chart(
                f"{title} by position in the document: " + "; ".join(f"{one.name} {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}" for one in series),
                series,
                x_label="position in the document, up to token",
                y_label=unit,
                x_ticks=[(float(index), token_label(stop)) for index, (_, stop) in enumerate(buckets)],
                marks=[Mark("y", 1.0, "")] if key == "ppl_ratio" else (),
            )
            boxes.append(_figure_box(title, chart, legend=[(one.style, one.name) for one in series]))
    rows, levels = [], []
    for row in sorted(positions, key=lambda row: (place[_f(row["start"]), _f(row["stop"])],)):
        bucket = f"{_whole(row['start'])} to {_whole(row['stop'])}"
        name = str(row.get("name"))
        figures = (_whole(row.get("num_tokens")), _figure(row.get("ppl"), 2), _figure(row.get("ppl_ratio"), 3), _figure(row.get("kl"), 4))
        rows.append((bucket, name, *figures))
        levels.append(_level(findings, "positions", row) if name == "student" else "")
    table = _table("Quality by position", ("tokens", "model", "scored", "perplexity", "ratio", "KL"), rows, levels=levels, text=(1,))
    text = "Later tokens have more to look back on. Where a curve rises above the teacher's with the position, the model is losing what lies far back. A dashed line stands for the teacher."
    return _p(text) + _figures(boxes) + _details("Figures", table)


# ---------------------------------------------------------------- recall


def _recall(evaluation: Mapping[str, Any], findings: Sequence[Row], styles: Mapping[str, int]) -> str:
    parts = [_passkey(evaluation, findings, styles), _needles(evaluation, findings), _mqar(evaluation, findings, styles)]
    return "".join(parts)


def _passkey(evaluation: Mapping[str, Any], findings: Sequence[Row], styles: Mapping[str, int]) -> str:
    rows = [row for row in _rows(evaluation, "passkey") if row.get("name") is not None and _f(row.get("length")) > 0]
    if not rows:
        return ""
    marks = [Mark("y", _PASSKEY_CHANCE, "chance")]
    window = _f(evaluation.get("window"))
    if window > 0:
        marks.append(Mark("x", window, f"window {window:.0f}"))
    chart = _lengths_chart(
        "Passkey found",
        rows,
        styles,
        x="length",
        y="accuracy",
        x_label="tokens of the prompt (k = 1024)",
        y_label="share of prompts",
        y_range=(0.0, 1.0),
        marks=marks,
    )
    lengths = sorted({_f(row["length"]) for row in rows})
    names = _names(rows)
    table, levels = [], []
    for length in lengths:
        here = {str(row.get("name")): row for row in rows if _f(row["length"]) == length}
        first = next(iter(here.values()))
        cells = [_with_interval(here[name].get("accuracy"), here[name].get("ci95"), 2) if name in here else "-" for name in names]
        table.append((_whole(length), *cells, _distance(first)))
        levels.append(_level(findings, "passkey", first))
    trials = next((f"; {_whole(row['num_trials'])} prompts per length" for row in rows if row.get("num_trials")), "")
    text = (
        "A five-digit key is hidden in plain filler text and asked for at the end. A prompt counts when the right key is the most likely of ten "
        f"(chance 0.10){trials}. Whiskers and brackets are 95 % intervals. Only lengths marked beyond the window need memory outside the exact window."
    )
    columns = ("tokens", *names, "how far back the key is")
    figures = _table("Passkey found, share of prompts", columns, table, levels=levels, text=(len(columns) - 1,))
    # With more than three models the table needs the width of the page.
    beside = f'<div class="beside">{figures}</div>' if len(names) <= 3 else ""
    return "<h3>Passkey</h3>" + _p(text) + f'<div class="figures">{chart}{beside}</div>' + ("" if beside else figures)


def _distance(row: Row) -> str:
    pair = _pair(row.get("distance"))
    beyond = row.get("beyond_window")
    reach = "beyond the window" if beyond is True else "within reach of the window" if beyond is False else ""
    back = "" if pair is None else f"{pair[0]:.0f} to {pair[1]:.0f} back" if pair[1] > pair[0] else f"{pair[0]:.0f} back"
    return ", ".join(filter(None, (back, reach))) or "-"


def _needles(evaluation: Mapping[str, Any], findings: Sequence[Row]) -> str:
    rows = [
        row
        for row in _rows(evaluation, "needles")
        if row.get("name") is not None and math.isfinite(_f(row.get("length"))) and math.isfinite(_f(row.get("depth")))
    ]
    if not rows:
        return ""
    parts = ["<h3>Needles by length and depth</h3>"]
    text = (
        "Share of questions about a hidden fact answered right (chance 0.10). Depth is where in the text the fact lies: 0 is the start, 1 the end. "
        "The stronger the shade, the better; a dot marks places within reach of the exact window, where no other memory is needed."
    )
    parts.append(_p(text))
    for count in sorted({_f(row.get("num_needles")) for row in rows if math.isfinite(_f(row.get("num_needles")))}) or [math.nan]:
        own = [row for row in rows if _f(row.get("num_needles")) == count or math.isnan(count)]
        if math.isfinite(count):
            parts.append(f"<h4>{'One fact hidden' if count == 1 else f'{count:.0f} facts hidden'}</h4>")
        parts.append(_figures([_heat_map(name, [row for row in own if row.get("name") == name], findings) for name in _names(own)]))
    return "".join(parts)


def _heat_map(name: str, rows: Sequence[Row], findings: Sequence[Row]) -> str:
    """Recall by length (columns) and depth (rows) as a table whose cells are shaded: every figure can be read, by a screen reader too."""
    lengths = sorted({_f(row["length"]) for row in rows})
    depths = sorted({_f(row["depth"]) for row in rows})
    cells = {(_f(row["length"]), _f(row["depth"])): row for row in rows}
    levels = {
        length: _worst(*(_level(findings, "needles", row) for row in rows if _f(row["length"]) == length)) if name == "student" else "" for length in lengths
    }
    head = "".join(f'<th scope="col">{token_label(length)}{_tag(levels[length])}</th>' for length in lengths)
    body = []
    for depth in depths:
        line = [f'<th scope="row">{depth:.2f}</th>']
        for length in lengths:
            row = cells.get((length, depth))
            share = _f(row.get("accuracy")) if row is not None else math.nan
            if row is None or not math.isfinite(share):
                line.append("<td>-</td>")
                continue
            pair = _pair(row.get("ci95"))
            more = f", 95 % {pair[0]:.2f} to {pair[1]:.2f}" if pair else ""
            near = row.get("beyond_window") is False
            reach = ", within reach of the window" if near else ""
            kind = " ".join(filter(None, ("on" if share > 0.85 else "", "near" if near else "")))
            tip = f"{name}, {length:,.0f} tokens, depth {depth:.2f}: {share:.2f}{more}{reach}"
            line.append(f'<td{f" class={chr(34)}{kind}{chr(34)}" if kind else ""} style="--v:{share:.2f}" title="{escape(tip)}">{share:.2f}</td>')
        body.append(f"<tr>{''.join(line)}</tr>")
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}: recall by length and depth"><table class="heat">'
        f'<caption>{escape(name)}</caption><thead><tr><th scope="col">depth \\ tokens</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div></figure>'
    )


def _mqar(evaluation: Mapping[str, Any], findings: Sequence[Row], styles: Mapping[str, int]) -> str:
    rows = [row for row in _rows(evaluation, "mqar") if row.get("name") is not None and _f(row.get("num_pairs")) > 0]
    if not rows:
        return ""
    keys = [(row.get("name"), row["num_pairs"]) for row in rows]
    # One length for each number of pairs makes one chart; a full grid of both needs one per length.
    groups = (
        [(math.nan, rows)]
        if len(set(keys)) == len(keys)
        else [(length, [row for row in rows if _f(row.get("length")) == length]) for length in sorted({_f(row.get("length")) for row in rows})]
    )
    boxes = []
    for length, own in groups:
        chance = {_f(row.get("chance")) for row in own if math.isfinite(_f(row.get("chance")))}
        marks = [Mark("y", chance.pop(), "chance")] if len(chance) == 1 else []
        title = "Pairs recalled" + (f" at {length:,.0f} tokens" if math.isfinite(length) else "")
        boxes.append(
            _lengths_chart(
                title, own, styles, x="num_pairs", y="accuracy", x_label="pairs to remember", y_label="share of questions", y_range=(0.0, 1.0), marks=marks,
                label_of=lambda count: f"{count:.0f}",
            )
        )  # fmt: skip
    table, levels = [], []
    for row in rows:
        name, pairs = str(row.get("name")), f"{_f(row['num_pairs']):.0f}"
        table.append(
            (
                name,
                pairs,
                _whole(row.get("length")),
                _whole(row.get("num_trials")),
                _with_interval(row.get("accuracy"), row.get("ci95"), 2),
                _figure(row.get("chance"), 2),
            )
        )
        levels.append(_level(findings, "mqar", row) if name == "student" else "")
    columns = ("model", "pairs", "tokens", "questions", "accuracy", "chance")
    text = "Key-value pairs are listed, then some keys are asked for (multi-query associative recall). More pairs need more memory."
    return "<h3>Associative recall</h3>" + _p(text) + _figures(boxes) + _details("Figures", _table("Associative recall", columns, table, levels=levels))


# ---------------------------------------------------------------- fidelity


def _fidelity(evaluation: Mapping[str, Any], findings: Sequence[Row]) -> str:
    fidelity = _mapping(evaluation.get("fidelity"))
    layers, maps = _rows(fidelity, "layers"), _rows(fidelity, "maps")
    left_out = not_compared(fidelity)
    if not layers and not maps and not left_out:
        return ""
    boxes = []
    for key, title, unit in (
        ("output_error", "Relative error of the attention output", "0 = the same, 1 = as far as zero"),
        ("kl", "KL of the attention weights", "nats"),
    ):
        values = [(int(_f(row["layer_idx"])), _f(row.get(key))) for row in layers if math.isfinite(_f(row.get("layer_idx")))]
        finite = [value for _, value in values if math.isfinite(value)]
        if finite:
            # Kept layers have no row: they stay as gaps, so that a layer has the same place in every picture.
            found = dict(values)
            everyone = range(max(found) + 1)
            blocks = [Block("", 1, f"layer {index}: {found.get(index, math.nan):.3g}", found.get(index)) for index in everyone]
            chart = layer_strip(f"{title} by layer, {min(finite):.3g} to {max(finite):.3g}", blocks, y_label=unit, strip=False)
            boxes.append(_figure_box(title, chart))
    points = []
    for row in layers:
        for head in _rows(row, "heads") or [row]:
            x, y = _f(head.get("entropy_teacher")), _f(head.get("entropy_student"))
            if math.isfinite(x) and math.isfinite(y):
                place = f"layer {row.get('layer_idx')}" + (f", head {head['head']}" if "head" in head else "")
                points.append((x, y, f"{place}: {x:.2f} and {y:.2f}"))
    if points:
        note = "One dot per head. Above the line the new attention is more spread out than the original's, below it is sharper."
        chart = scatter("Entropy of attention, teacher against student, per head", points, x_label="teacher, nats", y_label="student, nats")
        boxes.append(_figure_box("Entropy of the attention weights", chart, note=note))
    rows, levels = [], []
    for row in layers:
        rows.append(
            (_text(row.get("layer_idx")), *(_figure(row.get(key), 3) for key in ("output_error", "kl", "entropy_teacher", "entropy_student", "monotonicity")))
        )
        levels.append(_level(findings, "fidelity", row))
    columns = ("layer", "output error", "KL, nats", "entropy, teacher", "entropy, student", "monotonicity")
    table = _table("Attention compared, by layer", columns, rows, levels=levels) if rows else ""
    seen = [f"{_whole(fidelity[key])} {key}" for key in ("rows", "tokens") if math.isfinite(_f(fidelity.get(key)))]
    text = "How close the new attention is to the original's when both see the same input" + (f" ({', '.join(seen)})" if seen else "") + "."
    return _p(" ".join([text, *left_out])) + _figures(boxes) + _details("Figures", table) + _maps(maps)


def _maps(maps: Sequence[Row]) -> str:
    boxes = []
    for row in maps:
        pair = {who: _matrix(row.get(who)) for who in ("teacher", "student")}
        top = max((value for matrix in pair.values() for line in matrix for value in line if value is not None), default=0.0)
        if not top > 0:
            continue
        place = f"layer {row.get('layer_idx', '?')}, head {row.get('head', '?')}"
        images = "".join(
            f'<div><img src="{png_data_uri(matrix, top)}" alt="attention weights of the {who}, {escape(place)}" width="{len(matrix[0])}" height="{len(matrix)}"><span>{who}</span></div>'
            for who, matrix in pair.items()
            if matrix
        )
        pick = ", the median head" if row.get("pick") == "median" else ""
        kl = f", KL {_figure(row.get('kl'), 3)}" if math.isfinite(_f(row.get("kl"))) else ""
        boxes.append(
            f'<figure class="map"><figcaption>{escape(place[0].upper() + place[1:] + kl + pick)}</figcaption><div class="pair">{images}</div></figure>'
        )
    if not boxes:
        return ""
    text = "Each row is a token, from the top; each column a token it looks at. The heads with the largest KL come first. The stronger the shade, the more attention (by its square root, the same scale for both)."
    return "<h3>Attention maps</h3>" + _p(text) + f'<div class="maps">{"".join(boxes)}</div>'


def _matrix(value: object) -> list[list[float | None]]:
    """Rows of equal length; empty when it is no matrix."""
    rows = (
        [[None if math.isnan(_f(item)) else _f(item) for item in row] for row in value if isinstance(row, (list, tuple))]
        if isinstance(value, (list, tuple))
        else []
    )
    return rows if rows and rows[0] and all(len(row) == len(rows[0]) for row in rows) else []


# ---------------------------------------------------------------- memory and speed


def _state(evaluation: Mapping[str, Any], findings: Sequence[Row], styles: Mapping[str, int]) -> str:
    rows = [row for row in _rows(evaluation, "state_bytes") if _f(row.get("length")) > 0]
    if not rows:
        return ""
    flat = [{"name": who, "length": row["length"], "bytes": row[who]} for who in ("teacher", "student") for row in rows if math.isfinite(_f(row.get(who)))]
    chart = _lengths_chart(
        "Decode cache of one sequence", flat, styles, x="length", y="bytes", x_label="tokens (k = 1024)", y_label="MiB (log)", y_scale="log", divide=2**20
    )
    table, levels = [], []
    for row in rows:
        ratio = _f(row.get("teacher")) / _f(row.get("student")) if _f(row.get("student")) > 0 else math.nan
        table.append((_whole(row["length"]), _bytes(row.get("teacher")), _bytes(row.get("student")), f"{_TIMES} {ratio:.2f}" if math.isfinite(ratio) else "-"))
        levels.append(_level(findings, "state", row))
    text = (
        "Bytes that the cache of one sequence holds after reading a prompt"
        + (f", measured with {evaluation['dtype']} weights" if evaluation.get("dtype") else "")
        + "."
    )
    text += " Below \u00d7 1 the new attention's state is larger than the keys and values it replaces, as it is for short prompts."
    figures = _table("Decode cache of one sequence", ("tokens", "teacher", "student", "smaller by"), table, levels=levels)
    return _p(text) + f'<div class="figures">{chart}<div class="beside">{figures}</div></div>'


def _bench(bench: Mapping[str, Any], styles: Mapping[str, int]) -> str:
    rows = _rows(bench, "rows")
    if not rows:
        return ""
    crossover = _mapping(bench.get("crossover"))
    sizes = sorted({_f(row.get("batch_size")) for row in rows if math.isfinite(_f(row.get("batch_size")))})
    smallest = sizes[0] if sizes else math.nan
    at = f", batch {smallest:.0f}" if sizes else ""
    boxes = []
    for title, phase, key, y_label, divide in (
        ("Reading the prompt", "prefill", "tokens_per_second", "tokens/s (log)", 1.0),
        ("Writing", "decode", "tokens_per_second", "tokens/s (log)", 1.0),
        ("Time to the first token", "prefill", "first_token_seconds", "seconds (log)", 1.0),
        ("Peak memory of reading", "prefill", "peak_memory_bytes", "MiB (log)", 2.0**20),
        ("Cache", "decode", "cache_bytes", "MiB (log)", 2.0**20),
    ):
        own = [row for row in rows if row.get("phase") == phase and (not sizes or _f(row.get("batch_size")) == smallest)]
        point = _f(crossover.get("cache" if key == "cache_bytes" else phase)) if key in ("tokens_per_second", "cache_bytes") else math.nan
        marks = [Mark("x", point, f"even at {token_label(point)}")] if point > 0 else []
        boxes.append(
            _lengths_chart(
                f"{title}{at}",
                own,
                styles,
                name="model",
                x="length",
                y=key,
                x_label="tokens (k = 1024)",
                y_label=y_label,
                y_scale="log",
                marks=marks,
                divide=divide,
            )
        )
    text = f"Teacher and student in one run on {bench.get('device', 'an unnamed device')}" + (f", {bench['dtype']}" if bench.get("dtype") else "") + "."
    facts = []
    for key, what in (("prefill", "reads prompts faster"), ("decode", "writes faster"), ("cache", "has the smaller cache")):
        if key in crossover:
            point = _f(crossover[key])
            facts.append(
                f"The converted model {what} from {point:,.0f} tokens on." if math.isfinite(point) else f"At no length measured the converted model {what}."
            )
    largest = [
        (_text(row.get("model")), _whole(row.get("length")), _whole(row.get("batch_size")), _figure(row.get("tokens_per_second"), 1))
        for row in sorted(_rows(bench, "largest_batch"), key=lambda row: (_f(row.get("length")), str(row.get("model"))))
    ]
    table = [
        (
            _text(row.get("model")),
            _text(row.get("phase")),
            _whole(row.get("batch_size")),
            _whole(row.get("length")),
            _figure(row.get("tokens_per_second"), 1),
            _figure(_f(row.get("seconds_per_token")) * 1e3, 2),
            _figure(row.get("first_token_seconds"), 3),
            _bytes(row.get("peak_memory_bytes")),
            _bytes(row.get("cache_bytes")),
            str(row.get("note") or ""),
        )
        for row in rows
    ]
    columns = ("model", "phase", "batch", "tokens", "tokens/s", "ms/token", "first token, s", "peak memory", "cache", "note")
    made = [f"<dt>Measured with</dt><dd><code>{escape(str(bench['command']))}</code></dd>" if bench.get("command") else ""]
    made += [f"<dt>Date</dt><dd>{escape(str(bench['date']))}</dd>" if bench.get("date") else ""]
    made += [f"<dt>Versions</dt><dd>{escape(_versions(bench.get('versions')))}</dd>" if bench.get("versions") else ""]
    return (
        _p(text)
        + (f"<ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul>" if facts else "")
        + _figures(boxes)
        + (_table("Largest batch that fits, decoding", ("model", "tokens", "batch", "tokens/s"), largest) if largest else "")
        + _details("All measurements", _table("All measurements", columns, table, text=(1, 9)))
        + (f'<dl class="facts">{"".join(made)}</dl>' if any(made) else "")
    )


# ---------------------------------------------------------------- text, limits, provenance


def _generation(evaluation: Mapping[str, Any]) -> str:
    parts = []
    for row in _rows(evaluation, "generation"):
        columns = "".join(
            f"<div><h4>{who}</h4><p>{escape(str(row[who]).removeprefix(' '))}</p></div>" for who in ("teacher", "student") if row.get(who) is not None
        )
        parts.append(
            f'<article class="sample"><p class="prompt"><strong>Prompt</strong> {escape(str(row.get("prompt", "")))}</p><div class="columns">{columns}</div></article>'
        )
    intro = _p("The same prompts continued by both models, always with the most likely token. A few samples show tone and faults; they measure nothing.")
    return intro + "".join(parts) if parts else ""


def _limits(conversion: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    settings = [_mapping(row.get("config")) for row in _rows(_mapping(conversion.get("plan")), "layers") if row.get("method") is not None]
    windows = sorted({int(size) for config in settings if math.isfinite(size := _f(_mapping(config.get("window")).get("size")))})
    items = []
    if windows and any(config.get("linear") for config in settings):
        items.append(
            f"A converted layer sees about the last {' or '.join(map(str, windows))} tokens exactly (a block window up to twice that), and a few at the start. Everything older is summed up "
            "in a state of fixed size, whatever the length of the text: details far back can be lost. The recall tests are there to show it."
        )
    elif windows and not any(config.get("linear") for config in settings):
        items.append(
            f"A converted layer sees about the last {' or '.join(map(str, windows))} tokens (a block window up to twice that) and a few at the start, and nothing else. What lies "
            "further back reaches it only through the layers before it."
        )
    if any(config.get("alphas") is not None for config in settings):
        items.append(
            "Each KV head of a converted layer sees the first tokens and a window of its own, and nothing in between: a detail in the middle of a long text "
            "reaches the answer only through the heads whose windows are long enough."
        )
    if any("topk" in config for config in settings):
        items.append(
            "A converted layer keeps all keys, but of a long text each token sees the first blocks, the nearest, and those that score best for it: a detail is found "
            "only where the mean of the keys around it stands out."
        )
    if any("router" in config for config in settings):
        items.append(
            "A converted layer keeps all keys, but each token leaves out some of the heads, chosen by its queries or its input alone: what a head would have found is not looked at."
        )
    if _rows(evaluation, "quality"):
        items.append(
            "Perplexity is an average over all tokens, most of which need little context. A model can match the original's and still fail to look things up."
        )
        items.append(
            "The figures hold for this held-out text. On other text, in other languages and for longer inputs the distance to the original can be larger."
        )
        items.append(
            "Intervals cover the choice of test rows, not the luck of one training run: another seed moves the figures too. After finetuning, perplexity mixes what was "
            "recovered with what was learned from the training text; KL and agreement do not have that fault."
        )
    if any(_rows(evaluation, key) for key in ("passkey", "needles", "mqar")):
        items.append("Recall is tested on synthetic prompts with one kind of question. Passing them is necessary for long texts, not sufficient.")
    if items:
        items.append("Safety, bias and factual knowledge were not tested. The original's restrictions and faults apply to the converted model as well.")
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def _versions(value: object) -> str:
    return ", ".join(f"{name} {version}" for name, version in _mapping(value).items())


def _provenance(conversion: Mapping[str, Any], evaluation: Mapping[str, Any], recipe_text: str | None) -> str:
    facts: list[tuple[str, object]] = []

    def fact(name: str, value: object) -> None:
        if value not in (None, "", {}):
            facts.append((name, value))

    fact("Base model", conversion.get("base_model"))
    fact("Base model, revision", conversion.get("revision"))
    if conversion.get("command"):
        fact("Command", Html(f"<code>{escape(str(conversion['command']))}</code>"))
    fact("Converted on", conversion.get("device"))
    phases = _mapping(conversion.get("phase_seconds"))
    fact("Time", ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in phases.items()))
    measuring = sum(value for value in map(_f, _mapping(evaluation.get("seconds")).values()) if math.isfinite(value))
    fact(
        "Measured on",
        ", ".join(str(evaluation[key]) for key in ("device", "dtype") if evaluation.get(key)) + (f", in {_seconds(measuring)}" if measuring else ""),
    )
    fact("Seed", conversion.get("seed"))
    fact("Versions", _versions(conversion.get("versions")))
    data, measured = _mapping(conversion.get("data")), _mapping(conversion.get("evaluation_data"))
    for name, description, splits in (("text", data, ("train", "eval")), ("text measured again", measured, ("eval",))):
        if not description or (description is measured and _same_eval(data, measured)):
            continue
        source = description.get("source")
        other = description.get("eval_source")
        fact(f"Source of the {name}", f"{source}, held out: {other}" if other and other != source else source)
        for split in splits:
            fact(
                {"train": "Training text", "eval": "Held-out text" if name == "text" else "Held-out text, measured again"}[split],
                _split(_mapping(description.get(split))),
            )
    licences = {
        f"Licence of the {what}": owner.get(key)
        for what, owner in (("base model", conversion), ("text", data))
        for key in ("license", "licence", "licenses", "licences", "base_model_license")
        if owner.get(key)
    }
    for name, value in licences.items():
        fact(name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else _versions(value) if isinstance(value, Mapping) else value)
    if not licences and (conversion.get("base_model") or data):
        fact("Licences", "None recorded. The licence of the base model and the terms of the text apply to the result; look them up at their sources.")
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{_e(value)}</dd>" for name, value in facts)
    recipe = recipe_text
    if recipe is None and _mapping(conversion.get("recipe")):
        recipe = json.dumps(conversion["recipe"], indent=2, default=str)
    block = _details("Recipe, every setting", f'<pre tabindex="0">{escape(recipe.strip())}</pre>') if recipe else ""
    return (f'<dl class="facts">{listed}</dl>' if listed else "") + block


def _same_eval(data: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    ours, theirs = _mapping(data.get("eval")).get("sha256"), _mapping(measured.get("eval")).get("sha256")
    return ours is not None and ours == theirs


def _split(split: Mapping[str, Any]) -> Html:
    """`110 documents, 161,792 tokens in 316 rows of 512`, and the hash."""
    parts = [f"{_whole(split[key])} {key}" for key in ("documents", "tokens") if math.isfinite(_f(split.get(key)))]
    rows = f" in {_whole(split['rows'])} rows of {_whole(split.get('length'))}" if math.isfinite(_f(split.get("rows"))) else ""
    digest = f' <span class="small">SHA-256 of the tokens:</span> <code>{escape(str(split["sha256"]))}</code>' if split.get("sha256") else ""
    return Html(escape(", ".join(parts) + rows) + digest)


# ---------------------------------------------------------------- style

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1c1c1a;--muted:#5d5c57;--line:#dddcd6;--grid:#e9e8e3;--link:#1f5fb8;
--s0:#55544f;--s1:#2469cc;--s2:#c2560c;--s3:#0b7d60;--s4:#7a4bc4;--s5:#b93374;--heat:36,105,204;
--bad-bg:#fdeae7;--bad:#a2170f;--warn-bg:#fcf1d2;--warn:#725000;--on:#fff}
@media (prefers-color-scheme:dark){:root{--page:#171716;--card:#20201e;--ink:#efeeea;--muted:#aaa9a2;--line:#3b3b37;--grid:#30302d;--link:#84b4f5;
--s0:#bdbcb3;--s1:#6aa6f5;--s2:#ef8f4d;--s3:#3cba95;--s4:#b096f3;--s5:#e87dac;--heat:60,130,230;
--bad-bg:#3c1815;--bad:#ffa198;--warn-bg:#362b0d;--warn:#f1c964;--on:#131312}
.pair img{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:clamp(1.45rem,4vw,2rem);line-height:1.2;margin:.2em 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.25;margin:0 0 .5em}
h3{font-size:1.06rem;margin:1.5em 0 .3em}
h4{font-size:.95rem;margin:1.1em 0 .3em}
p{margin:.4em 0 .8em;max-width:76ch}
a{color:var(--link)}
code,pre{font:.875em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:12px;margin:8px 0}
.lead{color:var(--muted);margin-bottom:1.2em}
.small,.ci,.settings{color:var(--muted);font-size:.85em}
section{margin-top:44px;padding-top:20px;border-top:1px solid var(--line)}
footer{margin-top:40px;color:var(--muted);font-size:.9em}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:18px 0 0;padding:0;font-size:.92em}
nav a{display:inline-block;padding:3px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,225px),1fr));gap:10px;margin:0 0 14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:11px 14px 12px;min-width:0}
.card dt{font-size:.85em;color:var(--muted)}
.card dd{margin:0}
.value{display:block;font-size:1.6rem;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.unit{font-size:.5em;font-weight:400;color:var(--muted)}
.detail{display:block;font-size:.82em;line-height:1.4;color:var(--muted);font-variant-numeric:tabular-nums;margin-top:2px}
.findings{list-style:none;padding:0;margin:0 0 12px}
.finding{border-left:4px solid var(--line);background:var(--card);border-radius:0 6px 6px 0;padding:8px 12px;margin:6px 0}
.finding.bad{border-color:var(--bad);background:var(--bad-bg)}
.finding.warn{border-color:var(--warn);background:var(--warn-bg)}
.finding.none{max-width:none}
.place{color:var(--muted);font-size:.85em;white-space:nowrap}
.place::before{content:"("}.place::after{content:")"}
.tag{display:inline-block;font-size:.72rem;font-weight:600;line-height:1.5;border:1px solid currentColor;border-radius:4px;padding:0 5px;white-space:nowrap}
.tag.bad{color:var(--bad)}.tag.warn{color:var(--warn)}
.scroll{overflow-x:auto;margin:10px 0;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9em}
caption{text-align:left;white-space:nowrap;font-weight:600;padding:2px 0 6px}
th,td{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th:first-child,th.text,td.text{text-align:left}
td.text{white-space:normal;min-width:13ch}
thead th{color:var(--muted);font-weight:500;border-bottom-color:var(--muted);vertical-align:bottom}
tbody th{font-weight:500}
tr.bad>*{background:var(--bad-bg)}tr.warn>*{background:var(--warn-bg)}
tr.bad>th,tr.warn>th{padding-left:8px;border-left:4px solid var(--bad)}
tr.warn>th{border-left-color:var(--warn)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:22px 34px;margin:14px 0;align-items:start}
.figures>*{min-width:0;max-width:430px}
.figures>.beside,.figures>.kinds{max-width:none}
@media (min-width:760px){.figures>.beside,.figures>.kinds{grid-column:span 2}}
@media (min-width:760px) and (max-width:1150px){.figures>.beside{grid-column:1/-1}.figures>.kinds{grid-column:span 1}}
.beside .scroll{margin-top:0}
figure{margin:0}
figcaption{font-weight:600;font-size:.95em;margin-bottom:4px}
figure .small{margin:.2em 0 0}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 6px;padding:0;font-size:.85em}
.legend li{display:flex;align-items:center;gap:6px}
.swatch{flex:none}
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}
.chart .axis{fill:var(--ink)}
.chart .letter{font-size:10.5px;font-weight:600;fill:var(--ink)}.chart .letter.on{fill:var(--on)}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.faint{fill:none;stroke:var(--c);stroke-width:.9;opacity:.35}
.dot{fill:var(--c);stroke:var(--page);stroke-width:.8}
.whisker{fill:none;stroke:var(--c);stroke-width:1.2;opacity:.75}
.grid{stroke:var(--grid);fill:none}.base{stroke:var(--muted);fill:none;stroke-width:.8}
.note{paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
.mark{stroke:var(--muted);fill:none;stroke-width:1;stroke-dasharray:4 3}
.block,.bar{fill:var(--c)}
.kept{fill:none;stroke:var(--muted);stroke-width:1.1;stroke-dasharray:2.5 2}
.scatter{fill:var(--c);fill-opacity:.6}
.dots{fill:none;stroke:var(--c);stroke-width:3.6;stroke-linecap:round;stroke-opacity:.5}
.kinds{list-style:none;margin:0;padding:0}
.kinds li{display:flex;gap:10px;margin:0 0 12px}
.kinds .settings{display:block;overflow-wrap:anywhere}
.box{flex:none;width:24px;height:24px;border-radius:4px;background:var(--c);color:var(--on);font-weight:600;font-size:.85em;display:flex;align-items:center;justify-content:center}
.box.kept{background:none;color:var(--ink);border:1.5px dashed var(--muted)}
.heat td,.heat th{border:1px solid var(--page);padding:5px 8px;text-align:center}
.heat th{font-weight:400;color:var(--muted)}
.heat .tag{display:block;margin-top:2px}
.heat td{position:relative;min-width:3.2em;background:rgba(var(--heat),var(--v,0))}
.heat td.on{color:var(--on)}
.heat td.near::after{content:"";position:absolute;right:3px;top:3px;width:5px;height:5px;border-radius:50%;background:currentColor}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:20px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px;font-size:.82em;color:var(--muted)}
.pair img{display:block;width:100%;height:auto;image-rendering:pixelated;border:1px solid #999}
.sample{margin:16px 0;padding:12px 14px;background:var(--card);border:1px solid var(--line);border-radius:8px}
.sample p{white-space:pre-wrap;max-width:none;margin:.2em 0;overflow-wrap:anywhere}
.prompt{color:var(--muted)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:4px 28px}
.columns h4{margin:.6em 0 .1em;font-size:.85em;color:var(--muted);font-weight:600}
details{margin:10px 0}
summary{cursor:pointer;color:var(--link);padding:4px 0}
.facts{display:grid;grid-template-columns:minmax(9em,max-content) minmax(0,1fr);gap:6px 20px;margin:10px 0}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
@media (max-width:560px){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}section{margin-top:32px}.cards{grid-template-columns:1fr 1fr;gap:8px}.card{padding:9px 10px}tbody th{position:sticky;left:0;background:var(--page);white-space:normal;min-width:5.5em;max-width:9em}.heat tbody th{min-width:0}.heat td,.heat th{padding:5px 6px}.value{font-size:1.3rem}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#000;--muted:#444;--line:#ccc;--grid:#e6e6e6;--link:#000;--s0:#55544f;--s1:#2469cc;--s2:#c2560c;--s3:#0b7d60;
--s4:#7a4bc4;--s5:#b93374;--heat:36,105,204;--bad-bg:#fdeae7;--bad:#a2170f;--warn-bg:#fcf1d2;--warn:#725000;--on:#fff}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}nav{display:none}main{max-width:none;padding:0}body{font-size:11pt}
figure,.card,tr,.finding,article{break-inside:avoid}h2,h3,h4{break-after:avoid}.scroll{overflow:visible}pre{white-space:pre-wrap}.pair img{filter:none}}
""".replace("\n", "")
