"""One conversion from start to end on the embedded model: plans, bad places and bad text, kill -9 and resume, kept layers, adapters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import COMMON, FAMILIES
from rich.console import Console
from safetensors.torch import load_file

from attnconvert.convert import pipeline, save
from attnconvert.convert.load import load_model
from attnconvert.convert.merge import merge
from attnconvert.convert.pipeline import Prepared, RunOptions, load_converted, prepare, run, run_same_data_baseline
from attnconvert.convert.plan import build_plan, estimate, evaluation_window, render_plan
from attnconvert.distill.calibrate import calibrate
from attnconvert.distill.data import PackedRows, load_data
from attnconvert.distill.loop import RunContext, StageResult
from attnconvert.errors import AttnConvertError
from attnconvert.recipes.load import load_recipe
from attnconvert.surgery.plan import ConversionPlan
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import swap

STEPS = 24
SMALL = [
    "layers.0.config.window.size=16",
    *(f"stages.{stage}.{key}" for stage in ("transfer", "finetune") for key in (f"tokens={STEPS * 64}", "length=64", "batch_size=1", "warmup_steps=2")),
    "stages.finetune.lora.rank=2", "evaluate.tokens=256", "evaluate.length=64", "evaluate.passkey_lengths=[64]", "evaluate.passkey_trials=2",
]  # fmt: skip


class Log:
    """A RunUI that remembers, and stops the run where it is told to."""

    def __init__(self, stop: Callable[[str, int], None] = lambda what, step: None):
        self.stop, self.phases, self.notes, self.steps = stop, [], [], []

    def on_phase(self, name: str) -> None:
        self.phases.append(name)
        self.stop(name, 0)

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        self.steps.append((stage, step))
        self.stop(stage, step)

    def on_eval(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def note(self, text: str) -> None:
        self.notes.append(text)


def small(recipe: str = "hedgehog", *more: str, family: str | None = None) -> Prepared:
    return prepare("demo", recipe, overrides=[*SMALL, *more], family=family)


def error_of(call: Callable[[], Any]) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        call()
    return caught.value


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The plan's rows in the config of a saved model."""
    rows: list[dict[str, Any]] = json.loads((folder / "config.json").read_text())["attn_plan"]["layers"]
    return rows


def assert_adapters_merge_into_a_whole_run(ready: Prepared, folder: Path) -> dict[str, torch.Tensor]:
    """A run that saves adapters alone, merged, has the weights and the plan of a run that saves the whole model; these weights."""
    for name, adapters_only in (("whole", False), ("adapters", True)):
        run(ready, RunOptions(folder / name, device="cpu", adapters_only=adapters_only, skip_evaluation=True), Log())
    merge(folder / "adapters", folder / "merged")
    whole, merged = (load_file(folder / name / "model.safetensors") for name in ("whole", "merged"))
    assert all(torch.equal(whole[name], merged[name]) for name in whole)
    assert rows_of(folder / "whole") == rows_of(folder / "merged")
    return merged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log, pipeline.ConversionResult]:
    """One run with nothing skipped."""
    out, log = tmp_path_factory.mktemp("whole") / "deep" / "model", Log()
    return out, log, run(small(), RunOptions(out, command="attnconvert linearize demo"), log)


# ---------------------------------------------------------------- the whole way


def test_a_conversion_leaves_a_complete_measured_checkpoint_and_nothing_else(whole: Any) -> None:
    out, log, result = whole
    assert log.phases == ["read text", "load model", "swap", "calibrate", "transfer", "finetune", "merge", "save", "evaluate"]
    assert log.steps == [(stage, step) for stage in ("transfer", "finetune") for step in range(1, STEPS + 1)]
    assert list(out.parent.iterdir()) == [out]
    assert {p.name for p in (out / "attnconvert").iterdir()} == {"recipe.yaml", "metrics.jsonl", "run.json"}
    assert len((out / "attnconvert" / "metrics.jsonl").read_text().splitlines()) == 2 * STEPS
    assert load_recipe(out / "attnconvert" / "recipe.yaml").recipe == small().recipe.recipe
    assert json.loads((out / "attnconvert" / "run.json").read_text())["status"] == "complete"
    assert [stage.steps for stage in result.stages] == [STEPS, STEPS]
    assert "attnconvert linearize demo" in (out / "report.md").read_text()
    conversion = json.loads((out / "report.json").read_text())["conversion"]
    assert conversion["recipe_name"] == "hedgehog"
    assert conversion["plan"] == result.plan.to_dict()
    assert conversion["base_model_license"] == "apache-2.0"
    assert "NOTICE" in conversion["data"]["license"]
    page = (out / "report.html").read_text()
    assert "Licence of the base model" in page
    assert "Licence of the text" in page


