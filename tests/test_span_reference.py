"""Spans in PyTorch against their definition, pair by pair, on a T x T mask in fp64."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from attnconvert.kernels.span import reference
from attnconvert.kernels.span.reference import BETA_ONE, attend, span_attention, window

ONE = BETA_ONE
WINDOW, DENSE, LATE, QUARTER, ONE_KEY = (13, 0), (0, ONE), (-30, ONE), (5, ONE // 4), (-100, 0)
STARTS = {
    "whole": None,
    "padded": [[0] * 90, [17] * 90],
    "packed": [[0] * 21 + [21] * 1 + [22] * 68, [0] * 40 + [40] * 50],
    "padded then packed": [[5] * 50 + [50] * 40, [3] * 31 + [31] * 59],
}


def draw(T=90, H=4, G=2, B=2, D=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(B, T, heads, D, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for heads in (H, G, G)]


def table(*rules):
    """Rules (alpha, beta) or (alpha, beta, least) as the operator takes them."""
    columns = zip(("alpha", "beta", "least"), zip(*((*rule, 1)[:3] for rule in rules), strict=True), strict=True)
    return {name: torch.tensor(column, dtype=torch.int32) for name, column in columns}


def sees(n, i, rule, num_sinks, start=0):
    """The definition for one pair, in Python's integers."""
    position, key = n - start, i - start
    alpha, beta, least = (*rule, 1)[:3]
    size = max(least, alpha + (((position + 1) * beta) >> 16))
    return 0 <= key <= position and (key < num_sinks or key > position - size)


def by_definition(q, k, v, rules, num_sinks, starts=None, scale=0.3):
    """-> outputs [B, T, H, D], zeros for padding; real tokens bool [B, T]."""
    B, T, H, _ = q.shape
    mask = torch.zeros(B, H, T, T, dtype=torch.bool)
    real = torch.ones(B, T, dtype=torch.bool)
    for b in range(B):
        for n in range(T):
            start = 0 if starts is None else starts[b][n]
            real[b, n] = start <= n
            for i in range(n + 1):
                for h in range(H):
                    mask[b, h, n, i] = sees(n, i, rules[h * len(rules) // H], num_sinks, start)
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bnhd,bihd->bhni", q.double(), k.double()) * scale
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhni,bihd->bnhd", weights, v.double()), real


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "QUERY_CHUNK", 16)


def test_window_is_alpha_plus_the_share_of_the_tokens_so_far_and_at_least_one():
    rules = [(13, 0), (0, ONE), (-30, ONE), (5, ONE // 4), (-100, 0), (2**31 - 1, ONE), (-(2**31), ONE)]
    position = torch.tensor([0, 1, 29, 30, 31, 131071, 2**22])
    found = torch.stack([window(position, torch.tensor(a), torch.tensor(b)) for a, b in rules])
    assert found.tolist() == [[max(1, a + (((n + 1) * b) >> 16)) for n in position.tolist()] for a, b in rules]


def test_lower_edge_of_the_window_never_moves_back():
    position = torch.arange(5000)
    for rule in [(13, 0), (0, ONE), (-30, ONE), (5, ONE // 4), (-700, 3 * ONE // 8), (3, 12345)]:
        edge = position + 1 - window(position, *map(torch.tensor, rule))
        assert (edge.diff() >= 0).all(), rule


@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("num_sinks", [0, 4, 40])
@pytest.mark.parametrize("rules", [(WINDOW, QUARTER), (DENSE, LATE), (ONE_KEY, ONE_KEY), ((*QUARTER, 20), (*LATE, 9))], ids=str)
def test_outputs_and_gradients_are_those_of_the_definition(where, num_sinks, rules):
    q, k, v = draw()
    starts = STARTS[where]
    want, real = by_definition(q, k, v, rules, num_sinks, starts)
    got = span_attention(q, k, v, **table(*rules), num_sinks=num_sinks, scale=0.3, start=None if starts is None else torch.tensor(starts))
    assert got.isfinite().all()
    torch.testing.assert_close(got[real], want[real])
    probe = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1)) * real[..., None, None]
    for a, b in zip(torch.autograd.grad(got, (q, k, v), probe), torch.autograd.grad(want, (q, k, v), probe), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_sinks", [0, 7])
def test_dense_rule_is_causal_softmax(num_sinks):
    q, k, v = draw(T=50, dtype=torch.float32)
    got = span_attention(q, k, v, **table(DENSE, DENSE), num_sinks=num_sinks, scale=0.3)
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, plain.transpose(1, 2))


@pytest.mark.parametrize("T", [1, 5])
def test_sequences_shorter_than_sinks_and_window_are_dense(T):
    q, k, v = draw(T=T)
    narrow = span_attention(q, k, v, **table((64, 0), (0, 0)), num_sinks=64, scale=0.3)
    torch.testing.assert_close(narrow, span_attention(q, k, v, **table(DENSE, DENSE), num_sinks=0, scale=0.3))


def test_half_precision_inputs_are_summed_in_fp32():
    q, k, v = draw(dtype=torch.bfloat16)
    want, _ = by_definition(q, k, v, (WINDOW, QUARTER), 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = span_attention(q, k, v, **table(WINDOW, QUARTER), num_sinks=4, scale=0.3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)  # one rounding of the result


@pytest.mark.parametrize("pieces", [[1, 39, 50], [90], [64, 1, 25]], ids=str)
def test_pieces_with_told_positions_equal_the_whole_whatever_the_order_of_the_slots(pieces):
    rules, num_sinks = (WINDOW, QUARTER), 4
    q, k, v = draw()
    want = span_attention(q, k, v, **table(*rules), num_sinks=num_sinks, scale=0.3)
    order = torch.randperm(95, generator=torch.Generator().manual_seed(2))
    at, got = 0, []
    for count in pieces:
        query = torch.arange(at, at + count)
        at += count
        slots = torch.where(order < at, order, -1)  # keys to come, and slots never used
        keys, values = (x.transpose(1, 2)[:, :, slots.clamp_min(0)] for x in (k, v))
        positions = {"query_position": query.expand(2, -1), "key_position": slots.expand(2, 2, -1)}
        got.append(attend(q[:, query], keys, values, **positions, **table(*rules), num_sinks=num_sinks, scale=0.3))
    torch.testing.assert_close(torch.cat(got, 1), want)


def test_query_without_keys_gets_something_finite():
    q, k, v = draw(T=3)
    key = torch.full((2, 2, 3), -1)
    out = attend(
        q, k.transpose(1, 2), v.transpose(1, 2), query_position=torch.zeros(2, 3).long(), key_position=key, **table(WINDOW, DENSE), num_sinks=4, scale=0.3
    )
    assert out.isfinite().all()


class Allocations(TorchDispatchMode):
    """Storages of everything that operators return."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def test_memory_kept_for_the_backward_pass_is_linear_in_the_length():
    sizes = []
    for T in (320, 640):
        q, k, v = draw(T=T, B=1, D=4)
        with Allocations() as allocations:
            out = span_attention(q, k, v, **table((0, ONE // 2), DENSE), num_sinks=4, scale=0.3)
        sizes.append(allocations.alive())
        assert sizes[-1] >= out.numel() * out.element_size()
    assert sizes[1] <= 2.1 * sizes[0]
