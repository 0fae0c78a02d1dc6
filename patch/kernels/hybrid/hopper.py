"""Products with hybrid-tile weights on Hopper GPUs (H100, H200): the CUDA kernels, called with raw pointers.

`decode` streams the weight past up to 128 tokens; `prefill` is for more. Both take activations and return results as
`torch.nn.functional.linear` does, run on PyTorch's current stream and can be captured in CUDA graphs, once a first call
outside the capture has compiled the kernels and made the schedule. A weight must not be in use on two streams at once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.kernels.hybrid import build
from patch.kernels.hybrid.format import TILE_COLUMNS, TILE_ROWS, HybridWeight
from patch.kernels.hybrid.schedule import decode_schedule, prefill_order

MOST_DECODE_TOKENS = 128
_SPARSE_TIME = 0.6  # of a 2:4 tile in prefill, in those of a dense one
_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_WIDTHS = (8, 16, 32, 64, 128)  # columns of one tensor-core instruction
_NO_COMPILER = "no CUDA compiler; install the CUDA toolkit, or set CUDA_HOME to its folder"
log = logging.getLogger(__name__)


def supports(device: torch.device | str, tokens: int, weight: HybridWeight) -> str | None:
    """Why no kernel here can multiply `weight` with `tokens` tokens on `device`; None if one can."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return "the kernels need a CUDA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"the kernels need a Hopper GPU (compute capability 9.0), this one has {capability[0]}.{capability[1]}"
    if weight.in_features % 8:
        return f"{weight.in_features} inputs are not a multiple of 8 (16 bytes)"
    if tokens > MOST_DECODE_TOKENS and weight.out_features % 8:
        return f"{weight.out_features} outputs are not a multiple of 8 (16 bytes)"
    if weight.payload.data_ptr() % 16:
        return "the weight's payload does not start at a multiple of 16 bytes"
    if build.compiler() is None:
        _warn_of_no_compiler()
        return _NO_COMPILER
    return None


@functools.cache
def _warn_of_no_compiler() -> None:
    """Once per process: there are other kernels, and nothing else tells that they are the slower ones."""
    log.warning("the kernels for this GPU cannot be built (%s); slower ones multiply by hybrid weights", _NO_COMPILER)


@dataclass(frozen=True)
class DecodeTuning:
    """How the decode kernel runs; it is compiled for the choices of `_tuning`."""

    rows: int
    """Rows of tiles that a block works on at a time, 1 or 2: more shares the activations, fewer the partial sums."""
    shared_kib: int
    """Shared memory for tiles: 225, or 111, which leaves room for a block of the next layer."""


def decode(x: Tensor, weight: HybridWeight, bias: Tensor | None = None, tuning: DecodeTuning | None = None) -> Tensor:
    """x [..., in], 1 to 128 tokens in all -> x @ weight^T + bias, [..., out]. Repeats bit for bit.

    Raises PatchError where dtypes, shapes or devices do not fit, and where the kernel cannot run (see `supports`).
    """
    rows, bias = _prepare(x, weight, bias)
    tokens = len(rows)
    if tokens > MOST_DECODE_TOKENS:
        raise PatchError(f"decode kernel: {tokens} tokens are more than {MOST_DECODE_TOKENS}; use prefill.")
    y = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    width = next(width for width in _WIDTHS if width >= tokens)
    tuning = tuning or _tuning(weight, width)
    plan = _decode_plan(weight, width, tuning)
    sums = torch.empty(plan.slots * tuning.rows * width * TILE_ROWS, dtype=torch.float32, device=x.device)
    _check_launch(
        _decode_function()(
            x.dtype == torch.float16,
            rows.data_ptr(),
            rows.stride(0),
            weight.payload.data_ptr(),
            plan.table.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            sums.data_ptr(),
            plan.arrivals.data_ptr(),
            plan.table.shape[1],
            plan.table.shape[0],
            tuning.rows,
            weight.descriptors.shape[1],
            weight.out_features,
            weight.in_features,
            tokens,
            tuning.shared_kib,
            torch.cuda.current_stream(x.device).cuda_stream,
        )
    )
    return y


@dataclass(frozen=True)
class _DecodePlan:
    table: Tensor
    slots: int
    arrivals: Tensor


def _decode_plan(weight: HybridWeight, width: int, tuning: DecodeTuning) -> _DecodePlan:
    unit_bytes = width * TILE_COLUMNS * 2

    def make() -> _DecodePlan:
        schedule = decode_schedule(weight.descriptors, tuning.rows, _processors(weight), unit_bytes)
        arrivals = torch.zeros(schedule.slots, dtype=torch.int32, device=weight.device)
        return _DecodePlan(schedule.table, schedule.slots, arrivals)

    plan: _DecodePlan = _kept(weight, ("decode", width, tuning.rows), make)
    return plan


