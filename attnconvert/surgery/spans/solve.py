"""Which KV head gets which rule: the least predicted loss at a bounded mean density, with few different rules in a layer (MoA, https://arxiv.org/abs/2406.14909).

The problem. Every head takes one rule, every layer at most `max_rules` different ones. At each length the density, averaged over all heads of all layers, is at most
`bound`, and, as published, at least 0.9 of it. One length's predicted loss is minimised, those of the others may be limited.

How it is solved. With a variable per (layer, head, rule), as published, HiGHS needs 7 s to more than 30 s for one plan of 32 layers x 8 heads x 48 rules on one
core, because only the limit of rules per layer and a few averages couple the heads. So a variable here is a whole layer's allocation, made when it is
needed (column generation): given prices for density and for limited losses, the best allocation of a layer is the best pair of rules, each head taking the
cheaper one, which is a lookup over all pairs. The linear program over allocations gives the prices and, once no layer finds a better allocation, a lower
bound for every plan. The integer program over the allocations found is small, and close to that bound: between whole allocations of L layers, only as many
layers are undecided as there are constraints. `Solution.gap` says how close. Problems with few variables go to HiGHS as they are, which is exact.

Shapes: K lengths, L layers, G heads of a layer, R rules, S side constraints, P sets of rules.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnconvert.errors import AttnConvertError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FLOOR = 0.9  # of the bound, the least mean density
_POINTS = 5  # limits tried for each length's loss, its best and its worst included
_SMALL = 400  # variables up to which the problem is solved as it is
_GAP = 2e-3  # relative, of the integer programs
_SECONDS = 5.0  # for one integer program over allocations; a small problem as it is gets ten times that
_MAX_SETS = 50_000  # sets of rules that are looked through for every layer
_PENALTY = 1e3  # of a broken constraint, in units of all losses together
_ZERO = 1e-7


@dataclass(frozen=True)
class Problem:
    """What is chosen from.

    Attributes:
        costs: per layer [K, G, R], the predicted loss of a head under a rule, nats.
        densities: per layer [K, R], the share of keys a head with that rule holds.
        bound: mean density at each length at most.
        max_rules: different rules in a layer at most.
    """

    costs: tuple[Floats, ...]
    densities: tuple[Floats, ...]
    bound: float
    max_rules: int

    @property
    def num_heads(self) -> int:
        """Heads of all layers."""
        return sum(cost.shape[1] for cost in self.costs)


@dataclass(frozen=True)
class Solution:
    """One plan.

    Attributes:
        choice: per layer [G], the rule of each head.
        losses: predicted, per length.
        densities: mean, per length.
        gap: how much lower than its objective any plan under the same constraints could be at most, relative.
    """

    choice: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]
    densities: tuple[float, ...]
    gap: float


def best_plan(problem: Problem, objective: int, limits: Mapping[int, float] | None = None, floor: float = FLOOR) -> Solution | None:
    """The plan with the least loss at one length; None when no plan keeps all constraints.

    Args:
        problem: what is chosen from.
        objective: index of the length whose loss is minimised.
        limits: index of a length -> its loss at most.
        floor: least mean density, as a share of the bound; 0 = none.

    Raises:
        AttnConvertError: `search-too-large`.
    """
    return _Allocations(problem).solve(objective, limits or {}, floor)


def pareto(problem: Problem, progress: Callable[[int, int], None] | None = None) -> tuple[list[Solution], list[str]]:
    """Plans of which none is better than another at every length, and notes.

    First each length alone. That gives the range of every loss; those of all lengths but the last are then limited to 5 values of their range each, in every
    combination, while the last is minimised (epsilon constraints: every plan that is not dominated is found that way for some limits).

    Where no plan is dense enough at every length at once, the floor of 0.9 x bound is given up, which a note says: it only keeps a search from
    wasting what it may use.

    Args:
        problem: what is chosen from.
        progress: told (programs solved, programs).

    Returns:
        The plans by their loss at the last length, best first, and notes.

    Raises:
        AttnConvertError: `density-unreachable` where no plan keeps the bound; `search-too-large`.
    """
    allocations = _Allocations(problem)
    num_lengths = problem.costs[0].shape[0]
    total, done = num_lengths + (_POINTS ** (num_lengths - 1) if num_lengths > 1 else 0), 0
    notes: list[str] = []
    found: dict[tuple[tuple[int, ...], ...], Solution] = {}

    def attempt(objective: int, limits: Mapping[int, float], floor: float) -> Solution | None:
        nonlocal done
        done += 1
        solution = allocations.solve(objective, limits, floor)
        if solution is not None:
            found.setdefault(solution.choice, solution)
        if progress is not None:
            progress(min(done, total), total)
        return solution

    floor = FLOOR
    first = attempt(0, {}, floor)
    if first is None:
        floor = 0.0
        first = attempt(0, {}, floor)
        if first is None:
            raise _unreachable(problem.densities, [cost.shape[1] for cost in problem.costs], problem.bound)
        notes.append(f"No plan holds {FLOOR * problem.bound:.0%} to {problem.bound:.0%} of the cache at every length, so some hold less.")
    alone = [first] + [solution for k in range(1, num_lengths) if (solution := attempt(k, {}, floor)) is not None]
    grids = []
    for k in range(num_lengths - 1):
        losses = [solution.losses[k] for solution in alone]
        grids.append(np.linspace(min(losses), max(losses), _POINTS).tolist() if max(losses) > min(losses) * (1 + 1e-9) else [max(losses)])
    if num_lengths > 1:
        total = done + math.prod(map(len, grids))
        for limits in itertools.product(*grids):
            attempt(num_lengths - 1, {k: limit * (1 + 1e-9) for k, limit in enumerate(limits)}, floor)
    return _not_dominated(list(found.values())), notes


def _not_dominated(solutions: Sequence[Solution]) -> list[Solution]:
    kept = []
    for one in solutions:
        worse = (all(a <= b for a, b in zip(other.losses, one.losses, strict=True)) and other.losses != one.losses for other in solutions)
        if not any(worse):
            kept.append(one)
    return sorted(kept, key=lambda solution: (solution.losses[::-1], solution.choice))


def check_reachable(densities: Sequence[Floats], num_heads: Sequence[int], bound: float) -> None:
    """Refuse a bound that the sparsest rules exceed, before any cost is known.

    Args:
        densities: per layer [K, R], as in `Problem`.
        num_heads: of each layer.
        bound: mean density at each length at most.

    Raises:
        AttnConvertError: `density-unreachable`.
    """
    if max(_least_densities(densities, num_heads)) > bound * (1 + 1e-9):
        raise _unreachable(densities, num_heads, bound)


def _least_densities(densities: Sequence[Floats], num_heads: Sequence[int]) -> list[float]:
    return [sum(count * float(own[k].min()) for count, own in zip(num_heads, densities, strict=True)) / sum(num_heads) for k in range(len(densities[0]))]


def _unreachable(densities: Sequence[Floats], num_heads: Sequence[int], bound: float) -> AttnConvertError:
    least = _least_densities(densities, num_heads)
    return AttnConvertError(
        "density-unreachable",
        f"no plan holds {bound:.0%} of the cache or less at every length",
        where="density, search",
        expected=f"a density above {max(least):.1%}: the sparsest rules hold {', '.join(f'{share:.1%}' for share in least)} at the profiled lengths",
        hint="raise density, lower num_sinks, or allow shorter spans in search",
    )


# ---------------------------------------------------------------- side constraints


@dataclass(frozen=True)
class _Sides:
    """Sums over all heads that are limited: per layer [S, G, R] coefficients, and [S] what the sums may be at most."""

    coefficients: tuple[Floats, ...]
    at_most: Floats


def _sides(problem: Problem, limits: Mapping[int, float], floor: float) -> _Sides:
    at_most = []
    parts: list[list[Floats]] = [[] for _ in problem.costs]
    for k in range(problem.costs[0].shape[0]):
        for sign, limit in ((1.0, problem.bound), (-1.0, -floor * problem.bound)) if floor > 0 else ((1.0, problem.bound),):
            at_most.append(limit)
            for part, cost, density in zip(parts, problem.costs, problem.densities, strict=True):
                part.append(np.broadcast_to(sign * density[k] / problem.num_heads, cost.shape[1:]))
        if k in limits:
            scale = _scale(problem, k)
            at_most.append(limits[k] / scale)
            for part, cost in zip(parts, problem.costs, strict=True):
                part.append(cost[k] / scale)
    return _Sides(tuple(np.stack(part) for part in parts), np.array(at_most))


def _scale(problem: Problem, length: int) -> float:
    """All losses together, the unit of the programs: their tolerances are absolute."""
    return max(sum(float(cost[length].max(-1).sum()) for cost in problem.costs), 1e-30)


# ---------------------------------------------------------------- programs


class _Allocations:
    """Allocations of every layer, kept from one program to the next: they are good under similar constraints.

    Args:
        problem: what is chosen from.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.sets = [_rule_sets(cost.shape[2], cost.shape[1], problem.max_rules) for cost in problem.costs]
        self.columns: list[tuple[int, tuple[int, ...]]] = []  # (layer, rule of each head)
        self._known: set[tuple[int, tuple[int, ...]]] = set()

    def solve(self, objective: int, limits: Mapping[int, float], floor: float) -> Solution | None:
        """As `best_plan`."""
        sides = _sides(self.problem, limits, floor)
        scale = _scale(self.problem, objective)
        costs = [cost[objective] / scale for cost in self.problem.costs]
        if sum(cost.size for cost in costs) <= _SMALL:
            return self._exactly(costs, sides, objective)
        if not self.columns:
            self._start(costs)
        while True:
            program = self._linear(costs, sides)
            new = self._better(costs, sides, program)
            if not new:
                break
            for column in new:
                self._add(column)
        if program.broken > _ZERO:
            return None
        found = self._integer(costs, sides, program)
        if found is None:  # whole allocations leave gaps that the program, which mixes them, does not see
            return self._exactly(costs, sides, objective, program.value, _GAP)
        return self._solution(found, objective, program.value)

    def _add(self, column: tuple[int, tuple[int, ...]]) -> None:
        if column not in self._known:
            self._known.add(column)
            self.columns.append(column)

    def _start(self, costs: Sequence[Floats]) -> None:
        """The best allocations at a range of prices of density."""
        heads = self.problem.num_heads
        for price in (0.0, *np.geomspace(1e-3, 1e2, 16)):
            for layer, (cost, density) in enumerate(zip(costs, self.problem.densities, strict=True)):
                self._add((layer, _best(cost + price * density.mean(0) / heads, self.sets[layer])[1]))

    def _linear(self, costs: Sequence[Floats], sides: _Sides) -> _Program:
        """The linear program over the allocations there are; constraints may be broken at a price."""
        from scipy.optimize import linprog

        columns = self._matrices(costs, sides)
        num_sides, num_columns = columns.sums.shape
        result = linprog(
            np.concatenate([columns.costs, np.full(num_sides, _PENALTY)]),
            A_ub=np.hstack([columns.sums, -np.eye(num_sides)]),
            b_ub=sides.at_most,
            A_eq=np.hstack([columns.layers, np.zeros((len(costs), num_sides))]),
            b_eq=np.ones(len(costs)),
            method="highs",
        )
        assert result.status == 0, result.message
        return _Program(float(result.fun), float(result.x[num_columns:].sum()), np.asarray(result.eqlin.marginals), -np.asarray(result.ineqlin.marginals))

    def _matrices(self, costs: Sequence[Floats], sides: _Sides) -> _Columns:
        layers = np.zeros((len(costs), len(self.columns)))
        values, sums = np.empty(len(self.columns)), np.empty((len(sides.at_most), len(self.columns)))
        for number, (layer, rules) in enumerate(self.columns):
            heads = np.arange(len(rules))
            layers[layer, number] = 1.0
            values[number] = costs[layer][heads, rules].sum()
            sums[:, number] = sides.coefficients[layer][:, heads, rules].sum(-1)
        return _Columns(values, sums, layers)

    def _better(self, costs: Sequence[Floats], sides: _Sides, program: _Program) -> list[tuple[int, tuple[int, ...]]]:
        """Allocations that improve the linear program: one for each layer at most."""
        new = []
        for layer, cost in enumerate(costs):
            priced = cost + np.tensordot(program.prices, sides.coefficients[layer], 1)
            value, rules = _best(priced, self.sets[layer])
            if value < program.layer_values[layer] - _ZERO / len(costs) and (layer, rules) not in self._known:
                new.append((layer, rules))
        return new

    def _integer(self, costs: Sequence[Floats], sides: _Sides, program: _Program) -> tuple[tuple[int, ...], ...] | None:
        """The best plan of the allocations there are; None when none keeps the constraints."""
        columns = self._matrices(costs, sides)
        layer_of = np.array([layer for layer, _ in self.columns])
        reduced = columns.costs + program.prices @ columns.sums - program.layer_values[layer_of]
        for share in (0.01, 0.1, math.inf):  # an allocation this much worse than the prices say is in no plan this close to the bound
            near = np.flatnonzero(reduced <= share * abs(program.value) + _ZERO)
            x = _milp(columns.costs[near], columns.sums[:, near], sides.at_most, columns.layers[:, near], _SECONDS)
            if x is not None:
                chosen = dict(self.columns[near[number]] for number in np.flatnonzero(x > 0.5))
                return tuple(chosen[layer] for layer in range(len(costs)))
        return None

    def _exactly(self, costs: Sequence[Floats], sides: _Sides, objective: int, lower: float = -math.inf, gap: float = 0.0) -> Solution | None:
        """The program with a variable per (layer, head, rule), and one per (layer, rule) that says whether a layer uses it. `lower`: as `_solution`."""
        from scipy.sparse import block_diag, csr_array, hstack, identity, kron, vstack

        first = np.cumsum([0, *(cost.size for cost in costs)])
        shapes = [cost.shape for cost in costs]
        num_uses = sum(R for _, R in shapes)
        # takes one rule; takes a rule only if the layer uses it; few rules of a layer are used
        takes = block_diag([kron(np.eye(G), np.ones((1, R))) for G, R in shapes])
        couples = hstack([identity(int(first[-1])), block_diag([kron(-np.ones((G, 1)), np.eye(R)) for G, R in shapes])])
        counts = hstack([csr_array((len(shapes), int(first[-1]))), block_diag([np.ones((1, R)) for _, R in shapes])])
        sums = hstack([csr_array(np.hstack([part.reshape(len(part), -1) for part in sides.coefficients])), csr_array((len(sides.at_most), num_uses))])
        at_most = np.concatenate([sides.at_most, np.zeros(int(first[-1])), np.full(len(shapes), float(self.problem.max_rules))])
        values = np.concatenate([*(cost.ravel() for cost in costs), np.zeros(num_uses)])
        ones = hstack([takes, csr_array((takes.shape[0], num_uses))])
        x = _milp(values, vstack([sums, couples, counts], format="csr"), at_most, ones.tocsr(), 10 * _SECONDS, gap=gap)
        if x is None:
            return None
        chosen = tuple(tuple(x[first[i] : first[i + 1]].reshape(cost.shape).argmax(-1).tolist()) for i, cost in enumerate(costs))
        return self._solution(chosen, objective, lower)

    def _solution(self, choice: tuple[tuple[int, ...], ...], objective: int, lower: float) -> Solution:
        """`lower`: bound of the scaled objective; minus infinity when the choice is optimal."""
        problem = self.problem
        losses = sum(cost[:, np.arange(len(own)), own].sum(-1) for cost, own in zip(problem.costs, choice, strict=True))
        densities = sum(density[:, own].sum(-1) for density, own in zip(problem.densities, choice, strict=True)) / problem.num_heads
        value = float(losses[objective]) / _scale(problem, objective)
        gap = max(0.0, (value - lower) / value) if math.isfinite(lower) and value > 0 else 0.0
        return Solution(choice, tuple(map(float, losses)), tuple(map(float, densities)), gap)


