"""What of the vLLM plug-in needs no vLLM: what it refuses, how states lie in pages, and that requests cut and mixed in any way are computed each by itself."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, make_model
from test_seam import convert

from attnconvert.errors import AttnConvertError
from attnconvert.serving.vllm import plan as vllm_plan
from attnconvert.serving.vllm.plan import ConvertedModelConfig, check_checkpoint, check_settings, check_version, dense_length
from attnconvert.serving.vllm.pool import ALIGNMENT, Chunk, PooledState, batch_of, build_core, page_layout, views
from attnconvert.surgery.runtime.seam import SeamInputs, softmax_attention

HEADS, GROUPS, DIM, LENGTH = 4, 2, 8, 96
HEDGEHOG = {
    "window": {"kind": "block", "size": 16}, "sinks": 4, "linear": True, "feature_dim": None, "key_map": "per_kv_head", "reference": "absolute", "gates": True,
    "gate_power": 0.3, "softmax_weight": 0.3,
}  # fmt: skip
SPANS = {"alphas": [20, 6], "betas": [0.0, 0.25], "num_sinks": 3}
BLOCKS = {"block_size": 32, "init_blocks": 1, "window_size": 64, "topk": 3, "dense_len": 65, "scorer": "mean"}
ROUTED = {"unit": "query_head", "active": 0.75, "shared": 0.25, "shared_units": None, "router": "norm", "gates": "soft", "anneal": 0.0}
STATES = {"hedgehog": HEDGEHOG, "moa": SPANS}


def row(method, config, **changes):
    return {
        "layer_idx": 0,
        "path": "model.layers.0.self_attn",
        "num_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "method": method,
        "config": config,
        **changes,
    }


def served(method="hedgehog", config=HEDGEHOG, family="llama", **changes):
    return SimpleNamespace(base_model_type=family, attn_plan={"layers": [row(method, config)]}, num_hidden_layers=2, **changes)


def engine(config, **changes):
    """The parts of vLLM's settings that the plug-in looks at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, max_model_len=LENGTH, enforce_eager=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        **{"speculative_config": None, "lora_config": None, **changes},
    )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.1rc1+cpu"])
def test_patches_of_the_supported_release_are_taken(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev"])
def test_other_releases_are_refused_with_what_to_install(version):
    with pytest.raises(AttnConvertError, match=r"vllm-version(.|\n)*vllm==0\.32"):
        check_version(version)


@pytest.mark.parametrize("family", list(vllm_plan.FAMILIES))
def test_checkpoints_of_the_families_and_methods_named_are_taken(family):
    for method in vllm_plan.KINDS:
        check_checkpoint(served(method, {}, family))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (served(family="gemma3_text"), "gemma3_text(.|\n)*llama"),
        (served("kdgqa"), "kdgqa(.|\n)*hedgehog"),
        (served(quantization_config={"quant_method": "fp8"}), "quantised"),
    ],
)
def test_checkpoints_that_cannot_be_served_are_refused_with_what_can(config, message):
    with pytest.raises(AttnConvertError, match=message) as found:
        check_checkpoint(config)
    assert found.value.code == "not-served"


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"tensor_parallel": 2}, "--tensor-parallel-size"),
        ({"pipeline_parallel": 2}, "--pipeline-parallel-size"),
        ({"speculative": True}, "--speculative-config"),
        ({"lora": True}, "--enable-lora"),
    ],
)
def test_settings_under_which_the_text_would_be_wrong_are_refused_by_their_argument(settings, argument):
    check_settings(served(), max_model_len=10**6)
    with pytest.raises(AttnConvertError, match=argument):
        check_settings(served(), max_model_len=10, **settings)


def test_layers_that_choose_blocks_are_served_as_long_as_they_see_everything():
    config = served("infllm_v2", BLOCKS)
    assert dense_length(config.attn_plan) == 64
    assert dense_length(served().attn_plan) is None
    check_settings(config, max_model_len=64)
    with pytest.raises(AttnConvertError, match="--max-model-len 64"):
        check_settings(config, max_model_len=65)
    # That it is the longest: one token more, and the core leaves something out.
    core = build_core(row("infllm_v2", {**BLOCKS, "window_size": 0, "topk": 1, "init_blocks": 0}))
    q, k, v = tokens(65)
    out = core(q, k, v, SeamInputs(None, 1.0, batch_size=1, num_tokens=65))
    different = (out - softmax_attention(q, k, v, scaling=1.0, start=None)).abs().amax((0, 1, 3)) > 1e-4
    assert different.tolist() == [False] * 64 + [True]


