"""Show an evaluation: a table for the terminal, `report.json` for programs, `report.md` for people, the last two beside the weights.

Rows about which `verdict.py` has a finding are red (bad) or yellow (warn) in the terminal and marked **bad** or *warn* in Markdown; the sentences
stand at the end of the terminal output, where they are read, and at the top of report.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnconvert.convert.evaluate import Estimate, EvalReport, PositionQuality, Quality, StateBytes, json_safe
from attnconvert.convert.recall import NUM_CANDIDATES, MqarResult, NeedleResult, PasskeyResult
from attnconvert.convert.verdict import row_name
from attnconvert.distill.loop import write_atomic
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.heads.units import num_units, unit_counts
from attnconvert.kernels.span.slots import fixed_point, least_window, visible_keys

REPORT_SCHEMA_VERSION = 1
SPAN_LENGTHS = (2048, 8192, 32768)
"""Tokens at which a report says what attention spans keep, where no search names others."""
QUALITY_COLUMNS = ("model", "perplexity", "ratio to teacher", "KL, nats/token", "top-1 agreement")


# ---------------------------------------------------------------- figures as text


def format_bytes(num_bytes: float) -> str:
    """Binary units, three digits: `1.25 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"


def format_seconds(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_estimate(estimate: Estimate | None, digits: int) -> str:
    """`17.42 [16.90, 17.95]`: the value and its 95 % interval; `-` when there is no such figure."""
    if estimate is None:
        return "-"
    if estimate.ci95 is None:
        return _number(estimate.value, digits)
    return f"{_number(estimate.value, digits)} [{_number(estimate.ci95[0], digits)}, {_number(estimate.ci95[1], digits)}]"


def _number(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    # A broken model has a perplexity of millions; decimals say nothing there.
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:.{digits}f}"


def _quality_cells(row: Quality) -> tuple[str, ...]:
    label = f"student, {row.name}" if row.kind == "ablation" else row.name
    return (label, format_estimate(row.ppl, 2), format_estimate(row.ppl_ratio, 3), format_estimate(row.kl, 4), format_estimate(row.agreement, 4))


def _passkey_by_length(report: EvalReport) -> list[tuple[int, dict[str, PasskeyResult]]]:
    lengths = sorted({row.length for row in report.passkey})
    return [(length, {row.name: row for row in report.passkey if row.length == length}) for length in lengths]


def _passkey_names(report: EvalReport) -> list[str]:
    return list(dict.fromkeys(row.name for row in report.passkey))


def _distance(row: PasskeyResult) -> str:
    low, high = row.distance
    beyond = {True: ", beyond the window", False: ", within reach of the window", None: ""}[row.beyond_window]
    return (f"{low} to {high} back" if high > low else f"{low} back") + beyond


def _state_cells(row: StateBytes) -> tuple[str, ...]:
    if row.teacher is None:
        return (str(row.length), "-", format_bytes(row.student), "-")
    # Below the state's own size there is nothing to save, and a ratio under 1 says so.
    return (str(row.length), format_bytes(row.teacher), format_bytes(row.student), f"{row.teacher / row.student:.2f} x" if row.student else "-")


# ---------------------------------------------------------------- tables, for the terminal and for Markdown


@dataclass(frozen=True)
class _Rows:
    """A table: what it is, its columns, and its cells with the level of the finding about each row (None = no finding)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, tuple[str, ...]], ...]


def _level_of(report: EvalReport, section: str, row: str) -> str | None:
    """`bad`, `warn` or None: the worst finding about a row."""
    levels = {str(finding["level"]) for finding in report.findings if finding["section"] == section and finding["row"] == row}
    return min(levels, default=None)


def _quality_rows(report: EvalReport) -> _Rows:
    text = f"{report.num_tokens:,} held-out tokens in {report.num_rows} rows of {report.row_length}; [95 % interval]"
    rows = ((_level_of(report, "ablation" if row.kind == "ablation" else "quality", row.name), _quality_cells(row)) for row in report.quality)
    return _Rows(f"Quality ({text})", QUALITY_COLUMNS, tuple(rows))


def _position_rows(report: EvalReport) -> _Rows | None:
    """Quality by position; None where there is one bucket, which says what the quality table says."""
    buckets = sorted({(row.start, row.stop) for row in report.positions})
    if len(buckets) < 2:
        return None
    names = list(dict.fromkeys(row.name for row in report.positions))
    cells = {(row.start, row.name): row for row in report.positions}
    rows = []
    for start, stop in buckets:
        first = cells[start, names[0]]
        level = _level_of(report, "positions", row_name("positions", {"start": start, "stop": stop}))
        rows.append((level, (f"{start}-{stop}", f"{first.num_tokens:,}", *(_position_cell(cells[start, name]) for name in names))))
    against = any(row.kl is not None for row in report.positions)
    what = "perplexity ratio / KL; teacher: perplexity" if against else "perplexity"
    return _Rows(f"By position in the document ({what})", ("position", "tokens", *names), tuple(rows))


def _position_cell(row: PositionQuality) -> str:
    if row.ppl_ratio is None or row.kl is None:
        return _number(row.ppl, 2)
    return f"{_number(row.ppl_ratio, 3)} / {_number(row.kl, 4)}"


def _needle_rows(report: EvalReport) -> list[_Rows]:
    """One heat map per number of needles: a row per length and model, a column per depth."""
    maps = []
    for count in sorted({row.num_needles for row in report.needles}):
        cells = [row for row in report.needles if row.num_needles == count]
        depths = sorted({row.depth for row in cells})
        rows = []
        for length, name in dict.fromkeys((row.length, row.name) for row in cells):
            by_depth = {row.depth: row for row in cells if (row.length, row.name) == (length, name)}
            level = _level_of(report, "needles", row_name("needles", {"num_needles": count, "length": length})) if name == "student" else None
            rows.append((level, (str(length), name, *(_needle_cell(by_depth.get(depth)) for depth in depths))))
        needles = "1 named key" if count == 1 else f"{count} named keys, one asked for"
        title = f"Needles: {needles}, {cells[0].num_trials} prompts per cell (chance 0.10; w = within reach of the window)"
        maps.append(_Rows(title, ("tokens", "model", *(f"depth {depth:.2f}" for depth in depths)), tuple(rows)))
    return maps


def _needle_cell(row: NeedleResult | None) -> str:
    if row is None:
        return "-"
    return f"{row.accuracy:.2f}" + (" w" if row.beyond_window is False else "")


def _mqar_rows(report: EvalReport) -> _Rows | None:
    if not report.mqar:
        return None
    names = list(dict.fromkeys(row.name for row in report.mqar))
    cells = {(row.num_pairs, row.name): row for row in report.mqar}
    rows = []
    for num_pairs in sorted({row.num_pairs for row in report.mqar}):
        first = cells[num_pairs, names[0]]
        level = _level_of(report, "mqar", row_name("mqar", {"num_pairs": num_pairs}))
        rows.append((level, (str(num_pairs), str(first.length), *(_recall(cells[num_pairs, name]) for name in names), f"{first.chance:.3f}")))
    return _Rows("MQAR: the right value ranks first of those shown", ("pairs", "tokens", *names, "chance"), tuple(rows))


def _fidelity_rows(report: EvalReport) -> _Rows | None:
    layers = report.fidelity.get("layers") or []
    if not layers:
        return None
    rows = []
    for layer in layers:
        entropy = f"{_cell(layer.get('entropy_teacher'), 2)} / {_cell(layer.get('entropy_student'), 2)}"
        cells = (str(layer["layer_idx"]), _cell(layer["output_error"], 3), _cell(layer.get("kl"), 3), entropy, _cell(layer.get("monotonicity"), 3))
        rows.append((_level_of(report, "fidelity", row_name("fidelity", layer)), cells))
    columns = ("layer", "output error", "KL of weights", "entropy, teacher / student", "monotonicity")
    return _Rows("Attention of each converted layer", columns, tuple(rows))


def _task_rows(report: EvalReport) -> _Rows | None:
    if not report.tasks:
        return None
    rows = []
    for task in report.tasks:
        teacher, student = (_with_error(task.get(name), task.get(f"{name}_se")) for name in ("teacher", "student"))
        counts = (_cell(task.get("num_fewshot"), 0), _cell(task.get("num_samples"), 0))
        rows.append(
            (
                _level_of(report, "tasks", row_name("tasks", task)),
                (str(task["task"]), str(task["metric"]), *counts, teacher, student, _cell(task.get("chance"), 3)),
            )
        )
    return _Rows("Tasks (+- standard error)", ("task", "metric", "shots", "samples", "teacher", "student", "chance"), tuple(rows))


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else _number(float(value), digits)


def _with_error(value: float | None, error: float | None) -> str:
    return _cell(value, 3) + ("" if value is None or error is None else f" +- {error:.3f}")


def _state_rows(report: EvalReport) -> tuple[tuple[str | None, tuple[str, ...]], ...]:
    return tuple((_level_of(report, "state", row_name("state", {"length": row.length})), _state_cells(row)) for row in report.state_bytes)


# ---------------------------------------------------------------- terminal

_STYLES: Mapping[str | None, str] = MappingProxyType({"bad": "red", "warn": "yellow", None: ""})
_WORST_LAYERS = 6


def render_table(report: EvalReport) -> RenderableType:
    """The evaluation as rich tables: quality, by position, recall, attention, tasks, decode state, then notes and findings."""
    parts: list[RenderableType] = [_rich_table(_quality_rows(report))]
    positions = _position_rows(report)
    if positions is not None:
        parts.append(_rich_table(positions))
    if report.passkey:
        names = _passkey_names(report)
        rows = []
        for length, by_name in _passkey_by_length(report):
            level = _level_of(report, "passkey", row_name("passkey", {"length": length}))
            rows.append((level, (str(length), *(f"{by_name[name].accuracy:.2f}" for name in names), _distance(by_name[names[0]]))))
        title = f"Passkey recall, right key first of {NUM_CANDIDATES} ({report.passkey[0].num_trials} prompts, chance 0.10)"
        parts.append(_rich_table(_Rows(title, ("tokens", *names, "key"), tuple(rows))))
    parts += [_rich_table(table) for table in _needle_rows(report)]
    for table in (_mqar_rows(report), _worst(_fidelity_rows(report)), _task_rows(report)):
        if table is not None:
            parts.append(_rich_table(table))
    if report.state_bytes:
        parts.append(_rich_table(_Rows("Decode cache of one sequence", ("tokens", "teacher", "student", "smaller by"), _state_rows(report))))
    parts += [Text(f"note: {note}") for note in report.notes]
    for finding in report.findings:
        parts.append(Text(f"{finding['level']}: {finding['section']}, {finding['row']}: {finding['text']}", style=_STYLES[finding["level"]]))
    return Group(*parts)


def _worst(table: _Rows | None) -> _Rows | None:
    """The layers with the largest output error; all of them are in report.md."""
    if table is None or len(table.rows) <= _WORST_LAYERS:
        return table

    def error(row: tuple[str | None, tuple[str, ...]]) -> float:
        cell = row[1][1]
        return float(cell) if cell[0].isdigit() else math.inf

    rows = sorted(table.rows, key=error, reverse=True)[:_WORST_LAYERS]
    return _Rows(f"{table.title}, the {_WORST_LAYERS} worst of {len(table.rows)}", table.columns, tuple(rows))


def _rich_table(content: _Rows) -> Table:
    table = Table(title=content.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(content.columns):
        table.add_column(column, justify="left" if number == 0 or column in ("key", "model", "metric") else "right", no_wrap=True)
    for level, row in content.rows:
        # Text, not str: an interval such as [1.02, 1.05] must not be read as rich markup.
        table.add_row(*(Text(cell) for cell in row), style=_STYLES[level])
    return table


# ---------------------------------------------------------------- files


def write_report(report: EvalReport, conversion: Mapping[str, Any], directory: Path | str) -> tuple[Path, Path]:
    """Write `report.json` and `report.md` into the checkpoint, each complete or not at all.

    Args:
        report: what `evaluate_models` returned.
        conversion: how the model came to be, JSON-like. Known keys, all optional: recipe_name, base_model, base_model_type, plan
            (ConversionPlan.to_dict()), stages (StageResult dicts), data (Data.description), versions (name -> version), device, seconds,
            command (the command line), recipe (the resolved recipe). Others go into report.json only.
        directory: an existing folder.

    Returns:
        The two paths, JSON first.

    Raises:
        AttnConvertError: `cannot-write` when the folder is missing, read-only or full.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AttnConvertError(
            "cannot-write", f"there is no folder '{directory}'", where=str(directory.parent), hint="Check that the folder exists and has space."
        )
    kept = _kept(directory)
    document = {
        "schema_version": REPORT_SCHEMA_VERSION,
        "conversion": json_safe(conversion),
        "evaluation": report.to_dict(),
        **kept,
    }
    # Both texts exist before anything is written, so a value that is not JSON leaves no half of a report.
    texts = {"report.json": json.dumps(document, indent=2, allow_nan=False) + "\n", "report.md": render_markdown(report, conversion, kept.get("bench"))}
    for name, text in texts.items():
        write_atomic(directory / name, text.encode())
    return directory / "report.json", directory / "report.md"


def _kept(directory: Path) -> dict[str, Any]:
    """What measuring the quality again does not replace: the speed measurements of the same model, from the report before or from `bench`."""
    for name, pick in (("report.json", lambda data: data["bench"]), ("bench.json", lambda data: data)):
        try:
            return {"bench": pick(json.loads((directory / name).read_text(encoding="utf-8")))}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


# ---------------------------------------------------------------- report.md


def refresh_markdown(document: Mapping[str, Any], directory: Path) -> None:
    """Write `report.md` again from the content of `report.json`, after something was added to it; a report of another version stays as it is."""
    try:
        text = render_markdown(EvalReport.from_dict(document["evaluation"]), document["conversion"], document.get("bench"))
    except (ValueError, KeyError, TypeError):
        return
    write_atomic(directory / "report.md", text.encode())


def render_markdown(report: EvalReport, conversion: Mapping[str, Any], bench: Mapping[str, Any] | None = None) -> str:
    """The text of `report.md`; parts without data are left out."""
    from attnconvert.convert.bench import bench_markdown  # it imports this module

    base, recipe = conversion.get("base_model"), conversion.get("recipe_name")
    title = f"# {base}, converted" if base else "# Conversion report"
    sections = [
        title,
        _summary(report, conversion),
        _findings_section(report),
        _what_section(conversion, recipe),
        _quality_section(report),
        _positions_section(report),
        _passkey_section(report),
        _needles_section(report),
        _mqar_section(report),
        _fidelity_section(report),
        _tasks_section(report),
        _generation_section(report),
        _state_section(report),
        bench_markdown(bench) if bench else "",
        _training_section(conversion),
        _use_section(conversion),
        _provenance_section(report, conversion),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(report: EvalReport, conversion: Mapping[str, Any]) -> str:
    student = report.quality_of("student")
    lines = []
    if student.ppl_ratio is not None and student.agreement is not None and student.kl is not None:
        teacher = report.quality_of("teacher")
        lines.append(
            f"- On held-out text its perplexity is **{_number(student.ppl.value, 2)}**, the original's {_number(teacher.ppl.value, 2)} "
            f"(x {_number(student.ppl_ratio.value, 3)})."
        )
        lines.append(
            f"- It picks the original's most likely next token at **{_percent(student.agreement.value)}** of positions; "
            f"KL {_number(student.kl.value, 3)} nats/token."
        )
    else:
        lines.append(f"- On held-out text its perplexity is **{_number(student.ppl.value, 2)}** (the original was not measured).")
    if report.passkey:
        length, by_name = _passkey_by_length(report)[-1]
        teacher_recall = f", the original {by_name['teacher'].accuracy:.2f}" if "teacher" in by_name else ""
        lines.append(f"- Passkey recall at {length} tokens: **{by_name['student'].accuracy:.2f}**{teacher_recall} (chance 0.10).")
    if report.state_bytes:
        state = report.state_bytes[-1]
        if state.teacher is None:
            lines.append(f"- After {state.length} tokens its decode cache holds {format_bytes(state.student)}.")
        else:
            share = _percent(state.student / state.teacher)
            lines.append(
                f"- After {state.length} tokens its decode cache holds **{format_bytes(state.student)}** instead of {format_bytes(state.teacher)} ({share})."
            )
    if conversion.get("seconds") is not None:
        on = f" on {conversion['device']}" if conversion.get("device") else ""
        lines.append(f"- The conversion took {format_seconds(float(conversion['seconds']))}{on}.")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "not finite"


def _what_section(conversion: Mapping[str, Any], recipe: str | None) -> str:
    facts = []
    if conversion.get("base_model"):
        kind = f" ({conversion['base_model_type']})" if conversion.get("base_model_type") else ""
        facts.append(f"Base model `{conversion['base_model']}`{kind}" + (f", recipe `{recipe}`." if recipe else "."))
    elif recipe:
        facts.append(f"Recipe `{recipe}`.")
    plan = conversion.get("plan")
    if plan:
        facts.append(layer_map(plan))
        facts += spans_text(plan, conversion.get("search"))
        facts += heads_text(plan, conversion.get("heads"))
    return "## What was converted\n\n" + "\n\n".join(facts) if facts else ""


def spans_text(plan: Mapping[str, Any], search: Mapping[str, Any] | None) -> list[str]:
    """Paragraphs of Markdown about the attention spans of a plan, and how they were found; none without spans.

    Args:
        plan: ConversionPlan.to_dict().
        search: SpanSearch.to_dict(), or None where the rules were given.
    """
    lengths = span_lengths(search)
    rows = []
    for row in plan["layers"]:
        shares = [kept_shares(row, length) for length in lengths]
        if row["method"] is not None and shares[0] is not None:
            means = [f"{100 * sum(own) / len(own):.0f}" for own in shares if own is not None]
            rows.append((str(row["layer_idx"]), *means, describe_rules(span_rules(row))))
    if not rows:
        return []
    text = [
        "Attention spans: the keys that each layer keeps, mean over its KV heads, in % after so many tokens, and the windows of its heads (N: tokens so far)."
    ]
    text.append(markdown_table(("layer", *(f"{length:,}" for length in lengths), "windows"), rows))
    if search:
        chosen, unseen = search["front"][search["chosen"]], str(search["validation_length"])
        kept = ", ".join(f"{float(share):.1%} at {int(length):,}" for length, share in chosen["densities"].items())
        text.append(
            f"The rules were searched among {search['num_rules']} for a density of at most {float(search['density']):.0%} (all heads together {kept} tokens), by how far each moves the "
            f"model's predictions on {search['num_samples']} texts per length. Of {len(search['front'])} plans the one was taken that stays closest to the original at {int(unseen):,} tokens, a length "
            f"not looked at before: {float(chosen['validation_loss']) - float(search['dense_losses'][unseen]):.4f} nats per token, before any training. The search took "
            f"{format_seconds(sum(search['seconds'].values()))}."
        )
    return text


def heads_text(plan: Mapping[str, Any], heads: Mapping[str, Any] | None) -> list[str]:
    """Paragraphs of Markdown about the use of routed heads: how many of the held-out tokens use each unit of each layer, and what is skipped; none without.

    Args:
        plan: ConversionPlan.to_dict().
        heads: the facts of the run about them, `usage` and, where calibration chose the shared units, `importance`.
    """
    layers = head_usage(plan, heads)
    if not layers:
        return []
    width = max(len(shares) for _, shares, _ in layers)
    rows = []
    for idx, shares, shared in layers:
        cells = [f"{100 * share:.0f}" + ("*" if unit in shared else "") for unit, share in enumerate(shares)]
        rows.append((str(idx), *cells, *["-"] * (width - len(cells)), f"{_skipped(shares):.0%}"))
    facts = heads or {}
    chosen = " Calibration chose the shared ones: those whose outputs after o_proj were the largest." if facts.get("importance") else ""
    if explained := list((facts.get("explained") or {}).values()):
        chosen += (
            f" Before training, the routers explain {min(explained):.0%} to {max(explained):.0%} of the variance of the log norms of the outputs, by layer."
        )
    return [
        "Routed heads: the held-out tokens that use each unit (a KV head with its query heads, or a query head), in %; * = shared, used by all. What is skipped is not "
        f"computed, and its keys are not read in decoding.{chosen}",
        markdown_table(("layer", *map(str, range(width)), "skipped"), rows),
    ]


def head_usage(plan: Mapping[str, Any], heads: Mapping[str, Any] | None) -> list[tuple[int, list[float], set[int]]]:
    """For each layer with routed heads whose use was measured: its index, the share of tokens that use each unit, and which units are shared."""
    usage = {int(idx): [float(share) for share in own] for idx, own in ((heads or {}).get("usage") or {}).items()}
    rows = {int(row["layer_idx"]): row for row in plan["layers"] if "router" in row["config"]}
    found = []
    for idx in sorted(usage.keys() & rows.keys()):
        config = rows[idx]["config"]
        given, count = config["shared_units"], unit_counts(len(usage[idx]), config["active"], config["shared"])[1]
        found.append((idx, usage[idx], set(range(count)) if given is None else set(given)))
    return found


def _skipped(shares: Sequence[float]) -> float:
    return 1 - sum(shares) / len(shares)


def span_lengths(search: Mapping[str, Any] | None) -> list[int]:
    """Tokens at which to say what attention spans keep, ascending: where the search measured, if there was one (SpanSearch.to_dict())."""
    return [int(length) for length in search["front"][0]["densities"]] if search else list(SPAN_LENGTHS)


def layer_map(plan: Mapping[str, Any]) -> str:
    """The plan as compact Markdown: one letter per layer in a strip, and a line per kind of layer with its settings and layer numbers.

    Args:
        plan: ConversionPlan.to_dict().
    """

    def kind_of(row: Mapping[str, Any]) -> tuple[str | None, str]:
        return row["method"], json.dumps(same_in_all_heads(row["config"]), sort_keys=True)

    kinds: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
    for row in plan["layers"]:
        kinds.setdefault(kind_of(row), []).append(row)
    letters: dict[tuple[str | None, str], str] = {}
    for kind in kinds:
        free = [letter for letter in [*(kind[0] or ""), *"abcdefghijklmnopqrstuvwxyz"] if letter.isalpha() and letter not in letters.values()]
        letters[kind] = "S" if kind[0] is None else (free[0] if free else "?")
    strip = "".join(letters[kind_of(row)] for row in plan["layers"])
    lines = ["```text", f"layer 0 -> {len(plan['layers']) - 1}   {strip}", "```", ""]
    for kind, rows in kinds.items():
        name = "softmax, kept as it was" if kind[0] is None else kind[0]
        settings = f" ({compact_settings(same_in_all_heads(rows[0]['config']))})" if rows[0]["config"] else ""
        reasons = sorted({row["reason"] for row in rows if row.get("reason")}) if kind[0] is None else []
        why = f". Why: {'; '.join(reasons)}" if reasons else ""
        lines.append(f"- `{letters[kind]}` = {name}{settings}: {len(rows)} of {len(plan['layers'])} layers, {ranges([row['layer_idx'] for row in rows])}{why}")
    return "\n".join(lines)


def span_rules(row: Mapping[str, Any]) -> list[tuple[int, float]] | None:
    """The rule (alpha, beta) of every KV head, from a row of a plan; None for layers without attention spans, and before the rules are known."""
    config, heads = row["config"], int(row["num_key_value_heads"])
    if config.get("alphas") is None:
        return None
    alphas, betas = (list(x) if isinstance(x, list | tuple) else [x] * heads for x in (config["alphas"], config["betas"]))
    return list(zip(alphas, betas, strict=True))


def describe_rules(rules: Sequence[tuple[int, float]] | None) -> str:
    """Rules of attention spans, those that several heads have once: `window 448`, `windows 2 x all, 1 x 0.125 N + 256`; None = not known yet."""
    if rules is None:
        return "windows from calibration"
    counts = Counter(_describe_rule(alpha, beta) for alpha, beta in rules)
    return f"window {next(iter(counts))}" if len(counts) == 1 else "windows " + ", ".join(f"{count} x {rule}" for rule, count in counts.most_common())


def _describe_rule(alpha: int, beta: float) -> str:
    if beta == 1 and alpha >= 0:
        return "all"
    share = "N" if beta == 1 else f"{beta:g} N"
    return f"{alpha}" if not beta else share + (f" {'+' if alpha > 0 else '-'} {abs(alpha)}" if alpha else "")


def describe_blocks(config: Mapping[str, Any]) -> str:
    """Settings of block-sparse attention: `blocks of 64: 1 first, 33 nearest, 62 chosen; all below 8192 tokens`."""
    nearest = config["window_size"] // config["block_size"] + 1  # the query's own too
    chosen = config["topk"] - config["init_blocks"] - 1
    how = " by mean keys" if config["scorer"] == "mean" else ""
    dense = f"; all below {config['dense_len']} tokens" if config["dense_len"] > 1 else ""
    return f"blocks of {config['block_size']}: {config['init_blocks']} first, {nearest} nearest, {chosen} chosen{how}{dense}"


def describe_heads(num_heads: int, num_key_value_heads: int, config: Mapping[str, Any]) -> str:
    """Settings of routed heads: `6 of 8 KV heads a token, 4 of them always (0, 2-4), router norm, hard gates`."""
    units = num_units(config["unit"], num_heads, num_key_value_heads)
    used, shared = unit_counts(units, config["active"], config["shared"])
    given = config["shared_units"]
    always = f"{shared or 'none'} of them always" if given is None else f"{len(given)} of them always ({ranges(given)})" if given else "none of them always"
    what = "KV heads" if config["unit"] == "kv_head" else "query heads"
    return f"{used} of {units} {what} a token, {always}, router {config['router']}, {config['gates']} gates"


def same_in_all_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """A row's settings without what is about single heads (rules of attention spans where each has its own, shared units): layers that differ in it alone are of one kind."""
    return {key: value for key, value in config.items() if key not in ("alphas", "betas", "shared_units") or not isinstance(value, list | tuple)}


def kept_shares(row: Mapping[str, Any], length: int) -> list[float] | None:
    """Share of the keys that each KV head of a layer with attention spans holds after `length` tokens; None for other layers, and before the rules are known."""
    rules, config = span_rules(row), row["config"]
    if rules is None:
        return None
    shares = []
    for alpha, beta in ((alpha, fixed_point(beta)) for alpha, beta in rules):
        least = least_window(alpha, beta, config.get("min_length", 0))
        shares.append(visible_keys(length - 1, alpha, beta, config["num_sinks"], least) / length)
    return shares


def compact_settings(config: Mapping[str, Any], prefix: str = "") -> str:
    """`window.kind=block, window.size=64, sinks=4`; settings that are null are left out."""
    parts = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            parts.append(compact_settings(value, f"{prefix}{key}."))
        elif value is not None:
            parts.append(f"{prefix}{key}={str(value).lower() if isinstance(value, bool) else value}")
    return ", ".join(part for part in parts if part)


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 5, 8-11` for sorted whole numbers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|", *(line(row) for row in rows)])


