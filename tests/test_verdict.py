"""Findings: a working conversion has none, and each planted fault is found in the section and row it belongs to."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnconvert.convert.evaluate import EvalReport, evaluate_models, json_safe
from attnconvert.convert.fidelity import attention_fidelity
from attnconvert.convert.load import load_model
from attnconvert.convert.pipeline import prepare
from attnconvert.convert.verdict import find_problems
from attnconvert.distill.calibrate import calibrate
from attnconvert.distill.config import EvalConfig
from attnconvert.distill.data import load_data
from attnconvert.distill.loop import RunContext
from attnconvert.distill.transfer import run_transfer
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import swap, zeroed_linear_branch

WINDOW, LENGTH, TOKENS = 32, 256, 2048
STAGE = {"tokens": 12 * LENGTH, "length": LENGTH, "batch_size": 1, "warmup_steps": 2}
ABLATION = "linear branch zeroed"


class Conversion:
    """The embedded model with all layers converted and trained for a few steps, and what measures it."""

    def __init__(self, folder: Path):
        overrides = [f"layers.0.config.window.size={WINDOW}", *(f"stages.transfer.{key}={value}" for key, value in STAGE.items())]
        prepared = prepare("demo", "hedgehog", overrides=overrides)
        loaded = load_model(prepared.source)
        self.student, self.tokenizer = loaded.model, loaded.tokenizer
        self.teacher = load_model(prepared.source).model
        swap(self.student, prepared.plan)
        recipe = prepared.recipe.recipe
        data = load_data(recipe.data, self.tokenizer, length=LENGTH, num_train_tokens=STAGE["tokens"], num_eval_tokens=TOKENS, eval_length=LENGTH)
        self.rows = data.eval
        cores = {idx: module.core for idx, _, module in converted_sites(self.student)}
        run = RunContext(folder)
        calibrate(self.student, cores, data.train, run, num_rows=4)
        run_transfer(self.student, cores, data.train, recipe.stages.transfer, run)
        self.student.eval().requires_grad_(False)

    def report(self, student: Any, *, tokens: int = TOKENS, passkey_trials: int = 0, fidelity: bool = False) -> EvalReport:
        """Window and plan are as promised, whatever was done to the student."""
        config = EvalConfig(tokens=tokens, length=LENGTH, passkey_lengths=(64,), passkey_trials=passkey_trials)
        ablations = {ABLATION: lambda: zeroed_linear_branch(student)}
        # 64 tokens is the shortest prompt, with the key 11 tokens back: inside
        report = evaluate_models(student, self.teacher, self.tokenizer, self.rows, config, device="cpu", window=WINDOW, ablations=ablations)
        if fidelity:
            report = replace(report, fidelity=json_safe(attention_fidelity(student, self.teacher, self.rows, device="cpu", num_rows=1)))
        return report.with_findings()


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("run"))


@pytest.fixture
def student(conversion: Conversion) -> Any:
    return copy.deepcopy(conversion.student)


def bad(report: EvalReport) -> set[tuple[str, str]]:
    return {(finding["section"], finding["row"]) for finding in report.findings if finding["level"] == "bad"}


# ---------------------------------------------------------------- planted faults


def test_a_working_conversion_has_no_finding(conversion: Conversion) -> None:
    report = conversion.report(conversion.student, passkey_trials=6, fidelity=True)
    assert report.findings == ()
    assert report.recurrent is True
    assert len(report.fidelity["layers"]) == 6


def test_permuted_heads_are_found_in_their_layer(conversion: Conversion, student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = converted_sites(student)[2][2].core
    forward = core.forward
    monkeypatch.setattr(core, "forward", lambda q, k, v, inputs: forward(q, k, v, inputs).roll(1, dims=1))
    report = conversion.report(student, tokens=512, fidelity=True)
    assert {row for section, row in bad(report) if section == "fidelity"} == {"layer 2"}
    assert any(finding["section"] == "quality" for finding in report.findings)


def test_permuted_projections_are_found_in_their_layer(conversion: Conversion, student: Any) -> None:
    projection = converted_sites(student)[3][2].q_proj.weight
    projection.copy_(projection.roll(32, dims=0))  # one head of 32 on
    assert ("fidelity", "layer 3") in bad(conversion.report(student, tokens=512, fidelity=True))


def test_a_dead_linear_branch_is_found_in_its_ablation(conversion: Conversion, student: Any) -> None:
    for _, _, module in converted_sites(student):
        module.core.linear_log_weight.fill_(-40.0)
    report = conversion.report(student)
    assert bad(report) == {("ablation", ABLATION)}


def test_a_window_smaller_than_promised_is_found_in_the_recall_inside_it(conversion: Conversion, student: Any) -> None:
    for _, _, module in converted_sites(student):
        module.core.window_size = 2
    report = conversion.report(student, tokens=512, passkey_trials=6)
    assert ("passkey", "64 tokens") in bad(report)
    assert ("quality", "student") in bad(report)


# ---------------------------------------------------------------- figures


def estimate(value: float | None, width: float = 0.01) -> dict[str, Any]:
    return {"value": value, "se": width / 2, "ci95": None if value is None else [value - width, value + width]}


def quality(name: str, kind: str, kl: float | None, ratio: float | None = 1.02, change: float | None = None) -> dict[str, Any]:
    against = kind != "teacher"
    return {
        "name": name,
        "kind": kind,
        "nll": estimate(2.0),
        "ppl": estimate(7.4),
        "ppl_ratio": estimate(ratio) if against else None,
        "kl": estimate(kl) if against else None,
        "agreement": estimate(0.9) if against else None,
        "kl_change": None if change is None else estimate(change),
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    """What a good conversion measures, with some of it changed."""
    rows = [quality("teacher", "teacher", None), quality("student", "student", 0.1), quality(ABLATION, "ablation", 0.2, change=0.1)]
    positions = [{"name": "student", "start": a, "stop": b, "num_tokens": 1000, "nll": 2.0, "ppl": 7.4, "ppl_ratio": 1.0, "kl": kl} for a, b, kl in BUCKETS]
    base = {"quality": rows, "positions": positions, "passkey": [], "state_bytes": [], "window": 64, "recurrent": True}
    return base | changes


BUCKETS = ((0, 64, 0.01), (64, 128, 0.02), (128, 256, 0.12), (256, 512, 0.2))


def found(**changes: Any) -> list[tuple[str, str, str]]:
    return [(finding["level"], finding["section"], finding["row"]) for finding in find_problems(evaluation(**changes))]


def with_student(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [quality("teacher", "teacher", None), row]


def recall(name: str, accuracy: float, *, trials: int = 40, **shape: Any) -> dict[str, Any]:
    return {"name": name, "accuracy": accuracy, "num_trials": trials, "ci95": [0, 1], **shape}


def both(student_accuracy: float, *, teacher_accuracy: float = 1.0, trials: int = 40, **shape: Any) -> list[dict[str, Any]]:
    return [recall("teacher", teacher_accuracy, trials=trials, **shape), recall("student", student_accuracy, trials=trials, **shape)]


def test_good_figures_have_no_finding() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("row", "level"),
    [
        (quality("student", "student", 0.3), "warn"),
        (quality("student", "student", 0.255), None),  # not surely above the limit
        (quality("student", "student", 0.6), "bad"),
        (quality("student", "student", 0.1, ratio=1.3), "warn"),
        (quality("student", "student", 0.1, ratio=1.6), "bad"),
        (quality("student", "student", None), "bad"),
        ({**quality("student", "student", 0.1), "nll": estimate(None)}, "bad"),
    ],
)
def test_quality_is_judged_beyond_the_noise(row: dict[str, Any], level: str | None) -> None:
    assert found(quality=with_student(row)) == ([] if level is None else [(level, "quality", "student")])


@pytest.mark.parametrize(("kl", "num_tokens", "level"), [(0.6, 1000, "bad"), (0.4, 1000, "warn"), (0.6, 100, None), (0.2, 1000, None)])
def test_a_bucket_that_stands_out_is_named(kl: float, num_tokens: int, level: str | None) -> None:
    positions = evaluation()["positions"]
    positions[2] |= {"kl": kl, "num_tokens": num_tokens}
    positions[3] |= {"kl": 0.1}
    assert found(positions=positions) == ([] if level is None else [(level, "positions", "128-256")])


def test_a_level_that_all_buckets_have_is_no_finding_about_one() -> None:
    positions = [row | {"kl": 0.6} for row in evaluation()["positions"]]
    assert found(positions=positions) == []


@pytest.mark.parametrize(("kl", "change", "level"), [(0.105, 0.005, "bad"), (0.08, -0.02, "bad"), (0.1015, 0.0115, "warn"), (0.13, 0.03, None)])
def test_an_ablation_must_cost_something(kl: float, change: float, level: str | None) -> None:
    rows = [*with_student(quality("student", "student", 0.1)), quality(ABLATION, "ablation", kl, change=change)]
    assert found(quality=rows) == ([] if level is None else [(level, "ablation", ABLATION)])


def test_without_pairs_the_errors_of_both_figures_count() -> None:
    rows = [*with_student(quality("student", "student", 0.1)), quality(ABLATION, "ablation", 0.11)]
    assert found(quality=rows) == [("bad", "ablation", ABLATION)]
    rows[-1] = quality(ABLATION, "ablation", 0.2)
    assert found(quality=rows) == []


def test_text_that_ends_inside_the_window_says_nothing_about_the_branch() -> None:
    rows = [*with_student(quality("student", "student", 0.1)), quality(ABLATION, "ablation", 0.1, change=0.0)]
    assert found(quality=rows, positions=evaluation()["positions"][:2]) == []
    assert found(quality=rows) == [("bad", "ablation", ABLATION)]


@pytest.mark.parametrize(
    ("accuracy", "distance", "beyond", "level"),
    [
        (0.5, [11, 30], False, "bad"),  # inside
        (0.95, [11, 30], False, None),  # within the noise
        (0.5, [11, 100], False, None),  # out of a sliding window, within reach of a block window: says nothing
        (0.5, [200, 900], True, None),  # the price
        (0.1, [200, 900], True, "warn"),  # all of it
    ],
)
def test_passkey_recall_is_judged_by_where_the_key_lies(accuracy: float, distance: list[int], beyond: bool, level: str | None) -> None:
    rows = both(accuracy, length=256, distance=distance, beyond_window=beyond)
    assert found(passkey=rows) == ([] if level is None else [(level, "passkey", "256 tokens")])


def test_a_student_is_not_blamed_for_what_the_teacher_cannot_do() -> None:
    assert found(passkey=both(0.1, teacher_accuracy=0.2, length=1024, distance=[200, 900], beyond_window=True)) == []


def test_needles_of_all_depths_inside_the_window_count_together() -> None:
    cells = [row for depth in (0.7, 0.9) for row in both(0.6, trials=6, num_needles=4, length=256, depth=depth, beyond_window=False)]
    assert found(needles=cells) == [("bad", "needles", "4 needles, 256 tokens")]
    assert found(needles=cells[:2]) == []  # 6 prompts are too few
    assert found(needles=[row | {"beyond_window": None} for row in cells]) == []


def test_associative_recall_inside_the_window_is_judged() -> None:
    assert found(mqar=both(0.5, num_pairs=4, length=23, chance=0.25)) == [("bad", "mqar", "4 pairs")]
    assert found(mqar=both(0.5, num_pairs=64, length=167, chance=1 / 64)) == []


@pytest.mark.parametrize(("error", "drift", "level"), [(0.6, 0.0, "bad"), (0.3, 0.0, "warn"), (None, 0.0, "bad"), (0.02, 0.9, "bad"), (0.05, 0.2, None)])
def test_a_layer_that_differs_is_named(error: float | None, drift: float, level: str | None) -> None:
    layers = [{"layer_idx": idx, "output_error": 0.02, "softmax_drift": 0.01} for idx in range(5)]
    layers[3] |= {"output_error": error, "softmax_drift": drift}
    assert found(fidelity={"layers": layers}) == ([] if level is None else [(level, "fidelity", "layer 3")])


def state(length: int, num_bytes: int) -> dict[str, Any]:
    return {"length": length, "student": num_bytes, "teacher": 10**6}


def test_a_state_that_grows_is_found_only_where_it_must_not() -> None:
    rows = [state(64, 100), state(256, 400), state(1024, 400), state(4096, 1600)]
    assert found(state_bytes=rows) == [("bad", "state", "4096 tokens")]
    assert found(state_bytes=rows, recurrent=False) == []
    assert found(state_bytes=rows[:3]) == []


@pytest.mark.parametrize(
    ("student", "better", "level"), [(0.45, True, "bad"), (0.53, True, "warn"), (0.58, True, None), (0.75, False, "bad"), (0.75, True, None)]
)
def test_a_task_that_is_lost_is_named(student: float, better: bool, level: str | None) -> None:
    task = {"task": "qa", "metric": "acc", "teacher": 0.6, "teacher_se": 0.02, "student": student, "student_se": 0.02, "higher_is_better": better}
    assert found(tasks=[task]) == ([] if level is None else [(level, "tasks", "qa")])


@pytest.mark.parametrize("remove", ["positions", "recurrent", "window"])
def test_keys_that_an_old_report_lacks_are_no_problem(remove: str) -> None:
    data = evaluation()
    del data[remove]
    assert find_problems(data) == []


def test_bad_findings_come_first() -> None:
    rows = with_student(quality("student", "student", 0.3))
    layers = [{"layer_idx": 0, "output_error": 0.9}]
    assert [level for level, _, _ in found(quality=rows, fidelity={"layers": layers})] == ["bad", "warn"]


def test_findings_are_sentences_with_their_figures() -> None:
    findings = find_problems(evaluation(passkey=both(0.5, length=256, distance=[11, 30], beyond_window=False)))
    assert findings == [
        {
            "level": "bad",
            "section": "passkey",
            "row": "256 tokens",
            "text": "Passkey recall at 256 tokens is 0.50, the teacher's 1.00, although the key lies inside the exact window: "
            "the window or the head mapping is wrong, or the sinks are missing.",
        }
    ]
