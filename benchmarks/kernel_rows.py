"""What the benchmarks of attention kernels share: rows that are written as they come, one measurement of many that may fail, and the dense rivals.

A benchmark derives `Bench` from `PassRows` (whole sequences) or `StepRows` (decode steps). It says which cells there are, what a row contains before it is
measured, how a row is printed and what rows of one cell say of each other; ours are the rows whose `impl` is `triton`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_linear import (
    FLUSH_BYTES,
    fa3_function,
    fa3_rival,
    forward_backward,
    measure,
    measure_ceilings,
    measure_steps,
    meta,
    relative_error,
    sdpa_rival,
    wrong,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnconvert.kernels.span.decode import SpanLayout, SpanState, span_attention_step

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
STEP_RIVALS = ("flash", "cudnn", "fa3")
L2_BYTES = 2**27  # more than twice an H100's
MAX_COPIES = 64  # steps in one graph
REPLAYS = 20


@dataclass(frozen=True)
class Shape:
    """One size of an operator on whole sequences: B batch, T tokens, H query heads, G key-value heads, D head_dim."""

    B: int
    T: int
    H: int
    G: int
    D: int = 128


def names(text: str) -> list[str]:
    """What stands between commas."""
    return [x for x in text.split(",") if x]


def arguments(description: str | None, rivals: Sequence[str], budget: float) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        rivals: those measured unless told otherwise; a benchmark without any has no such option.
        budget: in seconds, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    if rivals:
        parser.add_argument("--rivals", type=names, default=list(rivals), help=f"of {', '.join(rivals)}; empty = none")
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which what is left gets a row without a figure")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    return parser


def random_qkv(shape: Shape, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    """Random q [B, T, H, D], k and v [B, T, G, D]; bf16, on a CPU fp32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = {"q": shape.H, "k": shape.G, "v": shape.G}
    return {name: torch.randn(shape.B, shape.T, heads, shape.D, device=device, dtype=dtype, generator=generator) for name, heads in sizes.items()}


def errors_of_heads(
    inputs: dict[str, Tensor], pick: dict[str, list[int]], gradients: bool, ours: Callable[..., Tensor], exact: Callable[..., Tensor]
) -> dict[str, float]:
    """Relative errors of some heads.

    Args:
        inputs: tensors [B, T, heads, ...], by the name of the argument.
        pick: the heads compared, of each input; the output has those of `q`.
        gradients: whether to compare those too, of every input.
        ours: called with the inputs.
        exact: called with the picked heads of the inputs in fp32.
    """
    small = {name: x[:, :, pick[name]].detach().float().requires_grad_(gradients) for name, x in inputs.items()}
    for x in inputs.values():
        x.requires_grad_(gradients)
    with nullcontext() if gradients else torch.no_grad():
        out, wanted = ours(**inputs), exact(**small)
    errors = {"output": relative_error(out[:, :, pick["q"]], wanted)}
    if gradients:
        upstream = torch.randn_like(out)
        found = torch.autograd.grad(out, list(inputs.values()), upstream)
        theirs = torch.autograd.grad(wanted, list(small.values()), upstream[:, :, pick["q"]].float())
        errors |= {f"d{name}": relative_error(a[:, :, pick[name]], b) for name, a, b in zip(inputs, found, theirs, strict=True)}
    for x in inputs.values():
        x.requires_grad_(False)
    return errors


def took(row: dict[str, Any]) -> str:
    """A row's time, in ms and in floors."""
    return "-" if row["ms"] is None else f"{row['ms']:9.4f} ms {row['ms'] / row['floor_ms']:6.2f} x floor"