def _marked(level: str | None, cells: Sequence[str]) -> tuple[str, ...]:
    """The cells with the level of the row's finding behind the first."""
    mark = {"bad": " **bad**", "warn": " *warn*", None: ""}[level]
    return (cells[0] + mark, *cells[1:])


def _content(table: _Rows) -> str:
    return markdown_table(table.columns, (_marked(level, cells) for level, cells in table.rows))


def _findings_section(report: EvalReport) -> str:
    if not report.findings:
        return ""
    marks = {"bad": "**bad**", "warn": "*warn*"}
    return "## Findings\n\n" + "\n".join(f"- {marks[row['level']]} {row['section']}, {row['row']}: {row['text']}" for row in report.findings)


def _quality_section(report: EvalReport) -> str:
    text = (
        f"{report.num_tokens:,} tokens of held-out text in {report.num_rows} rows of {report.row_length}. In brackets the 95 % interval from "
        f"resampling rows. KL and agreement are against the teacher (the original model) at every position."
    )
    if any(row.kind == "ablation" for row in report.quality):
        text += " An ablation is the student with one part switched off and nothing retrained: the difference is what that part does."
    if any(row.kind == "other" for row in report.quality):
        text += " The *same data* row is the softmax model finetuned on the text the student was: what the text alone gives."
    elif any(row.kind == "teacher" for row in report.quality):
        text += " There is no softmax model finetuned on the same text to compare with, so what the text alone gives is part of the student's figures."
    parts = ["## Quality", text, _content(_quality_rows(report))]
    notes = "\n".join(f"- {note}" for note in report.notes)
    return "\n\n".join([*parts, notes] if notes else parts)


