"""Talk with a model in the terminal, on transformers alone. The decode cache of one turn is carried into the next.

What a cache holds is a list of tokens. A turn renders the whole conversation anew, and where that begins with the tokens of the cache only the
rest is computed; where it does not (a template that drops earlier reasoning, text that is tokenized otherwise than it was written) the
conversation is computed from its beginning, because a recurrent state cannot be cut back. Either way the answer is the same.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from attnconvert.convert.generate import Generation, continue_tokens, encode_messages, encode_prompt, summarize
from attnconvert.convert.report import format_bytes
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from rich.console import Console

    from attnconvert.convert.load import Loaded

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "/help": "this list",
        "/reset": "forget the conversation, keep the system message",
        "/system [TEXT]": "set the system message; alone, show it",
        "/save FILE": "write the conversation as JSON",
        "/stats": "what has been said, and what the cache holds",
        "/quit": "end, as Ctrl-D does",
    }
)


@dataclass(frozen=True)
class Answer:
    """One turn of the model.

    Attributes:
        generation: the text and what was measured.
        num_reused: tokens of the prompt that were in the cache already.
        stopped: the user stopped it.
    """

    generation: Generation
    num_reused: int
    stopped: bool


@dataclass
class Chat:
    """A conversation with a model.

    A tokenizer without a chat template makes it a text that both write: what the user says is put behind the text so far, on a line of its own,
    and the model continues that.

    Attributes:
        loaded: the model, in eval mode, and its tokenizer.
        max_new_tokens: upper limit of an answer.
        temperature: as in `continue_tokens`.
        top_p: likewise.
        system: the system message, None = none.
        turns: user and assistant in turn, with `role` and `content`.
        answers: one for each turn of the assistant.
    """

    loaded: Loaded
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    _cache: Any = None
    _held: list[int] = field(default_factory=list)  # the tokens of _cache

    @property
    def templated(self) -> bool:
        """There is a chat template."""
        return bool(getattr(self.loaded.tokenizer, "chat_template", None))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation with its system message."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    @property
    def limit(self) -> int | None:
        """Tokens that the model was built for; None = any number."""
        limit = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns, self.answers, self._cache, self._held = [], [], None, []

    def set_system(self, text: str | None) -> None:
        """Change the system message, for the whole conversation.

        Raises:
            AttnConvertError: `no-chat-template`, `chat-template`; the message is the old one then.
        """
        before, self.system = self.system, text
        try:
            encode_messages(self.loaded.tokenizer, [*self.messages, {"role": "user", "content": "?"}])
        except AttnConvertError:
            self.system = before
            raise

    def ask(self, text: str, *, on_text: Callable[[str], None] | None = None, stop: Callable[[], bool] | None = None) -> Answer:
        """Answer a message. A failure or an interrupt leaves the conversation as it was.

        Args:
            text: the user's message.
            on_text: receives the answer piece by piece.
            stop: asked after every token; True ends the answer there. What was written so far stays in the conversation.

        Raises:
            AttnConvertError: `empty-prompt`, `chat-template`, `context-full`.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        input_ids = self._encode(turns)
        length = input_ids.shape[1]
        room = self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - length)
        if room < 1:
            raise AttnConvertError(
                "context-full",
                f"the conversation has {length} tokens with this message, the model was built for {self.limit}",
                hint="/reset begins a new one",
            )
        fits = self._cache is not None and len(self._held) < length and input_ids[0, : len(self._held)].tolist() == self._held
        cache, num_reused = (self._cache, len(self._held)) if fits else (None, 0)
        # An interrupt in the middle of a forward pass would leave some layers a token ahead of others.
        self._cache, self._held = None, []
        stopped = False

        def asked() -> bool:
            nonlocal stopped
            stopped = stop is not None and stop()
            return stopped

        made = continue_tokens(
            self.loaded.model,
            self.loaded.tokenizer,
            input_ids,
            max_new_tokens=room,
            temperature=self.temperature,
            top_p=self.top_p,
            cache=cache,
            stop=asked,
            on_text=on_text,
        )
        self._cache, self._held = made.cache, made.token_ids[:-1]
        content = self.loaded.tokenizer.decode(made.token_ids[length:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.turns = [*turns, {"role": "assistant", "content": content}]
        answer = Answer(made.generation, num_reused, stopped)
        self.answers.append(answer)
        return answer

    def _encode(self, turns: list[dict[str, str]]) -> Any:
        if self.templated:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            return encode_messages(self.loaded.tokenizer, [*system, *turns])
        text = "".join(("\n" if at and turn["role"] == "user" else "") + turn["content"] for at, turn in enumerate(turns))
        return encode_prompt(self.loaded.tokenizer, text, chat=False)

    def describe(self) -> str:
        """Which model this is, in a line."""
        model = self.loaded.model
        plan = getattr(model.config, "attn_plan", None)
        what = model.config.model_type if plan is None else _plan_in_words(model.config.base_model_type, plan)
        first = next(model.parameters())
        limit = "" if self.limit is None else f"; {self.limit:,} tokens"
        return f"{self.loaded.source.name}: {what}; {first.device}, {str(first.dtype).removeprefix('torch.')}{limit}"

    def stats(self) -> str:
        """Several lines: turns, tokens, speed, reuse, cache."""
        if not self.answers:
            return f"{self.describe()}\nnothing has been said"
        made = [answer.generation for answer in self.answers]
        timed = [one for one in made if one.tokens_per_second is not None]
        seconds = sum(one.decode_seconds for one in timed)
        speed = f", {sum(one.num_new_tokens - 1 for one in timed) / seconds:.1f} tokens/s" if seconds > 0 else ""
        again = [answer for answer in self.answers[1:] if not answer.num_reused]
        softmax = made[-1].softmax_cache_bytes
        return "\n".join(
            [
                self.describe(),
                f"{len(made)} answers of {sum(one.num_new_tokens for one in made)} tokens{speed}",
                f"the conversation has {made[-1].num_prompt_tokens + made[-1].num_new_tokens} tokens; "
                + (f"it was computed from its beginning for {len(again)} of {len(made) - 1} later turns" if len(made) > 1 else "one turn"),
                f"the cache holds {format_bytes(made[-1].cache_bytes)}" + ("" if softmax is None else f", softmax attention would {format_bytes(softmax)}"),
            ]
        )

    def save(self, path: Path) -> None:
        """Write the conversation to a new file.

        Raises:
            AttnConvertError: `cannot-write`.
        """
        content = json.dumps({"model": self.loaded.source.name, "messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError as error:
            raise AttnConvertError("cannot-write", f"{str(path)!r} exists", hint="give the name of a new file") from error
        except OSError as error:
            raise AttnConvertError("cannot-write", f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _plan_in_words(family: str, plan: Mapping[str, Any]) -> str:
    methods = [row["method"] for row in plan["layers"] if row["method"] is not None]
    return f"{family} with {', '.join(dict.fromkeys(methods))} in {len(methods)} of {len(plan['layers'])} layers"


# ---------------------------------------------------------------- the terminal


def converse(chat: Chat, console: Console, notes: Console) -> None:
    """Read messages and commands from standard input until it ends, and answer them.

    On a terminal there is a prompt, errors are shown and the chat goes on, and Ctrl-C stops an answer. Elsewhere each line is a message, answers
    are lines on stdout, and the first error ends it.

    Args:
        chat: the conversation.
        console: for answers.
        notes: for everything else.

    Raises:
        AttnConvertError: those of `Chat`, when standard input is no terminal.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        _say(notes, chat.describe())
        _say(notes, "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    if not chat.templated:
        _say(notes, "The model has no chat template: it continues your text, and what you write next is put behind that.")
    for line in _lines(console, interactive=interactive):
        try:
            if line.startswith("/"):
                if not _obey(chat, line, notes):
                    return
            else:
                _answer(chat, line, console, notes, interactive=interactive)
        except AttnConvertError as error:
            if not interactive:
                raise
            _say(notes, error.render(), style="")


def _say(notes: Console, text: str, style: str = "dim") -> None:
    notes.print(Text(text, style=style), soft_wrap=not notes.is_terminal)


def _lines(console: Console, *, interactive: bool) -> Iterator[str]:
    """Lines that say something. Raises KeyboardInterrupt for Ctrl-C unless there is a person to tell how to leave."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):  # on Windows, whose terminal has both itself
        import readline  # noqa: F401 (its import gives input() editing and a history)
    # \001 and \002 tell readline what takes no room
    prompt = "\001\033[1;36m\002>\001\033[0m\002 " if console.color_system and not console.no_color and "readline" in sys.modules else "> "
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D or /quit ends)")
            continue
        if line:
            yield line


def _obey(chat: Chat, line: str, notes: Console) -> bool:
    """Carry out a command; False = end."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/help":
        width = max(map(len, COMMANDS))
        _say(notes, "\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()))
    elif command == "/reset":
        chat.reset()
        _say(notes, "a new conversation")
    elif command == "/system" and rest:
        chat.set_system(rest)
        _say(notes, "the system message is set")
    elif command == "/system":
        _say(notes, chat.system if chat.system is not None else "there is no system message")
    elif command == "/save":
        if not rest:
            raise AttnConvertError("bad-command", "/save needs a file", expected="/save FILE")
        chat.save(Path(rest).expanduser())
        _say(notes, f"wrote {rest}")
    elif command == "/stats":
        _say(notes, chat.stats())
    else:
        raise AttnConvertError("bad-command", f"there is no command {command!r}", expected=", ".join(name.split()[0] for name in COMMANDS))
    return True


def _answer(chat: Chat, text: str, console: Console, notes: Console, *, interactive: bool) -> None:
    writer = Writer(console.file, console.width if console.is_terminal else None)
    try:
        with _ctrl_c_stops(enabled=interactive) as stop:
            answer = chat.ask(text, on_text=writer.write, stop=stop)
    except KeyboardInterrupt:
        if not interactive:
            raise
        writer.end()
        _say(notes, "interrupted; the conversation is as before")
        return
    writer.end()
    reused = f"; {answer.num_reused} tokens were in the cache" if answer.num_reused else ""
    _say(notes, f"[{'stopped; ' if answer.stopped else ''}{summarize(answer.generation)}{reused}]")


@contextmanager
def _ctrl_c_stops(*, enabled: bool) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C makes the function yielded say True; the second interrupts, as ever (a long prefill asks nobody)."""
    pressed = False
    if not enabled:
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Writer:
    """Writes text as it comes, and breaks lines between words.

    Args:
        file: where to.
        width: columns of a line; None = break nothing.
    """

    def __init__(self, file: IO[str], width: int | None):
        self.file, self.width, self.column = file, width, 0

    def write(self, text: str) -> None:
        """Write whole words."""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text) if self.width else [text]:
            cells = cell_len(part)
            if part == "\n":
                self.column = 0
            elif self.width and self.column and self.column + cells > self.width:
                self.file.write("\n")
                self.column = 0
                if part.isspace():
                    continue
                self.column = cells
            else:
                self.column += cells
            self.file.write(part)
        self.file.flush()

    def end(self) -> None:
        """Begin a new line."""
        self.file.write("\n")
        self.file.flush()
