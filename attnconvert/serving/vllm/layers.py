"""The attention of converted layers as vLLM calls it: tokens of many requests in one row, requests told apart by metadata."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from attnconvert.serving.vllm.plan import layer_kinds
from attnconvert.serving.vllm.pool import Batch, PooledState, batch_of, build_core


class StateBackend(AttentionBackend):
    """Names the metadata that layers with a state want."""

    @staticmethod
    def get_name() -> str:
        return "ATTNCONVERT"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("layers with a state compute their attention themselves")

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Sorts a forward pass's requests for layers with a state, once for all of them."""

    reorder_batch_threshold = 1  # requests with one token come first

    def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Batch:
        known, n = common_attn_metadata, common_attn_metadata.num_reqs
        # Without drafts the bound is exact, and it is on the host.
        seen = known.seq_lens_cpu_upper_bound if known.seq_lens_cpu_upper_bound is not None else known.seq_lens.cpu()
        return batch_of(known.query_start_loc_cpu[: n + 1].tolist(), seen[:n].tolist(), known.block_table_tensor[:n, 0].long())


class StateAttention(nn.Module, MambaBase):
    """Attention of a core that keeps a state: stands where vLLM's `Attention` stood, under its name.

    Args:
        state: of the layer; its core is a child of the attention module, where the checkpoint has it.
        num_bytes: of a page, at least what the state needs.
        head_dim: of the layer.
        scale: on q.k.
        layer_name: how vLLM finds the layer.
    """

    def __init__(self, state: PooledState, num_bytes: int, head_dim: int, scale: float, layer_name: str):
        super().__init__()
        self.state, self.num_bytes, self.head_dim, self.scale, self.layer_name = state, num_bytes, head_dim, scale, layer_name

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.num_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR  # one of vLLM's, since it travels between processes; the backend is ours all the same

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        states: Any = self.kv_cache
        self.state.bind(states[0])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the tokens of a forward pass. query [N, H D], key and value [N, G D] -> [N, H D], 0 for tokens that belong to no request."""
        q, k, v = query.unflatten(-1, (-1, self.head_dim)), *(x.unflatten(-1, (-1, self.head_dim)) for x in (key, value))
        out = torch.zeros_like(query)
        known = get_forward_context().attn_metadata
        if known is not None:  # None: vLLM measures how much memory a pass takes
            assert isinstance(known, dict), "passes are not split in two"
            self.state.attend(q, k, v, known[self.layer_name], self.scale, out.unflatten(-1, (-1, self.head_dim)))
        return out


class RoutedAttention(nn.Module):
    """Attention of MoH: vLLM's own for all heads, whose outputs are weighed as the router says. It computes what a token does not use, too.

    Args:
        attention: vLLM's.
        core: what routes; a child of the attention module, where the checkpoint has it.
    """

    def __init__(self, attention: nn.Module, core: Any, head_dim: int):
        super().__init__()
        self.attention, self.head_dim = attention, head_dim
        self._unit_factors = core.unit_factors

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the tokens of a forward pass, of the heads that each uses. query [N, H D], key and value [N, G D] -> [N, H D]."""
        factors: Tensor = self._unit_factors(query.unflatten(-1, (-1, self.head_dim)))
        out: Tensor = self.attention(query, key, value)
        weighed: Tensor = (out.unflatten(-1, (factors.shape[-1], -1)) * factors[..., None]).flatten(-2)
        return weighed


def page_bytes(vllm_config: Any) -> int:
    """Bytes of a request's page of a layer, which vLLM wants to be the same for all: what the largest state needs. 0 where no layer has a state."""
    plan = vllm_config.model_config.hf_config.attn_plan
    kinds = layer_kinds(plan)
    with torch.device("cpu"):
        return max((_pooled(build_core(row), vllm_config).layout.num_bytes for row in plan["layers"] if kinds[row["path"]] == "state"), default=0)


def _pooled(core: Any, vllm_config: Any) -> PooledState:
    return PooledState(core, vllm_config.model_config.max_model_len, vllm_config.model_config.dtype)


def convert_layers(model: Any, vllm_config: Any) -> None:
    """Give converted layers their cores, named as in the checkpoint, and an attention that uses them."""
    plan = vllm_config.model_config.hf_config.attn_plan
    kinds, num_bytes = layer_kinds(plan), page_bytes(vllm_config)
    for row in plan["layers"]:
        kind = kinds[row["path"]]
        if kind not in ("state", "routed"):
            continue
        module, core = model.get_submodule(row["path"]), build_core(row)
        module.core = core
        if kind == "routed":
            module.config = vllm_config.model_config.hf_config  # a learned router asks it for the width of the layer's input
            core.fit(module)
            module.attn = RoutedAttention(module.attn, core, row["head_dim"])
            continue
        layers = vllm_config.compilation_config.static_forward_context
        name = module.attn.layer_name
        del layers[name]
        module.attn = layers[name] = StateAttention(_pooled(core, vllm_config), num_bytes, row["head_dim"], module.scaling, name)