def _positions_section(report: EvalReport) -> str:
    table = _position_rows(report)
    if table is None:
        return ""
    text = "Tokens by how much of their document stands before them: perplexity of the teacher; of the others the ratio to it / the KL."
    if all(row.kl is None for row in report.positions):
        text = "Perplexity of tokens by how much of their document stands before them."
    return f"## By position\n\n{text}\n\n{_content(table)}"


def _needles_section(report: EvalReport) -> str:
    if not report.needles:
        return ""
    text = (
        "Heat map of recall: named keys in filler text, one asked for by name, by the length of the prompt and the depth at which that key stands "
        f"(0 = start). A prompt counts when the right key ranks first of {NUM_CANDIDATES}; the other names' keys are among them. Chance 0.10. "
        "Cells with a w lie within reach of the exact window."
    )
    maps = [f"{table.title.partition(' (')[0]}:\n\n{_content(table)}" for table in _needle_rows(report)]
    return "\n\n".join(["## Needles by depth", text, *maps])


def _mqar_section(report: EvalReport) -> str:
    table = _mqar_rows(report)
    if table is None:
        return ""
    text = (
        "Pairs of random word tokens, then some of the first ones again: the second one must rank first among all second ones shown. "
        f"{report.mqar[0].num_trials} queries or more per row, the same for every model, 95 % interval in brackets."
    )
    return f"## Associative recall (MQAR)\n\n{text}\n\n{_content(table)}"


