"""The cost of one mask-learning step beside the official code's and beside a dense step without any masks.

A step is one optimiser step, of one sequence unless said otherwise. All contenders run the same model with random
weights in bfloat16 on one GPU:

* ours: the trainer's own step.
* official: the official code (`patch.benchmarking.official`), eager and with its mask function and the blocks compiled.
* dense: our trainer's model, loss, checkpointing, compiled blocks and optimiser, with gradients for the linear weights
  and no mask work: what a step costs before masks come in.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patch.artefacts import PatchError
from patch.benchmarking.official import OfficialLearning
from patch.benchmarking.shapes import random_model, random_tokens, without_priors
from patch.kernels.adamw import FusedAdamW
from patch.learning.graphs import Replayed
from patch.learning.objective import NextTokenLoss
from patch.learning.parametrisation import run_block
from patch.learning.readback import Readback
from patch.learning.trainer import Trainer, make_masks
from patch.methods import Learned, make_method
from patch.models import decoder_blocks, prunable_linears
from patch.provenance import stamp
from patch.sparsity.patterns import Pattern

WARM_UP, REPEATS = 5, 10
SPARSITY, TILE = 0.45, (128, 128)
_COMPACT = {"optimizer": "adamw_8bit", "logits_dtype": "bfloat16", "gradient_dtype": "bfloat16"}
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": _COMPACT | {"checkpointing": "off"},
    "lean": _COMPACT | {"checkpointing": "all"},
    "default": {},
}
"""Hyper-parameters on top of the method's defaults. fast: keep activations. lean: compute them and the effective
weights again. default: the paper's, everything in float32, activations computed again."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    milliseconds: float
    """Median of a step."""
    peak_gib: float
    """Largest allocated device memory during the steps, model included."""


def measure(
    shape: str, mode: str, settings: Sequence[str], tokens: int, official: Path | None, micro_batches: int = 1
) -> Iterator[dict[str, Any]]:
    """Rows of results/reference/mask_learning.csv, one for each setting.

    shape: one of SHAPES; mode: maskllm, patch_joint or patch_tile; official: checkout of Paramathic/patch, or None to
    leave its columns empty (as where its step does not fit the memory). micro_batches: sequences of `tokens` per
    optimiser step; the official code is timed with one.
    """
    if not torch.cuda.is_available():
        raise PatchError("benchmark learning: needs a CUDA GPU.")
    theirs = compiled = None
    if official is not None:
        peer = partial(official_steps, shape, _method(mode, "default", 1), tokens, official)
        theirs = _cost("official", partial(peer, compiled=False))
        compiled = _cost("official, compiled", partial(peer, compiled=True))
    for setting in settings:
        method = _method(mode, setting, micro_batches)
        ours = _cost(f"ours, {setting}", partial(our_steps, shape, method, tokens))
        dense = _cost(f"dense, {setting}", partial(dense_steps, shape, method, tokens))
        row: dict[str, Any] = {
            "model": shape,
            "mode": mode,
            "setting": setting,
            "tokens": tokens * micro_batches,
            "ours_ms": ours.milliseconds,
            "official_ms": theirs.milliseconds if theirs else None,
            "compiled_official_ms": compiled.milliseconds if compiled else None,
            "dense_step_ms": dense.milliseconds,
            "speedup": theirs.milliseconds / ours.milliseconds if theirs else None,
            "overhead_over_dense": ours.milliseconds / dense.milliseconds,
            "ours_peak_gib": ours.peak_gib,
            "official_peak_gib": theirs.peak_gib if theirs else None,
            "memory_ratio": ours.peak_gib / theirs.peak_gib if theirs else None,
        }
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        yield rounded | stamp()


Step = Callable[[], None]


def _method(mode: str, setting: str, micro_batches: int) -> Learned:
    method = make_method(mode, SETTINGS[setting] | {"steps": 10_000, "batch_size": micro_batches})
    assert isinstance(method, Learned)
    return without_priors(method)


