"""Build everything the training of the embedded `demo` model needs, and the text that ships in the package.

Reads a corpus folder with `train-*.parquet` (columns text, source, id), `heldout.jsonl`, `long.jsonl` and `summary.json`
(licence and package of each source). Keeps only the sources named in `SHARES`, whose licences are permissive or public domain.

Writes into `--out` (input of `tools/train_demo_model.py`):
    tokenizer.json, tokenizer_config.json   byte-level BPE, 4096 entries, every digit is one token
    tokens.npy    uint16 [N]        the training documents, each followed by the end-of-text token
    recall.npy    uint16 [R, 2048]  synthetic rows that teach in-context retrieval (see `passkey_document`)
    heldout.jsonl                   the held-out documents, {"text", "source"}
    corpus.json                     facts: sources, licences, counts, digests, passkey templates
and into `--text`: train.jsonl.gz and heldout.jsonl.gz, the excerpts that ship with the package.

Everything is a pure function of the corpus folder and `--seed`.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROW_LENGTH = 2048
VOCAB_SIZE = 4096
EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
PASSKEY_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = " What is the pass key? The pass key is"
PASSKEY_DIGITS = 5

# source -> (share of the shipped excerpts, largest number of pretraining bytes; None = all of it).
# A source with share 0 is pretraining material only. Every licence here is permissive or public domain: no GPL, GFDL, MPL, CC-BY-SA.
SHARES: dict[str, tuple[float, int | None]] = {
    "austen": (0.15, None),
    "moby-dick": (0.09, None),
    "sotu": (0.15, None),
    "jargon": (0.07, None),
    "wordnet": (0.08, None),
    "python-doc": (0.12, None),
    "postgresql-doc": (0.10, None),
    "rust-books": (0.06, None),
    "apache-doc": (0.06, None),
    "sqlite-doc": (0.06, None),
    "django-doc": (0.06, None),
    "code-stdlib": (0.0, None),
    "code-sympy": (0.0, 3_500_000),
    "code-networkx": (0.0, 3_000_000),
    "code-django": (0.0, 3_500_000),
}
# Documents inside these packages that carry other terms than the package: the prose of the Embedded Rust Book is CC-BY-SA,
# and the two code files name third-party terms in their headers.
EXCLUDED_IDS = ("rust-books/embedded-book/", "code-networkx/networkx/algorithms/bipartite/matching.py", "code-django/django/utils/baseconv.py")
# Navigation at the head and foot of every page of the Django manual; left in, it would be the same text in train and held-out documents.
NAVIGATION = re.compile(r"^(Django [0-9.]+ documentation|Home \| Table of contents.*|\u00ab previous.*)\n*", re.MULTILINE)
FORBIDDEN_LICENCE = re.compile(r"GPL|GFDL|MPL|CC-BY|Artistic", re.IGNORECASE)
PROSE = ("austen", "moby-dick", "sotu", "jargon", "python-doc", "postgresql-doc", "rust-books", "apache-doc", "sqlite-doc", "django-doc")
# The filler of the published passkey test; some evaluations repeat it, so the model should have met a repetitive context.
REPEATED_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
EXCERPT_BYTES = 7000


class Document(TypedDict):
    """One document of the corpus folder."""

    text: str
    source: str
    id: str


def stable_order(documents: Sequence[Document], salt: str) -> list[Document]:
    """Documents in an order that depends on their ids and `salt` only."""
    return sorted(documents, key=lambda d: hashlib.sha256(f"{salt}:{d['id']}".encode()).digest())


def clean(row: dict[str, str]) -> Document:
    """One row of the corpus folder as a document, without the navigation of its web site."""
    text = NAVIGATION.sub("", row["text"]).strip() if row["source"] == "django-doc" else row["text"]
    return Document(text=text, source=row["source"], id=row["id"])


def read_corpus(folder: Path) -> tuple[list[Document], list[Document]]:
    """Read (train, held-out) documents of the sources in `SHARES`, in a stable order.

    `long.jsonl` holds held-out documents that exceed 8192 tokens; they count as held-out here.
    """
    train: list[Document] = []
    for path in sorted(folder.glob("train-*.parquet")):
        for row in pq.read_table(path, columns=["text", "source", "id"]).to_pylist():
            if row["source"] in SHARES and not row["id"].startswith(EXCLUDED_IDS):
                train.append(clean(row))
    heldout: list[Document] = []
    for name in ("heldout.jsonl", "long.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["source"] in SHARES and not row["id"].startswith(EXCLUDED_IDS):
                heldout.append(clean(row))
    for documents in (train, heldout):
        assert documents, f"no documents of the chosen sources in {folder}"
    used: collections.Counter[str] = collections.Counter()
    kept = []
    for document in stable_order(train, "demo-train"):
        limit = SHARES[document["source"]][1]
        if limit is None or used[document["source"]] < limit:
            used[document["source"]] += len(document["text"].encode())
            kept.append(document)
    return kept, stable_order(heldout, "demo-heldout")


def train_tokenizer(documents: Sequence[Document], sample_bytes: int = 24_000_000) -> Tokenizer:
    """Train the byte-level BPE tokenizer; digits never merge with anything, so numbers can be copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS_TOKEN, PAD_TOKEN], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )

    def sample() -> Iterator[str]:
        total = sum(len(d["text"]) for d in documents)
        keep = min(1.0, sample_bytes / total)
        for document in documents:  # the head of every document, so that each source is seen in proportion
            yield document["text"][: max(2000, int(len(document["text"]) * keep))]

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    out: list[list[int]] = []
    for start in range(0, len(texts), 256):
        out += [e.ids for e in tokenizer.encode_batch_fast(list(texts[start : start + 256]), add_special_tokens=False)]
    return out


