"""MoA layers in whole models: spans are what their rules say, cached text is uncached text in every way of running, and caches are as large as they say."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import FAMILIES, make_model
from pydantic import ValidationError
from test_seam import ROWS, SMALL, TOLERANCE, batch, convert, padded, step_logits, worst

from attnconvert.convert.evaluate import cache_bytes
from attnconvert.kernels.span import decode
from attnconvert.kernels.span.slots import fixed_point, least_window, ring_size, visible_pairs
from attnconvert.surgery import registry
from attnconvert.surgery.method import softmax_cost
from attnconvert.surgery.methods.moa import METHOD, MoaConfig, SearchConfig
from attnconvert.surgery.runtime import spans
from attnconvert.surgery.runtime.graph import DecodeGraph, graph_refusal
from attnconvert.surgery.sites import find_sites

EXACT = METHOD.runtime_config(METHOD.exact)
SLIDING = ("mistral",)  # every layer of it
NULL_FAMILIES = [name for name in FAMILIES if name not in SLIDING]
RULES = {  # KV heads of the tiny models: 2
    "elastic": {"alphas": [-2, 6], "betas": [0.5, 0.125], "num_sinks": 3},
    "elastic, held below 40 tokens": {"alphas": [-10, 6], "betas": [0.5, 0.125], "num_sinks": 1, "min_length": 40},
    "fixed, uneven": {"alphas": [4, 75], "betas": [0.0, 0.0], "num_sinks": 2},
    "one head dense": {"alphas": [8, 0], "betas": [0.0, 1.0], "num_sinks": 0},
    "sinks longer than prompts": {"alphas": [2, 1], "betas": [0.0, 0.25], "num_sinks": 24},
}


def full_layers(model):
    return {site.layer_idx for site in find_sites(model.config) if not METHOD.check(METHOD.exact, site)}


def moa(model, config, **options):
    return convert(model, method="moa", config=config, layers=full_layers(model), **options)


@pytest.fixture(params=list(RULES))
def rules(request):
    return RULES[request.param]


@pytest.fixture
def student(rules):
    return moa(make_model("llama"), rules)


def long_batch(tokens=150, pads=9):
    """Two rows, the second left-padded; long enough that rings of 64 slots turn over."""
    ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return ids * mask, mask


def uncached(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False).logits


# ---------------------------------------------------------------- what the rules mean


@pytest.mark.parametrize("name", NULL_FAMILIES)
def test_a_window_of_everything_equals_the_stock_model_at_every_step_and_in_its_text(name):
    teacher = make_model(name)
    student = moa(teacher, EXACT)
    ids, mask = batch()
    with torch.no_grad():
        assert worst(uncached(student, ids, mask), uncached(teacher, ids, mask), mask) < TOLERANCE
        cached = step_logits(teacher, ids, mask, prefill=[13])
        for prefill in ([13], [4, 4, 5]):
            assert worst(step_logits(student, ids, mask, prefill=prefill), cached, mask) < TOLERANCE
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    assert torch.equal(student.generate(ids, **options), teacher.generate(ids, **options))


def test_rules_show_each_head_the_keys_that_the_definition_names(rules):
    teacher = make_model("llama")
    teacher.set_attn_implementation("eager")
    ids, _ = long_batch()
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
    ids, mask = long_batch()
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
    ids, mask = long_batch()
    with torch.no_grad():
        got = step_logits(student, ids, mask, prefill=prefill, steps=150 - sum(prefill))
    assert worst(got, uncached(student, ids, mask), mask) < TOLERANCE


@pytest.mark.parametrize("prefill", [[5, 6, 70, 69], [140, 10], [1, 1, 1, 80, 2, 65]], ids=str)
def test_any_split_of_a_prompt_equals_one_forward_pass(student, prefill):
    ids, mask = long_batch()
    with torch.no_grad():
        got = step_logits(student, ids, mask, prefill=prefill, steps=0)
    assert worst(got, uncached(student, ids, mask), mask) < TOLERANCE


def test_planted_rolled_heads_of_the_rule_table_are_seen(monkeypatch):
    student = moa(make_model("llama"), RULES["fixed, uneven"])
    ids, mask = long_batch()
    real = spans.span_layout
    monkeypatch.setattr(spans, "span_layout", lambda alphas, betas, *rest: real(alphas[1:] + alphas[:1], betas[1:] + betas[:1], *rest))
    with torch.no_grad():
        assert worst(step_logits(student, ids, mask, prefill=[140], steps=10), uncached(student, ids, mask), mask) > 50 * TOLERANCE


def test_planted_slot_off_by_one_is_seen(monkeypatch):
    student = moa(make_model("llama"), RULES["fixed, uneven"])
    ids, mask = long_batch()
    real = decode._slots
    monkeypatch.setattr(decode, "_slots", lambda layout, head, position: real(layout, head, position + 1))
    with torch.no_grad():
        assert worst(step_logits(student, ids, mask, prefill=[140], steps=10), uncached(student, ids, mask), mask) > 50 * TOLERANCE


def test_padded_row_equals_the_row_alone(student):
    ids, mask = padded()
    together = student.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, ids.shape[1] :]
    for row, want in zip(ROWS, together, strict=True):
        alone = student.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), max_new_tokens=20, do_sample=False)
        assert torch.equal(alone[0, len(row) :], want)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"prefill_chunk_size": 5}], ids=str)
def test_beams_and_chunks_write_what_they_write_without_a_cache(student, options):
    ids, mask = padded()
    run = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, **options}
    plain = {name: value for name, value in run.items() if name != "prefill_chunk_size"}
    assert torch.equal(student.generate(ids, **run), student.generate(ids, use_cache=False, **plain))


def test_a_second_turn_goes_on_from_the_cache_of_the_first(student):
    ids, mask = long_batch(tokens=70)
    first = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    more = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(8))
    whole = torch.cat([first.sequences, more], 1)
    mask = torch.cat([mask, torch.ones(2, whole.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    want = student.generate(whole, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=False)
    cache = first.past_key_values
    assert cache.get_seq_length() == 77
    assert torch.equal(student.generate(whole, attention_mask=mask, max_new_tokens=20, do_sample=False, past_key_values=cache), want)
    assert [layer.capacity for layer in cache.layers] == [whole.shape[1] + 19] * 3


def test_rows_of_a_cache_can_be_repeated_and_chosen(student):
    ids, mask = long_batch(tokens=80)
    with torch.no_grad():
        want = uncached(student, torch.cat([ids, ids[:, :1]], 1)[[1, 0, 1]], torch.cat([mask, mask[:, -1:]], 1)[[1, 0, 1]])[:, -1]
        cache = student(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1, 3]))
        position, seen = mask.sum(1, keepdim=True)[[1, 0, 1]], torch.ones(3, 81, dtype=torch.long)
        got = student(ids[[1, 0, 1], :1], attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
    assert (got - want).abs().max() < TOLERANCE


# ---------------------------------------------------------------- the cache's size


def slots_of(rules, length):
    pairs = [(a, fixed_point(b)) for a, b in zip(rules["alphas"], rules["betas"], strict=True)]
    return sum(rules["num_sinks"] + ring_size(a, b, rules["num_sinks"], length, least_window(a, b, rules.get("min_length", 0))) for a, b in pairs)


def test_bytes_of_keys_are_those_of_the_rules_and_all_that_is_held_is_reported(rules):
    model = moa(make_model("llama"), rules)
    ids, mask = long_batch(tokens=70)
    site = find_sites(FAMILIES["llama"]())[0]
    for planned, length in ((None, 70), (230, 230)):
        cache = model.build_cache(planned)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
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
    ids, _ = long_batch(tokens=30)
    cache = model.build_cache(40)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        before = [(layer.state, [t.data_ptr() for t in layer.state.values()]) for layer in cache.layers]
        for _ in range(10):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert all(layer.state is state and [t.data_ptr() for t in state.values()] == found for layer, (state, found) in zip(cache.layers, before, strict=True))
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert [layer.capacity for layer in cache.layers] == [41 + 64] * 3


def test_a_graph_needs_a_planned_length_and_stops_where_the_room_ends(monkeypatch):
    model = moa(make_model("llama"), RULES["elastic"])
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert "not told how many tokens" in graph_refusal(model, model.build_cache())
    cache = model.build_cache(12)
    assert graph_refusal(model, cache) is None
    captured = []
    monkeypatch.setattr(DecodeGraph, "_capture", lambda self, inputs, values: captured.append(cache.get_seq_length()) or self.model(**inputs))
    run = DecodeGraph(model)
    with torch.no_grad():
        cache = run(input_ids=torch.tensor([[5, 9, 3]]), past_key_values=cache, use_cache=True).past_key_values
        for _ in range(11):
            run(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    # one warm step, steps that would be replays up to token 12, a plain one that makes room, and so on
    assert captured == [4, 5, 6, 7, 8, 9, 10, 11, 13]


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)], ids=["cuda"])
def test_generate_replays_a_graph_and_writes_the_same_text(case, dtype, monkeypatch):
    student = moa(make_model("llama"), RULES["elastic"]).to("cuda", dtype)
    runs = []
    monkeypatch.setattr(type(student), "get_compiled_call", lambda self, config: runs.append(DecodeGraph(self)) or runs[-1])
    ids, mask = (x.cuda() for x in long_batch(tokens=70))
    want = student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, disable_compile=True)
    assert torch.equal(student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False), want)
    assert [run.num_replays for run in runs] == [38]  # 39 steps after the prefill, the first of them plain


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_writes_the_same_text_in_a_process_without_attnconvert(tmp_path):
    student = moa(make_model("llama"), RULES["elastic"])
    student.save_pretrained(tmp_path / "model")
    ids, mask = padded()
    want = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
    code = (
        "import sys, json; sys.path[:], folder, ids, mask = json.loads(sys.argv[1]); sys.modules['attnconvert'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "print(json.dumps(m.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=8, do_sample=False).tolist()))\n"
    )
    arguments = json.dumps([[p for p in sys.path if p], str(tmp_path / "model"), ids.tolist(), mask.tolist()])
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-I", "-c", code, arguments], capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == want
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attn_plan"]["layers"][0]["config"] == RULES["elastic"]


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
    gemma = find_sites(FAMILIES["gemma3_text"]())
    assert "already a sliding window of 8" in METHOD.check(METHOD.exact, gemma[0])[0]
    assert METHOD.check(METHOD.exact, gemma[1]) == []
    assert METHOD.check(MoaConfig(alphas=(1, 2, 3), betas=0.5), gemma[1]) == ["alphas has 3 numbers, but the layer has 2 KV heads"]
    capped = find_sites(transformers.Gemma2Config(**SMALL, head_dim=8))
    assert any("capped logits" in problem for problem in METHOD.check(METHOD.exact, capped[1]))
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
