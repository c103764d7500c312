"""Sparse attention on a model with a long context: the rows `moa` of docs/moa.md and `infllm` of docs/infllm-v2.md, each at several lengths.

    python benchmarks/sparsify.py 50 --label smollm2-135m-instruct --model DIR --text DIR --long FILE --out OUT --lengths 2048,4096,8192 --tokens 2M
    python benchmarks/sparsify.py uniform-50 --label demo --model demo --text FILE --long FILE --out OUT --lengths 128,256,512 --sinks 4 --device cpu
    python benchmarks/sparsify.py infllm-33x32 --label smollm2-135m-instruct --model DIR --text DIR --long FILE --out OUT --tokens 500k \
        --set layers.0.config.block_size=32 --set layers.0.config.window_size=512 --set layers.0.config.topk=17 --set layers.0.config.dense_len=0

A variant is a share of the KV cache in percent: `50` = rules searched by the recipe `moa`, measured as they are and, with `--tokens`, after finetuning by it;
`uniform-50` = for each length, one fixed window of that share for all heads, sinks included, untrained; `source` = the model itself, finetuned on the same tokens with
the same adapters; `infllm...` = the recipe `infllm-v2` with what --set says; `window-1056` = for all lengths, one window of so many tokens, sinks included. Perplexity, KL and agreement are those of the first N tokens of every document of `--long` that has as many tokens as the longest length;
pass keys lie at all depths. Writes OUT/<moa or infllm>-<label>-<variant>.json with a row for each length, before and after training.
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
from attnconvert.convert.pipeline import prepare
from attnconvert.convert.plan import layer_settings, with_span_rules
from attnconvert.convert.sparsify import search_spans
from attnconvert.distill.config import EvalConfig, parse_token_count
from attnconvert.distill.data import PackedRows
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora, merge_lora
from attnconvert.kernels.blocks.rule import visible_blocks
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.spans import DENSE, Rule, density
from attnconvert.surgery.swap import swap

SOURCE, UNIFORM, WINDOW, INFLLM = "source", "uniform-", "window-", "infllm"


def long_rows(path: Path, tokenizer: Any, longest: int, count: int) -> torch.Tensor:
    """The first tokens of `count` documents that have as many, int32 [N, longest]."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"][: longest * 8], truncation=True, max_length=longest)["input_ids"]
        if len(ids) == longest:
            rows.append(ids)
        if len(rows) == count:
            break
    return torch.tensor(rows, dtype=torch.int32)


class Measure:
    """Rows for the table, at all lengths, written as they come."""

    def __init__(self, args: argparse.Namespace, teacher: Any, tokenizer: Any):
        self.args, self.teacher, self.tokenizer = args, teacher, tokenizer
        hidden = ("--model", "--text", "--long", "--out", "--cache")
        shown = [a for i, a in enumerate(sys.argv[1:]) if a not in hidden and sys.argv[i] not in hidden]
        command = f"python benchmarks/sparsify.py {shlex.join(shown)} --model MODEL --text TEXT --long FILE --out OUT"
        self.result: dict[str, Any] = {"meta": meta(command), "rows": []}
        self.documents = long_rows(args.long, tokenizer, max(args.lengths), args.documents)

    def __call__(self, student: Any, rules: dict[int, dict[int, list[Rule]]] | None, **facts: Any) -> None:
        """One row per length. rules: length -> layer -> one rule per KV head, what the student has there; None for blocks."""
        for length in self.args.lengths:
            cores = {idx: module.core for idx, _, module in converted_sites(student)}
            if rules is None:
                shares = [visible_blocks(length - 1, core.rule) * core.rule.block_size / length for core in cores.values()]
            else:
                for idx, own in rules[length].items():
                    cores[idx].set_rules([rule.alpha for rule in own], [rule.beta for rule in own])
                shares = [density(rule, length, self.args.sinks) for own in rules[length].values() for rule in own]
            ids = self.documents[:, :length].contiguous()
            packed = PackedRows(ids, torch.arange(length, dtype=torch.int32).expand_as(ids).contiguous())
            config = EvalConfig(tokens=ids.numel(), length=length, passkey_lengths=(length,), passkey_trials=self.args.trials)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.args.device != "cpu"):
                report = evaluate_models(student, self.teacher, self.tokenizer, packed, config, device=self.args.device, window=None, ablations={})
            quality, teacher = report.quality_of("student"), report.quality_of("teacher")
            keys = {entry.name: entry for entry in report.passkey}
            held = {entry.length: entry for entry in report.state_bytes}.get(length)
            row = {
                "name": family(self.args.variant), "model": self.args.label, "variant": self.args.variant, "length": length, **facts, "density": min(1.0, sum(shares) / len(shares)),
                "ppl": quality.ppl.value, "teacher_ppl": teacher.ppl.value, "ppl_ratio": value(quality.ppl_ratio), "kl": value(quality.kl), "agreement": value(quality.agreement),
                "passkey": keys["student"].accuracy if keys else None, "teacher_passkey": keys["teacher"].accuracy if keys else None,
                "passkey_trials": self.args.trials, "eval_tokens": ids.numel(), "passkey_by_third": keys["student"].by_third if keys else None, "teacher_passkey_by_third": keys["teacher"].by_third if keys else None,
                "kv_bytes": None if held is None else held.student, "teacher_kv_bytes": None if held is None else held.teacher,
            }  # fmt: skip
            print("ROW", json.dumps(row), flush=True)
            self.result["rows"].append(row)
            self.write()

    def write(self) -> None:
        """What is known so far, so that a run that is ended leaves its rows, and the rules they belong to."""
        path = self.args.out / f"{family(self.args.variant)}-{self.args.label}-{self.args.variant.removeprefix('infllm-')}.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)


