"""Measure a converted model against its teacher: perplexity, KL, top-1 agreement, branch ablations, passkey recall, decode state.

Shapes: B rows, T tokens per row, V vocabulary, E hidden_size, M valid positions of a batch, N rows or trials in all, A answer tokens.

What the figures mean:

- Perplexity, KL and agreement are token-weighted over the positions that have a next token in the same document. Their intervals come from
  a bootstrap over rows, because tokens of one row share a document and are not independent draws.
- Passkey recall ranks the right key among ten by log-probability. It is a test of memory beyond the window only where the key lies further
  back than the window reaches; `PasskeyResult.beyond_window` says so. A stack of L window layers can hand information on up to L windows
  deep, so read it next to the same figure with the linear branch switched off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnconvert.distill.config import EvalConfig
    from attnconvert.distill.data import Batch, PackedRows

EVAL_SCHEMA_VERSION = 1
NUM_RESAMPLES = 2000
NUM_CANDIDATES = 10
# A block window of size w sees up to 2w keys, so this many windows back is out of reach for every window kind.
WINDOWS_BACK = 2
# The key must not sit on the attention sinks, which every hybrid keeps exact.
LEAD_TOKENS = 8
# Elements of one fp32 [positions, V] block: 128 MiB, about four of them live at once.
LOGITS_BUDGET = 2**25

EvalProgress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""
Ablation = Callable[[], AbstractContextManager[Any]]


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: the figure over all rows.
        se: bootstrap standard error; None with fewer than two rows.
        ci95: 95 % bootstrap percentile interval; None with fewer than two rows.
    """

    value: float
    se: float | None = None
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quality:
    """Held-out quality of one model on the rows that all models of the report share.

    Attributes:
        name: `teacher`, `student`, the name of an ablation of the student, or of another model that was passed.
        kind: `teacher`, `student`, `ablation` or `other`.
        nll: nats per token against the text.
        ppl: exp(nll).
        ppl_ratio: ppl / teacher's ppl, resampled in pairs; None for the teacher and without one.
        kl: KL(teacher || model), nats per token; None for the teacher and without one.
        agreement: share of positions where model and teacher have the same most likely token; None as for kl.
    """

    name: str
    kind: str
    nll: Estimate
    ppl: Estimate
    ppl_ratio: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None


@dataclass(frozen=True)
class PasskeyResult:
    """Passkey recall of one model at one length.

    Attributes:
        name: the model, as in `Quality.name`.
        length: tokens of context plus answer.
        num_trials: prompts.
        accuracy: share of prompts whose right key ranks first among ten (chance 0.1; a tie counts 1/number tied).
        ci95: 95 % Wilson interval of the accuracy.
        mrr: mean reciprocal rank of the right key (chance 0.293).
        by_third: accuracy for keys in the early, middle and late third of the range of depths that was drawn from; None without a trial there.
        distance: smallest and largest number of tokens between the end of the needle and the answer.
        beyond_window: every needle lies entirely outside the window of the token that answers; None when no window was given.
    """

    name: str
    length: int
    num_trials: int
    accuracy: float
    ci95: tuple[float, float]
    mrr: float
    by_third: tuple[float | None, float | None, float | None]
    distance: tuple[int, int]
    beyond_window: bool | None


@dataclass(frozen=True)
class StateBytes:
    """Bytes the decode cache of one sequence holds after a prefill of `length` tokens; `teacher` is None when it was not loaded."""

    length: int
    student: int
    teacher: int | None


