"""Prefill and decode of whole models, converted against softmax attention: tokens/s, peak memory, largest batch, by context length.

    python benchmarks/bench_generate.py --out FILE [--models smollm2-135m,llama-1.3b,llama-1.3b-gqa] [--only prefill,decode,largest,based] [--budget 400]
    python benchmarks/bench_generate.py --out FILE --tiny      a tiny model on the CPU, to rehearse the program

What the figures mean:

- Random weights (speed does not depend on them), bf16, the recipe `hedgehog` (or `--recipe`) in every layer, untrained. One model at a time is in memory, first with
  softmax attention, then converted in place, so a peak holds one model's weights.
- Decode of both is the model's own forward plus argmax, captured in one CUDA graph and replayed; a graph that could not be captured, or whose logits
  differ from uncaptured steps, is replaced by uncaptured steps and the row says so.
- The dense rival is stronger than transformers' static cache: its cache is full, so there is no mask and SDPA may take its fastest backend with grouped
  heads. Its cache holds random keys; the converted state comes from a short prompt. Neither changes the time.
- largest: the largest batch whose decode step fits, for a cache of the given context, and its throughput.
- based: 1024 tokens after a 16-token prompt at the batch of highest throughput (the setting of the BASED paper, arXiv 2402.18668). The dense step attends
  to the mean context while its cache is allocated in full, so its figure is the mean over a growing cache.

Shapes: B rows, T tokens, G key-value heads, D head_dim.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.metadata
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from attnconvert.convert.plan import build_plan
from attnconvert.recipes.load import load_recipe
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import swap

DENSE = "bench_dense"
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LENGTHS = (2048, 8192, 32768, 131072)
CONVERTED_PROMPT = 256  # tokens in the state before decoding: every part of it is in use
BASED_PROMPT, BASED_NEW = 16, 1024
BASED_BATCHES = (64, 128, 256, 320, 384, 512, 768, 1024, 1536, 2048)
WARMUPS = 3
ROOM = 300  # tokens that a test adds to a cache
REPLAYS = 128  # two block windows of 64, so keys that leave the window are in the mean
SLOW_STEP_S = 0.02  # a step longer than this is replayed once a window position only
MAX_LOGIT_ERROR = 2e-2  # of a captured step against an uncaptured one, relative
WORKSPACE_BYTES = 2 * 2**30  # left free beside weights and caches when the largest batch is guessed
LARGEST_TRIES = 5


def model_config(name: str) -> LlamaConfig:
    """Shapes of the models measured."""
    common = {"max_position_embeddings": 2 * max(LENGTHS), "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": None}
    if name == "tiny":
        return LlamaConfig(**common, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    if name == "smollm2-135m":
        return LlamaConfig(
            **common, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
        )
    groups = {"llama-1.3b": 32, "llama-1.3b-gqa": 8}[name]
    return LlamaConfig(
        **common, vocab_size=50304, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=groups
    )


# ---------------------------------------------------------------- the dense rival


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal SDPA without a mask. query [B, H, T, D], key, value [B, G, S, D], S = T or T = 1 -> ([B, T, H, D], None)."""
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Nothing is padded here, and causality is the attention function's job."""


AttentionInterface.register(DENSE, dense_attention)
AttentionMaskInterface.register(DENSE, no_mask)


