"""The span kernels on the GPU they are made for: many seeds against fp64, poisoned memory, repeated runs, long and packed sequences, torch.compile."""

import pytest
import torch
from test_kernel_triton import assert_near, poison
from test_span_reference import DENSE, LATE, ONE, ONE_KEY, QUARTER
from test_span_triton import Case, draw, outputs_and_gradients

from attnconvert.kernels.span import reference
from attnconvert.kernels.span.api import span_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# ||got - want|| / ||want|| of a tensor, for (output, gradients); want is fp64 on the same rounded inputs
BOUNDS = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 5e-3)}
SEEDS = 20
BF16 = torch.bfloat16
CASES = [
    Case(((512, 0), (100, 0), (0, ONE // 2), DENSE), 64, D=128, dtype=BF16),
    Case(((200, ONE // 8), (64, 0)), 64, R=4, D=128, dtype=BF16, where="packed"),
    Case(((70, 0), LATE, ONE_KEY), 4, R=3, D=64, dtype=BF16, where="padded"),
    Case((QUARTER, (300, 0)), 150, R=2, D=80, dtype=torch.float16, where="padded then packed"),
    Case(((128, 0), (333, 3 * ONE // 8, 520)), 64, R=2, D=256, dtype=BF16, B=2),
    Case((DENSE, (65, 0)), 0, R=8, D=96, dtype=torch.float16),
    Case(((90, 0), (5, ONE // 4, 77)), 20, D=32, dtype=BF16, where="packed"),
]


def triton_attention(*arguments, **options):
    return span_attention(*arguments, **options, impl="triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_seeds_agree_with_fp64_and_twice_give_the_same_bits(case):
    for seed in range(SEEDS):
        # Lengths of one tile and of many; odd ones: Triton compiles a second kernel for multiples of 16, which other tests take.
        length = int(2 ** torch.empty(()).uniform_(4.7, 11.5, generator=torch.Generator().manual_seed(seed))) | 1
        case = case._replace(T=max(length, 241) if case.where != "whole" else length)
        x = draw(case, seed, "cuda")
        want = outputs_and_gradients(reference.span_attention, case, x, torch.float64)
        got = outputs_and_gradients(triton_attention, case, x)
        for_output, for_gradients = BOUNDS[case.dtype]
        for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
            assert_near(f"{name}, seed {seed}, T={case.T}", a, b, for_output if name == "output" else for_gradients)
        with poison():
            for a, b in zip(outputs_and_gradients(triton_attention, case, x), got, strict=True):
                assert torch.equal(a, b), f"seed {seed}"


def long_inputs(T, heads, groups, D, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(1, T, count, D, generator=g, device="cuda", dtype=BF16) for count in (heads, groups, groups)]


def row_by_definition(x, n, head, rule, num_sinks, scale, begin=0):
    """Output [D] of one query in fp64."""
    q, k, v = x
    g = head * k.shape[2] // q.shape[2]
    size = max(1, rule[0] + (((n - begin + 1) * rule[1]) >> 16))
    low = max(begin, n + 1 - size)
    keys = torch.cat([torch.arange(begin, max(begin, min(begin + num_sinks, low))), torch.arange(low, n + 1)]).cuda()
    return torch.softmax(k[0, keys, g].double() @ q[0, n, head].double() * scale, 0) @ v[0, keys, g].double()


def test_128k_tokens_train():
    """Gradients of a long sequence: outputs row by row, and the gradients' sums against what the outputs say."""
    T, rules = 131072, ((512, 0), (64, ONE // 4), DENSE)
    x = long_inputs(T, 6, 3, 128)
    leaves = [t.requires_grad_() for t in x]
    case = Case(rules, 64, D=128, dtype=BF16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = triton_attention(*leaves, **case.settings("cuda"))
    upstream = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda", dtype=BF16)
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream)
    # outputs, gradients, sums of the sinks: a matrix of T x T of one head alone would be 16 GiB
    assert torch.cuda.max_memory_allocated() - before < 3 * sum(t.numel() * 2 for t in x) + 2**28
    for head, n in ((0, 131071), (1, 65536), (2, 100_001), (3, 4095), (4, 131071), (5, 70_000)):
        want = row_by_definition([t.detach() for t in x], n, head, rules[head // 2], 64, case.settings()["scale"])
        assert_near(f"row {n} of head {head}", out[0, n, head], want, BOUNDS[BF16][0], floor=0.0)
    for g in range(3):
        # every row's weights sum to 1, so the values' gradients add up to the outputs'
        got, want = dv[0, :, g].double().sum(0), upstream[0, :, 2 * g : 2 * g + 2].double().sum((0, 1))
        assert (got - want).norm() <= 3e-2 * want.norm() + 1.0, g
        # a shift that all keys share changes no weight
        assert dk[0, :, g].double().sum(0).norm() <= 2e-2 * dk[0, :, g].double().norm(), g
        assert dq[0, :, 2 * g].isfinite().all()


@pytest.mark.parametrize("rule", [(512, 0), (0, ONE // 2)], ids=str)
def test_gradients_of_many_segments_agree_with_fp64(rule):
    case = Case((rule, (2000, 0)), 64, R=2, D=64, dtype=BF16, T=8192)
    x = draw(case, device="cuda")
    want = outputs_and_gradients(reference.span_attention, case, x, torch.float64)
    for name, a, b in zip(("output", "dq", "dk", "dv"), outputs_and_gradients(triton_attention, case, x), want, strict=True):
        assert_near(name, a, b, BOUNDS[BF16][name != "output"])
        if name in ("dk", "dv"):  # sinks, which later segments send sums to
            assert_near(f"{name} of sinks", a[:, :64], b[:, :64], BOUNDS[BF16][1])


def test_packed_documents_equal_each_alone():
    lengths, rules = [1, 1500, 63, 5000, 2, 700, 3000], ((512, 0), (64, ONE // 4))
    case = Case(rules, 64, R=4, D=128, dtype=BF16)
    x = long_inputs(sum(lengths), 8, 2, 128)
    begins = [sum(lengths[:at]) for at in range(len(lengths))]
    start = torch.tensor([begin for begin, length in zip(begins, lengths, strict=True) for _ in range(length)], device="cuda")[None]
    settings = case.settings("cuda")

    def run(tensors, start):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = triton_attention(*leaves, **settings | {"start": start})
        return [out, *torch.autograd.grad(out, leaves, upstream[:, : out.shape[1]] if start is None else upstream_packed)]

    upstream = torch.randn(1, max(lengths), 8, 128, generator=torch.Generator("cuda").manual_seed(1), device="cuda", dtype=BF16)
    upstream_packed = torch.cat([upstream[:, :length] for length in lengths], 1)
    packed = run(x, start)
    for begin, length in zip(begins, lengths, strict=True):
        alone = run([t[:, begin : begin + length] for t in x], None)
        for name, a, b in zip(("output", "dq", "dk", "dv"), packed, alone, strict=True):
            assert_near(f"{name} of {length} at {begin}", a[:, begin : begin + length], b.double(), BOUNDS[BF16][name != "output"])


def test_offsets_beyond_32_bits_reach_the_right_elements():
    T = 600_000
    assert T * 32 * 128 > 2**31
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GiB of free GPU memory")
    rules = ((512, 0),) * 31 + ((4096, 0),)
    case = Case(rules, 64, D=128, dtype=BF16)
    x = long_inputs(T, 32, 32, 128)
    with torch.no_grad():
        out = triton_attention(*x, **case.settings("cuda"))
    for head in (0, 31):
        for n in (100, 300_000, 524_289, 599_999):
            want = row_by_definition(x, n, head, rules[head], 64, case.settings()["scale"])
            assert_near(f"row {n} of head {head}", out[0, n, head], want, BOUNDS[BF16][0], floor=0.0)


def test_compiled_train_step_has_one_graph_and_the_bits_of_the_uncompiled_one():
    case = CASES[0]
    rules = {name: case.settings("cuda")[name] for name in ("alpha", "beta", "least")}

    def step(q, k, v, alpha, beta, least):
        out = triton_attention(q * 0.5, k, v, alpha=alpha, beta=beta, least=least, num_sinks=64, scale=0.1, start=None)
        return (out.float() * 3.0).square().mean()

    compiled = torch.compile(step, fullgraph=True)
    for T in (257, 321, 513):  # the second length makes T dynamic
        leaves = [t.requires_grad_() for t in draw(case._replace(T=T), device="cuda")]
        loss, wanted = compiled(*leaves, **rules), step(*leaves, **rules)
        torch.testing.assert_close(loss, wanted)
        for name, a, b in zip("qkv", torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            assert_near(name, a, b.double(), 5e-3)  # the loss around the operator is fused, and rounds once less


def test_auto_takes_the_kernels_for_half_precision_only():
    case = CASES[0]
    x = draw(case, device="cuda")
    assert torch.equal(span_attention(*x, **case.settings("cuda")), triton_attention(*x, **case.settings("cuda")))
    wide = [t.float() for t in x]
    assert torch.equal(span_attention(*wide, **case.settings("cuda")), reference.span_attention(*wide, **case.settings("cuda")))
