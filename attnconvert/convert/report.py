"""Show an evaluation: a table for the terminal, `report.json` for programs, `report.md` for people, the last two beside the weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnconvert.convert.evaluate import NUM_CANDIDATES, Estimate, EvalReport, PasskeyResult, Quality, StateBytes, json_safe
from attnconvert.errors import AttnConvertError

REPORT_SCHEMA_VERSION = 1
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


# ---------------------------------------------------------------- terminal


def render_table(report: EvalReport) -> RenderableType:
    """The evaluation as rich tables: quality, passkey recall, decode state, notes."""
    parts: list[RenderableType] = []
    text = f"{report.num_tokens:,} held-out tokens in {report.num_rows} rows of {report.row_length}; [95 % interval]"
    parts.append(_rich_table(f"Quality ({text})", QUALITY_COLUMNS, (_quality_cells(row) for row in report.quality)))
    if report.passkey:
        names = _passkey_names(report)
        rows = [
            (str(length), *(f"{by_name[name].accuracy:.2f}" for name in names), _distance(by_name[names[0]])) for length, by_name in _passkey_by_length(report)
        ]
        title = f"Passkey recall, right key first of {NUM_CANDIDATES} ({report.passkey[0].num_trials} prompts, chance 0.10)"
        parts.append(_rich_table(title, ("tokens", *names, "key"), rows))
    if report.state_bytes:
        rows = [_state_cells(row) for row in report.state_bytes]
        parts.append(_rich_table("Decode cache of one sequence", ("tokens", "teacher", "student", "smaller by"), rows))
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def _rich_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "key" else "right", no_wrap=True)
    for row in rows:
        # Text, not str: an interval such as [1.02, 1.05] must not be read as rich markup.
        table.add_row(*(Text(cell) for cell in row))
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
    document = {"schema_version": REPORT_SCHEMA_VERSION, "conversion": json_safe(conversion), "evaluation": report.to_dict()}
    # Both texts exist before anything is written, so a value that is not JSON leaves no half of a report.
    texts = {"report.json": json.dumps(document, indent=2, allow_nan=False) + "\n", "report.md": render_markdown(report, conversion)}
    for name, text in texts.items():
        _write_atomically(directory / name, text)
    return directory / "report.json", directory / "report.md"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The reason to report is the first one, whatever else fails while tidying up.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise AttnConvertError(
            "cannot-write", f"cannot write '{path.name}': {error.strerror or error}", where=str(path.parent), hint="Check that the folder exists and has space."
        ) from error


# ---------------------------------------------------------------- report.md


def render_markdown(report: EvalReport, conversion: Mapping[str, Any]) -> str:
    """The text of `report.md`; parts without data are left out."""
    base, recipe = conversion.get("base_model"), conversion.get("recipe_name")
    title = f"# {base}, converted" if base else "# Conversion report"
    sections = [
        title,
        _summary(report, conversion),
        _what_section(conversion, recipe),
        _quality_section(report),
        _passkey_section(report),
        _state_section(report),
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
    return "## What was converted\n\n" + "\n\n".join(facts) if facts else ""


def layer_map(plan: Mapping[str, Any]) -> str:
    """The plan as compact Markdown: one letter per layer in a strip, and a line per kind of layer with its settings and layer numbers.

    Args:
        plan: ConversionPlan.to_dict().
    """
    kinds: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
    for row in plan["layers"]:
        kinds.setdefault((row["method"], json.dumps(row["config"], sort_keys=True)), []).append(row)
    letters: dict[tuple[str | None, str], str] = {}
    for kind in kinds:
        free = [letter for letter in [*(kind[0] or ""), *"abcdefghijklmnopqrstuvwxyz"] if letter.isalpha() and letter not in letters.values()]
        letters[kind] = "S" if kind[0] is None else (free[0] if free else "?")
    strip = "".join(letters[row["method"], json.dumps(row["config"], sort_keys=True)] for row in plan["layers"])
    lines = ["```text", f"layer 0 -> {len(plan['layers']) - 1}   {strip}", "```", ""]
    for kind, rows in kinds.items():
        name = "softmax, kept as it was" if kind[0] is None else kind[0]
        settings = f" ({compact_settings(rows[0]['config'])})" if rows[0]["config"] else ""
        reasons = sorted({row["reason"] for row in rows if row.get("reason")}) if kind[0] is None else []
        why = f". Why: {'; '.join(reasons)}" if reasons else ""
        lines.append(f"- `{letters[kind]}` = {name}{settings}: {len(rows)} of {len(plan['layers'])} layers, {ranges([row['layer_idx'] for row in rows])}{why}")
    return "\n".join(lines)


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


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|", *(line(row) for row in rows)])


def _quality_section(report: EvalReport) -> str:
    text = (
        f"{report.num_tokens:,} tokens of held-out text in {report.num_rows} rows of {report.row_length}. In brackets the 95 % interval from "
        f"resampling rows. KL and agreement are against the teacher (the original model) at every position."
    )
    if any(row.kind == "ablation" for row in report.quality):
        text += " An ablation is the student with one part switched off and nothing retrained: the difference is what that part does."
    return "## Quality\n\n" + text + "\n\n" + _table(QUALITY_COLUMNS, (_quality_cells(row) for row in report.quality))


def _passkey_section(report: EvalReport) -> str:
    notes = "\n".join(f"- {note}" for note in report.notes)
    if not report.passkey:
        return f"## Notes\n\n{notes}" if notes else ""
    names = _passkey_names(report)
    by_length = _passkey_by_length(report)
    cells = [
        (
            str(length),
            *(_recall(by_name[name]) for name in names),
            _distance(by_name[names[0]]),
        )
        for length, by_name in by_length
    ]
    more = [(str(length), *(f"{_thirds(by_name[name])}; {by_name[name].mrr:.2f}" for name in names)) for length, by_name in by_length]
    text = (
        f"A five-digit key is hidden in plain filler text and asked for at the end. A prompt counts when the right key gets the highest "
        f"log-probability of {NUM_CANDIDATES} candidates (chance 0.10); {report.passkey[0].num_trials} prompts per length, the same for every model, "
        f"95 % interval in brackets. Only rows marked *beyond the window* need memory outside the exact window."
    )
    parts = [
        "## Passkey recall",
        text,
        _table(("tokens", *names, "how far back the key is"), cells),
        "By depth of the key (early / middle / late third) and mean reciprocal rank (chance 0.29):",
        _table(("tokens", *names), more),
    ]
    return "\n\n".join([*parts, notes] if notes else parts)


def _recall(row: PasskeyResult) -> str:
    return f"{row.accuracy:.2f} [{row.ci95[0]:.2f}, {row.ci95[1]:.2f}]"


def _thirds(row: PasskeyResult) -> str:
    return " / ".join("-" if value is None else f"{value:.2f}" for value in row.by_third)


def _state_section(report: EvalReport) -> str:
    if not report.state_bytes:
        return ""
    text = f"Bytes held by the decode cache of one sequence after a prefill, measured ({report.dtype} weights)."
    rows = (_state_cells(row) for row in report.state_bytes)
    return "## Decode cache\n\n" + text + "\n\n" + _table(("tokens", "teacher (KV)", "student", "smaller by"), rows)


def _training_section(conversion: Mapping[str, Any]) -> str:
    parts = []
    stages = conversion.get("stages") or []
    if stages:
        parts.append(_table(("stage", "tokens", "steps", "time", "tokens/s", "final loss", "peak memory"), (_stage_cells(stage) for stage in stages)))
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
