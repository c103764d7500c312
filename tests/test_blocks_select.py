"""The kernels that choose blocks, in Triton's interpreter, on the CPU, against the definition in PyTorch.

Triton decides when it is imported whether it interprets, so the kernels run in a process of their own, as in test_kernel_triton.py.
"""

import itertools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from test_kernel_triton import interpreter, poison, version  # noqa: F401

from attnconvert.kernels.blocks import reference
from attnconvert.kernels.blocks.rule import BlockRule, num_windows

triton = pytest.importorskip("triton")

from attnconvert.kernels.blocks import triton_select as select  # noqa: E402
from attnconvert.kernels.launch import Layout, Plan, signature  # noqa: E402

interpreted = pytest.mark.skipif(version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="Triton's interpreter of that age fails with this numpy")
# Two scores whose order may differ: one part in so many. Scores are sums of exponentials of logits of a few dozen products.
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-2}


class Case(NamedTuple):
    """A call, and how it is cut.

    Attributes:
        begins: of each row's documents.
        stops: where a row's last document ends, padding comes after; None: at T.
        scores: bytes that a chunk's scores may take.
        span: tokens of a program of `scores_kernel`.
        rows: tokens that `choose_kernel` handles at once; None: those of a tile.
    """

    rule: BlockRule
    T: int = 300
    G: int = 1
    R: int = 1
    D: int = 16
    dtype: torch.dtype = torch.float32
    begins: tuple = ((0,),)
    stops: tuple | None = None
    scores: int = select.SCORE_BYTES
    span: int = 128
    rows: int | None = None

    def __str__(self):
        return f"G{self.G}-R{self.R}-" + "-".join(str(value).removeprefix("torch.") for value in (*self.rule, self.T, self.dtype))

    @property
    def ends(self):
        return self.stops or (self.T,) * len(self.begins)

    @property
    def start(self):
        if self.begins == ((0,),) and self.stops is None:
            return None
        rows = []
        for begins, end in zip(self.begins, self.ends, strict=True):
            lengths = [b - a for a, b in itertools.pairwise((*begins, end))]
            rows.append([begin for begin, length in zip(begins, lengths, strict=True) for _ in range(length)] + [self.T] * (self.T - end))
        return torch.tensor(rows)


