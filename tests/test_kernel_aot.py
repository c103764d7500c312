"""Ahead-of-time compilation of the kernels that ship, without a GPU, and that the tool which does it sees what it is for."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As in a shell where somebody debugged a kernel: the tool compiles all the same.
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1"}


def compile_kernels(*arguments, path=""):
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.run([sys.executable, "tools/compile_kernels.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def product(X, Y, T, BLOCK: tl.constexpr, FACTORS: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    at = rows[:, None] * BLOCK + columns[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(T):
        x = tl.load(X + i.to(tl.int64) * BLOCK * BLOCK + at)
        total = tl.dot(x, x, total)
        for _ in tl.static_range(FACTORS - 1):
            total = tl.dot(total.to(x.dtype), x, total)
    tl.store(Y + at, total)

@triton.jit
def wrong(X, T, BLOCK: tl.constexpr):
    tl.store(X + tl.arange(0, BLOCK), tl.zeros([BLOCK + 1], tl.float32))

def aot_configs(arch):
    signature = {"X": "*bf16", "Y": "*fp32", "T": "i32"}

    def entry(name, block, warps, stages, *rest):
        return (name, product, signature, {"BLOCK": block, "FACTORS": 2}, {"num_warps": warps, "num_stages": stages}, *rest)

    return [
        entry("good", 64, 4, 2),
        entry("spills", 128, 2, 2),
        entry("spills as accepted", 128, 2, 2, 100_000),
        entry("large", 128, 8, 9),
        entry("block of its architecture", 64 if arch < 90 else 128, 8, 1),
        ("wrong", wrong, {"X": "*fp32", "T": "i32:16"}, {"BLOCK": 64}, {"num_warps": 4, "num_stages": 1}),
    ]
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "sample_kernels.py").write_text(KERNELS)
    return lambda *arguments: compile_kernels("--module", "sample_kernels", *arguments, path=str(folder))


def test_kernel_without_spills_passes_on_both_architectures_and_uses_tensor_cores(report):
    done = report("--filter", "^good$")
    assert done.returncode == 0, done.stdout + done.stderr
    header = done.stdout.splitlines()[1].split()
    ampere, hopper = (dict(zip(header, lines_with(done.stdout, "good", arch)[0].split(), strict=False)) for arch in ("sm_80", "sm_90"))
    assert int(ampere["HMMA"]) > 0
    assert int(hopper["HGMMA"]) > 0


def test_spills_too_much_shared_memory_and_code_that_does_not_compile_fail(report):
    done = report("--arch", "sm_90")
    assert done.returncode == 1, done.stdout + done.stderr
    assert lines_with(done.stdout, "FAILED spills sm_90", "B of stack, 0 accepted")
    assert lines_with(done.stdout, "FAILED spills sm_90", "local-memory instructions")
    assert lines_with(done.stdout, "FAILED large sm_90", "a block may have 232448")
    assert lines_with(done.stdout, "FAILED wrong sm_90: does not compile")
    assert not lines_with(done.stdout, "FAILED good")
    assert not lines_with(done.stdout, "FAILED spills as accepted")


def test_every_architecture_compiles_its_own_blocks(report):
    rows = lines_with(report("--filter", "^block of its architecture$").stdout, "block of its architecture", " sm_")
    memory = {row.split()[-10]: float(row.split()[-5]) for row in rows if "FAILED" not in row}
    assert set(memory) == {"sm_80", "sm_90"}
    assert memory["sm_90"] > memory["sm_80"] > 0


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_blocks_of_forward_and_backward_fit_each_other(arch, narrow, between):
    kernels = pytest.importorskip("attnconvert.kernels.linear.triton")
    for head_dim, features in itertools.product((32, 64, 80, 96, 128, 256), (16, 32, 64, 128)):
        blocks = kernels._blocks(head_dim, features, narrow, arch, between)
        assert blocks["GBM"] == blocks["GBN"]  # the two gradient kernels split the pairs between window, sinks and states alike
        assert not [name for name in ("BM", "BN", "GBM", "GBN") if blocks["CS"] % blocks[name]], (head_dim, features)
        for name in ("state", "reverse", "output", "query", "key", "map"):
            assert blocks[name].get("maxnreg", 0) * 32 * blocks[name]["num_warps"] <= 65536, name  # a multiprocessor's registers


def test_selecting_nothing_fails(report):
    assert report("--filter", "nothing of that name").returncode == 1


# Of every kind of kernel one that the default recipe runs.
REPRESENTATIVE = r"^(prefix|delta|sink_grad)_kernel-.*r4$|_kernel-d64-f64-r3$|^decode-d32-|^span-.*_kernel-d64-r3$|^blocks-.*-d64-r3-|^blocks-(scores|choose512)-d64-|^block_decode_attend-d64-h9-|^heads-.*-d64-r3-"


def test_representative_kernels_compile_for_both_architectures_within_limits():
    done = compile_kernels("--filter", REPRESENTATIVE)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("state", "prefix", "output", "delta", "reverse_state", "query_grad", "key_grad", "map_grad", "sink_grad"):
        assert len([line for line in done.stdout.splitlines() if line.startswith(f"{kernel}_kernel-")]) == 2, kernel
    assert len(lines_with(done.stdout, "decode-", " sm_")) == 2
    assert len(lines_with(done.stdout, "span-", " sm_")) == 8
    assert len(lines_with(done.stdout, "blocks-", " sm_")) == 12
    assert len(lines_with(done.stdout, "block_decode_attend-", " sm_")) == 2
    assert len(lines_with(done.stdout, "heads-", " sm_")) == 8


@pytest.mark.slow  # minutes: every configuration that ships, on two architectures
@pytest.mark.timeout(1200)
def test_every_kernel_that_ships_compiles_for_both_architectures_within_limits():
    done = compile_kernels()
    assert done.returncode == 0, done.stdout + done.stderr
