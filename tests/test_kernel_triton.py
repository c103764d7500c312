"""The Triton kernels in Triton's interpreter, on the CPU, against the quadratic definition in fp64: outputs, gradients, states.

Triton decides when it is imported whether it interprets, so these checks run in a process of their own: other tests of the same
pytest process may import Triton for real.
"""

import concurrent.futures
import contextlib
import inspect
import math
import multiprocessing
import os
import random
from importlib import metadata
from typing import NamedTuple
from unittest import mock

import pytest
import test_kernel_linear as definition
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnconvert.kernels.linear import api
from attnconvert.kernels.linear import reference as torch_impl

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}  # ||got - want|| / ||want|| of each tensor


def version(package):
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


pytestmark = pytest.mark.skipif(version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="Triton's interpreter of that age fails with this numpy")


@pytest.fixture(scope="module")
def interpreter():
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}),
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        yield pool


def run_check(name, arguments):
    globals()[name].check(**arguments)


def interpreted(check):
    """A test that runs `check` in the interpreter's process."""

    def test(interpreter, **arguments):
        interpreter.submit(run_check, check.__name__, arguments).result()

    parameters = [inspect.Parameter("interpreter", inspect.Parameter.KEYWORD_ONLY), *inspect.signature(check).parameters.values()]
    test.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
    test.__name__, test.__doc__, test.check = check.__name__, check.__doc__, check
    return test


class Case(NamedTuple):
    """map_heads: `kv` one key map per key-value head, `query` one per query head. F: features of one half. B: without documents; else 2."""

    kind: str = "block"
    size: int = 64
    sinks: int = 0
    T: int = 130
    D: int = 16
    F: int = 16
    H: int = 2
    G: int = 1
    map_heads: str = "kv"
    where: str = "none"
    reference: str = "absolute"
    gates: bool = True
    linear: bool = True
    dtype: torch.dtype = torch.float32
    gate_size: float = 0.5
    B: int = 1

    def __str__(self):
        return "-".join(str(value).removeprefix("torch.") for name, value in self._asdict().items() if value != self._field_defaults[name]) or "default"

    @property
    def settings(self):
        return definition.options(self.kind, self.size, self.sinks, self.reference) | {"scale": self.D**-0.5}

    @property
    def batch(self):
        return self.B if self.where == "none" else 2

    def start(self):
        return STARTS[self.where](self.T)[: self.batch]


def documents(*cuts):
    """[B, T] document starts; one tuple of first tokens per row."""
    return lambda T: torch.stack([torch.tensor([max(c for c in row if c <= t or c == row[0]) for t in range(T)]) for row in cuts])


STARTS = definition.STARTS | {
    "packed-across-tiles": documents((0, 1, 63, 66, 128), (0, 37, 64, 150)),
    "padded-beyond-a-tile": lambda T: torch.tensor([[min(3, T)] * T, [min(70, T)] * T]),
    "padded-then-packed": documents((9, 50, 77), (66, 100, 101)),
}


def draw(case, seed=0):
    """Inputs as `definition.draw` makes them, with logits and features of ordinary size; maps hold values that case.dtype represents."""
    heads = case.H if case.map_heads == "query" else case.G
    with mock.patch.multiple(definition, B=case.batch, H=case.H, G=case.G, D=case.D, F=case.F):
        x = definition.draw(case.T, heads=heads, linear=case.linear, seed=seed)
    factors = {"query_map": 1.5 * case.D**-0.5, "key_map": 1.5 * case.D**-0.5, "query_gate": case.gate_size, "key_gate": case.gate_size}
    if not case.gates:
        x |= {"query_gate": None, "key_gate": None}
    rounded = {name: None if t is None else (t.detach() * factors.get(name, 1.0)).to(case.dtype) for name, t in x.items()}
    return {name: t if t is None or name in "qkv" else t.float() for name, t in rounded.items()}


def leaves(x, dtype=None):
    return {name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in x.items()}


