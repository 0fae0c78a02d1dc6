"""The official code of PATCH, a checkout of github.com/Paramathic/patch, as a peer to measure against.

Its own functions make the masks and the regularisers; the loop around them is that of its `fine_tune_mask.py` and
`mask_trainer.py`: all masks of the model made in a forward pre-hook of every micro-batch, gradient checkpointing of
every block, logits in the model's dtype, AdamW, clipping. Nothing of it is part of this project.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.learning.schedules import MaskSchedule
from patch.methods import Learned, LearnedPatterns, LearnedTiles
from patch.models import decoder_blocks, prunable_linears
from patch.sparsity.maskset import MaskSet
from patch.sparsity.tiles import tile_sums


class OfficialLearning:
    """One run of the official code on `model`, which stays masked."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Learned,
        sparsity: float,
        tile: tuple[int, int],
        checkout: Path,
        *,
        priors: Mapping[str, MaskSet] | None = None,
        compiled: bool = False,
    ):
        """method: the hyper-parameters; those that the official code lacks are not read. priors: MaskSets by role,
        "pattern" and "reference", or None for random logits (for PATCH-Tile: on the dense weights).
        compiled: compile its mask function and the decoder blocks. Raises PatchError for another checkout."""
        self._model, self._method, self._sparsity = model, method, sparsity
        self._theirs = theirs = _load(checkout)
        self._schedule = MaskSchedule(method, sparsity)
        self._step = 0
        self._mode = {(True, False): "mask_llm", (True, True): "joint", (False, True): "tile"}[
            isinstance(method, LearnedPatterns), isinstance(method, LearnedTiles)
        ]
        self._joint = torch.compile(theirs.patch_joint) if compiled else theirs.patch_joint
        model.config.use_cache = False
        strengths = {"pattern_prior_strength": 0.0, "tile_prior_strength": 0.0}
        strengths |= {name: getattr(method, name) for name in strengths if priors and hasattr(method, name)}
        theirs.add_mask_parameters(
            model, _compressed(model, tile, priors) if priors else model, None, self._mode, tile, model.dtype,
            *strengths.values(), 1 - sparsity,
        )  # fmt: skip
        self._linears = list(prunable_linears(model).values())
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for block in decoder_blocks(model)[1]:
            block.forward = _checkpointed(torch.compile(block.forward) if compiled else block.forward)
        model.register_forward_pre_hook(self._make_masks)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=1.0, betas=method.betas, eps=method.epsilon, weight_decay=method.weight_decay,
            fused=True,
        )  # fmt: skip

    def step(self, step: int, micro_batches: Sequence[Tensor]) -> float:
        """One optimiser step, counted from 0. micro_batches: token ids [sequences, length] on the model's device.

        Returns the cross-entropy, the mean over the micro-batches, in nats per token.
        """
        self._step, theirs, count = step, self._theirs, len(micro_batches)
        total = torch.zeros((), device=self._model.device)
        for ids in micro_batches:
            loss = self._model(input_ids=ids, labels=ids).loss
            total += loss.detach()
            if self._mode != "mask_llm":
                density = theirs.compute_model_density_ratio(self._model, loss.device)
                miss = torch.abs(density - (1 - self._sparsity)).sum()
                loss = loss + miss * self._method.density_weight  # type: ignore[attr-defined]
            norm = theirs.compute_weight_sum(self._model, loss.device, self._mode == "mask_llm")[0]
            loss = loss - norm * self._schedule.norm_weight(step)
            (loss / count).backward()
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate(step)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._method.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(total) / count

    def _make_masks(self, module: nn.Module, arguments: Any) -> None:
        theirs = self._theirs
        patterns, tiles = self._schedule.patterns(self._step), self._schedule.tiles(self._step)
        for layer in self._linears:
            if self._mode != "mask_llm":
                size = (layer.tile_row_size, layer.tile_col_size)
                tile = (layer.tile_mask, False, tiles.temperature, tiles.scale, *size)
            if self._mode == "tile":
                layer.last_mask = theirs.patch_tile_only(layer.fixed_mask_2_4, *tile)
                continue
            choices = (layer.weight.shape, self._model.mask_choices, False, patterns.temperature, patterns.scale)
            if self._mode == "joint":
                layer.last_mask = self._joint(layer.mask_2_4, *choices, *tile)
            else:
                layer.last_mask = theirs.create_2_4_mask(layer.mask_2_4, *choices)


def _compressed(model: PreTrainedModel, tile: tuple[int, int], priors: Mapping[str, MaskSet]) -> PreTrainedModel:
    """A copy of the model as the official code wants its priors: pruned to 2:4, with the tiles' scores attached."""
    compressed = copy.deepcopy(model)
    linears = prunable_linears(compressed)
    for name, linear in linears.items():
        keep_mask = priors["pattern"].linears[name].keep_mask()
        linear.weight.data *= keep_mask.to(linear.weight)
        if "reference" in priors:
            kept = priors["reference"].linears[name].keep_mask().float()
            linear.distribution_scores = tile_sums(kept, tile) / (tile[0] * tile[1])
    return compressed


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*positional: Any, **named: Any) -> Any:
        return checkpoint(lambda *inner: forward(*inner, **named), *positional, use_reentrant=False)

    return checkpointed


def _load(checkout: Path) -> types.SimpleNamespace:
    """Its mask and regulariser functions. What those files import beside PyTorch is not used by them here."""
    absent = {
        "wandb": {},
        "slim_local": {},
        "slim_local.slim": {},
        "slim_local.slim.utils": {"find_layers": None, "get_layers_list": None},
    }
    functions: dict[str, Any] = {}
    with _stand_ins(absent):
        for name in ("learnable_mask", "regularizers"):
            path = checkout / "patch" / f"{name}.py"
            if not path.is_file():
                raise PatchError(f"{path}: no such file; --official takes a checkout of github.com/Paramathic/patch.")
            spec = importlib.util.spec_from_file_location(f"official_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # torch.compile looks functions up there
            spec.loader.exec_module(module)
            functions |= vars(module)
    return types.SimpleNamespace(**functions)


@contextmanager
def _stand_ins(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    added = [name for name in modules if name not in sys.modules]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(modules[name])
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