@dataclass(frozen=True)
class EvalReport:
    """Everything `evaluate_models` measured. `to_dict` is strict JSON (a figure that is not finite becomes null).

    Attributes:
        num_rows: evaluation rows.
        row_length: tokens per row.
        num_tokens: positions scored, the same for every model.
        quality: teacher first (when there is one), then the student, its ablations, other models.
        passkey: one entry per model and length.
        state_bytes: one entry per length.
        notes: what was left out, and why, as sentences.
        window: window in tokens the passkey distances are set by, None when not given.
        device: where the models ran.
        dtype: data type of the student's first parameter.
        seconds: wall-clock seconds of each part.
        seed: seed of the bootstrap and of the passkey prompts.
        config: the EvalConfig as JSON.
    """

    num_rows: int
    row_length: int
    num_tokens: int
    quality: tuple[Quality, ...]
    passkey: tuple[PasskeyResult, ...]
    state_bytes: tuple[StateBytes, ...]
    notes: tuple[str, ...]
    window: int | None
    device: str
    dtype: str
    seconds: dict[str, float]
    seed: int
    config: dict[str, Any]

    def quality_of(self, name: str) -> Quality:
        """The quality entry called `name`; KeyError when there is none."""
        for row in self.quality:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is the inverse up to non-finite figures."""
        return {"schema_version": EVAL_SCHEMA_VERSION, **json_safe(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalReport:
        """Inverse of `to_dict`. Raises ValueError for a schema version this attnconvert does not know."""
        if data.get("schema_version") != EVAL_SCHEMA_VERSION:
            raise ValueError(f"evaluation has schema_version {data.get('schema_version')!r}, this attnconvert reads {EVAL_SCHEMA_VERSION}")
        rest = {key: value for key, value in data.items() if key not in ("schema_version", "quality", "passkey", "state_bytes", "notes")}
        return cls(
            quality=tuple(_quality_from_dict(row) for row in data["quality"]),
            passkey=tuple(PasskeyResult(**{**row, **{key: tuple(row[key]) for key in ("ci95", "by_third", "distance")}}) for row in data["passkey"]),
            state_bytes=tuple(StateBytes(**row) for row in data["state_bytes"]),
            notes=tuple(data["notes"]),
            **rest,
        )


def json_safe(value: Any) -> Any:
    """Copy of a JSON-like value with tuples as lists, numpy scalars as Python's, and non-finite floats as None."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _estimate_from_dict(data: Mapping[str, Any]) -> Estimate:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    ci95 = None if data["ci95"] is None else (number(data["ci95"][0]), number(data["ci95"][1]))
    return Estimate(value=number(data["value"]), se=data["se"], ci95=ci95)


def _quality_from_dict(data: Mapping[str, Any]) -> Quality:
    ratio, kl, agreement = (None if data[key] is None else _estimate_from_dict(data[key]) for key in ("ppl_ratio", "kl", "agreement"))
    nll, ppl = _estimate_from_dict(data["nll"]), _estimate_from_dict(data["ppl"])
    return Quality(name=data["name"], kind=data["kind"], nll=nll, ppl=ppl, ppl_ratio=ratio, kl=kl, agreement=agreement)


# ---------------------------------------------------------------- the whole evaluation


