"""Write text with a model, token by token, and say how fast it was and what its decode cache held."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2.exceptions import TemplateError
from transformers import TextStreamer

from attnconvert.convert.evaluate import cache_bytes
from attnconvert.convert.report import format_bytes
from attnconvert.errors import AttnConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """What `generate_text` wrote and measured.

    Attributes:
        text: the new text, special tokens left out.
        num_prompt_tokens: tokens of the prompt, chat template included.
        num_new_tokens: tokens generated, an end-of-text token included.
        prefill_seconds: until the first new token.
        decode_seconds: from the first to the last new token.
        tokens_per_second: decoding speed, the first token left out; None with fewer than two.
        cache_bytes: what the decode cache holds at the end: recurrent states, windows and sinks, keys and values of kept layers.
        softmax_cache_bytes: keys and values that softmax attention in every layer would hold by then; None when the shapes are not known.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None
    cache_bytes: int
    softmax_cache_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Continuation:
    """What `continue_tokens` wrote.

    Attributes:
        generation: the text and what was measured.
        token_ids: the tokens given and the new ones.
        cache: holds all of `token_ids` but the last, which was never fed back.
    """

    generation: Generation
    token_ids: list[int]
    cache: Any


class _Relay(TextStreamer):
    """Hands finished words to a function, and remembers when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        # The first call brings the prompt, each later one a token. Reading a token from the device waits for it, so the clock is honest.
        super().put(value.cpu())
        self.times.append(time.perf_counter())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """Token ids [1, T] of a conversation in the tokenizer's chat template, up to where the assistant's next turn begins.

    Args:
        tokenizer: has a chat template.
        messages: turns with `role` and `content`, oldest first.

    Raises:
        AttnConvertError: `no-chat-template`; `chat-template` when the template refuses the conversation, e.g. its system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise AttnConvertError("no-chat-template", "the tokenizer has no chat template", hint="leave out --chat: the model continues the prompt as plain text")
    try:
        rendered = tokenizer.apply_chat_template([dict(message) for message in messages], add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise AttnConvertError("chat-template", f"the model's chat template refuses this conversation (roles: {roles}): {error}") from error
    return torch.as_tensor(tokenizer(rendered, return_tensors="pt", add_special_tokens=False).input_ids, dtype=torch.int64)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> torch.Tensor:
    """Token ids [1, T] of the prompt; with `chat`, as the user's turn of the tokenizer's chat template.

    Raises:
        AttnConvertError: `empty-prompt`, and those of `encode_messages`.
    """
    if chat:
        ids = encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = torch.as_tensor(tokenizer(prompt, return_tensors="pt").input_ids, dtype=torch.int64)
    if ids.shape[1] == 0:
        raise AttnConvertError("empty-prompt", "the prompt is empty", expected="at least one token of text")
    return ids


def softmax_cache_bytes(model: PreTrainedModel, num_tokens: int) -> int | None:
    """Bytes of the keys and values that softmax attention in every converted layer would hold after `num_tokens`; None for an unconverted model."""
    plan = getattr(model.config, "attn_plan", None)
    if plan is None:
        return None
    numbers = sum(2 * row["num_key_value_heads"] * row["head_dim"] for row in plan["layers"])
    return int(numbers * num_tokens * next(model.parameters()).element_size())


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt. See `continue_tokens`.

    Args:
        model: a causal LM in eval mode, converted or not, on any device.
        tokenizer: its tokenizer.
        prompt: text to continue, or with `chat` a message to answer.
        max_new_tokens: upper limit; an end-of-text token ends it earlier.
        temperature: as in `continue_tokens`.
        chat: use the tokenizer's chat template.
        seed: of the draws.
        on_text: receives the text piece by piece as it is finished.

    Raises:
        AttnConvertError: `empty-prompt`, `no-chat-template`, `chat-template`.
    """
    input_ids = encode_prompt(tokenizer, prompt, chat=chat)
    torch.manual_seed(seed)
    return continue_tokens(model, tokenizer, input_ids, max_new_tokens=max_new_tokens, temperature=temperature, on_text=on_text).generation


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    cache: Any = None,
    stop: Callable[[], bool] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Continuation:
    """Continue tokens. On CUDA, a model whose layers are all converted decodes from a CUDA graph; one with kept softmax layers does not.

    Args:
        model: a causal LM in eval mode, converted or not, on any device.
        tokenizer: its tokenizer.
        input_ids: [1, T], all tokens so far.
        max_new_tokens: upper limit; an end-of-text token ends it earlier.
        temperature: 0 = always the most likely token, else tokens are drawn from softmax(logits / temperature).
        top_p: with a temperature, draw from the likeliest tokens that have this probability together; 1 = from all.
        cache: what an earlier call returned, for the same first tokens and fewer than T of them; changed in place.
        stop: asked after every token; True ends the text there.
        on_text: receives the text piece by piece as it is finished.
    """
    pieces: list[str] = []

    def keep(text: str) -> None:
        pieces.append(text)
        if on_text is not None:
            on_text(text)

    input_ids = input_ids.to(next(model.parameters()).device)
    relay = _Relay(tokenizer, keep)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # generation_config.json of many models has a top_k and a top_p of its own
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    if stop is not None:
        asked = stop
        sampling["stopping_criteria"] = [lambda ids, scores: torch.full((ids.shape[0],), asked(), dtype=torch.bool, device=ids.device)]
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=relay,
            return_dict_in_generate=True,
            past_key_values=cache,
            **sampling,
        )
    # times[0] is the prompt's own hand-over, before the prefill
    token_times = relay.times[1:]
    token_ids = output.sequences[0].tolist()
    num_new = len(token_ids) - input_ids.shape[1]
    decode = token_times[-1] - token_times[0] if token_times else 0.0
    generation = Generation(
        text="".join(pieces),
        num_prompt_tokens=int(input_ids.shape[1]),
        num_new_tokens=num_new,
        prefill_seconds=token_times[0] - start if token_times else 0.0,
        decode_seconds=decode,
        tokens_per_second=(num_new - 1) / decode if num_new > 1 and decode > 0 else None,
        cache_bytes=cache_bytes(output.past_key_values),
        # the last token is drawn but never fed back
        softmax_cache_bytes=softmax_cache_bytes(model, len(token_ids) - 1),
    )
    return Continuation(generation, token_ids, output.past_key_values)


def summarize(made: Generation) -> str:
    """Tokens, speed and cache in a line."""
    speed = f", {made.tokens_per_second:.1f} tokens/s" if made.tokens_per_second is not None else ""
    cache = f"cache {format_bytes(made.cache_bytes)}"
    if made.softmax_cache_bytes is not None:
        cache += f" (softmax attention: {format_bytes(made.softmax_cache_bytes)})"
    return f"{made.num_prompt_tokens} + {made.num_new_tokens} tokens, first after {made.prefill_seconds:.2f} s{speed}; {cache}"
