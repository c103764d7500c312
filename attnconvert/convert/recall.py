"""Recall of a model: pass keys, named needles at every depth, and associative recall in token space (MQAR).

Shapes: N prompts, T tokens of a prompt, C candidates, A answer tokens, P key-value pairs, Q queries of a prompt, V vocabulary.

- Pass key: one five-digit key in filler text; the right key must get the highest log-probability of ten candidates. The key lies beyond the
  exact window wherever the prompt is long enough, so the figure is one of memory.
- Needles: k names with a key each, one of them asked for, at every depth of the prompt (a heat map). Keys of the other needles are among the
  ten candidates, so remembering that there was a key is not enough: it must be the right one.
- MQAR (https://arxiv.org/abs/2312.04927): a list of key-value pairs, each one word token, then some of the keys again. The right value must rank
  first among the values shown. No language, no digits: what is left is the lookup. A pretrained model does it without training, because
  continuing a repeated sequence is what induction heads do; how well is what the teacher's figure says.

The same prompts go to every model, and the teacher's figure stands beside every other: what it cannot recall, a student cannot lose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnconvert.convert.evaluate import EvalProgress, Variant
    from attnconvert.distill.config import EvalConfig

NUM_CANDIDATES = 10
# A block window of size w sees up to 2w keys, so this many windows back is out of reach for every window kind.
WINDOWS_BACK = 2
# The key must not sit on the attention sinks, which every hybrid keeps exact.
LEAD_TOKENS = 8
# A needle names its key twice, the second time at most so many tokens before its end: a window that reaches this far sees the key.
KEY_TOKENS = 16
# Queries of one MQAR prompt. More cost nothing but say little: those of one prompt fail together.
MQAR_QUERIES = 16
# Word tokens MQAR draws from. Tokenizers list tokens by how common they were, and rare ones are badly trained.
MQAR_WORDS = 4096


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class PasskeyResult:
    """Passkey recall of one model at one length.

    Attributes:
        name: the model, as in `Quality.name`.
        length: tokens of context plus answer.
        num_trials: prompts.
        accuracy: share of prompts whose right key ranks first among ten (chance 0.1; a tie counts 1/number tied).
        ci95: 95 % Wilson interval of the accuracy.
        mrr: mean reciprocal rank of the right key (chance 0.293).
        by_third: accuracy for keys in the early, middle and late third of the range of depths that was drawn from; None without a trial there.
        distance: smallest and largest number of tokens between the end of the needle and the answer.
        beyond_window: every needle lies entirely outside the window of the token that answers; None when no window was given.
    """

    name: str
    length: int
    num_trials: int
    accuracy: float
    ci95: tuple[float, float]
    mrr: float
    by_third: tuple[float | None, float | None, float | None]
    distance: tuple[int, int]
    beyond_window: bool | None


@dataclass(frozen=True)
class NeedleResult:
    """Recall of one model with several needles, one cell of the heat map.

    Attributes:
        name: the model, as in `Quality.name`.
        num_needles: names with a key in the text; one is asked for.
        length: tokens of context plus answer.
        depth: centre of the depth bucket of the needle asked for; 0 = start of the text, 1 = right before the question.
        num_trials: prompts.
        accuracy: share of prompts whose right key ranks first among ten (chance 0.1).
        ci95: 95 % Wilson interval of the accuracy.
        beyond_window: every needle asked for lies entirely outside the window of the token that answers (True), or surely inside it (False);
            None where some are and some are not, and when no window was given.
    """

    name: str
    num_needles: int
    length: int
    depth: float
    num_trials: int
    accuracy: float
    ci95: tuple[float, float]
    beyond_window: bool | None


@dataclass(frozen=True)
class MqarResult:
    """Associative recall in token space of one model.

    Attributes:
        name: the model, as in `Quality.name`.
        num_pairs: key-value pairs in the prompt.
        length: tokens of the prompt.
        num_trials: queries, of all prompts.
        accuracy: share of queries whose value ranks first among the values shown.
        ci95: 95 % Wilson interval, widened for queries of one prompt failing together.
        chance: 1 / num_pairs.
    """

    name: str
    num_pairs: int
    length: int
    num_trials: int
    accuracy: float
    ci95: tuple[float, float]
    chance: float


def measure_recall(
    variants: Sequence[Variant],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    config: EvalConfig,
    *,
    window: int | None,
    max_length: int | None,
    device: torch.device,
    seed: int,
    progress: EvalProgress | None,
    notes: list[str],
) -> tuple[tuple[PasskeyResult, ...], tuple[NeedleResult, ...], tuple[MqarResult, ...]]:
    """All recall tests that the config asks for.

    Args:
        variants: the models; all get the same prompts.
        tokenizer: the student's.
        lengths: passkey lengths in tokens, none above `max_length`.
        config: the trials, needle and MQAR settings.
        window: the window in tokens, None when there is no single one.
        max_length: tokens the models were built for, None = no limit.
        device: where inputs are sent.
        seed: of every prompt.
        progress: told about each batch.
        notes: gets a sentence for everything that was left out.
    """
    passkey: list[PasskeyResult] = []
    for length in lengths if config.passkey_trials else ():
        prompts = passkey_prompts(tokenizer, length, config.passkey_trials, window, seed)
        if prompts is None:
            notes.append(f"Passkey length {length} was skipped: needle, question and answer do not fit into {length} tokens of this tokenizer.")
            continue
        for variant, scores in _scored(variants, prompts, device, progress, f"passkey {length}"):
            passkey.append(passkey_result(variant.name, prompts, scores))

    needles: list[NeedleResult] = []
    wanted = sorted(set(config.needle_lengths)) or list(lengths)
    fitting = [length for length in wanted if max_length is None or length <= max_length]
    if config.needle_trials and fitting != wanted:
        too_long = ", ".join(str(length) for length in wanted if length not in fitting)
        notes.append(f"Needle lengths {too_long} were skipped: the models go up to max_position_embeddings = {max_length}.")
    for num_needles in sorted(set(config.needle_counts)) if config.needle_trials else ():
        for length in fitting:
            prompts = needle_prompts(tokenizer, length, num_needles, config.needle_trials, config.needle_depths, window, seed)
            if prompts is None:
                notes.append(f"{_needles(num_needles)} in {length} tokens: skipped, they do not fit with room between them.")
                continue
            for variant, scores in _scored(variants, prompts, device, progress, f"{_needles(num_needles)}, {length}"):
                needles += needle_results(variant.name, num_needles, config.needle_depths, prompts, scores)

    mqar: list[MqarResult] = []
    for num_pairs in sorted(set(config.mqar_pairs)) if config.mqar_trials else ():
        vocab_size = int(variants[0].model.config.get_text_config().vocab_size)
        lookups = mqar_prompts(tokenizer, vocab_size, num_pairs, config.mqar_trials, seed)
        if lookups is None:
            notes.append(f"MQAR with {num_pairs} pairs was skipped: the tokenizer has too few tokens for that many different keys and values.")
        elif max_length is not None and lookups.length > max_length:
            notes.append(f"MQAR with {num_pairs} pairs was skipped: it needs {lookups.length} tokens, the models go up to {max_length}.")
        else:
            for variant in variants:
                parts = []
                with variant.context():
                    for part in mqar_scores(variant.model, lookups, device):
                        parts.append(part)
                        if progress is not None:
                            progress(f"MQAR {num_pairs} pairs, {variant.name}", sum(map(len, parts)), len(lookups.input_ids))
                mqar.append(mqar_result(variant.name, lookups, torch.cat(parts)))
    return tuple(passkey), tuple(needles), tuple(mqar)


def _needles(count: int) -> str:
    return "1 needle" if count == 1 else f"{count} needles"


def _scored(
    variants: Sequence[Variant], prompts: RecallPrompts, device: torch.device, progress: EvalProgress | None, what: str
) -> Iterator[tuple[Variant, torch.Tensor]]:
    """Every variant with its scores [N, C] of the prompts."""
    for variant in variants:
        parts: list[torch.Tensor] = []
        with variant.context():
            for part in candidate_scores(variant.model, prompts, device):
                parts.append(part)
                if progress is not None:
                    progress(f"{what}, {variant.name}", sum(map(len, parts)), len(prompts.context))
        yield variant, torch.cat(parts)


def tokens_per_forward(device: torch.device) -> int:
    """Tokens of one forward pass: enough to keep the device busy, few enough for its memory."""
    return 8192 if device.type == "cuda" else 2048


# ---------------------------------------------------------------- text

_SUBJECTS = (
    "The old gardener", "A quiet neighbour", "The village baker", "My younger cousin", "The tall librarian", "A travelling painter", "The ferry captain",
    "Her music teacher", "The night porter", "A young carpenter", "The museum guide", "Our local doctor", "The mountain guide", "A retired sailor",
    "The weather station", "The small orchestra", "A stray cat", "The morning train", "The river bank", "An empty bench",
)  # fmt: skip
_PREDICATES = (
    "waited beside the bridge", "looked across the valley", "carried a basket of apples", "moved slowly past the church", "stayed close to the harbour",
    "kept a careful diary", "was seen near the market", "enjoyed the mild weather", "stood under the chestnut trees", "followed the narrow path",
    "belonged to the same street", "rested in the afternoon sun", "watched the clouds drift by", "came back from the hills", "listened to the falling rain",
    "sat at a wooden table", "crossed the wide square", "remembered the long summer", "turned towards the lake", "told a short story",
)  # fmt: skip
_TAILS = (
    "before the shops opened", "while the lamps were lit", "as the leaves began to fall", "on a calm Sunday", "until the evening grew cold",
    "without any hurry at all", "during the first week of spring", "when the bells had stopped", "after a late breakfast", "because the road was closed",
    "though nobody had asked", "and then went home again", "with a folded newspaper", "in the soft yellow light", "for the rest of the day",
    "just like the year before",
)  # fmt: skip
_NAMES = (
    "Alice", "Peter", "Maria", "Thomas", "Laura", "Robert", "Emma", "Henry", "Julia", "Oscar", "Clara", "Martin", "Nina", "Victor", "Helen", "Simon",
    "Rosa", "Daniel", "Irene", "Walter",
)  # fmt: skip
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"
_NAMED_NEEDLE = " The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."
_NAMED_QUESTION = " What is the pass key of {name}? The pass key of {name} is"


@dataclass(frozen=True)
class RecallPrompts:
    """Prompts of one length, tokenised. Candidate 0 is the right key.

    Attributes:
        length: tokens of context plus the longest answer.
        context: int64 [N, length - A], everything up to the answer; the start may cut a filler sentence.
        answers: int64 [N, 10, A], the tokens of each candidate, padded on the right with token 0.
        answer_mask: bool [N, 10, A], False on padding.
        distance: int64 [N], tokens between the end of the needle asked for and the answer.
        part: int64 [N], which part of the range of depths the needle was drawn from, 0 = the earliest.
        window: the window in tokens, None when none was given.
    """

    length: int
    context: torch.Tensor
    answers: torch.Tensor
    answer_mask: torch.Tensor
    distance: torch.Tensor
    part: torch.Tensor
    window: int | None

    def beyond_window(self, part: int | None = None) -> bool | None:
        """Whether every needle (of one part of the depths) lies outside the reach of the window; None without a window."""
        distance = self.distance if part is None else self.distance[self.part == part]
        return None if self.window is None else int(distance.min()) >= WINDOWS_BACK * self.window

    def inside_window(self, part: int) -> bool:
        """Whether every needle of one part of the depths names its key inside the smallest window that a block of this size gives."""
        return self.window is not None and int(self.distance[self.part == part].max()) + KEY_TOKENS <= self.window


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer adds one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("", verbose=False)["input_ids"])[:1] == [bos] else []


def _longest_sentence(tokenizer: PreTrainedTokenizerBase) -> int:
    """An upper bound of the tokens of a filler sentence."""
    return sum(max(len(_encode(tokenizer, " " + part)) for part in parts) for parts in (_SUBJECTS, _PREDICATES, _TAILS)) + 3


def _filler(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, longest_sentence: int) -> Callable[[int, str], str]:
    """A function (at_least, tail) -> sentences s with count(s + tail) >= at_least, by less than one sentence."""

    def filler(at_least: int, tail: str) -> str:
        text = ""
        while (missing := at_least - len(_encode(tokenizer, text + tail))) > 0:
            # Counting text costs more than making it, so add many sentences at once; longest_sentence bounds every one from above.
            for _ in range(max(1, missing // longest_sentence)):
                subject, predicate, ending = (words[rng.integers(len(words))] for words in (_SUBJECTS, _PREDICATES, _TAILS))
                text += f" {subject} {predicate} {ending}."
        return text

    return filler


@dataclass(frozen=True)
class _Answers:
    """Candidates after their questions: ids and mask [N, 10, A], and per prompt the question's tokens, shared with every answered form and in all."""

    ids: torch.Tensor
    mask: torch.Tensor
    boundary: list[int]
    question: list[int]


