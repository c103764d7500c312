"""What a converted layer with a cache of keys has to do whatever its method is: claims that several files make of models with layers of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from test_seam import ROWS, SMALL, TOLERANCE, batch, padded, step_logits, worst

from attnconvert.surgery.method import Method
from attnconvert.surgery.runtime.graph import DecodeGraph, graph_refusal
from attnconvert.surgery.runtime.seam import AttentionCore
from attnconvert.surgery.sites import find_sites

NULL_FAMILIES = [name for name in FAMILIES if name != "mistral"]  # every layer of it slides
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def full_layers(model: Any, method: Method) -> set[int]:
    """Indices of the layers that the method can convert."""
    return {site.layer_idx for site in find_sites(model.config) if not method.check(method.exact, site)}


def long_batch(tokens: int, pads: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of two rows, [2, T] each, the second left-padded."""
    ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return ids * mask, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own row, [B, T]; 0 in the padding."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def uncached(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of one forward pass without a cache, [B, T, vocabulary]."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


def cached_error(model: Any, ids: torch.Tensor, mask: torch.Tensor, prefill: list[int]) -> float:
    """Largest difference between one forward pass and the logits of a prefill in pieces and of single tokens from there to the end."""
    with torch.no_grad():
        got = step_logits(model, ids, mask, prefill=prefill, steps=ids.shape[1] - sum(prefill))
    return worst(got, uncached(model, ids, mask), mask)


def feed(model: Any, cache: Any, *pieces: torch.Tensor) -> Any:
    """Forward passes without gradients, one for each piece of tokens, [B, T], one after another; the cache after them."""
    with torch.no_grad():
        for piece in pieces:
            cache = model(input_ids=piece, past_key_values=cache, use_cache=True).past_key_values
    return cache


# ---------------------------------------------------------------- cached = uncached


def assert_equals_the_stock_model(student: Any, teacher: Any) -> None:
    """The student's logits, uncached, in every cached step and after split prompts, and the text of its beams are the teacher's."""
    ids, mask = batch()
    with torch.no_grad():
        assert worst(uncached(student, ids, mask), uncached(teacher, ids, mask), mask) < TOLERANCE
        cached = step_logits(teacher, ids, mask, prefill=[13])
        for prefill in ([13], [4, 4, 5]):
            assert worst(step_logits(student, ids, mask, prefill=prefill), cached, mask) < TOLERANCE
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    assert torch.equal(student.generate(ids, **options), teacher.generate(ids, **options))


def assert_rows_are_as_alone(model: Any, tokens: int, rows: list[list[int]] = ROWS) -> None:
    """Each row of a padded batch goes on for so many tokens as it does without the others."""
    ids, mask = padded(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[:, ids.shape[1] :]
    for row, want in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), max_new_tokens=tokens, do_sample=False)
        assert torch.equal(alone[0, len(row) :], want)


def assert_text_needs_no_cache(model: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: int, options: dict[str, int]) -> None:
    """With these options of `generate`, so many tokens are the same with a cache and without one (where a chunked prefill means nothing)."""
    run = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False, **options}
    plain = {name: value for name, value in run.items() if name != "prefill_chunk_size"}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **plain))


