"""The kernels of routed heads on the GPU they are made for: many seeds against fp64, poisoned memory, repeated runs, long and packed rows, torch.compile."""

import pytest
import torch
from test_heads_step import columns_of
from test_heads_triton import Case, draw, outputs_and_gradients
from test_kernel_triton import assert_near, poison
from torch import nn

from attnconvert.kernels.heads import reference
from attnconvert.kernels.heads.api import routed_attention
from attnconvert.kernels.heads.projection import SkippingLinear
from attnconvert.kernels.heads.routing import route_queries, route_scores
from attnconvert.kernels.softmax import masked_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# ||got - want|| / ||want|| of a tensor, for (output, gradients); want is fp64 on the same rounded inputs
BOUNDS = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 5e-3)}
NAMES = ("output", "dq", "dk", "dv", "dgate")
LENGTHS = (37, 1201, 1024, 2500, 777, 1999)  # of one seed each
BF16 = torch.bfloat16
CASES = [
    Case(R=4, D=128, dtype=BF16),
    Case(R=4, D=128, dtype=BF16, single=True, gates=False),
    Case(R=1, D=128, G=4, dtype=BF16, where="packed"),
    Case(R=3, D=64, G=3, dtype=BF16, where="padded"),
    Case(R=7, D=80, G=1, dtype=torch.float16, where="padded then packed", single=True),
    Case(R=8, D=16, G=1, dtype=torch.float16, share=0.1),
    Case(R=2, D=256, dtype=BF16),
    Case(R=2, D=256, dtype=BF16, where="packed", gates=False),
    Case(R=4, D=96, dtype=torch.float16, share=1.0),
    Case(R=1, D=64, G=4, dtype=BF16, causal=False),
    Case(R=4, D=128, dtype=BF16, where="padded then packed", causal=False),
]