def _fidelity_section(report: EvalReport) -> str:
    if not report.fidelity:
        return ""
    text = (
        "Each converted layer against softmax attention on the same inputs: squared error of the output relative to its power; KL and entropy (nats) of the "
        "attention weights; rank correlation of the weights over the keys outside the exact window (1 = their order is kept)."
    )
    table = _fidelity_rows(report)
    return "\n\n".join(["## Attention", " ".join([text, *not_compared(report.fidelity)]), *([] if table is None else [_content(table)])])


def not_compared(fidelity: Mapping[str, Any]) -> list[str]:
    """Sentences about the layers that `attention_fidelity` left out."""
    reasons = {
        "unreadable": "their attention is not a weighted sum of values",
        "unreached": f"their spans are longer than the {fidelity.get('row_tokens')} tokens of a row, so nothing is left out there",
    }
    return [f"Not compared, because {why}: layers {ranges(layers)}." for key, why in reasons.items() if (layers := fidelity.get(key))]


def _tasks_section(report: EvalReport) -> str:
    table = _task_rows(report)
    return "" if table is None else f"## Tasks\n\nWith lm-evaluation-harness, +- standard error.\n\n{_content(table)}"


def _generation_section(report: EvalReport) -> str:
    if not report.generation:
        return ""
    parts = ["## Side by side", "Continued greedily by both."]
    for sample in report.generation:
        parts.append(
            "\n>\n".join(
                f"> {who}: {_quoted(sample[key])}"
                for key, who in (("prompt", "*Prompt*"), ("teacher", "**Teacher**"), ("student", "**Student**"))
                if sample[key] is not None
            )
        )
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """Text of a model inside Markdown: on one line, nothing in it taken for markup."""
    line = " ".join(text.split())
    return "".join("\\" + letter if letter in "\\`*_{}[]<>#|" else letter for letter in line) or "(nothing)"


