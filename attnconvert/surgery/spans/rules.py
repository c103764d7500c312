"""Rules of attention spans: which ones a search chooses from, and how many keys each keeps.

A rule (alpha, beta) belongs to a KV head; `kernels/span/reference.py` defines what it means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnconvert.kernels.span.reference import BETA_ONE, window
from attnconvert.kernels.span.slots import fixed_point, least_window

_STEPS = 8  # alphas in the longest length, and betas between 0 and 1, as published


class Rule(NamedTuple):
    """A window of `alpha + beta x (position + 1)` tokens, at least `least`, besides the sinks.

    Attributes:
        alpha: tokens; may be negative.
        beta: 0 to 1.
        least: tokens, 1 or more.
    """

    alpha: int
    beta: float
    least: int = 1

    @property
    def beta_q(self) -> int:
        """Beta as kernels take it, 0 to BETA_ONE."""
        return round(self.beta * BETA_ONE)


DENSE = Rule(0, 1.0)


def held_below(alpha: int, beta: float, min_length: int) -> Rule:
    """The rule whose window in a context shorter than `min_length` tokens is what it is at that length."""
    return Rule(alpha, beta, least_window(alpha, fixed_point(beta), min_length))


def search_space(
    lengths: Sequence[int],
    alphas: Sequence[int] | None = None,
    betas: Sequence[float] | None = None,
    candidates: Sequence[tuple[int, float]] | None = None,
    min_length: int = 0,
) -> tuple[Rule, ...]:
    """The rules to choose from, without repeats, sorted.

    The published grid (https://arxiv.org/abs/2406.14909): alpha from minus the shortest length to the longest in steps of an eighth of it, beta from 0 to 1 in
    eighths. A pair is left out when its window exceeds the longest length there, or is empty at the shortest.

    Windows of 1/16 and 1/32 of the context in addition were no clear gain (SmolLM2-135M-Instruct, 512 tokens): KL to the dense model .0154 with and .0129 without
    them at half of the cache, .070 and .068 at a quarter, where the loss of a pass key's answer was 5.8 and 6.4 nats.

    Args:
        lengths: lengths that will be profiled, in tokens.
        alphas: None = the published range.
        betas: None = 0, 1/8 .. 1.
        candidates: explicit rules, which replace the grid and are taken as they are.
        min_length: see `held_below`.
    """
    if candidates is not None:
        return _unique(held_below(int(alpha), float(beta), min_length) for alpha, beta in candidates)
    shortest, longest = min(lengths), max(lengths)
    if alphas is None:
        step = max(1, longest // _STEPS)
        alphas = range(-(shortest // step) * step, longest + 1, step)
    if betas is None:
        betas = [eighth / _STEPS for eighth in range(_STEPS + 1)]
    grid = (held_below(int(alpha), float(beta), min_length) for alpha in alphas for beta in betas)
    return _unique(rule for rule in grid if rule.alpha + rule.beta * longest <= longest and rule.alpha + rule.beta * shortest > 0)


def _unique(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """One rule for each pair of numbers that the kernels tell apart."""
    found: dict[tuple[int, int], Rule] = {}
    for rule in rules:
        found.setdefault((rule.alpha, rule.beta_q), rule)
    return tuple(sorted(found.values()))


def windows(rule: Rule, positions: Tensor) -> Tensor:
    """Keys in the window of queries at `positions` (int64), sinks not counted; may be more than there are."""
    return window(positions, torch.tensor(rule.alpha), torch.tensor(rule.beta_q), rule.least)


def density(rule: Rule, length: int, num_sinks: int) -> float:
    """Share of the keys that a KV head with this rule still holds after `length` tokens."""
    last = int(windows(rule, torch.tensor(length - 1)))
    return min(length, last + num_sinks) / length
