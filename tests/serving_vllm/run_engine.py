"""One vLLM engine in a process of its own: reads a request from a JSON file, writes what came out to another.

In: `model`, `options` of `vllm.LLM`, `requests` (prompt ids, tokens of the answer, and the step before which it arrives), `fault` or null.
Out: `answers` (token ids, in the order of the requests), `preemptions`, and `rows`, the most requests that were computed in one step.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it most of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where a fault can be planted
    "VLLM_NO_USAGE_STATS": "1",
}


def plant(fault: str | None) -> None:
    """Break the plug-in in one way, to see that the tests would notice."""
    from attnconvert.serving.vllm import pool

    if fault == "state not reset":
        pool.Chunk.is_first = property(lambda chunk: False)  # type: ignore[assignment, method-assign]
    elif fault == "state of a chunk lost":
        attend = pool.PooledState.attend

        def forgetful(self: Any, q: Any, k: Any, v: Any, batch: Any, scale: float, out: Any) -> None:
            before = {name: tensor.clone() for name, tensor in self.pool.items()}
            attend(self, q, k, v, batch, scale, out)
            for chunk in batch.chunks:
                if not chunk.is_first:
                    for name, tensor in self.pool.items():
                        tensor[chunk.row] = before[name][chunk.row]

        pool.PooledState.attend = forgetful  # type: ignore[method-assign]
    elif fault == "rows swapped":
        from attnconvert.serving.vllm import layers

        sort = layers.batch_of

        def swapped(*args: Any) -> Any:
            batch = sort(*args)
            return pool.Batch(batch.rows.flip(0), batch.chunks)

        layers.batch_of = swapped
    else:
        assert fault is None, fault


def run(task: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    from vllm import LLM, SamplingParams

    plant(task["fault"])
    llm = LLM(model=task["model"], disable_log_stats=False, **task["options"])
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    requests, answers, step, rows, preempted = task["requests"], {}, 0, 0, 0
    preempt = scheduler._preempt_request

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return preempt(*args, **options)

    scheduler._preempt_request = counted
    waiting = dict(enumerate(requests))
    while waiting or engine.has_unfinished_requests():
        for i in [i for i, request in waiting.items() if request["arrives"] <= step]:
            request = waiting.pop(i)
            sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
            engine.add_request(str(i), {"prompt_token_ids": request["prompt"]}, sampling)
        outputs = engine.step()
        rows = max(rows, len(scheduler.running))
        for output in outputs:
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
    return {"answers": [answers[i] for i in range(len(requests))], "preemptions": preempted, "rows": rows}


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    source, target = sys.argv[1:]
    with open(source) as file:
        task = json.load(file)
    found = run(task)
    with open(target, "w") as file:
        json.dump(found, file)
