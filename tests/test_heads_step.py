"""What a decode step of routed heads has besides its attention: the choice of units and the output projection that skips zeros, in Triton's interpreter."""

import copy

import pytest
import torch
from test_heads_triton import interpreted
from test_kernel_triton import assert_near, interpreter, poison  # noqa: F401
from torch import nn

from attnconvert.kernels.heads.projection import SkippingLinear
from attnconvert.kernels.heads.routing import MAX_UNITS, route_queries, route_scores, unit_norms
from attnconvert.surgery.runtime.heads import MixtureOfHeads

triton = pytest.importorskip("triton")

from attnconvert.kernels.heads.triton_projection import SEGMENT, triton_project  # noqa: E402

SIZES = [(8, 32, 16, 2), (3, 9, 20, 1), (5, 5, 80, 0), (1, 4, 16, 0), (128, 128, 16, 28)]  # units, query heads, head_dim, shared units


def columns_of(num_units, num_shared, seed=0):
    """Random units are shared."""
    order = torch.randperm(num_units, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order[:num_shared].sort().values, order[num_shared:].sort().values])
    return order.argsort() - num_shared


def slow_choice(scores, columns, num_chosen):
    """Row by row, by Python's stable sort. scores: [B, T, E]."""
    chosen = torch.zeros(*scores.shape[:2], len(columns), dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape[:2])):
        row = scores[tuple(at)].tolist()
        best = sorted(range(len(row)), key=lambda e: -row[e])[:num_chosen]
        chosen[tuple(at)] = torch.tensor([column < 0 or column in best for column in columns.tolist()])
    return chosen


def draw_queries(num_units, heads, dim, num_shared, layout, seed=0):
    """[2, 3, H, D] in a layout of some family; units 0 and 1 of the routed ones have the same queries, up to their order."""
    columns = columns_of(num_units, num_shared)
    q = torch.randn(2, 3, heads, dim, generator=torch.Generator().manual_seed(seed))
    by_unit = q.unflatten(2, (num_units, -1))
    routed = columns.argsort()[num_shared:].tolist()
    if len(routed) > 1:
        by_unit[:, :, routed[1]] = by_unit[:, :, routed[0]]
    q = by_unit.flatten(2, 3)
    if layout == "heads first":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "of one projection":
        q = torch.cat([q, q], 2)[:, :, :heads]
    return q, columns


def compare_scores(size):
    num_units, _, _, num_shared = size
    columns = columns_of(num_units, num_shared)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randint(-2, 3, (2, 3, num_units - num_shared), generator=torch.Generator().manual_seed(0)).to(dtype)  # mostly equal ones
        for num_chosen in {0, 1, (num_units - num_shared) // 2, num_units - num_shared}:
            with poison():
                got = route_scores(scores, columns, num_chosen, impl="triton")
            assert torch.equal(got, slow_choice(scores, columns, num_chosen))
            assert torch.equal(got, route_scores(scores, columns, num_chosen, impl="reference"))


@interpreted
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_highest_scores_are_chosen_and_of_equal_ones_the_first(interpreter, size):  # noqa: F811
    interpreter.submit(compare_scores, size).result()


def compare_queries(size, layout):
    num_units, heads, dim, num_shared = size
    q, columns = draw_queries(num_units, heads, dim, num_shared, layout)
    scores = q.double().square().unflatten(2, (num_units, -1)).sum((3, 4)).sqrt().float()  # as the units that are alike are for every sum
    scores = scores[..., columns.argsort()[num_shared:]]
    for num_chosen in {1, (num_units - num_shared) // 2}:
        with poison():
            got = route_queries(q, columns, num_chosen, impl="triton")
        assert torch.equal(got, slow_choice(scores, columns, num_chosen))
        assert torch.equal(got, route_queries(q, columns, num_chosen, impl="reference"))


@interpreted
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "of one projection"])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_units_whose_queries_have_the_largest_norms_are_chosen_whatever_the_layout(interpreter, size, layout):  # noqa: F811
    interpreter.submit(compare_queries, size, layout).result()


def compare_not_numbers():
    columns = columns_of(6, 2)
    scores = torch.tensor([[[1.0, torch.nan, -torch.inf, torch.nan]], [[-torch.inf] * 4]])
    for impl in ("triton", "reference"):
        for num_chosen, first in ((1, [1]), (3, [0, 1, 3])):
            used = route_scores(scores, columns, num_chosen, impl=impl)
            assert (used.sum(-1) == num_chosen + 2).all()
            routed = used[..., columns.argsort()[2:]]
            assert routed[0, 0].nonzero().flatten().tolist() == first
            assert routed[1, 0].nonzero().flatten().tolist() == list(range(num_chosen))


