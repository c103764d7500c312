"""The decode step against the operator it continues: every window, sinks, padding, prefills of any length, and no new storage.

Triton decides when it is imported whether it interprets, so the kernel's checks run in a process of their own.
"""

import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
from importlib import metadata
from unittest import mock

import pytest
import torch
from conftest import make_model
from test_kernel_linear import KINDS, B, D, F, G, H, draw, options
from test_seam import HEDGEHOG, convert, padded

from attnconvert.kernels.linear.decode import linear_attention_step
from attnconvert.kernels.linear.reference import LinearState, empty_state, linear_attention, normalizer
from attnconvert.surgery.runtime.graph import DecodeGraph, graph_refusal

CASES = [(*kind, linear) for kind in KINDS for linear in (True, False) if linear or kind[1]]


def plain(T, **settings):
    return {n: None if t is None else t.detach() for n, t in draw(T, **settings).items()}


def at(x, n, length=1):
    return {name: t[:, n : n + length] if name in "qkv" else t for name, t in x.items()}


def start_state(x, sinks, size, kind):
    heads = G if x["key_map"] is None else x["key_map"].shape[0]
    features = 0 if x["key_map"] is None else 2 * x["key_map"].shape[-1]
    return empty_state(x["q"], x["k"], num_sinks=sinks, window_size=size, kind=kind, num_features=features, state_heads=heads)


def steps(x, settings, state, first, stop, start=None):
    out = []
    for n in range(first, stop):
        here = None if start is None else (start[:, n : n + 1] - n).clamp(0, 1)
        out.append(linear_attention_step(**at(x, n), state=state, **settings, start=here, impl="reference"))
    return torch.cat(out, 1)


