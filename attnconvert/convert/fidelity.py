"""How close a converted model's attention is to the softmax attention it replaced: weights, head by head, and text, side by side.

Shapes: B = 1 row at a time, T tokens of the row that are looked at, H query heads, G key-value heads, D head_dim, P <= 64 cells of a picture.

What the figures mean:

- Every converted layer computes softmax attention on its own q, k and v, hands those to a tap, and passes the softmax result on. So each layer is
  compared on the inputs it would have in a model whose other layers are exact: errors do not build up from layer to layer, and the projections are
  the student's, finetuning included. How far finetuning itself has moved the softmax attention is `softmax_drift`, which needs the teacher.
- Attention outputs are linear in v whatever the core, so with v = one column of the identity per head dimension the output IS D columns of the weight
  matrix. A core that is not linear in v after all is found out and left out, see `unreadable`.
- Everything is computed in fp32, whatever the model's data type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnconvert.convert.evaluate import eval_mode, json_safe
from attnconvert.convert.generate import encode_prompt, generate_text
from attnconvert.convert.report import kept_shares
from attnconvert.errors import AttnConvertError
from attnconvert.surgery.runtime.modeling import converted_sites
from attnconvert.surgery.runtime.seam import AttentionCore, SeamInputs, softmax_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnconvert.convert.evaluate import EvalProgress
    from attnconvert.distill.data import PackedRows

ROW_TOKENS = 256
# A block window reaches up to two windows back: four windows leave as many keys outside it as inside. Weights take H * T * T * 4 bytes.
ROW_WINDOWS, MAX_ROW_TOKENS = 4, 1024
MAP_CELLS = 64
MIN_RANKED_KEYS = 8
WEIGHT_FLOOR = 1e-9
"""What a student's weight counts as at least: a key that is dropped altogether costs its teacher's weight * log(weight / 1e-9), not infinity."""
LINEARITY_TOLERANCE = 1e-2
"""Relative difference between a core's output for a combination of values and the combination of its outputs; cores in use are at 1e-6."""


# ---------------------------------------------------------------- attention weights