def test_the_report_measures_the_saved_student_against_the_teacher(whole: Any) -> None:
    _, _, result = whole
    names = [row.name for row in result.report.quality]
    assert names == ["teacher", "student", "linear branch zeroed"]
    assert result.report.quality_of("teacher").ppl.value < 60
    student = result.report.quality_of("student")
    assert 1e-4 < student.kl.value < 1.5
    assert student.agreement.value > 0.5
    assert result.report.window == 16


def test_the_checkpoint_holds_the_trained_cores_and_merged_adapters(whole: Any) -> None:
    out, _, _ = whole
    tensors, stock = load_file(out / "model.safetensors"), load_file(Path(small().source.path) / "model.safetensors")
    changed = {name for name in stock if name in tensors and not torch.equal(tensors[name], stock[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(6) for p in "qkvo"}
    assert {t.dtype for name, t in tensors.items() if ".core." not in name} == {torch.bfloat16}
    fresh = load_converted(out).model.layers[0].self_attn.core
    assert not torch.equal(fresh.query_map, torch.eye(fresh.query_map.shape[1], fresh.query_map.shape[2]).expand_as(fresh.query_map))


def test_converted_checkpoints_are_refused_as_teachers(whole: Any) -> None:
    assert error_of(lambda: prepare(str(whole[0]), "hedgehog")).code == "already-converted"


# ---------------------------------------------------------------- interruption

KILLED = """
import os, signal, sys, json
sys.path[:0] = json.loads(sys.argv[1])
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_pipeline import Log, small
from attnconvert.convert.pipeline import RunOptions, run

def stop(what, step):
    if (what, step) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

run(small(sys.argv[6]), RunOptions(Path(sys.argv[2]), resume=bool(int(sys.argv[5]))), Log(stop))
"""


@pytest.mark.parametrize(
    "kills",
    [
        # Step 22 of 24: past the checkpoint of step 20, so 20 steps are kept and 4 are trained again.
        [("finetune", 22)],
        pytest.param([("transfer", 22), ("keep", 0), ("finetune", 22), ("save", 0)], marks=pytest.mark.slow),
    ],
    ids=["once", "in every phase"],
)
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(kills: list[tuple[str, int]], whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, recipe = tmp_path / "model", "hedgehog-mixed" if len(kills) > 1 else "hedgehog"
    here = Path(__file__).parent
    for number, (phase, step) in enumerate(kills):
        arguments = [json.dumps([str(here), str(here.parent), *sys.path]), str(out), phase, str(step), str(int(number > 0)), recipe]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not out.exists()

    assert error_of(lambda: run(small(recipe), RunOptions(out), Log())).code == "unfinished-run"
    other = small(recipe, "stages.finetune.lr=1e-5")
    error = error_of(lambda: run(other, RunOptions(out, resume=True), Log()))
    assert error.code == "resume-mismatch"
    assert "recipe.stages.finetune.lr: 0.001 -> 1e-05" in str(error.where)

    monkeypatch.setattr(save, "check_reload", lambda model, folder: None)
    log = Log()
    run(small(recipe), RunOptions(out, resume=True, skip_evaluation=True), log)
    assert log.steps == ([("finetune", step) for step in range(21, STEPS + 1)] if len(kills) == 1 else [])
    straight = whole[0]
    if recipe != "hedgehog":
        straight = tmp_path / "straight"
        run(small(recipe), RunOptions(straight, skip_evaluation=True), Log())
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.run"))


@pytest.mark.usefixtures("quick")
def test_a_run_stopped_after_saving_only_measures_and_one_that_is_complete_does_nothing(whole: Any, tmp_path: Path) -> None:
    def stop(what: str, step: int) -> None:
        if what == "evaluate":
            raise KeyboardInterrupt

    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        run(small(), RunOptions(out), Log(stop))
    assert (out / "model.safetensors").exists()
    log = Log()
    first = run(small(), RunOptions(out, resume=True), log)
    assert log.phases == ["read text", "evaluate"]
    assert first.report is not None
    assert first.report.quality == whole[2].report.quality
    assert list(tmp_path.iterdir()) == [out]
    again = run(small(), RunOptions(out, resume=True), log)
    assert "complete already" in log.notes[-1]
    assert (again.report, again.stages, again.plan) == (first.report, first.stages, first.plan)


def test_a_run_stopped_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    def stop(what: str, step: int) -> None:
        if what == "swap":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(), RunOptions(tmp_path / "new" / "model"), Log(stop))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    out = tmp_path / "model"

    def second(what: str, step: int) -> None:
        if what == "swap":
            assert error_of(lambda: run(small(), RunOptions(out), Log())).code == "run-in-use"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(), RunOptions(out), Log(second))


def test_calibration_brings_the_swapped_model_closer_to_the_teacher_and_leaves_no_tap(tmp_path: Path) -> None:
    prepared = small()
    loaded = load_model(prepared.source, dtype="fp32")
    rows = load_data(prepared.recipe.recipe.data, loaded.tokenizer, length=256, num_train_tokens=4096, num_eval_tokens=1024, eval_length=256)
    ids = rows.eval.rows([0, 1]).input_ids
    with torch.no_grad():
        teacher = loaded.model(ids, use_cache=False).logits.log_softmax(-1)
        swap(loaded.model, prepared.plan)
        cores = {idx: module.core for idx, _, module in converted_sites(loaded.model)}
        before = loaded.model(ids, use_cache=False).logits.log_softmax(-1)
        calibrate(loaded.model, cores, rows.train, RunContext(tmp_path))
        after = loaded.model(ids, use_cache=False).logits.log_softmax(-1)
    kl = [torch.nn.functional.kl_div(x, teacher, log_target=True, reduction="none").sum(-1).mean().item() for x in (before, after)]
    assert kl[1] < 0.7 * kl[0]
    assert all(core.tap is None and core.linear_log_weight.std() > 0.1 for core in cores.values())


def test_a_recipe_without_anything_to_calibrate_runs_no_rows_through_the_model(tmp_path: Path) -> None:
    prepared = small("lolcats")
    model = load_model(prepared.source).model
    swap(model, prepared.plan)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    rows = PackedRows(torch.zeros(2, 8, dtype=torch.int32), torch.arange(8, dtype=torch.int32).repeat(2, 1))
    calibrate(model, {idx: module.core for idx, _, module in converted_sites(model)}, rows, RunContext(tmp_path))


# ---------------------------------------------------------------- adapters, kept layers, baseline


@pytest.mark.usefixtures("quick")
def test_adapters_only_then_merge_equals_the_full_run(whole: Any, tmp_path: Path) -> None:
    result = run(small(), RunOptions(tmp_path / "adapters", adapters_only=True), Log())
    assert result.report is not None
    assert result.report.quality_of("student").kl.value == pytest.approx(whole[2].report.quality_of("student").kl.value, rel=1e-3)
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "cores.safetensors",
        "attnconvert.json",
        "report.json",
        "report.md",
        "report.html",
        "attnconvert",
    } == {p.name for p in (tmp_path / "adapters").iterdir()}
    merge(tmp_path / "adapters", tmp_path / "merged", base=None, device="cpu")
    full, merged = load_file(whole[0] / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert full.keys() == merged.keys()
    assert all(torch.equal(full[name], merged[name]) for name in full)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (whole[0], tmp_path / "merged"))
    assert ours == theirs


