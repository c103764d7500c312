"""The cache of block-sparse attention against the operator on whole sequences: prefills, further turns and steps of any length, padding, growth.

Triton decides when it is imported whether it interprets, so the kernels' checks run in a process of their own.
"""

import itertools
from unittest import mock

import pytest
import torch
from test_decode import interpreter  # noqa: F401

from attnconvert.kernels.blocks.decode import BlockState, block_sparse_extend, block_sparse_step, fill, resized
from attnconvert.kernels.blocks.reference import block_sparse_attention, compressed_keys, select_blocks
from attnconvert.kernels.blocks.rule import BlockRule, capacity_for, state_bytes

B, G, R, D = 2, 2, 2, 6
PADS = 37  # the second row is left-padded
SCALE = 0.4
RULES = {
    # the first sparse position and the first window of every kind come before 300 tokens
    "compressed": BlockRule(32, 1, 1, 4, 0),
    "dense first": BlockRule(32, 1, 0, 4, 200),
    "dense for long": BlockRule(32, 0, 2, 3, 270),
    "nothing forced": BlockRule(32, 0, 0, 2, 0),
    "means": BlockRule(32, 1, 1, 4, 170, "mean"),
    "means, nothing forced": BlockRule(64, 0, 0, 2, 0, "mean"),
    "blocks of 64": BlockRule(64, 1, 1, 4, 0),
}
LARGE = {"blocks of 128": BlockRule(128, 1, 1, 4, 0), "means of 128": BlockRule(128, 0, 1, 3, 600, "mean")}
T = 300


def draw(tokens=T, dtype=torch.float64, seed=0, rows=B, heads=G * R, kv_heads=G, dim=D):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(rows, tokens, h, dim, generator=g, dtype=torch.float64).to(dtype) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))}


def starts(tokens=T):
    return torch.tensor([[0] * tokens, [PADS] * tokens])


def whole(x, rule, start=None):
    return block_sparse_attention(**x, rule=rule, scale=SCALE, start=start)


def part(x, at, length=1):
    return {n: t[:, at : at + length] for n, t in x.items()}


def prefill(x, length, rule, start=None, capacity=None):
    here = None if start is None or length == 0 else start[:, :length].clamp(max=length)
    return fill(x["k"][:, :length], x["v"][:, :length], rule, capacity or capacity_for(x["k"].shape[1]), here)


def step(x, n, state, rule, start=None, impl="reference"):
    here = None if start is None else (start[:, n : n + 1] - n).clamp(0, 1)
    return block_sparse_step(**part(x, n), state=state, rule=rule, scale=SCALE, start=here, impl=impl)


def copied(state, dtype=None):
    return BlockState(*(t.clone().to(dtype or t.dtype) for t in state[:4]), state.length.clone())


