"""`linear_attention` on the kernels of triton.py: which are launched on what, gradients, states, and how PyTorch sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.launch import MAX_PLANS, Launch, Layout, Plan, signature
from attnconvert.kernels.linear.reference import (
    LinearOutput,
    LinearState,
    _next_state,
    _state_of_whole_rows,
    empty_state,
    feature_map,
    last_keys,
    normalizer,
    num_back_chunks,
    ring_size,
    window_start,
)
from attnconvert.kernels.linear.triton import (
    MAX_FEATURES,
    MAX_HEAD_DIM,
    MAX_VALUE_BLOCK,
    STATE_DISTANCE,
    TARGET_PROGRAMS,
    _blocks,
    _pow2,
    delta_kernel,
    key_grad_kernel,
    map_grad_kernel,
    output_kernel,
    parameter_grad_kernel,
    prefix_kernel,
    query_grad_kernel,
    reverse_state_kernel,
    round_kernel,
    sink_grad_kernel,
    state_kernel,
)
from attnconvert.kernels.registration import INTERPRETED, architecture, namespace, register, runs_here

NAMESPACE = namespace(__name__)


def _segments(num_chunks: int, heads: int) -> tuple[int, int]:
    """(chunks per segment, segments)."""
    wanted = max(1, min(num_chunks, -(-TARGET_PROGRAMS // heads)))
    per_segment = -(-num_chunks // wanted)
    return per_segment, -(-num_chunks // per_segment)


def _state_programs(B: int, GS: int, D: int) -> int:
    """Programs of `state_kernel` per segment."""
    return 2 * B * GS * (-(-D // min(_pow2(D), MAX_VALUE_BLOCK)))


def _linear_type(dtype: torch.dtype) -> tuple[Any, torch.dtype, str]:
    """(element type of the linear branch's products, of stored states, tl.dot precision): features and states outgrow fp16's range."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, torch.bfloat16, "tf32"
    if dtype == torch.float16:
        return tl.float32, torch.float32, "tf32"
    return tl.float32, torch.float32, "ieee"


def refusal(q: Tensor, k: Tensor, *, query_map: Tensor | None, linear_log_weight: Tensor, needs_grad: bool, has_state: bool) -> str | None:
    """Why the kernels cannot take these inputs, or None.

    Args: as `linear_attention`. needs_grad: some input requires a gradient. has_state: with an initial state, or a final state is asked for.
    """
    H, D = q.shape[2:]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {q.dtype} is not bfloat16, float16 or float32"
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device.type}, the kernels need an NVIDIA GPU"
    if D > MAX_HEAD_DIM:
        return f"head_dim {D} is larger than {MAX_HEAD_DIM}"
    if H % k.shape[2]:
        return f"{H} query heads are not a multiple of {k.shape[2]} key-value heads"
    if query_map is not None and query_map.shape[-1] > MAX_FEATURES:
        return f"{query_map.shape[-1]} features per half are more than {MAX_FEATURES}"
    if linear_log_weight.numel() not in (1, H):
        return f"the log weight has shape {list(linear_log_weight.shape)}, not one value per head"
    if q.is_cuda and query_map is not None:
        # compiled ahead of time: these ask for more shared memory than a block has (8.0: 163 KiB; 8.6, 8.9, 12.x: 99 KiB)
        arch, large = architecture(q.get_device()), _pow2(D) * _pow2(query_map.shape[-1]) > 128 * 64
        small = arch // 10 != 9 and arch // 10 != 10 and arch != 80
        if (needs_grad and ((small and large) or (arch == 80 and D > 128))) or (small and D > 128 and q.dtype == torch.float16):
            return f"head_dim {D} with {query_map.shape[-1]} features per half needs more shared memory than compute capability {arch / 10} has"
    if needs_grad and has_state:
        return "gradients through an initial or final state are left to the reference"
    return None


class _Sizes(NamedTuple):
    """What both passes need to know of a call's tensors, in the letters of docs/kernels.md; GS: heads of the states, TK: keys, prefix + T."""

    B: int
    T: int
    TK: int
    H: int
    GS: int
    D: int
    F: int
    linear: bool
    num_chunks: int
    seg_chunks: int
    num_segs: int

    @property
    def segment_size(self) -> int:
        """Numbers in a state and its normaliser."""
        return 2 * self.F * self.D + 2 * self.F


