"""Search attention spans (MoA, https://arxiv.org/abs/2406.14909): which rule each KV head gets, for a bounded share of the KV cache.

Profile how much the loss depends on each part of each head's attention map (`influence`), count what each rule hides of it (`rules`), choose
the rules of all heads together (`solve`), and try plans on the stock model (`stock`). `planfile` reads and writes the published plan format.
"""

from attnconvert.surgery.spans.influence import Influence, check_sites, profile, response_loss
from attnconvert.surgery.spans.planfile import read_plan, write_plan
from attnconvert.surgery.spans.rules import BLOCK, DENSE, Rule, density, held_below, hidden_shares, predicted_losses, search_space
from attnconvert.surgery.spans.solve import FLOOR, Problem, Solution, best_plan, pareto
from attnconvert.surgery.spans.stock import attention_through, with_spans

__all__ = [
    "BLOCK",
    "DENSE",
    "FLOOR",
    "Influence",
    "Problem",
    "Rule",
    "Solution",
    "attention_through",
    "best_plan",
    "check_sites",
    "density",
    "held_below",
    "hidden_shares",
    "pareto",
    "predicted_losses",
    "profile",
    "read_plan",
    "response_loss",
    "search_space",
    "with_spans",
    "write_plan",
]