def evaluate_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: PackedRows,
    config: EvalConfig,
    *,
    device: torch.device | str,
    window: int | None,
    ablations: Mapping[str, Ablation],
    progress: EvalProgress | None = None,
    others: Mapping[str, PreTrainedModel] | None = None,
    seed: int = 0,
) -> EvalReport:
    """Measure the student, its ablations and other models against the teacher.

    The models must already be on `device`; they are put into eval mode for the time of the call and get no gradients.

    Args:
        student: the converted causal LM.
        teacher: the model it was converted from, or None when it cannot be loaded: then there are student figures only.
        tokenizer: the student's tokenizer, for the passkey prompts.
        rows: held-out packed rows [N, T]; the first ceil(config.tokens / T) of them are used.
        config: how many tokens, which passkey lengths, how many trials.
        device: where inputs are sent.
        window: `window.size` of the recipe in tokens, None when there is no single one. Sets default passkey lengths and key distances.
        ablations: name -> function giving a context manager that changes the student while it is open. It is entered once per batch and
            must leave the output embeddings alone.
        progress: told about each batch.
        others: name -> further models measured the same way, such as the softmax teacher finetuned on the same data.
        seed: seed of the bootstrap and of the passkey prompts.

    Raises:
        AttnConvertError: `no-eval-tokens` when the rows hold nothing to predict, `vocab-mismatch` when models have different vocabularies.
    """
    device = torch.device(device)
    others = dict(others or {})
    variants = _variants(student, teacher, ablations, others)
    notes: list[str] = []
    if teacher is None:
        notes.append("The teacher could not be loaded: KL, agreement and ratios are missing, and the student's figures stand alone.")
    seconds: dict[str, float] = {}
    models = [student, *([teacher] if teacher is not None else []), *others.values()]
    with _evaluating(models), torch.no_grad():
        start = time.perf_counter()
        measured = _measure_rows(variants, rows, config, device, progress)
        quality = _quality(variants, measured, seed)
        seconds["quality"] = time.perf_counter() - start

        start = time.perf_counter()
        lengths = _usable_lengths(config, window, models, notes)
        passkey = _passkey_results(variants, tokenizer, lengths, config.passkey_trials, window, device, seed, progress, notes)
        seconds["passkey"] = time.perf_counter() - start

        start = time.perf_counter()
        state_bytes = _state_bytes(student, teacher, rows.input_ids.flatten(), _state_lengths(lengths, config, models), device, progress)
        seconds["state_bytes"] = time.perf_counter() - start
    return EvalReport(
        num_rows=len(measured.num_targets),
        row_length=int(rows.input_ids.shape[1]),
        num_tokens=int(measured.num_targets.sum()),
        quality=quality,
        passkey=passkey,
        state_bytes=state_bytes,
        notes=tuple(notes),
        window=window,
        device=device_name(device),
        dtype=str(next(student.parameters()).dtype).removeprefix("torch."),
        seconds={key: round(value, 3) for key, value in seconds.items()},
        seed=seed,
        config=config.model_dump(mode="json"),
    )


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the accelerator."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class _Variant:
    """A model as it is measured: the model and the context it runs in."""

    name: str
    kind: str
    model: PreTrainedModel
    context: Ablation


def _variants(
    student: PreTrainedModel, teacher: PreTrainedModel | None, ablations: Mapping[str, Ablation], others: Mapping[str, PreTrainedModel]
) -> list[_Variant]:
    variants = [_Variant("teacher", "teacher", teacher, nullcontext)] if teacher is not None else []
    variants.append(_Variant("student", "student", student, nullcontext))
    variants += [_Variant(name, "ablation", student, context) for name, context in ablations.items()]
    variants += [_Variant(name, "other", model, nullcontext) for name, model in others.items()]
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names), f"two variants share a name: {names}"
    vocabularies = {variant.name: _vocab_size(variant.model) for variant in variants}
    if len(set(vocabularies.values())) > 1:
        raise AttnConvertError(
            "vocab-mismatch",
            f"the models to compare have different vocabularies: {vocabularies}",
            expected="the teacher the student was converted from",
            hint="KL and agreement compare next-token distributions, so both models must use the same tokenizer.",
        )
    return variants


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


