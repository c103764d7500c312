"""Long calibration samples: text, and questions whose answers depend on far text (MoA, https://arxiv.org/abs/2406.14909).

Two kinds alternate, since a plan has to serve both.
- Text: a part of a long document, of which the last quarter is scored, 1,024 tokens at most.
- Retrieval: facts about invented people are scattered over such a text, one of them is asked for at the end, and the model's own greedy answer is scored.
  The wording is that of `recall.py`, which shares nothing with the tests that report recall.

Plain text has few dependencies further back than a few hundred tokens: profiled on it alone, a model seems to need little of its context. Profiled on answers
alone, it seems to need little else.

Every sample has exactly the length asked for. An answer that ends early leaves room, which goes to the beginning of the context once the response is
known. Documents at least as long as the sample are used, other parts of them for other samples; only where there is none are documents joined.

Making samples takes a generation each, so they are kept in the user's cache (the assets folder of the Hugging Face cache) under a hash of the model's weights,
the settings and the text. A damaged file there is replaced.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnconvert.distill.data import read_documents
from attnconvert.distill.loop import write_atomic
from attnconvert.distill.recall import make_lookup
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from attnconvert.distill.config import DataConfig

_FORMAT = 2  # of the cache file and of how samples are made; a change makes old files useless
_TEXT_TOKENS, _TEXT_SHARE = 1024, 4  # scored in a sample of text: at most, and one in so many
_CHAT_ANSWER_TOKENS, _PLAIN_ANSWER_TOKENS = 32, 16  # of an answer at most
_NUM_FACTS = 3
_UNSEEN_SHARE = 4  # every fourth document is for the validation length
_BYTES_PER_TOKEN = 8  # more than any common text has: a document cut to so many bytes per token wanted is still long enough
_STREAM_BYTES = 64 << 20  # of a stream are looked at for long documents
_GENERATE_TOKENS = 16_384  # prompt tokens of one batch on a GPU: 2 GiB of keys and values for an 8B model with 8 KV heads
_MARK = "<<attnconvert context>>"

Note = Callable[[str], None]
Progress = Callable[[int, int], None]


class CalibrationItem(NamedTuple):
    """One sample.

    Attributes:
        input_ids: int64 [T].
        response: bool [T], True on the tokens that are scored, the last ones: the model's own answer, or the end of a text.
    """

    input_ids: Tensor
    response: Tensor


@dataclass(frozen=True)
class Calibration:
    """Samples by length.

    Attributes:
        items: length in tokens -> samples, of the two kinds in turn.
        notes: what the user should know about the text.
        from_cache: whether they were made before.
    """

    items: Mapping[int, tuple[CalibrationItem, ...]]
    notes: tuple[str, ...]
    from_cache: bool


@dataclass(frozen=True)
class _Prompt:
    """A prompt whose context can be given more tokens at its beginning: head + body[spare:] + tail, where `spare` is at most `budget`.

    Attributes:
        head, tail: token ids before and after the context.
        body: the context, `budget` tokens longer than the prompt shows.
        budget: tokens of the longest response.
    """

    head: list[int]
    body: list[int]
    tail: list[int]
    budget: int

    def ids(self, response_tokens: int) -> list[int]:
        """The prompt that with a response of so many tokens has the sample's length."""
        return [*self.head, *self.body[response_tokens:], *self.tail]


