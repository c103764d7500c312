"""Decode speed against KV heads, through a stock reload: 32 query heads, 32 -> 8, 4, 1 KV heads, one step at a context of 32768 tokens.

    python benchmarks/bench_regroup_decode.py --out benchmarks/results/gqa_decode_h100.json [--batch 8,32] [--context 32768] [--kv-heads 32,8,4,1] [--budget 80]
    python benchmarks/bench_regroup_decode.py --out FILE --tiny      a tiny model on the CPU, to rehearse the program

What the figures mean:

- The model has the shape of a 32-layer Llama of 7 B parameters, cut to 2 layers and as large a share of its vocabulary, so that weights and cache have the
  same share of the bytes. Its weights are random (speed does not depend on them), bf16. Heads are merged by attnconvert (`mean`), saved, and loaded by
  AutoModelForCausalLM in its stock class, from a config that says fewer KV heads and nothing else.
- `stock`: transformers as it comes, sdpa attention and a dynamic cache, which copies the cache at every step. (Its static cache needs a mask, with which
  its sdpa attention writes out one KV head per query head: what is saved would be lost again.)
- the other modes: the same model through transformers' AttentionInterface and a static cache that is full, so there is no mask; one CUDA graph of the
  model's own forward plus argmax. `grouped` lets SDPA share KV heads, `rows` hands it the query heads of a group as rows of one head; each with every
  backend. A mode whose logits differ from `stock`, or that its backend refuses, is left out and the row says so. The fastest one counts for engines.
- `of_kv_reduction`: speedup over the source divided by how many times fewer KV heads there are, 1 = all of it. `bytes_bound` is the same for a step that
  takes exactly as long as its bytes (weights and cache, each once).

Shapes: B batch, H query heads, G KV heads, S context, D head_dim.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_generate import capture, free, full_cache, no_mask, synchronize
from linearize import meta
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from attnconvert.surgery.regroup import check_architecture, find_freedom, install, regroup

GOAL = 0.8
STEPS, STOCK_STEPS = 64, 12
MAX_LOGIT_ERROR = 2e-2  # relative, bf16


def model_config(tiny: bool, context: int) -> LlamaConfig:
    """The shape measured."""
    size = (
        {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
        if tiny
        else {"vocab_size": 2000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    )
    heads = size["num_attention_heads"]
    return LlamaConfig(**size, num_hidden_layers=2, num_key_value_heads=heads, max_position_embeddings=context, bos_token_id=0, eos_token_id=None)


def saved(source: LlamaForCausalLM, heads: int, folder: Path, dtype: torch.dtype) -> Path:
    """A stock checkpoint of `source` with this many KV heads."""
    model = copy.deepcopy(source)
    if heads != model.config.num_key_value_heads:
        sites = check_architecture(model.config, [heads])
        install(model, regroup(model, sites, {}, find_freedom(model, sites), heads, "mean"))
    model.to(dtype).save_pretrained(folder / f"kv{heads}")
    return folder / f"kv{heads}"


# ---------------------------------------------------------------- attention of one step


def one_step(
    backend: SDPBackend,
    as_rows: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query position to a full cache. query [B, H, 1, D], key, value [B, G, S, D] -> ([B, 1, H, D], None)."""
    B, H, T, D = query.shape
    G = key.shape[1]
    assert T == 1, "a step is one token"
    with sdpa_kernel(backend):
        if as_rows:
            out = nn.functional.scaled_dot_product_attention(query.view(B, G, H // G, D), key, value, scale=scaling).reshape(B, H, 1, D)
        else:
            out = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=H != G)
    return out.transpose(1, 2).contiguous(), None


def modes(tiny: bool) -> list[str]:
    """Names under which transformers knows the attention functions; registers them. A name with `flash` in it would make transformers look for a package."""
    backends = (
        {"splitkv": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
        if tiny
        else {"cudnn": SDPBackend.CUDNN_ATTENTION, "splitkv": SDPBackend.FLASH_ATTENTION}
    )
    names = []
    for name, backend in backends.items():
        for form in ("grouped", "rows"):
            names.append(f"{form}_{name}")
            AttentionInterface.register(names[-1], partial(one_step, backend, form == "rows"))
            AttentionMaskInterface.register(names[-1], no_mask)
    return names


def step_of(model: Any, cache: Any, rows: int, context: int) -> Callable[[], Tensor]:
    """One token at the last position of `context`, the next one written over it. The function returns logits [B, 1, V]."""
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    position = torch.full((rows, 1), context - 1, dtype=torch.long, device=model.device)

    def step() -> Tensor:
        logits: Tensor = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True).logits
        tokens.copy_(logits.argmax(-1))
        return logits

    return step


def dynamic(model: Any, layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """The cache of transformers itself, holding the keys and values of each layer."""
    cache = DynamicCache(config=model.config)
    for idx, (keys, values) in enumerate(layers):
        cache.update(keys, values, idx)
    return cache


def random_layers(model: Any, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random keys and values, one layer at a time: at these sizes two copies of a cache do not fit."""
    config = model.config
    size = (rows, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for _ in range(config.num_hidden_layers):
        yield torch.empty(size, device=model.device, dtype=model.dtype).normal_(), torch.empty(size, device=model.device, dtype=model.dtype).normal_()


def check(model: Any, name: str, context: int) -> str | None:
    """Why a mode cannot be used; None when its logits are those of transformers as it comes."""
    full = full_cache(model.config, 2, min(context, 512), min(context, 512), model.device, model.dtype)
    model.set_attn_implementation("sdpa")
    before = ((layer.keys[:, :, :-1], layer.values[:, :, :-1]) for layer in full.layers)
    wanted = step_of(model, dynamic(model, before), 2, min(context, 512))().float()
    model.set_attn_implementation(name)
    try:
        found = step_of(model, full, 2, min(context, 512))().float()
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0][:120]}"
    error = float((found - wanted).norm() / wanted.norm())
    return None if error < MAX_LOGIT_ERROR else f"logits differ by {error:.1e}"


def seconds_of(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds of a call, the mean of `steps`."""
    run()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / steps


def measure(model: Any, names: list[str], rows: int, context: int) -> dict[str, Any]:
    """Seconds of a step in every mode."""
    device, found, notes = model.device, {}, {}
    on_cuda = device.type == "cuda"
    for name in names:
        why = check(model, name, context)
        if why is not None:
            notes[name] = why
            continue
        free(device)
        step = step_of(model, full_cache(model.config, rows, context, context, device, model.dtype), rows, context)
        try:
            found[name] = seconds_of(capture(step)[0] if on_cuda else step, STEPS if on_cuda else 2, device)
        except RuntimeError as error:
            notes[name] = f"refused: {str(error).splitlines()[0][:120]}"
        del step
    free(device)
    model.set_attn_implementation("sdpa")
    try:
        step = step_of(model, dynamic(model, random_layers(model, rows, context - STOCK_STEPS)), rows, context)
        found["stock"] = seconds_of(step, STOCK_STEPS if on_cuda else 2, device)
    except torch.OutOfMemoryError as error:
        notes["stock"] = f"refused: {str(error).splitlines()[0][:120]}"
    return {"seconds": found, "notes": notes}


# ---------------------------------------------------------------- the run


def bytes_of(model: Any, rows: int, context: int) -> tuple[int, int]:
    """Bytes of weights that a step reads, and of the cache."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    head_dim = config.hidden_size // config.num_attention_heads
    return weights, 2 * config.num_hidden_layers * rows * context * config.num_key_value_heads * head_dim * model.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", default="8,32")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--kv-heads", default="32,8,4,1", help="the source's first")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds after which no further row is begun")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        args.batch, args.context, args.kv_heads = "2,4", 256, "8,2,1"
    ends = time.monotonic() + args.budget
    device, dtype = (torch.device("cpu"), torch.float32) if args.tiny else (torch.device("cuda"), torch.bfloat16)
    shown = [a for i, a in enumerate(sys.argv[1:], 1) if a != "--out" and sys.argv[i - 1] != "--out"]
    facts = meta(f"python benchmarks/bench_regroup_decode.py --out FILE {shlex.join(shown)}".rstrip())
    names, rows = modes(args.tiny), []
    first: dict[tuple[int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        torch.manual_seed(0)
        with torch.device(device):
            source = LlamaForCausalLM(model_config(args.tiny, args.context)).eval()
        for heads in (int(n) for n in args.kv_heads.split(",")):
            folder = saved(source, heads, Path(temporary), dtype)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            assert type(model) is LlamaForCausalLM, "the checkpoint is a stock one"
            assert model.config.num_key_value_heads == heads, "its config says how many heads"
            for batch in (int(n) for n in args.batch.split(",")):
                if time.monotonic() > ends:
                    print(f"not measured: {heads} KV heads, batch {batch}: the time budget was spent", flush=True)
                    continue
                found = measure(model, names, batch, args.context)
                weights, cache = bytes_of(model, batch, args.context)
                fastest = min((name for name in found["seconds"] if name != "stock"), key=found["seconds"].__getitem__, default="stock")
                for mode in (mode for mode in dict.fromkeys((fastest, "stock")) if mode in found["seconds"]):
                    row = {
                        "name": "gqa.decode", "mode": "stock" if mode == "stock" else "full cache, CUDA graph", "attention": mode, "H": source.config.num_attention_heads, "G": heads,
                        "D": source.config.hidden_size // source.config.num_attention_heads, "B": batch, "T": args.context, "layers": source.config.num_hidden_layers,
                        "seconds_per_step": found["seconds"][mode], "tokens_per_second": batch / found["seconds"][mode], "weight_bytes": weights, "cache_bytes": cache,
                        "bytes_per_second": (weights + cache) / found["seconds"][mode], "all_seconds": found["seconds"], "notes": found["notes"],
                    }  # fmt: skip
                    base = first.setdefault((batch, row["mode"]), row)
                    fewer, speedup = base["G"] / heads, row["tokens_per_second"] / base["tokens_per_second"]
                    bound = (base["weight_bytes"] + base["cache_bytes"]) / (weights + cache)
                    row |= {"kv_reduction": fewer, "speedup": speedup, "of_kv_reduction": speedup / fewer, "bytes_bound": bound / fewer, "goal": GOAL}
                    rows.append(row)
                    print(json.dumps({k: v for k, v in row.items() if k not in ("all_seconds", "notes")}), flush=True)
                path = Path(args.out)
                path.with_suffix(".tmp").write_text(json.dumps({"meta": facts, "rows": rows}, indent=1) + "\n")
                os.replace(path.with_suffix(".tmp"), path)
            del model
            free(device)


if __name__ == "__main__":
    main()
