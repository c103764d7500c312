"""Pretrain the embedded `demo` model: a 6 M parameter Llama, from token files made by `tools/build_demo_corpus.py`.

    python tools/train_demo_model.py --data DATA --out OUT --minutes 5

Runs on one GPU (or, for a smoke test, on a CPU: `--steps 3`) and needs no network. The run is limited by wall-clock time: the learning
rate falls linearly to zero over the time that is left after warm-up, so it always ends and always saves. Writes into OUT config.json,
generation_config.json, model.safetensors (bf16), the tokenizer, training.json (what was run and measured) and README.md (the model card,
whose figures all come from training.json). Prints one JSON line at the end; progress goes to stderr.

The forward pass is written out here over transformers' own Llama modules, so that it compiles into one graph and attention can respect
document boundaries cheaply; `tests/test_embedded.py` checks that it equals `LlamaForCausalLM.forward`.

Shapes: B rows, T tokens of a row, H heads, D head_dim, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

# flex: compiled kernel that skips blocks outside the document (GPU). dense: a [B,1,T,T] mask, any device.
# causal: no mask beyond causality, so a row's documents see the ones before them.
AttentionKind = Literal["flex", "dense", "causal"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PASSKEY_DISTANCES = (64, 256, 1024)


def demo_config(vocab_size: int, eos_token_id: int, pad_token_id: int) -> LlamaConfig:
    """The architecture: 6 layers, hidden size 256, 8 heads of 32 (no grouping), tied embeddings, 2048 positions; 6.2 M parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        initializer_range=0.02,
    )


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; projections that write to the residual stream start 1/sqrt(2 layers) smaller."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def rotary(num_tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [T, D] of rotary embeddings, halves repeated (transformers' layout).

    Positions count along the row. Within a document only position differences matter, so restarting them at each document
    would change nothing when attention stays inside the document.
    """
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(num_tokens, device=device, dtype=torch.float32), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Apply rotary embeddings."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_TD + torch.cat([-second, first], dim=-1) * sin_TD


def document_ids(ids_BT: Tensor, eos_token_id: int) -> Tensor:
    """Number of the document each token belongs to [B, T]; the end-of-text token still belongs to its document."""
    ends = (ids_BT == eos_token_id).int()
    return torch.cumsum(ends, dim=1, dtype=torch.int32) - ends


def targets_of(ids_BT: Tensor, eos_token_id: int) -> Tensor:
    """Next-token targets int64 [B, T]; -100 where the next token starts another document and in the last column."""
    targets = torch.full_like(ids_BT, -100, dtype=torch.int64)
    targets[:, :-1] = ids_BT[:, 1:]
    return targets.masked_fill(ids_BT == eos_token_id, -100)


def flex_mask(documents_BT: Tensor) -> BlockMask:
    """Causal attention inside each document, as block structure plus rule."""

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    rows, length = documents_BT.shape
    return create_block_mask(inside, rows, None, length, length, device=documents_BT.device.type)


def dense_mask(documents_BT: Tensor) -> Tensor:
    """Causal attention inside each document, bool [B, 1, T, T]."""
    length = documents_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents_BT.device).tril()
    return (causal & (documents_BT[:, :, None] == documents_BT[:, None, :]))[:, None]


def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: BlockMask | Tensor | None) -> Tensor:
    """Softmax attention under `mask`; None is plain causal attention."""
    if isinstance(mask, BlockMask):
        out = flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=mask)
        assert isinstance(out, Tensor)
        return out
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, is_causal=mask is None)


def logits_of(model: LlamaForCausalLM, ids_BT: Tensor, mask: BlockMask | Tensor | None) -> Tensor:
    """Logits [B, T, V] of transformers' Llama weights, without its mask and cache machinery."""
    config = model.config
    rows, length = ids_BT.shape
    heads, head_dim = config.num_attention_heads, config.head_dim
    assert head_dim is not None
    assert isinstance(config.rope_parameters, dict)
    theta = config.rope_parameters["rope_theta"]
    assert theta is not None
    cos, sin = rotary(length, head_dim, theta, ids_BT.device)
    hidden_BTE = model.model.embed_tokens(ids_BT)
    for layer in model.model.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden_BTE)
        q, k, v = (p(normed).view(rows, length, heads, head_dim).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        mixed = attend(q, k, v, mask).transpose(1, 2).reshape(rows, length, heads * head_dim)
        hidden_BTE = hidden_BTE + attention.o_proj(mixed)
        normed = layer.post_attention_layernorm(hidden_BTE)
        hidden_BTE = hidden_BTE + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
    logits: Tensor = model.lm_head(model.model.norm(hidden_BTE))
    return logits


def mean_loss(model: LlamaForCausalLM, ids_BT: Tensor, targets_BT: Tensor, mask: BlockMask | Tensor | None) -> Tensor:
    """Mean cross-entropy in nats over the positions that have a target."""
    logits = logits_of(model, ids_BT, mask)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten())


