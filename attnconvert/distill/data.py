"""Text -> packed rows of tokens: where the training and held-out tokens come from, and in which order they are seen.

Splits. A document is its text. It is held out when the sha256 of its text falls into `eval_fraction`, so the split does not depend on
file order or format, and exact duplicates land on one side (repeats are dropped). `eval_source`, or `embedded` with its own held-out
file, replaces that rule: then every document of it is dropped from training. A source so small that its share does not fill one held-out
row has the share doubled, up to one half.

Order. A corpus is often sorted by source, so a budget smaller than the corpus must not read its head only.
- Local files: all documents are scanned once (0.6 s for 110 MB of parquet on one core), each gets a seeded hash of its text as its key,
  and the documents with the smallest keys are kept until they fill the token budget: an unbiased sample, the same for the same documents
  in any format or folder, with memory set by the budget and not by the corpus. Corpora above `_SCAN_BYTES` are scanned in part: parquet row
  groups and 8 MiB ranges of .jsonl, chosen at random over all files (.txt and .jsonl.gz cannot be entered in the middle: they are read whole).
- `datasets` ids are streamed: shard order is shuffled, documents pass through a shuffle buffer of 32 MiB of text, and reading stops when
  both budgets are full. A stream sorted within a shard in runs longer than the buffer stays sorted.

.parquet and .jsonl are read with pyarrow and json rather than through `datasets`: no Arrow copy of the corpus is written to a cache, row
groups can be sampled, and errors name the file and line.

Packing. Every document ends in EOS (BOS if the tokenizer has no EOS, nothing if it has neither) and documents follow each other
without padding. Special tokens spelled out in the text are read as such, as the tokenizer does by default. The same request gives the same
rows, bit for bit; `Data.description` holds their sha256.

Shapes: B rows of a batch, N rows of a split, T tokens of a row.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import importlib
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnconvert.distill.recall import recall_rows
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from attnconvert.distill.config import DataConfig

SEPARATOR = "<|endoftext|>"  # a line holding only this ends a document of a .txt file
IGNORE_INDEX = -100  # torch's cross_entropy skips it

_KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_PIECE_CHARS = (2_000, 20_000)  # shortest and longest target for the pieces of a .txt without separators
_RANGE_BYTES = 8 << 20  # a .jsonl is sampled in ranges of this size
_SCAN_BYTES = 512 << 20  # local text scanned at most before sampling starts; about 5 s
_STREAM_BUFFER_BYTES = 32 << 20
_TOKENIZE_BYTES = 1 << 18  # one call of the tokenizer; larger calls are not faster
_BYTES_PER_TOKEN = 6.0  # first guess, generous: English under a 50k vocabulary has 4.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens as a model takes them.

    Args:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], restarting at 0 at each document and at each row start; attention must not cross a restart.
    """

    input_ids: Tensor
    position_ids: Tensor

    def targets(self) -> Tensor:
        """Next-token ids, int64 [B, T]; `IGNORE_INDEX` where the next token starts another document and in the last column."""
        targets = torch.full_like(self.input_ids, IGNORE_INDEX)
        targets[:, :-1] = self.input_ids[:, 1:].masked_fill(self.position_ids[:, 1:] == 0, IGNORE_INDEX)
        return targets

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on `device`."""
        return Batch(self.input_ids.to(device), self.position_ids.to(device))


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A split in memory: documents concatenated, cut into rows of T tokens. 8 bytes per token.

    Args:
        input_ids: int32 [N, T] on the CPU.
        position_ids: int32 [N, T] on the CPU.
    """

    input_ids: Tensor
    position_ids: Tensor

    def __post_init__(self) -> None:
        """Check what the rest of the package relies on."""
        assert self.input_ids.dim() == 2, "rows are [N, T]"
        assert self.input_ids.shape == self.position_ids.shape, "one position per token"
        assert self.input_ids.dtype == self.position_ids.dtype == torch.int32, "rows are int32"

    @property
    def num_rows(self) -> int:
        """N."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def alignment(self) -> int:
        """The largest number of which the starts of all documents in their rows are multiples; rows that are one document each have their length."""
        inside = (self.position_ids[:, 1:] != self.position_ids[:, :-1] + 1).any(0).nonzero().flatten() + 1
        return math.gcd(self.length, *inside.tolist())

    def rows(self, indices: Sequence[int]) -> Batch:
        """The rows `indices`, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self.input_ids[index].long(), self.position_ids[index].long())

    def batch(self, seed: int, step: int, num_tokens: int) -> Batch:
        """The rows of optimizer step `step`, `num_tokens` in all."""
        return self.rows(epoch_indices(self.num_rows, seed, step, num_tokens // self.length))

    def sha256(self) -> str:
        """Hash of both tensors; equal hashes mean equal training data in equal order."""
        digest = hashlib.sha256(f"{self.num_rows}x{self.length}".encode())
        for tensor in (self.input_ids, self.position_ids):
            digest.update(tensor.contiguous().numpy().astype("<i4", copy=False).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class MixedRows:
    """Rows of several lengths, one length a step in turn.

    Args:
        parts: by ascending length, of which each divides the last.
    """

    parts: tuple[PackedRows, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest rows."""
        return self.parts[-1].length

    @property
    def alignment(self) -> int:
        """As of `PackedRows`, of all lengths."""
        return math.gcd(*(part.alignment for part in self.parts))

    def batch(self, seed: int, step: int, num_tokens: int) -> Batch:
        """The rows of optimizer step `step`, `num_tokens` in all, of one length."""
        turn, number = divmod(step, len(self.parts))
        return self.parts[number].batch(seed, turn, num_tokens)

    def sha256(self) -> str:
        """Hash of all rows."""
        return hashlib.sha256("".join(part.sha256() for part in self.parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Data:
    """Both splits and the JSON facts about them (see `load_data`)."""

    train: PackedRows
    eval: PackedRows
    description: dict[str, Any]


def epoch_indices(num_rows: int, seed: int, step: int, batch_size: int) -> list[int]:
    """The rows of optimizer step `step`, a pure function of its arguments: resuming needs no loader state.

    Rows are seen in a new random order each epoch, every row once per epoch; a batch may span the end of an epoch.

    Args:
        num_rows: rows of the split, at least 1.
        seed: non-negative.
        step: optimizer step, from 0.
        batch_size: rows per step.

    Returns:
        `batch_size` row numbers.
    """
    assert min(num_rows, batch_size) >= 1, "a batch needs rows"
    assert min(seed, step) >= 0, "seed and step count from 0"
    first = step * batch_size
    return [int(_permutation(num_rows, seed, place // num_rows)[place % num_rows]) for place in range(first, first + batch_size)]


@lru_cache(maxsize=2)  # a batch touches at most two epochs unless it is larger than the split; 1.5 M rows take 20 ms to shuffle
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False
    return order


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_train_tokens: int,
    num_eval_tokens: int,
    eval_length: int,
    seed: int = 0,
    document_tokens: tuple[int, int | None] = (0, None),
    progress: Progress | None = None,
) -> Data:
    """Reads, splits, tokenises and packs the text of one conversion. Writes nothing.

    A budget is rounded up to whole rows; 0 gives no rows. A source with fewer tokens than asked gives the rows it has; training then
    cycles over them, which `train_epochs` of the description states.

    Args:
        config: where the text comes from.
        tokenizer: of the model that is converted; a fast tokenizer (a slow one works, slowly).
        length: tokens of a training row.
        num_train_tokens: training tokens wanted.
        num_eval_tokens: held-out tokens wanted.
        eval_length: tokens of a held-out row.
        seed: of the document order.
        document_tokens: training documents have more tokens than the first number and at most the second (None = any number); others are left out.
        progress: called with (tokens done, tokens wanted), both splits together.

    Returns:
        The splits, and a description with `source`, `eval_source`, `eval_fraction` (null when the held-out text has its own source), `seed`, `recall_rows` (synthetic ones among the training rows),
        `train_documents_dropped` (also in the held-out source), `train_epochs` (passes over the rows that the wanted tokens need; 1.0
        when the source fills the budget) and per split `documents`, `tokens`, `rows`, `length`, `tokens_wanted`, `tokens_available` (null
        when the source has more than was wanted) and `sha256` of the rows.

    Raises:
        AttnConvertError: data-missing, data-unknown-extension, data-unreadable, data-corrupt, data-not-utf8, data-bad-json,
            data-column-missing, data-column-type, data-empty, data-too-short, data-hub-missing, data-hub-gated, data-hub-offline,
            data-hub-config, data-hub-failed, missing-package.
    """
    assert min(length, eval_length) >= 2, "a row has a next token"
    if length % config.align:
        raise AttnConvertError(
            "data-align",
            f"training rows of {length} tokens are not a multiple of data.align ({config.align})",
            expected=f"a length such as {-(-length // config.align) * config.align}, or data.align: 1",
        )
    assert min(num_train_tokens, num_eval_tokens) >= 0, "budgets are checked by the recipe"
    train, held_out = _Packer(tokenizer, length, num_train_tokens, config.align, document_tokens), _Packer(tokenizer, eval_length, num_eval_tokens)
    if progress is not None:
        train.on_tokens = held_out.on_tokens = _progress_of((train, held_out), progress)

    with ExitStack() as stack:
        source = _open_source(config.source, config, stack, held_out=False)
        eval_name = config.eval_source or ("embedded" if config.source == "embedded" else None)
        fraction, dropped = None, 0
        if eval_name is not None:
            dropped = _fill_from_two(source, _open_source(eval_name, config, stack, held_out=True), train, held_out, seed)
        else:
            fraction = _fill_from_one(source, train, held_out, config.eval_fraction, seed)

    for packer, name, split in ((train, config.source, "training"), (held_out, eval_name or config.source, "held-out")):
        _check_enough(packer, name, split, fraction, dropped)
    train_rows, eval_rows = train.rows(), held_out.rows()
    num_recall = round(train_rows.num_rows * config.recall)
    if num_recall:  # they take the place of that many rows of text, so the budget stays what was asked
        kept = slice(0, train_rows.num_rows - num_recall)
        recall = recall_rows(train_rows, tokenizer, num_recall, seed)
        train_rows = PackedRows(torch.cat([train_rows.input_ids[kept], recall.input_ids]), torch.cat([train_rows.position_ids[kept], recall.position_ids]))
    description = {
        "source": config.source,
        "eval_source": eval_name,
        "eval_fraction": fraction,
        "seed": seed,
        "train_documents_dropped": dropped,
        "recall_rows": num_recall,
        "train_epochs": round(train.wanted / (train_rows.num_rows * length), 4) if train.wanted else 0.0,
        "train": train.describe(train_rows),
        "eval": held_out.describe(eval_rows),
    }
    return Data(train_rows, eval_rows, description)


def read_documents(config: DataConfig, seed: int) -> Iterator[bytes]:
    """The training documents of a source one by one, as UTF-8: for uses that need whole documents rather than packed rows.

    Those whose hash holds them out are left out, repeats are not. Local corpora above `_SCAN_BYTES` are read in part, a `datasets` id is streamed; in both the order
    within is not the order of `load_data`.

    Args:
        config: where the text comes from.
        seed: of the parts and shards that are read.

    Raises:
        AttnConvertError: as `load_data` for reading.
    """
    fraction = 0.0 if config.eval_source is not None or config.source == "embedded" else config.eval_fraction
    with ExitStack() as stack:
        source = _open_source(config.source, config, stack, held_out=False)
        if isinstance(source, _Files):
            texts = _read(_sample(source.parts, _SCAN_BYTES, seed), source.text_field)
        else:
            texts = _shuffled(source.documents(seed), seed)
        for text in texts:
            document = text.encode(errors="replace")  # JSON may hold half of a surrogate pair; it becomes "?"
            if not _is_held_out(hashlib.sha256(document).digest(), fraction):
                yield document


# ---------------------------------------------------------------------------------------------------------------- packing


class _Packer:
    """Collects documents of one split, tokenises them in batches and cuts the result into rows.

    Args:
        tokenizer: as for `load_data`.
        length: tokens of a row.
        num_tokens: wanted; rounded up to whole rows.
        align: documents lose their first tokens until their length is a multiple of this (those shorter vanish), so that all of them start
            at a multiple of it inside a row.
        document_tokens: as for `load_data`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int, num_tokens: int, align: int = 1, document_tokens: tuple[int, int | None] = (0, None)
    ):  # fmt: skip
        self.tokenizer, self.length, self.align, self.document_tokens = tokenizer, length, align, document_tokens
        self.wanted = -(-num_tokens // length) * length
        self.on_tokens: Callable[[], None] | None = None
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        assert end is None or isinstance(end, int), "tokenizers have one EOS"
        self._end: list[int] = [] if end is None else [end]
        self.clear()

    def clear(self) -> None:
        """Forget all documents."""
        self.count = self.seen_bytes = 0
        self._documents: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self._pending: list[str] = []
        self._pending_bytes = 0

    @property
    def full(self) -> bool:
        """Whether the budget is met; pending documents do not count before `flush`."""
        return self.count >= self.wanted

    def add(self, document: bytes) -> None:
        """Take a document (UTF-8); does nothing once the budget is met."""
        if self.full:
            return
        self._pending.append(document.decode())
        self._pending_bytes += len(document)
        if self._pending_bytes >= _TOKENIZE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Tokenise what is pending."""
        if not self._pending:
            return
        # verbose=False: a document longer than the model's context is expected here, no warning.
        encoded = self.tokenizer(self._pending, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for ids in encoded:
            document = np.asarray([*ids, *self._end], dtype=np.int32)
            shortest, longest = self.document_tokens
            if len(document) <= shortest or (longest is not None and len(document) > longest):
                continue
            self._documents.append(document[len(document) % self.align :])
            self.count += len(self._documents[-1])
        self.seen_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        if self.on_tokens is not None:
            self.on_tokens()

    def rows(self) -> PackedRows:
        """The rows, in the order the documents were added."""
        num_rows = min(self.count, self.wanted) // self.length
        total = num_rows * self.length
        tokens, positions = np.empty(total, np.int32), np.empty(total, np.int32)
        done = 0
        for document in self._documents:
            taken = document[: total - done]
            tokens[done : done + len(taken)] = taken
            positions[done : done + len(taken)] = np.arange(len(taken), dtype=np.int32)
            done += len(taken)
        rows = positions.reshape(num_rows, self.length)
        # Distance to the later of document start and row start = the smaller of both distances.
        np.minimum(rows, np.arange(self.length, dtype=np.int32), out=rows)
        return PackedRows(torch.from_numpy(tokens.reshape(num_rows, self.length)), torch.from_numpy(rows))

    def describe(self, rows: PackedRows) -> dict[str, Any]:
        """JSON facts of this split; `rows` is what `rows()` returned."""
        starts = np.cumsum([0, *(len(d) for d in self._documents)])[:-1]
        return {
            "documents": int((starts < rows.input_ids.numel()).sum()),
            "tokens": rows.input_ids.numel(),
            "rows": rows.num_rows,
            "length": self.length,
            "tokens_wanted": self.wanted,
            "tokens_available": None if self.full else self.count,
            "sha256": rows.sha256(),
        }


def _progress_of(packers: tuple[_Packer, ...], progress: Progress) -> Callable[[], None]:
    wanted = sum(p.wanted for p in packers)
    return lambda: progress(sum(min(p.count, p.wanted) for p in packers), wanted)


def _check_enough(packer: _Packer, source: str, split: str, fraction: float | None, dropped: int) -> None:
    """Raise data-too-short unless the split holds one row (or none is wanted)."""
    if not packer.wanted or packer.count >= packer.length:
        return
    if packer.document_tokens != (0, None):
        shortest, longest = packer.document_tokens
        of = f"more than {shortest}" + (f" and at most {longest}" if longest is not None else "")
        hint = f"Only documents of {of} tokens are taken for these rows: give stages.finetune.lengths that fit the documents, or null (rows of one length, of any documents)."
    elif split == "training" and dropped:
        hint = f"{dropped} of its documents are also in the held-out source and were left out; give a different data.source or data.eval_source."
    elif fraction is not None:
        hint = f"{fraction:.0%} of its documents are held out. Give more text and more documents, a shorter sequence length, or a file as data.eval_source."
    else:
        hint = "Give more text or a shorter sequence length."
    raise AttnConvertError(
        "data-too-short",
        f"the {split} text is shorter than one sequence: {packer.count} tokens found, {packer.length} needed",
        where=source,
        expected=f"at least one sequence of {packer.length} tokens; {packer.wanted} tokens are wanted in all",
        hint=hint,
    )


# ------------------------------------------------------------------------------------------------- splitting and sampling

_Route = Callable[[bytes], int | None]  # sha256 of a document -> the packer it goes to, None = dropped


def _fill_from_one(source: _Source, train: _Packer, held_out: _Packer, fraction: float, seed: int) -> float:
    """Fill both splits from `source` by content hash; returns the share held out, doubled while it did not give one row."""
    while True:
        cut = fraction

        def route(digest: bytes, cut: float = cut) -> int:
            return int(_is_held_out(digest, cut))

        _fill(source, (train, held_out), route, seed)
        if not held_out.wanted or held_out.count >= held_out.length or fraction >= 0.5:
            return fraction
        fraction = min(0.5, 2 * fraction)


def _is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether a document, by the sha256 of its text, belongs to the held-out share."""
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _fill_from_two(source: _Source, eval_source: _Source, train: _Packer, held_out: _Packer, seed: int) -> int:
    """Fill the splits from two sources, without the documents of `eval_source` in training; returns how many were dropped for that."""
    held_out_digests: set[bytes] = set()
    dropped: set[bytes] = set()

    def route_eval(digest: bytes) -> int:
        held_out_digests.add(digest)
        return 0

    def route_train(digest: bytes) -> int | None:
        if digest not in held_out_digests:
            return 0
        dropped.add(digest)
        return None

    _fill(eval_source, (held_out,), route_eval, seed)
    _fill(source, (train,), route_train, seed)
    return len(dropped)


def _fill(source: _Source, packers: Sequence[_Packer], route: _Route, seed: int) -> None:
    """Fill `packers` with the documents of `source`, in the seeded order of the module docstring.

    Raises:
        AttnConvertError: data-empty if there is no text at all; the errors of reading.
    """
    for packer in packers:
        packer.clear()
    found = _fill_from_files(source, packers, route, seed) if isinstance(source, _Files) else _fill_from_stream(source, packers, route, seed)
    if not found:
        raise AttnConvertError("data-empty", f"no text in {source.name!r}", where=source.name, expected="at least one document that is not blank")


def _fill_from_files(source: _Files, packers: Sequence[_Packer], route: _Route, seed: int) -> bool:
    limits = [round(p.wanted * _BYTES_PER_TOKEN) for p in packers]
    scan_bytes = max(_SCAN_BYTES, 4 * sum(limits))
    order_key = f"attnconvert {seed}".encode()
    while True:
        parts = _sample(source.parts, scan_bytes, seed)
        pools = [_Pool(limit) for limit in limits]
        found = False
        for text in _read(parts, source.text_field):
            document = text.encode(errors="replace")  # JSON may hold half of a surrogate pair; it becomes "?"
            digest = hashlib.sha256(document).digest()
            found = True
            target = route(digest)
            if target is not None:
                pools[target].add(hashlib.blake2b(digest, key=order_key, digest_size=16).digest(), document)
        for pool, packer in zip(pools, packers, strict=True):
            packer.clear()
            for document in pool.documents():
                packer.add(document)
                if packer.full:
                    break
            packer.flush()
        # Denser text than guessed: scan again with room for what was measured. Ends when everything was read and nothing left out.
        short = [i for i, packer in enumerate(packers) if not packer.full and (pools[i].left_out or len(parts) < len(source.parts))]
        if not short:
            return found
        for i in short:
            limits[i] = round(packers[i].wanted * 1.1 * max(_BYTES_PER_TOKEN, packers[i].seen_bytes / max(packers[i].count, 1))) + limits[i]
        scan_bytes = max(4 * scan_bytes, 4 * sum(limits))


def _fill_from_stream(source: _Stream, packers: Sequence[_Packer], route: _Route, seed: int) -> bool:
    seen: set[bytes] = set()
    found = False
    for text in _shuffled(source.documents(seed), seed):
        document = text.encode(errors="replace")  # JSON may hold half of a surrogate pair; it becomes "?"
        digest = hashlib.sha256(document).digest()
        found = True
        target = route(digest)
        if target is not None and digest not in seen:
            seen.add(digest)
            packers[target].add(document)
            if all(packer.full for packer in packers):
                break
    for packer in packers:
        packer.flush()
    return found


class _Pool:
    """The documents with the smallest keys, as few as hold `limit` bytes; repeated keys (equal documents) are kept once."""

    def __init__(self, limit: int):
        self.limit, self.left_out = limit, False
        self._heap: list[tuple[int, bytes]] = []  # (-key, document): the largest key on top
        self._keys: set[int] = set()
        self._bytes = 0

    def add(self, key: bytes, document: bytes) -> None:
        number = int.from_bytes(key, "big")
        if number in self._keys:
            return
        if self._bytes >= self.limit and (not self._heap or number > -self._heap[0][0]):
            self.left_out = True
            return
        self._keys.add(number)
        heapq.heappush(self._heap, (-number, document))
        self._bytes += len(document)
        while self._bytes - len(self._heap[0][1]) >= self.limit:
            largest, removed = heapq.heappop(self._heap)
            self._keys.discard(-largest)
            self._bytes -= len(removed)
            self.left_out = True
            if not self._heap:
                break

    def documents(self) -> Iterator[bytes]:
        """By increasing key."""
        for _, document in sorted(self._heap, key=lambda item: -item[0]):
            yield document


def _shuffled(documents: Iterator[str], seed: int) -> Iterator[str]:
    """A shuffle buffer bounded in text, not in documents: 10k books would not fit in memory."""
    rng, buffer, held = random.Random(seed), list[str](), 0
    for document in documents:
        buffer.append(document)
        held += len(document)
        while held > _STREAM_BUFFER_BYTES:
            place = rng.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            held -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


# --------------------------------------------------------------------------------------------------------------- sources


class _Part(NamedTuple):
    """A piece of a file that can be read alone: a row group of a .parquet, a byte range of a .jsonl, else the whole file."""

    path: Path
    start: int
    stop: int
    num_bytes: int  # of text, estimated


class _Files(NamedTuple):
    """Local files, in parts."""

    name: str
    parts: tuple[_Part, ...]
    text_field: str


class _Stream(NamedTuple):
    """A `datasets` id; `documents(seed)` opens it."""

    name: str
    documents: Callable[[int], Iterator[str]]


_Source = _Files | _Stream


def _open_source(name: str, config: DataConfig, stack: ExitStack, *, held_out: bool) -> _Source:
    """What `name` means: `embedded`, something on this disk, or a `datasets` id. Reads no text yet."""
    if name == "embedded":
        file = resources.files("attnconvert") / "embedded" / "text" / ("heldout.jsonl.gz" if held_out else "train.jsonl.gz")
        path = stack.enter_context(resources.as_file(file))
        assert path.is_file(), f"the package lacks {path}"
        return _Files(name, tuple(_parts(path, "text")), "text")
    path = Path(name).expanduser()
    if path.exists():
        files = _files_of(path)
        with _readable(path):
            return _Files(name, tuple(part for file in files for part in _parts(file, config.text_field)), config.text_field)
    if not _may_be_hub_id(name):
        raise AttnConvertError(
            "data-missing",
            f"no such file or folder: {name!r}",
            where=str(path.absolute()),
            expected=f"`embedded`, a {', '.join(_KINDS)} file, a folder of them, or a `datasets` id such as user/name",
        )
    same = name == config.source
    split = None if held_out else config.split
    return _Stream(name, lambda seed: _hub_documents(name, config.text_field, config.subset if same else None, split, config.revision if same else None, seed))


def _may_be_hub_id(name: str) -> bool:
    """Whether a name that is not on this disk is worth asking the Hub for: `name` or `user/name`, without a data file's ending."""
    endings = (*_KINDS, ".json", ".csv", ".tsv", ".md", ".gz", ".zst", ".zip", ".tar", ".arrow")
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not name.lower().endswith(endings)


def _kind(path: Path) -> str | None:
    return next((kind for kind in sorted(_KINDS, key=len, reverse=True) if path.name.lower().endswith(kind)), None)


def _files_of(path: Path) -> list[Path]:
    """The data files at `path`, sorted; a folder's hidden and unknown files are passed over.

    Raises:
        AttnConvertError: data-unknown-extension for a file; data-empty for a folder without data files.
    """
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = [p for p in inside if _kind(p) is not None and p.is_file()]
        if not files:
            raise AttnConvertError("data-empty", f"no data file in the folder {str(path)!r}", where=str(path), expected=f"files ending in {', '.join(_KINDS)}")
        return files
    if _kind(path) is None:
        raise AttnConvertError(
            "data-unknown-extension",
            f"cannot tell the format of {path.name!r} from its ending",
            where=str(path),
            expected=f"one of {', '.join(_KINDS)}",
            hint="Rename plain text to .txt; write JSON as one object a line (.jsonl).",
        )
    return [path]


def _parts(path: Path, text_field: str) -> Iterator[_Part]:
    size = path.stat().st_size
    if size == 0:
        return
    match _kind(path):
        case ".parquet":
            yield from _parquet_parts(path, text_field)
        case ".jsonl":
            for start in range(0, size, _RANGE_BYTES):
                stop = min(start + _RANGE_BYTES, size)
                yield _Part(path, start, stop, stop - start)
        case ".jsonl.gz":
            yield _Part(path, 0, size, 3 * size)
        case _:
            yield _Part(path, 0, size, size)


def _sample(parts: tuple[_Part, ...], num_bytes: int, seed: int) -> list[_Part]:
    """All parts if they hold at most `num_bytes`, else random ones that together hold as much."""
    if sum(part.num_bytes for part in parts) <= num_bytes:
        return list(parts)
    chosen: list[_Part] = []
    for part in random.Random(seed).sample(parts, len(parts)):
        chosen.append(part)
        num_bytes -= part.num_bytes
        if num_bytes <= 0:
            break
    return sorted(chosen)


def _read(parts: Sequence[_Part], text_field: str) -> Iterator[str]:
    """The documents of `parts` that are not blank."""
    by_file: dict[Path, list[_Part]] = {}
    for part in parts:
        by_file.setdefault(part.path, []).append(part)
    for path, own in by_file.items():
        match _kind(path):
            case ".parquet":
                documents = _read_parquet(path, [part.start for part in own], text_field)
            case ".jsonl":
                documents = _read_jsonl(path, own, text_field)
            case ".jsonl.gz":
                documents = _read_jsonl_gz(path, text_field)
            case _:
                documents = _read_txt(path)
        with _readable(path):
            yield from (document for document in documents if document and not document.isspace())


# --------------------------------------------------------------------------------------------------------------- formats


def _read_jsonl(path: Path, parts: Sequence[_Part], text_field: str) -> Iterator[str]:
    """A line belongs to the range that its first byte lies in."""
    with path.open("rb") as stream:
        for part in parts:
            offset = 0
            if part.start:
                stream.seek(part.start - 1)
                offset = part.start - 1 + len(stream.readline())
            else:
                stream.seek(0)
            while offset < part.stop and (line := stream.readline()):
                here = offset
                offset += len(line)
                yield _json_text(line, text_field, lambda here=here: f"{path}:{_line_number(path, here)}")  # type: ignore[misc]


def _read_jsonl_gz(path: Path, text_field: str) -> Iterator[str]:
    with gzip.open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            yield _json_text(line, text_field, lambda number=number: f"{path}:{number}")  # type: ignore[misc]


def _json_text(line: bytes, text_field: str, where: Callable[[], str]) -> str:
    """The text of one JSON line; "" for a blank line or null."""
    try:
        record = json.loads(line.decode("utf-8-sig")) if not line.isspace() else {text_field: None}
    except UnicodeDecodeError as error:
        raise _not_utf8(where(), error) from None
    except ValueError as error:
        raise AttnConvertError("data-bad-json", f"not JSON: {error}", where=where(), expected="one JSON object a line") from None
    if not isinstance(record, dict):
        raise AttnConvertError("data-bad-json", f"a JSON {type(record).__name__}, not an object", where=where(), expected="one JSON object a line")
    if text_field not in record:
        raise _column_missing(text_field, list(record), where())
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise _column_type(text_field, type(text).__name__, where())
    return text or ""


def _read_txt(path: Path) -> Iterator[str]:
    """Documents between separator lines; without any, pieces that end at blank lines.

    A piece aims at a twentieth of the file, between 2k and 20k characters: a split needs some documents, and a longer row needs long ones.
    Where no blank line comes within twice that size, it ends at a line's end.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            separated = any(line.strip() == SEPARATOR for line in stream)
            stream.seek(0)
            target = min(max(path.stat().st_size // 20, _PIECE_CHARS[0]), _PIECE_CHARS[1])
            lines: list[str] = []
            held = 0
            for line in stream:
                if line.strip() == SEPARATOR if separated else held >= target and (line.isspace() or held >= 2 * target):
                    yield "".join(lines).strip("\n")
                    lines, held = [], 0
                    if separated:
                        continue
                lines.append(line)
                held += len(line)
            yield "".join(lines).strip("\n")
    except UnicodeDecodeError as error:
        with path.open("rb") as raw:
            number = next((n for n, line in enumerate(raw, 1) if not _is_utf8(line)), 1)
        raise _not_utf8(f"{path}:{number}", error) from None


def _parquet_parts(path: Path, text_field: str) -> Iterator[_Part]:
    file = _parquet_file(path)
    try:
        names = list(file.schema_arrow.names)
        if text_field not in names:
            raise _column_missing(text_field, names, str(path))
        column_type = file.schema_arrow.field(text_field).type
        if str(column_type) not in ("string", "large_string", "string_view"):
            raise _column_type(text_field, str(column_type), str(path))
        for group in range(file.num_row_groups):
            row_group = file.metadata.row_group(group)
            columns = (row_group.column(i) for i in range(row_group.num_columns))
            yield _Part(path, group, group + 1, sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field))
    finally:
        file.close()


def _read_parquet(path: Path, groups: Sequence[int], text_field: str) -> Iterator[str]:
    file = _parquet_file(path)
    try:
        with _corrupt_parquet(path):
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    finally:
        file.close()


def _parquet_file(path: Path) -> Any:
    parquet = _import("pyarrow.parquet", "reading .parquet files", "pyarrow")
    with _corrupt_parquet(path):
        return parquet.ParquetFile(path)


@contextmanager
def _corrupt_parquet(path: Path) -> Iterator[None]:
    arrow = importlib.import_module("pyarrow")
    try:
        yield
    except PermissionError:
        raise
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from None
    except (arrow.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the disk or a damaged file raises into errors for the user."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _corrupt(path, error) from error
    except OSError as error:
        raise AttnConvertError("data-unreadable", f"cannot read the data: {error.strerror or error}", where=str(error.filename or path)) from error


def _corrupt(path: Path, error: Exception) -> AttnConvertError:
    message = f"the file is damaged or not what its ending says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return AttnConvertError("data-corrupt", message, where=str(path), expected=f"a readable {_kind(path)} file", hint="Copy or download the file again.")


def _not_utf8(where: str, error: UnicodeDecodeError) -> AttnConvertError:
    byte = error.object[error.start]
    hint = "Convert the file first, e.g. `iconv -f latin1 -t utf-8 in.txt > out.txt`."
    return AttnConvertError("data-not-utf8", f"the text is not UTF-8 (byte 0x{byte:02x}: {error.reason})", where=where, expected="UTF-8 text", hint=hint)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _column_missing(text_field: str, names: Sequence[str], where: str) -> AttnConvertError:
    return AttnConvertError(
        "data-column-missing",
        f"no column {text_field!r} in the data",
        where=where,
        expected=f"one of the columns there: {', '.join(names) or '(none)'}",
        hint="Set data.text_field to the column that holds the text.",
    )


def _column_type(text_field: str, found: str, where: str) -> AttnConvertError:
    return AttnConvertError(
        "data-column-type",
        f"column {text_field!r} holds {found}, not text",
        where=where,
        expected="strings (null is passed over)",
        hint="Set data.text_field to the column that holds the text.",
    )


def _line_number(path: Path, offset: int) -> int:
    with path.open("rb") as stream:
        return 1 + sum(stream.read(min(1 << 20, offset - done)).count(b"\n") for done in range(0, offset, 1 << 20))


def _import(module: str, purpose: str, package: str) -> Any:
    """Import at the moment of use: the Hub and parquet readers are heavy, and most runs need neither."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AttnConvertError("missing-package", f"{purpose} needs the package {package!r}: {error}", hint=f"`pip install {package}`") from error


# --------------------------------------------------------------------------------------------------------------- the Hub


def _hub_documents(name: str, text_field: str, subset: str | None, split: str | None, revision: str | None, seed: int) -> Iterator[str]:
    """The documents of a `datasets` id, streamed, shards in seeded random order.

    Args:
        name: `user/name` or `name`.
        text_field: the column that holds the text.
        subset: configuration name, None = the only or default one.
        split: None = the first of validation, valid, dev, test that there is.
        revision: None = the newest.
        seed: of the shard order.
    """
    datasets = _import("datasets", f"reading the `datasets` id {name!r}", "datasets")
    where = " ".join([name, *(f"{key}={value}" for key, value in (("subset", subset), ("split", split), ("revision", revision)) if value)])
    with _hub_errors(name, where, opening=True):
        stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
    if split is None:
        held_out = next((key for key in ("validation", "valid", "dev", "test") if key in stream), None)
        if held_out is None:
            raise AttnConvertError(
                "data-hub-config",
                f"{name!r} has no held-out split",
                where=where,
                expected=f"a split named validation, valid, dev or test; there are: {', '.join(stream)}",
                hint="Leave data.eval_source empty to hold out a share of data.source, or name a local file.",
            )
        stream = stream[held_out]
    # buffer_size=1: only the shard order is left to `datasets`, whose buffer counts documents, not bytes; `_shuffled` does the rest.
    with _hub_errors(name, where, opening=False):
        records = iter(stream.shuffle(seed=seed, buffer_size=1))
    while True:
        with _hub_errors(name, where, opening=False):
            record = next(records, None)
        if record is None:
            return
        if text_field not in record:
            raise _column_missing(text_field, list(record), where)
        text = record[text_field]
        if text is not None and not isinstance(text, str):
            raise _column_type(text_field, type(text).__name__, where)
        if text and not text.isspace():
            yield text


@contextmanager
def _hub_errors(name: str, where: str, *, opening: bool) -> Iterator[None]:
    """Turn what `datasets` raises into errors for the user. Only code of `datasets` runs inside, so everything is caught."""
    try:
        yield
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, FileNotFoundError) and "gated" in str(error):
            hint = f"Accept the terms on the page of {name!r} on the Hub, then log in with `hf auth login`."
            raise AttnConvertError("data-hub-gated", f"access to the dataset {name!r} must be granted first: {first_line}", where=where, hint=hint) from error
        if isinstance(error, FileNotFoundError):
            hint = "Check the spelling; a private dataset needs `hf auth login`."
            message = f"neither a file or folder here nor a dataset on the Hub: {name!r} ({first_line})"
            raise AttnConvertError("data-hub-missing", message, where=where, hint=hint) from error
        if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):
            hint = "Check the network and HF_HUB_OFFLINE, or use a local file or `embedded`."
            message = f"{name!r} is not a file or folder here, and the Hub cannot be reached: {first_line}"
            raise AttnConvertError("data-hub-offline", message, where=where, hint=hint) from error
        if opening and isinstance(error, ValueError):
            lines = " ".join(str(error).split("\nExample of usage")[0].split())
            hint = "Set data.subset and data.split."
            raise AttnConvertError("data-hub-config", f"cannot open the dataset {name!r}: {lines}", where=where, hint=hint) from error
        raise AttnConvertError("data-hub-failed", f"reading the dataset {name!r} failed: {type(error).__name__}: {first_line}", where=where) from error
