"""The official release's mask.npz: files written by hand in its layout, and damaged ones."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from patch.artefacts import PatchError
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.patterns import Pattern
from patch.sparsity.release import read_release, write_release


def two_four(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < 2).reshape(rows, columns)


def half_tiled() -> torch.Tensor:
    keep = two_four(16, 16)
    keep[:8, :8] = True
    return keep


MASKS = {
    "model.layers.0.mlp.up_proj": (two_four(8, 12), "2:4"),
    "model.layers.0.mlp.down_proj": (half_tiled(), "tiles:8x8"),
    "model.layers.1.mlp.up_proj": (torch.ones(8, 8, dtype=torch.bool), "tiles:8x8"),
    "model.layers.1.mlp.down_proj": (
        torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5,
        "unstructured",
    ),
    "model.layers.2.mlp.down_proj": (
        torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) < 0.5,
        "unstructured",
    ),
}


def write_by_hand(path, meta: object = None) -> None:
    """The layout of the official release, bit by bit: the first weight in the highest bit."""
    arrays = {}
    for name, (keep, _) in MASKS.items():
        flat = keep.flatten().tolist() + [False] * (-keep.numel() % 8)
        octets = [sum(bit << (7 - i) for i, bit in enumerate(flat[s : s + 8])) for s in range(0, len(flat), 8)]
        arrays[f"{name}.weight"] = np.array(octets, dtype=np.uint8)
        arrays[f"{name}.weight.__shape__"] = np.array(keep.shape)
    arrays["__meta__"] = np.array(json.dumps({"measured_sparsity": 0.37} if meta is None else meta))
    np.savez(path, **arrays)


def test_official_files_are_read_layer_by_layer(tmp_path):
    write_by_hand(tmp_path / "mask.npz")
    masks = read_release(tmp_path / "mask.npz", tile=(8, 8))
    assert masks.linears.keys() == MASKS.keys()
    for name, (keep, pattern) in MASKS.items():
        assert torch.equal(masks.linears[name].keep_mask(), keep)
        assert str(masks.linears[name].pattern) == pattern
    assert masks.recipe["measured_sparsity"] == 0.37
    assert masks.base_fingerprint is None


def test_the_dense_tiles_are_found(tmp_path):
    write_by_hand(tmp_path / "mask.npz")
    masks = read_release(tmp_path / "mask.npz", tile=(8, 8))
    assert masks.linears["model.layers.0.mlp.down_proj"].dense_tiles().tolist() == [[True, False], [False, False]]


def test_what_is_written_is_the_official_layout(tmp_path):
    patterns = {name: Pattern.parse(pattern) for name, (_, pattern) in MASKS.items()}
    dense = {"model.layers.0.mlp.down_proj": [[True, False], [False, False]], "model.layers.1.mlp.up_proj": [[True]]}
    masks = {
        name: LinearMask.from_keep_mask(
            keep, patterns[name], dense_tiles=torch.tensor(dense[name]) if name in dense else None
        )
        for name, (keep, _) in MASKS.items()
    }
    write_release(MaskSet(masks), tmp_path / "ours.npz")
    write_by_hand(tmp_path / "official.npz")
    with np.load(tmp_path / "ours.npz") as ours, np.load(tmp_path / "official.npz") as official:
        assert sorted(ours.files) == sorted(official.files)
        for key in ours.files:
            if key != "__meta__":
                assert ours[key].tolist() == official[key].tolist()
        pruned = sum(int((~keep).sum()) for keep, _ in MASKS.values())
        total = sum(keep.numel() for keep, _ in MASKS.values())
        assert json.loads(str(ours["__meta__"]))["measured_sparsity"] == pytest.approx(pruned / total)


def test_masks_survive_a_round_trip(tmp_path):
    write_by_hand(tmp_path / "a.npz")
    write_release(read_release(tmp_path / "a.npz", tile=(8, 8)), tmp_path / "b.npz")
    again = read_release(tmp_path / "b.npz", tile=(8, 8))
    for name, (keep, _) in MASKS.items():
        assert torch.equal(again.linears[name].keep_mask(), keep)


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def damaged_zip(tmp_path) -> bytes:
    content = {"w.weight": np.arange(5000) % 251, "w.weight.__shape__": np.array([100, 400])}
    np.savez_compressed(tmp_path / "whole.npz", **content)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[100:140] = bytes(40)
    return bytes(content)


@pytest.mark.parametrize("garbage", [b"", b"not an archive at all", b"PK\x03\x04 half a zip", npy(), "damaged"])
def test_garbage_is_refused_by_name(tmp_path, garbage):
    (tmp_path / "mask.npz").write_bytes(damaged_zip(tmp_path) if garbage == "damaged" else garbage)
    with pytest.raises(PatchError, match=r"mask\.npz: not a mask\.npz of the official release"):
        read_release(tmp_path / "mask.npz")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(PatchError, match=r"nowhere\.npz"):
        read_release(tmp_path / "nowhere.npz")


def test_an_archive_without_masks_is_refused(tmp_path):
    np.savez(tmp_path / "mask.npz", something=np.zeros(3))
    with pytest.raises(PatchError, match="holds no masks"):
        read_release(tmp_path / "mask.npz")


@pytest.mark.parametrize("shape", [[4, 400], [4], [2, 2, 2]])
def test_shapes_that_do_not_fit_the_bits_are_refused(tmp_path, shape):
    np.savez(tmp_path / "mask.npz", **{"a.weight": np.zeros(4, np.uint8), "a.weight.__shape__": np.array(shape)})
    with pytest.raises(PatchError, match=r"not a mask\.npz"):
        read_release(tmp_path / "mask.npz")


def test_meta_that_is_not_an_object_is_refused(tmp_path):
    write_by_hand(tmp_path / "mask.npz", meta=[1, 2])
    with pytest.raises(PatchError, match=r"not a mask\.npz"):
        read_release(tmp_path / "mask.npz")