def _tuning(weight: HybridWeight, width: int) -> DecodeTuning:
    """The fastest, or within 2 % of it, in 70 of 72 measurements on an H100 (the others: 3 and 10 % from it).

    They are of 1, 16 and 64 tokens, at 25, 35 and 45 % zeros, for 6 shapes of 4096 to 28672 outputs and 4096 inputs,
    and 2 of 4096 outputs and 11008 or 14336 inputs. 32 tokens go by the rule of 64; 128 leave registers for one row.
    """
    tile_rows, tile_columns = weight.descriptors.shape
    tiles = tile_rows * tile_columns
    if width <= 16:
        paired = tiles > 2560
    else:
        mostly_sparse = weight.payload.numel() < 12 * 1024 * tiles  # 57 % of tiles 2:4 or more
        paired = width <= 64 and (tile_rows > 128 or (tile_rows > 64 and mostly_sparse))
    if paired:
        return DecodeTuning(rows=2, shared_kib=111 if tile_rows > 128 else 225)
    return DecodeTuning(rows=1, shared_kib=111 if width <= 16 else 225)


def prefill(x: Tensor, weight: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> x @ weight^T + bias, [..., out], by tiles of 256 tokens. Repeats bit for bit.

    Raises PatchError where dtypes, shapes or devices do not fit, and where the kernel cannot run (see `supports`).
    """
    rows, bias = _prepare(x, weight, bias)
    if weight.out_features % 8:
        raise PatchError(f"prefill kernel: {weight.out_features} outputs are not a multiple of 8 (16 bytes).")
    y = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=x.device)
    if not len(rows):
        return y
    order = _prefill_order(weight)
    _check_launch(
        _prefill_function()(
            x.dtype == torch.float16,
            rows.data_ptr(),
            rows.stride(0),
            weight.payload.data_ptr(),
            weight.descriptors.data_ptr(),
            order.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            _processors(weight),
            weight.descriptors.shape[0],
            weight.descriptors.shape[1],
            weight.out_features,
            weight.in_features,
            len(rows),
            torch.cuda.current_stream(x.device).cuda_stream,
        )
    )
    return y


def _prefill_order(weight: HybridWeight) -> Tensor:
    order: Tensor = _kept(weight, "prefill", lambda: prefill_order(weight.descriptors, _SPARSE_TIME))
    return order


def _kept(weight: HybridWeight, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns on first use, kept with the weight.

    A thread of its own makes it. All that this one allocates while `torch.compile` warms up for CUDA graphs is memory
    of the graphs: nothing may stay there that they do not return.
    """
    if key in weight.plans:
        return weight.plans[key]
    if torch.cuda.is_current_stream_capturing():
        raise PatchError(
            f"hybrid weight of {weight.out_features}x{weight.in_features}: its schedule cannot be made during the "
            "capture of a CUDA graph; call the layer once before, with as many tokens."
        )
    stream = torch.cuda.current_stream(weight.device)

    def run() -> Any:
        with torch.cuda.stream(stream):
            plan = make()
        stream.synchronize()  # decode reads W and its plan ahead of other kernels
        return plan

    with ThreadPoolExecutor(1) as thread:
        weight.plans[key] = thread.submit(run).result()
    return weight.plans[key]


def _processors(weight: HybridWeight) -> int:
    return torch.cuda.get_device_properties(weight.device).multi_processor_count


def _prepare(x: Tensor, weight: HybridWeight, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Activations as [tokens, in] that the copy engine can read, and the bias, contiguous; all checked."""
    place = f"hybrid weight of {weight.out_features}x{weight.in_features}"
    if x.dtype != weight.dtype or x.device != weight.device or x.shape[-1] != weight.in_features:
        raise PatchError(
            f"{place} ({weight.dtype}, {weight.device}): activations are {x.dtype} {tuple(x.shape)} on {x.device}."
        )
    if bias is not None and (bias.dtype, bias.device, bias.shape) != (x.dtype, x.device, (weight.out_features,)):
        raise PatchError(f"{place}: the bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}.")
    reason = supports(x.device, x.numel() // weight.in_features, weight)
    if reason:
        raise PatchError(f"{place}: {reason}.")
    rows = x.reshape(-1, weight.in_features)
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.stride(0) < weight.in_features or rows.data_ptr() % 16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows, None if bias is None else bias.contiguous()


def _decode_function() -> ctypes._NamedFuncPointer:
    return _typed(build.load("decode").patch_decode, [_INT, _POINTER, _INT64, *[_POINTER] * 6, *[_INT] * 8, _POINTER])


def _prefill_function() -> ctypes._NamedFuncPointer:
    return _typed(build.load("prefill").patch_prefill, [_INT, _POINTER, _INT64, *[_POINTER] * 5, *[_INT] * 6, _POINTER])


def _typed(function: ctypes._NamedFuncPointer, arguments: list[type]) -> ctypes._NamedFuncPointer:
    if function.argtypes is None:
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return function


def _check_launch(error: bytes | None) -> None:
    if error:
        raise PatchError(f"hybrid kernel: {error.decode()}.")
