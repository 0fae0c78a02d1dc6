"""Learning masks on frozen weights: the loop (PATCH section 6.7; the official `fine_tune_mask.py`).

    for every step:  for every micro-batch:  draw noise, forward, loss, backward
                     clip, optimiser step, curves, save every k steps or when asked to stop

Everything that changes over a run is a function of the step and the seed, so a resumed run continues exactly.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.learning import distributed
from patch.learning.graphs import Replayed
from patch.learning.memory import memory_estimate
from patch.learning.objective import NextTokenLoss
from patch.learning.optimizers import apply, make_optimizer
from patch.learning.order import Shuffled
from patch.learning.parametrisation import LearnableMasks, run_block
from patch.learning.schedules import Schedule
from patch.learning.selection import final_masks
from patch.learning.state import State, StateDirectory
from patch.learning.stopping import Stopped, StopRequest, stop_on_signals
from patch.methods import Learned, LearnedTiles
from patch.models import prunable_linears, vocabulary_size
from patch.progress import duration
from patch.sparsity.maskset import MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

SECONDS_BETWEEN_LINES = 10.0
DIVERGED = 3.0
"""A cross-entropy of so many times ln(vocabulary), that of guessing, ends the run."""
DENSITY_TOLERANCE = 0.05
"""A final density further than this from its target is an error, not a result."""
log = logging.getLogger(__name__)

Row = dict[str, float]


@dataclass(frozen=True)
class LearnedMasks:
    """What a finished run leaves."""

    masks: MaskSet
    curves: list[Row]
    """One row per optimiser step."""


def learn_masks(
    model: PreTrainedModel,
    method: Learned,
    pattern: Pattern,
    sparsity: float,
    training: TokenSet,
    priors: Mapping[str, MaskSet],
    *,
    seed: int = 0,
    epochs: int = 1,
    device: torch.device | str = "cpu",
    state: Path | None = None,
    key: str = "",
    sharded: bool = False,
    compiled: bool | None = None,
    observe: Callable[[Row], None] | None = None,
) -> LearnedMasks:
    """Learn the masks of all linears of the model's decoder blocks. The model ends as it was, on `device`.

    sparsity: target share of pruned weights, 0 to 0.5 (2:4 fixes it). training: token ids [sequences, length].
    priors: MaskSets by role, "pattern" and "reference" (`LearnableMasks`). epochs: how often `training` may be read.
    state: directory for saved states, with `key` as the identity of the run; None keeps nothing.
    sharded: split weights and logits over all processes (FSDP2) instead of replicating them.
    compiled: compile the decoder blocks; default on GPUs. observe: called with every step's row, on the main process.
    Raises PatchError for a divergence, too little text, a density that is not reached, or memory that does not
    suffice, each with its remedy; Stopped after a signal, when the state is saved.
    """
    _check(model, method, sparsity, training, epochs)
    chosen = torch.device(device)
    base = fingerprint(prunable_linears(model))
    for role, prior in priors.items():
        if prior.base_fingerprint not in (None, base):
            raise PatchError(f"the {role} mask belongs to another model: it was made for other weights.")
    compiled = compiled if compiled is not None else chosen.type == "cuda"
    estimate = memory_estimate(
        model, method, pattern, training.ids.shape[1], distributed.world_size() if sharded else 1
    )
    try:
        masks = make_masks(
            model, method, pattern, sparsity, priors, seed=seed, device=chosen, sharded=sharded, compiled=compiled
        )
        try:
            trainer = Trainer(model, masks, training, seed, key, state, observe)
            trainer.run()
            result = final_masks(masks, base)
        finally:
            masks.remove()
    except torch.OutOfMemoryError as error:
        raise PatchError(
            f"out of memory; estimate in GiB: {', '.join(f'{part} {size:g}' for part, size in estimate.items())}. Use "
            "optimizer adamw_8bit, gradient_dtype and logits_dtype bfloat16, checkpointing, several GPUs with --shard, "
            "or shorter sequences. The last saved state is kept."
        ) from error
    _check_density(result, method, sparsity)
    return LearnedMasks(result, trainer.curves)


def make_masks(
    model: PreTrainedModel,
    method: Learned,
    pattern: Pattern,
    sparsity: float,
    priors: Mapping[str, MaskSet],
    *,
    seed: int,
    device: torch.device,
    sharded: bool = False,
    compiled: bool = False,
) -> LearnableMasks:
    """The learnable masks, in the model and on the device, ready for a trainer.

    sharded: split every block's weights and 2:4 logits over all processes (FSDP2); tile logits stay whole.
    """
    masks = LearnableMasks(model, method, pattern, sparsity, priors, seed=seed, device=device)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for block in masks.blocks:
            fully_shard(block)
    else:
        masks.accumulate_in_place()
    if compiled:
        masks.call = torch.compile(run_block, dynamic=False)
    return masks


class Trainer:
    """One run: the optimiser, the data order and the curves."""

    def __init__(
        self,
        model: PreTrainedModel,
        masks: LearnableMasks,
        training: TokenSet,
        seed: int,
        key: str = "",
        state: Path | None = None,
        observe: Callable[[Row], None] | None = None,
    ):
        self.masks, self.method, self.seed = masks, masks.method, seed
        self.sequences = Shuffled(training.ids, seed)
        self.length = training.ids.shape[1]
        self.schedule = Schedule(masks.method, masks.sparsity)
        self.loss = NextTokenLoss(model)
        self.vocabulary = vocabulary_size(model)
        self.model = model
        self.curves: list[Row] = []
        self.observe = observe
        self._state, self._key = state, key
        self.micro_batches = self.method.batch_size // self.method.micro_batch_size // distributed.world_size()

    @property
    def sharded(self) -> bool:
        return not self.masks.gradients and self.masks.learns_patterns

    def prepare(self) -> None:
        """Make the optimiser, and check that the loss is the model's own."""
        self.leaves = [_leaf(parameter) for parameter in self.masks.parameters()]
        self.optimizer = make_optimizer(self.method, self.leaves)
        shape = (self.method.micro_batch_size, self.length)
        self._batch = torch.zeros(shape, dtype=torch.int64, device=self.masks.device)
        self._norm_weight = torch.zeros((), device=self.masks.device)
        if self.masks.learns_tiles:
            self._tile_buffer = torch.zeros_like(self.masks.tile_logits)
        capture = self.masks.device.type == "cuda" and not self.sharded and self.method.noise == "micro_batch"
        self._micro_batch = Replayed(self._forward_backward, capture=capture)
        self.loss.check(self.model, self.sequences[range(1)].to(self.masks.device))

    def run(self) -> None:
        """All steps, from the last saved state on."""
        self.prepare()
        directory = self._state_directory()
        first = self._resume(directory) if directory else 0
        started, shown = time.perf_counter(), time.monotonic()
        with stop_on_signals() as request:
            for step in range(first, self.method.steps):
                row = self.step(step)
                self.curves.append(row)
                if distributed.is_main():
                    if self.observe:
                        self.observe(row)
                    if time.monotonic() - shown >= SECONDS_BETWEEN_LINES or step + 1 == self.method.steps:
                        shown = time.monotonic()
                        left = (time.perf_counter() - started) / (step + 1 - first) * (self.method.steps - step - 1)
                        log.info("%s", self._line(row, left))
                self._save_if_due(directory, step + 1, request)

    def step(self, step: int) -> Row:
        """One optimiser step, counted from 0; returns its row of the curves."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(step)
        self._norm_weight.fill_(self.schedule.norm_weight(step))
        self._clear_gradients()
        per_step = self.method.noise == "step"
        terms = torch.zeros(4, device=self.masks.device)
        if per_step:
            self._draw(step, step * distributed.world_size() + distributed.rank(), accumulate=False)
            self.masks.hold()
        for micro in range(self.micro_batches):
            number = micro * distributed.world_size() + distributed.rank()
            if not per_step:
                sample = step * (self.method.batch_size // self.method.micro_batch_size) + number
                self._draw(step, sample, accumulate=micro > 0)
            self._batch.copy_(self._ids_of(step, number), non_blocking=True)
            terms += self._micro_batch()
        if per_step:
            self.masks.held_norms()
            regularisers, terms[1:] = self._regularisers()
            self.masks.release(regularisers)
        if not self.sharded:
            distributed.average_(self.masks.gradients.values())
        distributed.average_([*self._tile_gradient(), terms])
        gradients = self._gradients()
        norm = self._norm(gradients)
        row = self._row(step, terms.tolist(), norm)
        self._check_finite(step, row)
        apply(self.optimizer, gradients, (self.method.max_grad_norm / (norm + 1e-6)).clamp_max(1.0))
        tokens = self.method.batch_size * self.length
        seconds = time.perf_counter() - started
        return row | {"tokens_per_second": tokens / seconds, "wall_s": seconds}

    def _forward_backward(self) -> Tensor:
        """One micro-batch; returns its part of (cross-entropy, |density - target|, density, norm term)."""
        per_step = self.method.noise == "step"
        if not per_step:
            self.masks.sample()
        cross_entropy = self.loss(self._batch)
        total, values = cross_entropy, torch.zeros(3, device=self.masks.device)
        if not per_step:
            regularisers, values = self._regularisers()
            total = total + regularisers
        (total / self.micro_batches).backward()
        if not per_step:
            self.masks.forget()
        return torch.cat([cross_entropy.detach().view(1), values]) / self.micro_batches

    def _regularisers(self) -> tuple[Tensor, Tensor]:
        """Their weighted sum, differentiable, and float32 [3]: |density - target|, density, norm term."""
        total = torch.zeros((), device=self.masks.device)
        values = torch.zeros(3, device=self.masks.device)
        if isinstance(self.method, LearnedTiles):
            density = self.masks.density()
            miss = (density - (1 - self.masks.sparsity)).abs().sum()
            total = total + self.method.density_weight * miss
            values[0], values[1] = miss.detach(), density.detach().mean()
        else:
            values[1].fill_(0.5)  # an assignment would copy from the host, which no CUDA graph can hold
        if self.method.norm_weight > 0:
            norm = self.masks.norm_term()
            total = total - self._norm_weight * norm
            values[2] = norm.detach()
        return total, values

    def _draw(self, step: int, sample: int, *, accumulate: bool) -> None:
        self.masks.draw(sample, self.schedule.patterns(step), self.schedule.tiles(step), accumulate=accumulate)

    def _ids_of(self, step: int, micro: int) -> Tensor:
        """Token ids [micro_batch_size, length] of a micro-batch, counted over all processes."""
        count = self.method.micro_batch_size
        first = step * self.method.batch_size + micro * count
        return self.sequences[range(first, first + count)]

    # ---- gradients -------------------------------------------------------------------------------------------

    def _clear_gradients(self) -> None:
        """The kernels overwrite their buffers at the first micro-batch, so only autograd's have to go.

        The tiles' gradient stays in one place, where a CUDA graph adds to it.
        """
        if self.sharded:
            for block in self.masks.blocks:
                block.pattern_logits.grad = None  # type: ignore[union-attr]
        if self.masks.learns_tiles:
            self.masks.tile_logits.grad = self._tile_buffer.zero_()

    def _tile_gradient(self) -> list[Tensor]:
        return [self._tile_buffer] if self.masks.learns_tiles else []

    def _gradients(self) -> list[Tensor]:
        """Of all parameters in their order, as plain tensors: this process's part where they are sharded."""
        found = [*self.masks.gradients.values()]
        if self.sharded:
            found = [_local(block.pattern_logits.grad) for block in self.masks.blocks]  # type: ignore[union-attr,arg-type]
        return [*found, *self._tile_gradient()]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of all gradients together, over all processes."""
        squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2 for gradient in gradients]
        if self.sharded:
            whole = squares.pop() if self.masks.learns_tiles else torch.zeros((), device=self.masks.device)
            local = torch.stack(squares).sum()
            torch.distributed.all_reduce(local)
            squares = [local, whole]
        return torch.stack(squares).sum().sqrt()

    # ---- curves ----------------------------------------------------------------------------------------------

    def _row(self, step: int, terms: list[float], norm: Tensor) -> Row:
        cross_entropy, miss, density, norm_term = terms
        patterns, tiles = self.schedule.patterns(step), self.schedule.tiles(step)
        density_loss = miss * getattr(self.method, "density_weight", 0.0)
        return {
            "step": step + 1,
            "loss": cross_entropy + density_loss - self.schedule.norm_weight(step) * norm_term,
            "cross_entropy": cross_entropy,
            "density": density,
            "density_loss": density_loss,
            "norm_ratio": norm_term,
            "pattern_temperature": patterns.temperature,
            "pattern_scale": patterns.scale,
            "tile_temperature": tiles.temperature,
            "tile_scale": tiles.scale,
            "learning_rate": self.schedule.learning_rate(step),
            "gradient_norm": float(norm),
        }

    def _line(self, row: Row, left: float) -> str:
        return (
            f"step {row['step']:.0f}/{self.method.steps}, cross-entropy {row['cross_entropy']:.3f}, "
            f"density {row['density']:.3f}, learning rate {row['learning_rate']:.2g}, "
            f"{row['tokens_per_second']:,.0f} tokens/s, {duration(left)} left"
        )

    def _check_finite(self, step: int, row: Row) -> None:
        """Raise before the logits are touched, so the state that is kept is a good one."""
        problem = None
        for term in ("cross_entropy", "density_loss", "norm_ratio", "gradient_norm"):
            if problem is None and not math.isfinite(row[term]):
                problem = f"{term} is {row[term]}; load the model in bfloat16 or float32, or"
        if problem is None and row["cross_entropy"] > DIVERGED * math.log(self.vocabulary):
            problem = f"cross_entropy is {row['cross_entropy']:.1f}, far worse than guessing;"
        if problem:
            raise PatchError(f"step {step + 1}: {problem} lower the learning rate. The last saved state is kept.")

    # ---- state -----------------------------------------------------------------------------------------------

    def _state_directory(self) -> StateDirectory | None:
        if self._state is None:
            return None
        identity = {
            "key": self._key,
            "method": self.method.model_dump(mode="json"),
            "pattern": str(self.masks.pattern),
            "sparsity": self.masks.sparsity,
            "seed": self.seed,
            "processes": distributed.world_size() if self.sharded else None,
        }
        return StateDirectory(self._state, identity, distributed.rank() if self.sharded else 0)

    def _resume(self, directory: StateDirectory) -> int:
        step = directory.newest()
        if step == 0:
            return 0
        state = directory.load(step)
        self._restore(state)
        log.info("going on after step %d of %d", step, self.method.steps)
        return step

    def _save_if_due(self, directory: StateDirectory | None, done: int, request: StopRequest) -> None:
        """Every few steps and before stopping, but not after the last step, when the masks are written at once."""
        if done == self.method.steps:
            return
        number = distributed.maximum(request.number, self.masks.device)
        if directory and (number or done % self.method.checkpoint_every == 0):
            if self.sharded or distributed.is_main():
                directory.save(State(done, self._tensors(), self.curves))
            distributed.barrier()
        if number:
            raise Stopped(done, number)

    def _tensors(self) -> dict[str, Tensor]:
        """Logits and optimiser state by name."""
        tensors: dict[str, Tensor] = {}
        for index, leaf in enumerate(self.leaves):
            tensors[f"logits.{index}"] = leaf.detach()
            tensors |= {f"state.{index}.{name}": torch.as_tensor(v) for name, v in self.optimizer.state[leaf].items()}
        for index, group in enumerate(self.optimizer.param_groups):
            tensors |= {f"group.{index}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
        return tensors

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        """Inverse of `_tensors`."""
        self.curves = list(state.curves)
        for name, value in state.tensors.items():
            kind, index, entry = [*name.split("."), ""][:3]
            if kind == "logits":
                self.leaves[int(index)].copy_(value)
            elif kind == "state":  # PyTorch's AdamW counts its steps on the CPU
                leaf = self.leaves[int(index)]
                self.optimizer.state[leaf][entry] = value if value.dim() == 0 else value.to(leaf.device)
            else:
                self.optimizer.param_groups[int(index)][entry].copy_(value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _leaf(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimiser updates: the parameter, or this process's part of a sharded one, in the same memory."""
    return nn.Parameter(_local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def _check(model: PreTrainedModel, method: Learned, sparsity: float, training: TokenSet, epochs: int) -> None:
    if model.dtype == torch.float16:
        raise PatchError(
            "mask learning in float16 loses small gradients; load the model with dtype bfloat16 or float32."
        )
    if not 0 <= sparsity <= 0.5:
        raise PatchError(f"sparsity {100 * sparsity:g} %: tiles that are dense or 2:4 reach 0 to 50 %, not more.")
    training.check_vocabulary(vocabulary_size(model))
    wanted, held = method.steps * method.batch_size, len(training.ids)
    if wanted > held * epochs:
        raise PatchError(
            f"too little training text: {method.steps} steps of {method.batch_size} sequences need {wanted:,}, there "
            f"are {held:,} (epochs: {epochs}); allow {math.ceil(wanted / held)} epochs, use more text, fewer steps or "
            "smaller batches."
        )
    share = method.micro_batch_size * distributed.world_size()
    if method.batch_size % share:
        raise PatchError(
            f"batch_size {method.batch_size}: does not divide into micro-batches of {method.micro_batch_size} on "
            f"{distributed.world_size()} processes."
        )


def _check_density(masks: MaskSet, method: Learned, sparsity: float) -> None:
    if isinstance(method, LearnedTiles) and abs(masks.sparsity - sparsity) > DENSITY_TOLERANCE:
        raise PatchError(
            f"the masks end at {100 * masks.sparsity:.1f} % sparsity, the target is {100 * sparsity:.1f} %: raise "
            "density_weight or the number of steps, lower norm_weight, or use selection topk. The last state is kept."
        )