def _answers(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], keys_NC: NDArray[np.int64]) -> _Answers:
    answered = [[_encode(tokenizer, f"{question} {key}") for key in keys] for question, keys in zip(questions, keys_NC, strict=True)]
    encoded = {question: _encode(tokenizer, question) for question in set(questions)}
    # Where a tokenizer merges across the boundary, the merged token belongs to the answer. One boundary per question: prompts differ in nothing else.
    boundary = {question: len(ids) for question, ids in encoded.items()}
    for question, row in zip(questions, answered, strict=True):
        boundary[question] = min(boundary[question], *(_shared_prefix(encoded[question], ids) for ids in row))
    width = max(len(ids) - boundary[question] for question, row in zip(questions, answered, strict=True) for ids in row)
    answers = torch.zeros(len(questions), NUM_CANDIDATES, width, dtype=torch.int64)
    mask = torch.zeros(len(questions), NUM_CANDIDATES, width, dtype=torch.bool)
    for n, (question, row) in enumerate(zip(questions, answered, strict=True)):
        for c, ids in enumerate(row):
            own = ids[boundary[question] :]
            answers[n, c, : len(own)] = torch.tensor(own)
            mask[n, c, : len(own)] = True
    return _Answers(answers, mask, [boundary[question] for question in questions], [len(encoded[question]) for question in questions])


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _keys(rng: np.random.Generator, num_prompts: int) -> NDArray[np.int64]:
    """Ten different five-digit numbers for each prompt, [N, 10]; the first is the right one."""
    return np.stack([rng.choice(np.arange(10_000, 100_000), size=NUM_CANDIDATES, replace=False) for _ in range(num_prompts)])


