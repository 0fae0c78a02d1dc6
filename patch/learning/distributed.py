"""Several processes that learn together: torchrun's environment, averaging, and agreeing to stop.

Without torchrun there is one process and everything here is free.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from patch.artefacts import PatchError

Yielded = TypeVar("Yielded")


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this process's device.

    device: "cpu" or "cuda"; with several processes on GPUs each takes the one of its local rank.
    Raises PatchError where a process finds no GPU of its own.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local >= torch.cuda.device_count():
        raise PatchError(
            f"process {local} of this node finds only {torch.cuda.device_count()} GPUs; "
            "start as many processes as there are GPUs (torchrun --nproc-per-node)."
        )
    chosen = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True for the one process that writes files and logs."""
    return rank() == 0


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its mean over all processes."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= world_size()


def maximum(value: int, device: torch.device) -> int:
    """The largest `value` of all processes: how a signal that one of them got becomes known to all."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def minimum(value: int, device: torch.device) -> int:
    """The smallest `value` of all processes."""
    return -maximum(-value, device)


@contextlib.contextmanager
def only_main(
    context: Callable[..., contextlib.AbstractContextManager[Yielded]], *arguments: Any
) -> Iterator[Yielded | None]:
    """Enter `context(*arguments)` on the main process; elsewhere yield None."""
    if not is_main():
        yield None
        return
    with context(*arguments) as yielded:
        yield yielded


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
