"""Text sources, the train/held-out split, packing and the order of rows."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnconvert.distill import data as data_module
from attnconvert.distill.config import DataConfig
from attnconvert.distill.data import IGNORE_INDEX, SEPARATOR, Data, MixedRows, PackedRows, epoch_indices, load_data
from attnconvert.errors import AttnConvertError

EOS = 0
NUM_WORDS = 400


def make_tokenizer(*, eos: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word `w0`..`w399`, so that a test can read documents back from ids."""
    vocabulary = {"<eos>": EOS, "<unk>": 1, "<bos>": 2} | {f"w{i}": i + 3 for i in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "<eos>"} if eos else {}
    build: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, unk_token="<unk>", **names, **({"bos_token": "<bos>"} if bos else {}))


def documents(count: int, seed: int = 0, words: tuple[int, int] = (3, 60)) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(rng.randint(*words))) for _ in range(count)]


def read_back(rows: PackedRows) -> list[str]:
    """The documents in `rows`, each ended by EOS; a last one without EOS was cut by the budget and is left out."""
    text: list[str] = []
    found: list[str] = []
    for token in rows.input_ids.flatten().tolist():
        if token == EOS:
            found.append(" ".join(text))
            text = []
        else:
            text.append(f"w{token - 3}")
    return found


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "source": "test"}) + "\n" for text in texts))
    return path


def write_gz(path: Path, texts: list[str]) -> Path:
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def write_txt(path: Path, texts: list[str]) -> Path:
    path.write_text(f"\n{SEPARATOR}\n".join(texts))
    return path


def write_parquet(path: Path, texts: list[str], row_group_size: int = 7, field: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=row_group_size)
    return path


def write_folder(path: Path, texts: list[str]) -> Path:
    (path / "b" / "c").mkdir(parents=True)
    write_parquet(path / "b" / "c" / "one.parquet", texts[:20])
    write_jsonl(path / "b" / "two.jsonl", texts[20:50])
    write_txt(path / "three.txt", texts[50:])
    (path / "README.md").write_text("not data")
    (path / "empty.parquet").touch()
    return path


def load(source: Path | str, tokens: int = 400, *, length: int = 16, eval_tokens: int = 64, seed: int = 0, **config: Any) -> Data:
    settings = DataConfig(source=str(source), **{"eval_fraction": 0.2, **config})
    return load_data(settings, make_tokenizer(), length=length, num_train_tokens=tokens, num_eval_tokens=eval_tokens, eval_length=16, seed=seed)


def error_of(call: Callable[[], Any]) -> AttnConvertError:
    with pytest.raises(AttnConvertError) as caught:
        call()
    return caught.value


# ------------------------------------------------------------------------------------------------------------------ split


def test_splits_share_no_document_and_together_hold_every_document(tmp_path: Path) -> None:
    texts = documents(100)
    found = load(write_jsonl(tmp_path / "a.jsonl", texts), 10**6, length=2, eval_tokens=10**6)
    train, held_out = set(read_back(found.train)), set(read_back(found.eval))
    assert train.isdisjoint(held_out)
    assert 5 < len(held_out) < 40
    # A row of 16 (eval) cuts off at most the last held-out document, a row of 2 the last training document.
    assert len(set(texts) - train - held_out) <= 2


def test_split_does_not_depend_on_document_order_and_repeats_are_dropped(tmp_path: Path) -> None:
    texts = documents(80)
    shuffled = [*texts, *texts[:30]]
    random.Random(1).shuffle(shuffled)
    one = load(write_jsonl(tmp_path / "a.jsonl", texts), 10**6)
    other = load(write_jsonl(tmp_path / "b.jsonl", shuffled), 10**6)
    assert one.train.sha256() == other.train.sha256()
    assert one.eval.sha256() == other.eval.sha256()


