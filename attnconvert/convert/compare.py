"""`attnconvert compare`: several conversions side by side, from the report each of them carries. Loads no model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnconvert.convert.html import decode_speed, read_report, total_tokens
from attnconvert.convert.report import format_seconds
from attnconvert.errors import AttnConvertError, ErrorGroup

if TYPE_CHECKING:
    from rich.console import RenderableType

COMPARE_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ComparedRow:
    """One conversion; None where its report has no such figure.

    Attributes:
        name: the folder, told apart where two have the same name.
        recipe: name of the recipe.
        methods: layers per method, e.g. `hedgehog 24, softmax 6`.
        base_model: the model that was converted.
        tokens: training tokens of all stages.
        seconds: wall-clock time of the conversion.
        device: where it was converted.
        ppl_ratio: held-out perplexity / teacher's.
        kl: KL to the teacher, nats/token.
        agreement: share of positions with the same most likely token.
        passkey: length in tokens -> share of prompts whose key was found.
        cache_share: decode cache in bytes / teacher's, at the longest length that every row has.
        decode_speed: tokens per second while decoding, where it was benchmarked.
        decode_at: what that was measured at, e.g. `8,192 tokens, batch 1`.
    """

    name: str
    recipe: str | None
    methods: str
    base_model: str | None
    tokens: int | None
    seconds: float | None
    device: str | None
    ppl_ratio: float | None
    kl: float | None
    agreement: float | None
    passkey: dict[int, float]
    cache_share: float | None
    decode_speed: float | None
    decode_at: str | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: one per folder, in the order given.
        cache_length: tokens at which the cache shares were taken; None when the rows have no length in common.
        warnings: what makes figures of different rows unfit for comparison, as sentences.
    """

    rows: tuple[ComparedRow, ...]
    cache_length: int | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `best` names the rows with the best value of each column."""
        columns = _columns(self)
        best = {column.key: [self.rows[index].name for index in sorted(_best(column, self.rows))] for column in columns if column.better is not None}
        rows = [{**asdict(row), "passkey": {str(length): share for length, share in row.passkey.items()}} for row in self.rows]
        return {"schema_version": COMPARE_SCHEMA_VERSION, "rows": rows, "cache_length": self.cache_length, "best": best, "warnings": list(self.warnings)}


# ---------------------------------------------------------------- reading


def compare(directories: Sequence[Path]) -> Comparison:
    """Read the reports of several conversions; nothing is measured again.

    Args:
        directories: folders that a conversion wrote, at least one.

    Raises:
        AttnConvertError: `not-converted`, `no-report`, `bad-report`; an ErrorGroup when several folders have such a fault.
    """
    assert directories, "nothing to compare"
    reports, errors = [], []
    for directory in directories:
        try:
            reports.append(read_report(directory))
        except AttnConvertError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors)
    names = _row_names(directories)
    shares = [_cache_shares(report) for report in reports]
    common = set.intersection(*(set(share) for share in shares))
    cache_length = max(common) if common else None
    rows = tuple(_row(name, report, share.get(cache_length) if cache_length else None) for name, report, share in zip(names, reports, shares, strict=True))
    return Comparison(rows, cache_length, tuple(_warnings(names, reports, rows)))


def _row_names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole path where that is not enough."""
    short = [Path(directory).resolve().name for directory in directories]
    return [name if short.count(name) == 1 else str(directory) for name, directory in zip(short, directories, strict=True)]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(parent: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = parent.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _cache_shares(report: Mapping[str, Any]) -> dict[int, float]:
    """Length -> student's bytes / teacher's."""
    shares = {}
    for row in _list(report["evaluation"], "state_bytes"):
        length, student, teacher = (_number(row.get(key)) for key in ("length", "student", "teacher"))
        if length is not None and student is not None and teacher:
            shares[int(length)] = student / teacher
    return shares


def _row(name: str, report: Mapping[str, Any], cache_share: float | None) -> ComparedRow:
    conversion, evaluation = report["conversion"], report["evaluation"]
    student = next((row for row in _list(evaluation, "quality") if row.get("name") == "student"), {})

    def estimate(key: str) -> float | None:
        return _number(_mapping(student.get(key)).get("value"))

    layers = Counter("softmax" if row.get("method") is None else str(row["method"]) for row in _list(_mapping(conversion.get("plan")), "layers"))
    passkey = {}
    for row in _list(evaluation, "passkey"):
        length, share = _number(row.get("length")), _number(row.get("accuracy"))
        if row.get("name") == "student" and length is not None and share is not None:
            passkey[int(length)] = share
    speed = decode_speed(_mapping(report.get("bench")))
    return ComparedRow(
        name=name,
        recipe=conversion.get("recipe_name"),
        methods=", ".join(f"{method} {count}" for method, count in sorted(layers.items(), key=lambda item: (item[0] == "softmax", -item[1], item[0]))),
        base_model=conversion.get("base_model"),
        tokens=total_tokens(conversion) or None,
        seconds=_number(conversion.get("seconds")),
        device=conversion.get("device"),
        ppl_ratio=estimate("ppl_ratio"),
        kl=estimate("kl"),
        agreement=estimate("agreement"),
        passkey=dict(sorted(passkey.items())),
        cache_share=cache_share,
        decode_speed=None if speed is None else speed[3],
        decode_at=None if speed is None else f"{speed[0]:,} tokens, batch {speed[1]}",
    )


# ---------------------------------------------------------------- what cannot be compared


def _warnings(names: Sequence[str], reports: Sequence[Mapping[str, Any]], rows: Sequence[ComparedRow]) -> list[str]:
    """One sentence per kind of difference that makes figures of different rows answers to different questions."""

    def of_evaluation(key: str) -> list[object]:
        return [report["evaluation"].get(key) for report in reports]

    def text(report: Mapping[str, Any]) -> object:
        # A report measured again says which text it used; before that it was the conversion's own.
        data = report["conversion"].get("evaluation_data") or report["conversion"].get("data")
        digest = _mapping(_mapping(data).get("eval")).get("sha256")
        return None if digest is None else str(digest)[:12]

    def trials(report: Mapping[str, Any]) -> object:
        return next((row.get("num_trials") for row in _list(report["evaluation"], "passkey")), None)

    def bench(key: str) -> list[object]:
        return [_mapping(report.get("bench")).get(key) for report in reports]

    sizes = [f"{report['evaluation'].get('num_rows')} x {report['evaluation'].get('row_length')}" for report in reports]
    checks: list[tuple[str, Sequence[object], str]] = [
        ("the base model", [row.base_model for row in rows], "ratio, KL and agreement are against different teachers"),
        ("the held-out text (SHA-256)", [text(report) for report in reports], "quality was measured on different text"),
        ("the number of held-out rows x tokens", sizes, "quality was measured on different amounts or lengths of text"),
        ("the window", of_evaluation("window"), "passkeys lie at different distances"),
        ("the number of passkey prompts", [trials(report) for report in reports], "passkey figures are not equally certain"),
        ("the data type", of_evaluation("dtype"), "rounding and cache bytes differ"),
        ("the device of the measurement", of_evaluation("device"), "rounding differs a little"),
        ("the device of the conversion", [row.device for row in rows], "times cannot be compared"),
    ]
    benched = [index for index, row in enumerate(rows) if row.decode_speed is not None]
    found = [_difference(what, names, values, so) for what, values, so in checks]
    for what, values in (("the device of the benchmark", bench("device")), ("the length and batch of decoding", [row.decode_at for row in rows])):
        found.append(_difference(what, [names[index] for index in benched], [values[index] for index in benched], "tokens/s cannot be compared"))
    return [warning for warning in found if warning]


def _difference(what: str, names: Sequence[str], values: Sequence[object], so: str) -> str:
    """`the window differs: 64 (a, b) against 128 (c); passkeys lie at different distances`; empty when all are the same or unknown."""
    groups: dict[object, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return ""
    listed = " against ".join(f"{'unknown' if value is None else value} ({', '.join(members)})" for value, members in groups.items())
    return f"{what} differs: {listed}; {so}"


# ---------------------------------------------------------------- showing


@dataclass(frozen=True)
class _Column:
    """A column: its key in `to_dict`, heading (in one line or two), value of a row, text of a value, and which end is better (None = neither)."""

    key: str
    heading: str
    value: Callable[[ComparedRow], Any]
    text: Callable[[Any], str]
    better: Callable[[Sequence[float]], float] | None = None


def _columns(comparison: Comparison) -> list[_Column]:
    """The columns of which some row has a value."""
    rows = comparison.rows

    def passkey_column(length: int) -> _Column:
        return _Column(f"passkey.{length}", f"passkey\n{length:,}", lambda row: row.passkey.get(length), lambda value: f"{value:.2f}", max)

    cache = "cache share" + ("" if comparison.cache_length is None else f"\nat {comparison.cache_length:,}")
    columns = [
        _Column("name", "conversion", lambda row: row.name, str),
        _Column("recipe", "recipe", lambda row: row.recipe, str),
        _Column("methods", "layers", lambda row: row.methods or None, str),
        _Column("base_model", "base\nmodel", lambda row: row.base_model, str),
        _Column("tokens", "tokens", lambda row: row.tokens, lambda value: f"{value:,}", min),
        _Column("seconds", "time", lambda row: row.seconds, format_seconds, min),
        _Column("ppl_ratio", "ppl\nratio", lambda row: row.ppl_ratio, lambda value: f"{value:.3f}", min),
        _Column("kl", "KL", lambda row: row.kl, lambda value: f"{value:.4f}", min),
        _Column("agreement", "agreement", lambda row: row.agreement, lambda value: f"{value:.4f}", max),
        *(passkey_column(length) for length in sorted({length for row in rows for length in row.passkey})),
        _Column("cache_share", cache, lambda row: row.cache_share, lambda value: f"{100 * value:.1f} %", min),
        _Column("decode_speed", "decode\ntokens/s", lambda row: row.decode_speed, lambda value: f"{value:,.1f}", max),
    ]
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def _best(column: _Column, rows: Sequence[ComparedRow]) -> set[int]:
    """Rows that show the best value of a column; none when there is nothing to choose between."""
    values = {index: column.value(row) for index, row in enumerate(rows) if column.value(row) is not None}
    if column.better is None or len({column.text(value) for value in values.values()}) < 2:
        return set()
    # Figures that are printed alike are equally good: the table must not contradict itself.
    best = column.text(column.better(list(values.values())))
    return {index for index, value in values.items() if column.text(value) == best}


def _cells(comparison: Comparison) -> tuple[list[_Column], list[list[tuple[str, bool]]]]:
    """Columns, and per row the (text, is best) of each."""
    columns = _columns(comparison)
    best = [_best(column, comparison.rows) for column in columns]
    lines = []
    for index, row in enumerate(comparison.rows):
        values = [column.value(row) for column in columns]
        lines.append([("-" if value is None else column.text(value), index in chosen) for column, value, chosen in zip(columns, values, best, strict=True)])
    return columns, lines


def _notes(comparison: Comparison) -> list[str]:
    """What the headings have no room for."""
    at = {row.decode_at for row in comparison.rows if row.decode_at is not None}
    notes = ["cache share: bytes of the decode cache / the teacher's"] if any(row.cache_share is not None for row in comparison.rows) else []
    return notes + ([f"decode tokens/s at {at.pop()}"] if len(at) == 1 else [])


_TEXT_COLUMNS = ("name", "recipe", "methods", "base_model")


def render_comparison(comparison: Comparison) -> RenderableType:
    """The comparison as a rich table; the best value of a column is bold and has a star."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns, lines = _cells(comparison)
    models = {row.base_model for row in comparison.rows}
    if len(models) == 1 and len(comparison.rows) > 1:
        # A terminal is narrow: what is the same in every row stands above them.
        place = next((index for index, column in enumerate(columns) if column.key == "base_model"), None)
        if place is not None:
            del columns[place]
            for line in lines:
                del line[place]
    title = f"Conversions of {models.pop()}" if len(models) == 1 else None
    table = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(
            column.heading,
            justify="left" if column.key in _TEXT_COLUMNS else "right",
            no_wrap=column.key not in _TEXT_COLUMNS,
            overflow="fold",
            min_width=12 if column.key in _TEXT_COLUMNS else None,
        )
    for line in lines:
        # Text, not str: a name with brackets must not be read as rich markup.
        cells = []
        for column, (text, is_best) in zip(columns, line, strict=True):
            # Two blanks where there is no star, or the figures of a column would not stand below one another.
            star = "" if column.better is None else " *" if is_best else "  "
            cells.append(Text(text + star, style="bold" if is_best else ""))
        table.add_row(*cells)
    parts: list[RenderableType] = [table]
    if any(is_best for line in lines for _, is_best in line):
        parts.append(Text("* best of its column"))
    parts += [Text(note) for note in _notes(comparison)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in comparison.warnings]
    return Group(*parts)


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, best values bold, notes and warnings as a list beneath."""
    columns, lines = _cells(comparison)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(text: str, is_best: bool) -> str:
        safe = text.replace("|", "\\|")
        return f"**{safe}**" if is_best else safe

    head = line([column.heading.replace("\n", " ") for column in columns])
    rule = "|" + "|".join("---" if column.key in _TEXT_COLUMNS else "---:" for column in columns) + "|"
    table = "\n".join([head, rule, *(line([cell(text, is_best) for text, is_best in row]) for row in lines)])
    below = [*(f"- {note}" for note in _notes(comparison)), *(f"- Not comparable as it stands: {warning}." for warning in comparison.warnings)]
    return "\n".join([table, "", *below]) + "\n" if below else table + "\n"
