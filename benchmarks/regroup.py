"""A model with fewer KV heads, recovered by training: the rows `gqa` of docs/results.md, each beside the source trained on the same data.

    python benchmarks/regroup.py --label demo --model demo --text DIR --heldout embedded --length 512 --out OUT --budget 1M,5M source 8-4 8-2 8-1
    python benchmarks/regroup.py --label smollm2-135m-instruct --model DIR --text DIR --heldout FILE --out OUT --budget 250k,1M,4M source 9/3-9/1
    python benchmarks/regroup.py --label demo --model demo --text embedded --length 512 --out OUT --device cpu --jobs 1 --budget 15k --eval-tokens 8k source 8-4

A row is a variant, from KV heads to KV heads (`8-4`, or with the query heads `9/3-9/1`), at each token budget, transfer and finetuning together
(4 : 1, as in the recipe). Every budget is a training of its own, because the learning rate falls to its end. `source` is the source itself, finetuned on all
tokens of the budget with the same adapters and its own projections in full. `start` and `transfer` are the figures before training and between the stages.
Rows run `--jobs` at a time on one GPU, those of the largest budget first, so `seconds` is longer than a row alone would take. Writes
OUT/gqa-<label>-<variant>-<tokens>.json and .log, one row each, as soon as the row is done; a row whose file is there is left out, so a run that broke off
goes on. What is not done after `--budget-seconds` is stopped and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from linearize import Log, cached_data, meta, named

from attnconvert.convert.evaluate import EvalReport, evaluate_models
from attnconvert.convert.load import load_model, load_tokenizer, resolve
from attnconvert.convert.pipeline import Prepared, prepare
from attnconvert.convert.regroup import regroup_for_training
from attnconvert.distill.config import EvalConfig, parse_token_count
from attnconvert.distill.data import Data
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora, merge_lora
from attnconvert.distill.transfer import run_transfer
from attnconvert.surgery.regrouped import remember_sources

SOURCE = "source"
TRANSFER_SHARE = 0.8
FINE = ("passkey", "layer_errors", "curve", "data", "stages")  # in the file, not on the screen


def settings(args: argparse.Namespace, variant: str, budget: int) -> list[str]:
    """Recipe overrides of a row. The source is prepared as if it lost heads, and then does not; it has nothing to learn in transfer."""
    heads = [f"layers.0.config.kv_heads={1 if variant == SOURCE else variant.rpartition('-')[2].rpartition('/')[2]}"]
    transfer = 0 if variant == SOURCE else round(budget * TRANSFER_SHARE)
    return [
        *heads, f"stages.transfer.tokens={transfer}", f"stages.finetune.tokens={budget - transfer}", f"stages.transfer.length={args.length}",
        f"stages.finetune.length={args.length}", *args.set,
    ]  # fmt: skip


def context(args: argparse.Namespace, name: str) -> RunContext:
    return RunContext(
        Path(args.cache) / f"run-{args.label}-{name}",
        seed=args.seed,
        device=torch.device(args.device),
        precision="bf16" if args.device != "cpu" else "fp32",
        checkpoint_every=10**6,
        progress=Log(name),
    )


def load(prepared: Prepared, args: argparse.Namespace) -> Any:
    """A model on its device, in the data type it is trained in, and its tokenizer."""
    loaded = load_model(prepared.source, dtype="auto" if args.device != "cpu" else "fp32", device=args.device)
    return loaded.model, loaded.tokenizer


def measure(args: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any, data: Data, trials: int = 0) -> EvalReport:
    config = EvalConfig(tokens=args.eval_tokens, length=args.length, passkey_lengths=tuple(args.passkey), passkey_trials=trials)
    with torch.autocast("cuda", torch.bfloat16) if args.device != "cpu" else contextlib.nullcontext():
        return evaluate_models(student, teacher, tokenizer, data.eval, config, device=args.device, window=None, ablations={})


def figures(report: EvalReport) -> dict[str, float | None]:
    quality = report.quality_of("student")
    return {
        key: None if value is None else value.value
        for key, value in (("ppl", quality.ppl), ("ppl_ratio", quality.ppl_ratio), ("kl", quality.kl), ("agreement", quality.agreement))
    }


def pool(args: argparse.Namespace) -> int:
    """Tokens of text that all rows draw from."""
    return int(args.pool or max(parse_token_count(text) for text in args.budget.split(",")))


def run_row(args: argparse.Namespace, variant: str, text: str) -> dict[str, Any]:
    """Convert, train, measure, return the row."""
    overrides = settings(args, variant, parse_token_count(text))
    prepared = prepare(args.model, "gqa", overrides=overrides)
    recipe = prepared.recipe.recipe
    teacher, tokenizer = load(prepared, args)
    data = cached_data(args, tokenizer, pool(args))
    student, _ = load(prepared, args)
    name = f"{variant.replace('/', 'of')}-{text}"
    start = between = None
    stages, seconds = [], 0.0
    if variant == SOURCE:
        layers = remember_sources(student, prepared.sites)
    else:
        began = time.perf_counter()
        layers = regroup_for_training(student, prepared.sites, prepared.plan, data.train, args.seed, lambda note: print(name, note, flush=True))
        seconds += time.perf_counter() - began
        start = figures(measure(args, student, teacher, tokenizer, data))
        print(name, "start", start, flush=True)
        began = time.perf_counter()
        stages.append(run_transfer(student, layers, data.train, recipe.stages.transfer, context(args, name)))
        seconds += time.perf_counter() - began
        between = figures(measure(args, student, teacher, tokenizer, data))
        print(name, "after transfer", between, flush=True)
    began = time.perf_counter()
    adapted = add_lora(student, [site.path for site in prepared.sites], recipe.stages.finetune.lora, seed=args.seed)
    stages.append(run_finetune(adapted, layers, data.train, recipe.stages.finetune, context(args, name)))
    student = merge_lora(adapted).eval()
    seconds += time.perf_counter() - began
    report = measure(args, student, teacher, tokenizer, data, args.trials)
    passkey: dict[str, dict[str, float]] = {}
    for entry in report.passkey:
        passkey.setdefault(entry.name, {})[str(entry.length)] = entry.accuracy
    metrics = (context(args, name).run_dir / "metrics.jsonl").read_text().splitlines()
    plan = prepared.plan.converted[0].config
    return {
        "name": "gqa", "model": args.label, "variant": variant, "init": None if variant == SOURCE else plan["init"], "grouping": None if variant == SOURCE else plan["grouping"],
        "budget": parse_token_count(text), "tokens": sum(stage.tokens for stage in stages), "seconds": round(seconds, 1), "jobs": args.jobs,
        "teacher_ppl": report.quality_of("teacher").ppl.value, **figures(report), "start": start, "transfer": between,
        "passkey": passkey.get("student", {}), "teacher_passkey": passkey.get("teacher", {}), "layer_errors": stages[0].layer_errors,
        "stages": [{k: v for k, v in vars(stage).items() if k != "layer_errors"} for stage in stages], "data": named(data.description),
        "curve": [json.loads(line) for i, line in enumerate(metrics) if i % 10 == 9 and '"finetune"' in line], "overrides": overrides,
    }  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse a variant that does not start where the model does, before anything runs."""
    site = prepare(args.model, "gqa", overrides=settings(args, SOURCE, 10_000)).sites[0]
    for variant in args.variants:
        before = variant.split("-")[0]
        if variant != SOURCE and before not in (str(site.num_key_value_heads), f"{site.num_heads}/{site.num_key_value_heads}"):
            raise SystemExit(f"{variant}: the model has {site.num_heads} query and {site.num_key_value_heads} KV heads")


