"""Calibration sequences on their way through a model whose decoder blocks run one at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patch.data import TokenSet
from patch.models import decoder_blocks, vocabulary_size

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class HiddenStates:
    """The calibration sequences on their way through the model, as the input of the next block."""

    def __init__(self, model: PreTrainedModel, calibration: TokenSet, device: str):
        calibration.check_vocabulary(vocabulary_size(model))
        self.device = device
        ids = calibration.ids.to(model.device)
        _, blocks = decoder_blocks(model)
        self.arguments, self.returns_tuple = _block_arguments(model, blocks, ids[:1], device)
        self.per_batch = max(1, TOKENS_PER_BATCH[torch.device(device).type] // ids.shape[1])
        self.hidden = torch.cat([_first_block_input(model, blocks, row) for row in ids.split(self.per_batch)])

    def batches(self) -> Iterator[Tensor]:
        """Views of at most `per_batch` sequences [sequences, tokens, hidden]."""
        yield from self.hidden.split(self.per_batch)

    def slice_of(self, buffer: Tensor, number: int) -> Tensor:
        """Where the outputs of a batch go in a `buffer`."""
        return buffer[number * self.per_batch :][: self.per_batch]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        positional, named = self.arguments[index]
        output = block(hidden.to(self.device), *positional, **named)
        return output[0] if self.returns_tuple else output

    def buffer(self, *, last_use: bool) -> Tensor:
        """Memory for the outputs of the block at work; its inputs' own where they are not used again."""
        return self.hidden if last_use else torch.empty_like(self.hidden)

    def advance(self, index: int, block: nn.Module, outputs: Tensor) -> None:
        """Write the outputs of block `index` into a `buffer`."""
        for number, hidden in enumerate(self.batches()):
            self.slice_of(outputs, number).copy_(self.run(index, block, hidden))

    def following(self, outputs: Tensor) -> HiddenStates:
        """The states as the next block gets them."""
        following = copy.copy(self)
        following.hidden = outputs
        return following


class _StopForward(Exception):  # noqa: N818 - it is no error
    """Ends a forward pass early."""


def _first_block_input(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> Tensor:
    captured: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        captured.append(arguments[0])
        raise _StopForward

    handle = blocks[0].register_forward_pre_hook(hook)
    try:
        with contextlib.suppress(_StopForward):
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def _block_arguments(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, device: str
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], bool]:
    """What the model passes to each block beside the hidden states (masks, positions), and whether blocks
    return tuples.

    One forward pass of one sequence in which no block computes anything: asking the model itself keeps
    this right for architectures whose blocks differ, such as Gemma 3's local and global attention.
    """
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returns_tuple = False
    originals = [block.forward for block in blocks]

    def recorder(*positional: Any, **named: Any) -> Any:
        arguments.append((positional[1:], named))
        return (positional[0],) if returns_tuple else positional[0]

    def probe(*positional: Any, **named: Any) -> Any:
        nonlocal returns_tuple
        output = originals[0](*positional, **named)
        returns_tuple = isinstance(output, tuple)
        raise _StopForward

    try:
        blocks[0].forward = probe
        with contextlib.suppress(_StopForward):
            model(input_ids=ids[:, :4], use_cache=False)
        for block in blocks:
            block.forward = recorder
        model(input_ids=ids, use_cache=False)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    return [_to_device(item, device) for item in arguments], returns_tuple


def _to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value
