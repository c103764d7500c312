"""Plans of MoA as files: `{"alphas": L x H numbers, "betas": L x H numbers}`, as the published code writes and reads them.

What differs: the published window is alpha + beta x N for all queries of an input of N tokens, N rounded to blocks; ours is alpha + beta x (position + 1), so it
grows with the query. At the last token of an input (of `min_length` tokens or more) the two are equal. A published plan may have a rule per query head; ours has one
per KV head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnconvert.errors import AttnConvertError
from attnconvert.surgery.sites import Site
from attnconvert.surgery.spans.rules import Rule

_COMPARED_AT = 8192  # tokens; the length the published plans are quoted at


def read_plan(path: Path, sites: Sequence[Site]) -> tuple[dict[int, tuple[Rule, ...]], list[str]]:
    """The rules of a plan file for every layer of a model, and notes.

    A file with a rule per query head gives a KV head the rule of its query heads that shows most: the one with the longest window at 8192 tokens.

    Args:
        path: the file.
        sites: all attention sites of the model.

    Returns:
        Layer index -> one rule per KV head; notes.

    Raises:
        AttnConvertError: `plan-file-missing`, `plan-file-invalid`, `plan-file-shape`.
    """
    alphas, betas = _read(path)
    notes = []
    sites = sorted(sites, key=lambda site: site.layer_idx)
    if len(alphas) != len(sites):
        raise _wrong_shape(path, f"has rules for {len(alphas)} layers", f"{len(sites)} layers, as many as the model has attention layers")
    rules = {}
    reduced = 0
    for site, own_alphas, own_betas in zip(sites, alphas, betas, strict=True):
        H, G = site.num_heads, site.num_key_value_heads
        own = [Rule(round(alpha), float(beta)) for alpha, beta in zip(own_alphas, own_betas, strict=True)]
        if len(own) == G:
            rules[site.layer_idx] = tuple(own)
            continue
        if len(own) != H or H % G:
            accepted = f"{G}, one for each KV head" if H == G or H % G else f"{G} (KV heads) or {H} (query heads)"
            raise _wrong_shape(path, f"has {len(own)} rules for layer {site.layer_idx}", accepted)
        groups = [own[first : first + H // G] for first in range(0, H, H // G)]
        reduced += sum(len(set(group)) > 1 for group in groups)
        rules[site.layer_idx] = tuple(max(group, key=lambda rule: (rule.alpha + rule.beta * _COMPARED_AT, rule.beta)) for group in groups)
    if reduced:
        notes.append(
            f"{reduced} KV heads serve query heads with different rules in {path.name}: each took the one that shows most, so the cache is larger than planned there."
        )
    return rules, notes


def write_plan(path: Path, rules: Mapping[int, Sequence[Rule]], sites: Sequence[Site]) -> None:
    """Write a plan that the published code reads: a rule per query head.

    Args:
        path: the file, whose folder exists.
        rules: layer index -> one rule per KV head; other layers are written as dense.
        sites: all attention sites of the model.

    Raises:
        AttnConvertError: `cannot-write`.
    """
    alphas, betas = [], []
    for site in sorted(sites, key=lambda site: site.layer_idx):
        own = rules.get(site.layer_idx, [Rule(0, 1.0)] * site.num_key_value_heads)
        per_query_head = [rule for rule in own for _ in range(site.num_heads // len(own))]
        alphas.append([rule.alpha for rule in per_query_head])
        betas.append([rule.beta for rule in per_query_head])
    try:
        path.write_text(json.dumps({"alphas": alphas, "betas": betas}) + "\n", encoding="utf-8")
    except OSError as error:
        raise AttnConvertError("cannot-write", f"cannot write the plan: {error.strerror or error}", where=str(path)) from error


def _read(path: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Both matrices, of one shape and with values in range."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AttnConvertError(
            "plan-file-missing", f"there is no plan file {path.name!r}", where=str(path), expected="a JSON file with alphas and betas"
        ) from error
    except (OSError, ValueError) as error:
        raise _invalid(path, f"cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict) or not {"alphas", "betas"} <= data.keys():
        raise _invalid(path, "lacks alphas or betas")
    alphas, betas = (_matrix(path, name, data[name]) for name in ("alphas", "betas"))
    if [len(row) for row in alphas] != [len(row) for row in betas]:
        raise _wrong_shape(path, "has alphas and betas of different shapes", "one alpha and one beta for each head of each layer")
    for layer, row in enumerate(betas):
        for beta in row:
            if not 0 <= beta <= 1:
                raise _invalid(path, f"has a beta of {beta:g} in layer {layer}, outside of 0 to 1")
    return alphas, betas


def _matrix(path: Path, name: str, value: Any) -> list[list[float]]:
    rows = value if isinstance(value, list) else [value]
    for row in rows:
        if not isinstance(row, list) or not all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in row):
            raise _invalid(path, f"has {name} that are not a list of lists of numbers")
    return rows


def _invalid(path: Path, what: str) -> AttnConvertError:
    return AttnConvertError(
        "plan-file-invalid", f"the plan file {what}", where=str(path), expected='{"alphas": [[..], ..], "betas": [[..], ..]}, a list per layer'
    )


def _wrong_shape(path: Path, what: str, expected: str) -> AttnConvertError:
    return AttnConvertError("plan-file-shape", f"the plan file {what}", where=str(path), expected=expected, hint="use a plan made for this model")
