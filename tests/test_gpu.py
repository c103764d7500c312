"""What only a GPU can show: compiled operators, bf16 autocast, training and merging on CUDA. `make test-gpu` runs this tier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_kernel_linear import STARTS, G, H, draw, options, oracle
from test_pipeline import Log, small

from attnconvert.convert import bench as benchmark
from attnconvert.convert.bench import bench
from attnconvert.convert.load import load_model
from attnconvert.convert.merge import merge
from attnconvert.convert.pipeline import RunOptions, load_converted, prepare, run
from attnconvert.kernels.linear.reference import linear_attention
from attnconvert.surgery.swap import swap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CASES = [("block", 8, 2, "absolute", G), ("block", 16, 0, "window_max", H), ("sliding", 8, 2, "absolute", G), ("sliding", 0, 0, "absolute", G)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("where", ["none", "packed"])
@pytest.mark.parametrize(("kind", "size", "sinks", "reference", "heads"), CASES)
def test_operator_on_cuda_equals_the_fp64_definition(kind, size, sinks, reference, heads, where, compiled):
    T = 200
    exact = draw(T, heads=heads)
    rounded = {name: t.detach().to("cuda", torch.float32).requires_grad_() for name, t in exact.items()}
    exact = {name: t.detach().double().cpu().requires_grad_() for name, t in rounded.items()}
    settings, start = options(kind, size, sinks, reference), STARTS[where](T)
    want = oracle(**exact, **settings, start=start)
    operator = torch.compile(linear_attention, dynamic=False) if compiled else linear_attention
    got = operator(**rounded, **settings, start=None if where == "none" else start.cuda()).output
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-5)
    probe = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((want * probe).sum(), list(exact.values()))
    found = torch.autograd.grad((got * probe.to("cuda", torch.float32)).sum(), list(rounded.values()))
    for name, a, b in zip(exact, found, wanted, strict=True):
        # Without a softmax branch the weight's gradient is 0, and only rounding is left.
        size = torch.linalg.norm(b)
        assert torch.linalg.norm(a.double().cpu() - b) <= (1e-4 * size if size > 1e-9 else 1e-4), name


def test_compiled_window_max_has_finite_gradients_where_logits_tie():
    """LoLCATs' form in bf16, with ties for the row's maximum: compiled amax once divided 0 by 0 here."""
    torch.manual_seed(0)
    operator = torch.compile(linear_attention, dynamic=False)
    heads, dim, rows = 9, 64, 1024
    q, k, v = (torch.randn(4, rows, n, dim, device="cuda", dtype=torch.bfloat16).mul_(2).round_().requires_grad_() for n in (heads, 3, 3))
    maps = {name: torch.eye(dim, device="cuda").repeat(heads, 1, 1).requires_grad_() for name in ("query_map", "key_map")}
    out = operator(q, k, v, **options("block", 64, 0, "window_max"), **maps, linear_log_weight=torch.full((heads, 1), 2.3, device="cuda")).output
    for grad in torch.autograd.grad(out.float().square().sum(), [q, k, v, *maps.values()]):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("recipe", ["hedgehog", "lolcats"])
def test_a_conversion_on_the_gpu_loses_little_and_reloads_on_the_cpu(recipe: str, tmp_path: Path) -> None:
    """Compiled layers, bf16 autocast; `run` itself checks parity and the reload in a fresh process."""
    log = Log()
    result = run(small(recipe), RunOptions(tmp_path / "out", device="cuda"), log)
    student = result.report.quality_of("student")
    assert student.kl.value < 3.0
    assert json.loads((tmp_path / "out" / "attnconvert" / "run.json").read_text())["status"] == "complete"
    ids = torch.randint(0, 4096, (1, 100), generator=torch.Generator().manual_seed(0))
    loaded: Any = load_converted(tmp_path / "out")
    with torch.no_grad():
        on_cpu = loaded(ids).logits.float()
        on_gpu = loaded.cuda()(ids.cuda()).logits.float().cpu()
    assert torch.nn.functional.kl_div(on_gpu.log_softmax(-1), on_cpu.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean() < 5e-3


def test_adapters_trained_on_the_gpu_merge_on_the_cpu_to_the_same_checkpoint(tmp_path: Path) -> None:
    prepared, options_ = small(), RunOptions(tmp_path / "full", device="cuda", skip_evaluation=True)
    run(prepared, options_, Log())
    full = load_file(tmp_path / "full" / "model.safetensors")
    run(prepared, replace(options_, out=tmp_path / "adapters", adapters_only=True), Log())
    merge(tmp_path / "adapters", tmp_path / "merged", base=None, device="cpu")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert full.keys() == merged.keys()
    # Two trainings on a GPU need not end with the same bits; the merge of either rounds to bf16 from nearly the same numbers.
    assert all(torch.allclose(full[name].float(), merged[name].float(), rtol=0.05, atol=1e-2) for name in full)


def test_bench_measures_memory_and_goes_on_after_running_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 GiB of GPU memory, 2048 rows of 256 tokens of the embedded model cannot fit; one row, and some batch of decoding rows, can."""
    monkeypatch.setattr(benchmark, "MAX_REPEATS", 3)
    prepared = prepare("demo", "hedgehog")
    loaded = load_model(prepared.source)
    swap(loaded.model, prepared.plan)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    benchmark._free(torch.device("cuda"))
    before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        result = bench(tmp_path / "model", against="demo", device="cuda", lengths=[64, 256], batch_sizes=[1, 2048], new_tokens=2, max_seconds=60.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    single = {(row["model"], row["phase"], row["length"]): row for row in result["rows"] if row["batch_size"] == 1}
    assert set(single) == {(model, phase, length) for model in ("teacher", "student") for phase in ("prefill", "decode") for length in (64, 256)}
    for (model, _, _), row in single.items():
        assert row["peak_memory_above_weights_bytes"] > row["cache_bytes"] / 2, row
        assert row["peak_memory_bytes"] == row["peak_memory_above_weights_bytes"] + result["weight_bytes"][model]
    assert {(stop["model"], stop["batch_size"], stop["reason"]) for stop in result["stopped"]} == {(m, 2048, "out of memory") for m in ("teacher", "student")}
    assert {row["model"] for row in result["largest_batch"]} == {"teacher", "student"}
    for row in result["largest_batch"]:
        assert row["length"] == 256
        assert 1 <= row["batch_size"] < 4096
        assert row["note"] == f"{2 * row['batch_size']} rows ran out of memory"
    benchmark._free(torch.device("cuda"))
    # cuBLAS keeps a workspace for the stream that decode steps are captured on, one for all of them
    assert torch.cuda.memory_allocated() <= before + 2**26, "what ran out of memory holds on to nothing"
