"""MoA layers in whole models: spans are what their rules say, cached text is uncached text in every way of running, and caches are as large as they say."""

import json

import cached_layers
import pytest
import torch
from cached_layers import GPU, NULL_FAMILIES, cached_error, full_layers, long_batch, uncached
from conftest import FAMILIES, make_model
from pydantic import ValidationError
from test_seam import TOLERANCE, convert, padded, worst

from attnconvert.convert.evaluate import cache_bytes
from attnconvert.kernels.span import decode
from attnconvert.kernels.span.slots import fixed_point, least_window, ring_size, visible_pairs
from attnconvert.surgery import registry
from attnconvert.surgery.method import softmax_cost
from attnconvert.surgery.methods.moa import METHOD, MoaConfig, SearchConfig
from attnconvert.surgery.runtime import spans
from attnconvert.surgery.sites import find_sites

EXACT = METHOD.runtime_config(METHOD.exact)
LENGTH = 150  # rings of 64 slots turn over
RULES = {  # KV heads of the tiny models: 2
    "elastic": {"alphas": [-2, 6], "betas": [0.5, 0.125], "num_sinks": 3},
    "elastic, held below 40 tokens": {"alphas": [-10, 6], "betas": [0.5, 0.125], "num_sinks": 1, "min_length": 40},
    "fixed, uneven": {"alphas": [4, 75], "betas": [0.0, 0.0], "num_sinks": 2},
    "one head dense": {"alphas": [8, 0], "betas": [0.0, 1.0], "num_sinks": 0},
    "sinks longer than prompts": {"alphas": [2, 1], "betas": [0.0, 0.25], "num_sinks": 24},
}


def moa(model, config, **options):
    return convert(model, method="moa", config=config, layers=full_layers(model, METHOD), **options)


@pytest.fixture(params=list(RULES))
def rules(request):
    return RULES[request.param]


@pytest.fixture
def student(rules):
    return moa(make_model("llama"), rules)


# ---------------------------------------------------------------- what the rules mean


@pytest.mark.parametrize("name", NULL_FAMILIES)
def test_a_window_of_everything_equals_the_stock_model_at_every_step_and_in_its_text(name):
    teacher = make_model(name)
    cached_layers.assert_equals_the_stock_model(moa(teacher, EXACT), teacher)


def test_rules_show_each_head_the_keys_that_the_definition_names(rules):
    teacher = make_model("llama")
    teacher.set_attn_implementation("eager")
    ids, _ = long_batch(LENGTH)
    n = torch.arange(ids.shape[1])
    seen = []
    for alpha, beta in zip(rules["alphas"], rules["betas"], strict=True):
        length = [max(at + 1, rules.get("min_length", 0)) for at in n.tolist()]
        window = torch.tensor([max(1, alpha + (context * round(beta * 65536)) // 65536) for context in length])
        seen.append((n[None] <= n[:, None]) & ((n[None] < rules["num_sinks"]) | (n[None] > (n - window)[:, None])))
    mask = torch.where(torch.stack(seen).repeat_interleave(2, 0), 0.0, torch.finfo(torch.float32).min)[None]
    with torch.no_grad():
        want = teacher(ids, attention_mask=mask, use_cache=False).logits
        assert (moa(teacher, rules)(ids, use_cache=False).logits - want).abs().max() < TOLERANCE
        rolled = rules | {"alphas": rules["alphas"][::-1], "betas": rules["betas"][::-1]}
        assert (moa(teacher, rolled)(ids, use_cache=False).logits - want).abs().max() > 50 * TOLERANCE


def test_one_rule_for_all_heads_may_be_a_number_and_no_rule_yet_is_dense_attention():
    teacher = make_model("llama")
    ids, mask = long_batch(LENGTH)
    many = moa(teacher, {"alphas": [7, 7], "betas": [0.25, 0.25], "num_sinks": 2})
    assert torch.equal(uncached(moa(teacher, {"alphas": 7, "betas": 0.25, "num_sinks": 2}), ids, mask), uncached(many, ids, mask))
    undecided = moa(teacher, METHOD.runtime_config(MoaConfig(min_length=0)))
    assert worst(uncached(undecided, ids, mask), uncached(teacher, ids, mask), mask) < TOLERANCE
    for layer in undecided.model.layers:
        layer.self_attn.core.set_rules([7, 7], [0.25, 0.25])
        layer.self_attn.core.num_sinks = 2
    assert torch.equal(uncached(undecided, ids, mask), uncached(many, ids, mask))
    with pytest.raises(ValueError, match="3 alphas and 2 betas for 2 KV heads"):
        undecided.model.layers[0].self_attn.core.set_rules([1, 2, 3], [0.5, 0.5])
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        undecided.model.layers[0].self_attn.core.set_rules(3, 1.5)


# ---------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("prefill", [[1], [140]], ids=str)
def test_decode_equals_prefill_at_every_position(student, prefill):
    assert cached_error(student, *long_batch(LENGTH), prefill) < TOLERANCE


@pytest.mark.parametrize("prefill", [[5, 6, 70, 69], [140, 10], [1, 1, 1, 80, 2, 65]], ids=str)
def test_any_split_of_a_prompt_equals_one_forward_pass(student, prefill):
    assert cached_error(student, *long_batch(LENGTH), prefill) < TOLERANCE


def test_planted_rolled_heads_of_the_rule_table_are_seen(monkeypatch):
    student = moa(make_model("llama"), RULES["fixed, uneven"])
    real = spans.span_layout
    monkeypatch.setattr(spans, "span_layout", lambda alphas, betas, *rest: real(alphas[1:] + alphas[:1], betas[1:] + betas[:1], *rest))
    assert cached_error(student, *long_batch(LENGTH), [140]) > 50 * TOLERANCE


def test_planted_slot_off_by_one_is_seen(monkeypatch):
    student = moa(make_model("llama"), RULES["fixed, uneven"])
    real = decode._slots
    monkeypatch.setattr(decode, "_slots", lambda layout, head, position: real(layout, head, position + 1))
    assert cached_error(student, *long_batch(LENGTH), [140]) > 50 * TOLERANCE


def test_padded_row_equals_the_row_alone(student):
    cached_layers.assert_rows_are_as_alone(student, 20)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"prefill_chunk_size": 5}], ids=str)
