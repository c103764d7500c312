"""The kernels of routed heads in Triton's interpreter, on the CPU, against the reference in fp64, and which implementation runs.

Triton decides when it is imported whether it interprets, so the kernels run in a process of their own, as in test_kernel_triton.py.
"""

from typing import NamedTuple

import pytest
import torch
from test_kernel_triton import assert_near, interpreter, poison, version  # noqa: F401
from torch.nn.functional import scaled_dot_product_attention

from attnconvert.kernels import choice
from attnconvert.kernels.heads import api, reference

triton = pytest.importorskip("triton")

from attnconvert.kernels.heads import triton_operator  # noqa: E402
from attnconvert.kernels.heads.triton import LIST_BLOCK, LIST_OPTIONS, MAX_TILE, _blocks, list_kernel, list_programs  # noqa: E402
from attnconvert.kernels.span.triton_operator import triton_span_attention  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # ||got - want|| / ||want|| of each tensor
interpreted = pytest.mark.skipif(version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="Triton's interpreter of that age fails with this numpy")
NAMES = ("output", "dq", "dk", "dv", "dgate")
STARTS = {
    "padded": lambda T: [[0] * T, [min(77, T)] * T],
    "packed": lambda T: [[0] * 21 + [21] + [22] * (T - 22), [0] * 64 + [64] * 30 + [94] * (T - 94)],
    "padded then packed": lambda T: [[5] * 70 + [70] * (T - 70), [3] * 31 + [31] * (T - 31)],
}


class Case(NamedTuple):
    """R: query heads of each of G KV heads. single: query heads are routed, not KV heads. share: of the units, what a token uses at random."""

    R: int = 2
    D: int = 16
    single: bool = False
    T: int = 150
    dtype: torch.dtype = torch.float16
    gates: bool = True
    where: str = "whole"
    G: int = 2
    B: int = 1
    share: float = 0.6
    causal: bool = True

    def __str__(self):
        return (
            "-".join(f"{name}{str(value).removeprefix('torch.')}" for name, value in self._asdict().items() if value != self._field_defaults[name]) or "default"
        )

    @property
    def units(self):
        return self.G * (self.R if self.single else 1)

    @property
    def batch(self):
        return self.B if self.where == "whole" else 2

    def settings(self, device="cpu"):
        start = None if self.where == "whole" else torch.tensor(STARTS[self.where](self.T), device=device)
        return {"scale": self.D**-0.5, "start": start, "causal": self.causal}

    def real(self, device="cpu"):
        """[B, T, 1, 1], 0 for padding."""
        if self.where == "whole":
            return torch.ones(self.batch, self.T, 1, 1, device=device)
        return (self.settings()["start"] <= torch.arange(self.T)).float()[:, :, None, None].to(device)