class RowSampler:
    """Draws training rows: natural text in epochs without repetition, plus a share of synthetic recall rows.

    Args:
        tokens: uint16 [N], natural documents with end-of-text tokens.
        recall: uint16 [R, T], synthetic rows.
        batch_size: rows per step.
        recall_share: expected share of synthetic rows in a batch.
        seed: of the order.
        device: where the token files are kept and rows are cut out.
    """

    def __init__(self, tokens: np.ndarray, recall: np.ndarray, *, batch_size: int, recall_share: float, seed: int, device: torch.device):
        self.length = recall.shape[1]
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.recall = torch.from_numpy(recall.astype(np.int32)).to(device)
        self.batch_size, self.recall_share = batch_size, recall_share
        self.rng = np.random.default_rng(seed)
        self.natural_order = np.empty(0, dtype=np.int64)
        self.recall_order = np.empty(0, dtype=np.int64)
        self.columns = torch.arange(self.length, device=device)
        self.natural_rows_drawn = 0

    def _natural_starts(self, count: int) -> np.ndarray:
        while len(self.natural_order) < count:
            # A new offset every epoch, so that rows (and their cuts) differ between epochs.
            offset = int(self.rng.integers(self.length))
            starts = np.arange(offset, len(self.tokens) - self.length, self.length)
            self.natural_order = np.concatenate([self.natural_order, self.rng.permutation(starts)])
        taken, self.natural_order = self.natural_order[:count], self.natural_order[count:]
        self.natural_rows_drawn += count
        return taken

    def _recall_rows(self, count: int) -> np.ndarray:
        while len(self.recall_order) < count:
            self.recall_order = np.concatenate([self.recall_order, self.rng.permutation(len(self.recall))])
        taken, self.recall_order = self.recall_order[:count], self.recall_order[count:]
        return taken

    def draw(self) -> Tensor:
        """One batch, int64 [B, T]."""
        expected = self.batch_size * self.recall_share
        synthetic = min(self.batch_size, int(expected + self.rng.random()))
        starts = torch.from_numpy(self._natural_starts(self.batch_size - synthetic)).to(self.tokens.device)
        natural = self.tokens[starts[:, None] + self.columns]
        chosen = torch.from_numpy(self._recall_rows(synthetic)).to(self.tokens.device)
        return torch.cat([natural, self.recall[chosen]]).long()

    @property
    def epochs(self) -> float:
        """Passes over the natural text so far."""
        return float(self.natural_rows_drawn * self.length / len(self.tokens))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on the projection matrices only (not on norms, not on the tied embedding)."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def heldout_rows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int, max_tokens: int) -> tuple[Tensor, int]:
    """Held-out documents packed into rows int64 [N, T] (end-of-text after each), and the UTF-8 bytes of the text in them."""
    ids: list[int] = []
    num_bytes = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) + len(piece) + 1 > max_tokens:
            break
        ids += [*piece, tokenizer.eos_token_id]
        num_bytes += len(text.encode())
    assert ids, "max_tokens is smaller than the first held-out document"
    ids += [tokenizer.eos_token_id] * (-len(ids) % length)  # end-of-text has no target, so the padding is never scored
    return torch.tensor(ids).view(-1, length), num_bytes


@torch.no_grad()
def heldout_nats(model: LlamaForCausalLM, rows_NT: Tensor, eos_token_id: int) -> tuple[float, int]:
    """Summed cross-entropy in nats over held-out rows, and the number of scored tokens. Attention stays inside each document."""
    total, count = 0.0, 0
    for row in torch.split(rows_NT, 4):
        ids = row.to(model.device)
        targets = targets_of(ids, eos_token_id)
        logits = logits_of(model, ids, dense_mask(document_ids(ids, eos_token_id)))
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    return total, count


