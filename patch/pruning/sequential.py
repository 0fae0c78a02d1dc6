"""The calibration driver: block after block, so that one block's statistics are in memory at a time.

For every decoder block, in order (SLIM `slim/prune.py`, WANDA `lib/prune.py`): run the calibration
sequences through it, still dense, and accumulate every layer's statistic; prune its layers; run the
sequences again, now through the pruned block, to make the next block's inputs.

The model stays where it is (CPU memory, usually); only the block at work moves to the device, so an 8B
model fits a GPU with 24 GB.

Several masks of one model can be made in one pass over it. What jobs share without a number changing: each block's way
to the device, and the statistics of the same inputs. The first block has the same inputs for all; the others only for
jobs that calibrate on the dense model (`calibration_inputs`), which then share every statistic, and every forward
pass. All other jobs have hidden states of their own from there on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.methods import CalibratedMethod, Magnitude, Method, OneShotMethod, Random, SparseGPT, Thanos, Wanda
from patch.models import decoder_blocks, in_attention, prunable_linears
from patch.progress import track
from patch.pruning.base import Pruned, Pruner, Statistic
from patch.pruning.hidden_states import HiddenStates
from patch.pruning.magnitude import MagnitudePruner
from patch.pruning.random import RandomPruner
from patch.pruning.sparsegpt import SparseGPTPruner
from patch.pruning.thanos import ThanosPruner
from patch.pruning.wanda import WandaPruner
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

log = logging.getLogger(__name__)

Statistics = dict[type[Statistic], dict[str, Statistic]]
"""By kind, then by layer; layers with the same inputs share theirs."""


@dataclass(frozen=True)
class Job:
    """A mask to make."""

    method: Method
    pattern: Pattern
    sparsity: float
    """Share of weights to prune, 0 to 1; N:M patterns fix it and ignore this."""


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
    (result,) = _prune(model, [Job(method, pattern, sparsity)], calibration, device, seed, in_place=True)
    if isinstance(result, PatchError):
        raise result
    return result


def prune_together(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    calibration: TokenSet | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> list[MaskSet | PatchError]:
    """Make several masks of one model in one pass over it; each is what `prune_model` makes. The model stays as it is.

    A job that fails, for a reason that `prune_model` raises, has its error in the place of its masks; the others go on.
    Host memory: the hidden states of the calibration tokens once for each job that uses them, but once for all that
    calibrate on the dense model.
    Raises PatchError for foreign calibration tokens.
    """
    return _prune(model, jobs, calibration, device, seed, in_place=False)


@torch.no_grad()
def _prune(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    calibration: TokenSet | None,
    device: str,
    seed: int,
    *,
    in_place: bool,
) -> list[MaskSet | PatchError]:
    linears = prunable_linears(model)
    base = fingerprint(linears)
    prefix, blocks = decoder_blocks(model)
    runs = [_Run(job, make_pruner(job.method, seed)) for job in jobs]
    for run in runs:
        with run.catching():
            run.start(linears, calibration)
    runs_left = [run for run in runs if not run.error]
    streams = [_Stream(without)] if (without := [run for run in runs_left if not run.uses_calibration]) else []
    if calibration is not None and (calibrated := [run for run in runs_left if run.uses_calibration]):
        streams.append(_Stream(calibrated, HiddenStates(model, calibration, device)))

    with _without_tf32():
        for index, block in track(list(enumerate(blocks)), "block", log):
            if not streams:  # all have failed
                break
            with _on_device(block, device):
                streams = [
                    part for stream in streams for part in stream.through(index, f"{prefix}.{index}.", block, in_place)
                ]
    return [run.error or MaskSet(run.masks, base) for run in runs]


def calibrated_blocks(
    model: PreTrainedModel,
    linears: dict[str, nn.Linear],
    kind: type[Statistic],
    calibration: TokenSet | None,
    device: str,
) -> Iterator[tuple[dict[str, nn.Linear], dict[str, Statistic]]]:
    """Block after block on `device`: those of `linears` in it, and the statistics of their inputs.

    What the caller makes of a block's layers before it asks for the next one is what the next one's inputs come from.
    calibration: None for no statistics. Raises PatchError as `prune_model` does. Call it without gradients.
    """
    prefix, blocks = decoder_blocks(model)
    states = HiddenStates(model, calibration, device) if calibration else None
    with _without_tf32():
        for index, block in track(list(enumerate(blocks)), "block", log):
            layers = {name: linear for name, linear in linears.items() if name.startswith(f"{prefix}.{index}.")}
            with _on_device(block, device):
                statistics: dict[str, Statistic] = {}
                if states:
                    wanted = {name: (linear, [kind]) for name, linear in layers.items()}
                    statistics = _accumulate(states, index, block, wanted, None)[kind]
                    _check_statistics(layers, statistics)
                yield layers, statistics
                statistics.clear()  # the caller's, too, before anything else needs memory
                if states:
                    outputs = states.buffer(last_use=True)
                    states.advance(index, block, outputs)
                    states = states.following(outputs)


def _check_statistics(layers: dict[str, nn.Linear], statistics: dict[str, Statistic]) -> None:
    """Raise PatchError where a layer saw no tokens, or NaN or Inf."""
    for name in layers:
        if name not in statistics:
            raise PatchError(f"layer {name}: saw no calibration tokens; use more calibration text.")
    for name, statistic in statistics.items():  # in order of execution: the first one is the cause
        if name in layers and not statistic.is_finite():
            raise PatchError(
                f"layer {name}: its inputs hold NaN or Inf during calibration; "
                "load the model in bfloat16 or float32 (float16 overflows in some models)."
            )


@dataclass
class _Run:
    """A job under way."""

    job: Job
    pruner: Pruner
    layers: dict[str, nn.Linear] = field(default_factory=dict)
    """Those that it prunes."""
    masks: dict[str, LinearMask] = field(default_factory=dict)
    """Of all linears in the blocks."""
    error: PatchError | None = None
    """Why it came to an end early."""

    @property
    def uses_calibration(self) -> bool:
        return self.job.method.uses_calibration

    @property
    def follows_dense(self) -> bool:
        method = self.job.method
        return isinstance(method, CalibratedMethod) and method.calibration_inputs == "dense"

    def start(self, linears: dict[str, nn.Linear], calibration: TokenSet | None) -> None:
        """Refuse what cannot be done before anything is computed."""
        method, pattern = self.job.method, self.job.pattern
        if pattern.kind not in method.patterns:
            raise PatchError(f"method {method.title}: cannot make the pattern {pattern}; it makes {method.patterns}.")
        self.layers = _chosen(linears, method)
        for name, linear in self.layers.items():
            pattern.check_shape(linear.out_features, linear.in_features, name)
        if method.uses_calibration and (calibration is None or calibration.ids.numel() == 0):
            raise PatchError(f"method {method.title}: needs calibration tokens.")
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self.masks = {name: LinearMask.dense(shape) for name, shape in shapes.items()}

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Errors inside end this run, but not those beside it."""
        try:
            yield
        except PatchError as error:
            self.error = error

    def of_block(self, prefix: str) -> dict[str, nn.Linear]:
        return {name: linear for name, linear in self.layers.items() if name.startswith(prefix)}

    def prune(self, layers: dict[str, nn.Linear], statistics: dict[str, Statistic]) -> None:
        """Prune layers of a block in place and keep their masks."""
        if self.uses_calibration:
            _check_statistics(layers, statistics)
        for name, linear in layers.items():
            pruned = _prune_linear(name, linear, self.pruner, statistics.get(name), self.job.pattern, self.job.sparsity)
            self.masks[name] = pruned