class KernelRows(ABC):
    """Rows so far, written after each one.

    Args:
        args: what `arguments` parsed.
        script: the benchmark's name, for the command in `meta`.
    """

    def __init__(self, args: argparse.Namespace, script: str):
        self.began = time.monotonic()
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        self.args = args
        self.device = torch.device("cpu" if args.rehearse else "cuda")
        self.flush = None if args.rehearse else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.impl: Any = "reference" if args.rehearse else "triton"
        self.rows: list[dict[str, Any]] = []
        self.meta = meta()
        self.meta["command"] = self.meta["command"].replace("bench_linear", script, 1)
        self.ceilings = measure_ceilings(self.flush)
        self.meta["ceilings"] = {"copy_bytes_per_s": self.ceilings.copy}

    @abstractmethod
    def line(self, row: dict[str, Any]) -> str:
        """A row as it is printed."""

    @abstractmethod
    def compare(self) -> None:
        """Put into our rows, in place, what other rows say of them."""

    def rivals_of(self, row: dict[str, Any], keys: Iterable[str]) -> list[dict[str, Any]]:
        """The rivals' rows that have a time and are alike in `keys`."""
        return [other for other in self.rows if other["impl"] != "triton" and other["ms"] is not None and all(other[x] == row[x] for x in keys)]

    def guarded(self, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Run one measurement, complete its row, print it and write the file; whatever the measurement raises becomes the row's note."""
        if time.monotonic() - self.began > self.args.budget:
            values: dict[str, Any] = {"ms": None, "note": "not measured: the time budget was spent"}
        else:
            try:
                values = work()
            except Exception as error:  # a rival may refuse in any way, and its refusal is a result
                values = {"ms": None, "note": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"}
        self.rows.append({**row, **values})
        self.write()
        print(self.line(self.rows[-1]), flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        """All rows; the file appears when it is whole."""
        self.compare()
        if self.args.out == os.devnull:
            return
        path = Path(self.args.out)
        path.with_suffix(".tmp").write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)

    def finish(self) -> None:
        """Write the file, which is not there yet if there were no rows, and print how long all took."""
        self.write()
        print(f"{time.monotonic() - self.began:.0f} s")


class PassRows(KernelRows):
    """Rows of whole sequences, forward or forward and backward; `args` has `seconds`, how long one measurement repeats."""

    def __init__(self, args: argparse.Namespace, script: str):
        super().__init__(args, script)
        self.meta["ceilings"]["gemm_flop_per_s"] = self.ceilings.gemm

    def print_ceilings(self) -> None:
        print(f"copy {self.ceilings.copy / 1e12:.2f} TB/s, gemm {self.ceilings.gemm / 1e12:.0f} TFLOP/s", flush=True)

    def timed(self, forward: Callable[[], Tensor], leaves: Sequence[Tensor], backward: bool) -> dict[str, Any]:
        """A row's times; `leaves` are what the backward pass has gradients of."""
        if backward:
            return asdict(measure(forward_backward(forward, leaves), self.flush, self.args.seconds))
        with torch.no_grad():
            return asdict(measure(forward, self.flush, self.args.seconds))

    def dense(self, rival: str, shape: Shape, inputs: dict[str, Tensor], backward: bool) -> dict[str, Any]:
        """Dense causal attention: `fa3`, or a backend of PyTorch's SDPA."""
        if rival == "fa3":
            forward, leaves, note = fa3_rival(shape, inputs)  # type: ignore[arg-type]
        else:
            forward, leaves, note = sdpa_rival(SDPBackend.MATH if self.args.rehearse else BACKENDS[rival], shape, inputs)  # type: ignore[arg-type]
        return {**self.timed(forward, leaves, backward), "note": f"dense causal; {note}" if note else "dense causal"}


class StepRows(KernelRows):
    """Rows of one decode step, timed in a CUDA graph of steps over several caches."""

    def __init__(self, args: argparse.Namespace, script: str):
        super().__init__(args, script)
        self.flush = None  # only the ceilings needed it; caches take all the memory there is
        self.dtype = torch.float32 if args.rehearse else torch.bfloat16

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def copies(self, num_bytes: int) -> int:
        """Caches that together exceed the L2 cache, where a step reads `num_bytes` of one."""
        return 2 if self.args.rehearse else max(1, min(MAX_COPIES, -(-L2_BYTES // num_bytes)))

    def span_floor_ms(self, B: int, H: int, keys: int, D: int) -> float:
        """`keys`: those that a step reads, of all KV heads of a row."""
        return B * (2 * keys + 2 * H) * D * self.dtype.itemsize / self.ceilings.copy * 1e3

    def span_step(self, B: int, context: int, H: int, G: int, D: int, layout: SpanLayout, active: Tensor | None = None) -> dict[str, Any]:
        """Our step of attention spans that makes a cache `context` tokens long, compared with the PyTorch step in fp32 before it is timed.

        Args:
            layout: of G heads, with room for the steps of all replays.
            active: bool [B, 1, G], the KV heads that each row uses; None = all.
        """

        def state() -> SpanState:
            length = torch.full((B,), context - 1, dtype=torch.int64, device=self.device)
            return SpanState(self.normal(B, layout.num_slots, D), self.normal(B, layout.num_slots, D), length)

        q, k, v = self.normal(B, 1, H, D), self.normal(B, 1, G, D), self.normal(B, 1, G, D)
        step = partial(span_attention_step, q, k, v, layout=layout, scale=D**-0.5, active=active, impl=self.impl)
        one = state()
        exact = SpanState(one.k[:1].float(), one.v[:1].float(), one.length[:1].clone())
        few = None if active is None else active[:1]
        wanted = span_attention_step(*(x[:1].float() for x in (q, k, v)), state=exact, layout=layout, scale=D**-0.5, active=few, impl="reference")
        del exact  # caches take all the memory there is
        errors = {"output": relative_error(step(state=one)[:1], wanted)}
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        num_bytes = one.k.nbytes + one.v.nbytes
        states = [one, *(state() for _ in range(self.copies(num_bytes) - 1))]
        return {"ms": measure_steps([partial(step, state=s) for s in states], REPLAYS), "errors": errors, "copies": len(states), "cache_bytes": num_bytes}

    def dense_step(self, rival: str, B: int, context: int, H: int, G: int, D: int) -> dict[str, Any]:
        """One token over a full static cache of `context` tokens: `fa3`, or a backend of PyTorch's SDPA."""
        size = (B, context, G, D) if rival == "fa3" else (B, G, context, D)
        num_bytes = 2 * B * G * context * D * self.dtype.itemsize
        caches = [(self.normal(*size), self.normal(*size)) for _ in range(self.copies(num_bytes))]
        if rival == "fa3":
            function = fa3_function("flash_attn_with_kvcache")
            if function is None:
                raise RuntimeError("FlashAttention-3 is not installed")
            q = self.normal(B, 1, H, D)
            lengths = torch.full((B,), context, dtype=torch.int32, device=self.device)
            steps: list[Callable[[], Any]] = [partial(function, q, k, v, cache_seqlens=lengths, causal=True) for k, v in caches]
        else:
            q = self.normal(B, G, H // G, D)

            def attend(k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH if self.args.rehearse else BACKENDS[rival]):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            steps = [partial(attend, k, v) for k, v in caches]
        return {"ms": measure_steps(steps, REPLAYS), "copies": len(caches), "cache_bytes": num_bytes}

    def compare(self) -> None:
        """The best rival of the same cell, and how much faster ours is."""
        for row in self.rows:
            rivals = self.rivals_of(row, ("B", "context", "H", "G", "D"))
            if row["impl"] == "triton" and row["ms"] is not None and rivals:
                best = min(rivals, key=lambda r: r["ms"])
                row |= {"best_rival": best["impl"], "best_rival_ms": best["ms"], "speedup": best["ms"] / row["ms"]}