@pytest.mark.parametrize("by", ["layer_error", "kl"])
@pytest.mark.usefixtures("quick")
def test_the_worst_layers_are_put_back_to_softmax(by: str, tmp_path: Path) -> None:
    log = Log()
    more = ("keep.fraction=0.34", f"keep.by={by}", "stages.transfer.tokens=256", "stages.finetune.tokens=64")
    result = run(small("hedgehog-mixed", *more), RunOptions(tmp_path / "model", skip_evaluation=True), log)
    kept = [row.layer_idx for row in result.plan.layers if row.method is None]
    assert len(kept) == 2
    assert "keep" in log.phases
    if by == "layer_error":
        errors = result.stages[0].layer_errors
        assert kept == sorted(sorted(errors, key=lambda layer: errors[layer])[-2:])
        assert all(f"relative error {errors[row.layer_idx]:.3f}" in row.reason for row in result.plan.layers if row.method is None)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {int(name.split(".")[2]) for name in tensors if ".core." in name} == set(range(6)) - set(kept)
    stock = load_file(Path(small().source.path) / "model.safetensors")
    # no adapters on kept layers: they are the teacher's
    assert all(torch.equal(tensors[name], stock[name]) for name in stock for layer in kept if f"layers.{layer}.self_attn" in name)
    assert load_converted(tmp_path / "model").config.attn_plan == result.plan.to_dict()


