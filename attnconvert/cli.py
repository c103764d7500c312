"""The command line: parse, call `convert/`, show what came back.

Results go to stdout, everything else to stderr. `main` is the only place that catches errors: exit code 0 = done, 1 = a mistake in the
input or the surroundings, 2 = wrong usage, 3 = a bug (the traceback is in a log file), 130 = Ctrl-C.

Importing this file imports typer and rich and nothing heavier, so that `--help` is instant; commands import what they need.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.main

from attnconvert import __version__
from attnconvert.errors import AttnConvertError, ErrorGroup

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

EXIT_ERROR, EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED = 1, 2, 3, 130
RESUMABLE = ("linearize", "sparsify", "mix-heads", "convert", "regroup")
DEBUG = "ATTNCONVERT_DEBUG"

_SUITES = ("quick", "standard", "long")  # as reevaluate.SUITES, which imports torch
_INITS = ("svd", "aligned", "mean", "medoid", "first", "random")  # as surgery.regroup.INITS, likewise
_GROUPINGS = ("contiguous", "similar")  # as surgery.regroup.GROUPINGS, likewise

# Width of text when the output is no terminal; and of tables always, at least: a wrapped line is better than a figure cut short.
_TEXT_COLUMNS, _TABLE_COLUMNS = 120, 160
# Without a terminal, a stage says how far it is every tenth of the way, and at least this often.
_SECONDS_BETWEEN_LINES = 15.0


# ---------------------------------------------------------------- options

_MODEL_PANEL, _RUN_PANEL, _OUT_PANEL, _MACHINE_PANEL = "Model and recipe", "How it runs", "Output", "Machine"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="Hub id (user/name), local directory, .gguf file, or `demo` for the small model inside the package."
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="A folder that attnconvert wrote.")]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", metavar="NAME|FILE", rich_help_panel=_MODEL_PANEL, help="A recipe of `attnconvert recipes list`, or a YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", rich_help_panel=_MODEL_PANEL, help="Change one setting of the recipe, e.g. stages.transfer.tokens=2M. Repeatable."
    ),
]
RevisionOption = Annotated[str | None, typer.Option(metavar="REV", rich_help_panel=_MODEL_PANEL, help="Branch, tag or commit of a Hub model.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", rich_help_panel=_MODEL_PANEL, help="Run Python code from the model's repository. Read it first.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", rich_help_panel=_OUT_PANEL, show_default="<model>-<recipe>", help="Folder to create.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=_OUT_PANEL, help="Replace an earlier result in that folder, once the new one is complete.")
]
AdaptersOption = Annotated[
    bool,
    typer.Option(
        "--adapters-only",
        rich_help_panel=_OUT_PANEL,
        help="Save only what the conversion adds, a few MB; `attnconvert merge` makes the full checkpoint of it later.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", rich_help_panel=_RUN_PANEL, help="Continue an interrupted run; the result is the same as without the interruption.")
]
SkipOption = Annotated[
    bool, typer.Option("--skip-evaluation", rich_help_panel=_RUN_PANEL, help="Do not measure the result; `attnconvert evaluate-converted` can do it later.")
]
SeedOption = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=_RUN_PANEL, show_default="the recipe's", help="Seed of data order, initialisation and evaluation.")
]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", min=0.0, rich_help_panel=_RUN_PANEL, help="0 = always the most likely token; higher = more varied.")
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", rich_help_panel=_MACHINE_PANEL, help="auto, cpu, cuda or cuda:N. auto takes the GPU if there is one.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="DTYPE", rich_help_panel=_MACHINE_PANEL, help="Weights in auto (as stored), fp32, bf16 or fp16. The new attention's state is fp32 always."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", rich_help_panel=_OUT_PANEL, help="Print the result as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=_OUT_PANEL, help="No plan, no progress; only the result and errors.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", rich_help_panel=_OUT_PANEL, help="Let transformers, peft and datasets print their own messages too.")
]


def _examples(*lines: str) -> str:
    """An epilog. Typer joins single line breaks and makes one of two."""
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="attnconvert",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Swap a pretrained transformer's attention for a cheaper kind, give the quality back, save an ordinary Hugging Face checkpoint.",
    epilog=_examples(
        "attnconvert linearize demo --recipe hedgehog",
        "attnconvert plan HuggingFaceTB/SmolLM2-135M-Instruct --recipe hedgehog-mixed",
        "attnconvert linearize HuggingFaceTB/SmolLM2-135M-Instruct --recipe hedgehog",
        "attnconvert generate SmolLM2-135M-Instruct-hedgehog 'Once upon a time'",
    )
    + "\n\n`demo` is a small model inside the package: that line needs no download and minutes on a CPU.",
)
recipes_app = typer.Typer(help="List, show and check recipes: which layers get which attention, and how they are trained.", rich_markup_mode="rich")
_CONVERT, _USE, _INFORM = "Convert", "Use and measure", "Look things up"


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"attnconvert {__version__}")
        raise typer.Exit


# ---------------------------------------------------------------- convert


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples(
        "attnconvert linearize demo --recipe hedgehog",
        "attnconvert linearize HuggingFaceTB/SmolLM2-135M-Instruct --recipe hedgehog --set data.source=my-text/ --out smol",
        "attnconvert linearize ./my-model --recipe hedgehog-mixed --set keep.fraction=0.5 --set stages.finetune.tokens=20M",
        "attnconvert linearize ./my-model --recipe my.yaml --resume",
    ),
)
def linearize(
    ctx: typer.Context,
    model: Model,
    recipe: RecipeOption = "hedgehog",
    set_: SetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    adapters_only: AdaptersOption = False,
    resume: ResumeOption = False,
    skip_evaluation: SkipOption = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Turn softmax attention into linear attention: plan, train, save, measure.

    Like `convert`, with a recipe whose methods all belong to the linearize family.
    """
    _convert(
        ctx.find_root().obj, model, recipe, set_, revision=revision, trust_remote_code=trust_remote_code, family="linearize", out=out, overwrite=overwrite, adapters_only=adapters_only, resume=resume,
        skip_evaluation=skip_evaluation, seed=seed, device=device, dtype=dtype, as_json=as_json, quiet=quiet, verbose=verbose,
    )  # fmt: skip


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples(
        "attnconvert sparsify demo --recipe moa",
        "attnconvert sparsify HuggingFaceTB/SmolLM2-135M-Instruct --recipe moa --set layers.0.config.density=0.25 --out smol-moa",
        "attnconvert sparsify ./my-model --recipe duo-attention --set data.source=my-text/",
        "attnconvert sparsify ./my-model --recipe streaming-llm --set stages.finetune.tokens=0",
        "attnconvert sparsify ./my-long-model --recipe infllm-v2 --set data.source=long-text/",
    ),
)
def sparsify(
    ctx: typer.Context,
    model: Model,
    recipe: RecipeOption = "moa",
    set_: SetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    adapters_only: AdaptersOption = False,
    resume: ResumeOption = False,
    skip_evaluation: SkipOption = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Leave keys out of softmax attention, far ones (spans per KV head) or unfit ones (blocks chosen per token): plan, train, save, measure.

    Like `convert`, with a recipe whose methods all belong to the sparsify family.
    """
    _convert(
        ctx.find_root().obj, model, recipe, set_, revision=revision, trust_remote_code=trust_remote_code, family="sparsify", out=out, overwrite=overwrite, adapters_only=adapters_only, resume=resume,
        skip_evaluation=skip_evaluation, seed=seed, device=device, dtype=dtype, as_json=as_json, quiet=quiet, verbose=verbose,
    )  # fmt: skip


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples(
        "attnconvert mix-heads demo --recipe moh",
        "attnconvert mix-heads HuggingFaceTB/SmolLM2-135M-Instruct --set layers.0.config.unit=query_head --out smol-moh",
        "attnconvert mix-heads ./my-model --recipe moh --set layers.0.config.active=0.5 --set data.source=my-text/",
    ),
)
def mix_heads(
    ctx: typer.Context,
    model: Model,
    recipe: RecipeOption = "moh",
    set_: SetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    adapters_only: AdaptersOption = False,
    resume: ResumeOption = False,
    skip_evaluation: SkipOption = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Let each token use some of the heads, chosen by a router: plan, train, save, measure.

    Like `convert`, with a recipe whose methods all belong to the mix-heads family.
    """
    _convert(
        ctx.find_root().obj, model, recipe, set_, revision=revision, trust_remote_code=trust_remote_code, family="mix-heads", out=out, overwrite=overwrite, adapters_only=adapters_only, resume=resume,
        skip_evaluation=skip_evaluation, seed=seed, device=device, dtype=dtype, as_json=as_json, quiet=quiet, verbose=verbose,
    )  # fmt: skip


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples("attnconvert convert demo --recipe window-sinks", "attnconvert convert ./my-model --recipe my.yaml --out my-model-converted"),
)
def convert(
    ctx: typer.Context,
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            rich_help_panel=_MODEL_PANEL,
            show_default=False,
            help="A recipe of `attnconvert recipes list`, or a YAML file.",
        ),
    ],
    set_: SetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    adapters_only: AdaptersOption = False,
    resume: ResumeOption = False,
    skip_evaluation: SkipOption = False,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert with any recipe: plan, train, save, measure."""
    _convert(
        ctx.find_root().obj, model, recipe, set_, revision=revision, trust_remote_code=trust_remote_code, family=None, out=out, overwrite=overwrite, adapters_only=adapters_only, resume=resume,
        skip_evaluation=skip_evaluation, seed=seed, device=device, dtype=dtype, as_json=as_json, quiet=quiet, verbose=verbose,
    )  # fmt: skip


def _convert(
    arguments: Sequence[str],
    model: str,
    recipe: str,
    overrides: list[str] | None,
    *,
    revision: str | None,
    trust_remote_code: bool,
    family: str | None,
    out: Path | None,
    overwrite: bool,
    adapters_only: bool,
    resume: bool,
    skip_evaluation: bool,
    seed: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """What `linearize` and `convert` share."""
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    _check_device(device)
    with _libraries(verbose):
        from attnconvert.convert import pipeline
        from attnconvert.convert.plan import render_plan
        from attnconvert.convert.regroup import regrouped_heads

        prepared = pipeline.prepare(model, recipe, overrides=tuple(overrides or ()), revision=revision, trust_remote_code=trust_remote_code, family=family)
        target = out if out is not None else Path(default_out(model, recipe))
        if not quiet:
            _show(render_plan(prepared.plan, prepared.estimate), _stderr())
        options = pipeline.RunOptions(
            out=target, device=device, dtype=dtype, resume=resume, adapters_only=adapters_only, overwrite=overwrite, skip_evaluation=skip_evaluation, seed=seed,
            command=shlex.join(["attnconvert", *arguments]),
        )  # fmt: skip
        with RunUi(_stderr(), quiet=quiet) as ui:
            result = pipeline.run(prepared, options, ui)
    if as_json:
        _print_json(
            {
                "path": str(result.path),
                "seconds": result.seconds,
                "plan": result.plan.to_dict(),
                "stages": [_jsonable(stage) for stage in result.stages],
                "evaluation": None if result.report is None else result.report.to_dict(),
            }
        )
        return
    if quiet:
        typer.echo(_shown(result.path))
        return
    if result.report is not None:
        from attnconvert.convert.report import render_table

        _show(render_table(result.report), _stdout())
    typer.echo(next_steps(result.path, adapters_only=adapters_only, stock=result.plan.base_model_type if regrouped_heads(result.plan) is not None else None))


def default_out(model: str, recipe: str) -> str:
    """`<model>-<recipe>` from what the user typed: the last part of a path or Hub id, without the suffix of a file."""
    path = Path(model)
    name = path.stem if path.suffix == ".gguf" else Path(os.path.abspath(model)).name if model.startswith((".", "~", "/")) else path.name
    return f"{name}-{Path(recipe).stem if recipe.endswith(('.yaml', '.yml')) else Path(recipe).name}"


def next_steps(path: Path, *, adapters_only: bool, stock: str | None = None) -> str:
    """What to do with a finished conversion, ready to be copied. `stock`: the model_type of a checkpoint that needs no code but transformers'."""
    folder = _shown(path)
    quoted = shlex.quote(folder)
    if adapters_only:
        return f"Saved {folder} (adapters only)\n\nMake the full checkpoint:\n\n  attnconvert merge {quoted} --out {shlex.quote(folder + '-merged')}"
    load = [f"  model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)"]
    load += [f"  tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=False)"]
    if stock is not None:
        from attnconvert.convert.regroup import how_to_serve

        load = [f"  model = AutoModelForCausalLM.from_pretrained({folder!r})", f"  tokenizer = AutoTokenizer.from_pretrained({folder!r})"]
        load += how_to_serve(stock, folder)
    lines = [
        f"Saved {folder}",
        "",
        "Load it with plain transformers, no code of attnconvert:" if stock is not None else "Load it, with or without attnconvert installed:",
        "",
        "  from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *load,
        "",
        "Try it:",
        "",
        f"  attnconvert generate {quoted} 'Once upon a time'",
        f"  attnconvert chat {quoted}",
        f"  attnconvert serve {quoted}",
    ]
    return "\n".join(lines)