def _passkey_section(report: EvalReport) -> str:
    if not report.passkey:
        return ""
    names = _passkey_names(report)
    by_length = _passkey_by_length(report)
    cells = []
    for length, by_name in by_length:
        level = _level_of(report, "passkey", row_name("passkey", {"length": length}))
        cells.append(_marked(level, (str(length), *(_recall(by_name[name]) for name in names), _distance(by_name[names[0]]))))
    more = [(str(length), *(f"{_thirds(by_name[name])}; {by_name[name].mrr:.2f}" for name in names)) for length, by_name in by_length]
    text = (
        f"A five-digit key is hidden in plain filler text and asked for at the end. A prompt counts when the right key gets the highest "
        f"log-probability of {NUM_CANDIDATES} candidates (chance 0.10); {report.passkey[0].num_trials} prompts per length, the same for every model, "
        f"95 % interval in brackets. Only rows marked *beyond the window* need memory outside the exact window."
    )
    parts = [
        "## Passkey recall",
        text,
        markdown_table(("tokens", *names, "how far back the key is"), cells),
        "By depth of the key (early / middle / late third) and mean reciprocal rank (chance 0.29):",
        markdown_table(("tokens", *names), more),
    ]
    return "\n\n".join(parts)


def _recall(row: PasskeyResult | MqarResult) -> str:
    return f"{row.accuracy:.2f} [{row.ci95[0]:.2f}, {row.ci95[1]:.2f}]"