def close_states(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- decode = prefill


@pytest.mark.parametrize("first", [0, 131, 290])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_steps_after_any_prefill_equal_one_call_and_leave_the_same_state(name, padded, first):
    x, start, rule = draw(), starts() if padded else None, RULES[name]
    state = prefill(x, first, rule, start)
    got = torch.cat([step(x, n, state, rule, start) for n in range(first, T)], 1)
    begin = max(first, PADS) if padded else first  # before it the second row has padding
    torch.testing.assert_close(got[:, begin - first :], whole(x, rule, start)[:, begin:], rtol=1e-10, atol=1e-12)
    assert state.length.tolist() == [T, T - PADS * padded]
    close_states(state, prefill(x, T, rule, start))


@pytest.mark.parametrize("name", LARGE)
def test_steps_over_large_blocks_equal_one_call(name):
    x, rule = draw(910), LARGE[name]
    state = prefill(x, 500, rule)
    got = torch.cat([step(x, n, state, rule) for n in range(500, 910)], 1)
    torch.testing.assert_close(got, whole(x, rule)[:, 500:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["compressed", "means"])
def test_after_every_token_compressed_keys_are_those_of_all_keys_so_far(name):
    x, rule = draw(), RULES[name]
    state = prefill(x, 0, rule)
    for n in range(T):
        step(x, n, state, rule)
        wanted = compressed_keys(x["k"][:, : n + 1], rule)
        for means, want in zip((state.fine, state.coarse), wanted[: 1 + (rule.coarser > 1)], strict=False):
            torch.testing.assert_close(means[:, :, : want.shape[1]].transpose(1, 2), want, rtol=1e-12, atol=1e-14)
            assert not means[:, :, want.shape[1] :].any()


@pytest.mark.parametrize("name", ["compressed", "dense first", "means"])
def test_rows_of_unequal_length_some_dense_some_sparse_step_together(name):
    x, rule = draw(260, rows=3), RULES[name]
    start = torch.tensor([[0], [100], [230]]).expand(-1, 260)
    state = prefill(x, 240, rule, start)
    assert state.length.tolist() == [240, 140, 10]
    got = torch.cat([step(x, n, state, rule) for n in range(240, 260)], 1)
    torch.testing.assert_close(got, whole(x, rule, start)[:, 240:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1, 2), (10,), (3, 8, 100, 201), (31, 32, 64, 127, 128, 270), (299,)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["compressed", "dense first", "means"])
def test_any_split_of_a_sequence_equals_one_call_and_leaves_the_same_state(name, padded, cuts):
    x, start, rule = draw(), starts() if padded else None, RULES[name]
    out, state = [], prefill(x, 0, rule)
    for at, stop in itertools.pairwise((0, *cuts, T)):
        here = None if start is None else (start[:, at:stop] - at).clamp(0, stop - at)
        some, state = block_sparse_extend(**part(x, at, stop - at), state=state, rule=rule, scale=SCALE, start=here)
        assert torch.isfinite(some).all()
        out.append(some)
    got, want = torch.cat(out, 1), whole(x, rule, start)
    real = [got[0], got[1, PADS * padded :]], [want[0], want[1, PADS * padded :]]
    torch.testing.assert_close(*real, rtol=1e-10, atol=1e-12)
    close_states(state, prefill(x, T, rule, start))


def test_a_further_turn_of_many_tokens_is_attended_to_in_pieces():
    x, rule = draw(700), RULES["compressed"]
    out, _ = block_sparse_extend(**part(x, 100, 600), state=prefill(x, 100, rule), rule=rule, scale=SCALE)
    torch.testing.assert_close(out, whole(x, rule)[:, 100:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["compressed", "means"])
def test_further_tokens_have_the_gradients_of_one_call(name):
    x, rule = {n: t.requires_grad_() for n, t in draw(tokens=290).items()}, RULES[name]
    want = torch.autograd.grad(whole(x, rule)[:, 180:].square().sum(), list(x.values()))
    out, _ = block_sparse_extend(**part(x, 180, 110), state=prefill(x, 180, rule), rule=rule, scale=SCALE)
    for a, b in zip(torch.autograd.grad(out.square().sum(), list(x.values())), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["compressed", "means"])
def test_a_cache_that_grows_on_the_way_equals_one_of_the_planned_size(name):
    x, rule = draw(), RULES[name]
    state = prefill(x, 100, rule, capacity=128)
    out = []
    for n in range(100, T):
        state = resized(state, rule, capacity_for(n + 1))
        out.append(step(x, n, state, rule))
    torch.testing.assert_close(torch.cat(out, 1), whole(x, rule)[:, 100:], rtol=1e-10, atol=1e-12)
    close_states(state, prefill(x, T, rule))


def test_a_cache_that_is_large_enough_is_not_copied():
    x, rule = draw(), RULES["compressed"]
    state = prefill(x, 10, rule)
    assert resized(state, rule, 384) is state
    assert resized(state, rule, 128) is state
    assert resized(state, rule, 512).k.shape == (B, G, 512, D)


@pytest.mark.parametrize("name", RULES)
def test_a_cache_has_the_bytes_that_are_counted(name):
    state = prefill(draw(), T, RULES[name])
    assert sum(x.nbytes for x in state) == B * state_bytes(G, D, 8, T, RULES[name])


@pytest.mark.parametrize("name", ["compressed", "means", "blocks of 64"])
def test_every_tensor_of_a_cache_is_contiguous_however_it_was_made(name):
    x, rule = draw(384), RULES[name]
    states = [prefill(x, n, rule, start) for n in (0, 100, 384) for start in (None, starts(384))]
    states += [resized(s, rule, 512) for s in states] + [block_sparse_extend(**part(x, 0, 100), state=s, rule=rule, scale=SCALE)[1] for s in states[:2]]
    assert all(t.is_contiguous() for state in states for t in state)


def test_a_step_keeps_every_tensor_of_the_state_where_it_is():
    x, rule = draw(), RULES["compressed"]
    state = prefill(x, 100, rule)
    before = [t.data_ptr() for t in state]
    for n in range(100, 170):
        step(x, n, state, rule)
    assert [t.data_ptr() for t in state] == before


@pytest.mark.parametrize("full", [False, True])
def test_a_padding_token_leaves_the_state_of_its_row_alone_and_outputs_zero(full):
    x, rule = draw(257), RULES["compressed"]
    state = prefill(x, 255, rule, capacity=256)
    step(x, 255, state, rule, torch.tensor([[0] * 256, [0] * 256]) if full else torch.tensor([[256] * 256, [0] * 256]))
    before = copied(state)
    out = block_sparse_step(**part(x, 256), state=state, rule=rule, scale=SCALE, start=torch.tensor([[1 if full else 0], [1]]), impl="reference")
    assert out[1].abs().max() == 0
    assert (out[0].abs().max() > 0) != full
    assert all(torch.equal(a[int(not full) :], b[int(not full) :]) for a, b in zip(state, before, strict=True))
    assert state.length.tolist() == [256, 256]


def test_what_cannot_be_a_step_or_a_cache_is_refused():
    x, rule = draw(4), RULES["compressed"]
    state = prefill(x, 4, rule)
    options = {"rule": rule, "scale": SCALE}
    with pytest.raises(ValueError, match="one token a row, got 4"):
        block_sparse_step(**x, state=state, **options)
    with pytest.raises(ValueError, match="another batch size"):
        block_sparse_step(**{n: t[:1] for n, t in part(x, 0).items()}, state=state, **options)
    with pytest.raises(ValueError, match="another batch size, number of heads or rule"):
        block_sparse_step(**part(x, 0), state=state, rule=RULES["means"], scale=SCALE)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*float64"):
        block_sparse_step(**part(x, 0), state=state, **options, impl="triton")
    strided = state._replace(k=state.k.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="not contiguous"):
        block_sparse_step(**part(x, 0), state=strided, **options, impl="triton")
    for capacity in (0, 100):
        with pytest.raises(ValueError, match=f"a multiple of 128 tokens and at least so many, not for {capacity}"):
            prefill(x, 4, rule) and fill(x["k"], x["v"], rule, capacity)
    with pytest.raises(ValueError, match="a multiple of 128 tokens, not for 200"):
        resized(state, rule, 200)


def test_the_pytorch_step_compiles_into_one_graph():
    x, rule = draw(140, torch.float32), RULES["compressed"]
    state, other = prefill(x, 124, rule), prefill(x, 124, rule)
    run = torch.compile(lambda some, state: block_sparse_step(**some, state=state, rule=rule, scale=SCALE), fullgraph=True, backend="aot_eager")
    got = torch.cat([run(part(x, n), state) for n in range(124, 130)], 1)
    torch.testing.assert_close(got, torch.cat([step(x, n, other, rule) for n in range(124, 130)], 1))
    close_states(state, other, 1e-6)


# ---------------------------------------------------------------- the kernels, interpreted

half = torch.float16
KERNEL_CASES = {
    # batch, query heads, KV heads, head_dim, rule, first step, last step, blocks of a program, dtype
    "windows of every kind end": (2, 4, 2, 16, BlockRule(32, 1, 1, 4, 0), 254, 257, 2, torch.float32),
    "from the first token": (1, 2, 1, 16, BlockRule(32, 1, 1, 4, 0), 0, 3, 1, torch.float32),
    "the first windows": (1, 2, 1, 16, BlockRule(32, 1, 1, 4, 0), 31, 33, 1, torch.float32),
    "the first coarse window": (1, 3, 1, 16, BlockRule(32, 0, 0, 2, 0), 126, 129, 1, torch.float32),
    "the first choice": (1, 2, 1, 16, BlockRule(32, 1, 1, 4, 0), 126, 130, 4, torch.float32),
    "dense until then": (2, 2, 1, 16, BlockRule(32, 1, 1, 4, 250), 248, 251, 2, torch.float32),
    "nothing forced": (1, 2, 1, 16, BlockRule(32, 0, 0, 3, 0), 300, 302, 1, torch.float32),
    "more forced than seen": (1, 2, 1, 16, BlockRule(32, 2, 3, 4, 0), 300, 302, 2, torch.float32),
    "more first blocks than there are": (1, 2, 1, 16, BlockRule(32, 9, 1, 4, 0), 300, 302, 2, torch.float32),
    "seven heads a group, sizes that need masks": (2, 7, 1, 80, BlockRule(64, 1, 1, 4, 0), 414, 417, 4, torch.float32),
    "16 heads a group": (1, 32, 2, 64, BlockRule(64, 1, 1, 5, 0), 511, 513, 4, torch.float32),
    "a group of one, blocks of 128": (1, 2, 2, 128, BlockRule(128, 1, 1, 4, 0), 895, 897, 2, torch.float32),
    "head_dim 256": (1, 4, 1, 256, BlockRule(32, 1, 1, 4, 0), 255, 257, 2, torch.float32),
    "means": (2, 8, 2, 16, BlockRule(32, 0, 0, 3, 0, "mean"), 255, 257, 1, torch.float32),
    "means of 64": (1, 3, 1, 16, BlockRule(64, 1, 1, 4, 0, "mean"), 447, 449, 8, torch.float32),
    "means of 128, the first": (1, 2, 1, 16, BlockRule(128, 0, 0, 1, 0, "mean"), 127, 130, 1, torch.float32),
    "fp16": (3, 4, 2, 32, BlockRule(32, 1, 1, 4, 0), 286, 288, 2, half),  # the finished row's next token would have ended a window
    "several parts of everything": (1, 2, 1, 16, BlockRule(32, 1, 8, 40, 0), 4415, 4417, 3, torch.float32),
}


def kernel_against_pytorch(name):
    """Largest difference of outputs to steps in fp64 and of the states to theirs. Runs where Triton interprets."""
    from attnconvert.kernels.blocks import triton_decode

    rows, heads, kv_heads, dim, rule, first, stop, share, dtype = KERNEL_CASES[name]
    x = draw(stop, dtype, 0, rows, heads, kv_heads, dim)
    start = torch.zeros(rows, stop, dtype=torch.int64)
    start[-1] = first + 1 if rows > 1 else 0  # the last row begins with padding
    if rows > 2:
        start[1] = 200
    state = prefill(x, first, rule, start)
    ours, exact = copied(state), copied(state, torch.float64)
    worst = 0.0
    with mock.patch.object(triton_decode, "_share", return_value=share):
        for n in range(first, stop):
            there = (torch.arange(ours.k.shape[2]) < ours.length[:, None])[:, None, :, None]
            for slots in (ours.k, ours.v):  # what an empty slot holds must not matter
                slots.masked_fill_(~there, torch.nan)
            pad = (start[:, n : n + 1] - n).clamp(0, 1)
            pad[0] = int(rows > 1 and n == stop - 1)  # padding after tokens: a row that is finished
            options = {"rule": rule, "scale": SCALE, "start": pad if rows > 1 else None}
            got = block_sparse_step(**part(x, n), state=ours, **options, impl="triton")
            want = block_sparse_step(**{key: t.double() for key, t in part(x, n).items()}, state=exact, **options, impl="reference")
            worst = max(worst, (got - want).abs().nan_to_num(1e9).max().item())
    ours.k.nan_to_num_(0), ours.v.nan_to_num_(0)
    moved = max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, exact, strict=True) if a.numel())
    return worst, moved


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernels_equal_the_pytorch_step_in_output_and_state(interpreter, name):  # noqa: F811
    worst, moved = interpreter.submit(kernel_against_pytorch, name).result()
    assert worst < (2e-3 if KERNEL_CASES[name][-1] == half else 5e-6)
    assert moved < (2e-3 if KERNEL_CASES[name][-1] == half else 1e-6)


TIED = {
    # rule, positions, share
    "compressed": (BlockRule(32, 1, 1, 5, 0), (400, 447), 2),
    "nothing forced": (BlockRule(32, 0, 0, 3, 0), (416, 470), 3),
    "means": (BlockRule(32, 0, 1, 4, 0, "mean"), (351, 480), 1),
}


def seen_by_the_kernels(name, equal):
    """Blocks that the steps at the positions see, and those that the definition says. Values tell blocks apart: block b has 1 in column b."""
    from attnconvert.kernels.blocks import triton_decode

    rule, positions, share = TIED[name]
    g = torch.Generator().manual_seed(3)
    tokens, kinds = max(positions) + 1, torch.randint(-2, 3, (2, 16), generator=g).float()
    of_block = torch.arange(tokens) // rule.block_size
    k = kinds[of_block % 2][None, :, None] if equal else torch.zeros(1, tokens, 1, 16)  # many blocks have equal scores, or all have
    q = torch.randint(-2, 3, (1, tokens, 2, 16), generator=g).float()
    v = torch.nn.functional.one_hot(of_block, 16).float()[None, :, None]
    found, wanted = [], []
    with mock.patch.object(triton_decode, "_share", return_value=share):
        for n in positions:
            state = fill(k[:, :n], v[:, :n], rule, capacity_for(tokens))
            out = block_sparse_step(q[:, n : n + 1], k[:, n : n + 1], v[:, n : n + 1], state, rule=rule, scale=0.125, impl="triton")
            fine, coarse = compressed_keys(k[:, : n + 1], rule)
            found.append((out[0, 0, 0] > 0).tolist())
            wanted.append(select_blocks(q[:, n : n + 1], fine, coarse, torch.tensor([[n]]), 16, rule, 0.125)[0, 0, 0].tolist())
    return found, wanted


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_the_kernels_choose_the_blocks_of_the_definition_where_scores_are_equal(interpreter, name, equal):  # noqa: F811
    found, wanted = interpreter.submit(seen_by_the_kernels, name, equal).result()
    assert found == wanted
    assert all(sum(row) == TIED[name][0].num_blocks for row in found)


def outputs_of_capacities():
    """The same step with caches of several capacities. Runs where Triton interprets."""
    x, rule = draw(300, torch.float32, dim=16), RULES["compressed"]
    return [step(x, 290, prefill(x, 290, rule, capacity=capacity), rule, impl="triton") for capacity in (384, 1024, 9088)]


def test_no_bit_of_the_kernels_output_depends_on_the_capacity(interpreter):  # noqa: F811
    first, *others = interpreter.submit(outputs_of_capacities).result()
    assert all(torch.equal(first, other) for other in others)


def test_programs_fill_a_gpu_and_have_few_parts_to_add_up():
    kernels = pytest.importorskip("attnconvert.kernels.blocks.triton_decode")
    rule = BlockRule()
    shares = {case: kernels._share(*case, 128, rule) for case in ((1, 2, 16), (1, 8, 4), (8, 2, 16), (8, 8, 4), (64, 8, 4))}
    assert shares == {(1, 2, 16): 4, (1, 8, 4): 6, (8, 2, 16): 12, (8, 8, 4): 24, (64, 8, 4): 24}
    assert kernels._most_visible(2048, rule) == 128  # 8192 tokens that see everything
    assert kernels._most_visible(100, rule) == 100
    assert kernels._most_visible(2048, rule._replace(dense_len=0)) == 96
    assert kernels._most_visible(2048, BlockRule(64, 4, 32, 20, 0)) == 37


# ---------------------------------------------------------------- the kernels on a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU_CASES = {
    # batch, query heads, KV heads, head_dim, rule, tokens so far, dtype
    "32/2 heads, a long row": (1, 32, 2, 128, BlockRule(), 131_072 - 2, torch.bfloat16),
    "32/8 heads": (3, 32, 8, 128, BlockRule(), 20_029, torch.bfloat16),
    "dense and sparse rows": (3, 32, 8, 128, BlockRule(), 8_190, torch.bfloat16),
    "many rows": (64, 32, 8, 128, BlockRule(), 12_500, torch.bfloat16),
    "as many KV heads, blocks of 128": (2, 16, 16, 96, BlockRule(128, 1, 8, 24, 0), 9_213, torch.float16),
    "seven heads a group, blocks of 32": (2, 28, 4, 80, BlockRule(32, 1, 16, 64, 0), 9_000, torch.bfloat16),
    "means": (2, 32, 8, 128, BlockRule(128, 0, 0, 12, 0, "mean"), 10_238, torch.bfloat16),
    "means of 64, head_dim 64": (2, 9, 3, 64, BlockRule(64, 0, 1, 24, 0, "mean"), 10_238, torch.float16),
    "head_dim 256": (2, 8, 2, 256, BlockRule(64, 1, 8, 24, 0), 6_000, torch.bfloat16),
    "fp32": (2, 8, 2, 64, BlockRule(64, 1, 8, 24, 0), 6_013, torch.float32),
    "the first tokens": (4, 8, 8, 32, BlockRule(32, 1, 1, 4, 0), 30, torch.bfloat16),
}