def family(variant: str) -> str:
    """What the rows of a variant are called: they are compared with those of the same name."""
    return "infllm" if variant.startswith((INFLLM, WINDOW)) else "moa"


def value(estimate: Any) -> float | None:
    return None if estimate is None else float(estimate.value)


def run(args: argparse.Namespace) -> None:
    """Measure a variant, train it, measure it again."""
    blocks, fixed = args.variant.startswith(INFLLM), args.variant.startswith((UNIFORM, WINDOW))
    share = 1.0 if blocks or args.variant == SOURCE or args.variant.startswith(WINDOW) else int(args.variant.removeprefix(UNIFORM)) / 100
    overrides = [f"data.source={args.text}", f"stages.finetune.tokens={args.tokens}", f"stages.finetune.length={args.length}"]
    if not blocks:
        settings = {"density": share, "num_sinks": args.sinks, "search.lengths": json.dumps(args.lengths)}
        overrides += [f"layers.0.config.{name}={setting}" for name, setting in settings.items()]
    prepared = prepare(args.model, "infllm-v2" if blocks else "moa", overrides=[*overrides, *args.set])
    recipe = prepared.recipe.recipe
    dtype = "auto" if args.device != "cpu" else "fp32"
    loaded = load_model(prepared.source, dtype=dtype, device=args.device)
    teacher, tokenizer = load_model(prepared.source, dtype=dtype, device=args.device).model, loaded.tokenizer
    measure, student = Measure(args, teacher, tokenizer), loaded.model
    plan, began = prepared.plan, time.perf_counter()
    heads = {site.layer_idx: site.num_key_value_heads for site in prepared.sites}
    rules: dict[int, dict[int, list[Rule]]] | None = None
    if fixed:
        window = int(args.variant.removeprefix(WINDOW)) if args.variant.startswith(WINDOW) else None
        sizes = {length: round(share * length) if window is None else window for length in args.lengths}
        rules = {length: {idx: [Rule(sizes[length] - args.sinks, 0.0)] * G for idx, G in heads.items()} for length in args.lengths}
    elif args.variant == SOURCE:
        rules = {length: {idx: [DENSE] * G for idx, G in heads.items()} for length in args.lengths}
    elif not blocks:
        per_layer: Any = layer_settings(recipe, plan)
        search = search_spans(student.eval(), tokenizer, prepared.sites, per_layer, recipe.data, seed=args.seed, cache=args.cache, note=print)
        found = search.to_dict()
        print("SEARCH", json.dumps({key: entry for key, entry in found.items() if key != "front"}), flush=True)
        for at, tried in enumerate(found["front"]):
            if at != found["chosen"]:
                del tried["rules"]
        measure.result["search"] = found
        rules = {length: {idx: list(own) for idx, own in search.chosen.rules.items()} for length in args.lengths}
    if rules is not None:
        plan = with_span_rules(plan, {idx: [(rule.alpha, rule.beta) for rule in own] for idx, own in rules[max(args.lengths)].items()})
    swap(student, plan)
    search_seconds = time.perf_counter() - began
    if args.variant != SOURCE and not args.only_trained:
        measure(student, rules, tokens=0, seconds=round(search_seconds, 1))
    if args.tokens and not args.variant.startswith(UNIFORM):  # a window for all lengths can be trained, one for each cannot
        began = time.perf_counter()
        args.recall = recipe.data.recall
        data = cached_data(args, tokenizer, args.tokens)
        context = RunContext(
            args.cache / f"run-{args.label}-{args.variant}", seed=args.seed, device=torch.device(args.device), precision="bf16" if args.device != "cpu" else "fp32",
            checkpoint_every=10**6, progress=Log(args.variant),
        )  # fmt: skip
        adapted = add_lora(student, [row.path for row in plan.converted], recipe.stages.finetune.lora, seed=args.seed)
        stage = run_finetune(adapted, {idx: module.core for idx, _, module in converted_sites(adapted)}, data.train, recipe.stages.finetune, context)
        student = merge_lora(adapted).eval()
        measure(student, rules, tokens=stage.tokens, seconds=round(search_seconds + time.perf_counter() - began, 1), data=named(data.description))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="50, 25, uniform-50, source, infllm-..., window-1056, ...")
    parser.add_argument("--label", required=True, help="name of the model in the rows")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="training text, also for calibration")
    parser.add_argument("--long", required=True, type=Path, help="held-out long documents, .jsonl")
    parser.add_argument("--heldout", help=argparse.SUPPRESS)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cache", default=Path("/tmp/attnconvert-bench"), type=Path)
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], default=[2048, 4096, 8192])
    parser.add_argument("--sinks", type=int, default=64)
    parser.add_argument("--tokens", type=parse_token_count, default=0, help="of finetuning; 0 = none")
    parser.add_argument("--only-trained", action="store_true", help="no rows before training")
    parser.add_argument("--length", type=int, default=4096, help="tokens per training row")
    parser.add_argument("--documents", type=int, default=32, help="held-out documents at most")
    parser.add_argument("--trials", type=int, default=50, help="pass-key prompts per length")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="recipe override, as for attnconvert")
    args = parser.parse_args()
    args.eval_tokens = 10_000  # of the training text's own held-out rows, which are not used
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True
    run(args)


if __name__ == "__main__":
    main()
