"""The calibration driver: block after block, so that one block's statistics are in memory at a time.

For every decoder block, in order (SLIM `slim/prune.py`, WANDA `lib/prune.py`): run the calibration
sequences through it, still dense, and accumulate every layer's statistic; prune its layers; run the
sequences again, now through the pruned block, to make the next block's inputs.

The model stays where it is (CPU memory, usually); only the block at work moves to the device, so an 8B
model fits a GPU with 24 GB.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.methods import Magnitude, Method, OneShotMethod, Random, SparseGPT, Thanos, Wanda
from patch.models import decoder_blocks, in_attention, prunable_linears, vocabulary_size
from patch.progress import track
from patch.pruning.base import Pruned, Pruner, Statistic
from patch.pruning.magnitude import MagnitudePruner
from patch.pruning.random import RandomPruner
from patch.pruning.sparsegpt import SparseGPTPruner
from patch.pruning.thanos import ThanosPruner
from patch.pruning.wanda import WandaPruner
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

NewStatistic = Callable[[int, torch.device], Statistic | None]
"""From in_features and a device to an empty statistic."""
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
log = logging.getLogger(__name__)


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    method: Method,
    pattern: Pattern,
    sparsity: float,
    calibration: TokenSet | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> MaskSet:
    """Prune the linears of the model's decoder blocks, in place, and return the masks of all of them.

    sparsity: share of weights to prune, 0 to 1; N:M patterns fix it and ignore this argument.
    calibration: token ids [sequences, length]; needed by methods that look at inputs. seed: of random masks.
    Raises PatchError for layers whose inputs do not divide, for NaN or infinite weights and activations
    (the layer is named), and for missing or foreign calibration tokens. The model is then partly pruned.
    """
    pruner = make_pruner(method, seed)
    if pattern.kind not in method.patterns:
        raise PatchError(f"method {method.title}: cannot make the pattern {pattern}; it makes {method.patterns}.")
    linears = prunable_linears(model)
    chosen = _chosen(linears, method)
    for name, linear in chosen.items():
        pattern.check_shape(linear.out_features, linear.in_features, name)
    base = fingerprint(linears)
    if method.uses_calibration and calibration is None:
        raise PatchError(f"method {method.title}: needs calibration tokens.")
    masks = {name: LinearMask.dense((linear.out_features, linear.in_features)) for name, linear in linears.items()}
    tokens = calibration if method.uses_calibration else None
    for layers, statistics in calibrated_blocks(model, chosen, pruner.new_statistic, tokens, device):
        for name, linear in layers.items():
            masks[name] = _prune_linear(name, linear, pruner, statistics.get(name), pattern, sparsity)
    return MaskSet(masks, base)


def calibrated_blocks(
    model: PreTrainedModel,
    linears: dict[str, nn.Linear],
    new_statistic: NewStatistic,
    calibration: TokenSet | None,
    device: str,
) -> Iterator[tuple[dict[str, nn.Linear], dict[str, Statistic]]]:
    """Block after block on `device`: those of `linears` in it, and the statistics of their inputs.

    What the caller makes of a block's layers before it asks for the next one is what the next one's inputs come from.
    calibration: None for no statistics. Raises PatchError as `prune_model` does. Call it without gradients.
    """
    prefix, blocks = decoder_blocks(model)
    stream = _HiddenStates(model, calibration, device) if calibration else None
    for index, block in track(list(enumerate(blocks)), "block", log):
        layers = {name: linear for name, linear in linears.items() if name.startswith(f"{prefix}.{index}.")}
        with _on_device(block, device):
            statistics = _accumulate(stream, index, block, layers, new_statistic, device) if stream else {}
            yield layers, statistics
            statistics.clear()  # the caller's, too, before anything else needs memory
            if stream:
                stream.advance(index, block)


def _chosen(linears: dict[str, nn.Linear], method: Method) -> dict[str, nn.Linear]:
    """The linears that the method's option `layers` stands for."""
    assert isinstance(method, OneShotMethod)
    if method.layers == "all":
        return linears
    chosen = {name: linear for name, linear in linears.items() if not in_attention(name)}
    if not 0 < len(chosen) < len(linears):
        raise PatchError(
            f"layers {method.layers}: the layers of this model do not divide into attention and MLP by their names "
            f"({', '.join(list(linears)[:3])}, ...); use layers: all."
        )
    return chosen