def gpu_case(name, steps):
    """Tokens of `steps` steps and the state before them, rows of unequal length; the last of several rows begins with a padding token."""
    rows, heads, kv_heads, dim, rule, length, dtype = GPU_CASES[name]
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda tokens, h: torch.randn(rows, tokens, h, dim, generator=g, device="cuda").to(dtype)  # noqa: E731
    start = torch.arange(rows, device="cuda")[:, None].expand(-1, length)
    state = fill(r(length, kv_heads), r(length, kv_heads), rule, capacity_for(length + steps), start)
    x = {n: r(steps, h) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    pad = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    pad[-1] = int(rows > 1)
    return x, state, rule, dim**-0.5, pad


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in GPU_CASES])
def test_on_a_gpu_the_kernels_equal_an_fp32_step_and_write_the_same_state(name):
    x, state, rule, scale, pad = gpu_case(name, 4)
    ours, plain = copied(state), copied(state)
    for n in range(4):
        options = {"rule": rule, "scale": scale, "start": pad if n == 0 else None}
        exact = copied(plain, torch.float32)
        got = block_sparse_step(**part(x, n), state=ours, **options, impl="triton")
        want = block_sparse_step(**{key: t.float() for key, t in part(x, n).items()}, state=exact, **options, impl="reference")
        block_sparse_step(**part(x, n), state=plain, **options, impl="reference")
        assert (got.float() - want).norm() < (1e-4 if got.dtype == torch.float32 else 8e-3) * want.norm()
    close_states(ours, plain, 1e-5 if got.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("32/2 heads, a long row", "32/8 heads", "means")])
def test_on_a_gpu_replays_of_a_graph_equal_plain_steps_bit_for_bit(name):
    x, state, rule, scale, _ = gpu_case(name, 20)
    ours, plain, now = copied(state), copied(state), {n: t.clone() for n, t in part(x, 0).items()}

    def one(some, state):
        return block_sparse_step(**some, state=state, rule=rule, scale=scale, impl="triton")

    one(now, copied(state))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = one(now, ours)
    for n in range(20):
        for key, value in part(x, n).items():
            now[key].copy_(value)
        graph.replay()
        assert torch.equal(out, one(part(x, n), plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
