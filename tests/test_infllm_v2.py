"""Block-sparse layers in whole models: blocks are those of the definition, cached text is uncached text in every way of running, and settings mean what they say."""

import json

import cached_layers
import pytest
import torch
import transformers
from cached_layers import GPU, NULL_FAMILIES, cached_error, full_layers, long_batch, uncached
from conftest import FAMILIES, make_model
from pydantic import ValidationError
from test_seam import ROWS, SMALL, convert

from attnconvert.convert.evaluate import cache_bytes
from attnconvert.convert.plan import describe_settings
from attnconvert.convert.save import check_parity
from attnconvert.distill.config import FinetuneConfig, LoraConfig
from attnconvert.distill.data import PackedRows
from attnconvert.distill.finetune import run_finetune
from attnconvert.distill.loop import RunContext
from attnconvert.distill.lora import add_lora
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.blocks import decode, reference
from attnconvert.kernels.blocks.rule import BlockRule, visible_pairs
from attnconvert.surgery import registry
from attnconvert.surgery.method import softmax_cost
from attnconvert.surgery.methods.infllm_v2 import METHOD, InfLLMV2Config, rule_of
from attnconvert.surgery.plan import LayerPlan
from attnconvert.surgery.runtime import blocks
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.sites import find_sites

EXACT = METHOD.runtime_config(METHOD.exact)
SETTINGS = {
    "compressed": InfLLMV2Config(block_size=32, window_size=32, topk=3, dense_len=0),
    "mean, dense below 100": InfLLMV2Config(block_size=32, init_blocks=0, window_size=0, topk=2, dense_len=100, scorer="mean"),
}
EVERY_SETTING = {**SETTINGS, "blocks of 64, dense below 180": InfLLMV2Config(block_size=64, window_size=0, topk=2, dense_len=180)}
LENGTH = 200  # most blocks are left out


def infllm(model, config, **options):
    settings = METHOD.runtime_config(config) if isinstance(config, InfLLMV2Config) else config
    return convert(model, method="infllm_v2", config=settings, layers=full_layers(model, METHOD), **options)


@pytest.fixture(params=list(EVERY_SETTING))
def settings(request):
    return EVERY_SETTING[request.param]


@pytest.fixture
def student(settings):
    """In fp64: two blocks that score alike are told apart by the last bits, and not by how the model is run."""
    return infllm(make_model("llama"), settings).double()


# ---------------------------------------------------------------- what the settings mean


@pytest.mark.parametrize("name", NULL_FAMILIES)
def test_enough_blocks_for_all_equal_the_stock_model_at_every_step_and_in_its_text(name):
    teacher = make_model(name)
    cached_layers.assert_equals_the_stock_model(infllm(teacher, EXACT), teacher)


def test_settings_leave_out_blocks_and_dense_len_says_from_where_on(settings):
    teacher = make_model("llama").double()
    ids, mask = long_batch(LENGTH, pads=0)
    first = max(settings.dense_len - 1, rule_of(settings).num_blocks * settings.block_size)
    error = (uncached(infllm(teacher, settings), ids, mask) - uncached(teacher, ids, mask)).abs().amax((0, 2))
    assert first < LENGTH - 16
    assert error[:first].max() < 1e-10
    assert error[first:].min() > 1e-4
    always = settings.model_copy(update={"dense_len": LENGTH + 1})
    assert (uncached(infllm(teacher, always), ids, mask) - uncached(teacher, ids, mask)).abs().max() < 1e-10


def test_names_of_minicpm_mean_what_they_mean_there():
    config = InfLLMV2Config()
    assert rule_of(config) == BlockRule(block_size=64, num_init=1, num_local=32, num_blocks=96, dense_len=8192, scorer="compressed")
    core = blocks.BlockSparseAttention(4, 2, 8, **METHOD.runtime_config(config))
    assert core.rule == rule_of(config)
    assert rule_of(InfLLMV2Config(block_size=32, window_size=512, topk=17, dense_len=0))[:4] == (32, 1, 16, 33)


