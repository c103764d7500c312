"""Layers with routed heads in whole models: all heads are the stock model, cached text is uncached text, and routers choose, learn and count as they say."""

import copy
import json
import types

import cached_layers
import pytest
import torch
from cached_layers import GPU, NULL_FAMILIES, cached_error, full_layers, long_batch, uncached
from conftest import FAMILIES, make_model
from pydantic import ValidationError
from test_seam import convert, padded

from attnconvert.convert.evaluate import cache_bytes
from attnconvert.distill.config import FinetuneConfig, LoraConfig
from attnconvert.distill.data import PackedRows
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora
from attnconvert.kernels.heads.units import annealed, unit_counts
from attnconvert.surgery import registry
from attnconvert.surgery.method import softmax_cost
from attnconvert.surgery.methods.moh import METHOD, MohConfig
from attnconvert.surgery.runtime.heads import MixtureOfHeads
from attnconvert.surgery.runtime.modeling import converted_sites, teacher_mode
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import restore_softmax

LENGTH = 60
SETTINGS = {
    "output norms": MohConfig(unit="query_head"),
    "KV heads, soft": MohConfig(active=0.5, router="norm", gates="soft"),
    "query heads": MohConfig(unit="query_head", shared=0.25, router="norm"),
    "learned, soft": MohConfig(unit="query_head", active=0.75, shared_units=(2,), router="learned", gates="soft"),
    "learned": MohConfig(active=0.5, router="learned"),
}


def moh(model, config, **options):
    student = convert(model, method="moh", config=METHOD.runtime_config(config), layers=full_layers(model, METHOD), **options)
    g = torch.Generator().manual_seed(7)
    for core in cores(student):
        for parameter in core.parameters():  # scores that differ, as after training
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float32) / 4
    return student


def cores(model):
    return [module.core for _, _, module in converted_sites(model)]


@pytest.fixture(params=list(SETTINGS))
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def student(settings):
    """In fp64: which of two heads that score alike is chosen is decided by the last bits, and not by how the model is run."""
    return moh(make_model("llama"), settings).double()


def routes(model, ids, **options):
    """What each layer's router chose in one forward pass: (active, gate) by layer."""
    found = []
    for core in cores(model):
        core._route = lambda *args, real=core._route: found.append(real(*args)) or found[-1]
    try:
        model(ids, use_cache=False, **options)
    finally:
        for core in cores(model):
            del core._route
    return found


# ---------------------------------------------------------------- all heads


@pytest.mark.parametrize("router", ["output_norm", "norm"])
@pytest.mark.parametrize("name", NULL_FAMILIES)
def test_all_units_equal_the_stock_model_at_every_step_and_in_its_text(name, router):
    teacher = make_model(name)
    cached_layers.assert_equals_the_stock_model(moh(teacher, METHOD.exact.model_copy(update={"router": router})), teacher)


def test_settings_leave_heads_out(settings):
    teacher = make_model("llama").double()
    ids, mask = long_batch(LENGTH, pads=0)
    student = moh(teacher, settings).double()
    assert (uncached(student, ids, mask) - uncached(teacher, ids, mask)).abs().amax((0, 2)).min() > 1e-4
    with teacher_mode(student):
        assert (uncached(student, ids, mask) - uncached(teacher, ids, mask)).abs().max() < 1e-10
    restore_softmax(student, full_layers(teacher, METHOD), "test")
    assert (uncached(student, ids, mask) - uncached(teacher, ids, mask)).abs().max() < 1e-10


# ---------------------------------------------------------------- what routers choose


