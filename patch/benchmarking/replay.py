"""Timing by replays of CUDA graphs: what the device needs, without the host that launches it.

On a CPU the same calls run as they are, so that every benchmark can be tried out and tested without a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from patch.artefacts import PatchError

CONTEXT_GIB = 1.5
"""Of a GPU's memory that may be taken although nothing else runs: contexts of this process and of idle ones."""
Call = Callable[[], object]
WARM_UP = 2
"""Eager calls before a capture: compilation, choices of kernels and library handles must be out of the way."""


def check_alone() -> None:
    """Raise PatchError where another process holds memory of the GPU, whose work timings would contain."""
    if not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    others = (total - free - torch.cuda.memory_reserved()) / 2**30 - CONTEXT_GIB
    if others > 0:
        raise PatchError(
            f"GPU {torch.cuda.current_device()}: other processes hold {others:.1f} GiB of it, and a benchmark needs it "
            "alone; wait for them (the workflow does with --resources gpu=1), or set CUDA_VISIBLE_DEVICES to another."
        )


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Call, device: torch.device) -> Call:
    """The same call as the replay of a graph, on a GPU. It must work on tensors that stay where they are."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def milliseconds(call: Call, device: torch.device, repeats: int) -> float:
    """Median time of a call, from its start to its end on the device."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def microseconds(calls: Sequence[Call], device: torch.device, repeats: int = 11, rounds: int = 4) -> float:
    """Median time of one of several equal calls, each on its own copy of the data, one after the other.

    With copies that exceed the cache together, each call finds its data in memory. One graph holds `rounds` over all
    copies: its start is a small part of the time.
    """

    def all_of_them() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    replay = captured(all_of_them, device)
    replay()
    return 1e3 * milliseconds(replay, device, repeats) / (rounds * len(calls))


def copies_past_cache(bytes_of_one: int, device: torch.device) -> int:
    """How many copies of something are at least four and twice as large as the device's L2 cache together."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(4, -(-2 * cache // bytes_of_one))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, read and written ones together."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # by a kernel: in a CUDA graph a plain copy becomes a node of the copy engine, which is slower by a third
    return 2 * size / (1e-6 * microseconds([lambda: torch.bitwise_not(source, out=target)], device, rounds=2))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds per second of a large dense matrix product in `dtype` on the device."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / (1e-6 * microseconds([lambda: left @ right], device, rounds=2))