def test_packed_documents_and_padding_of_whole_blocks_are_seen_as_documents(settings):
    model = infllm(make_model("llama"), settings).double()
    ids, _ = long_batch(LENGTH)
    sizes = (settings.block_size * 2, LENGTH - settings.block_size * 2)
    packed = torch.cat([torch.arange(size) for size in sizes])[None]
    alone = [model(part, use_cache=False).logits for part in ids[:1].split(sizes, 1)]
    assert (model(ids[:1], position_ids=packed, use_cache=False).logits - torch.cat(alone, 1)).abs().max() < 1e-10
    ids, mask = long_batch(LENGTH, pads=64)
    want = model(ids[1:, 64:], use_cache=False).logits
    assert (uncached(model, ids, mask)[1:, 64:] - want).abs().max() < 1e-10


def test_kernels_are_promised_aligned_documents_only_where_there_is_no_padding(monkeypatch):
    model = infllm(make_model("llama"), InfLLMV2Config(block_size=32, window_size=0, topk=2, dense_len=0))
    promised = []
    real = blocks.block_sparse_attention
    monkeypatch.setattr(blocks, "block_sparse_attention", lambda *args, aligned, **options: promised.append(aligned) or real(*args, **options))
    ids, mask = long_batch(tokens=160, pads=64)
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
        for first in (64, 96):  # coarse keys begin at every 64th token, blocks of 32 at every 32nd
            model(ids[:1], position_ids=torch.cat([torch.arange(first), torch.arange(160 - first)])[None], use_cache=False)
    assert promised == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(("first", "promise"), [(64, True), (96, False)])
def test_finetuning_tells_the_kernels_where_packed_documents_begin(tmp_path, monkeypatch, first, promise):
    """Training calls the model inside of the language model, which has seen no masks: without being told, every layer would look on the device."""
    model = infllm(make_model("llama"), InfLLMV2Config(block_size=32, window_size=0, topk=2, dense_len=0))
    position = torch.cat([torch.arange(first), torch.arange(128 - first)]).to(torch.int32).expand(2, -1).contiguous()
    config = FinetuneConfig(tokens=256, length=128, batch_size=2, warmup_steps=0, lr=1e-3, lora=LoraConfig(rank=2))
    adapted = add_lora(model, [path for _, path, _ in converted_sites(model)], config.lora, seed=0)
    promised = []
    real = blocks.block_sparse_attention

    def spy(q, *args, aligned, **options):
        if q.shape[1] == 128:  # before, short inputs find the model's head
            promised.append(aligned)
        return real(q, *args, **options)

    monkeypatch.setattr(blocks, "block_sparse_attention", spy)
    cores = {idx: module.core for idx, _, module in converted_sites(adapted)}
    run_finetune(adapted, cores, PackedRows(torch.full_like(position, 5), position), config, RunContext(tmp_path))
    assert promised == [promise] * len(cores)
    assert {core.packed_alignment for core in cores.values()} == {1}


def test_gradients_reach_queries_keys_and_values():
    model = infllm(make_model("llama"), SETTINGS["compressed"]).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.requires_grad_(True)
    ids, mask = long_batch(LENGTH)
    model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    assert all(p.weight.grad.abs().max() > 0 for p in (attention.q_proj, attention.k_proj, attention.v_proj))


# ---------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("prefill", [[1], [140], [5, 6, 70, 69], [190, 10]], ids=str)
def test_every_way_through_a_cache_equals_one_forward_pass(student, prefill):
    assert cached_error(student, *long_batch(LENGTH), prefill) < 1e-10


def test_planted_forgotten_compressed_keys_are_seen(monkeypatch):
    model = infllm(make_model("llama"), SETTINGS["compressed"]).double()
    real = decode._put
    monkeypatch.setattr(decode, "_put", lambda buffer, place, x, where: real(buffer, place, x, where) if buffer.shape[2] > LENGTH else None)
    assert cached_error(model, *long_batch(LENGTH), [140]) > 1e-3


def test_padded_row_equals_the_row_alone(settings):
    rows = [(row * 20)[:n] for row, n in zip(ROWS, (150, 97, 3), strict=False)]
    cached_layers.assert_rows_are_as_alone(infllm(make_model("llama"), settings).double(), 12, rows)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 50}], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_beams_and_chunks_write_what_they_write_without_a_cache(name, options):
    cached_layers.assert_text_needs_no_cache(infllm(make_model("llama"), SETTINGS[name]).double(), *long_batch(tokens=110), 6, options)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_second_turn_goes_on_from_the_cache_of_the_first(name):
    model = infllm(make_model("llama"), SETTINGS[name]).double()
    cache, whole, mask = cached_layers.first_turn(model, *long_batch(tokens=110), 4)
    assert [layer.capacity for layer in cache.layers] == [128] * 3
    cached_layers.assert_goes_on(model, cache, whole, mask, 12)
    assert [layer.capacity for layer in cache.layers] == [256] * 3


