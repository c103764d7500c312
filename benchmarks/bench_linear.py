"""Speed of window + sinks + Hedgehog linear attention against its floor and its rivals, all in one run on one GPU.

    python benchmarks/bench_linear.py --out FILE [--only forward,backward,decode] [--forms published,gates] [--rivals cudnn,fla] [--quick] [--budget 150]
    python benchmarks/bench_linear.py --out FILE --rehearse      tiny shapes on the CPU, the PyTorch operator in place of the kernels

What the figures mean:

- Random bf16 data, median of CUDA-event times with the L2 cache overwritten before every repeat (the overwrite also hides the host's launch time);
  decode is a CUDA graph of steps over states that together exceed the cache, mean over whole windows, so a fold every C steps is in it.
- floor = max(bytes / copy bandwidth, FLOP / gemm rate, exp / exp rate), bandwidth and rate measured in this run. Bytes: each input and output once.
- Every kernel is compared with the fp32 PyTorch operator before it is timed, on the timed inputs, one group of heads over the whole length; one that is
  wrong is not timed.
- Rivals get their inputs in the layout they like; where they take no grouped heads, repeated heads that are not timed. `fla` is given features that exist
  already and has no normaliser; `fla+maps` computes them (compiled PyTorch), `fla+maps+norm` also normalises. None of the three has a window.
- bytes_peak is what one forward and backward pass allocates above its inputs.

Shapes: B batch, T tokens, H query heads, G key-value heads, D head_dim, F features (two halves), C window, A sinks.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnconvert.kernels.linear import reference
from attnconvert.kernels.linear.api import linear_attention
from attnconvert.kernels.linear.decode import linear_attention_step

WINDOW = 64
MAX_DENSE_CACHE = 2**22  # batch x tokens x key-value heads of a dense decode row, 2 GB at D = 128
EXP_PER_CLOCK = 16  # special-function results per SM and clock, Hopper
CLOCK_HZ = 1.755e9
MAX_OUTPUT_ERROR, MAX_GRADIENT_ERROR = 1e-2, 3e-2  # relative, bf16 operands; sums over all tokens lose more than outputs do
SLOW_MS = 150.0  # what takes longer is run once after its warm-up
FLUSH_BYTES = 2**30  # 20 times an H100's L2; overwriting it takes 0.4 ms, longer than the host needs for any launch here


@dataclass(frozen=True)
class Shape:
    """One size of the operator; `F` counts both halves."""

    B: int
    T: int
    H: int
    G: int
    D: int = 128
    F: int = 128
    C: int = WINDOW


@dataclass(frozen=True)
class Form:
    """One form of the operator: what `reference`, sinks and gates are."""

    name: str
    reference: str
    num_sinks: int
    gates: bool


FORMS = (
    Form("published", "window_max", 0, False),  # LoLCATs; the goals are for this one
    Form("gates", "absolute", 4, True),  # what the hedgehog recipe trains
    Form("absolute", "absolute", 4, False),
    Form("no-sinks", "absolute", 0, False),
)
SHAPES = tuple(Shape(B, T, 32, G) for B, T in ((1, 8192), (1, 32768), (1, 131072), (8, 8192)) for G in (32, 8))
SMOLLM2 = Shape(16, 1024, 9, 3, 64, 128)  # SmolLM2-135M in training
DECODE_SHAPES = (*(Shape(B, 1, 32, G) for G in (8, 32) for B in (1, 8, 64)), Shape(16, 1, 9, 3, 64, 128))
MAIN_FORMS = ("published", "gates")
WARM_SECONDS = 150.0
MAX_WARM_TOKENS = 65536  # a longer row takes the kernels of a shorter one, and 16 processes share the memory

# (row, form, B, T, H, G) -> ms; a goal of None means GOAL_FLOORS times the floor
GOALS: dict[tuple[str, str, int, int, int, int], float | None] = {
    ("linear.forward", "published", 1, 8192, 32, 32): 0.22,
    ("linear.forward", "published", 1, 32768, 32, 32): 0.80,
    ("linear.forward", "published", 1, 131072, 32, 32): 3.1,
    ("linear.forward", "published", 8, 8192, 32, 32): 1.7,
    ("linear.forward_backward", "published", 1, 8192, 32, 32): 0.95,
    ("linear.forward_backward", "published", 1, 32768, 32, 32): 3.8,
    ("linear.decode", "published", 1, 1, 32, 8): 0.005,
    ("linear.decode", "published", 64, 1, 32, 8): None,
}
GOAL_FLOORS = 1.3


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """Median, smallest and largest time in ms, and the bytes that one call allocated above its inputs (None on a CPU)."""

    ms: float
    ms_min: float
    ms_max: float
    bytes_peak: int | None


def measure(function: Callable[[], Any], flush: Tensor | None, seconds: float) -> Timing:
    """Time a function.

    Args:
        flush: buffer on the GPU to overwrite before each repeat; None = CPU.
        seconds: how long to repeat.
    """
    if flush is None:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            function()
            times.append((time.perf_counter() - began) * 1e3)
        return Timing(statistics.median(times), min(times), max(times), None)
    function()  # compiles and tunes, which takes memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def once() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        function()
        end.record()
        return begin, end

    begin, end = once()
    torch.cuda.synchronize()
    first, peak = begin.elapsed_time(end), torch.cuda.max_memory_allocated() - before
    if first > SLOW_MS:
        return Timing(first, first, first, peak)
    for _ in range(3):
        once()
    pairs = [once() for _ in range(max(7, min(100, int(seconds * 1e3 / (first + 0.4)))))]
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairs]
    return Timing(statistics.median(times), min(times), max(times), peak)


def measure_steps(steps: Sequence[Callable[[], Any]], replays: int) -> float:
    """Mean time in ms of one step, all steps captured in one CUDA graph. On a CPU they are called."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for step in steps:
            step()
        return (time.perf_counter() - began) * 1e3 / len(steps)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step() for step in steps]
    for _ in range(8):
        graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    del kept
    return begin.elapsed_time(end) / replays / len(steps)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: copy in bytes/s (read and written), bf16 gemm in FLOP/s; exp is on paper."""

    copy: float
    gemm: float
    exp: float


def measure_ceilings(flush: Tensor | None) -> Ceilings:
    if flush is None:
        return Ceilings(1e10, 1e11, 1e10)
    x = torch.empty(2**29, dtype=torch.int32, device="cuda").random_()
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 4 / (measure(lambda: y.copy_(x), flush, 0.1).ms * 1e-3)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    gemm = 2 * 8192**3 / (measure(lambda: a @ b, flush, 0.1).ms * 1e-3)
    return Ceilings(copy, gemm, torch.cuda.get_device_properties(0).multi_processor_count * EXP_PER_CLOCK * CLOCK_HZ)


def floor_ms(name: str, shape: Shape, form: Form, ceilings: Ceilings) -> float:
    """Smallest time in ms with features and softmax on chip, launches not counted."""
    B, T, H, G, D, F, C = (getattr(shape, x) for x in "BTHGDFC")
    keys = 1.5 * C + form.num_sinks  # softmax keys of a query with a block window, on average
    if name == "linear.decode":
        state = G * F * (D + 1) * 4 + 2 * G * keys * D * 2
        return B * (state + (2 * H + 2 * G) * D * 2) / ceilings.copy * 1e3
    heads = H + G
    num_bytes = 2 * heads * D * 2
    flops = D * F * heads + 2 * F * D * heads + 4 * keys * D * H  # feature maps; state update and readout; softmax branch
    exps = F * heads + keys * H
    if name == "linear.forward_backward":
        num_bytes += 4 * heads * D * 2
        flops += 3 * D * F * heads + 2 * F * D * (G + 4 * H) + 10 * keys * D * H
        exps *= 2
    return B * T * max(num_bytes / ceilings.copy, flops / ceilings.gemm, exps / ceilings.exp) * 1e3


# ---------------------------------------------------------------- our operator


def make_inputs(shape: Shape, form: Form, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Random q, k, v and parameters of the operator; logits and feature logits of about unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T, H, G, D, F = shape.B, shape.T, shape.H, shape.G, shape.D, shape.F

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs: dict[str, Any] = {"q": normal(B, T, H, D, dtype=dtype), "k": normal(B, T, G, D, dtype=dtype), "v": normal(B, T, G, D, dtype=dtype)}
    for name, heads in (("query_map", H), ("key_map", G)):  # bf16 values: the kernels round maps to it
        inputs[name] = (normal(heads, D, F // 2) * D**-0.5).to(torch.bfloat16).float()
    inputs["linear_log_weight"] = normal(H, 1)
    inputs["query_gate"] = inputs["key_gate"] = None
    if form.gates:
        inputs["query_gate"], inputs["key_gate"] = normal(H, D + 1) * 0.3, normal(G, D + 1) * 0.3
    return inputs


def settings(shape: Shape, form: Form) -> dict[str, Any]:
    return {"window_size": shape.C, "window_kind": "block", "num_sinks": form.num_sinks, "scale": shape.D**-0.5, "reference": form.reference}


def first_group(inputs: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """First row, first key-value head and its query heads, in fp32."""
    r = shape.H // shape.G
    heads = {"q": r, "k": 1, "v": 1, "query_map": r, "key_map": 1, "linear_log_weight": r, "query_gate": r, "key_gate": 1}
    found: dict[str, Any] = {}
    for name, x in inputs.items():
        if x is None:
            found[name] = None
        elif name in ("q", "k", "v"):
            found[name] = x[:1, :, : heads[name]].detach().float()
        else:
            found[name] = x[: heads[name]].detach().float()
    return found


def relative_error(value: Tensor, wanted: Tensor) -> float:
    return float(((value.float() - wanted.float()).norm() / wanted.float().norm()).item())


def check(shape: Shape, form: Form, inputs: dict[str, Any], gradients: bool, impl: Any) -> dict[str, float]:
    """Relative errors of the first group of heads against the PyTorch operator in fp32. Gradients of parameters come from all rows, so only with B = 1."""
    r = shape.H // shape.G
    small = first_group(inputs, shape)
    wanted_from = {name: x for name, x in small.items() if x is not None}
    from_ours = {name: x for name, x in inputs.items() if x is not None}
    for x in (*wanted_from.values(), *from_ours.values()):
        x.requires_grad_(gradients)
    grad_context: Any = nullcontext() if gradients else torch.no_grad()
    with grad_context:
        out = linear_attention(**inputs, **settings(shape, form), impl=impl).output
        wanted = reference.linear_attention(**small, **settings(shape, form)).output
    errors = {"output": relative_error(out[:1, :, :r], wanted)}
    if gradients:
        upstream = torch.randn_like(out)
        ours = torch.autograd.grad(out, list(from_ours.values()), upstream)
        theirs = torch.autograd.grad(wanted, list(wanted_from.values()), upstream[:1, :, :r].float())
        for name, a, b in zip(from_ours, ours, theirs, strict=True):
            if name in ("q", "k", "v"):
                errors[f"d{name}"] = relative_error(a[:1, :, : b.shape[2]], b)
            elif name == "linear_log_weight" and shape.B == 1:
                # over a long row of random tokens the linear branch holds nearly all the weight and its own weight cancels: what is left is the
                # rounding of the outputs, so that is what the error is measured by
                errors[f"d{name}"] = float(((a[: b.shape[0]].float() - b).norm() / torch.maximum(b.norm(), wanted.detach().norm())).item())
            elif shape.B == 1:
                errors[f"d{name}"] = relative_error(a[: b.shape[0]], b)
    for x in from_ours.values():
        x.requires_grad_(False)
    return errors


def wrong(errors: dict[str, float]) -> str | None:
    """What is too far off, or None. NaN is."""
    bad = [f"{name} {error:.1e}" for name, error in errors.items() if not error < (MAX_OUTPUT_ERROR if name == "output" else MAX_GRADIENT_ERROR)]
    return f"wrong, so not timed: {', '.join(bad)}" if bad else None


def forward_backward(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """A function that runs forward and backward; the incoming gradient is made once."""
    for x in leaves:
        x.requires_grad_(True)
    upstream: list[Tensor] = []

    def run() -> Any:
        out = function()
        if not upstream:
            upstream.append(torch.randn_like(out))
        return torch.autograd.grad(out, list(leaves), upstream[0])

    return run


# ---------------------------------------------------------------- rivals


def repeat(x: Tensor, H: int) -> Tensor:
    """[B, T, G, D] -> [B, T, H, D], contiguous."""
    return x.repeat_interleave(H // x.shape[2], 2)


def sdpa_rival(backend: SDPBackend, shape: Shape, inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor], str]:
    q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in "qkv")
    note = ""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

    if shape.G != shape.H:
        try:
            with torch.no_grad():
                run(q[:1, :, :128], k[:1, :, :128], v[:1, :, :128])
        except RuntimeError:
            k, v = (x.repeat_interleave(shape.H // shape.G, 1) for x in (k, v))
            note = "repeated heads"
    return lambda: run(q, k, v), [q, k, v], note


def fa3_function(name: str) -> Callable[..., Any] | None:
    """A function of FlashAttention-3, from its own package or the forward-only build of it."""
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, OSError, AttributeError):
            continue
    return None


def fa3_rival(shape: Shape, inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor], str]:
    function = fa3_function("flash_attn_func")
    if function is None:
        raise RuntimeError("FlashAttention-3 is not installed")
    q, k, v = inputs["q"], inputs["k"], inputs["v"]

    def run() -> Tensor:
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run, [q, k, v], ""


def hedgehog_features(x: Tensor, weight: Tensor) -> Tensor:
    """Both halves of the published map. x [B, T, heads, D], weight [heads, D, F/2] -> [B, T, heads, F] in x's dtype."""
    y = torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype)).float()
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12).to(x.dtype)