class FullLayer(CacheLayerMixin):
    """A static cache at its last position: each step writes the last slot and attends to the last `visible` slots."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, visible: int):
        super().__init__()
        self.keys, self.values, self.visible, self.is_initialized = keys, values, visible, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a full cache is never empty")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys[:, :, -self.visible :], self.values[:, :, -self.visible :]

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    def get_max_cache_shape(self) -> int:
        return int(self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0


def full_cache(config: LlamaConfig, rows: int, context: int, visible: int, device: torch.device, dtype: torch.dtype) -> Cache:
    """Random keys and values for `context` tokens in all."""
    size = (rows, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    return Cache(
        layers=[
            FullLayer(torch.empty(size, device=device, dtype=dtype).normal_(), torch.empty(size, device=device, dtype=dtype).normal_(), visible)
            for _ in range(config.num_hidden_layers)
        ]
    )


# ---------------------------------------------------------------- contestants


class Contestant:
    """A model on the device; `kind` is dense or converted."""

    def __init__(self, kind: str, name: str, model: Any, config: LlamaConfig):
        self.kind, self.name, self.model, self.config = kind, name, model, config
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.graph_refused: str | None = None

    def empty_cache(self, capacity: int) -> Any:
        return DynamicCache(config=self.config) if self.kind == "dense" else self.model.build_cache(capacity)

    def prefill(self, ids: Tensor, capacity: int | None = None) -> tuple[Tensor, Any]:
        """Logits of the last token [B, 1, V] and the cache, with room for `capacity` tokens. ids [B, T]."""
        out = self.model(input_ids=ids, past_key_values=self.empty_cache(capacity or ids.shape[1]), use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def decode_cache(self, rows: int, context: int, visible: int | None = None) -> Any:
        """A cache of `context` tokens for `rows` rows. `visible`: how many of them a dense step attends to, None = all."""
        if self.kind == "dense":
            return full_cache(self.config, rows, context, visible or context, self.device, self.dtype)
        ids = torch.randint(0, self.config.vocab_size, (1, min(context, CONVERTED_PROMPT)), device=self.device)
        cache = self.prefill(ids, context + ROOM)[1]
        for layer in cache.layers:
            if "length" in layer.state:  # a cache that grows with the context: which token a slot holds follows from the length, and zeros cost what keys do
                layer.state["length"].fill_(context - 1)
                layer.num_tokens = context - 1
        cache.batch_repeat_interleave(rows)
        return cache

    def step(self, cache: Any, tokens: Tensor, position: Tensor) -> Tensor:
        """One token: tokens and position [B, 1] are replaced by the next ones; returns the logits [B, 1, V]."""
        logits: Tensor = self.model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True).logits
        tokens.copy_(logits.argmax(-1))
        position.add_(1)
        return logits


@contextmanager
def no_garbage() -> Iterator[None]:
    """A collection inside a graph capture would free tensors of other pools."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Warm up and capture a step; returns the replay and the tensor that its result is written to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a graph allocates from a pool of its own
    graph = torch.cuda.CUDAGraph()
    with no_garbage(), torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def check_graph(who: Contestant) -> dict[str, Any]:
    """Whether captured steps give the logits of uncaptured ones, over more steps than a block window; else why not."""
    rows, context, num_steps = 2, 100, 80
    generator = torch.Generator(who.device).manual_seed(0)
    forced = torch.randint(0, who.config.vocab_size, (num_steps, rows, 1), device=who.device, generator=generator)
    cache = who.decode_cache(rows, context)
    other = copy.deepcopy(cache)

    def buffers() -> tuple[Tensor, Tensor]:
        return torch.zeros(rows, 1, dtype=torch.long, device=who.device), torch.full((rows, 1), context, dtype=torch.long, device=who.device)

    tokens, position = buffers()
    wanted = []
    for t in range(-WARMUPS, num_steps):
        if t >= 0:
            tokens.copy_(forced[t])
        logits = who.step(cache, tokens, position)
        if t >= 0:
            wanted.append(logits.float().clone())
    tokens, position = buffers()
    try:
        replay, result = capture(lambda: who.step(other, tokens, position))
    except Exception as error:
        torch.cuda.synchronize()
        who.graph_refused = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return {"captured": False, "note": who.graph_refused}
    worst = 0.0
    for t in range(num_steps):
        tokens.copy_(forced[t])
        replay()
        worst = max(worst, float((result.float() - wanted[t]).norm() / wanted[t].norm()))
    if not worst < MAX_LOGIT_ERROR:
        who.graph_refused = f"captured steps differ from uncaptured ones by {worst:.1e}"
    return {"captured": who.graph_refused is None, "relative_error": worst, **({"note": who.graph_refused} if who.graph_refused else {})}