def query_norms(model, family, ids):
    """Norms of the queries of the first layer's heads, [B, T, H], recomputed from the projections alone."""
    attention = converted_sites(model)[0][2]
    seen = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, options: seen.extend([*args, *[x for name, x in options.items() if name == "hidden_states"]]), with_kwargs=True
    )
    model(ids, use_cache=False)
    handle.remove()
    H, D = 4, 8
    fused = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}.get(family)
    projected = getattr(attention, fused or "q_proj")(seen[0])
    if family == "gpt_neox":
        projected = projected.unflatten(-1, (H, 3 * D))[..., :D].flatten(-2)
    return projected[..., : H * D].unflatten(-1, (H, D)).norm(dim=-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("tokens", [4, 30])
def test_the_norm_router_uses_the_units_whose_queries_have_the_largest_norms_before_any_norm_of_them(family, tokens):
    model = moh(make_model(family), MohConfig(unit="query_head", active=0.75, shared_units=(1,), router="norm")).double()
    ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        norms = query_norms(model, family, ids)
        active, gate = routes(model, ids)[0]
    assert gate is None
    assert active[..., 1].all()
    assert (active.sum(-1) == 3).all()
    left_out = norms.masked_fill(torch.tensor([False, True, False, False]), torch.inf).argmin(-1)
    assert torch.equal((~active).float().argmax(-1), left_out)
    assert len(left_out.unique()) > 1


def test_a_kv_head_is_chosen_by_the_norm_of_all_its_queries():
    model = moh(make_model("llama"), MohConfig(active=0.5, router="norm")).double()
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        norms = query_norms(model, "llama", ids).unflatten(-1, (2, 2)).norm(dim=-1)
        active, _ = routes(model, ids)[0]
    assert torch.equal(active.float().argmax(-1), norms.argmax(-1))
    assert (active.sum(-1) == 1).all()


def core_alone(config, heads=4, groups=4, dim=3, width=5):
    torch.manual_seed(0)
    core = MixtureOfHeads(heads, groups, dim, **METHOD.runtime_config(config)).double()
    module = torch.nn.Module()
    module.config = types.SimpleNamespace(hidden_size=width)
    core.fit(module)
    return core.double()


def inputs_for(q, start=None):
    from attnconvert.surgery.runtime.seam import SeamInputs

    return SeamInputs(start=start, scaling=0.5, batch_size=q.shape[0], num_tokens=q.shape[2], device=q.device)


def test_equal_scores_go_to_the_first_units():
    core = core_alone(MohConfig(unit="query_head", active=0.5, router="norm"))
    q = torch.ones(1, 4, 6, 3, dtype=torch.float64)
    active, _ = core._route(q, inputs_for(q))
    assert active[0].tolist() == [[True, True, False, False]] * 6


def test_norms_are_divided_by_their_deviation():
    core = core_alone(MohConfig(unit="query_head", active=0.75, shared_units=(2,), router="norm", gates="soft"))
    q = torch.zeros(1, 4, 1, 3, dtype=torch.float64)
    q[0, :, 0, 0] = torch.tensor([3.0, -1.0, 50.0, 5.0])
    active, gate = core._route(q, inputs_for(q))
    scores = (torch.tensor([3.0, 1.0, 5.0], dtype=torch.float64) / 2).softmax(0)  # their deviation is 2
    assert active.flatten().tolist() == [True, False, True, True]
    want = torch.stack([2 * scores[0] / (scores[0] + scores[2]), torch.tensor(1.0), 2 * scores[2] / (scores[0] + scores[2])])
    torch.testing.assert_close(gate[0, 0, [0, 2, 3]], want.double())


def test_a_learned_router_starts_with_factors_near_1_and_its_factors_are_the_published_ones():
    config = MohConfig(unit="query_head", active=0.75, shared=0.25, router="learned", gates="soft")
    core = core_alone(config, heads=8, groups=8)
    assert {name: tuple(p.shape) for name, p in core.named_parameters()} == {"kind_map": (2, 5), "shared_map": (2, 5), "routed_map": (6, 5)}
    q, x = torch.randn(1, 8, 7, 3, dtype=torch.float64), torch.randn(1, 7, 5, dtype=torch.float64)
    core._seen = x
    active, gate = core._route(q, inputs_for(q))
    assert (gate[active] - 1).abs().max() < 0.01
    for parameter in core.parameters():
        parameter.data = torch.randn_like(parameter)
    core._seen = x
    active, gate = core._route(q, inputs_for(q))
    first, second = (2 * (x @ core.kind_map.T).softmax(-1)).split(1, -1)
    shared, scores = 2 * (x @ core.shared_map.T).softmax(-1), (x @ core.routed_map.T).softmax(-1)
    top = scores.topk(4).values
    assert torch.equal(active[..., 2:], scores >= top[..., -1:])
    torch.testing.assert_close(gate[..., :2], first * shared)
    torch.testing.assert_close(gate[..., 2:], second * 4 * scores / top.sum(-1, keepdim=True))


def test_the_router_of_output_norms_uses_the_units_with_the_highest_estimates():
    core = core_alone(MohConfig(unit="query_head", active=0.5, shared_units=(2,)))
    g = torch.Generator().manual_seed(2)
    q, x = torch.randn(1, 4, 7, 3, generator=g, dtype=torch.float64), torch.randn(1, 7, 5, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(4, 5, generator=g, dtype=torch.float64), torch.tensor([0.5, 0.0, 9.0, -0.5], dtype=torch.float64)
    core.estimate_norms(weight, bias)
    core._seen = x
    active, gate = core._route(q, inputs_for(q))
    best = (x @ weight.T + bias)[..., [0, 1, 3]].argmax(-1)
    want = torch.nn.functional.one_hot(torch.tensor([0, 1, 3])[best], 4).bool() | torch.tensor([False, False, True, False])
    assert torch.equal(active, want)
    assert len(best.unique()) == 3
    assert torch.equal(gate, torch.ones_like(gate))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("router", ["output_norm", "norm", "learned"])
def test_the_gradient_of_hard_gates_is_that_of_the_soft_scores_at_factors_of_1(router):
    """Numerically: factors 1 + score(theta) - score(theta now), with the choice as it is."""
    core = core_alone(MohConfig(unit="query_head", active=0.75, shared=0.25, router=router))
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 6, 3, generator=g, dtype=torch.float64) for _ in range(3))
    x = torch.randn(1, 6, 5, generator=g, dtype=torch.float64)
    for parameter in core.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    theta = q if router == "norm" else core.routed_map

    def scores():
        """Of all units, [B, T, U]: the softmax that the docstring names."""
        if router == "norm":
            norms = q.norm(dim=-1).transpose(1, 2)[..., 1:]
            return torch.cat([torch.ones(1, 6, 1), (norms / norms.std(-1, keepdim=True)).softmax(-1)], -1)
        if router == "output_norm":
            return torch.cat([torch.ones(1, 6, 1), (x @ core.routed_map.T + core.routed_bias).softmax(-1)], -1)
        kinds = (x @ core.kind_map.T).softmax(-1)
        return torch.cat([kinds[..., :1] * (x @ core.shared_map.T).softmax(-1), kinds[..., 1:] * (x @ core.routed_map.T).softmax(-1)], -1)

    with torch.no_grad():
        core._seen = None if router == "norm" else x
        (active, _), now = core._route(q, inputs_for(q)), scores()
        fixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5).transpose(1, 2)
        weight = torch.randn(fixed.shape, generator=g, dtype=torch.float64)

    def surrogate():
        """The loss as a function of the scores alone: the heads' outputs are held."""
        return (weight * fixed * (active * (1 + scores() - now))[..., None]).sum()

    theta.requires_grad_(True)
    core._seen = None if router == "norm" else x
    _, gate = core._route(q, inputs_for(q))
    assert torch.equal(gate, torch.ones_like(gate))
    ((weight * fixed * (active * gate)[..., None]).sum()).backward()
    numeric = torch.zeros_like(theta)
    with torch.no_grad():
        for i in range(theta.numel()):
            flat = theta.data.reshape(-1) if theta.is_contiguous() else None
            before = flat[i].item()
            values = []
            for step in (1e-6, -1e-6):
                flat[i] = before + step
                values.append(surrogate().item())
            flat[i] = before
            numeric.view(-1)[i] = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(theta.grad, numeric, rtol=1e-5, atol=1e-8)
    assert theta.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_learns_through_its_router_and_its_heads(name):
    model = moh(make_model("llama"), SETTINGS[name])
    ids, mask = long_batch(LENGTH)
    model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    attention = model.model.layers[1].self_attn
    assert all(p.weight.grad.abs().max() > 0 for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    learned = {name for name, p in attention.core.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    want = {"learned, soft": {"kind_map", "routed_map"}, "learned": {"routed_map"}, "output norms": {"routed_map", "routed_bias"}}
    assert learned == want.get(name, set())  # a softmax over one shared unit is 1


# ---------------------------------------------------------------- balance


def test_the_balance_loss_is_1_where_all_units_are_chosen_alike_and_more_where_one_is_preferred():
    core = core_alone(MohConfig(unit="query_head", active=0.25, router="norm"))
    core.balanced, found = True, []
    core.on_balance = found.append
    even = torch.full((2, 4, 8, 3), 1e-3, dtype=torch.float64)
    for token in range(8):
        even[:, token % 4, token] *= 1.5
    core._route(even, inputs_for(even))
    one = even.clone()
    one[:, 2] *= 100
    core._route(one, inputs_for(one))
    assert found[0].item() == pytest.approx(1)
    assert found[1].item() > 1.9


def test_the_balance_loss_is_the_mean_over_rows_and_leaves_out_padding():
    core = core_alone(MohConfig(unit="query_head", active=0.5, router="norm"))
    core.balanced, found = True, []
    core.on_balance = found.append
    q = torch.randn(2, 4, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.tensor([[0] * 9, [4] * 9])
    core._route(q, inputs_for(q, start))
    for row in (q[:1], q[1:, :, 4:]):
        core._route(row, inputs_for(row))
    assert found[0].item() == pytest.approx((found[1].item() + found[2].item()) / 2)


def test_usage_counts_real_tokens():
    model = moh(make_model("llama"), SETTINGS["query heads"])
    for core in cores(model):
        core.usage = torch.zeros(5, dtype=torch.int64)
    ids, mask = long_batch(LENGTH)
    chosen = routes(model, ids, attention_mask=mask)
    for core, (active, _) in zip(cores(model), chosen, strict=True):
        assert core.usage.tolist() == [*(active & mask.bool()[..., None]).sum((0, 1)).tolist(), 111]
        assert core.usage[:4].sum() == 3 * 111


def test_units_go_from_all_to_the_target_in_equal_parts():
    assert [annealed(8, 6, progress / 10) for progress in range(12)] == [8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 6, 6]
    core = core_alone(MohConfig(unit="query_head", active=0.5, shared=0.25, anneal=0.5))
    seen = []
    for progress in (0.0, 0.2, 0.3, 0.5, 1.0):
        core.set_progress(progress)
        seen.append(core.num_active)
    assert seen == [4, 4, 3, 2, 2]
    direct = core_alone(MohConfig(unit="query_head", active=0.5, shared=0.25))
    direct.set_progress(0.0)
    assert direct.num_active == 2


@pytest.mark.parametrize(
    ("units", "active", "shared", "want"),
    [(32, 0.75, 0.5, (24, 16)), (8, 0.75, 0.5, (6, 4)), (9, 0.78, 0.5, (7, 4)), (3, 0.67, 0.5, (2, 1)), (4, 1, 0.9, (4, 3)), (5, 0.01, 0, (1, 0))],
)
def test_shares_become_whole_units_and_leave_something_to_choose(units, active, shared, want):
    assert unit_counts(units, active, shared) == want


# ---------------------------------------------------------------- training


def finetuned(folder, *, balance=0.5, settings=None, steps=2, watch=None, checkpointing=False, **options):
    """Weights and lines of metrics of a finetuning of a small model with routers, in fp64."""
    model = moh(make_model("llama"), settings or SETTINGS["query heads"]).double()
    ids = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    rows = PackedRows(ids, torch.arange(24, dtype=torch.int32).expand_as(ids).contiguous())
    config = FinetuneConfig(tokens=steps * 96, length=24, batch_size=4, warmup_steps=0, lr=1e-2, balance=balance, lora=LoraConfig(rank=2), **options)
    adapted = add_lora(model, [path for _, path, _ in converted_sites(model)], config.lora, seed=0)
    layers = {idx: module.core for idx, _, module in converted_sites(adapted)}
    for core in layers.values():
        if watch is not None:
            core.set_progress = lambda progress, core=core, real=core.set_progress: (real(progress), watch.append(core.num_active))
    run_finetune(adapted, layers, rows, config, RunContext(folder, gradient_checkpointing=checkpointing))
    for core in layers.values():
        assert (core.balanced, core.on_balance, core.num_active) == (False, None, core.target)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: p.detach() for name, p in adapted.named_parameters()}, lines


@pytest.mark.parametrize("name", ["output norms", "query heads", "learned, soft"])
def test_neither_small_batches_nor_recomputed_activations_change_what_is_learned(tmp_path, name):
    want, lines = finetuned(tmp_path / "whole", settings=SETTINGS[name])
    for folder, options in (("parts", {"micro_batch_size": 2}), ("recomputed", {"checkpointing": True})):
        got, others = finetuned(tmp_path / folder, settings=SETTINGS[name], **options)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)
        assert [line["balance"] for line in others] == pytest.approx([line["balance"] for line in lines])


def test_the_balance_loss_is_logged_is_part_of_the_loss_and_is_learned_from(tmp_path):
    settings = SETTINGS["learned"]
    _, lines = finetuned(tmp_path / "weighted", balance=1.0, steps=8, settings=settings)
    _, without = finetuned(tmp_path / "plain", balance=0.0, steps=8, settings=settings)
    assert all("balance" not in line for line in without)
    assert [line["loss"] for line in lines] == pytest.approx([0.9 * line["kl"] + 0.1 * line["ce"] + 3 * line["balance"] for line in lines], rel=1e-5)
    assert lines[-1]["balance"] - 1 < 0.5 * (lines[0]["balance"] - 1)


def test_units_are_left_out_step_by_step(tmp_path):
    seen = []
    finetuned(tmp_path, steps=8, watch=seen, settings=MohConfig(unit="query_head", active=0.5, shared=0.25, anneal=0.5))
    assert seen[::3] == [4, 3, 3, 2, 2, 2, 2, 2, 2]  # eight steps, and once more when it is over


# ---------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("prefill", [[1], [40], [5, 6, 30, 9]], ids=str)
def test_every_way_through_a_cache_equals_one_forward_pass(student, prefill):
    assert cached_error(student, *long_batch(LENGTH), prefill) < 1e-10


def test_planted_routing_that_forgets_its_choice_in_a_step_is_seen(monkeypatch):
    from attnconvert.surgery.runtime import heads

    model = moh(make_model("llama"), SETTINGS["query heads"]).double()
    real = heads.span_attention_step
    monkeypatch.setattr(heads, "span_attention_step", lambda *args, active, **options: real(*args, active=active.roll(1, -1), **options))
    assert cached_error(model, *long_batch(LENGTH), [40]) > 1e-3


def test_outputs_do_not_depend_on_the_batch_or_its_order(student):
    ids, _ = long_batch(LENGTH, pads=0)
    more = torch.randint(3, 60, (3, 60), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        alone = torch.cat([student(row[None], use_cache=False).logits for row in ids])
        among = student(torch.cat([more, ids.flip(0)]), use_cache=False).logits[3:].flip(0)
    assert (alone - among).abs().max() < 1e-10


def test_later_tokens_do_not_change_earlier_ones(student):
    ids, _ = long_batch(LENGTH, pads=0)
    other = ids.clone()
    other[:, 40:] = 7
    with torch.no_grad():
        a, b = (student(x, use_cache=False).logits for x in (ids, other))
    assert (a[:, :40] - b[:, :40]).abs().max() < 1e-10
    assert (a[:, 40:] - b[:, 40:]).abs().max() > 1e-3


def test_packed_documents_are_seen_as_documents(student):
    ids, _ = long_batch(LENGTH, pads=0)
    packed = torch.cat([torch.arange(25), torch.arange(35)])[None]
    with torch.no_grad():
        alone = [student(part, use_cache=False).logits for part in ids[:1].split((25, 35), 1)]
        assert (student(ids[:1], position_ids=packed, use_cache=False).logits - torch.cat(alone, 1)).abs().max() < 1e-10


def test_padded_row_equals_the_row_alone(student):
    cached_layers.assert_rows_are_as_alone(student, 12)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 20}], ids=str)
