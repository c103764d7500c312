"""One decode step in which each row uses some of the KV heads (MoH), against the same step with all of them, all in one run on one GPU.

    python benchmarks/bench_heads_decode.py --out FILE [--only step,route,output,layer] [--contexts 8192,32768] [--batch 1,8,64] [--share 0.75] [--budget 240]
    python benchmarks/bench_heads_decode.py --out FILE --rehearse      tiny shapes on the CPU, PyTorch in place of the kernels

What the figures mean:

- Random bf16 data; a CUDA graph of steps over caches that together exceed the L2 cache; mean time of a step. Every head's cache holds the whole context.
- Half of the KV heads are used by every row; of the others each row draws its own. `all` is the step without routing.
- heads.decode is the attention alone. heads.route is the choice by the norms of queries, beside the same in PyTorch. heads.output is the output projection, a square
  bf16 map, which skips weights for zeros where that is done; `all` is `nn.Linear`. heads.layer is the choice, the attention and the projection together.
- floor = bytes / copy bandwidth, the bandwidth measured in this run. Bytes: every key and value of the heads that are used, queries and outputs once.
- Ours is compared with the PyTorch step in fp32 on the same cache before it is timed; one that is wrong is not timed.

Shapes: B batch, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import torch
from bench_linear import measure_steps, relative_error, wrong
from kernel_rows import REPLAYS, StepRows, arguments, names, took
from torch import Tensor, nn

from attnconvert.kernels.heads.projection import SkippingLinear
from attnconvert.kernels.heads.routing import route_queries
from attnconvert.kernels.span.decode import SpanLayout, SpanState, span_attention_step, span_layout
from attnconvert.kernels.span.reference import BETA_ONE

PARTS = {part: f"heads.{name}" for part, name in (("step", "decode"), ("route", "route"), ("output", "output"), ("layer", "layer"))}


def choose(B: int, G: int, share: float, device: torch.device) -> Tensor:
    """Which KV heads each row uses, bool [B, 1, G]."""
    used, shared = round(share * G), G // 2
    scores = torch.rand(B, 1, G, generator=torch.Generator().manual_seed(0))
    scores[..., :shared] = 2.0
    return torch.zeros(B, 1, G, dtype=torch.bool).scatter(-1, scores.topk(used, -1).indices, True).to(device)


class Bench(StepRows):
    """Two rows for each part and shape, all KV heads and a share of them, and one for the choice."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_heads_decode")

    def layout(self, G: int, context: int) -> SpanLayout:
        return span_layout((0,) * G, (BETA_ONE,) * G, (1,) * G, 0, context + 10 * REPLAYS, self.device)

    def columns(self, G: int) -> Tensor:
        """The first half of the KV heads are shared; see `kernels.heads.routing`."""
        return torch.arange(G, device=self.device) - G // 2

    def linears(self, width: int, linear: type[nn.Linear]) -> list[nn.Linear]:
        """Square maps whose weights together exceed the L2 cache."""
        made = [linear(width, width, bias=False, device=self.device, dtype=self.dtype) for _ in range(self.copies(width * width * self.dtype.itemsize))]
        return [one.requires_grad_(False) for one in made]

    def step(self, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """A share of 1 is the step without routing."""
        return self.span_step(B, context, H, G, D, self.layout(G, context), choose(B, G, share, self.device) if share < 1 else None)

    def route(self, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """The choice by the norms of queries, and what it takes in PyTorch."""
        queries = [self.normal(B, 1, H, D) for _ in range(8)]
        columns, num_chosen = self.columns(G), round(share * G) - G // 2
        same = [torch.equal(*(route_queries(q, columns, num_chosen, impl=impl) for impl in (self.impl, "reference"))) for q in queries]
        if not all(same):  # random norms are never so close that rounding decides
            return {"ms": None, "note": f"{same.count(False)} of {len(same)} choices differ from PyTorch's"}
        times = [measure_steps([partial(route_queries, q, columns, num_chosen, impl=impl) for q in queries], REPLAYS) for impl in (self.impl, "reference")]
        return {"ms": times[0], "torch_ms": times[1], "speedup": times[1] / times[0]}

    def output(self, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """The output projection of heads' outputs that are zero where a KV head is not used; a share of 1 is `nn.Linear`."""
        used = choose(B, G, share, self.device).repeat_interleave(H // G, 2)
        x = (self.normal(B, 1, H, D) * used[..., None]).flatten(2)
        maps = self.linears(H * D, SkippingLinear if share < 1 else nn.Linear)
        errors = {"output": relative_error(maps[0](x), nn.functional.linear(x.float(), maps[0].weight.float()))}
        note = wrong(errors)
        return {"ms": None if note else measure_steps([partial(one, x) for one in maps], REPLAYS), "errors": errors, "note": note or ""}

    def layer(self, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """The choice, the step and the output projection together; a share of 1 is the step without routing and `nn.Linear`."""
        layout, columns, num_chosen = self.layout(G, context), self.columns(G), round(share * G) - G // 2
        q, k, v = self.normal(B, 1, H, D), self.normal(B, 1, G, D), self.normal(B, 1, G, D)
        maps = self.linears(H * D, SkippingLinear if share < 1 else nn.Linear)

        def step(state: SpanState, project: nn.Linear) -> Tensor:
            active = route_queries(q, columns, num_chosen, impl=self.impl) if share < 1 else None
            out = span_attention_step(q, k, v, state, layout, scale=D**-0.5, active=active, impl=self.impl)
            return project(out.flatten(2))

        def state() -> SpanState:
            length = torch.full((B,), context - 1, dtype=torch.int64, device=self.device)
            return SpanState(self.normal(B, layout.num_slots, D), self.normal(B, layout.num_slots, D), length)

        one = state()
        active = route_queries(q[:1], columns, num_chosen, impl="reference") if share < 1 else None
        exact = SpanState(one.k[:1].float(), one.v[:1].float(), one.length[:1].clone())
        wanted = span_attention_step(*(x[:1].float() for x in (q, k, v)), state=exact, layout=layout, scale=D**-0.5, active=active, impl="reference")
        del exact
        errors = {"output": relative_error(step(one, maps[0])[:1], nn.functional.linear(wanted.flatten(2), maps[0].weight.float()))}
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        states = [one, *(state() for _ in range(self.copies(one.k.nbytes + one.v.nbytes) - 1))]
        pairs = [(states[at % len(states)], maps[at % len(maps)]) for at in range(max(len(states), len(maps)))]
        return {"ms": measure_steps([partial(step, *pair) for pair in pairs], REPLAYS), "errors": errors, "copies": len(states)}

    def floor_ms(self, part: str, B: int, context: int, H: int, G: int, D: int, used: int) -> float:
        """Of the projection's weights, those that a row uses at least."""
        size = self.dtype.itemsize / self.ceilings.copy * 1e3
        weights = (H * D) * (H * D * used // G) * size
        step = self.span_floor_ms(B, H, context * used, D)
        return {"step": step, "route": B * H * D * size, "output": weights, "layer": step + weights}[part]

    def row(self, part: str, B: int, context: int, H: int, G: int, D: int, share: float) -> dict[str, Any]:
        """What a row says before it is measured."""
        used = round(share * G)
        row: dict[str, Any] = {"name": PARTS[part], "impl": "triton", "B": B, "H": H, "G": G, "D": D, "context": context, "active": used / G}
        return row | {"floor_ms": self.floor_ms(part, B, context, H, G, D, used)}

    def line(self, row: dict[str, Any]) -> str:
        shape = f"{row['name']:13s} B={row['B']} H={row['H']} G={row['G']} context={row['context']} active={round(row['active'] * row['G'])}/{row['G']}"
        speedup = f"{row['speedup']:.2f} x {'PyTorch' if 'torch_ms' in row else 'all'}" if "speedup" in row else ""
        return f"{shape} {took(row)} {speedup} {row.get('note', '')}"

    def compare(self) -> None:
        """How much faster a share of the heads is than all of the same cell."""
        cell = ("name", "B", "context", "H", "G", "D")
        every = {tuple(row[x] for x in cell): row["ms"] for row in self.rows if row["active"] == 1}
        for row in self.rows:
            dense = every.get(tuple(row[x] for x in cell))
            if row["active"] < 1 and row["ms"] is not None and dense is not None:
                row["speedup"] = dense / row["ms"]

    @torch.no_grad()
    def run(self) -> None:
        """All shapes, the longest context last; what does not depend on it once."""
        H, D, heads = (4, 16, (2, 4)) if self.args.rehearse else (32, 128, (8, 32))
        for part in self.args.only:
            fixed = part in ("route", "output")
            for context, B, G in itertools.product([0] if fixed else self.args.contexts, self.args.batch, heads):
                for share in (self.args.share,) if part == "route" else (1.0, self.args.share):
                    self.guarded(self.row(part, B, context, H, G, D, share), partial(getattr(self, part), B, context, H, G, D, share))


def main() -> None:
    parser = arguments(__doc__, (), budget=240.0)
    parser.add_argument("--only", type=names, default=list(PARTS))
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