def time_steps(who: Contestant, cache: Any, rows: int, context: int, max_seconds: float) -> dict[str, Any]:
    """Seconds of one decode step and how it was run."""
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=who.device)
    position = torch.full((rows, 1), context - 1, dtype=torch.long, device=who.device)

    def step() -> Tensor:
        return who.step(cache, tokens, position)

    note = who.graph_refused
    run: Callable[[], Any] = step
    if who.device.type == "cuda" and note is None:
        run, _ = capture(step)
    began = time.perf_counter()
    run()
    synchronize(who.device)
    seconds = time.perf_counter() - began
    repeats = REPLAYS if seconds < SLOW_STEP_S else REPLAYS // 2
    if who.device.type != "cuda" or note is not None or repeats * seconds > max_seconds:
        repeats = max(2, min(REPLAYS // 2, int(max_seconds / max(seconds, 1e-6) / 4)))
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(who.device)
    seconds = (time.perf_counter() - began) / repeats
    return {"seconds_per_step": seconds, "tokens_per_second": rows / seconds, "graph": run is not step, **({"note": note} if note else {})}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        yield from state.values() if state else (layer.keys, layer.values)


# ---------------------------------------------------------------- the run


class Bench:
    """Rows so far; written after each one."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.dtype = torch.float32 if args.tiny else torch.bfloat16
        self.rows: list[dict[str, Any]] = []
        self.meta = meta()
        self.deadline = 0.0

    def add(self, name: str, who: Contestant, **values: Any) -> None:
        self.rows.append({"name": name, "model": who.name, "attention": who.kind, **values})
        print(json.dumps(self.rows[-1]), flush=True)
        path = Path(self.args.out)
        path.with_suffix(".tmp").write_text(json.dumps({"meta": self.meta, "rows": self.rows}, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)

    def guarded(self, name: str, who: Contestant, cell: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Measure one cell; whatever it raises becomes the row's note. Returns the values, None without any."""
        if time.monotonic() > self.deadline:
            self.add(name, who, **cell, note="not measured: the time budget was spent")
            return None
        free(self.device)
        try:
            with torch.no_grad():
                values = work()
        except Exception as error:  # out of memory is a result, and one cell must not cost the others
            self.add(name, who, **cell, note=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}")
            return None
        finally:
            free(self.device)
        self.add(name, who, **{**cell, **values})
        return values

    def prefill(self, who: Contestant, length: int) -> dict[str, Any]:
        ids = torch.randint(0, who.config.vocab_size, (1, length), device=self.device)
        times: list[float] = []
        while len(times) < 2 or (len(times) < 6 and sum(times[1:]) < self.args.cell_seconds / 2):
            began = time.perf_counter()
            result = who.prefill(ids)
            synchronize(self.device)
            times.append(time.perf_counter() - began)
            del result
        times = times[1:]  # the first pass compiles, and longer contexts may take kernels that shorter ones do not
        seconds = statistics.median(times)
        return {"seconds": seconds, "tokens_per_second": length / seconds, "repeats": len(times), "bytes_peak": peak(self.device)}

    def decode(self, who: Contestant, rows: int, context: int, visible: int | None = None) -> dict[str, Any]:
        cache = who.decode_cache(rows, context, visible)
        num_bytes = sum(x.numel() * x.element_size() for x in cache_tensors(cache))
        found = time_steps(who, cache, rows, context, self.args.cell_seconds)
        return {**found, "bytes_cache": num_bytes, "bytes_peak": peak(self.device)}

    def largest(self, who: Contestant, context: int, bytes_per_row: float) -> dict[str, Any]:
        """Guess from the bytes of a row, then shrink until it fits."""
        room = torch.cuda.mem_get_info()[0] - WORKSPACE_BYTES if self.device.type == "cuda" else 4 * bytes_per_row
        rows = max(1, int(room / bytes_per_row))
        reason = ""
        for _ in range(LARGEST_TRIES):
            try:
                return {"B": rows, **self.decode(who, rows, context)}
            except RuntimeError as error:  # out of memory, which inside a capture has other names
                reason = str(error).strip().partition("\n")[0][:100]
            free(self.device)  # outside the handler, which would keep the frames alive
            rows = max(1, int(rows * 0.85))
        raise RuntimeError(f"did not fit: {reason}")

    def based(self, who: Contestant) -> None:
        """Doubling batches until memory ends or throughput stops growing."""
        total = BASED_PROMPT + BASED_NEW
        best = 0.0
        for rows in (2, 4) if self.args.tiny else BASED_BATCHES:
            cell = {"B": rows, "prompt": BASED_PROMPT, "new_tokens": BASED_NEW}
            found = self.guarded("generate.based", who, cell, lambda rows=rows: self.decode(who, rows, total, BASED_PROMPT + BASED_NEW // 2))  # type: ignore[misc]
            if found is None or found["tokens_per_second"] < 1.03 * best:
                break
            best = found["tokens_per_second"]

    def contestant(self, who: Contestant, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        lengths = (64, 200) if self.args.tiny else self.args.lengths
        only = self.args.only
        if self.device.type == "cuda":
            self.guarded("generate.check", who, {}, lambda: check_graph(who))
        bytes_per_row: dict[int, float] = {}
        for length in lengths:
            if "prefill" in only:
                self.guarded("generate.prefill", who, {"B": 1, "T": length}, lambda length=length: self.prefill(who, length))  # type: ignore[misc]
            if "decode" in only or "largest" in only:
                found = self.guarded("generate.decode", who, {"B": 1, "T": length}, lambda length=length: self.decode(who, 1, length))  # type: ignore[misc]
                if found is not None:
                    bytes_per_row[length] = found["bytes_cache"] * 1.02  # a row's activations are small beside its cache
        if "based" in only:
            self.based(who)
        if "largest" in only:
            for length, per_row in bytes_per_row.items():
                self.guarded("generate.largest", who, {"T": length}, lambda length=length, per_row=per_row: self.largest(who, length, per_row))  # type: ignore[misc]

    def run(self) -> None:
        names = ["tiny"] if self.args.tiny else self.args.models
        share = self.args.budget / len(names) / 2
        for name in names:
            config = model_config(name)
            torch.manual_seed(0)
            with self.device:
                model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=DENSE, dtype=self.dtype).eval()
            if self.args.compile:
                for layer in model.model.layers:
                    for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                        part.compile(dynamic=True)
            self.contestant(Contestant("dense", name, model, config), share)
            swap(model, build_plan(load_recipe(self.args.recipe, self.args.set).recipe, model.config, find_sites(model.config)))
            self.contestant(Contestant("converted", name, model, config), share)
            del model
            free(self.device)


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Converted against dense, cell by cell."""
    print(f"\n{'model':16s} {'row':18s} {'cell':22s} {'dense':>12s} {'converted':>12s} {'ratio':>7s}   tokens/s")
    done = [r for r in rows if "tokens_per_second" in r and r["name"] in ("generate.prefill", "generate.decode", "generate.largest")]
    for row in done:
        if row["attention"] != "dense":
            continue
        same = [r for r in done if r["attention"] == "converted" and all(r[x] == row[x] for x in ("name", "model", "T"))]
        for other in same:
            batch = f"B={row['B']}" if row["B"] == other["B"] else f"B={row['B']} and {other['B']}"
            cell = f"T={row['T']} {batch}"
            a, b = row["tokens_per_second"], other["tokens_per_second"]
            print(f"{row['model']:16s} {row['name']:18s} {cell:22s} {a:12.0f} {b:12.0f} {b / a:7.2f}")
    for model in dict.fromkeys(r["model"] for r in rows):
        best = {}
        for kind in ("dense", "converted"):
            cells = [r for r in rows if r["name"] == "generate.based" and r["model"] == model and r["attention"] == kind and "tokens_per_second" in r]
            if cells:
                best[kind] = max(cells, key=lambda r: r["tokens_per_second"])
        if len(best) == 2:
            a, b = best["dense"], best["converted"]
            print(
                f"{model}: {BASED_NEW} tokens at the best batch: dense {a['tokens_per_second']:.0f} (B={a['B']}), converted {b['tokens_per_second']:.0f} (B={b['B']}), x{b['tokens_per_second'] / a['tokens_per_second']:.2f}"
            )


def meta() -> dict[str, Any]:
    """Where the figures come from."""
    shown = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--out" and sys.argv[i - 1] != "--out"]
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    command = " ".join(["python benchmarks/bench_generate.py --out FILE", shlex.join(shown)]).strip()
    return {"command": command, "device": device, "date": datetime.date.today().isoformat(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return [x for x in text.split(",") if x]

    parser.add_argument("--out", required=True)
    parser.add_argument("--models", type=names, default=["smollm2-135m", "llama-1.3b", "llama-1.3b-gqa"])
    parser.add_argument("--only", type=names, default=["prefill", "decode", "based", "largest"])
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in names(text)], default=list(LENGTHS))
    parser.add_argument("--recipe", default="hedgehog")
    parser.add_argument("--set", action="append", default=[], help="recipe override, as for attnconvert")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds for everything; each model gets an equal share, half of it dense")
    parser.add_argument("--cell-seconds", type=float, default=4.0, help="seconds of repeats in one cell")
    parser.add_argument("--compile", action="store_true", help="torch.compile for MLP and norms of both")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    began = time.monotonic()
    bench.run()
    print_summary(bench.rows)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