@interpreted
def test_scores_that_are_not_numbers_change_nothing_about_how_many_units_are_used(interpreter):  # noqa: F811
    interpreter.submit(compare_not_numbers).result()


def compare_compiled():
    q, columns = draw_queries(4, 8, 16, 1, "tokens first")

    def choose(q, scores):
        return route_queries(q * 2, columns, 2, impl="triton") | route_scores(scores + 1, columns, 1, impl="triton")

    scores = unit_norms(q, 4)[..., 1:]
    assert torch.equal(torch.compile(choose, backend="aot_eager", fullgraph=True)(q, scores), choose(q, scores))


@interpreted
def test_compiled_whole_the_choice_is_the_same(interpreter):  # noqa: F811
    interpreter.submit(compare_compiled).result()


def test_norms_of_units_have_gradients_and_the_choice_has_none():
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: unit_norms(q, 2), q)
    assert not route_queries(q, torch.tensor([0, 1]), 1).requires_grad


def test_triton_by_name_says_why_it_cannot_choose_here():
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: the tensors are on cpu"):
        route_scores(torch.zeros(1, 1, 2), torch.tensor([0, 1]), 1, impl="triton")


def refuse():
    columns = torch.arange(MAX_UNITS + 1)
    with pytest.raises(ValueError, match=rf"{MAX_UNITS + 1} units are more than {MAX_UNITS}"):
        route_scores(torch.zeros(1, 1, MAX_UNITS + 1), columns, 1, impl="triton")
    with pytest.raises(ValueError, match="no kernel for"):
        route_scores(torch.zeros(1, 1, 2, dtype=torch.float64), columns[:2], 1, impl="triton")


@interpreted
def test_what_the_choosing_kernel_cannot_take_is_named(interpreter):  # noqa: F811
    interpreter.submit(refuse).result()


def compare_projection(N, K, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 1, K, generator=generator), torch.randn(N, K, generator=generator)
    offset = torch.randn(N, generator=generator) if bias else None
    segments = x.view(2, -1, SEGMENT)
    segments[0, ::2] = 0
    segments[1, :-1] = 0
    segments[1, -1, 1:] = 0  # one number is enough for a segment to count
    with poison():
        got = triton_project(x, weight, offset)
    want = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert_near("output", got, want, 2e-6)
    unread = weight.clone()
    unread.view(N, -1, SEGMENT)[:, ::2] = torch.nan
    assert torch.equal(triton_project(x[:1], unread, offset), got[:1])
    assert not triton_project(torch.zeros(1, K), torch.full((N, K), torch.nan), None).any()
    unread.view(N, -1, SEGMENT)[3, 1, 5] = torch.nan
    assert triton_project(x[:1], unread, offset)[0, 0].isnan().nonzero().flatten().tolist() == [3]


@interpreted
@pytest.mark.parametrize(("N", "K", "bias"), [(70, 64, True), (33, 96, False), (130, 2080, True), (8, 4096, False)])
def test_projection_is_right_and_reads_no_weights_that_meet_zeros(interpreter, N, K, bias):  # noqa: F811
    interpreter.submit(compare_projection, N, K, bias).result()


def test_a_linear_map_that_learned_to_skip_is_the_same_map_and_the_same_object():
    linear = nn.Linear(64, 32)
    want, weight, hook = linear(torch.ones(2, 64)), linear.weight, []
    linear.register_forward_hook(lambda *_: hook.append(1))
    linear.__class__ = SkippingLinear
    assert torch.equal(linear(torch.ones(2, 64)), want)
    assert linear.weight is weight
    assert hook == [1]
    assert torch.equal(copy.deepcopy(linear)(torch.ones(2, 64)), want)
    assert list(linear.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("active", "skips"), [(0.75, True), (1.0, False)])
def test_a_layer_that_leaves_units_out_has_an_output_projection_that_skips(active, skips):
    layer = nn.Module()
    layer.q_proj, layer.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)
    settings = {"unit": "query_head", "shared": 0.5, "shared_units": None, "router": "norm", "gates": "hard", "anneal": 0.0}
    MixtureOfHeads(4, 4, 16, active=active, **settings).fit(layer)
    assert type(layer.o_proj) is (SkippingLinear if skips else nn.Linear)
    assert type(layer.q_proj) is nn.Linear


def test_adapters_go_on_and_off_a_map_that_skips():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(SkippingLinear(64, 32))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    x = torch.randn(1, 64)
    want = adapted(x)
    merged = adapted.merge_and_unload()
    assert type(merged[0]) is SkippingLinear
    torch.testing.assert_close(merged(x), want)
