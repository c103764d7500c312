"""Speed of block-sparse attention (InfLLM-V2), selection included, against its floor, dense attention and a public sparse kernel, all in one run on one GPU.

    python benchmarks/bench_blocks.py --out FILE --model DIR --text FILE [--only prefill,backward] [--data model,random] [--rivals cudnn,fa3,fla-nsa]
    python benchmarks/bench_blocks.py --out FILE --rehearse --data random      tiny shapes on the CPU, the PyTorch operator in place of the kernels

How much work a tile of neighbouring tokens has depends on how alike their choices are, so rows of `model` take queries and keys of a real model: one
pass over each document of --text that has as many tokens as the model takes, at three layers; two heads of 64 side by side make one of 128 (their logits add
up), documents follow one another up to the length. A KV head is a pair of KV heads of a layer, its query heads are pairs of theirs; where a group wants more than
there are, the first come again. Values are random. `random` rows are random throughout: choices of neighbours have nothing in common but what is forced.

- 96 blocks of 64 keys: the first, the token's own, 32 before it, 62 chosen; `dense_len` 0, so selection is always on.
- Median of CUDA-event times, the L2 cache overwritten before every repeat. `kernel_us`: one more call, profiled.
- floor: pairs of a query and a key that it sees, and of a query and a fine or coarse key, as matrix products at the rate measured in this run.
- Before it is timed, sampled rows are compared with fp32 PyTorch: the blocks that were chosen must have the best scores, within rounding, and the output must
  be attention to them.
- `fla-nsa` is the sparse attention of flash-linear-attention alone, given 64 random blocks per token: no selection, a third fewer blocks, groups of 16 only.

Shapes: B batch, T tokens, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_linear import Ceilings, forward_backward, relative_error
from kernel_rows import PassRows, Shape, arguments, names, random_qkv
from torch import Tensor

from attnconvert.kernels.blocks import reference
from attnconvert.kernels.blocks.api import block_sparse_attention
from attnconvert.kernels.blocks.rule import BlockRule, num_windows, visible_pairs
from attnconvert.kernels.softmax import masked_attention

RULE = BlockRule(block_size=64, num_init=1, num_local=32, num_blocks=96, dense_len=0)
ROWS = {"prefill": "infllm.prefill", "backward": "infllm.forward_backward"}
MAX_DENSE_TRAINING = 65536  # tokens; more takes seconds a call
SAMPLES = 32  # rows compared with PyTorch
OUTPUT_ERROR, SCORE_ERROR = 1e-2, 2e-2  # relative
NSA_BLOCKS = 64

PREFILL = tuple(Shape(1, T, 32, G) for T in (32768, 131072, 8192) for G in (2, 8))
BACKWARD = tuple(Shape(1, T, 32, G) for T in (65536, 32768) for G in (2, 8))
GOALS_MS = {(32768, 2): 10.0, (131072, 2): 50.0, (32768, 8): 13.0, (131072, 8): 65.0}


def floor_ms(name: str, shape: Shape, rule: BlockRule, ceilings: Ceilings) -> float:
    """Smallest time in ms, launches not counted."""
    attended = visible_pairs(shape.T, rule) * (14 if name == ROWS["backward"] else 4)
    scored = range(rule.num_blocks * rule.block_size, shape.T, 64)  # queries that have more blocks than they may see; every 64th stands for 64
    steps = ((rule.kernel * m, rule.stride * m) for m in {1, rule.coarser})
    scores = 2 * 64 * sum(num_windows(n + 1, kernel, stride) for kernel, stride in steps for n in scored)
    num_bytes = 2 * shape.B * shape.T * shape.D * (2 * shape.H + 2 * shape.G) * (3 if name == ROWS["backward"] else 1)
    return max(shape.B * shape.H * shape.D * (attended + scores) / ceilings.gemm, num_bytes / ceilings.copy) * 1e3


def capture(model: Path, text: Path, tokens: int, device: torch.device) -> list[list[tuple[Tensor, Tensor]]]:
    """Queries [T, H, D] and keys [T, G, D], positions in them, of three layers: layer -> document -> (q, k), for documents that together have `tokens`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    depth, length = loaded.config.num_hidden_layers, loaded.config.max_position_embeddings
    layers = [depth // 4, depth // 2, 3 * depth // 4]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def keep(module: Any, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            found[layers.index(module.layer_idx)].append((q[0].transpose(0, 1).clone(), k[0].transpose(0, 1).clone()))
        return sdpa(module, q, k, *rest, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = keep
    try:
        for line in text.read_text(encoding="utf-8").splitlines():
            ids = tokenizer(json.loads(line)["text"][: length * 8], truncation=True, max_length=length)["input_ids"]
            if len(ids) == length and len(found[0]) * length < tokens:
                with torch.no_grad():
                    loaded.model(torch.tensor([ids], device=device), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
    if len(found[0]) * length < tokens:
        raise SystemExit(f"{text} has {len(found[0])} documents of {length} tokens; {tokens} tokens are needed")
    return found


def paired(found: list[list[tuple[Tensor, Tensor]]], shape: Shape) -> tuple[Tensor, Tensor]:
    """Q [1, T, H, D] and k [1, T, G, D] out of captured heads of half the size, see the top."""
    R = shape.H // shape.G
    queries, keys = [], []
    per_layer = found[0][0][1].shape[1]
    pairs = [(layer, a, b) for layer in (1, 0, 2) for a, b in itertools.combinations(range(per_layer), 2)]
    for layer, a, b in itertools.islice(itertools.cycle(pairs), shape.G):
        q, k = (torch.cat([document[part] for document in found[layer]])[: shape.T] for part in (0, 1))
        keys.append(torch.cat([k[:, a], k[:, b]], -1))
        group = q.shape[1] // per_layer
        combinations = itertools.cycle(itertools.product(range(a * group, (a + 1) * group), range(b * group, (b + 1) * group)))
        queries += [torch.cat([q[:, i], q[:, j]], -1) for i, j in itertools.islice(combinations, R)]
    return torch.stack(queries, 1)[None].contiguous(), torch.stack(keys, 1)[None].contiguous()


def check(inputs: dict[str, Tensor], out: Tensor, rule: BlockRule, scale: float) -> dict[str, float]:
    """How far sampled rows are off: the output given the blocks that were chosen, and the best score that was passed over, relative to the worst that was taken."""
    from attnconvert.kernels.blocks.triton_select import triton_select_blocks

    q, k, v = (inputs[name] for name in "qkv")
    T, N = q.shape[1], -(-q.shape[1] // rule.block_size)
    position = torch.linspace(0, T - 1, SAMPLES, device=q.device).long()
    chosen = triton_select_blocks(q, k, rule=rule, scale=scale)[:, :, position]
    fine, coarse = reference.compressed_keys(k, rule)
    scores = reference.block_scores(q[:, position].float(), fine.float(), coarse.float(), position[None], N, rule, scale)
    block, own = torch.arange(N, device=q.device), (position // rule.block_size)[None, None, :, None]
    free = (block >= rule.num_init) & (block < own - rule.num_local)
    taken = scores.masked_fill(~(free & chosen), float("inf")).amin(-1)
    passed = scores.masked_fill(~(free & ~chosen), 0.0).amax(-1)
    forced = (block <= own) & ~free
    if not (chosen | ~forced).all() or (chosen & (block > own)).any():
        return {"output": float("nan"), "selection": float("nan")}
    wanted_count = torch.minimum(own + 1, torch.tensor(rule.num_blocks, device=q.device))
    miscounted = (chosen.sum(-1, keepdim=True) != wanted_count).any().item()
    seen = chosen.repeat_interleave(rule.block_size, -1)[..., :T] & (torch.arange(T, device=q.device) <= position[:, None])
    worst = 0.0
    for g in range(k.shape[2]):
        R = q.shape[2] // k.shape[2]
        heads = slice(g * R, (g + 1) * R)
        wanted = masked_attention(q[:, position, heads].float(), k[:, :, g : g + 1].float(), v[:, :, g : g + 1].float(), seen[:, g : g + 1], scale)
        worst = max(worst, relative_error(out[:, position, heads], wanted))
    return {"output": worst, "selection": float("nan") if miscounted else float((passed / taken - 1).clamp_min(0).max())}


def kernel_times(function: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel in one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            times[event.key[:60]] = round(times.get(event.key[:60], 0.0) + event.self_device_time_total, 1)
    return times


class Bench(PassRows):
    """A row for each operator, shape and kind of data."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, "bench_blocks")
        self.rule = BlockRule(32, 1, 2, 6, 0) if args.rehearse else RULE
        small = (Shape(1, 400, 4, 2, 16),)
        self.shapes = {ROWS["prefill"]: small if args.rehearse else PREFILL, ROWS["backward"]: small if args.rehearse else BACKWARD}
        for given, shown in ((args.model, "MODEL"), (args.text, "TEXT")):
            self.meta["command"] = self.meta["command"].replace(str(given), shown) if given else self.meta["command"]
        self.meta["rule"] = self.rule._asdict()
        longest = max(shape.T for name in args.only for shape in self.shapes[ROWS[name]])
        self.captured = capture(args.model, args.text, longest, self.device) if "model" in args.data else []

    def inputs(self, data: str, shape: Shape) -> dict[str, Tensor]:
        drawn = random_qkv(shape, self.device, torch.Generator(self.device).manual_seed(0))
        if data == "model":
            drawn["q"], drawn["k"] = paired(self.captured, shape)
        return drawn

    def row(self, name: str, impl: str, data: str, shape: Shape) -> dict[str, Any]:
        """What a row says before it is measured."""
        floor = floor_ms(name, shape, self.rule, self.ceilings)
        goal = GOALS_MS.get((shape.T, shape.G)) if name == ROWS["prefill"] and impl == "triton" else None
        return {"name": name, "impl": impl, "data": data, **asdict(shape), "floor_ms": floor, **({} if goal is None else {"goal_ms": goal})}

    def line(self, row: dict[str, Any]) -> str:
        took = "-" if row["ms"] is None else f"{row['ms']:9.3f} ms {row['ms'] / row['floor_ms']:6.2f} x floor"
        text = f"{row['name']:24s} {row['impl']:8s} {row['data']:6s} T={row['T']:<6d} H={row['H']} G={row['G']} {took} {row.get('note', '')}"
        return f"{text}\n     {row['kernel_us']} {row.get('errors')}" if "kernel_us" in row else text

    def compare(self) -> None:
        """Rivals' times beside ours, whatever the data."""
        for row in self.rows:
            if row["impl"] == "triton":
                row["rivals"] = {other["impl"]: other["ms"] for other in self.rivals_of(row, ("name", "B", "T", "H", "G", "D"))}

    def ours(self, name: str, data: str, shape: Shape) -> dict[str, Any]:
        inputs, scale = self.inputs(data, shape), shape.D**-0.5
        run = functools.partial(block_sparse_attention, **inputs, rule=self.rule, scale=scale, impl=self.impl)
        values: dict[str, Any] = {}
        if not self.args.rehearse:
            with torch.no_grad():
                values["errors"] = check(inputs, run(), self.rule, scale)
            if not (values["errors"]["output"] < OUTPUT_ERROR and values["errors"]["selection"] < SCORE_ERROR):
                return {"ms": None, "note": f"wrong, so not timed: {values['errors']}", **values}
        values |= self.timed(run, list(inputs.values()), name == ROWS["backward"])
        if not self.args.rehearse:
            again = forward_backward(run, list(inputs.values())) if name == ROWS["backward"] else torch.no_grad()(run)
            values["kernel_us"] = kernel_times(again)
        return values

    def nsa(self, shape: Shape) -> dict[str, Any]:
        from fla.ops.nsa import parallel_nsa

        inputs = self.inputs("random", shape)
        own = torch.arange(shape.T, device=self.device) // RULE.block_size
        drawn = (torch.rand(1, shape.T, shape.G, NSA_BLOCKS, device=self.device) * (own + 1)[:, None, None]).long()
        drawn[..., 0] = own[:, None]
        gate = torch.ones(1, shape.T, shape.H, device=self.device, dtype=inputs["q"].dtype)
        chosen = drawn.sort(-1).values
        forward = functools.partial(parallel_nsa, **inputs, g_slc=gate, block_indices=chosen, block_counts=NSA_BLOCKS, block_size=RULE.block_size)
        return {**self.timed(forward, list(inputs.values()), backward=False), "note": f"attention alone, to {NSA_BLOCKS} given blocks"}

    def rival(self, name: str, rival: str, shape: Shape) -> dict[str, Any]:
        return self.dense(rival, shape, self.inputs("random", shape), name == ROWS["backward"])

    def run(self) -> None:
        """Ours first, then the rivals, which know nothing of the data."""
        for part in self.args.only:
            name = ROWS[part]
            for shape in self.shapes[name]:
                for data in self.args.data:
                    self.guarded(self.row(name, "triton", data, shape), functools.partial(self.ours, name, data, shape))
        for part in self.args.only:
            name = ROWS[part]
            for shape in self.shapes[name]:
                for rival in self.args.rivals:
                    if rival == "fla-nsa":
                        if part == "prefill" and shape.H // shape.G == 16 and shape.T <= 32768:
                            self.guarded(self.row(name, rival, "random", shape), functools.partial(self.nsa, shape))
                    elif part == "prefill" or (rival != "fa3" and shape.T <= MAX_DENSE_TRAINING):
                        self.guarded(self.row(name, rival, "random", shape), functools.partial(self.rival, name, rival, shape))


def main() -> None:
    parser = arguments(__doc__, ("cudnn", "fa3", "fla-nsa"), budget=540.0)
    parser.add_argument("--model", type=Path, help="model with heads of 64, for the rows `model`")
    parser.add_argument("--text", type=Path, help="long documents, .jsonl with a key `text`")
    parser.add_argument("--only", type=names, default=list(ROWS))
    parser.add_argument("--data", type=names, default=["model", "random"])
    parser.add_argument("--seconds", type=float, default=0.1, help="repeats of one measurement")
    args = parser.parse_args()
    if "model" in args.data and (args.model is None or args.text is None):
        parser.error("rows of `model` need --model and --text; --data random goes without")
    bench = Bench(args)
    bench.run()
    bench.finish()


if __name__ == "__main__":
    main()
