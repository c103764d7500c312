"""The ragged cache of attention spans against the operator on whole sequences: prefills, further turns and steps of any length, padding, growth.

Triton decides when it is imported whether it interprets, so the kernel's checks run in a process of their own.
"""

import itertools
from unittest import mock

import pytest
import torch
from test_decode import close, difference_on_a_pool, interpreter, paged  # noqa: F401

from attnconvert.kernels.span.decode import SpanState, fill, resized, span_attention_extend, span_attention_step, span_layout
from attnconvert.kernels.span.reference import BETA_ONE, span_attention, visible, window
from attnconvert.kernels.span.slots import SLOT_MULTIPLE, fixed_point, ring_size, visible_keys, visible_pairs, window_at

B, T, R, D = 2, 150, 2, 6
RULES = ((5, 0.0), (-20, 0.5), (0, 1.0), (3, 0.25), (0, 0.0), (80, 0.0))  # a ring of 64 turns over twice in 150 tokens
G = len(RULES)
ALPHAS, BETAS = tuple(a for a, _ in RULES), tuple(fixed_point(b) for _, b in RULES)
LEASTS = (1, 9, 1, 12, 1, 30)  # the second and fourth rule begin with a window of their own
PADS = 7  # the second row is left-padded
SCALE = 0.4


def draw(tokens=T, dtype=torch.float64, seed=0, rows=B):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(rows, tokens, h, D, generator=g, dtype=torch.float64).to(dtype) for n, h in (("q", G * R), ("k", G), ("v", G))}


def starts(tokens=T):
    return torch.tensor([[0] * tokens, [PADS] * tokens])


def whole(x, sinks, start):
    rules = {"alpha": torch.tensor(ALPHAS), "beta": torch.tensor(BETAS), "least": torch.tensor(LEASTS)}
    return span_attention(**x, **rules, num_sinks=sinks, scale=SCALE, start=start)


def part(x, at, length=1):
    return {n: t[:, at : at + length] for n, t in x.items()}


def layout_of(sinks, capacity, alphas=ALPHAS, betas=BETAS, leasts=LEASTS):
    return span_layout(alphas, betas, leasts, sinks, capacity, torch.device("cpu"))


def prefill(x, length, sinks, capacity, start=None):
    layout = layout_of(sinks, capacity)
    return fill(x["k"][:, :length], x["v"][:, :length], layout, None if start is None else start[:, :length].clamp(max=length)), layout


def steps(x, state, layout, first, stop, start=None, impl="reference"):
    out = []
    for n in range(first, stop):
        here = None if start is None else (start[:, n : n + 1] - n).clamp(0, 1)
        out.append(span_attention_step(**part(x, n), state=state, layout=layout, scale=SCALE, start=here, impl=impl))
    return torch.cat(out, 1)


def real(x, start=None):
    """Rows of tokens that are not padding."""
    return x if start is None else torch.cat([x[0], x[1, PADS:]])