def oracle(case, x):
    if case.linear and not case.gates:  # `definition.oracle` wants gates: u = 0, a = 0 is the map without one
        x = x | {name: x["q"].new_zeros(x[of].shape[0], case.D + 1) for name, of in (("query_gate", "query_map"), ("key_gate", "key_map"))}
    with mock.patch.multiple(definition, B=case.batch, H=case.H, G=case.G):
        return definition.oracle(**x, **case.settings, start=case.start())


def triton_attention(case, x, **more):
    from attnconvert.kernels.linear.triton_operator import triton_linear_attention

    start = {} if "start" in more or case.where == "none" else {"start": case.start()}
    return triton_linear_attention(**x, **(case.settings | start | more))


def probe_like(t):
    return torch.randn(t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(t.device)


def gradients(out, x):
    given = {name: t for name, t in x.items() if t is not None}
    loss = (out.double() * probe_like(out)).sum()
    return dict(zip(given, torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True), strict=True))


def assert_near(name, got, want, bound, floor=1.0):
    """`bound` is relative to the whole tensor; what should be 0 may be as far off as in a tensor of norm `floor`, by default a probe element's size."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    error, size = torch.linalg.norm(got.double() - want), torch.linalg.norm(want)
    assert error <= bound * max(size, floor), f"{name}: error {error:.3g} of {size:.3g}, relative bound {bound:g}"


def assert_gradients_near(case, found, wanted, bound, output):
    for name, gradient in found.items():
        # Without a softmax branch the weight and a query's gate cancel; what is left is the rounding of the outputs, summed over all rows.
        floor = torch.linalg.norm(output) if name in ("linear_log_weight", "query_gate") and not case.size and not case.sinks else 1.0
        assert_near(f"gradient of {name}", gradient, wanted[name], bound, floor)


def check_case(case, seed=0):
    x = draw(case, seed)
    exact, given = leaves(x, torch.float64), leaves(x)
    want, got = oracle(case, exact), triton_attention(case, given).output
    assert got.dtype == case.dtype
    bound = TOLERANCE[case.dtype]
    assert_near("output", got, want, bound)
    found = gradients(got, given)
    assert all(gradient.dtype == given[name].dtype for name, gradient in found.items())
    assert_gradients_near(case, found, gradients(want, exact), 2 * bound, want)


CASES = [
    Case(T=200, B=2),
    Case("block", 64, 4, 130, 32, 32, 2, 2, reference="window_max", gates=False),
    Case("block", 64, 2, 130, 16, 16, 2, 1, "query", "packed-across-tiles", "window_max", gates=False),
    Case("block", 8, 2, 65, 8, 4, where="left-padded"),
    Case("block", 8, 0, 130, 8, 4, reference="window_max", gates=False, where="packed"),
    Case("block", 24, 4, 130, 20, 16, where="packed-across-tiles"),
    Case("block", 100, 20, 230, 8, 4),
    Case("block", 64, 0, 64, 16, 16, where="padded-then-packed"),
    Case("sliding", 8, 0, 64, 8, 4, 3, 1),
    Case("sliding", 24, 20, 130, 16, 16, reference="window_max", gates=False, where="packed-across-tiles"),
    Case("sliding", 64, 2, 130, 32, 16, where="padded-beyond-a-tile"),
    Case("sliding", 64, 0, 130, 16, 16, 4, 2, "query", reference="window_max", gates=False),
    Case("sliding", 100, 4, 200, 8, 16),
    Case("sliding", 1, 0, 65, 8, 4),
    Case("sliding", 0, 0, 200, 80, 64, 1, 1),
    Case("block", 0, 2, 65, 16, 16, where="packed"),
    Case("block", 0, 4, 130, 16, 16, 2, 1, "query", "padded-beyond-a-tile", "window_max", gates=False),
    Case("block", 64, 4, 130, 16, 16, linear=False),
    Case("sliding", 24, 2, 130, 16, 16, where="packed-across-tiles", linear=False),
    Case("block", 64, 0, 65, 32, 64),
    Case("block", 64, 4, 200, 80, 16),
    Case("block", 64, 4, 1),
    Case("sliding", 0, 0, 1),
    Case("sliding", 8, 2, 7, 8, 4),
    Case("block", 8, 2, 63, 8, 4, where="padded-beyond-a-tile"),
    Case("block", 64, 4, 200, 32, 32, dtype=torch.float16),
    Case("sliding", 24, 0, 130, 16, 16, reference="window_max", gates=False, where="packed-across-tiles", dtype=torch.float16),
    Case("block", 8, 2, 130, 16, 16, gate_size=8.0),  # most gates at their limit of e^12 or e^-12
    Case("block", 8, 2, 130, 16, 16, gate_size=8.0, dtype=torch.float16),  # e^12 is above what fp16 holds
]


@pytest.mark.parametrize("case", CASES, ids=str)
@interpreted
def test_output_and_gradients_equal_the_quadratic_definition(case):
    check_case(case)


@pytest.mark.slow  # about five seconds each
@pytest.mark.parametrize("seed", range(80))
@interpreted
def test_random_shapes_equal_the_quadratic_definition(seed):
    choose = random.Random(seed).choice
    linear = choose([True, True, True, False])
    H, G = choose([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)])
    reference, gates = choose([("absolute", True), ("absolute", False), ("window_max", False), ("window_max", True)])
    sizes = [1, 8, 24, 63, 64, 65, 100] + [0] * linear
    case = Case(choose(["block", "sliding"]), choose(sizes), choose([0, 2, 4, 20]), choose([1, 7, 63, 64, 65, 130, 200, 257]), choose([8, 16, 20, 32, 80]),
                choose([4, 16, 32, 64]), H, G, choose(["kv", "query"]), choose(list(STARTS)), reference, gates, linear, choose([torch.float32] * 3 + [torch.float16]))  # fmt: skip
    check_case(case, seed)


def same_state(case, got, want):
    """Equal where a state means something: unused slots of the ring, sinks beyond the length and one slot of the normaliser hold junk."""
    assert torch.equal(got.lengths, want.lengths)
    assert [t.shape for t in got] == [t.shape for t in want]
    assert got.kv.dtype == got.z.dtype == torch.float32
    bound = TOLERANCE[case.dtype]
    assert_near("kv", got.kv, want.kv, bound)
    assert_near("z", *(torch_impl.normalizer(state, case.size, case.kind) for state in (got, want)), bound)
    keys = torch_impl.num_back_chunks(case.size, case.kind, aligned=False) * case.size
    for name in ("k", "v", "sink_k", "sink_v"):
        a, b = (getattr(state, name).double() for state in (got, want))
        if name in "kv" and keys:
            a, b = (torch_impl.last_keys(ring, want.length, keys) for ring in (a, b))
        for row, length in enumerate(want.length.tolist()):
            used = slice(max(keys - length, 0), None) if name in "kv" else slice(0, length)
            assert torch.equal(a[row, :, used], b[row, :, used]), f"{name} of row {row}"


PIECES = [
    (Case("block", 64, 4), [70, 60]),
    (Case("block", 64, 2, where="padded-beyond-a-tile"), [64, 1, 65]),
    (Case("block", 24, 2, where="left-padded"), [1, 100, 29]),
    (Case("sliding", 64, 0, reference="window_max", gates=False), [65, 65]),
    (Case("sliding", 8, 20, 65, 8, 4, map_heads="query"), [12, 30, 23]),
    (Case("sliding", 0, 0), [63, 67]),
    (Case("block", 0, 4, reference="window_max", gates=False, where="left-padded"), [2, 128]),
    (Case("sliding", 24, 2, linear=False), [50, 80]),
    (Case("block", 8, 2, 65, 8, 4, where="packed"), [10, 25, 30]),
]


@pytest.mark.parametrize(("case", "pieces"), PIECES, ids=str)
@interpreted
def test_pieces_with_carried_state_equal_one_call_and_the_states_of_the_reference(case, pieces):
    x = draw(case)
    exact = {name: None if t is None else t.double() for name, t in x.items()}
    want = oracle(case, exact)
    state, wanted, got, at = None, None, [], 0
    for n in pieces:
        here = {"start": (case.start()[:, at : at + n] - at).clamp(max=n)}
        if case.where != "packed":  # a document that goes on from the call before
            here["start"] = here["start"].clamp(min=0)
        part, exact_part = ({name: t[:, at : at + n] if name in "qkv" else t for name, t in tensors.items()} for tensors in (x, exact))
        out, state = triton_attention(case, part, initial_state=state, output_final_state=True, **here)
        wanted = torch_impl.linear_attention(**exact_part, **case.settings, initial_state=wanted, output_final_state=True, **here).final_state
        same_state(case, state, wanted)
        got.append(out)
        at += n
    assert_near("output", torch.cat(got, 1), want, TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    "case",
    [
        Case("block", 64, 4, 200), Case("block", 64, 4, 130, B=2), Case("block", 8, 0, 7), Case("block", 24, 20, 11), Case("sliding", 24, 2, 150), Case("sliding", 0, 0, 70),
        Case("sliding", 8, 20, 65, 8, 4, map_heads="query"), Case("sliding", 24, 2, 50, linear=False),
    ],
    ids=str,
)  # fmt: skip
@interpreted
def test_state_of_a_prompt_without_padding_is_the_reference_s(case):
    x = draw(case)
    exact = {name: None if t is None else t.double() for name, t in x.items()}
    out, state = triton_attention(case, x, output_final_state=True, start=None)
    wanted = torch_impl.linear_attention(**exact, **case.settings, output_final_state=True)
    assert_near("output", out, wanted.output, TOLERANCE[case.dtype])
    same_state(case, state, wanted.final_state)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in state), "a state that keeps other tensors' memory"


@pytest.mark.parametrize("case", [Case("block", 64, 4, H=4, G=2, dtype=torch.float16), Case("sliding", 24, 2, 70)], ids=str)
@interpreted
def test_strided_inputs_give_the_bits_of_contiguous_ones(case):
    x = draw(case)
    heads_first = {name: t.transpose(1, 2).contiguous().transpose(1, 2) if name in "qkv" else t for name, t in x.items()}
    fused = torch.cat([x[name].flatten(2) for name in "qkv"], 2)  # one projection for q, k and v: rows of all three lie side by side
    split = fused.split([case.H * case.D, case.G * case.D, case.G * case.D], 2)
    side_by_side = x | {name: t.unflatten(2, (-1, case.D)) for name, t in zip("qkv", split, strict=True)}
    results = []
    for tensors in (x, heads_first, side_by_side):
        given = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        out = triton_attention(case, given).output
        results.append([out, *gradients(out, given).values()])
    assert not heads_first["q"].is_contiguous()
    assert not side_by_side["q"].is_contiguous()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@contextlib.contextmanager
def poison():
    """Whatever allocates without writing returns NaN, or an index far outside, instead of what memory held."""

    def filled(allocate):
        def allocate_filled(*arguments, **options):
            t = allocate(*arguments, **options)
            with torch.no_grad():
                return t.fill_(math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)

        return allocate_filled

    functions = {name: filled(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")}
    methods = {name: filled(getattr(torch.Tensor, name)) for name in ("new_empty", "new_empty_strided")}
    with mock.patch.multiple(torch, **functions), mock.patch.multiple(torch.Tensor, **methods):
        assert torch.empty(1).isnan().item()
        yield


@pytest.mark.parametrize(
    "case",
    [
        Case("block", 64, 4, 200, dtype=torch.float16),
        Case("sliding", 24, 20, 75, reference="window_max", gates=False, where="padded-beyond-a-tile"),
        Case("block", 8, 2, 35, 8, 4, 2, 1, "query", "packed"),
        Case("sliding", 0, 0, 130, 20, 16),
        Case("block", 64, 4, 130, linear=False),
    ],
    ids=str,
)
@interpreted
def test_results_do_not_depend_on_what_memory_held(case):
    results = []
    for memory in (contextlib.nullcontext(), poison()):
        given = leaves(draw(case))
        with memory:
            with torch.no_grad():
                plain, state = triton_attention(case, given, output_final_state=True)
            out = triton_attention(case, given).output
            results.append([plain, state.kv, torch_impl.normalizer(state, case.size, case.kind), out, *gradients(out, given).values()])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@interpreted
def test_future_tokens_change_neither_the_past_nor_its_gradients():
    case, cut = Case("block", 24, 2, 100), 77
    x = draw(case)
    changed = {name: torch.cat([t[:, :cut], t[:, cut:] + 1.0], 1) if name in "qkv" else t for name, t in x.items()}
    results = []
    for tensors in (x, changed):
        given = leaves(tensors)
        out = triton_attention(case, given).output[:, :cut]
        results.append([out, *gradients(out, given).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("offset", "where", "T"),
    [
        (-300.0, "none", 100),
        (-300.0, "none", 40),
        (-300.0, "packed-across-tiles", 100),
        (-50.0, "none", 100),
        (300.0, "none", 100),
        (300.0, "padded-beyond-a-tile", 100),
    ],
)
@interpreted
def test_extreme_logits_give_finite_outputs_and_gradients_and_the_softmax_branch_stays_exact(offset, where, T):
    case = Case("block", 24, 2, T, where=where)
    x = draw(case)
    x["q"][..., 0], x["k"][..., 0] = 30.0, offset / (case.settings["scale"] * 30.0)
    given = leaves(x)
    out = triton_attention(case, given).output
    assert torch.isfinite(out).all()
    for name, gradient in gradients(out, given).items():
        assert torch.isfinite(gradient).all(), name
    position = torch.arange(case.T) - case.start()
    early = (position >= 0) & (position < 48)  # two blocks: nothing has left the window
    exact = {name: t.double() if name in "qkv" else None for name, t in x.items()} | {"linear_log_weight": x["linear_log_weight"].double()}
    want = torch_impl.linear_attention(**exact, **case.settings, start=case.start()).output
    torch.testing.assert_close(out.double()[early], want[early], rtol=1e-3, atol=1e-3)


class Calls(TorchDispatchMode):
    """Records the calls of this package's registered operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace.startswith("attnconvert"):
            self.seen.append((operator, arguments, options or {}))
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "case", [Case("block", 8, 2, 20, 8, 4), Case("sliding", 8, 0, 20, 8, 4, where="left-padded", reference="window_max", gates=False)], ids=str
)
@interpreted
def test_registered_operators_keep_what_torch_asks_of_them(case):
    """Fake outputs have the real ones' shapes, dtypes and strides; nothing is mutated or aliased; any size may be symbolic."""
    given = leaves(draw(case))
    with Calls() as calls:
        gradients(triton_attention(case, given).output, given)
    assert len(calls.seen) == 2, "one operator forward, one backward"
    with poison():  # between the tensors of one allocation are bytes that nobody writes
        for operator, arguments, options in calls.seen:  # the gradient's formula stands above both operators
            torch.library.opcheck(operator, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments), options)


@interpreted
def test_compiled_whole_it_has_one_graph_and_the_same_bits():
    case = Case("block", 8, 2, 20, 8, 4, where="left-padded")

    def loss(x, start):
        return triton_attention(case, x, start=start).output.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for T in (20, 27, 41):  # the second length makes T dynamic
        given, start = leaves(draw(case._replace(T=T))), case._replace(T=T).start()
        got, want = compiled(given, start), loss(given, start)
        assert torch.equal(got, want)
        for name, a, b in zip(given, torch.autograd.grad(got, list(given.values())), torch.autograd.grad(want, list(given.values())), strict=True):
            assert torch.equal(a, b), name


@interpreted
def test_the_entry_point_that_chooses_compiles_to_one_graph_too():
    case = Case("block", 8, 2, 20, 8, 4)
    x = leaves(draw(case))

    def through_api(x):
        return api.linear_attention(**x, **case.settings, impl="triton").output

    assert torch.equal(torch.compile(through_api, backend="aot_eager", fullgraph=True)(x), through_api(x))
