"""The block-sparse kernels on the GPU they are made for: many seeds against fp64, poisoned memory, repeated runs, long and packed rows, steps, torch.compile."""

from typing import NamedTuple

import pytest
import torch
from test_kernel_triton import assert_near, poison

from attnconvert.kernels.blocks import reference
from attnconvert.kernels.blocks.api import block_sparse_attention
from attnconvert.kernels.blocks.decode import block_sparse_step, fill
from attnconvert.kernels.blocks.rule import BlockRule, capacity_for
from attnconvert.kernels.softmax import masked_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BOUNDS = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 5e-3)}  # ||got - want|| / ||want|| of (output, gradients)
SCORE_BOUND = 2e-2  # how much better a block that was passed over may be, by scores of fp64: keys' means are rounded
NAMES = ("output", "dq", "dk", "dv")
SEEDS = 6
BF16 = torch.bfloat16


class Case(NamedTuple):
    rule: BlockRule
    R: int = 4
    D: int = 128
    G: int = 2
    dtype: torch.dtype = BF16
    lengths: tuple[int, ...] | None = None  # of packed documents

    def __str__(self):
        return f"S{self.rule.block_size}-{self.rule.scorer}-R{self.R}-D{self.D}" + "-packed" * (self.lengths is not None)


RULE = BlockRule(64, 1, 4, 12, 0)
CASES = [
    Case(RULE, R=16),
    Case(RULE, R=4, lengths=(1024, 64, 1473)),
    Case(BlockRule(32, 1, 4, 16, 700), R=3, D=64, G=3),
    Case(BlockRule(32, 1, 4, 16, 0), R=7, D=80, dtype=torch.float16, G=1),
    Case(BlockRule(128, 1, 2, 6, 0), R=1, D=96, G=4),
    Case(BlockRule(64, 1, 2, 9, 0, "mean"), R=8, D=64, dtype=torch.float16, G=1, lengths=(1280, 1250)),
    Case(BlockRule(64, 0, 0, 5, 0), R=2, D=256, G=2),
]