@torch.no_grad()
def passkey_recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, filler: Tensor, templates: dict[str, Any], *, distance: int, trials: int, seed: int
) -> dict[str, float]:
    """Rank of the right pass key among ten by log-probability, `distance` filler tokens after it was stated.

    Returns:
        `accuracy` (share of trials with rank 1; chance is 0.1), `mean_rank` (1 is best, chance 5.5) and `greedy` (share of trials in
        which every token of the key is the most likely one).
    """
    rng = np.random.default_rng([seed, distance])
    low, high = 10 ** (templates["digits"] - 1), 10 ** templates["digits"]
    ranks, greedy = [], 0
    for _ in range(trials):
        keys = [str(k) for k in rng.choice(np.arange(low, high), size=10, replace=False)]
        before = int(rng.integers(20, 200))
        start = int(rng.integers(0, len(filler) - before - distance))
        passage = filler[start : start + before + distance].tolist()
        needle = tokenizer(templates["needle"].format(key=keys[0]), add_special_tokens=False)["input_ids"]
        question = tokenizer(templates["question"], add_special_tokens=False)["input_ids"]
        prompt = torch.tensor([passage[:before] + needle + passage[before:] + question], device=model.device)
        answers = torch.tensor([tokenizer(" " + k, add_special_tokens=False)["input_ids"] for k in keys], device=model.device)
        first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(keys))
        rest = model(input_ids=answers[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first.logits.expand(len(keys), -1, -1), rest], dim=1).float()
        scores = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(-1)
        ranks.append(1 + int((scores[1:] >= scores[0]).sum()))
        greedy += int(bool((logits[0].argmax(-1) == answers[0]).all()))
    return {"accuracy": ranks.count(1) / trials, "mean_rank": sum(ranks) / trials, "greedy": greedy / trials}


def unigram_perplexity(tokens: np.ndarray, rows_NT: Tensor, vocab_size: int, eos_token_id: int) -> float:
    """Held-out perplexity of a model that knows only the token frequencies of the training text (add-one smoothing)."""
    counts = np.bincount(tokens, minlength=vocab_size).astype(np.float64) + 1
    nats = -np.log(counts / counts.sum())
    targets = targets_of(rows_NT, eos_token_id)
    return float(np.exp(nats[targets[targets != -100].numpy()].mean()))


