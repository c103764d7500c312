"""What fewer heads cost before any training, by which heads become one, with fewer query heads too, and with uneven shares: tables of docs/results.md.

    python benchmarks/regroup_variants.py --label demo --model demo --tokens 16k --kv-heads 4,3,2 --query-heads 4/4,4/2,4/1,2/2 --out FILE
    python benchmarks/regroup_variants.py --label smollm2-135m-instruct --model DIR --text FILE --tokens 2k --kv-heads 1 --query-heads 3/3,3/1 --out FILE

The table of inits is `attnconvert regroup --compare-inits`. Figures are held-out, fp32, on the CPU; the source's loss is in every row. Kinds of rows:

- grouping: an init with neighbouring heads as groups and with those that lose least together, where the KV heads divide the query heads.
- sqa: `svd` for the KV heads, then query heads merged, written query/KV heads.
- uneven: `svd`, the shares of query heads counted on the calibration text by each rule (`even`: as equal as can be).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from linearize import meta

from attnconvert.convert.evaluate import evaluate_models
from attnconvert.convert.load import load_model, resolve
from attnconvert.distill.config import DataConfig, EvalConfig, parse_token_count
from attnconvert.distill.data import load_data
from attnconvert.surgery.regroup import GROUPINGS, check_architecture, find_freedom, installed, regroup, second_moments
from attnconvert.surgery.regroup.uneven import ALLOCATIONS, allocate, key_norms, make_uneven, measurable

INITS = ("svd", "aligned", "mean")
LENGTH = 512


def candidates(model: Any, targets: list[int], queries: list[tuple[int, int]], train: Any) -> Mapping[str, tuple[dict[str, Any], Any]]:
    """Name -> (facts of the row, new weights) of everything to be measured."""
    sites = check_architecture(model.config, [])
    freedoms = find_freedom(model, sites)
    with torch.no_grad(), second_moments(model, sites) as moments, key_norms(model, sites) as norms:
        for index in range(train.num_rows):
            batch = train.rows([index])
            model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    heads, groups = sites[0].num_heads, sites[0].num_key_value_heads
    found: dict[str, tuple[dict[str, Any], Any]] = {}

    def add(kind: str, new: Any, began: float, **facts: Any) -> None:
        row = {"kind": kind, "H": heads, "G": groups, **facts, "seconds": round(time.perf_counter() - began, 2)}
        found[" ".join(str(value) for value in (kind, *facts.values()))] = (row, new)

    for target in targets:
        for init in INITS if heads % target == 0 else ():
            for grouping in GROUPINGS if target > 1 else GROUPINGS[:1]:
                began = time.perf_counter()
                add("grouping", regroup(model, sites, moments, freedoms, target, init, grouping=grouping), began, kv_heads=target, init=init, grouping=grouping)
        for allocation in ALLOCATIONS if 1 < target < groups else ():
            began = time.perf_counter()
            shares = {idx: allocate(torch.stack(windows), heads, target, allocation) for idx, windows in norms.items()}
            new = measurable(model, sites, make_uneven(model, sites, moments, freedoms, shares, "svd"))
            add("uneven", new, began, kv_heads=target, allocation=allocation, shares=list(shares.values()))
    for num_heads, target in queries:
        began = time.perf_counter()
        add("sqa", regroup(model, sites, moments, freedoms, target, "svd", num_heads=num_heads), began, query_heads=num_heads, kv_heads=target, init="svd")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="name of the model in the rows")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default="embedded", help="calibration and held-out text, split by document")
    parser.add_argument("--tokens", type=parse_token_count, default=16_384, help="of calibration and of held-out text, each")
    parser.add_argument("--kv-heads", default="4,3,2")
    parser.add_argument("--query-heads", default="", help="pairs such as 4/2: query heads and KV heads to end with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    hidden = ("--model", "--text", "--out")
    shown = [a for i, a in enumerate(sys.argv[1:], 1) if a not in hidden and sys.argv[i - 1] not in hidden]
    loaded = load_model(resolve(args.model), dtype="fp32")
    data = load_data(
        DataConfig(source=args.text), loaded.tokenizer, length=LENGTH, num_train_tokens=args.tokens, num_eval_tokens=args.tokens, eval_length=LENGTH, seed=args.seed
    )  # fmt: skip
    queries = [(int(h), int(n)) for h, _, n in (pair.partition("/") for pair in args.query_heads.split(",") if pair)]
    made = candidates(loaded.model, [int(n) for n in args.kv_heads.split(",")], queries, data.train)
    print(f"{len(made)} to measure on {data.eval.num_rows * LENGTH:,} tokens", flush=True)
    report = evaluate_models(
        loaded.model, loaded.model, loaded.tokenizer, data.eval, EvalConfig(tokens=data.eval.num_rows * LENGTH, length=LENGTH, passkey_trials=0), device="cpu", window=None,
        ablations={name: (lambda new=new: installed(loaded.model, new)) for name, (_, new) in made.items()},
    )  # fmt: skip
    teacher = report.quality_of("teacher")
    rows = []
    for name, (facts, _) in made.items():
        quality = report.quality_of(name)
        assert quality.kl is not None
        rows.append({"name": "gqa.variants", "model": args.label, **facts, "loss": quality.nll.value, "kl": quality.kl.value, "teacher_loss": teacher.nll.value,
                     "calibration_tokens": data.train.num_rows * LENGTH, "heldout_tokens": report.num_tokens})  # fmt: skip
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "shares"}), flush=True)
    command = f"python benchmarks/regroup_variants.py --model MODEL --out FILE {shlex.join(shown)}"
    facts = meta(command) | {"device": f"CPU, {torch.get_num_threads()} threads"}
    Path(args.out).write_text(json.dumps({"meta": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
