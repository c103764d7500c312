"""Load what a conversion saved, on this machine and by the installed attnconvert, and measure it again: the same, more, or against limits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import attnconvert
from attnconvert.convert.evaluate import EvalProgress, EvalReport, evaluate_models, json_safe
from attnconvert.convert.load import Loaded, load_model, resolve
from attnconvert.convert.merge import load_merged
from attnconvert.convert.pipeline import FOLDER
from attnconvert.convert.plan import evaluation_window
from attnconvert.convert.regroup import regrouped_heads
from attnconvert.convert.save import FACTS_FILE
from attnconvert.distill.config import EvalConfig, Suite
from attnconvert.errors import AttnConvertError
from attnconvert.recipes.load import LoadedRecipe, load_recipe
from attnconvert.surgery.plan import ConversionPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnconvert.distill.data import PackedRows

NO_TEACHER = "none"
"""The word for `--against` that measures the student alone."""
BASELINE = "teacher, same data"
"""Name of the dense baseline's rows in a report."""
BASELINE_FOLDER = "baseline"
"""Where in the run's own folder the dense baseline lies, when there is one."""
SUITES: tuple[Suite, ...] = get_args(Suite)
NUM_FIDELITY_ROWS: Mapping[Suite, int] = MappingProxyType({"quick": 2, "standard": 4, "long": 8})


@dataclass(frozen=True)
class RunRecord:
    """What a result folder says about its own making.

    Attributes:
        recipe: the recipe, every default filled in.
        facts: contents of run.json: settings, plan, stages, data, seconds, command, versions, device.
    """

    recipe: LoadedRecipe
    facts: Mapping[str, Any]

    @property
    def teacher(self) -> str:
        """The model that was converted, as the user named it."""
        return str(self.facts["settings"]["model"]["name"])

    @property
    def revision(self) -> str | None:
        """Its Hub revision."""
        revision = self.facts["settings"]["model"]["revision"]
        return None if revision is None else str(revision)


def load_saved(name: str, *, dtype: str = "auto", device: str = "cpu", base: str | None = None) -> Loaded:
    """A converted checkpoint, an adapters folder (merged in memory), or an unconverted model; no code from the checkpoint runs.

    Args:
        name: a folder, or anything `load.resolve` takes.
        dtype: `auto`, `fp32`, `bf16` or `fp16`; adapters keep the data type they were trained with.
        device: a torch device.
        base: the base model of an adapters folder, where it is not as recorded.

    Raises:
        AttnConvertError: those of `load.load_model` and `merge.load_merged`; also `missing-tensors` and `unknown-plan`.
    """
    folder = Path(name).expanduser()
    if (folder / FACTS_FILE).is_file():
        merged = load_merged(folder, base=base)
        return Loaded(merged.model.to(device), merged.tokenizer, merged.source)
    attnconvert.register()
    try:
        return load_model(resolve(name), dtype=dtype, device=device)
    except ValueError as error:  # what the runtime, which travels with checkpoints and has no AttnConvertError, says of a broken one
        text = str(error)
        if text.startswith("the checkpoint lacks"):
            raise AttnConvertError("missing-tensors", text, where=name, hint="copy or convert the model again") from error
        if text.startswith(("attn_plan has schema version", "this config.json has no base_model_type", "this transformers does not know")):
            raise AttnConvertError("unknown-plan", text, where=name) from error
        raise


