"""Attention weights of converted layers against softmax attention, their picture, and text side by side; on tiny random models."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import spearmanr

from attnconvert import embedded
from attnconvert.convert import fidelity
from attnconvert.convert.fidelity import DEFAULT_PROMPTS, attention_fidelity, draw_maps, read_weights, side_by_side
from attnconvert.convert.report import not_compared
from attnconvert.distill.data import PackedRows
from attnconvert.errors import AttnConvertError
from attnconvert.surgery import registry
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.runtime.seam import SeamInputs, softmax_attention
from attnconvert.surgery.sites import find_sites
from attnconvert.surgery.swap import swap

WINDOW = {"kind": "block", "size": 8}


def convert(model: Any, method: str = "hedgehog", **config: Any) -> Any:
    student = copy.deepcopy(model)
    made = registry.get(method)
    settings = made.runtime_config(made.config.model_validate(config))
    sites = find_sites(model.config)
    rows = tuple(LayerPlan(s.layer_idx, s.path, s.num_heads, s.num_key_value_heads, s.head_dim, method, settings) for s in sites)
    swap(student, ConversionPlan(model.config.model_type, rows))
    return student.eval()


def packed(num_rows: int = 2, length: int = 45, document: int | None = 19, seed: int = 0) -> PackedRows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (num_rows, length), generator=generator, dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32) % (document or length)
    return PackedRows(ids, positions.repeat(num_rows, 1))


def measure(student: Any, rows: PackedRows, teacher: Any = None, **options: Any) -> dict[str, Any]:
    return attention_fidelity(student, teacher, rows, device="cpu", **{"num_rows": rows.num_rows, **options})


def figures(result: dict[str, Any], name: str) -> list[Any]:
    return [head[name] for layer in result["layers"] for head in layer["heads"]]


# ---------------------------------------------------------------- weights


def test_weights_read_off_softmax_attention_are_its_weights() -> None:
    H, G, T, D = 6, 3, 21, 8  # T is no multiple of D
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, T, D, generator=generator) for heads in (H, G, G))
    start = torch.where(torch.arange(T) < 9, 0, 9)[None]
    got = read_weights(lambda values: softmax_attention(q, k, values, scaling=0.4, start=start), v)
    logits = q[0] @ k[0].repeat_interleave(H // G, 0).transpose(1, 2) * 0.4
    index = torch.arange(T)
    visible = (index <= index[:, None]) & (index >= start[0][:, None])
    assert torch.allclose(got, logits.masked_fill(~visible, -torch.inf).softmax(-1), atol=1e-6)


def test_an_exact_conversion_of_any_family_has_exact_weights(teacher: Any) -> None:
    result = measure(convert(teacher, "exact"), packed(), teacher)
    assert result["unreadable"] == []
    assert [layer["layer_idx"] for layer in result["layers"]] == [0, 1, 2]
    for layer in result["layers"]:
        assert layer["output_error"] < 1e-10
        assert abs(layer["kl"]) < 1e-5
        assert layer["entropy_student"] == pytest.approx(layer["entropy_teacher"], abs=1e-5)
        assert layer["softmax_drift"] < 1e-10
        if layer["monotonicity"] is not None:  # keys of a window of 8 are never more than 8
            assert layer["monotonicity"] > 0.9999


@pytest.mark.parametrize("kind", ["block", "sliding"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_the_exact_window_is_where_a_layer_without_linear_branch_has_weight(tiny_llama: Any, kind: str, sinks: int) -> None:
    student = convert(tiny_llama, window={"kind": kind, "size": 8}, sinks=sinks, linear=False)
    core = converted_sites(student)[0][2].core
    T, D = 45, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, T, D, generator=generator) for heads in (4, 2, 2))
    start = torch.where(torch.arange(T) < 19, 0, 19)
    inputs = SeamInputs(start[None], D**-0.5, batch_size=1, num_tokens=T)
    with torch.no_grad():
        weights = read_weights(lambda values: core(q, k, values, inputs), v)
    index = torch.arange(T)
    visible = (index <= index[:, None]) & (index >= start[:, None])
    exact = fidelity._windows(student)[0].exact(start)
    assert torch.equal((weights > 0).all(0), visible & exact)
    assert not torch.equal(visible, visible & exact), "the window must leave something out"


def test_attention_spans_are_compared_where_they_leave_something_out(tiny_llama: Any) -> None:
    layers = measure(convert(tiny_llama, "moa", alphas=(6, 0), betas=(0, 1), num_sinks=2), packed(document=None))
    assert layers["unreached"] == []
    for layer in layers["layers"]:
        errors, monotonicity = ([head[name] for head in layer["heads"]] for name in ("output_error", "monotonicity"))
        assert min(errors[:2]) > 1e-3  # query heads of the first KV head
        assert max(errors[2:]) < 1e-9
        assert monotonicity == [None] * 4  # keys outside of a span have no order


def test_attention_spans_longer_than_a_row_are_left_out_with_a_sentence(tiny_llama: Any) -> None:
    assert measure(convert(tiny_llama, "moa", alphas=43, betas=0, num_sinks=1), packed())["unreached"] == []  # the last query misses one key
    found = measure(convert(tiny_llama, "moa", alphas=43, betas=0, num_sinks=2), packed())
    assert (found["layers"], found["maps"], found["unreached"]) == ([], [], [0, 1, 2])
    assert not_compared(found) == ["Not compared, because their spans are longer than the 45 tokens of a row, so nothing is left out there: layers 0-2."]


def test_figures_equal_their_definitions(tiny_llama: Any) -> None:
    student = convert(tiny_llama, window=WINDOW, sinks=2)
    rows = packed(num_rows=1, length=45, document=None)
    seen: list[tuple[Any, ...]] = []
    core = converted_sites(student)[1][2].core
    core.tap = lambda core, q, k, v, inputs, y: seen.append((q, k, v, inputs, y))
    with torch.no_grad():
        batch = rows.rows([0])
        for _, _, module in converted_sites(student):
            module.core.teacher = True
        student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        for _, _, module in converted_sites(student):
            module.core.teacher = False
        core.tap = None
        q, k, v, inputs, y = seen[0]
        out = core(q, k, v, inputs)[0]
        t = read_weights(lambda values: softmax_attention(q, k, values, scaling=inputs.scaling, start=None), v).double().numpy()
        s = read_weights(lambda values: core(q, k, values, inputs), v).double().numpy()
    layer = measure(student, rows)["layers"][1]
    for head, got in enumerate(layer["heads"]):
        assert got["output_error"] == pytest.approx(float((out[head] - y[0, head]).square().sum() / y[0, head].square().sum()), rel=1e-4)
        kl, entropy, rho = [], [], []
        for n in range(45):
            p, r = t[head, n, : n + 1], s[head, n, : n + 1]
            kl.append(float((p * np.log(p / r)).sum()))
            entropy.append(float(-(r * np.log(r)).sum()))
            keys = range(2, max(2, (n // 8 - 1) * 8))  # behind the sinks, before the block before the query's own
            if len(keys) >= 8:
                rho.append(spearmanr(p[keys], r[keys]).statistic)
        assert got["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert got["entropy_student"] == pytest.approx(np.mean(entropy), rel=1e-4)
        assert got["monotonicity"] == pytest.approx(np.mean(rho), abs=1e-3)
        assert len(rho) > 10
    assert layer["output_error"] == pytest.approx(float((out - y[0]).square().sum() / y.square().sum()), rel=1e-4)
    assert layer["softmax_drift"] is None


def test_entropy_of_uniform_attention_is_the_log_of_the_number_of_keys(tiny_llama: Any) -> None:
    with torch.no_grad():
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    result = measure(convert(tiny_llama, "exact"), packed(1, 40, 20))
    want = sum(math.log(n) for n in range(1, 21)) / 20
    assert figures(result, "entropy_teacher") == pytest.approx([want] * 12, rel=1e-5)


def test_rank_correlation_equals_scipy_with_ties_and_left_out_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(6, 30, generator=generator)
    b = (a + torch.rand(6, 30, generator=generator)).mul(6).round()  # many ties
    b[5] = 1.0
    keys = torch.rand(6, 30, generator=generator) > 0.4
    rho, known = fidelity._rank_correlation(a, b, keys)
    assert known.tolist() == [True] * 5 + [False]
    for row in range(5):
        want = spearmanr(a[row][keys[row]], b[row][keys[row]]).statistic
        assert rho[row].item() == pytest.approx(want, abs=1e-9)


# ---------------------------------------------------------------- bad conversions show


def test_a_dropped_linear_branch_shows_in_kl_and_has_no_monotonicity(tiny_llama: Any) -> None:
    rows = packed(2, 60, None)
    whole = measure(convert(tiny_llama, window=WINDOW, sinks=2), rows)
    dropped = measure(convert(tiny_llama, window=WINDOW, sinks=2, linear=False), rows)
    assert all(value is None for value in figures(dropped, "monotonicity"))
    assert all(value is not None for value in figures(whole, "monotonicity"))
    assert min(figures(dropped, "kl")) > 0.1
    assert np.mean(figures(dropped, "kl")) > 2 * np.mean(figures(whole, "kl"))


def test_permuted_heads_show_in_the_layer_where_they_are(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student = convert(tiny_llama, "exact")
    core = converted_sites(student)[1][2].core
    right = core.forward
    monkeypatch.setattr(core, "forward", lambda q, k, v, inputs: right(q, k, v, inputs).roll(1, 1))
    result = measure(student, packed())
    assert result["unreadable"] == []
    layers = result["layers"]
    assert layers[1]["kl"] > 1e-3
    assert layers[1]["output_error"] > 0.5
    assert all(layers[idx]["output_error"] < 1e-10 and abs(layers[idx]["kl"]) < 1e-5 for idx in (0, 2))


@pytest.mark.parametrize("wrong", [torch.tanh, lambda y: y + 1])
def test_a_core_that_is_not_linear_in_v_is_left_out_and_named(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    student = convert(tiny_llama, "exact")
    core = converted_sites(student)[2][2].core
    right = core.forward
    monkeypatch.setattr(core, "forward", lambda q, k, v, inputs: wrong(right(q, k, v, inputs)))
    result = measure(student, packed())
    assert result["unreadable"] == [2]
    assert [layer["layer_idx"] for layer in result["layers"]] == [0, 1]
    assert all(entry["layer_idx"] != 2 for entry in result["maps"])


def test_a_layer_whose_output_is_not_finite_shows_as_none(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    student = convert(tiny_llama, "exact")
    core = converted_sites(student)[0][2].core
    right = core.forward
    monkeypatch.setattr(core, "forward", lambda q, k, v, inputs: right(q, k, v, inputs) * torch.nan)
    result = measure(student, packed())
    assert [layer["output_error"] is None for layer in result["layers"]] == [True, False, False]
    assert [layer["kl"] is None for layer in result["layers"]] == [True, False, False]
    assert result["layers"][0]["monotonicity"] is None
    assert {entry["layer_idx"] for entry in result["maps"][:4]} == {0}
    json.dumps(result, allow_nan=False)
    pytest.importorskip("matplotlib")
    draw_maps(result, tmp_path / "maps.png")


def test_finetuned_projections_show_as_drift_and_not_as_error(tiny_llama: Any) -> None:
    student = convert(tiny_llama, "exact")
    with torch.no_grad():
        student.model.layers[1].self_attn.v_proj.weight.mul_(1.1)
    layers = measure(student, packed(), tiny_llama)["layers"]
    assert layers[0]["softmax_drift"] < 1e-10
    assert layers[1]["softmax_drift"] == pytest.approx(0.01, rel=1e-3)
    assert layers[2]["softmax_drift"] > 0
    assert all(abs(layer["kl"]) < 1e-5 for layer in layers)


# ---------------------------------------------------------------- the call as a whole


def test_the_model_is_left_as_it_was_even_when_the_run_is_broken_off(tiny_llama: Any) -> None:
    student = convert(tiny_llama, window=WINDOW)
    student.model.layers[0].train()
    cores = [module.core for _, _, module in converted_sites(student)]

    def stop(what: str, done: int, total: int) -> None:
        assert cores[1].tap is not None
        assert not student.model.layers[0].training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(student, packed(), progress=stop)
    assert [core.tap for core in cores] == [None] * 3
    assert student.model.layers[0].training
    assert not student.model.layers[1].training
    assert not any(module._forward_hooks for module in student.modules())


def test_rows_are_cut_to_256_tokens_or_four_windows(tiny_llama: Any) -> None:
    rows = packed(1, 300, None)
    assert measure(convert(tiny_llama, window=WINDOW), rows)["row_tokens"] == 256
    result = measure(convert(tiny_llama, window={"kind": "sliding", "size": 70}), rows)
    assert (result["row_tokens"], result["tokens"], result["rows"]) == (280, 280, 1)
    assert measure(convert(tiny_llama, "exact"), packed(3, 30), num_rows=9)["rows"] == 3


def test_bf16_models_are_measured_in_fp32(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student = convert(tiny_llama, window=WINDOW).bfloat16()
    core = converted_sites(student)[0][2].core
    right, seen = core.forward, set()

    def record(q: Any, k: Any, v: Any, inputs: Any) -> Any:
        seen.update({q.dtype, k.dtype, v.dtype})
        return right(q, k, v, inputs)

    monkeypatch.setattr(core, "forward", record)
    assert all(value > 0 for value in figures(measure(student, packed()), "kl"))
    assert seen == {torch.float32}


def test_maps_are_the_worst_heads_and_the_median_and_their_rows_sum_to_one(tiny_llama: Any) -> None:
    rows = PackedRows(*(torch.cat(pair) for pair in zip(*((r.input_ids, r.position_ids) for r in (packed(1, 150, 30), packed(1, 150, None))), strict=True)))
    result = measure(convert(tiny_llama, window=WINDOW), rows, num_maps=3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    order = sorted(((head["kl"], layer["layer_idx"], head["head"]) for layer in result["layers"] for head in layer["heads"]), reverse=True)
    assert [(entry["kl"], entry["layer_idx"], entry["head"]) for entry in result["maps"]] == [*order[:3], order[6]]
    assert [entry["pick"] for entry in result["maps"]] == ["largest"] * 3 + ["median"]
    for entry in result["maps"]:
        for side in ("teacher", "student"):
            weights = np.array(entry[side])
            assert weights.shape == (64, 64)
            assert weights.sum(1) == pytest.approx(np.ones(64), abs=4e-3)
            assert np.triu(weights, 1).max() == 0
        # the row that is one document is drawn: the other one has nothing left of its document
        assert np.array(entry["teacher"])[-1, :32].sum() > 0
    few = measure(convert(tiny_llama, window=WINDOW), packed(1, 20, None), num_maps=50)["maps"]
    assert len(few) == 12
    assert np.array(few[0]["teacher"]).shape == (20, 20)


# ---------------------------------------------------------------- picture


def test_the_picture_is_a_png_that_depends_on_the_maps(tiny_llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = measure(convert(tiny_llama, window=WINDOW), packed(1, 80, None), num_maps=1)
    first, again, other = (tmp_path / "new" / f"{name}.png" for name in ("first", "again", "other"))
    draw_maps(result, first)
    draw_maps(result, again)
    draw_maps({"maps": result["maps"][::-1]}, other)
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    with pytest.raises(AttnConvertError, match="no attention maps") as caught:
        draw_maps({}, tmp_path / "none.png")
    assert caught.value.code == "no-maps"


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(AttnConvertError) as caught:
        draw_maps({"maps": []}, tmp_path / "maps.png")
    assert caught.value.code == "missing-extra"
    assert "attnconvert[plots]" in caught.value.render()


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, Any]:
    """The embedded model, an untrained conversion of it, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded.model_dir(), dtype=torch.float32).eval()
    return convert(model, window=WINDOW), model, transformers.AutoTokenizer.from_pretrained(embedded.model_dir())


