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
from functools import partial
from typing import Any

import torch
from kernel_rows import REPLAYS, StepRows, arguments, took
from torch import Tensor

from attnconvert.kernels.span.decode import span_layout
from attnconvert.kernels.span.reference import BETA_ONE


def choose(B: int, G: int, share: float, device: torch.device) -> Tensor:
    """Which KV heads each row uses, bool [B, 1, G]."""
    used, shared = round(share * G), G // 2
    scores = torch.rand(B, 1, G, generator=torch.Generator().manual_seed(0))
    scores[..., :shared] = 2.0
    return torch.zeros(B, 1, G, dtype=torch.bool).scatter(-1, scores.topk(used, -1).indices, True).to(device)


class Bench(StepRows):
    """Two rows for each shape: all KV heads, and a share of them."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_heads_decode")

    def ours(self, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """A share of 1 is the step without routing."""
        layout = span_layout((0,) * G, (BETA_ONE,) * G, (1,) * G, 0, context + 10 * REPLAYS, self.device)
        return self.span_step(B, context, H, G, D, layout, choose(B, G, share, self.device) if share < 1 else None)

    def row(self, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """What a row says before it is measured."""
        used = round(share * G)
        row: dict[str, Any] = {"name": "heads.decode", "impl": "triton", "B": B, "H": H, "G": G, "D": D, "context": context, "active": used / G}
        return row | {"floor_ms": self.span_floor_ms(B, H, context * used, D)}

    def line(self, row: dict[str, Any]) -> str:
        shape = f"B={row['B']} H={row['H']} G={row['G']} context={row['context']} active={round(row['active'] * row['G'])}/{row['G']}"
        speedup = f"{row['speedup']:.2f} x all" if "speedup" in row else ""
        return f"{shape} {took(row)} {speedup} {row.get('note', '')}"

    def compare(self) -> None:
        """How much faster a share of the heads is than all of the same cell."""
        cell = ("B", "context", "H", "G", "D")
        every = {tuple(row[x] for x in cell): row["ms"] for row in self.rows if row["active"] == 1}
        for row in self.rows:
            dense = every.get(tuple(row[x] for x in cell))
            if row["active"] < 1 and row["ms"] is not None and dense is not None:
                row["speedup"] = dense / row["ms"]

    @torch.no_grad()
    def run(self) -> None:
        """All shapes, the longest context last."""
        H, D, heads = (4, 16, (2, 4)) if self.args.rehearse else (32, 128, (8, 32))
        for shape in [(B, context, H, G, D) for context in self.args.contexts for B in self.args.batch for G in heads]:
            for share in (1.0, self.args.share):
                self.guarded(self.row(*shape, share), partial(self.ours, *shape, share))


def main() -> None:
    parser = arguments(__doc__, (), budget=240.0)
    parser.add_argument("--contexts", type=lambda text: [int(x) for x in text.split(",")], default=[8192, 32768])
    parser.add_argument("--batch", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--share", type=float, default=0.75, help="of the KV heads that a row uses")
    args = parser.parse_args()
    if args.rehearse:
        args.contexts, args.batch, args.share = [300], [1, 2], 0.5
    bench = Bench(args)
    bench.run()
    bench.finish()


if __name__ == "__main__":
    main()