def test_a_document_stays_on_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    texts = documents(120)
    small = load(write_jsonl(tmp_path / "a.jsonl", texts[:60]), 10**6, eval_tokens=10**6)
    large = load(write_jsonl(tmp_path / "b.jsonl", texts), 10**6, eval_tokens=10**6)
    assert set(read_back(small.train)).isdisjoint(read_back(large.eval))
    assert set(read_back(small.eval)).isdisjoint(read_back(large.train))


def test_documents_of_eval_source_never_train(tmp_path: Path) -> None:
    texts = documents(60)
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    held_out = write_txt(tmp_path / "heldout.txt", texts[:25])
    found = load(train, 10**6, eval_source=str(held_out), eval_tokens=32)
    assert set(read_back(found.train)).isdisjoint(texts[:25])
    assert found.description["train_documents_dropped"] == 25
    assert found.description["eval_fraction"] is None
    assert set(read_back(found.eval)) <= set(texts[:25])


def test_share_held_out_grows_until_it_gives_one_row(tmp_path: Path) -> None:
    found = load(write_jsonl(tmp_path / "a.jsonl", documents(12, words=(20, 40))), 10**6, eval_fraction=0.001)
    assert found.eval.num_rows >= 1
    assert 0.001 < found.description["eval_fraction"] <= 0.5
    assert set(read_back(found.eval)).isdisjoint(read_back(found.train))


def test_embedded_text_has_its_own_held_out_documents() -> None:
    found = load_data(DataConfig(), make_tokenizer(), length=64, num_train_tokens=2000, num_eval_tokens=500, eval_length=64)
    assert found.description["eval_source"] == "embedded"
    assert found.description["train"]["sha256"] != found.description["eval"]["sha256"]
    assert found.train.num_rows == 32
    assert found.eval.num_rows == 8


# ---------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl.gz", write_gz), ("a.txt", write_txt), ("a.parquet", write_parquet), ("folder", write_folder)],
    ids=["jsonl.gz", "txt", "parquet", "folder"],
)
def test_every_format_gives_the_same_rows_as_jsonl(tmp_path: Path, name: str, write: Callable[[Path, list[str]], Path]) -> None:
    texts = documents(80)
    expected = load(write_jsonl(tmp_path / "reference.jsonl", texts), 600)
    found = load(write(tmp_path / name, texts), 600)
    assert found.train.sha256() == expected.train.sha256()
    assert found.eval.sha256() == expected.eval.sha256()
    assert found.description | {"source": ""} == expected.description | {"source": ""}


def test_txt_with_crlf_and_byte_order_mark_reads_as_plain_txt(tmp_path: Path) -> None:
    texts = documents(60)
    write_txt(tmp_path / "a.txt", texts)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert load(tmp_path / "a.txt", 10**6).train.sha256() == load(tmp_path / "b.txt", 10**6).train.sha256()


def test_txt_without_separators_is_cut_at_blank_lines_and_loses_no_word(tmp_path: Path) -> None:
    paragraphs = documents(3000, words=(10, 40))
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    pieces = list(data_module._read_txt(path))
    assert " ".join(" ".join(pieces).split()) == " ".join(paragraphs)
    starts = {paragraph[:30] for paragraph in paragraphs}
    assert all(piece[:30] in starts for piece in pieces)
    assert all(len(piece) < 22_000 for piece in pieces)
    assert 15 <= len(pieces) <= 30


def test_txt_without_blank_lines_is_still_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("\n".join(documents(2000, words=(10, 40))))
    assert len(list(data_module._read_txt(path))) > 5


def test_jsonl_in_ranges_reads_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(50)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    boundary = len(path.read_bytes().split(b"\n")[0]) + 1  # a range that ends exactly where a line ends
    for size in (1, 17, boundary, 1000):
        monkeypatch.setattr(data_module, "_RANGE_BYTES", size)
        assert list(data_module._read(list(data_module._parts(path, "text")), "text")) == texts


def test_half_a_surrogate_pair_and_null_text_do_not_stop_reading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(60))
    with path.open("a") as stream:
        stream.write('{"text": "w1 \\ud83d w2"}\n{"text": null}\n\n{"text": "  "}\n')
    assert load(path, 10**6, eval_tokens=0).description["train"]["documents"] > 40