def test_rows_of_a_cache_can_be_repeated_and_chosen(student):
    cached_layers.assert_rows_can_be_repeated_and_chosen(student, *long_batch(tokens=160), 1e-10)


# ---------------------------------------------------------------- the cache's size


def test_bytes_of_the_cache_are_those_of_the_plan(settings):
    model = infllm(make_model("llama"), settings)
    site = find_sites(FAMILIES["llama"]())[0]
    for length, cache in cached_layers.filled_caches(model):
        assert cache_bytes(cache) == 3 * 2 * METHOD.cost(settings, site, length, 4).state_bytes


def test_a_step_with_room_moves_nothing_and_one_without_is_given_it():
    model = infllm(make_model("llama"), SETTINGS["compressed"])
    cache = model.build_cache(126)
    cached_layers.assert_steps_with_room_move_nothing(model, cache, long_batch(tokens=120)[0], 8)
    assert [layer.capacity for layer in cache.layers] == [256] * 3


def test_a_graph_needs_a_planned_length_and_stops_where_the_room_ends(monkeypatch):
    model = infllm(make_model("llama"), SETTINGS["compressed"])
    run, cache, captured = cached_layers.watched_graph(model, 120, monkeypatch)
    cached_layers.feed(run, cache, long_batch(tokens=124)[0][:1], *[torch.tensor([[7]])] * 7)
    # one warm step, steps that would be replays up to token 128, a plain one that makes room, and so on
    assert captured == [125, 126, 127, 129, 130]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [pytest.param(None, marks=GPU)], ids=["cuda"])
def test_generate_replays_a_graph_and_writes_the_same_text(case, dtype, monkeypatch):
    cached_layers.assert_replays_write_the_same_text(infllm(make_model("llama"), SETTINGS["compressed"]).to("cuda", dtype), 150, monkeypatch)


# ---------------------------------------------------------------- checkpoints


def test_all_ways_to_run_a_model_agree_where_it_chooses(settings, monkeypatch):
    model = infllm(make_model("llama"), settings)
    before = [module.core.rule for _, _, module in converted_sites(model)]
    chosen = []
    real = reference.chosen_blocks

    def counted(scores, position, rule):
        found = real(scores, position, rule)
        chosen.append((found.sum(-1) < (position // rule.block_size + 1)[:, None]).any().item())
        return found

    monkeypatch.setattr(reference, "chosen_blocks", counted)
    found = check_parity(model)
    assert max(found.errors.values()) < found.tolerance / 1000
    assert found.dtype == torch.float64
    assert any(chosen)
    assert [module.core.rule for _, _, module in converted_sites(model)] == before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_choice_that_differs_in_decoding_fails_the_parity_check(monkeypatch):
    """Below all blocks in sight nothing is chosen: the check has to shorten rules of thousands of tokens."""
    model = infllm(make_model("llama"), InfLLMV2Config())
    real = decode.attend
    monkeypatch.setattr(decode, "attend", lambda *args, rule, **options: real(*args, rule=rule._replace(num_init=0), **options))
    with pytest.raises(AttnConvertError) as caught:
        check_parity(model)
    assert caught.value.code == "parity-failed"


def test_a_checkpoint_writes_the_same_text_in_a_process_without_attnconvert(tmp_path):
    plan = cached_layers.assert_checkpoint_needs_no_attnconvert(infllm(make_model("llama"), SETTINGS["compressed"]), tmp_path, *long_batch(tokens=140))
    assert plan["layers"][0]["config"] == METHOD.runtime_config(SETTINGS["compressed"])


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 48}, "32, 64 or 128"),
        ({"window_size": 100}, "window_size 100 is not a multiple of block_size 64, such as 64 or 128"),
        ({"topk": 1}, "topk 1 has no room .* 1 first ones and the query's own; 2 at least"),
        ({"topk": 4, "init_blocks": 4}, "5 at least"),
        ({"topk": 20000}, "less than or equal to 16384"),
        ({"dense_len": -1}, "greater than or equal to 0"),
        ({"scorer": "max"}, "'compressed' or 'mean'"),
        ({"kernel_size": 32}, "Extra inputs"),
        ({"sparse_config": "x.json", "topk": 4}, "leave out topk, or sparse_config"),
        ({"sparse_config": "nowhere.json"}, "cannot be read"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValidationError, match=message):
        InfLLMV2Config.model_validate(settings)


MINICPM = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64, "use_nope": False, "dense_len": 8192}


