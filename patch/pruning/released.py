"""Masks that others have published: fetched, checked against the model, and made a MaskSet. Nothing is trained.

The format (`patch.sparsity.release`) stores which weights of the pruned checkpoint are not 0. A weight that was 0
before looks pruned there, so it may stand in for one that a group of 4 or a dense tile lacks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch.artefacts import PatchError, read_json, write_json
from patch.hub import download
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern, keep_n_of_m
from patch.sparsity.release import read_release
from patch.sparsity.tiles import expand, tile_sums

SCHEMA = "patch.released/1"
TOLERANCE = 0.02
"""How far the share of zeros may be from the one asked for; PATCH's own masks end within 0.01."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleasedFile:
    """Where a published mask lies on this machine, and what it is: the content of `released.json`."""

    source: str
    """Repository on the hub, directory or file."""
    file: str
    revision: str | None
    """Commit on the hub; None for files of this machine."""
    path: str
    checksum: str
    """SHA-256 of the file."""

    def write(self, path: Path | str) -> None:
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path | str) -> ReleasedFile:
        content = read_json(path, SCHEMA)
        content.pop("schema")
        try:
            return cls(**content)
        except TypeError as error:
            raise PatchError(f"{path}: not a complete description ({error}); prepare it again.") from None


def fetch(source: str, file: str = "mask.npz", revision: str | None = None) -> ReleasedFile:
    """Bring a published mask to this machine.

    source: a repository on the hub, a directory that holds `file`, or the file itself.
    Raises PatchError when it cannot be had.
    """
    local = Path(source).expanduser()
    if local.exists() or source.startswith((".", "/", "~")):
        path, commit = (local / file if local.is_dir() else local).resolve(), None
        if not path.is_file():
            raise PatchError(f"released mask {path}: no such file; correct `source` or `file`.")
    else:
        path, commit = download(source, file, revision)
    return ReleasedFile(source, file, commit, str(path), _checksum(path))


def released_masks(
    released: ReleasedFile, linears: Mapping[str, nn.Linear], pattern: Pattern, sparsity: float
) -> MaskSet:
    """Read a published mask as one of `pattern` for a model with these prunable layers.

    sparsity: the share of zeros that it is meant to have, 0 to 1.
    Raises PatchError for another file than the one fetched, one that is damaged or of another model, one that breaks
    the pattern (the group is named), and one of another sparsity.
    """
    path = Path(released.path)
    if not path.is_file() or _checksum(path) != released.checksum:
        raise PatchError(f"{path}: gone, or not the file that was fetched; prepare it again.")

    def convert(name: str, keep: Tensor) -> LinearMask:
        linear = linears.get(name)
        if linear is None or keep.shape != linear.weight.shape:
            ours = "no such layer" if linear is None else f"{tuple(linear.weight.shape)}"
            raise PatchError(
                f"{path}: layer {name}, {tuple(keep.shape)}: the model has {ours}; the mask belongs to another model."
            )
        rows, columns = keep.shape
        pattern.check_shape(rows, columns, name)
        return _as_pattern(keep, linear.weight, pattern.for_layer(rows, columns), f"{path}: layer {name}")

    masks = read_release(path, convert=convert)
    if missing := linears.keys() - masks.linears.keys():
        raise PatchError(
            f"{path}: has no mask of {len(missing)} of the model's layers ({', '.join(sorted(missing)[:3])}); it "
            "belongs to another model, or is not complete."
        )
    if abs(masks.sparsity - sparsity) > TOLERANCE:
        raise PatchError(
            f"{path}: prunes {100 * masks.sparsity:.2f} %, not {100 * sparsity:g} %; correct `source` or the sparsity."
        )
    claimed = masks.recipe.get("measured_sparsity")
    if isinstance(claimed, int | float):
        claimed = claimed / 100 if claimed > 1 else claimed
        if abs(claimed - masks.sparsity) > 0.001:
            log.warning("%s: says that it prunes %.2f %%, and prunes %.2f", path, 100 * claimed, 100 * masks.sparsity)
    masks.linears = {name: masks.linears[name] for name in linears}
    masks.base_fingerprint = fingerprint(linears)
    origin: dict[str, Any] = {name: value for name, value in asdict(released).items() if name != "path"}
    masks.recipe = {"released": {**origin, "claimed_sparsity": claimed}}
    return masks


def _as_pattern(keep: Tensor, weight: Tensor, pattern: Pattern, where: str) -> LinearMask:
    """keep: bool [out, in], True = not 0 in the published checkpoint; weight: [out, in] before pruning."""
    # Published checkpoints were float16 or bfloat16; what is 0 in float16 may be 0 in either.
    unknown = ~keep & (weight.detach().cpu().half() == 0)
    dense_tiles = None
    sparse = torch.ones_like(keep)
    if pattern.kind == "tiles":
        dense_tiles = tile_sums(keep | unknown, pattern.tile) == tile_sums(torch.ones_like(keep), pattern.tile)
        sparse = ~expand(dense_tiles, (keep.shape[0], keep.shape[1]), pattern.tile)
    chosen = keep_n_of_m(2 * keep.to(torch.uint8) + unknown.to(torch.uint8), pattern.n, pattern.m)
    wrong = ((chosen & ~keep & ~unknown) | (keep & ~chosen)) & sparse
    if wrong.any():
        groups = wrong.view(keep.shape[0], -1, pattern.m).any(2)
        row, group = groups.nonzero()[0].tolist()
        raise PatchError(
            f"{where}: {int(groups.sum())} groups break the pattern {pattern}, the first in row {row}, columns "
            f"{pattern.m * group} to {pattern.m * group + pattern.m - 1}: it keeps "
            f"{int(keep.view(keep.shape[0], -1, pattern.m)[row, group].sum())} of {pattern.m} in a sparse tile."
        )
    return LinearMask.from_keep_mask(torch.where(sparse, chosen, True), pattern, dense_tiles=dense_tiles)


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