def _shown(path: Path) -> str:
    """A path as the user would type it here."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples(
        "attnconvert regroup demo --recipe gqa",
        "attnconvert regroup demo --recipe gqa --kv-heads 2 --set stages.finetune.tokens=200k",
        "attnconvert regroup demo --kv-heads 4,2,1 --compare-inits",
        "attnconvert regroup demo --kv-heads 4",
        "attnconvert regroup HuggingFaceTB/SmolLM2-135M-Instruct --kv-heads 1 --calibration my-text/ --out smol-mqa",
    ),
)
def regroup(
    ctx: typer.Context,
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            rich_help_panel=_MODEL_PANEL,
            show_default="no training",
            help="Train the result by this recipe: gqa, mqa, sqa, kdgqa, or a YAML file whose methods regroup.",
        ),
    ] = None,
    set_: SetOption = None,
    kv_heads: Annotated[
        str | None,
        typer.Option(
            "--kv-heads",
            metavar="N[,N...]",
            rich_help_panel=_MODEL_PANEL,
            show_default="the recipe's",
            help="KV heads to end with; needed without --recipe. A list to compare.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODEL_PANEL,
            show_default="the recipe's; svd without one; all of them with --compare-inits",
            help=f"How heads become fewer: {', '.join(_INITS)}. svd lost least wherever it was measured; aligned, rotations alone, is next. With --compare-inits a list.",
        ),
    ] = None,
    grouping: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODEL_PANEL,
            show_default="the recipe's, else similar for svd and aligned, contiguous for others",
            help="Which heads become one: contiguous (neighbours) or similar (those that lose least together).",
        ),
    ] = None,
    query_heads: Annotated[
        int | None,
        typer.Option(
            "--query-heads", metavar="N", min=1, rich_help_panel=_MODEL_PANEL, show_default="as many as there are", help="Query heads to end with (SQA)."
        ),
    ] = None,
    compare_inits: Annotated[
        bool, typer.Option("--compare-inits", rich_help_panel=_RUN_PANEL, help="Measure every init at every N before any training; writes nothing.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=_RUN_PANEL,
            show_default="the text inside the package",
            help="Without --recipe: text to align on and to measure on, split by document: a file, a folder or a `datasets` id; `none` aligns by the weights alone.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="N", rich_help_panel=_RUN_PANEL, show_default="16k", help="Without --recipe: tokens of calibration and of held-out text, each."),
    ] = None,
    resume: ResumeOption = False,
    skip_evaluation: SkipOption = False,
    revision: RevisionOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", rich_help_panel=_OUT_PANEL, show_default="<model>-<recipe>-kv<N>, without what is not given", help="Folder to create."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, rich_help_panel=_RUN_PANEL, show_default="the recipe's, else 0", help="Seed of the text read, of `random`, and of training."
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Give a model fewer KV heads (GQA, MQA) or query heads (SQA) and save it as a stock architecture, for every engine.

    With --recipe gqa the model is trained to behave as before: plan, train, save, measure, like every conversion.

    Without a recipe nothing is trained: heads are merged, measured on held-out text, and proven to reload in plain transformers, in seconds.
    """
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    _check_device(device)
    targets = _sizes("kv-heads", kv_heads) or []
    inits = None if init is None else [part.strip() for part in init.split(",") if part.strip()]
    for name in inits or ():
        _check_choice("init", name, _INITS)
    if grouping is not None:
        _check_choice("grouping", grouping, _GROUPINGS)
    if recipe is not None:
        without = {"--compare-inits": compare_inits, "--calibration": calibration is not None, "--tokens": tokens is not None}
        for option in (option for option, given in without.items() if given):
            hint = "calibration and training read the recipe's text: --set data.source=TEXT" if option == "--calibration" else "leave one of the two away"
            raise typer.BadParameter(f"it is for regrouping without training, and --recipe trains; {hint}", param_hint=option)
        if len(targets) > 1 or len(inits or ()) > 1:
            raise typer.BadParameter("one model is trained at a time: give one N and one init", param_hint="--kv-heads")
        overrides = [*(set_ or ()), *(f"layers.0.config.kv_heads={n}" for n in targets), *(f"layers.0.config.init={name}" for name in inits or ())]
        overrides += [f"layers.0.config.{key}={value}" for key, value in (("grouping", grouping), ("query_heads", query_heads)) if value is not None]
        name = default_out(model, recipe) + "".join(f"-kv{n}" for n in targets)
        _convert(
            ctx.find_root().obj, model, recipe, overrides, revision=revision, trust_remote_code=False, family="regroup", out=out or Path(name), overwrite=overwrite, adapters_only=False,
            resume=resume, skip_evaluation=skip_evaluation, seed=seed, device=device, dtype=dtype, as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip
        return
    for option, given in {"--set": bool(set_), "--resume": resume, "--skip-evaluation": skip_evaluation}.items():
        if given:
            raise typer.BadParameter("it is for training, which needs --recipe, such as --recipe gqa", param_hint=option)
    if not targets:
        raise typer.BadParameter("say how many KV heads to end with, or give --recipe gqa, which halves them", param_hint="--kv-heads")
    if not compare_inits and (len(targets) > 1 or len(inits or ()) > 1):
        raise typer.BadParameter("a model is written with one N and one init; several need --compare-inits", param_hint="--kv-heads")
    if compare_inits and (out is not None or overwrite):
        raise typer.BadParameter("--compare-inits writes no model; leave --out and --overwrite away", param_hint="--compare-inits")
    num_tokens = _token_count(tokens or "16k") or 0
    with _libraries(verbose):
        from attnconvert.convert import regroup as regrouping

        with RunUi(_stderr(), quiet=quiet) as ui:
            common: dict[str, Any] = {
                "calibration": calibration, "tokens": num_tokens, "revision": revision, "dtype": dtype, "device": _resolved(device), "seed": seed or 0,
                "note": ui.on_phase, "progress": ui.on_eval, "grouping": grouping, "query_heads": query_heads,
            }  # fmt: skip
            if compare_inits:
                report = regrouping.compare_inits(model, sorted(set(targets), reverse=True), inits=inits, **common)
            else:
                target = out if out is not None else Path(default_out(model, f"kv{targets[0]}"))
                chosen = (inits or [_INITS[0]])[0]
                report = regrouping.regroup_model(model, targets[0], target, init=chosen, overwrite=overwrite, **common)
    if as_json:
        _print_json(report.to_dict())
        return
    if report.path is not None and quiet:
        typer.echo(_shown(report.path))
        return
    _show(regrouping.render_report(report), _stdout())
    if report.path is not None:
        typer.echo(regrouping.what_next(report, _shown(report.path)))


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples(
        "attnconvert plan demo --recipe hedgehog",
        "attnconvert plan HuggingFaceTB/SmolLM2-135M-Instruct --recipe hedgehog-mixed --set keep.fraction=0.5 --json",
        "attnconvert plan demo-moa --heat-map spans.png",
    ),
)
def plan(
    model: Model,
    recipe: RecipeOption = "hedgehog",
    set_: SetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    heat_map: Annotated[
        Path | None,
        typer.Option(
            "--heat-map", metavar="FILE.png", rich_help_panel=_OUT_PANEL, show_default=False, help="Also draw which keys each KV head keeps (attention spans)."
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a conversion would change, save and cost, or what a finished one did; loads no weights.

    With the folder of a converted model there is no recipe to name: its own plan is shown.
    """
    with _libraries(verbose):
        from attnconvert.convert import pipeline
        from attnconvert.convert.plan import default_length, finished_plan, render_plan
        from attnconvert.convert.sparsify import draw_heat_map, has_spans, render_heat_map, span_heat_map

        prepared = None
        try:
            prepared = pipeline.prepare(model, recipe, overrides=tuple(set_ or ()), revision=revision, trust_remote_code=trust_remote_code)
            shown, config, notes = prepared.plan, prepared.config, prepared.notes
        except AttnConvertError as error:
            if error.code != "already-converted":
                raise
            shown, config = finished_plan(model, revision=revision, trust_remote_code=trust_remote_code)
            notes = ("This model was converted before: this is its own plan, --recipe and --set change nothing.",)
        spans = span_heat_map(shown, default_length(config)) if has_spans(shown) else None
        if heat_map is not None:
            if spans is None:
                raise AttnConvertError(
                    "no-spans", "the plan has no attention spans that could be drawn", where="--heat-map",
                    hint="rules from calibration are known after the conversion: `attnconvert plan DIR --heat-map spans.png` with its folder",
                )  # fmt: skip
            draw_heat_map(spans, heat_map)
    if as_json:
        facts = {"model": model, "plan": shown.to_dict(), "notes": list(notes)}
        _print_json(facts if prepared is None else facts | {"recipe": recipe, "estimate": prepared.estimate.to_dict()})
        return
    _show(render_plan(shown, None if prepared is None else prepared.estimate), _stdout())
    if spans is not None:
        _show(render_heat_map(spans), _stdout())
    for note in notes:
        _say(f"note: {note}")
    if heat_map is not None:
        typer.echo(f"Drawn to {_shown(heat_map)}")


@app.command(
    rich_help_panel=_CONVERT,
    epilog=_examples("attnconvert merge my-adapters --out my-model", "attnconvert merge my-adapters --out my-model --base ./copy-of-the-base-model"),
)
def merge(
    adapters: Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="A folder written with --adapters-only.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", show_default=False, rich_help_panel=_OUT_PANEL, help="Folder to create.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=_MODEL_PANEL,
            show_default="as recorded",
            help="The base model, if it is called otherwise here: Hub id or local directory.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make the full checkpoint of a conversion saved with --adapters-only."""
    _check_device(device)
    with _libraries(verbose):
        from attnconvert.convert.merge import merge as merge_adapters

        path = merge_adapters(adapters, out, base=base, device=_resolved(device))
    if as_json:
        _print_json({"path": str(path)})
    else:
        typer.echo(next_steps(path, adapters_only=False))


# ---------------------------------------------------------------- use and measure


@app.command(
    "evaluate-converted",
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert evaluate-converted demo-hedgehog",
        "attnconvert evaluate-converted demo-hedgehog --suite standard",
        "attnconvert evaluate-converted demo-hedgehog --data my-text.jsonl --tokens 500k",
        "attnconvert evaluate-converted my-model-hedgehog --tasks arc_easy,hellaswag --limit 200",
        "attnconvert evaluate-converted my-model-hedgehog --against ./my-model --fail-below ppl-ratio=1.05 --fail-below passkey=0.9 --json",
    ),
)
def evaluate_converted(
    model: Annotated[str, typer.Argument(metavar="DIR|ID", show_default=False, help="A converted checkpoint or adapters, or a converted model's Hub id.")],
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_RUN_PANEL,
            show_default="the recipe's settings",
            help="How much to measure: `quick` (seconds), `standard` (needles by depth, MQAR, attention maps, texts side by side), `long` (a GPU's work).",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", rich_help_panel=_RUN_PANEL, show_default=False, help="Benchmarks to run with lm-evaluation-harness, or paths of its YAML tasks."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=_RUN_PANEL, show_default=False, help="A folder with more YAML tasks.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="N", min=0.0, rich_help_panel=_RUN_PANEL, show_default="all", help="Samples per task; below 1 a share of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, rich_help_panel=_RUN_PANEL, show_default="the task's", help="Examples in a task's prompt.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_RUN_PANEL, help="Samples of a task per forward pass.")] = 8,
    fidelity: Annotated[
        bool | None,
        typer.Option(
            "--fidelity/--no-fidelity", rich_help_panel=_RUN_PANEL, show_default="with standard and long", help="Compare attention maps and generated text."
        ),
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=X",
            rich_help_panel=_RUN_PANEL,
            show_default=False,
            help="Exit 1 when a figure is worse: ppl-ratio and kl (maximums), agreement and passkey (minimums). Repeatable.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            rich_help_panel=_MODEL_PANEL,
            show_default="the model that was converted",
            help="What to compare with: Hub id, directory, or `none`.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=_MODEL_PANEL,
            show_default="the run's own, if any",
            help="A softmax model finetuned on the same text, measured beside.",
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", rich_help_panel=_RUN_PANEL, show_default="the recipe's", help="Held-out tokens, e.g. 200k.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            rich_help_panel=_RUN_PANEL,
            show_default="the documents held out of training",
            help="Other text: a file or folder, or a `datasets` id.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a converted model: perplexity, KL and agreement with the teacher by position, recall, cache size, benchmarks.

    Prints tables with what is wrong in red, and writes report.json, report.md and report.html into DIR (of a Hub model: into NAME-evaluation).
    """
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    if suite is not None:
        _check_choice("suite", suite, _SUITES)
    _check_device(device)
    with _libraries(verbose):
        from attnconvert.convert import reevaluate
        from attnconvert.convert.html import write_html
        from attnconvert.convert.report import render_table, write_report

        thresholds = reevaluate.parse_thresholds(fail_below or ())
        names = tuple(part.strip() for part in (tasks or "").split(",") if part.strip())
        folder, out = reevaluate.locate(model)
        options = reevaluate.TaskOptions(names, include_path, limit, num_fewshot, batch_size)
        with RunUi(_stderr(), quiet=quiet) as ui:
            report, conversion = reevaluate.evaluate_converted(
                folder,
                suite=cast("Any", suite),
                against=against,
                baseline=baseline,
                tokens=_token_count(tokens),
                data=data,
                fidelity=fidelity,
                tasks=options,
                device=_resolved(device),
                dtype=dtype,
                note=ui.on_phase,
                progress=ui.on_eval,
                keep=lambda report, conversion: write_report(report, conversion, out),
            )
        paths = [*write_report(report, conversion, out), write_html(out)]
        if importlib.util.find_spec("matplotlib") is not None:  # an extra; the page has its own charts
            from attnconvert.convert.plots import draw_report

            paths += draw_report(out)
    if as_json:
        from attnconvert.convert.evaluate import json_safe

        _print_json({"conversion": json_safe(conversion), "evaluation": report.to_dict()})
    else:
        _show(render_table(report), _stdout())
        _say(f"wrote {', '.join(map(str, paths))}")
    reevaluate.check_thresholds(report, thresholds)


@app.command(
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert bench demo-hedgehog",
        "attnconvert bench demo-hedgehog --lengths 512,1024,2048 --new-tokens 16",
        "attnconvert bench my-model-hedgehog --device cuda --lengths 1024,8192,65536 --batch-sizes 1,8,32",
        "attnconvert bench user/my-model-hedgehog --out bench-results",
    ),
)
def bench(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="DIR|ID", show_default=False, help="A converted checkpoint, or its Hub id.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            rich_help_panel=_MODEL_PANEL,
            show_default="the model that was converted",
            help="What to compare with: Hub id, directory, or `none`.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", rich_help_panel=_RUN_PANEL, show_default="powers of two as far as the model goes", help="Prompt lengths in tokens."),
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,...", rich_help_panel=_RUN_PANEL, show_default="1; on a GPU 1 and 8", help="Prompts at a time.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_RUN_PANEL, help="Decode steps per repeat.")] = 32,
    max_seconds: Annotated[
        float,
        typer.Option(metavar="S", min=0.1, rich_help_panel=_RUN_PANEL, help="Stop a model's series of lengths before one that would take longer than this."),
    ] = 20.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", rich_help_panel=_OUT_PANEL, show_default="DIR", help="Where the figures and plots go.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure speed and memory: prefill and decode, teacher and student in turns, against length and batch.

    Prints tables and the length from which the student is faster; writes report.json (or bench.json) and plots into DIR. Ctrl-C keeps
    what is measured.
    """
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    _check_device(device)
    asked = {"lengths": _sizes("lengths", lengths), "batch_sizes": _sizes("batch-sizes", batch_sizes)}
    with _libraries(verbose):
        from attnconvert.convert import bench as benchmark

        with RunUi(_stderr(), quiet=quiet) as ui:
            result = benchmark.bench(
                model,
                against=against,
                device=_resolved(device),
                dtype=dtype,
                lengths=asked["lengths"],
                batch_sizes=asked["batch_sizes"],
                new_tokens=new_tokens,
                max_seconds=max_seconds,
                out=out,
                progress=ui.on_eval,
                note=ui.on_phase,
                command=shlex.join(["attnconvert", *ctx.obj]),
            )
        folder = benchmark.output_folder(model, out)
        if (folder / "report.json").exists():
            from attnconvert.convert.html import write_html

            write_html(folder)
    if as_json:
        _print_json(result)
    else:
        _show(benchmark.render_bench(result), _stdout())
        if result["rows"] or not result["interrupted"]:
            _say(f"wrote {', '.join(map(str, [benchmark.result_file(folder), *(folder / name for name in result['plots'])]))}")
    if result["interrupted"]:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command(
    "tune-switch",
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert tune-switch my-model-infllm-v2 --device cuda",
        "attnconvert tune-switch my-model-infllm-v2 --lengths 8192,16384,32768,65536 --for decode --batch-size 8",
        "attnconvert tune-switch my-model-infllm-v2 --dry-run --json",
    ),
)
def tune_switch(
    folder: Folder,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", rich_help_panel=_RUN_PANEL, show_default="growing ones, as far as the model goes", help="Context lengths in tokens."),
    ] = None,
    goal: Annotated[
        str, typer.Option("--for", metavar="WHAT", rich_help_panel=_RUN_PANEL, help="What must not be slower when sparse: prefill, decode or both.")
    ] = "both",
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, rich_help_panel=_RUN_PANEL, help="Sequences at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", rich_help_panel=_OUT_PANEL, help="Measure, and change nothing.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure from which context on block-sparse layers are faster than dense ones here, and write it into the checkpoint as dense_len.

    For models of the recipes infllm-v2 and moba. The model's text changes with dense_len, slightly: between the old and the new length it sees more or fewer keys.
    """
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    _check_choice("for", goal, ("prefill", "decode", "both"))
    _check_device(device)
    asked = _sizes("lengths", lengths)
    with _libraries(verbose):
        from attnconvert.convert import switch

        with RunUi(_stderr(), quiet=quiet) as ui:
            report = switch.tune_switch(
                folder,
                device=_resolved(device),
                dtype=dtype,
                lengths=asked,
                batch_size=batch_size,
                goal=cast(Any, goal),
                dry_run=dry_run,
                progress=ui.on_eval,
                note=ui.note,
            )
    if as_json:
        _print_json(report.to_dict())
    else:
        _show(switch.render_switch(report), _stdout())


@app.command(
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert compare demo-hedgehog demo-window-sinks",
        "attnconvert compare results/*/ --markdown > table.md",
        "attnconvert compare a b --json",
    ),
)
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", show_default=False, help="Folders that attnconvert wrote and measured.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", rich_help_panel=_OUT_PANEL, help="Print a Markdown table.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare conversions in one table, from the reports in their folders; measures nothing anew.

    The best value of each column is marked. Warns where rows were measured on different text, models or devices.
    """
    if as_markdown and as_json:
        raise typer.BadParameter("choose one of --markdown and --json", param_hint="--markdown")
    with _libraries(verbose):
        from attnconvert.convert import compare as comparing

    comparison = comparing.compare(folders)
    if as_json:
        _print_json(comparison.to_dict())
    elif as_markdown:
        sys.stdout.write(comparing.comparison_markdown(comparison))
    else:
        _show(comparing.render_comparison(comparison), _stdout())


@app.command(
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert push demo-hedgehog my-name/demo-hedgehog --dry-run",
        "attnconvert push SmolLM2-135M-Instruct-hedgehog my-name/SmolLM2-135M-hedgehog --private",
        "attnconvert push my-adapters my-name/my-adapters --adapters-only",
    ),
)
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", show_default=False, help="Repository on the Hub, created if need be; NAME alone = yours.")],
    private: Annotated[bool, typer.Option("--private", rich_help_panel=_OUT_PANEL, help="Create the repository private.")] = False,
    adapters_only: Annotated[bool, typer.Option("--adapters-only", rich_help_panel=_OUT_PANEL, help="DIR was written with --adapters-only.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=_RUN_PANEL, help="List the files that would be pushed; needs no network and no token.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", rich_help_panel=_OUT_PANEL, show_default="main", help="Branch to push to, created if need be.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", rich_help_panel=_OUT_PANEL, help="Open a pull request instead of committing to main.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", rich_help_panel=_OUT_PANEL, show_default=False, help="Commit message.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Put a conversion on the Hub with a model card from its report; refuses a model that does not reload or gives other logits when decoded.

    Only the model, its code, tokenizer, report and record go; paths of this machine are taken out. The token is that of `hf auth login` or HF_TOKEN.
    Run it again after an interruption: what has arrived is not sent again.
    """
    with _libraries(verbose):
        from attnconvert.convert import hub

        with RunUi(_stderr(), quiet=quiet) as ui:
            result = hub.push(
                folder, repo_id, private=private, adapters_only=adapters_only, dry_run=dry_run, revision=revision, commit_message=message, create_pr=create_pr,
                progress=ui.on_eval, note=ui.note,
            )  # fmt: skip
    if as_json:
        _print_json(result.to_dict())
        return
    typer.echo(result.render())


@app.command(
    rich_help_panel=_USE, epilog=_examples("attnconvert card demo-hedgehog", "attnconvert card my-model --repo-id my-name/my-model --license apache-2.0")
)
def card(
    folder: Folder,
    repo_id: Annotated[
        str | None,
        typer.Option("--repo-id", metavar="USER/NAME", rich_help_panel=_OUT_PANEL, show_default=False, help="Name on the Hub, for the code to copy."),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", rich_help_panel=_OUT_PANEL, show_default="the base model's", help="Licence id of the Hub, e.g. apache-2.0."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", metavar="CODE", rich_help_panel=_OUT_PANEL, show_default="the base model's", help="ISO code; repeatable.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", rich_help_panel=_RUN_PANEL, help="Do not ask the Hub for the base model's licence.")] = False,
) -> None:
    """Write DIR/README.md, the model card, from the report; what you write outside its marked part stays."""
    from attnconvert.convert.card import write_card

    typer.echo(f"wrote {_shown(write_card(folder, repo_id=repo_id, license=license_, language=language, offline=offline))}")


@app.command(
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert generate demo-hedgehog 'The whale'",
        "attnconvert generate SmolLM2-135M-Instruct-hedgehog 'What is the capital of France?' --chat",
        "attnconvert generate demo 'The whale'   (the model before conversion, for comparison)",
    ),
)
def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="A converted checkpoint; or any model that `linearize` takes.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False, help="Text to continue; `-` reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_RUN_PANEL, help="Stop after this many tokens.")] = 100,
    temperature: TemperatureOption = 0.0,
    chat: Annotated[bool, typer.Option("--chat", rich_help_panel=_RUN_PANEL, help="Use the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=_RUN_PANEL, help="Seed of the draws, with --temperature.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write text with a converted model, then say how fast it was and what its decode cache holds."""
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    _check_device(device)
    text = sys.stdin.read() if prompt == "-" else prompt

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with _libraries(verbose):
        from attnconvert.convert.generate import generate_text, summarize
        from attnconvert.convert.reevaluate import load_saved

        loaded = load_saved(model, dtype=dtype, device=_resolved(device))
        made = generate_text(
            loaded.model,
            loaded.tokenizer,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=chat,
            seed=seed,
            on_text=None if as_json else write,
        )
    if as_json:
        _print_json(made.to_dict())
        return
    typer.echo("")
    _say(f"\n{summarize(made)}")


@app.command(
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert chat SmolLM2-135M-Instruct-hedgehog",
        "attnconvert chat SmolLM2-135M-Instruct-hedgehog --system 'Answer in one sentence.' --temperature 0.7 --top-p 0.9",
        "attnconvert chat ./my-model < questions.txt   (one message a line; any model, for comparison)",
    ),
)
def chat(
    model: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="A converted checkpoint; or any model that `linearize` takes.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", rich_help_panel=_RUN_PANEL, help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_RUN_PANEL, help="Longest answer, in tokens.")] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", min=0.0, max=1.0, rich_help_panel=_RUN_PANEL, help="With --temperature: draw from the likeliest tokens that make up P."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=_RUN_PANEL, help="Seed of the draws, with --temperature.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
) -> None:
    """Talk with a model, converted or not; each answer with its speed and the size of its cache. From a pipe, each line is a message."""
    _check_choice("dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    _check_device(device)
    if top_p == 0.0:
        raise typer.BadParameter("0 would leave no token to draw; --temperature 0 takes the likeliest", param_hint="--top-p")
    with _libraries(verbose):
        import torch

        from attnconvert.convert.reevaluate import load_saved
        from attnconvert.serving.chat import Chat, converse

        talk = Chat(load_saved(model, dtype=dtype, device=_resolved(device)), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        if system is not None:
            talk.set_system(system)
        torch.manual_seed(seed)
        converse(talk, _stdout(), _stderr())


@app.command(
    rich_help_panel=_USE,
    epilog=_examples(
        "attnconvert serve SmolLM2-135M-Instruct-hedgehog",
        "attnconvert serve SmolLM2-135M-Instruct-gqa --port 8080 --engine vllm -- --max-model-len 4096",
        "attnconvert serve SmolLM2-135M-Instruct-hedgehog --dry-run   (checks everything, prints the engine's command)",
    ),
)
def serve(
    model: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="A checkpoint: converted, a stock export, or any other; or `demo`.")],
    extra: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGUMENT...]", show_default=False, help="Arguments for the engine.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE", rich_help_panel=_RUN_PANEL, help="auto, vllm or transformers. auto takes vLLM where it is installed and knows the model."
        ),
    ] = "auto",
    host: Annotated[str, typer.Option(metavar="HOST", rich_help_panel=_RUN_PANEL, help="Address to listen on; 0.0.0.0 = every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, rich_help_panel=_RUN_PANEL, help="TCP port.")] = 8000,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", rich_help_panel=_RUN_PANEL, help="Print the engine's command and start nothing.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve a checkpoint over HTTP with the API of OpenAI: vLLM where it can, else transformers' own server. Ctrl-C ends it."""
    _check_choice("engine", engine, ("auto", "vllm", "transformers"))
    _check_device(device)
    with _libraries(verbose):
        from attnconvert.serving import engine as engines

        launch = engines.prepare(model, engine=engine, host=host, port=port, device=device if device == "auto" else _resolved(device), extra=extra or ())
    if dry_run:
        _say(launch.why)
        typer.echo(shlex.join(launch.command))
        return
    _say(engines.render(launch))
    raise typer.Exit(engines.start(launch))


# ---------------------------------------------------------------- look things up


@app.command(rich_help_panel=_INFORM, epilog=_examples("attnconvert methods", "attnconvert methods hedgehog", "attnconvert methods --json"))
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Only this method.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the kinds of attention, with their settings for `config:` in a recipe."""
    from attnconvert.surgery import registry

    found = [registry.get(method) for method in ([name] if name is not None else registry.available())]
    if as_json:
        _print_json(
            [
                {
                    "name": m.name,
                    "family": m.family,
                    "summary": m.summary,
                    "paper": m.paper,
                    "options": [option.__dict__ for option in method_options(m.config)],
                }
                for m in found
            ]
        )
        return
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    for method in found:
        family = "" if method.family == "none" else f"  (attnconvert {method.family})"
        parts: list[RenderableType] = [Text.assemble((method.name, "bold"), family), Text(f"  {method.summary}\n  {method.paper}")]
        options = method_options(method.config)
        if options:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2))
            table.add_column("setting", no_wrap=True)
            table.add_column("default", overflow="fold", min_width=7)
            table.add_column("values", overflow="fold", min_width=7)
            table.add_column("meaning", overflow="fold", ratio=1)
            for option in options:
                table.add_row(*(Text(cell) for cell in (option.key, option.default, option.values, option.description)))
            parts.append(table)
        else:
            parts.append(Text("  no settings\n"))
        _show(Group(*parts), _stdout())


class MethodOption:
    """One setting of a method: its dotted key, default and accepted values as text, and what it means."""

    def __init__(self, key: str, default: str, values: str, description: str):
        self.key, self.default, self.values, self.description = key, default, values, description


def method_options(config: type[BaseModel], prefix: str = "") -> list[MethodOption]:
    """The settings of a method, nested blocks as dotted keys."""
    from pydantic import BaseModel

    options = []
    for key, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            options += method_options(field.annotation, f"{prefix}{key}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True)).strip('"')
        options.append(MethodOption(f"{prefix}{key}", default, _accepted(field.annotation, field.metadata), field.description or ""))
    return options


def _accepted(annotation: Any, bounds: Sequence[Any]) -> str:
    """`block | sliding`, `integer 0 to 64`, `true | false`, `[number, ...] | null`: what a setting accepts."""
    import typing

    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(annotation) is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _accepted(part, ()) for part in arguments)}]"
    if arguments:
        return " | ".join("null" if part is type(None) else _accepted(part, bounds) for part in arguments)
    if annotation is bool:
        return "true | false"
    text = {int: "integer", float: "number", str: "text"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
    limits = {name: getattr(bound, name) for bound in bounds for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)}
    if "ge" in limits and "le" in limits:
        return f"{text} {limits['ge']} to {limits['le']}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " ".join([text, *(f"{signs[name]} {value}" for name, value in limits.items())])


app.add_typer(recipes_app, name="recipes", rich_help_panel=_INFORM)


@recipes_app.callback(
    invoke_without_command=True, epilog=_examples("attnconvert recipes", "attnconvert recipes show hedgehog > my.yaml", "attnconvert recipes validate my.yaml")
)
def _recipes(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes that ship with attnconvert."""
    from attnconvert.recipes import load

    recipes = [load.load_recipe(name).recipe for name in load.list_recipes()]
    if as_json:
        _print_json(
            [{"name": recipe.name, "description": recipe.description, "methods": list(recipe.methods), "reference": recipe.reference} for recipe in recipes]
        )
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("methods", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for recipe in recipes:
        table.add_row(*(Text(cell) for cell in (recipe.name, ", ".join(recipe.methods), recipe.description)))
    _show(table, _stdout())


@recipes_app.command("show", epilog=_examples("attnconvert recipes show hedgehog > my.yaml", "attnconvert recipes show hedgehog --resolved"))
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", show_default=False, help="A shipped recipe or a YAML file.")],
    set_: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="With `extends`, --set and every default written out.")] = False,
) -> None:
    """Print a recipe as YAML."""
    from attnconvert.recipes import load

    loaded = load.load_recipe(name, tuple(set_ or ()))
    if set_ and not resolved:
        raise typer.BadParameter("the file as written has no --set in it; add --resolved", param_hint="--set")
    sys.stdout.write(load.dump_resolved(loaded.recipe) if resolved else loaded.text)


