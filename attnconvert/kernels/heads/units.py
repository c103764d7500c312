"""How many routed units a layer has and a token uses, in plain integers; no torch, plans use it too."""

from __future__ import annotations

import math
from typing import Literal

Unit = Literal["kv_head", "query_head"]


def num_units(unit: Unit, num_heads: int, num_key_value_heads: int) -> int:
    """U: KV heads with the query heads that share them, or single query heads."""
    return num_key_value_heads if unit == "kv_head" else num_heads


def unit_counts(units: int, active: float, shared: float) -> tuple[int, int]:
    """Units that a token uses, and how many of them are the same for all tokens: whole numbers from shares of all units.

    What is used is rounded to the nearest number, what is shared down, to one less than what is used at most: a router always has a unit to choose.
    """
    used = min(units, max(1, math.floor(active * units + 0.5)))
    return used, min(math.floor(shared * units + 1e-9), used - 1)


def annealed(units: int, used: int, progress: float) -> int:
    """Units that a token uses on the way from all of them (progress 0) to `used` (progress 1), in equal parts."""
    return used + math.ceil((units - used) * (1 - min(1.0, progress)) - 1e-9)