def locate(source: str) -> tuple[Path, Path]:
    """Where a converted model lies and where its report goes: a folder is both; a model on the Hub is downloaded, its report goes to `<name>-evaluation` here.

    Raises:
        AttnConvertError: `not-converted`, `model-not-found`, `gated-model`, `offline`, `cannot-write`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or source.count("/") != 1 or source.startswith((".", "~", "/")):
        return folder, folder
    from huggingface_hub import snapshot_download

    from attnconvert.convert.load import Source, explained

    with explained(Source(source, source), "model"):
        checkpoint = Path(snapshot_download(source))
    read_record(checkpoint)
    out = Path(f"{folder.name}-evaluation")
    try:
        # report.html takes the training curves and the recipe from here.
        shutil.copytree(checkpoint / FOLDER, out / FOLDER, dirs_exist_ok=True)
    except OSError as error:
        raise AttnConvertError("cannot-write", f"cannot write into '{out}': {error.strerror or error}", where=str(Path.cwd())) from error
    return checkpoint, out


def read_record(folder: Path) -> RunRecord:
    """The record of the run that wrote `folder`.

    Raises:
        AttnConvertError: `not-converted`, or `no-run-record`.
    """
    if not folder.is_dir():
        raise AttnConvertError("not-converted", f"there is no folder {str(folder)!r}", expected="a folder that `attnconvert linearize` or `convert` wrote")
    run, recipe = folder / FOLDER / "run.json", folder / FOLDER / "recipe.yaml"
    try:
        facts = json.loads(run.read_text(encoding="utf-8"))
        assert isinstance(facts["settings"]["model"]["name"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise AttnConvertError(
            "no-run-record",
            f"{str(folder)!r} has no readable record of a conversion",
            where=str(run),
            expected="a folder that `attnconvert linearize` or `convert` wrote",
            hint="copy the whole folder, with its subfolder attnconvert/",
        ) from error
    return RunRecord(load_recipe(recipe), facts)


@dataclass(frozen=True)
class TaskOptions:
    """How lm-evaluation-harness runs.

    Attributes:
        names: its tasks, groups, or names of the YAML tasks of `include_path`; empty = none.
        include_path: a folder of local YAML tasks.
        limit: samples per task, or below 1 a share of them; None = all.
        num_fewshot: examples in the prompt, None = the task's own number.
        batch_size: samples of one forward pass.
    """

    names: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int = 8


def evaluate_converted(
    folder: Path,
    *,
    suite: Suite | None = None,
    against: str | None = None,
    baseline: str | None = None,
    tokens: int | None = None,
    data: str | None = None,
    fidelity: bool | None = None,
    tasks: TaskOptions | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    note: Callable[[str], None] | None = None,
    progress: EvalProgress | None = None,
    keep: Callable[[EvalReport, dict[str, Any]], object] | None = None,
) -> tuple[EvalReport, dict[str, Any]]:
    """Measure a converted model against its teacher as the end of its conversion did, or more of it, or on other text.

    Args:
        folder: a checkpoint or an adapters folder.
        suite: `EvalConfig.suite`; None = what the recipe says and nothing more.
        against: the teacher, None = the one that was converted, `none` = no teacher.
        baseline: a softmax model finetuned on the same text, measured beside; None = the run's own where it has one (attnconvert/baseline).
        tokens: held-out tokens, None = as the suite or the recipe says.
        data: other held-out text (the forms of `data.source`), None = the conversion's own held-out documents.
        fidelity: compare attention maps and text side by side; None = with the suites standard and long.
        tasks: what to run with lm-evaluation-harness, None = nothing.
        device: a torch device.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        note: told what happens.
        progress: told about each batch.
        keep: given what there is so far before attention, text and tasks are measured, which may take long.

    Returns:
        The report, and the facts about the conversion that `report.write_report` takes.

    Raises:
        AttnConvertError: `not-converted`, `no-run-record`, `unknown-suite`, and those of loading models and text and of running tasks.
    """
    from attnconvert.convert.card import base_facts
    from attnconvert.distill.data import load_data
    from attnconvert.surgery.swap import zeroed_linear_branch

    say = note or (lambda text: None)
    if suite is not None and suite not in SUITES:
        raise AttnConvertError("unknown-suite", f"unknown suite {suite!r}", expected=f"one of: {', '.join(SUITES)}")
    record = read_record(folder)
    overrides = [] if data is None else [f"data.source={json.dumps(data)}", f"data.eval_source={json.dumps(data)}"]
    recipe = load_recipe(record.recipe.source_path, overrides).recipe
    seed = int(record.facts["settings"]["seed"])

    say("load model")
    loaded = load_saved(str(folder), dtype=dtype, device="cpu", base=None if against in (None, NO_TEACHER) else against)
    student = loaded.model
    plan = _plan_of(student, record)
    if plan is None:
        raise AttnConvertError("not-converted", f"the model in {str(folder)!r} has no converted attention", hint="give the folder that a conversion wrote")
    config = _eval_config(recipe.evaluate, suite, tokens, student)
    say("read text")
    held_out = load_data(
        recipe.data,
        loaded.tokenizer,
        length=recipe.stages.finetune.length,
        num_train_tokens=0,
        num_eval_tokens=config.tokens,
        eval_length=config.length,
        seed=seed,
    )
    teacher = None
    if against != NO_TEACHER:
        say("load teacher")
        source = resolve(record.teacher, revision=record.revision) if against is None else resolve(against)
        teacher = load_model(source, dtype=dtype).model
    own_baseline = folder / FOLDER / BASELINE_FOLDER
    if baseline is None and (own_baseline / "config.json").is_file():
        baseline = str(own_baseline)
    others = {}
    if baseline is not None:
        say("load baseline")
        others[BASELINE] = load_model(resolve(baseline), dtype=dtype).model
    # 16-bit weights are computed with in fp32 on a CPU: exact, and faster
    for model in (student, teacher, *others.values()):
        if model is not None:
            (model.float() if device == "cpu" else model).to(device)

    ablations: dict[str, Callable[[], Any]] = {}
    if any(getattr(module, "linear", False) is True for module in student.modules() if hasattr(module, "linear_enabled")):
        ablations["linear branch zeroed"] = lambda: zeroed_linear_branch(student)
    say("evaluate")
    report = evaluate_models(
        student,
        teacher,
        loaded.tokenizer,
        held_out.eval,
        config,
        device=device,
        window=evaluation_window(plan),
        ablations=ablations,
        progress=progress,
        others=others,
        seed=seed,
    )
    same_text = data is None and (config.tokens, config.length) == (recipe.evaluate.tokens, recipe.evaluate.length)
    report = replace(report, notes=(*report.notes, *_text_notes(record, held_out.description, same_text, data)))
    facts = record.facts
    conversion = {
        "recipe_name": record.recipe.recipe.name,
        "base_model": record.teacher,
        "base_model_type": plan.base_model_type,
        "base_model_license": base_facts(record.teacher, revision=record.revision).license,
        "plan": plan.to_dict(),
        "search": facts.get("search"),
        "heads": facts.get("heads"),
        "stages": facts.get("stages", []),
        "data": facts.get("data"),
        "evaluation_data": held_out.description,
        "versions": facts.get("versions", {}),
        "device": facts.get("device"),
        "seconds": sum(facts.get("seconds", {}).values()),
        "command": facts.get("command", ""),
        "recipe": record.recipe.resolved,
        "seed": seed,
    }
    compares = fidelity if fidelity is not None else suite in ("standard", "long")
    if keep is not None and (compares or (tasks is not None and tasks.names)):
        keep(report.with_findings(), conversion)
    if compares:
        say("compare attention")
        report = _with_fidelity(report, student, teacher, loaded.tokenizer, held_out.eval, device, NUM_FIDELITY_ROWS[suite or "quick"], seed, progress)
    if tasks is not None and tasks.names:
        from attnconvert.convert.tasks import run_tasks

        say("tasks")
        results = run_tasks(
            student,
            teacher,
            loaded.tokenizer,
            tasks.names,
            include_path=tasks.include_path,
            limit=tasks.limit,
            num_fewshot=tasks.num_fewshot,
            batch_size=tasks.batch_size,
            device=device,
        )
        report = replace(report, tasks=tuple(json_safe(results)))
    return report.with_findings(), conversion


def _plan_of(student: PreTrainedModel, record: RunRecord) -> ConversionPlan | None:
    """The plan in the model's config; of a stock checkpoint, whose config has none, that of the run which changed its projections."""
    plan = getattr(student.config, "attn_plan", None)
    if plan is not None:
        return ConversionPlan.from_dict(plan)
    recorded = record.facts.get("plan")
    found = None if recorded is None else ConversionPlan.from_dict(recorded)
    return found if found is not None and regrouped_heads(found) is not None else None