# ---------------------------------------------------------------- pass key


def passkey_prompts(tokenizer: PreTrainedTokenizerBase, length: int, num_trials: int, window: int | None, seed: int) -> RecallPrompts | None:
    """Build the prompts of one length; None when needle and question do not fit into it. `part` is the third of the depths.

    Each prompt is filler, the needle, filler, the question. The distance from needle to answer is drawn uniformly (one draw from each of
    `num_trials` equal strata) between the question's own length and what the context can hold; where the context is long enough, never below
    2 windows, since a block window of size w sees up to 2w keys: then no key of the needle is visible to the token that answers. Shorter
    lengths cannot test recall beyond the window, draw from the full range and say so. At least 8 filler tokens come first where they fit,
    so that the key is never an attention sink.

    Args:
        tokenizer: any transformers tokenizer; the beginning-of-sequence token is kept when it adds one.
        length: tokens of context plus the longest candidate's tokens.
        num_trials: prompts, at least 1.
        window: see `measure_recall`.
        seed: prompts are a pure function of the arguments.
    """
    rng = np.random.default_rng([seed, length])
    keys_NC = _keys(rng, num_trials)
    answers = _answers(tokenizer, [_QUESTION] * num_trials, keys_NC)
    prefix, boundary, cut = _prefix(tokenizer), answers.boundary[0], answers.question[0] - answers.boundary[0]
    context_length = length - answers.ids.shape[2]
    needle_length = max(len(_encode(tokenizer, _NEEDLE.format(key=keys[0]))) for keys in keys_NC)
    longest_sentence = _longest_sentence(tokenizer)

    # Distances are measured to the first answer token, so they include the question up to the boundary.
    nearest = boundary
    farthest = context_length - len(prefix) - needle_length
    if farthest < nearest:
        return None
    # Filler comes in whole sentences, so a draw may overshoot by one of them.
    latest_draw = max(nearest, farthest - LEAD_TOKENS - longest_sentence)
    if window is not None and latest_draw >= WINDOWS_BACK * window:
        nearest = max(nearest, WINDOWS_BACK * window)

    filler = _filler(tokenizer, rng, longest_sentence)
    contexts, distances, thirds = [], [], []
    for trial, keys in enumerate(keys_NC):
        place = (trial + rng.random()) / num_trials  # 0 = as near as allowed, 1 = as far as possible
        wanted = nearest + round(place * (latest_draw - nearest))
        needle = _NEEDLE.format(key=keys[0])
        after = filler(wanted + cut, _QUESTION)
        before = filler(context_length, needle + after + _QUESTION)
        ids = _encode(tokenizer, before + needle + after + _QUESTION)
        ids = ids[: len(ids) - cut]
        distance = len(ids) - len(_encode(tokenizer, before + needle))
        assert distance <= farthest, f"passkey needle was cut: {distance} > {farthest}"
        contexts.append(prefix + ids[len(ids) - (context_length - len(prefix)) :])
        distances.append(distance)
        # With nothing to draw from (a context just long enough), every needle is as near as can be.
        thirds.append(2 - min(2, int(place * 3)) if latest_draw > nearest else 2)
    return RecallPrompts(length, torch.tensor(contexts), answers.ids, answers.mask, torch.tensor(distances), torch.tensor(thirds), window)


