"""Find attention spans by calibration: the whole search for a loaded model, and pictures of what a plan keeps.

Samples (`distill/calibration.py`), what every rule costs every KV head in predictions that move, plans that trade the lengths against each other
(`surgery/spans`), and each plan tried on the stock model at a length that was not profiled: the one whose predictions there are closest to the dense
model's is taken, since costs of single heads rank whole plans less well than trying them. The uniform window of the same density is tried too, so what is chosen is
no worse than that.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnconvert.convert.plan import with_span_rules
from attnconvert.convert.report import kept_shares
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.methods.moa import MoaConfig, min_length_of, rules_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

    from attnconvert.distill.calibration import CalibrationItem
    from attnconvert.distill.config import DataConfig
    from attnconvert.surgery.method import MethodConfig
    from attnconvert.surgery.plan import ConversionPlan
    from attnconvert.surgery.sites import Site
    from attnconvert.surgery.spans import Problem, Rule, Solution

Note = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SpanPlan:
    """Rules for all layers that were searched, and what is known of them.

    Attributes:
        rules: layer index -> one rule per KV head.
        losses: profiled length -> predicted divergence from the dense model, nats per scored token; heads added up one by one, good for ranking.
        densities: profiled length -> share of the keys that are kept, mean over the heads of these layers.
        validation_loss: at the validation length, the expected loss of the tokens that the dense model would write, nats per scored token: what is above
            the dense model's own is the divergence KL(dense || plan).
    """

    rules: Mapping[int, tuple[Rule, ...]]
    losses: Mapping[int, float]
    densities: Mapping[int, float]
    validation_loss: float

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "rules": {str(idx): [[rule.alpha, rule.beta] for rule in own] for idx, own in self.rules.items()},
            "losses": {str(length): loss for length, loss in self.losses.items()},
            "densities": {str(length): share for length, share in self.densities.items()},
            "validation_loss": self.validation_loss,
        }


@dataclass(frozen=True)
class SpanSearch:
    """What a search found.

    Attributes:
        chosen: the plan with the lowest validation loss.
        front: all plans that were tried, the one predicted best at the longest length first, a uniform one last; `chosen` is one of them.
        density: the bound.
        num_rules: how many rules each head chose from.
        validation_length: tokens.
        dense_losses: length -> that loss of the model as it is (the entropy of its predictions), the validation length included.
        num_samples: per length.
        notes: what else to know.
        seconds: phase -> wall-clock time.
    """

    chosen: SpanPlan
    front: tuple[SpanPlan, ...]
    density: float
    num_rules: int
    validation_length: int
    dense_losses: Mapping[int, float]
    num_samples: int
    notes: tuple[str, ...]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "chosen": self.front.index(self.chosen),
            "front": [plan.to_dict() for plan in self.front],
            "density": self.density,
            "num_rules": self.num_rules,
            "validation_length": self.validation_length,
            "dense_losses": {str(length): loss for length, loss in self.dense_losses.items()},
            "num_samples": self.num_samples,
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
        }


def needs_search(config: MoaConfig) -> bool:
    """Whether a layer's rules come from calibration."""
    return config.alphas is None and config.plan is None


