"""Routed heads against the same model with all heads, finetuned on the same tokens: the rows `moh` of docs/moh.md.

    python benchmarks/mix_heads.py 75 --label demo --model demo --text embedded --out OUT --tokens 300k,1M --length 512 --device cpu
    python benchmarks/mix_heads.py 78-head --label smollm2-135m-instruct --model DIR --text DIR --heldout FILE --out OUT --tokens 250k,1M,4M --length 1024
    python benchmarks/mix_heads.py 75 --label demo --model demo --text embedded --out OUT --length 512 --device cpu --routers --eval-tokens 8192

A variant is the share of the units that a token uses, in percent, and what a unit is: `75` and `67-group` = KV heads with their query heads, `78-head` = query heads.
Everything else is the recipe `moh` with what --set says. For each number of tokens the model is converted and trained anew; `baseline_ppl` is that of the unconverted
model, trained on the same rows with the same adapters, steps and losses (trained once for all variants, kept in --cache). A first row is the conversion without training, but with --only-trained.
Writes OUT/moh-<label>-<variant>.json, row by row. With --routers nothing is trained: rows `moh.routers`, one for each way to choose the units in ROUTERS, and one for the
units whose outputs have the largest norms, which is known when all are computed. Writes OUT/moh-routers-<label>-<variant>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from linearize import Log, cached_data, meta, named

from attnconvert.convert.evaluate import evaluate_models
from attnconvert.convert.load import load_model
from attnconvert.convert.mix_heads import calibrate_heads, measure_usage, start_routers, uncalibrated, with_calibration
from attnconvert.convert.pipeline import Prepared, prepare
from attnconvert.distill.config import EvalConfig, parse_token_count
from attnconvert.distill.data import Data
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora, lora_targets, merge_lora
from attnconvert.surgery.methods.moh import MohConfig, counts
from attnconvert.surgery.plan import ConversionPlan
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import swap

ROUTERS = {
    "output_norm, none shared, units by layer from calibration": ("allocate=calibration",),
    "output_norm, none shared, as many units in every layer": ("allocate=even",),
    "output_norm, a quarter shared": (
        "allocate=even",
        "shared=0.25",
    ),
    "output_norm, half shared": (
        "allocate=even",
        "shared=0.5",
    ),
    "norm, none shared": (
        "allocate=even",
        "router=norm",
    ),
    "norm, half shared by calibration": ("allocate=even", "router=norm", "shared=0.5"),
    "norm, the first half shared (as published)": ("allocate=even", "router=norm", "shared=0.5", "choose_shared=first"),
}
"""What a row is called -> the settings of the layers in it."""


def prepared_for(args: argparse.Namespace, tokens: int, *settings: str) -> Prepared:
    """The conversion by the recipe, with a budget of training tokens and settings of the layers."""
    percent, _, kind = args.variant.partition("-")
    overrides = [
        f"data.source={args.text}", f"stages.finetune.tokens={tokens or 1}", f"stages.finetune.length={args.length}", f"layers.0.config.active={int(percent) / 100}",
        f"layers.0.config.unit={'query_head' if kind == 'head' else 'kv_head'}", *(f"layers.0.config.{setting}" for setting in settings), *args.set,
    ]  # fmt: skip
    return prepare(args.model, "moh", overrides=overrides)


def train(args: argparse.Namespace, name: str, model: Any, prepared: Prepared, data: Data) -> tuple[Any, int]:
    """The model with its finetuned adapters merged, and the tokens it saw."""
    folder = args.cache / f"run-{args.label}-{name}"
    precision: Any = "bf16" if args.device != "cpu" else "fp32"
    run = RunContext(folder, seed=args.seed, device=torch.device(args.device), precision=precision, checkpoint_every=10**6, progress=Log(name))
    config = prepared.recipe.recipe.stages.finetune
    adapted = add_lora(model, [row.path for row in prepared.plan.converted], config.lora, seed=args.seed)
    stage = run_finetune(adapted, {idx: module.core for idx, _, module in converted_sites(adapted)}, data.train, config, run)
    return merge_lora(adapted).eval(), stage.tokens  # type: ignore[attr-defined]


def measure(args: argparse.Namespace, model: Any, teacher: Any, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Quality of a model on the held-out rows, against the source."""
    config = EvalConfig(tokens=args.eval_tokens, length=args.length, passkey_trials=0)
    with torch.autocast("cuda", torch.bfloat16, enabled=args.device != "cpu"):
        report = evaluate_models(model, teacher, tokenizer, data.eval, config, device=args.device, window=None, ablations={})
    own, source = report.quality_of("student"), report.quality_of("teacher")
    assert own.ppl_ratio is not None
    assert own.kl is not None
    assert own.agreement is not None
    return {
        "ppl": own.ppl.value, "teacher_ppl": source.ppl.value, "ppl_ratio": own.ppl_ratio.value, "ppl_ratio_ci95": own.ppl_ratio.ci95, "kl": own.kl.value,
        "agreement": own.agreement.value, "eval_tokens": report.num_tokens,
    }  # fmt: skip


