"""The search for attention spans: rules, influence, optimisation, plan files, and the whole on a tiny model."""

from __future__ import annotations

import ctypes
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COMMON, make_model
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnconvert.convert.load import load_tokenizer, resolve
from attnconvert.convert.sparsify import SpanMap, draw_heat_map, expected_losses, render_heat_map, search_spans, span_heat_map
from attnconvert.distill.config import DataConfig
from attnconvert.errors import AttnConvertError
from attnconvert.kernels.span.reference import visible
from attnconvert.surgery.methods.moa import MoaConfig
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.sites import Site, find_sites
from attnconvert.surgery.spans.influence import add_costs, first_keys, profile, response_logits
from attnconvert.surgery.spans.planfile import read_plan, write_plan
from attnconvert.surgery.spans.rules import DENSE, Rule, density, held_below, search_space
from attnconvert.surgery.spans.solve import Problem, _Allocations, _results_alone_on_stdout, best_plan, pareto
from attnconvert.surgery.spans.stock import attention_through, with_spans

RULES = (DENSE, Rule(5, 0.0), Rule(-6, 0.75), Rule(2, 0.3), Rule(1, 0.0), Rule(100, 0.0), Rule(-100, 0.5))


def error_of(call: Callable[[], Any]) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        call()
    return caught.value


def shown(rule: Rule, length: int, num_sinks: int) -> torch.Tensor:
    """The mask of a rule from the operator's own definition, bool [T, T]."""
    position = torch.arange(length)
    return visible(position[:, None], position, torch.tensor(rule.alpha), torch.tensor(rule.beta_q), num_sinks)


# ------------------------------------------------------------------------------------------------------------------ rules


def test_the_default_rules_are_the_published_grid() -> None:
    space = search_space((2048, 4096, 8192))
    assert {rule.alpha for rule in space} == {-1024, *range(0, 8193, 1024)}
    assert {rule.beta for rule in space} == {eighth / 8 for eighth in range(9)}
    assert all(rule.alpha + rule.beta * 8192 <= 8192 and rule.alpha + rule.beta * 2048 > 0 for rule in space)
    assert len(space) == len(set(space)) == 48
    assert DENSE in space


def test_rules_that_the_kernels_cannot_tell_apart_are_one() -> None:
    assert search_space((64,), candidates=((8, 0.5), (8, 0.5 + 1e-7), (0, 1.0))) == (held_below(0, 1.0, 0), held_below(8, 0.5, 0))
    assert search_space((100, 200), alphas=(50, 50, 300, -40), betas=(0.0, 0.25)) == (held_below(50, 0.0, 0), held_below(50, 0.25, 0))


@pytest.mark.parametrize("rule", RULES)
def test_density_is_what_the_last_query_sees(rule: Rule) -> None:
    assert density(rule, 50, 4) == int(shown(rule, 50, 4)[-1].sum()) / 50


# -------------------------------------------------------------------------------------------------------------- influence


def double_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 2})
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 8.0)
    return model


def sample(length: int, response: int, vocab: int = 64, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length) >= length - response