def _thirds(row: PasskeyResult) -> str:
    return " / ".join("-" if value is None else f"{value:.2f}" for value in row.by_third)


def _state_section(report: EvalReport) -> str:
    if not report.state_bytes:
        return ""
    text = f"Bytes held by the decode cache of one sequence after a prefill, measured ({report.dtype} weights)."
    rows = (_marked(level, cells) for level, cells in _state_rows(report))
    return "## Decode cache\n\n" + text + "\n\n" + markdown_table(("tokens", "teacher (KV)", "student", "smaller by"), rows)


def _training_section(conversion: Mapping[str, Any]) -> str:
    parts = []
    stages = conversion.get("stages") or []
    if stages:
        parts.append(markdown_table(("stage", "tokens", "steps", "time", "tokens/s", "final loss", "peak memory"), (_stage_cells(stage) for stage in stages)))
    for stage in stages:
        errors = {int(layer): float(error) for layer, error in (stage.get("layer_errors") or {}).items()}
        if errors:
            worst = sorted(errors, key=lambda layer: errors[layer], reverse=True)[:5]
            listed = ", ".join(f"layer {layer} {errors[layer]:.3f}" for layer in worst)
            mean = sum(errors.values()) / len(errors)
            parts.append(f"Relative error of the attention output after {stage['stage']}: mean {mean:.3f}; largest: {listed}.")
    data = conversion.get("data")
    if data:
        parts.append(_data_text(data))
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _stage_cells(stage: Mapping[str, Any]) -> tuple[str, ...]:
    if stage.get("skipped"):
        return (str(stage.get("stage", "-")), f"skipped: {stage['skipped']}", "-", "-", "-", "-", "-")

    def cell(key: str, text: Any) -> str:
        return "-" if stage.get(key) is None else str(text(stage[key]))

    return (
        str(stage.get("stage", "-")),
        cell("tokens", lambda value: f"{value:,}"),
        cell("steps", lambda value: f"{value:,}"),
        cell("seconds", format_seconds),
        cell("tokens_per_second", lambda value: f"{value:,.0f}"),
        cell("final_loss", lambda value: _number(value, 4)),
        cell("peak_memory_bytes", format_bytes),
    )