def same_state(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- slots


@pytest.mark.parametrize("least", [1, 7, 100])
@pytest.mark.parametrize("sinks", [0, 3, 64])
def test_counts_in_plain_integers_are_what_the_definition_shows(sinks, least):
    position = torch.arange(300)
    for (alpha, _), beta in zip((*RULES, (1000, 0.1), (-1000, 0.9), (-5, 1.0)), (*BETAS, 6553, 58982, BETA_ONE), strict=True):
        seen = visible(position[:, None], position[None], torch.tensor(alpha), torch.tensor(beta), sinks, torch.tensor(least)).sum(1)
        assert [window_at(n, alpha, beta, least) for n in range(300)] == window(position, torch.tensor(alpha), torch.tensor(beta), least).tolist()
        assert [visible_keys(n, alpha, beta, sinks, least) for n in range(300)] == seen.tolist()
        for length in (0, 1, 2, 40, 65, 300):
            assert visible_pairs(alpha, beta, sinks, length, least) == seen[:length].sum().item()
            ring, needed = ring_size(alpha, beta, sinks, length, least), seen[length - 1].item() - min(sinks, length) if length else 0
            assert ring % SLOT_MULTIPLE == 0
            assert needed <= ring < needed + SLOT_MULTIPLE


def test_a_cache_has_the_slots_of_its_rules_and_no_more():
    state, layout = prefill(draw(), T, 4, 1000)
    assert layout.rings == (64, 512, 1024, 256, 64, 128)
    assert state.k.shape == state.v.shape == (B, sum(layout.rings) + 4 * G, D)
    assert layout_of(64, 50).rings == (0,) * G


# ---------------------------------------------------------------- decode = prefill


@pytest.mark.parametrize("capacity", [T, 1000])
@pytest.mark.parametrize("sinks", [0, 3, 70])
@pytest.mark.parametrize("first", [1, 60, 141])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_after_any_prefill_equal_one_call_and_leave_the_same_state(capacity, sinks, first, padded):
    x, start = draw(), starts() if padded else None
    state, layout = prefill(x, first, sinks, capacity, start)
    got = steps(x, state, layout, first, T, start)
    begin = max(first, PADS) if padded else first  # before it the second row has padding
    torch.testing.assert_close(got[:, begin - first :], whole(x, sinks, start)[:, begin:], rtol=1e-10, atol=1e-12)
    assert state.length.tolist() == [T, T - PADS * padded]
    same_state(state, fill(x["k"], x["v"], layout, start))


@pytest.mark.parametrize("cuts", [(1, 2), (10,), (3, 8, 100), (5, 6, 7, 64, 128), (149,)])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_any_split_of_a_sequence_equals_one_call_and_leaves_the_same_state(cuts, sinks, padded):
    x, start = draw(), starts() if padded else None
    want, layout = whole(x, sinks, start), layout_of(sinks, T)
    out, state = [], SpanState(*(torch.zeros(B, layout.num_slots, D, dtype=torch.float64) for _ in "kv"), torch.zeros(B, dtype=torch.int64))
    for at, stop in itertools.pairwise((0, *cuts, T)):
        here = None if start is None else (start[:, at:stop] - at).clamp(0, stop - at)
        some, state = span_attention_extend(**part(x, at, stop - at), state=state, layout=layout, scale=SCALE, start=here)
        assert torch.isfinite(some).all()
        out.append(some)
    torch.testing.assert_close(real(torch.cat(out, 1), start), real(want, start), rtol=1e-10, atol=1e-12)
    same_state(state, fill(x["k"], x["v"], layout, start))


def test_a_cache_that_grows_with_every_token_equals_one_of_the_planned_size():
    x = draw()
    state, layout = prefill(x, 1, 3, 1)
    out = []
    for n in range(1, T):
        state, layout = resized(state, layout, n + 1)
        out.append(steps(x, state, layout, n, n + 1))
    torch.testing.assert_close(torch.cat(out, 1), whole(x, 3, None)[:, 1:], rtol=1e-10, atol=1e-12)
    assert layout.rings == layout_of(3, T).rings


def test_growing_copies_only_when_a_ring_grows():
    state, layout = prefill(draw(), T, 4, T)
    again, wider = resized(state, layout, T + 1)
    assert again is state
    assert (wider.capacity, wider.table.data_ptr()) == (T + 1, layout.table.data_ptr())
    assert resized(state, layout, T + 100)[0] is not state


# ---------------------------------------------------------------- queries that use some of the heads


def choice(units, tokens=T, seed=4, rows=B):
    """Which units each token uses, and their factors; a token with none and one with all among them."""
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, tokens, units, generator=g) < 0.6
    active[:, -1], active[:, -2] = False, True
    return active, torch.rand(rows, tokens, units, generator=g, dtype=torch.float64)


def left_out(out, active, gate):
    """The definition: outputs of the heads of units that a token uses, times the units' factors."""
    units = out.unflatten(2, (active.shape[2], -1))
    return torch.where(active[..., None, None], units * gate[..., None, None], torch.zeros_like(units)).flatten(2, 3)