def triton_attention(q, k, v, active, gate=None, **settings):
    return routed_attention(q, k, v, active, gate, **settings, impl="triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_seeds_agree_with_fp64_and_twice_give_the_same_bits(case):
    for seed, T in enumerate(LENGTHS):
        if case.where != "whole":
            T = max(T, 200)
        some = case._replace(T=T)
        x, active, grad = draw(some, seed, "cuda")
        want = outputs_and_gradients(reference.routed_attention, some, x, active, grad, wide=True)
        got = outputs_and_gradients(triton_attention, some, x, active, grad)
        for name, a, b in zip(NAMES, got, want, strict=False):
            assert a.isfinite().all(), f"{name}, seed {seed}"
            assert_near(f"{name}, seed {seed}", a, b, BOUNDS[case.dtype][name != "output"])
        assert not got[0][~active.repeat_interleave(case.G * case.R // case.units, 2)].any()
        with poison():
            for name, a, b in zip(NAMES, outputs_and_gradients(triton_attention, some, x, active, grad), got, strict=False):
                assert torch.equal(a, b), f"{name}, seed {seed}"


@pytest.mark.parametrize("single", [False, True])
def test_output_of_a_token_has_the_same_bits_whoever_else_uses_the_unit(single):
    case = Case(R=4, D=128, T=3001, dtype=BF16, single=single)
    (q, k, v, gate), active, _ = draw(case, device="cuda")
    whole = triton_attention(q, k, v, torch.ones_like(active), gate, **case.settings("cuda"))
    for share in (0.02, 0.5, 0.9):
        some = torch.rand(active.shape, device="cuda") < share
        out = triton_attention(q, k, v, some, gate, **case.settings("cuda"))
        used = some.repeat_interleave(1 if single else 4, 2)
        assert torch.equal(out[used], whole[used])
        assert not out[~used].any()


def test_with_all_units_it_is_dense_attention():
    from attnconvert.kernels.span.triton_operator import triton_span_attention

    case = Case(R=4, D=128, T=3001, dtype=BF16, gates=False)
    (q, k, v, _), active, _ = draw(case, device="cuda")
    none, all_keys = (torch.full((2,), value, dtype=torch.int32, device="cuda") for value in (0, 1 << 16))
    dense = triton_span_attention(q, k, v, alpha=none, beta=all_keys, num_sinks=0, scale=case.D**-0.5)
    assert_near("output", triton_attention(q, k, v, torch.ones_like(active), **case.settings("cuda")), dense.double(), 1e-3)


def test_units_that_nobody_or_one_token_uses():
    case = Case(R=4, D=128, T=5000, G=3, dtype=BF16)
    x, active, grad = draw(case, device="cuda")
    active[:, :, 0], active[:, :, 1] = False, torch.arange(5000, device="cuda") == 4321
    want = outputs_and_gradients(reference.routed_attention, case, x, active, grad, wide=True)
    with poison():
        got = outputs_and_gradients(triton_attention, case, x, active, grad)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_near(name, a, b, BOUNDS[BF16][name != "output"])
    for name, a in zip(NAMES, got, strict=True):
        assert not a[:, :, : 1 if name in ("dk", "dv", "dgate") else 4].any(), name
    assert got[0][0, :, 4:8].any(-1).any(-1).nonzero().flatten().tolist() == [4321]


def test_packed_documents_equal_each_alone():
    lengths = (1, 1500, 63, 5000, 2, 700, 3000)
    case = Case(R=4, D=128, dtype=BF16, T=sum(lengths))
    x, active, grad = draw(case, device="cuda")
    begins = [sum(lengths[:at]) for at in range(len(lengths))]
    start = torch.tensor([begin for begin, length in zip(begins, lengths, strict=True) for _ in range(length)], device="cuda")[None]

    def run(x, active, grad, start):
        leaves = [t.detach().requires_grad_() for t in x]
        out = triton_attention(*leaves[:3], active, leaves[3], scale=0.1, start=start)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    packed = run(x, active, grad, start)
    for begin, length in zip(begins, lengths, strict=True):
        part = slice(begin, begin + length)
        alone = run([t[:, part] for t in x], active[:, part], grad[:, part], None)
        for name, a, b in zip(NAMES, packed, alone, strict=True):
            assert_near(f"{name} of {length} at {begin}", a[:, part], b.double(), BOUNDS[BF16][name != "output"])


def test_128k_tokens_train_in_bounded_memory():
    T, G, R, D = 131072, 2, 3, 128
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (torch.randn(1, T, heads, D, generator=generator, device="cuda", dtype=BF16) for heads in (G * R, G, G, G * R))
    active = torch.rand(1, T, G, generator=generator, device="cuda") < torch.tensor([0.75, 0.05], device="cuda")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = triton_attention(*leaves, active, scale=D**-0.5)
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream)
    # outputs, gradients, lists: a matrix of T x T of one head alone would be 16 GiB
    assert torch.cuda.max_memory_allocated() - before < 3 * sum(t.numel() * 2 for t in (q, k, v)) + 2**27
    for n in (131071, 65536, 100_001, 63, 64):
        seen = torch.arange(T, device="cuda") <= n
        want = masked_attention(q[:, n : n + 1].detach().double(), k.detach().double(), v.detach().double(), seen[None, None, None], D**-0.5)
        want = want.masked_fill(~active[:, n : n + 1].repeat_interleave(R, 2)[..., None], 0)
        assert_near(f"row {n}", out[:, n : n + 1], want, BOUNDS[BF16][0], floor=1e-9)
    for g in range(G):
        heads = slice(g * R, (g + 1) * R)
        # every row's weights sum to 1, so the values' gradients add up to the used outputs'
        got, want = dv[0, :, g].double().sum(0), (upstream[0, :, heads].double() * active[0, :, g, None, None]).sum((0, 1))
        assert (got - want).norm() <= 3e-2 * want.norm() + 1.0, g
        # a shift that all keys share changes no weight
        assert dk[0, :, g].double().sum(0).norm() <= 2e-2 * dk[0, :, g].double().norm(), g
        assert dq[0, :, heads].isfinite().all()
        assert not dq[0, ~active[0, :, g], heads].any()


def test_offsets_beyond_32_bits_reach_the_right_elements():
    T, H, D = 600_000, 32, 128
    assert T * H * D > 2**31
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, T, H, D, generator=generator, device="cuda", dtype=BF16) for _ in range(3))
    rows = (100, 300_000, 524_289, 599_999)
    active = torch.zeros(1, T, H, dtype=torch.bool, device="cuda")
    active[:, :, [0, 31]] = torch.rand(1, T, 2, generator=generator, device="cuda") < 0.01
    active[:, list(rows)] = True
    with torch.no_grad():
        out = triton_attention(q, k, v, active, scale=D**-0.5)
    for head in (0, 17, 31):
        for n in rows:
            weights = torch.softmax(k[0, : n + 1, head].double() @ q[0, n, head].double() * D**-0.5, 0)
            assert_near(f"row {n} of head {head}", out[0, n, head], weights @ v[0, : n + 1, head].double(), BOUNDS[BF16][0], floor=0.0)
    assert not out[0, 599_998, 17].any()


