"""One decode step in which each row uses some of the KV heads (MoH), against the same step with all of them, all in one run on one GPU.

    python benchmarks/bench_heads_decode.py --out FILE [--contexts 8192,32768] [--batch 1,8,64] [--share 0.75] [--budget 240]
    python benchmarks/bench_heads_decode.py --out FILE --rehearse      tiny shapes on the CPU, PyTorch in place of the kernels

What the figures mean:

- Random bf16 data; a CUDA graph of steps over caches that together exceed the L2 cache; mean time of a step. Every head's cache holds the whole context.
- Half of the KV heads are used by every row; of the others each row draws its own. The router's work is not part of the step. `all` is the step without routing.
- floor = bytes / copy bandwidth, the bandwidth measured in this run. Bytes: every key and value of the heads that are used, queries and outputs once.
- Ours is compared with the PyTorch step in fp32 on the same cache before it is timed; one that is wrong is not timed.

Shapes: B batch, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_linear import FLUSH_BYTES, Ceilings, measure_ceilings, measure_steps, meta, relative_error, wrong
from torch import Tensor

from attnconvert.kernels.span.decode import SpanState, span_attention_step, span_layout
from attnconvert.kernels.span.reference import BETA_ONE

L2_BYTES = 2**27  # more than twice an H100's
MAX_COPIES = 64  # steps in one graph
REPLAYS = 20


def choose(B: int, G: int, share: float, device: torch.device) -> Tensor:
    """Which KV heads each row uses, bool [B, 1, G]."""
    used, shared = round(share * G), G // 2
    scores = torch.rand(B, 1, G, generator=torch.Generator().manual_seed(0))
    scores[..., :shared] = 2.0
    return torch.zeros(B, 1, G, dtype=torch.bool).scatter(-1, scores.topk(used, -1).indices, True).to(device)


def measured(args: argparse.Namespace, B: int, H: int, G: int, D: int, context: int, share: float) -> dict[str, Any]:
    """Time of a step of one shape and share of the KV heads; 1 = no routing."""
    device, dtype = torch.device("cpu" if args.rehearse else "cuda"), torch.float32 if args.rehearse else torch.bfloat16
    layout = span_layout((0,) * G, (BETA_ONE,) * G, (1,) * G, 0, context + 10 * REPLAYS, device)
    normal = partial(torch.randn, device=device, dtype=dtype)

    def state() -> SpanState:
        return SpanState(normal(B, layout.num_slots, D), normal(B, layout.num_slots, D), torch.full((B,), context - 1, dtype=torch.int64, device=device))

    q, k, v = normal(B, 1, H, D), normal(B, 1, G, D), normal(B, 1, G, D)
    active = choose(B, G, share, device) if share < 1 else None
    step = partial(span_attention_step, q, k, v, layout=layout, scale=D**-0.5, active=active, impl="reference" if args.rehearse else "triton")
    one = state()
    exact = SpanState(one.k[:1].float(), one.v[:1].float(), one.length[:1].clone())
    few = None if active is None else active[:1]
    wanted = span_attention_step(*(x[:1].float() for x in (q, k, v)), state=exact, layout=layout, scale=D**-0.5, active=few, impl="reference")
    errors = {"output": relative_error(step(state=one)[:1], wanted)}
    note = wrong(errors)
    if note is not None:
        return {"ms": None, "note": note, "errors": errors}
    del exact, wanted
    cache_bytes = one.k.nbytes + one.v.nbytes
    copies = 2 if args.rehearse else max(1, min(MAX_COPIES, -(-L2_BYTES // cache_bytes)))
    states = [one, *(state() for _ in range(copies - 1))]
    return {"ms": measure_steps([partial(step, state=s) for s in states], REPLAYS), "errors": errors, "copies": copies, "cache_bytes": cache_bytes}


def run(args: argparse.Namespace, rows: list[dict[str, Any]], ceilings: Ceilings, save: Any) -> None:
    """All shapes, the longest context last."""
    began, (H, D) = time.monotonic(), (4, 16) if args.rehearse else (32, 128)
    for context in args.contexts:
        for B in args.batch:
            for G in (H // 4 if not args.rehearse else 2, H):
                dense = None
                for share in (1.0, args.share):
                    used = round(share * G)
                    floor = B * (2 * context * used + 2 * H) * D * 2 / ceilings.copy * 1e3
                    row: dict[str, Any] = {"name": "heads.decode", "B": B, "H": H, "G": G, "D": D, "context": context, "active": used / G, "floor_ms": floor}
                    if time.monotonic() - began > args.budget:
                        values: dict[str, Any] = {"ms": None, "note": "not measured: the time budget was spent"}
                    else:
                        with torch.no_grad():
                            values = measured(args, B, H, G, D, context, share)
                    row |= values
                    dense = row["ms"] if share == 1 else dense
                    if share < 1 and dense and row["ms"]:
                        row["speedup"] = dense / row["ms"]
                    rows.append(row)
                    save()
                    took = "-" if row["ms"] is None else f"{row['ms']:9.4f} ms {row['ms'] / floor:6.2f} x floor"
                    print(f"B={B} H={H} G={G} context={context} active={used}/{G} {took} {row.get('speedup', '')} {row.get('note', '')}", flush=True)
                    gc.collect()
                    if not args.rehearse:
                        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--contexts", type=lambda text: [int(x) for x in text.split(",")], default=[8192, 32768])
    parser.add_argument("--batch", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--share", type=float, default=0.75, help="of the KV heads that a row uses")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which what is left gets a row without a figure")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if args.rehearse:
        args.contexts, args.batch, args.share = [300], [1, 2], 0.5
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(None if args.rehearse else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda"))
    shown = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--out" and sys.argv[i - 1] != "--out"]
    facts = {**meta(), "command": " ".join(["python benchmarks/bench_heads_decode.py --out FILE", shlex.join(shown)]).strip()}
    result: dict[str, Any] = {"meta": {**facts, "ceilings": {"copy_bytes_per_s": ceilings.copy}}, "rows": []}

    def save() -> None:
        if args.out != os.devnull:
            path = Path(args.out)
            path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
            os.replace(path.with_suffix(".tmp"), path)

    run(args, result["rows"], ceilings, save)


if __name__ == "__main__":
    main()