@pytest.mark.parametrize("units", [G, G * R])
@pytest.mark.parametrize("padded", [False, True])
def test_units_that_a_token_does_not_use_are_zero_and_the_state_is_that_of_all(units, padded):
    x, start = draw(), starts() if padded else None
    active, gate = choice(units)
    want = left_out(whole(x, 3, start), active, gate)
    state, layout = prefill(x, 60, 3, T, start)
    more = {"scale": SCALE, "layout": layout}
    here = None if start is None else (start[:, 60:140] - 60).clamp(0, 80)
    some, state = span_attention_extend(**part(x, 60, 80), state=state, **more, start=here, active=active[:, 60:140], gate=gate[:, 60:140])
    got = [some]
    for n in range(140, T):
        got.append(span_attention_step(**part(x, n), state=state, **more, active=active[:, n : n + 1], gate=gate[:, n : n + 1], impl="reference"))
    torch.testing.assert_close(torch.cat(got, 1), want[:, 60:], rtol=1e-10, atol=1e-12)
    assert got[-1].abs().max() == 0
    same_state(state, fill(x["k"], x["v"], layout, start))


def test_units_without_factors_are_left_as_they_are():
    x, (active, _) = draw(), choice(G)
    state, layout = prefill(x, 100, 3, T)
    got = span_attention_step(**part(x, 100), state=state, layout=layout, scale=SCALE, active=active[:, 100:101], impl="reference")
    torch.testing.assert_close(got, left_out(whole(x, 3, None), active, torch.ones_like(active, dtype=torch.float64))[:, 100:101], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("active", "gate"), [((B, 1, 4), None), ((B, 2, G), None), (None, (B, 1, G)), ((B, 1, G), (B, 1, G * R))])
def test_units_of_another_shape_are_refused(active, gate):
    x = draw(4)
    state, layout = prefill(x, 3, 2, 8)
    units = {"active": None if active is None else torch.ones(active, dtype=torch.bool), "gate": None if gate is None else torch.ones(gate)}
    for run in (span_attention_step, span_attention_extend):
        with pytest.raises(ValueError, match="have a column for each KV head or each query head"):
            run(**part(x, 3), state=state, layout=layout, scale=SCALE, **units)
    assert state.length.tolist() == [3, 3]