def result(args: argparse.Namespace, variant: str, text: str) -> Path:
    return Path(args.out) / f"gqa-{args.label}-{variant.replace('/', 'of')}-{text}.json"


def run_all(args: argparse.Namespace) -> int:
    """Every row in a process of its own, `--jobs` at a time. Returns how many are missing."""
    ends = time.monotonic() + args.budget_seconds
    check(args)
    cached_data(args, load_tokenizer(resolve(args.model)), pool(args))
    budgets = sorted(args.budget.split(","), key=parse_token_count, reverse=True)
    rows = [(variant, text) for text in budgets for variant in args.variants]
    waiting = [row for row in rows if not result(args, *row).exists()]
    running: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
    failed: list[tuple[str, str]] = []
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            row = waiting.pop(0)
            with result(args, *row).with_suffix(".log").open("wb") as log:
                command = [sys.executable, __file__, *sys.argv[1:], "--row", *row]
                running[row] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        for row, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[row]
            if process.returncode:
                failed.append(row)
                print("FAILED", *row, result(args, *row).with_suffix(".log").read_text()[-1500:], sep="\n", flush=True)
            else:
                done = json.loads(result(args, *row).read_text())["rows"][0]
                print("ROW", json.dumps({k: v for k, v in done.items() if k not in FINE}), flush=True)
        if time.monotonic() > ends:
            for row, process in running.items():
                process.terminate()
                process.wait()
                print("STOPPED", *row, result(args, *row).with_suffix(".log").read_text()[-300:], flush=True)
            failed += [*running, *waiting]
            break
        time.sleep(0.2)
    if failed:
        print("MISSING", *("-".join(row) for row in failed), flush=True)
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="`source`, or heads such as 8-4 or 9/3-9/1")
    parser.add_argument("--label", required=True, help="name of the model in the rows")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", help="held-out text; not given = a share of the text's own, `embedded` = the text inside the package")
    parser.add_argument("--budget", default="5M", help="training tokens of a row; several with commas give a curve")
    parser.add_argument("--budget-seconds", type=float, default=600.0, help="stop after this many seconds, with the rows that are done")
    parser.add_argument("--jobs", type=int, default=8, help="rows that train at the same time")
    parser.add_argument("--out", required=True)
    parser.add_argument("--cache", default="/tmp/attnconvert-bench")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recall", type=float, default=0.0, help="share of synthetic recall rows in everybody's training data")
    parser.add_argument("--pool", type=parse_token_count, default=0, help="tokens of text to draw from; 0 = the largest budget")
    parser.add_argument("--eval-tokens", type=parse_token_count, default=100_000)
    parser.add_argument("--trials", type=int, default=0, help="pass-key prompts per length")
    parser.add_argument("--passkey", type=int, nargs="*", default=[128, 512, 1024], help="pass-key lengths in tokens")
    parser.add_argument("--set", action="append", default=[], help="recipe override, as for attnconvert")
    parser.add_argument("--row", nargs=2, metavar=("VARIANT", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.row is None:
        sys.exit(1 if run_all(args) else 0)
    if args.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True
    hidden = ("--model", "--text", "--heldout", "--out", "--cache", "--budget-seconds")
    given = sys.argv[1 : sys.argv.index("--row")]
    shown = [a for i, a in enumerate(given) if a not in hidden and (i == 0 or given[i - 1] not in hidden)]
    command = f"python benchmarks/regroup.py --model MODEL --text TEXT --heldout HELDOUT --out OUT {shlex.join(shown)}"
    row = run_row(args, *args.row)
    path = result(args, *args.row)
    path.with_suffix(".tmp").write_text(json.dumps({"meta": meta(command), "rows": [row]}, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