def test_beams_and_chunks_write_what_they_write_without_a_cache(student, options):
    cached_layers.assert_text_needs_no_cache(student, *long_batch(tokens=50), 6, options)


def test_a_second_turn_goes_on_from_the_cache_of_the_first(student):
    cached_layers.assert_goes_on(student, *cached_layers.first_turn(student, *long_batch(tokens=50), 4), 12)


def test_the_cache_has_every_key_and_its_bytes_are_those_of_the_plan(settings):
    model = moh(make_model("llama"), settings)
    site = find_sites(FAMILIES["llama"]())[0]
    for length, cache in cached_layers.filled_caches(model):
        keys = sum(tensor.nbytes for layer in cache.layers for name, tensor in layer.state.items() if name in "kv")
        assert keys == 3 * 2 * METHOD.cost(settings, site, length, 4).state_bytes == 3 * 2 * 2 * 2 * -(-length // 64) * 64 * 8 * 4
        assert cache_bytes(cache) < keys * 1.01


def test_a_graph_needs_a_planned_length_and_stops_where_the_room_ends(monkeypatch):
    model = moh(make_model("llama"), SETTINGS["query heads"])
    run, cache, captured = cached_layers.watched_graph(model, 12, monkeypatch)
    cached_layers.feed(run, cache, torch.tensor([[5, 9, 3]]))
    states = [layer.state for layer in cache.layers]
    cached_layers.feed(run, cache, *[torch.tensor([[7]])] * 9)
    assert captured == [4, 5, 6, 7, 8, 9, 10, 11]
    assert all(layer.state is state for layer, state in zip(cache.layers, states, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in SETTINGS])
def test_generate_replays_a_graph_and_writes_the_same_text(name, dtype, monkeypatch):
    cached_layers.assert_replays_write_the_same_text(moh(make_model("llama"), SETTINGS[name]).to("cuda", dtype), 70, monkeypatch)


# ---------------------------------------------------------------- copies and checkpoints


def test_a_copy_of_a_model_routes_by_what_it_sees_itself():
    for family, settings in (("qwen3", SETTINGS["query heads"]), ("llama", SETTINGS["output norms"])):
        model = moh(make_model(family), settings).double()
        ids, mask = long_batch(LENGTH)
        want = uncached(model, ids, mask)
        other = copy.deepcopy(model)
        for core in cores(model):
            core._route = None  # the copy does not ask it
        assert torch.equal(uncached(other, ids, mask), want)


@pytest.mark.parametrize(("family", "name"), [("qwen3", "query heads"), ("llama", "output norms"), ("llama", "learned, soft")])
def test_a_checkpoint_writes_the_same_text_in_a_process_without_attnconvert(tmp_path, family, name):
    cached_layers.assert_checkpoint_needs_no_attnconvert(moh(make_model(family), SETTINGS[name]), tmp_path, *padded())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 0}, "greater than 0"),
        ({"shared": 1}, "less than 1"),
        ({"unit": "head"}, "'kv_head' or 'query_head'"),
        ({"shared_units": (1, 1)}, "not different numbers"),
        ({"shared_units": (-1,)}, "not different numbers"),
        ({"router": "random"}, "'output_norm', 'norm' or 'learned'"),
        ({"anneal": 2}, "less than or equal to 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValidationError, match=message):
        MohConfig.model_validate(settings)


def test_settings_survive_being_written_and_read():
    for config in (*METHOD.examples, METHOD.exact, MohConfig()):
        assert MohConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_layers_that_cannot_be_routed_say_why():
    cached_layers.assert_sliding_and_capped_layers_are_refused(METHOD)
    gemma = find_sites(FAMILIES["gemma3_text"]())
    [two] = METHOD.check(MohConfig(), gemma[1])
    assert two == "0.75 of 2 KV heads is all of them, so there is nothing to leave out; set active to 0.5 or less; unit query_head has more to choose from"
    assert METHOD.check(MohConfig(unit="query_head"), gemma[1]) == []
    assert "leave a router nothing to choose; 2 shared_units at most" in METHOD.check(MohConfig(unit="query_head", shared_units=(0, 1, 2)), gemma[1])[0]
    assert "beyond the layer's 4 query heads" in METHOD.check(MohConfig(unit="query_head", shared_units=(4,)), gemma[1])[0]
    assert registry.get("moh") is METHOD


def test_a_norm_of_queries_and_keys_together_is_refused_for_the_norm_router():
    module = torch.nn.Module()
    module.qk_norm = torch.nn.LayerNorm(4)
    core = MixtureOfHeads(4, 4, 3, **METHOD.runtime_config(MohConfig(router="norm")))
    with pytest.raises(ValueError, match="one norm for queries and keys"):
        core.fit(module)


@pytest.mark.parametrize("units", [(0, 0), (4,), (0, 1, 2)])
def test_shared_units_that_cannot_be_are_refused_by_the_core(units):
    with pytest.raises(ValueError, match="shared units"):
        MixtureOfHeads(4, 4, 3, **METHOD.runtime_config(MohConfig(shared=0.5))).set_shared(units)


def test_costs_are_those_of_the_used_units():
    site = find_sites(FAMILIES["llama"]())[0]
    dense = softmax_cost(site, 4096, 2)
    assert METHOD.cost(METHOD.exact.model_copy(update={"router": "norm"}), site, 4096, 2) == dense
    half = METHOD.cost(MohConfig(active=0.5, router="norm"), site, 4096, 2)
    assert (half.state_bytes, half.flops, half.num_parameters) == (dense.state_bytes, dense.flops // 2, 0)
    for config in (SETTINGS["output norms"], SETTINGS["learned"], SETTINGS["learned, soft"]):
        core = moh(make_model("llama"), config).model.layers[0].self_attn.core
        assert METHOD.cost(config, site, 64, 2).num_parameters == sum(p.numel() for p in core.parameters())
