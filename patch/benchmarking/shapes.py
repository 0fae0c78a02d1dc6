"""Models with the shapes of the paper's, random weights, masks and text: for timing, nothing has to be downloaded."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.kernels.hybrid.fusion import fuse_linears
from patch.methods import Learned
from patch.models import prunable_linears, vocabulary_size
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern, keep_n_of_m
from patch.sparsity.tiles import expand, grid_shape

SHAPES: dict[str, PreTrainedConfig] = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
}  # fmt: skip


def random_model(shape: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal LM of one of SHAPES, frozen, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def layer_shapes(shape: str, *, fused: bool = False) -> list[tuple[int, int]]:
    """(out_features, in_features) of the different linears in a block of one of SHAPES, or of the one layer OUTxIN.

    fused: query, key and value as one layer, and gate and up.
    """
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape):
        return [(int(found[1]), int(found[2]))]
    if shape not in SHAPES:
        raise PatchError(f"shape {shape!r}: not one of {', '.join(SHAPES)}, or a layer such as 896x4864.")
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if fused:
        fuse_linears(model)
    linears = prunable_linears(model).values()
    return list(dict.fromkeys((linear.out_features, linear.in_features) for linear in linears))


def random_tokens(model: PreTrainedModel, length: int, samples: int = 8) -> TokenSet:
    """Sequences of random tokens of the model's vocabulary: int32 [samples, length]."""
    ids = torch.randint(vocabulary_size(model), (samples, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids.int(), {"source": "random"})


def random_mask(weight: Tensor, sparsity: float, tile: tuple[int, int], generator: torch.Generator) -> LinearMask:
    """Random tiles of `weight` [out, in] are 2:4, as many as come nearest to the share `sparsity` of pruned weights.

    sparsity: 0 to 0.5. generator: of the CPU, so that the tiles are the same on every device.
    """
    rows, columns = grid_shape((weight.shape[0], weight.shape[1]), tile)
    sparse = torch.zeros(rows * columns, dtype=torch.bool)
    sparse[torch.randperm(rows * columns, generator=generator)[: round(2 * sparsity * rows * columns)]] = True
    return _mask_of_tiles(weight, ~sparse.view(rows, columns), tile)


def random_masks(model: PreTrainedModel, sparsity: float, tile: tuple[int, int] = (128, 128)) -> MaskSet:
    """Random tiles over all prunable linears of the model are 2:4; `sparsity` and exactness as in `random_mask`."""
    linears = prunable_linears(model)
    grids = [grid_shape((linear.out_features, linear.in_features), tile) for linear in linears.values()]
    sizes = [rows * columns for rows, columns in grids]
    sparse = torch.zeros(sum(sizes), dtype=torch.bool)
    order = torch.randperm(len(sparse), generator=torch.Generator().manual_seed(0))
    sparse[order[: round(2 * sparsity * len(sparse))]] = True
    masks = {
        name: _mask_of_tiles(linear.weight, ~tiles.view(grid), tile)
        for (name, linear), grid, tiles in zip(linears.items(), grids, sparse.split(sizes), strict=True)
    }
    return MaskSet(masks, fingerprint(linears), {"method": "random tiles", "sparsity": sparsity})


def _mask_of_tiles(weight: Tensor, dense_tiles: Tensor, tile: tuple[int, int]) -> LinearMask:
    dense_tiles = dense_tiles.to(weight.device)
    keep = keep_n_of_m(weight.abs(), 2, 4) | expand(dense_tiles, (weight.shape[0], weight.shape[1]), tile)
    return LinearMask.from_keep_mask(keep, Pattern("tiles", n=2, m=4, tile=tile), dense_tiles=dense_tiles)


def without_priors(method: Learned) -> Learned:
    """The method from random logits: no one-shot masks have to be made first."""
    strengths = ("pattern_prior_strength", "tile_prior_strength")
    return method.model_copy(update={name: 0.0 for name in strengths if hasattr(method, name)})
