"""The chat: a carried cache answers as a recomputed one, Ctrl-C keeps the conversation, commands, and what a terminal and a pipe see."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from attnconvert import cli
from attnconvert.convert import generate, pipeline
from attnconvert.convert.load import Loaded, load_model, resolve
from attnconvert.errors import AttnConvertError
from attnconvert.serving import chat as module
from attnconvert.serving.chat import Chat, Writer
from attnconvert.surgery.swap import swap

TEMPLATE = """{%- for m in messages %}{%- if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no such system message') }}{%- endif %}
{{- '<' + m.role + '>' + m.content + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", params=["stock", "hedgehog", "moa"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """The embedded model, as it is or converted and untrained, with a chat template."""
    loaded = load_model(resolve("demo"), dtype="fp32")
    loaded.tokenizer.chat_template = TEMPLATE
    if request.param != "stock":
        swap(loaded.model, pipeline.prepare("demo", request.param).plan)
    return loaded


@pytest.fixture(scope="module")
def stock() -> Loaded:
    """The embedded model with a chat template."""
    loaded = load_model(resolve("demo"), dtype="fp32")
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture(scope="module")
def plain() -> Loaded:
    """The embedded model, which has no chat template."""
    return load_model(resolve("demo"), dtype="fp32")


def alone(loaded: Loaded, chat: Chat, text: str, tokens: int) -> str:
    """What `generate` answers to a conversation of its own, without any cache from before."""
    ids = generate.encode_messages(loaded.tokenizer, [*chat.messages, {"role": "user", "content": text}])
    with torch.no_grad():
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


# ---------------------------------------------------------------- turns


def test_every_turn_on_a_carried_cache_is_the_text_of_a_recomputed_one(loaded: Loaded) -> None:
    chat = Chat(loaded, max_new_tokens=24, system="You hunt whales.")
    reused = []
    for text in ("Where is the ship?", "And the captain?", "Call me Ishmael. " * 12, "Who?"):
        want = alone(loaded, chat, text, 24)
        reused.append(chat.ask(text).num_reused)
        assert chat.turns[-1] == {"role": "assistant", "content": want}
    assert reused[0] == 0
    assert sum(count > 0 for count in reused) >= 2, reused  # a turn that ends in an unusual split of a word is tokenized otherwise


def test_the_reused_tokens_are_all_of_the_earlier_conversation(stock: Loaded) -> None:
    chat = Chat(stock, max_new_tokens=8)
    first = chat.ask("The whale").generation
    second = chat.ask("And?")
    assert second.num_reused == first.num_prompt_tokens + first.num_new_tokens - 1  # the last token was never fed back


def test_a_history_that_the_template_changes_is_computed_anew(stock: Loaded) -> None:
    chat = Chat(stock, max_new_tokens=8)
    chat.ask("The whale")
    chat.turns[-1]["content"] = "Something else."
    want = alone(stock, chat, "And?", 8)
    assert chat.ask("And?").num_reused == 0
    assert chat.turns[-1]["content"] == want


def test_another_system_message_is_computed_anew_and_a_refused_one_leaves_the_old(stock: Loaded) -> None:
    chat = Chat(stock, max_new_tokens=4, system="Be brief.")
    chat.ask("The whale")
    chat.set_system("Be long.")
    want = alone(stock, chat, "And?", 4)
    assert chat.ask("And?").num_reused == 0
    assert chat.turns[-1]["content"] == want
    with pytest.raises(AttnConvertError, match=r"error\[chat-template\].*system, user.*no such system message"):
        chat.set_system("no")
    assert chat.system == "Be long."


def test_a_stopped_answer_stays_in_the_conversation_and_the_next_turn_goes_on_from_it(loaded: Loaded) -> None:
    chat = Chat(loaded, max_new_tokens=40)
    pieces: list[str] = []
    answer = chat.ask("The whale", on_text=pieces.append, stop=lambda: len(pieces) >= 3)
    assert answer.stopped
    assert answer.generation.num_new_tokens < 40
    assert chat.turns[-1]["content"] == "".join(pieces)
    want = alone(loaded, chat, "Go on.", 10)
    chat.max_new_tokens = 10
    assert not chat.ask("Go on.").stopped
    assert chat.turns[-1]["content"] == want


def test_an_interrupt_in_a_forward_pass_leaves_the_conversation_and_no_half_changed_cache(loaded: Loaded) -> None:
    chat = Chat(loaded, max_new_tokens=12)
    chat.ask("The whale")
    before = list(chat.turns)
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = loaded.model.model.layers[3].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            chat.ask("And?")
    finally:
        hook.remove()
    assert chat.turns == before
    want = alone(loaded, chat, "And?", 12)
    assert chat.ask("And?").num_reused == 0
    assert chat.turns[-1]["content"] == want


def test_without_a_template_both_write_one_text(plain: Loaded) -> None:
    chat = Chat(plain, max_new_tokens=10)
    chat.ask("The whale")
    chat.ask("The sea")
    said = [turn["content"] for turn in chat.turns]
    assert said[3] == generate.generate_text(plain.model, plain.tokenizer, f"{said[0]}{said[1]}\n{said[2]}", max_new_tokens=10).text
    with pytest.raises(AttnConvertError, match="no-chat-template"):
        chat.set_system("Be brief.")


def test_a_full_context_is_an_error_and_the_last_answer_before_ends_at_the_limit(stock: Loaded) -> None:
    chat = Chat(stock, max_new_tokens=20)
    limit = chat.limit
    assert limit is not None
    encoded = generate.encode_messages(stock.tokenizer, [{"role": "user", "content": " whale" * 2000}]).shape[1]
    words = 2000 + limit - encoded - 5
    room = limit - generate.encode_messages(stock.tokenizer, [{"role": "user", "content": " whale" * words}]).shape[1]
    assert 0 < room < 20
    answer = chat.ask(" whale" * words)
    assert answer.generation.num_prompt_tokens + answer.generation.num_new_tokens <= limit
    with pytest.raises(AttnConvertError, match=f"context-full.*built for {limit}"):
        chat.ask("And?")
    assert len(chat.turns) == 2


def test_draws_take_from_the_whole_vocabulary_unless_top_p_says_otherwise(stock: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a model's own generation_config.json may ask for
    monkeypatch.setattr(stock.model.generation_config, "top_k", 1)
    torch.manual_seed(0)
    drawn = {Chat(stock, max_new_tokens=6, temperature=1.5).ask("The whale").generation.text for _ in range(4)}
    assert len(drawn) > 1
    nearly_greedy = {Chat(stock, max_new_tokens=6, temperature=1.5, top_p=1e-6).ask("The whale").generation.text for _ in range(3)}
    assert nearly_greedy == {Chat(stock, max_new_tokens=6).ask("The whale").generation.text}


# ---------------------------------------------------------------- the terminal


def test_lines_break_between_words_of_a_stream() -> None:
    file = io.StringIO()
    writer = Writer(file, 20)
    text = "Call me Ishmael. Some years ago - never mind how long precisely - having little\nor no money in my purse"
    for word in text.replace(" ", " |").split("|"):  # as the tokens come, word by word
        writer.write(word)
    lines = file.getvalue().split("\n")
    assert max(map(len, lines)) <= 20
    assert " ".join(file.getvalue().split()) == " ".join(text.split())
    assert "or no money in my" in [line.strip() for line in lines]
    unbroken = io.StringIO()
    Writer(unbroken, None).write(text)
    assert unbroken.getvalue() == text


def test_a_pipe_answers_each_line_and_obeys_commands(plain: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "chat.json"
    lines = f"The whale\n\nThe sea\n/stats\n/save {saved}\n/reset\n/stats\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, err = io.StringIO(), io.StringIO()
    chat = Chat(plain, max_new_tokens=5)
    module.converse(chat, Console(file=out, width=60), Console(file=err, width=60))
    said = json.loads(saved.read_text())
    assert [m["role"] for m in said["messages"]] == ["user", "assistant"] * 2
    assert out.getvalue() == "".join(f"{m['content']}\n" for m in said["messages"] if m["role"] == "assistant")
    assert "2 answers of 10 tokens" in err.getvalue()
    assert "0 of 1 later turns" in err.getvalue()
    assert "nothing has been said" in err.getvalue()
    assert chat.turns == []


@pytest.mark.parametrize(("line", "said"), [("/sytem x", "expected /help, /reset, /system"), ("/save", "/save FILE"), ("/save {old}", "exists")])
def test_a_wrong_command_ends_a_pipe_with_an_error(line: str, said: str, plain: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_text("mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO(line.format(old=tmp_path / "old")))
    with pytest.raises(AttnConvertError, match=said):
        module.converse(Chat(plain), Console(file=io.StringIO()), Console(file=io.StringIO()))
    assert (tmp_path / "old").read_text() == "mine"


def test_the_first_ctrl_c_asks_to_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with module._ctrl_c_stops(enabled=True) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_answers_a_pipe_with_the_text_of_generate(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The whale\n"))
    code = cli.main(["chat", "demo", "--max-new-tokens", "8", "--dtype", "fp32"])
    chatted = capsys.readouterr()
    assert code == 0
    assert cli.main(["generate", "demo", "The whale", "--max-new-tokens", "8", "--dtype", "fp32"]) == 0
    assert chatted.out == capsys.readouterr().out
    assert "tokens/s; cache" in chatted.err
    assert "no chat template" in chatted.err


@pytest.mark.parametrize(("options", "code", "said"), [(["--top-p", "0"], 2, "--top-p"), (["--system", "x"], 1, "no-chat-template")])
def test_options_that_cannot_be_are_refused(options: list[str], code: int, said: str, capsys: Capture) -> None:
    assert cli.main(["chat", "demo", *options]) == code
    assert said in capsys.readouterr().err


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str):
        self.main, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attnconvert", *arguments], stdin=other, stdout=other, stderr=other, env=environment, cwd=folder, start_new_session=True
        )
        os.close(other)
        self.seen, self.read_to = "", 0

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until the text has come after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen[self.read_to :]:
            assert time.monotonic() < end, self.seen
            if not select.select([self.main], [], [], 0.2)[0]:
                continue
            try:
                self.seen += os.read(self.main, 4096).decode(errors="replace")
            except OSError:  # Linux says so when the other side was closed
                raise AssertionError(self.seen) from None
        self.read_to = self.seen.index(text, self.read_to) + len(text)

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, "chat", "demo", "--max-new-tokens", "1900")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.main)


def test_ctrl_c_on_a_terminal_stops_the_answer_and_keeps_the_chat(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("The whale\n")
    terminal.wait_for("The whale")  # the echo
    terminal.wait_for(" ")  # and the first words
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("[stopped; ")
    terminal.wait_for("> ")
    terminal.type("/nonsense\n")
    terminal.wait_for("error[bad-command]")
    terminal.wait_for("> ")
    terminal.type("/stats\n")
    terminal.wait_for("1 answers of")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
