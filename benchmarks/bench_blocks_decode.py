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
from functools import partial
from typing import Any

import torch
from bench_linear import measure_steps, relative_error, wrong
from kernel_rows import REPLAYS, STEP_RIVALS, StepRows, arguments, took

from attnconvert.kernels.blocks.decode import BlockState, block_sparse_step, fill
from attnconvert.kernels.blocks.rule import BlockRule, capacity_for, num_windows


class Bench(StepRows):
    """A row for each shape."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_blocks_decode")
        self.rule = BlockRule(32, 1, 1, 4, 0) if args.rehearse else BlockRule()

    def sparse_bytes(self, B: int, context: int, H: int, G: int, D: int) -> int:
        """What a step has to read and write."""
        rule = self.rule
        keys = 2 * ((rule.num_blocks - 1) * rule.block_size + (context - 1) % rule.block_size + 1)
        means = num_windows(context, rule.kernel, rule.stride) + num_windows(context, rule.kernel * rule.coarser, rule.stride * rule.coarser)
        return B * (G * (keys + means) + 2 * H) * D * self.dtype.itemsize

    def dense_bytes(self, B: int, context: int, H: int, G: int, D: int) -> int:
        return B * (2 * G * context + 2 * H) * D * self.dtype.itemsize

    def ours(self, B: int, context: int, H: int, G: int, D: int) -> dict[str, Any]:
        capacity = capacity_for(context + 16 + REPLAYS)  # each warm-up and replay is a further token

        def state() -> BlockState:
            return fill(self.normal(B, context - 1, G, D), self.normal(B, context - 1, G, D), self.rule, capacity)

        q, k, v = self.normal(B, 1, H, D), self.normal(B, 1, G, D), self.normal(B, 1, G, D)
        step = partial(block_sparse_step, q, k, v, rule=self.rule, scale=D**-0.5, impl=self.impl)
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

    def row(self, impl: str, B: int, context: int, H: int, G: int, D: int) -> dict[str, Any]:
        """What a row says before it is measured."""
        row: dict[str, Any] = {"name": "infllm.decode", "impl": impl, "B": B, "T": 1, "H": H, "G": G, "D": D, "context": context}
        row |= {"rule": self.rule._asdict()} if impl == "triton" else {}
        num_bytes = self.sparse_bytes(B, context, H, G, D) if impl == "triton" else self.dense_bytes(B, context, H, G, D)
        return row | {"floor_ms": num_bytes / self.ceilings.copy * 1e3}

    def line(self, row: dict[str, Any]) -> str:
        return f"{row['impl']:8s} B={row['B']} context={row['context']} H={row['H']} G={row['G']} D={row['D']} {took(row)} {row.get('note', '')}"

    @torch.no_grad()
    def run(self) -> None:
        H, D, heads = (4, 16, (2,)) if self.args.rehearse else (32, 128, (2, 8))
        shapes = [(B, context, H, G, D) for B, context in self.args.shapes for G in heads]
        for shape in shapes:
            self.guarded(self.row("triton", *shape), partial(self.ours, *shape))
        for shape in shapes:
            for name in self.args.rivals:
                self.guarded(self.row(name, *shape), partial(self.dense_step, name, *shape))


def main() -> None:
    parser = arguments(__doc__, STEP_RIVALS, budget=240.0)
    parser.add_argument(
        "--shapes",
        type=lambda text: [tuple(int(x) for x in shape.split("x")) for shape in text.split(",")],
        default=[(1, 32768), (1, 131072), (8, 32768)],
        help="batch x context",
    )
    args = parser.parse_args()
    if args.rehearse:
        args.shapes = [(1, 300), (2, 200)]
    bench = Bench(args)
    bench.run()
    for row in bench.rows:
        if "speedup" in row:
            print(f"B={row['B']} context={row['context']} G={row['G']}: {row['speedup']:.2f} x {row['best_rival']}")
    bench.finish()


if __name__ == "__main__":
    main()