# ------------------------------------------------------------------------------------------------------------ the sample


def sorted_by_source(tmp_path: Path) -> Path:
    """Ten sources of 40 documents after one another; source s writes only the words w{40s}..w{40s+39}."""
    rng = random.Random(0)
    texts = [" ".join(f"w{40 * source + rng.randrange(40)}" for _ in range(20)) for source in range(10) for _ in range(40)]
    return write_parquet(tmp_path / "sorted.parquet", texts, row_group_size=10)


def sources_in(rows: PackedRows) -> Counter[int]:
    return Counter((token - 3) // 40 for token in rows.input_ids.flatten().tolist() if token != EOS)


def test_small_budget_samples_the_whole_of_a_corpus_sorted_by_source(tmp_path: Path) -> None:
    found = load(sorted_by_source(tmp_path), 1600)  # a fifth of the corpus
    assert len(sources_in(found.train)) >= 9
    assert max(sources_in(found.train).values()) < 800


def test_corpus_too_large_to_scan_is_sampled_in_many_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sorted_by_source(tmp_path)
    monkeypatch.setattr(data_module, "_SCAN_BYTES", 1)
    read: list[str] = []
    reader = data_module._read

    def counting(parts: Any, text_field: str) -> Iterator[str]:
        for text in reader(parts, text_field):
            read.append(text)
            yield text

    monkeypatch.setattr(data_module, "_read", counting)
    found = load(path, 800)
    assert found.train.num_rows == 50
    assert len(sources_in(found.train)) >= 5
    assert {0, 1} & set(sources_in(found.train))
    assert {8, 9} & set(sources_in(found.train))
    assert 100 < len(read) < 300


def test_budget_is_filled_when_tokens_are_longer_than_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(400))
    generous = load(path, 4000)
    monkeypatch.setattr(data_module, "_BYTES_PER_TOKEN", 0.1)
    tight = load(path, 4000)
    assert tight.train.num_rows == 250
    assert tight.train.sha256() == generous.train.sha256()


def test_memory_follows_the_budget_and_not_the_corpus() -> None:
    pool = data_module._Pool(limit=1000)
    for number in random.Random(0).sample(range(10_000), 10_000):
        pool.add(number.to_bytes(16, "big"), b"x" * 100)
    assert len(pool._heap) == len(pool._keys) == 10
    assert pool.left_out
    assert sorted(pool._keys) == list(range(10))


def test_seed_changes_the_order_but_not_the_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(100))
    one, other = load(path, 10**6, length=2, seed=0), load(path, 10**6, length=2, seed=1)
    assert one.train.sha256() != other.train.sha256()
    assert len(set(read_back(one.train)) ^ set(read_back(other.train))) <= 2  # the last document may be cut


def test_same_request_gives_the_same_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(100))
    assert load(path).description == load(path).description


def test_source_smaller_than_the_budget_states_its_epochs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    found = load(path, 10_000)
    facts = found.description["train"]
    assert facts["tokens"] == found.train.num_rows * 16
    assert facts["tokens"] <= facts["tokens_available"] < facts["tokens"] + 16
    assert found.description["train_epochs"] == pytest.approx(10_000 / facts["tokens"], abs=1e-3)
    assert load(path, 160).description["train_epochs"] == 1.0
    assert json.loads(json.dumps(found.description)) == found.description