@recipes_app.command("validate", epilog=_examples("attnconvert recipes validate my.yaml", "attnconvert recipes validate my.yaml --set layers.0.config.sinks=8"))
def validate_recipes(
    files: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", show_default=False, help="Shipped recipes or YAML files.")],
    set_: SetOption = None,
) -> None:
    """Check recipes and report every mistake at once, with file, line and what would be accepted.

    Layer numbers are checked against a model by `attnconvert plan MODEL --recipe FILE`.
    """
    from attnconvert.recipes import load

    errors: list[AttnConvertError] = []
    for file in files:
        try:
            recipe = load.load_recipe(file, tuple(set_ or ())).recipe
        except AttnConvertError as error:
            errors.append(error)
        else:
            typer.echo(f"{file}: keys, values and methods are valid ({', '.join(recipe.methods) or 'no methods'})")
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors)


@app.command(rich_help_panel=_INFORM, epilog=_examples("attnconvert doctor", "attnconvert doctor --json"))
def doctor(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Check this machine: versions, GPU, disk, Hub access, what it has memory for, and a self-test. Exit code 1 if something needed is missing."""
    with _libraries(verbose):
        from attnconvert.convert.doctor import diagnose, render_diagnosis

        diagnosis = diagnose()
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        _show(render_diagnosis(diagnosis), _stdout())
    if not diagnosis.ok:
        raise typer.Exit(EXIT_ERROR)


# ---------------------------------------------------------------- progress


class RunUi:
    """Shows a running conversion on stderr: progress bars on a terminal, now and then a line elsewhere, nothing when quiet.

    A context manager; the bars are gone and the cursor is back when it ends, however it ends.
    """

    def __init__(self, console: Console, *, quiet: bool = False):
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, tuple[float, float]] = {}  # what is shown -> (share done, time) of its last line
        self._started: dict[str, float] = {}
        self._part = ""

    def __enter__(self) -> RunUi:
        if self.live:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description:<20}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_phase(self, name: str) -> None:
        """A new part of the conversion begins."""
        if self._progress is not None and "eval" in self._tasks:  # the bars of training stay, this one has done its service
            self._progress.remove_task(self._tasks.pop("eval"))
        if not self.quiet:
            self._print(name)

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self.quiet:
            self._print(f"note: {text}")

    def on_step(self, stage: str, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        """Optimizer step `step` of `num_steps` is done. Metrics used: loss, tokens_per_second."""
        facts = [f"loss {metrics['loss']:.4g}"] if metrics.get("loss") is not None else []
        facts += [f"{metrics['tokens_per_second']:,.0f} tokens/s"] if metrics.get("tokens_per_second") else []
        self._advance(stage, step, num_steps, ", ".join(facts), shown=stage)

    def on_eval(self, what: str, done: int, total: int) -> None:
        """Part `what` of a measurement, or of reading text, is `done` of `total`. The parts share one bar: there are dozens."""
        if self._progress is not None and "eval" in self._tasks and self._part != what:
            self._progress.reset(self._tasks["eval"], total=total, description=what)
        self._part = what
        self._advance("eval", done, total, "", shown=what)

    def _advance(self, key: str, done: int, total: int, facts: str, *, shown: str) -> None:
        if self.quiet:
            return
        if self._progress is not None:
            if key not in self._tasks:
                self._tasks[key] = self._progress.add_task(shown, total=total, facts=facts)
            self._progress.update(self._tasks[key], completed=done, total=total, facts=facts)
            return
        now = time.monotonic()
        started = self._started.setdefault(shown, now)
        last_share, last_time = self._last.get(shown, (0.0, started))
        share = done / total if total else 1.0
        # A run of hours writes a line every few minutes; a part of a measurement that takes a moment says nothing at all.
        pause = max(_SECONDS_BETWEEN_LINES, 0.02 * (now - started))
        tenth = key != "eval" and share - last_share >= 0.1 and now - last_time >= 1.0
        finished = key != "eval" or now - started >= 5.0
        if finished if done == total else tenth or now - last_time >= pause:
            self._last[shown] = (share, now)
            left = f", {_duration((now - started) * (total - done) / done)} left" if 0 < done < total and now > started else ""
            self._print(f"{shown}: {done}/{total}{', ' if facts else ''}{facts}{left}")

    def _print(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text), soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------- output


def _stdout() -> Console:
    return _console(stderr=False)


def _stderr() -> Console:
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, highlight=False, markup=False, width=_TEXT_COLUMNS)
    return console


def _show(renderable: RenderableType, console: Console) -> None:
    from rich.console import Group
    from rich.table import Table

    columns = console.width
    for part in renderable.renderables if isinstance(renderable, Group) else [renderable]:
        # A table takes the columns it needs; one with a column that asks for the rest of the line is laid out for the console.
        grows = isinstance(part, Table) and not any(column.ratio for column in part.columns)
        console.width = max(columns, _TABLE_COLUMNS) if grows else columns
        console.print(part, crop=False)
    console.width = columns


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _jsonable(stage: Any) -> dict[str, Any]:
    """A stage's result as strict JSON: a loss that is not finite is null."""
    from dataclasses import asdict

    from attnconvert.convert.evaluate import json_safe

    result: dict[str, Any] = json_safe(asdict(stage))
    return result


@contextmanager
def _libraries(verbose: bool) -> Iterator[None]:
    """Inside, transformers, peft and datasets keep their load reports, weight bars and deprecation notes to themselves.

    Their mistakes still come as exceptions, and download bars of the Hub stay: a download is worth seeing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks is not for the user
    if verbose:
        yield
        return
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(transformers|peft|accelerate|datasets|huggingface_hub|torch)\b")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------- checks of options


def _sizes(option: str, text: str | None) -> list[int] | None:
    """`1024,4096` -> [1024, 4096], None stays."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1024,4096", param_hint=f"--{option}")
    return [int(part) for part in parts]


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=f"--{option}")


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise typer.BadParameter(f"{device!r} is not one of auto, cpu, cuda, cuda:N", param_hint="--device")


