"""Calibration samples: long contexts with responses of the model's own, and their cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnconvert.convert.load import load_tokenizer, resolve
from attnconvert.distill import calibration
from attnconvert.distill.calibration import Calibration, make_calibration
from attnconvert.distill.config import DataConfig
from attnconvert.distill.data import read_documents
from attnconvert.errors import AttnConvertError

LENGTH = 192
WORDS = [
    "the",
    "ship",
    "went",
    "over",
    "a",
    "long",
    "sea",
    "and",
    "every",
    "sailor",
    "sang",
    "about",
    "his",
    "home",
    "while",
    "rain",
    "fell",
    "on",
    "the",
    "deck",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve("demo"))


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 6.0)
    return made


def text(num_words: int, number: int = 0) -> str:
    return " ".join(f"{WORDS[(i * (number + 3) + number) % len(WORDS)]} {i * (number + 1)}" for i in range(num_words // 2))


def source(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return DataConfig(source=str(path), eval_fraction=1e-9)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return source(tmp_path / "long.jsonl", [text(900, number) for number in range(6)])


def make(model: Any, tokenizer: Any, data: DataConfig, folder: Path, lengths: tuple[int, ...] = (LENGTH,), **settings: Any) -> Calibration:
    return make_calibration(model, tokenizer, data, lengths, **{"num_samples": 4, "response_tokens": 12, "cache": folder, **settings})


def error_of(call: Callable[[], Any]) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        call()
    return caught.value


def same(a: Calibration, b: Calibration) -> bool:
    return a.items.keys() == b.items.keys() and all(
        torch.equal(x, y) for length in a.items for one, other in zip(a.items[length], b.items[length], strict=True) for x, y in zip(one, other, strict=True)
    )


def with_template(tokenizer: Any) -> Any:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}[answer]"
    return chat


# -------------------------------------------------------------------------------------------------------------- the samples


@pytest.mark.parametrize("chat", [False, True])
def test_samples_have_the_length_asked_for_and_answers_are_the_models_own(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path, chat: bool) -> None:
    tokenizer = with_template(tokenizer) if chat else tokenizer
    made = make(model, tokenizer, data, tmp_path / "c", (LENGTH, 224), validation_length=256)
    assert {length: len(items) for length, items in made.items.items()} == {LENGTH: 4, 224: 4, 256: 4}
    for length, items in made.items.items():
        for number, (input_ids, response) in enumerate(items):
            count = int(response.sum())
            assert input_ids.shape == response.shape == (length,)
            assert response[-count:].all()
            if number % 2 == 0:
                assert count == length // 4
                continue
            with torch.no_grad():
                own = model(input_ids[None]).logits[0].argmax(-1)
            assert count == 12
            assert torch.equal(input_ids[-count:], own[-count - 1 : -1])


@pytest.mark.parametrize("chat", [False, True])
def test_every_second_sample_asks_for_a_fact_far_back(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path, chat: bool) -> None:
    tokenizer = with_template(tokenizer) if chat else tokenizer
    made = make(model, tokenizer, data, tmp_path / "c", num_samples=6)
    depths = []
    whole = "\n".join(text(900, number) for number in range(6))
    for number, (input_ids, response) in enumerate(made.items[LENGTH]):
        prompt = tokenizer.decode(input_ids[~response])
        if number % 2 == 0:
            assert tokenizer.decode(input_ids) in whole  # text as it is
            continue
        if chat:
            question = prompt.split("\n\n")[-1]
            assert question.endswith("?[end][answer]")
            name = question.split(" does ")[1].split(" have?")[0]
            assert prompt.startswith("[user]")
        else:
            name = prompt.rsplit("\n", 1)[1].split(" has the ")[0]
        assert prompt.count(name) == 2  # the fact and the question
        depths.append(prompt.index(name) / len(prompt))
    assert len(depths) == 3
    assert max(depths) - min(depths) > 0.1


def test_a_response_that_ends_early_leaves_its_room_to_the_context(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path) -> None:
    short = copy.deepcopy(model)
    short.generation_config.eos_token_id = list(range(0, len(tokenizer), 2))
    made = make(short, tokenizer, data, tmp_path / "c", num_samples=8)
    counts = [int(response.sum()) for _, response in made.items[LENGTH][1::2]]
    assert min(counts) < 12
    for (input_ids, response), count in zip(made.items[LENGTH][1::2], counts, strict=True):
        assert input_ids.shape == (LENGTH,)
        tokens = input_ids[response].tolist()
        assert count == 12 or tokens[-1] % 2 == 0
        assert all(token % 2 for token in tokens[:-1])


def test_prompts_answered_together_are_answered_as_alone(model: Any, tokenizer: Any) -> None:
    short = copy.deepcopy(model)
    short.generation_config.eos_token_id = list(range(0, len(tokenizer), 3))
    prompts = torch.randint(3, len(tokenizer), (6, 20), generator=torch.Generator().manual_seed(0)).tolist()
    together = calibration._generate(short, tokenizer, prompts, 9)
    assert together == [calibration._generate(short, tokenizer, [prompt], 9)[0] for prompt in prompts]
    assert len(set(map(len, together))) > 1


def test_the_seed_decides_everything(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path) -> None:
    one = make(model, tokenizer, data, tmp_path / "a")
    assert same(one, make(model, tokenizer, data, tmp_path / "b"))
    assert not same(one, make(model, tokenizer, data, tmp_path / "a", seed=1))


def test_progress_counts_samples(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make(model, tokenizer, data, tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ----------------------------------------------------------------------------------------------------------------- the text


def contexts(made: Calibration, tokenizer: Any, length: int = LENGTH) -> list[str]:
    return [tokenizer.decode(item.input_ids[~item.response]) for item in made.items[length]]


def test_long_documents_are_used_and_short_ones_are_not(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = source(tmp_path / "mixed.jsonl", [*("tiny story number " + str(number) for number in range(200)), text(900)])
    made = make(model, tokenizer, data, tmp_path / "c")
    assert made.notes == ()
    assert not any("tiny story" in context for context in contexts(made, tokenizer))


def test_short_documents_are_joined_where_there_is_no_long_one_and_a_note_says_so(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = source(tmp_path / "short.jsonl", [f"tiny story number {number}, " + text(20, number) for number in range(60)])
    made = make(model, tokenizer, data, tmp_path / "c")
    assert "shorter ones were joined" in made.notes[0]
    assert any(context.count("tiny story") > 1 for context in contexts(made, tokenizer))


def test_the_validation_length_has_documents_of_its_own(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = source(tmp_path / "named.jsonl", [" ".join(f"dog{number}" for _ in range(600)) for number in range(8)])
    made = make(model, tokenizer, data, tmp_path / "c", num_samples=8, validation_length=256)
    seen, unseen = ({number for number in range(8) for one in contexts(made, tokenizer, length) if f"dog{number}" in one} for length in (LENGTH, 256))
    assert seen
    assert unseen
    assert not seen & unseen


def test_held_out_documents_are_not_read(tmp_path: Path) -> None:
    texts = [text(40, number) for number in range(60)]
    whole = source(tmp_path / "a.jsonl", texts)
    part = DataConfig(source=whole.source, eval_fraction=0.5)
    read, left = set(read_documents(part, 0)), {one.encode() for one in texts}
    assert 10 < len(read) < 50
    assert read < left
    assert set(read_documents(DataConfig(source=whole.source, eval_fraction=0.5, eval_source="embedded"), 0)) == left


def test_text_and_lengths_that_do_not_fit_are_refused_before_anything_is_made(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    cases = {
        "data-empty": lambda: make(model, tokenizer, DataConfig(source=str(empty)), tmp_path / "c"),
        "data-too-short": lambda: make(model, tokenizer, source(tmp_path / "s.jsonl", ["one short text"]), tmp_path / "c"),
        "length-too-long": lambda: make(model, tokenizer, data, tmp_path / "c", (LENGTH, 513)),
        "length-too-short": lambda: make(model, tokenizer, data, tmp_path / "c", (32, LENGTH)),
        "data-missing": lambda: make(model, tokenizer, DataConfig(source=str(tmp_path / "none.txt")), tmp_path / "c"),
    }
    assert {code: error_of(call).code for code, call in cases.items()} == {code: code for code in cases}
    assert "max_position_embeddings = 512" in str(error_of(cases["length-too-long"]).expected)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------------------------------------------------------- the cache


def test_samples_are_made_once(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(model, tokenizer, data, tmp_path / "c")
    monkeypatch.setattr(calibration, "_generate", lambda *args: pytest.fail("the samples are in the cache"))
    second = make(model, tokenizer, data, tmp_path / "c")
    assert (first.from_cache, second.from_cache) == (False, True)
    assert same(first, second)
    assert first.notes == second.notes


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", None])
def test_a_damaged_cache_file_is_replaced(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path, damage: bytes | None) -> None:
    first = make(model, tokenizer, data, tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-50] if damage is None else damage)
    second = make(model, tokenizer, data, tmp_path / "c")
    assert not second.from_cache
    assert same(first, second)
    assert file.read_bytes() == whole


def test_other_weights_settings_or_text_are_other_samples(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path) -> None:
    make(model, tokenizer, data, tmp_path / "c")
    trained = copy.deepcopy(model)
    trained.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
    other = source(tmp_path / "other.jsonl", [text(900, 40)])
    for changed in (
        make(trained, tokenizer, data, tmp_path / "c"),
        make(model, tokenizer, other, tmp_path / "c"),
        make(model, tokenizer, data, tmp_path / "c", response_tokens=11),
        make(model, with_template(tokenizer), data, tmp_path / "c"),
    ):
        assert not changed.from_cache
    assert len(list((tmp_path / "c").iterdir())) == 5


def test_a_cache_that_cannot_be_written_costs_a_note_and_nothing_else(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes: list[str] = []
    made = make(model, tokenizer, data, tmp_path / "file" / "c", note=notes.append)
    assert len(made.items[LENGTH]) == 4
    assert "not kept for next time" in notes[0]


def test_the_cache_is_the_users_hugging_face_cache(model: Any, tokenizer: Any, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    make_calibration(model, tokenizer, data, (LENGTH,), num_samples=1, response_tokens=12)
    assert len(list((tmp_path / "assets" / "attnconvert" / "calibration").iterdir())) == 1