def make_calibration(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    lengths: Sequence[int],
    *,
    validation_length: int | None = None,
    num_samples: int = 16,
    response_tokens: int = 32,
    seed: int = 0,
    cache: Path | None = None,
    note: Note | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Samples for each length, read from the cache or made now.

    Args:
        model: the dense model, in eval mode, on its device.
        tokenizer: its tokenizer.
        data: the user's text; held-out documents are not used.
        lengths: tokens of a sample, response included.
        validation_length: one more length, whose samples come from documents that the others do not use, where there are enough; not among `lengths`.
        num_samples: per length.
        response_tokens: longest answer.
        seed: of documents, places, facts and questions. The same arguments give the same samples.
        cache: folder; None = the user's Hugging Face cache.
        note: told what is done.
        progress: told (samples written, samples).

    Raises:
        AttnConvertError: `length-too-long`, `length-too-short`, `data-empty`, `data-too-short`; the errors of reading data.
    """
    assert lengths, "samples have a length"
    assert validation_length not in lengths, "the validation length is one of its own"
    assert min(num_samples, response_tokens) >= 1, "counts are checked by the recipe"
    wanted = sorted({*lengths, *(() if validation_length is None else (validation_length,))})
    _check_lengths(model, wanted)
    form = _Form.of(tokenizer)
    for length in wanted:
        form.check(length, response_tokens)
    documents = _long_documents(data, max(wanted), num_samples * len(wanted), seed)
    settings = {
        "format": _FORMAT, "model": fingerprint(model), "lengths": wanted, "validation_length": validation_length, "num_samples": num_samples,
        "response_tokens": response_tokens, "seed": seed, "form": [form.begin, form.head, form.tail("x")], "vocabulary": _vocabulary_hash(tokenizer),
        "text": hashlib.sha256(b"\0".join(hashlib.sha256(document).digest() for document in documents)).hexdigest(),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32] + ".safetensors"
    path = (_cache_folder() if cache is None else cache) / name
    kept = _read_cache(path, wanted, num_samples)
    if kept is not None:
        return kept
    texts, notes = _texts(tokenizer, documents, wanted, validation_length, data.source)
    total, done = num_samples * len(wanted), 0
    items: dict[int, tuple[CalibrationItem, ...]] = {}
    for length in wanted:
        rng = np.random.default_rng([seed, length])
        pieces = _Pieces(texts[length], rng)
        made: dict[int, CalibrationItem] = {}
        prompts: dict[int, _Prompt] = {}
        scored = min(_TEXT_TOKENS, length // _TEXT_SHARE)
        for number in range(num_samples):
            if number % 2:
                prompts[number] = form.prompt(rng, pieces, length, response_tokens)
            else:
                ids = torch.tensor([*form.begin, *pieces.take(length - len(form.begin))])
                made[number] = CalibrationItem(ids, torch.arange(length) >= length - scored)
                done += 1
                if progress is not None:
                    progress(done, total)
        for batch in _batches(prompts, model):
            responses = _generate(model, tokenizer, [prompts[number].ids(prompts[number].budget) for number in batch], prompts[batch[0]].budget)
            for number, response in zip(batch, responses, strict=True):
                ids = torch.tensor([*prompts[number].ids(len(response)), *response])
                assert ids.shape[0] == length, "a sample has the length asked for"
                made[number] = CalibrationItem(ids, torch.arange(length) >= length - len(response))
            done += len(batch)
            if progress is not None:
                progress(done, total)
        items[length] = tuple(made[number] for number in range(num_samples))
    result = Calibration(items, tuple(notes), from_cache=False)
    try:
        write_atomic(path, _to_bytes(result))
    except AttnConvertError as error:
        if note is not None:
            note(f"calibration samples are not kept for next time: {error.message}")
    return result


def _check_lengths(model: Any, lengths: Sequence[int]) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and max(lengths) > limit:
        raise AttnConvertError(
            "length-too-long",
            f"calibration samples of {max(lengths)} tokens are longer than the model takes",
            where="search.lengths, search.validation_length",
            expected=f"at most max_position_embeddings = {limit}",
        )


# ---------------------------------------------------------------- text


def _long_documents(data: DataConfig, length: int, num_documents: int, seed: int) -> list[bytes]:
    """The longest documents, cut where more of them could not be used, in an order that depends on the seed and not on the files.

    Args:
        data: the source.
        length: tokens of the longest sample.
        num_documents: how many of that length are enough.
        seed: of the order among documents that are long enough.

    Raises:
        AttnConvertError: `data-empty`; the errors of reading.
    """
    enough = length * _BYTES_PER_TOKEN
    limit = num_documents * enough
    key = f"attnconvert calibration {seed}".encode()
    heap: list[tuple[int, bytes, bytes]] = []  # the least useful on top
    seen: set[bytes] = set()
    held, read = 0, 0
    for document in read_documents(data, seed):
        read += len(document)
        order = hashlib.blake2b(document, key=key, digest_size=16).digest()
        if order in seen:
            continue
        cut = _cut(document, enough, order)
        entry = (min(len(cut), enough), order, cut)
        if held < limit or entry > heap[0]:
            seen.add(order)
            heapq.heappush(heap, entry)
            held += len(cut)
            while held - len(heap[0][2]) >= limit:
                _, gone, dropped = heapq.heappop(heap)
                held -= len(dropped)
                seen.discard(gone)
        if read > _STREAM_BYTES and held >= limit and heap[0][0] >= enough and _is_streamed(data):
            break
    if not heap:
        raise AttnConvertError("data-empty", f"no text in {data.source!r}", where=data.source, expected="at least one document that is not blank")
    return [document for _, _, document in sorted(heap, reverse=True)]


def _is_streamed(data: DataConfig) -> bool:
    return data.source != "embedded" and not Path(data.source).expanduser().exists()


def _cut(document: bytes, num_bytes: int, order: bytes) -> bytes:
    """A piece of at most `num_bytes`, at a place that depends on `order`."""
    if len(document) <= num_bytes:
        return document
    first = int.from_bytes(order[:8], "big") % (len(document) - num_bytes)
    return document[first : first + num_bytes].decode(errors="ignore").encode()


def _texts(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[bytes], lengths: Sequence[int], validation_length: int | None, source: str
) -> tuple[dict[int, list[list[int]]], list[str]]:
    """Token ids of the texts that samples of each length are cut from, each at least as long as the sample; and notes.

    Raises:
        AttnConvertError: `data-too-short`.
    """
    encoded = [
        list(ids) for ids in tokenizer([d.decode() for d in documents], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ]
    notes: list[str] = []
    unseen = [ids for number, ids in enumerate(encoded) if number % _UNSEEN_SHARE == 0]
    seen = [ids for number, ids in enumerate(encoded) if number % _UNSEEN_SHARE]
    texts = {}
    for length in lengths:
        own = unseen if length == validation_length else seen if validation_length is not None else encoded
        long = [ids for ids in own if len(ids) >= length]
        if not long and (long := [ids for ids in encoded if len(ids) >= length]):
            notes.append(f"Too few documents of {length} tokens: those for validation are also profiled.")
        if not long:
            end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
            long = [joined] if len(joined := _join(own, end)) >= length else [_join(encoded, end)]
            if len(long[0]) < length:
                raise AttnConvertError(
                    "data-too-short",
                    f"the text is too short for calibration: {len(long[0])} tokens in all, samples of {length} wanted",
                    where=source,
                    expected=f"documents of at least {length} tokens, as text is read far back only where it belongs together",
                    hint="give longer text as data.source, or lower search.lengths and search.validation_length",
                )
            notes.append(f"No document has {length} tokens: shorter ones were joined, so far text matters less than it would in a long document.")
        texts[length] = long
    return texts, notes


def _join(documents: Sequence[list[int]], end: int | None) -> list[int]:
    return [token for ids in documents for token in (*ids, *(() if end is None else (end,)))]


class _Pieces:
    """Pieces of texts, each text in turn, at random places.

    Args:
        texts: token ids.
        rng: of the order and the places.
    """

    def __init__(self, texts: Sequence[list[int]], rng: np.random.Generator):
        self.texts, self.rng, self.count = [texts[int(i)] for i in rng.permutation(len(texts))], rng, 0

    def take(self, num_tokens: int) -> list[int]:
        """The next piece; the text must be at least as long."""
        text = self.texts[self.count % len(self.texts)]
        self.count += 1
        first = int(self.rng.integers(len(text) - num_tokens + 1))
        return text[first : first + num_tokens]


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True)
class _Form:
    """How a prompt looks: the chat template around context and question, or plain text.

    Attributes:
        tokenizer: of the model.
        begin: token ids that every text begins with.
        head: token ids before the context of a question.
        ending: the template's text after the question; None = plain text.
    """

    tokenizer: Any
    begin: list[int]
    head: list[int]
    ending: str | None

    @classmethod
    def of(cls, tokenizer: Any) -> _Form:
        """The form the tokenizer asks for."""
        bos = tokenizer.bos_token_id
        begin = [bos] if bos is not None and list(tokenizer("", verbose=False)["input_ids"])[:1] == [bos] else []
        if getattr(tokenizer, "chat_template", None):
            rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False))
            if rendered.count(_MARK) == 1:
                before, after = rendered.split(_MARK)
                return cls(tokenizer, begin, _encode(tokenizer, before), after)
        return cls(tokenizer, begin, begin, None)

    def tail(self, question: str) -> list[int]:
        """Token ids after the context of a chat, whose user ends with `question`."""
        return _encode(self.tokenizer, f"\n\n{question}{self.ending}")

    def check(self, length: int, response_tokens: int) -> None:
        """Raise AttnConvertError `length-too-short` where a question and the longest answer leave the context less than a third of the sample."""
        around = []
        for seed in range(8):  # facts differ by a few tokens
            asked = make_lookup(np.random.default_rng(seed), _NUM_FACTS)
            facts = sum(len(_encode(self.tokenizer, f"\n{fact}\n")) for fact in asked.facts)
            around.append(len(self.head) + facts + len(_encode(self.tokenizer, f"\n\n{asked.question}{self.ending or asked.lead}")) + _CHAT_ANSWER_TOKENS)
        needed = -(-3 * max(around) // 2)
        if length < needed:
            raise AttnConvertError(
                "length-too-short",
                f"calibration samples of {length} tokens leave too little room for a context",
                where="search.lengths, search.response_tokens",
                expected=f"at least {needed} tokens with answers of up to {response_tokens}",
            )

    def prompt(self, rng: np.random.Generator, pieces: _Pieces, length: int, response_tokens: int) -> _Prompt:
        """The next question about a context: with the longest answer it has `length` tokens."""
        chat = self.ending is not None
        budget = min(response_tokens, _CHAT_ANSWER_TOKENS if chat else _PLAIN_ANSWER_TOKENS)
        asked = make_lookup(rng, _NUM_FACTS)
        tail = self.tail(asked.question) if chat else _encode(self.tokenizer, f"\n{asked.lead}")
        facts = [_encode(self.tokenizer, f"\n{fact}\n") for fact in asked.facts]
        text = pieces.take(length - len(self.head) - len(tail) - sum(map(len, facts)))
        body: list[int] = []
        done = 0
        # Places in the part that is always shown; the fact asked for comes at any depth among the others.
        for place, fact in sorted(zip(rng.integers(budget, len(text) + 1, _NUM_FACTS).tolist(), facts, strict=True)):
            body += [*text[done:place], *fact]
            done = place
        return _Prompt(self.head, [*body, *text[done:]], tail, budget)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# ---------------------------------------------------------------- responses


def _batches(prompts: Mapping[int, _Prompt], model: Any) -> list[list[int]]:
    """Numbers of prompts that are answered together: as many tokens and as long responses, so that nothing is padded."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    groups: dict[tuple[int, int], list[int]] = {}
    for number, prompt in prompts.items():
        groups.setdefault((len(prompt.ids(prompt.budget)), prompt.budget), []).append(number)
    batches = []
    for (num_tokens, _), numbers in groups.items():
        size = max(1, _GENERATE_TOKENS // num_tokens) if on_gpu else 1
        batches += [numbers[at : at + size] for at in range(0, len(numbers), size)]
    return batches


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """The most likely tokens after each prompt, one by one, up to and including an end token. Prompts have one length."""
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    device = next(model.parameters()).device
    input_ids = torch.tensor(list(map(list, prompts)), device=device)
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=budget, do_sample=False, temperature=None, top_p=None, top_k=None,
        eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0),
    )  # fmt: skip
    responses = []
    for row in output[:, input_ids.shape[1] :].tolist():
        end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
        responses.append(row[: end + 1])
    return responses


