"""Learning masks on frozen weights: the steps (PATCH section 6.7; the official `fine_tune_mask.py`).

    for every step:  for every micro-batch:  draw noise, forward, loss, backward
                     clip, optimiser step, curves

`patch.learning.loop` goes around it: data order, states, stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.learning import distributed
from patch.learning.graphs import Replayed
from patch.learning.loop import LearnedMasks, Loop, Row, check_training, gradient_norm, out_of_memory
from patch.learning.memory import memory_estimate
from patch.learning.optimizers import apply, make_optimizer
from patch.learning.parametrisation import LearnableMasks, run_block
from patch.learning.readback import Readback
from patch.learning.schedules import MaskSchedule
from patch.learning.selection import final_masks
from patch.learning.state import State, kept
from patch.methods import Learned, LearnedTiles
from patch.models import prunable_linears
from patch.sparsity.maskset import MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

DENSITY_TOLERANCE = 0.05
"""A final density further than this from its target is an error, not a result."""


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
    compiled: compile the decoder blocks; default on GPUs. observe: called with every step's row and `seconds_left`,
    on the main process.
    Raises PatchError for a divergence, too little text, a density that is not reached, or memory that does not
    suffice, each with its remedy; Stopped after a signal, when the state is saved.
    """
    if not 0 <= sparsity <= 0.5:
        raise PatchError(f"sparsity {100 * sparsity:g} %: tiles that are dense or 2:4 reach 0 to 50 %, not more.")
    check_training(model, method, training, epochs)
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
            if isinstance(method, LearnedTiles) and abs(result.sparsity - sparsity) > DENSITY_TOLERANCE:
                trainer.save_last()
                raise _density_missed(result.sparsity, sparsity, state)
        finally:
            masks.remove()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(
            estimate,
            "optimizer adamw_8bit, gradient_dtype and logits_dtype bfloat16, checkpointing, several GPUs with --shard, "
            "or shorter sequences",
            state,
        ) from error
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


class Trainer(Loop):
    """One run: the optimiser, the micro-batches and the gradients."""

    method: Learned
    schedule: MaskSchedule
    terms = ("cross_entropy", "density_loss", "norm_ratio", "gradient_norm")

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
        schedule = MaskSchedule(masks.method, masks.sparsity)
        super().__init__(model, masks.method, schedule, masks.device, training, seed, key, state, observe)
        self.masks = masks

    @property
    def sharded(self) -> bool:  # type: ignore[override]
        return not self.masks.gradients and self.masks.learns_patterns

    def identity(self) -> dict[str, Any]:
        return {"pattern": str(self.masks.pattern), "sparsity": self.masks.sparsity}

    def prepare(self) -> None:
        """Make the optimiser, and check that the loss is the model's own."""
        self.leaves = [_leaf(parameter) for parameter in self.masks.parameters()]
        self.optimizer = make_optimizer(
            self.method, self.leaves, stochastic_rounding=self.method.logits_dtype == "bfloat16"
        )
        shape = (self.method.micro_batch_size, self.length)
        self._batch = torch.zeros(shape, dtype=torch.int64, device=self.masks.device)
        self._norm_weight = torch.zeros((), device=self.masks.device)
        if self.masks.learns_tiles:
            self._tile_buffer = torch.zeros_like(self.masks.tile_logits)
        capture = self.masks.device.type == "cuda" and not self.sharded and self.method.noise == "micro_batch"
        self._micro_batch = Replayed(self._forward_backward, capture=capture)
        self.loss.check(self.model, self.sequences[range(1)].to(self.masks.device))

    def update(self, step: int) -> Row:
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
            self._batch.copy_(self.ids_of(step, number), non_blocking=True)
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
        # Read while the optimiser runs, so that the device never waits for the host. A step that turns out to be
        # not finite has spoilt the logits by then, but no state with them is saved.
        numbers = Readback(torch.cat([terms, norm.view(1)]))
        apply(self.optimizer, gradients, (self.method.max_grad_norm / (norm + 1e-6)).clamp_max(1.0))
        return self._row(step, numbers.tolist())

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

    def restore(self, state: State) -> None:
        super().restore(state)
        if self.sharded:
            for block in self.masks.blocks:
                block.reshard()  # type: ignore[operator]  # or what `prepare` gathered would be used once more

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
        whole = self._tile_gradient()
        if self.sharded:
            squares = gradient_norm(gradients[: len(gradients) - len(whole)]) ** 2
            torch.distributed.all_reduce(squares)
        elif self.masks.learns_patterns and distributed.world_size() == 1:
            squares = self.masks.all_squares.sum()  # of the last backward pass, which had the gradients at hand
        else:
            return gradient_norm(gradients)
        return (squares + (gradient_norm(whole) ** 2 if whole else 0)).sqrt()

    # ---- curves ----------------------------------------------------------------------------------------------

    def sharpness(self, row: Row) -> str:
        learned = {"pattern": self.masks.learns_patterns, "tile": self.masks.learns_tiles}
        found = [f"{row[f'{part}_temperature']:.3g} ({part}s)" for part, learns in learned.items() if learns]
        return f"temperature {' and '.join(found)}, "

    def _row(self, step: int, numbers: list[float]) -> Row:
        """numbers: the four terms of `_forward_backward`, and the norm of all gradients."""
        cross_entropy, miss, density, norm_term, gradient_norm = numbers
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
            "gradient_norm": gradient_norm,
        }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _leaf(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimiser updates: the parameter, or this process's part of a sharded one, in the same memory."""
    return nn.Parameter(_local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def _density_missed(reached: float, target: float, state: Path | None) -> PatchError:
    saved = kept(state)
    remedy = "or use selection topk" + (", which goes on from there." if saved else ".")
    return PatchError(
        f"the masks end at {100 * reached:.1f} % sparsity, the target is {100 * target:.1f} %.{saved} Raise "
        f"density_weight or the number of steps, lower norm_weight, {remedy}"
    )