def test_the_choice_of_kept_layers_survives_an_interruption(tmp_path: Path) -> None:
    def stop(what: str, step: int) -> None:
        if what == "finetune":
            raise KeyboardInterrupt

    prepared, options = small("hedgehog-mixed", "stages.transfer.tokens=256"), RunOptions(tmp_path / "model", skip_evaluation=True)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, options, Log(stop))
    record = tmp_path / "model.run" / "keep.json"
    chosen = json.loads(record.read_text())
    other = next(layer for layer in range(6) if layer not in chosen["layers"])
    record.write_text(json.dumps({**chosen, "layers": [other]}))  # visible only if it is read, not chosen again
    log = Log(stop)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, replace(options, resume=True), log)
    assert log.notes[-1].startswith(f"Layers {other} go back")


def test_the_same_data_baseline_trains_the_softmax_model(tmp_path: Path) -> None:
    quality = run_same_data_baseline(small("hedgehog", "stages.finetune.kl=0", "stages.finetune.ce=1"), RunOptions(tmp_path / "base"), Log())
    assert quality.name == "teacher, same data"
    assert quality.kl is not None
    assert 0 < quality.kl.value < 0.5
    assert (tmp_path / "base" / "metrics.jsonl").exists()


# ---------------------------------------------------------------- bad places and bad text


def test_a_full_output_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    log = Log()
    assert error_of(lambda: run(small(), RunOptions(out), log)).code == "output-not-empty"
    assert error_of(lambda: run(small(), RunOptions(out, overwrite=True), log)).code == "output-not-ours"
    assert error_of(lambda: run(small(), RunOptions(out, resume=True), log)).code == "output-not-empty"
    assert log.phases == []
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "letter.txt"]


def test_text_shorter_than_one_sequence_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too little to learn from.")
    log = Log()
    error = error_of(lambda: run(small("hedgehog", f"data.source={tmp_path / 'short.txt'}"), RunOptions(tmp_path / "model"), log))
    assert error.code.startswith("data-")
    assert log.phases == ["read text"]
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_too_little_disk_is_found_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    log = Log()
    error = error_of(lambda: run(small(), RunOptions(tmp_path / "model"), log))
    assert error.code == "disk-full"
    assert log.phases == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_disk_that_fills_up_while_saving_leaves_a_resumable_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    prepared, options = small("hedgehog", "stages.transfer.tokens=64", "stages.finetune.tokens=64"), RunOptions(tmp_path / "model", skip_evaluation=True)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", full)
        assert error_of(lambda: run(prepared, options, Log())).code == "disk-full"
    assert [p.name for p in tmp_path.iterdir()] == ["model.run"]
    log = Log()
    run(prepared, replace(options, resume=True), log)
    assert log.steps == []
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unknown_devices_and_dtypes_are_refused(tmp_path: Path) -> None:
    assert error_of(lambda: run(small(), RunOptions(tmp_path / "m", device="gpu"), Log())).code == "unknown-device"
    assert error_of(lambda: run(small(), RunOptions(tmp_path / "m", dtype="int4"), Log())).code == "unknown-dtype"


# ---------------------------------------------------------------- plans


def plan_for(config: Any, *overrides: str, recipe: str = "hedgehog") -> ConversionPlan:
    return build_plan(load_recipe(recipe, overrides).recipe, config, find_sites(config))


def test_sliding_layers_stay_softmax_with_the_reason_when_all_layers_are_asked_for() -> None:
    plan = plan_for(FAMILIES["gemma3_text"]())
    assert [row.method for row in plan.layers] == [None, "hedgehog", None]
    assert "already a sliding window of 8 tokens" in plan.layers[0].reason


def test_a_sliding_layer_named_by_number_is_an_error_that_says_what_to_do() -> None:
    error = error_of(lambda: plan_for(FAMILIES["gemma3_text"](), "layers.0.match=[0-1]"))
    assert error.code == "site-refused"
    assert "layer 0" in error.message
    assert "keep: {layers: [0]}" in str(error.hint)


def test_layers_a_method_cannot_do_are_an_error_even_under_match_all() -> None:
    config = transformers.Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    config._attn_implementation = "eager"
    error = error_of(lambda: plan_for(config))
    assert error.code == "site-refused"
    assert "softcap" in error.message


def test_a_model_of_sliding_layers_has_nothing_to_convert() -> None:
    error = error_of(lambda: plan_for(FAMILIES["mistral"]()))
    assert error.code == "nothing-to-convert"
    assert "already a sliding window" in error.message
    assert [row.method for row in plan_for(FAMILIES["mistral"](), recipe="window-sinks").layers] == ["hedgehog"] * 3