def draw(case, seed=0, device="cpu"):
    """(q, k, v, gate or None), which units are active, a gradient of the output. Some gates are negative, one in twenty is 0."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(case.batch, case.T, heads, case.D, generator=g).to(case.dtype) for heads in (case.G * case.R, case.G, case.G, case.G * case.R))
    active = torch.rand(case.batch, case.T, case.units, generator=g) < case.share
    gate = 1 + 0.5 * torch.randn(active.shape, generator=g)
    gate = gate.masked_fill(torch.rand(active.shape, generator=g) < 0.05, 0) if case.gates else None
    return [None if t is None else t.to(device) for t in (q, k, v, gate)], active.to(device), grad.to(device)


def outputs_and_gradients(operator, case, x, active, grad, wide=False):
    """[output, dq, dk, dv, dgate if there are gates] of real tokens."""
    leaves = [None if t is None else (t.double() if wide else t.clone()).requires_grad_() for t in x]
    out = operator(*leaves[:3], active, leaves[3], **case.settings(grad.device)) * case.real(grad.device).to(leaves[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))]


def compare(case):
    x, active, grad = draw(case)
    want = outputs_and_gradients(reference.routed_attention, case, x, active, grad, wide=True)
    with poison():
        got = outputs_and_gradients(triton_operator.triton_routed_attention, case, x, active, grad)
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert a.isfinite().all(), name
        assert_near(name, a, b, TOLERANCE[case.dtype])
    used = active.repeat_interleave(case.G * case.R // case.units, 2)
    assert not got[0][~used].any()
    assert not got[1][~used].any()
    if case.gates:
        assert not got[4][~active].any()


CASES = [
    Case(R=1, D=16, dtype=torch.float32, T=101),
    Case(R=4, D=32, dtype=torch.float32, T=101, single=True),
    Case(R=2, D=32, dtype=torch.float32, where="padded then packed", T=100, gates=False, single=True),
    Case(R=3, D=64, T=300),
    Case(R=2, D=80, T=210, single=True),
    Case(R=7, D=16, G=1, T=300, gates=False),
    Case(R=8, D=64, G=1, T=150, single=True, share=0.3),
    Case(R=1, D=128, where="packed"),
    Case(R=4, D=128, G=1, where="padded", gates=False),
    Case(R=2, D=256, G=1, where="padded then packed"),
    Case(R=3, D=64, G=1, where="packed", single=True, T=210, share=0.1),
    Case(R=1, D=16, T=1, B=3),
    Case(R=2, D=16, T=65, share=1.0),
    Case(R=1, D=16, T=101, dtype=torch.float32, causal=False),
    Case(R=2, D=32, T=100, dtype=torch.float32, where="padded then packed", single=True, causal=False),
    Case(R=3, D=64, G=1, T=210, where="packed", causal=False),
    Case(R=2, D=16, T=129, where="padded", gates=False, share=0.2, causal=False),
    Case(R=2, D=16, T=64, share=1.0, causal=False),
]


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_agree_with_fp64_and_unused_queries_have_none(interpreter, case):  # noqa: F811
    interpreter.submit(compare, case).result()


def compare_dense():
    case = Case(R=2, D=32, T=150, dtype=torch.float32, gates=False)
    (q, k, v, _), active, _ = draw(case)
    used = torch.ones_like(active)
    out = triton_operator.triton_routed_attention(q, k, v, used, **case.settings())
    plain = scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v)), is_causal=True, scale=case.D**-0.5, enable_gqa=True)
    assert_near("output", out, plain.transpose(1, 2), TOLERANCE[case.dtype])
    none, all_keys = torch.zeros(2, dtype=torch.int32), torch.full((2,), 1 << 16, dtype=torch.int32)
    assert torch.equal(out, triton_span_attention(q, k, v, alpha=none, beta=all_keys, num_sinks=0, scale=case.D**-0.5))
    assert torch.equal(out, triton_operator.triton_routed_attention(q, k, v, used, torch.ones(used.shape), **case.settings()))
    single = torch.ones(1, case.T, 4, dtype=torch.bool)
    assert torch.equal(out, triton_operator.triton_routed_attention(q, k, v, single, **case.settings()))


def compare_bidirectional():
    case = Case(R=2, D=32, T=150, dtype=torch.float32, gates=False, causal=False)
    (q, k, v, _), active, _ = draw(case)
    plain = scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v)), scale=case.D**-0.5, enable_gqa=True).transpose(1, 2)
    for operator in (triton_operator.triton_routed_attention, reference.routed_attention):
        assert_near("output", operator(q, k, v, torch.ones_like(active), **case.settings()), plain, TOLERANCE[case.dtype])
    cut = 40  # a document, and padding behind it
    start = torch.where(torch.arange(case.T) < cut, 0, cut)[None]
    alone = reference.routed_attention(*(t[:, :cut].double() for t in (q, k, v)), active[:, :cut], scale=case.D**-0.5, causal=False)
    for operator in (triton_operator.triton_routed_attention, reference.routed_attention):
        got = operator(q, k, v, active, **{**case.settings(), "start": start})
        assert_near("document", got[:, :cut], alone, TOLERANCE[case.dtype])


@interpreted
def test_not_causal_with_all_units_it_is_softmax_over_the_document(interpreter):  # noqa: F811
    interpreter.submit(compare_bidirectional).result()


@interpreted
def test_with_all_units_it_is_causal_softmax_to_the_bit_of_the_dense_kernel(interpreter):  # noqa: F811
    interpreter.submit(compare_dense).result()


def compare_nobody():
    case = Case(R=2, T=200)
    x, active, grad = draw(case)
    with poison():
        got = outputs_and_gradients(triton_operator.triton_routed_attention, case, x, torch.zeros_like(active), grad)
    for name, a in zip(NAMES, got, strict=True):
        assert torch.equal(a, torch.zeros_like(a)), name


@interpreted
def test_units_that_nobody_uses_give_zeros_not_what_memory_held(interpreter):  # noqa: F811
    interpreter.submit(compare_nobody).result()


def compare_lonely(token):
    case = Case(R=2, T=200, dtype=torch.float32)
    x, active, grad = draw(case)
    active[:, :, 1] = torch.arange(case.T) == token
    want = outputs_and_gradients(reference.routed_attention, case, x, active, grad, wide=True)
    with poison():
        got = outputs_and_gradients(triton_operator.triton_routed_attention, case, x, active, grad)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_near(name, a, b, TOLERANCE[case.dtype])
    assert got[0][0, :, 2:].any(-1).any(-1).nonzero().flatten().tolist() == [token]
    assert not got[2][0, token + 1 :, 1].any()  # later keys


@interpreted
@pytest.mark.parametrize("token", [0, 130, 199])
def test_unit_that_one_token_uses_is_right(interpreter, token):  # noqa: F811
    interpreter.submit(compare_lonely, token).result()


def compare_order():
    case = Case(R=2, T=130, G=3)
    x, active, grad = draw(case)
    want = outputs_and_gradients(triton_operator.triton_routed_attention, case, x, active, grad)
    order = torch.tensor([2, 0, 1])
    heads = torch.tensor([4, 5, 0, 1, 2, 3])
    moved = [t[:, :, o] for t, o in zip(x, (heads, order, order, order), strict=True)]
    got = outputs_and_gradients(triton_operator.triton_routed_attention, case, moved, active[:, :, order], grad[:, :, heads])
    for name, a, b, o in zip(NAMES, got, want, (heads, heads, order, order, order), strict=True):
        assert torch.equal(a, b[:, :, o]), name


@interpreted
def test_order_of_units_does_not_matter_to_the_bit(interpreter):  # noqa: F811
    interpreter.submit(compare_order).result()


def compare_neighbours():
    case = Case(R=2, T=130, dtype=torch.float32)
    (q, k, v, gate), active, _ = draw(case)
    out = triton_operator.triton_routed_attention(q, k, v, active, gate, **case.settings())
    full = triton_operator.triton_routed_attention(q, k, v, torch.ones_like(active), gate, **case.settings())
    used = active.repeat_interleave(2, 2)
    assert_near("output", out[used], full[used].double(), TOLERANCE[torch.float32])


@interpreted
def test_output_of_a_token_does_not_depend_on_who_else_uses_the_unit(interpreter):  # noqa: F811
    interpreter.submit(compare_neighbours).result()


def compare_repeat():
    case = Case(R=2, T=130, single=True)
    x, active, grad = draw(case)
    want = outputs_and_gradients(triton_operator.triton_routed_attention, case, x, active, grad)
    halves = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (*x, active, grad)]
    everyother = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (*x, active, grad)]
    with poison():
        for others in ([*x, active, grad], halves, everyother):
            got = outputs_and_gradients(triton_operator.triton_routed_attention, case, others[:4], *others[4:])
            for name, a, b in zip(NAMES, got, want, strict=True):
                assert torch.equal(a, b), name
        with torch.no_grad():
            assert torch.equal(triton_operator.triton_routed_attention(*x[:3], active, x[3], **case.settings()), want[0])


@interpreted
def test_runs_are_bit_equal_whatever_the_strides(interpreter):  # noqa: F811
    interpreter.submit(compare_repeat).result()


def compare_straight_through():
    case = Case(R=2, T=100, dtype=torch.float32)
    (q, k, v, _), active, grad = draw(case)
    score = torch.rand(active.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    gate = score - score.detach() + 1  # 1 exactly; `1 + score - score.detach()` is not
    out = triton_operator.triton_routed_attention(q, k, v, active, gate, **case.settings())
    plain = triton_operator.triton_routed_attention(q, k, v, active, **case.settings())
    assert torch.equal(out, plain)
    (got,) = torch.autograd.grad(out, score, grad)
    assert_near("gradient of the score", got, (plain.double() * grad.double()).unflatten(2, (2, 2)).sum((3, 4)), TOLERANCE[case.dtype])
    assert not got[~active].any()
    assert got[active].all()


@interpreted
def test_straight_through_gate_keeps_the_output_and_gives_the_score_a_gradient_where_its_unit_is_used(interpreter):  # noqa: F811
    interpreter.submit(compare_straight_through).result()


def compare_planted():
    case = Case(R=2, T=150, dtype=torch.float32)
    x, active, grad = draw(case)
    want = outputs_and_gradients(reference.routed_attention, case, x, active, grad, wide=True)
    token = int((active[0, :, 0] & (x[3][0, :, 0] > 0.5)).nonzero()[-1])
    less = active.clone()
    less[0, token, 0] = False
    got = outputs_and_gradients(triton_operator.triton_routed_attention, case, x, less, grad)
    for name, a, b in zip(NAMES, got, want, strict=True):
        with pytest.raises(AssertionError):
            assert_near(name, a, b, TOLERANCE[case.dtype])
    assert ((got[0] - want[0]).abs().amax((0, 2, 3)) > 1e-4).nonzero().flatten().tolist() == [token]


@interpreted
def test_one_query_left_out_changes_that_token_alone_and_is_seen(interpreter):  # noqa: F811
    interpreter.submit(compare_planted).result()


def compare_lists():
    B, U, grain = 2, 3, 64
    for T in (1, 64, LIST_BLOCK - 1, LIST_BLOCK, 2 * LIST_BLOCK + 77):
        generator = torch.Generator().manual_seed(T)
        active = torch.rand(B, T, U, generator=generator) < torch.tensor([0.5, 0.02, 1.1])
        active[1, :, 1] = False
        gate = torch.randn(B, T, U, generator=generator)
        N = -(-T // grain)
        index, before = torch.full((B, U, T), -1, dtype=torch.int32), torch.full((B, U, N + 1), -1, dtype=torch.int32)
        gates = torch.zeros(B, U, triton_operator._padded(T))
        grid = (list_programs(B * U, N, grain),)
        list_kernel[grid](active.view(torch.uint8), gate, index, gates, before, T, U, N, GRAIN=grain, BLOCK=LIST_BLOCK, HAS_GATE=True, **LIST_OPTIONS)
        for b in range(B):
            for u in range(U):
                tokens = active[b, :, u].nonzero().flatten()
                count = len(tokens)
                assert index[b, u].tolist() == tokens.tolist() + [-1] * (T - count)
                assert torch.equal(gates[b, u, :count], gate[b, tokens, u])
                assert not gates[b, u, count:].any()
                assert before[b, u].tolist() == [int((tokens < i * grain).sum()) for i in range(N + 1)]


@interpreted
def test_lists_name_every_token_that_uses_a_unit_in_order(interpreter):  # noqa: F811
    interpreter.submit(compare_lists).result()


def compare_compiled():
    case = Case(R=2, D=16)

    def loss(q, k, v, gate, active, start):
        return api.routed_attention(q * 0.5, k, v, active, gate * 2, scale=0.3, start=start, impl="triton").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for T in (20, 27, 41):  # the second length makes T dynamic
        x, active, _ = draw(case._replace(T=T))
        leaves, start = [t.requires_grad_() for t in x], torch.zeros(1, T, dtype=torch.int64)
        got, want = compiled(*leaves, active, start), loss(*leaves, active, start)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert torch.equal(a, b)


@interpreted
def test_compiled_whole_it_has_one_graph_and_the_same_bits(interpreter):  # noqa: F811
    interpreter.submit(compare_compiled).result()


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("narrow", [False, True])
def test_blocks_fit_each_other(arch, narrow):
    for head_dim in (16, 32, 64, 80, 96, 128, 160, 256):
        blocks = _blocks(head_dim, narrow, arch)
        sizes = [size for name in ("forward", "query", "key") for size in blocks[name][:2]]
        assert all(16 <= size <= MAX_TILE.value and size & (size - 1) == 0 for size in sizes)
        assert blocks["key"][0] <= min(
            blocks["forward"][0], blocks["query"][0]
        )  # who writes what is kept per query fills the lines that the keys' gradients read
        assert LIST_BLOCK % blocks["key"][1] == 0


def test_auto_on_the_cpu_is_the_reference():
    case = Case(T=40, dtype=torch.float32)
    x, active, _ = draw(case)
    assert torch.equal(api.routed_attention(*x[:3], active, x[3], scale=0.3), reference.routed_attention(*x[:3], active, x[3], scale=0.3))


def test_triton_by_name_says_why_it_cannot_run_instead_of_falling_back():
    x, active, _ = draw(Case(T=20))
    with pytest.raises(ValueError, match=r"impl=.triton. cannot run here: .* (GPU|installed)"):
        api.routed_attention(*x[:3], active, x[3], scale=0.3, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        api.routed_attention(*(t.double() for t in x[:3]), active, scale=0.3, impl="triton")


def test_the_environment_variable_replaces_auto_and_nothing_else(monkeypatch):
    monkeypatch.setattr(choice, "_AUTO", "triton")
    x, active, _ = draw(Case(T=20))
    with pytest.raises(ValueError, match="triton"):
        api.routed_attention(*x[:3], active, scale=0.3)
    api.routed_attention(*x[:3], active, scale=0.3, impl="reference")


def refuse():
    q, k = torch.empty(1, 5, 6, 16, dtype=torch.float16), torch.empty(1, 5, 2, 16, dtype=torch.float16)
    assert triton_operator.refusal(q, k, torch.ones(1, 5, 2, dtype=torch.bool)) is None
    assert triton_operator.refusal(q, k, torch.ones(1, 5, 6, dtype=torch.bool)) is None
    assert "3 units are neither 2 key-value heads nor 6 query heads" in triton_operator.refusal(q, k, torch.ones(1, 5, 3, dtype=torch.bool))
    assert "260 is larger" in triton_operator.refusal(torch.empty(1, 5, 2, 260, dtype=torch.float16), k, torch.ones(1, 5, 2, dtype=torch.bool))


@interpreted
def test_what_the_kernels_cannot_take_is_named(interpreter):  # noqa: F811
    interpreter.submit(refuse).result()