@pytest.mark.parametrize(("kind", "size", "sinks", "linear"), CASES)
@pytest.mark.parametrize(("heads", "reference"), [(G, "absolute"), (H, "window_max")])
@pytest.mark.parametrize("prefill", [0, 1, 9, 29])
def test_steps_after_any_prefill_equal_one_call_and_leave_the_same_state(kind, size, sinks, linear, heads, reference, prefill):
    T = 60
    x = plain(T, heads=heads, linear=linear)
    settings = options(kind, size, sinks, reference)
    start = torch.tensor([[0] * T, [6] * T])  # the second row is left-padded
    want, final = linear_attention(**x, **settings, start=start, output_final_state=True)
    if prefill:
        out, state = linear_attention(**at(x, 0, prefill), **settings, start=start[:, :prefill].clamp(max=prefill), output_final_state=True)
    else:
        out, state = want[:, :0], start_state(x, sinks, size, kind)
    got = torch.cat([out, steps(x, settings, state, prefill, T, start)], 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert state.lengths.unique(dim=-1).shape[-1] == 1
    assert state.length.tolist() == [T, T - 6]
    torch.testing.assert_close(state.kv, final.kv, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(normalizer(state, size, kind), normalizer(final, size, kind), rtol=1e-9, atol=1e-10)
    more = plain(21, heads=heads, linear=linear, seed=1)  # and the operator goes on from there
    more = {n: more[n] if n in "qkv" else t for n, t in x.items()}
    torch.testing.assert_close(
        linear_attention(**more, **settings, initial_state=state).output, linear_attention(**more, **settings, initial_state=final).output, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(("kind", "size"), [("block", 8), ("sliding", 8), ("sliding", 0)])
def test_300_fp32_steps_equal_a_prefill_of_300(kind, size, sinks):
    x = plain(300)
    settings = options(kind, size, sinks)
    want = linear_attention(**x, **settings).output
    narrow = {n: t.float() for n, t in x.items()}
    got = steps(narrow, settings, start_state(narrow, sinks, size, kind), 0, 300)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_step_keeps_every_tensor_of_the_state_where_it_is():
    x = plain(40)
    state = start_state(x, 2, 8, "block")
    before = [t.data_ptr() for t in state]
    steps(x, options("block", 8, 2), state, 0, 40)
    assert [t.data_ptr() for t in state] == before


def test_a_padding_token_leaves_the_state_of_its_row_alone_and_outputs_zero():
    x = plain(30)
    settings = options("sliding", 4, 2)
    state = linear_attention(**at(x, 0, 20), **settings, output_final_state=True).final_state
    before = LinearState(*(t.clone() for t in state))
    out = linear_attention_step(**at(x, 20), state=state, **settings, start=torch.tensor([[0], [1]]), impl="reference")
    assert out[1].abs().max() == 0
    assert out[0].abs().max() > 0
    assert all(torch.equal(a[1], b[1]) for a, b in zip(state, before, strict=True))
    assert state.length.tolist() == [21, 20]


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_extreme_logits_stay_finite_and_equal_the_operator(offset):
    x = {n: t.float() for n, t in plain(37, seed=4).items()}
    x["q"][..., 0], x["k"][..., 0] = 30.0, offset / (0.4 * 30.0)
    settings = options("block", 4, 2)
    got = steps(x, settings, start_state(x, 2, 4, "block"), 0, 37)
    torch.testing.assert_close(got, linear_attention(**x, **settings).output, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_a_step_is_refused():
    x = plain(4)
    state = start_state(x, 2, 8, "block")
    with pytest.raises(ValueError, match="one token a row, got 4"):
        linear_attention_step(**x, state=state, **options("block", 8, 2))
    with pytest.raises(ValueError, match="another batch size"):
        linear_attention_step(**at(x, 0), state=state, **options("block", 8, 3))
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*float64"):
        linear_attention_step(**at(x, 0), state=state, **options("block", 8, 2), impl="triton")


def test_the_pytorch_step_compiles_into_one_graph():
    x = {n: t.float() for n, t in plain(12).items()}
    settings = options("block", 4, 2)
    want = steps(x, settings, start_state(x, 2, 4, "block"), 0, 12)
    state = start_state(x, 2, 4, "block")
    step = torch.compile(lambda part, state: linear_attention_step(**part, state=state, **settings), fullgraph=True, backend="aot_eager")
    got = torch.cat([step(at(x, n), state) for n in range(12)], 1)
    torch.testing.assert_close(got, want)
    assert (B, D, F) == (2, 6, 5)


# ---------------------------------------------------------------- the kernel, interpreted


def version(package):
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


KERNEL_CASES = {
    # batch, query heads, key heads, state heads, head_dim, F/2, kind, window, sinks, reference, gates, first step, last step, dtype
    "a program per head and slice, blocks folding": (1, 4, 2, 2, 32, 16, "block", 4, 2, "absolute", True, 6, 18, torch.float32),
    "LoLCATs: a state per query head, ring per key head": (2, 4, 2, 4, 32, 8, "block", 4, 0, "window_max", False, 7, 14, torch.float32),
    "sliding, sizes that need masks, three heads a group": (2, 6, 2, 2, 20, 5, "sliding", 4, 2, "absolute", True, 3, 9, torch.float32),
    "no window, no sinks": (2, 4, 2, 2, 32, 16, "sliding", 0, 0, "absolute", True, 0, 4, torch.float32),
    "no window, sinks": (2, 4, 2, 2, 32, 16, "block", 0, 3, "absolute", True, 0, 6, torch.float32),
    "no linear branch": (2, 4, 2, 2, 32, 0, "block", 4, 2, "absolute", False, 0, 11, torch.float32),
    "many rows, fp16": (64, 4, 2, 2, 32, 16, "block", 16, 2, "absolute", True, 32, 33, torch.float16),
}


def kernel_against_pytorch(name):
    """Largest differences of outputs, kv and z; whether everything else of the two states is equal. Runs where Triton interprets."""
    rows, heads, key_heads, state_heads, dim, half, kind, size, sinks, reference, gates, first, stop, dtype = KERNEL_CASES[name]
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x = {n: r(rows, stop, h, dim).to(dtype) for n, h in (("q", heads), ("k", key_heads), ("v", key_heads))}
    x |= {"query_map": r(heads, dim, half) * dim**-0.5 if half else None, "key_map": r(state_heads, dim, half) * dim**-0.5 if half else None}
    x |= {"query_gate": r(heads, dim + 1) if gates else None, "key_gate": r(state_heads, dim + 1) if gates else None, "linear_log_weight": r(heads, 1)}
    settings = options(kind, size, sinks, reference)
    start = torch.zeros(rows, stop, dtype=torch.int64)
    start[-1] = first + 2 if rows > 1 else 0  # the last row begins with padding
    if first:
        state = linear_attention(**at(x, 0, first), **settings, start=start[:, :first].clamp(max=first), output_final_state=True).final_state
    else:
        state = empty_state(x["q"], x["k"], num_sinks=sinks, window_size=size, kind=kind, num_features=2 * half, state_heads=state_heads)
    states = {impl: LinearState(*(t.clone() for t in state)) for impl in ("reference", "triton")}
    worst = 0.0
    for n in range(first, stop):
        here = (start[:, n : n + 1] - n).clamp(0, 1) if rows > 1 else None
        a, b = (linear_attention_step(**at(x, n), state=states[impl], **settings, start=here, impl=impl) for impl in states)
        worst = max(worst, (a.float() - b.float()).abs().max().item())
    a, b = states.values()
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("k", "v", "sink_k", "sink_v", "lengths"))
    error = lambda p, q: ((p - q).abs().max() / p.abs().max().clamp_min(1)).item() if half else 0.0  # noqa: E731
    return worst, error(a.kv, b.kv), error(normalizer(a, size, kind), normalizer(b, size, kind)), same


@pytest.fixture(scope="module")
def interpreter():
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("Triton's interpreter of that age fails with this numpy")
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}),
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        yield pool


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernel_equals_the_pytorch_step_in_output_and_state(interpreter, name):
    worst, kv, z, same = interpreter.submit(kernel_against_pytorch, name).result()
    assert worst < (5e-6 if KERNEL_CASES[name][-1] == torch.float32 else 2e-3)
    assert max(kv, z) < 1e-5
    assert same


def rows_share_a_program(rows, *case):
    """`kernel_against_pytorch` where 4 state heads are enough for programs of two batch rows; their number."""
    from attnconvert.kernels.linear import triton_decode

    found = []
    constants = triton_decode._constants
    with (
        mock.patch.object(triton_decode, "TARGET_PROGRAMS", 1),
        mock.patch.object(triton_decode, "_constants", lambda *args, **kwargs: found.append(constants(*args, **kwargs)) or found[-1]),
        mock.patch.dict(KERNEL_CASES, {"rows": (rows, *case)}),
    ):
        triton_decode._plan.cache_clear()
        result = kernel_against_pytorch("rows")
        triton_decode._plan.cache_clear()
    return result, {chosen["BATCH_ROWS"] for chosen, _ in found}


@pytest.mark.parametrize(("rows", "together"), [(4, 2), (3, 1)])
@pytest.mark.parametrize(
    "case",
    [
        (8, 4, 4, 32, 16, "block", 4, 2, "absolute", True, 6, 14, torch.float32),
        (4, 2, 4, 20, 5, "block", 4, 0, "window_max", False, 7, 14, torch.float32),
    ],
    ids=["recipe", "LoLCATs"],
)
def test_batch_rows_that_share_a_program_equal_the_pytorch_step(interpreter, rows, together, case):
    (worst, kv, z, same), found = interpreter.submit(rows_share_a_program, rows, *case).result()
    assert found == {together}
    assert worst < 5e-6
    assert max(kv, z) < 1e-5
    assert same


# ---------------------------------------------------------------- whole models


def test_a_decode_step_of_a_model_keeps_the_cache_where_it_is_and_compiles_into_one_graph():
    student = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = student(ids, use_cache=False).logits
        cache = student(ids[:, :6], use_cache=True).past_key_values
        before = [t.data_ptr() for layer in cache.layers for t in layer.state.values()]
        step = torch.compile(student, fullgraph=True, backend="aot_eager")
        for n in range(6, 12):
            logits = step(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], want[:, n], rtol=1e-4, atol=2e-4)
    assert [t.data_ptr() for layer in cache.layers for t in layer.state.values()] == before
    assert cache.get_seq_length() == 12