class Filler:
    """Sentences of training prose, already tokenised, from which synthetic documents are padded.

    Every sentence is encoded with a leading space, so that joining token lists equals encoding the joined text.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[Document], num_documents: int = 900):
        boundary = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
        self.runs: list[list[list[int]]] = []
        for document in [d for d in documents if d["source"] in PROSE][:num_documents]:
            sentences = [re.sub(r"\s+", " ", s).strip() for p in document["text"][:60_000].split("\n\n") for s in boundary.split(p)]
            sentences = [s for s in sentences if 25 <= len(s) <= 260 and s[-1] in ".!?" and s[0].isupper()]
            if len(sentences) >= 5:
                self.runs.append(encode_all(tokenizer, [" " + s for s in sentences]))
        self.flat = [s for run in self.runs for s in run]
        self.repeated = encode_all(tokenizer, [" " + s for s in re.split(r"(?<=\.) ", REPEATED_FILLER)])
        assert self.runs, "no prose to take filler sentences from"

    def take(self, rng: random.Random, num_tokens: int) -> list[int]:
        """Whole sentences, as many as fit into `num_tokens` tokens: a running passage, unrelated sentences, or a repeated paragraph."""
        kind = rng.random()
        out: list[int] = []
        if kind < 0.60:
            run = rng.choice(self.runs)
            position = rng.randrange(len(run))
        while True:
            if kind < 0.60:
                if position == len(run):
                    run, position = rng.choice(self.runs), 0
                sentence = run[position]
                position += 1
            elif kind < 0.85:
                sentence = rng.choice(self.flat)
            else:
                sentence = [t for s in self.repeated for t in s]
            if len(out) + len(sentence) > num_tokens:
                return out
            out += sentence


Encode = Callable[[str], list[int]]


def random_key(rng: random.Random) -> str:
    """A pass key: `PASSKEY_DIGITS` decimal digits without a leading zero."""
    return str(rng.randrange(10 ** (PASSKEY_DIGITS - 1), 10**PASSKEY_DIGITS))


def random_distance(rng: random.Random, limit: int) -> int:
    """Distance in tokens between needle and question: half uniform, half log-uniform, in [50, limit]."""
    if rng.random() < 0.5:
        return rng.randint(50, limit)
    return round(math.exp(rng.uniform(math.log(50), math.log(limit))))


def passkey_document(rng: random.Random, encode: Encode, filler: Filler) -> list[int]:
    """Filler, the needle, `distance` tokens of filler, the question and its answer: the form in which pass-key recall is measured."""
    key = random_key(rng)
    needle, question = encode(PASSKEY_NEEDLE.format(key=key)), encode(f"{PASSKEY_QUESTION} {key}.")
    room = ROW_LENGTH - 1 - len(needle) - len(question)
    distance = random_distance(rng, min(1900, room))
    before = rng.randint(0, min(room - distance, 1200 if rng.random() < 0.2 else 250))
    return filler.take(rng, before) + needle + filler.take(rng, distance) + question


def named_keys_document(rng: random.Random, encode: Encode, filler: Filler, words: Sequence[str]) -> list[int]:
    """Several owners, each with a pass key, scattered in filler; then every owner is asked about in another order."""
    owners = [w.capitalize() for w in rng.sample(words, rng.randint(2, 8))]
    keys = {owner: random_key(rng) for owner in owners}
    gap = random_distance(rng, 1500 // len(owners))
    out: list[int] = []
    for owner in owners:
        out += encode(f" The pass key of {owner} is {keys[owner]}.") + filler.take(rng, gap)
    for owner in rng.sample(owners, len(owners)):
        out += encode(f" What is the pass key of {owner}? The pass key of {owner} is {keys[owner]}.")
    return out


def pairs_document(rng: random.Random, encode: Encode, filler: Filler, words: Sequence[str]) -> list[int]:
    """A list of `key: value` pairs, perhaps some filler, then queries of earlier keys with their values."""
    count = rng.randint(4, 70)
    keys = rng.sample(words, count)
    numeric = rng.random() < 0.5
    values = [str(rng.randrange(10, 10 ** rng.randint(2, 4))) if numeric else rng.choice(words) for _ in keys]
    queries = rng.sample(range(count), rng.randint(3, min(count, 30)))
    gap = filler.take(rng, random_distance(rng, 500)) if rng.random() < 0.4 else []
    if rng.random() < 0.6:
        listing = "".join(f"{k}: {v}\n" for k, v in zip(keys, values, strict=True))
        asked = "\n" + "".join(f"{keys[i]}: {values[i]}\n" for i in queries)
    else:
        listing = "".join(f" The value of {k} is {v}." for k, v in zip(keys, values, strict=True))
        asked = "".join(f" What is the value of {keys[i]}? The value of {keys[i]} is {values[i]}." for i in queries)
    return encode(listing) + gap + encode(asked)


def recall_rows(tokenizer: Tokenizer, filler: Filler, words: Sequence[str], *, num_rows: int, seed: int) -> np.ndarray:
    """Rows of synthetic recall documents, uint16 [num_rows, ROW_LENGTH].

    No document is cut by a row end (the answer must stay reachable); the rest of a row is running prose. By number of documents
    60 % ask for one pass key, 15 % for several named ones, 25 % are key-value lists.
    """
    rng = random.Random(seed)
    eos = tokenizer.token_to_id(EOS_TOKEN)
    assert eos is not None

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    rows = np.empty((num_rows, ROW_LENGTH), dtype=np.uint16)
    pending: list[int] | None = None
    for row in rows:
        filled: list[int] = []
        while True:
            if pending is None:
                kind = rng.random()
                if kind < 0.60:
                    pending = passkey_document(rng, encode, filler)
                elif kind < 0.75:
                    pending = named_keys_document(rng, encode, filler, words)
                else:
                    pending = pairs_document(rng, encode, filler, words)
                if len(pending) >= ROW_LENGTH:
                    pending = None
                    continue
            if len(filled) + len(pending) + 1 > ROW_LENGTH:
                break
            filled += [*pending, eos]
            pending = None
        while len(filled) < ROW_LENGTH:
            run = rng.choice(filler.runs)
            filled += [t for s in run[rng.randrange(len(run)) :] for t in s]
        row[:] = filled[:ROW_LENGTH]
    return rows


def excerpt(text: str, start: int, max_bytes: int) -> str:
    """A verbatim piece of `text` of at most `max_bytes` bytes, from a paragraph start at or after character `start`.

    It ends at a paragraph end, or at a sentence end where the paragraphs are too long for that (speeches are one paragraph).
    """
    if start:
        paragraph = text.find("\n\n", start)
        sentence = re.search(r"(?<=[.!?])\s+(?=[A-Z])", text[start:])
        if paragraph >= 0 and paragraph < start + max_bytes:
            start = paragraph + 2
        elif sentence:
            start += sentence.end()
    piece = text[start:].encode()[:max_bytes].decode(errors="ignore")
    if start + len(piece) < len(text):
        paragraph = piece.rfind("\n\n")
        sentences = [m.end() for m in re.finditer(r"[.!?](?=\s)", piece)]
        if paragraph > len(piece) // 2:
            piece = piece[:paragraph]
        elif sentences:
            piece = piece[: sentences[-1]]
    return piece.strip()


def choose_excerpts(documents: Sequence[Document], total_bytes: int) -> list[dict[str, str]]:
    """Excerpts of up to `EXCERPT_BYTES`, each source up to its share of `total_bytes`; long documents give several, spread over them."""
    by_source: dict[str, list[Document]] = collections.defaultdict(list)
    for document in documents:
        by_source[document["source"]].append(document)
    chosen: list[dict[str, str]] = []
    for source, (share, _) in SHARES.items():
        budget = share * total_bytes
        own = by_source[source]
        # Round k takes one excerpt from each document that is long enough for a (k+1)-th one, at evenly spread places.
        pieces: list[str] = []
        for turn in range(200):
            usable = [d for d in own if turn == 0 or len(d["text"]) > (turn + 1) * 4 * EXCERPT_BYTES]
            for document in usable:
                count = max(1, len(document["text"]) // (4 * EXCERPT_BYTES))
                text = excerpt(document["text"], turn * (len(document["text"]) // count), EXCERPT_BYTES)
                if budget > 0 and len(text) >= 400:
                    pieces.append(text)
                    budget -= len(text.encode())
            if budget <= 0 or not usable:
                break
        chosen += [{"text": piece, "source": source} for piece in pieces]
    return sorted(chosen, key=lambda e: hashlib.sha256(e["text"].encode()).digest())


def write_jsonl_gz(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write gzip JSON lines, byte-identical for identical rows (no time stamp in the header)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as handle, gzip.GzipFile(filename="", mode="wb", fileobj=handle, compresslevel=9, mtime=0) as stream:
        stream.write(body.encode())


def common_words(documents: Sequence[Document], count: int = 4000) -> list[str]:
    """Frequent lower-case words of 3 to 9 letters in the prose sources."""
    counter: collections.Counter[str] = collections.Counter()
    for document in documents:
        if document["source"] in PROSE:
            counter.update(re.findall(r"\b[a-z]{3,9}\b", document["text"][:40_000]))
    return [word for word, _ in counter.most_common(count)]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Parse the command line and build everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="corpus folder (train-*.parquet, heldout.jsonl, long.jsonl, summary.json)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the training input")
    parser.add_argument("--text", type=Path, required=True, help="folder for train.jsonl.gz and heldout.jsonl.gz")
    parser.add_argument("--recall-rows", type=int, default=2400, help="synthetic rows of 2048 tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)

    summary = json.loads((args.corpus / "summary.json").read_text(encoding="utf-8"))["sources"]
    for source in SHARES:
        licence = summary[source]["licence"]
        assert not FORBIDDEN_LICENCE.search(licence), f"{source} is under {licence}, which must not enter the embedded model"
    train, heldout = read_corpus(args.corpus)
    tokenizer = train_tokenizer(train)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves its __init__ untyped
        tokenizer_object=tokenizer,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=ROW_LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)

    eos = tokenizer.token_to_id(EOS_TOKEN)
    encoded = encode_all(tokenizer, [d["text"] for d in train])
    np.save(out / "tokens.npy", np.fromiter((t for ids in encoded for t in (*ids, eos)), dtype=np.uint16))
    filler = Filler(tokenizer, train)
    rows = recall_rows(tokenizer, filler, common_words(train), num_rows=args.recall_rows, seed=args.seed)
    for row in rows[:50]:  # joined pieces must be what the tokenizer itself would produce
        document = row[: row.tolist().index(eos)].tolist()
        assert tokenizer.encode(tokenizer.decode(document), add_special_tokens=False).ids == document
    np.save(out / "recall.npy", rows)

    shipped, shipped_heldout = choose_excerpts(train, 850_000), choose_excerpts(heldout, 175_000)
    write_jsonl_gz(args.text / "train.jsonl.gz", shipped)
    write_jsonl_gz(args.text / "heldout.jsonl.gz", shipped_heldout)
    (out / "heldout.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shipped_heldout), encoding="utf-8")

    sources = {}
    for source in SHARES:
        lengths = [(len(ids), len(d["text"].encode())) for ids, d in zip(encoded, train, strict=True) if d["source"] == source]
        sources[source] = {
            "package": summary[source]["package"],
            "licence": summary[source]["licence"],
            "documents": len(lengths),
            "bytes": sum(b for _, b in lengths),
            "tokens": sum(t for t, _ in lengths),
            "shipped_train_bytes": sum(len(e["text"].encode()) for e in shipped if e["source"] == source),
            "shipped_heldout_bytes": sum(len(e["text"].encode()) for e in shipped_heldout if e["source"] == source),
        }
    facts = {
        "sources": sources,
        "tokens": sum(len(ids) + 1 for ids in encoded),
        "recall_tokens": int(rows.size),
        "vocab_size": VOCAB_SIZE,
        "row_length": ROW_LENGTH,
        "passkey": {"needle": PASSKEY_NEEDLE, "question": PASSKEY_QUESTION, "digits": PASSKEY_DIGITS},
        "seed": args.seed,
        "sha256": {name: digest(out / name) for name in ("tokens.npy", "recall.npy", "heldout.jsonl", "tokenizer.json")},
    }
    (out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: facts[k] for k in ("tokens", "recall_tokens")} | {"bytes": sum(s["bytes"] for s in sources.values())}))


if __name__ == "__main__":
    main()
