"""Converted checkpoints for the tests of vLLM: untrained, since what is shown is that two programs compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from attnconvert.surgery import registry
from attnconvert.surgery.plan import ConversionPlan, LayerPlan
from attnconvert.surgery.sites import Site, find_sites
from attnconvert.surgery.swap import swap


def _hedgehog(site: Site) -> dict[str, Any]:
    return {"window": {"kind": "block", "size": 16}, "sinks": 4, "softmax_weight": 0.3}


def _spans(site: Site) -> dict[str, Any]:
    """Layers with caches of different sizes, and heads of one layer too."""
    groups = site.num_key_value_heads
    return {
        "alphas": [20 + 30 * group for group in range(groups)],
        "betas": [0.25 * (site.layer_idx % 3 == group % 3) for group in range(groups)],
        "num_sinks": 4,
    }


def _heads(**options: Any) -> Callable[[Site], dict[str, Any]]:
    return lambda site: {"unit": "query_head", "choose_shared": "first", "active": 0.75, "shared": 0.25, **options}


DENSE_LENGTH = 256
"""Tokens of context up to which layers of the conversion `infllm` see everything."""

CONVERSIONS: dict[str, tuple[str, Callable[[Site], dict[str, Any]]]] = {
    "hedgehog": ("hedgehog", _hedgehog),
    "moa": ("moa", _spans),
    "infllm": ("infllm_v2", lambda site: {"dense_len": DENSE_LENGTH + 1, "topk": 3, "init_blocks": 1, "window_size": 64, "block_size": 32}),
    "moh": ("moh", _heads(router="norm")),
    "moh-learned": ("moh", _heads(router="learned", gates="soft")),
}


def write(source: str, conversion: str, out: Path, *, kept: tuple[int, ...] = ()) -> Path:
    """A conversion of the checkpoint `source` in the folder `out`, with `kept` layers as they were, and half-precision weights as usual. Returns `out`."""
    name, settings = CONVERSIONS[conversion]
    method = registry.get(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    rows = []
    for site in find_sites(model.config):
        shape = (site.layer_idx, site.path, site.num_heads, site.num_key_value_heads, site.head_dim)
        config = method.config(**settings(site))
        problems = method.check(config, site)
        assert not problems, problems
        rows.append(LayerPlan(*shape, None) if site.layer_idx in kept else LayerPlan(*shape, name, method.runtime_config(config)))
    swap(model, ConversionPlan(model.config.model_type, tuple(rows)))
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out
