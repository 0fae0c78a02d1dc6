"""The learnable masks of a model: logits, how they sit in its decoder blocks, and one sample of all of them.

Every linear W [out, in] of a decoder block computes with W * M instead of W, where

    M = t + (1 - t) * M24

t is the sampled density of the weight's tile, M24 the sampled 2:4 mask (PATCH section 6.3, equations 6.1-6.4).
PATCH-Joint learns both, PATCH-Tile only t on a frozen M24, MaskLLM only M24 (t = 0). Weights are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.kernels.soft_mask import Sampling, effective_weight, square_sums
from patch.learning.priors import codes_of_mask, pattern_offsets, random_logits, tile_offsets
from patch.learning.schedules import Sharpness
from patch.methods import Learned, LearnedPatterns, LearnedTiles, MaskLLM
from patch.models import decoder_blocks
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern
from patch.sparsity.tiles import grid_shape, tile_sums

LOGITS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16_nearest": torch.bfloat16}
_TILE_STREAM = 0x9E3779B9
"""Keeps the noise of the tiles apart from everything else that is seeded."""


@dataclass(frozen=True)
class MaskedLinear:
    """One masked linear: its place in the model, and where its logits are in the flat tensors."""

    index: int
    """Number in the model: its noise stream."""
    name: str
    """Full name in the model."""
    name_in_block: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    grid: tuple[int, int]
    """Tile rows and columns; (0, 0) without tiles."""
    first_logit: int
    """Of its planar 2:4 logits [6, out, in / 4] in the block's flat tensor."""

    @property
    def logits(self) -> int:
        """Number of 2:4 logits: 1.5 per weight."""
        return 6 * self.shape[0] * self.shape[1] // 4

    @property
    def tiles(self) -> int:
        return self.grid[0] * self.grid[1]


