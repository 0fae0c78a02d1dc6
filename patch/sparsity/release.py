"""The official release's mask file (`mask.npz` of Paramathic/patch), read and written.

Per weight `NAME.weight`: `np.packbits(weight != 0)`, its shape under `NAME.weight.__shape__`, and JSON
under `__meta__`. The format does not say which pattern a layer follows, so reading finds out.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from patch.artefacts import PatchError, atomic_path
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.patterns import Pattern
from patch.sparsity.tiles import tile_sums


def read_release(
    path: Path | str,
    tile: tuple[int, int] = (128, 128),
    convert: Callable[[str, torch.Tensor], LinearMask] | None = None,
) -> MaskSet:
    """Read `mask.npz`. Each layer becomes 2:4 or tiles of size `tile` where it is exactly that, else
    unstructured (a weight that was 0 before pruning looks pruned in this format).

    convert: what to make of a layer's name and bool [out, in] instead; it raises PatchError to refuse them.
    Raises PatchError for a file that is not in this format.
    """
    convert = convert or (lambda _, keep_mask: _classify(keep_mask, tile))
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("one array instead of an archive of them")
        with loaded as archive:
            names = [key for key in archive.files if f"{key}.__shape__" in archive.files]
            meta = json.loads(str(archive["__meta__"])) if "__meta__" in archive.files else {}
            masks = {}
            for key in names:
                rows, columns = (int(size) for size in archive[f"{key}.__shape__"])
                bits = np.unpackbits(archive[key])[: rows * columns].astype(bool)
                name = key.removesuffix(".weight")
                masks[name] = convert(name, torch.from_numpy(bits.reshape(rows, columns)))
            if not isinstance(meta, dict):
                raise ValueError("its __meta__ is not a JSON object")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise PatchError(f"{path}: not a mask.npz of the official release ({error}).") from None
    if not masks:
        raise PatchError(f"{path}: holds no masks (no key with a .__shape__ beside it).")
    return MaskSet(masks, recipe={"source": str(path), **meta})


def write_release(masks: MaskSet, path: Path | str) -> None:
    """Write `mask.npz`. New weight values, if any, are not part of this format and are left out."""
    arrays: dict[str, np.ndarray] = {}
    for name, mask in masks.linears.items():
        arrays[f"{name}.weight"] = np.packbits(mask.keep_mask().cpu().numpy().ravel())
        arrays[f"{name}.weight.__shape__"] = np.array(mask.shape, dtype=np.int64)
    arrays["__meta__"] = np.array(json.dumps({"measured_sparsity": masks.sparsity}))
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def _classify(keep_mask: torch.Tensor, tile: tuple[int, int]) -> LinearMask:
    """The strictest pattern that the mask follows exactly: 2:4, then tiles, then unstructured."""
    if keep_mask.shape[1] % 4 == 0:
        with contextlib.suppress(ValueError):
            return LinearMask.from_keep_mask(keep_mask, Pattern("n:m", 2, 4))
        dense_tiles = tile_sums(keep_mask, tile) == tile_sums(torch.ones_like(keep_mask), tile)
        if dense_tiles.any():
            with contextlib.suppress(ValueError):
                return LinearMask.from_keep_mask(keep_mask, Pattern("tiles", 2, 4, tile), dense_tiles=dense_tiles)
    return LinearMask.from_keep_mask(keep_mask, Pattern("unstructured"))
