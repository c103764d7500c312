"""Recall tests: that the prompts are what they say, that models which can, do, and that models which cannot score chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnconvert import embedded
from attnconvert.convert.recall import (
    candidate_scores,
    mqar_prompts,
    mqar_result,
    mqar_scores,
    needle_prompts,
    needle_results,
    passkey_prompts,
    passkey_result,
    rank_right_key,
    wilson_interval,
    word_tokens,
)

CPU = torch.device("cpu")
VOCAB = 300


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # logits of a spread that makes KL and ranks mean something
    )
    return LlamaForCausalLM(config).eval()


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: digits are single tokens, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE that merges some digits, so that candidate keys differ in token count."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([f" {number * number}" for number in range(3000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


# ---------------------------------------------------------------- passkey recall


class _Induction:
    """A model that continues with what followed the longest earlier match of its last tokens, seeing only `reach` tokens back."""

    def __init__(self, reach: int | None = None):
        self.reach = reach

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0, past_key_values: Any = None) -> Any:
        seen = input_ids if past_key_values is None else torch.cat([past_key_values.seen, input_ids], dim=1)
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for b in range(len(seen)):
            for t in range(input_ids.shape[1]):
                prefix = seen[b, : seen.shape[1] - input_ids.shape[1] + t + 1].tolist()
                prefix = prefix if self.reach is None else prefix[-self.reach :]
                logits[b, t, self._next(prefix)] = 10.0
        cache = SimpleNamespace(seen=seen)
        cache.batch_repeat_interleave = lambda n: setattr(cache, "seen", cache.seen.repeat_interleave(n, 0))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=cache)

    @staticmethod
    def _next(prefix: list[int]) -> int:
        best, following = 0, 0
        for end in range(1, len(prefix)):
            match = 0
            while match < end and prefix[end - 1 - match] == prefix[-1 - match]:
                match += 1
            if match >= best and match > 0:
                best, following = match, prefix[end]
        return following


class _Uniform:
    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0, past_key_values: Any = None) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB), past_key_values=SimpleNamespace(batch_repeat_interleave=lambda n: None))


def _recall(model: Any, tokenizer: Any, length: int, trials: int, window: int | None) -> Any:
    prompts = passkey_prompts(tokenizer, length, trials, window, seed=0)
    assert prompts is not None
    return passkey_result("model", prompts, torch.cat(list(candidate_scores(model, prompts, CPU))))


def test_a_model_that_copies_recalls_every_key(tokenizer: PreTrainedTokenizerFast) -> None:
    result = _recall(_Induction(), tokenizer, 320, 6, window=None)
    assert result.accuracy == 1
    assert result.mrr == 1
    assert result.by_third == (1, 1, 1)


def test_a_model_that_sees_two_windows_recalls_nothing_beyond_the_window(tokenizer: PreTrainedTokenizerFast) -> None:
    window = 80
    result = _recall(_Induction(reach=2 * window), tokenizer, 480, 6, window=window)
    assert result.beyond_window is True
    assert result.accuracy <= 1 / 6


def test_a_uniform_model_scores_chance_because_ties_are_shared(tokenizer: PreTrainedTokenizerFast) -> None:
    result = _recall(_Uniform(), tokenizer, 320, 3, window=None)
    assert result.accuracy == pytest.approx(0.1)
    assert result.mrr == pytest.approx(sum(1 / k for k in range(1, 11)) / 10)


def test_a_model_without_knowledge_scores_near_chance(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = passkey_prompts(tokenizer, 256, 200, None, seed=0)
    assert prompts is not None
    with torch.no_grad():
        result = passkey_result("random", prompts, torch.cat(list(candidate_scores(teacher, prompts, CPU))))
    assert result.ci95[0] < 0.1 < result.ci95[1]


def test_nan_scores_never_count_as_recall() -> None:
    credit, reciprocal = rank_right_key(torch.tensor([[math.nan] + [-3.0] * 9, [math.nan] * 10]))
    assert credit.tolist() == pytest.approx([0, 0.1])
    assert reciprocal[0] == pytest.approx(0.1)


def test_rank_counts_the_better_candidates() -> None:
    scores = torch.arange(10.0).flip(0).repeat(3, 1)  # the right key is best ...
    scores[1, 0] = 7.5  # ... third ...
    scores[2, 0] = -1.0  # ... last
    credit, reciprocal = rank_right_key(scores)
    assert credit.tolist() == [1, 0, 0]
    assert reciprocal.tolist() == pytest.approx([1, 1 / 2, 1 / 10])


@pytest.mark.parametrize("make_tokenizer", [bytes_tokenizer, merging_tokenizer])
def test_scores_equal_a_full_forward_of_each_candidate(teacher: LlamaForCausalLM, make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    prompts = passkey_prompts(tokenizer, 256, 3, None, seed=0)
    assert prompts is not None
    if make_tokenizer is merging_tokenizer:
        assert len(set(prompts.answer_mask.sum(dim=-1).flatten().tolist())) > 1, "candidates must differ in token count"
    with torch.no_grad():
        scores = torch.cat(list(candidate_scores(teacher, prompts, CPU)))
        for n, context in enumerate(prompts.context):
            for c in range(10):
                answer = prompts.answers[n, c][prompts.answer_mask[n, c]]
                logp = F.log_softmax(teacher(input_ids=torch.cat([context, answer])[None]).logits[0].double(), dim=-1)
                expected = logp[len(context) - 1 : -1].gather(1, answer[:, None]).sum().item()
                assert scores[n, c].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("make_tokenizer", [bytes_tokenizer, merging_tokenizer])
def test_prompts_read_as_promised(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    prompts = passkey_prompts(tokenizer, 420, 9, 40, seed=3)
    assert prompts is not None
    assert prompts.beyond_window() is True
    assert prompts.distance.min() >= 80
    assert prompts.context.shape[1] + prompts.answers.shape[2] == 420
    fillers = set()
    for n, context in enumerate(prompts.context):
        text = tokenizer.decode(context)
        candidates = [tokenizer.decode(prompts.answers[n, c][prompts.answer_mask[n, c]]) for c in range(10)]
        key = candidates[0].strip()
        assert all(candidate[0] == " " and candidate.strip().isdigit() and len(candidate) == 6 for candidate in candidates)
        assert len(set(candidates)) == 10
        assert text.count(f" The pass key is {key}. Remember it. {key} is the pass key.") == 1
        assert text.endswith(" What is the pass key? The pass key is")
        assert all(candidate.strip() not in text for candidate in candidates[1:])
        after = text.split(" is the pass key.")[1]
        assert len(tokenizer(after)["input_ids"]) == prompts.distance[n]
        sentences = after.split(". ")[:-1]
        fillers.update(sentences)
        assert len(set(sentences)) == len(sentences)
    assert len(fillers) > 9
    assert sorted(prompts.part.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (prompts.distance[prompts.part == 0].min() > prompts.distance[prompts.part == 2].max()).item()


def test_prompts_are_a_function_of_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (passkey_prompts(tokenizer, 300, 2, None, seed=seed) for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.context, again.context)
    assert not torch.equal(first.context, other.context)


def test_a_beginning_of_sequence_token_is_kept_when_the_tokenizer_adds_one(tokenizer: PreTrainedTokenizerFast) -> None:
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.add_special_tokens(["<s>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    prompts = passkey_prompts(with_bos, 256, 2, None, seed=0)
    assert prompts is not None
    assert (prompts.context[:, 0] == with_bos.bos_token_id).all()
    assert (prompts.context[:, 1:] != with_bos.bos_token_id).all()
    assert prompts.context.shape[1] + prompts.answers.shape[2] == 256


def test_a_length_within_reach_of_the_window_is_marked(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = passkey_prompts(tokenizer, 256, 2, 128, seed=0)
    assert prompts is not None
    assert prompts.beyond_window() is False


def test_wilson_interval_matches_published_values() -> None:
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


# ---------------------------------------------------------------- needles


@pytest.mark.parametrize("make_tokenizer", [bytes_tokenizer, merging_tokenizer])
def test_needle_prompts_hold_every_name_and_ask_for_the_one_at_the_depth(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    prompts = needle_prompts(tokenizer, 1400, 3, 2, 4, 100, seed=0)
    assert prompts is not None
    assert prompts.context.shape[1] + prompts.answers.shape[2] == 1400
    assert prompts.part.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (prompts.distance.diff() < 0).all()  # deeper and deeper
    for n, context in enumerate(prompts.context):
        text = tokenizer.decode(context)
        candidates = [tokenizer.decode(prompts.answers[n, c][prompts.answer_mask[n, c]]).strip() for c in range(10)]
        assert len(set(candidates)) == 10
        name = text.rsplit("What is the pass key of ")[-1].split("?")[0]
        assert text.endswith(f" What is the pass key of {name}? The pass key of {name} is")
        needles = [f" The pass key of {name} is {candidates[0]}. Remember it. {candidates[0]} is the pass key of {name}."]
        others = [part.split(" is ")[0] for part in text.split(" The pass key of ")[1:-1] if not part.startswith(f"{name} is")]
        assert len(set(others)) == 2
        assert {key for key in candidates if key in text} == set(candidates[:3]), "the others' keys are candidates, the rest is not shown"
        assert text.count(needles[0]) == 1
        after = text.split(needles[0])[1]
        assert len(tokenizer(after, add_special_tokens=False)["input_ids"]) == prompts.distance[n]


def test_a_model_that_copies_finds_the_right_one_of_several_needles(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = needle_prompts(tokenizer, 1000, 2, 1, 2, None, seed=0)
    assert prompts is not None
    results = needle_results("model", 2, 2, prompts, torch.cat(list(candidate_scores(_Induction(), prompts, CPU))))
    assert [(row.depth, row.accuracy, row.beyond_window) for row in results] == [(0.25, 1, None), (0.75, 1, None)]


def test_a_cell_is_beyond_the_window_inside_it_or_neither(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = needle_prompts(tokenizer, 1000, 1, 3, 5, 150, seed=0)
    assert prompts is not None
    results = needle_results("model", 1, 5, prompts, torch.zeros(15, 10))
    assert [row.accuracy for row in results] == pytest.approx([0.1] * 5)
    for part, row in enumerate(results):
        distance = prompts.distance[prompts.part == part]
        expected = True if distance.min() >= 300 else False if distance.max() <= 150 - 16 else None
        assert row.beyond_window is expected
    assert [row.beyond_window for row in results][::4] == [True, None]
    wide = needle_prompts(tokenizer, 1000, 1, 3, 5, 400, seed=0)
    assert wide is not None
    assert needle_results("model", 1, 5, wide, torch.zeros(15, 10))[-1].beyond_window is False


def test_needles_that_would_touch_are_not_built(tokenizer: PreTrainedTokenizerFast) -> None:
    assert needle_prompts(tokenizer, 480, 1, 1, 2, None, seed=0) is not None
    assert needle_prompts(tokenizer, 480, 4, 1, 2, None, seed=0) is None


# ---------------------------------------------------------------- MQAR


class _Lookup:
    """Continues with what followed the last earlier occurrence of a token among the last `reach` tokens; VOCAB logits."""

    def __init__(self, reach: int):
        self.reach = reach

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for b, row in enumerate(input_ids.tolist()):
            for t, token in enumerate(row):
                earlier = [i for i in range(max(0, t - self.reach + 1), t) if row[i] == token]
                if earlier:
                    logits[b, t, row[earlier[-1] + 1]] = 10.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def _mqar(model: Any, tokenizer: Any, num_pairs: int, trials: int) -> Any:
    prompts = mqar_prompts(tokenizer, VOCAB, num_pairs, trials, seed=0)
    assert prompts is not None
    return mqar_result("model", prompts, torch.cat(list(mqar_scores(model, prompts, CPU))))


def test_a_lookup_solves_mqar_and_one_with_a_window_solves_what_it_sees(tokenizer: PreTrainedTokenizerFast) -> None:
    assert _mqar(_Lookup(10_000), tokenizer, 8, 16).accuracy == 1
    blind = _mqar(_Lookup(2), tokenizer, 8, 16)
    assert blind.accuracy == pytest.approx(1 / 8) == blind.chance
    partial = _mqar(_Lookup(40), tokenizer, 32, 64)
    assert 0.1 < partial.accuracy < 0.9


def test_mqar_prompts_show_each_key_once_before_it_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = mqar_prompts(tokenizer, VOCAB, 20, 40, seed=1)
    assert prompts is not None
    assert prompts.input_ids.shape == (3, 8 + 2 * 20 + 2 * 16 - 1)
    for row, values, asked in zip(prompts.input_ids.tolist(), prompts.values.tolist(), prompts.asked.tolist(), strict=True):
        shown, queries = row[: 8 + 40], row[8 + 40 :]
        assert len(set(shown)) == len(shown)
        assert shown[9::2] == values
        assert queries[::2] == [shown[8 + 2 * pair] for pair in asked]
        assert queries[1::2] == [values[pair] for pair in asked[:-1]]


def test_mqar_scores_equal_a_plain_forward(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = mqar_prompts(tokenizer, VOCAB, 5, 10, seed=0)
    assert prompts is not None
    with torch.no_grad():
        scores = torch.cat(list(mqar_scores(teacher, prompts, CPU)))
        logits = teacher(input_ids=prompts.input_ids).logits
    for n in range(2):
        for q in range(5):
            at = logits[n, 8 + 10 + 2 * q]
            right = prompts.values[n, prompts.asked[n, q]]
            others = [value for value in prompts.values[n].tolist() if value != right]
            assert scores[n, q, 0].item() == pytest.approx(at[right].item(), abs=1e-5)
            assert sorted(scores[n, q, 1:].tolist()) == pytest.approx(sorted(at[others].tolist()), abs=1e-5)


def test_queries_of_one_prompt_that_fail_together_widen_the_interval(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = mqar_prompts(tokenizer, VOCAB, 16, 16 * 10, seed=0)
    assert prompts is not None
    together, mixed = torch.zeros(10, 16, 16), torch.zeros(10, 16, 16)
    together[:5, :, 0], together[5:, :, 1] = 1, 1
    mixed[:, ::2, 0], mixed[:, 1::2, 1] = 1, 1
    wide, narrow = (mqar_result("model", prompts, scores) for scores in (together, mixed))
    assert wide.accuracy == narrow.accuracy == 0.5
    assert wide.ci95 == pytest.approx(wilson_interval(5, 10))
    assert narrow.ci95 == pytest.approx(wilson_interval(80, 160))


def test_too_many_pairs_for_the_vocabulary_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    assert mqar_prompts(tokenizer, VOCAB, 130, 16, seed=0) is None


def test_word_tokens_of_a_real_vocabulary_are_words() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir())
    words = [tokenizer.decode(i) for i in word_tokens(tokenizer, len(tokenizer))]
    assert len(words) > 1000
    assert all(word[0] == " " and word[1:].isalpha() and word.islower() for word in words)
