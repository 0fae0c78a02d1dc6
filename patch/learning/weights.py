"""Training the weights themselves: ProxSparse, and fine-tuning of a pruned model.

    for every step:  for every micro-batch:  forward, loss, backward
                     clip, optimiser step, the method's constraint on the weights, curves

`patch.learning.loop` goes around it: data order, states, stopping. Several processes average their gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import PADDING, TokenSet
from patch.kernels.proximal import proximal_, two_of_four
from patch.learning import distributed
from patch.learning.graphs import Replayed
from patch.learning.loop import LearnedMasks, Loop, Row, check_training, gradient_norm, out_of_memory
from patch.learning.memory import weights_memory_estimate
from patch.learning.optimizers import apply, make_optimizer
from patch.learning.readback import Readback
from patch.learning.schedules import Schedule
from patch.methods import FineTune, ProxSparse, TrainedWeights
from patch.models import decoder_blocks, prunable_linears
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern, keep_n_of_m


def train_weights(
    model: PreTrainedModel,
    method: TrainedWeights,
    pattern: Pattern,
    training: TokenSet,
    priors: Mapping[str, MaskSet],
    *,
    seed: int = 0,
    epochs: int = 1,
    device: torch.device | str = "cpu",
    state: Path | None = None,
    key: str = "",
    observe: Callable[[Row], None] | None = None,
) -> LearnedMasks:
    """Train the model's weights in place, on `device`, and return what that makes of its linears.

    training: token ids [sequences, length], padded where they are documents. priors: "start", the MaskSet that
    fine-tuning goes on from. Other arguments as in `patch.learning.learn_masks`.
    Raises PatchError for a divergence, too little text, a missing or foreign mask, or memory that does not suffice,
    each with its remedy; Stopped after a signal, when the state is saved.
    """
    check_training(model, method, training, epochs)
    if not {pattern.kind, str(pattern)} & set(method.patterns):
        raise PatchError(
            f"method {method.title}: cannot make the pattern {pattern}; it makes {', '.join(method.patterns)}."
        )
    for name, linear in prunable_linears(model).items():
        pattern.check_shape(linear.out_features, linear.in_features, name)
    estimate = weights_memory_estimate(model, method, training.ids.shape[1])
    run = (torch.device(device), training, seed, key, state, observe)
    trainer: WeightTrainer
    try:
        match method:
            case ProxSparse():
                trainer = ProxSparseTrainer(model, method, pattern, *run)
            case FineTune():
                trainer = FineTuneTrainer(model, method, pattern, priors, *run)
            case _:
                raise PatchError(f"method {method.title}: does not train weights.")
        with _recomputed(model, method), _differentiable(trainer.trained):
            trainer.run()
        return LearnedMasks(trainer.result(), trainer.curves)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(
            estimate,
            "optimizer adamw_8bit with rounding stochastic, gradient_dtype bfloat16, checkpointing activations, a "
            "smaller micro_batch_size or shorter sequences",
            state,
        ) from error


class WeightTrainer(Loop):
    """One run: which weights train, their gradients and their updates."""

    method: TrainedWeights
    trained: dict[str, nn.Parameter]
    """By their names in the model; in the order of `leaves`."""

    def __init__(
        self, model: PreTrainedModel, method: TrainedWeights, pattern: Pattern, device: torch.device, *run: Any
    ):
        """run: training text, seed, key, state, observe, as for `Loop`."""
        self.pattern = pattern
        self.base = fingerprint(prunable_linears(model))
        model.to(device)  # type: ignore[arg-type]
        super().__init__(model, method, Schedule(method), device, *run)

    @abstractmethod
    def adjust_(self, gradients: list[Tensor]) -> Tensor:
        """Change gradients in place before they are clipped; returns what the method adds to the loss, a scalar."""

    @abstractmethod
    def constrain_(self) -> None:
        """Change the leaves in place after an optimiser step."""

    @abstractmethod
    def shares(self) -> dict[str, Tensor | float]:
        """`density` and what else describes the leaves, for the curves."""

    @abstractmethod
    def result(self) -> MaskSet:
        """Of the trained weights."""

    def identity(self) -> dict[str, Any]:
        return {"pattern": str(self.pattern), "model": self.base}

    def prepare(self) -> None:
        parameters = list(self.trained.values())
        halves = self.model.dtype == torch.bfloat16
        copied = self.method.rounding == "none" and halves
        self.leaves = [nn.Parameter(p.detach().float()) if copied else p for p in parameters]
        self.optimizer = make_optimizer(
            self.method, self.leaves, stochastic_rounding=self.method.rounding == "stochastic"
        )
        # Packed text always has the same shape; of documents, what is not padding differs from one to the next.
        self._whole = not bool((self.sequences.ids == PADDING).any())
        self._batch = torch.zeros(self.method.micro_batch_size, self.length, dtype=torch.int64, device=self.device)
        self._micro_batch = Replayed(self._forward_backward, capture=self._whole and self.device.type == "cuda")
        self._sums: list[Tensor] = []
        if halves and self.micro_batches > 1 and self.method.gradient_dtype == "float32":
            self._sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.loss.check(self.model, self.sequences[range(1)].to(self.device))

    def update(self, step: int) -> Row:
        cross_entropy, tokens = torch.zeros(1, device=self.device), 0
        self._clear()
        for total in self._sums:
            total.zero_()
        for micro in range(self.micro_batches):
            ids = self.ids_of(step, micro * distributed.world_size() + distributed.rank())
            tokens += int((ids != PADDING).sum()) * distributed.world_size()
            if self._whole:
                self._batch.copy_(ids, non_blocking=True)
            else:
                self._batch = _without_padding(ids).to(self.device).long()
            cross_entropy += self._micro_batch()
            self._accumulate()
        gradients = self._gradients()
        distributed.average_([*gradients, cross_entropy])
        with torch.no_grad():
            added = self.adjust_(gradients)
            norm = gradient_norm(gradients)
            apply(self.optimizer, gradients, (self.method.max_grad_norm / (norm + 1e-6)).clamp_max(1.0))
            self.constrain_()
            for parameter, leaf in zip(self.trained.values(), self.leaves, strict=True):
                if parameter is not leaf:
                    parameter.copy_(leaf)
            shares = {name: torch.as_tensor(share, device=self.device) for name, share in self.shares().items()}
        terms = [cross_entropy[0], added, norm, *shares.values()]
        numbers = Readback(torch.stack([term.float() for term in terms])).tolist()
        return {
            "step": step + 1,
            "loss": numbers[0] + numbers[1],
            "cross_entropy": numbers[0],
            "learning_rate": self.schedule.learning_rate(step),
            "gradient_norm": numbers[2],
            "tokens": tokens,
            **dict(zip(shares, numbers[3:], strict=True)),
        }

    def _forward_backward(self) -> Tensor:
        """One micro-batch; returns its part of the cross-entropy, [1]."""
        loss = self.loss(self._batch) / self.micro_batches
        loss.backward()
        return loss.detach().view(1)

    def _accumulate(self) -> None:
        """Add the micro-batch's gradients to the float32 sums, where there are any."""
        if not self._sums:
            return
        for parameter, total in zip(self.trained.values(), self._sums, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
        self._clear()

    def _clear(self) -> None:
        """Gradients stay where they are: a CUDA graph adds to them there."""
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def _gradients(self) -> list[Tensor]:
        """Of all leaves, in a precision that the optimiser takes."""
        found = self._sums or [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained.values()]
        if self.method.fused:
            return found
        return [gradient.to(leaf.dtype) for gradient, leaf in zip(found, self.leaves, strict=True)]

    def _leaves_of_linears(self) -> dict[str, Tensor]:
        """What the optimiser keeps of every prunable weight, by the linear's name."""
        leaves = dict(zip(self.trained, self.leaves, strict=True))
        return {name: leaves[f"{name}.weight"].detach() for name in prunable_linears(self.model)}


class ProxSparseTrainer(WeightTrainer):
    """All parameters train, as in the reference; the proximal operator follows on the linears of the decoder blocks."""

    method: ProxSparse

    def __init__(self, model: PreTrainedModel, method: ProxSparse, pattern: Pattern, *run: Any):
        super().__init__(model, method, pattern, *run)
        self.trained = dict(model.named_parameters())
        self._original: dict[str, Tensor] = {}
        if method.anchor_weight > 0:
            self._original = {
                f"{name}.weight": linear.weight.detach().clone() for name, linear in prunable_linears(model).items()
            }

    def adjust_(self, gradients: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for name, gradient, leaf in zip(self.trained, gradients, self.leaves, strict=True):
            if name in self._original:
                value, slope = anchor(leaf.float(), self._original[name].float(), self.method.anchor_epsilon)
                gradient.add_(slope, alpha=self.method.anchor_weight)
                total += self.method.anchor_weight * value
        return total

    def constrain_(self) -> None:
        for weight in self._leaves_of_linears().values():
            proximal_(weight, self.method.proximal_weight)

    def shares(self) -> dict[str, Tensor | float]:
        weights = list(self._leaves_of_linears().values())
        size = sum(weight.numel() for weight in weights)
        kept = torch.stack([weight.count_nonzero() for weight in weights]).sum()
        sparse = torch.stack([two_of_four(weight) for weight in weights]).sum()
        return {"density": kept / size, "two_of_four": sparse / (size / 4)}

    def result(self) -> MaskSet:
        """The 2 largest of every 4 trained weights, for the original ones."""
        masks = {
            name: LinearMask.from_keep_mask(keep_n_of_m(weight.abs(), 2, 4), self.pattern).to("cpu")
            for name, weight in self._leaves_of_linears().items()
        }
        return MaskSet(masks, self.base)


class FineTuneTrainer(WeightTrainer):
    """The kept weights of all linears train; everything else stays as it is, biases, norms and embeddings too."""

    method: FineTune

    def __init__(
        self, model: PreTrainedModel, method: FineTune, pattern: Pattern, priors: Mapping[str, MaskSet], *run: Any
    ):
        if "start" not in priors:
            raise PatchError("method Fine-tuned: needs a start mask; make it with `patch-llm prune` or `learn`.")
        self.start = priors["start"]
        for name, mask in self.start.linears.items():
            if mask.pattern.kind != "dense" and mask.pattern != pattern.for_layer(*mask.shape):
                raise PatchError(f"layer {name}: the start mask is {mask.pattern}, not {pattern} as asked for.")
        super().__init__(model, method, pattern, *run)
        linears = prunable_linears(model)
        self.start.apply_(linears)
        self.trained = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in linears}
        self._pruned = [~self.start.linears[name].keep_mask().to(self.device) for name in linears]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"start": self.start.checksum}

    def adjust_(self, gradients: list[Tensor]) -> Tensor:
        for gradient, pruned in zip(gradients, self._pruned, strict=True):
            gradient.masked_fill_(pruned, 0)
        return torch.zeros((), device=self.device)

    def constrain_(self) -> None:
        for leaf, pruned in zip(self.leaves, self._pruned, strict=True):
            leaf.masked_fill_(pruned, 0)

    def shares(self) -> dict[str, Tensor | float]:
        return {"density": 1 - self.start.sparsity}

    def tensors(self) -> dict[str, Tensor]:
        self.verify()
        return super().tensors()

    def verify(self) -> None:
        """Raise PatchError unless every pruned weight is exactly 0, in the model and in the optimiser's copy."""
        for (name, parameter), leaf, pruned in zip(self.trained.items(), self.leaves, self._pruned, strict=True):
            wrong = int(parameter[pruned].count_nonzero() + leaf[pruned].count_nonzero())
            if wrong:
                raise PatchError(
                    f"{name}: {wrong} pruned weights are not 0 any more; the last saved state is good, start again "
                    "from it."
                )

    def result(self) -> MaskSet:
        """The masks of the start with the trained weights as their values."""
        self.verify()
        masks = {
            name: dataclasses.replace(mask, values=self.trained[f"{name}.weight"].detach()[~pruned].cpu())
            for (name, mask), pruned in zip(self.start.linears.items(), self._pruned, strict=True)
        }
        return MaskSet(masks, self.base)