def test_beams_are_reordered_in_place():
    student = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG)
    cache = student(torch.tensor([[5, 9, 3], [7, 2, 8]]), use_cache=True).past_key_values
    state = cache.layers[0].state
    before = {name: (t, t.data_ptr(), t.clone()) for name, t in state.items()}
    with torch.no_grad():
        cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].state is state
    for name, (tensor, address, old) in before.items():
        assert state[name] is tensor
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, old[[1, 1]])


def test_a_graph_is_refused_with_the_reason(monkeypatch):
    student = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG)
    assert graph_refusal(student, student.build_cache()) == "the model is on cpu"
    monkeypatch.setattr(type(student), "device", torch.device("cuda"))
    assert graph_refusal(student, student.build_cache()) is None
    assert graph_refusal(student, None) == "there is no cache"
    partly = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG, layers={0, 2})
    assert "1 of 3 layers are kept as softmax" in graph_refusal(partly, partly.build_cache())
    exact = convert(make_model("llama"))
    assert "ExactAttention changes the shape" in graph_refusal(exact, exact.build_cache())
    student.config.rope_parameters["rope_type"] = "dynamic"
    assert "dynamic rotary" in graph_refusal(student, student.build_cache())
    assert "training mode" in graph_refusal(partly.train(), student.build_cache())


