"""Variants of regrouping: similar groups, fused projections, other architectures, fewer query heads, uneven groups. What claims to change nothing is compared by logits."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import transformers
from conftest import COMMON, FAMILIES
from test_regroup import build, moments_of, prepare

import attnconvert
from attnconvert.convert.save import check_parity, check_reload
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery import regroup as surgery
from attnconvert.surgery.regroup import exports, grouping, heads, queries, uneven
from attnconvert.surgery.regroup.model import new_tensors
from attnconvert.surgery.runtime.modeling import teacher_mode
from attnconvert.surgery.runtime.seam import SeamInputs
from attnconvert.surgery.runtime.uneven import UnevenAttention, even_split
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import restore_softmax

IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(5))
WIDE = {**COMMON, "num_key_value_heads": 4}
NO_KV = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
OPT = {**{k: v for k, v in NO_KV.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32}


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_another_order_of_the_heads_leaves_logits_unchanged(family):
    config = FAMILIES[family]()
    config.num_key_value_heads = 4
    model = build(config)
    sites, _ = prepare(model)
    tensors = new_tensors(model, sites, {}, lambda site, source, moment: heads.selected(source, [2, 0, 3, 1]))
    want = logits(model)
    assert any(not torch.equal(tensor, model.get_parameter(name)) for name, tensor in tensors.items())
    with surgery.installed(model, surgery.Regrouped(4, tensors)):
        assert (logits(model) - want).abs().max() <= 1e-4


def test_similar_groups_find_heads_that_are_copies_of_each_other():
    model = build(transformers.LlamaConfig(**COMMON))
    sites, _ = prepare(model)
    want, moments = logits(model), moments_of(model, sites)
    wide = copy.deepcopy(model)
    # KV heads 0, 1 of two query heads each become four of one: 0, 1, 0', 1' so that neighbours are strangers
    mixed = new_tensors(model, sites, moments, lambda site, source, moment: heads.selected(heads.repeated(source, 4), [0, 2, 1, 3]))
    surgery.install(wide, surgery.Regrouped(4, mixed))
    assert (logits(wide) - want).abs().max() <= 1e-4
    wide_sites, wide_freedoms = prepare(wide, [2])
    surgery.install(wide, surgery.turned(wide, wide_sites, surgery.random_turns(wide_sites, wide_freedoms)))
    for init in ("aligned", "svd"):
        for chosen, undone in (("similar", True), ("contiguous", False)):
            with surgery.installed(wide, surgery.regroup(wide, wide_sites, moments, wide_freedoms, 2, init, grouping=chosen)):
                assert (float((logits(wide) - want).abs().max()) <= 1e-4) is undone


def test_swaps_find_the_best_groups_and_are_never_worse_than_neighbours():
    generator = torch.Generator().manual_seed(0)
    for size, groups in ((8, 4), (8, 2), (6, 2)):
        for _ in range(5):
            costs = torch.rand(size, size, generator=generator)
            costs = (costs + costs.T).fill_diagonal_(0)

            def total(order, count=groups, table=costs):
                return sum(float(table[i, j]) for group in torch.tensor(order).view(count, -1).tolist() for i, j in itertools.combinations(group, 2))

            order = grouping.similar_order(costs, groups)
            assert sorted(order) == list(range(size))
            best = min(total(list(p)) for p in itertools.permutations(range(size)) if p[0] == 0) if size == 6 else 0
            assert best - 1e-6 <= total(order) <= total(list(range(size)))
            assert size != 6 or total(order) <= 1.05 * best
    far = torch.tensor([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0.0]])
    assert grouping.similar_order(far, 2) == [0, 2, 1, 3]


def test_a_pair_costs_nothing_when_its_heads_are_turned_copies():
    model = build(transformers.LlamaConfig(**WIDE))
    sites, freedoms = prepare(model)
    source = surgery.read_projections(model.model.layers[0].self_attn, sites[0]).to(torch.float64)
    moments = moments_of(model, sites)[0]
    turn_k, turn_v = surgery.random_turns(sites, freedoms)[0]
    copies = heads.selected(source, [0, 1, 2, 2])
    copies = surgery.fold(copies, surgery.rotation(turn_k), surgery.rotation(turn_v), 4)
    for init in ("aligned", "svd"):
        costs = grouping.pair_costs(copies, moments, freedoms[0], init)
        assert torch.equal(costs, costs.T)
        assert float(costs[2, 3]) < 1e-6 * float(costs[0, 1])
        assert float(costs[0, 2]) > 0.1 * float(costs[0, 1])


# ---------------------------------------------------------------- fused projections and other architectures


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "weights alone"])
def test_fused_projections_are_turned_and_merged_like_separate_ones(calibrated):
    fused, apart = build(transformers.Phi3Config(**WIDE)), build(transformers.LlamaConfig(**WIDE))
    for layer, other in zip(fused.model.layers, apart.model.layers, strict=True):
        q, k, v = layer.self_attn.qkv_proj.weight.split(32)
        other.self_attn.q_proj.weight.data, other.self_attn.k_proj.weight.data, other.self_attn.v_proj.weight.data = q.clone(), k.clone(), v.clone()
        other.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data.clone()
    sites, freedoms = prepare(fused, [2, 1])
    other_sites, other_freedoms = prepare(apart, [2])
    want = logits(fused)
    with surgery.installed(fused, surgery.turned(fused, sites, surgery.random_turns(sites, freedoms))):
        assert (logits(fused) - want).abs().max() <= 1e-4
    moments = moments_of(fused, sites) if calibrated else {}
    new = surgery.regroup(fused, sites, moments, freedoms, 2, "svd").tensors
    same = surgery.regroup(apart, other_sites, moments, other_freedoms, 2, "svd").tensors
    torch.testing.assert_close(new["model.layers.0.self_attn.qkv_proj.weight"][32:48], same["model.layers.0.self_attn.k_proj.weight"])
    surgery.install(fused, surgery.regroup(fused, sites, moments, freedoms, 2, "svd"))
    assert fused.model.layers[0].self_attn.qkv_proj.weight.shape == (64, 32)
    assert fused.config.num_key_value_heads == 2


def test_a_regrouped_phi3_is_a_stock_checkpoint(tmp_path):
    model = build(transformers.Phi3Config(**WIDE))
    sites, freedoms = prepare(model, [2])
    surgery.install(model, surgery.regroup(model, sites, {}, freedoms, 2, "aligned"))
    model.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is transformers.Phi3ForCausalLM
    assert torch.equal(logits(again), logits(model))


EXPORTS = {
    "pythia": (lambda: transformers.GPTNeoXConfig(**NO_KV), "phi"),
    "gpt_neox without biases, tied": (lambda: transformers.GPTNeoXConfig(**NO_KV, attention_bias=False, tie_word_embeddings=True), "phi"),
    "gpt_neox with scaled positions": (
        lambda: transformers.GPTNeoXConfig(
            **NO_KV, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        ),
        "phi",
    ),
    "gpt_neox, sequential": (lambda: transformers.GPTNeoXConfig(**NO_KV, use_parallel_residual=False), "nemotron"),
    "gpt_neox, sequential, without biases": (
        lambda: transformers.GPTNeoXConfig(**NO_KV, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new", tie_word_embeddings=True),
        "nemotron",
    ),
    "gpt2": (lambda: transformers.GPT2Config(**GPT2), "gpt_bigcode"),
    "gpt2 with other scaling": (lambda: transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=40), "gpt_bigcode"),
    "gpt2 without scaling": (lambda: transformers.GPT2Config(**GPT2, scale_attn_weights=False), "gpt_bigcode"),
    "opt": (lambda: transformers.OPTConfig(**OPT), "gpt_bigcode"),
    "opt without biases": (lambda: transformers.OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False), "gpt_bigcode"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_equal_stock_model_is_found_for_architectures_without_kv_heads(name, tmp_path):
    config, family = EXPORTS[name]
    model = build(config())
    assert exports.stock_config(model.config).model_type == family
    made = exports.as_stock(model)
    assert made.config.model_type == family
    want = logits(model)
    assert want.std() > 0.02
    assert (logits(made) - want).abs().max() <= 1e-4
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    options = {"attention_mask": padding, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), made.generate(IDS, **options))
    targets = [1] if family == "gpt_bigcode" else [2, 1]
    sites, freedoms = prepare(made, targets)
    assert all(freedom.keys_fixed is freedom.values_fixed is None for freedom in freedoms.values())
    with surgery.installed(made, surgery.turned(made, sites, surgery.random_turns(sites, freedoms))):
        assert (logits(made) - want).abs().max() <= 1e-4
    surgery.install(made, surgery.regroup(made, sites, {}, freedoms, targets[0], "svd"))
    made.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(made)
    assert again.config.num_key_value_heads == targets[0]
    assert torch.equal(logits(again), logits(made))
    assert not torch.allclose(logits(made), want, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: transformers.OPTConfig(**OPT, do_layer_norm_before=False), "it normalises after the attention (do_layer_norm_before: false)"),
        (lambda: transformers.OPTConfig(**{**OPT, "word_embed_proj_dim": 16}), "its embeddings are narrower than its layers (word_embed_proj_dim)"),
        (lambda: transformers.OPTConfig(**OPT, _remove_final_layer_norm=True), "it has no last norm (_remove_final_layer_norm)"),
        (lambda: transformers.GPT2Config(**GPT2, add_cross_attention=True), "it attends to an encoder (add_cross_attention)"),
    ],
)
def test_what_no_stock_architecture_expresses_is_refused_with_the_reason(config, said):
    made = config()
    with pytest.raises(AttnConvertError) as caught:
        exports.stock_config(made)
    assert caught.value.code == "no-equal-architecture"
    assert caught.value.message == (
        f"the config of a {made.model_type!r} model has no num_key_value_heads, and this one cannot be saved as 'gpt_bigcode' either: {said}"
    )


def test_gpt2_can_have_one_kv_head_and_no_number_between():
    config = exports.stock_config(transformers.GPT2Config(**GPT2))
    with pytest.raises(AttnConvertError) as caught:
        surgery.check_architecture(config, [2])
    assert caught.value.message == "2 KV heads cannot be made: a 'gpt_bigcode' model has one KV head, or as many as query heads"
    assert caught.value.expected == "one of: 1"


def test_other_architectures_stay_what_they_are():
    config = FAMILIES["llama"]()
    assert exports.stock_config(config) is config
    model = build(config)
    assert exports.as_stock(model) is model


# ---------------------------------------------------------------- fewer query heads


def test_query_heads_that_are_equal_merge_without_a_change(tmp_path):
    model = build(transformers.LlamaConfig(**COMMON, head_dim=8))
    sites, freedoms = prepare(model)

    def twice(site, source, moment):  # every query head stands for two with half of its output each
        return heads.Projections(source.q.repeat_interleave(2, 0), source.k, source.v, source.o.repeat_interleave(2, 0) / 2)

    wide = copy.deepcopy(model)
    surgery.install(wide, surgery.Regrouped(2, new_tensors(model, sites, {}, twice), 8))
    want = logits(model)
    assert wide.config.num_attention_heads == 8
    assert (logits(wide) - want).abs().max() <= 1e-4
    wide_sites = surgery.check_architecture(wide.config, [2], num_heads=4)
    new = surgery.regroup(wide, wide_sites, moments_of(wide, wide_sites), freedoms, 2, "svd", num_heads=4)
    with surgery.installed(wide, new):
        assert (logits(wide) - want).abs().max() <= 1e-4
    assert wide.config.num_attention_heads == 8
    assert (logits(wide) - want).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi"])
def test_fewer_query_heads_are_a_stock_checkpoint(family, tmp_path):
    config = {**FAMILIES, "phi": lambda: transformers.PhiConfig(**COMMON)}[family]()
    config.num_key_value_heads = 4
    model = build(config)
    sites = surgery.check_architecture(model.config, [2], num_heads=2)
    freedoms = surgery.find_freedom(model, sites)
    surgery.install(model, surgery.regroup(model, sites, {}, freedoms, 2, "svd", num_heads=2, grouping="similar"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_attention_heads"], saved["num_key_value_heads"], saved["head_dim"]) == (2, 2, 8)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert again.get_submodule(sites[0].path).q_proj.weight.shape == (16, 32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("config", "num_heads", "kv_heads", "code", "said"),
    [
        (lambda: transformers.StableLmConfig(**WIDE), 2, 2, "cannot-regroup", "cannot be built with 2 query and 2 KV heads of 8 channels"),
        (lambda: exports.stock_config(transformers.GPT2Config(**GPT2)), 2, 1, "cannot-regroup", "a 'gpt_bigcode' model cannot be regrouped: "),
        (lambda: transformers.LlamaConfig(**WIDE), 3, 1, "query-heads", "3 query heads cannot be made: its 4 query heads cannot be merged evenly"),
        (lambda: transformers.LlamaConfig(**WIDE), 4, 2, "query-heads", "4 query heads cannot be made: the model has 4"),
        (lambda: transformers.LlamaConfig(**WIDE), 2, 4, "kv-heads", "4 KV heads cannot be made: "),
    ],
)
def test_query_heads_that_cannot_be_are_refused(config, num_heads, kv_heads, code, said):
    with pytest.raises(AttnConvertError) as caught:
        surgery.check_architecture(config(), [kv_heads], num_heads=num_heads)
    assert caught.value.code == code
    assert said in caught.value.message


def test_a_merged_query_weighs_its_members_by_what_they_add_and_keeps_their_length():
    torch.manual_seed(0)
    q = torch.zeros(2, 4, 6, dtype=torch.float64)
    q[0, 0, 0], q[1, 0, 1] = 2.0, 2.0  # two orthogonal directions of the same length
    k = torch.randn(1, 4, 6, dtype=torch.float64)
    o = torch.zeros(2, 6, 4, dtype=torch.float64)
    o[0, 0, 0], o[1, 1, 0] = 3.0**0.5, 1.0  # the first adds three times the energy
    moments = torch.eye(7, dtype=torch.float64)
    made = queries.merge_queries(surgery.Projections(q, k, k, o), moments, 1)
    direction = made.q[0, 0] / made.q[0, 0].norm()
    torch.testing.assert_close(direction[:2], torch.tensor([0.75, 0.25], dtype=torch.float64) / torch.tensor([0.75, 0.25]).double().norm())
    torch.testing.assert_close(made.q[0, 0].norm(), torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(made.o[0], o.sum(0))


def test_the_names_are_those_of_the_paper():
    assert [queries.sqa_name(16, *counts) for counts in ((8, 4), (8, 8), (4, 4), (4, 1), (8, 2))] == ["SQA", "sSQA", "xSQA", "xSMQA", "SQA"]


# ---------------------------------------------------------------- uneven groups: allocation


@pytest.mark.parametrize(
    ("weights", "num_heads", "counts"),
    [
        ([1, 1, 1, 1], 8, [2, 2, 2, 2]),
        ([0, 0, 0], 8, [3, 3, 2]),
        ([0, 1, 2, 3], 16, [1, 2, 5, 8]),  # one for the first, then 15 in 2.5, 5, 7.5: of equal remainders the larger weight
        ([3, 1], 8, [6, 2]),
        ([1, 0], 8, [7, 1]),  # never none
        ([0, 1, 0, 0], 4, [1, 1, 1, 1]),
        ([5, 3, 2], 8, [4, 2, 2]),  # 4, 2.4, 1.6: the remainder goes to the last
        ([0.2, 0.3, 0.5], 5, [1, 1, 3]),  # 1, 1.5, 2.5: of equal remainders the larger weight
    ],
)
def test_query_heads_are_shared_out_by_largest_remainder(weights, num_heads, counts):
    assert uneven.shared_out(weights, num_heads) == counts


def test_shares_add_up_and_leave_nobody_out():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        groups = int(torch.randint(1, 9, (1,), generator=generator))
        num_heads = groups + int(torch.randint(0, 20, (1,), generator=generator))
        counts = uneven.shared_out(torch.rand(groups, generator=generator).pow(4).tolist(), num_heads)
        assert sum(counts) == num_heads
        assert min(counts) >= 1
        assert len(counts) == groups


def test_the_map_follows_the_norms_as_each_variant_says():
    # four source heads, two groups of two query heads each: group norms are the means 2, 4 of the first window and 6, 4 of the second
    norms = torch.tensor([[1.0, 3.0, 4.0, 4.0], [6.0, 6.0, 3.0, 5.0]])
    assert uneven.allocate(norms[:1], 4, 2, "kdgqa") == [1, 3]
    assert uneven.allocate(norms, 4, 2, "kdgqa") == [3, 1]  # sqrt(4 + 36) against sqrt(16 + 16)
    assert uneven.allocate(norms, 4, 2, "dgqa_ema") == [3, 1]  # 0.9 * 6 + 0.1 * 2 against 4
    assert uneven.allocate(norms.flip(0), 4, 2, "dgqa_ema") == [1, 3]  # the last window counts most
    assert uneven.allocate(norms, 4, 2, "dgqa_diff") == [3, 1]  # 4 against 0
    assert uneven.allocate(norms[:1], 4, 2, "dgqa_diff") == [2, 2]  # one window has no differences
    assert uneven.allocate(norms, 4, 2, "even") == [2, 2]
    assert uneven.allocate(torch.ones(3, 4), 8, 3, "kdgqa") == [3, 3, 2]
    # min-max of 1, 2, 4 is 0, 1/3, 1: one query head for the first, the other 8 as 2 and 6
    assert uneven.allocate(torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0]]), 9, 3, "kdgqa") == [1, 2, 6]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_key_norms_are_those_of_the_projected_keys_of_each_window(family):
    model = build(FAMILIES[family]())
    sites, _ = prepare(model)
    seen = []
    module = model.get_submodule(sites[1].path)
    name = "qkv_proj" if family == "phi3" else "k_proj"
    hook = getattr(module, name).register_forward_hook(lambda m, a, out: seen.append(out[..., 32:48] if family == "phi3" else out))
    with torch.no_grad(), uneven.key_norms(model, sites) as norms:
        for row in IDS:
            model.base_model(row[None])
    hook.remove()
    assert sorted(norms) == [0, 1, 2]
    assert len(norms[1]) == 2
    for found, out in zip(norms[1], seen, strict=True):
        torch.testing.assert_close(found.float(), out.view(24, 2, 8).permute(1, 0, 2).flatten(1).norm(dim=1))


# ---------------------------------------------------------------- uneven groups: models

COUNTS = {0: [3, 1], 1: [1, 1, 2], 2: [4]}
UNEVEN = {
    **{family: FAMILIES[family] for family in ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3")},
    "stablelm": lambda: transformers.StableLmConfig(**COMMON, use_qkv_bias=True),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "glm": lambda: transformers.GlmConfig(**COMMON, head_dim=8, attention_bias=True),
}


def unevenly(model, counts, init="svd", **options):
    """A copy of `model` with these heads, and weights that make the model itself compute the same."""
    sites, freedoms = prepare(model)
    new = uneven.make_uneven(model, sites, {}, freedoms, counts, init)
    made = copy.deepcopy(model)
    uneven.install_uneven(made, new, uneven.uneven_plan(model.config, sites, counts, **options))
    return made, uneven.measurable(model, sites, new) if len(counts) == len(sites) else None


@pytest.mark.parametrize("family", UNEVEN)
def test_uneven_heads_compute_what_a_head_for_each_query_would_in_every_way_to_run(family, tmp_path):
    attnconvert.register()
    config = UNEVEN[family]()
    config.num_key_value_heads = 4
    model = build(config)
    made, same = unevenly(model, COUNTS)
    want = logits(made)
    with surgery.installed(model, same):
        assert (logits(model) - want).abs().max() <= 1e-4
    assert not torch.allclose(logits(model), want, atol=1e-2)
    check_parity(made)  # prefill and decode, chunked prefill, left padding
    made.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_even_map_equals_the_stock_model(family):
    config = FAMILIES[family]()
    config.num_key_value_heads = 4
    model = build(config)
    made, _ = unevenly(model, {idx: [2, 2] for idx in range(3)})
    sites, freedoms = prepare(model, [2])
    surgery.install(model, surgery.regroup(model, sites, {}, freedoms, 2, "svd", grouping="contiguous"))
    assert torch.equal(logits(made), logits(model))
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    options = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(made.generate(IDS, **options), model.generate(IDS, **options))


def test_the_cache_holds_the_layers_own_number_of_heads():
    made, _ = unevenly(build(transformers.LlamaConfig(**WIDE)), COUNTS)
    with torch.no_grad():
        cache = made(IDS, use_cache=True).past_key_values
    assert [layer.state["k"].shape[1] for layer in cache.layers] == [2, 3, 1]
    assert [made.get_submodule(f"model.layers.{idx}.self_attn.k_proj").out_features for idx in range(3)] == [16, 24, 8]


def test_layers_that_the_plan_leaves_out_keep_their_heads(tmp_path):
    attnconvert.register()
    model = build(transformers.LlamaConfig(**WIDE))
    made, _ = unevenly(model, {1: [3, 1]})
    assert [made.get_submodule(f"model.layers.{idx}.self_attn.k_proj").out_features for idx in range(3)] == [32, 16, 32]
    check_parity(made)
    made.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(made))


def test_the_code_of_uneven_heads_travels_with_the_checkpoint(tmp_path):
    model = build(transformers.LlamaConfig(**{**WIDE, "vocab_size": 4096}))
    made, _ = unevenly(model, COUNTS)
    made.save_pretrained(tmp_path)
    from attnconvert import embedded

    transformers.AutoTokenizer.from_pretrained(embedded.model_dir()).save_pretrained(tmp_path)
    check_reload(made, tmp_path)
    assert (tmp_path / "attnconvert_uneven.py").exists()


def test_heads_merge_with_their_own_group_alone():
    model = build(transformers.LlamaConfig(**WIDE))
    sites, freedoms = prepare(model)
    new = uneven.make_uneven(model, sites, {}, freedoms, {0: [3, 1]}, "mean").tensors
    k = model.model.layers[0].self_attn.k_proj.weight.view(4, 8, 32)
    torch.testing.assert_close(new["model.layers.0.self_attn.k_proj.weight"].view(2, 8, 32), torch.stack([k[:3].mean(0), k[3]]))
    assert sorted({name.split(".")[2] for name in new}) == ["0"]


def test_each_query_reads_the_head_that_the_map_gives_it():
    core = UnevenAttention(4, 2, 8, kv_heads=3, query_heads=[1, 2, 1])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, count, 5, 8, generator=generator) for count in (4, 3, 3))
    inputs = SeamInputs(None, 8**-0.5, batch_size=1, num_tokens=5, device=torch.device("cpu"))
    with torch.no_grad():
        got = core(q, k, v, inputs)
    index = [0, 1, 1, 2]
    want = torch.nn.functional.scaled_dot_product_attention(q, k[:, index], v[:, index], is_causal=True)
    torch.testing.assert_close(got, want)


def test_training_noise_is_off_outside_training_and_spares_a_tokens_own_key():
    core = UnevenAttention(4, 2, 8, kv_heads=2, noise=True)
    plain = UnevenAttention(4, 2, 8, kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, count, 6, 8, generator=generator) for count in (4, 2, 2))
    inputs = SeamInputs(None, 8**-0.5, batch_size=1, num_tokens=6, device=torch.device("cpu"))
    assert torch.equal(core.eval()(q, k, v, inputs), plain(q, k, v, inputs))
    torch.manual_seed(0)
    noisy, exact = core.train()(q, k, v, inputs), plain(q, k, v, inputs)
    torch.testing.assert_close(noisy[:, :, 0], exact[:, :, 0])  # the first token sees itself alone
    assert (noisy[:, :, 1:] - exact[:, :, 1:]).abs().max() > 0.05
    v_late = v.clone()
    v_late[:, :, 4:] += 1
    torch.manual_seed(0)
    torch.testing.assert_close(core(q, k, v_late, inputs)[:, :, :4], noisy[:, :, :4])


def test_the_original_attention_is_not_pretended():
    made, _ = unevenly(build(transformers.LlamaConfig(**WIDE)), COUNTS)
    with teacher_mode(made), pytest.raises(ValueError, match="projections of this layer were changed"):
        logits(made)


def test_layers_with_other_projections_do_not_go_back_to_softmax():
    made, _ = unevenly(build(transformers.LlamaConfig(**WIDE)), COUNTS)
    with pytest.raises(AttnConvertError, match="cannot go back to softmax attention"):
        restore_softmax(made, [1], "asked for")
    assert hasattr(made.model.layers[1].self_attn, "core")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({0: [2, 2], 1: [2, 2], 2: [3, 1]}, "in 1 layers KV heads serve different numbers of query heads (layer 2: 3, 1)"),
        ({0: [2, 2], 1: [4], 2: [2, 2]}, "layers have 1, 2 KV heads"),
        ({0: [2, 2]}, "2 of 3 layers keep their heads"),
    ],
)
def test_uneven_heads_are_refused_as_a_stock_model_with_the_reason(counts, said):
    with pytest.raises(AttnConvertError) as caught:
        uneven.stock_heads(counts, 3)
    assert caught.value.code == "not-stock"
    assert caught.value.message == f"no stock architecture holds this model: {said}"
    assert "trust_remote_code" in str(caught.value.hint)


def test_even_heads_of_one_number_are_a_stock_model():
    assert uneven.stock_heads({idx: [2, 2] for idx in range(3)}, 3) == 2
    assert even_split(8, 3) == [3, 3, 2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_heads": 3}, "the layer has 2 KV heads, fewer than the 3 asked for"),
        ({"kv_heads": 2, "query_heads": (3, 2)}, "query_heads adds up to 5, but the layer has 4 query heads"),
    ],
)
def test_settings_that_do_not_fit_a_layer_are_told(settings, said):
    method = registry.get("kdgqa")
    site = find_sites(FAMILIES["llama"]())[0]
    assert method.check(method.config(**settings), site) == [said]
    assert method.check(method.config(kv_heads=2, query_heads=(3, 1)), site) == []


def test_a_map_has_an_entry_for_each_kv_head():
    with pytest.raises(ValueError, match="query_heads needs 2 numbers"):
        registry.get("kdgqa").config(kv_heads=2, query_heads=(1, 2, 1))


def test_capped_logits_are_refused():
    method = registry.get("kdgqa")
    site = find_sites(transformers.Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8))[0]
    assert method.check(method.config(kv_heads=1), site) == ["the layer has capped logits, which uneven groups do not do"]