def draw(case, T, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    sizes = (case.G * case.R, case.G, case.G, case.G * case.R)
    return [torch.randn(1, T, heads, case.D, generator=g, device="cuda", dtype=case.dtype) for heads in sizes]


def run(case, x, start):
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    out = block_sparse_attention(*leaves, rule=case.rule, scale=case.D**-0.5, start=start, aligned=True, impl="triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, x[3])]


def chosen_by_kernel(case, x, start):
    from attnconvert.kernels.blocks.triton_select import triton_select_blocks

    return triton_select_blocks(x[0], x[1], rule=case.rule, scale=case.D**-0.5, start=start)


def check_choice(case, chosen, q, k):
    """The blocks of one document that begins at 0: all forced ones, none of the future, as many as there may be, and the best, within rounding."""
    rule, position = case.rule, torch.arange(q.shape[1], device="cuda")
    N = chosen.shape[-1]
    fine, coarse = reference.compressed_keys(k, rule)
    scores = reference.block_scores(q.double(), fine.double(), coarse.double(), position[None], N, rule, case.D**-0.5)
    block, own = torch.arange(N, device="cuda"), (position // rule.block_size)[:, None]
    forced = (block <= own) & ((block < rule.num_init) | (block >= own - rule.num_local))
    free = (block <= own) & ~forced
    assert (chosen | ~forced).all()
    assert not (chosen & (block > own)).any()
    dense = (position + 1 < rule.dense_len)[:, None]
    want = torch.where(dense, own + 1, (own + 1).clamp_max(rule.num_blocks)).squeeze(-1)
    assert torch.equal(chosen.sum(-1), want.expand(chosen.shape[:3]))
    taken = scores.masked_fill(~(free & chosen), torch.inf).amin(-1)
    passed = scores.masked_fill(~(free & ~chosen), 0.0).amax(-1)
    assert (passed <= taken * (1 + SCORE_BOUND)).all(), (passed / taken).max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_seeds_agree_with_fp64_and_twice_give_the_same_bits(case):
    for seed in range(SEEDS):
        T = sum(case.lengths) if case.lengths else (37, 1201, 1024, 2500, 777, 1999)[seed]
        x, start = draw(case, T, seed), None
        begins = [0] if case.lengths is None else [sum(case.lengths[:at]) for at in range(len(case.lengths))]
        lengths = case.lengths or (T,)
        if case.lengths:
            start = torch.tensor([b for b, length in zip(begins, lengths, strict=True) for _ in range(length)], device="cuda")[None]
        got = run(case, x, start)
        chosen = chosen_by_kernel(case, x, start)
        S = case.rule.block_size
        for begin, length in zip(begins, lengths, strict=True):
            part = [t[:, begin : begin + length] for t in x]
            own = chosen[:, :, begin : begin + length, begin // S : -(-(begin + length) // S)]
            if length > S:
                check_choice(case, own, part[0], part[1])
            seen = own.repeat_interleave(S, -1)[..., :length] & torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
            leaves = [t.double().requires_grad_() for t in part[:3]]
            out = masked_attention(*leaves, seen.repeat_interleave(case.R, 1), case.D**-0.5)
            want = [out.detach(), *torch.autograd.grad(out, leaves, part[3].double())]
            for name, a, b in zip(NAMES, got, want, strict=True):
                assert_near(f"{name}, seed {seed}, {length} at {begin}", a[:, begin : begin + length], b, BOUNDS[case.dtype][name != "output"])
        with poison():
            for a, b in zip(run(case, x, start), got, strict=True):
                assert torch.equal(a, b), f"seed {seed}"


def test_unaligned_documents_and_padding_equal_each_alone():
    case, lengths = Case(RULE, R=4), (701, 1, 1300, 450)
    x, begins = draw(case, sum(lengths), 0), [0, 701, 702, 2002]
    start = torch.tensor([b for b, length in zip(begins, lengths, strict=True) for _ in range(length)], device="cuda")[None]
    packed = block_sparse_attention(*x[:3], rule=case.rule, scale=case.D**-0.5, start=start, impl="triton")
    padded = block_sparse_attention(*x[:3], rule=case.rule, scale=case.D**-0.5, start=torch.full_like(start, 1001), impl="triton")
    assert padded.isfinite().all()
    alone = block_sparse_attention(*(t[:, 1001:] for t in x[:3]), rule=case.rule, scale=case.D**-0.5, impl="triton")
    assert_near("behind padding", padded[:, 1001:], alone.double(), 1e-3)
    for begin, length in zip(begins, lengths, strict=True):
        alone = block_sparse_attention(*(t[:, begin : begin + length] for t in x[:3]), rule=case.rule, scale=case.D**-0.5, impl="triton")
        assert_near(f"{length} at {begin}", packed[:, begin : begin + length], alone.double(), BOUNDS[BF16][0])


def test_128k_tokens_in_bounded_memory():
    case = Case(BlockRule(dense_len=0), R=4, G=2)
    q, k, v, _ = draw(case, 131072, 0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = block_sparse_attention(q, k, v, rule=case.rule, scale=case.D**-0.5, impl="triton")
    # outputs, log-sums, compressed keys, the scores and lists of a chunk: all scores of one KV head alone would be 1 GiB
    assert torch.cuda.max_memory_allocated() - before < 2 * q.numel() + 1.2 * 2**30
    chosen = chosen_by_kernel(case, (q, k), None)
    for n in (131071, 65536, 100_001, 6143, 6144):
        seen = chosen[:, :, n : n + 1].repeat_interleave(64, -1)[..., :131072] & (torch.arange(131072, device="cuda") <= n)
        want = masked_attention(q[:, n : n + 1].double(), k.double(), v.double(), seen.repeat_interleave(case.R, 1), case.D**-0.5)
        assert_near(f"row {n}", out[:, n : n + 1], want, BOUNDS[BF16][0], floor=0.0)


@pytest.mark.parametrize("case", [Case(RULE, R=16, G=1), Case(BlockRule(32, 1, 4, 16, 1100), R=3, D=64, G=3), Case(RULE._replace(scorer="mean"), R=4)], ids=str)
def test_steps_in_a_cuda_graph_equal_the_pytorch_step(case):
    T, more, rows = 1090, 40, 3  # rows of a batch cross dense_len one after another
    q, k, v = (torch.cat([t] * rows) for t in draw(case, T + more, 0)[:3])
    pads = torch.tensor([0, 500, 1089], device="cuda")[:, None]
    start = pads.expand(-1, T)
    scale = case.D**-0.5
    state = fill(k[:, :T], v[:, :T], case.rule, capacity_for(T + more), start)
    twin = type(state)(*(t.clone() for t in state))
    static = [torch.empty_like(t[:, :1]) for t in (q, k, v)]
    none = torch.zeros(rows, 1, dtype=torch.long, device="cuda")

    def step(into, impl):
        return block_sparse_step(*static, into, rule=case.rule, scale=scale, start=none, impl=impl)

    for t, source in zip(static, (q, k, v), strict=True):
        t.copy_(source[:, T : T + 1])
    warm = type(state)(*(t.clone() for t in state))
    step(warm, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(state, "triton")
    for n in range(T, T + more):
        for t, source in zip(static, (q, k, v), strict=True):
            t.copy_(source[:, n : n + 1])
        graph.replay()
        want = step(twin, "reference")
        assert_near(f"step {n}", out, want.double(), 2e-2)
    for a, b in zip(state, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_compiled_without_a_graph_break():
    case = Case(RULE, R=4)
    x = draw(case, 1100, 0)
    leaves = [t.detach().requires_grad_() for t in x[:3]]

    @torch.compile(fullgraph=True)
    def compiled(q, k, v):
        return block_sparse_attention(q, k, v, rule=case.rule, scale=case.D**-0.5) * 2

    out = compiled(*leaves)
    grads = torch.autograd.grad(out, leaves, x[3])
    for name, a, b in zip(NAMES, [out.detach(), *grads], run(case, x, None), strict=True):
        assert_near(name, a, 2 * b.double(), BOUNDS[BF16][1])
