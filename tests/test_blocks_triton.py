"""Block-sparse attention's kernels in Triton's interpreter, on the CPU, against PyTorch in fp64: attention over given lists of blocks, and the whole operator.

Triton decides when it is imported whether it interprets, so the kernels run in a process of their own, as in test_kernel_triton.py.
"""

import itertools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from test_kernel_triton import assert_near, interpreter, poison, version  # noqa: F401

from attnconvert.kernels.blocks import api, reference
from attnconvert.kernels.blocks.rule import BlockRule
from attnconvert.kernels.launch import Layout, Plan, signature
from attnconvert.kernels.softmax import masked_attention

pytest.importorskip("triton")

from attnconvert.kernels.blocks import triton_attend, triton_operator, triton_select

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # ||got - want|| / ||want|| of each tensor
interpreted = pytest.mark.skipif(version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="Triton's interpreter of that age fails with this numpy")
NAMES = ("output", "dq", "dk", "dv")


class Case(NamedTuple):
    """D: head_dim. R: query heads of each of G KV heads. S: block size. share: of the past blocks, what a token sees."""

    D: int = 16
    R: int = 2
    S: int = 32
    T: int = 150
    dtype: torch.dtype = torch.float32
    G: int = 1
    B: int = 1
    share: float = 0.5

    def __str__(self):
        return "-".join(str(value).removeprefix("torch.") for value in self)

    @property
    def scale(self):
        return self.D**-0.5