def test_kept_layers_are_named_or_counted_in_the_plan() -> None:
    named = small("hedgehog", "keep.layers=[-1, 0-1]").plan
    assert [row.method is None for row in named.layers] == [True, True, False, False, False, True]
    assert named.num_kept_later == 0
    counted = small("hedgehog-mixed", "keep.fraction=0.5").plan
    assert (len(counted.converted), counted.num_kept_later, counted.keep_by) == (6, 3, "layer_error")
    assert error_of(lambda: small("hedgehog-mixed", "layers.0.match=[0]")).code == "keep-all"


def test_stages_that_the_cores_cannot_follow_are_refused() -> None:
    weights = error_of(lambda: small("window-sinks", "stages.transfer.loss=weights"))
    assert weights.code == "no-weight-loss"
    assert "layers 0-5" in weights.message
    assert error_of(lambda: small("hedgehog-mixed", "stages.transfer.tokens=0")).code == "keep-unmeasurable"
    assert error_of(lambda: small("window-sinks", "keep.fraction=0.25")).code == "keep-unmeasurable"
    assert small("window-sinks", "keep.fraction=0.25", "keep.by=kl").plan.keep_by == "kl"


def test_prepare_refuses_other_families_and_sequences_longer_than_the_model() -> None:
    assert small(family="linearize").plan.converted
    error = error_of(lambda: small(family="sparsify"))
    assert error.code == "wrong-family"
    assert "attnconvert linearize" in str(error.hint)
    error = error_of(lambda: small("hedgehog", "stages.finetune.length=4096"))
    assert error.code == "length-too-long"
    assert "2048" in str(error.expected)


def test_the_demo_budget_lies_below_the_users_own_settings() -> None:
    plain = prepare("demo", "hedgehog")
    assert "small budget" in plain.notes[0]
    assert plain.recipe.recipe.stages.transfer.tokens < 10**6
    assert prepare("demo", "hedgehog", overrides=["stages.transfer.tokens=1M"]).recipe.recipe.stages.transfer.tokens == 10**6


# ---------------------------------------------------------------- estimates


def test_the_estimate_counts_bytes_and_parameters_as_they_will_be(whole: Any) -> None:
    prepared = small()
    tensors = load_file(whole[0] / "model.safetensors")
    assert prepared.estimate.new_parameters == sum(t.numel() for name, t in tensors.items() if ".core." in name)
    assert prepared.estimate.num_parameters == sum(t.numel() for name, t in tensors.items() if ".core." not in name)
    measured = {row.length: row for row in whole[2].report.state_bytes}[64]
    at_64 = estimate(prepared.plan, prepared.sites, prepared.recipe.recipe, prepared.estimate.num_parameters, 64, 4)  # the CPU evaluates in fp32
    assert at_64.total("state_bytes_before") == measured.teacher
    assert at_64.total("state_bytes_after") <= measured.student <= 2 * at_64.total("state_bytes_after")
    assert [stage.tokens for stage in prepared.estimate.stages] == [STEPS * 64, STEPS * 64]
    longer = estimate(prepared.plan, prepared.sites, prepared.recipe.recipe, prepared.estimate.num_parameters, 2048, 2)
    assert longer.total("flops_after") < longer.total("flops_before")
    json.dumps(prepared.estimate.to_dict(), allow_nan=False)


def test_the_rendered_plan_merges_equal_neighbours_and_names_the_settings() -> None:
    prepared = prepare("demo", "hedgehog", overrides=["keep.layers=[2]"])
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render_plan(prepared.plan, prepared.estimate))
    text = console.export_text()
    assert "0-1" in text
    assert "3-5" in text
    assert "window block 64, 4 sinks, linear F=64" in text
    assert "kept: the recipe keeps it" in text
    assert "FLOP/s" in text


def test_the_evaluation_window_is_the_largest_of_the_plan() -> None:
    assert evaluation_window(prepare("demo", "hedgehog").plan) == 64
    assert evaluation_window(prepare("demo", "hedgehog-pure").plan) is None


def test_a_stage_result_survives_the_run_record() -> None:
    result = StageResult("transfer", steps=3, tokens=4, layer_errors={0: 0.5, 11: 0.25})
    record = pipeline._Record("id", {}, stages=[json.loads(json.dumps(vars(result)))])
    assert record.results() == [result]