class MaskedBlock(nn.Module):
    """A decoder block whose linears compute with sampled effective weights; takes the block's place in the model."""

    def __init__(self, block: nn.Module, linears: list[MaskedLinear], masks: LearnableMasks):
        super().__init__()
        self.block = block
        self.linears = linears
        self.pattern_logits: nn.Parameter | None = None
        """Flat, planar per linear; None where the patterns are frozen."""
        self._masks = (masks,)  # in a tuple, so that it is no submodule

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Any:
        masks = self._masks[0]
        recompute = masks.method.checkpointing if torch.is_grad_enabled() else "off"
        kept = None if recompute == "all" else masks.weights_of(self)

        def compute(hidden: Tensor) -> tuple[Any, Tensor]:
            weights, norms = kept or masks.weights_of(self)
            return masks.call(self.block, weights, hidden, positional, named), norms

        if recompute == "off":
            output, norms = compute(hidden)
        else:
            # decoder blocks in evaluation mode draw no random numbers of their own
            output, norms = checkpoint(compute, hidden, use_reentrant=False, preserve_rng_state=False)
        masks.squared_norms.append(norms)
        return output

    def effective_weights(self, sampling: Sampling, tile_samples: list[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """W * M of every linear, in order, and float32 [linears] of their squared norms."""
        hard = isinstance(self._masks[0].method, LearnedPatterns) and self._masks[0].method.hard_patterns
        results = [
            effective_weight(
                self.block.get_parameter(f"{linear.name_in_block}.weight"),
                self.patterns_of(linear),
                tile_samples[number],
                linear.tile,
                sampling,
                linear.index,
                hard=hard,
                gradient=self._gradient_of(linear),
                gradient_squares=self._masks[0].gradient_squares.get(linear.index),
            )
            for number, linear in enumerate(self.linears)
        ]
        return [weight for weight, _ in results], torch.stack([norm for _, norm in results])

    def patterns_of(self, linear: MaskedLinear) -> Tensor:
        """2:4 logits [6, out, in / 4], or the frozen codes uint8 [out, in / 4]."""
        if self.pattern_logits is None:
            return self.get_buffer(_buffer_name(linear))
        return _planar(self.pattern_logits, linear)

    @torch.no_grad()
    def final_codes(self) -> dict[str, Tensor]:
        """uint8 [out, in / 4] of every linear by full name: the pattern with the largest logit, or the frozen one."""
        if self.pattern_logits is None:
            return {linear.name: self.patterns_of(linear) for linear in self.linears}
        logits = self.pattern_logits
        whole = logits.full_tensor() if isinstance(logits, DTensor) else logits
        return {linear.name: _planar(whole, linear).argmax(dim=0).to(torch.uint8) for linear in self.linears}

    def _gradient_of(self, linear: MaskedLinear) -> Tensor | None:
        """The kernels add gradients of the logits in place, unless FSDP owns them."""
        buffer = self._masks[0].gradients.get(self)
        return None if buffer is None else _planar(buffer, linear)


class LearnableMasks:
    """All masks of one model during learning.

    Building it puts a `MaskedBlock` in the place of every decoder block; `remove` puts the blocks back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Learned,
        pattern: Pattern,
        sparsity: float,
        priors: Mapping[str, MaskSet],
        *,
        seed: int,
        device: torch.device,
    ):
        """Model and logits end up on `device`.

        sparsity: target share of pruned weights over all masked linears, at most 0.5.
        priors: "pattern", a 2:4 MaskSet (prior of the 2:4 logits, or the frozen mask of PATCH-Tile), and
        "reference", an unstructured MaskSet (prior of the tiles); one may be missing where its strength is 0.
        Raises PatchError where a prior is missing or belongs to another model, or where shapes do not divide.
        """
        self.method, self.pattern, self.sparsity, self.device = method, pattern, sparsity, device
        self.seed = seed
        self.learns_patterns = isinstance(method, LearnedPatterns)
        self.learns_tiles = isinstance(method, LearnedTiles)
        prefix, self._blocks = decoder_blocks(model)
        self._originals = list(self._blocks)
        self.squared_norms: list[Tensor] = []
        """float32 [linears] of every block, filled by the forward pass."""
        self.gradients: dict[MaskedBlock, Tensor] = {}
        """Flat buffers that the kernels add the 2:4 logits' gradients to."""
        self.gradient_squares: dict[int, Tensor] = {}
        """Of every linear by its number, a part of `all_squares` that every backward pass fills."""
        self.call = run_block
        """How a block computes with given weights; replaced by a compiled version on GPUs."""
        self._tile_samples: dict[MaskedBlock, list[Tensor | None]] = {}
        self._held: dict[MaskedBlock, tuple[list[Tensor], Tensor]] = {}
        self.sampling = Sampling(seed, 0, device)

        model.to(device)  # type: ignore[arg-type]
        index = 0
        for number, block in enumerate(self._originals):
            linears = self._linears_of(block, f"{prefix}.{number}.", index)
            index += len(linears)
            self._blocks[number] = MaskedBlock(block, linears, self)
        self.total_norm = {form: self._weight_norm(form) for form in ("ratio", "squared_ratio")}
        self._initialise(priors)

    # ---- structure -------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[MaskedBlock]:
        return list(self._blocks)  # type: ignore[arg-type]

    @property
    def linears(self) -> list[MaskedLinear]:
        return [linear for block in self.blocks for linear in block.linears]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that learns."""
        if self.learns_patterns:
            for block in self.blocks:
                assert block.pattern_logits is not None
                yield block.pattern_logits
        if self.learns_tiles:
            yield self.tile_logits

    def accumulate_in_place(self) -> None:
        """Give every block's 2:4 logits a gradient buffer that the kernels add to (not under FSDP).

        `all_squares`, float32, then sums up to the squared norm of these gradients after every backward pass.
        """
        dtype = torch.bfloat16 if self.method.gradient_dtype == "bfloat16" else torch.float32
        for block in self.blocks:
            if block.pattern_logits is not None:
                self.gradients[block] = torch.zeros_like(block.pattern_logits, dtype=dtype)
        if self.learns_patterns:
            parts = [
                square_sums(block.block.get_parameter(f"{linear.name_in_block}.weight"), linear.tile)
                for block in self.blocks
                for linear in block.linears
            ]
            self.all_squares = torch.zeros(sum(parts), device=self.device)
            numbers = [linear.index for linear in self.linears]
            self.gradient_squares = dict(zip(numbers, self.all_squares.split(parts), strict=True))

    def remove(self) -> None:
        """Put the model's own blocks back."""
        for number, block in enumerate(self._originals):
            self._blocks[number] = block

    # ---- one sample ------------------------------------------------------------------------------------------

    def draw(self, sample: int, patterns: Sharpness, tiles: Sharpness, *, accumulate: bool) -> None:
        """Draw the noise of one sample of all masks; the same number always draws the same.

        sample: counts micro-batches over all steps and processes, so no two of them share their noise, and
        several processes learn what one would. accumulate: add gradients to what is there, or overwrite it.
        Everything goes into tensors that stay where they are, so that a CUDA graph sees it.
        """
        self.sampling.set(sample, patterns.scale, patterns.temperature, accumulate)
        if self.learns_tiles:
            self._generator.manual_seed(_mix(self.seed, sample, _TILE_STREAM))
            torch.rand(len(self._uniform), generator=self._generator, out=self._uniform)
            self._tile_sharpness.copy_(torch.tensor([tiles.scale, tiles.temperature]), non_blocking=True)

    def sample(self) -> None:
        """Sample the tiles with the noise drawn last, differentiably; the blocks' forward passes then use them."""
        self.squared_norms.clear()
        if not self.learns_tiles:
            return
        scale, temperature = self._tile_sharpness
        hard = self.method.hard_tiles  # type: ignore[attr-defined]
        self.tile_sample = sample_tiles(self.tile_logits, self._uniform, scale, temperature, hard=hard)
        samples = iter(self.tile_sample.split([linear.tiles for linear in self.linears]))
        for block in self.blocks:
            self._tile_samples[block] = [next(samples).view(linear.grid) for linear in block.linears]

    def forget(self) -> None:
        """Drop the sample's autograd graph, which a CUDA graph must not find from outside."""
        self.squared_norms.clear()
        self._tile_samples.clear()
        if self.learns_tiles:
            del self.tile_sample

    def weights_of(self, block: MaskedBlock) -> tuple[dict[str, Tensor], Tensor]:
        """Effective weights of a block by parameter name, and the squared norms of its linears."""
        if block in self._held:
            weights, norms = self._held[block]
            norms = norms.detach()
        else:
            samples = self._tile_samples.get(block) or [None] * len(block.linears)
            weights, norms = block.effective_weights(self.sampling, samples)
        names = [f"{linear.name_in_block}.weight" for linear in block.linears]
        return dict(zip(names, weights, strict=True)), norms

    def density(self) -> Tensor:
        """Share of weights that the sample keeps: [1] over the model, or [blocks], float32, differentiable.

        Every 2:4 row of M24 sums to 2 whatever is sampled, so the density depends on the tiles alone.
        """
        kept = self.tile_sample * self.tile_sizes
        if self.method.density_target == "global":  # type: ignore[attr-defined]
            return 0.5 + 0.5 * kept.sum().view(1) / self.tile_sizes.sum()
        totals = kept.new_zeros(len(self.blocks))
        sizes = totals.index_add(0, self.block_of_tile, self.tile_sizes)
        return 0.5 + 0.5 * totals.index_add(0, self.block_of_tile, kept) / sizes

    def norm_term(self) -> Tensor:
        """The reward for large kept weights in the method's form, a scalar, before its weight."""
        squared = torch.cat([norms.flatten() for norms in self.squared_norms])
        form = self.method.norm_form
        if form.startswith("squared"):
            return squared.sum() / self.total_norm.get(form, 1.0)
        # at a norm of 0 the square root has no derivative; such a layer has no weights to reward
        return squared.clamp_min(1e-30).sqrt().sum() / self.total_norm.get(form, 1.0)

    # ---- one sample per optimiser step -----------------------------------------------------------------------

    def hold(self) -> None:
        """Materialise the effective weights once; forward passes use them until `release`."""
        self._held.clear()
        self.sample()
        self._sampled = [(block, *self._sampled_weights(block)) for block in self.blocks]
        for block, weights, norms in self._sampled:
            self._held[block] = ([weight.detach().requires_grad_() for weight in weights], norms)

    def held_norms(self) -> None:
        """Make `norm_term` that of the held weights, with its gradient."""
        self.squared_norms[:] = [norms for _, _, norms in self._sampled]

    def release(self, regularisers: Tensor) -> None:
        """Pass the gradients that the held weights gathered, and those of the regularisers, on to the logits."""
        outputs = [weight for _, weights, _ in self._sampled for weight in weights]
        gradients = [leaf.grad for block, _, _ in self._sampled for leaf in self._held[block][0]]
        if regularisers.requires_grad:  # in one pass, since the kernels overwrite their buffers
            outputs, gradients = [*outputs, regularisers], [*gradients, None]
        torch.autograd.backward(outputs, gradients)
        self._held.clear()
        self._sampled.clear()
        self.forget()

    def _sampled_weights(self, block: MaskedBlock) -> tuple[list[Tensor], Tensor]:
        weights, norms = self.weights_of(block)
        return list(weights.values()), norms

    # ---- building --------------------------------------------------------------------------------------------

    def _linears_of(self, block: nn.Module, prefix: str, index: int) -> list[MaskedLinear]:
        found: list[MaskedLinear] = []
        first_logit = 0
        for name, module in block.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            shape = (module.out_features, module.in_features)
            self.pattern.check_shape(*shape, prefix + name)
            tile = self.pattern.for_layer(*shape).tile if self.learns_tiles else shape
            grid = grid_shape(shape, tile) if self.learns_tiles else (0, 0)
            linear = MaskedLinear(index + len(found), prefix + name, name, shape, tile, grid, first_logit)
            first_logit += linear.logits
            found.append(linear)
        return found

    @torch.no_grad()
    def _initialise(self, priors: Mapping[str, MaskSet]) -> None:
        dtype = LOGITS_DTYPES[self.method.logits_dtype]
        generator = torch.Generator(self.device)
        generator.manual_seed(_mix(self.seed))
        self._check_priors(priors)
        for block in self.blocks:
            if self.learns_patterns:
                logits = torch.empty(sum(linear.logits for linear in block.linears), dtype=dtype, device=self.device)
                for linear in block.linears:
                    _planar(logits, linear).copy_(self._initial_patterns(linear, priors, generator))
                block.pattern_logits = nn.Parameter(logits)
            else:
                for linear in block.linears:
                    codes = codes_of_mask(priors["pattern"].linears[linear.name])
                    block.register_buffer(_buffer_name(linear), codes.to(self.device), persistent=False)
        if self.learns_tiles:
            tiles = [self._initial_tiles(linear, priors, generator) for linear in self.linears]
            sizes = [tile_sums(torch.ones(linear.shape), linear.tile).flatten() for linear in self.linears]
            self.tile_logits = nn.Parameter(torch.cat(tiles).to(dtype))
            self._uniform = torch.empty(len(self.tile_logits), device=self.device)
            self._tile_sharpness = torch.ones(2, device=self.device)
            self._generator = torch.Generator(self.device)
            self.tile_sizes = torch.cat(sizes).to(self.device)
            """float32 [tiles]: weights in every tile; fewer at ragged edges."""
            counts = torch.tensor([sum(linear.tiles for linear in block.linears) for block in self.blocks])
            self.block_of_tile = torch.arange(len(self.blocks)).repeat_interleave(counts).to(self.device)

    def _initial_patterns(
        self, linear: MaskedLinear, priors: Mapping[str, MaskSet], generator: torch.Generator
    ) -> Tensor:
        """MaskLLM adds its prior to random logits; PATCH's takes their place."""
        assert isinstance(self.method, LearnedPatterns)
        std, strength = self.method.init_std, self.method.pattern_prior_strength
        shape = (6, linear.shape[0], linear.shape[1] // 4)
        if strength == 0:
            return random_logits(shape, std, generator)
        codes = codes_of_mask(priors["pattern"].linears[linear.name]).to(self.device)
        offsets = pattern_offsets(codes, strength, std)
        return random_logits(shape, std, generator) + offsets if isinstance(self.method, MaskLLM) else offsets

    def _initial_tiles(self, linear: MaskedLinear, priors: Mapping[str, MaskSet], generator: torch.Generator) -> Tensor:
        assert isinstance(self.method, LearnedTiles)
        std, strength = self.method.init_std, self.method.tile_prior_strength
        logits = random_logits(linear.grid, std, generator)
        if strength > 0:
            keep_mask = priors["reference"].linears[linear.name].to(self.device).keep_mask()
            logits += tile_offsets(keep_mask, linear.tile, self.sparsity, strength, std)
        return logits.flatten()

    def _check_priors(self, priors: Mapping[str, MaskSet]) -> None:
        needed = set()
        if not self.learns_patterns or self.method.pattern_prior_strength > 0:  # type: ignore[attr-defined]
            needed.add("pattern")
        if self.learns_tiles and self.method.tile_prior_strength > 0:  # type: ignore[attr-defined]
            needed.add("reference")
        for role in sorted(needed):
            if role not in priors:
                raise PatchError(f"method {self.method.title}: needs a {role} mask; make it with `patch-llm prune`.")
            for linear in self.linears:
                mask = priors[role].linears.get(linear.name)
                if mask is None or mask.shape != linear.shape:
                    raise PatchError(f"layer {linear.name}: the {role} mask belongs to another model.")
                if role == "pattern" and str(mask.pattern) != "2:4":
                    raise PatchError(f"layer {linear.name}: the pattern mask is {mask.pattern}, it has to be 2:4.")

    @torch.no_grad()
    def _weight_norm(self, form: str) -> float:
        """Sum over the masked linears of ||W||, or of its square."""
        power = 1 if form == "ratio" else 2
        norms = [
            block.block.get_parameter(f"{linear.name_in_block}.weight").float().norm().item()
            for block in self.blocks
            for linear in block.linears
        ]
        return sum(norm**power for norm in norms)


def run_block(
    block: nn.Module, weights: dict[str, Tensor], hidden: Tensor, positional: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """The block's output with `weights` in the place of its own."""
    return functional_call(block, weights, (hidden, *positional), named)


def sample_tiles(
    logits: Tensor, uniform: Tensor, scale: float | Tensor, temperature: float | Tensor, *, hard: bool
) -> Tensor:
    """Sampled density of every tile: the second entry of a Gumbel-softmax over the logits (0, logit).

    logits: [tiles], any float dtype. uniform: float32 [tiles] in [0, 1). Returns float32 [tiles] in [0, 1]; with
    `hard` 0 or 1, and the gradient of the soft sample.
    """
    clamped = uniform.clamp(2**-25, 1 - 2**-24)
    logistic = clamped.log() - torch.log1p(-clamped)  # the difference of two Gumbel variables
    soft = torch.sigmoid((logits.float() * scale + logistic) / temperature)
    return (soft > 0.5).float() + (soft - soft.detach()) if hard else soft


def _planar(flat: Tensor, linear: MaskedLinear) -> Tensor:
    """View [6, out, in / 4] of a linear's logits in the flat tensor of its block."""
    part = flat[linear.first_logit : linear.first_logit + linear.logits]
    return part.view(6, linear.shape[0], linear.shape[1] // 4)


def _buffer_name(linear: MaskedLinear) -> str:
    return "codes_" + linear.name_in_block.replace(".", "_")


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers (FNV-1a over 32-bit parts): neighbours get unrelated seeds."""
    state = 0xCBF29CE484222325
    for number in numbers:
        for part in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF):
            state = (state ^ part) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    state ^= state >> 29
    return state * 0xBF58476D1CE4E5B9 >> 1 & 0x7FFFFFFFFFFFFFFF
