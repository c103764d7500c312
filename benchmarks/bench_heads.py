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
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_linear import FLUSH_BYTES, Ceilings, fa3_rival, forward_backward, measure, measure_ceilings, meta, relative_error, sdpa_rival, wrong
from torch import Tensor
from torch.nn.attention import SDPBackend

from attnconvert.kernels.heads.api import routed_attention

ROWS = {"prefill": "moh.prefill", "backward": "moh.forward_backward"}
GOAL = 1.22  # speedup of prefill


@dataclass(frozen=True)
class Shape:
    """One size of the operator."""

    B: int
    T: int
    H: int
    G: int
    D: int = 128


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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = {"q": shape.H, "k": shape.G, "v": shape.G}
    inputs = {name: torch.randn(shape.B, shape.T, heads, shape.D, device=device, dtype=dtype, generator=generator) for name, heads in sizes.items()}
    if name == ROWS["backward"]:
        inputs["gate"] = 0.5 + torch.rand(shape.B, shape.T, shape.G, device=device, generator=generator)
    return inputs


def check(shape: Shape, inputs: dict[str, Tensor], active: Tensor, impl: Any) -> dict[str, float]:
    """Relative errors of the first and the last unit against the PyTorch operator in fp32, of gradients too where there are gates."""
    units, R, gradients = [0, shape.G - 1], shape.H // shape.G, "gate" in inputs
    pick = {"q": [unit * R + r for unit in units for r in range(R)], "k": units, "v": units, "gate": units}
    small = {name: x[:, :, pick[name]].detach().float().requires_grad_(gradients) for name, x in inputs.items()}
    for x in inputs.values():
        x.requires_grad_(gradients)
    with nullcontext() if gradients else torch.no_grad():
        out = routed_attention(**inputs, active=active, scale=shape.D**-0.5, impl=impl)
        wanted = routed_attention(**small, active=active[:, :, units], scale=shape.D**-0.5, impl="reference")
    errors = {"output": relative_error(out[:, :, pick["q"]], wanted)}
    if gradients:
        upstream = torch.randn_like(out)
        ours = torch.autograd.grad(out, list(inputs.values()), upstream)
        theirs = torch.autograd.grad(wanted, list(small.values()), upstream[:, :, pick["q"]].float())
        errors |= {f"d{name}": relative_error(a[:, :, pick[name]], b) for name, a, b in zip(inputs, ours, theirs, strict=True)}
    for x in inputs.values():
        x.requires_grad_(False)
    return errors