@dataclass
class _Stream:
    """Jobs whose inputs are the same up to the block at work."""

    runs: list[_Run]
    states: HiddenStates | None = None
    """None for methods that do not look at inputs."""

    def through(self, index: int, prefix: str, block: nn.Module, in_place: bool) -> list[_Stream]:
        """Make the masks of a block; returns this stream as it parts into those that enter the next block.

        prefix: of the names of the block's layers. in_place: leave the block pruned, by the only job that there is.
        """
        with_dense = [run for run in self.runs if run.follows_dense]
        others = [run for run in self.runs if not run.follows_dense]
        statistics: Statistics = {}
        dense_outputs = None
        if self.states:
            dense_outputs = self.states.buffer(last_use=not others) if with_dense else None
            statistics = _accumulate(self.states, index, block, self._wanted(prefix), dense_outputs)
        parts, left = [], with_dense + others
        while left:
            run, left = left[0], left[1:]
            layers, kind = run.of_block(prefix), run.pruner.statistic
            with contextlib.nullcontext() if in_place else _restoring(layers):
                with run.catching():
                    run.prune(layers, statistics.get(kind, {}) if kind else {})
                if kind and all(other.pruner.statistic is not kind for other in left):
                    statistics.pop(kind, None)  # it may be gigabytes
                if self.states and run in others and not run.error:
                    outputs = self.states.buffer(last_use=not left)
                    self.states.advance(index, block, outputs)
                    parts.append(_Stream([run], self.states.following(outputs)))
        if self.states is None:
            parts.append(_Stream(self.runs))
        elif dense_outputs is not None:
            parts.append(_Stream(with_dense, self.states.following(dense_outputs)))
        for part in parts:
            part.runs = [run for run in part.runs if not run.error]
        return [part for part in parts if part.runs]

    def _wanted(self, prefix: str) -> dict[str, tuple[nn.Linear, list[type[Statistic]]]]:
        """The kinds of statistic that each layer of a block needs."""
        wanted: dict[str, tuple[nn.Linear, list[type[Statistic]]]] = {}
        for run in self.runs:
            for name, linear in run.of_block(prefix).items():
                _, kinds = wanted.setdefault(name, (linear, []))
                if run.pruner.statistic and run.pruner.statistic not in kinds:
                    kinds.append(run.pruner.statistic)
        return wanted


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
    raise PatchError(f"method {method.title}: does not prune in one shot; use `patch-llm learn`.")


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


