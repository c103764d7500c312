"""The embedded model and text keep what their card promises."""

from __future__ import annotations

import collections
import gzip
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from attnconvert.embedded import model_dir, text_path

ROOT = Path(__file__).parents[1]


def read_text(split: Literal["train", "heldout"]) -> list[dict[str, str]]:
    """The documents of one embedded split."""
    with gzip.open(text_path(split), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded tokenizer."""
    return AutoTokenizer.from_pretrained(model_dir(), trust_remote_code=False)


@pytest.fixture(scope="module")
def model() -> Any:
    """The embedded model in fp32."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32, output_loading_info=True)
    network, info = loaded
    assert not any(info.values()), info
    return network.eval()


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    """What the training run recorded."""
    record: dict[str, Any] = json.loads((model_dir() / "training.json").read_text(encoding="utf-8"))
    return record


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    """tools/train_demo_model.py as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import train_demo_model
    finally:
        sys.path.pop(0)
    return train_demo_model


def test_model_is_a_llama_of_six_million_parameters_with_eight_heads_of_32(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (256, 8, 8, 32)
    assert config.max_position_embeddings == 2048
    assert 5.5e6 < sum(p.numel() for p in model.parameters()) < 7e6


def test_model_and_text_stay_within_their_size_limits() -> None:
    assert (model_dir() / "model.safetensors").stat().st_size <= 14_000_000
    assert sum(p.stat().st_size for p in model_dir().iterdir()) <= 15_000_000
    assert sum(text_path(s).stat().st_size for s in ("train", "heldout")) <= 500_000
    sizes = {s: sum(len(d["text"].encode()) for d in read_text(s)) for s in ("train", "heldout")}
    assert 700_000 < sizes["train"] < 1_000_000
    assert 140_000 < sizes["heldout"] < 220_000


def test_every_shipped_file_is_readable_by_other_users() -> None:
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in [*model_dir().iterdir(), text_path("train"), text_path("heldout")])


def test_heldout_perplexity_is_what_the_card_says_and_far_below_a_unigram_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, training: dict[str, Any]
) -> None:
    counts = torch.ones(model.config.vocab_size)
    for document in read_text("train"):
        counts += torch.bincount(torch.tensor(tokenizer(document["text"])["input_ids"]), minlength=len(counts))
    unigram_nats = -(counts / counts.sum()).log()
    nats = unigram = 0.0
    scored = 0
    # Every eighth document keeps this to seconds on one core and still meets every source.
    for document in read_text("heldout")[::8]:
        ids = torch.tensor(tokenizer(document["text"])["input_ids"][:1024])
        with torch.no_grad():
            logits = model(input_ids=ids[None, :-1]).logits[0]
        nats += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        unigram += float(unigram_nats[ids[1:]].sum())
        scored += len(ids) - 1
    perplexity, unigram_perplexity = math.exp(nats / scored), math.exp(unigram / scored)
    assert scored > 3000
    assert perplexity < 40
    assert perplexity < unigram_perplexity / 10
    # The first 1024 tokens of an eighth of the documents: the card's figure (all of them) must be near, not equal.
    assert abs(math.log(perplexity / training["result"]["ppl"])) < 0.5


def test_model_recalls_a_pass_key_across_1024_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, trainer: ModuleType) -> None:
    templates = {"needle": " The pass key is {key}. Remember it. {key} is the pass key.", "question": " What is the pass key? The pass key is", "digits": 5}
    filler = torch.tensor([i for d in read_text("heldout") for i in tokenizer(d["text"])["input_ids"]])
    result = trainer.passkey_recall(model, tokenizer, filler, templates, distance=1024, trials=12, seed=1)
    assert result["accuracy"] >= 0.75, result  # chance is 0.1


def test_train_and_heldout_documents_are_disjoint_down_to_their_phrases() -> None:
    def phrases(document: dict[str, str]) -> set[tuple[str, ...]]:
        words = document["text"].lower().split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    train, heldout = read_text("train"), read_text("heldout")
    assert not {d["text"] for d in train} & {d["text"] for d in heldout}
    seen = set().union(*(phrases(d) for d in train))
    for document in heldout:
        own = phrases(document)
        assert len(own & seen) <= 0.05 * len(own), document["text"][:100]


def test_documents_have_exactly_a_text_and_a_source_and_every_source_is_in_the_notice() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    documents = read_text("train") + read_text("heldout")
    assert all(set(d) == {"text", "source"} and len(d["text"]) >= 300 for d in documents)
    sources = collections.Counter(d["source"] for d in documents)
    assert len(sources) >= 10
    assert all(f"\n{source} " in notice for source in sources)


def test_corpus_sources_are_in_the_notice_and_none_is_copyleft() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    card = (model_dir() / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.split("| source |")[1].splitlines()[2:] if line.startswith("|")]
    assert len(rows) >= 15
    for source, package, licence, *_ in rows:
        assert f"\n{source} " in notice
        assert package in notice
        assert not any(word in licence.upper() for word in ("GPL", "GFDL", "MPL", "CC-BY"))


def test_tokenizer_round_trips_every_document(tokenizer: PreTrainedTokenizerBase) -> None:
    for document in [*read_text("heldout"), {"text": "tabs\tand\r\n  blanks   caf\u00e9 \u4f60\u597d \U0001f600 <b>"}]:
        assert tokenizer.decode(tokenizer(document["text"])["input_ids"]) == document["text"]


def test_tokenizer_makes_every_digit_a_token_and_adds_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("key 48213")[-5:] == list("48213")
    digits = [i for i in range(tokenizer.vocab_size) if any(c.isdigit() for c in tokenizer.decode([i]))]
    assert all(len(tokenizer.decode([i])) == 1 for i in digits)
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(tokenizer("some text")["input_ids"])
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_trainer_forward_equals_transformers_forward_on_packed_rows(model: Any, trainer: ModuleType) -> None:
    torch.manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (2, 97))
    ids[:, 40] = model.config.eos_token_id
    positions = torch.cat([torch.arange(41), torch.arange(56)]).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        documents = trainer.document_ids(ids, model.config.eos_token_id)
        actual = trainer.logits_of(model, ids, trainer.dense_mask(documents))
        crossing = trainer.logits_of(model, ids, None)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    assert (crossing - expected).abs().max() > 0.05  # the boundary matters, so the equality above tests it


def test_trainer_sees_every_natural_row_once_an_epoch(trainer: ModuleType) -> None:
    import numpy as np

    tokens = np.arange(16 * 10, dtype=np.uint16) + 100
    recall = np.zeros((4, 16), dtype=np.uint16)
    sampler = trainer.RowSampler(tokens, recall, batch_size=3, recall_share=0.0, seed=0, device=torch.device("cpu"))
    firsts = torch.cat([sampler.draw()[:, 0] for _ in range(3)]).tolist()
    assert len(set(firsts)) == 9
    assert {f % 16 for f in firsts} == {firsts[0] % 16}


def test_card_and_training_record_name_command_device_and_measured_values(training: dict[str, Any]) -> None:
    card = (model_dir() / "README.md").read_text(encoding="utf-8")
    assert training["command"] in card
    assert training["device"] in card
    assert f"**{training['result']['ppl']}**" in card
    assert set(training["result"]["passkey"]) == {"64", "256", "1024"}
    assert training["corpus"]["sha256"].keys() == {"tokens.npy", "recall.npy", "heldout.jsonl", "tokenizer.json"}
