"""Plans hand binaries what Triton would, and leave to Triton what is not as it was: seen by a driver that compiles for a GPU and launches nothing."""

import concurrent.futures
import functools
import multiprocessing
import os
import threading
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from attnconvert.kernels.launch import ALIGNMENT, Launch, Layout, Plan  # noqa: E402


class Recorder:
    """Stands in for Triton's GPU driver, and for its launchers; `seen`: (kernel, binary, grid, stream, arguments) of each launch."""

    seen: list = []  # noqa: RUF012
    stream = 7

    def __init__(self, source=None, metadata=None):
        self.source = source
        self.utils, self.launcher_cls = self, Recorder

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        for hook in (enter, leave):
            if hook is not None:
                hook(launch_metadata)
        Recorder.seen.append((self.source.fn.__name__, self.source.hash(), (x, y, z), stream, arguments))

    def load_binary(self, *_):
        return "module", "function", 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return Recorder.stream


def set_up():
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Recorder())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A process in which Triton compiles for an H100."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "TRITON_DEFAULT_FP_FUSION": "1"}
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("TRITON_INTERPRET", None)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_up) as pool:
            yield pool


def run_check(name):
    Recorder.seen.clear()
    globals()[name].check()


def compiled(check):
    """A test that runs `check` in the compiler's process."""

    @functools.wraps(check)
    def test(compiler):
        compiler.submit(run_check, check.__name__).result()

    del test.__wrapped__  # pytest looks there for the fixtures
    test.check = check
    return test


@triton.jit
def copy(X, Y, ABSENT, n, scale, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n, other=0.0) * scale, mask=at < n)


def copying(n=64):
    """(plan, its tensors): a copy into memory, and from there to y."""
    layout = Layout()
    layout.add("unused", (3,), torch.bfloat16)
    layout.add("middle", (n,), torch.float32)
    launches = [Launch(copy, (2,), (x, y, None, n, 0.5), {"BLOCK": 64}, {"num_warps": 1}) for x, y in (("x", "middle"), ("middle", "y"))]
    return Plan(-1, ("x", "y", "memory", "nobody"), launches, {"memory": layout}), (torch.zeros(n), torch.zeros(n), layout.allocate(torch.device("cpu")), None)


def handed(launch):
    """Arguments of a launch as the binary sees them."""
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in launch[-1]]


def by_triton(launch):
    return any(isinstance(x, torch.Tensor) for x in launch[-1])


@compiled
def test_a_repeated_plan_hands_the_binary_what_triton_handed_it_without_triton():
    plan, tensors = copying()
    plan(*tensors)
    plan(*tensors)
    first, second = Recorder.seen[:2], Recorder.seen[2:]
    assert all(by_triton(launch) for launch in first)
    assert not any(by_triton(launch) for launch in second)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert a[:4] == b[:4]
        assert handed(a) == handed(b)
    assert handed(second[0])[1] == tensors[2].data_ptr() + ALIGNMENT


@compiled
def test_other_tensors_of_the_same_kind_and_another_stream_are_those_of_the_call():
    plan, tensors = copying()
    plan(*tensors)
    others = [None if x is None else x.clone() for x in tensors]
    with mock.patch.object(Recorder, "stream", 11):
        plan(*others)
    first, last = Recorder.seen[2], Recorder.seen[3]
    assert [first[3], last[3]] == [11, 11]
    assert handed(first)[0] == others[0].data_ptr()
    assert handed(last)[1] == others[1].data_ptr()


@compiled
def test_a_pointer_that_is_not_aligned_gets_the_binary_for_such_pointers():
    plan, (_, y, memory, _) = copying()
    for x in (torch.zeros(64), torch.zeros(64), torch.zeros(65)[1:]):
        plan(x, y, memory, None)
    aligned, shifted = Recorder.seen[2], Recorder.seen[4]
    assert not by_triton(aligned)
    assert by_triton(shifted)
    assert aligned[1] != shifted[1]


