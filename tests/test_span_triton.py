"""The span kernels in Triton's interpreter, on the CPU, against the reference in fp64, and which implementation runs.

Triton decides when it is imported whether it interprets, so the kernels run in a process of their own, as in test_kernel_triton.py.
"""

import itertools
import random
from fractions import Fraction
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from test_kernel_triton import assert_near, interpreter, poison, version  # noqa: F401
from test_span_reference import DENSE, LATE, ONE, ONE_KEY, QUARTER, WINDOW, table
from torch.nn.functional import scaled_dot_product_attention

from attnconvert.kernels import choice
from attnconvert.kernels.span import api, reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from attnconvert.kernels.span import triton_operator  # noqa: E402
from attnconvert.kernels.span.triton import HIDDEN, LOG2E, _document_end, _reach_end  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # ||got - want|| / ||want|| of each tensor
interpreted = pytest.mark.skipif(version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="Triton's interpreter of that age fails with this numpy")
NARROW, EIGHTH = (70, 0), (30, ONE // 8)
STARTS = {
    "padded": lambda T: [[0] * T, [min(77, T)] * T],
    "packed": lambda T: [[0] * 21 + [21] + [22] * (T - 22), [0] * 128 + [128] * 30 + [158] * (T - 158)],
    "padded then packed": lambda T: [[5] * 150 + [150] * (T - 150), [3] * 31 + [31] * (T - 31)],
}


class Case(NamedTuple):
    """rules: one per KV head. R: query heads of each. segment: tokens, see triton_operator.SEGMENT_TOKENS."""

    rules: tuple = (WINDOW,)
    sinks: int = 4
    T: int = 300
    R: int = 1
    D: int = 64
    dtype: torch.dtype = torch.float16
    where: str = "whole"
    segment: int = 128
    B: int = 1

    def __str__(self):
        return "-".join(str(value).removeprefix("torch.") for name, value in self._asdict().items() if value != self._field_defaults[name]) or "default"

    @property
    def start(self):
        return None if self.where == "whole" else torch.tensor(STARTS[self.where](self.T))

    @property
    def batch(self):
        return self.B if self.where == "whole" else 2

    def real(self, device="cpu"):
        """[B, T, 1, 1], 0 for padding."""
        if self.where == "whole":
            return torch.ones(self.batch, self.T, 1, 1, device=device)
        return (self.start <= torch.arange(self.T)).float()[:, :, None, None].to(device)

    def settings(self, device="cpu"):
        rules = {name: t.to(device) for name, t in table(*self.rules).items()}
        return {**rules, "num_sinks": self.sinks, "scale": self.D**-0.5, "start": None if self.start is None else self.start.to(device)}


def draw(case, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    G = len(case.rules)
    return [torch.randn(case.batch, case.T, heads, case.D, generator=g).to(case.dtype).to(device) for heads in (G * case.R, G, G)]


def outputs_and_gradients(operator, case, x, dtype=None):
    """[output, dq, dk, dv] of real tokens, with a fixed gradient of the output."""
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in x]
    device = x[0].device
    out = operator(*leaves, **case.settings(device)) * case.real(device).to(leaves[0].dtype)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(case.dtype).to(device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe)]


def compare(case):
    x = draw(case)
    want = outputs_and_gradients(reference.span_attention, case, x, torch.float64)
    # several segments even in a short sequence
    with mock.patch.object(triton_operator, "SEGMENT_TOKENS", case.segment), poison():
        got = outputs_and_gradients(triton_operator.triton_span_attention, case, x)
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        assert a.isfinite().all(), name
        assert_near(name, a, b, TOLERANCE[case.dtype])


CASES = [
    Case((WINDOW, DENSE), dtype=torch.float32, D=32, T=100, segment=32),
    Case((QUARTER, ONE_KEY), 70, R=1, dtype=torch.float32, D=32, T=140, segment=32),
    Case((NARROW, (-30, ONE, 90)), R=3),
    Case((EIGHTH,), 80, R=4, D=80, T=333),
    Case((NARROW, WINDOW, DENSE), 0),
    Case(((5, ONE // 4, 50), NARROW), 20, where="padded"),
    Case(((*EIGHTH, 45),), 40, R=3, where="packed"),
    Case((NARROW, DENSE), 150, where="padded then packed", D=32),
    Case((WINDOW,), 40, T=170, where="padded then packed", dtype=torch.float32, D=32, segment=32),
    Case((NARROW, QUARTER), 64, T=1, B=2),
    Case((NARROW, LATE), 2**31 - 1, T=33),
]


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_agree_with_fp64(interpreter, case):  # noqa: F811
    interpreter.submit(compare, case).result()


def compare_dense_and_repeat():
    case = Case((DENSE, DENSE), 64, R=2, dtype=torch.float32, T=70, D=32)
    x = draw(case)
    out = triton_operator.triton_span_attention(*x, **case.settings())
    plain = scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in x), is_causal=True, scale=case.settings()["scale"], enable_gqa=True)
    assert_near("output", out, plain.transpose(1, 2), TOLERANCE[case.dtype])
    strided = [torch.cat([t, t], -1)[..., : case.D] for t in x]
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    with poison():
        for other in (strided, spread):
            assert torch.equal(triton_operator.triton_span_attention(*other, **case.settings()), out)
    wide = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in x]
    assert torch.equal(triton_operator.triton_span_attention(*wide, **case.settings()), out)