def make_pruner(method: Method, seed: int = 0) -> Pruner:
    """The implementation that belongs to a method's options."""
    match method:
        case Random():
            return RandomPruner(method, seed)
        case Magnitude():
            return MagnitudePruner(method)
        case Wanda():
            return WandaPruner(method)
        case SparseGPT():
            return SparseGPTPruner(method)
        case Thanos():
            return ThanosPruner(method)
    raise PatchError(f"method {method.title}: not a one-shot pruning method.")


def _prune_linear(
    name: str, linear: nn.Linear, pruner: Pruner, statistic: Statistic | None, pattern: Pattern, sparsity: float
) -> LinearMask:
    weight = linear.weight
    if not weight.isfinite().all():
        raise PatchError(f"layer {name}: its weights hold NaN or Inf; the checkpoint is damaged, load it again.")
    pruned: Pruned = pruner.prune(weight, statistic, pattern, sparsity)
    mask = LinearMask.from_keep_mask(
        pruned.keep_mask, pruned.pattern or pattern, dense_tiles=pruned.dense_tiles, new_weight=pruned.new_weight
    )
    mask.apply_(weight)
    if not weight.isfinite().all():
        raise PatchError(f"layer {name}: pruning made NaN or Inf weights; use more calibration or a larger damping.")
    return mask.to("cpu")


def _accumulate(
    stream: _HiddenStates,
    index: int,
    block: nn.Module,
    layers: dict[str, nn.Linear],
    new_statistic: NewStatistic,
    device: str,
) -> dict[str, Statistic]:
    """Statistics of all layers of a block. Layers that get the same input tensor share one (q, k, v; gate, up)."""
    statistics: dict[str, Statistic] = {}
    leaders: list[tuple[Tensor, str]] = []  # inputs of the first batch, and who accumulates them
    hooks = []

    def discover(name: str, linear: nn.Linear) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for seen, leader in leaders:
                if seen is arguments[0]:
                    statistics.setdefault(name, statistics[leader])
                    return
            statistic = new_statistic(linear.in_features, torch.device(device))
            assert statistic is not None
            statistics[name] = statistic
            leaders.append((arguments[0], name))
            statistic.add(arguments[0])

        return hook

    def accumulate(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            statistics[name].add(arguments[0])

        return hook

    for number, hidden in enumerate(stream.batches()):
        if number == 0:
            hooks = [linear.register_forward_pre_hook(discover(name, linear)) for name, linear in layers.items()]
        elif number == 1:
            _remove(hooks)
            hooks = [layers[name].register_forward_pre_hook(accumulate(name)) for _, name in leaders]
            leaders = []
        stream.run(index, block, hidden)
    _remove(hooks)
    for name in layers:
        if name not in statistics:
            raise PatchError(f"layer {name}: saw no calibration tokens; use more calibration text.")
    for name, statistic in statistics.items():  # in order of execution: the first one is the cause
        if not statistic.is_finite():
            raise PatchError(
                f"layer {name}: its inputs hold NaN or Inf during calibration; "
                "load the model in bfloat16 or float32 (float16 overflows in some models)."
            )
    return statistics


class _HiddenStates:
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

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        positional, named = self.arguments[index]
        output = block(hidden.to(self.device), *positional, **named)
        return output[0] if self.returns_tuple else output

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the inputs of block `index` by its outputs."""
        for hidden in self.batches():
            hidden.copy_(self.run(index, block, hidden))


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


@contextlib.contextmanager
def _on_device(block: nn.Module, device: str) -> Iterator[None]:
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