def _sizes(q_shape: tuple[int, ...], k_shape: tuple[int, ...], map_shape: tuple[int, ...] | None, prefix: int) -> _Sizes:
    B, T, H, D = q_shape
    GS = k_shape[2]
    num_chunks = -(-(prefix + T) // STATE_DISTANCE)
    return _Sizes(
        B,
        T,
        prefix + T,
        H,
        GS,
        D,
        16 if map_shape is None else map_shape[-1],
        map_shape is not None,
        num_chunks,
        *_segments(num_chunks, _state_programs(B, GS, D)),
    )


def _forward_layout(sizes: _Sizes, dtype: torch.dtype, map_dtype: torch.dtype | None, *, window_max: bool, save: bool, final: bool) -> Layout:
    """What the forward pass leaves beside its output, for the backward pass and for the outgoing state; empty where it is not asked for."""
    B, T, H, GS, D, F = sizes.B, sizes.T, sizes.H, sizes.GS, sizes.D, sizes.F
    fp32 = torch.float32
    layout = Layout()
    layout.add("lse", (B, H, T) if save else (0,), fp32)
    layout.add("row_max", (B, H, T) if save and window_max else (0,), fp32)
    layout.add("arg_max", (B, H, T) if save and window_max else (0,), torch.int32)
    layout.add("states", (B * GS, sizes.num_chunks, 2, F, D) if sizes.linear else (0,), _linear_type(dtype)[1])
    layout.add("norms", (B * GS, sizes.num_chunks, 2, F) if sizes.linear else (0,), fp32)
    layout.add("segments", (B * GS, sizes.num_segs, sizes.segment_size) if sizes.linear else (0,), fp32)
    layout.add("carry", (B * GS, sizes.num_segs, 2 * F * D) if sizes.linear else (0,), _linear_type(dtype)[1])
    layout.add("final", (B * GS, sizes.segment_size) if sizes.linear and final else (0,), fp32)
    rounded = sizes.linear and map_dtype != dtype
    layout.add("rounded_query_map", (H, D, F) if rounded else (0,), dtype)
    layout.add("rounded_key_map", (GS, D, F) if rounded else (0,), dtype)
    return layout


def _layout_of(
    q: Tensor, k: Tensor, query_map: Tensor | None, final_chunk: Tensor | None, prefix: int, reference: str, save: bool
) -> tuple[_Sizes, Layout]:  # fmt: skip
    """Sizes and memory of a forward pass on such tensors."""
    sizes = _sizes(q.shape, k.shape, None if query_map is None else query_map.shape, prefix)
    map_dtype = None if query_map is None else query_map.dtype
    return sizes, _forward_layout(sizes, q.dtype, map_dtype, window_max=reference == "window_max", save=save, final=final_chunk is not None)


_INPUTS = ("q", "k", "v", "query_map", "key_map", "log_weight", "query_gate", "key_gate", "start")


@functools.lru_cache(MAX_PLANS)
def _forward_plan(
    tensors: tuple[Any, ...], window_size: int, window_kind: str, num_sinks: int, prefix: int, scale: float, reference: str, between: bool, save: bool
) -> tuple[Plan, Layout]:
    """Launches of the forward pass, and what they leave in memory. tensors: signatures of `_INPUTS`, fold, initial and final_chunk."""
    q, k, v, query_map, _key_map, _log_weight, query_gate, _key_gate, start, fold, initial, final_chunk = tensors
    (q_shape, q_strides, dtype, device), (k_shape, k_strides, _, _), (_, v_strides, _, _) = q, k, v
    sizes = _sizes(q_shape, k_shape, query_map and query_map[0], prefix)
    B, T, TK, H, GS, D, F, linear, num_chunks, seg_chunks, num_segs = sizes
    map_dtype = query_map and query_map[2]
    window_max, gates, size = reference == "window_max", query_gate is not None, sizes.segment_size
    layout = _forward_layout(sizes, dtype, map_dtype, window_max=window_max, save=save, final=final_chunk is not None)
    blocks = _blocks(D, F, dtype != torch.float32, architecture(device), between)
    DP, FP, BV, CS, BM, BN = (blocks[name] for name in ("DP", "FP", "BV", "CS", "BM", "BN"))
    LT, _, precision = _linear_type(dtype)
    has_start, has_fold = start is not None, fold is not None
    wq, wk = ("query_map", "key_map") if map_dtype == dtype else ("rounded_query_map", "rounded_key_map")
    names = {
        "wq": wq if linear else None, "wk": wk if linear else None, "log_weight": "log_weight" if linear else "lse", "start": "start" if has_start else None,
        "gq": "query_gate" if gates else None, "gk": "key_gate" if gates else None, "fold": "fold" if has_fold else None,
    }  # fmt: skip
    k_strides, v_strides = k_strides[:3], v_strides[:3]
    launches = []
    if linear:
        if wq != "query_map":
            map_sizes = (H * D * F, GS * D * F)
            launches.append(
                Launch(round_kernel, (-(-max(map_sizes) // 1024), 2), ("query_map", "key_map", wq, wk, *map_sizes), {"BLOCK_SIZE": 1024}, {"num_warps": 4})
            )
        launches.append(Launch(
            state_kernel, (num_segs * 2, B * GS, -(-D // BV)),
            ("k", "v", names["wk"], names["gk"], names["start"], names["fold"], "final_chunk" if final_chunk else None, "states", "norms", "segments", "final",
             *k_strides, *v_strides, TK, num_chunks, seg_chunks, num_segs, GS, num_sinks),
            {"D": D, "DP": DP, "BV": BV, "F": F, "FP": FP, "CS": CS, "BN": BN, "GATES": gates, "HAS_START": has_start, "HAS_FOLD": has_fold, "HAS_FINAL": final_chunk is not None,
             "LT": LT, "PREC": precision},
            blocks["state"],
        ))  # fmt: skip
        if num_segs > 1 or initial is not None:
            launches.append(Launch(
                prefix_kernel, (B * GS, -(-size // 1024)), ("segments", "carry", "initial" if initial else None, names["start"], TK, num_segs, seg_chunks * CS, size, 2 * F * D, GS),
                {"HAS_START": has_start, "HAS_INITIAL": initial is not None, "REVERSE": False, "BLOCK_SIZE": 1024}, {"num_warps": 4},
            ))  # fmt: skip
    tiles = -(-T // BM)
    launches.append(Launch(
        output_kernel, (B * H * tiles, -(-D // BV)),
        ("q", "k", "v", "output", "lse", "row_max", "arg_max", names["wq"], names["wk"], names["gq"], names["gk"], names["log_weight"], "states", "norms", "segments", "carry", names["start"], names["fold"],
         *q_strides[:3], *k_strides, *v_strides, T, prefix, tiles, num_chunks, seg_chunks, num_segs, GS, num_sinks, scale),
        {"R": H // GS, "D": D, "DP": DP, "BV": BV, "F": F, "FP": FP, "C": window_size, "BLOCK": window_kind == "block", "CS": CS, "BM": BM, "BN": BN, "SB": _pow2(num_sinks) if num_sinks else 0,
         "LINEAR": linear, "BETWEEN": between, "GATES": gates, "WINDOW_MAX": window_max, "HAS_START": has_start, "HAS_FOLD": has_fold, "SPLIT": num_segs > 1 or initial is not None, "SAVE": save,
         "LT": LT, "PREC": precision},
        blocks["output"],
    ))  # fmt: skip
    return Plan(device, (*_INPUTS, "fold", "initial", "final_chunk", "output", "memory"), launches, {"memory": layout}), layout


def _forward(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None, key_gate: Tensor | None, start: Tensor | None,
    fold: Tensor | None, initial: Tensor | None, final_chunk: Tensor | None, window_size: int, window_kind: str, num_sinks: int, prefix: int, scale: float, reference: str, between: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward pass. Inputs as `_kernel_inputs` leaves them; start int32 [B, prefix + T]; see `output_kernel`.

    With `fold` (an initial state) k and v are [B, num_sinks + prefix + T, Gs, D], else [B, T, Gs, D].

    Returns:
        output, and memory with what `_forward_layout` lists.
    """
    if fold is not None and num_sinks:
        k, v = k[:, num_sinks:], v[:, num_sinks:]
    inputs = (q, k, v, query_map, key_map, log_weight, query_gate, key_gate, start, fold, initial, final_chunk)
    plan, layout = _forward_plan(signature(*inputs), window_size, window_kind, num_sinks, prefix, scale, reference, between, save)
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    memory = layout.allocate(q.device)
    plan(*inputs, output, memory)
    return output, memory


@functools.lru_cache(MAX_PLANS)
def _backward_plan(
    tensors: tuple[Any, ...], window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str, between: bool
) -> tuple[Plan, Layout]:  # fmt: skip
    """Launches of the backward pass, and their memory. tensors: signatures of `_INPUTS` and the output's gradient."""
    q, k, v, query_map, _key_map, _log_weight, query_gate, _key_gate, start, grad = tensors
    (q_shape, q_strides, dtype, device), (k_shape, k_strides, _, _), (_, v_strides, _, _), (_, grad_strides, _, _) = q, k, v, grad
    sizes = _sizes(q_shape, k_shape, query_map and query_map[0], 0)
    B, T, _, H, GS, D, F, linear, num_chunks, seg_chunks, num_segs = sizes
    map_dtype = query_map and query_map[2]
    window_max, gates, size, R = reference == "window_max", query_gate is not None, sizes.segment_size, H // GS
    blocks = _blocks(D, F, dtype != torch.float32, architecture(device), between)
    DP, FP, BV, CS, BM, BN = (blocks[name] for name in ("DP", "FP", "BV", "CS", "GBM", "GBN"))
    LT, state_dtype, precision = _linear_type(dtype)
    has_start, fp32 = start is not None, torch.float32
    tiles, key_tiles = -(-T // BM), -(-T // BN)
    splits = {heads: max(1, min(B * (-(-T // 64)), -(-TARGET_PROGRAMS // heads))) for heads in (H, GS)}
    layout = Layout()
    layout.add("delta", (B, H, T), fp32)
    layout.add("path", (B, H, T) if window_max else (0,), fp32)
    layout.add("d_sink", (B, H, tiles, 2, num_sinks, D), fp32)
    layout.add("reverse", (B * GS, num_chunks, 2, F, D) if linear else (0,), state_dtype)
    layout.add("reverse_norms", (B * GS, num_chunks, 2, F) if linear else (0,), fp32)
    layout.add("reverse_segments", (B * GS, num_segs, size) if linear else (0,), fp32)
    layout.add("reverse_carry", (B * GS, num_segs, 2 * F * D) if linear else (0,), state_dtype)
    layout.add("d_log", (B, H, tiles) if linear else (0,), fp32)
    for name, heads, blocks_of in (("q", H, tiles), ("k", GS, key_tiles)):
        layout.add(f"dy_{name}", (B, heads, T, F) if linear else (0,), state_dtype)
        layout.add(f"d_gate_{name}", (B, heads, T) if gates else (0,), fp32)
        layout.add(f"d_power_{name}", (B, heads, blocks_of) if gates else (0,), fp32)
        layout.add(f"parts_{name}", (splits[heads], heads * (D * F + D * gates)) if linear else (0,), fp32)

    wq, wk = (None, None) if not linear else ("query_map", "key_map") if map_dtype == dtype else ("rounded_query_map", "rounded_key_map")
    gq, gk = ("query_gate", "key_gate") if gates else (None, None)
    log_weight, starts = "log_weight" if linear else "lse", "start" if has_start else None
    q_strides, k_strides, v_strides, grad_strides = q_strides[:3], k_strides[:3], v_strides[:3], grad_strides[:3]
    launches = [Launch(delta_kernel, (-(-T // 64), B * H), ("output", "grad", "delta", *grad_strides, T, H), {"D": D, "DP": DP, "BM": 64}, {"num_warps": 4})]
    if linear:
        launches.append(Launch(
            reverse_state_kernel, (num_segs * 2, B * GS, -(-D // BV)),
            ("q", "grad", "lse", "row_max", "delta", wq, gq, log_weight, starts, "reverse", "reverse_norms", "reverse_segments",
             *q_strides, *grad_strides, T, num_chunks, seg_chunks, num_segs, GS),
            {"R": R, "D": D, "DP": DP, "BV": BV, "F": F, "FP": FP, "CS": CS, "BM": blocks["BM"], "GATES": gates, "WINDOW_MAX": window_max, "HAS_START": has_start, "LT": LT, "PREC": precision},
            blocks["reverse"],
        ))  # fmt: skip
        if num_segs > 1:
            launches.append(Launch(
                prefix_kernel, (B * GS, -(-size // 1024)), ("reverse_segments", "reverse_carry", None, starts, T, num_segs, seg_chunks * CS, size, 2 * F * D, GS),
                {"HAS_START": has_start, "HAS_INITIAL": False, "REVERSE": True, "BLOCK_SIZE": 1024}, {"num_warps": 4},
            ))  # fmt: skip
    strides = (*q_strides, *k_strides, *v_strides, *grad_strides)
    flags = {
        "R": R, "D": D, "DP": DP, "F": F, "FP": FP, "C": window_size, "BLOCK": window_kind == "block", "CS": CS, "BM": BM, "BN": BN, "LINEAR": linear, "BETWEEN": between, "GATES": gates,
        "WINDOW_MAX": window_max, "HAS_START": has_start, "SPLIT": num_segs > 1, "LT": LT, "PREC": precision,
    }  # fmt: skip
    inputs = ("q", "k", "v", "grad", "lse", "row_max", "arg_max", "delta", "path", wq, wk, gq, gk, log_weight)
    launches.append(Launch(
        query_grad_kernel, (B * H * tiles,),
        (*inputs, "states", "norms", "segments", "carry", starts, "dq", "dy_q", "d_gate_q", "d_power_q", "d_log", "d_sink",
         *strides, T, tiles, num_chunks, seg_chunks, num_segs, GS, num_sinks, scale),
        flags | {"SB": _pow2(num_sinks) if num_sinks else 0}, blocks["query"],
    ))  # fmt: skip
    launches.append(Launch(
        key_grad_kernel, (key_tiles, B * GS),
        (*inputs, "reverse", "reverse_norms", "reverse_segments", "reverse_carry", starts, "dk", "dv", "dy_k", "d_gate_k", "d_power_k",
         *strides, T, key_tiles, num_chunks, seg_chunks, num_segs, GS, num_sinks, scale),
        flags, blocks["key"],
    ))  # fmt: skip
    if num_sinks:
        launches.append(Launch(
            sink_grad_kernel, (tiles if has_start else 1, B * GS, num_sinks), ("d_sink", starts, "dk", "dv", T, tiles, GS, num_sinks),
            {"BM": BM, "R": R, "D": D, "DP": DP, "HAS_START": has_start, "BT": 64}, {"num_warps": 8},
        ))  # fmt: skip
    if linear:
        for name, heads, x_strides in (("q", H, q_strides), ("k", GS, k_strides)):
            launches.append(Launch(
                map_grad_kernel, (splits[heads], heads), (name, f"dy_{name}", f"d_gate_{name}", f"parts_{name}", *x_strides, B, T, heads, splits[heads]),
                {"D": D, "DP": DP, "F": F, "FP": FP, "BT": 64, "GATES": gates, "LT": LT, "PREC": precision}, blocks["map"],
            ))  # fmt: skip
        # at least H programs and a whole number of columns: the first `heads` programs of each half add a gate's power, the others 128 columns each
        launches.append(Launch(
            parameter_grad_kernel, (H + -(-H * (D * F + D * gates) // 128), 3),
            ("parts_q", "parts_k", "d_power_q", "d_power_k", "d_log", "d_query_map", "d_key_map", "d_query_gate" if gates else None, "d_key_gate" if gates else None, "d_log_weight",
             B, H, GS, tiles, key_tiles, splits[H], splits[GS]),
            {"D": D, "F": F, "BLOCK_SIZE": 128, "BS": 16, "GATES": gates}, {"num_warps": 4},
        ))  # fmt: skip
    saved = _forward_layout(sizes, dtype, map_dtype, window_max=window_max, save=True, final=False)
    names = (*_INPUTS, "output", "memory", "grad", "dq", "dk", "dv", "d_query_map", "d_key_map", "d_log_weight", "d_query_gate", "d_key_gate", "scratch")
    return Plan(device, names, launches, {"memory": saved, "scratch": layout}), layout


def _backward(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None, key_gate: Tensor | None, start: Tensor | None,
    output: Tensor, memory: Tensor, grad: Tensor, window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str, between: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, query_map, key_map, log_weight, query_gate, key_gate (empty where there is no such input). output, memory: of the forward pass with save."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    inputs = (q, k, v, query_map, key_map, log_weight, query_gate, key_gate, start)
    plan, layout = _backward_plan(signature(*inputs, grad), window_size, window_kind, num_sinks, scale, reference, between)
    grads = _empty_gradients(*inputs[:-1])
    plan(*inputs, output, memory, grad, *grads, layout.allocate(q.device))
    return grads


def _empty_gradients(q: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A contiguous tensor for the gradient of each of the first eight of `_INPUTS`."""
    device = q.device
    dq, dk, dv, query_map, key_map, log_weight, query_gate, key_gate = [
        torch.empty(0, dtype=q.dtype, device=device) if x is None else torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, *others)
    ]
    return dq, dk, dv, query_map, key_map, log_weight, query_gate, key_gate


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None, key_gate: Tensor | None, start: Tensor | None,
    fold: Tensor | None, initial: Tensor | None, final_chunk: Tensor | None, window_size: int, window_kind: str, num_sinks: int, prefix: int, scale: float, reference: str, between: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, layout = _layout_of(q, k, query_map, final_chunk, prefix, reference, save)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), layout.allocate(q.device)


def _backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None, key_gate: Tensor | None, start: Tensor | None,
    output: Tensor, memory: Tensor, grad: Tensor, window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str, between: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(q, k, v, query_map, key_map, log_weight, query_gate, key_gate)


_LIBRARY = None  # of an earlier execution of this module
_LIBRARY = register(NAMESPACE, {"linear_attention_forward": (_forward, _forward_shapes), "linear_attention_backward": (_backward, _backward_shapes)})
_forward_op = getattr(torch.ops, NAMESPACE).linear_attention_forward.default
_backward_op = getattr(torch.ops, NAMESPACE).linear_attention_backward.default


class _LinearAttention(torch.autograd.Function):
    """Gradients of q, k, v, maps, log weight and gates; no states."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None, key_gate: Tensor | None,
        start: Tensor | None, window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str, between: bool,
    ) -> Tensor:  # fmt: skip
        inputs = (q, k, v, query_map, key_map, log_weight, query_gate, key_gate, start)
        run = _forward if runs_here(q) else _forward_op
        output, memory = run(*inputs, None, None, None, window_size, window_kind, num_sinks, 0, scale, reference, between, True)
        ctx.save_for_backward(*inputs, output, memory)
        ctx.options = (window_size, window_kind, num_sinks, scale, reference, between)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        run: Callable[..., tuple[Tensor, ...]] = _backward if runs_here(grad) else _backward_op
        dq, dk, dv, query_map, key_map, log_weight, query_gate, key_gate = run(*saved, grad, *ctx.options)
        linear, gates = saved[3] is not None, saved[6] is not None
        maps = (query_map, key_map, log_weight) if linear else (None, None, None)
        return dq, dk, dv, *maps, *((query_gate, key_gate) if gates else (None, None)), *[None] * 7


def _dense(x: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
    """`x`, contiguous and of one of the dtypes, the last of which it is cast to."""
    if x is None or (x.dtype in dtypes and x.is_contiguous()):
        return x
    return (x if x.dtype in dtypes else x.to(dtypes[-1])).contiguous()


def _kernel_inputs(
    q: Tensor, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor, query_gate: Tensor | None, key_gate: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Maps in q's dtype or fp32 (both in one), a log weight per head and gates in fp32, all contiguous."""
    if query_map is None or key_map is None:
        return None, None, None, None, None
    fp32, dtype, H = torch.float32, q.dtype, q.shape[2]
    map_dtypes = (fp32, dtype) if query_map.dtype == key_map.dtype else (dtype,)
    log_weight = linear_log_weight if linear_log_weight.numel() == H else linear_log_weight.reshape(-1).expand(H)
    return _dense(query_map, *map_dtypes), _dense(key_map, *map_dtypes), _dense(log_weight, fp32), _dense(query_gate, fp32), _dense(key_gate, fp32)


def _first_state(
    q: Tensor, k: Tensor, v: Tensor, heads_k: Tensor, heads_v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None,
    key_gate: Tensor | None, between: bool, window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str,
) -> LinearOutput:  # fmt: skip
    """`_with_state` where a state leaves, none comes in and no row is padded or packed: a prompt's prefill, whose time is the time to the first token."""
    B, T, _, D = q.shape
    GS = heads_k.shape[2]
    if window_size == 0:
        end = T
    elif window_kind == "sliding":
        end = max(T - window_size, 0)
    else:
        end = max((T - 1) // window_size - 1, 0) * window_size
    chunk = min(end // STATE_DISTANCE, (T - 1) // STATE_DISTANCE)
    linear = query_map is not None
    final_chunk = torch.full((B,), chunk, dtype=torch.int32, device=q.device) if linear else None
    run = _forward if runs_here(q) else _forward_op
    output, memory = run(
        q, heads_k, heads_v, query_map, key_map, log_weight, query_gate, key_gate, None, None, None, final_chunk, window_size, window_kind, num_sinks, 0, scale, reference, between, False
    )  # fmt: skip
    if query_map is None or key_map is None:
        kv, z = torch.zeros(B, GS, 0, D, device=q.device), torch.zeros(B, GS, 0, device=q.device)
    else:
        sizes, layout = _layout_of(q, heads_k, query_map, final_chunk, 0, reference, False)
        total = layout.view(memory, "final").view(B, GS, -1)
        if chunk >= sizes.seg_chunks:
            total = total + layout.view(memory, "segments").view(B, GS, sizes.num_segs, -1)[:, :, chunk // sizes.seg_chunks]
        features = 2 * sizes.F
        kv, z = total[..., : features * D].reshape(B, GS, features, D), total[..., features * D :]
        first = max(chunk * STATE_DISTANCE, num_sinks)
        if first < end:  # keys after the last stored state that have left the window
            phi = feature_map(heads_k[:, first:end].transpose(1, 2), key_map, key_gate)
            kv, z = kv + phi.transpose(-1, -2) @ heads_v[:, first:end].transpose(1, 2).float(), z + phi.sum(2)
        kv = kv.clone(memory_format=torch.contiguous_format)  # a view would keep all of the call's memory
    return LinearOutput(output, _state_of_whole_rows(k, v, ring_size(window_size, window_kind), num_sinks, kv, z))


def _with_state(
    q: Tensor, k: Tensor, v: Tensor, heads_k: Tensor, heads_v: Tensor, query_map: Tensor | None, key_map: Tensor | None, log_weight: Tensor | None, query_gate: Tensor | None,
    key_gate: Tensor | None, start: Tensor | None, state: LinearState | None, output_final_state: bool, between: bool, window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str,
) -> LinearOutput:  # fmt: skip
    """The operator with an incoming or outgoing state. k, v: [B, T, G, D]; heads_k, heads_v: the same with a head per state, [B, T, Gs, D]."""
    B, T, _, D = q.shape
    GS, device = heads_k.shape[2], q.device
    features = 0 if query_map is None else 2 * query_map.shape[-1]
    prefix = 0
    fold = initial = starts = None
    incoming = (
        empty_state(q, k, num_sinks=num_sinks, window_size=window_size, kind=window_kind, num_features=features, state_heads=GS) if state is None else state
    )
    if state is None:
        starts = None if start is None else start.to(torch.int32).contiguous()
    else:
        prefix = num_back_chunks(window_size, window_kind, aligned=False) * window_size
        length = state.length
        start = -length[:, None].expand(B, T) if start is None else torch.where(start <= 0, -length[:, None], start)
        first = prefix - length[:, None]
        starts = torch.cat([first.expand(B, prefix), start + prefix], 1).to(torch.int32)
        left = window_start((length - 1).clamp_min(0)[:, None], window_size, window_kind) if window_size else length[:, None]
        fold = (first + torch.where(length[:, None] > 0, left, 0))[:, 0].to(torch.int32)

        def joined(new: Tensor, ring: Tensor, sinks: Tensor) -> Tensor:
            old = torch.cat([sinks, last_keys(ring, length, prefix)], 2) if prefix else sinks
            return torch.cat([old.transpose(1, 2).repeat_interleave(GS // old.shape[1], 2).to(new.dtype), new], 1)

        heads_k, heads_v = joined(heads_k, state.k, state.sink_k), joined(heads_v, state.v, state.sink_v)
        if features:
            initial = torch.cat([state.kv.reshape(B * GS, -1), normalizer(state, window_size, window_kind).reshape(B * GS, -1)], 1).float()
    last = prefix + T - 1
    document = torch.zeros(B, dtype=torch.int64, device=device) if starts is None else starts[:, -1].long()
    end = document + window_start(last - document, window_size, window_kind)  # keys before it are in the outgoing state
    chunk = (end // STATE_DISTANCE).clamp(0, last // STATE_DISTANCE)
    final_chunk = chunk.to(torch.int32) if output_final_state and features else None
    run = _forward if runs_here(q) else _forward_op
    output, memory = run(
        q, heads_k, heads_v, query_map, key_map, log_weight, query_gate, key_gate, starts, fold, initial, final_chunk, window_size, window_kind, num_sinks, prefix, scale, reference, between, False
    )  # fmt: skip
    if not output_final_state:
        return LinearOutput(output, None)
    kv = z = None
    if features:
        assert key_map is not None
        sizes, layout = _layout_of(q, heads_k, query_map, final_chunk, prefix, reference, False)
        segments, final = layout.view(memory, "segments"), layout.view(memory, "final")
        per_segment = sizes.seg_chunks
        segment = chunk // per_segment
        at = chunk * STATE_DISTANCE
        total = final.view(B, GS, -1) * (document < at)[:, None, None]
        carried = (document < segment * per_segment * STATE_DISTANCE) & (document < at)
        total = (
            total
            + segments.view(B, GS, -1, final.shape[-1]).gather(2, segment[:, None, None, None].expand(B, GS, 1, final.shape[-1]))[:, :, 0]
            * carried[:, None, None]
        )
        # keys after the last stored state that have left the window
        skipped = num_sinks if state is not None else 0
        index = at[:, None] + torch.arange(STATE_DISTANCE, device=device)
        leaves = (index < end[:, None]) & (index >= document[:, None] + num_sinks) & (index <= last)
        if fold is not None:
            leaves = leaves & (index >= fold[:, None])
        rows = (index.clamp(0, last) + skipped)[:, :, None, None].expand(-1, -1, GS, D)
        keys, values = heads_k.gather(1, rows).transpose(1, 2), heads_v.gather(1, rows).transpose(1, 2)
        phi = feature_map(keys, key_map, key_gate) * leaves[:, None, :, None]
        split = features * D
        kv = total[..., :split].reshape(B, GS, features, D) + phi.transpose(-1, -2) @ values.float()
        z = total[..., split:] + phi.sum(2)
    return LinearOutput(output, _next_state(incoming, k, v, document - prefix, kv, z))


def triton_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, window_kind: str, num_sinks: int, scale: float, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor,
    query_gate: Tensor | None = None, key_gate: Tensor | None = None, reference: str = "absolute", start: Tensor | None = None, aligned: bool = False,
    initial_state: LinearState | None = None, output_final_state: bool = False,
) -> LinearOutput:  # fmt: skip
    """`reference.linear_attention` on Triton kernels; the same arguments. linear_log_weight: one value per head, or one for all.

    Matrix products take q's dtype (maps are rounded to it), sums are fp32. `aligned` needs no telling: aligned documents are found to
    need less.
    """
    H, G = q.shape[2], k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    k, v = (x if x.dtype == q.dtype else x.to(q.dtype) for x in (k, v))
    heads_k, heads_v = k, v
    if key_map is not None and key_map.shape[0] != G:  # LoLCATs' layout: a key map and a state per query head
        heads_k, heads_v = (x.repeat_interleave(H // G, 2) for x in (k, v))
    # keys between state and windows: none where every window starts at a multiple of the states' distance
    between = not (window_kind == "block" and window_size > 0 and window_size % STATE_DISTANCE == 0 and initial_state is None and (start is None or aligned))
    parameters = _kernel_inputs(q, query_map, key_map, linear_log_weight, query_gate, key_gate)
    options = (window_size, window_kind, num_sinks)
    if initial_state is not None or output_final_state:
        with torch.autocast(q.device.type, enabled=False):
            if initial_state is None and start is None:
                return _first_state(q, k, v, heads_k, heads_v, *parameters, between, *options, scale, reference)
            return _with_state(q, k, v, heads_k, heads_v, *parameters, start, initial_state, output_final_state, between, *options, scale, reference)
    starts = None if start is None else start.to(torch.int32).contiguous()
    inputs = (q, heads_k, heads_v, *parameters)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return LinearOutput(_LinearAttention.apply(*inputs, starts, *options, scale, reference, between), None)
    run = _forward if runs_here(q) else _forward_op
    return LinearOutput(run(*inputs, starts, None, None, None, *options, 0, scale, reference, between, False)[0], None)