def first_turn(model: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The cache after a first turn of so many new tokens, and ids and mask of all there is when the user has added 5 more, [2, T] each."""
    first = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    more = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(8))
    whole = torch.cat([first.sequences, more], 1)
    return first.past_key_values, whole, torch.cat([mask, torch.ones(2, whole.shape[1] - mask.shape[1], dtype=torch.long)], 1)


def assert_goes_on(model: Any, cache: Any, whole: torch.Tensor, mask: torch.Tensor, tokens: int) -> None:
    """So many tokens after `whole` are the same from the cache of its beginning as without a cache."""
    want = model.generate(whole, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(whole, attention_mask=mask, max_new_tokens=tokens, do_sample=False, past_key_values=cache), want)


def assert_rows_can_be_repeated_and_chosen(model: Any, ids: torch.Tensor, mask: torch.Tensor, tolerance: float) -> None:
    """After rows of its cache were repeated and chosen, a step's logits are those of the chosen rows."""
    rows = [1, 0, 1]
    want = uncached(model, torch.cat([ids, ids[:, :1]], 1)[rows], torch.cat([mask, mask[:, -1:]], 1)[rows])[:, -1]
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1, 3]))
        position, seen = mask.sum(1, keepdim=True)[rows], torch.ones(3, ids.shape[1] + 1, dtype=torch.long)
        got = model(ids[rows, :1], attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
    assert (got - want).abs().max() < tolerance


# ---------------------------------------------------------------- the cache's size


def filled_caches(model: Any) -> Iterator[tuple[int, Any]]:
    """Caches after a prompt of 70 tokens in two rows, each with the length that it has room for: one without a plan, one planned for 230."""
    ids, mask = long_batch(tokens=70)
    for planned, length in ((None, 70), (230, 230)):
        cache = model.build_cache(planned)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        yield length, cache


def assert_steps_with_room_move_nothing(model: Any, cache: Any, ids: torch.Tensor, steps: int) -> None:
    """After the prompt `ids`, so many steps leave each layer's tensors where they are; one more step is taken, beyond the room."""
    feed(model, cache, ids)
    before = [(layer.state, [t.data_ptr() for t in layer.state.values()]) for layer in cache.layers]
    feed(model, cache, *[ids[:, :1]] * steps)
    assert all(layer.state is state and [t.data_ptr() for t in state.values()] == found for layer, (state, found) in zip(cache.layers, before, strict=True))
    feed(model, cache, ids[:, :1])


# ---------------------------------------------------------------- serving engines


def cores_of(model: Any) -> list[AttentionCore]:
    """The cores of a model, layer after layer."""
    return [module for module in model.modules() if isinstance(module, AttentionCore)]


def assert_a_new_state_is_as_after_a_prefill(model: Any) -> None:
    """`new_state` of each core has the names, shapes, strides and types of the tensors in a cache planned for as many tokens, all zero, and its layout."""
    ids, _ = long_batch(tokens=20)
    cache = feed(model, model.build_cache(230), ids)
    for core, layer in zip(cores_of(model), cache.layers, strict=True):
        state, layout = core.new_state(2, 230, torch.float32, ids.device)
        assert {name: (t.shape, t.stride(), t.dtype) for name, t in state.items()} == {name: (t.shape, t.stride(), t.dtype) for name, t in layer.state.items()}
        assert not any(t.any() for t in state.values())
        assert (layout is None) == (layer.layout is None)
        if layout is not None:
            assert layout[:-1] == layer.layout[:-1]
            assert torch.equal(layout.table, layer.layout.table)


def assert_steps_on_a_pool_are_those_of_the_batch(model: Any) -> None:
    """Steps from an empty state whose rows a batch picks give the logits of the batch's own cache; several tokens at once and beams are refused."""
    ids, slots = long_batch(tokens=24)[0], torch.tensor([4, 1])
    cache, pooled = feed(model, model.build_cache(40), ids[:, :1]), model.build_cache(40)
    for core, layer in zip(cores_of(model), pooled.layers, strict=True):
        layer.state, layer.layout = core.new_state(5, 40, torch.float32, ids.device)
        layer.slots = slots
    feed(model, pooled, ids[:, :1])
    with torch.no_grad():
        for n in range(1, ids.shape[1]):
            want, got = (model(ids[:, n : n + 1], past_key_values=some, use_cache=True).logits for some in (cache, pooled))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for own, layer in zip(cache.layers, pooled.layers, strict=True):
        assert all(torch.equal(layer.state[name][slots], t) for name, t in own.state.items() if not t.is_floating_point())
        assert not any(t[[0, 2, 3]].any() for t in layer.state.values())
    before = [{name: t.clone() for name, t in layer.state.items()} for layer in pooled.layers]
    for change in (
        lambda: feed(model, pooled, ids[:, :3]),
        lambda: pooled.reorder_cache(torch.tensor([1, 0])),
        lambda: pooled.batch_repeat_interleave(2),
        lambda: pooled.reset(),
    ):
        with pytest.raises(ValueError, match="serving engine that owns the pool"):
            change()
    assert all(torch.equal(t, old[name]) for layer, old in zip(pooled.layers, before, strict=True) for name, t in layer.state.items())


# ---------------------------------------------------------------- CUDA graphs


def watched_graph(model: Any, planned: int, monkeypatch: pytest.MonkeyPatch) -> tuple[DecodeGraph, Any, list[int]]:
    """A runner of steps, a cache planned for so many tokens, and the list of tokens held at steps that would be captured: none is, they run plainly.

    Asserts that a graph is refused without a planned length, and only then.
    """
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert "not told how many tokens" in graph_refusal(model, model.build_cache())
    cache, captured = model.build_cache(planned), []
    assert graph_refusal(model, cache) is None
    monkeypatch.setattr(DecodeGraph, "_capture", lambda self, inputs, values: captured.append(cache.get_seq_length()) or self.model(**inputs))
    return DecodeGraph(model), cache, captured


def assert_replays_write_the_same_text(student: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, 40 tokens after a prompt of so many are the same with a graph as without, and all steps but the first are replays of it."""
    runs: list[DecodeGraph] = []
    monkeypatch.setattr(type(student), "get_compiled_call", lambda self, config: runs.append(DecodeGraph(self)) or runs[-1])
    ids, mask = (x.cuda() for x in long_batch(tokens))
    want = student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, disable_compile=True)
    assert torch.equal(student.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False), want)
    assert [run.num_replays for run in runs] == [38]  # 39 steps after the prefill, the first of them plain


# ---------------------------------------------------------------- checkpoints and settings


def assert_checkpoint_needs_no_attnconvert(student: Any, folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Saved under `folder` and read in a process that cannot import attnconvert, the model writes the same 8 tokens; the plan in its config."""
    student.save_pretrained(folder / "model")
    want = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
    code = (
        "import sys, json; sys.path[:], folder, ids, mask = json.loads(sys.argv[1]); sys.modules['attnconvert'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "print(json.dumps(m.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=8, do_sample=False).tolist()))\n"
    )
    arguments = json.dumps([[p for p in sys.path if p], str(folder / "model"), ids.tolist(), mask.tolist()])
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run([sys.executable, "-I", "-c", code, arguments], capture_output=True, text=True, env=env, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == want
    plan: dict[str, Any] = json.loads((folder / "model" / "config.json").read_text())["attn_plan"]
    return plan


def assert_sliding_and_capped_layers_are_refused(method: Method) -> None:
    """The method says why it cannot have layers that already slide or that cap their logits, and has nothing against full ones."""
    gemma = find_sites(FAMILIES["gemma3_text"]())
    assert "already a sliding window of 8" in method.check(method.exact, gemma[0])[0]
    assert method.check(method.exact, gemma[1]) == []
    capped = find_sites(transformers.Gemma2Config(**SMALL, head_dim=8))
    assert any("capped logits" in problem for problem in method.check(method.exact, capped[1]))