def fla_rival(kind: str, shape: Shape, inputs: dict[str, Any], features: Callable[..., Tensor]) -> tuple[Callable[[], Tensor], list[Tensor], str]:
    """`kind`: fla, fla+maps or fla+maps+norm."""
    ops = importlib.import_module("fla.ops.linear_attn")
    q, k, v = inputs["q"], repeat(inputs["k"], shape.H), repeat(inputs["v"], shape.H)
    query_map, key_map = inputs["query_map"], inputs["key_map"].repeat_interleave(shape.H // shape.G, 0)
    note = "repeated heads" if shape.G != shape.H else ""
    if kind == "fla":
        with torch.no_grad():
            phi_q, phi_k = features(q, query_map).clone(), features(k, key_map).clone()
        return lambda: ops.chunk_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=False)[0], [phi_q, phi_k, v], note
    normalize = kind == "fla+maps+norm"
    leaves = [q, k, v, query_map, key_map]
    return lambda: ops.chunk_linear_attn(features(q, query_map), features(k, key_map), v, scale=1.0, normalize=normalize)[0], leaves, note


def compiled_rival(shape: Shape, form: Form, inputs: dict[str, Any], compiled: Callable[..., Any]) -> tuple[Callable[[], Tensor], list[Tensor], str]:
    leaves = [x for x in inputs.values() if x is not None]
    return lambda: compiled(**inputs, **settings(shape, form)).output, leaves, "the PyTorch operator, torch.compile"


