"""The MaskSet artefact: which weights of a model survive, bit-packed, verified on every save and load.

One safetensors file. Per linear layer `NAME` it holds

    NAME.keep    uint8, one bit per weight (unstructured, N:M other than 2:4; none where dense), or
    NAME.codes   uint8, one 3-bit pattern code per group of 4 (2:4, tiles; 0 under dense tiles)
    NAME.tiles   uint8, one bit per tile, 1 = dense (tiles only)
    NAME.values  the kept weights in row-major order, only where the method changed them

and in its header the schema version, a checksum, the pattern and shape of every layer, the identity of
the base model and the recipe that made it. Masks are small, models are not: a 2:4 mask costs 0.75 bit
per weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch.artefacts import PatchError, read_tensors, write_tensors
from patch.sparsity.packing import (
    INVALID_CODE,
    codes_of,
    pack_bits,
    pack_codes,
    patterns_of,
    unpack_bits,
    unpack_codes,
)
from patch.sparsity.patterns import Pattern
from patch.sparsity.tiles import expand, grid_shape, weights_in

SCHEMA = "patch.maskset/1"


@dataclass(frozen=True)
class LinearMask:
    """Which weights of one `nn.Linear` [out_features, in_features] survive. Immutable, packed."""

    pattern: Pattern
    shape: tuple[int, int]
    packed: Tensor
    """uint8: 3-bit codes where groups are 2:4, nothing where the layer is dense, else one bit per weight (see
    `packing`)."""
    packed_tiles: Tensor | None = None
    """uint8 bitmap of the tile grid, 1 = dense; None unless the pattern is tiles."""
    values: Tensor | None = None
    """[kept] new values of the kept weights in row-major order; None where the weights stay as they are."""

    @classmethod
    def dense(cls, shape: tuple[int, int]) -> LinearMask:
        """The mask of a layer that the method leaves alone."""
        return cls(Pattern("dense"), shape, torch.empty(0, dtype=torch.uint8))

    @classmethod
    def from_keep_mask(
        cls,
        keep_mask: Tensor,
        pattern: Pattern,
        *,
        dense_tiles: Tensor | None = None,
        new_weight: Tensor | None = None,
    ) -> LinearMask:
        """Pack a bool mask [out, in] (True = kept), on its own device.

        dense_tiles: bool [tile rows, tile columns], required for tile patterns only.
        new_weight: [out, in] weights to use instead of the model's own (methods that update weights).
        Raises ValueError where the mask does not follow the pattern.
        """
        shape = (keep_mask.shape[0], keep_mask.shape[1])
        if pattern.m and shape[1] % pattern.m:
            raise ValueError(f"{shape[1]} inputs do not split into {pattern.m}s")
        values = None if new_weight is None else new_weight[keep_mask]
        if not _uses_codes(pattern):
            mask = cls(pattern, shape, pack_bits(keep_mask), None, values)
            mask.verify()
            return mask
        codes = codes_of(keep_mask)
        packed_tiles = None
        if pattern.kind == "tiles":
            if dense_tiles is None:
                raise ValueError(f"pattern {pattern} needs dense_tiles")
            in_dense_tile = expand(dense_tiles, shape, pattern.tile)
            if not keep_mask[in_dense_tile].all():
                raise ValueError(f"a dense tile of the pattern {pattern} has pruned weights")
            codes = torch.where(in_dense_tile.reshape(-1, 4)[:, 0], 0, codes)
            packed_tiles = pack_bits(dense_tiles)
        if (codes == INVALID_CODE).any():
            raise ValueError(f"the mask is not exactly 2:4 where the pattern {pattern} wants it")
        return cls(pattern, shape, pack_codes(codes), packed_tiles, values)

    def keep_mask(self) -> Tensor:
        """bool [out, in], True = kept."""
        if self.pattern.kind == "dense":
            return torch.ones(self.shape, dtype=torch.bool, device=self.packed.device)
        if not _uses_codes(self.pattern):
            return unpack_bits(self.packed, self.shape)
        keep = patterns_of(unpack_codes(self.packed, self.shape[0] * self.shape[1] // 4), self.shape)
        tiles = self.dense_tiles()
        return keep if tiles is None else keep | expand(tiles, self.shape, self.pattern.tile)

    def dense_tiles(self) -> Tensor | None:
        """bool [tile rows, tile columns], True = dense; None unless the pattern is tiles."""
        if self.packed_tiles is None:
            return None
        return unpack_bits(self.packed_tiles, grid_shape(self.shape, self.pattern.tile))

    @property
    def size(self) -> int:
        """Number of weights of the layer."""
        return self.shape[0] * self.shape[1]

    @property
    def kept(self) -> int:
        """Number of weights that survive."""
        if self.pattern.kind == "dense":
            return self.size
        if not _uses_codes(self.pattern):
            return int(self.keep_mask().sum())
        tiles = self.dense_tiles()
        in_dense_tiles = 0 if tiles is None else weights_in(tiles, self.shape, self.pattern.tile)
        return (self.size + in_dense_tiles) // 2

    @property
    def sparsity(self) -> float:
        """Share of pruned weights, 0 to 1."""
        return 1 - self.kept / self.size

    @torch.no_grad()
    def apply_(self, weight: Tensor) -> None:
        """Set pruned weights [out, in] to exact zero, and kept ones to their new values where there are any."""
        keep = self.keep_mask().to(weight.device)
        if self.values is None:
            weight.masked_fill_(~keep, 0)
        else:
            weight.zero_()
            weight[keep] = self.values.to(weight)

    def verify(self) -> None:
        """Raise ValueError unless sizes fit the shape and every group follows the pattern exactly."""
        out_features, in_features = self.shape
        if self.pattern.m and in_features % self.pattern.m:
            raise ValueError(f"{in_features} inputs do not split into {self.pattern.m}s")
        size = out_features * in_features
        expected = 3 * -(-size // 32) if _uses_codes(self.pattern) else -(-size // 8)
        if self.pattern.kind == "dense":
            expected = 0
        if self.packed.numel() != expected:
            raise ValueError(f"{self.packed.numel()} packed bytes, expected {expected} for {self.shape}")
        if self.pattern.kind == "tiles":
            rows, columns = grid_shape(self.shape, self.pattern.tile)
            if self.packed_tiles is None or self.packed_tiles.numel() != -(-rows * columns // 8):
                raise ValueError(f"the tile bitmap does not fit a grid of {rows}x{columns}")
        if _uses_codes(self.pattern):
            if size and int(unpack_codes(self.packed, size // 4).max()) > 5:
                raise ValueError("a pattern code is not one of the six 2:4 patterns")
        elif self.pattern.kind == "n:m":
            kept_per_group = self.keep_mask().reshape(-1, self.pattern.m).sum(1)
            if (kept_per_group != self.pattern.n).any():
                raise ValueError(f"a group does not keep exactly {self.pattern.n} of {self.pattern.m}")
        if self.values is not None and self.values.numel() != self.kept:
            raise ValueError(f"{self.values.numel()} values for {self.kept} kept weights")

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by the suffix of the layer's name; `description` goes into the header."""
        found = {"codes" if _uses_codes(self.pattern) else "keep": self.packed}
        for suffix, tensor in (("tiles", self.packed_tiles), ("values", self.values)):
            if tensor is not None:
                found[suffix] = tensor
        return found

    def description(self) -> dict[str, Any]:
        return {"pattern": str(self.pattern), "shape": list(self.shape)}

    @classmethod
    def from_tensors(cls, name: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LinearMask:
        """Inverse of `tensors` (here with NAME. before them) and `description`, unverified.

        Raises ValueError where the mask is not among them.
        """
        pattern = Pattern.parse(description["pattern"])
        packed = tensors.get(f"{name}.{'codes' if _uses_codes(pattern) else 'keep'}")
        if packed is None:
            raise ValueError("its mask is not in the file; delete it and run its stage again.")
        height, width = description["shape"]
        return cls(pattern, (height, width), packed, tensors.get(f"{name}.tiles"), tensors.get(f"{name}.values"))

    def to(self, device: torch.device | str) -> LinearMask:
        """The same mask with its tensors on `device`."""
        tensors = (self.packed, self.packed_tiles, self.values)
        return LinearMask(self.pattern, self.shape, *(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]


@dataclass
class MaskSet:
    """The masks of all pruned linears of one model."""

    linears: dict[str, LinearMask]
    """By the layer's name in the model, e.g. "model.layers.0.mlp.up_proj"."""
    base_fingerprint: str | None = None
    """`fingerprint` of the unpruned model; None where unknown (masks of the official release)."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was made: method, options, calibration, seed. For people and records."""
    checksum: str = ""
    """Of the file's content, once saved or loaded."""

    @property
    def sparsity(self) -> float:
        """Realised share of pruned weights over all linears in the set, 0 to 1."""
        kept = sum(mask.kept for mask in self.linears.values())
        return 1 - kept / sum(mask.size for mask in self.linears.values())

    def save(self, path: Path | str) -> str:
        """Verify, then write atomically; returns the checksum of the content."""
        self._verify(path)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        for name, mask in self.linears.items():
            layers[name] = mask.description()
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in mask.tensors().items()}
        metadata = {"linears": layers, "base_fingerprint": self.base_fingerprint, "recipe": self.recipe}
        self.checksum = write_tensors(path, tensors, SCHEMA, metadata)
        return self.checksum

    @classmethod
    def load(cls, path: Path | str) -> MaskSet:
        """Read and verify. Raises PatchError for a truncated, altered, foreign or inconsistent file."""
        tensors, metadata, checksum = read_tensors(path, SCHEMA)
        linears = {}
        for name, layer in metadata["linears"].items():
            try:
                linears[name] = LinearMask.from_tensors(name, layer, tensors)
            except ValueError as error:
                raise PatchError(f"{path}: layer {name}: {error}") from None
        masks = cls(linears, metadata["base_fingerprint"], metadata["recipe"], checksum)
        masks._verify(path)
        return masks

    def apply_(self, linears: Mapping[str, nn.Linear]) -> None:
        """Prune the given layers in place, which must be those the set was made for.

        Raises PatchError, before anything changes, where names, shapes or the weights themselves belong
        to another model.
        """
        check_model(self.linears, self.base_fingerprint, linears)
        for name, linear in linears.items():
            self.linears[name].apply_(linear.weight)

    def _verify(self, path: Path | str) -> None:
        for name, mask in self.linears.items():
            try:
                mask.verify()
            except ValueError as error:
                raise PatchError(f"{path}: layer {name}: {error}; the mask is not valid.") from None


def check_model(
    masks: Mapping[str, LinearMask], base_fingerprint: str | None, linears: Mapping[str, nn.Linear]
) -> None:
    """Raise PatchError unless the masks were made for the model of these linears, judged by names, shapes, weights."""
    if masks.keys() != linears.keys():
        missing, extra = sorted(masks.keys() - linears.keys()), sorted(linears.keys() - masks.keys())
        raise PatchError(
            f"the mask belongs to another model: {len(missing)} of its layers are not in this model "
            f"({', '.join(missing[:3]) or 'none'}), {len(extra)} of the model's are not in the mask "
            f"({', '.join(extra[:3]) or 'none'})."
        )
    for name, linear in linears.items():
        if tuple(linear.weight.shape) != masks[name].shape:
            raise PatchError(
                f"layer {name}: the mask is for shape {masks[name].shape}, "
                f"the model has {tuple(linear.weight.shape)}; they belong to different models."
            )
    if base_fingerprint is not None and fingerprint(linears) != base_fingerprint:
        raise PatchError(
            "the mask belongs to another model: names and shapes agree but the weights differ "
            "(another checkpoint or revision, or a model that is already pruned)."
        )


def fingerprint(linears: Mapping[str, nn.Linear], samples: int = 256) -> str:
    """Identity of a model's prunable weights: SHA-256 over names, shapes and `samples` weights per layer.

    The sampled weights are rounded to bfloat16, so a checkpoint loaded in float32 and in bfloat16 is the
    same model.
    """
    digest = hashlib.sha256()
    for name in sorted(linears):
        weight = linears[name].weight.detach()
        digest.update(f"{name} {tuple(weight.shape)};".encode())
        every = max(1, weight.numel() // samples)
        sampled = weight.flatten()[::every].to(torch.bfloat16).cpu().contiguous()
        digest.update(sampled.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _uses_codes(pattern: Pattern) -> bool:
    return (pattern.n, pattern.m) == (2, 4)