@compiled
def test_hooks_see_every_launch():
    plan, tensors = copying()
    plan(*tensors)
    plan(*tensors)
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    plan(*tensors)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    plan(*tensors)
    assert names == ["copy", "copy"]
    assert [by_triton(launch) for launch in Recorder.seen] == [True, True, False, False, True, True, False, False]


@compiled
def test_kernels_of_a_plan_are_compiled_in_threads_and_only_once():
    compile_one, where = copy.compile, []

    def compile_and_tell(*args, **kwargs):
        where.append(threading.current_thread().name)
        return compile_one(*args, **kwargs)

    launches = [Launch(copy, (1,), ("x", "y", None, 3, 0.125), {"BLOCK": block}, {"num_warps": 1, "num_stages": 2}) for block in (32, 16)]
    with mock.patch.object(copy, "compile", compile_and_tell):
        Plan(-1, ("x", "y"), launches, {})(torch.zeros(64), torch.zeros(64))
    assert len(where) == 2
    assert not any(name == threading.main_thread().name for name in where)


@compiled
def test_the_operators_plans_hand_every_kernel_what_triton_hands_it():
    from attnconvert.kernels.linear import triton_operator

    B, T, H, G, D, F = 1, 130, 4, 2, 16, 16
    heads = {"query_map": (H, D, F), "key_map": (G, D, F), "linear_log_weight": (H, 1), "query_gate": (H, D + 1), "key_gate": (G, D + 1)}
    given = {name: torch.zeros(B, T, n, D, dtype=torch.bfloat16) for name, n in (("q", H), ("k", G), ("v", G))} | {
        name: torch.zeros(shape) for name, shape in heads.items()
    }
    once = Plan.__call__

    def twice(plan, *tensors):
        once(plan, *tensors)
        once(plan, *tensors)

    leaves = {name: x.requires_grad_() for name, x in given.items()}
    with mock.patch.object(Plan, "__call__", twice):
        out = triton_operator.triton_linear_attention(**leaves, window_size=64, window_kind="block", num_sinks=4, scale=0.25).output
        forward = len(Recorder.seen) // 2
        torch.autograd.grad(out, list(leaves.values()), torch.zeros_like(out))
    backward = len(Recorder.seen) // 2 - forward
    pairs = [(first + i, first + n + i) for first, n in ((0, forward), (2 * forward, backward)) for i in range(n)]
    assert (forward, backward) == (4, 9)
    for first, second in pairs:
        a, b = Recorder.seen[first], Recorder.seen[second]
        assert by_triton(a)
        assert not by_triton(b)
        assert a[:4] == b[:4]
        for x, y in zip(handed(a), handed(b), strict=True):
            assert x == y or (x == 0 and y % 16 == 0), a[0]  # a tensor without elements has no address


def test_tensors_in_one_allocation_do_not_overlap_and_are_aligned():
    layout = Layout()
    shapes = {"a": (3, 5), "empty": (0,), "b": (7,), "c": (2, 2, 2)}
    dtypes = {"a": torch.bfloat16, "empty": torch.float32, "b": torch.int32, "c": torch.float32}
    for name, shape in shapes.items():
        layout.add(name, shape, dtypes[name])
    memory = layout.allocate(torch.device("cpu"))
    for number, name in enumerate(shapes):
        layout.view(memory, name).fill_(number + 1)
    for number, name in enumerate(shapes):
        x = layout.view(memory, name)
        assert (x.shape, x.dtype) == (shapes[name], dtypes[name])
        assert (x == number + 1).all()
        assert (x.data_ptr() - memory.data_ptr()) % ALIGNMENT == 0 or not x.numel()


def test_two_tensors_of_one_name_are_refused():
    layout = Layout()
    layout.add("x", (1,), torch.float32)
    with pytest.raises(ValueError, match="same name"):
        Plan(-1, ("x", "memory"), [], {"memory": layout})
