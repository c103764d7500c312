"""Null conversion: with an exact core, ten families compute what the stock model computes, cached logits at every step included."""

import copy

import pytest
import torch
import transformers

from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.runtime import seam
from attnconvert.surgery.runtime.cache import CoreCacheLayer
from attnconvert.surgery.runtime.modeling import teacher_mode
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import restore_softmax, swap

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = [[5, 9, 3], [7, 2, 8, 4, 6, 11, 13, 5, 9, 10, 3, 2, 17], [33]]


def make_plan(model, method="exact", config=None, layers=None):
    sites = find_sites(model.config)
    rows = [
        LayerPlan(
            s.layer_idx,
            s.path,
            s.num_heads,
            s.num_key_value_heads,
            s.head_dim,
            method if layers is None or s.layer_idx in layers else None,
            (config or {}) if layers is None or s.layer_idx in layers else {},
        )
        for s in sites
    ]
    return ConversionPlan(model.config.model_type, tuple(rows))


def convert(model, **options):
    student = copy.deepcopy(model)
    swap(student, make_plan(model, **options))
    return student


def padded(rows=ROWS):
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(r)) + r for r in rows]), torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


def step_logits(model, ids, mask, *, prefill, steps=6):
    """Logits of a prefill in pieces and of `steps` cached single tokens, concatenated over T."""
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, out, at = None, [], 0
    for n in [*prefill, *[1] * steps]:
        part = model(ids[:, at : at + n], attention_mask=mask[:, : at + n], position_ids=position_ids[:, at : at + n], past_key_values=cache, use_cache=True)
        cache = part.past_key_values
        out.append(part.logits)
        at += n
    return torch.cat(out, 1)


def batch(extra=6):
    ids, mask = padded()
    more = torch.randint(3, 60, (ids.shape[0], extra), generator=torch.Generator().manual_seed(5))
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)


def worst(a, b, mask):
    return (a - b)[mask.bool()].abs().max().item()


TOLERANCE = 2e-4  # fp32; logits of these models are of order 10