def test_documents_of_other_lengths_are_left_out_of_training_alone(tmp_path: Path) -> None:
    path, settings = write_jsonl(tmp_path / "a.jsonl", documents(200)), DataConfig(source=str(tmp_path / "a.jsonl"), eval_fraction=0.2)

    def lengths(bounds: tuple[int, int | None]) -> tuple[list[int], str]:
        found = load_data(settings, make_tokenizer(), length=2, num_train_tokens=10**6, num_eval_tokens=10**6, eval_length=16, document_tokens=bounds)
        return sorted(len(text.split()) + 1 for text in read_back(found.train)), found.eval.sha256()

    everything, held_out = lengths((0, None))
    for bounds in ((0, 20), (20, 40), (40, None)):
        expected = [n for n in everything if bounds[0] < n <= (bounds[1] or 10**6)]
        found, same = lengths(bounds)
        assert same == held_out
        assert 10 < len(expected) < len(everything) / 2
        assert abs(len(found) - len(expected)) <= 1  # the last one may be cut
    error = error_of(
        lambda: load_data(settings, make_tokenizer(), length=16, num_train_tokens=64, num_eval_tokens=0, eval_length=16, document_tokens=(100, None))
    )
    assert error.code == "data-too-short"
    assert "Only documents of more than 100 tokens are taken" in (error.hint or "")
    assert path.exists()


