"""Synthetic recall documents: facts scattered through ordinary text, asked for again later.

Ordinary text seldom needs a key from hundreds of tokens ago, so a converted model trained on it alone learns to do without its long-range
branch: perplexity comes back, lookups do not. A small share of rows in which lookups pay gives that branch a reason to remember. The
teacher's own answers are what is distilled. The wording shares nothing with the pass-key test that reports recall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from attnconvert.distill.data import PackedRows

_SYLLABLES = tuple(a + b for a in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st", "tr") for b in ("a", "e", "i", "o", "u"))
_NOUNS = (
    "code",
    "badge number",
    "serial number",
    "extension",
    "room",
    "locker",
    "ticket number",
    "account",
    "address",
    "reference",
    "nickname",
    "licence plate",
)
_FACTS = ("The {noun} of {name} is {value}.", "{name} has the {noun} {value}.", "Note that {name}'s {noun} is {value}.", "{noun} of {name}: {value}")
_QUERIES = (
    "Which {noun} does {name} have? {name} has the {noun} {value}.",
    "Again, the {noun} of {name} is {value}.",
    "Question: {noun} of {name}? Answer: {value}.",
    "{noun} of {name}: {value}",
)
_MIN_FACTS, _MAX_FACTS = 3, 8


class Lookup(NamedTuple):
    """Facts of one kind about different people, and a question about one of them.

    Attributes:
        facts: sentences; the first is the one asked for.
        question: a sentence for a model that answers.
        lead: the beginning of the answer, for a model that continues text.
    """

    facts: tuple[str, ...]
    question: str
    lead: str


def make_lookup(rng: np.random.Generator, num_facts: int) -> Lookup:
    """A question whose answer is in one of `num_facts` facts, in the wording of the recall documents."""
    noun = str(rng.choice(_NOUNS))
    names: dict[str, None] = {}
    while len(names) < num_facts:
        names[_word(rng, 2, 3).capitalize()] = None
    facts = tuple(str(rng.choice(_FACTS)).format(noun=noun, name=name, value=_value(rng)) for name in names)
    question, lead = _QUERIES[0].format(noun=noun, name=next(iter(names)), value="\0").split("? ")
    return Lookup(facts, question + "?", lead.split(" \0")[0])


def recall_rows(filler: PackedRows, tokenizer: PreTrainedTokenizerBase, num_rows: int, seed: int) -> PackedRows:
    """Rows of one document each: text of `filler` with 3 to 8 facts in its first three quarters, each asked for once later.

    Args:
        filler: rows whose text goes between the facts; also gives the row length T.
        tokenizer: of the model.
        num_rows: rows wanted.
        seed: of everything random.

    Returns:
        PackedRows with input_ids and position_ids [num_rows, T]; position_ids count from 0.
    """
    from attnconvert.distill.data import PackedRows

    rng = np.random.default_rng((seed, 0x4EC11))
    length = filler.length
    rows = np.empty((num_rows, length), np.int32)
    for i in range(num_rows):
        text = filler.input_ids[int(rng.integers(filler.num_rows))].numpy()
        rows[i] = _row(rng, text, lambda s: tokenizer(s, add_special_tokens=False)["input_ids"], length)
    positions = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    return PackedRows(torch.from_numpy(rows), torch.from_numpy(positions))


def _row(rng: np.random.Generator, text: NDArray[np.int32], encode: Callable[[str], list[int]], length: int) -> NDArray[np.int32]:
    """One document of `length` tokens. The last insert ends the row, so that one question lies as far from its fact as the row allows."""
    num_facts = int(rng.integers(_MIN_FACTS, _MAX_FACTS + 1)) if length >= 256 else 1
    inserts: list[tuple[float, list[int]]] = []
    for _ in range(num_facts):
        fields = {"noun": str(rng.choice(_NOUNS)), "name": _word(rng, 2, 3).capitalize(), "value": _value(rng)}
        at = rng.uniform(0.0, 0.75)
        asked = rng.uniform(at + 0.05, 1.0)
        inserts.append((at, encode("\n" + str(rng.choice(_FACTS)).format(**fields) + "\n")))
        inserts.append((asked, encode("\n" + str(rng.choice(_QUERIES)).format(**fields) + "\n")))
    inserts.sort(key=lambda insert: insert[0])
    spare = length - sum(len(ids) for _, ids in inserts)
    if spare < 0:  # rows too short for the wording: plain text
        return text[:length]
    pieces: list[NDArray[np.int32]] = []
    done = 0
    for n, (at, ids) in enumerate(inserts):
        upto = spare if n == len(inserts) - 1 else max(done, int(at * spare))
        pieces += [text[done:upto], np.asarray(ids, np.int32)]
        done = upto
    return np.concatenate(pieces)


def _word(rng: np.random.Generator, low: int, high: int) -> str:
    return "".join(str(rng.choice(_SYLLABLES)) for _ in range(int(rng.integers(low, high + 1))))


def _value(rng: np.random.Generator) -> str:
    if rng.random() < 0.7:
        return "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(3, 7))))
    return _word(rng, 2, 3)