FULL, SLIDING = ["full_attention"] * 2, ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("method", ["hedgehog", "moa", "moh", "exact"])
@pytest.mark.parametrize("types", [None, FULL, SLIDING])
def test_room_for_states_is_made_and_prefix_caching_turned_off_where_a_layer_has_one(method, types):
    has_state = method in STATES
    settings = engine(served(method, {}, layer_types=types))
    ConvertedModelConfig.verify_and_update_model_config(settings.model_config)
    ConvertedModelConfig.verify_and_update_config(settings)
    assert settings.model_config.enforce_eager
    assert settings.cache_config.enable_prefix_caching is not has_state
    # vLLM: there are states unless the list says full_attention of every layer.
    assert settings.model_config.hf_config.layer_types == (SLIDING if types == SLIDING else ["linear_attention"] * 2 if has_state else FULL)


def test_settings_are_checked_when_vllm_asks():
    with pytest.raises(AttnConvertError, match="--enable-lora"):
        ConvertedModelConfig.verify_and_update_config(engine(served(), lora_config=object()))


def test_naming_the_architectures_imports_no_model_code():
    code = "import sys, attnconvert.serving.vllm.plugin; assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_converted_config_travels_between_processes():
    config = convert(make_model("llama")).config
    copy = pickle.loads(pickle.dumps(config))
    assert type(copy) is type(config)
    assert copy.attn_plan == config.attn_plan


def test_a_converted_class_has_the_name_that_checkpoints_give_it():
    for family in vllm_plan.FAMILIES:
        assert convert(make_model(family), layers=set()).config.architectures == [vllm_plan.architecture(family)]
    assert set(vllm_plan.FAMILIES) <= set(FAMILIES)


# ---------------------------------------------------------------- pages


def test_tensors_of_a_state_lie_apart_aligned_and_inside_of_their_page():
    state = {"a": torch.empty(1, 3, 5, dtype=torch.bfloat16), "n": torch.empty(1, dtype=torch.int64), "none": torch.empty(1, 0, 4), "b": torch.empty(1, 7)}
    layout = page_layout(state)
    assert layout.num_bytes % ALIGNMENT == 0
    raw = torch.zeros(4, 3 * layout.num_bytes, dtype=torch.uint8)
    pages = raw[:, layout.num_bytes :]
    found = views(pages, layout)
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == ((4, *state[name].shape[1:]), state[name].dtype)
        assert tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0
    for value, tensor in enumerate(found.values(), 1):
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(found.values(), 1))
    assert not raw[:, : layout.num_bytes].any()
    assert not raw[:, 2 * layout.num_bytes :].any()


def test_requests_with_one_further_token_are_computed_together_and_the_others_one_by_one():
    rows = torch.tensor([5, 6, 7, 8, 9])
    batch = batch_of([0, 1, 2, 10, 11, 11], [30, 2, 40, 1, 0], rows)
    assert batch.rows.tolist() == [5, 6]
    assert [(c.begin, c.end, c.row.item(), c.seen, c.is_first) for c in batch.chunks] == [(2, 10, 7, 40, False), (10, 11, 8, 1, True)]


def test_a_request_of_one_token_begins_with_an_empty_state():
    batch = batch_of([0, 1], [1], torch.tensor([3]))
    assert not len(batch.rows)
    assert batch.chunks == (Chunk(0, 1, batch.chunks[0].row, 1),)


# ---------------------------------------------------------------- requests in a pool


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, count, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]