def hidden_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, rule: Rule, num_sinks: int) -> torch.Tensor:
    """Attention by a rule with a dense mask."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown(rule, q.shape[2], num_sinks), scale=scaling, enable_gqa=True)


def tensors(length: int = 37, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, d_out = (torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4))
    return q, k, v, d_out


@pytest.mark.parametrize("num_sinks", [0, 3, 50])
@pytest.mark.parametrize("tile", [8, 64])
def test_a_cost_is_half_the_square_of_what_a_row_loses_to_first_order(num_sinks: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconvert.surgery.spans.influence._TILE", tile)
    q, k, v, d_out = tensors()
    total = torch.zeros(2, len(RULES), dtype=torch.float64)
    add_costs(q, k, v, d_out, 0.7, total, first_keys(RULES, q.shape[2], num_sinks), num_sinks)
    dense = hidden_keys(q, k, v, 0.7, DENSE, 0)
    for number, rule in enumerate(RULES):
        effects = (d_out * (hidden_keys(q, k, v, 0.7, rule, num_sinks) - dense)).unflatten(1, (2, 2)).sum((2, 4))  # [1, G, T]
        torch.testing.assert_close(total[:, number], effects.square().sum((0, 2)) / 2)


def test_a_cost_is_the_divergence_of_the_predictions() -> None:
    # Where one row alone counts, nothing is left out but higher orders: those of a small step are small.
    model, item, step = double_llama(), sample(11, 1), 0.02
    rule, sinks = Rule(4, 0.0), 1
    found = profile(model, find_sites(model.config), [item] * 400, [rule], dict.fromkeys(range(2), sinks))

    def blend(group: int | None) -> Any:
        def attend(idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
            out = hidden_keys(q, k, v, scaling, DENSE, 0)
            if idx == 1 and group is not None:
                heads = slice(2 * group, 2 * group + 2)
                out[:, heads] += step * (hidden_keys(q, k, v, scaling, rule, sinks) - out)[:, heads]
            return out

        with torch.no_grad(), attention_through(model, {0, 1}, attend):
            return response_logits(model, *item).log_softmax(-1)

    dense = blend(None)
    for group in (0, 1):
        divergence = float((dense.exp() * (dense - blend(group))).sum())
        assert divergence > 0
        assert float(found.costs[11][1][group, 0]) == pytest.approx(divergence / step**2, rel=0.3)
    assert found.losses[11] == pytest.approx(float(-(dense.exp() * dense).sum()))


def test_samples_of_a_length_are_averaged() -> None:
    model, items = double_llama(), [sample(11, 4), sample(11, 2, seed=8), sample(9, 2)]
    sites, sinks = find_sites(model.config), {0: 1, 1: 1}
    both, first = (profile(model, sites, own, RULES, sinks) for own in (items, items[:1]))
    assert both.num_samples == {11: 2, 9: 1}
    assert set(both.costs) == set(both.losses) == {9, 11}
    assert (2 * both.costs[11][0] >= first.costs[11][0]).all()  # the same tokens are drawn for the first
    assert (2 * both.costs[11][0] > first.costs[11][0])[:, 2:].any()
    assert both.costs[11][0][:, 0].tolist() == [0, 0]


def test_the_profiled_attention_has_the_gradients_of_attention() -> None:
    q, k, v, d_out = tensors(13)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.7, enable_gqa=True).backward(d_out)
    found = add_costs(q, k, v, d_out, 0.7, torch.zeros(2, 1), first_keys([DENSE], q.shape[2], 2), 2)
    for leaf, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_16_bit_models_are_profiled_in_fp32() -> None:
    q, k, v, d_out = tensors(13, torch.bfloat16)
    narrow, wide = torch.zeros(2, len(RULES)), torch.zeros(2, len(RULES))
    gradients = add_costs(q, k, v, d_out, 0.7, narrow, first_keys(RULES, q.shape[2], 2), 2)
    add_costs(q.float(), k.float(), v.float(), d_out.float(), 0.7, wide, first_keys(RULES, q.shape[2], 2), 2)
    assert torch.equal(narrow, wide)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


def test_a_row_that_one_hidden_key_takes_whole_stays_finite() -> None:
    q = torch.full((1, 1, 6, 4), 30.0)
    k = torch.zeros(1, 1, 6, 4)
    k[:, :, 2] = 30.0  # from token 2 on, all weight goes there
    total = torch.zeros(1, 1)
    add_costs(q, k, torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), 1.0, total, first_keys([Rule(1, 0.0)], q.shape[2], 1), 1)
    assert total.isfinite().all()


def test_no_attention_map_is_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    length, tile = 256, 16
    monkeypatch.setattr("attnconvert.surgery.spans.influence._TILE", tile)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)), 0)
            return out

    with Watch():
        profile(model, find_sites(model.config), [sample(length, 8)], RULES, dict.fromkeys(range(3), 2))
    assert largest <= 4 * tile * (length + 1)  # H rows of a tile; a map would be H x T x T


def test_a_profile_leaves_the_model_as_it_was_even_after_an_error() -> None:
    model = make_model("llama")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    names = set(ALL_ATTENTION_FUNCTIONS)
    sites, sinks = find_sites(model.config), dict.fromkeys(range(3), 2)
    profile(model, sites, [sample(20, 4)], RULES, sinks)
    with pytest.raises(RuntimeError, match="stop"):
        profile(model, sites, [sample(20, 4)], RULES, sinks, progress=lambda done, total: (_ for _ in ()).throw(RuntimeError("stop")))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {name: flag for name, (flag, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) and p.grad is None for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert set(ALL_ATTENTION_FUNCTIONS) == names
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gpt_neox", "gpt2"])
def test_every_family_is_profiled(name: str) -> None:
    model = make_model(name)
    found = profile(model, find_sites(model.config), [sample(40, 6)], [DENSE, Rule(8, 0.0), Rule(2, 0.0)], dict.fromkeys(range(3), 2))
    for idx in range(3):
        costs = found.costs[40][idx]
        assert (costs[:, 0] == 0).all()
        assert (costs[:, 1:] > 0).all()


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_layers_with_a_sliding_window_are_refused(name: str) -> None:
    model = make_model(name)
    found = error_of(lambda: profile(model, find_sites(model.config), [sample(20, 4)], RULES, dict.fromkeys(range(3), 2)))
    assert found.code == "spans-not-possible"
    assert "sliding window of 8 tokens" in found.message


# ------------------------------------------------------------------------------------------------------------ stock model


def test_a_stock_model_attends_by_the_rules() -> None:
    model = make_model("llama").double()
    ids = sample(40, 1)[0][None]
    rules, sinks = {0: (Rule(3, 0.25), DENSE), 2: (Rule(4, 0.0), Rule(-8, 1.0))}, {0: 2, 2: 1}

    def masked(idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        mask = torch.stack([shown(rule, 40, sinks[idx]) for rule in rules[idx] for _ in range(2)])
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with attention_through(model, rules.keys(), masked):
            expected = model(ids, use_cache=False).logits
        with with_spans(model, rules, sinks):
            found = model(ids, use_cache=False).logits
        with with_spans(model, {1: (DENSE, DENSE)}, {1: 0}):
            same = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(dense.std()))  # Llama's norms are fp32
    torch.testing.assert_close(same, dense, rtol=0, atol=1e-4 * float(dense.std()))
    assert (found - dense).abs().max() > 0.05 * dense.std()
    assert torch.equal(model(ids, use_cache=False).logits, dense)


# ------------------------------------------------------------------------------------------------------------------ solve


def random_problem(seed: int, layers: int, heads: int, num_rules: int, lengths: int = 2, max_rules: int = 2, bound: float = 0.5) -> Problem:
    rng = np.random.default_rng(seed)
    shares = np.sort(rng.random((lengths, num_rules)))
    shares[:, 0], shares[:, -1] = rng.uniform(0.05, 0.2, lengths), 1.0
    falling = np.sort(rng.random((layers, lengths, heads, num_rules)) * rng.lognormal(0, 1.5, (layers, 1, heads, 1)))[..., ::-1].copy()
    falling[..., -1] = 0.0
    return Problem(tuple(falling), (shares,) * layers, bound, max_rules)


def brute_force(problem: Problem, objective: int, limits: dict[int, float], floor: float) -> float | None:
    best = None
    heads, num_rules = problem.costs[0].shape[1:]
    layers = range(len(problem.costs))
    own = [choice for choice in itertools.product(range(num_rules), repeat=heads) if len(set(choice)) <= problem.max_rules]
    for plan in itertools.product(own, repeat=len(layers)):
        losses = sum(problem.costs[i][:, range(heads), plan[i]].sum(-1) for i in layers)
        means = sum(problem.densities[i][:, plan[i]].sum(-1) for i in layers) / problem.num_heads
        fits = (means <= problem.bound + 1e-9).all() and (means >= floor * problem.bound - 1e-9).all() and all(losses[k] <= v + 1e-9 for k, v in limits.items())
        if fits and (best is None or losses[objective] < best):
            best = float(losses[objective])
    return best


@pytest.mark.parametrize("max_rules", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_small_plans_are_optimal(seed: int, max_rules: int) -> None:
    problem = random_problem(seed, 2, 3, 4, max_rules=max_rules)
    for floor in (0.0, 0.9):
        best = brute_force(problem, 1, {}, floor)
        found = best_plan(problem, 1, floor=floor)
        assert (found is None) == (best is None)
        if found is not None:
            assert found.losses[1] == pytest.approx(best)
            limits = {0: found.losses[0] * 0.9}
            tighter = best_plan(problem, 1, limits, floor)
            expected = brute_force(problem, 1, limits, floor)
            assert (None if tighter is None else pytest.approx(tighter.losses[1])) == expected


@pytest.mark.parametrize("max_rules", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_generated_allocations_are_as_good_as_they_claim(seed: int, max_rules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconvert.surgery.spans.solve._SMALL", 0)
    problem = random_problem(seed, 3, 2, 5, max_rules=max_rules, bound=0.6)
    best, found = brute_force(problem, 0, {}, 0.0), best_plan(problem, 0, floor=0.0)
    assert best is not None
    assert found is not None
    assert best - 1e-9 <= found.losses[0]
    assert found.losses[0] * (1 - found.gap) <= best + 1e-9
    assert max(found.densities) <= 0.6 + 1e-6
    assert all(len(set(own)) <= max_rules for own in found.choice)


def test_plans_that_no_generated_allocation_allows_are_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconvert.surgery.spans.solve._SMALL", 0)
    monkeypatch.setattr(_Allocations, "_integer", lambda *args: None)
    problem = random_problem(1, 3, 2, 5)
    found = best_plan(problem, 0, floor=0.0)
    assert found is not None
    assert found.losses[0] == pytest.approx(brute_force(problem, 0, {}, 0.0), rel=2e-3)


def test_a_large_model_is_planned_close_to_the_bound() -> None:
    rng = np.random.default_rng(0)
    lengths, layers, heads = (2048, 4096, 8192), 32, 8
    space = search_space(lengths)
    reach, weight = rng.lognormal(np.log(800), 1.3, (layers, heads, 1)), rng.lognormal(0, 1.5, (layers, heads, 1))
    widths = np.array([[min(n, rule.alpha + rule.beta * n) for rule in space] for n in lengths])
    costs = np.stack([weight * (np.exp(-w / reach) - np.exp(-n / reach)) for n, w in zip(lengths, widths, strict=True)], 1)
    problem = Problem(tuple(costs), (np.array([[density(rule, n, 64) for rule in space] for n in lengths]),) * layers, 0.5, 2)
    found = best_plan(problem, 2)
    assert found is not None
    assert found.gap < 0.01
    assert all(0.45 <= share <= 0.5 + 1e-6 for share in found.densities)
    assert all(len(set(own)) <= 2 for own in found.choice)


def test_a_front_holds_the_best_plan_of_each_length_and_no_dominated_one() -> None:
    problem = random_problem(3, 3, 4, 6, lengths=2)
    front, notes = pareto(problem)
    assert notes == []
    for k in (0, 1):
        alone = best_plan(problem, k)
        assert alone is not None
        assert min(plan.losses[k] for plan in front) == pytest.approx(alone.losses[k])
    assert len(front) > 1
    for one, other in itertools.permutations(front, 2):
        assert any(a < b for a, b in zip(one.losses, other.losses, strict=True))


def test_one_candidate_is_a_uniform_plan_and_two_are_duo_attention() -> None:
    costs = np.array([[[5.0, 0.0], [1.0, 0.0], [0.1, 0.0], [3.0, 0.0]]])
    shares = np.array([[0.25, 1.0]])
    (duo,), _ = pareto(Problem((costs[0][None],), (shares,), 0.7, 2))
    assert duo.choice == ((1, 0, 0, 1),)
    (uniform,), notes = pareto(Problem((costs[0][None, :, :1],), (shares[:, :1],), 0.7, 2))
    assert uniform.choice == ((0, 0, 0, 0),)
    assert "some hold less" in notes[0]


def test_a_density_below_the_sparsest_rules_is_refused_with_what_there_is() -> None:
    found = error_of(lambda: pareto(Problem((np.ones((2, 3, 2)),), (np.array([[0.4, 1.0], [0.3, 1.0]]),), 0.2, 2)))
    assert found.code == "density-unreachable"
    assert "40.0%, 30.0%" in str(found.expected)


def test_too_many_sets_of_rules_are_refused() -> None:
    problem = Problem((np.ones((1, 32, 60)),), (np.linspace(0.1, 1, 60)[None],), 0.5, 6)
    assert error_of(lambda: _Allocations(problem)).code == "search-too-large"


def test_what_the_solver_prints_does_not_mix_with_results(capfd: pytest.CaptureFixture[str]) -> None:
    with _results_alone_on_stdout():
        ctypes.CDLL(None).puts(b"chatter")
    print("result")
    assert capfd.readouterr() == ("result\n", "chatter\n")


# -------------------------------------------------------------------------------------------------------------- plan files

SITES = [Site(idx, f"layers.{idx}", "LlamaAttention", 4, 2, 8, 0.3) for idx in range(2)]


def plan_file(path: Path, alphas: Any, betas: Any) -> Path:
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return path


def test_a_written_plan_reads_back(tmp_path: Path) -> None:
    rules = {0: (Rule(-1024, 0.5), Rule(64, 0.0)), 1: (DENSE, Rule(3, 0.125))}
    write_plan(tmp_path / "plan.json", rules, SITES)
    assert np.shape(json.loads((tmp_path / "plan.json").read_text())["alphas"]) == (2, 4)
    assert read_plan(tmp_path / "plan.json", SITES) == (rules, [])


def test_query_heads_of_a_kv_head_take_the_rule_that_shows_most(tmp_path: Path) -> None:
    path = plan_file(tmp_path / "p.json", [[0, 4096.0, 64, 64], [1, 1, 2, 2]], [[0.75, 0, 0, 0], [0] * 4])
    rules, notes = read_plan(path, SITES)
    assert rules == {0: (Rule(0, 0.75), Rule(64, 0.0)), 1: (Rule(1, 0.0), Rule(2, 0.0))}
    assert notes == [
        "1 KV heads serve query heads with different rules in p.json: each took the one that shows most, so the cache is larger than planned there."
    ]


@pytest.mark.parametrize(
    ("alphas", "betas", "code", "text"),
    [
        ([[1, 1]], [[0, 0]], "plan-file-shape", "has rules for 1 layers"),
        ([[1] * 3] * 2, [[0] * 3] * 2, "plan-file-shape", "has 3 rules for layer 0"),
        ([[1] * 2] * 2, [[0] * 4] * 2, "plan-file-shape", "different shapes"),
        ([[1] * 2] * 2, [[0, 1.5]] * 2, "plan-file-invalid", "beta of 1.5 in layer 0"),
        ([["a", 1]] * 2, [[0, 0]] * 2, "plan-file-invalid", "alphas that are not"),
        (5, [[0, 0]] * 2, "plan-file-invalid", "alphas that are not"),
    ],
)
def test_plans_of_another_model_are_refused(tmp_path: Path, alphas: Any, betas: Any, code: str, text: str) -> None:
    found = error_of(lambda: read_plan(plan_file(tmp_path / "p.json", alphas, betas), SITES))
    assert found.code == code
    assert text in found.message


def test_files_that_are_no_plans_are_refused(tmp_path: Path) -> None:
    assert error_of(lambda: read_plan(tmp_path / "none.json", SITES)).code == "plan-file-missing"
    (tmp_path / "bad.json").write_text("{")
    assert error_of(lambda: read_plan(tmp_path / "bad.json", SITES)).code == "plan-file-invalid"
    (tmp_path / "other.json").write_text('{"alphas": []}')
    assert "lacks" in error_of(lambda: read_plan(tmp_path / "other.json", SITES)).message


# ------------------------------------------------------------------------------------------------------------------- whole


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A search for layers 1 and 2 of a tiny model whose layer 0 has rules of its own."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(resolve("demo"))
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "bos_token_id": 0})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 4.0)
    own = MoaConfig(alphas=8, betas=0.25, num_sinks=4)
    search = {"lengths": (192, 288), "num_samples": 2, "response_tokens": 8}
    config = MoaConfig(density=0.5, num_sinks=4, search=search)
    sites, settings = find_sites(model.config), {0: own, 1: config, 2: config}
    data, cache = DataConfig(), tmp_path_factory.mktemp("cache")
    phases: list[str] = []
    found = search_spans(model, tokenizer, sites, settings, data, cache=cache, progress=lambda phase, done, total: phases.append(f"{phase} {done}/{total}"))
    return model, tokenizer, sites, settings, data, cache, found, phases


def test_a_search_decides_the_layers_without_rules_within_the_density(searched: Any) -> None:
    *_, found, phases = searched
    assert found.chosen in found.front
    assert found.validation_length == 432
    assert set(found.dense_losses) == {192, 288, 432}
    for plan in found.front:
        assert {idx: len(own) for idx, own in plan.rules.items()} == {1: 2, 2: 2}
        for length in (192, 288):
            mean = np.mean([density(rule, length, 4) for own in plan.rules.values() for rule in own])
            assert plan.densities[length] == pytest.approx(mean)
            assert mean <= 0.5 + 1e-6
    assert found.chosen.validation_loss == min(plan.validation_loss for plan in found.front)
    assert list(found.seconds) == ["samples", "influence", "plans", "validation"]
    assert phases[-1] == f"validation {2 * (len(found.front) + 1)}/{2 * (len(found.front) + 1)}"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["front"][found.front.index(found.chosen)] == found.chosen.to_dict()


def test_plans_are_tried_with_the_rules_that_other_layers_have(searched: Any) -> None:
    from attnconvert.distill.calibration import make_calibration

    model, tokenizer, _, _, data, cache, found, _ = searched
    made = make_calibration(model, tokenizer, data, (192, 288), validation_length=432, num_samples=2, response_tokens=8, cache=cache)
    assert made.from_cache
    sinks = dict.fromkeys(range(3), 4)
    rules = {0: (Rule(8, 0.25),) * 2, **found.chosen.rules}
    dense, loss = expected_losses(model, made.items[432], [{}, rules], sinks)
    assert dense == pytest.approx(found.dense_losses[432])
    assert loss == pytest.approx(found.chosen.validation_loss)
    assert loss > dense  # by the divergence


def test_a_uniform_plan_is_tried_too(searched: Any) -> None:
    *_, found, _ = searched
    uniform = [plan for plan in found.front if len({rule for own in plan.rules.values() for rule in own}) == 1]
    assert len(uniform) == 1
    assert found.chosen.validation_loss <= uniform[0].validation_loss


def test_layers_that_are_planned_together_share_their_settings(searched: Any) -> None:
    model, tokenizer, sites, settings, data, cache, *_ = searched
    other = {**settings, 2: settings[2].model_copy(update={"density": 0.7})}
    found = error_of(lambda: search_spans(model, tokenizer, sites, other, data, cache=cache))
    assert (found.code, found.where) == ("search-differs", "layer 2")


def test_the_validation_length_is_one_that_was_not_profiled(searched: Any) -> None:
    model, tokenizer, sites, settings, data, cache, *_ = searched
    config = settings[1].model_copy(update={"search": settings[1].search.model_copy(update={"validation_length": 288})})
    assert error_of(lambda: search_spans(model, tokenizer, sites, {1: config}, data, cache=cache)).code == "validation-length"


def heat_map(layers: int, heads: int) -> SpanMap:
    return SpanMap(4096, tuple(range(layers)), tuple(tuple((layer + head) % 11 / 10 for head in range(heads)) for layer in range(layers)))


@pytest.mark.parametrize(("layers", "heads"), [(32, 8), (80, 64), (4, 128)])
def test_heat_maps_fit_a_terminal_and_say_the_same_without_colour(layers: int, heads: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80, no_color=True).print(render_heat_map(heat_map(layers, heads)))
    lines = stream.getvalue().splitlines()
    body = [line for line in lines if line[:5].strip().isdigit()]
    assert len(body) == layers
    assert max(map(len, lines)) <= 80
    assert body[3].split()[1:] == (["30", "40", "50", "60", "70", "80", "90", "100"] if heads == 8 else ["3456789#012" * 5 + "3456789#0"])


def test_a_plans_map_counts_kept_layers_as_whole() -> None:
    moa = {"alphas": [8, 0], "betas": [0.0, 1.0], "num_sinks": 2}
    rows = (
        LayerPlan(0, "a", 4, 2, 8, None),
        LayerPlan(1, "b", 4, 2, 8, "moa", moa),
        LayerPlan(2, "c", 4, 2, 8, "moa", {"alphas": 18, "betas": 0.0, "num_sinks": 2}),
        LayerPlan(3, "d", 4, 2, 8, "hedgehog", {}),
        LayerPlan(4, "e", 4, 2, 8, "moa", {"alphas": None, "betas": None, "num_sinks": 2}),
    )
    found = span_heat_map(ConversionPlan("llama", rows), 40)
    assert found.densities == ((1.0, 1.0), (0.25, 1.0), (0.5, 0.5), (None, None), (None, None))
    assert found.mean == pytest.approx(4.25 / 6)


def test_a_heat_map_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for layers, heads in ((32, 8), (80, 64)):
        path = draw_heat_map(heat_map(layers, heads), tmp_path / f"{layers}.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_density_that_no_plan_reaches_is_refused_before_any_sample_is_made(searched: Any, tmp_path: Path) -> None:
    model, tokenizer, sites, settings, data, *_ = searched
    config = settings[1].model_copy(update={"density": 0.01})
    assert error_of(lambda: search_spans(model, tokenizer, sites, {1: config}, data, cache=tmp_path)).code == "density-unreachable"
    assert list(tmp_path.iterdir()) == []