def _eval_config(recipe: EvalConfig, suite: Suite | None, tokens: int | None, student: PreTrainedModel) -> EvalConfig:
    """The settings of this evaluation. A suite's rows are not longer than the model was built for; a recipe's are as it says."""
    config = recipe if suite is None else EvalConfig.suite(suite, recipe)
    limit = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.length > limit and config.length != recipe.length:
        config = config.model_copy(update={"length": int(limit)})
    return config if tokens is None else config.model_copy(update={"tokens": tokens})


def _with_fidelity(
    report: EvalReport,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: PackedRows,
    device: str,
    num_rows: int,
    seed: int,
    progress: EvalProgress | None,
) -> EvalReport:
    """The report with attention maps compared, where there are cores on the projections of the original to ask for theirs, and text side by side."""
    from attnconvert.convert.fidelity import attention_fidelity, side_by_side
    from attnconvert.surgery.swap import changed_projections

    if getattr(student.config, "attn_plan", None) is not None and not changed_projections(student):
        fidelity = attention_fidelity(student, teacher, rows, device=device, num_rows=num_rows, seed=seed, progress=progress)
        report = replace(report, fidelity=json_safe(fidelity))
    return replace(report, generation=tuple(json_safe(side_by_side(student, teacher, tokenizer, device=device))))