def served_in(pieces, state, rows):
    """Attention of requests whose tokens come in these pieces: one list of numbers of tokens per forward pass, 0 = the request waits. [H, T, D] each."""
    lengths = [sum(counts) for counts in zip(*pieces, strict=True)]
    requests = [tokens(length, seed) for seed, length in enumerate(lengths)]
    seen, outputs = [0] * len(lengths), [[] for _ in lengths]
    for counts in pieces:
        order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: (counts[i] > 1 or not seen[i], i))
        parts = [[x[0, :, seen[i] : seen[i] + counts[i]].transpose(0, 1) for x in requests[i]] for i in order]
        q, k, v = (torch.cat([part[j] for part in parts]) for j in range(3))
        begins = [0]
        for i in order:
            seen[i] += counts[i]
            begins.append(begins[-1] + counts[i])
        out = torch.zeros_like(q)
        with torch.no_grad():
            state.attend(q, k, v, batch_of(begins, [seen[i] for i in order], torch.tensor([rows[i] for i in order])), 0.3, out)
        for i, begin, end in zip(order, begins, begins[1:], strict=False):
            outputs[i].append(out[begin:end].transpose(0, 1))
    return requests, [torch.cat(parts, 1) for parts in outputs]


def pooled(method, num_pages=7):
    state = PooledState(build_core(row(method, STATES[method])), LENGTH, torch.float32)
    pages = torch.full((num_pages, state.layout.num_bytes + 3 * ALIGNMENT), 255, dtype=torch.uint8)  # what others left: in floats, not a number
    state.bind(pages[:, ALIGNMENT:])
    return state


@pytest.mark.parametrize("method", list(STATES))
@pytest.mark.parametrize(
    "pieces",
    [
        [[40], *[[1]] * 30],
        [[1], [1], [17], [1], [16], [30]],
        [[50, 1, 7], [1, 1, 0], [1, 20, 33], *[[1, 1, 1]] * 20, [0, 13, 0], *[[1, 0, 1]] * 5],
    ],
    ids=["prompt, then steps", "pieces", "three requests"],
)
def test_requests_cut_and_mixed_are_computed_each_by_itself(method, pieces):
    state = pooled(method)
    requests, outputs = served_in(pieces, state, [3, 6, 1])
    for (q, k, v), out in zip(requests, outputs, strict=True):
        with torch.no_grad():
            alone = state.core(q, k, v, SeamInputs(None, 0.3, batch_size=1, num_tokens=q.shape[2]))[0]
        assert (out - alone).abs().max() < 1e-5


@pytest.mark.parametrize("method", list(STATES))
def test_a_page_is_as_good_as_new_for_the_next_request(method):
    state = pooled(method)
    first = served_in([[30, 20], [1, 1]], state, [2, 4])[1]
    served_in([[60, 3], [1, 1]], state, [4, 2])
    again = served_in([[30, 20], [1, 1]], state, [2, 4])[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---------------------------------------------------------------- routed heads


@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_factors_of_units_turn_all_heads_into_what_the_core_computes(gates):
    core = build_core(row("moh", {**ROUTED, "gates": gates}))
    q, k, v = tokens(20)
    with torch.no_grad():
        factors = core.unit_factors(q[0].transpose(0, 1))
        every = softmax_attention(q, k, v, scaling=0.3, start=None)
        wanted = core(q, k, v, SeamInputs(None, 0.3, batch_size=1, num_tokens=20))
    assert (factors == 0).sum(-1).tolist() == [1] * 20
    assert (every * factors.T[None, ..., None] - wanted).abs().max() < 1e-5


def test_a_router_sees_the_input_of_layers_that_have_no_batches():
    core = build_core(row("moh", {**ROUTED, "router": "learned"}))
    module = torch.nn.Linear(32, 32)
    module.config = SimpleNamespace(hidden_size=32)
    core.fit(module)
    torch.nn.init.normal_(core.routed_map)
    x, (q, k, v) = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)), tokens(20)
    with torch.no_grad():
        module(x)
        factors = core.unit_factors(q[0].transpose(0, 1))
        module(x[None])
        wanted = core(q, k, v, SeamInputs(None, 0.3, batch_size=1, num_tokens=20))
        every = softmax_attention(q, k, v, scaling=0.3, start=None)
    assert (every * factors.T[None, ..., None] - wanted).abs().max() < 1e-5
