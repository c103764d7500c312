"""Search attention spans (MoA, https://arxiv.org/abs/2406.14909): which rule each KV head gets, for a bounded share of the KV cache.

Profile how far the predictions move when a rule (`rules`) hides keys from a head (`influence`), choose the rules of all heads
together (`solve`), and try plans on the stock model (`stock`). `planfile` reads and writes the published plan format.
"""

from attnconvert.surgery.spans.influence import Influence, check_sites, profile, response_logits
from attnconvert.surgery.spans.planfile import read_plan, write_plan
from attnconvert.surgery.spans.rules import DENSE, Rule, density, held_below, search_space
from attnconvert.surgery.spans.solve import FLOOR, Problem, Solution, best_plan, check_reachable, pareto
from attnconvert.surgery.spans.stock import attention_through, with_spans

__all__ = [
    "DENSE",
    "FLOOR",
    "Influence",
    "Problem",
    "Rule",
    "Solution",
    "attention_through",
    "best_plan",
    "check_reachable",
    "check_sites",
    "density",
    "held_below",
    "pareto",
    "profile",
    "read_plan",
    "response_logits",
    "search_space",
    "with_spans",
    "write_plan",
]