def _token_count(text: str | None) -> int | None:
    """`200k` -> 200000, None stays."""
    if text is None:
        return None
    from attnconvert.distill.config import parse_token_count

    try:
        count = int(parse_token_count(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from error
    if count < 1:
        raise typer.BadParameter("at least one token is needed", param_hint="--tokens")
    return count


def _resolved(device: str) -> str:
    """`auto` -> the GPU if there is one. Raises AttnConvertError `no-gpu` when one was asked for and there is none."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= count:
            raise AttnConvertError(
                "no-gpu",
                f"there is no {device!r} here: torch sees {count} GPU(s)",
                hint="`attnconvert doctor` says what this machine has; --device cpu works without a GPU",
            )
    return device


# ---------------------------------------------------------------- the one place that catches


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None = sys.argv.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Not app(): that would replace sys.excepthook for the whole process.
        typer.main.get_command(app)(args=arguments, prog_name="attnconvert", obj=arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else EXIT_ERROR
        if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this
            _say(interrupted(arguments))
        return code
    except KeyboardInterrupt:
        _say(interrupted(arguments))
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        known = error if isinstance(error, AttnConvertError) else surroundings(error)
        if known is not None:
            _say(known.render())
            return EXIT_ERROR
        _say(report_bug(error, arguments))
        return EXIT_BUG
    return 0


def interrupted(arguments: Sequence[str]) -> str:
    """What Ctrl-C prints: for a conversion, the command that goes on with it."""
    without_training = arguments[:1] == ["regroup"] and not any(argument.startswith(("--recipe", "-r")) for argument in arguments)
    if not arguments or arguments[0] not in RESUMABLE or without_training:
        return "interrupted"
    again = [argument for argument in arguments if argument != "--overwrite"]
    if "--resume" not in again:
        again.append("--resume")
    return f"interrupted; continue with: {shlex.join(['attnconvert', *again])}"


def surroundings(error: BaseException) -> AttnConvertError | None:
    """The user's version of errors that say the machine is too small, which no code of ours raises; None for a bug."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        first = str(error).splitlines()[0] if str(error) else "no memory left"
        hint = "use fewer rows at a time: --set stages.transfer.micro_batch_size=1 --set stages.finetune.micro_batch_size=1 (the result is the same up to rounding)"
        return AttnConvertError("out-of-memory", f"memory ran out: {first}", hint=hint)
    return None


def report_bug(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback to a log file and say where it is."""
    versions = _versions()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    command = shlex.join(["attnconvert", *arguments])
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    content = f"command: {command}\nversions: {versions}\nfolder: {Path.cwd()}\n\n{trace}"
    first = str(error).splitlines()[0] if str(error) else ""
    lines = [f"error[internal]: {type(error).__name__}: {first}", "  this is a fault in attnconvert, or in a library it uses, not in what you typed"]
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        path = folder / f"attnconvert-error-{stamp}-{os.getpid()}.log"
        try:
            path.write_text(content, encoding="utf-8")
        except OSError:
            continue
        lines.append(f"  traceback: {path}")
        break
    else:
        lines += ["  the traceback could not be written to a file:", trace]
    return "\n".join([*lines, f"  {versions}", f"hint: report it with that file; {DEBUG}=1 shows the traceback here"])


def _versions() -> str:
    from importlib import metadata

    parts = [f"attnconvert {__version__}", f"python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft", "typer"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package} absent")
    return ", ".join([*parts, platform.platform()])


if __name__ == "__main__":
    sys.exit(main())