def test_mixed_rows_see_each_length_in_turn_and_each_row_once_per_epoch() -> None:
    parts = tuple(
        PackedRows(torch.arange(64, dtype=torch.int32).reshape(-1, length), torch.zeros(64 // length, length, dtype=torch.int32)) for length in (2, 8)
    )
    mixed = MixedRows(parts)
    assert mixed.length == 8
    batches = [mixed.batch(5, step, 16) for step in range(8)]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(8, 2), (2, 8)] * 4
    for turn in (0, 1):
        assert sorted(torch.cat([batch.input_ids.flatten() for batch in batches[turn::2]]).tolist()) == list(range(64))
    assert mixed.sha256() not in {MixedRows(parts[::-1]).sha256(), parts[0].sha256()}


def test_zero_budget_gives_no_rows_and_no_error(tmp_path: Path) -> None:
    found = load(write_jsonl(tmp_path / "a.jsonl", documents(40)), 0, eval_tokens=0)
    assert found.train.num_rows == found.eval.num_rows == 0
    assert found.description["train_epochs"] == 0.0


def test_progress_ends_at_the_wanted_tokens(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", documents(200))), eval_fraction=0.2)
    load_data(
        config,
        make_tokenizer(),
        length=16,
        num_train_tokens=1000,
        num_eval_tokens=100,
        eval_length=16,
        progress=lambda done, wanted: calls.append((done, wanted)),
    )
    assert calls[-1] == (1008 + 112, 1008 + 112)


# ---------------------------------------------------------------------------------------------------------------- packing


def test_positions_restart_exactly_at_documents_and_rows(tmp_path: Path) -> None:
    rows = load(write_jsonl(tmp_path / "a.jsonl", documents(60)), 10**6).train
    expected: list[int] = []
    after_eos = True
    for index, token in enumerate(rows.input_ids.flatten().tolist()):
        expected.append(0 if after_eos or index % 16 == 0 else expected[-1] + 1)
        after_eos = token == EOS
    assert rows.position_ids.flatten().tolist() == expected
    assert 0 in rows.position_ids[:, 1:]


def test_targets_are_the_next_tokens_of_the_same_document(tmp_path: Path) -> None:
    rows = load(write_jsonl(tmp_path / "a.jsonl", documents(60)), 800).train
    batch = rows.rows(list(range(rows.num_rows)))
    targets = batch.targets()
    assert targets.dtype == batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    ends = batch.input_ids == EOS
    ends[:, -1] = True
    assert torch.equal(targets == IGNORE_INDEX, ends)
    assert torch.equal(targets[~ends], batch.input_ids.roll(-1, 1)[~ends])
    assert (targets == EOS).any(), "the end of a document is learnt"


@pytest.mark.parametrize(("bos", "end"), [(True, 2), (False, None)], ids=["bos", "neither"])
def test_without_eos_documents_end_in_bos_or_nothing_and_positions_still_restart(tmp_path: Path, bos: bool, end: int | None) -> None:
    texts = ["w1 w2 w3", "w4 w5 w6"]
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", texts)), eval_source="embedded")
    tokenizer = make_tokenizer(eos=False, bos=bos)
    rows = load_data(config, tokenizer, length=2, num_train_tokens=100, num_eval_tokens=0, eval_length=2).train
    words = [4, 5, 6], [7, 8, 9]
    one, other = ([*first, *([end] if end else [])] for first in words)
    assert rows.input_ids.flatten().tolist() in (one + other, other + one)
    assert rows.position_ids.flatten().tolist() == ([0, 1] * 4 if bos else [0, 1, 0, 0, 0, 1])


def test_rows_come_in_the_order_asked() -> None:
    ids = torch.arange(12, dtype=torch.int32).reshape(4, 3)
    rows = PackedRows(ids, torch.zeros_like(ids))
    assert torch.equal(rows.rows([3, 0, 3]).input_ids, ids[[3, 0, 3]].long())


# ------------------------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 1), (7, 3), (8, 8), (10, 25), (64, 5)])
def test_every_row_is_seen_once_per_epoch_across_batches(num_rows: int, batch_size: int) -> None:
    epochs = 6
    order = [row for step in range(-(-epochs * num_rows // batch_size)) for row in epoch_indices(num_rows, 3, step, batch_size)]
    for epoch in range(epochs):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_epochs_differ_in_order_and_seeds_too() -> None:
    orders = {tuple(epoch_indices(50, seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_resuming_at_a_step_gives_the_rows_of_an_uninterrupted_run() -> None:
    steps = [epoch_indices(23, 5, step, 4) for step in range(30)]
    epoch_indices(99, 1, 7, 4)
    data_module._permutation.cache_clear()
    assert [epoch_indices(23, 5, step, 4) for step in reversed(range(30))] == steps[::-1]


# ----------------------------------------------------------------------------------------------------------------- errors


def test_missing_file_is_named_with_what_would_be_accepted(tmp_path: Path) -> None:
    error = error_of(lambda: load(tmp_path / "no.jsonl"))
    assert error.code == "data-missing"
    assert str(tmp_path / "no.jsonl") in error.render()
    assert ".parquet" in error.render()
    assert error_of(lambda: load("corpus.jsonl")).code == "data-missing"
    assert error_of(lambda: load("some/deep/folder")).code == "data-missing"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert error_of(lambda: load(tmp_path / name)).code == "data-empty"


def test_blank_documents_and_folders_without_data_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f" \n{SEPARATOR}\n\n")
    assert error_of(lambda: load(tmp_path / "a.txt")).code == "data-empty"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("x")
    assert error_of(lambda: load(tmp_path / "folder")).code == "data-empty"


def test_unknown_ending_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    error = error_of(lambda: load(tmp_path / "a.csv"))
    assert error.code == "data-unknown-extension"
    assert ".jsonl.gz" in error.render()


@pytest.mark.parametrize("write", [write_jsonl, write_parquet], ids=["jsonl", "parquet"])
def test_missing_column_error_names_the_columns_there(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", documents(5), field="content")
    error = error_of(lambda: load(path))
    assert error.code == "data-column-missing"
    assert error.expected is not None
    assert "content" in error.expected
    assert load(path, 32, eval_tokens=0, text_field="content").train.num_rows == 2


def test_column_of_another_type_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(5))
    (tmp_path / "a.jsonl").write_text('{"text": [1, 2]}\n')
    assert error_of(lambda: load(tmp_path / "a.jsonl")).code == "data-column-type"
    assert error_of(lambda: load(write_parquet(tmp_path / "a.parquet", documents(5)), text_field="id")).code == "data-column-type"


def test_text_shorter_than_one_sequence_states_found_and_needed(tmp_path: Path) -> None:
    error = error_of(lambda: load(write_jsonl(tmp_path / "a.jsonl", ["w1 w2 w3", "w4"]), length=1024))
    assert error.code == "data-too-short"
    assert "1024 needed" in error.message
    error = error_of(lambda: load(tmp_path / "a.jsonl", length=1024, eval_tokens=0, eval_fraction=1e-9))
    assert "the training text is shorter than one sequence: 6 tokens found, 1024 needed" in error.message
    error = error_of(lambda: load(tmp_path / "a.jsonl", 0))
    assert "the held-out text" in error.message


def test_training_text_that_is_all_held_out_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(30))
    error = error_of(lambda: load(path, eval_source=str(path)))
    assert error.code == "data-too-short"
    assert error.hint is not None
    assert error.hint.startswith("30 of its documents")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    lines = b'{"text": "w1 w2"}\n{"text": "w3 caf\xe9 w4"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    error = error_of(lambda: load(tmp_path / name))
    assert error.code == "data-not-utf8"
    assert error.where == f"{tmp_path / name}:2"
    assert "0xe9" in error.message


@pytest.mark.parametrize("line", ["{oops", "[1, 2]", '"text"'])
def test_bad_json_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    with path.open("a") as stream:
        stream.write(line + "\n")
    error = error_of(lambda: load(path))
    assert (error.code, error.where) == ("data-bad-json", f"{path}:41")


def test_damaged_parquet_and_gzip_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", documents(50))
    path.write_bytes(path.read_bytes()[:-100])
    assert error_of(lambda: load(path)).code == "data-corrupt"
    packed = write_gz(tmp_path / "a.jsonl.gz", documents(50))
    packed.write_bytes(packed.read_bytes()[:-40])
    assert error_of(lambda: load(packed)).code == "data-corrupt"
    packed.write_bytes(b"plain text")
    assert error_of(lambda: load(packed)).code == "data-corrupt"


def test_disk_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(40))
    # A file mode would not stop the root user that containers run tests as.
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(self))))
    error = error_of(lambda: load(path))
    assert error.code == "data-unreadable"
    assert error.where == str(path)


# ---------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Replace `datasets.load_dataset`: answers with a dataset or raises; returns the list of calls."""
    datasets = pytest.importorskip("datasets")

    def install(answer: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, name: str | None = None, *, split: str | None, revision: str | None, streaming: bool) -> Any:
            assert streaming, "a corpus is never downloaded whole"
            calls.append((path, name, split, revision))
            if isinstance(answer, Exception):
                raise answer
            return answer[split] if split else answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def stream_of(texts: list[str], read: list[int] | None = None, num_shards: int = 1) -> Any:
    datasets = pytest.importorskip("datasets")

    def generate(shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            for index in range(shard, len(texts), num_shards):
                if read is not None:
                    read.append(index)
                yield {"text": texts[index]}

    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(num_shards))})


