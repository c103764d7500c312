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
from cached_layers import assert_a_new_state_is_as_after_a_prefill, assert_steps_on_a_pool_are_those_of_the_batch
from conftest import make_model
from test_kernel_linear import KINDS, B, D, F, G, H, draw, options
from test_seam import HEDGEHOG, convert, padded

from attnconvert.kernels.linear.decode import linear_attention_step
from attnconvert.kernels.linear.reference import LinearState, empty_state, linear_attention, normalizer
from attnconvert.surgery.runtime.graph import DecodeGraph, graph_refusal
from attnconvert.surgery.runtime.seam import AttentionCore

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


def kernel_case(name):
    """Inputs of all tokens, options, document starts of rows of which the last begins with padding, and the state before the first step."""
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
    return x, settings, start, state


def kernel_against_pytorch(name):
    """Largest differences of outputs, kv and z; whether everything else of the two states is equal. Runs where Triton interprets."""
    rows, *_, half, kind, size, _, _, _, first, stop, _ = KERNEL_CASES[name]
    x, settings, start, state = kernel_case(name)
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


def rows_share_a_program(check, rows, *case):
    """What `check` finds where 4 state heads are enough for programs of two batch rows; their number."""
    from attnconvert.kernels.linear import triton_decode

    found = []
    constants = triton_decode._constants
    with (
        mock.patch.object(triton_decode, "TARGET_PROGRAMS", 1),
        mock.patch.object(triton_decode, "_constants", lambda *args, **kwargs: found.append(constants(*args, **kwargs)) or found[-1]),
        mock.patch.dict(KERNEL_CASES, {"rows": (rows, *case)}),
    ):
        triton_decode._plan.cache_clear()
        result = check("rows")
        triton_decode._plan.cache_clear()
    return result, {chosen["BATCH_ROWS"] for chosen, _ in found}


SHARING = {
    "recipe": (8, 4, 4, 32, 16, "block", 4, 2, "absolute", True, 6, 14, torch.float32),
    "LoLCATs": (4, 2, 4, 20, 5, "block", 4, 0, "window_max", False, 7, 14, torch.float32),
}