def anchor(weight: Tensor, original: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """ProxSparse's frozen-weight term, ||W (W - W0) / (W0 + epsilon * sign(W0))||^2, and its derivative by W.

    weight, original: float32 [out, in]; the sign of 0 is 1. The term is 0 for weights at their original value, and for
    those that are pruned.
    """
    divisor = original + torch.where(original < 0, -epsilon, epsilon)
    ratio = weight * (weight - original) / divisor
    return ratio.square().sum(), 2 * ratio * (2 * weight - original) / divisor


def _without_padding(ids: Tensor) -> Tensor:
    """ids [sequences, length], cut to the longest sequence."""
    return ids[:, : int((ids != PADDING).sum(1).max())]


@contextlib.contextmanager
def _differentiable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    for parameter in parameters.values():
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@contextlib.contextmanager
def _recomputed(model: PreTrainedModel, method: TrainedWeights) -> Iterator[None]:
    """Let the backward pass compute each decoder block's activations again, where the method says so."""
    blocks = list(decoder_blocks(model)[1]) if method.checkpointing == "activations" else []
    for block in blocks:
        block.forward = _checkpointed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # what lay over the class's own


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputing(*positional: Any, **named: Any) -> Any:
        # decoder blocks in evaluation mode draw no random numbers
        return checkpoint(forward, *positional, use_reentrant=False, preserve_rng_state=False, **named)

    return recomputing
