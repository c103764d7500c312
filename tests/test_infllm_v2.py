"""Block-sparse layers in whole models: blocks are those of the definition, cached text is uncached text in every way of running, and settings mean what they say."""

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
from attnconvert.convert.plan import describe_settings
from attnconvert.convert.save import check_parity
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.blocks import decode, reference
from attnconvert.kernels.blocks.rule import BlockRule, visible_pairs
from attnconvert.surgery import registry
from attnconvert.surgery.method import softmax_cost
from attnconvert.surgery.methods.infllm_v2 import METHOD, InfLLMV2Config, rule_of
from attnconvert.surgery.plan import LayerPlan
from attnconvert.surgery.runtime import blocks
from attnconvert.surgery.runtime.graph import DecodeGraph, graph_refusal
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.sites import find_sites

EXACT = METHOD.runtime_config(METHOD.exact)
NULL_FAMILIES = [name for name in FAMILIES if name != "mistral"]  # every layer of it slides
SETTINGS = {
    "compressed": InfLLMV2Config(block_size=32, window_size=32, topk=3, dense_len=0),
    "mean, dense below 100": InfLLMV2Config(block_size=32, init_blocks=0, window_size=0, topk=2, dense_len=100, scorer="mean"),
}
EVERY_SETTING = {**SETTINGS, "blocks of 64, dense below 180": InfLLMV2Config(block_size=64, window_size=0, topk=2, dense_len=180)}
LENGTH = 200


def full_layers(model):
    return {site.layer_idx for site in find_sites(model.config) if not METHOD.check(METHOD.exact, site)}


def infllm(model, config, **options):
    settings = METHOD.runtime_config(config) if isinstance(config, InfLLMV2Config) else config
    return convert(model, method="infllm_v2", config=settings, layers=full_layers(model), **options)


@pytest.fixture(params=list(EVERY_SETTING))
def settings(request):
    return EVERY_SETTING[request.param]


@pytest.fixture
def student(settings):
    """In fp64: two blocks that score alike are told apart by the last bits, and not by how the model is run."""
    return infllm(make_model("llama"), settings).double()


def long_batch(tokens=LENGTH, pads=9):
    """Two rows, the second left-padded; long enough that most blocks are left out."""
    ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return ids * mask, mask


def uncached(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False).logits


# ---------------------------------------------------------------- what the settings mean


@pytest.mark.parametrize("name", NULL_FAMILIES)
def test_enough_blocks_for_all_equal_the_stock_model_at_every_step_and_in_its_text(name):
    teacher = make_model(name)
    student = infllm(teacher, EXACT)
    ids, mask = batch()
    with torch.no_grad():
        assert worst(uncached(student, ids, mask), uncached(teacher, ids, mask), mask) < TOLERANCE
        cached = step_logits(teacher, ids, mask, prefill=[13])
        for prefill in ([13], [4, 4, 5]):
            assert worst(step_logits(student, ids, mask, prefill=prefill), cached, mask) < TOLERANCE
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    assert torch.equal(student.generate(ids, **options), teacher.generate(ids, **options))


def test_settings_leave_out_blocks_and_dense_len_says_from_where_on(settings):
    teacher = make_model("llama").double()
    ids, mask = long_batch(pads=0)
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
    ids, _ = long_batch()
    sizes = (settings.block_size * 2, LENGTH - settings.block_size * 2)
    packed = torch.cat([torch.arange(size) for size in sizes])[None]
    alone = [model(part, use_cache=False).logits for part in ids[:1].split(sizes, 1)]
    assert (model(ids[:1], position_ids=packed, use_cache=False).logits - torch.cat(alone, 1)).abs().max() < 1e-10
    ids, mask = long_batch(pads=64)
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


def test_gradients_reach_queries_keys_and_values():
    model = infllm(make_model("llama"), SETTINGS["compressed"]).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.requires_grad_(True)
    ids, mask = long_batch()
    model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    assert all(p.weight.grad.abs().max() > 0 for p in (attention.q_proj, attention.k_proj, attention.v_proj))


# ---------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("prefill", [[1], [140], [5, 6, 70, 69], [190, 10]], ids=str)
def test_every_way_through_a_cache_equals_one_forward_pass(student, prefill):
    ids, mask = long_batch()
    with torch.no_grad():
        got = step_logits(student, ids, mask, prefill=prefill, steps=LENGTH - sum(prefill))
    assert worst(got, uncached(student, ids, mask), mask) < 1e-10


def test_planted_forgotten_compressed_keys_are_seen(monkeypatch):
    model = infllm(make_model("llama"), SETTINGS["compressed"]).double()
    ids, mask = long_batch()
    real = decode._put
    monkeypatch.setattr(decode, "_put", lambda buffer, place, x, where: real(buffer, place, x, where) if buffer.shape[2] > LENGTH else None)
    with torch.no_grad():
        assert worst(step_logits(model, ids, mask, prefill=[140], steps=60), uncached(model, ids, mask), mask) > 1e-3


