"""Findings: what the figures of an evaluation say is wrong, as sentences.

A pure function of the JSON that `EvalReport.to_dict` makes, so that old reports can be judged again. `bad` means that the conversion is broken or
useless as it is; `warn` means that somebody should look. What a working conversion shows must give neither, so every threshold lies outside of
what was measured on working ones (embedded model, 160 k tokens of training: ratio 1.03, KL .05, KL .09 without the linear branch; SmolLM2-135M, 10 M
tokens: KL .12) and inside of what broken ones show.

quality     KL above 0.5 nats/token is bad, above 0.25 a warning. Window and sinks alone, without any training, reach .34 on SmolLM2: a converted
            model that is not below that has gained nothing from being trained, and 0.5 is worse than doing nothing. For perplexity the same two
            models stand at 1.42; above 1.5 is bad, above 1.2 a warning. The lower end of the 95 % interval decides, so little text accuses nobody.
positions   A bucket's KL is bad above 0.5 when it is also above 3 times the mean over the other tokens, a warning above 0.25. KL rises with the
            distance from the exact window in every working conversion (about twofold), so a ratio alone says nothing, and neither does a level
            that the whole model has: that is a finding of `quality`. Buckets of fewer than 256 tokens are not judged.
ablation    A part that is switched off must raise the KL: bad when the 95 % interval of the change (in pairs) reaches 0, that is when the branch does
            less than the noise or harm; a warning when what it does is below 2 % of the student's KL. On the embedded model the linear branch is
            worth 80 % of it. Not judged where no text reaches beyond the window, because the branch then has nothing to do.
recall      (passkey, needles, mqar) Inside the window attention is exact, so the student must recall what the teacher does: bad when it is lower by
            0.15 and by 2 standard errors of the difference. Beyond the window some loss is the known price, so only losing everything is said, as
            a warning: within 2 standard errors of chance where the teacher has at least 0.5.
fidelity    The relative error of a layer's attention output is 0 for a perfect layer and 1 for one that outputs zeros; above 0.5 the layer is bad. A
            trained layer stands near .02 and a difficult one at .2. A layer above 0.1 and 5 times the median is a warning. The same limit of 0.5 holds
            for `softmax_drift`, how far the layer is from the teacher's with softmax put back: beyond it the projections are not the teacher's.
state       Bytes that grow by more than 1 % between two lengths of at least 4 windows, when the plan promises a constant state. Bad.
tasks       Worse than the teacher's by 2 standard errors of the difference, and by 0.1 (bad) or 0.03 (a warning). Only for figures between 0 and 1.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KL_BAD, KL_WARN = 0.5, 0.25
RATIO_BAD, RATIO_WARN = 1.5, 1.2
BUCKET_TIMES_OTHERS, BUCKET_MIN_TOKENS = 3.0, 256
BRANCH_WARN = 0.02
RECALL_DROP, RECALL_OF_TEACHER = 0.15, 0.5
LAYER_BAD, LAYER_WARN, LAYER_TIMES_MEDIAN = 0.5, 0.1, 5.0
STATE_GROWTH, STATE_WINDOWS = 1.01, 4
TASK_BAD, TASK_WARN = 0.1, 0.03
# A block window of w tokens sees up to 2 w.
REACH_WINDOWS = 2
# As in recall.py, which this module does without because it imports torch.
KEY_TOKENS = 16

Finding = dict[str, Any]
"""`level` (bad, warn), `section` (quality, positions, passkey, needles, mqar, ablation, fidelity, state, tasks), `row` (see `row_name`), `text`."""


def find_problems(evaluation: Mapping[str, Any]) -> list[Finding]:
    """All findings, the bad ones first, else in the order of the report.

    Args:
        evaluation: `EvalReport.to_dict()`, or the `evaluation` of a report.json. Keys added since schema version 1 may be missing.
    """
    found = [
        *_quality(evaluation),
        *_positions(evaluation),
        *_recall(evaluation),
        *_ablations(evaluation),
        *_fidelity(evaluation),
        *_state(evaluation),
        *_tasks(evaluation),
    ]
    return sorted(found, key=lambda finding: finding["level"] != "bad")


def row_name(section: str, row: Mapping[str, Any]) -> str:
    """What findings call a row of a section, so that tables can mark it."""
    if section == "positions":
        return f"{row['start']}-{row['stop']}"
    if section == "needles":
        return f"{row['num_needles']} {'needle' if row['num_needles'] == 1 else 'needles'}, {row['length']} tokens"
    if section == "mqar":
        return f"{row['num_pairs']} pairs"
    if section == "fidelity":
        return f"layer {row['layer_idx']}"
    if section in ("passkey", "state"):
        return f"{row['length']} tokens"
    return str(row["task" if section == "tasks" else "name"])


def _finding(level: str, section: str, row: str, text: str) -> Finding:
    assert level in ("bad", "warn")
    return {"level": level, "section": section, "row": row, "text": text}


def _level(value: float, warn: float, bad: float) -> str | None:
    return "bad" if value > bad else "warn" if value > warn else None


def _quality(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    student = _student(evaluation)
    if student["nll"]["value"] is None:
        yield _finding("bad", "quality", "student", "The student's perplexity is not a finite number: its weights or its attention overflow.")
        return
    for key, warn, bad, what in (
        ("ppl_ratio", RATIO_WARN, RATIO_BAD, "perplexity over the teacher's"),
        ("kl", KL_WARN, KL_BAD, "KL to the teacher in nats/token"),
    ):
        estimate = student[key]
        if estimate is None:
            continue
        value = estimate["value"]
        if value is None:
            yield _finding("bad", "quality", "student", f"The student's {what} is not a finite number.")
            continue
        low = estimate["ci95"][0] if estimate["ci95"] else value
        level = _level(value if low is None else low, warn, bad)
        if level is not None:
            limit = bad if level == "bad" else warn
            yield _finding(level, "quality", "student", f"The student's {what} is {value:.3f}, surely above {limit:g}.")


def _student(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in evaluation["quality"] if row["kind"] == "student")


def _positions(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    rows = [row for row in evaluation.get("positions") or () if row["name"] == "student" and row["kl"] is not None]
    for row in rows:
        others = [other for other in rows if other is not row]
        num_others = sum(other["num_tokens"] for other in others)
        if not num_others or row["num_tokens"] < BUCKET_MIN_TOKENS:
            continue
        mean = sum(other["kl"] * other["num_tokens"] for other in others) / num_others
        level = _level(row["kl"], KL_WARN, KL_BAD)
        if level is not None and row["kl"] > BUCKET_TIMES_OTHERS * mean:
            text = f"Tokens {row['start']} to {row['stop']} of a document have a KL of {row['kl']:.3f} nats/token; all others together {mean:.3f}."
            yield _finding(level, "positions", row_name("positions", row), text)


def _recall(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    window = evaluation.get("window")
    for row, teacher in _pairs(evaluation.get("passkey") or (), ("length",)):
        # Not beyond it is not yet inside: a needle 100 tokens back is out of a sliding window of 64 and within reach of a block window.
        inside = window is not None and row["distance"][1] + KEY_TOKENS <= window
        beyond = True if row["beyond_window"] else False if inside else None
        yield from _recall_of("passkey", row, teacher, beyond, 0.1, f"Passkey recall at {row['length']} tokens")
    for inside in (True, False):
        # Cells of one length are few prompts each; together they say more.
        cells = [row for row in evaluation.get("needles") or () if row["beyond_window"] is (not inside)]
        for row, teacher in _pairs(_pooled(cells), ("num_needles", "length")):
            name = row_name("needles", row)
            yield from _recall_of("needles", row, teacher, not inside, 0.1, f"Recall of {name}, over the depths {'inside' if inside else 'beyond'} the window")
    for row, teacher in _pairs(evaluation.get("mqar") or (), ("num_pairs",)):
        # Only a prompt that fits into the window as a whole is surely inside; of a longer one some pairs are.
        beyond = None if window is None else row["length"] > window
        yield from _recall_of("mqar", row, teacher, beyond, row["chance"], f"Associative recall of {row['num_pairs']} pairs")


def _recall_of(section: str, row: Mapping[str, Any], teacher: Mapping[str, Any], beyond: bool | None, chance: float, what: str) -> Iterator[Finding]:
    student_share, teacher_share = row["accuracy"], teacher["accuracy"]
    if beyond is None:
        return
    pooled = (student_share + teacher_share) / 2
    noise = 2 * math.sqrt(pooled * (1 - pooled) * (1 / row["num_trials"] + 1 / teacher["num_trials"]))
    drop = teacher_share - student_share
    figures = f"{student_share:.2f}, the teacher's {teacher_share:.2f}"
    if not beyond and drop >= RECALL_DROP and drop > noise:
        text = f"{what} is {figures}, although the key lies inside the exact window: the window or the head mapping is wrong, or the sinks are missing."
        yield _finding("bad", section, row_name(section, row), text)
    elif beyond and teacher_share >= RECALL_OF_TEACHER and drop > noise and student_share <= chance + 2 * math.sqrt(chance * (1 - chance) / row["num_trials"]):
        yield _finding("warn", section, row_name(section, row), f"{what} is {figures}: beyond the window nothing is recalled (chance {chance:.2f}).")


def _pairs(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(student's row, teacher's row) wherever both were measured."""
    teachers = {tuple(row[key] for key in keys): row for row in rows if row["name"] == "teacher"}
    for row in rows:
        teacher = teachers.get(tuple(row[key] for key in keys))
        if row["name"] == "student" and teacher is not None:
            yield row, teacher