@dataclass(frozen=True)
class _Columns:
    """Allocations as columns: scaled cost [N], sums [S, N], and which layer they belong to [L, N]."""

    costs: Floats
    sums: Floats
    layers: Floats


@dataclass(frozen=True)
class _Program:
    """A solved linear program: its value, by how much constraints are broken, what a layer [L] and what a unit of each side constraint [S] is worth."""

    value: float
    broken: float
    layer_values: Floats
    prices: Floats


def _milp(costs: Floats, sums: Any, at_most: Floats, ones: Any, seconds: float, gap: float = _GAP) -> Floats | None:
    """Binary x with the least costs.x, sums.x <= at_most and ones.x = 1, matrices dense or sparse; None when there is none (or none was found in time)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    constraints: list[Any] = [LinearConstraint(sums, -np.inf, at_most), LinearConstraint(ones, 1, 1)]
    options = {"time_limit": seconds, "mip_rel_gap": gap}
    with _results_alone_on_stdout():
        result = milp(costs, constraints=constraints, integrality=np.ones(len(costs)), bounds=Bounds(0, 1), options=options)
    return None if result.x is None else np.asarray(result.x)


@contextlib.contextmanager
def _results_alone_on_stdout() -> Iterator[None]:
    """Inside, what C code prints goes to stderr: HiGHS 1.12 prints a line of its own now and then, whatever it is told (its issue 2783)."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    before = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        libc.fflush(None)  # what C has not written yet would follow the file descriptor back
        os.dup2(before, 1)
        os.close(before)