class Bench:
    """Rows so far; written after each one."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device("cpu" if args.rehearse else "cuda")
        self.flush = None if args.rehearse else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.impl: Any = "reference" if args.rehearse else "triton"
        self.shapes = (Shape(1, 200, 8, 4, 16), Shape(2, 300, 4, 4, 16)) if args.rehearse else SHAPES
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.meta = meta()
        self.meta["command"] = self.meta["command"].replace("bench_linear", "bench_heads")
        self.ceilings = measure_ceilings(self.flush)
        self.meta["ceilings"] = {"copy_bytes_per_s": self.ceilings.copy, "gemm_flop_per_s": self.ceilings.gemm}
        print(f"copy {self.ceilings.copy / 1e12:.2f} TB/s, gemm {self.ceilings.gemm / 1e12:.0f} TFLOP/s", flush=True)

    def add(self, name: str, impl: str, shape: Shape, share: float, **values: Any) -> None:
        """Append a row, print it and write the file."""
        floor = floor_ms(name, shape, share, self.ceilings)
        self.rows.append({"name": name, "impl": impl, **asdict(shape), "active": share, "floor_ms": floor, **values})
        self.write()
        ms, speedup = values.get("ms"), self.rows[-1].get("speedup")
        took = "-" if ms is None else f"{ms:9.4f} ms {ms / floor:6.2f} x floor"
        gain = f"{speedup:.3f} x faster than all active" if speedup else ""
        print(
            f"{name:22s} {impl:7s} B={shape.B} T={shape.T:<6d} H={shape.H} G={shape.G:<2d} active {share:.2f} {took} {gain} {values.get('note', '')}",
            flush=True,
        )

    def write(self) -> None:
        """All rows; each of ours has the rivals' times beside it and, with units left out, what that gains."""
        key = ("name", "B", "T", "H", "G", "D")
        for row in self.rows:
            if row["impl"] != "triton" or row.get("ms") is None:
                continue
            same = [other for other in self.rows if other["ms"] is not None and all(other[x] == row[x] for x in key)]
            row["rivals"] = {other["impl"]: other["ms"] for other in same if other["impl"] != "triton"}
            whole = [other["ms"] for other in same if other["impl"] == "triton" and other["active"] == 1]
            if row["active"] < 1 and whole:
                row["speedup"] = whole[0] / row["ms"]
                if row["name"] == ROWS["prefill"]:
                    row["goal_speedup"] = GOAL
        if self.args.out == os.devnull:
            return
        path = Path(self.args.out)
        path.with_suffix(".tmp").write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)

    def guarded(self, name: str, impl: str, shape: Shape, share: float, work: Callable[[], dict[str, Any]]) -> None:
        """Run one measurement; whatever it raises becomes the row's note."""
        if time.monotonic() - self.began > self.args.budget:
            self.add(name, impl, shape, share, ms=None, note="not measured: the time budget was spent")
            return
        try:
            values = work()
        except Exception as error:  # a rival may refuse in any way, and its refusal is a result
            values = {"ms": None, "note": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"}
        self.add(name, impl, shape, share, **values)
        gc.collect()
        if self.flush is not None:
            torch.cuda.empty_cache()

    def timed(self, name: str, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> dict[str, Any]:
        if name == ROWS["backward"]:
            return asdict(measure(forward_backward(forward, leaves), self.flush, self.args.seconds))
        with torch.no_grad():
            return asdict(measure(forward, self.flush, self.args.seconds))

    def ours(self, name: str, shape: Shape, share: float) -> dict[str, Any]:
        inputs, active = make_inputs(name, shape, self.device), draw_active(shape, share, self.device)
        errors = check(shape, inputs, active, self.impl)
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        run = functools.partial(routed_attention, **inputs, active=active, scale=shape.D**-0.5, impl=self.impl)
        return {**self.timed(name, run, list(inputs.values())), "errors": errors}

    def dense(self, name: str, rival: str, shape: Shape) -> dict[str, Any]:
        inputs = {x: t for x, t in make_inputs(name, shape, self.device).items() if x != "gate"}
        if rival == "fa3":
            forward, leaves, note = fa3_rival(shape, inputs)  # type: ignore[arg-type]
        else:
            forward, leaves, note = sdpa_rival(SDPBackend.MATH if self.args.rehearse else SDPBackend.CUDNN_ATTENTION, shape, inputs)  # type: ignore[arg-type]
        return {**self.timed(name, forward, leaves), "note": f"dense causal; {note}" if note else "dense causal"}

    def run(self) -> None:
        """Ours with all units beside ours with some, then the rivals."""
        cells = [(ROWS[part], shape) for part in self.args.only for shape in self.shapes]
        for name, shape in cells:
            for share in SHARES:
                self.guarded(name, "triton", shape, share, functools.partial(self.ours, name, shape, share))
        for name, shape in cells:
            for rival in self.args.rivals:
                self.guarded(name, rival, shape, 1.0, functools.partial(self.dense, name, rival, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return [x for x in text.split(",") if x]

    parser.add_argument("--out", required=True)
    parser.add_argument("--only", type=names, default=list(ROWS))
    parser.add_argument("--rivals", type=names, default=["cudnn", "fa3"], help="empty = none")
    parser.add_argument("--seconds", type=float, default=0.2, help="repeats of one measurement")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which what is left gets a row without a figure")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    bench = Bench(args)
    bench.run()
    bench.write()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