def test_compiled_train_step_has_one_graph_and_the_bits_of_the_uncompiled_one():
    case = Case(R=4, D=128, dtype=BF16)

    def step(q, k, v, gate, active):
        return (triton_attention(q * 0.5, k, v, active, gate, scale=0.1).float() * 3.0).square().mean()

    compiled = torch.compile(step, fullgraph=True)
    for T in (257, 321, 513):  # the second length makes T dynamic
        x, active, _ = draw(case._replace(T=T), device="cuda")
        leaves = [t.requires_grad_() for t in x]
        loss, wanted = compiled(*leaves, active), step(*leaves, active)
        torch.testing.assert_close(loss, wanted)
        for name, a, b in zip(NAMES[1:], torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            assert_near(name, a, b.double(), 5e-3)  # the loss around the operator is fused, and rounds once less


def test_auto_takes_the_kernels_for_half_precision_only():
    case = Case(R=2, D=64, dtype=BF16)
    (q, k, v, gate), active, _ = draw(case, device="cuda")
    settings = case.settings("cuda")
    assert torch.equal(routed_attention(q, k, v, active, gate, **settings), triton_attention(q, k, v, active, gate, **settings))
    wide = [t.float() for t in (q, k, v)]
    assert torch.equal(routed_attention(*wide, active, gate, **settings), reference.routed_attention(*wide, active, gate, **settings))


# ---------------------------------------------------------------- what else a decode step has


def replayed(step, change):
    """(what a captured step gives after `change`, allocations that a step makes); a capture makes some of its own."""
    step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    change()
    graph.replay()
    return out, allocations


@pytest.mark.parametrize("batch", [1, 7, 256])
@pytest.mark.parametrize(("units", "heads", "dim", "shared"), [(8, 32, 128, 4), (32, 32, 128, 0), (3, 9, 64, 1), (128, 128, 64, 32), (2, 4, 80, 0)])
def test_choice_is_that_of_pytorch_in_one_launch_of_a_graph(batch, units, heads, dim, shared):
    columns, generator = columns_of(units, shared).cuda(), torch.Generator("cuda").manual_seed(batch)
    q = torch.randn(batch, heads, 1, dim, generator=generator, device="cuda", dtype=BF16).transpose(1, 2)
    q = q * torch.rand(batch, 1, heads, 1, generator=generator, device="cuda", dtype=torch.float32).exp().to(BF16)
    scores = torch.randint(0, 4, (batch, 1, units - shared), generator=generator, device="cuda").float()
    for num_chosen in {1, (units - shared) // 2}:
        assert torch.equal(route_scores(scores, columns, num_chosen), route_scores(scores, columns, num_chosen, impl="reference"))
        used = route_queries(q, columns, num_chosen)
        norms = q.double().square().unflatten(2, (units, -1)).sum((3, 4)).sqrt()
        least = norms.masked_fill(~used | (columns < 0), torch.inf).amin(-1)
        most = norms.masked_fill(used, -torch.inf).amax(-1)
        assert (used.sum(-1) == shared + num_chosen).all()
        assert used[..., columns < 0].all()
        assert (least >= most * (1 - 1e-6)).all()  # norms that agree to fp32's last digits may be taken either way
    out, allocations = replayed(lambda: route_queries(q, columns, 1), lambda: q.copy_(q.flip(0).roll(1, 2)))
    assert allocations == 1
    assert torch.equal(out, route_queries(q, columns, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "bias"), [(4096, 4096, False), (576, 576, True), (5120, 5120, False), (1000, 96, True)])
def test_projection_of_one_row_is_right_reads_no_weights_that_meet_zeros_and_replays(N, K, bias, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    linear = SkippingLinear(K, N, bias=bias, device="cuda", dtype=dtype)
    x = torch.randn(1, 1, K, generator=generator, device="cuda", dtype=dtype)
    x.view(-1, 32)[::3] = 0

    def exact():
        return nn.functional.linear(x.double(), linear.weight.detach().double().nan_to_num(), linear.bias.double() if bias else None).detach()

    with torch.no_grad():
        linear.weight.view(N, -1, 32)[:, ::3] = torch.nan
        assert_near("output", linear(x), exact(), BOUNDS[dtype][0])
        out, allocations = replayed(lambda: linear(x), lambda: x.mul_(2))
        assert allocations == 1
        assert_near("replayed", out, exact(), BOUNDS[dtype][0])
        assert torch.equal(out, linear(x))
        assert linear(x.repeat(2, 1, 1)).isnan().all()  # more rows are an ordinary product
    assert linear(x).isnan().all()  # and so is what has a gradient