def test_further_tokens_have_the_gradients_of_one_call():
    x = {n: t.requires_grad_() for n, t in draw(tokens=90).items()}
    want = torch.autograd.grad(whole(x, 2, None)[:, 70:].square().sum(), list(x.values()))
    state, layout = prefill(x, 70, 2, 90)
    out, _ = span_attention_extend(**part(x, 70, 20), state=state, layout=layout, scale=SCALE)
    for a, b in zip(torch.autograd.grad(out.square().sum(), list(x.values())), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_300_fp32_steps_equal_a_prefill_of_300():
    x = draw(300, torch.float32)
    want = whole({n: t.double() for n, t in x.items()}, 4, None)
    state, layout = prefill(x, 1, 4, 300)
    torch.testing.assert_close(steps(x, state, layout, 1, 300).double(), want[:, 1:], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- a step


def test_a_step_keeps_every_tensor_of_the_state_where_it_is():
    x = draw()
    state, layout = prefill(x, 20, 2, T)
    before = [t.data_ptr() for t in state]
    steps(x, state, layout, 20, 90)
    assert [t.data_ptr() for t in state] == before


def test_a_padding_token_leaves_the_state_of_its_row_alone_and_outputs_zero():
    x = draw()
    state, layout = prefill(x, 100, 2, T)
    before = SpanState(*(t.clone() for t in state))
    out = span_attention_step(**part(x, 100), state=state, layout=layout, scale=SCALE, start=torch.tensor([[0], [1]]), impl="reference")
    assert out[1].abs().max() == 0
    assert out[0].abs().max() > 0
    assert all(torch.equal(a[1], b[1]) for a, b in zip(state, before, strict=True))
    assert state.length.tolist() == [101, 100]


def test_what_cannot_be_a_step_is_refused():
    x = draw(4)
    state, layout = prefill(x, 4, 2, 8)
    with pytest.raises(ValueError, match="one token a row, got 4"):
        span_attention_step(**x, state=state, layout=layout, scale=SCALE)
    with pytest.raises(ValueError, match="another batch size"):
        span_attention_step(**part(x, 0), state=state, layout=layout_of(3, 8), scale=SCALE)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*float64"):
        span_attention_step(**part(x, 0), state=state, layout=layout, scale=SCALE, impl="triton")


def test_the_pytorch_step_compiles_into_one_graph():
    x = draw(12, torch.float32)
    (state, layout), (other, _) = prefill(x, 4, 2, 12), prefill(x, 4, 2, 12)
    step = torch.compile(lambda some, state: span_attention_step(**some, state=state, layout=layout, scale=SCALE), fullgraph=True, backend="aot_eager")
    got = torch.cat([step(part(x, n), state) for n in range(4, 12)], 1)
    torch.testing.assert_close(got, steps(x, other, layout, 4, 12))
    same_state(state, other)


def test_slots_of_another_shape_are_refused():
    x = draw(4)
    state, layout = prefill(x, 3, 2, 8)
    with pytest.raises(ValueError, match="which row of the pool each row of the batch uses"):
        span_attention_step(**part(x, 3), state=state, layout=layout, scale=SCALE, slots=torch.tensor([0]))
    assert state.length.tolist() == [3, 3]


# ---------------------------------------------------------------- the kernels, interpreted


KERNEL_CASES = {
    # batch, query heads, head_dim, rules, sinks, capacity, first step, last step, keys of a program, dtype
    "rings that turn over, a head of several parts": (2, 4, 16, ((5, 0.0), (-20, 0.5), (0, 1.0), (130, 0.0)), 4, 200, 150, 152, 64, torch.float32),
    "parts of several blocks": (1, 2, 16, ((0, 0.5), (0, 1.0)), 4, 290, 280, 282, 128, torch.float32),
    "from the first token, through the sinks": (2, 6, 32, ((2, 0.0), (0, 0.5)), 3, 16, 1, 9, 64, torch.float32),
    "no room besides the sinks": (1, 2, 16, ((2, 0.0),), 16, 12, 5, 8, 64, torch.float32),
    "three heads a group, sizes that need masks, no sinks": (2, 6, 20, ((7, 0.25), (0, 1.0)), 0, 100, 64, 68, 64, torch.float32),
    "room for much more": (1, 2, 16, ((64, 0.0), (0, 1.0)), 4, 1000, 70, 72, 64, torch.float32),
    "more rows than one tile": (1, 20, 16, ((40, 0.0),), 2, 90, 80, 82, 64, torch.float32),
    "fp16": (3, 2, 32, ((64, 0.0), (0, 1.0)), 2, 300, 299, 300, 256, torch.float16),
    "head_dim 256": (1, 2, 256, ((0, 0.5),), 2, 90, 88, 90, 64, torch.float32),
}


def kernel_case(name):
    """Inputs of all tokens, document starts of rows of which the last begins with padding, and state and layout before the first step."""
    rows, heads, dim, rules, sinks, capacity, first, stop, _, dtype = KERNEL_CASES[name]
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(rows, stop, h, dim, generator=g).to(dtype) for n, h in (("q", heads), ("k", len(rules)), ("v", len(rules)))}
    start = torch.zeros(rows, stop, dtype=torch.int64)
    start[-1] = first + 1 if rows > 1 else 0  # the last row begins with padding
    layout = layout_of(sinks, capacity, tuple(a for a, _ in rules), tuple(fixed_point(b) for _, b in rules), tuple(1 + 5 * head for head in range(len(rules))))
    return x, start, fill(x["k"][:, :first], x["v"][:, :first], layout, start[:, :first].clamp(max=first)), layout


def kernel_against_pytorch(name, units=None, gated=False):
    """Largest difference of outputs, and whether the two states are equal. Runs where Triton interprets. units: which are routed, `KV heads` or `query heads`."""
    from attnconvert.kernels.span import decode, triton_decode

    rows, heads, _, rules, _, _, first, stop, split, _ = KERNEL_CASES[name]
    active, gate = choice(heads if units == "query heads" else len(rules), stop, rows=rows)
    x, start, state, layout = kernel_case(name)
    states = {impl: SpanState(*(t.clone() for t in state)) for impl in ("reference", "triton")}
    worst = 0.0
    with mock.patch.object(triton_decode, "_split", return_value=split):
        for n in range(first, stop):
            here = (start[:, n : n + 1] - n).clamp(0, 1) if rows > 1 else None
            empty = decode._positions(layout, states["triton"].length) < 0
            for slots in states["triton"][:2]:  # what an empty slot holds must not matter
                slots[empty] = torch.nan
            options = {
                "layout": layout,
                "scale": SCALE,
                "start": here,
                "active": active[:, n : n + 1] if units else None,
                "gate": gate[:, n : n + 1].float() if gated else None,
            }
            a, b = (span_attention_step(**part(x, n), state=states[impl], **options, impl=impl) for impl in states)
            worst = max(worst, (a.float() - b.float()).abs().nan_to_num(1e9).max().item())
    return worst, all(torch.equal(a, b.nan_to_num(0)) for a, b in zip(*states.values(), strict=True))


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernels_equal_the_pytorch_step_in_output_and_state(interpreter, name):  # noqa: F811
    worst, same = interpreter.submit(kernel_against_pytorch, name).result()
    assert worst < (5e-6 if KERNEL_CASES[name][-1] == torch.float32 else 2e-3)
    assert same


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("units", ["KV heads", "query heads"])
@pytest.mark.parametrize(
    "name", ["rings that turn over, a head of several parts", "three heads a group, sizes that need masks, no sinks", "no room besides the sinks"]
)
def test_the_kernels_leave_out_the_same_units(interpreter, name, units, gated):  # noqa: F811
    worst, same = interpreter.submit(kernel_against_pytorch, name, units, gated).result()
    assert worst < 5e-6
    assert same


def kernel_on_a_pool(name, impl="triton", units=None, padded=False):
    """`difference_on_a_pool` of a kernel's case, with routed units if `units`. Runs where Triton interprets."""
    from attnconvert.kernels.span import triton_decode

    rows, heads, _, rules, _, _, first, stop, split, _ = KERNEL_CASES[name]
    active, gate = choice(heads if units == "query heads" else len(rules), stop, rows=rows)
    x, start, state, layout = kernel_case(name)

    def step(n, state, start, slots):
        routed = {"active": active[:, n : n + 1], "gate": gate[:, n : n + 1].float()} if units else {}
        return span_attention_step(**part(x, n), state=state, layout=layout, scale=SCALE, start=start, slots=slots, **routed, impl=impl)

    with mock.patch.object(triton_decode, "_split", return_value=split):
        return difference_on_a_pool(step, state, first, stop, start if padded else None)


POOLED = ["rings that turn over, a head of several parts", "three heads a group, sizes that need masks, no sinks", "fp16", "head_dim 256"]


@pytest.mark.parametrize("units", [None, "KV heads", "query heads"])
@pytest.mark.parametrize("name", POOLED)
def test_pytorch_steps_on_rows_of_a_pool_equal_steps_on_these_rows_and_touch_no_other(name, units):
    pytest.importorskip("triton")
    assert kernel_on_a_pool(name, "reference", units, padded=units is None) is None


@pytest.mark.parametrize("name", POOLED)
def test_the_kernels_on_rows_of_a_pool_equal_themselves_on_these_rows_and_touch_no_other(interpreter, name):  # noqa: F811
    assert interpreter.submit(kernel_on_a_pool, name).result() is None


@pytest.mark.parametrize("units", ["KV heads", "query heads"])
def test_the_kernels_leave_out_units_and_padding_beside_rows_of_a_pool(interpreter, units):  # noqa: F811
    assert interpreter.submit(kernel_on_a_pool, POOLED[1], units=units, padded=True).result() is None


def unused_keys_are_poison():
    """Outputs where a KV head that no row uses has nothing but NaN in its cache. Runs where Triton interprets."""
    layout = layout_of(2, 100, (40, 0), (0, BETA_ONE), (1, 1))
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(1, 1, h, 16, generator=g) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    state = SpanState(*(torch.randn(1, layout.num_slots, 16, generator=g) for _ in "kv"), torch.tensor([99]))
    for slots in state[:2]:
        slots[:, layout.num_slots - layout.rings[1] - 2 :] = torch.nan
    return span_attention_step(**x, state=state, layout=layout, scale=SCALE, active=torch.tensor([[[True, False]]]), impl="triton"), layout, state


def test_keys_of_a_head_that_is_not_used_are_not_read(interpreter):  # noqa: F811
    out, layout, state = interpreter.submit(unused_keys_are_poison).result()
    assert torch.isfinite(out).all()
    assert out[:, :, :2].abs().min() > 0
    assert out[:, :, 2:].abs().max() == 0
    assert state.length.tolist() == [100]
    assert torch.isfinite(state.k[0, -layout.rings[1] - 2 :]).all(1).sum() == 1  # the token's own key


def test_the_grid_has_a_program_for_every_key_and_no_idle_head():
    kernels = pytest.importorskip("attnconvert.kernels.span.triton_decode")
    for rows, rings, sinks in itertools.product((1, 8, 64), ((64,) * 8, (512, 512, 1024, 1024, 2048, 2048, 4096, 4096), (0, 64)), (0, 64)):
        split = kernels._split(rows, rings, sinks)
        assert 64 <= split <= 1024
        assert split.bit_count() == 1
        assert kernels._num_programs(rings, sinks, split) == sum(max(1, -(-(ring + sinks) // split)) for ring in rings)


# ---------------------------------------------------------------- the kernels on a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU_CASES = {
    # batch, query heads, head_dim, rules, sinks, tokens so far, dtype
    "llama": (3, 32, 128, ((512, 0.0), (0, 1.0), (-100, 0.5), (4096, 0.0)) * 2, 64, 9000, torch.bfloat16),
    "many rows": (64, 32, 128, ((512, 0.0), (1024, 0.0)) * 4, 64, 5000, torch.bfloat16),
    "a long row": (1, 8, 64, ((0, 1.0), (300, 0.0)), 4, 100_000, torch.bfloat16),
    "as many KV heads": (2, 16, 96, ((200, 0.125),) * 16, 3, 3000, torch.float16),
    "one KV head": (2, 40, 80, ((0, 0.5),), 0, 3000, torch.bfloat16),
    "head_dim 256": (2, 8, 256, ((900, 0.0), (0, 1.0)), 64, 2500, torch.bfloat16),
    "the first tokens": (4, 8, 32, ((20, 0.0), (0, 0.5)), 16, 5, torch.bfloat16),
}


def gpu_case(name, steps):
    """Tokens of `steps` steps and the state before them; the last of several rows begins with padding."""
    rows, heads, dim, rules, sinks, length, dtype = GPU_CASES[name]
    g = torch.Generator("cuda").manual_seed(0)
    device = torch.device("cuda")
    layout = span_layout(tuple(a for a, _ in rules), tuple(fixed_point(b) for _, b in rules), (1,) * len(rules), sinks, length + steps, device)
    r = lambda *shape: torch.randn(*shape, generator=g, device=device).to(dtype)  # noqa: E731
    state = SpanState(*(r(rows, layout.num_slots, dim) for _ in "kv"), torch.arange(length, length - rows, -1, device=device).clamp_min(0))
    x = {n: r(rows, steps, h, dim) for n, h in (("q", heads), ("k", len(rules)), ("v", len(rules)))}
    pad = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    pad[-1] = int(rows > 1)
    return x, state, layout, pad


def copied(state, dtype=None):
    return SpanState(*(t.clone().to(dtype or t.dtype) for t in state[:2]), state.length.clone())


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in GPU_CASES])
def test_on_a_gpu_the_kernels_equal_an_fp64_step_and_write_the_same_state(name):
    x, state, layout, pad = gpu_case(name, 3)
    ours, exact, plain = copied(state), copied(state, torch.float64), copied(state)
    for n in range(3):
        some, options = part(x, n), {"layout": layout, "scale": x["q"].shape[-1] ** -0.5, "start": pad if n == 0 else None}
        got = span_attention_step(**some, state=ours, **options, impl="triton")
        want = span_attention_step(**{name: t.double() for name, t in some.items()}, state=exact, **options, impl="reference")
        span_attention_step(**some, state=plain, **options, impl="reference")
        assert (got.double() - want).norm() < 8e-3 * want.norm()
    same_state(ours, plain)


@pytest.mark.parametrize("units", ["KV heads", "query heads"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("llama", "many rows", "as many KV heads", "head_dim 256")])
def test_on_a_gpu_the_kernels_leave_out_what_is_not_used(name, units):
    x, state, layout, pad = gpu_case(name, 1)
    ours, exact = copied(state), copied(state, torch.float64)
    active, gate = (t.cuda() for t in choice(x["q" if units == "query heads" else "k"].shape[2], 3, rows=len(x["q"])))
    options = {"layout": layout, "scale": x["q"].shape[-1] ** -0.5, "start": pad, "active": active[:, :1], "gate": gate[:, :1].float()}
    got = span_attention_step(**x, state=ours, **options, impl="triton")
    want = span_attention_step(**{name: t.double() for name, t in x.items()}, state=exact, **options, impl="reference")
    assert (got.double() - want).norm() < 8e-3 * want.norm()
    assert torch.equal(got == 0, want == 0)
    assert torch.equal(ours.length, exact.length)


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("llama", "a long row")])
def test_on_a_gpu_replays_of_a_graph_equal_plain_steps_bit_for_bit(name):
    x, state, layout, _ = gpu_case(name, 4)
    ours, plain, now = copied(state), copied(state), {n: t.clone() for n, t in part(x, 0).items()}

    def step(some, state):
        return span_attention_step(**some, state=state, layout=layout, scale=0.1, impl="triton")

    step(now, copied(state))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(now, ours)
    for n in range(4):
        for key, value in part(x, n).items():
            now[key].copy_(value)
        graph.replay()
        assert torch.equal(out, step(part(x, n), plain))
    same_state(ours, plain)


