"""Load what a conversion saved, on this machine and by the installed attnconvert, and measure it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attnconvert
from attnconvert.convert.evaluate import EvalProgress, EvalReport, evaluate_models
from attnconvert.convert.load import Loaded, load_model, resolve
from attnconvert.convert.merge import load_merged
from attnconvert.convert.pipeline import FOLDER
from attnconvert.convert.plan import evaluation_window
from attnconvert.convert.save import FACTS_FILE
from attnconvert.errors import AttnConvertError
from attnconvert.recipes.load import LoadedRecipe, load_recipe
from attnconvert.surgery.plan import ConversionPlan

NO_TEACHER = "none"
"""The word for `--against` that measures the student alone."""


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


def evaluate_converted(
    folder: Path,
    *,
    against: str | None = None,
    tokens: int | None = None,
    data: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    note: Callable[[str], None] | None = None,
    progress: EvalProgress | None = None,
) -> tuple[EvalReport, dict[str, Any]]:
    """Measure a converted model against its teacher as the end of its conversion did, or on other text.

    Args:
        folder: a checkpoint or an adapters folder.
        against: the teacher, None = the one that was converted, `none` = no teacher.
        tokens: held-out tokens, None = as the recipe says.
        data: other held-out text (the forms of `data.source`), None = the conversion's own held-out documents.
        device: a torch device.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        note: told what happens.
        progress: told about each batch.

    Returns:
        The report, and the facts about the conversion that `report.write_report` takes.

    Raises:
        AttnConvertError: `not-converted`, `no-run-record`, and those of loading models and text.
    """
    from attnconvert.distill.data import load_data
    from attnconvert.surgery.swap import zeroed_linear_branch

    say = note or (lambda text: None)
    record = read_record(folder)
    overrides = [] if tokens is None else [f"evaluate.tokens={tokens}"]
    if data is not None:
        overrides += [f"data.source={json.dumps(data)}", f"data.eval_source={json.dumps(data)}"]
    recipe = load_recipe(record.recipe.source_path, overrides).recipe
    seed = int(record.facts["settings"]["seed"])

    say("load model")
    loaded = load_saved(str(folder), dtype=dtype, device="cpu", base=None if against in (None, NO_TEACHER) else against)
    student = loaded.model
    if getattr(student.config, "attn_plan", None) is None:
        raise AttnConvertError("not-converted", f"the model in {str(folder)!r} has no converted attention", hint="give the folder that a conversion wrote")
    say("read text")
    held_out = load_data(
        recipe.data,
        loaded.tokenizer,
        length=recipe.stages.finetune.length,
        num_train_tokens=0,
        num_eval_tokens=recipe.evaluate.tokens,
        eval_length=recipe.evaluate.length,
        seed=seed,
    )
    teacher = None
    if against != NO_TEACHER:
        say("load teacher")
        source = resolve(record.teacher, revision=record.revision) if against is None else resolve(against)
        teacher = load_model(source, dtype=dtype).model
    # 16-bit weights are computed with in fp32 on a CPU: exact, and faster
    models = [model.float() if device == "cpu" else model for model in (student, teacher) if model is not None]
    for model in models:
        model.to(device)

    ablations: dict[str, Callable[[], Any]] = {}
    if any(getattr(module, "linear", False) is True for module in student.modules() if hasattr(module, "linear_enabled")):
        ablations["linear branch zeroed"] = lambda: zeroed_linear_branch(student)
    plan = ConversionPlan.from_dict(student.config.attn_plan)
    say("evaluate")
    report = evaluate_models(
        student,
        teacher,
        loaded.tokenizer,
        held_out.eval,
        recipe.evaluate,
        device=device,
        window=evaluation_window(plan),
        ablations=ablations,
        progress=progress,
        seed=seed,
    )
    report = replace(report, notes=(*report.notes, *_text_notes(record, held_out.description, tokens, data)))
    facts = record.facts
    conversion = {
        "recipe_name": record.recipe.recipe.name,
        "base_model": record.teacher,
        "base_model_type": plan.base_model_type,
        "plan": plan.to_dict(),
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
    return report, conversion


def _text_notes(record: RunRecord, description: Mapping[str, Any], tokens: int | None, data: str | None) -> list[str]:
    """What a reader must know about the text before comparing these figures with others."""
    if data is not None:
        return [f"The text is {data}, given with --data; whether the model was trained on it is not known."]
    before = (record.facts.get("data") or {}).get("eval", {}).get("sha256")
    if tokens is None and before is not None and before != description["eval"]["sha256"]:
        return ["The held-out text is not the one that the conversion measured: the source or the tokenizer has changed since."]
    return []
