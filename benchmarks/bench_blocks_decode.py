"""One decode step of block-sparse attention (InfLLM-V2) against dense attention over a full static cache, all in one run on one GPU.

    python benchmarks/bench_blocks_decode.py --out FILE [--shapes 1x32768,1x131072,8x32768] [--rivals flash,cudnn,fa3] [--budget 240]
    python benchmarks/bench_blocks_decode.py --out FILE --rehearse      tiny shapes on the CPU, PyTorch in place of the kernels

What the figures mean:

- Random bf16 data; a CUDA graph of steps over caches of which the steps together read more than the L2 cache holds; mean time of a step, the choice of blocks
  and the compressed keys that get whole included. Ours writes the step's key and value into the cache, the rivals only read.
- 96 blocks of 64 (1 first, 33 local, 62 chosen); the context is as long for everybody.
- floor = bytes / copy bandwidth, the bandwidth measured in this run. Bytes: every compressed key and every visible key and value, queries and outputs once. A
  rival's floor is that of a dense step.
- Ours is compared with the PyTorch step in fp32 on the same cache before it is timed; one that is wrong is not timed.
- Rivals hand SDPA the query heads of a KV head as rows of one head, its fastest form; `fa3` takes grouped heads as they are.

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_linear import FLUSH_BYTES, Ceilings, fa3_function, measure_ceilings, measure_steps, meta, relative_error, wrong
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnconvert.kernels.blocks.decode import BlockState, block_sparse_step, fill
from attnconvert.kernels.blocks.rule import BlockRule, capacity_for, num_windows

L2_BYTES = 2**27  # more than twice an H100's
MAX_COPIES = 64  # steps in one graph
REPLAYS = 20
RIVALS = ("flash", "cudnn", "fa3")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Bench:
    """Rows so far; written after each one."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cpu" if args.rehearse else "cuda")
        self.dtype = torch.float32 if args.rehearse else torch.bfloat16
        self.rule = BlockRule(32, 1, 1, 4, 0) if args.rehearse else BlockRule()
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        flush = None if args.rehearse else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.ceilings: Ceilings = measure_ceilings(flush)
        shown = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--out" and sys.argv[i - 1] != "--out"]
        self.meta = {**meta(), "command": " ".join(["python benchmarks/bench_blocks_decode.py --out FILE", shlex.join(shown)]).strip()}
        self.meta["ceilings"] = {"copy_bytes_per_s": self.ceilings.copy}

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def sparse_bytes(self, B: int, context: int, H: int, G: int, D: int) -> int:
        """What a step has to read and write."""
        rule = self.rule
        keys = 2 * ((rule.num_blocks - 1) * rule.block_size + (context - 1) % rule.block_size + 1)
        means = num_windows(context, rule.kernel, rule.stride) + num_windows(context, rule.kernel * rule.coarser, rule.stride * rule.coarser)
        return B * (G * (keys + means) + 2 * H) * D * self.dtype.itemsize

    def dense_bytes(self, B: int, context: int, H: int, G: int, D: int) -> int:
        return B * (2 * G * context + 2 * H) * D * self.dtype.itemsize

    def copies(self, num_bytes: int) -> int:
        return 2 if self.args.rehearse else max(1, min(MAX_COPIES, -(-L2_BYTES // num_bytes)))

    def ours(self, B: int, context: int, H: int, G: int, D: int) -> dict[str, Any]:
        capacity = capacity_for(context + 16 + REPLAYS)  # each warm-up and replay is a further token

        def state() -> BlockState:
            return fill(self.normal(B, context - 1, G, D), self.normal(B, context - 1, G, D), self.rule, capacity)

        q, k, v = self.normal(B, 1, H, D), self.normal(B, 1, G, D), self.normal(B, 1, G, D)
        step = partial(block_sparse_step, q, k, v, rule=self.rule, scale=D**-0.5, impl="reference" if self.args.rehearse else "triton")
        one = state()
        exact = BlockState(*(x[:1].float() for x in one[:4]), one.length[:1].clone())
        wanted = block_sparse_step(*(x[:1].float() for x in (q, k, v)), state=exact, rule=self.rule, scale=D**-0.5, impl="reference")
        del exact
        errors = {"output": relative_error(step(state=one)[:1], wanted)}
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        states = [one, *(state() for _ in range(self.copies(self.sparse_bytes(B, context, H, G, D)) - 1))]
        return {
            "ms": measure_steps([partial(step, state=s) for s in states], REPLAYS),
            "errors": errors,
            "copies": len(states),
            "cache_bytes": sum(x.nbytes for x in one),
        }

    def rival(self, name: str, B: int, context: int, H: int, G: int, D: int) -> dict[str, Any]:
        size = (B, context, G, D) if name == "fa3" else (B, G, context, D)
        num_bytes = 2 * B * G * context * D * self.dtype.itemsize
        caches = [(self.normal(*size), self.normal(*size)) for _ in range(self.copies(num_bytes))]
        if name == "fa3":
            function = fa3_function("flash_attn_with_kvcache")
            if function is None:
                raise RuntimeError("FlashAttention-3 is not installed")
            q = self.normal(B, 1, H, D)
            lengths = torch.full((B,), context, dtype=torch.int32, device=self.device)
            steps: list[Callable[[], Any]] = [partial(function, q, k, v, cache_seqlens=lengths, causal=True) for k, v in caches]
        else:
            q = self.normal(B, G, H // G, D)

            def attend(k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH if self.args.rehearse else BACKENDS[name]):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            steps = [partial(attend, k, v) for k, v in caches]
        return {"ms": measure_steps(steps, REPLAYS), "copies": len(caches), "cache_bytes": num_bytes}

    def guarded(self, impl: str, shape: tuple[int, int, int, int, int], work: Callable[[], dict[str, Any]]) -> None:
        """Run one measurement and write its row; whatever it raises becomes the row's note."""
        B, context, H, G, D = shape
        row: dict[str, Any] = {"name": "infllm.decode", "impl": impl, "B": B, "T": 1, "H": H, "G": G, "D": D, "context": context}
        row |= {"rule": self.rule._asdict()} if impl == "triton" else {}
        row["floor_ms"] = (self.sparse_bytes(*shape) if impl == "triton" else self.dense_bytes(*shape)) / self.ceilings.copy * 1e3
        if time.monotonic() - self.began > self.args.budget:
            values: dict[str, Any] = {"ms": None, "note": "not measured: the time budget was spent"}
        else:
            try:
                with torch.no_grad():
                    values = work()
            except Exception as error:  # a rival may refuse in any way, and its refusal is a result
                values = {"ms": None, "note": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"}
        self.rows.append({**row, **values})
        self.write()
        took = "-" if values["ms"] is None else f"{values['ms']:9.4f} ms {values['ms'] / row['floor_ms']:6.2f} x floor"
        print(f"{impl:8s} B={B} context={context} H={H} G={G} D={D} {took} {values.get('note', '')}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        for row in self.rows:
            same = [r for r in self.rows if all(r[x] == row[x] for x in ("B", "context", "H", "G", "D"))]
            rivals = [r for r in same if r["impl"] != "triton" and r["ms"] is not None]
            if row["impl"] == "triton" and row["ms"] is not None and rivals:
                best = min(rivals, key=lambda r: r["ms"])
                row |= {"best_rival": best["impl"], "best_rival_ms": best["ms"], "speedup": best["ms"] / row["ms"]}
        if self.args.out != os.devnull:
            path = Path(self.args.out)
            path.with_suffix(".tmp").write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
            os.replace(path.with_suffix(".tmp"), path)

    def run(self) -> None:
        H, D, heads = (4, 16, (2,)) if self.args.rehearse else (32, 128, (2, 8))
        shapes = [(B, context, H, G, D) for B, context in self.args.shapes for G in heads]
        for shape in shapes:
            self.guarded("triton", shape, partial(self.ours, *shape))
        for shape in shapes:
            for name in self.args.rivals:
                self.guarded(name, shape, partial(self.rival, name, *shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--shapes",
        type=lambda text: [tuple(int(x) for x in shape.split("x")) for shape in text.split(",")],
        default=[(1, 32768), (1, 131072), (8, 32768)],
        help="batch x context",
    )
    parser.add_argument("--rivals", type=lambda text: [x for x in text.split(",") if x], default=list(RIVALS), help=f"of {', '.join(RIVALS)}; empty = none")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which what is left gets a row without a figure")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if args.rehearse:
        args.shapes = [(1, 300), (2, 200)]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.run()
    bench.write()
    for row in bench.rows:
        if "speedup" in row:
            print(f"B={row['B']} context={row['context']} G={row['G']}: {row['speedup']:.2f} x {row['best_rival']}")
    print(f"{time.monotonic() - bench.began:.0f} s")


if __name__ == "__main__":
    main()