@pytest.mark.parametrize(
    ("name", "page_bytes"), [pytest.param(name, page, marks=gpu) for name, page in (("llama", 0), ("many rows", 0), ("the first tokens", 2**30 + 4096))]
)
def test_on_a_gpu_the_kernels_on_rows_of_a_pool_equal_themselves_on_these_rows(name, page_bytes):
    x, state, layout, _ = gpu_case(name, 3)

    def step(n, state, start, slots):
        return span_attention_step(**part(x, n), state=state, layout=layout, scale=0.1, start=start, slots=slots, impl="triton")

    assert difference_on_a_pool(step, state, 0, 3, same=close, page_bytes=page_bytes) is None


@pytest.mark.parametrize("name", [pytest.param("many rows", marks=gpu)])
def test_on_a_gpu_replays_of_a_graph_read_their_slots_anew(name):
    x, state, layout, _ = gpu_case(name, 1)
    rows = len(state.k)
    slots = torch.arange(rows, device="cuda")
    pool, plain, other = (paged(state, slots, rows + 4) for _ in range(3))

    def step(state):
        return span_attention_step(**x, state=state, layout=layout, scale=0.1, slots=slots, impl="triton")

    step(other)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(pool)
    for shift in range(3):
        slots.copy_(torch.arange(rows, device="cuda").roll(shift))
        slots[shift] = -1
        graph.replay()
        assert torch.equal(out, step(plain))
    assert all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(pool, plain, strict=True))
