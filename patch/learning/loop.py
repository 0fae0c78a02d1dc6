"""The loop that everything that trains here shares.

    for every step:  gradients of all micro-batches, optimiser step, curves
                     save every k steps or when asked to stop

Everything that changes over a run is a function of the step and the seed, so a resumed run continues exactly.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.learning import distributed
from patch.learning.objective import NextTokenLoss
from patch.learning.order import Shuffled
from patch.learning.schedules import Schedule
from patch.learning.state import State, StateDirectory, kept
from patch.learning.stopping import Stopped, StopRequest, stop_on_signals
from patch.methods import Trained
from patch.models import vocabulary_size
from patch.progress import duration
from patch.sparsity.maskset import MaskSet

SECONDS_BETWEEN_LINES = 10.0
SAVING = 0.1
"""Largest share of a run's time that goes into its states: on a slow disk, those of a small model take many steps."""
DIVERGED = 3.0
"""A cross-entropy of so many times ln(vocabulary), that of guessing, ends the run."""
log = logging.getLogger(__name__)

Row = dict[str, float]


@dataclass(frozen=True)
class LearnedMasks:
    """What a finished run leaves."""

    masks: MaskSet
    curves: list[Row]
    """One row per optimiser step."""


class Loop(ABC):
    """One run: the data order, the curves and the states."""

    leaves: list[nn.Parameter]
    """What the optimiser updates."""
    optimizer: torch.optim.Optimizer
    sharded = False
    """Whether every process holds a part of the leaves, and saves its own state."""
    terms: tuple[str, ...] = ("cross_entropy", "gradient_norm")
    """Entries of a row that have to stay finite."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Trained,
        schedule: Schedule,
        device: torch.device,
        training: TokenSet,
        seed: int,
        key: str = "",
        state: Path | None = None,
        observe: Callable[[Row], None] | None = None,
    ):
        """method: of which this reads what all trained methods share; state: directory for saved states.

        observe: called with every step's row and `seconds_left`, on the main process.
        """
        self.model, self.method, self.schedule, self.device, self.seed = model, method, schedule, device, seed
        self.sequences = Shuffled(training.ids, seed)
        self.length = training.ids.shape[1]
        self.loss = NextTokenLoss(model)
        self.vocabulary = vocabulary_size(model)
        self.curves: list[Row] = []
        self.observe = observe
        self._state, self._key = state, key
        self.micro_batches = method.batch_size // method.micro_batch_size // distributed.world_size()
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0

    @abstractmethod
    def prepare(self) -> None:
        """Make the optimiser, and check that the loss is the model's own."""

    @abstractmethod
    def update(self, step: int) -> Row:
        """Gradients and one optimiser step, counted from 0, at the learning rate that is set; its row of the curves."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What determines the run besides method, seed and key (JSON)."""

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
                    left = (time.perf_counter() - started) / (step + 1 - first) * (self.method.steps - step - 1)
                    if self.observe:
                        self.observe(row | {"seconds_left": left})
                    if time.monotonic() - shown >= SECONDS_BETWEEN_LINES or step + 1 == self.method.steps:
                        shown = time.monotonic()
                        log.info("%s", self._line(row, left))
                self._save_if_due(directory, step + 1, request)

    def step(self, step: int) -> Row:
        """One optimiser step, counted from 0; returns its row of the curves."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(step)
        row = self.update(step)
        self._check_finite(step, row)
        seconds = time.perf_counter() - started
        tokens = row.pop("tokens", self.method.batch_size * self.length)
        return row | {"tokens_per_second": tokens / seconds, "wall_s": seconds}

    def ids_of(self, step: int, micro: int) -> Tensor:
        """Token ids [micro_batch_size, length] of a micro-batch, counted over all processes."""
        count = self.method.micro_batch_size
        first = step * self.method.batch_size + micro * count
        return self.sequences[range(first, first + count)]

    # ---- curves ----------------------------------------------------------------------------------------------

    def _line(self, row: Row, left: float) -> str:
        return (
            f"step {row['step']:.0f}/{self.method.steps}, loss {row['loss']:.3f}, "
            f"cross-entropy {row['cross_entropy']:.3f}, density {row['density']:.3f}, {self.sharpness(row)}"
            f"learning rate {row['learning_rate']:.2g}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{duration(left)} left"
        )

    def sharpness(self, row: Row) -> str:
        """What the line of a step says of its temperatures, where it has any, with a comma at the end."""
        return ""

    def _check_finite(self, step: int, row: Row) -> None:
        """Raise before any state is saved, so the one that is kept is good."""
        problem = None
        for term in self.terms:
            if problem is None and not math.isfinite(row[term]):
                problem = f"{term} is {row[term]}; load the model in bfloat16 or float32, or"
        if problem is None and row["cross_entropy"] > DIVERGED * math.log(self.vocabulary):
            problem = f"cross_entropy is {row['cross_entropy']:.1f}, far worse than guessing;"
        if problem:
            raise PatchError(f"step {step + 1}: {problem} lower the learning rate.{kept(self._state)}")

    # ---- state -----------------------------------------------------------------------------------------------

    def _state_directory(self) -> StateDirectory | None:
        if self._state is None:
            return None
        identity = {
            "key": self._key,
            # a selection is made when all steps are done, so another one goes on from the same states
            "method": self.method.model_dump(mode="json", exclude={"selection"}),
            "seed": self.seed,
            "processes": distributed.world_size() if self.sharded else None,
            **self.identity(),
        }
        return StateDirectory(self._state, identity, distributed.rank() if self.sharded else 0)

    def _resume(self, directory: StateDirectory) -> int:
        """Go on after the newest step that every process has saved: one of them may have been killed before its turn.

        Raises PatchError where processes find states from which they cannot go on together.
        """
        newest = directory.newest()
        step = distributed.minimum(newest, self.device)
        if not directory.leads_from(step) or (newest != step and not self.sharded):
            raise PatchError(
                f"{directory.directory}: process {distributed.rank()} finds a state after step {newest} there, another "
                f"process none after step {step}; put it on a disk that all nodes share, or delete it to start anew."
            )
        if step:
            self.restore(directory.load(step))
            log.info("going on after step %d of %d", step, self.method.steps)
        directory.discard_after(step)
        return step

    def _save_if_due(self, directory: StateDirectory | None, done: int, request: StopRequest) -> None:
        """Every few steps and before stopping, but not after the last step, when the masks are written at once."""
        if done == self.method.steps:
            return
        number = distributed.maximum(request.number, self.device)
        if directory and (number or self._due(done)):
            started = time.monotonic()
            self._save(directory, done)
            self._saved_at = time.monotonic()
            self._saving_seconds = self._saved_at - started
        if number:
            raise Stopped(done, number, saved=directory is not None)

    def save_last(self) -> None:
        """Save the state after the last step, for a run whose end has to be made again."""
        if directory := self._state_directory():
            self._save(directory, self.method.steps)

    def _save(self, directory: StateDirectory, done: int) -> None:
        if self.sharded or distributed.is_main():
            directory.save(State(done, self.tensors(), self.curves))
        distributed.barrier()

    def _due(self, done: int) -> bool:
        """Every few steps, but not so often that saving takes more than its share of the time; alike on all ranks."""
        if done % self.method.checkpoint_every:
            return False
        since = time.monotonic() - self._saved_at
        return bool(distributed.maximum(int(SAVING * since >= (1 - SAVING) * self._saving_seconds), self.device))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: leaves and optimiser state by name."""
        tensors: dict[str, Tensor] = {}
        for index, leaf in enumerate(self.leaves):
            tensors[f"leaf.{index}"] = leaf.detach()
            tensors |= {f"state.{index}.{name}": torch.as_tensor(v) for name, v in self.optimizer.state[leaf].items()}
        for index, group in enumerate(self.optimizer.param_groups):
            tensors |= {f"group.{index}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
        return tensors

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Inverse of `tensors`."""
        self.curves = list(state.curves)
        for name, value in state.tensors.items():
            kind, index, entry = [*name.split("."), ""][:3]
            if kind == "leaf":
                self.leaves[int(index)].copy_(value)
            elif kind == "state":  # PyTorch's AdamW counts its steps on the CPU
                leaf = self.leaves[int(index)]
                self.optimizer.state[leaf][entry] = value if value.dim() == 0 else value.to(leaf.device)
            else:
                self.optimizer.param_groups[int(index)][entry].copy_(value)


def check_training(model: PreTrainedModel, method: Trained, training: TokenSet, epochs: int) -> None:
    """Raise PatchError for a model that cannot train, for text that is too short or foreign, and for odd batches."""
    if model.dtype == torch.float16:
        raise PatchError("training in float16 loses small gradients; load the model with dtype bfloat16 or float32.")
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


def out_of_memory(estimate: dict[str, float], remedy: str, state: Path | None) -> PatchError:
    """estimate: GiB by component. remedy: what needs less. state: directory for saved states."""
    parts = ", ".join(f"{part} {size:g}" for part, size in estimate.items())
    return PatchError(f"out of memory; estimate in GiB: {parts}. Use {remedy}.{kept(state)}")


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, a float32 scalar."""
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2 for gradient in gradients]
    return torch.stack(squares).sum().sqrt()
