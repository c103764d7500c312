"""The linear-attention operator against a direct quadratic oracle in fp64: outputs, gradients, states, documents, padding."""

import math

import pytest
import torch

from attnconvert.kernels.linear.reference import attention_weight_loss, branch_log_ratio, feature_map, linear_attention

B, H, G, D, F = 2, 4, 2, 6, 5
KINDS = [
    ("block", 4, 2),
    ("sliding", 4, 2),
    ("block", 8, 0),
    ("sliding", 3, 1),
    ("block", 1, 0),
    ("sliding", 1, 3),
    ("sliding", 0, 0),
    ("block", 0, 2),
    ("block", 64, 4),
]


def draw(T, *, heads=G, linear=True, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    tensors = {"q": r(B, T, H, D), "k": r(B, T, G, D), "v": r(B, T, G, D), "linear_log_weight": r(H, 1)}
    maps = {"query_map": r(H, D, F), "key_map": r(heads, D, F), "query_gate": r(H, D + 1), "key_gate": r(heads, D + 1)}
    return tensors | {name: t if linear else None for name, t in maps.items()}


def oracle(q, k, v, linear_log_weight, query_map, key_map, query_gate, key_gate, *, window_size, window_kind, num_sinks, scale, reference, start):
    """The definition, key by key, with T x T masks. start: [B, T]."""
    T = q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(H // G, 1), v.transpose(1, 2).repeat_interleave(H // G, 1)
    n, i = torch.arange(T)[:, None], torch.arange(T)[None]
    s = start[:, :, None]
    p = n - s
    lo = {"sliding": (p - window_size + 1).clamp_min(0), "block": (p.div(max(window_size, 1), rounding_mode="floor") - 1).clamp_min(0) * window_size}[
        window_kind
    ]
    if window_size == 0:
        lo = p + 1
    seen = (i <= n) & (i >= s)
    exact = (seen & ((i >= s + lo) | (i < s + num_sinks)))[:, None]
    rest = (seen & (i < s + lo) & (i >= s + num_sinks))[:, None]
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~exact, float("-inf"))
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    w = torch.exp(logits - top) if reference == "window_max" else torch.exp(logits)
    if query_map is not None:
        key_map, key_gate = (x if x.shape[0] == H else x.repeat_interleave(H // G, 0) for x in (key_map, key_gate))
        w = w + torch.exp(linear_log_weight)[..., None] * (feature_map(q, query_map, query_gate) @ feature_map(k, key_map, key_gate).transpose(-1, -2)) * rest
    total = w.sum(-1, keepdim=True)
    return (w @ v / torch.where(total == 0, torch.ones_like(total), total)).transpose(1, 2)


def options(kind, size, sinks, reference="absolute"):
    return {"window_size": size, "window_kind": kind, "num_sinks": sinks, "scale": 0.4, "reference": reference}


STARTS = {
    "none": lambda T: torch.zeros(B, T, dtype=torch.int64),
    "left-padded": lambda T: torch.tensor([[0] * T, [min(5, T)] * T]),
    "packed": lambda T: torch.stack([torch.tensor([max(x for x in cuts if x <= t) for t in range(T)]) for cuts in ([0, 3, 4, 11], [0, 17, 18, 30])]),
}


@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize(("kind", "size", "sinks"), KINDS)
@pytest.mark.parametrize(("heads", "reference"), [(G, "absolute"), (H, "window_max")])
def test_output_and_gradients_equal_the_quadratic_definition(kind, size, sinks, where, heads, reference):
    for T in (1, 7, 37):
        x = draw(T, heads=heads)
        start = STARTS[where](T)
        want = oracle(**x, **options(kind, size, sinks, reference), start=start)
        got = linear_attention(**x, **options(kind, size, sinks, reference), start=None if where == "none" else start).output
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        probe = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(3))
        for a, b, name in zip(
            torch.autograd.grad((got * probe).sum(), list(x.values()), allow_unused=True, materialize_grads=True),
            torch.autograd.grad((want * probe).sum(), list(x.values()), allow_unused=True, materialize_grads=True),
            x,
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"grad {name}: {m}")


@pytest.mark.parametrize(("kind", "size", "sinks"), [k for k in KINDS if k[1]])
def test_aligned_documents_need_fewer_keys_and_give_the_same_output(kind, size, sinks):
    x = draw(37)
    cuts = [n * size for n in (0, 1, 4)] if size < 10 else [0]
    start = torch.tensor([max(c for c in cuts if c <= t) for t in range(37)]).expand(B, 37)
    fast = linear_attention(**x, **options(kind, size, sinks), start=start, aligned=True).output
    torch.testing.assert_close(fast, oracle(**x, **options(kind, size, sinks), start=start), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("kind", "size", "sinks"), [k for k in KINDS if k[1]])
def test_without_linear_branch_only_window_and_sinks_are_seen(kind, size, sinks):
    x = draw(37, linear=False)
    start = STARTS["packed"](37)
    torch.testing.assert_close(linear_attention(**x, **options(kind, size, sinks), start=start).output, oracle(**x, **options(kind, size, sinks), start=start))


@pytest.mark.parametrize(("kind", "size", "sinks", "linear"), [(*k, linear) for k in KINDS for linear in (True, False) if linear or k[1]])
@pytest.mark.parametrize("heads", [G, H])
@pytest.mark.parametrize("pieces", [[1] * 29, [13, 1, 1, 9, 5], [28, 1], [4, 8, 8, 8, 1], [29]])
def test_pieces_with_carried_state_equal_one_call(kind, size, sinks, heads, pieces, linear):
    x = {n: None if t is None else t.detach() for n, t in draw(29, heads=heads, linear=linear).items()}
    start = torch.tensor([[0] * 29, [6] * 29])  # the second row is left-padded
    want = linear_attention(**x, **options(kind, size, sinks), start=start).output
    state, got, at = None, [], 0
    for n in pieces:
        part = {m: t[:, at : at + n] if m in "qkv" else t for m, t in x.items()}
        here = (start[:, at : at + n] - at).clamp(0, n)
        out, state = linear_attention(**part, **options(kind, size, sinks), start=here, initial_state=state, output_final_state=True)
        got.append(out)
        at += n
    assert state.length.tolist() == [29, 23]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-9, atol=1e-10)


def test_state_size_does_not_grow_with_tokens():
    sizes = set()
    for T in (1, 30, 200):
        x = {n: t.detach() for n, t in draw(T).items()}
        state = linear_attention(**x, **options("block", 8, 2), output_final_state=True).final_state
        sizes.add(sum(t.numel() for t in state))
    assert len(sizes) == 1


def test_future_tokens_do_not_change_the_past():
    x = {n: t.detach() for n, t in draw(40).items()}
    before = linear_attention(**x, **options("block", 8, 2)).output
    for name in "qkv":
        x[name] = x[name].clone()
        x[name][:, 23:] += 1.0
    after = linear_attention(**x, **options("block", 8, 2)).output
    assert torch.equal(before[:, :23], after[:, :23])
    assert not torch.allclose(before[:, 23:], after[:, 23:])


def test_bf16_input_is_computed_in_fp32():
    x = {n: t.detach() for n, t in draw(300, dtype=torch.bfloat16).items()}
    got = linear_attention(**x, **options("block", 16, 2)).output
    want = linear_attention(**{n: t.double() for n, t in x.items()}, **options("block", 16, 2)).output
    assert got.dtype == torch.bfloat16
    one_rounding = want.abs().max() * 2**-8
    assert (got.double() - want).abs().max() <= one_rounding


def test_memory_of_forward_and_backward_grows_linearly():
    def saved_elements(T):
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        x = draw(T, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear_attention(**x, **options("block", 16, 2)).output.sum()
        return total

    assert saved_elements(1024) < 2.2 * saved_elements(512)


@pytest.mark.parametrize("reference", ["absolute", "window_max"])
@pytest.mark.parametrize("where", STARTS)
def test_weight_loss_equals_the_cross_entropy_of_whole_attention_rows(where, reference):
    T = 37
    x = draw(T, heads=H)
    start = STARTS[where](T)
    settings = options("block", 4, 2, reference)
    got = attention_weight_loss(**{n: t for n, t in x.items() if n != "v"}, **settings, start=None if where == "none" else start, chunk_size=8)
    rows = {n: t for n, t in x.items() if n != "v"}
    identity = torch.eye(T, dtype=torch.float64)[None, :, None].expand(B, T, G, T)  # with v = I the output is the attention weights
    student = oracle(v=identity, **rows, **settings, start=start)
    everything = oracle(v=identity, **rows, **(settings | {"window_size": 1000, "window_kind": "sliding"}), start=start).detach()
    valid = start <= torch.arange(T)
    want = -(everything * torch.log(student.clamp_min(1e-300))).sum(-1)[valid].sum() / (valid.sum() * H)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    names = [n for n in rows if n not in ("q", "k")]  # the teacher's weights are a target: q and k differ by that path
    for a, b in zip(torch.autograd.grad(got, [x[n] for n in names]), torch.autograd.grad(want, [x[n] for n in names]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_gated_map_with_power_one_is_the_exponential_map():
    x, w = torch.randn(1, 2, 5, D, dtype=torch.float64), torch.randn(2, D, F, dtype=torch.float64)
    gate = torch.zeros(2, D + 1, dtype=torch.float64)
    gate[:, -1] = 1
    y = x @ w
    torch.testing.assert_close(feature_map(x, w, gate), torch.cat([y.exp(), (-y).exp()], -1) / F)
    gate[:, -1] = 0
    torch.testing.assert_close(feature_map(x, w, gate), feature_map(x, w))


@pytest.mark.parametrize("offset", [-300.0, -50.0, 300.0])
@pytest.mark.parametrize("where", STARTS)
def test_extreme_logits_give_finite_outputs_and_gradients_and_the_softmax_branch_stays_exact(offset, where):
    """Heads of real models have logits far from 0; a common offset must not overflow, underflow to 0/0, or touch rows without a linear part."""
    x = {n: t.detach().float().requires_grad_() for n, t in draw(37, seed=4).items()}
    with torch.no_grad():  # one direction shared by all queries and keys shifts every logit by about `offset`
        x["q"][..., 0], x["k"][..., 0] = 30.0, offset / (0.4 * 30.0)
    start = STARTS[where](37)
    out = linear_attention(**x, **options("block", 4, 2), start=start).output
    gradients = torch.autograd.grad(out.square().sum(), list(x.values()))
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in gradients)
    early = ((torch.arange(37) - start) < 8) & (start <= torch.arange(37))  # position < 2 blocks: nothing has left the window
    exact = {n: t.detach().double() for n, t in x.items()} | {"query_map": None, "key_map": None, "query_gate": None, "key_gate": None}
    want = linear_attention(**exact, **options("block", 4, 2), start=start).output
    torch.testing.assert_close(out.double()[early], want[early], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reference", ["absolute", "window_max"])
@pytest.mark.parametrize("heads", [G, H])
def test_calibrated_weight_makes_the_branches_weigh_as_in_softmax_attention(heads, reference):
    T = 96
    x = draw(T, heads=heads)
    q, k = torch.zeros(B, T, H, D, dtype=torch.float64), torch.randn(B, T, G, D, dtype=torch.float64)
    q[..., 0], k[..., 0] = 3.0, 2.0  # every logit is 6 * scale: exp(s) is a multiple of phi.phi, and the estimate is exact
    maps = {"query_map": torch.zeros(H, D, F, dtype=torch.float64), "key_map": torch.zeros(heads, D, F, dtype=torch.float64)}
    settings = options("block", 8, 2, reference) | maps | {"start": STARTS["packed"](T)}
    ratio, weight = branch_log_ratio(q, k, **settings, num_queries=50)
    # phi = 1/F in 2F features, so phi.phi = 2/F per key; window_max takes the row's largest logit out
    expected = (0.0 if reference == "window_max" else 6 * 0.4) - math.log(2 / F)
    torch.testing.assert_close(ratio / weight, torch.full((H,), expected, dtype=torch.float64))
    out = linear_attention(q, k, x["v"], linear_log_weight=(ratio / weight)[:, None], **settings).output
    dense = oracle(q, k, x["v"], None, *[None] * 4, **options("block", 256, 0) | {"start": STARTS["packed"](T)})
    torch.testing.assert_close(out, dense)


def test_a_head_that_never_looks_far_tells_the_calibration_nothing():
    x = draw(16)
    ratio, weight = branch_log_ratio(x["q"], x["k"], **options("block", 16, 0), query_map=x["query_map"], key_map=x["key_map"])
    assert weight.tolist() == ratio.tolist() == [0] * H
