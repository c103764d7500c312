"""Speed of attention with one span per KV head against its floor and its rivals, all in one run on one GPU.

    python benchmarks/bench_span.py --out FILE [--only forward,backward] [--forms windows,elastic] [--rivals cudnn,flex] [--budget 90]
    python benchmarks/bench_span.py --out FILE --rehearse      tiny shapes on the CPU, the PyTorch operator in place of the kernels

What the figures mean:

- Random bf16 data, median of CUDA-event times with the L2 cache overwritten before every repeat.
- floor = max(FLOP of the visible pairs / gemm rate, bytes / copy bandwidth), rates measured in this run. FLOP of a pair of a query head: 4 D forward, 10 D
  backward (logits are computed again). Bytes: each input and output once.
- Ours is compared with the fp32 PyTorch operator before it is timed, on the timed inputs, one KV head of every rule over the whole length; FlexAttention
  with ours. What is wrong is not timed.
- `cudnn` is dense causal attention (PyTorch's SDPA), another operator: what a model without spans would run. `flex` is FlexAttention, compiled for each shape,
  with the same mask in blocks of 128; building the mask is not timed.
- bytes_peak is what one call, forward and backward where the row has both, allocates above its inputs.

Shapes: B batch, T tokens, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from bench_linear import Ceilings, relative_error, wrong
from kernel_rows import PassRows, Shape, arguments, errors_of_heads, names, random_qkv, took
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnconvert.kernels.span import reference
from attnconvert.kernels.span.api import span_attention
from attnconvert.kernels.span.reference import BETA_ONE, window

NUM_SINKS = 64
FLEX_BLOCK = 128
MAX_DENSE_TRAINING = 65536  # tokens; dense forward and backward of more takes a second a call
ROWS = {"forward": "span.forward", "backward": "span.forward_backward"}

# MoA's mix of windows; and rules that grow with the position, where pairs are quadratic in T again
FORMS: dict[str, tuple[tuple[int, int], ...]] = {
    "windows": ((512, 0), (1024, 0), (2048, 0), (4096, 0)),
    "elastic": ((0, BETA_ONE // 4), (0, BETA_ONE // 2)),
}
SHAPES = tuple(Shape(1, T, 32, G) for T in (8192, 32768, 131072) for G in (32, 8))


def rules_of(form: str, shape: Shape) -> list[tuple[int, int]]:
    """(alpha, beta) per KV head, the same number of heads for each rule of the form; heads of a rule are not neighbours."""
    return [FORMS[form][head % len(FORMS[form])] for head in range(shape.G)]


def visible_pairs(rule: tuple[int, int], T: int) -> int:
    """Pairs of a query and a key that it sees, in one head of one sequence."""
    n = torch.arange(T)
    recent = torch.minimum(window(n, torch.tensor(rule[0]), torch.tensor(rule[1])), n + 1)
    return int((recent + (n + 1 - recent).clamp_max(NUM_SINKS)).sum())


def floor_ms(name: str, form: str, shape: Shape, ceilings: Ceilings) -> float:
    """Smallest time in ms, launches not counted."""
    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    pairs = B * H // G * sum(visible_pairs(rule, T) for rule in rules_of(form, shape))
    backward = name == ROWS["backward"]
    num_bytes = 2 * B * T * D * ((2 * H + 2 * G) + backward * (4 * H + 4 * G))
    return max(pairs * D * (14 if backward else 4) / ceilings.gemm, num_bytes / ceilings.copy) * 1e3


def make_inputs(form: str, shape: Shape, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random q, k, v and the operator's other arguments."""
    inputs = random_qkv(shape, device, torch.Generator(device).manual_seed(0))
    alpha, beta = torch.tensor(rules_of(form, shape), dtype=torch.int32, device=device).T.contiguous()
    return inputs, {"alpha": alpha, "beta": beta, "num_sinks": NUM_SINKS, "scale": shape.D**-0.5}


def check(form: str, shape: Shape, inputs: dict[str, Tensor], options: dict[str, Any], gradients: bool, impl: Any) -> dict[str, float]:
    """Relative errors of one KV head of every rule against the PyTorch operator in fp32."""
    rules = rules_of(form, shape)
    heads = [rules.index(rule) for rule in dict.fromkeys(rules)]
    R = shape.H // shape.G
    pick = {"q": [head * R + r for head in heads for r in range(R)], "k": heads, "v": heads}
    few = options | {name: options[name][heads] for name in ("alpha", "beta")}
    ours = functools.partial(span_attention, **options, impl=impl)
    return errors_of_heads(inputs, pick, gradients, ours, functools.partial(reference.span_attention, **few))