def test_hub_stream_is_split_by_hash_and_not_read_beyond_the_budgets(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_STREAM_BUFFER_BYTES", 2000)
    monkeypatch.setattr(data_module, "_TOKENIZE_BYTES", 200)
    read: list[int] = []
    calls = hub({"train": stream_of(documents(2000), read)})
    found = load("user/name", 800, subset="en", revision="abc")
    assert calls == [("user/name", "en", "train", "abc")]
    assert found.train.num_rows == 50
    assert set(read_back(found.train)).isdisjoint(read_back(found.eval))
    assert len(read) < 300
    assert found.description["train"]["tokens_available"] is None


def test_hub_stream_gives_the_same_rows_twice_and_drops_repeats(hub: Any) -> None:
    texts = documents(60)
    hub({"train": stream_of([*texts, *texts], num_shards=3)})
    one, other = load("user/name", 10**6), load("user/name", 10**6)
    assert one.description == other.description
    assert max(Counter(read_back(one.train)).values()) == 1


def test_hub_eval_source_takes_the_held_out_split(hub: Any) -> None:
    texts = documents(80)
    calls = hub({"train": stream_of(texts), "test": stream_of(["w1 w2 w3 w4"] * 9), "validation": stream_of(texts[:30])})
    found = load("user/name", 10**6, eval_source="user/name", subset="en")
    assert calls == [("user/name", "en", None, None), ("user/name", "en", "train", None)]
    assert set(read_back(found.eval)) <= set(texts[:30])
    assert set(read_back(found.train)).isdisjoint(texts[:30])


def test_hub_errors_have_their_codes(hub: Any) -> None:
    missing = pytest.importorskip("datasets.exceptions").DatasetNotFoundError
    cases = {
        "data-hub-missing": missing("Dataset 'user/name' doesn't exist on the Hub or cannot be accessed."),
        "data-hub-gated": missing("Dataset 'user/name' is a gated dataset on the Hub. You must be authenticated to access it."),
        "data-hub-offline": ConnectionError("Couldn't reach 'user/name' on the Hub (OfflineModeIsEnabled)"),
        "data-hub-config": ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"),
        "data-hub-failed": RuntimeError("Dataset scripts are no longer supported, but found name.py"),
    }
    for code, raised in cases.items():
        hub(raised)
        error = error_of(lambda: load("user/name"))
        assert error.code == code
        assert "user/name" in error.render()
        assert code != "data-hub-config" or "['en', 'de']" in error.message


def test_real_datasets_library_offline_is_reported_as_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert error_of(lambda: load("user/no-such-dataset")).code == "data-hub-offline"
    assert list(tmp_path.iterdir()) == []


def test_hub_stream_without_the_column_names_those_there(hub: Any) -> None:
    hub({"train": stream_of(documents(5))})
    error = error_of(lambda: load("user/name", text_field="content"))
    assert error.code == "data-column-missing"
    assert "text" in str(error.expected)


def test_hub_stream_that_breaks_off_is_an_error_not_a_short_corpus(hub: Any) -> None:
    datasets = pytest.importorskip("datasets")

    def generate() -> Iterator[dict[str, str]]:
        yield {"text": "w1 w2 w3"}
        raise ConnectionError("reset by peer")

    hub({"train": datasets.IterableDataset.from_generator(generate)})
    assert error_of(lambda: load("user/name")).code == "data-hub-offline"


def test_missing_reader_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", documents(5))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    error = error_of(lambda: load(path))
    assert error.code == "missing-package"
    assert "pip install pyarrow" in error.render()


def test_aligned_documents_start_at_multiples_and_keep_their_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i % 50}" for i in range(n))}) + "\n" for n in range(20, 400, 7)))
    data = load_data(DataConfig(source=str(path), align=16), tokenizer, length=64, num_train_tokens=2000, num_eval_tokens=128, eval_length=64)
    starts = (data.train.position_ids == 0).nonzero()[:, 1]
    assert len(set(starts.tolist())) > 2
    assert (starts % 16 == 0).all()
    with pytest.raises(AttnConvertError, match="not a multiple of data"):
        load_data(DataConfig(source=str(path), align=48), tokenizer, length=64, num_train_tokens=2000, num_eval_tokens=128, eval_length=64)


