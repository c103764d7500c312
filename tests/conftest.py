"""Tiny random models of ten families, built from configs: no download, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from attnconvert import embedded
from attnconvert.convert import save

pytest.register_assert_rewrite("cached_layers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
    "smollm3": lambda: transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1]),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=256, pad_token_id=0, bos_token_id=1, eos_token_id=None),
}


def make_model(family, seed=1):
    """A random model whose attention is sharp enough that mistakes show in the logits."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 3.0)
    return model


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def teacher(family):
    return make_model(family)


@pytest.fixture
def tiny_llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 2 layers, 4 heads, 2 KV heads and 512 positions with the embedded tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.model_dir())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 512, "bos_token_id": 0})
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the reload in a fresh process, seconds each; test_save.py and one whole run per command have it."""
    monkeypatch.setattr(save, "check_reload", lambda model, folder: None)