def _pooled(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row per model, number of needles and length."""
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["name"], cell["num_needles"], cell["length"]), []).append(cell)
    rows: list[Mapping[str, Any]] = []
    for (name, num_needles, length), members in groups.items():
        trials = sum(member["num_trials"] for member in members)
        right = sum(member["accuracy"] * member["num_trials"] for member in members)
        shape = {"name": name, "num_needles": num_needles, "length": length, "num_trials": trials}
        rows.append({**shape, "accuracy": right / trials})
    return rows


def _ablations(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    student, window = _student(evaluation), evaluation.get("window")
    if student["kl"] is None or student["kl"]["value"] is None or not _reaches_beyond(evaluation, window):
        return
    for row in evaluation["quality"]:
        if row["kind"] != "ablation" or row["kl"] is None or row["kl"]["value"] is None:
            continue
        change = row["kl"]["value"] - student["kl"]["value"]
        figures = f"switching it off changes the KL from {student['kl']['value']:.4f} to {row['kl']['value']:.4f} nats/token"
        if change < 0:
            yield _finding("bad", "ablation", row["name"], f"The part does harm: {figures}.")
        elif _low(row, student) <= 0:
            yield _finding("bad", "ablation", row["name"], f"The part does nothing that can be told from noise: {figures}.")
        elif change < BRANCH_WARN * student["kl"]["value"]:
            yield _finding("warn", "ablation", row["name"], f"The part does next to nothing: {figures}.")


def _low(row: Mapping[str, Any], student: Mapping[str, Any]) -> float:
    """Lower end of the 95 % interval of the change; a report of schema version 1 has no pairs, there the errors are added as if independent."""
    change = row["kl"]["value"] - student["kl"]["value"]
    paired = row.get("kl_change")
    if paired is not None:
        return float(change if paired["ci95"] is None else paired["ci95"][0])
    errors = [estimate["se"] or 0.0 for estimate in (row["kl"], student["kl"])]
    return float(change - 1.96 * math.hypot(*errors))


def _reaches_beyond(evaluation: Mapping[str, Any], window: int | None) -> bool:
    """Whether a fair share of the text lies beyond the window; taken for granted where it is not known."""
    rows = [row for row in evaluation.get("positions") or () if row["name"] == "student"]
    beyond = sum(row["num_tokens"] for row in rows if window is None or row["start"] >= REACH_WINDOWS * window)
    return not rows or beyond >= BUCKET_MIN_TOKENS


def _fidelity(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    layers = (evaluation.get("fidelity") or {}).get("layers") or ()
    errors = [layer["output_error"] for layer in layers if layer["output_error"] is not None]
    for layer in layers:
        error, name = layer["output_error"], row_name("fidelity", layer)
        if error is None:
            yield _finding("bad", "fidelity", name, f"The attention output of {name} is not finite.")
        elif error > LAYER_BAD:
            text = (
                f"The attention output of {name} is off by {error:.2f} of its power (zeros would be off by 1): the layer does not do what the teacher's does."
            )
            yield _finding("bad", "fidelity", name, text)
        elif error > LAYER_WARN and error > LAYER_TIMES_MEDIAN * statistics.median(errors):
            text = f"The attention output of {name} is off by {error:.3f} of its power, {error / statistics.median(errors):.0f} times the median layer."
            yield _finding("warn", "fidelity", name, text)
        drift = layer.get("softmax_drift")
        if drift is not None and drift > LAYER_BAD:
            text = f"With softmax attention put back, {name} is off by {drift:.2f} of the teacher's power: its projections or heads are not the teacher's."
            yield _finding("bad", "fidelity", name, text)


def _state(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    if not evaluation.get("recurrent"):
        return
    window = evaluation.get("window") or 0
    rows = sorted((row for row in evaluation["state_bytes"] if row["length"] >= STATE_WINDOWS * window), key=lambda row: row["length"])
    for before, row in itertools.pairwise(rows):
        if row["student"] > STATE_GROWTH * before["student"]:
            text = (
                f"The decode cache grows from {before['student']:,} bytes at {before['length']} tokens to {row['student']:,} at {row['length']}, although every "
                f"layer has a state of constant size."
            )
            yield _finding("bad", "state", row_name("state", row), text)


def _tasks(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    for row in evaluation.get("tasks") or ():
        if row["teacher"] is None or row["student"] is None or not (0 <= row["teacher"] <= 1 and 0 <= row["student"] <= 1):
            continue
        drop = row["teacher"] - row["student"] if row.get("higher_is_better", True) else row["student"] - row["teacher"]
        noise = 2 * math.hypot(row["teacher_se"] or 0.0, row["student_se"] or 0.0)
        level = _level(drop, TASK_WARN, TASK_BAD)
        if level is not None and drop > noise:
            text = f"{row['task']} ({row['metric']}): {row['student']:.3f}, the teacher has {row['teacher']:.3f}."
            yield _finding(level, "tasks", row_name("tasks", row), text)