def test_a_sparse_config_is_read_from_a_file_of_its_own_or_a_models(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "minicpm", "sparse_config": MINICPM | {"topk": 32, "dense_len": -1}}))
    config = InfLLMV2Config(sparse_config=str(path))
    assert config == InfLLMV2Config(topk=32, dense_len=0)
    path.unlink()  # what is stored with a checkpoint has the numbers
    assert InfLLMV2Config.model_validate(config.model_dump(mode="json")) == config
    path.write_text(json.dumps(MINICPM))
    assert InfLLMV2Config(sparse_config=str(path)) == InfLLMV2Config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MINICPM | {"kernel_size": 64}, "kernel_size 64 is not supported, only 32"),
        (MINICPM | {"kernel_stride": 32}, "kernel_stride 32 is not supported, only 16"),
        (MINICPM | {"use_nope": True}, "use_nope true is not supported, only false: scores come from keys after rotary embedding"),
        (MINICPM | {"router": 2}, "router is nothing that"),
        (MINICPM | {"topk": "64"}, 'topk is "64", not a whole number'),
        (MINICPM | {"window_size": 100}, "not a multiple of block_size"),
        ({"model_type": "llama"}, "has no sparse_config"),
        ([1], "has no sparse_config"),
    ],
    ids=str,
)
def test_a_sparse_config_that_our_operator_does_not_do_is_refused(tmp_path, content, message):
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValidationError, match=message):
        InfLLMV2Config(sparse_config=str(path))
    path.write_text("{")
    with pytest.raises(ValidationError, match="is not JSON"):
        InfLLMV2Config(sparse_config=str(path))


def test_layers_that_cannot_choose_blocks_say_why():
    cached_layers.assert_sliding_and_capped_layers_are_refused(METHOD)
    wide = find_sites(transformers.LlamaConfig(**{**SMALL, "hidden_size": 136, "num_attention_heads": 17, "num_key_value_heads": 1}))
    assert "17 query heads share a KV head" in METHOD.check(METHOD.exact, wide[0])[0]
    assert registry.get("infllm_v2") is METHOD


def test_costs_are_those_of_the_keys_that_are_seen():
    site = find_sites(FAMILIES["llama"]())[0]
    dense = softmax_cost(site, 32768, 2)
    assert METHOD.cost(METHOD.exact, site, 4096, 2).flops == softmax_cost(site, 4096, 2).flops
    found = METHOD.cost(InfLLMV2Config(), site, 32768, 2)
    assert found.num_parameters == 0
    assert found.state_bytes == dense.state_bytes * (1 + 1 / 32 + 1 / 128) + 8  # keys and values, and half of them: 1 / 16 and 1 / 64 as keys alone
    attended = 4 * visible_pairs(32768, rule_of(InfLLMV2Config())) * site.num_heads * site.head_dim
    assert attended < found.flops < attended + dense.flops * 0.04
    assert METHOD.cost(InfLLMV2Config(), site, 8000, 2).flops == softmax_cost(site, 8000, 2).flops


def test_a_plan_says_what_a_query_sees():
    def said(config):
        return describe_settings(LayerPlan(0, "x", 4, 2, 8, "infllm_v2", METHOD.runtime_config(config)))

    assert said(InfLLMV2Config()) == "blocks of 64: 1 first, 33 nearest, 62 chosen; all below 8192 tokens"
    assert said(SETTINGS["mean, dense below 100"]) == "blocks of 32: 0 first, 1 nearest, 1 chosen by mean keys; all below 100 tokens"
    assert said(SETTINGS["compressed"]) == "blocks of 32: 1 first, 2 nearest, 1 chosen"