def flex_mask(shape: Shape, options: dict[str, Any]) -> BlockMask:
    """The spans as FlexAttention takes them: per head and block of queries the blocks of keys that some or all of them see."""
    alpha, beta, R, device = options["alpha"].long(), options["beta"].long(), shape.H // shape.G, options["alpha"].device
    first = torch.arange(0, shape.T, FLEX_BLOCK, device=device)
    last = (first + FLEX_BLOCK).clamp_max(shape.T) - 1
    edge_first, edge_last = (n + 1 - window(n, alpha[:, None], beta[:, None]) for n in (first, last))  # [G, blocks]
    some = (first <= last[:, None]) & ((first < NUM_SINKS) | (last >= edge_first[:, :, None]))
    whole = (last <= first[:, None]) & ((last < NUM_SINKS) | (first >= edge_last[:, :, None]))
    lists = []
    for blocks in (some & ~whole, whole):
        blocks = blocks.repeat_interleave(R, 0)[None]
        order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        lists += [blocks.sum(-1).to(torch.int32), order.to(torch.int32)]

    def sees(b: Tensor, h: Tensor, n: Tensor, i: Tensor) -> Tensor:
        size = (alpha[h // R] + ((n + 1) * beta[h // R] >> 16)).clamp_min(1)
        return (i <= n) & ((i < NUM_SINKS) | (i > n - size))

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(shape.T, shape.T))


class Bench(PassRows):
    """A row for each operator, form and shape."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_span")
        self.shapes = (Shape(1, 200, 4, 4, 16), Shape(2, 300, 8, 4, 16)) if args.rehearse else SHAPES
        self.print_ceilings()
        torch._dynamo.config.recompile_limit = 64  # above it a rival would silently run uncompiled
        self.flex: Callable[..., Any] = flex_attention if args.rehearse else torch.compile(flex_attention, dynamic=False)

    def row(self, name: str, impl: str, form: str, shape: Shape) -> dict[str, Any]:
        """What a row says before it is measured."""
        rules = [{"alpha": a, "beta": b / BETA_ONE} for a, b in FORMS[form]]
        floor = floor_ms(name, form, shape, self.ceilings)
        return {"name": name, "impl": impl, "form": form, **asdict(shape), "num_sinks": NUM_SINKS, "rules": rules, "floor_ms": floor}

    def line(self, row: dict[str, Any]) -> str:
        shape = f"B={row['B']} T={row['T']:<6d} H={row['H']} G={row['G']:<2d}"
        return f"{row['name']:22s} {row['impl']:8s} {row['form']:8s} {shape} {took(row)} {row.get('note', '')}"

    def compare(self) -> None:
        """Rivals' times beside ours."""
        for row in self.rows:
            if row["impl"] == "triton":
                row["rivals"] = {other["impl"]: other["ms"] for other in self.rivals_of(row, ("name", "form", "B", "T", "H", "G", "D"))}

    def ours(self, name: str, form: str, shape: Shape) -> dict[str, Any]:
        inputs, options = make_inputs(form, shape, self.device)
        errors = check(form, shape, inputs, options, name == ROWS["backward"], self.impl)
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        run = functools.partial(span_attention, **inputs, **options, impl=self.impl)
        return {**self.timed(run, list(inputs.values()), name == ROWS["backward"]), "errors": errors}

    def cudnn(self, name: str, form: str, shape: Shape) -> dict[str, Any]:
        inputs, _ = make_inputs(form, shape, self.device)
        return self.dense("cudnn", shape, inputs, name == ROWS["backward"])

    def flex_attention(self, name: str, form: str, shape: Shape) -> dict[str, Any]:
        inputs, options = make_inputs(form, shape, self.device)
        q, k, v = (x.transpose(1, 2).contiguous() for x in inputs.values())
        mask = flex_mask(shape, options)
        run = functools.partial(self.flex, block_mask=mask, scale=options["scale"], enable_gqa=shape.H != shape.G)
        with torch.no_grad():
            errors = {"output": relative_error(run(q, k, v).transpose(1, 2), span_attention(**inputs, **options, impl=self.impl))}
        note = wrong(errors)
        if note is not None:
            return {"ms": None, "note": note, "errors": errors}
        return {**self.timed(lambda: run(q, k, v), [q, k, v], name == ROWS["backward"]), "errors": errors}

    def run(self) -> None:
        """Ours first, then dense attention, which needs no compilation, then FlexAttention, the plainest cases first."""
        names = [ROWS[part] for part in self.args.only]
        cells = [(name, form, shape) for form in self.args.forms for shape in self.shapes for name in names]
        for name, form, shape in cells:
            self.guarded(self.row(name, "triton", form, shape), functools.partial(self.ours, name, form, shape))
        if "cudnn" in self.args.rivals:
            for name, form, shape in cells:
                if form == self.args.forms[0] and not (name == ROWS["backward"] and shape.T > MAX_DENSE_TRAINING):  # it knows of no spans
                    self.guarded(self.row(name, "cudnn", form, shape), functools.partial(self.cudnn, name, form, shape))
        if "flex" in self.args.rivals:
            for name, form, shape in sorted(cells, key=lambda cell: (cell[1] != self.args.forms[0], -cell[2].G, cell[2].T)):
                self.guarded(self.row(name, "flex", form, shape), functools.partial(self.flex_attention, name, form, shape))


def main() -> None:
    parser = arguments(__doc__, ("cudnn", "flex"), budget=540.0)
    parser.add_argument("--only", type=names, default=list(ROWS))
    parser.add_argument("--forms", type=names, default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=0.06, help="repeats of one measurement")
    bench = Bench(parser.parse_args())
    bench.run()
    bench.finish()


if __name__ == "__main__":
    main()