def test_continuations_are_the_greedy_ones_of_each_model(demo: tuple[Any, Any, Any]) -> None:
    student, teacher, tokenizer = demo
    prompt = DEFAULT_PROMPTS[0]
    rows = side_by_side(student, teacher, tokenizer, [prompt], device="cpu", max_new_tokens=6)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for name, model in (("teacher", teacher), ("student", student)):
        want = ids
        for _ in range(6):  # no generate(), no cache
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert rows[0][name] == tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
    assert list(rows[0]) == ["prompt", "teacher", "student"]
    assert side_by_side(student, None, tokenizer, [prompt], device="cpu", max_new_tokens=6) == [{**rows[0], "teacher": None}]


def test_a_chat_template_is_used_and_prompts_that_do_not_fit_are_left_out(demo: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    student, _, tokenizer = demo
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}Say: {{ m['content'] }} -> {% endfor %}"
    plain, templated = (
        side_by_side(student, None, t, [p], device="cpu", max_new_tokens=5)[0] for t, p in ((demo[2], "Say: the sea -> "), (tokenizer, "the sea"))
    )
    assert plain["student"] == templated["student"]
    assert templated["prompt"] == "the sea"
    monkeypatch.setattr(student.config, "max_position_embeddings", 40)
    rows = side_by_side(student, None, demo[2], DEFAULT_PROMPTS, device="cpu", max_new_tokens=5)
    assert [row["prompt"] for row in rows] == list(DEFAULT_PROMPTS[:-1])


def test_the_long_default_prompt_asks_beyond_300_tokens_for_its_first_sentence(demo: tuple[Any, Any, Any]) -> None:
    long = DEFAULT_PROMPTS[-1]
    fact, end = long.index("blue hook"), long.index("someone asked")
    assert long.count("blue hook") == 1
    assert len(demo[2](long[fact:end]).input_ids) > 300
    assert len(demo[2](long).input_ids) < 1000