def draw(case):
    """q, k, v and a gradient of the output."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(case.B, case.T, heads, case.D, generator=g).to(case.dtype) for heads in (case.G * case.R, case.G, case.G, case.G * case.R)]


def draw_seen(case):
    """Boolean [B, G, T, N]: each token's own block and some before it; the second one is seen by its own tokens alone."""
    N = -(-case.T // case.S)
    own, block = (torch.arange(case.T) // case.S)[:, None], torch.arange(N)
    seen = torch.rand(case.B, case.G, case.T, N, generator=torch.Generator().manual_seed(1)) < case.share
    return (seen & (block < own) & (block != 1)) | (block == own)


def words_of(seen, case):
    """[B, G, tiles, N] as the kernels that choose blocks write them; tokens behind the last one see their own block."""
    tokens = triton_select.tile_tokens(case.R, case.D, case.S)
    tiles = -(-case.T // tokens)
    whole = torch.zeros(*seen.shape[:2], tiles * tokens, seen.shape[3], dtype=torch.bool)
    whole[:, :, : case.T] = seen
    whole[:, :, case.T :, -1] = True
    bits = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(tokens)])
    words = torch.where(whole.unflatten(2, (tiles, tokens)), bits[:, None], 0).sum(3)
    return words if tokens > 32 else (words & 0xFFFFFFFF).to(torch.int64).sub((words & 0x80000000) << 1).to(torch.int32)


def attend(words, q, k, v, case):
    """Output and log-sums of the forward kernel over lists of the words."""
    q_, k_, v_ = signature(q, k, v)
    tiles, room = words.shape[2:]
    layout = Layout()
    for name, count in (("count", 1), ("block", room), ("word", room)):
        layout.add(name, (case.B * case.G * tiles * count,), words.dtype if name == "word" else torch.int32)
    launches = [
        triton_attend.pack_launch(q_, k_, case.S, 0, tiles, room, columns=False),
        triton_attend.forward_launch(q_, k_, v_, case.S, case.scale, 0, case.T, room),
    ]
    output, lse = torch.empty_like(q), torch.empty(case.B, case.T, case.G * case.R)
    Plan(-1, ("words", "q", "k", "v", "output", "lse", "scratch"), launches, {"scratch": layout})(words, q, k, v, output, lse, layout.allocate(q.device))
    return output, lse


def attend_backward(words, q, k, v, output, lse, grad, case):
    """dq, dk, dv."""
    launches, layout = triton_attend.backward_launches(*signature(q, k, v, grad), case.S, case.scale, words.shape[3])
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    names = ("q", "k", "v", "output", "lse", "words", "grad", "dq", "dk", "dv", "scratch")
    Plan(-1, names, launches, {"scratch": layout})(q, k, v, output, lse, words, grad, *gradients, layout.allocate(q.device))
    return gradients


def attend_fp64(seen, q, k, v, grad, case):
    """[output, dq, dk, dv] by PyTorch."""
    pairs = seen.repeat_interleave(case.S, -1)[..., : case.T] & torch.ones(case.T, case.T, dtype=torch.bool).tril()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = masked_attention(*leaves, pairs.repeat_interleave(case.R, 1), case.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def compare_attend(case):
    *x, grad = draw(case)
    seen = draw_seen(case)
    words = words_of(seen, case)
    grad[:, case.S : 2 * case.S] = 0  # the second block's own tokens: nothing comes to its keys
    want = attend_fp64(seen, *x, grad, case)
    with poison():
        output, lse = attend(words, *x, case)
        got = [output, *attend_backward(words, *x, output, lse, grad, case)]
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.isfinite().all(), name
        assert_near(name, a, b, TOLERANCE[case.dtype])
    for a in got[2:]:
        assert not a[:, case.S : 2 * case.S].any()


ATTEND = [
    Case(D=16, R=1, S=32, T=110, B=2),
    Case(D=16, R=1, S=64, T=200),
    Case(D=64, R=2, S=64, T=300, dtype=torch.float16, G=2),
    Case(D=80, R=3, S=32, T=101),
    Case(D=96, R=4, S=128, T=300, dtype=torch.float16),
    Case(D=128, R=7, S=64, T=150, dtype=torch.float16),
    Case(D=256, R=2, S=64, T=150, dtype=torch.float16),
    Case(D=16, R=16, S=64, T=101, dtype=torch.float16),
    Case(D=32, R=4, S=32, T=96, share=0.0),
    Case(D=16, R=4, S=32, T=1, G=2),
]


@interpreted
@pytest.mark.parametrize("case", ATTEND, ids=str)
def test_attention_over_given_lists_agrees_with_fp64_and_unseen_blocks_get_no_gradient(interpreter, case):  # noqa: F811
    interpreter.submit(compare_attend, case).result()


def compare_dropped_bit():
    case = Case(D=16, R=2, S=32, T=128)
    *x, grad = draw(case)
    seen = draw_seen(case)
    token, block = next((n, b) for n, b in itertools.product(range(127, -1, -1), range(4)) if b < n // 32 and seen[0, 0, n, b])
    less = seen.clone()
    less[0, 0, token, block] = False
    want = attend_fp64(seen, *x, grad, case)
    output, lse = attend(words_of(less, case), *x, case)
    got = [output, *attend_backward(words_of(less, case), *x, output, lse, grad, case)]
    for name, a, b in zip(NAMES, got, want, strict=True):
        with pytest.raises(AssertionError):
            assert_near(name, a, b, TOLERANCE[case.dtype])
    wrong = (got[0] - want[0]).abs().amax((0, 2, 3)) > 1e-4
    assert wrong.nonzero().flatten().tolist() == [token]


@interpreted
def test_a_dropped_bit_changes_that_token_alone_and_is_seen(interpreter):  # noqa: F811
    interpreter.submit(compare_dropped_bit).result()


def compare_pieces():
    case = Case(D=16, R=4, S=32, T=100, G=2)
    *x, grad = draw(case)
    words = words_of(draw_seen(case), case)
    output, lse = attend(words, *x, case)
    want = attend_backward(words, *x, output, lse, grad, case)
    with mock.patch.object(triton_attend, "LIST_BYTES", 200):
        launches, _ = triton_attend.backward_launches(*signature(*x, grad), case.S, case.scale, words.shape[3])
        assert len(launches) > 8
        got = attend_backward(words, *x, output, lse, grad, case)
    for name, a, b in zip(NAMES[1:], got, want, strict=True):
        assert torch.equal(a, b), name


@interpreted
def test_lists_made_in_pieces_give_the_same_bits(interpreter):  # noqa: F811
    interpreter.submit(compare_pieces).result()


RULE = BlockRule(block_size=32, num_init=1, num_local=0, num_blocks=3, dense_len=0)
STARTS = {
    "aligned": lambda T: [[0] * 64 + [64] * 128 + [192] * (T - 192), [0] * (T - 8) + [T] * 8],
    "aligned to blocks of 32": lambda T: [[0] * 32 + [32] * 128 + [160] * (T - 160), [0] * T],
    "packed": lambda T: [[0] * 50 + [50] * 110 + [160] * (T - 160), [0] * 1 + [1] * (T - 1)],
    "padded": lambda T: [[T] * T, [77] * T],
    "padded inside": lambda T: [[5] * 150 + [170] * (T - 150), [0] * 60 + [64] * (T - 60)],
}


class Whole(NamedTuple):
    """A call of the operator. where: of STARTS, or `whole`."""

    case: Case
    rule: BlockRule = RULE
    where: str = "whole"

    def __str__(self):
        return f"{self.case}-{self.rule.scorer}-{self.where}"

    @property
    def start(self):
        return None if self.where == "whole" else torch.tensor(STARTS[self.where](self.case.T))

    def settings(self):
        return {"rule": self.rule, "scale": self.case.scale, "start": self.start}

    def real(self):
        """[B, T, 1, 1], 0 for padding."""
        return torch.ones(1, self.case.T, 1, 1) if self.start is None else (self.start <= torch.arange(self.case.T)).float()[:, :, None, None]


def outputs_and_gradients(operator, call, x, dtype=None, **more):
    """[output, dq, dk, dv] of real tokens."""
    *x, grad = x
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in x]
    out = operator(*leaves, **call.settings(), **more) * call.real().to(leaves[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare_operator(call):
    x = draw(call.case)
    want = outputs_and_gradients(reference.block_sparse_attention, call, x, torch.float64)
    with poison():
        got = outputs_and_gradients(triton_operator.triton_block_sparse_attention, call, x, aligned="aligned" in call.where)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.isfinite().all(), name
        assert_near(name, a, b, TOLERANCE[call.case.dtype])


OPERATOR = [
    Whole(Case(D=16, R=4, T=170, G=2)),
    Whole(Case(D=16, R=2, T=203), RULE._replace(dense_len=120)),
    Whole(Case(D=32, R=3, S=64, T=230), BlockRule(64, 1, 0, 2, 0, "mean")),
    *(Whole(Case(D=16, R=2, T=200, B=2), where=where) for where in STARTS),
    Whole(Case(D=16, R=2, S=64, T=250, B=2), BlockRule(64, 1, 0, 2, 0), "aligned"),
]


@interpreted
@pytest.mark.parametrize("call", OPERATOR, ids=str)
def test_operator_agrees_with_fp64(interpreter, call):  # noqa: F811
    interpreter.submit(compare_operator, call).result()


def compare_repeat():
    call = Whole(Case(D=16, R=2, T=110))
    x = draw(call.case)
    want = outputs_and_gradients(triton_operator.triton_block_sparse_attention, call, x)
    strided = [torch.cat([t, t], -1)[..., : call.case.D] for t in x]
    spread = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in x]
    with poison():
        for other in (x, strided, spread):
            for name, a, b in zip(NAMES, outputs_and_gradients(triton_operator.triton_block_sparse_attention, call, other), want, strict=True):
                assert torch.equal(a, b), name
        with torch.no_grad():
            assert torch.equal(triton_operator.triton_block_sparse_attention(*x[:3], **call.settings()), want[0])


@interpreted
def test_runs_are_bit_equal_whatever_the_strides(interpreter):  # noqa: F811
    interpreter.submit(compare_repeat).result()


def compare_dense():
    call = Whole(Case(D=16, R=2, T=120))
    x = draw(call.case)
    rule = call.rule._replace(num_blocks=4)
    short = triton_operator.triton_block_sparse_attention(*x[:3], rule=rule, scale=call.case.scale)
    with mock.patch.object(triton_operator, "scaled_dot_product_attention", side_effect=AssertionError):
        by_kernel = triton_operator.triton_block_sparse_attention(*x[:3], rule=rule, scale=call.case.scale, start=torch.zeros(1, 120, dtype=torch.int64))
        with pytest.raises(AssertionError):
            triton_operator.triton_block_sparse_attention(*x[:3], rule=rule, scale=call.case.scale)
    assert_near("output", by_kernel, short.double(), TOLERANCE[torch.float32])


@interpreted
def test_what_sees_everything_is_dense_attention(interpreter):  # noqa: F811
    interpreter.submit(compare_dense).result()


def compare_compiled():
    call = Whole(Case(D=16, R=2))

    def loss(q, k, v):
        return api.block_sparse_attention(q * 0.5, k, v, **call.settings(), impl="triton").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for T in (100, 105, 113):  # the second length makes T dynamic
        x = [t.requires_grad_() for t in draw(call.case._replace(T=T))[:3]]
        got, want = compiled(*x), loss(*x)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
            assert torch.equal(a, b)


@interpreted
def test_compiled_whole_it_has_one_graph_and_the_same_bits(interpreter):  # noqa: F811
    interpreter.submit(compare_compiled).result()


@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("multiple", [32, 64])
def test_moved_documents_begin_at_multiples_and_keep_their_order(where, multiple):
    start = torch.tensor(STARTS[where](250))
    place, new_start = triton_operator.aligned_places(start, multiple)
    for row, begins in enumerate(start.tolist()):
        at, want = 0, [-1] * 250
        documents = sorted({begin for i, begin in enumerate(begins) if begin <= i})
        fresh = []
        for begin in documents:
            tokens = [i for i in range(250) if begins[i] == begin and begin <= i]
            for i in tokens:
                want[i] = at + i - begin
            size = -(-len(tokens) // multiple) * multiple
            fresh += [at] * size
            at += size
        assert place[row].tolist() == want
        assert new_start[row].tolist()[:at] == fresh
        assert all(begin > i for i, begin in enumerate(new_start[row].tolist()) if i >= at)
    assert new_start.shape[1] % multiple == 0


def compare_padding():
    call = Whole(Case(D=16, R=1, T=180, B=2), where="padded inside")
    out = triton_operator.triton_block_sparse_attention(*draw(call.case)[:3], **call.settings())
    padding = (call.real() == 0).expand_as(out)
    assert padding.any()
    assert not out[padding].any()


@interpreted
def test_output_of_padding_is_zero(interpreter):  # noqa: F811
    interpreter.submit(compare_padding).result()


def test_auto_on_the_cpu_is_the_reference():
    call = Whole(Case())
    x = draw(call.case)[:3]
    assert torch.equal(api.block_sparse_attention(*x, **call.settings()), reference.block_sparse_attention(*x, **call.settings()))


def test_triton_by_name_says_why_it_cannot_run_instead_of_falling_back():
    call = Whole(Case())
    x = draw(call.case)[:3]
    with pytest.raises(ValueError, match=r"impl=.triton. cannot run here: .* (GPU|installed|float16)"):
        api.block_sparse_attention(*x, **call.settings(), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        api.block_sparse_attention(*(t.double() for t in x), **call.settings(), impl="triton")
    with mock.patch.object(triton_operator, "INTERPRETED", True):
        assert "17 query heads share" in triton_operator.refusal(torch.empty(1, 9, 17, 16), torch.empty(1, 9, 1, 16), RULE)
        assert "head_dim 257" in triton_operator.refusal(torch.empty(1, 9, 1, 257), torch.empty(1, 9, 1, 257), RULE)
        assert "not a multiple" in triton_operator.refusal(torch.empty(1, 9, 3, 16), torch.empty(1, 9, 2, 16), RULE)
        long = torch.empty(1, 1, 1, 16).expand(1, 32 * triton_select.MAX_BLOCKS + 1, 1, 16)
        assert "more than" in triton_operator.refusal(long, long, RULE)
        assert triton_operator.refusal(long[:, 1:], long[:, 1:], RULE) is None