def test_the_graph_runner_runs_plainly_what_it_cannot_replay():
    student = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG)
    ids, mask = padded()
    run = DecodeGraph(student)
    with torch.no_grad():
        cache = run(input_ids=ids, attention_mask=mask, use_cache=True, past_key_values=student.build_cache()).past_key_values
        want = run(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert run.num_replays == 0
    assert torch.isfinite(want).all()
    assert cache.get_seq_length() == ids.shape[1] + 1


@pytest.mark.parametrize("hidden", [["attnconvert", "triton"], ["attnconvert"]], ids=["without Triton", "with Triton"])
def test_a_checkpoint_decodes_in_a_bare_process_and_its_op_does_not_clash(hidden, tmp_path):
    student = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG)
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        student.save_pretrained(copy)
    ids, mask = padded()
    want = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
    code = (
        "import sys, json; sys.path[:], hidden, copies, ids, mask = json.loads(sys.argv[1]); sys.modules.update(dict.fromkeys(hidden))\n"
        "import torch, importlib; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids, mask = torch.tensor(ids), torch.tensor(mask)\n"
        "models = [AutoModelForCausalLM.from_pretrained(c, trust_remote_code=True).eval() for c in copies]\n"
        "print(json.dumps([m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist() for m in models]))\n"
        "if 'triton' not in hidden:\n"
        "    names = [importlib.import_module(type(m).__module__.rsplit('.', 1)[0] + '.attnconvert_linear_triton_decode').NAMESPACE for m in models]\n"
        "    assert len(set(names)) == 2 and 'attnconvert' not in names, names\n"
    )
    path = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps([path, hidden, [str(c) for c in copies], ids.tolist(), mask.tolist()])],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [want, want]
    assert (copies[0] / "attnconvert_linear_triton_decode.py").exists()


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)], ids=["cuda"])
def test_generate_replays_a_graph_and_writes_the_same_text(case, dtype, monkeypatch):
    student = convert(make_model("llama"), method="hedgehog", config=HEDGEHOG).to("cuda", dtype)
    runs = []
    monkeypatch.setattr(type(student), "get_compiled_call", lambda self, config: runs.append(DecodeGraph(self)) or runs[-1])
    ids, mask = (x.cuda() for x in padded())
    want = student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, disable_compile=True)
    got = student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, want)
    assert [run.num_replays for run in runs] == [38]  # 39 steps after the prefill, the first of them plain