@pytest.mark.parametrize("layers", [None, {0, 2}])
def test_null_conversion_equals_stock_logits_and_every_cached_step(teacher, layers):
    ids, mask = batch()
    with torch.no_grad():
        student = convert(teacher, layers=layers)
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        want = teacher(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        assert worst(student(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits, want, mask) < TOLERANCE
        cached = step_logits(teacher, ids, mask, prefill=[13])
        for prefill in ([13], [4, 4, 5]):
            assert worst(step_logits(student, ids, mask, prefill=prefill), cached, mask) < TOLERANCE


def test_null_conversion_generates_the_same_text(teacher):
    ids, mask = padded()
    student = convert(teacher)
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        want = teacher.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
        got = student.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(want, got), options


def test_null_conversion_respects_packed_documents(teacher):
    ids = torch.tensor([[5, 9, 3, 7, 2, 8, 4, 6]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        want = teacher(ids, position_ids=position_ids, use_cache=False).logits
        for layers in (None, {1}):
            got = convert(teacher, layers=layers)(ids, position_ids=position_ids, use_cache=False).logits
            assert (got - want).abs().max() < TOLERANCE


def test_planted_head_roll_is_seen(teacher, monkeypatch):
    """The test above must fail when KV heads are permuted (greedy text alone misses it in two families)."""
    ids, mask = batch()
    student = convert(teacher)
    update = CoreCacheLayer.update
    monkeypatch.setattr(CoreCacheLayer, "update", lambda self, k, v, *a, **kw: update(self, k.roll(1, 1), v, *a, **kw))
    with torch.no_grad():
        assert worst(step_logits(student, ids, mask, prefill=[13]), step_logits(teacher, ids, mask, prefill=[13]), mask) > 50 * TOLERANCE


def test_planted_dropped_mask_is_seen(teacher, monkeypatch):
    ids, mask = batch()
    student = convert(teacher)
    monkeypatch.setattr(seam.SeamInputs, "valid", lambda self: torch.ones(self.batch_size, self.num_tokens, dtype=torch.bool))
    with torch.no_grad():
        assert worst(step_logits(student, ids, mask, prefill=[13]), step_logits(teacher, ids, mask, prefill=[13]), mask) > 50 * TOLERANCE


def test_teacher_mode_and_restored_layers_equal_the_stock_model(teacher):
    full = [s.layer_idx for s in find_sites(teacher.config) if s.sliding_window is None]
    if not full:
        full = [0, 1, 2]  # every layer slides: window and sinks still go in, a linear branch would be refused
    student = convert(teacher, method="hedgehog", layers=set(full), config=HEDGEHOG)
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = teacher(ids, use_cache=False).logits
        assert (student(ids, use_cache=False).logits - want).abs().max() > 50 * TOLERANCE
        with teacher_mode(student):
            assert (student(ids, use_cache=False).logits - want).abs().max() < TOLERANCE
        restore_softmax(student, full, "test")
        assert (student(ids, use_cache=False).logits - want).abs().max() < TOLERANCE


HEDGEHOG = {
    "window": {"kind": "block", "size": 4},
    "sinks": 2,
    "linear": True,
    "feature_dim": None,
    "key_map": "per_kv_head",
    "reference": "absolute",
    "gates": True,
    "gate_power": 1.0,
    "softmax_weight": 0.1,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"window": {"kind": "sliding", "size": 4}},
        {"window": {"kind": "block", "size": 0}, "sinks": 0},
        {"key_map": "per_query_head", "reference": "window_max", "gates": False},
        {"linear": False},
    ],
)
def test_hedgehog_cached_steps_equal_one_forward(teacher, change):
    student = convert(teacher, method="hedgehog", config=HEDGEHOG | change)
    ids, mask = batch()
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        want = student(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        for prefill in ([13], [4, 4, 5], [1] * 13):
            assert worst(step_logits(student, ids, mask, prefill=prefill), want, mask) < TOLERANCE


def test_padded_row_equals_the_row_alone(teacher):
    student = convert(teacher, method="hedgehog", config=HEDGEHOG)
    ids, mask = padded()
    together = student.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    for row, want in zip(ROWS, together, strict=True):
        alone = student.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), max_new_tokens=12, do_sample=False)
        assert torch.equal(alone[0, len(row) :], want)


def test_refused_uses_say_why(tiny_llama):
    student = convert(tiny_llama, method="hedgehog", config=HEDGEHOG)
    ids = torch.tensor([[5, 9, 3, 7]])
    with pytest.raises(ValueError, match="assisted"):
        student.generate(ids, max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="continuous batching"):
        student.generate_batch([[5, 9]])
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        student.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="right-padded"):
        student(ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), use_cache=True)
    with pytest.raises(ValueError, match="zeros between"):
        student(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="2D attention mask"):
        student(ids, attention_mask=torch.ones(1, 1, 4, 4))
    cache = student(ids, use_cache=True).past_key_values
    for length in (0, 2, -1):
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.layers[0].crop(length)
    cache.layers[0].crop(4)  # all of it: nothing to forget
    with pytest.raises(ValueError, match="fixed by its plan"):
        student.set_attn_implementation("sdpa")


def test_state_bytes_are_constant_and_kv_bytes_grow(tiny_llama):
    student = convert(tiny_llama, method="hedgehog", config=HEDGEHOG, layers={0, 1})
    sizes = []
    for T in (20, 200):
        cache = student(torch.randint(3, 60, (1, T)), use_cache=True).past_key_values
        sizes.append((sum(t.nbytes for layer in cache.layers[:2] for t in layer.state.values()), cache.layers[2].keys.nbytes))
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] == 10 * sizes[0][1]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (lambda: transformers.DiffLlamaConfig(**SMALL), "attention-touches-cache"),
        (lambda: transformers.DeepseekV3Config(**SMALL), "attention-not-reachable"),
        (lambda: transformers.FalconConfig(**SMALL), "attention-not-reachable"),
        (lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "attention-not-reachable"),
        (lambda: transformers.BertConfig(**SMALL), "not-a-causal-lm"),
    ],
)
def test_families_that_cannot_be_converted_are_refused_by_name(config, code):
    with pytest.raises(AttnConvertError) as caught:
        find_sites(config())
    assert caught.value.code == code
    assert config().model_type in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.MixtralConfig(**SMALL),
        lambda: transformers.GraniteConfig(**SMALL),
        lambda: transformers.OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    ],
)
def test_families_nobody_wrote_code_for_are_found(config):
    assert [site.layer_idx for site in find_sites(config())] == [0, 1]


def test_costs_count_the_parameters_a_layer_really_gets(tiny_llama):
    site = find_sites(tiny_llama.config)[0]
    for config in registry.get("hedgehog").examples:
        core = convert(tiny_llama, method="hedgehog", config=config.model_dump(mode="json")).model.layers[0].self_attn.core
        assert registry.get("hedgehog").cost(config, site, 64, 2).num_parameters == sum(p.numel() for p in core.parameters())