@contextmanager
def _evaluating(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Eval mode inside, every module's own training flag back afterwards (a finetuned model may mix both)."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _tokens_per_forward(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 2048


# ---------------------------------------------------------------- perplexity, KL, agreement


@dataclass(frozen=True)
class _Measured:
    """Sums per row. `num_targets` [N]; per variant `nll`, `kl`, `agree` [N], kl and agree empty without a teacher."""

    num_targets: NDArray[np.float64]
    nll: dict[str, NDArray[np.float64]]
    kl: dict[str, NDArray[np.float64]]
    agree: dict[str, NDArray[np.float64]]


def _measure_rows(variants: Sequence[_Variant], rows: PackedRows, config: EvalConfig, device: torch.device, progress: EvalProgress | None) -> _Measured:
    """One pass over the rows with every variant, batch by batch, so that the teacher runs once however many ablations there are."""
    available, length = rows.input_ids.shape
    num_rows = min(available, -(-config.tokens // length))
    heads_split = {}
    for variant in variants:
        with variant.context():
            heads_split[variant.name] = head_is_separate(variant.model, device)
    # Without a separate head, whole rows of logits are held, so one row at a time.
    batch_size = max(1, _tokens_per_forward(device) // length) if all(heads_split.values()) else 1
    parts: list[dict[str, NDArray[np.float64]]] = []
    for first in range(0, num_rows, batch_size):
        batch = rows.rows(range(first, min(first + batch_size, num_rows)))
        parts.append(_measure_batch(variants, heads_split, batch, device))
        if progress is not None:
            progress("held-out text", min(first + batch_size, num_rows), num_rows)
    sums = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    if not parts or sums["num_targets"].sum() == 0:
        raise AttnConvertError(
            "no-eval-tokens",
            f"the held-out data holds no token to predict ({num_rows} rows of {length})",
            expected="at least one row with two tokens of one document",
            hint="Give more held-out text (data.eval_source or data.eval_fraction) or a larger evaluation.tokens.",
        )

    def pick(what: str) -> dict[str, NDArray[np.float64]]:
        return {variant.name: sums[f"{what}/{variant.name}"] for variant in variants if f"{what}/{variant.name}" in sums}

    return _Measured(num_targets=sums["num_targets"], nll=pick("nll"), kl=pick("kl"), agree=pick("agree"))


def head_is_separate(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether logits = output_embeddings(base_model(x)), bit for bit, with nothing in between or after (softcap, logit scale).

    Then logits can be computed for a few positions at a time. Found by trying, so that no family needs naming; a no costs memory, not truth.
    """
    head, base = _head(model), model.base_model
    if head is None or base is model:
        return False
    input_ids = torch.arange(8, device=device)[None] % _vocab_size(model)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=device)
    hidden = getattr(base(input_ids=input_ids, position_ids=position_ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return False
    return torch.equal(head(hidden), model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits)


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _measure_batch(variants: Sequence[_Variant], heads_split: Mapping[str, bool], batch: Batch, device: torch.device) -> dict[str, NDArray[np.float64]]:
    targets_BT = batch.targets()
    valid_BT = targets_BT != -100
    row_of_M = valid_BT.nonzero()[:, 0].numpy()
    num_rows = len(targets_BT)
    targets_M = targets_BT[valid_BT].to(device)
    input_ids, position_ids, valid = batch.input_ids.to(device), batch.position_ids.to(device), valid_BT.to(device)

    outputs: dict[str, torch.Tensor] = {}  # [M, E] before the head, or [M, V] logits
    for variant in variants:
        with variant.context():
            # No attention_mask: stock models then build the block-diagonal mask from position_ids, converted ones do the same.
            if heads_split[variant.name]:
                out = variant.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            else:
                out = variant.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        outputs[variant.name] = out[valid]

    pieces: dict[str, list[torch.Tensor]] = {}
    step = max(1, LOGITS_BUDGET // _vocab_size(variants[0].model))
    for start in range(0, len(targets_M), step):
        teacher_logp = None
        for variant in variants:
            out = outputs[variant.name][start : start + step]
            logits = _head(variant.model)(out) if heads_split[variant.name] else out
            logp = F.log_softmax(logits.float(), dim=-1)
            pieces.setdefault(f"nll/{variant.name}", []).append(-logp.gather(1, targets_M[start : start + step, None])[:, 0])
            if variant.kind == "teacher":
                teacher_logp, teacher_top, teacher_p = logp, logp.argmax(dim=-1), logp.exp()
            elif teacher_logp is not None:
                # p (log p - log q), with 0 where p underflows to 0, whatever log q is.
                kl = torch.where(teacher_p > 0, teacher_p * (teacher_logp - logp), 0.0).sum(dim=-1)
                pieces.setdefault(f"kl/{variant.name}", []).append(kl)
                pieces.setdefault(f"agree/{variant.name}", []).append(logp.argmax(dim=-1) == teacher_top)
    values = {key: torch.cat(piece).cpu().double().numpy() for key, piece in pieces.items()}
    values["num_targets"] = np.ones(len(row_of_M))
    return {key: np.bincount(row_of_M, weights=value, minlength=num_rows).astype(np.float64) for key, value in values.items()}


def _quality(variants: Sequence[_Variant], measured: _Measured, seed: int) -> tuple[Quality, ...]:
    num_rows = len(measured.num_targets)
    # The same resamples for every figure and model: ratios are of paired rows.
    weights = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES) if num_rows > 1 else None

    def estimate(sums_N: NDArray[np.float64], transform: Callable[[Any], Any]) -> Estimate:
        # A model that is off enough overflows exp; the figure is then inf and says so.
        with np.errstate(over="ignore", invalid="ignore"):
            value = float(transform(sums_N.sum() / measured.num_targets.sum()))
            if weights is None:
                return Estimate(value)
            samples = transform((weights @ sums_N) / np.maximum(weights @ measured.num_targets, 1))
            low, high = np.percentile(samples, [2.5, 97.5])
            return Estimate(value, se=float(np.std(samples, ddof=1)), ci95=(float(low), float(high)))

    def identity(x: Any) -> Any:
        return x

    rows = []
    for variant in variants:
        nll = measured.nll[variant.name]
        against = variant.name in measured.kl
        rows.append(
            Quality(
                name=variant.name,
                kind=variant.kind,
                nll=estimate(nll, identity),
                ppl=estimate(nll, np.exp),
                ppl_ratio=estimate(nll - measured.nll["teacher"], np.exp) if against else None,
                kl=estimate(measured.kl[variant.name], identity) if against else None,
                agreement=estimate(measured.agree[variant.name], identity) if against else None,
            )
        )
    return tuple(rows)


# ---------------------------------------------------------------- passkey recall

_SUBJECTS = (
    "The old gardener", "A quiet neighbour", "The village baker", "My younger cousin", "The tall librarian", "A travelling painter", "The ferry captain",
    "Her music teacher", "The night porter", "A young carpenter", "The museum guide", "Our local doctor", "The mountain guide", "A retired sailor",
    "The weather station", "The small orchestra", "A stray cat", "The morning train", "The river bank", "An empty bench",
)  # fmt: skip
_PREDICATES = (
    "waited beside the bridge", "looked across the valley", "carried a basket of apples", "moved slowly past the church", "stayed close to the harbour",
    "kept a careful diary", "was seen near the market", "enjoyed the mild weather", "stood under the chestnut trees", "followed the narrow path",
    "belonged to the same street", "rested in the afternoon sun", "watched the clouds drift by", "came back from the hills", "listened to the falling rain",
    "sat at a wooden table", "crossed the wide square", "remembered the long summer", "turned towards the lake", "told a short story",
)  # fmt: skip
_TAILS = (
    "before the shops opened", "while the lamps were lit", "as the leaves began to fall", "on a calm Sunday", "until the evening grew cold",
    "without any hurry at all", "during the first week of spring", "when the bells had stopped", "after a late breakfast", "because the road was closed",
    "though nobody had asked", "and then went home again", "with a folded newspaper", "in the soft yellow light", "for the rest of the day",
    "just like the year before",
)  # fmt: skip
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True)
class PasskeyPrompts:
    """Prompts of one length, tokenised. Candidate 0 is the right key.

    Attributes:
        length: tokens of context plus the longest answer.
        context: int64 [N, length - A], everything up to the answer; the start may cut a filler sentence.
        answers: int64 [N, 10, A], the tokens of each candidate, padded on the right with token 0.
        answer_mask: bool [N, 10, A], False on padding.
        distance: int64 [N], tokens between the end of the needle and the answer.
        third: int64 [N], 0 early, 1 middle, 2 late in the range of depths drawn from.
        beyond_window: every needle lies outside the reach of the window; None when no window was given.
    """

    length: int
    context: torch.Tensor
    answers: torch.Tensor
    answer_mask: torch.Tensor
    distance: torch.Tensor
    third: torch.Tensor
    beyond_window: bool | None


def passkey_prompts(tokenizer: PreTrainedTokenizerBase, length: int, num_trials: int, window: int | None, seed: int) -> PasskeyPrompts | None:
    """Build the prompts of one length; None when needle and question do not fit into it.

    Each prompt is filler, the needle, filler, the question. The distance from needle to answer is drawn uniformly (one draw from each of
    `num_trials` equal strata) between the question's own length and what the context can hold; where the context is long enough, never below
    2 windows, since a block window of size w sees up to 2w keys: then no key of the needle is visible to the token that answers. Shorter
    lengths cannot test recall beyond the window, draw from the full range and say `beyond_window=False`. At least 8 filler tokens come first
    where they fit, so that the key is never an attention sink.

    Args:
        tokenizer: any transformers tokenizer; the beginning-of-sequence token is kept when it adds one.
        length: tokens of context plus the longest candidate's tokens.
        num_trials: prompts, at least 1.
        window: see `evaluate_models`.
        seed: prompts are a pure function of the arguments.
    """
    rng = np.random.default_rng([seed, length])
    keys_NC = np.stack([rng.choice(np.arange(10_000, 100_000), size=NUM_CANDIDATES, replace=False) for _ in range(num_trials)])

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def count(text: str) -> int:
        return len(tokenize(text))

    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and list(tokenizer("", verbose=False)["input_ids"])[:1] == [bos] else []
    question = tokenize(_QUESTION)
    answered = [[tokenize(f"{_QUESTION} {key}") for key in keys] for keys in keys_NC]
    # Where a tokenizer merges across the boundary, the merged token belongs to the answer.
    boundary = min(_shared_prefix(question, ids) for row in answered for ids in row)
    width = max(len(ids) - boundary for row in answered for ids in row)
    context_length = length - width
    needle_length = max(count(_NEEDLE.format(key=keys[0])) for keys in keys_NC)
    longest_sentence = sum(max(count(" " + part) for part in parts) for parts in (_SUBJECTS, _PREDICATES, _TAILS)) + 3

    # Distances are measured to the first answer token, so they include the question up to the boundary.
    nearest = boundary
    farthest = context_length - len(prefix) - needle_length
    if farthest < nearest:
        return None
    # Filler comes in whole sentences, so a draw may overshoot by one of them.
    latest_draw = max(nearest, farthest - LEAD_TOKENS - longest_sentence)
    if window is not None and latest_draw >= WINDOWS_BACK * window:
        nearest = max(nearest, WINDOWS_BACK * window)

    def filler(at_least: int, tail: str) -> str:
        """Sentences s with count(s + tail) >= at_least, by less than one sentence."""
        text = ""
        while (missing := at_least - count(text + tail)) > 0:
            # Counting text costs more than making it, so add many sentences at once; longest_sentence bounds every one from above.
            for _ in range(max(1, missing // longest_sentence)):
                subject, predicate, ending = (words[rng.integers(len(words))] for words in (_SUBJECTS, _PREDICATES, _TAILS))
                text += f" {subject} {predicate} {ending}."
        return text

    contexts, distances, thirds = [], [], []
    cut = len(question) - boundary
    for trial, keys in enumerate(keys_NC):
        place = (trial + rng.random()) / num_trials  # 0 = as near as allowed, 1 = as far as possible
        wanted = nearest + round(place * (latest_draw - nearest))
        needle = _NEEDLE.format(key=keys[0])
        after = filler(wanted + cut, _QUESTION)
        before = filler(context_length, needle + after + _QUESTION)
        ids = tokenize(before + needle + after + _QUESTION)
        ids = ids[: len(ids) - cut]
        distance = len(ids) - count(before + needle)
        assert distance <= farthest, f"passkey needle was cut: {distance} > {farthest}"
        contexts.append(prefix + ids[len(ids) - (context_length - len(prefix)) :])
        distances.append(distance)
        # With nothing to draw from (a context just long enough), every needle is as near as can be.
        thirds.append(2 - min(2, int(place * 3)) if latest_draw > nearest else 2)

    answers = torch.zeros(num_trials, NUM_CANDIDATES, width, dtype=torch.int64)
    answer_mask = torch.zeros(num_trials, NUM_CANDIDATES, width, dtype=torch.bool)
    for n, row in enumerate(answered):
        for c, ids in enumerate(row):
            answers[n, c, : len(ids) - boundary] = torch.tensor(ids[boundary:])
            answer_mask[n, c, : len(ids) - boundary] = True
    return PasskeyPrompts(
        length=length,
        context=torch.tensor(contexts),
        answers=answers,
        answer_mask=answer_mask,
        distance=torch.tensor(distances),
        third=torch.tensor(thirds),
        beyond_window=None if window is None else min(distances) >= WINDOWS_BACK * window,
    )


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def passkey_scores(model: PreTrainedModel, prompts: PasskeyPrompts, device: torch.device) -> Iterator[torch.Tensor]:
    """Summed log-probability of every candidate answer, fp32 on the CPU, [n, 10] per batch of prompts.

    The context is encoded once per prompt; its cache is then repeated for the ten candidates. Prompts of a batch have equal length, and
    padding stands behind the answers where a causal model cannot see it, so no mask is needed.
    """
    step = max(1, _tokens_per_forward(device) // prompts.length)
    for start in range(0, len(prompts.context), step):
        context = prompts.context[start : start + step].to(device)
        answers = prompts.answers[start : start + step].to(device)
        mask = prompts.answer_mask[start : start + step].to(device)
        n, num_candidates, width = answers.shape
        out = model(input_ids=context, use_cache=True, logits_to_keep=1)
        scores = F.log_softmax(out.logits[:, -1].float(), dim=-1).gather(1, answers[:, :, 0])
        if width > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(num_candidates)
            logits = model(input_ids=answers[:, :, :-1].reshape(n * num_candidates, width - 1), past_key_values=cache, use_cache=True).logits
            logp = F.log_softmax(logits.float(), dim=-1).gather(2, answers[:, :, 1:].reshape(n * num_candidates, width - 1, 1))
            scores = scores + torch.where(mask[:, :, 1:], logp.reshape(n, num_candidates, width - 1), 0.0).sum(dim=-1)
        yield scores.cpu()


def rank_right_key(scores: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Credit and reciprocal rank of candidate 0, both [N], in expectation over a random order of ties.

    Ties must not favour the right key: a model that scores all ten alike gets 0.1, not 1.

    Args:
        scores: [N, 10]; a NaN counts as the worst score.
    """
    values = np.nan_to_num(scores.double().numpy(), nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    greater = (values > values[:, :1]).sum(axis=1)
    equal = (values == values[:, :1]).sum(axis=1)
    credit = np.where(greater == 0, 1 / equal, 0.0)
    reciprocal = np.array([np.mean(1 / np.arange(g + 1, g + e + 1)) for g, e in zip(greater, equal, strict=True)])
    return credit, reciprocal


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; sensible at 0 and 1, where the normal interval has no width."""
    z = 1.959964
    share, denominator = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / denominator
    # At 0 and 1 the ends are exact; rounding must not push the share out of its own interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _passkey_results(
    variants: Sequence[_Variant],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    num_trials: int,
    window: int | None,
    device: torch.device,
    seed: int,
    progress: EvalProgress | None,
    notes: list[str],
) -> tuple[PasskeyResult, ...]:
    if num_trials == 0:
        return ()
    results = []
    for length in lengths:
        prompts = passkey_prompts(tokenizer, length, num_trials, window, seed)
        if prompts is None:
            notes.append(f"Passkey length {length} was skipped: needle, question and answer do not fit into {length} tokens of this tokenizer.")
            continue
        for variant in variants:
            parts: list[torch.Tensor] = []
            with variant.context():
                for part in passkey_scores(variant.model, prompts, device):
                    parts.append(part)
                    if progress is not None:
                        progress(f"passkey {length}, {variant.name}", sum(len(part) for part in parts), num_trials)
            results.append(passkey_result(variant.name, prompts, torch.cat(parts)))
    return tuple(results)


def passkey_result(name: str, prompts: PasskeyPrompts, scores: torch.Tensor) -> PasskeyResult:
    """Sum up the scores [N, 10] of one model on one set of prompts."""
    credit, reciprocal = rank_right_key(scores)
    third = prompts.third.numpy()
    early, middle, late = (float(credit[third == part].mean()) if (third == part).any() else None for part in range(3))
    return PasskeyResult(
        name=name,
        length=prompts.length,
        num_trials=len(credit),
        accuracy=float(credit.mean()),
        ci95=wilson_interval(float(credit.sum()), len(credit)),
        mrr=float(reciprocal.mean()),
        by_third=(early, middle, late),
        distance=(int(prompts.distance.min()), int(prompts.distance.max())),
        beyond_window=prompts.beyond_window,
    )


def _max_length(models: Sequence[PreTrainedModel]) -> int | None:
    """The smallest max_position_embeddings of the models, None when none of them has a limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min((int(limit) for limit in limits if limit), default=None)


def _usable_lengths(config: EvalConfig, window: int | None, models: Sequence[PreTrainedModel], notes: list[str]) -> list[int]:
    """The passkey lengths of the config (by default 1x, 4x, 16x the window), less those beyond what the models were built for."""
    base = window or max(16, config.length // 4)
    lengths = sorted(set(config.passkey_lengths or (base, 4 * base, 16 * base)))
    limit = _max_length(models)
    too_long = [length for length in lengths if limit is not None and length > limit]
    if too_long and config.passkey_trials > 0:
        notes.append(f"Passkey lengths {', '.join(map(str, too_long))} were skipped: the models go up to max_position_embeddings = {limit}.")
    return [length for length in lengths if length not in too_long]


# ---------------------------------------------------------------- decode state


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors a cache holds: keys and values, states in attributes, dicts or lists, of every layer. Each tensor counts once."""
    tensors = {id(tensor): tensor for tensor in _tensors(cache)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, (Cache, CacheLayerMixin)):
        yield from _tensors(vars(value))


def _state_lengths(lengths: Sequence[int], config: EvalConfig, models: Sequence[PreTrainedModel]) -> list[int]:
    """The passkey lengths and the evaluation length, as far as the models go."""
    limit = _max_length(models)
    return sorted({*lengths, config.length if limit is None else min(config.length, limit)})


def _state_bytes(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    token_ids: torch.Tensor,
    lengths: Sequence[int],
    device: torch.device,
    progress: EvalProgress | None,
) -> tuple[StateBytes, ...]:
    """Prefill one sequence of each length and weigh the caches. Bytes do not depend on the text, so held-out tokens are repeated to fill up."""
    results = []
    for done, length in enumerate(lengths, start=1):
        input_ids = token_ids.repeat(-(-length // len(token_ids)))[:length].to(device=device, dtype=torch.int64)[None]

        def held(model: PreTrainedModel, input_ids: torch.Tensor = input_ids) -> int:
            return cache_bytes(model(input_ids=input_ids, use_cache=True, logits_to_keep=1).past_key_values)

        results.append(StateBytes(length=length, student=held(student), teacher=held(teacher) if teacher is not None else None))
        if progress is not None:
            progress("decode state", done, len(lengths))
    return tuple(results)