def test_beams_and_chunks_write_what_they_write_without_a_cache(student, options):
    cached_layers.assert_text_needs_no_cache(student, *padded(), 15, options)


def test_a_second_turn_goes_on_from_the_cache_of_the_first(student):
    cache, whole, mask = cached_layers.first_turn(student, *long_batch(tokens=70), 8)
    assert cache.get_seq_length() == 77
    cached_layers.assert_goes_on(student, cache, whole, mask, 20)
    assert [layer.capacity for layer in cache.layers] == [whole.shape[1] + 19] * 3


def test_rows_of_a_cache_can_be_repeated_and_chosen(student):
    cached_layers.assert_rows_can_be_repeated_and_chosen(student, *long_batch(tokens=80), TOLERANCE)


# ---------------------------------------------------------------- the cache's size


def slots_of(rules, length):
    pairs = [(a, fixed_point(b)) for a, b in zip(rules["alphas"], rules["betas"], strict=True)]
    return sum(rules["num_sinks"] + ring_size(a, b, rules["num_sinks"], length, least_window(a, b, rules.get("min_length", 0))) for a, b in pairs)


def test_bytes_of_keys_are_those_of_the_rules_and_all_that_is_held_is_reported(rules):
    model = moa(make_model("llama"), rules)
    site = find_sites(FAMILIES["llama"]())[0]
    for length, cache in cached_layers.filled_caches(model):
        held = [tensor for layer in cache.layers for tensor in (*layer.state.values(), layer.layout.table)]
        keys = sum(tensor.untyped_storage().nbytes() for tensor in held if tensor.dim() == 3)
        assert keys == 3 * 2 * 2 * slots_of(rules, length) * 8 * 4  # layers, k and v, rows, slots, head_dim, fp32
        config = MoaConfig(alphas=tuple(rules["alphas"]), betas=tuple(rules["betas"]), num_sinks=rules["num_sinks"])
        assert keys == 3 * 2 * METHOD.cost(config, site, length, 4).state_bytes
        assert cache_bytes(cache) == sum(tensor.untyped_storage().nbytes() for tensor in held)


def test_generate_plans_for_its_own_length_and_a_fixed_window_never_grows():
    model = moa(make_model("llama"), {"alphas": [8, 0], "betas": [0.0, 1.0], "num_sinks": 2})
    ids, mask = long_batch(tokens=20)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=120, do_sample=False, return_dict_in_generate=True)
    assert [(layer.planned_length, layer.capacity, layer.layout.rings) for layer in out.past_key_values.layers] == [(139, 139, (64, 192))] * 3
    cache = None
    with torch.no_grad():
        for n in range(150):
            cache = model(torch.tensor([[5 + n % 40]]), past_key_values=cache, use_cache=True).past_key_values
            rings = cache.layers[0].layout.rings
            assert rings[0] == 64 if n else rings[0] == 0
            assert n - 2 < rings[1] <= max(n - 2, 0) + 64 + 64  # what the head sees, the 64 that it grows by, and the rounding


def test_a_step_with_room_moves_nothing_and_one_without_is_given_it():
    model = moa(make_model("llama"), RULES["elastic"])
    cache = model.build_cache(40)
    cached_layers.assert_steps_with_room_move_nothing(model, cache, long_batch(tokens=30)[0], 10)
    assert [layer.capacity for layer in cache.layers] == [41 + 64] * 3


