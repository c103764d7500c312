"""One decode step of attention spans (MoA) against dense attention over a full static cache, all in one run on one GPU.

    python benchmarks/bench_span_decode.py --out FILE [--context 32768] [--batch 1,8,64] [--rivals flash,cudnn,fa3] [--budget 240]
    python benchmarks/bench_span_decode.py --out FILE --rehearse      tiny shapes on the CPU, PyTorch in place of the kernels

What the figures mean:

- Random bf16 data; a CUDA graph of steps over caches that together exceed the L2 cache; mean time of a step. Ours writes the step's key and value into
  the cache, the rivals only read.
- Windows of 512 to 4096 tokens, a quarter of the KV heads each, and 64 sinks; the context is `context` tokens for everybody.
- floor = bytes / copy bandwidth, the bandwidth measured in this run. Bytes: every visible key and value, queries and outputs once. A rival's floor is that of
  a dense step.
- Ours is compared with the PyTorch step in fp32 on the same cache before it is timed; one that is wrong is not timed.
- Rivals hand SDPA the query heads of a KV head as rows of one head, its fastest form; `fa3` takes grouped heads as they are.

Shapes: B batch, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from kernel_rows import REPLAYS, STEP_RIVALS, StepRows, arguments, took

from attnconvert.kernels.span.decode import SpanLayout, span_layout
from attnconvert.kernels.span.slots import visible_keys

NUM_SINKS = 64
WINDOWS = (512, 1024, 2048, 4096)


class Bench(StepRows):
    """A row for each shape."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_span_decode")
        self.windows = (5, 70) if args.rehearse else WINDOWS

    def layout(self, G: int) -> SpanLayout:
        """The windows in turn; room for the steps of all replays, which fixed windows do not grow for."""
        alphas = tuple(self.windows[head * len(self.windows) // G] for head in range(G))
        return span_layout(alphas, (0,) * G, (1,) * G, NUM_SINKS, self.args.context + 10 * REPLAYS, self.device)

    def ours(self, B: int, H: int, G: int, D: int) -> dict[str, Any]:
        return self.span_step(B, self.args.context, H, G, D, self.layout(G))

    def rival(self, name: str, B: int, H: int, G: int, D: int) -> dict[str, Any]:
        return {**self.dense_step(name, B, self.args.context, H, G, D), "note": f"softmax over {self.args.context} tokens"}

    def row(self, impl: str, B: int, H: int, G: int, D: int) -> dict[str, Any]:
        """What a row says before it is measured."""
        layout, context = self.layout(G), self.args.context
        seen = sum(visible_keys(context - 1, alpha, 0, NUM_SINKS) for alpha in layout.alphas) if impl == "triton" else context * G
        row: dict[str, Any] = {"name": "span.decode", "impl": impl, "B": B, "T": 1, "H": H, "G": G, "D": D, "context": context}
        row |= {"windows": list(layout.alphas), "num_sinks": NUM_SINKS} if impl == "triton" else {}
        return row | {"floor_ms": self.span_floor_ms(B, H, seen, D)}

    def line(self, row: dict[str, Any]) -> str:
        return f"{row['impl']:8s} B={row['B']} H={row['H']} G={row['G']} D={row['D']} {took(row)} {row.get('note', '')}"

    @torch.no_grad()
    def run(self) -> None:
        H, D = (4, 16) if self.args.rehearse else (32, 128)
        shapes = [(B, H, G, D) for B in self.args.batch for G in (H // 4, H)]
        for shape in shapes:
            self.guarded(self.row("triton", *shape), partial(self.ours, *shape))
        for shape in shapes:
            for name in self.args.rivals:
                self.guarded(self.row(name, *shape), partial(self.rival, name, *shape))


def main() -> None:
    parser = arguments(__doc__, STEP_RIVALS, budget=240.0)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 64])
    args = parser.parse_args()
    if args.rehearse:
        args.context, args.batch = 300, [1, 2]
    bench = Bench(args)
    bench.run()
    for row in bench.rows:
        if "speedup" in row:
            print(f"B={row['B']} G={row['G']}: {row['speedup']:.2f} x {row['best_rival']}")
    bench.finish()


if __name__ == "__main__":
    main()