# ---------------------------------------------------------------- cache


def fingerprint(model: Any) -> str:
    """Hash of a model's config and of a sample of every weight: other weights, and other training of the same ones, give another."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        taken = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(taken.numpy().tobytes())
    return digest.hexdigest()


def _vocabulary_hash(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_ASSETS_CACHE

    return Path(HF_ASSETS_CACHE) / "attnconvert" / "calibration"


def _to_bytes(calibration: Calibration) -> bytes:
    from safetensors.torch import save

    tensors = {}
    for length, items in calibration.items.items():
        tensors[f"{length}.input_ids"] = torch.stack([item.input_ids for item in items]).to(torch.int32)
        tensors[f"{length}.response"] = torch.stack([item.response for item in items])
    return save(tensors, metadata={"notes": json.dumps(calibration.notes)})


def _read_cache(path: Path, lengths: Sequence[int], num_samples: int) -> Calibration | None:
    """What a file of the cache holds; None when there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = tuple(str(text) for text in json.loads(file.metadata()["notes"]))
            items = {}
            for length in lengths:
                ids, response = file.get_tensor(f"{length}.input_ids").long(), file.get_tensor(f"{length}.response")
                if ids.shape != (num_samples, length) or response.shape != ids.shape:
                    return None
                items[length] = tuple(CalibrationItem(row, own) for row, own in zip(ids, response, strict=True))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return Calibration(items, notes, from_cache=True)
