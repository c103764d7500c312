"""A model converted by every shipped linear recipe at one token budget, and by ours for longer: the rows of docs/results.md.

    python benchmarks/linearize.py --label smollm2-135m-instruct --model DIR --text DIR --heldout FILE --out OUT --jobs 3 all-layers:5M kept-25:5M lolcats:5M
    python benchmarks/linearize.py --label demo --model demo --text embedded --out OUT --device cpu --length 512 all-layers:300k window-sinks:300k

A row is VARIANT:TOKENS, tokens of transfer and finetuning together (2 : 3, as in the recipes). All rows train on the same rows of text and
are evaluated on the same held-out rows and pass-key prompts. Rows run `--jobs` at a time on one GPU; `gpu_seconds` is wall-clock of the row's
training, so it is longer than the row alone would take. Writes OUT/<variant>-<tokens>.json (one row each) and, for rows named with a
trailing `!`, the adapters and cores into OUT/adapters-<variant>-<tokens>.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from attnconvert.convert.evaluate import evaluate_models
from attnconvert.convert.load import load_model
from attnconvert.convert.pipeline import prepare
from attnconvert.distill.calibrate import calibrate
from attnconvert.distill.config import DataConfig, EvalConfig, parse_token_count
from attnconvert.distill.data import Data, PackedRows, load_data
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext, StageResult
from attnconvert.distill.lora import add_lora, merge_lora
from attnconvert.distill.transfer import run_transfer
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.swap import restore_softmax, swap, zeroed_linear_branch

RECIPES = {"all-layers": "hedgehog", "kept-25": "hedgehog-mixed", "window-sinks": "window-sinks", "lolcats": "lolcats", "teacher-same-data": "hedgehog"}
PASSKEY_LENGTHS = (128, 256, 512, 1024)  # 64 tokens do not hold the prompt; block window 64 sees 65 to 128 keys


def cached_data(args: argparse.Namespace, tokenizer: Any, num_tokens: int) -> Data:
    """Packed rows, tokenised once for all processes."""
    path = Path(args.cache) / f"rows-{args.label}-{num_tokens}-{args.length}-{args.recall}.pt"
    if not path.exists():
        config = DataConfig(source=args.text, eval_source=args.heldout, align=64, recall=args.recall)
        data = load_data(config, tokenizer, length=args.length, num_train_tokens=num_tokens, num_eval_tokens=args.eval_tokens, eval_length=args.length)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save({"train": vars(data.train), "eval": vars(data.eval), "description": data.description}, part)
        os.replace(part, path)
    saved = torch.load(path, weights_only=True)
    return Data(PackedRows(**saved["train"]), PackedRows(**saved["eval"]), saved["description"])


class Log:
    """Prints a line every 20 steps."""

    def __init__(self, name: str):
        self.name = name

    def on_step(self, stage: str, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        if step % 20 == 0 or step == num_steps:
            print(f"{self.name} {stage} {step}/{num_steps} loss {metrics['loss']:.4f} {metrics['tokens_per_second']:.0f} tokens/s", flush=True)


def run_row(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """Convert, measure, return the row."""
    variant, tokens = row.rstrip("!").split(":")
    budget = parse_token_count(tokens)
    recipe_name = RECIPES[variant]
    transfer_share = 0.0 if variant in ("window-sinks", "teacher-same-data") else 0.4
    overrides = [
        f"stages.transfer.tokens={round(budget * transfer_share)}", f"stages.finetune.tokens={round(budget * (1 - transfer_share))}", f"stages.transfer.length={args.length}",
        f"stages.finetune.length={args.length}", *args.set,
    ]  # fmt: skip
    prepared = prepare(args.model, recipe_name, overrides=overrides)
    recipe = prepared.recipe.recipe
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    loaded = load_model(prepared.source, dtype="auto", device=args.device)
    data = cached_data(args, loaded.tokenizer, args.pool or budget)
    student = loaded.model
    run_dir = Path(args.cache) / f"run-{args.label}-{variant}-{tokens}"
    run = RunContext(
        run_dir,
        seed=args.seed,
        device=device,
        precision="bf16" if device.type == "cuda" else "fp32",
        compile=device.type == "cuda",
        checkpoint_every=10**6,
        progress=Log(row),
    )
    began = time.perf_counter()
    stages: list[StageResult] = []
    kept: list[int] = []
    paths = [site.path for site in prepared.sites]
    cores: dict[int, Any] = {}
    if variant != "teacher-same-data":
        swap(student, prepared.plan)
        cores = {idx: module.core for idx, _, module in converted_sites(student)}
        for core in cores.values():
            core.to(torch.float32)
            core.compile_kernel = device.type == "cuda"
        calibrate(student, cores, data.train, run)
        stages.append(run_transfer(student, cores, data.train, recipe.stages.transfer, RunContext(**{**vars(run), "compile": False})))
        for core in cores.values():
            core.compile_kernel = False  # finetuning compiles whole layers
        if prepared.plan.num_kept_later:
            errors = stages[0].layer_errors
            kept = sorted(sorted(errors, key=lambda idx: -errors[idx])[: prepared.plan.num_kept_later])
            restore_softmax(student, kept, "largest error after transfer")
            cores = {idx: module.core for idx, _, module in converted_sites(student)}
        paths = [path for _, path, _ in converted_sites(student)]
    adapted = add_lora(student, paths, recipe.stages.finetune.lora, seed=args.seed)
    stages.append(run_finetune(adapted, cores, data.train, recipe.stages.finetune, run))
    seconds = time.perf_counter() - began
    if row.endswith("!"):
        torch.save(
            {name: p.detach().cpu() for name, p in adapted.named_parameters() if "lora_" in name or ".core." in name},
            Path(args.out) / f"adapters-{variant}-{tokens}.pt",
        )
    merge_lora(adapted)
    teacher = load_model(prepared.source, dtype="auto", device=args.device).model
    ablations = {"linear branch zeroed": lambda: zeroed_linear_branch(student)} if any(getattr(core, "linear", False) for core in cores.values()) else {}
    config = EvalConfig(tokens=args.eval_tokens, length=args.length, passkey_lengths=PASSKEY_LENGTHS, passkey_trials=args.trials)
    context = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    with context:
        report = evaluate_models(student, teacher, loaded.tokenizer, data.eval, config, device=device, window=64, ablations=ablations)
    quality = {
        q.name: {"ppl": q.ppl.value, "kl": None if q.kl is None else q.kl.value, "agreement": None if q.agreement is None else q.agreement.value}
        for q in report.quality
    }
    passkey: dict[str, dict[str, float]] = {}
    for entry in report.passkey:
        passkey.setdefault(entry.name, {})[str(entry.length)] = entry.accuracy
    return {
        "name": "hedgehog", "model": args.label, "variant": variant, "recipe": recipe_name, "tokens": sum(s.tokens for s in stages), "gpu_seconds": round(seconds, 1),
        "jobs_on_gpu": args.jobs, "teacher_ppl": quality["teacher"]["ppl"], **quality["student"], "passkey": passkey.get("student", {}), "teacher_passkey": passkey.get("teacher", {}),
        "ablations": {name: {**q, "passkey": passkey.get(name, {})} for name, q in quality.items() if name not in ("teacher", "student")}, "kept_layers": kept,
        "layer_errors": stages[0].layer_errors, "stages": [{k: v for k, v in vars(s).items() if k != "layer_errors"} for s in stages], "data": named(data.description),
        "curve": [json.loads(line) for i, line in enumerate((run_dir / "metrics.jsonl").read_text().splitlines()) if i % 10 == 9 and '"finetune"' in line], "overrides": overrides,
    }  # fmt: skip


def named(description: dict[str, Any]) -> dict[str, Any]:
    """A description of data with the names of files instead of their paths, which mean nothing elsewhere."""
    return {key: Path(value).name if key in ("source", "eval_source") and isinstance(value, str) else value for key, value in description.items()}


def meta(command: str) -> dict[str, Any]:
    """Where the figures come from."""
    import peft
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {"command": command, "device": device, "date": datetime.date.today().isoformat(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--label", required=True, help="name of the model in the rows")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", help="held-out text; not given = a share of the text's own")
    parser.add_argument("--out", required=True)
    parser.add_argument("--cache", default="/tmp/attnconvert-bench")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recall", type=float, default=0.1, help="share of synthetic recall rows in everybody's training data")
    parser.add_argument("--pool", type=parse_token_count, default=0, help="tokens of text to draw from; 0 = the row's budget")
    parser.add_argument("--eval-tokens", type=parse_token_count, default=100_000)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], help="recipe override, as for attnconvert")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.one:
        (row,) = args.rows
        result = run_row(args, row)
        path = Path(args.out) / f"{row.rstrip('!').replace(':', '-')}.json"
        hidden = ("--model", "--text", "--heldout", "--out", "--cache", "--one")
        shown = [a for i, a in enumerate(sys.argv[1:], 1) if a not in hidden and sys.argv[i - 1] not in hidden]
        path.write_text(
            json.dumps(
                {"meta": meta(f"python benchmarks/linearize.py --model MODEL --text TEXT --heldout HELDOUT --out OUT {shlex.join(shown)}"), "rows": [result]},
                indent=1,
            )
            + "\n"
        )
        brief = {
            k: result[k]
            for k in ("variant", "tokens", "gpu_seconds", "teacher_ppl", "ppl", "kl", "agreement", "passkey", "teacher_passkey", "ablations", "kept_layers")
        }
        print("ROW", json.dumps(brief), flush=True)
        return
    waiting, running = list(args.rows), []
    failed = 0
    while waiting or running:
        while waiting and len(running) < args.jobs:
            row = waiting.pop(0)
            command = [sys.executable, __file__, "--one", *[a for a in sys.argv[1:] if a not in args.rows], row]
            log = open(Path(args.out) / f"{row.rstrip('!').replace(':', '-')}.log", "w")  # noqa: SIM115 (lives as long as the process)
            running.append((row, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
        for row, process in list(running):
            if process.poll() is not None:
                running.remove((row, process))
                failed += process.returncode != 0
                print(row, "exit", process.returncode, flush=True)
        time.sleep(0.5)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