def test_recall_rows_ask_for_facts_given_earlier_and_keep_the_budget(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from attnconvert import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir())
    config = {"length": 512, "num_train_tokens": 512 * 20, "num_eval_tokens": 512, "eval_length": 512}
    plain = load_data(DataConfig(source="embedded"), tokenizer, **config)
    mixed = load_data(DataConfig(source="embedded", recall=0.25), tokenizer, **config)
    assert mixed.train.num_rows == plain.train.num_rows
    assert mixed.description["recall_rows"] == 5
    assert torch.equal(mixed.train.input_ids[:15], plain.train.input_ids[:15])
    for row in mixed.train.input_ids[15:]:
        text = tokenizer.decode(row.tolist())
        numbers = Counter(word for word in "".join(c if c.isdigit() else " " for c in text).split() if len(word) >= 3)
        assert any(count >= 2 for count in numbers.values())
    again = load_data(DataConfig(source="embedded", recall=0.25), tokenizer, **config)
    assert again.description == mixed.description


def test_rows_know_where_their_documents_may_begin():
    def rows(*lengths):
        position = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])[None]
        return PackedRows(torch.zeros_like(position), position)

    assert rows(256).alignment == 256
    assert rows(128, 64, 64).alignment == 64
    assert rows(129, 127).alignment == 1
    assert MixedRows((rows(64), rows(192, 64))).alignment == 64
