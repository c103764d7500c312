"""One conversion from start to end: prepare (nothing is spent), then run: read text, load, swap, transfer, keep, finetune, merge, save, evaluate.

While it runs, everything lives in `<out>.run` beside the output: settings, metrics, checkpoints, the choice of kept layers. A run killed at any
point goes on from there with `resume` and ends with the same weights, because each stage is a pure function of the settings and its checkpoint.
The output appears in one rename when it is complete; the run folder goes last.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import attnconvert
from attnconvert.convert.load import Loaded, Source, load_config, load_model, load_tokenizer, resolve
from attnconvert.convert.mix_heads import calibrate_heads, measure_usage, start_routers, uncalibrated, with_calibration
from attnconvert.convert.plan import Estimate, build_plan, default_length, estimate, evaluation_window, layer_settings, with_span_rules
from attnconvert.convert.regroup import has_uneven_heads, regroup_for_training, regrouped_heads, uneven_for_training
from attnconvert.convert.report import ranges
from attnconvert.convert.sparsify import chosen_rules, needs_search, read_span_plans, search_spans, undecided_spans
from attnconvert.embedded import demo_overrides
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.blocks.rule import block_rule
from attnconvert.recipes.load import LoadedRecipe, dump_resolved, load_recipe
from attnconvert.surgery import registry
from attnconvert.surgery.methods.moa import MoaConfig
from attnconvert.surgery.plan import ConversionPlan
from attnconvert.surgery.sites import Site, find_sites

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnconvert.convert.evaluate import EvalReport, Quality
    from attnconvert.distill.data import MixedRows, PackedRows
    from attnconvert.distill.loop import ConvertedLayer, RunContext, StageResult

RUN_SCHEMA_VERSION = 1
FOLDER = "attnconvert"
"""Folder inside a checkpoint that holds the record of its run."""

_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_KL_ROWS = 8
_GIB = 2**30


# ---------------------------------------------------------------- what goes in and out


class RunUI(Protocol):
    """Receives what happens during a run; shows it or not."""

    def on_phase(self, name: str) -> None:
        """A phase begins: one of `read text`, `load model`, `swap`, `transfer`, `keep`, `finetune`, `merge`, `save`, `same-data baseline`, `evaluate`."""

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        """One optimizer step is done (`distill.loop.Progress`)."""

    def on_eval(self, what: str, done: int, total: int) -> None:
        """Part of a measurement, or of reading text, is done."""

    def note(self, text: str) -> None:
        """Something the user should know, as a sentence."""


@dataclass(frozen=True)
class RunOptions:
    """How and where a conversion runs; nothing in here changes what is learned, except seed and dtype.

    Attributes:
        out: the folder to create.
        device: `auto` (a GPU if there is one), or a torch device.
        dtype: data type the weights are loaded and saved in: `auto` (the checkpoint's), `fp32`, `bf16`, `fp16`. Training on a CPU computes in fp32 anyway.
        resume: go on with the run that was interrupted; without one, start.
        adapters_only: save plan, cores and LoRA instead of a full checkpoint.
        overwrite: replace the checkpoint at `out`, and forget an interrupted run.
        skip_evaluation: no report.
        seed: instead of the recipe's.
        command: the command line, for the report.
    """

    out: Path
    device: str = "auto"
    dtype: str = "auto"
    resume: bool = False
    adapters_only: bool = False
    overwrite: bool = False
    skip_evaluation: bool = False
    seed: int | None = None
    command: str = ""


@dataclass(frozen=True)
class Prepared:
    """Everything known before weights are read.

    Attributes:
        source: where the model comes from.
        recipe: the recipe with overrides applied.
        config: the model's transformers config.
        sites: its attention sites, in layer order.
        plan: what becomes of them.
        estimate: what that saves and costs.
        notes: sentences for the user.
    """

    source: Source
    recipe: LoadedRecipe
    config: Any
    sites: list[Site]
    plan: ConversionPlan
    estimate: Estimate
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ConversionResult:
    """What a run made.

    Attributes:
        path: the folder.
        report: the evaluation, None when it was skipped.
        stages: what each training stage did.
        plan: the final plan, with the kept layers.
        seconds: wall-clock seconds over all sessions of the run.
    """

    path: Path
    report: EvalReport | None
    stages: list[StageResult]
    plan: ConversionPlan
    seconds: float


# ---------------------------------------------------------------- prepare


def prepare(
    model: str, recipe: str, *, overrides: Sequence[str] = (), revision: str | None = None, trust_remote_code: bool = False, family: str | None = None
) -> Prepared:
    """Load the recipe and the model's config, and plan; reads no weights and writes nothing.

    Args:
        model: a Hub id, a folder, a .gguf file, or `demo`.
        recipe: name of a shipped recipe, or a YAML file.
        overrides: `--set` texts.
        revision: Hub revision of the model.
        trust_remote_code: allow code from the model's repository.
        family: the CLI verb, such as `linearize`: every method of the recipe must belong to it. None = any.

    Raises:
        AttnConvertError: from the recipe, the model, the plan; also `wrong-family`, `already-converted`, `quantized-model`, `length-too-long`.
    """
    notes: list[str] = []
    source = resolve(model, revision=revision, trust_remote_code=trust_remote_code)
    loaded = load_recipe(recipe, overrides)
    regroups = all(registry.get(name).family == "regroup" for name in loaded.recipe.methods)
    if model == "demo" and source.name == "demo":
        small = demo_overrides(
            [("", {}) if rule.config is None else (registry.get(rule.method).family, rule.config.model_dump()) for rule in loaded.recipe.layers]
        )
        notes.append(f"The embedded model uses a small budget unless you set another: {', '.join(small)}.")
        loaded = load_recipe(recipe, (*small, *overrides))
    if family is not None:
        _check_family(loaded, family)
    attnconvert.register()  # a folder that was converted before is then recognised as such
    config = load_config(source)
    if config.model_type == "attnconvert" or getattr(config, "attn_plan", None) is not None:
        raise AttnConvertError("already-converted", f"{model!r} was converted before", hint="convert the original model with the recipe you want")
    if source.gguf_file is None and getattr(config, "quantization_config", None) is not None:
        raise AttnConvertError(
            "quantized-model",
            f"the weights of {model!r} are quantized, and adapters cannot be merged into them",
            expected="fp32, bf16 or fp16 weights",
            hint="convert the original model, then quantize",
        )
    if regroups:
        from attnconvert.surgery.regroup import stock_config

        stock = stock_config(config)
        if stock is not config:
            notes.append(f"Converted as a {stock.model_type!r} model that computes the same: a {config.model_type!r} model has no number of KV heads.")
        config = stock
    sites = find_sites(config)
    plan = build_plan(loaded.recipe, config, sites)
    heads = regrouped_heads(plan)
    if heads is not None:
        from attnconvert.surgery.regroup import check_architecture

        check_architecture(config, [heads], plan.converted[0].config["query_heads"])
    if has_uneven_heads(plan):
        _check_uneven(plan, config)
    _check_lengths(loaded, config)
    _check_calibration(loaded, plan, sites)
    plan, found = read_span_plans(plan, layer_settings(loaded.recipe, plan), sites)
    notes += found
    blocks, align = {block_rule(**row.config).alignment for row in plan.converted if "block_size" in row.config}, loaded.recipe.data.align
    if loaded.recipe.stages.finetune.tokens and any(align % size for size in blocks):
        notes.append(f"Training documents begin at multiples of {align} tokens, not of {max(blocks)}: `--set data.align={max(blocks)}` makes training faster.")
    element_size = _SIZES[_config_dtype(config)]
    return Prepared(
        source=source,
        recipe=loaded,
        config=config,
        sites=sites,
        plan=plan,
        estimate=estimate(plan, sites, loaded.recipe, _count_parameters(config), default_length(config), element_size),
        notes=tuple(notes),
    )


def _check_uneven(plan: ConversionPlan, config: Any) -> None:
    """Refuse what layers with heads of their own cannot be combined with, before a model is loaded."""
    from attnconvert.surgery.regroup import check_architecture

    check_architecture(config, [])
    others = sorted({str(row.method) for row in plan.converted if "kv_heads" not in row.config})
    if others or plan.num_kept_later:
        raise AttnConvertError(
            "uneven-heads",
            "layers whose projections change cannot be " + (f"mixed with {', '.join(others)}" if others else "put back to softmax attention after transfer"),
            where="layers" if others else "keep",
            hint="convert all layers by one method, or name the layers that stay with keep.layers",
        )


def _check_calibration(loaded: LoadedRecipe, plan: ConversionPlan, sites: Sequence[Site]) -> None:
    """Refuse to calibrate routed heads on training text where there is none, before a model is loaded."""
    stages, wanted = loaded.recipe.stages, uncalibrated(loaded.recipe, plan, sites)
    if not wanted or stages.transfer.tokens or stages.finetune.tokens:
        return
    routers, shared = ([idx for idx, own in wanted.items() if getattr(own, name)] for name in ("router", "shared"))
    what = [f"the routers of layers {ranges(routers)} are fitted"] if routers else []
    what += [f"the shared units of layers {ranges(shared)} are chosen by their outputs"] if shared else []
    settings = (["router=norm"] if routers else []) + (["allocate=even"] if any(own.used is not None for own in wanted.values()) else [])
    settings += ["choose_shared=first"] if shared else []
    raise AttnConvertError(
        "no-calibration",
        f"{' and '.join(what)} on training text, and no stage reads any",
        where="layers",
        expected="a training stage" + ("; or router: norm" if routers else "") + ("; or choose_shared: first, or shared_units" if shared else ""),
        hint=f"`{' '.join(f'--set layers.0.config.{setting}' for setting in settings)}`",
    )


def _check_family(loaded: LoadedRecipe, family: str) -> None:
    other = [name for name in loaded.recipe.methods if registry.get(name).family != family]
    if other:
        belongs = registry.get(other[0]).family
        raise AttnConvertError(
            "wrong-family",
            f"recipe {loaded.recipe.name!r} uses {', '.join(other)}, which `attnconvert {family}` does not do",
            where=str(loaded.source_path),
            expected=f"methods of the family {family}: {', '.join(name for name in registry.available() if registry.get(name).family == family) or 'none'}",
            hint="`attnconvert convert` takes any recipe"
            if belongs == "none"
            else f"use `attnconvert {belongs}`, or `attnconvert convert`, which takes any recipe",
        )


def _check_lengths(loaded: LoadedRecipe, config: Any) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    recipe = loaded.recipe
    stages = {"transfer": recipe.stages.transfer, "finetune": recipe.stages.finetune}
    lengths = {f"stages.{name}.length": stage.length for name, stage in stages.items() if stage.tokens} | {"evaluate.length": recipe.evaluate.length}
    for number, rule in enumerate(recipe.layers):
        if limit is None or not isinstance(rule.config, MoaConfig) or not needs_search(rule.config):
            continue
        search = rule.config.search
        for name, length, fitting in (("lengths", search.lengths[-1], f"[{limit // 2},{limit}]"), ("validation_length", search.validation_length or 0, "null")):
            if length > limit:
                raise AttnConvertError(
                    "length-too-long",
                    f"attention spans are searched in contexts of up to {length} tokens, longer than the model's {limit} positions",
                    where=f"layers.{number}.config.search.{name}",
                    expected=f"at most {limit} (max_position_embeddings)",
                    hint=f"`--set layers.{number}.config.search.{name}={fitting}`",
                )
    for where, length in lengths.items():
        if limit is not None and length > limit:
            raise AttnConvertError(
                "length-too-long",
                f"sequences of {length} tokens are longer than the model's {limit} positions",
                where=where,
                expected=f"at most {limit} (max_position_embeddings)",
                hint=f"`--set {where}={limit}`",
            )


def _config_dtype(config: Any) -> str:
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in _SIZES else "float32"


def _count_parameters(config: Any) -> int:
    """Parameters of the model a config describes, tied ones once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------- the run folder


@dataclass
class _Record:
    """The state of a run, `run.json`; rewritten whole after every phase.

    Attributes:
        run_id: ties an output folder to its run folder.
        settings: what may not change between the sessions of a run.
        status: `running`, `saved` (the output is in place, the report is missing) or `complete`.
        seconds: phase -> wall-clock seconds, over all sessions.
        plan, stages, data: filled in when known.
        search: the search for attention spans, where there was one; a resumed run does not search again.
        heads: of layers with routed heads, by layer index as text: the `importance` of each unit, where calibration chose the shared ones, how much of the log
            norms the fitted routers `explain`ed before training, and the `usage` of the units, the share of held-out tokens that each is used by.
        command, versions, device: for the report.
    """

    run_id: str
    settings: dict[str, Any]
    status: Literal["running", "saved", "complete"] = "running"
    seconds: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    heads: dict[str, dict[str, Any]] | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def text(self) -> str:
        return json.dumps({"schema_version": RUN_SCHEMA_VERSION, **asdict(self)}, indent=2) + "\n"

    def results(self) -> list[StageResult]:
        from attnconvert.distill.loop import StageResult

        return [StageResult(**{**stage, "layer_errors": {int(k): v for k, v in stage["layer_errors"].items()}}) for stage in self.stages]


def _read_record(path: Path) -> _Record | None:
    """The record at `path`; None when there is none that this attnconvert can read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema_version") != RUN_SCHEMA_VERSION:
            return None
        return _Record(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _settings(prepared: Prepared, options: RunOptions, precision: str) -> dict[str, Any]:
    """What a resumed run must have in common with the one it resumes. How the rows are split into forward passes, and what is measured, may change."""
    recipe = {key: value for key, value in prepared.recipe.resolved.items() if key not in ("evaluate", "seed", "precision")}
    recipe["stages"] = {name: {k: v for k, v in stage.items() if k != "micro_batch_size"} for name, stage in recipe["stages"].items()}
    return {
        "model": {"name": prepared.source.name, "revision": prepared.source.revision},
        "recipe": recipe,
        "plan": prepared.plan.to_dict(),
        "dtype": options.dtype,
        "precision": precision,
        "seed": _seed(prepared, options),
        "adapters_only": options.adapters_only,
    }


def _seed(prepared: Prepared, options: RunOptions) -> int:
    return prepared.recipe.recipe.seed if options.seed is None else options.seed


def _changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, as `recipe.stages.transfer.lr: 0.01 -> 0.1`."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [text for key in dict.fromkeys([*before, *now]) for text in _changes(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [text for i, pair in enumerate(zip(before, now, strict=True)) for text in _changes(*pair, f"{name}.{i}")]
    return [] if before == now else [f"{name}: {str(before)[:60]} -> {str(now)[:60]}"]


def _run_folder(out: Path) -> Path:
    return out.with_name(out.name + ".run")


def _is_resumable(folder: Path) -> bool:
    """Whether a run folder holds work that is worth going on with: a training checkpoint, or a search for attention spans."""
    record = _read_record(folder / "run.json")
    return any((folder / "checkpoints").glob("*.pt")) or (record is not None and record.search is not None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the same run. The lock dies with its holder."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AttnConvertError(
                "run-in-use", "another process is working on this run", where=str(folder), hint="wait for it, or choose another output folder"
            ) from error
        yield


# ---------------------------------------------------------------- run


def run(prepared: Prepared, options: RunOptions, ui: RunUI) -> ConversionResult:
    """Convert, save and measure.

    Args:
        prepared: from `prepare`.
        options: where and how.
        ui: is told what happens.

    Raises:
        AttnConvertError: of every part; also `output-not-empty`, `unfinished-run`, `resume-mismatch`, `disk-full`, `run-in-use`, `unknown-device`.
            Before the first training checkpoint nothing is left on disk; after it the run folder stays for `resume`.
        KeyboardInterrupt: likewise.
    """
    if options.adapters_only and _new_projections(prepared.plan):
        raise AttnConvertError(
            "no-adapters-only",
            "a model with fewer KV heads cannot be saved as adapters: its projections are new as a whole",
            where="--adapters-only",
            hint="leave the option out" + ("" if has_uneven_heads(prepared.plan) else "; the checkpoint is a stock one"),
        )
    out = Path(os.path.abspath(options.out))
    options = replace(options, out=out)
    device, precision = torch_device(options.device), _precision(prepared, options)
    settings = _settings(prepared, options, precision)
    finished = _finished(out, settings, options)
    if finished is not None:
        ui.note(f"{out} is complete already; there is nothing to resume.")
        return finished
    record = _check_start(prepared, options, settings)
    for note in prepared.notes:
        ui.note(note)
    if options.resume:
        ui.note(f"Going on with the run in {_run_folder(out)}." if record is not None else "There is no interrupted run for this folder; starting one.")

    job = _Job(prepared, options, ui, device, precision, record or _Record(uuid.uuid4().hex, settings), record is not None)
    job.record.command, job.record.versions, job.record.device = options.command, versions(), _device_name(device)
    # Text and tokenizer first: they are quick to read, and most mistakes are there.
    tokenizer = load_tokenizer(prepared.source)
    with job.phase("read text"):
        texts = _load_texts(prepared, tokenizer, _seed(prepared, options), ui)
    job.record.data = texts.description | ({"license": _EMBEDDED_TEXT_LICENSE} if job.prepared.recipe.recipe.data.source == "embedded" else {})

    folder = _run_folder(out)
    created = _make_folders(folder)
    with _locked(folder):
        try:
            if not job.resumed:
                _clear(folder)
            _write_run_files(job, folder)
            report = _work(job, folder, tokenizer, texts)
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:
            # A run without such work would only stand in the way of the next try.
            if not _is_resumable(folder) and job.record.status == "running":
                shutil.rmtree(folder, ignore_errors=True)
                for parent in created:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise
    seconds = sum(job.record.seconds.values())
    assert job.record.plan is not None
    return ConversionResult(out, report, job.record.results(), ConversionPlan.from_dict(job.record.plan), seconds)


@dataclass
class _Job:
    """A run under way."""

    prepared: Prepared
    options: RunOptions
    ui: RunUI
    device: torch.device
    precision: Literal["fp32", "bf16"]
    record: _Record
    resumed: bool

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and add its time to the record, whether it ends well or not."""
        self.ui.on_phase(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record.seconds[name] = round(self.record.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def save_record(self, folder: Path) -> None:
        from attnconvert.distill.loop import write_atomic

        write_atomic(folder / "run.json", self.record.text().encode())

    def context(self, folder: Path) -> RunContext:
        from attnconvert.distill.loop import RunContext

        big = self.prepared.estimate.num_parameters > 2e9
        return RunContext(
            run_dir=folder,
            seed=_seed(self.prepared, self.options),
            device=self.device,
            precision=self.precision,
            gradient_checkpointing=big and self.device.type == "cuda",
            progress=self.ui,
            resume=self.resumed,
            checkpoint_every=20 if self.device.type == "cpu" else 100,
        )


def _check_start(prepared: Prepared, options: RunOptions, settings: Mapping[str, Any]) -> _Record | None:
    """Everything that can be wrong with the output place. Returns the record of the run to resume, or None to start afresh."""
    from attnconvert.convert.save import check_output

    out, folder = options.out, _run_folder(options.out)
    record = _read_record(folder / "run.json") if options.resume else None
    ours = record is not None and (saved := _read_record(out / FOLDER / "run.json")) is not None and saved.run_id == record.run_id
    # A run killed after the rename finds its own output in place and writes it again, or goes on behind it.
    check_output(out, overwrite=options.overwrite or ours)
    if folder.exists() and not folder.is_dir():
        raise AttnConvertError("output-not-a-folder", f"{str(folder)!r} is in the way", hint="choose another output folder")
    if record is not None:
        changed = _changes(record.settings, json.loads(json.dumps(settings)))
        if changed:
            raise AttnConvertError(
                "resume-mismatch",
                "the interrupted run had other settings",
                where=f"{folder}  " + "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else ""),
                expected="the model, recipe, dtype and seed of the interrupted run (micro_batch_size and evaluate may differ)",
                hint="restore the settings, or start afresh with --overwrite instead of --resume",
            )
    elif _is_resumable(folder) and not options.overwrite:
        what = "cannot be read" if options.resume else "was interrupted"
        raise AttnConvertError(
            "unfinished-run",
            f"a run into this folder {what}",
            where=str(folder),
            hint="start afresh with --overwrite" if options.resume else "go on with --resume, or start afresh with --overwrite",
        )
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise AttnConvertError(
            "cannot-write", f"no permission to write in {str(parent)!r}" if parent.is_dir() else f"{str(parent)!r} is not a folder", where=str(out)
        )
    needed = _disk_bytes(prepared, options)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise AttnConvertError(
            "disk-full",
            f"{free / _GIB:.2f} GiB are free, but the conversion writes about {needed / _GIB:.2f} GiB",
            where=str(parent),
            hint="make room, or choose an output folder on another disk",
        )
    return record


def _disk_bytes(prepared: Prepared, options: RunOptions) -> int:
    """What a run writes at most: the checkpoint, training state (parameters and two moments, twice while one replaces another), slack."""
    dtype = _DTYPES.get(options.dtype) or _config_dtype(prepared.config)
    if prepared.source.gguf_file is not None and options.dtype == "auto":
        dtype = "float32"
    estimate = prepared.estimate
    rank = prepared.recipe.recipe.stages.finetune.lora.rank
    wide = max(site.num_heads * site.head_dim for site in prepared.sites)
    trained = estimate.trained_parameters + len(prepared.plan.converted) * 8 * wide * rank
    weights = 0 if options.adapters_only else estimate.num_parameters * _SIZES[dtype]
    return int(1.02 * weights + 4 * trained * 7 + 2**25)


def _make_folders(folder: Path) -> list[Path]:
    """Create the run folder and its parents; returns the parents that are new, innermost first."""
    from attnconvert.convert.save import disk_errors

    created = [path for path in folder.parents if not path.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return created


def _clear(folder: Path) -> None:
    """Forget an earlier run; the lock file stays, we hold it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


def _write_run_files(job: _Job, folder: Path) -> None:
    from attnconvert.distill.loop import write_atomic

    write_atomic(folder / "recipe.yaml", dump_resolved(job.prepared.recipe.recipe).encode())
    write_atomic(folder / "plan.json", (json.dumps(job.prepared.plan.to_dict(), indent=2) + "\n").encode())
    job.save_record(folder)


def _finished(out: Path, settings: Mapping[str, Any], options: RunOptions) -> ConversionResult | None:
    """The result of a run that was complete before this `resume`, or None."""
    from attnconvert.convert.evaluate import EvalReport
    from attnconvert.convert.save import discard_leftovers

    if out.parent.is_dir():
        discard_leftovers(out)
    record = _read_record(out / FOLDER / "run.json")
    if not options.resume or record is None or record.status != "complete" or record.settings != json.loads(json.dumps(settings)) or record.plan is None:
        return None
    shutil.rmtree(_run_folder(out), ignore_errors=True)  # killed between the last two steps
    report = out / "report.json"
    evaluation = json.loads(report.read_text(encoding="utf-8"))["evaluation"] if report.is_file() else None
    return ConversionResult(
        out,
        None if evaluation is None else EvalReport.from_dict(evaluation),
        record.results(),
        ConversionPlan.from_dict(record.plan),
        sum(record.seconds.values()),
    )


def _work(job: _Job, folder: Path, tokenizer: Any, texts: _Texts) -> EvalReport | None:
    """Train, save and measure; each part is skipped when the record says it is done."""
    if job.record.status != "saved":
        _train_and_save(job, folder, texts)
        job.record.status = "saved"
        job.save_record(folder)
    report = None
    if not job.options.skip_evaluation:
        baseline = None
        if job.prepared.recipe.recipe.evaluate.same_data_baseline:
            with job.phase("same-data baseline"):
                baseline = _same_data_model(job, folder / "baseline", texts)
        with job.phase("evaluate"):
            report = _evaluate(job, tokenizer, texts, baseline)
            _write_report(job, report)
    job.record.status = "complete"
    job.save_record(job.options.out / FOLDER)
    return report


# ---------------------------------------------------------------- text


@dataclass(frozen=True, eq=False)
class _Texts:
    """Rows of each stage and of the evaluation, and the JSON facts about them."""

    transfer: PackedRows
    finetune: PackedRows | MixedRows
    eval: PackedRows
    description: dict[str, Any]


def _load_texts(prepared: Prepared, tokenizer: Any, seed: int, ui: RunUI) -> _Texts:
    """Rows for both stages. Where the source holds enough text the stages see different rows, else both cycle over all of it."""
    from attnconvert.distill.data import MixedRows, PackedRows, load_data

    recipe = prepared.recipe.recipe
    transfer, finetune = recipe.stages.transfer, recipe.stages.finetune
    wanted = {stage: stage.steps * stage.batch_size * stage.length for stage in (transfer, finetune)}

    def load(length: int, num_tokens: int, document_tokens: tuple[int, int | None] = (0, None)) -> Any:
        return load_data(
            recipe.data,
            tokenizer,
            length=length,
            num_train_tokens=num_tokens,
            num_eval_tokens=recipe.evaluate.tokens,
            eval_length=recipe.evaluate.length,
            seed=seed,
            document_tokens=document_tokens,
            progress=lambda done, total: ui.on_eval("text", done, total),
        )

    if finetune.tokens and finetune.lengths is not None:
        lengths, share = finetune.lengths, -(-wanted[finetune] // len(finetune.lengths))
        bounds = zip((0, *lengths), (*lengths[:-1], None), strict=False)
        parts = [load(length, share, own) for length, own in zip(lengths, bounds, strict=True)]
        mixed = MixedRows(tuple(part.train for part in parts))
        first = load(transfer.length, wanted[transfer]) if transfer.tokens else parts[0]
        sums = {key: sum(part.description["train"][key] for part in parts) for key in ("documents", "tokens", "rows", "tokens_wanted")}
        train = {**parts[-1].description["train"], **sums, "tokens_available": None, "sha256": mixed.sha256()}
        by_length = {str(length): part.description for length, part in zip(lengths, parts, strict=True)}
        epochs = max(part.description["train_epochs"] for part in parts)
        facts = {**parts[-1].description, "train": train, "train_epochs": epochs, "lengths": by_length}
        return _Texts(first.train, mixed, parts[0].eval, facts | ({"transfer": first.description} if transfer.tokens else {}))
    if transfer.length != finetune.length and transfer.tokens and finetune.tokens:
        first, second = load(transfer.length, wanted[transfer]), load(finetune.length, wanted[finetune])
        return _Texts(first.train, second.train, second.eval, {**second.description, "transfer": first.description})
    length = finetune.length if finetune.tokens else transfer.length
    data = load(length, sum(wanted.values()))
    num_first = wanted[transfer] // length
    if transfer.tokens and finetune.tokens and data.train.num_rows >= num_first + wanted[finetune] // length:
        rows = data.train
        return _Texts(
            PackedRows(rows.input_ids[:num_first], rows.position_ids[:num_first]),
            PackedRows(rows.input_ids[num_first:], rows.position_ids[num_first:]),
            data.eval,
            data.description,
        )
    return _Texts(data.train, data.train, data.eval, data.description)


# ---------------------------------------------------------------- training


def _train_and_save(job: _Job, folder: Path, texts: _Texts) -> None:
    import torch

    from attnconvert.convert.merge import Adapters
    from attnconvert.convert.save import fingerprint, save_adapters, save_checkpoint
    from attnconvert.distill.calibrate import calibrate
    from attnconvert.distill.finetune import run_finetune
    from attnconvert.distill.lora import add_lora, lora_targets, merge_lora
    from attnconvert.distill.transfer import run_transfer

    prepared, options, recipe = job.prepared, job.options, job.prepared.recipe.recipe
    context = job.context(folder)
    with _fast_matmul(job.device), _explained_memory(job):
        with job.phase("load model"):
            loaded = _load_source(prepared, options.dtype)
            model, dtype = loaded.model, loaded.model.dtype
            base_hash = fingerprint(model) if options.adapters_only else ""
            if _trains_in_fp32(job, dtype):
                model.float()
            model.to(job.device)
        with job.phase("swap"):
            lora_targets(model, [row.path for row in prepared.plan.converted], recipe.stages.finetune.lora.targets)  # a wrong target shows before any training
            layers, plan = _swap(job, model, loaded.tokenizer, texts, folder)
        with job.phase("calibrate"):
            calibrate(model, layers, texts.transfer, context)
        with job.phase("transfer"), _compiled_kernels(model, _compiles(job, recipe.stages.transfer.tokens)):
            transfer = run_transfer(model, layers, texts.transfer, recipe.stages.transfer, context)
        if plan.num_kept_later:
            with job.phase("keep"):
                plan = _keep_layers(job, model, transfer, texts, folder)
                layers = {row.layer_idx: layers[row.layer_idx] for row in plan.converted}
        with job.phase("finetune"):
            wrapped = add_lora(model, [row.path for row in plan.converted], recipe.stages.finetune.lora, seed=context.seed)
            compiled = replace(context, compile=_compiles(job, recipe.stages.finetune.tokens))
            finetune = run_finetune(wrapped, layers, texts.finetune, recipe.stages.finetune, compiled)
        job.record.plan, job.record.stages = plan.to_dict(), [asdict(transfer), asdict(finetune)]
        job.save_record(folder)

        layers.clear()  # with the teachers, where they are modules of their own
        # On the CPU, so that `merge` on another machine rounds alike.
        wrapped.to("cpu")
        extra = _record_files(job, folder)
        if options.adapters_only:
            with job.phase("save"):
                adapters = Adapters(
                    plan,
                    prepared.source.name,
                    prepared.source.revision,
                    base_hash,
                    options.dtype,
                    str(dtype).removeprefix("torch."),
                    prepared.recipe.resolved,
                    versions(),
                )
                save_adapters(
                    wrapped,
                    options.out,
                    base_name=prepared.source.name,
                    revision=prepared.source.revision,
                    facts=adapters.to_dict(),
                    extra_files=extra,
                    overwrite=True,  # run() has checked what is there
                )
            return
        with job.phase("merge"):
            merged = cast(Any, merge_lora(wrapped))
            merged.eval().requires_grad_(False)
        with job.phase("save"):
            merged.to(job.device)
            save_checkpoint(merged, loaded.tokenizer, options.out, dtype=dtype, extra_files=extra, overwrite=True)
        del wrapped, merged, model, loaded
        gc.collect()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def _new_projections(plan: ConversionPlan) -> bool:
    return regrouped_heads(plan) is not None or has_uneven_heads(plan)


def _load_source(prepared: Prepared, dtype: str) -> Loaded:
    """The source model, as the architecture that the plan was made for."""
    loaded = load_model(prepared.source, dtype=dtype)
    if loaded.model.config.model_type == prepared.config.model_type:
        return loaded
    from attnconvert.surgery.regroup import as_stock

    return replace(loaded, model=as_stock(loaded.model))


def _swap(job: _Job, model: Any, tokenizer: Any, texts: _Texts, folder: Path) -> tuple[dict[int, ConvertedLayer], ConversionPlan]:
    """Convert the loaded model in place. Returns the layers to train, which hold what their teachers need, and the plan that was carried out."""
    from attnconvert.surgery.swap import swap

    prepared, plan, seed, ui = job.prepared, job.prepared.plan, _seed(job.prepared, job.options), job.ui
    if has_uneven_heads(plan):
        settings = layer_settings(prepared.recipe.recipe, plan)
        layers, plan = uneven_for_training(model, prepared.sites, plan, settings, texts.transfer, seed, ui.note, ui.on_eval)
        return dict(layers), plan
    if regrouped_heads(plan) is not None:
        return dict(regroup_for_training(model, prepared.sites, plan, texts.transfer, seed, ui.note, ui.on_eval)), plan
    if undecided_spans(plan):
        plan = _search_spans(job, model, tokenizer, folder)
    plan, maps = _calibrate_heads(job, model, plan, texts, folder)
    swap(model, plan)
    start_routers(model, maps)
    return _cores(model), plan


def _calibrate_heads(job: _Job, model: Any, plan: ConversionPlan, texts: _Texts, folder: Path) -> tuple[ConversionPlan, dict[int, tuple[Tensor, Tensor]]]:
    """What calibration finds for layers with routed heads: the plan with their shared units, and the maps that their routers start with (`start_routers`)."""
    from safetensors.torch import load, save

    from attnconvert.distill.loop import write_atomic

    wanted, path = uncalibrated(job.prepared.recipe.recipe, plan, job.prepared.sites), folder / "routers.safetensors"
    if not wanted:
        return plan, {}
    if job.record.heads is None:  # a resumed run goes on with what it has trained with
        facts, maps = calibrate_heads(model, job.prepared.sites, plan, wanted, texts.transfer, _seed(job.prepared, job.options), job.ui.on_eval)
        write_atomic(path, save({f"{idx}.{name}": part for idx, parts in maps.items() for name, part in zip(("weight", "bias"), parts, strict=True)}))
        job.record.heads = facts
        job.save_record(folder)
    saved = load(path.read_bytes())
    maps = {idx: (saved[f"{idx}.weight"], saved[f"{idx}.bias"]) for idx, own in wanted.items() if own.router}
    return with_calibration(plan, wanted, job.record.heads), maps


def _search_spans(job: _Job, model: Any, tokenizer: Any, folder: Path) -> ConversionPlan:
    """The plan with rules for the attention spans that the recipe leaves to calibration."""
    prepared = job.prepared
    if job.record.search is None:
        settings = {idx: config for idx, config in layer_settings(prepared.recipe.recipe, prepared.plan).items() if isinstance(config, MoaConfig)}
        model.eval()
        found = search_spans(
            model,
            tokenizer,
            prepared.sites,
            settings,
            prepared.recipe.recipe.data,
            seed=_seed(prepared, job.options),
            note=job.ui.note,
            progress=job.ui.on_eval,
        )
        for note in found.notes:
            job.ui.note(note)
        job.record.search = found.to_dict()
        job.save_record(folder)
    else:
        job.ui.note("The search for attention spans was done before.")
    return with_span_rules(prepared.plan, chosen_rules(job.record.search))


def _compiles(job: _Job, num_tokens: int) -> bool:
    """Whether a stage of `num_tokens` gains more from compiling than it costs (about a minute on an H100 with 16 CPU cores)."""
    return job.device.type == "cuda" and num_tokens >= 500_000


@contextlib.contextmanager
def _compiled_kernels(model: Any, enabled: bool) -> Iterator[None]:
    """Inside, the cores' operators run compiled. Never outside: evaluation and decoding meet many shapes, and each would be compiled anew."""
    cores = list(_cores(model).values())
    try:
        for core in cores:
            core.compile_kernel = enabled
        yield
    finally:
        for core in cores:
            core.compile_kernel = False


def _record_files(job: _Job, folder: Path) -> dict[str, str]:
    """The record of the run that stays with the output."""
    metrics = folder / "metrics.jsonl"
    return {
        f"{FOLDER}/recipe.yaml": dump_resolved(job.prepared.recipe.recipe),
        f"{FOLDER}/metrics.jsonl": metrics.read_text(encoding="utf-8") if metrics.exists() else "",
        f"{FOLDER}/run.json": job.record.text(),
    }


def _cores(model: Any) -> dict[int, Any]:
    from attnconvert.surgery.runtime.modeling import converted_sites

    return {idx: module.core for idx, _, module in converted_sites(model)}


def _keep_layers(job: _Job, model: Any, transfer: StageResult, texts: _Texts, folder: Path) -> ConversionPlan:
    """Put the chosen layers back to softmax. The choice is written down first: a resumed run must not choose again."""
    from attnconvert.distill.loop import write_atomic
    from attnconvert.surgery.swap import restore_softmax

    path, plan = folder / "keep.json", job.prepared.plan
    chosen = json.loads(path.read_text(encoding="utf-8")) if path.exists() and job.resumed else None
    if chosen is None:
        if plan.keep_by == "layer_error":
            scores, text = transfer.layer_errors, "relative error {:.3f} after transfer"
        else:
            scores, text = _kl_gains(job, model, texts.transfer), "KL to the teacher lower by {:.4f} when put back alone"
        # Ties go to the lower layer, so that the choice is one.
        ranked = sorted(scores, key=lambda layer: (-scores[layer], layer))[: plan.num_kept_later]
        chosen = {"by": plan.keep_by, "layers": sorted(ranked), "scores": {str(k): v for k, v in sorted(scores.items())}, "text": text}
        write_atomic(path, (json.dumps(chosen, indent=2) + "\n").encode())
    job.ui.note(f"Layers {', '.join(map(str, chosen['layers']))} go back to softmax attention ({chosen['by']}).")
    for layer in chosen["layers"]:
        plan = restore_softmax(model, [layer], f"kept after transfer: {chosen['text'].format(chosen['scores'][str(layer)])}")
    return plan


def _kl_gains(job: _Job, model: Any, rows: PackedRows) -> dict[int, float]:
    """Layer -> how much lower the KL to the teacher is when that layer alone is put back, nats per token, on a few training rows."""
    from attnconvert.surgery.runtime.modeling import teacher_mode

    everything = list(_cores(model))

    def kl_with(layers: Sequence[int]) -> float:
        with teacher_mode(model, layers):
            return _mean_kl(job, model, rows)

    before, gains = kl_with([]), {}
    for done, layer in enumerate(everything, start=1):
        gains[layer] = before - kl_with([layer])
        job.ui.on_eval("KL of each layer", done, len(everything))
    return gains


def _mean_kl(job: _Job, model: Any, rows: PackedRows) -> float:
    """KL(teacher || model) in nats per token over the first rows of the first epoch."""
    import torch

    from attnconvert.distill.data import epoch_indices
    from attnconvert.distill.losses import distillation_loss, hidden_states, logit_head
    from attnconvert.surgery.runtime.modeling import teacher_mode

    total, count = 0.0, 0
    vocab = model.get_output_embeddings().weight.shape[0]
    with torch.no_grad(), torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
        head = logit_head(model, rows.input_ids[:1, :16].to(job.device, torch.int64))
        for index in epoch_indices(rows.num_rows, _seed(job.prepared, job.options), 0, min(_KL_ROWS, rows.num_rows)):
            batch = rows.rows([index]).to(job.device)
            with teacher_mode(model):
                teacher = hidden_states(model, batch.input_ids, batch.position_ids)
            student = hidden_states(model, batch.input_ids, batch.position_ids)
            targets = batch.targets()
            loss = distillation_loss(student, teacher, head, targets, torch.ones_like(targets, dtype=torch.bool), 1.0, 0.0, max(16, 2**26 // vocab))
            total, count = total + float(loss.kl_sum), count + targets.numel()
    return total / count


# ---------------------------------------------------------------- evaluation


def load_converted(path: Path, *, dtype: str = "auto") -> Any:
    """A converted model from a checkpoint folder, on the CPU in eval mode, by the installed attnconvert (no code from the folder runs).

    Args:
        path: a folder written by a conversion.
        dtype: as transformers' `dtype`.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path), trust_remote_code=False, dtype=dtype).eval().requires_grad_(False)


def _evaluate(job: _Job, tokenizer: Any, texts: _Texts, baseline: Any) -> EvalReport:
    """Measure what is on disk, not what was in memory; beside it the baseline, unless that is None."""
    from attnconvert.convert.evaluate import evaluate_models
    from attnconvert.convert.merge import load_merged
    from attnconvert.convert.reevaluate import BASELINE
    from attnconvert.surgery.swap import zeroed_linear_branch

    out = job.options.out
    if job.options.adapters_only:
        student = load_merged(out).model
    else:
        student = load_converted(out)
    teacher = _load_source(job.prepared, job.options.dtype).model
    student, teacher = (_on_device(model, job) for model in (student, teacher))
    ablations: dict[str, Callable[[], Any]] = {}
    if any(getattr(core, "linear", False) for core in _cores(student).values()):
        ablations["linear branch zeroed"] = lambda: zeroed_linear_branch(student)
    usage = measure_usage(student, texts.eval, job.device, job.ui.on_eval)
    if usage:
        job.record.heads = {**(job.record.heads or {}), "usage": {str(idx): own for idx, own in usage.items()}}
    with _fast_matmul(job.device):
        return evaluate_models(
            student,
            teacher,
            tokenizer,
            texts.eval,
            job.prepared.recipe.recipe.evaluate,
            device=job.device,
            window=evaluation_window(ConversionPlan.from_dict(cast(dict[str, Any], job.record.plan))),
            ablations=ablations,
            progress=job.ui.on_eval,
            others={} if baseline is None else {BASELINE: baseline},
            seed=_seed(job.prepared, job.options),
        )


def _on_device(model: Any, job: _Job) -> Any:
    """Ready to measure: 16-bit weights are computed with in fp32 where the recipe's precision says so (exact, and faster on a CPU)."""
    if _trains_in_fp32(job, model.dtype):
        model.float()
    return model.to(job.device)


_EMBEDDED_TEXT_LICENSE = "public domain, MIT, BSD, Apache-2.0, PSF-2.0, PostgreSQL and WordNet, source by source in attnconvert's NOTICE"


def _write_report(job: _Job, report: EvalReport) -> None:
    from attnconvert.convert.card import base_facts
    from attnconvert.convert.html import write_html
    from attnconvert.convert.report import write_report

    record = job.record
    conversion = {
        "recipe_name": job.prepared.recipe.recipe.name,
        "base_model": job.prepared.source.name,
        "base_model_type": job.prepared.plan.base_model_type,
        "base_model_license": base_facts(job.prepared.source.name, revision=job.prepared.source.revision).license,
        "plan": record.plan,
        "search": record.search,
        "heads": record.heads,
        "stages": record.stages,
        "data": record.data,
        "versions": record.versions,
        "device": record.device,
        "seconds": sum(record.seconds.values()),
        "phase_seconds": record.seconds,
        "command": record.command,
        "recipe": job.prepared.recipe.resolved,
        "seed": _seed(job.prepared, job.options),
    }
    write_report(report, conversion, job.options.out)
    write_html(job.options.out)


def run_same_data_baseline(prepared: Prepared, options: RunOptions, ui: RunUI) -> Quality:
    """The honest comparison: the softmax model with the same LoRA, finetuned on the same rows, measured as a converted one is.

    Trains `stages.finetune` as the recipe has it, where KV heads become fewer the old projections in full like the new ones; its metrics and checkpoints stay in `options.out`, no model is saved.

    Args:
        prepared: the conversion to compare with; its adapters sit on the layers that it converts.
        options: `out` is the folder for the metrics.
        ui: is told what happens.
    """
    from attnconvert.convert.evaluate import evaluate_models
    from attnconvert.convert.reevaluate import BASELINE

    device, precision = torch_device(options.device), _precision(prepared, options)
    folder = Path(os.path.abspath(options.out))
    job = _Job(prepared, options, ui, device, precision, _Record(uuid.uuid4().hex, {}), options.resume)
    recipe, seed = prepared.recipe.recipe, _seed(prepared, options)
    tokenizer = load_tokenizer(prepared.source)
    with job.phase("read text"):
        texts = _load_texts(prepared, tokenizer, seed, ui)
    _make_folders(folder)
    with job.phase("same-data baseline"):
        student = _same_data_model(job, folder, texts)
    with job.phase("evaluate"), _fast_matmul(device), _explained_memory(job):
        teacher = _on_device(_load_source(prepared, options.dtype).model, job)
        report = evaluate_models(
            student,
            teacher,
            tokenizer,
            texts.eval,
            recipe.evaluate.model_copy(update={"passkey_trials": 0}),
            device=device,
            window=None,
            ablations={},
            progress=ui.on_eval,
            seed=seed,
        )
    return replace(report.quality_of("student"), name=BASELINE, kind="other")


@dataclass(frozen=True)
class _BaselineProgress:
    """Tells a RunUI of the baseline's training, under a name of its own."""

    ui: RunUI

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        """As `RunUI.on_step`."""
        self.ui.on_step(f"{stage} of the baseline", step, num_steps, metrics)


def _same_data_model(job: _Job, folder: Path, texts: _Texts) -> Any:
    """The softmax model finetuned on the rows that the converted one is, on the device; metrics and checkpoints go to `folder`."""
    from attnconvert.distill.finetune import run_finetune
    from attnconvert.distill.lora import add_lora, merge_lora
    from attnconvert.surgery.regrouped import remember_sources

    prepared, config = job.prepared, job.prepared.recipe.recipe.stages.finetune
    with _fast_matmul(job.device), _explained_memory(job):
        model = _on_device(_load_source(prepared, job.options.dtype).model, job)
        layers: Mapping[int, ConvertedLayer] = remember_sources(model, prepared.sites) if _new_projections(prepared.plan) else {}
        wrapped = add_lora(model, [row.path for row in prepared.plan.converted], config.lora, seed=_seed(prepared, job.options))
        context = replace(job.context(folder), compile=_compiles(job, config.tokens), progress=_BaselineProgress(job.ui))
        run_finetune(wrapped, layers, texts.finetune, config, context)
        return cast(Any, merge_lora(wrapped)).eval().requires_grad_(False)


# ---------------------------------------------------------------- surroundings


def torch_device(name: str) -> torch.device:
    """The torch device for `--device`. Raises AttnConvertError `unknown-device`."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        raise AttnConvertError(
            "unknown-device",
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}",
            expected="auto, cpu, cuda or cuda:N",
            hint="`attnconvert doctor` lists what this machine has",
        ) from error
    return device


def _device_name(device: torch.device) -> str:
    import torch

    from attnconvert.convert.evaluate import device_name

    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)


def _precision(prepared: Prepared, options: RunOptions) -> Literal["fp32", "bf16"]:
    import torch

    wanted = prepared.recipe.recipe.precision
    if options.dtype not in ("auto", *_DTYPES):
        raise AttnConvertError("unknown-dtype", f"unknown dtype {options.dtype!r}", expected=f"one of: auto, {', '.join(_DTYPES)}")
    if wanted != "auto":
        return wanted
    return "bf16" if torch_device(options.device).type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _trains_in_fp32(job: _Job, dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` are widened for computing: in fp32 precision, and for fp16, whose range autocast to bf16 would not restore."""
    import torch

    return dtype != torch.float32 and (job.precision == "fp32" or dtype == torch.float16)


@contextlib.contextmanager
def _fast_matmul(device: torch.device) -> Iterator[None]:
    """Inside, fp32 matrix products on a GPU may use TF32."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def _explained_memory(job: _Job) -> Iterator[None]:
    """An out-of-memory error outside the training steps (which explain their own) as AttnConvertError `out-of-memory`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AttnConvertError(
            "out-of-memory",
            f"the model does not fit on {job.device}",
            where=str(error).splitlines()[0][:200],
            hint="use a larger GPU, or `--device cpu`; then --resume",
        ) from error


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"attnconvert": attnconvert.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
