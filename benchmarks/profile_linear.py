"""Where the time of the linear-attention kernels goes, kernel by kernel, on one GPU.

    python benchmarks/profile_linear.py --out benchmarks/results/linear_profile_h100.json

ms is the median over whole calls (triton.testing.do_bench), kernel_us the mean device time per kernel of three profiled calls; a ms far above the sum is
the host, which cannot launch fast enough. bf16, random data, block window of 64, 4 sinks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnconvert.kernels.linear.api import linear_attention

# B, T, H, G, D, features per half, gates
SHAPES = ((1, 8192, 32, 32, 128, 64, False), (1, 8192, 32, 8, 128, 64, False), (1, 8192, 32, 8, 128, 128, True), (16, 1024, 9, 3, 64, 64, True))
CALLS = 3


def inputs(B: int, T: int, H: int, G: int, D: int, F: int, gates: bool) -> dict[str, Tensor]:
    x = {name: torch.randn(B, T, heads, D, device="cuda", dtype=torch.bfloat16) for name, heads in (("q", H), ("k", G), ("v", G))}
    x["linear_log_weight"] = torch.randn(H, 1, device="cuda")
    for side, heads in (("query", H), ("key", G)):
        x[f"{side}_map"] = torch.eye(D, F, device="cuda") + 0.05 * torch.randn(heads, D, F, device="cuda")
        if gates:
            x[f"{side}_gate"] = torch.cat([0.2 * torch.randn(heads, D, device="cuda"), torch.full((heads, 1), 0.3, device="cuda")], 1)
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def kernel_us(call: Callable[[], Any]) -> dict[str, int]:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        name = event.key.removesuffix("_kernel") if event.key.endswith("_kernel") else "reductions" if "reduce" in event.key else "other"
        times[name] = times.get(name, 0.0) + event.device_time_total / CALLS
    return {name: round(us) for name, us in times.items() if us >= 1}


def main() -> None:
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    rows = []
    for shape in SHAPES:
        B, T, H, G, D, F, gates = shape
        x = inputs(*shape)
        grad = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)

        def forward(x: dict[str, Tensor] = x, D: int = D) -> Tensor:
            return linear_attention(**x, window_size=64, window_kind="block", num_sinks=4, scale=D**-0.5, impl="triton").output

        def inference(forward: Callable[[], Tensor] = forward) -> Tensor:
            with torch.no_grad():
                return forward()

        def both(forward: Callable[[], Tensor] = forward, x: dict[str, Tensor] = x, grad: Tensor = grad) -> Any:
            return torch.autograd.grad(forward(), list(x.values()), grad)

        for name, call in (("forward", inference), ("forward_backward", both)):
            row = {
                "name": f"linear.{name}",
                "form": f"absolute, {'gates' if gates else 'no gates'}",
                "B": B,
                "T": T,
                "H": H,
                "G": G,
                "D": D,
                "features_per_half": F,
            }
            rows.append(row | {"ms": round(do_bench(call, return_mode="median"), 3), "kernel_us": kernel_us(call)})
            print(rows[-1], flush=True)
    meta = {
        "command": shlex.join(["python", "benchmarks/profile_linear.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
    }
    args.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