def test_padded_row_equals_the_row_alone(settings):
    model = infllm(make_model("llama"), settings).double()
    rows = [(row * 20)[:n] for row, n in zip(ROWS, (150, 97, 3), strict=False)]
    ids, mask = padded(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    for row, want in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), max_new_tokens=12, do_sample=False)
        assert torch.equal(alone[0, len(row) :], want)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 50}], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_beams_and_chunks_write_what_they_write_without_a_cache(name, options):
    model = infllm(make_model("llama"), SETTINGS[name]).double()
    ids, mask = long_batch(tokens=110)
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    plain = {name: value for name, value in run.items() if name != "prefill_chunk_size"}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **plain))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_second_turn_goes_on_from_the_cache_of_the_first(name):
    model = infllm(make_model("llama"), SETTINGS[name]).double()
    ids, mask = long_batch(tokens=110)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(8))
    whole = torch.cat([first.sequences, more], 1)
    mask = torch.cat([mask, torch.ones(2, whole.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    want = model.generate(whole, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=False)
    cache = first.past_key_values
    assert [layer.capacity for layer in cache.layers] == [128] * 3
    assert torch.equal(model.generate(whole, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache), want)
    assert [layer.capacity for layer in cache.layers] == [256] * 3


def test_rows_of_a_cache_can_be_repeated_and_chosen(student):
    ids, mask = long_batch(tokens=160)
    with torch.no_grad():
        want = uncached(student, torch.cat([ids, ids[:, :1]], 1)[[1, 0, 1]], torch.cat([mask, mask[:, -1:]], 1)[[1, 0, 1]])[:, -1]
        cache = student(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1, 3]))
        position, seen = mask.sum(1, keepdim=True)[[1, 0, 1]], torch.ones(3, 161, dtype=torch.long)
        got = student(ids[[1, 0, 1], :1], attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
    assert (got - want).abs().max() < 1e-10


# ---------------------------------------------------------------- the cache's size


def test_bytes_of_the_cache_are_those_of_the_plan(settings):
    model = infllm(make_model("llama"), settings)
    ids, mask = long_batch(tokens=70)
    site = find_sites(FAMILIES["llama"]())[0]
    for planned, length in ((None, 70), (230, 230)):
        cache = model.build_cache(planned)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert cache_bytes(cache) == 3 * 2 * METHOD.cost(settings, site, length, 4).state_bytes


def test_a_step_with_room_moves_nothing_and_one_without_is_given_it():
    model = infllm(make_model("llama"), SETTINGS["compressed"])
    ids, _ = long_batch(tokens=120)
    cache = model.build_cache(126)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        before = [(layer.state, [t.data_ptr() for t in layer.state.values()]) for layer in cache.layers]
        for _ in range(8):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert all(layer.state is state and [t.data_ptr() for t in state.values()] == found for layer, (state, found) in zip(cache.layers, before, strict=True))
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert [layer.capacity for layer in cache.layers] == [256] * 3


def test_a_graph_needs_a_planned_length_and_stops_where_the_room_ends(monkeypatch):
    model = infllm(make_model("llama"), SETTINGS["compressed"])
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert "not told how many tokens" in graph_refusal(model, model.build_cache())
    cache = model.build_cache(120)
    assert graph_refusal(model, cache) is None
    captured = []
    monkeypatch.setattr(DecodeGraph, "_capture", lambda self, inputs, values: captured.append(cache.get_seq_length()) or self.model(**inputs))
    run = DecodeGraph(model)
    with torch.no_grad():
        cache = run(input_ids=long_batch(tokens=124)[0][:1], past_key_values=cache, use_cache=True).past_key_values
        for _ in range(7):
            run(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    # one warm step, steps that would be replays up to token 128, a plain one that makes room, and so on
    assert captured == [125, 126, 127, 129, 130]


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)], ids=["cuda"])
def test_generate_replays_a_graph_and_writes_the_same_text(case, dtype, monkeypatch):
    student = infllm(make_model("llama"), SETTINGS["compressed"]).to("cuda", dtype)
    runs = []
    monkeypatch.setattr(type(student), "get_compiled_call", lambda self, config: runs.append(DecodeGraph(self)) or runs[-1])
    ids, mask = (x.cuda() for x in long_batch(tokens=150))
    want = student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, disable_compile=True)
    assert torch.equal(student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False), want)
    assert [run.num_replays for run in runs] == [38]  # 39 steps after the prefill, the first of them plain


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
    settings = SETTINGS["compressed"]
    student = infllm(make_model("llama"), settings)
    student.save_pretrained(tmp_path / "model")
    ids, mask = long_batch(tokens=140)
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
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attn_plan"]["layers"][0]["config"] == METHOD.runtime_config(settings)


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
    gemma = find_sites(FAMILIES["gemma3_text"]())
    assert "already a sliding window of 8" in METHOD.check(METHOD.exact, gemma[0])[0]
    assert METHOD.check(METHOD.exact, gemma[1]) == []
    capped = find_sites(transformers.Gemma2Config(**SMALL, head_dim=8))
    assert any("capped logits" in problem for problem in METHOD.check(METHOD.exact, capped[1]))
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