def search_spans(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[Site],
    settings: Mapping[int, MoaConfig],
    data: DataConfig,
    *,
    seed: int = 0,
    cache: Path | None = None,
    note: Note | None = None,
    progress: Progress | None = None,
) -> SpanSearch:
    """The rules of all layers that have none. The model is unchanged afterwards.

    Args:
        model: the dense model, stock class, in eval mode, on its device.
        tokenizer: its tokenizer.
        sites: all its attention sites.
        settings: layer index -> settings. Layers with rules of their own keep them, plans are tried with them in place, and they do not count
            towards the density; a `plan` file has been read into them before. Layers not named stay dense.
        data: the user's text.
        seed: of the samples.
        cache: folder for samples; None = the user's Hugging Face cache.
        note: told what is done.
        progress: told about each phase.

    Raises:
        AttnConvertError: `search-differs`, `validation-length`, `spans-not-possible`, `no-rules`, `density-unreachable`, `search-too-large`; those of `make_calibration`.
    """
    import numpy as np

    from attnconvert.distill.calibration import make_calibration
    from attnconvert.surgery.spans import Problem, check_reachable, check_sites, held_below, pareto, profile, search_space
    from attnconvert.surgery.spans import density as density_of

    searched = [site for site in sites if site.layer_idx in settings and needs_search(settings[site.layer_idx])]
    assert searched, "the caller checks that something is to be searched"
    first = _common(searched, settings)
    config = first.search
    check_sites(searched)
    lengths = config.lengths
    validation_length = _validation_length(model, lengths, config.validation_length)
    rules = search_space(lengths, config.alphas, config.betas, config.candidates, min_length_of(first))
    if not rules:
        raise AttnConvertError(
            "no-rules", "no rule of search is within the lengths", where="search.alphas, search.betas",
            expected=f"alpha + beta x length above 0 at {lengths[0]} tokens and at most {lengths[-1]} at {lengths[-1]}",
        )  # fmt: skip
    num_sinks = {idx: own.num_sinks for idx, own in settings.items()}
    if config.candidates is None:  # what a plan has to beat: the density as it is, for all heads
        same = {held_below(-num_sinks[site.layer_idx], first.density, min_length_of(first)) for site in searched}
        rules = tuple(sorted({*rules, *(rule for rule in same if rule.alpha + rule.beta * lengths[0] > 0)}))
    by_sinks = {sinks: np.array([[density_of(rule, length, sinks) for rule in rules] for length in lengths]) for sinks in sorted(set(num_sinks.values()))}
    densities = tuple(by_sinks[num_sinks[site.layer_idx]] for site in searched)
    check_reachable(densities, [site.num_key_value_heads for site in searched], first.density)
    explicit = {
        site.layer_idx: tuple(held_below(alpha, beta, min_length_of(settings[site.layer_idx])) for alpha, beta in own)
        for site in sites
        if site.layer_idx in settings and (own := rules_of(settings[site.layer_idx], site.num_key_value_heads)) is not None
    }
    seconds: dict[str, float] = {}

    def report(phase: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(phase, done, total)

    def say(text: str) -> None:
        if note is not None:
            note(text)

    with _timed(seconds, "samples"):
        calibration = make_calibration(
            model, tokenizer, data, lengths, validation_length=validation_length, num_samples=config.num_samples, response_tokens=config.response_tokens,
            seed=seed, cache=cache, note=note, progress=report("samples"),
        )  # fmt: skip
    notes = list(calibration.notes)
    if calibration.from_cache:
        say("calibration samples: as made before, from the cache")
    with _timed(seconds, "influence"):
        samples = [item for length in lengths for item in calibration.items[length]]
        influence = profile(model, searched, samples, rules, num_sinks, seed=seed, progress=report("influence"))
    with _timed(seconds, "plans"):
        costs = tuple(np.stack([influence.costs[length][site.layer_idx].numpy() for length in lengths]) for site in searched)
        problem = Problem(costs, densities, first.density, config.max_rules)
        solutions, found = pareto(problem, report("plans"))
        notes += found
        if len(lengths) == 1 and config.candidates is None:
            notes.append(
                "One length was profiled: there a fixed window shows more than one that grows to the same size, so spans will not grow with the context."
            )
    with _timed(seconds, "validation"):
        plans = [*solutions, *_uniform(problem, solutions)]
        decided = [{site.layer_idx: tuple(rules[number] for number in choice) for site, choice in zip(searched, plan.choice, strict=True)} for plan in plans]
        tried = [{**explicit, **each} for each in decided]
        entropy, *losses = expected_losses(model, calibration.items[validation_length], [{}, *tried], num_sinks, report("validation"))
        front = tuple(
            SpanPlan(each, dict(zip(lengths, plan.losses, strict=True)), dict(zip(lengths, plan.densities, strict=True)), loss)
            for each, plan, loss in zip(decided, plans, losses, strict=True)
        )
    dense_losses = {**influence.losses, validation_length: entropy}
    chosen = min(front, key=lambda plan: plan.validation_loss)
    return SpanSearch(chosen, front, first.density, len(rules), validation_length, dense_losses, config.num_samples, tuple(notes), seconds)


def expected_losses(
    model: Any,
    items: Sequence[CalibrationItem],
    plans: Sequence[Mapping[int, Sequence[Rule]]],
    num_sinks: Mapping[int, int],
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Cross-entropy of the dense model's predictions and those of a stock model that attends by rules, nats per scored token, mean over samples.

    Args:
        model: on its device.
        items: samples.
        plans: layer index -> one rule per KV head; no layers = the model as it is, whose own entropy comes out.
        num_sinks: layer index -> sinks.
        progress: told (forward passes done, passes).
    """
    import torch

    from attnconvert.surgery.spans import response_logits, with_spans

    device = next(model.parameters()).device
    sums = [0.0] * len(plans)
    with torch.no_grad():
        for at, (input_ids, response) in enumerate(items):
            ids = input_ids.to(device)
            dense = response_logits(model, ids, response).softmax(-1)
            for number, plan in enumerate(plans):
                with with_spans(model, plan, num_sinks):
                    found = response_logits(model, ids, response).log_softmax(-1)
                sums[number] -= float((dense * found).sum(-1).mean())
                if progress is not None:
                    progress(at * len(plans) + number + 1, len(items) * len(plans))
    return [total / len(items) for total in sums]


def _uniform(problem: Problem, solutions: Sequence[Solution]) -> list[Solution]:
    """The plan with one rule for all heads that is predicted best at the last length, within the density at every length; none where there is no such rule."""
    from attnconvert.surgery.spans import Solution

    layers = range(len(problem.costs))
    found = []
    for rule in range(problem.costs[0].shape[2]):
        densities = sum(cost.shape[1] * density[:, rule] for cost, density in zip(problem.costs, problem.densities, strict=True)) / problem.num_heads
        if (densities <= problem.bound + 1e-9).all():
            choice = tuple((rule,) * problem.costs[layer].shape[1] for layer in layers)
            losses = sum(cost[:, :, rule].sum(-1) for cost in problem.costs)
            found.append(Solution(choice, tuple(map(float, losses)), tuple(map(float, densities)), 0.0))
    known = {solution.choice for solution in solutions}
    return [best for best in sorted(found, key=lambda one: one.losses[-1])[:1] if best.choice not in known]


def _common(searched: Sequence[Site], settings: Mapping[int, MoaConfig]) -> MoaConfig:
    """The settings of the first layer; `density`, `min_length` and `search` are the same in all.

    Raises:
        AttnConvertError: `search-differs`.
    """
    first = settings[searched[0].layer_idx]
    for site in searched:
        own = settings[site.layer_idx]
        for name in ("density", "min_length", "search"):
            if getattr(own, name) != getattr(first, name):
                raise AttnConvertError(
                    "search-differs",
                    f"layers {searched[0].layer_idx} and {site.layer_idx} have different settings of {name}",
                    where=f"layer {site.layer_idx}",
                    expected="one density, min_length and search for all layers whose rules come from calibration: they are chosen together",
                    hint="give the layers that are to differ rules of their own (`alphas`, `betas`)",
                )
    return first


def _validation_length(model: Any, lengths: Sequence[int], wanted: int | None) -> int:
    """Half as long again as the longest profiled length, as published (12k for 8k), or what the model allows; always one that was not profiled.

    Raises:
        AttnConvertError: `validation-length`.
    """
    if wanted is not None:
        if wanted in lengths:
            raise AttnConvertError(
                "validation-length",
                f"the validation length {wanted} is also profiled",
                where="search.validation_length",
                expected="a length that is not among search.lengths: plans are compared on what they were not made for",
            )
        return wanted
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = lengths[-1]
    above = min(longest * 3 // 2, limit or longest * 3 // 2)
    if above > longest:
        return above
    below = longest * 3 // 4
    return below if below not in lengths else (below + longest) // 2


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = round(time.perf_counter() - start, 3)


# ---------------------------------------------------------------- in the plan of a conversion


def undecided_spans(plan: ConversionPlan) -> bool:
    """Whether a layer of the plan waits for rules from calibration."""
    return any(row.method == "moa" and row.config["alphas"] is None for row in plan.layers)


def has_spans(plan: ConversionPlan) -> bool:
    """Whether the plan has layers with attention spans whose rules are known."""
    return any(row.method == "moa" and row.config["alphas"] is not None for row in plan.layers)


def read_span_plans(plan: ConversionPlan, settings: Mapping[int, MethodConfig], sites: Sequence[Site]) -> tuple[ConversionPlan, list[str]]:
    """The plan with the rules of the files that its settings name, and notes.

    Args:
        plan: of a conversion.
        settings: layer index -> settings of the converted layers.
        sites: all attention sites of the model.

    Raises:
        AttnConvertError: those of `read_plan`.
    """
    files = {idx: config.plan for idx, config in settings.items() if isinstance(config, MoaConfig) and config.plan is not None}
    if not files:
        return plan, []
    from attnconvert.surgery.spans import read_plan

    notes: list[str] = []
    rules: dict[int, list[tuple[int, float]]] = {}
    for name in dict.fromkeys(files.values()):
        found, said = read_plan(Path(name).expanduser(), sites)
        rules |= {idx: [(rule.alpha, rule.beta) for rule in found[idx]] for idx, file in files.items() if file == name}
        notes += [
            f"{name}: its windows grow with the position of the query here, not with the length of the input; at the end of an input both are the same.",
            *said,
        ]
    return with_span_rules(plan, rules), notes


def chosen_rules(search: Mapping[str, Any]) -> dict[int, list[tuple[int, float]]]:
    """Layer index -> rules (alpha, beta) of the plan that a search chose, from its dictionary form."""
    rules = search["front"][search["chosen"]]["rules"]
    return {int(idx): [(int(alpha), float(beta)) for alpha, beta in own] for idx, own in rules.items()}


# ---------------------------------------------------------------- pictures

_LIGHT, _DARK = (229, 240, 252), (16, 66, 129)
_WIDE_CELLS = 16  # KV heads up to which a cell of the terminal's map has room for its percentage
_HEADS_PER_LINE = 64


@dataclass(frozen=True)
class SpanMap:
    """Share of the keys that each KV head keeps at one length.

    Attributes:
        length: tokens.
        layers: layer indices.
        densities: per layer, one share per KV head: 1 where nothing is left out, None where the layer's method keeps no keys or its rules are not known yet.
    """

    length: int
    layers: tuple[int, ...]
    densities: tuple[tuple[float | None, ...], ...]

    @property
    def mean(self) -> float:
        """Over all heads that keep keys; NaN when there are none."""
        known = [share for row in self.densities for share in row if share is not None]
        return sum(known) / len(known) if known else float("nan")


def span_heat_map(plan: ConversionPlan, length: int) -> SpanMap:
    """What a plan's layers keep after `length` tokens. Layers that stay softmax keep everything.

    Args:
        plan: of a conversion, with the rules where they are known.
        length: tokens.
    """
    rows: list[tuple[float | None, ...]] = []
    for row in plan.layers:
        known = kept_shares(asdict(row), length)
        unknown = 1.0 if row.method is None else None
        rows.append((unknown,) * row.num_key_value_heads if known is None else tuple(known))
    return SpanMap(length, tuple(row.layer_idx for row in plan.layers), tuple(rows))


def render_heat_map(shown: SpanMap) -> RenderableType:
    """The map for a terminal: a line per layer, a cell per KV head with its percentage, or its tens digit where heads are many. Says the same without colour."""
    from rich.console import Group
    from rich.text import Text

    wide = max(map(len, shown.densities)) <= _WIDE_CELLS
    what = "" if wide else "; 5 = 50 to 59 %, # = all"
    lines = [Text(f"Keys kept after {shown.length:,} tokens, in %: mean {shown.mean:.1%}", style="bold"), Text(f"a line per layer, a column per KV head{what}")]
    for layer, row in zip(shown.layers, shown.densities, strict=True):
        for first in range(0, len(row), _HEADS_PER_LINE):
            line = Text(f"{layer:>5} " if first == 0 else " " * 6)
            for share in row[first : first + _HEADS_PER_LINE]:
                line.append(_wide_cell(share) if wide else _narrow_cell(share), style="" if share is None else _style(share))
            lines.append(line)
    return Group(*lines)


def _wide_cell(share: float | None) -> str:
    return "   -" if share is None else f"{100 * share:4.0f}"


def _narrow_cell(share: float | None) -> str:
    return "-" if share is None else "#" if share >= 1 else str(int(10 * share))


def _style(share: float) -> str:
    red, green, blue = (round(light + (dark - light) * share) for light, dark in zip(_LIGHT, _DARK, strict=True))
    return f"{'white' if share > 0.5 else 'black'} on rgb({red},{green},{blue})"


def draw_heat_map(shown: SpanMap, path: Path) -> Path:
    """Write the map as a PNG.

    Returns:
        The file.

    Raises:
        AttnConvertError: `missing-extra` without matplotlib, `cannot-write`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AttnConvertError("missing-extra", "plots need matplotlib, which is not installed", hint="`pip install 'attnconvert[plots]'`") from error
    import numpy as np

    from attnconvert.distill.loop import write_atomic

    layers, heads = len(shown.layers), max(map(len, shown.densities))
    values = np.full((layers, heads), np.nan)
    for number, row in enumerate(shown.densities):
        values[number, : len(row)] = [np.nan if share is None else share for share in row]
    figure = Figure(figsize=(8.0, min(14.0, 1.6 + 0.22 * layers)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("#e9e9ec")
    image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    if heads <= _WIDE_CELLS and layers <= 48:
        for y, x in np.argwhere(~np.isnan(values)):
            axes.text(x, y, f"{100 * values[y, x]:.0f}", ha="center", va="center", fontsize=8, color="white" if values[y, x] > 0.6 else "black")
    every = -(-layers // 40)
    axes.set_yticks(range(0, layers, every), [str(layer) for layer in shown.layers[::every]])
    axes.set_xticks(range(0, heads, -(-heads // 32)))
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("KV head", fontsize=10)
    axes.set_ylabel("layer", fontsize=10)
    axes.set_title(f"Keys kept after {shown.length:,} tokens: mean {shown.mean:.1%}", loc="left", fontsize=12, fontweight="bold")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("share of the keys", fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return path