def draw(case, kind, seed=0):
    """Queries and keys. `ties`: small integers, the same for the heads of a KV head, and blocks of keys are copies of three, so that scores are equal to the bit or far apart."""
    g = torch.Generator().manual_seed(seed)
    B, S = len(case.begins), case.rule.block_size
    if kind == "random":
        return [torch.randn(B, case.T, heads, case.D, generator=g).to(case.dtype) for heads in (case.G * case.R, case.G)]
    q = torch.randint(-1, 2, (B, case.T, case.G, case.D), generator=g).repeat_interleave(case.R, 2)
    # The keys of a block are equal: their mean is exact.
    blocks = torch.randint(-1, 2, (B, 3, case.G, case.D), generator=g) * 4
    pattern = torch.randint(0, 3, (B, -(-case.T // S)), generator=g)
    k = blocks.gather(1, pattern[:, :, None, None].expand(-1, -1, case.G, case.D)).repeat_interleave(S, 1)[:, : case.T]
    return [x.to(case.dtype) for x in (q, k)]


def documents(case):
    """(row, begin, end) of all documents."""
    return [(b, *edge) for b, (begins, end) in enumerate(zip(case.begins, case.ends, strict=True)) for edge in itertools.pairwise((*begins, end))]


def expected(case, q, k, scale):
    """(what `triton_select_blocks` should return, scores there, which tokens are in documents)."""
    B, S, N = q.shape[0], case.rule.block_size, -(-case.T // case.rule.block_size)
    seen = torch.zeros(B, case.G, case.T, N, dtype=torch.bool)
    scores, real = torch.full(seen.shape, -1.0), torch.zeros(B, case.T, dtype=torch.bool)
    seen[:] = torch.arange(case.T)[:, None] // S == torch.arange(N)  # padding
    for b, begin, end in documents(case):
        queries, keys = q[b : b + 1, begin:end], k[b : b + 1, begin:end]
        fine, coarse = reference.compressed_keys(keys, case.rule)
        position, there = torch.arange(end - begin)[None], -(-(end - begin) // S)
        own = slice(begin // S, begin // S + there)
        seen[b, :, begin:end] = False
        seen[b, :, begin:end, own] = reference.select_blocks(queries, fine, coarse, position, there, case.rule, scale)[0]
        scores[b, :, begin:end, own] = reference.block_scores(queries, fine, coarse, position, there, case.rule, scale)[0]
        real[b, begin:end] = True
    return seen, scores, real


def small(case):
    """Several chunks and programs even in a short sequence."""
    return mock.patch.multiple(select, SCORE_BYTES=case.scores, SPAN=case.span, _rows=lambda tokens, device: case.rows or tokens)


def choose(case, q, k, scale):
    with small(case), poison():
        select._plan.cache_clear()
        return select.triton_select_blocks(q, k, rule=case.rule, scale=scale, start=case.start)


def compare(case, kind):
    q, k = draw(case, kind)
    scale = case.D**-0.5
    got = choose(case, q, k, scale)
    want, scores, real = expected(case, q, k, scale)
    assert got.shape == want.shape
    ranked = want.sum(-1)[real[:, None].expand(-1, case.G, -1)] == case.rule.num_blocks
    assert ranked.any()  # the case is about a choice
    assert torch.equal(got.sum(-1), want.sum(-1))
    if kind == "random":  # where the two differ, the scores do not
        least = scores.masked_fill(~(want & ~got), float("inf")).amin(-1)
        most = scores.masked_fill(~(got & ~want), float("-inf")).amax(-1)
        different = (got != want).any(-1)
        assert (most >= least * (1 - ROUNDING[case.dtype]))[different].all()
        assert different.float().mean() < 0.02
    else:
        assert torch.equal(got, want)


SMALL = BlockRule(32, num_init=1, num_local=1, num_blocks=5, dense_len=100)
NO_LOCAL = BlockRule(32, num_init=0, num_local=0, num_blocks=2, dense_len=0)
MIDDLE = BlockRule(64, num_init=2, num_local=2, num_blocks=6, dense_len=333)
LARGE = BlockRule(128, num_init=0, num_local=1, num_blocks=3, dense_len=1)
MEAN = BlockRule(32, num_init=1, num_local=0, num_blocks=4, dense_len=0, scorer="mean")
CASES = [
    Case(SMALL, 233, G=2, R=2),
    Case(SMALL, 301, R=3, dtype=torch.float16),
    Case(NO_LOCAL, 190, G=2, scores=1),
    Case(NO_LOCAL._replace(num_blocks=1), 99, rows=1),
    Case(NO_LOCAL, 230, R=2, begins=((0, 128), (0, 64)), stops=(230, 161)),
    Case(MIDDLE, 700, R=4, dtype=torch.float16, scores=40_000),
    Case(MIDDLE, 650, begins=((0, 192), (0,))),
    Case(MIDDLE, 513, R=7),
    Case(LARGE, 600, R=8, D=20),
    Case(LARGE, 805, begins=((0, 128), (0, 256)), stops=(805, 760), scores=20_000),
    Case(MEAN, 233, G=2, R=2, begins=((0,), (0, 32)), stops=(200, 233)),
    Case(MEAN._replace(block_size=128, num_blocks=2), 530, R=16, dtype=torch.float16),
    Case(MEAN._replace(block_size=64, num_init=0), 420, R=3),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_query_sees_the_blocks_of_the_definition(interpreter, case, kind):  # noqa: F811
    interpreter.submit(compare, case, kind).result()


def check_lists(case):
    """Lists are what the words of training say, in each chunk; the forced blocks are there, future ones and other documents' are not."""
    q, k = draw(case, "random")
    B, T, H, D = q.shape
    rule, S, tokens = case.rule, case.rule.block_size, select.tile_tokens(case.R, case.D, case.rule.block_size)
    N, start = -(-T // S), case.start.to(torch.int32)
    signatures = signature(q, k, start)
    with small(case):
        layout = Layout()
        select.add_scratch(layout, B=B, T=T, H=H, G=case.G, D=D, rule=rule, dtype=q.dtype)
        parts = select.chunks(B, T, case.G, rule)
        assert len(parts) > 2
        memory = layout.allocate(q.device).fill_(0xFF)
        words = torch.full((B, case.G, -(-T // tokens), N), -1, dtype=select.word_dtype(tokens))
        names = ("q", "k", "start", "words", "scratch")
        Plan(-1, names, select.prepare_launches(*signatures, rule, 0.3), {"scratch": layout})(q, k, start, words, memory)
        room = select.cap(case.R, D, T, rule)
        for first, stop in parts:
            Plan(-1, names, select.chunk_launches(*signatures, rule, 0.3, first, stop, True), {"scratch": layout})(q, k, start, words, memory)
            tiles = -(-(stop - first) // tokens)
            count = layout.view(memory, "count")[: B * case.G * tiles].view(B, case.G, tiles)
            block, word = (layout.view(memory, name)[: B * case.G * tiles * room].view(B, case.G, tiles, room) for name in ("block", "word"))
            here = words[:, :, first // tokens :][:, :, :tiles]
            assert torch.equal(count.long(), (here != 0).sum(-1))
            assert count.max() <= room
            for at in itertools.product(range(B), range(case.G), range(tiles)):
                listed = block[at][: count[at]].long()
                assert torch.equal(listed, here[at].nonzero().flatten())
                assert torch.equal(word[at][: count[at]], here[at][listed])
    n, block = torch.arange(T), torch.arange(N)
    seen = ((words[:, :, :, None] >> torch.arange(tokens).to(words.dtype)[:, None]) & 1).bool().flatten(2, 3)[:, :, :T]
    real = (case.start <= n)[:, None, :, None]
    own, first = (n // S)[:, None], (case.start // S)[:, None, :, None]
    past = (block >= first) & (block <= own)
    forced = past & ((block < first + rule.num_init) | (block >= own - rule.num_local))
    assert (seen | ~forced)[real.expand_as(seen)].all()
    assert not (seen & ~past)[real.expand_as(seen)].any()


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(SMALL, 290, R=5, begins=((0, 128), (0,)), stops=(290, 250), scores=1),
        Case(MIDDLE._replace(num_init=1, num_local=0, num_blocks=3, dense_len=0), 330, G=2, begins=((0,),), stops=(320,), scores=1),  # words of 64 bits
    ],
    ids=str,
)
def test_lists_of_all_chunks_agree_with_the_words_kept_for_training(interpreter, case):  # noqa: F811
    interpreter.submit(check_lists, case).result()


@pytest.mark.parametrize("rule", [SMALL, MIDDLE, LARGE, MEAN, BlockRule()], ids=str)
def test_chunks_follow_each_other_and_their_scores_stay_below_the_bound(rule):
    for B, T, G, limit in ((1, 1, 1, 2**20), (1, 128, 2, 1), (2, 5000, 2, 2**18), (1, 131072, 8, 2**28), (1, 2**20, 2, 2**28)):
        with mock.patch.object(select, "SCORE_BYTES", limit):
            parts = select.chunks(B, T, G, rule)
            layout = Layout()
            select.add_scratch(layout, B=B, T=T, H=4 * G, G=G, D=64, rule=rule, dtype=torch.bfloat16)
        assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])]
        assert parts[-1][1] == T
        assert not any(first % select.CHUNK_MULTIPLE for first, _ in parts)
        smallest = 4 * B * G * select.CHUNK_MULTIPLE * (-(-T // rule.block_size) + 15)
        assert 4 * layout.tensors["scores"][1][0] <= max(limit, smallest)
        assert layout.tensors["fine"][1] == (B, G, num_windows(T, rule.kernel, rule.stride), 64)


@pytest.mark.parametrize("S", [32, 64, 128])
@pytest.mark.parametrize("R", range(1, 17))
def test_a_tile_lies_in_one_block_and_fills_a_matrix_product(R, S):
    for D in (16, 64, 128, 256):
        tokens = select.tile_tokens(R, D, S)
        assert tokens & (tokens - 1) == 0
        assert S % tokens == 0
        assert select.CHUNK_MULTIPLE % tokens == 0
        assert 32 <= tokens * triton.next_power_of_2(R) <= 128
