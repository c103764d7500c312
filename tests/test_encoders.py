"""Attention that is not causal, at the seam: encoders' layers with routed heads or none are the stock model's, and other cores refuse them."""

import pytest
import torch
from test_kernel_triton import interpreter  # noqa: F401
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from attnconvert.kernels.heads.reference import routed_attention
from attnconvert.surgery.methods import hedgehog
from attnconvert.surgery.methods.moh import METHOD, MohConfig
from attnconvert.surgery.runtime.heads import MixtureOfHeads
from attnconvert.surgery.runtime.modeling import attach_cores, use_seam
from attnconvert.surgery.runtime.seam import SeamInputs, attnconvert_attention, document_starts

HEADS, DIM, LAYERS = 4, 8, 2
SIZES = {"hidden_size": HEADS * DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48}
MASKS = {  # real tokens of rows of 12
    "none": None,
    "padding behind": [[1] * 12, [1] * 7 + [0] * 5],
    "padding before": [[1] * 12, [0] * 5 + [1] * 7],
    "both": [[0] * 2 + [1] * 10, [0] * 3 + [1] * 6 + [0] * 3],
}


def bert():
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES))
    return model.double().eval(), [f"encoder.layer.{idx}.attention.self" for idx in range(LAYERS)]


def vit():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=12, patch_size=4, num_channels=1, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **SIZES)).double().eval()
    return model, [name for name, module in model.named_modules() if type(module).__name__ == "ViTAttention"]


def through_the_seam(model, paths, config=None):
    """The model with routed heads in its first layer, or with none, its last layer as it was."""
    if config is not None:
        row = {"path": paths[0], "method": "moh", "config": METHOD.runtime_config(config), "num_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": DIM}
        attach_cores(model, {"layers": [row]})
    use_seam(model)
    return model.double()


def words(mask):
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({} if mask is None else {"attention_mask": torch.tensor(mask)})


def seen_part(out, mask):
    return out if mask is None else out[torch.tensor(mask).bool()]


EVERYTHING = MohConfig(active=1.0, router="norm", shared=0)
HALF = MohConfig(active=0.5, router="output_norm")


@pytest.mark.parametrize("config", [None, EVERYTHING], ids=["no core", "all heads"])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_an_encoder_of_text_computes_what_it_did(mask, config):
    wanted = bert()[0](**words(MASKS[mask])).last_hidden_state
    got = through_the_seam(*bert(), config)(**words(MASKS[mask])).last_hidden_state
    torch.testing.assert_close(seen_part(got, MASKS[mask]), seen_part(wanted, MASKS[mask]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_in_teacher_mode_a_layer_is_the_stock_one_whatever_heads_it_uses(mask):
    model = through_the_seam(*bert(), HALF)
    next(module for module in model.modules() if isinstance(module, MixtureOfHeads)).teacher = True
    wanted = bert()[0](**words(MASKS[mask])).last_hidden_state
    torch.testing.assert_close(seen_part(model(**words(MASKS[mask])).last_hidden_state, MASKS[mask]), seen_part(wanted, MASKS[mask]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [None, EVERYTHING], ids=["no core", "all heads"])
@torch.no_grad()
def test_a_vision_transformer_computes_what_it_did(config):
    pixels = torch.randn(2, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, paths = vit()
    assert len(paths) == LAYERS
    wanted = model(pixels).last_hidden_state
    got = through_the_seam(*vit(), config)(pixels).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_row_with_half_of_the_heads_does_not_know_its_batch_or_its_padding():
    model = through_the_seam(*bert(), HALF)
    core = next(module for module in model.modules() if isinstance(module, MixtureOfHeads))
    core.routed_map.data = torch.randn(core.routed_map.shape, generator=torch.Generator().manual_seed(2), dtype=core.routed_map.dtype)
    core.usage = torch.zeros(HEADS + 1, dtype=torch.int64)
    mask = MASKS["padding behind"]
    batch = model(**words(mask)).last_hidden_state
    used, tokens = core.usage[:-1].sum(), core.usage[-1]
    assert tokens == 19  # padding is not counted
    assert used == tokens * HEADS / 2
    alone = model(input_ids=words(mask)["input_ids"][1:, :7]).last_hidden_state
    torch.testing.assert_close(batch[1, :7], alone[0], rtol=1e-6, atol=1e-6)
    dense = bert()[0](**words(mask)).last_hidden_state
    assert (batch[1, :7] - dense[1, :7]).abs().max() > 1e-2


def test_routers_of_an_encoder_learn():
    model = through_the_seam(*bert(), HALF)
    model(**words(MASKS["both"])).last_hidden_state.square().sum().backward()
    core = next(module for module in model.modules() if isinstance(module, MixtureOfHeads))
    assert core.routed_map.grad.abs().max() > 0


def test_padding_of_an_encoder_is_in_no_document():
    start = document_starts(torch.tensor(MASKS["both"]), None, 2, 12, has_past=False, causal=False)
    assert start.tolist() == [[12] * 2 + [2] * 10, [12] * 3 + [3] * 6 + [12] * 3]
    inputs = SeamInputs(start, 1.0, batch_size=2, num_tokens=12, causal=False)
    assert inputs.valid().int().tolist() == MASKS["both"]


@torch.no_grad()
def test_a_core_that_is_causal_refuses_an_encoder():
    model, paths = bert()
    method = hedgehog.METHOD
    row = {
        "path": paths[0],
        "method": "hedgehog",
        "config": method.runtime_config(hedgehog.HedgehogConfig()),
        "num_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
    }
    attach_cores(model, {"layers": [row]})
    use_seam(model)
    with pytest.raises(ValueError, match="is not causal"):
        model(**words(None))


def test_a_window_on_both_sides_is_refused():
    q = torch.randn(1, HEADS, 12, DIM)
    with pytest.raises(ValueError, match="sliding window of 4"):
        attnconvert_attention(bert()[0].encoder.layer[0].attention.self, q, q, q, None, sliding_window=4)


def outputs_with_padding():
    """Ours and the definition's outputs of real tokens, with padding on both sides. Runs where Triton interprets."""
    from attnconvert.kernels.heads.api import routed_attention as ours

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 16, generator=g) for heads in (4, 2, 2))
    active = torch.rand(2, 40, 2, generator=g) > 0.4
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, 29:], mask[1, :5], mask[1, 37:] = 0, 0, 0
    start = document_starts(mask, None, 2, 40, has_past=False, causal=False)
    got = ours(q, k, v, active, scale=0.25, start=start, causal=False, impl="triton")
    want = routed_attention(q.double(), k.double(), v.double(), active, scale=0.25, start=start, causal=False)
    alone = routed_attention(q[:1, :29].double(), k[:1, :29].double(), v[:1, :29].double(), active[:1, :29], scale=0.25, causal=False)
    real = mask.bool()
    return (got[real] - want[real]).abs().max().item(), (want[0, :29] - alone[0]).abs().max().item(), got.isfinite().all().item()


def test_the_kernels_take_padding_on_both_sides(interpreter):  # noqa: F811
    error, from_alone, finite = interpreter.submit(outputs_with_padding).result()
    assert error < 1e-5
    assert from_alone < 1e-12
    assert finite