def candidate_scores(model: PreTrainedModel, prompts: RecallPrompts, device: torch.device) -> Iterator[torch.Tensor]:
    """Summed log-probability of every candidate answer, fp32 on the CPU, [n, 10] per batch of prompts.

    The context is encoded once per prompt; its cache is then repeated for the ten candidates. Prompts of a batch have equal length, and
    padding stands behind the answers where a causal model cannot see it, so no mask is needed.
    """
    step = max(1, tokens_per_forward(device) // prompts.length)
    for start in range(0, len(prompts.context), step):
        context = prompts.context[start : start + step].to(device)
        answers = prompts.answers[start : start + step].to(device)
        mask = prompts.answer_mask[start : start + step].to(device)
        n, num_candidates, width = answers.shape
        out = model(input_ids=context, use_cache=True, logits_to_keep=1)
        scores = F.log_softmax(out.logits[:, -1].float(), dim=-1).gather(1, answers[:, :, 0])
        if width > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(num_candidates)
            logits = model(input_ids=answers[:, :, :-1].reshape(n * num_candidates, width - 1), past_key_values=cache, use_cache=True).logits
            logp = F.log_softmax(logits.float(), dim=-1).gather(2, answers[:, :, 1:].reshape(n * num_candidates, width - 1, 1))
            scores = scores + torch.where(mask[:, :, 1:], logp.reshape(n, num_candidates, width - 1), 0.0).sum(dim=-1)
        yield scores.cpu()


def rank_right_key(scores: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Credit and reciprocal rank of candidate 0, both [N], in expectation over a random order of ties.

    Ties must not favour the right answer: a model that scores all ten alike gets 0.1, not 1.

    Args:
        scores: [N, C]; a NaN counts as the worst score.
    """
    values = np.nan_to_num(scores.double().numpy(), nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    greater = (values > values[:, :1]).sum(axis=1)
    equal = (values == values[:, :1]).sum(axis=1)
    credit = np.where(greater == 0, 1 / equal, 0.0)
    reciprocal = np.array([np.mean(1 / np.arange(g + 1, g + e + 1)) for g, e in zip(greater, equal, strict=True)])
    return credit, reciprocal


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share; sensible at 0 and 1, where the normal interval has no width."""
    z = 1.959964
    share, denominator = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / denominator
    # At 0 and 1 the ends are exact; rounding must not push the share out of its own interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def passkey_result(name: str, prompts: RecallPrompts, scores: torch.Tensor) -> PasskeyResult:
    """Sum up the scores [N, 10] of one model on one set of prompts."""
    credit, reciprocal = rank_right_key(scores)
    third = prompts.part.numpy()
    early, middle, late = (float(credit[third == part].mean()) if (third == part).any() else None for part in range(3))
    return PasskeyResult(
        name=name,
        length=prompts.length,
        num_trials=len(credit),
        accuracy=float(credit.mean()),
        ci95=wilson_interval(float(credit.sum()), len(credit)),
        mrr=float(reciprocal.mean()),
        by_third=(early, middle, late),
        distance=(int(prompts.distance.min()), int(prompts.distance.max())),
        beyond_window=prompts.beyond_window(),
    )


# ---------------------------------------------------------------- needles


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase, length: int, num_needles: int, num_trials: int, num_depths: int, window: int | None, seed: int
) -> RecallPrompts | None:
    """Prompts with several named keys, one asked for at each depth; None when they do not fit with filler between them.

    The range from the first place a needle can have (after 8 tokens of filler) to the one right before the question is cut into `num_depths`
    buckets, and the needle asked for is drawn from each of them `num_trials` times. The other needles lie anywhere else. A needle may end up
    to one filler sentence (about 20 tokens) before its bucket says, since filler is not cut.

    Args:
        tokenizer: as for `passkey_prompts`.
        length: tokens of context plus the longest candidate's tokens.
        num_needles: names with a key, 1 to 10.
        num_trials: prompts per depth bucket.
        num_depths: depth buckets; `part` of the result is the bucket.
        window: see `measure_recall`.
        seed: prompts are a pure function of the arguments.
    """
    assert 1 <= num_needles <= NUM_CANDIDATES, "the keys of all needles are candidates"
    rng = np.random.default_rng([seed, length, num_needles, num_depths])
    num_prompts = num_depths * num_trials
    keys_NC = _keys(rng, num_prompts)
    names = [rng.choice(_NAMES, size=num_needles, replace=False) for _ in range(num_prompts)]
    questions = [_NAMED_QUESTION.format(name=prompt[0]) for prompt in names]
    answers = _answers(tokenizer, questions, keys_NC)
    prefix = _prefix(tokenizer)
    context_length = length - answers.ids.shape[2]
    needles = [
        [_NAMED_NEEDLE.format(name=name, key=key) for name, key in zip(prompt, keys[:num_needles], strict=True)]
        for prompt, keys in zip(names, keys_NC, strict=True)
    ]
    needle_length = max(len(_encode(tokenizer, needle)) for prompt in needles for needle in prompt)
    longest_sentence = _longest_sentence(tokenizer)
    nearest = max(answers.boundary)
    farthest = context_length - len(prefix) - needle_length
    latest_draw = farthest - LEAD_TOKENS - longest_sentence
    # Less room than a sentence beside each needle would make the depths of different buckets the same.
    if latest_draw - nearest < num_needles * (needle_length + longest_sentence):
        return None

    filler = _filler(tokenizer, rng, longest_sentence)
    contexts, distances = [], []
    for n, question in enumerate(questions):
        bucket, trial = divmod(n, num_trials)
        depth = (bucket + (trial + rng.random()) / num_trials) / num_depths
        wanted = latest_draw - depth * (latest_draw - nearest)
        places = _spread(rng, wanted, num_needles - 1, nearest, latest_draw, needle_length)
        if places is None:
            return None
        cut = answers.question[n] - answers.boundary[n]
        text, behind_asked = question, ""
        for place, needle in sorted(zip(places, needles[n], strict=True)):
            text = filler(round(place) + cut, text) + text
            if needle is needles[n][0]:
                behind_asked = text
            text = needle + text
        text = filler(context_length, text) + text
        ids = _encode(tokenizer, text)
        ids = ids[: len(ids) - cut]
        distance = len(ids) - len(_encode(tokenizer, text.removesuffix(behind_asked)))
        contexts.append(prefix + ids[len(ids) - (context_length - len(prefix)) :])
        distances.append(distance)
    parts = torch.arange(num_prompts) // num_trials
    return RecallPrompts(length, torch.tensor(contexts), answers.ids, answers.mask, torch.tensor(distances), parts, window)


def _spread(rng: np.random.Generator, first: float, num_others: int, low: int, high: int, gap: int) -> list[float] | None:
    """`first` and places for the others, uniform in [low, high] given that all lie `gap` apart; None when 1000 draws found none."""
    draws = np.concatenate([np.full((1000, 1), first), rng.uniform(low, high, (1000, num_others))], axis=1)
    apart = (np.diff(np.sort(draws, axis=1), axis=1) >= gap).all(axis=1)
    return list(draws[int(apart.argmax())]) if apart.any() else None


def needle_results(name: str, num_needles: int, num_depths: int, prompts: RecallPrompts, scores: torch.Tensor) -> list[NeedleResult]:
    """The cells of one row of the heat map, from the scores [N, 10] of one model."""
    credit, _ = rank_right_key(scores)
    results = []
    for part in range(num_depths):
        own = credit[(prompts.part == part).numpy()]
        results.append(
            NeedleResult(
                name=name,
                num_needles=num_needles,
                length=prompts.length,
                depth=round((part + 0.5) / num_depths, 4),
                num_trials=len(own),
                accuracy=float(own.mean()),
                ci95=wilson_interval(float(own.sum()), len(own)),
                beyond_window=True if prompts.beyond_window(part) else False if prompts.inside_window(part) else None,
            )
        )
    return results


# ---------------------------------------------------------------- associative recall in token space


@dataclass(frozen=True)
class MqarPrompts:
    """Prompts of one number of pairs: lead, k1 v1 k2 v2 ..., then keys again, each with its value behind it.

    Attributes:
        length: tokens T of a prompt; the last one is the last key asked for.
        input_ids: int64 [N, T].
        values: int64 [N, P], the values shown, in order.
        asked: int64 [N, Q], the pair each query asks for.
    """

    length: int
    input_ids: torch.Tensor
    values: torch.Tensor
    asked: torch.Tensor


def word_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Token ids to draw keys and values from: whole lower-case words of two letters or more, the 4096 that come first in the vocabulary.

    A tokenizer without any to speak of (bytes, characters, no Latin script) gives all its tokens but the special ones.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(min(vocab_size, len(tokenizer))) if i not in special]
    # A leading space is written G with a dot (byte-level BPE) or as a low line (SentencePiece).
    words = [i for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if re.fullmatch("[\u0120\u2581][a-z]{2,}", str(token))]
    return words[:MQAR_WORDS] if len(words) >= MQAR_WORDS // 16 else ids