RIVALS = ("cudnn", "fa3", "flash", "fla+maps+norm", "fla+maps", "fla", "compiled")


def fla_autotuners() -> Iterator[Any]:
    """The autotuned kernels behind fla's linear attention."""
    for name in ("chunk_h", "chunk_o", "fused_recurrent"):
        for kernel in vars(importlib.import_module(f"fla.ops.common.{name}")).values():
            while kernel is not None and not hasattr(kernel, "configs"):
                kernel = getattr(kernel, "fn", None) if type(kernel).__module__.startswith("triton") else None
            if kernel is not None:
                yield kernel


def shorten_fla_tuning() -> None:
    """250 candidates: 25 ms each instead of 125."""
    testing = importlib.import_module("triton.testing")
    for kernel in fla_autotuners():
        kernel._do_bench = lambda function, quantiles: testing.do_bench(function, warmup=5, rep=20, quantiles=quantiles)


def fla_shard(index: int, shards: int) -> None:
    """Run fla forward and backward with every `shards`-th candidate only."""
    for kernel in fla_autotuners():
        kernel.configs = kernel.configs[index::shards] or kernel.configs[:1]
    ops = importlib.import_module("fla.ops.linear_attn")
    for shape in (SHAPES[0], SMOLLM2):
        phi_q, phi_k = (torch.rand(1, 512, shape.H, shape.F, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        v = torch.rand(1, 512, shape.H, shape.D, device="cuda", dtype=torch.bfloat16).requires_grad_()
        ops.chunk_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=True)[0].sum().backward()


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Sizes:
    """The shapes of one run; `context` is the length of dense caches in decode."""

    prefill: tuple[Shape, ...]
    decode: tuple[Shape, ...]
    context: int = 8192


def sizes(args: argparse.Namespace) -> Sizes:
    if args.rehearse:
        return Sizes((Shape(1, 200, 4, 2, 16, 16), Shape(2, 70, 3, 1, 8, 16)), (Shape(1, 1, 4, 2, 16, 16),), 32)
    if args.quick:
        return Sizes((Shape(1, 8192, 32, 32), SMOLLM2), (Shape(1, 1, 32, 8),))
    return Sizes((*SHAPES, SMOLLM2), DECODE_SHAPES)


def row_names(args: argparse.Namespace) -> list[str]:
    return [name for part, name in (("forward", "linear.forward"), ("backward", "linear.forward_backward")) if part in args.only]


def our_rows(args: argparse.Namespace) -> list[tuple[str, Shape, Form]]:
    """Everything of ours, in order; forms other than MAIN_FORMS at the first shape only."""
    found, size = [], sizes(args)
    for form in (f for f in FORMS if f.name in args.forms):
        main = form.name in MAIN_FORMS
        found += [(name, shape, form) for shape in (size.prefill if main else size.prefill[:1]) for name in row_names(args)]
        found += [("linear.decode", shape, form) for shape in size.decode if main and "decode" in args.only]
    return found


def warm_caches(args: argparse.Namespace) -> None:
    """Compile our kernels and fla's candidates in parallel processes; this one then finds them in Triton's cache."""
    shards = args.shards if has_fla() and any(is_fla(rival) for rival in args.rivals) else min(args.shards, len(our_rows(args)))
    children = [
        subprocess.Popen([sys.executable, *sys.argv, "--shard", f"{i}/{shards}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for i in range(shards)
    ]
    deadline = time.monotonic() + WARM_SECONDS
    for child in children:
        try:
            child.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run_shard(args: argparse.Namespace) -> None:
    """One process of `warm_caches`: each kernel once, at lengths whose launch arguments specialise alike."""
    index, shards = map(int, args.shard.split("/"))
    device = torch.device("cuda")
    for name, shape, form in our_rows(args)[index::shards]:
        if shape.B * shape.T > MAX_WARM_TOKENS:
            continue
        try:
            if name == "linear.decode":
                prompt = make_inputs(Shape(shape.B, 200, shape.H, shape.G, shape.D, shape.F), form, device)
                with torch.no_grad():
                    state = linear_attention(**prompt, **settings(shape, form), impl="reference", output_final_state=True).final_state
                    assert state is not None
                    last = {name: x[:, -1:] if name in ("q", "k", "v") else x for name, x in prompt.items()}
                    linear_attention_step(**last, state=state, **settings(shape, form), impl="triton")
                continue
            inputs = make_inputs(shape, form, device)
            leaves = [x for x in inputs.values() if x is not None]
            backward = name == "linear.forward_backward"
            with nullcontext() if backward else torch.no_grad():
                for x in leaves:
                    x.requires_grad_(backward)
                out = linear_attention(**inputs, **settings(shape, form), impl="triton").output
                if backward:
                    torch.autograd.grad(out, leaves, torch.randn_like(out))
        except Exception as error:  # the process that measures says what is wrong
            print(f"{name} {describe(shape)}: {error}", file=sys.stderr)
    if has_fla() and any(is_fla(rival) for rival in args.rivals):
        fla_shard(index, shards)


def has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


def is_fla(rival: str) -> bool:
    return rival.partition("+")[0] == "fla"


# ---------------------------------------------------------------- the run


class Bench:
    """Rows so far; written after each one."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cpu" if args.rehearse else "cuda")
        self.flush = None if args.rehearse else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.impl: Any = "reference" if args.rehearse else "triton"
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.meta = meta()
        self.ceilings = measure_ceilings(self.flush)
        self.meta["ceilings"] = {"copy_bytes_per_s": self.ceilings.copy, "gemm_flop_per_s": self.ceilings.gemm, "exp_per_s": self.ceilings.exp}
        print(f"copy {self.ceilings.copy / 1e12:.2f} TB/s, gemm {self.ceilings.gemm / 1e12:.0f} TFLOP/s", flush=True)
        torch._dynamo.config.recompile_limit = 64  # above it a rival would silently run uncompiled
        self.features: Callable[..., Tensor] = hedgehog_features if args.rehearse else torch.compile(hedgehog_features, dynamic=True)
        self.compiled: Callable[..., Any] = reference.linear_attention if args.rehearse else torch.compile(reference.linear_attention, dynamic=False)

    def spent(self) -> bool:
        return time.monotonic() - self.began > self.args.budget

    def add(self, name: str, impl: str, shape: Shape, form: Form | None, **values: Any) -> None:
        """Append a row, print it and write the file. `form` None = a rival, whose floor is the published form's."""
        row: dict[str, Any] = {"name": name, "impl": impl, "form": None if form is None else form.name, **asdict(shape)}
        row["num_sinks"], row["gates"] = (None, None) if form is None else (form.num_sinks, form.gates)
        row["floor_ms"] = floor_ms(name, shape, form or FORMS[0], self.ceilings)
        self.rows.append({**row, **values})
        ms = values.get("ms")
        took = "-" if ms is None else f"{ms:9.4f} ms {ms / row['floor_ms']:6.2f} x floor"
        print(f"{name:24s} {impl:14s} {row['form'] or '':10s} {describe(shape):34s} {took} {values.get('note', '')}", flush=True)
        self.write()

    def write(self) -> None:
        compare(self.rows)
        if self.args.out == os.devnull:
            return
        path = Path(self.args.out)
        path.with_suffix(".tmp").write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)

    def guarded(self, name: str, impl: str, shape: Shape, form: Form | None, work: Callable[[], dict[str, Any]]) -> None:
        """Run one measurement; whatever it raises becomes the row's note."""
        if self.spent():
            self.add(name, impl, shape, form, ms=None, note="not measured: the time budget was spent")
            return
        try:
            values = work()
        except Exception as error:  # a rival may refuse in any way, and its refusal is a result
            values = {"ms": None, "note": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"}
        self.add(name, impl, shape, form, **values)
        gc.collect()
        if self.flush is not None:
            torch.cuda.empty_cache()

    # ---- prefill

    def ours(self, name: str, shape: Shape, form: Form) -> dict[str, Any]:
        inputs = make_inputs(shape, form, self.device)
        backward = name == "linear.forward_backward"
        errors = check(shape, form, inputs, backward, self.impl)
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}

        def forward() -> Tensor:
            return linear_attention(**inputs, **settings(shape, form), impl=self.impl).output

        return {**self.timed(forward, [x for x in inputs.values() if x is not None], backward), "errors": errors}

    def timed(self, forward: Callable[[], Tensor], leaves: Sequence[Tensor], backward: bool) -> dict[str, Any]:
        if backward:
            return asdict(measure(forward_backward(forward, leaves), self.flush, self.args.seconds))
        with torch.no_grad():
            return asdict(measure(forward, self.flush, self.args.seconds))

    def rival(self, name: str, rival: str, shape: Shape) -> dict[str, Any]:
        backward = name == "linear.forward_backward"
        form = FORMS[0]
        inputs = make_inputs(shape, form, self.device)
        if rival in ("cudnn", "flash"):
            backend = SDPBackend.MATH if self.args.rehearse else SDPBackend.CUDNN_ATTENTION if rival == "cudnn" else SDPBackend.FLASH_ATTENTION
            forward, leaves, note = sdpa_rival(backend, shape, inputs)
        elif rival == "fa3":
            forward, leaves, note = fa3_rival(shape, inputs)
        elif rival == "compiled":
            forward, leaves, note = compiled_rival(shape, form, inputs, self.compiled)
        else:
            forward, leaves, note = fla_rival(rival, shape, inputs, self.features)
        result = self.timed(forward, leaves, backward)
        return {**result, "note": note} if note else result

    # ---- decode

    def copies(self, num_bytes: int) -> int:
        """How many sets of inputs exceed twice the L2 cache; at least 4, and not more than a graph should hold."""
        return 2 if self.args.rehearse else max(4, min(128, -(-(2**27) // num_bytes)))

    def decode_ours(self, shape: Shape, form: Form) -> dict[str, Any]:
        prompt = Shape(shape.B, 200, shape.H, shape.G, shape.D, shape.F)
        inputs = make_inputs(prompt, form, self.device, seed=1)
        parameters: dict[str, Any] = {name: x for name, x in inputs.items() if name not in ("q", "k", "v")}
        options = settings(shape, form)
        with torch.no_grad():
            state = linear_attention(**inputs, **options, impl="reference", output_final_state=True).final_state
            assert state is not None
            num_steps = shape.C + 8  # from token 200 on: crosses the start of a block, where keys leave the window for the state
            tokens = make_inputs(Shape(shape.B, num_steps, shape.H, shape.G, shape.D, shape.F), form, self.device, seed=2)
            q, k, v = (tokens[name] for name in "qkv")
            whole: dict[str, Any] = {name: torch.cat([inputs[name], tokens[name]], 1).float() for name in "qkv"}
            wanted = reference.linear_attention(**whole, **parameters, **options).output[:, 200:]
            running = fresh(state)
            outs = [
                linear_attention_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], running, **parameters, **options, impl=self.impl)
                for t in range(num_steps)
            ]
            errors = {"output": relative_error(torch.cat(outs, 1), wanted)}
            note = wrong(errors)
            if note is not None:
                return {"ms": None, "note": note, "errors": errors}
            num = self.copies(sum(x.numel() * x.element_size() for x in state))
            states = [fresh(state) for _ in range(num)]
            steps = [lambda s=s: linear_attention_step(q[:, :1], k[:, :1], v[:, :1], s, **parameters, **options, impl=self.impl) for s in states]
            return {"ms": measure_steps(steps, 2 * shape.C), "errors": errors, "copies": num}

    def decode_fla(self, shape: Shape, kind: str) -> dict[str, Any]:
        ops = importlib.import_module("fla.ops.linear_attn")
        form = FORMS[0]
        inputs = make_inputs(shape, form, self.device)
        k, v = repeat(inputs["k"], shape.H), repeat(inputs["v"], shape.H)
        query_map, key_map = inputs["query_map"], inputs["key_map"].repeat_interleave(shape.H // shape.G, 0)
        with torch.no_grad():
            phi_q, phi_k = self.features(inputs["q"], query_map).clone(), self.features(k, key_map).clone()
            num = self.copies(shape.B * shape.H * shape.F * shape.D * 4)
            kv = [torch.rand(shape.B, shape.H, shape.F, shape.D, device=self.device) for _ in range(num)]
            z = [torch.rand(shape.B, 1, shape.H, shape.F, device=self.device, dtype=torch.bfloat16) for _ in range(num)]
            if kind == "fla":
                steps = [lambda s=s: ops.fused_recurrent_linear_attn(phi_q, phi_k, v, scale=1.0, initial_state=s, output_final_state=True) for s in kv]
            else:

                def step(s: Tensor, n: Tensor) -> Any:
                    a, b = self.features(inputs["q"], query_map), self.features(k, key_map)
                    return ops.fused_recurrent_linear_attn(a, b, v, scale=1.0, initial_state=(s, n), output_final_state=True, normalize=True)

                steps = [lambda s=s, n=n: step(s, n) for s, n in zip(kv, z, strict=True)]
            ms = measure_steps(steps, 2 * shape.C)
        return {"ms": ms, "copies": num, "note": "repeated heads: a state per query head" if shape.G != shape.H else ""}

    def decode_dense(self, shape: Shape, rival: str, context: int) -> dict[str, Any]:
        """Softmax attention of one token over a full cache of `context` tokens."""
        num = self.copies(2 * shape.B * context * shape.G * shape.D * 2)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        size = (shape.B, context, shape.G, shape.D) if rival == "fa3" else (shape.B, shape.G, context, shape.D)
        caches = [tuple(torch.randn(size, device=self.device, dtype=dtype) for _ in range(2)) for _ in range(num)]
        if rival == "fa3":
            function = fa3_function("flash_attn_with_kvcache")
            if function is None:
                raise RuntimeError("FlashAttention-3 is not installed")
            q = torch.randn(shape.B, 1, shape.H, shape.D, device=self.device, dtype=dtype)
            lengths = torch.full((shape.B,), context, dtype=torch.int32, device=self.device)
            steps = [lambda k=k, v=v: function(q, k, v, cache_seqlens=lengths, causal=True) for k, v in caches]
        else:
            backend = SDPBackend.MATH if self.args.rehearse else SDPBackend.CUDNN_ATTENTION
            q = torch.randn(shape.B, shape.H, 1, shape.D, device=self.device, dtype=dtype)

            def attend(k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=shape.G != shape.H)

            steps = [lambda k=k, v=v: attend(k, v) for k, v in caches]
        with torch.no_grad():
            return {"ms": measure_steps(steps, 20), "copies": num, "note": f"softmax over {context} tokens", "context": context}

    # ---- order: ours first, then the rivals that need no compilation, then the rest

    def run(self) -> None:
        size, names = sizes(self.args), row_names(self.args)
        for name, shape, form in our_rows(self.args):
            measured = self.decode_ours if name == "linear.decode" else functools.partial(self.ours, name)
            self.guarded(name, "triton", shape, form, functools.partial(measured, shape, form))
        for rival in self.args.rivals:
            if is_fla(rival) and not has_fla():
                self.add((names or ["linear.decode"])[0], rival, size.prefill[0], None, ms=None, note="flash-linear-attention is not installed")
                continue
            if is_fla(rival) and not self.args.rehearse:
                shorten_fla_tuning()
            if "decode" in self.args.only and rival not in ("compiled", "flash", "fla+maps"):
                for shape in size.decode:
                    if is_fla(rival):
                        self.guarded("linear.decode", rival, shape, None, functools.partial(self.decode_fla, shape, rival))
                    elif shape.B * size.context * shape.G <= MAX_DENSE_CACHE:
                        self.guarded("linear.decode", rival, shape, None, functools.partial(self.decode_dense, shape, rival, size.context))
            for shape in size.prefill if rival != "compiled" else size.prefill[:1]:  # it compiles each shape for half a minute
                for name in names:
                    if name == "linear.forward_backward" and rival == "fa3":
                        continue  # the build that can be had has no backward
                    self.guarded(name, rival, shape, None, functools.partial(self.rival, name, rival, shape))


def fresh(state: reference.LinearState) -> reference.LinearState:
    """A copy of a prefill's state; a step changes its state in place."""
    return reference.LinearState(*(x.clone() for x in state))


def describe(shape: Shape) -> str:
    return f"B={shape.B} T={shape.T} H={shape.H} G={shape.G} D={shape.D} F={shape.F}"


def compare(rows: list[dict[str, Any]]) -> None:
    """Put the best rival of the same shape, the ratio to it, and the goal into our rows, in place."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[x] for x in ("name", "B", "T", "H", "G", "D", "F"))

    for row in rows:
        if row["impl"] != "triton" or row["ms"] is None:
            continue
        rivals = [r for r in rows if r["impl"] != "triton" and r["ms"] is not None and key(r) == key(row)]
        if rivals:
            best = min(rivals, key=lambda r: r["ms"])
            row["best_rival"], row["best_rival_ms"], row["speedup"] = best["impl"], best["ms"], best["ms"] / row["ms"]
        goal_key = (row["name"], row["form"], row["B"], row["T"], row["H"], row["G"])
        if goal_key in GOALS:
            goal = GOALS[goal_key]
            row["goal_ms"] = GOAL_FLOORS * row["floor_ms"] if goal is None else goal
            row["goal_met"] = row["ms"] <= row["goal_ms"]


def print_goals(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'row':24s} {'form':10s} {'shape':34s} {'ms':>9s} {'floor':>9s} {'x floor':>8s} {'best rival':>22s} {'ratio':>7s} {'goal':>8s} met")
    for row in rows:
        if row["impl"] != "triton":
            continue
        shape = Shape(*(row[x] for x in "BTHGDFC"))
        if row["ms"] is None:
            print(f"{row['name']:24s} {row['form']:10s} {describe(shape):34s} {row.get('note', '')}")
            continue
        rival = f"{row['best_rival']} {row['best_rival_ms']:.4f}" if "best_rival" in row else "-"
        ratio = f"{row['speedup']:.2f}" if "speedup" in row else "-"
        goal, met = (f"{row['goal_ms']:.4f}", "yes" if row["goal_met"] else "NO") if "goal_ms" in row else ("-", "")
        print(
            f"{row['name']:24s} {row['form']:10s} {describe(shape):34s} {row['ms']:9.4f} {row['floor_ms']:9.4f} {row['ms'] / row['floor_ms']:8.2f} {rival:>22s} {ratio:>7s} {goal:>8s} {met}"
        )


def installed(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def meta() -> dict[str, Any]:
    """Where the figures come from."""
    shown = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--out" and sys.argv[i - 1] != "--out"]
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, **dict(installed(("triton", "fla-core", "flash-attn-3", "fa3-fwd")))}
    if torch.cuda.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    command = " ".join(["python benchmarks/bench_linear.py --out FILE", shlex.join(shown)]).strip()
    return {"command": command, "device": device, "date": datetime.date.today().isoformat(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return [x for x in text.split(",") if x]

    parser.add_argument("--out", required=True)
    parser.add_argument("--only", type=names, default=["forward", "backward", "decode"])
    parser.add_argument("--forms", type=names, default=[f.name for f in FORMS])
    parser.add_argument("--rivals", type=names, default=list(RIVALS), help=f"of {', '.join(RIVALS)}; empty = none")
    parser.add_argument("--seconds", type=float, default=0.06, help="repeats of one measurement")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which what is left gets a row without a figure")
    parser.add_argument("--quick", action="store_true", help="one shape, no fla, no compiled PyTorch")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--shards", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile beforehand; 0 = compile on the way")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.rivals = [r for r in args.rivals if r in ("cudnn", "fa3")]
        args.forms = [f for f in args.forms if f in ("published", "gates")]
    if args.shard:
        run_shard(args)
        return
    began = time.monotonic()
    if args.shards and not args.rehearse:
        warm_caches(args)
        print(f"compiled beforehand in {time.monotonic() - began:.0f} s", flush=True)
    bench = Bench(args)
    bench.run()
    bench.write()
    print_goals(bench.rows)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
