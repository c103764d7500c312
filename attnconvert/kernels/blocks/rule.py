"""What block selection is made of, in plain integers: which blocks are always seen, how many there are, what a cache needs. No torch, plans use it too."""

from __future__ import annotations

from typing import Literal, NamedTuple

Scorer = Literal["compressed", "mean"]
COARSER = 4  # a coarse key of the scorer `compressed` stands for as many times the tokens of a fine one
BLOCK_SIZES = (32, 64, 128)
CAPACITY_MULTIPLE = 128  # tokens that a cache has room for are a multiple of it: whole blocks of every size, whole strides of all keys


class BlockRule(NamedTuple):
    """Which blocks of keys a query sees. Positions and blocks count from the first token of a document; block b has the keys S b .. S b + S - 1.

    Attributes:
        block_size: S, one of `BLOCK_SIZES`.
        num_init: first blocks that every query sees.
        num_local: blocks before the query's own that it always sees, besides its own.
        num_blocks: blocks that a query sees in all, forced ones included; what is left goes to the blocks with the best scores.
        dense_len: queries at positions below `dense_len - 1`, whose context is shorter than `dense_len`, see everything.
        scorer: `compressed` = InfLLM-V2's: means of 32 keys, 16 apart, the best of those that touch a block; `mean` = MoBA's: the mean of the block's keys.
    """

    block_size: int = 64
    num_init: int = 1
    num_local: int = 32
    num_blocks: int = 96
    dense_len: int = 8192
    scorer: Scorer = "compressed"

    @property
    def kernel(self) -> int:
        """Keys whose mean is one fine key."""
        return 32 if self.scorer == "compressed" else self.block_size

    @property
    def stride(self) -> int:
        """Tokens from one fine key to the next."""
        return 16 if self.scorer == "compressed" else self.block_size

    @property
    def coarser(self) -> int:
        """Kernel and stride of coarse keys, which the scores are normalised with, over those of fine ones; 1 = they are the fine keys."""
        return COARSER if self.scorer == "compressed" else 1

    @property
    def alignment(self) -> int:
        """The kernels take packed documents that begin at multiples of this: where blocks and coarse keys do."""
        return max(self.block_size, self.stride * self.coarser)

    @property
    def pool(self) -> int:
        """Fine keys from one block to the next."""
        return self.block_size // self.stride

    @property
    def lead(self) -> int:
        """Fine keys that begin before a block and are pooled with its own: 1, or 0 where fine keys do not overlap."""
        return int(self.kernel > self.stride)

    def sees_all(self, length: int) -> bool:
        """Whether every query of a document of `length` tokens sees everything before it."""
        return length < self.dense_len or -(-length // self.block_size) <= self.num_blocks


def num_windows(length: int, kernel: int, stride: int) -> int:
    """Means of `kernel` neighbouring keys, `stride` apart, that `length` keys have."""
    return max(0, (length - kernel) // stride + 1)


def visible_blocks(position: int, rule: BlockRule) -> int:
    """Blocks that the query at `position` sees, its own included."""
    there = position // rule.block_size + 1
    return there if position + 1 < rule.dense_len else min(there, rule.num_blocks)


def visible_pairs(length: int, rule: BlockRule) -> int:
    """Sum over the positions below `length` of the keys that their queries see."""
    sparse_from = min(length, max(rule.dense_len - 1, rule.num_blocks * rule.block_size, 0))
    dense = sparse_from * (sparse_from + 1) // 2
    tail = sum_of_own(length, rule.block_size) - sum_of_own(sparse_from, rule.block_size)
    return dense + (length - sparse_from) * (rule.num_blocks - 1) * rule.block_size + tail


def sum_of_own(length: int, block_size: int) -> int:
    """Sum over the positions below `length` of the keys that their own block has up to them."""
    whole, rest = divmod(length, block_size)
    return whole * (block_size * (block_size + 1) // 2) + rest * (rest + 1) // 2


def block_rule(block_size: int, init_blocks: int, window_size: int, topk: int, dense_len: int, scorer: Scorer) -> BlockRule:
    """The rule of a layer's settings, which have MiniCPM4's names: `window_size` in tokens, and `topk` blocks besides those of the window."""
    num_local = window_size // block_size
    return BlockRule(block_size, init_blocks, num_local, topk + num_local, dense_len, scorer)


def score_pairs(length: int, rule: BlockRule) -> int:
    """Products of queries at the positions below `length` with compressed keys, about: those of queries that choose, and each key half of the time."""
    sparse_from = min(length, max(rule.dense_len - 1, rule.num_blocks * rule.block_size, 0))
    positions = (length - sparse_from) * (length + sparse_from) // 2
    return positions // rule.stride + (positions // (rule.stride * rule.coarser) if rule.coarser > 1 else 0)


def capacity_for(num_tokens: int) -> int:
    """Tokens that a cache for `num_tokens` has room for."""
    return -(-num_tokens // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


def state_bytes(num_kv_heads: int, head_dim: int, element_size: int, num_tokens: int, rule: BlockRule) -> int:
    """Bytes of the cache of one row and one layer with room for `num_tokens`: keys, values, compressed keys, and the count of tokens."""
    capacity = capacity_for(num_tokens)
    coarse = 0 if rule.coarser == 1 else capacity // (rule.stride * rule.coarser)
    return num_kv_heads * head_dim * element_size * (2 * capacity + capacity // rule.stride + coarse) + 8