def _rule_sets(num_rules: int, num_heads: int, max_rules: int) -> Ints:
    """The sets of rules a layer may use, [P, rules of a set]; one set of all where the limit says nothing.

    Raises:
        AttnConvertError: `search-too-large`.
    """
    if max_rules >= min(num_rules, num_heads):
        return np.arange(num_rules)[None]
    if math.comb(num_rules, max_rules) > _MAX_SETS:
        raise AttnConvertError(
            "search-too-large",
            f"{num_rules} rules can be combined in too many ways at {max_rules} in a layer",
            where="search.max_rules",
            expected=f"at most {_MAX_SETS:,} sets of rules, or as many rules in a layer as it has KV heads ({num_heads})",
            hint="lower search.max_rules, or give fewer alphas, betas or candidates",
        )
    return np.array(list(itertools.combinations(range(num_rules), max_rules)))


def _best(cost: Floats, sets: Ints) -> tuple[float, tuple[int, ...]]:
    """The cheapest allocation of a layer whose heads cost [G, R], and its cost."""
    options = cost[:, sets]  # [G, P, rules of a set]
    best = int(options.min(-1).sum(0).argmin())
    rules = sets[best][options[:, best].argmin(-1)]
    return float(cost[np.arange(len(rules)), rules].sum()), tuple(rules.tolist())