def train(model: LlamaForCausalLM, sampler: RowSampler, args: argparse.Namespace, started: float) -> dict[str, Any]:
    """Train until the time or step budget is spent.

    Returns:
        steps, tokens, epochs, seconds (of training, compilation included), tokens_per_second (after the first steps) and the loss curve.
    """
    device = model.device
    on_gpu = device.type == "cuda"
    eos = model.config.eos_token_id
    assert isinstance(eos, int)
    attention: AttentionKind = args.attention or ("flex" if on_gpu else "dense")
    masks: dict[str, Callable[[Tensor], BlockMask | Tensor | None]] = {"flex": flex_mask, "dense": dense_mask, "causal": lambda documents: None}
    make_mask, loss_function = masks[attention], mean_loss
    if on_gpu:
        # The model is so narrow that uncompiled steps spend their time on kernel launches and elementwise memory traffic.
        loss_function = torch.compile(mean_loss, fullgraph=True, dynamic=False)
        make_mask = torch.compile(make_mask, dynamic=False) if attention == "flex" else make_mask
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=on_gpu)
    deadline = started + 60 * args.minutes
    begun = time.monotonic()
    settled, settled_step = begun, 0  # when compilation was over; the schedule runs over the time after it
    losses: list[Tensor] = []
    curve: list[dict[str, float]] = []
    step = 0
    while True:
        now = time.monotonic()
        progress = max((now - settled) / max(deadline - settled, 1e-9) if step > 3 else 0.0, step / args.steps if args.steps else 0.0)
        if progress >= 1:
            break
        rate = args.lr * min(1.0, (step + 1) / args.warmup_steps) * (1 - progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = sampler.draw()
        mask = make_mask(document_ids(ids, eos))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            loss = loss_function(model, ids, targets_of(ids, eos), mask)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step == 3 or step % 8 == 0:  # keeps the clock honest: without it the host runs ahead of the device
            float(losses[-1])
        if step == 3:
            settled, settled_step = time.monotonic(), step
        if step % args.log_every == 0:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is {mean} at step {step}; lower --lr")
            speed = (step - settled_step) * ids.numel() / max(time.monotonic() - settled, 1e-9)
            curve.append(
                {"step": step, "tokens": step * ids.numel(), "loss": round(mean, 4), "lr": round(rate, 7), "seconds": round(time.monotonic() - begun, 1)}
            )
            print(
                f"step {step}  loss {mean:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s  {100 * progress:.0f} %  compile {settled - begun:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - begun
    tokens = step * args.batch_size * sampler.length
    return {
        "attention": attention,
        "precision": "bf16 autocast" if on_gpu else "fp32",
        "steps": step,
        "tokens": tokens,
        "epochs": round(sampler.epochs, 2),
        "seconds": round(seconds, 1),
        "tokens_per_second": round((step - settled_step) * args.batch_size * sampler.length / max(seconds - (settled - begun), 1e-9)),
        "curve": curve,
    }


def save(model: LlamaForCausalLM, data: Path, out: Path) -> None:
    """Write the checkpoint in bf16 together with the tokenizer, readable by everybody."""
    out.mkdir(parents=True, exist_ok=True)
    # Only the parameters are cast: model.to(bfloat16) would round the rotary frequencies of the live model too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    config = model.config
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig.from_dict(ids)
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (data / name).exists():
            shutil.copyfile(data / name, out / name)
    for path in out.iterdir():
        os.chmod(path, 0o644)  # safetensors writes 0600, which another user of an installed package could not read


def evaluate(out: Path, data: Path, corpus: dict[str, Any], tokens: np.ndarray, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the saved checkpoint: held-out perplexity, bits per byte, a unigram model's perplexity, pass-key recall."""
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    nn.Module.to(model, device)
    nn.Module.eval(model)
    eos = model.config.eos_token_id
    assert isinstance(eos, int)
    rows, num_bytes = heldout_rows(tokenizer, data / "heldout.jsonl", corpus["row_length"], args.eval_tokens)
    nats, count = heldout_nats(model, rows, eos)
    filler = rows.flatten()
    filler = filler[filler != eos]
    passkey = {
        str(distance): passkey_recall(model, tokenizer, filler, corpus["passkey"], distance=distance, trials=args.passkey_trials, seed=args.seed)
        for distance in PASSKEY_DISTANCES
        if args.passkey_trials and len(filler) > distance + 400
    }
    return {
        "heldout_tokens": count,
        "ppl": round(math.exp(nats / count), 3),
        "bits_per_byte": round(nats / math.log(2) / num_bytes, 4),
        "unigram_ppl": round(unigram_perplexity(tokens, rows, corpus["vocab_size"], eos), 1),
        "passkey": passkey,
    }


def card(record: dict[str, Any], corpus: dict[str, Any], config: LlamaConfig) -> str:
    """The model card, Hub style. Every figure comes from `record` (training.json) or `corpus` (corpus.json)."""
    facts, steps, seconds = record["result"], record["steps"], record["seconds"]
    text_tokens, recall_tokens, share = corpus["tokens"] / 1e6, corpus["recall_tokens"] / 1e6, 100 * record["recall_share"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    sources = ""
    for name, s in corpus["sources"].items():
        shipped = f"{s['shipped_train_bytes'] / 1000:.0f} | {s['shipped_heldout_bytes'] / 1000:.0f}"
        sources += f"| {name} | {s['package']} | {s['licence']} | {s['documents']} | {s['tokens'] / 1e6:.2f} | {shipped} |\n"
    recall = "Pass-key recall was not measured in this run.\n"
    if facts["passkey"]:
        recall = (
            "Pass-key recall: the rank of the right five-digit key among ten by log-probability (chance: .10 and 5.5),\n"
            f"{record['passkey_trials']} prompts a row, filler from the held-out text.\n\n"
            "| tokens between key and question | rank 1 | mean rank | every digit greedy |\n|---|---|---|---|\n"
        )
        for distance, measured in facts["passkey"].items():
            recall += f"| {distance} | {measured['accuracy']:.2f} | {measured['mean_rank']:.2f} | {measured['greedy']:.2f} |\n"
    documents = {"flex": "inside each document", "dense": "inside each document", "causal": "causal over whole rows"}[record["attention"]]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- attnconvert
- test-model
model-index:
- name: attnconvert-demo
  results:
  - task: {{type: text-generation}}
    dataset: {{name: held-out excerpts shipped beside the model, type: text}}
    metrics:
    - {{type: perplexity, value: {facts["ppl"]}}}
---

# attnconvert-demo

The model inside the `attnconvert` package: {record["parameters"] / 1e6:.2f} M parameters of the Llama architecture
({config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}, tied embeddings,
{config.max_position_embeddings} positions), with a byte-level BPE tokenizer of {config.vocab_size} entries in which every digit is a token.
It exists so that an attention conversion can be tried and tested in minutes on a CPU. It is pretrained on real text, and on synthetic
documents that ask for what was said earlier, because looking things up is what a cheaper attention is at risk of losing. It knows little
and is no use as an assistant.

## Measured
Held-out perplexity **{facts["ppl"]}** per token, {facts["bits_per_byte"]} bits per byte
({facts["heldout_tokens"]} tokens of `heldout.jsonl.gz`; a unigram model has {facts["unigram_ppl"]}).

{recall}
## Training
```
{record["command"]}
```
{record["device"]}, {record["date"]}, {versions}.
{record["tokens"] / 1e6:.1f} M tokens in {steps} steps of {record["batch_size"]} x {corpus["row_length"]}, {seconds:.0f} s:
{record["epochs"]} passes over {text_tokens:.1f} M tokens of text, and {share:g} % synthetic rows ({recall_tokens:.1f} M tokens, pass keys hidden in
filler and key-value lists) that teach in-context retrieval. AdamW (peak {record["lr"]:g}, {record["warmup_steps"]} warm-up steps, then linearly to 0;
betas 0.9/0.95, weight decay {record["weight_decay"]:g} on matrices, clip 1.0), {record["precision"]}, attention {documents}.
The schedule follows the clock, so a repetition gives an equivalent model, not the same bits. Curve and settings: `training.json`.
No held-out document is in the training text.

## Data
`package` is the software package the text was taken from. "Shipped" are the excerpts (kB) in `train.jsonl.gz` and `heldout.jsonl.gz`.
The notices of the sources are in NOTICE.

| source | package | licence | documents | M tokens | shipped train | shipped held-out |
|---|---|---|---|---|---|---|
{sources}"""


def command_line(args: argparse.Namespace) -> str:
    """The command that was run, with DATA and OUT in place of this machine's folders."""
    names = {str(args.data): "DATA", str(args.out): "OUT"}
    program = Path(sys.argv[0])
    return shlex.join(["python", f"{program.parent.name}/{program.name}", *(names.get(word, word) for word in sys.argv[1:])])


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by build_demo_corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall clock from the start of the program to the end of training")
    parser.add_argument("--steps", type=int, default=None, help="end after this many steps even if time is left")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--recall-share", type=float, default=0.05, help="share of synthetic recall rows")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--attention", choices=["flex", "dense", "causal"], default=None, help="default: flex on a GPU, dense on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-tokens", type=int, default=1_000_000, help="at most this many held-out tokens")
    parser.add_argument("--passkey-trials", type=int, default=100, help="prompts per distance; 0 skips the test")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, save, measure, describe."""
    started = time.monotonic()
    args = parse_args()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    corpus = json.loads((args.data / "corpus.json").read_text(encoding="utf-8"))
    tokens, recall = np.load(args.data / "tokens.npy"), np.load(args.data / "recall.npy")
    tokenizer = AutoTokenizer.from_pretrained(args.data, trust_remote_code=False)
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None
    model = new_model(demo_config(corpus["vocab_size"], tokenizer.eos_token_id, tokenizer.pad_token_id), args.seed)
    nn.Module.to(model, device)
    parameters = sum(p.numel() for p in model.parameters())
    sampler = RowSampler(tokens, recall, batch_size=args.batch_size, recall_share=args.recall_share, seed=args.seed, device=device)

    trained = train(model, sampler, args, started)
    save(model, args.data, args.out)
    result = evaluate(args.out, args.data, corpus, tokens, args, device)
    settings = ("batch_size", "recall_share", "lr", "warmup_steps", "weight_decay", "seed", "minutes", "passkey_trials")
    record: dict[str, Any] = {
        "command": command_line(args),
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": parameters,
        **{name: getattr(args, name) for name in settings},
        **trained,
        "wall_seconds": round(time.monotonic() - started, 1),
        "result": result,
        "corpus": {"tokens": corpus["tokens"], "recall_tokens": corpus["recall_tokens"], "sha256": corpus["sha256"]},
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(card(record, corpus, model.config), encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}))


if __name__ == "__main__":
    main()