@pytest.mark.parametrize(("rows", "together"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("name", SHARING)
def test_batch_rows_that_share_a_program_equal_the_pytorch_step(interpreter, rows, together, name):
    (worst, kv, z, same), found = interpreter.submit(rows_share_a_program, kernel_against_pytorch, rows, *SHARING[name]).result()
    assert found == {together}
    assert worst < 5e-6
    assert max(kv, z) < 1e-5
    assert same


# ---------------------------------------------------------------- rows of a pool


def paged(state, slots, num_rows, page_bytes=0):
    """A pool with the rows of `state` in its rows `slots`. A row's tensors lie in one page, as serving engines have them; no other row holds a number."""
    sizes = [-(-t[0].nbytes // 64) * 64 for t in state]
    memory = torch.empty(num_rows, max(page_bytes, sum(sizes) + 64), dtype=torch.uint8, device=state[0].device)
    pool, at = [], 0
    for tensor, size in zip(state, sizes, strict=True):
        pool.append(memory[:, at : at + tensor[0].nbytes].view(tensor.dtype).view(num_rows, *tensor.shape[1:]))
        pool[-1].fill_(torch.nan if tensor.is_floating_point() else 10**6)
        pool[-1][slots[slots >= 0]] = tensor[slots >= 0]
        at += size
    return type(state)(*pool)


def close(a, b):
    """What two compilations of the same sums may differ in."""
    return torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2)


def difference_on_a_pool(step, state, first, stop, start=None, same=torch.equal, **page):
    """What differs when steps use rows of a pool, shuffled and one of several padding, from the same steps on those rows alone; None if nothing does.

    step: (n, state, start of the step [B, 1] or None, slots or None) -> output of step n. start: [B, T] or None.
    """
    B, device = len(state[0]), state[0].device
    slots = torch.randperm(B + 4, generator=torch.Generator().manual_seed(1))[:B].to(device)
    slots[1:2] = -1
    used = slots >= 0
    others = torch.ones(B + 4, dtype=torch.bool, device=device).index_fill(0, slots[used], False)
    pool = paged(state, slots, B + 4, **page)
    alone, before = type(state)(*(t.clone() for t in state)), [t[others].clone() for t in pool]
    for n in range(first, stop):
        here = None if start is None else (start[:, n : n + 1] - n).clamp(0, 1)
        want = step(n, alone, torch.where(used[:, None], 0 if here is None else here, 1), None)
        got = step(n, pool, here, slots)
        if not same(got, want) or got[~used].any():
            return f"output of step {n}"
    for name, ours, theirs, old in zip(state._fields, pool, alone, before, strict=True):
        if not same(ours[slots[used]], theirs[used]):
            return f"{name} of the rows"
        if not torch.equal(ours[others].view(torch.uint8), old.view(torch.uint8)):
            return f"{name} of other rows"
    return None


def kernel_on_a_pool(name, impl="triton", padded=False):
    """`difference_on_a_pool` of a kernel's case. Runs where Triton interprets."""
    x, settings, start, state = kernel_case(name)

    def step(n, state, start, slots):
        return linear_attention_step(**at(x, n), state=state, **settings, start=start, slots=slots, impl=impl)

    first, stop = KERNEL_CASES[name][-3:-1]
    return difference_on_a_pool(step, state, first, stop, start if padded else None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name, case in KERNEL_CASES.items() if case[0] > 1])
def test_pytorch_steps_on_rows_of_a_pool_equal_steps_on_these_rows_and_touch_no_other(name, padded):
    assert kernel_on_a_pool(name, "reference", padded) is None


@pytest.mark.parametrize(
    ("name", "padded"),
    [("a program per head and slice, blocks folding", False), ("LoLCATs: a state per query head, ring per key head", True), ("no linear branch", False)],
)
def test_the_kernel_on_rows_of_a_pool_equals_itself_on_these_rows_and_touches_no_other(interpreter, name, padded):
    assert interpreter.submit(kernel_on_a_pool, name, padded=padded).result() is None


def test_batch_rows_that_share_a_program_may_be_any_rows_of_a_pool(interpreter):
    case = (8, 4, 4, 32, 16, "block", 4, 2, "absolute", True, 7, 10, torch.float16)  # keys leave the window at position 8
    assert interpreter.submit(rows_share_a_program, kernel_on_a_pool, 4, *case).result() == (None, {2})


def compiled_on_a_pool():
    """Output and pool after a step that torch.compile made, which knows the kernel as an operator, and after the same step without it. Runs where Triton interprets."""
    x, settings, _, state = kernel_case("LoLCATs: a state per query head, ring per key head")
    slots, pools = torch.tensor([2, -1]), [LinearState(*(torch.cat([t, t]) for t in state)) for _ in "ab"]

    def step(pool):
        return linear_attention_step(**at(x, 7), state=pool, **settings, slots=slots, impl="triton")

    return [(run(pool), *pool) for run, pool in zip((torch.compile(step, fullgraph=True, backend="aot_eager"), step), pools, strict=True)]


def test_the_kernel_on_rows_of_a_pool_compiles_into_one_graph(interpreter):
    compiled, plain = interpreter.submit(compiled_on_a_pool).result()
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    assert plain[-1][:, 0, 0].tolist() == [7, 0, 8, 0]


def test_a_batch_of_nothing_but_padding_reads_and_writes_no_row():
    x = plain(1)
    pool = LinearState(*(torch.full_like(t, torch.nan if t.is_floating_point() else 10**6) for t in start_state(x, 2, 8, "block")))
    before = [t.clone() for t in pool]
    out = linear_attention_step(**x, state=pool, **options("block", 8, 2), slots=torch.tensor([-1, -1]), impl="reference")
    assert out.abs().max() == 0
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(pool, before, strict=True))


@pytest.mark.parametrize("slots", [torch.tensor([0]), torch.tensor([[0], [1]]), torch.tensor([0, 1], dtype=torch.int32)])
def test_slots_of_another_shape_are_refused(slots):
    x = plain(1)
    with pytest.raises(ValueError, match=r"which row of the pool each row of the batch uses: int64 \[2\]"):
        linear_attention_step(**x, state=start_state(x, 2, 8, "block"), **options("block", 8, 2), slots=slots)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("settings", [{}, {"gates": False, "sinks": 0, "window": {"kind": "sliding", "size": 0}}, {"linear": False, "gates": False}])
def test_a_new_state_has_the_tensors_that_a_prefill_leaves(settings):
    assert_a_new_state_is_as_after_a_prefill(convert(make_model("llama"), method="hedgehog", config={**HEDGEHOG, **settings}))


def test_a_core_whose_steps_use_no_pool_has_no_new_state_and_says_so():
    with pytest.raises(NotImplementedError, match="ExactAttention keeps no state that could be part of a pool"):
        next(m for m in convert(make_model("llama")).modules() if isinstance(m, AttentionCore)).new_state(2, 8, torch.float32, torch.device("cpu"))


def test_a_model_steps_on_rows_of_a_pool_as_on_its_own():
    assert_steps_on_a_pool_are_those_of_the_batch(convert(make_model("llama"), method="hedgehog", config=HEDGEHOG))


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


GPU_POOLS = {
    # rows, query heads, key heads, head_dim, F/2, window kind, first step, bytes of a page (0: no more than needed)
    "a row": (1, 32, 8, 128, 64, "block", 126, 0),
    "rows that share a program": (64, 32, 8, 128, 64, "block", 127, 0),
    "sliding": (8, 9, 3, 64, 64, "sliding", 100, 0),
    "more than 2^31 elements": (8, 8, 4, 64, 64, "block", 127, 2**30 + 4096),
}


def gpu_pool(name, steps):
    """A function for steps on the GPU, see `difference_on_a_pool`, and the state before the first."""
    rows, heads, key_heads, dim, half, kind, first, _ = GPU_POOLS[name]
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
    x = {n: r(rows, first + steps, h, dim).bfloat16() for n, h in (("q", heads), ("k", key_heads), ("v", key_heads))}
    x |= {"query_map": r(heads, dim, half) * dim**-0.5, "key_map": r(key_heads, dim, half) * dim**-0.5, "linear_log_weight": r(heads, 1)}
    x |= {"query_gate": r(heads, dim + 1), "key_gate": r(key_heads, dim + 1)}
    settings = options(kind, 64, 4)
    state = linear_attention(**at(x, 0, first), **settings, output_final_state=True).final_state

    def step(n, state, start, slots):
        return linear_attention_step(**at(x, n), state=state, **settings, start=start, slots=slots, impl="triton")

    return step, state


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in GPU_POOLS])
def test_on_a_gpu_the_kernel_on_rows_of_a_pool_equals_itself_on_these_rows(name):
    first, page_bytes = GPU_POOLS[name][-2:]
    step, state = gpu_pool(name, 4)  # of which one moves a block out of the window
    assert difference_on_a_pool(step, state, first, first + 4, same=close, page_bytes=page_bytes) is None


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("a row", "rows that share a program")])
def test_on_a_gpu_replays_of_a_graph_read_their_slots_anew(name):
    rows, first = GPU_POOLS[name][0], GPU_POOLS[name][-2]
    step, state = gpu_pool(name, 1)
    slots = torch.arange(rows, device="cuda")
    pool, plain, other = (paged(state, slots, rows + 4) for _ in range(3))
    step(first, other, None, slots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(first, pool, None, slots)
    for shift in range(3):
        slots.copy_(torch.arange(rows, device="cuda").roll(shift))
        slots[shift : shift + 1] = -1
        graph.replay()
        assert torch.equal(out, step(first, plain, None, slots))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(pool, plain, strict=True))


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