def mqar_prompts(tokenizer: PreTrainedTokenizerBase, vocab_size: int, num_pairs: int, num_trials: int, seed: int) -> MqarPrompts | None:
    """Prompts for at least `num_trials` queries; None when the tokenizer has too few tokens for keys and values that all differ.

    Args:
        tokenizer: the student's.
        vocab_size: of the models; tokens beyond it are not used.
        num_pairs: P; chance is 1 / P.
        num_trials: queries wanted over all prompts; each prompt asks min(P, 16).
        seed: prompts are a pure function of the arguments.
    """
    rng = np.random.default_rng([seed, num_pairs])
    pool = np.array(word_tokens(tokenizer, vocab_size))
    if len(pool) < 2 * num_pairs + LEAD_TOKENS:
        return None
    num_queries = min(num_pairs, MQAR_QUERIES)
    prefix = _prefix(tokenizer)
    rows, values, asked = [], [], []
    for _ in range(-(-num_trials // num_queries)):
        drawn = rng.choice(pool, size=2 * num_pairs + LEAD_TOKENS, replace=False)
        lead, pairs = drawn[:LEAD_TOKENS], drawn[LEAD_TOKENS:].reshape(num_pairs, 2)
        queries = rng.choice(num_pairs, size=num_queries, replace=False)
        rows.append([*prefix, *lead, *pairs.flatten(), *pairs[queries].flatten()[:-1]])
        values.append(pairs[:, 1])
        asked.append(queries)
    return MqarPrompts(len(rows[0]), torch.tensor(np.array(rows)), torch.tensor(np.array(values)), torch.tensor(np.array(asked)))


def mqar_scores(model: PreTrainedModel, prompts: MqarPrompts, device: torch.device) -> Iterator[torch.Tensor]:
    """Logits of the values shown after each query, the right one first, fp32 on the CPU, [n, Q, P] per batch of prompts."""
    num_queries = prompts.asked.shape[1]
    step = max(1, tokens_per_forward(device) // prompts.length)
    for start in range(0, len(prompts.input_ids), step):
        input_ids = prompts.input_ids[start : start + step].to(device)
        # The queries and the values between them end the prompt: every second of the last 2 Q - 1 positions is a query.
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=2 * num_queries - 1).logits[:, ::2].float().cpu()
        values, asked = prompts.values[start : start + step], prompts.asked[start : start + step]
        scores = logits.gather(2, values[:, None].expand(-1, num_queries, -1))
        right = scores.gather(2, asked[:, :, None])
        # The first value takes the place of the right one.
        yield torch.cat([right, scores.scatter(2, asked[:, :, None], scores[:, :, :1])[:, :, 1:]], dim=2)


def mqar_result(name: str, prompts: MqarPrompts, scores: torch.Tensor) -> MqarResult:
    """Sum up the scores [N, Q, P] of one model."""
    num_prompts, num_queries, num_pairs = scores.shape
    credit = rank_right_key(scores.flatten(0, 1))[0]
    share, trials = float(credit.mean()), len(credit)
    # Queries of one prompt fail together, so they are worth fewer than their number: the design effect, variance of the prompts' means over
    # what independent queries would have.
    spread = float(np.var(credit.reshape(num_prompts, num_queries).mean(axis=1), ddof=1)) * num_queries if num_prompts > 1 else 0.0
    effect = max(1.0, spread / (share * (1 - share))) if 0 < share < 1 else 1.0
    effective = max(float(num_prompts), trials / effect)
    return MqarResult(
        name=name,
        num_pairs=num_pairs,
        length=prompts.length,
        num_trials=trials,
        accuracy=share,
        ci95=wilson_interval(share * effective, effective),
        chance=1 / num_pairs,
    )
