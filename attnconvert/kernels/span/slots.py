"""What a span rule costs, in plain integers: keys that are seen, slots that a cache needs. See `reference` for the rules; no torch, plans use it too."""

from __future__ import annotations

import bisect

FRACTION_BITS = 16  # beta is a multiple of 2**-16, see `reference.BETA_ONE`
SLOT_MULTIPLE = 64  # a ring has a multiple of it


def fixed_point(beta: float) -> int:
    """The integer that stands for a beta between 0 and 1."""
    return round(beta * (1 << FRACTION_BITS))


def window_at(position: int, alpha: int, beta: int, least: int = 1) -> int:
    """`reference.window` of one position and rule; beta as `fixed_point` gives it."""
    return max(least, alpha + ((position + 1) * beta >> FRACTION_BITS))


def least_window(alpha: int, beta: int, min_length: int) -> int:
    """The window of a rule in a context of `min_length` tokens, which is that of all shorter ones too; at least 1."""
    return window_at(min_length - 1, alpha, beta)


def ring_size(alpha: int, beta: int, num_sinks: int, length: int, least: int = 1) -> int:
    """Ring slots of a KV head for a context of up to `length` tokens: what its last query sees besides the sinks, rounded up to `SLOT_MULTIPLE`."""
    if length <= num_sinks:
        return 0
    return -(-min(window_at(length - 1, alpha, beta, least), length - num_sinks) // SLOT_MULTIPLE) * SLOT_MULTIPLE


def visible_keys(position: int, alpha: int, beta: int, num_sinks: int, least: int = 1) -> int:
    """Keys that the query at `position` sees, itself and sinks included."""
    return min(position + 1, num_sinks + window_at(position, alpha, beta, least))


def visible_pairs(alpha: int, beta: int, num_sinks: int, length: int, least: int = 1) -> int:
    """Sum of `visible_keys` over the positions below `length`, in time logarithmic in it."""
    counts = range(1, length + 1)  # position + 1
    # Up to `dense` a query sees everything before it, up to `flat` its window is the least: both turn once, since a window grows by at most 1 a token.
    dense = bisect.bisect_left(counts, True, key=lambda count: count > visible_keys(count - 1, alpha, beta, num_sinks, least))
    flat = max(dense, bisect.bisect_left(counts, True, key=lambda count: alpha + (count * beta >> FRACTION_BITS) >= least))
    band = (length - flat) * alpha + _floor_sum(length, beta) - _floor_sum(flat, beta)
    return dense * (dense + 1) // 2 + (length - dense) * num_sinks + (flat - dense) * least + band


def _floor_sum(count: int, beta: int) -> int:
    """Sum of i beta >> FRACTION_BITS over i = 0 .. count, by Euclid's algorithm on the line's slope."""
    n, modulus, slope, offset, total = count + 1, 1 << FRACTION_BITS, beta, 0, 0
    while True:
        total += (n - 1) * n // 2 * (slope // modulus) + n * (offset // modulus)
        slope, offset = slope % modulus, offset % modulus
        top = slope * n + offset
        if top < modulus:
            return total
        n, offset = divmod(top, modulus)
        modulus, slope = slope, modulus