def _data_text(data: Mapping[str, Any]) -> str:
    lines = [f"Text: `{data['source']}`." if "source" in data else "Text:"]
    for split in ("train", "eval"):
        if isinstance(data.get(split), Mapping):
            lines.append(f"- {split}: " + compact_settings(data[split]))
    if data.get("train_epochs"):
        lines.append(f"- passes over the training text: {data['train_epochs']}")
    return "\n".join(lines)


def _use_section(conversion: Mapping[str, Any]) -> str:
    code = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # the folder this file lies in',
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # no trust needed after `import attnconvert`",
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
        "```",
    ]
    parts = ["## Use it", "\n".join(code), "Measure it again: `attnconvert evaluate-converted .`"]
    if conversion.get("command"):
        parts.append(f"It was made by:\n\n```sh\n{conversion['command']}\n```")
    return "\n\n".join(parts)


def _provenance_section(report: EvalReport, conversion: Mapping[str, Any]) -> str:
    lines = []
    if conversion.get("device"):
        lines.append(f"- converted on {conversion['device']}")
    lines.append(f"- measured on {report.device} in {format_seconds(sum(report.seconds.values()))}, seed {report.seed}")
    if conversion.get("versions"):
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in conversion["versions"].items()))
    lines.append("- all figures in full precision: `report.json`")
    return "## How these figures came about\n\n" + "\n".join(lines)