# ---------------------------------------------------------------- limits, for CI


@dataclass(frozen=True)
class Threshold:
    """A limit of `--fail-below`: a figure, the worst value it may have, and whether that is a maximum or a minimum."""

    name: str
    value: float
    kind: Literal["maximum", "minimum"]


_LIMITS: Mapping[str, Literal["maximum", "minimum"]] = MappingProxyType({"ppl-ratio": "maximum", "kl": "maximum", "agreement": "minimum", "passkey": "minimum"})


def parse_thresholds(texts: Sequence[str]) -> tuple[Threshold, ...]:
    """`ppl-ratio=1.05`, `kl=0.1`, `agreement=0.9`, `passkey=0.5` -> limits. Call it before anything is measured.

    Raises:
        AttnConvertError: `bad-threshold`.
    """
    thresholds = []
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        expected = f"NAME=NUMBER with a name of: {', '.join(_LIMITS)}"
        if name not in _LIMITS:
            raise AttnConvertError(
                "bad-threshold",
                f"no figure is called {name!r}",
                where=f"--fail-below {text}",
                expected=expected,
                hint="ppl-ratio and kl are maximums, agreement and passkey are minimums",
            )
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise AttnConvertError("bad-threshold", f"{value!r} is not a number", where=f"--fail-below {text}", expected=expected)
        thresholds.append(Threshold(name, number, _LIMITS[name]))
    return tuple(thresholds)


def check_thresholds(report: EvalReport, thresholds: Sequence[Threshold]) -> None:
    """Fail when the student is worse than a limit. Call it when the report is written and shown.

    `passkey` is the lowest recall over the lengths measured. A figure that was not measured (no teacher, no passkey prompts) fails: a check that
    cannot be made has not been passed. So does one that is not finite.

    Raises:
        AttnConvertError: `below-threshold`, with every limit that was missed.
    """
    student = report.quality_of("student")
    estimates = {"ppl-ratio": student.ppl_ratio, "kl": student.kl, "agreement": student.agreement}
    figures = {name: None if estimate is None else estimate.value for name, estimate in estimates.items()}
    figures["passkey"] = min((row.accuracy for row in report.passkey if row.name == "student"), default=None)
    missed = []
    for threshold in thresholds:
        value = figures[threshold.name]
        if value is None:
            missed.append(f"{threshold.name} was not measured")
        elif not (value <= threshold.value if threshold.kind == "maximum" else value >= threshold.value):
            missed.append(f"{threshold.name} is {value:.4g}, the {threshold.kind} is {threshold.value:g}")
    if missed:
        raise AttnConvertError("below-threshold", "; ".join(missed), hint="report.md in the model's folder has all figures and what was found wrong")


def _text_notes(record: RunRecord, description: Mapping[str, Any], same_text: bool, data: str | None) -> list[str]:
    """What a reader must know about the text before comparing these figures with others."""
    if data is not None:
        return [f"The text is {data}, given with --data; whether the model was trained on it is not known."]
    before = (record.facts.get("data") or {}).get("eval", {}).get("sha256")
    if same_text and before is not None and before != description["eval"]["sha256"]:
        return ["The held-out text is not the one that the conversion measured: the source or the tokenizer has changed since."]
    return []