@dataclass
class _Shared:
    """Inputs that several layers of a block have in common (q, k, v; gate, up)."""

    inputs: Tensor | None
    """Of the first batch, by which the layers are recognised."""
    leader: nn.Linear
    """The first of the layers, which accumulates for all."""
    statistics: dict[type[Statistic], Statistic] = field(default_factory=dict)


def _accumulate(
    states: HiddenStates,
    index: int,
    block: nn.Module,
    wanted: dict[str, tuple[nn.Linear, list[type[Statistic]]]],
    outputs: Tensor | None,
) -> Statistics:
    """Statistics of a block's layers, of the kinds that each of them needs, all in one forward pass.

    outputs: where to put what comes out of the block, unless None; may be the states' own memory.
    """
    found: Statistics = {kind: {} for _, kinds in wanted.values() for kind in kinds}
    groups: list[_Shared] = []

    def discover(name: str) -> Any:
        def hook(linear: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0]
            group = next((group for group in groups if group.inputs is inputs), None)
            if group is None:
                group = _Shared(inputs, linear)
                groups.append(group)
            for kind in wanted[name][1]:
                if kind not in group.statistics:
                    group.statistics[kind] = kind(linear.in_features, inputs.device)
                    group.statistics[kind].add(inputs)
                found[kind][name] = group.statistics[kind]

        return hook

    def accumulate(group: _Shared) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for statistic in group.statistics.values():
                statistic.add(arguments[0])

        return hook

    hooks = [linear.register_forward_pre_hook(discover(name)) for name, (linear, _) in wanted.items()]
    for number, hidden in enumerate(states.batches()):
        if number == 1:
            _remove(hooks)
            hooks = [group.leader.register_forward_pre_hook(accumulate(group)) for group in groups]
            for group in groups:
                group.inputs = None
        output = states.run(index, block, hidden)
        if outputs is not None:
            states.slice_of(outputs, number).copy_(output)
    _remove(hooks)
    return found


@contextlib.contextmanager
def _on_device(block: nn.Module, device: str) -> Iterator[None]:
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@contextlib.contextmanager
def _restoring(layers: dict[str, nn.Linear]) -> Iterator[None]:
    """Give the layers their weights back at the end."""
    originals = {name: linear.weight.clone() for name, linear in layers.items()}
    try:
        yield
    finally:
        for name, linear in layers.items():
            linear.weight.copy_(originals[name])


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the process prefers: ten bits of mantissa turn masks."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