def baseline(args: argparse.Namespace, tokens: int, data: Data) -> dict[str, Any]:
    """Quality of the unconverted model, trained on the same rows."""
    path = args.cache / f"baseline-{args.label}-{tokens}-{args.length}-{args.seed}.json"
    if not path.exists():
        prepared = prepared_for(args, tokens)
        loaded = load_model(prepared.source, dtype=args.dtype, device=args.device)
        model, _ = train(args, f"baseline-{tokens}", loaded.model, prepared, data)
        teacher = load_model(prepared.source, dtype=args.dtype, device=args.device).model
        path.write_text(json.dumps(measure(args, model, teacher, loaded.tokenizer, data)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def converted(args: argparse.Namespace, model: Any, prepared: Prepared, data: Data) -> tuple[ConversionPlan, dict[str, dict[str, Any]]]:
    """Calibrate and convert the model in place; the plan, and what calibration found."""
    wanted, plan = uncalibrated(prepared.recipe.recipe, prepared.plan, prepared.sites), prepared.plan
    if not wanted:
        swap(model, plan)
        return plan, {}
    facts, maps = calibrate_heads(model, prepared.sites, plan, wanted, data.train, args.seed, lambda *facts: None)
    plan = with_calibration(plan, wanted, facts)
    swap(model, plan)
    start_routers(model, maps)
    return plan, facts


def row_of(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Convert, train and measure."""
    prepared, began = prepared_for(args, tokens), time.perf_counter()
    loaded = load_model(prepared.source, dtype=args.dtype, device=args.device)
    args.recall = prepared.recipe.recipe.data.recall
    data = cached_data(args, loaded.tokenizer, tokens or args.tokens[0])
    model = loaded.model
    plan, facts = converted(args, model, prepared, data)
    seen = 0
    if tokens:
        model, seen = train(args, f"{args.variant}-{tokens}", model, prepared, data)
    seconds = time.perf_counter() - began
    usage = measure_usage(model.eval(), data.eval, torch.device(args.device), lambda *facts: None)
    teacher = load_model(prepared.source, dtype=args.dtype, device=args.device).model
    found = measure(args, model, teacher, loaded.tokenizer, data)
    same = baseline(args, tokens, data) if tokens else {**found, "ppl": found["teacher_ppl"], "kl": 0.0}
    routed = [share for row in plan.converted for unit, share in enumerate(usage[row.layer_idx]) if unit not in (row.config["shared_units"] or ())]
    shares = [share for own in usage.values() for share in own]
    return {
        "name": "moh", "model": args.label, "variant": args.variant, "tokens": seen, **found, "baseline_ppl": same["ppl"], "baseline_kl": same["kl"],
        "ppl_over_baseline": found["ppl"] / same["ppl"], "skipped": 1 - sum(shares) / len(shares), "routed_least": min(routed), "routed_most": max(routed), "usage": usage,
        "explained": facts.get("explained", {}), "seconds": round(seconds, 1), "settings": plan.converted[0].config | {"shared_units": None}, "data": named(data.description),
    }  # fmt: skip


@contextlib.contextmanager
def largest_outputs(model: Any, prepared: Prepared) -> Iterator[None]:
    """Inside, each token of an unconverted model uses the units that add the vectors of the largest norms to the layers' outputs."""
    with contextlib.ExitStack() as stack:
        for site, row in zip(prepared.sites, prepared.plan.layers, strict=True):
            units, used, _ = counts(MohConfig.model_validate(row.config), site)
            projection: Any = model.get_submodule(lora_targets(model, [site.path], ["o"])[0])
            assert isinstance(projection, torch.nn.Linear), "GPT-2's is another kind"

            def choose(module: Any, inputs: tuple[Any, ...], units: int = units, used: int = used) -> tuple[Any, ...]:
                heads = inputs[0].unflatten(-1, (units, -1))
                norms = torch.stack(
                    [torch.nn.functional.linear(heads[..., u, :], part).norm(dim=-1) for u, part in enumerate(module.weight.chunk(units, 1))], -1
                )
                mask = torch.zeros_like(norms).scatter(-1, norms.topk(used, -1).indices, 1.0)
                return ((heads * mask[..., None].to(heads.dtype)).flatten(-2),)

            stack.callback(projection.register_forward_pre_hook(choose).remove)
        yield


def router_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way to choose the units, without training."""
    for name, settings in {**ROUTERS, "by the norms of the outputs themselves, as many units in every layer (computes all)": ()}.items():
        prepared = prepared_for(args, 0, *settings)
        loaded = load_model(prepared.source, dtype=args.dtype, device=args.device)
        args.recall = prepared.recipe.recipe.data.recall
        data = cached_data(args, loaded.tokenizer, args.tokens[0])
        facts: dict[str, dict[str, Any]] = {}
        if name in ROUTERS:
            _, facts = converted(args, loaded.model, prepared, data)
        teacher = load_model(prepared.source, dtype=args.dtype, device=args.device).model
        with contextlib.nullcontext() if name in ROUTERS else largest_outputs(loaded.model, prepared):
            found = measure(args, loaded.model.eval(), teacher, loaded.tokenizer, data)
        yield {
            "name": "moh.routers",
            "model": args.label,
            "variant": args.variant,
            "choice": name,
            **found,
            "explained": facts.get("explained", {}),
            "data": named(data.description),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="75, 50, 78-head, 67-group, ...")
    parser.add_argument("--label", required=True, help="name of the model in the rows")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="training text, also for calibration")
    parser.add_argument("--heldout", help="held-out text; otherwise documents of --text")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cache", default=Path("/tmp/attnconvert-bench"), type=Path)
    parser.add_argument(
        "--tokens", type=lambda text: [parse_token_count(part) for part in text.split(",")], default=[100_000], help="of finetuning, a row for each"
    )
    parser.add_argument("--only-trained", action="store_true", help="no row before training")
    parser.add_argument("--routers", action="store_true", help="compare routers without training")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--eval-tokens", type=parse_token_count, default=100_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="recipe override, as for attnconvert")
    args = parser.parse_args()
    args.dtype = "auto" if args.device != "cpu" else "fp32"
    for folder in (args.out, args.cache):
        folder.mkdir(parents=True, exist_ok=True)
    if args.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True
    hidden = ("--model", "--text", "--heldout", "--out", "--cache")
    shown = [a for i, a in enumerate(sys.argv[1:]) if a not in hidden and sys.argv[i] not in hidden]
    result: dict[str, Any] = {"meta": meta(f"python benchmarks/mix_heads.py {shlex.join(shown)} --model MODEL --text TEXT --out OUT"), "rows": []}
    path = args.out / f"moh-{'routers-' if args.routers else ''}{args.label}-{args.variant}.json"
    for row in router_rows(args) if args.routers else (row_of(args, tokens) for tokens in (*([] if args.only_trained else [0]), *args.tokens)):
        print("ROW", json.dumps({key: value for key, value in row.items() if key != "usage"}), flush=True)
        result["rows"].append(row)
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