def our_steps(shape: str, method: Learned, tokens: int) -> Iterator[Step]:
    model = random_model(shape, "cuda")
    pattern = Pattern.parse("2:4" if method.title == "MaskLLM" else f"tiles:{TILE[0]}x{TILE[1]}")
    masks = make_masks(model, method, pattern, SPARSITY, {}, seed=0, device=torch.device("cuda"), compiled=True)
    trainer = Trainer(model, masks, random_tokens(model, tokens), seed=0)
    trainer.prepare()
    count = iter(range(10_000))

    def step() -> None:
        trainer.step(next(count))

    yield step


def dense_steps(shape: str, method: Learned, tokens: int) -> Iterator[Step]:
    model = random_model(shape, "cuda")
    ids = random_tokens(model, tokens).ids
    weights = [linear.weight.requires_grad_() for linear in prunable_linears(model).values()]
    _, blocks = decoder_blocks(model)
    compiled = torch.compile(run_block, dynamic=False)
    for block in blocks:
        own = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
        block.forward = _dense_forward(block, own, compiled, method.checkpointing != "off")
    loss_of = NextTokenLoss(model)
    bits = 8 if method.optimizer == "adamw_8bit" else 32
    optimizer = FusedAdamW(weights, lr=1e-9, betas=method.betas, state_bits=bits, stochastic_rounding=True)
    batch = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")

    def forward_backward() -> Tensor:
        if method.batch_size == 1:
            for weight in weights:
                weight.grad = None  # overwritten rather than added to, as in our trainer
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    micro_batch = Replayed(forward_backward, capture=True)
    count = iter(range(10_000))

    def step() -> None:
        if method.batch_size > 1:
            for weight in weights:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        for _ in range(method.batch_size):
            batch.copy_(ids[next(count) % len(ids)].view(1, -1), non_blocking=True)
            loss = micro_batch()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().float()
        number = Readback(loss.view(1))
        optimizer.step(gradients=gradients, gradient_scale=(1 / (norm + 1e-6)).clamp_max(1.0))
        number.tolist()

    yield step


def _dense_forward(
    block: nn.Module, weights: Mapping[str, Tensor], compiled: Callable[..., Any], checkpointing: bool
) -> Callable[..., Any]:
    def forward(hidden: Tensor, *positional: Any, **named: Any) -> Any:
        def compute(hidden: Tensor) -> Any:
            vars(block).pop("forward")  # the class's own, or the compiled call would come back here
            try:
                return compiled(block, weights, hidden, positional, named)
            finally:
                block.forward = forward

        if not checkpointing:
            return compute(hidden)
        return checkpoint(compute, hidden, use_reentrant=False, preserve_rng_state=False)

    return forward


def official_steps(shape: str, method: Learned, tokens: int, checkout: Path, *, compiled: bool) -> Iterator[Step]:
    model = random_model(shape, "cuda")
    official = OfficialLearning(model, method, SPARSITY, TILE, checkout, compiled=compiled)
    ids = random_tokens(model, tokens).ids
    count = iter(range(10_000))

    def step() -> None:
        number = next(count)
        official.step(number, [ids[number % len(ids)].view(1, -1).to("cuda").long()])

    yield step


def _cost(name: str, make: Callable[[], Iterator[Step]]) -> Cost:
    """Of the steps that `make` makes, in a process of their own: contenders leave memory and compiled code behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        cost = process.submit(_measured, make).result()
    log.info("%s: %.1f ms, %.2f GiB", name, cost.milliseconds, cost.peak_gib)
    return cost


def _measured(make: Callable[[], Iterator[Step]]) -> Cost:
    """Median time from step to step as they follow each other in a run, and the peak memory.

    The peak counts from the second step on, those before the capture of a CUDA graph included: what lives inside
    a graph does not show in the allocator's statistics while it is replayed, and before the capture it lives outside.
    """
    step = next(make())
    step()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    moments = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    moments[0].record()
    for moment in moments[1:]:
        step()
        moment.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(moments)]
    return Cost(statistics.median(times), torch.cuda.max_memory_allocated() / 2**30)
