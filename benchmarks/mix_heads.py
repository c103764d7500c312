"""Routed heads against the same model with all heads, finetuned on the same tokens: the rows `moh` of docs/moh.md.

    python benchmarks/mix_heads.py 75 --label demo --model demo --text embedded --out OUT --tokens 300k,1M --length 512 --device cpu
    python benchmarks/mix_heads.py 78-head --label smollm2-135m-instruct --model DIR --text DIR --heldout FILE --out OUT --tokens 250k,1M,4M --length 1024

A variant is the share of the units that a token uses, in percent, and what a unit is: `75` and `67-group` = KV heads with their query heads, `78-head` = query heads.
Everything else is the recipe `moh` with what --set says. For each number of tokens the model is converted and trained anew; `baseline_ppl` is that of the unconverted
model, trained on the same rows with the same adapters, steps and losses (trained once for all variants, kept in --cache). A first row is the conversion without training.
Writes OUT/moh-<label>-<variant>.json, row by row.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from linearize import Log, cached_data, meta, named

from attnconvert.convert.evaluate import evaluate_models
from attnconvert.convert.load import load_model
from attnconvert.convert.mix_heads import measure_importance, measure_usage, most_important, undecided_units, with_shared_units
from attnconvert.convert.pipeline import Prepared, prepare
from attnconvert.distill.config import EvalConfig, parse_token_count
from attnconvert.distill.data import Data
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora, merge_lora
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import swap


def prepared_for(args: argparse.Namespace, tokens: int) -> Prepared:
    """The conversion by the recipe, with a budget of training tokens."""
    percent, _, kind = args.variant.partition("-")
    overrides = [
        f"data.source={args.text}", f"stages.finetune.tokens={tokens or 1}", f"stages.finetune.length={args.length}", f"layers.0.config.active={int(percent) / 100}",
        f"layers.0.config.unit={'query_head' if kind == 'head' else 'kv_head'}", *args.set,
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


def row_of(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Convert, train and measure."""
    prepared, began = prepared_for(args, tokens), time.perf_counter()
    loaded = load_model(prepared.source, dtype=args.dtype, device=args.device)
    args.recall = prepared.recipe.recipe.data.recall
    data = cached_data(args, loaded.tokenizer, tokens or args.tokens[0])
    model, undecided = loaded.model, undecided_units(prepared.recipe.recipe, prepared.plan, prepared.sites)
    importance = measure_importance(model, prepared.sites, {idx: units for idx, (units, _) in undecided.items()}, data.train, args.seed, lambda *facts: None)
    plan = with_shared_units(prepared.plan, most_important(importance, {idx: shared for idx, (_, shared) in undecided.items()}))
    swap(model, plan)
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
        "seconds": round(seconds, 1), "settings": plan.converted[0].config | {"shared_units": None}, "data": named(data.description),
    }  # fmt: skip


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
        "--tokens", type=lambda text: [parse_token_count(part) for part in text.split(",")], required=True, help="of finetuning, a row for each"
    )
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
    path = args.out / f"moh-{args.label}-{args.variant}.json"
    for tokens in (0, *args.tokens):
        row = row_of(args, tokens)
        print("ROW", json.dumps({key: value for key, value in row.items() if key != "usage"}), flush=True)
        result["rows"].append(row)
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