def read_weights(attend: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The weight matrix of an attention operator that is linear in v, all query heads.

    Args:
        attend: v [1, G, T, D] -> [1, H, T, D], with q and k fixed.
        like: v as it is in the model; gives shape, data type and device.

    Returns:
        [H, T, T], row = query, column = key.
    """
    _, _, T, D = like.shape
    eye = torch.eye(D, dtype=like.dtype, device=like.device)
    columns = []
    for first in range(0, T, D):
        width = min(D, T - first)
        probe = torch.zeros_like(like)
        probe[:, :, first : first + width] = eye[:width]
        columns.append(attend(probe)[0, :, :, :width])
    return torch.cat(columns, -1)


@dataclass(frozen=True)
class _Window:
    """Which keys a layer attends to exactly, from its row of the plan. `size` 0 = none; kind `spans` = all that it attends to at all."""

    size: int
    kind: str
    num_sinks: int

    def exact(self, start: Tensor) -> Tensor:
        """Bool [T, T], query by key. start [T]: index of the first token of each query's document."""
        query = torch.arange(len(start), device=start.device)
        position = query - start
        if self.kind == "spans":
            low = torch.zeros_like(position)
        elif self.size == 0:
            low = position + 1
        elif self.kind == "block":
            low = (position // self.size - 1).clamp_min(0) * self.size
        else:
            low = (position - self.size + 1).clamp_min(0)
        return (query >= (start + low)[:, None]) | (query < (start + self.num_sinks)[:, None])


@dataclass
class _Sums:
    """Running sums of one layer over the rows, float64 [H]."""

    error: Any = 0.0
    energy: Any = 0.0
    kl: Any = 0.0
    entropy_teacher: Any = 0.0
    entropy_student: Any = 0.0
    queries: int = 0
    correlation: Any = 0.0
    correlated: Any = 0
    maps: tuple[Tensor, Tensor] | None = None
    drift: list[float] = field(default_factory=lambda: [0.0, 0.0])


def attention_fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: PackedRows,
    *,
    device: torch.device | str,
    num_rows: int,
    seed: int = 0,
    progress: EvalProgress | None = None,
    num_maps: int = 4,
) -> dict[str, Any]:
    """Attention weights of every converted layer against softmax attention on the same q, k, v.

    Per layer (mean over heads) and per head:

    - `output_error`: sum |y_student - y_softmax|^2 / sum |y_softmax|^2.
    - `kl`: KL(softmax row || student row), nats, mean over queries; student weights are clipped at 1e-9 and made to sum to one.
    - `entropy_teacher`, `entropy_student`: entropy of the rows, nats, mean over queries.
    - `monotonicity`: rank correlation of log weights over the keys outside the exact window and sinks (all keys where a layer has neither), mean over
      queries with at least 8 such keys and weights that differ; None where there is no such query, and for attention spans, which give no weight to
      other keys. 1 = the order of the keys is kept.

    Args:
        student: the converted causal LM, on `device`.
        teacher: the model it was converted from, on `device`; only `softmax_drift` needs it.
        rows: held-out packed rows [N, T].
        device: where inputs are sent.
        num_rows: rows to use, drawn without replacement. Their first 256 tokens are looked at, or 4 windows (at most 1024 tokens) where that is more; of
            attention spans the shortest counts.
        seed: of the draw.
        progress: told about each row.
        num_maps: how many of the heads with the largest KL get a picture; the head with the median KL is added.

    Returns:
        JSON (a figure that is not finite is None): `rows`, `tokens` in all, `row_tokens`, `layers` as above with `layer_idx` and `heads`; per layer also `softmax_drift`: relative squared
        distance of the layer's output with softmax attention everywhere between student and teacher (None without a teacher). `maps`: both weight
        matrices of the row with the fewest documents in at most 64 x 64 cells, the mean over a cell's queries of the sum over its keys, so rows sum to
        one (3 digits are kept); `pick` says why the head is there, `largest` or `median`. `unreadable`: layers left out because their core is not linear in v;
        `unreached`: layers left out because their attention spans leave nothing out in rows of `row_tokens`.
    """
    device = torch.device(device)
    num_rows = min(num_rows, rows.num_rows)
    assert num_rows >= 1, "at least one row is needed"
    windows = _windows(student)
    widest = max((window.size for window in windows.values()), default=0)
    length = min(rows.length, max(ROW_TOKENS, min(ROW_WINDOWS * widest, MAX_ROW_TOKENS)))
    unreached = [row["layer_idx"] for row in student.config.attn_plan["layers"] if row["layer_idx"] in windows and _sees_all(row, length)]
    windows = {idx: window for idx, window in windows.items() if idx not in unreached}
    chosen = np.random.default_rng(seed).choice(rows.num_rows, num_rows, replace=False)
    batch = rows.rows(sorted(int(row) for row in chosen))
    input_ids, position_ids = batch.input_ids[:, :length], batch.position_ids[:, :length]
    order = sorted(range(num_rows), key=lambda row: (int((position_ids[row] == 0).sum()), row))  # the first one is drawn

    sums = {idx: _Sums() for idx in windows}
    unreadable: set[int] = set()
    idx_of = {id(module.core): idx for idx, _, module in converted_sites(student)}

    def tap(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs, y: Tensor) -> None:
        idx = idx_of[id(core)]
        if idx in sums and idx not in unreadable and not _add(sums[idx], core, q, k, v, inputs, windows[idx]):
            unreadable.add(idx)

    with _softmax_and_tap(student, tap), torch.no_grad(), eval_mode([student] if teacher is None else [student, teacher]):
        for done, row in enumerate(order, start=1):
            ids, positions = input_ids[row : row + 1].to(device), position_ids[row : row + 1].to(device)
            ours = _layer_outputs(student, student, ids, positions)
            if teacher is not None:
                theirs = _layer_outputs(student, teacher, ids, positions)
                for idx in sums.keys() & theirs.keys():
                    sums[idx].drift[0] += float((ours[idx] - theirs[idx]).square().sum())
                    sums[idx].drift[1] += float(theirs[idx].square().sum())
            if progress is not None:
                progress("attention maps", done, num_rows)

    layers = [_layer_dict(idx, sums[idx]) for idx in sums if idx not in unreadable]
    result = {
        "rows": num_rows,
        "tokens": num_rows * length,
        "row_tokens": length,
        "layers": layers,
        "maps": _pick_maps(layers, sums, num_maps),
        "unreadable": sorted(unreadable),
        "unreached": unreached,
    }
    safe: dict[str, Any] = json_safe(result)
    return safe


def _windows(student: Any) -> dict[int, _Window]:
    """The window of every converted layer, in model order."""
    plan = {row["layer_idx"]: row for row in student.config.attn_plan["layers"]}
    windows = {}
    for idx, _, _ in converted_sites(student):
        config, shares = plan[idx]["config"], kept_shares(plan[idx], MAX_ROW_TOKENS)
        if shares is not None:
            windows[idx] = _Window(round(min(shares) * MAX_ROW_TOKENS), "spans", 0)
            continue
        window = config.get("window") or {}
        windows[idx] = _Window(int(window.get("size", 0)), str(window.get("kind", "sliding")), int(config.get("sinks", 0)))
    return windows


def _sees_all(row: Mapping[str, Any], length: int) -> bool:
    """Whether a layer has attention spans, and all of them reach back to the beginning of a row of `length` tokens: a key that one query cannot see, no later one can."""
    shares = kept_shares(row, length)
    return shares is not None and min(shares) == 1


@contextmanager
def _softmax_and_tap(student: nn.Module, tap: Callable[[AttentionCore, Tensor, Tensor, Tensor, SeamInputs, Tensor], None]) -> Iterator[None]:
    """Inside, converted layers compute softmax attention and call `tap`."""
    cores = [module.core for _, _, module in converted_sites(student)]
    before = [core.tap for core in cores]
    try:
        for core in cores:
            core.tap = tap
        yield
    finally:
        for core, old in zip(cores, before, strict=True):
            core.tap = old


def _layer_outputs(student: nn.Module, model: Any, input_ids: Tensor, position_ids: Tensor) -> dict[int, Tensor]:
    """Runs `model` and returns the output fp32 [1, T, E] of its attention modules at the places where the student's are converted."""
    modules = dict(model.named_modules())
    outputs: dict[int, Tensor] = {}

    def keep(idx: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[idx] = (output[0] if isinstance(output, tuple) else output).float()

        return hook

    with ExitStack() as stack:
        for idx, path, _ in converted_sites(student):
            if path in modules:
                stack.callback(modules[path].register_forward_hook(keep(idx)).remove)
        # the whole model, not its base: a converted family that hands no position_ids to its layers learns about documents only this way
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return outputs


def _add(sums: _Sums, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, inputs: SeamInputs, window: _Window) -> bool:
    """Adds one row to a layer's sums, and the maps if it is the first. False when the core's weights cannot be read off. Shapes as in AttentionCore.forward."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.float(), k.float(), v.float()

        def attend(values: Tensor) -> Tensor:
            return core(q, k, values, inputs)  # type: ignore[no-any-return]

        def attend_softmax(values: Tensor) -> Tensor:
            return softmax_attention(q, k, values, scaling=inputs.scaling, start=inputs.start, sliding_window=inputs.sliding_window)

        student, teacher = read_weights(attend, v), read_weights(attend_softmax, v)
        y, target = attend(v)[0], attend_softmax(v)[0]
        if not _is_linear(attend, v, y):
            return False

        H, T = q.shape[1], q.shape[2]
        query = torch.arange(T, device=q.device)
        start = torch.zeros_like(query) if inputs.start is None else inputs.start[0]
        visible = (query <= query[:, None]) & (query >= start[:, None])
        if inputs.sliding_window is not None:
            visible &= query > query[:, None] - inputs.sliding_window
        p, s = _distribution(teacher, visible), _distribution(student, visible)
        if sums.maps is None:
            sums.maps = _pooled(p), _pooled(s)
        sums.queries += T
        sums.error += (y - target).square().sum((1, 2)).double().cpu()
        sums.energy += target.square().sum((1, 2)).double().cpu()
        sums.kl += (torch.special.xlogy(p, p) - p * s.clamp_min(WEIGHT_FLOOR).log()).sum((1, 2)).double().cpu()
        sums.entropy_teacher += torch.special.entr(p).sum((1, 2)).double().cpu()
        sums.entropy_student += torch.special.entr(s).sum((1, 2)).double().cpu()
        ranked = visible & ~window.exact(start) if window.size or window.num_sinks else visible
        ranked = ranked & (ranked.sum(1, keepdim=True) >= MIN_RANKED_KEYS)
        for head in range(H):  # ranks take several [T, T] int64 tensors, so a head at a time
            rho, known = _rank_correlation(p[head], s[head], ranked)
            if head == 0:
                total, count = torch.zeros(H, dtype=torch.float64), torch.zeros(H, dtype=torch.float64)
            total[head], count[head] = float(rho[known].double().sum()), int(known.sum())
        sums.correlation += total
        sums.correlated += count
    return True


def _is_linear(attend: Callable[[Tensor], Tensor], v: Tensor, y: Tensor) -> bool:
    """Whether attend(v - 2 w) = attend(v) - 2 attend(w), with w = v in reverse order; y [H, T, D] = attend(v).

    An output that is not finite passes: such a layer must show in the figures, as None.
    """
    reverse = v.flip(2)
    want = y - 2 * attend(reverse)[0]
    return not float((attend(v - 2 * reverse)[0] - want).square().sum()) > LINEARITY_TOLERANCE**2 * float(want.square().sum())


def _distribution(weights: Tensor, visible: Tensor) -> Tensor:
    """Weights [H, T, T] as distributions over the visible keys: nothing negative, rows that sum to one."""
    weights = weights.clamp_min(0) * visible
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _rank_correlation(a: Tensor, b: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Spearman correlation of a and b [T, T] over each row's `keys` (bool [T, T]), ties at their mean rank: [T], and where it is defined, bool [T]."""
    ranks = []
    for values in (a, b):
        # keys left out go behind all others, so they take the highest ranks and do not shift the rest
        values = values.masked_fill(~keys, torch.inf)
        ordered = values.sort(-1).values
        rank = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() * keys
        mean = rank.sum(-1, keepdim=True) / keys.sum(-1, keepdim=True).clamp_min(1)
        ranks.append((rank - mean) * keys)
    spread = (ranks[0].square().sum(-1) * ranks[1].square().sum(-1)).sqrt()
    finite = ((a + b) * keys).sum(-1).isfinite()
    return (ranks[0] * ranks[1]).sum(-1) / spread.clamp_min(1e-30), (spread > 0) & finite


def _pooled(weights: Tensor) -> Tensor:
    """[H, T, T] -> [H, P, P] on the CPU: mean over a cell's queries of the sum over its keys."""
    T = weights.shape[-1]
    P = min(T, MAP_CELLS)
    cell = torch.arange(T, device=weights.device) * P // T
    member = torch.nn.functional.one_hot(cell, P).to(weights.dtype)  # [T, P]
    return ((member / member.sum(0)).T @ weights @ member).cpu()


def _layer_dict(idx: int, sums: _Sums) -> dict[str, Any]:
    monotonicity = [float(total / count) if count else None for total, count in zip(sums.correlation, sums.correlated, strict=True)]
    known = [value for value in monotonicity if value is not None]
    figures = {
        "kl": sums.kl / sums.queries,
        "entropy_teacher": sums.entropy_teacher / sums.queries,
        "entropy_student": sums.entropy_student / sums.queries,
    }
    errors = sums.error / sums.energy.clamp_min(1e-30)
    return {
        "layer_idx": idx,
        "output_error": float(sums.error.sum() / sums.energy.sum().clamp_min(1e-30)),
        **{name: float(values.mean()) for name, values in figures.items()},
        "monotonicity": sum(known) / len(known) if known else None,
        "softmax_drift": sums.drift[0] / sums.drift[1] if sums.drift[1] > 0 else None,
        "heads": [
            {"head": head, "output_error": float(errors[head]), **{name: float(values[head]) for name, values in figures.items()}, "monotonicity": value}
            for head, value in enumerate(monotonicity)
        ],
    }


def _pick_maps(layers: Sequence[Mapping[str, Any]], sums: Mapping[int, _Sums], num_maps: int) -> list[dict[str, Any]]:
    """Pictures of the heads with the largest KL, largest first, then of the one with the median KL."""
    ranking = sorted(
        ((head["kl"], layer["layer_idx"], head["head"]) for layer in layers for head in layer["heads"]),
        key=lambda entry: (math.isnan(entry[0]), *entry),  # what is not a number is worst
        reverse=True,
    )
    picked = [(*entry, "largest") for entry in ranking[:num_maps]]
    if len(ranking) // 2 >= num_maps:
        picked.append((*ranking[len(ranking) // 2], "median"))
    maps = []
    for kl, idx, head, pick in picked:
        pooled = sums[idx].maps
        assert pooled is not None, "a layer with figures has maps"
        # 3 digits are more than a colour shows, and five pairs of maps are most of report.json
        teacher, student = ([[float(f"{value:.3g}") for value in row] for row in side[head].tolist()] for side in pooled)
        maps.append({"layer_idx": idx, "head": head, "kl": kl, "pick": pick, "teacher": teacher, "student": student})
    return maps


def draw_maps(fidelity: Mapping[str, Any], path: Path) -> None:
    """Writes the `maps` of `attention_fidelity` as a PNG: one head per row, softmax attention left, the converted layer right, weights on a log scale.

    Raises:
        AttnConvertError: `missing-extra` without matplotlib, `no-maps` when there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AttnConvertError("missing-extra", "pictures need matplotlib, which is not installed", hint="pip install 'attnconvert[plots]'") from error
    maps = fidelity.get("maps") or []
    if not maps:
        raise AttnConvertError("no-maps", "the evaluation holds no attention maps", hint="evaluate a model that has converted layers")
    tokens = fidelity.get("row_tokens")
    figure = Figure(figsize=(7.2, 0.9 + 3.1 * len(maps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(maps), 2, squeeze=False)
    figure.suptitle("Attention weights: softmax (left), converted layer (right)", fontsize=11)
    image = None
    for pair, entry in zip(axes, maps, strict=True):
        kl = f" (KL {'not finite' if entry['kl'] is None else format(entry['kl'], '.3g')}{', median' if entry.get('pick') == 'median' else ''})"
        for axis, side, name in zip(pair, ("teacher", "student"), ("softmax", "converted"), strict=True):
            weights = np.asarray(entry[side], dtype=np.float64)
            cells = len(weights)
            extent = (0, tokens or cells, tokens or cells, 0)
            future = np.triu(np.ones((cells, cells), dtype=bool), 1)
            # a weight of 0 gets the darkest colour, keys that are still to come get none
            shown = np.ma.masked_array(np.maximum(weights, 1e-4), mask=future | np.isnan(weights))
            axis.set_facecolor("#e9e9ec")
            image = axis.imshow(shown, norm=LogNorm(1e-4, 1), cmap="magma", extent=extent, interpolation="nearest")
            axis.set_title(f"layer {entry['layer_idx']}, head {entry['head']}: {name}" + (kl if side == "student" else ""), fontsize=9)
            axis.tick_params(labelsize=7, labelleft=side == "teacher")
        pair[0].set_ylabel("query token", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("key token", fontsize=8)
    assert image is not None
    per_cell = f"weight on a cell of {tokens // cells} keys" if tokens and tokens > cells else "weight"
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.2 / len(maps)), aspect=30, pad=0.02, extend="min")
    bar.set_label(per_cell, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    # without the version of matplotlib in it, the same maps give the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})


# ---------------------------------------------------------------- text, side by side


def _long_prompt() -> str:
    fact = "The keys to the boat house hang on the blue hook beside the kitchen door. "
    filler = (
        "In the morning the wind came from the west and the lake was grey. People walked along the shore, bought bread, and talked about the weather. "
        "Later the sun came out for an hour, and the children played near the water until it was time to go home. "
    )
    return fact + filler * 7 + "In the evening someone asked where the keys to the boat house were. They hang on the"


DEFAULT_PROMPTS: tuple[str, ...] = (
    "Once upon a time, in a small village by the sea,",
    "Water boils at a lower temperature on a mountain because",
    "To bake a simple loaf of bread, first",
    "The library was quiet. She opened the old book and",
    "One, two, three, four, five,",
    _long_prompt(),
)
"""Neutral prompts. The last one, of more than 300 tokens, asks at its end for a fact of its first sentence, which has left every short window by then."""


def side_by_side(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    *,
    device: torch.device | str,
    max_new_tokens: int = 48,
) -> list[dict[str, Any]]:
    """Greedy continuations of both models; with a chat template in the tokenizer, answers to the prompts as messages.

    Args:
        student: the converted causal LM, on `device`.
        teacher: the model it was converted from, on `device`, or None.
        tokenizer: the student's tokenizer.
        prompts: text to continue. A prompt that with its continuation is longer than `max_position_embeddings` is left out.
        device: where both models are.
        max_new_tokens: an end-of-text token ends a continuation earlier.

    Returns:
        `prompt`, `teacher` (None without one), `student` per prompt.
    """
    models = {"teacher": teacher, "student": student}
    assert all(next(model.parameters()).device.type == torch.device(device).type for model in models.values() if model is not None), "models on `device`"
    chat = bool(getattr(tokenizer, "chat_template", None))
    limit = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    rows = []
    with eval_mode([model for model in models.values() if model is not None]):
        for prompt in prompts:
            if limit and encode_prompt(tokenizer, prompt, chat=chat).shape[1] + max_new_tokens > limit:
                continue
            row: dict[str, Any] = {"prompt": prompt}
            for name, model in models.items():
                row[name] = None if model is None else generate_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat).text
            rows.append(row)
    return rows