@interpreted
def test_dense_rule_is_causal_softmax_whatever_the_strides(interpreter):  # noqa: F811
    interpreter.submit(compare_dense_and_repeat).result()


@triton.jit
def reach_kernel(END, alpha, beta, least, begin, T, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    end = _reach_end(begin + i, begin, tl.full([], alpha, tl.int64), tl.full([], beta, tl.int64), tl.full([], least, tl.int64), T)
    tl.store(END + begin + i, end, mask=begin + i < T)


@triton.jit
def document_kernel(END, START, T, STEP):
    for i in range(0, T, STEP):
        tl.store(END + i, _document_end(START, 0, i, T, True))


def compare_reach():
    draws = random.Random(0)
    rules = [WINDOW, DENSE, LATE, QUARTER, ONE_KEY, (-(2**31), ONE), (2**31 - 1, 3), (-40, ONE - 1)]
    rules += [(draws.randint(-300, 300), draws.randint(0, ONE)) for _ in range(40)]
    T = 250
    n, end = torch.arange(T), torch.empty(T, dtype=torch.int32)
    for (alpha, beta), begin, least in itertools.product(rules, (0, 90), (1, 23)):
        reach_kernel[(1,)](end, alpha, beta, least, begin, T, BLOCK=256)
        edge = n + 1 - reference.window(n - begin, torch.tensor(alpha), torch.tensor(beta), least)
        has_key = (edge <= n[:, None]) & (n >= n[:, None])  # [key, query]
        assert torch.equal(end[begin:].long(), torch.where(has_key, n + 1, 0).amax(1)[begin:]), (alpha, beta, least, begin)


@interpreted
def test_closed_form_of_the_last_query_that_has_a_key_is_exact(interpreter):  # noqa: F811
    interpreter.submit(compare_reach).result()


def compare_document_ends():
    T, step = 700, 9  # more than one round of the search
    padding, cuts = 9, (9, 10, 200, 456, 699)
    start = torch.tensor([max([c for c in cuts if c <= t], default=padding) for t in range(T)], dtype=torch.int32)
    end = torch.empty(T, dtype=torch.int32)
    document_kernel[(1,)](end, start, T, step)
    assert end[::step].tolist() == [t + 1 if t < padding else min([c for c in cuts if c > t], default=T) for t in range(0, T, step)]


@interpreted
def test_end_of_a_document_is_found(interpreter):  # noqa: F811
    interpreter.submit(compare_document_ends).result()


def compare_compiled():
    case = Case((NARROW, LATE), 20, D=16)

    def loss(q, k, v, start):
        return api.span_attention(q * 0.5, k, v, **case.settings() | {"start": start}, impl="triton").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for T in (20, 27, 41):  # the second length makes T dynamic
        x, start = [t.requires_grad_() for t in draw(case._replace(T=T))], torch.zeros(1, T, dtype=torch.int64)
        got, want = compiled(*x, start), loss(*x, start)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
            assert torch.equal(a, b)


@interpreted
def test_compiled_whole_it_has_one_graph_and_the_same_bits(interpreter):  # noqa: F811
    interpreter.submit(compare_compiled).result()


def test_auto_on_the_cpu_is_the_reference():
    case = Case((WINDOW, QUARTER), T=40, dtype=torch.float32)
    x = draw(case)
    assert torch.equal(api.span_attention(*x, **case.settings()), reference.span_attention(*x, **case.settings()))


def test_triton_by_name_says_why_it_cannot_run_instead_of_falling_back():
    case = Case((WINDOW,), T=20)
    with pytest.raises(ValueError, match=r"impl=.triton. cannot run here: .* (GPU|installed)"):
        api.span_attention(*draw(case), **case.settings(), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        api.span_attention(*(t.double() for t in draw(case)), **case.settings(), impl="triton")


def test_the_environment_variable_replaces_auto_and_nothing_else(monkeypatch):
    monkeypatch.setattr(choice, "_AUTO", "triton")
    case = Case((WINDOW,), T=20)
    with pytest.raises(ValueError, match="triton"):
        api.span_attention(*draw(case), **case.settings())
    api.span_attention(*draw(case), **case.settings(), impl="reference")


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 160, 256])
def test_a_hidden_logit_times_the_scale_is_exact(D):
    """Else `s * scale2 - largest`, fused on a GPU, is the rounding error of 1e29 for a row that sees nothing of its first block; exp2 of it is infinite."""
    scale = np.float32(np.float32(D**-0.5) * np.float32(LOG2E.value))
    hidden = np.float32(HIDDEN.value)
    assert np.isfinite(hidden * scale)
    assert Fraction(float(hidden * scale)) == Fraction(float(hidden)) * Fraction(float(scale))
