"""Speed of attention with routed heads against itself with all units active, its floor, and dense attention, all in one run on one GPU.

    python benchmarks/bench_heads.py --out FILE [--only prefill,backward] [--rivals cudnn,fa3] [--budget 240]
    python benchmarks/bench_heads.py --out FILE --rehearse      tiny shapes on the CPU, the PyTorch operator in place of the kernels

What the figures mean:

- Random bf16 data, median of CUDA-event times with the L2 cache overwritten before every repeat.
- A unit is a KV head with its query heads. Half of the units are always active; of the others each token draws its own at random, so that neighbours have
  nothing in common: 6 of 8 units, 24 of 32. `active` is the share of units that a token uses. Finding out which tokens use a unit is part of the time;
  choosing the units, the router's work, is not.
- Rows of training have gates, and their gradients; rows of prefill have none, as with gates that are 1 where a unit is used.
- speedup: the same operator's time with all units active, by this row's time. No work but that of unused queries is saved, so it cannot be more than 1 / active.
- floor = max(FLOP of the used queries' visible pairs / gemm rate, bytes / copy bandwidth), rates measured in this run. FLOP of a pair of a query head: 4 D forward,
  10 D backward (logits are computed again). Bytes: each input and output once.
- Ours is compared with the fp32 PyTorch operator before it is timed, on the timed inputs, a unit that is always active and one that is not over the whole length.
  What is wrong is not timed.
- `cudnn` and `fa3` are dense causal attention: what a model whose heads are not routed would run.

Shapes: B batch, T tokens, H query heads, G key-value heads, D head_dim, U units.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from typing import Any

import torch
from bench_linear import Ceilings, wrong
from kernel_rows import PassRows, Shape, arguments, errors_of_heads, names, random_qkv, took
from torch import Tensor

from attnconvert.kernels.heads.api import routed_attention

ROWS = {"prefill": "moh.prefill", "backward": "moh.forward_backward"}
GOAL = 1.22  # speedup of prefill

SHAPES = tuple(Shape(1, T, 32, G) for T in (8192, 32768) for G in (8, 32))
SHARES = (1.0, 0.75)


def floor_ms(name: str, shape: Shape, share: float, ceilings: Ceilings) -> float:
    """Smallest time in ms, launches not counted."""
    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    backward = name == ROWS["backward"]
    pairs = B * H * share * T * (T + 1) / 2
    num_bytes = 2 * B * T * D * ((H * share + H + 2 * G) + backward * (2 * H * share + H + 4 * G))
    return max(pairs * D * (14 if backward else 4) / ceilings.gemm, num_bytes / ceilings.copy) * 1e3


def draw_active(shape: Shape, share: float, device: torch.device) -> Tensor:
    """Bool [B, T, U]: half of the units always, of the others a random choice of each token."""
    always, used = shape.G // 2, round(shape.G * share)
    score = torch.rand(shape.B, shape.T, shape.G - always, device=device, generator=torch.Generator(device).manual_seed(1))
    routed = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(used - always, 2).indices, True)
    return torch.cat([torch.ones(shape.B, shape.T, always, dtype=torch.bool, device=device), routed], 2)


def make_inputs(name: str, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Random q, k, v, and gate where the row is of training."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = random_qkv(shape, device, generator)
    if name == ROWS["backward"]:
        inputs["gate"] = 0.5 + torch.rand(shape.B, shape.T, shape.G, device=device, generator=generator)
    return inputs


def check(shape: Shape, inputs: dict[str, Tensor], active: Tensor, impl: Any) -> dict[str, float]:
    """Relative errors of the first and the last unit against the PyTorch operator in fp32, of gradients too where there are gates."""
    units, R = [0, shape.G - 1], shape.H // shape.G
    pick = {"q": [unit * R + r for unit in units for r in range(R)], "k": units, "v": units, "gate": units}
    ours = functools.partial(routed_attention, active=active, scale=shape.D**-0.5, impl=impl)
    exact = functools.partial(routed_attention, active=active[:, :, units], scale=shape.D**-0.5, impl="reference")
    return errors_of_heads(inputs, pick, "gate" in inputs, ours, exact)


class Bench(PassRows):
    """A row for each operator, shape and share of active units."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_heads")
        self.shapes = (Shape(1, 200, 8, 4, 16), Shape(2, 300, 4, 4, 16)) if args.rehearse else SHAPES
        self.print_ceilings()

    def row(self, name: str, impl: str, shape: Shape, share: float) -> dict[str, Any]:
        """What a row says before it is measured."""
        return {"name": name, "impl": impl, **asdict(shape), "active": share, "floor_ms": floor_ms(name, shape, share, self.ceilings)}

    def line(self, row: dict[str, Any]) -> str:
        shape = f"B={row['B']} T={row['T']:<6d} H={row['H']} G={row['G']:<2d}"
        gain = f"{row['speedup']:.3f} x faster than all active" if "speedup" in row else ""
        return f"{row['name']:22s} {row['impl']:7s} {shape} active {row['active']:.2f} {took(row)} {gain} {row.get('note', '')}"

    def compare(self) -> None:
        """Rivals' times beside ours and, with units left out, what that gains."""
        key = ("name", "B", "T", "H", "G", "D")
        ours = [row for row in self.rows if row["impl"] == "triton" and row["ms"] is not None]
        for row in ours:
            row["rivals"] = {other["impl"]: other["ms"] for other in self.rivals_of(row, key)}
            whole = [other["ms"] for other in ours if other["active"] == 1 and all(other[x] == row[x] for x in key)]
            if row["active"] < 1 and whole:
                row["speedup"] = whole[0] / row["ms"]
                if row["name"] == ROWS["prefill"]:
                    row["goal_speedup"] = GOAL

    def ours(self, name: str, shape: Shape, share: float) -> dict[str, Any]:
        inputs, active = make_inputs(name, shape, self.device), draw_active(shape, share, self.device)
        errors = check(shape, inputs, active, self.impl)
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        run = functools.partial(routed_attention, **inputs, active=active, scale=shape.D**-0.5, impl=self.impl)
        return {**self.timed(run, list(inputs.values()), name == ROWS["backward"]), "errors": errors}

    def rival(self, name: str, rival: str, shape: Shape) -> dict[str, Any]:
        inputs = random_qkv(shape, self.device, torch.Generator(self.device).manual_seed(0))
        return self.dense(rival, shape, inputs, name == ROWS["backward"])

    def run(self) -> None:
        """Ours with all units beside ours with some, then the rivals."""
        cells = [(ROWS[part], shape) for part in self.args.only for shape in self.shapes]
        for name, shape in cells:
            for share in SHARES:
                self.guarded(self.row(name, "triton", shape, share), functools.partial(self.ours, name, shape, share))
        for name, shape in cells:
            for rival in self.args.rivals:
                self.guarded(self.row(name, rival, shape, 1.0), functools.partial(self.rival, name, rival, shape))


def main() -> None:
    parser = arguments(__doc__, ("cudnn", "fa3"), budget=540.0)
    parser.add_argument("--only", type=names, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=0.2, help="repeats of one measurement")
    bench = Bench(parser.parse_args())
    bench.run()
    bench.finish()


if __name__ == "__main__":
    main()