def test_a_graph_needs_a_planned_length_and_stops_where_the_room_ends(monkeypatch):
    model = moa(make_model("llama"), RULES["elastic"])
    run, cache, captured = cached_layers.watched_graph(model, 12, monkeypatch)
    cached_layers.feed(run, cache, torch.tensor([[5, 9, 3]]), *[torch.tensor([[7]])] * 11)
    # one warm step, steps that would be replays up to token 12, a plain one that makes room, and so on
    assert captured == [4, 5, 6, 7, 8, 9, 10, 11, 13]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [pytest.param(None, marks=GPU)], ids=["cuda"])
def test_generate_replays_a_graph_and_writes_the_same_text(case, dtype, monkeypatch):
    cached_layers.assert_replays_write_the_same_text(moa(make_model("llama"), RULES["elastic"]).to("cuda", dtype), 70, monkeypatch)


# ---------------------------------------------------------------- serving engines


def test_a_new_state_has_the_tensors_that_a_prefill_leaves():
    cached_layers.assert_a_new_state_is_as_after_a_prefill(moa(make_model("llama"), RULES["elastic"]))


def test_a_model_steps_on_rows_of_a_pool_as_on_its_own():
    cached_layers.assert_steps_on_a_pool_are_those_of_the_batch(moa(make_model("llama"), RULES["elastic"]))


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_writes_the_same_text_in_a_process_without_attnconvert(tmp_path):
    plan = cached_layers.assert_checkpoint_needs_no_attnconvert(moa(make_model("llama"), RULES["elastic"]), tmp_path, *padded())
    assert plan["layers"][0]["config"] == RULES["elastic"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alphas": 8}, "alphas without betas"),
        ({"betas": 0.5}, "betas without alphas"),
        ({"alphas": (1, 2), "betas": (0.5,) * 3}, "2 alphas and 3 betas"),
        ({"alphas": (), "betas": 0.5}, "one number for each KV head"),
        ({"alphas": 1, "betas": 1.5}, "beta 1.5 is not between 0 and 1"),
        ({"alphas": 2**40, "betas": 0}, "is beyond"),
        ({"alphas": 1, "betas": 0, "plan": "x.json"}, "leave out one or the other"),
        ({"density": 0}, "greater than 0"),
        ({"num_sinks": -1}, "greater than or equal to 0"),
        ({"search": {"lengths": (4096, 2048)}}, "ascending"),
        ({"search": {"lengths": ()}}, "at least 1 item"),
        ({"search": {"lengths": (32,)}}, "a response of 32 tokens leaves nothing"),
        ({"search": {"betas": (0.5, -0.1)}}, "beta -0.1"),
        ({"search": {"candidates": ((256, 0.0),), "alphas": (1,)}}, "leave out alphas"),
        ({"search": {"candidates": ((256, 0.0), (256, 0.0))}}, "same rule twice"),
        ({"search": {"candidates": ((256, 2.0),)}}, "beta 2 is not between"),
        ({"search": {"max_rules": 0}}, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValidationError, match=message):
        MoaConfig.model_validate(settings)


def test_settings_survive_being_written_and_read():
    for config in (*METHOD.examples, METHOD.exact, MoaConfig(), MoaConfig(search=SearchConfig(candidates=((256, 0.0), (0, 1.0))))):
        assert MoaConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_layers_that_cannot_have_spans_say_why():
    cached_layers.assert_sliding_and_capped_layers_are_refused(METHOD)
    gemma = find_sites(FAMILIES["gemma3_text"]())
    assert METHOD.check(MoaConfig(alphas=(1, 2, 3), betas=0.5), gemma[1]) == ["alphas has 3 numbers, but the layer has 2 KV heads"]
    assert registry.get("moa") is METHOD


def test_costs_are_those_of_the_rules_or_of_the_target_density():
    site = find_sites(FAMILIES["llama"]())[0]
    dense = softmax_cost(site, 4096, 2)
    assert METHOD.cost(METHOD.exact, site, 4096, 2) == dense
    half = METHOD.cost(MoaConfig(density=0.5), site, 4096, 2)
    assert (half.state_bytes, half.flops, half.num_parameters) == (dense.state_bytes // 2, dense.flops // 2, 0)
    duo = METHOD.cost(MoaConfig(alphas=(200, 0), betas=(0, 1)), site, 4096, 2)
    assert duo.state_bytes == 2 * (64 + 256 + 4096) * 8 * 2
    assert duo.flops == 4 * 2 * 8 * (visible_pairs(200, 0, 64, 4096) + 4096 * 4097 // 2)
