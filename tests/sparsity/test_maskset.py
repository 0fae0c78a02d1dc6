"""The MaskSet artefact: exact round trips, and refusal of whatever is damaged or foreign."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors import safe_open
from torch import nn

from patch.artefacts import PatchError, write_tensors
from patch.sparsity.maskset import SCHEMA, LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

TWO_FOUR = Pattern.parse("2:4")
UNSTRUCTURED = Pattern.parse("unstructured")
TILES = Pattern.parse("tiles:8x8")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_four(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A random exact 2:4 mask: two random places per group."""
    order = torch.rand(rows, columns // 4, 4, generator=generator(seed)).argsort(-1)
    return (order < 2).reshape(rows, columns)


def tiled(rows: int, columns: int, tile: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random mask of dense and 2:4 tiles, and which ones are dense."""
    keep = two_four(rows, columns, seed)
    dense = torch.rand(-(-rows // tile[0]), -(-columns // tile[1]), generator=generator(seed)) < 0.5
    for i, row in enumerate(dense.tolist()):
        for j, is_dense in enumerate(row):
            if is_dense:
                keep[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]] = True
    return keep, dense


def layers(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Linear]:
    torch.manual_seed(seed)
    linears = {
        "blocks.0.up": nn.Linear(16, 12, bias=False),
        "blocks.0.down": nn.Linear(12, 20, bias=False),
        "blocks.1.up": nn.Linear(16, 12, bias=False),
    }
    return {name: linear.to(dtype) for name, linear in linears.items()}


def mask_set(linears: dict[str, nn.Linear], **options: object) -> MaskSet:
    """One layer of each kind."""
    keep, dense = tiled(12, 16, (8, 8))
    anything = torch.rand(20, 12, generator=generator(3)) < 0.6
    masks = {
        "blocks.0.up": LinearMask.from_keep_mask(two_four(12, 16), TWO_FOUR),
        "blocks.0.down": LinearMask.from_keep_mask(anything, UNSTRUCTURED),
        "blocks.1.up": LinearMask.from_keep_mask(keep, TILES, dense_tiles=dense),
    }
    return MaskSet(masks, fingerprint(linears), {"method": "test"}, **options)


# one layer


@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (16, 64)])
def test_2_4_masks_survive_packing(shape):
    keep = two_four(*shape)
    mask = LinearMask.from_keep_mask(keep, TWO_FOUR)
    mask.verify()
    assert torch.equal(mask.keep_mask(), keep)
    assert mask.kept == int(keep.sum())
    assert mask.sparsity == 0.5
    assert mask.dense_tiles() is None


@pytest.mark.parametrize("text", ["1:4", "3:4", "4:8"])
def test_other_n_m_masks_survive_packing(text):
    pattern = Pattern.parse(text)
    scores = torch.rand(6, 2, pattern.m, generator=generator())
    keep = (scores.argsort(-1) < pattern.n).reshape(6, -1)
    mask = LinearMask.from_keep_mask(keep, pattern)
    assert torch.equal(mask.keep_mask(), keep)
    assert mask.sparsity == pytest.approx(1 - pattern.n / pattern.m)


@pytest.mark.parametrize(("shape", "tile"), [((12, 16), (8, 8)), ((72, 40), (32, 32)), ((5, 12), (128, 128))])
def test_tiled_masks_survive_packing(shape, tile):
    keep, dense = tiled(*shape, tile)
    mask = LinearMask.from_keep_mask(keep, Pattern("tiles", 2, 4, tile), dense_tiles=dense)
    mask.verify()
    assert torch.equal(mask.keep_mask(), keep)
    assert torch.equal(mask.dense_tiles(), dense)
    assert mask.sparsity == pytest.approx(1 - keep.double().mean().item())


def test_unstructured_masks_survive_packing():
    keep = torch.rand(7, 13, generator=generator()) < 0.3
    assert torch.equal(LinearMask.from_keep_mask(keep, UNSTRUCTURED).keep_mask(), keep)


def test_dense_layers_cost_nothing(tmp_path):
    dense = LinearMask.dense((5, 7))
    sparse = LinearMask.from_keep_mask(two_four(5, 8), TWO_FOUR)
    MaskSet({"attention": dense, "mlp": sparse}).save(tmp_path / "mask")
    loaded = MaskSet.load(tmp_path / "mask")
    mask = loaded.linears["attention"]
    assert mask.packed.numel() == 0
    assert mask.keep_mask().shape == (5, 7)
    assert mask.sparsity == 0
    assert loaded.sparsity == pytest.approx(20 / 75)
    weight = torch.randn(5, 7, generator=generator())
    before = weight.clone()
    mask.apply_(weight)
    assert torch.equal(weight, before)
    with pytest.raises(ValueError, match="expected 0"):
        dataclasses.replace(mask, packed=torch.zeros(3, dtype=torch.uint8)).verify()


@pytest.mark.parametrize("group", ["1110", "1000", "0000", "1111"])
def test_a_group_that_is_not_2_4_is_refused(group):
    keep = two_four(4, 8)
    keep[2, 4:] = torch.tensor([bit == "1" for bit in group])
    with pytest.raises(ValueError, match="not exactly 2:4"):
        LinearMask.from_keep_mask(keep, TWO_FOUR)


def test_a_group_that_is_not_n_m_is_refused():
    keep = torch.tensor([[True, False, False, False, True, True, False, False]])
    with pytest.raises(ValueError, match="does not keep exactly 1 of 4"):
        LinearMask.from_keep_mask(keep, Pattern.parse("1:4"))


def test_groups_do_not_run_over_the_ends_of_rows():
    flat = torch.tensor([True, False, True, False] * 6)
    with pytest.raises(ValueError, match="6 inputs do not split into 4s"):
        LinearMask.from_keep_mask(flat.reshape(4, 6), TWO_FOUR)


def test_a_dense_tile_with_pruned_weights_is_refused():
    keep, dense = two_four(8, 16), torch.tensor([[True, False]])
    with pytest.raises(ValueError, match=r"dense tile .* has pruned weights"):
        LinearMask.from_keep_mask(keep, TILES, dense_tiles=dense)


def test_a_sparse_tile_that_is_not_2_4_is_refused():
    keep, dense = torch.ones(8, 16, dtype=torch.bool), torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="not exactly 2:4"):
        LinearMask.from_keep_mask(keep, TILES, dense_tiles=dense)


def test_tiles_without_their_bitmap_are_refused():
    with pytest.raises(ValueError, match="needs dense_tiles"):
        LinearMask.from_keep_mask(two_four(8, 16), TILES)


def test_codes_beyond_the_six_patterns_are_found():
    mask = LinearMask.from_keep_mask(two_four(4, 8), TWO_FOUR)
    broken = dataclasses.replace(mask, packed=torch.full_like(mask.packed, 255))
    with pytest.raises(ValueError, match="not one of the six"):
        broken.verify()


def test_sizes_that_do_not_fit_are_found():
    mask = LinearMask.from_keep_mask(two_four(16, 16), TWO_FOUR)
    with pytest.raises(ValueError, match="packed bytes"):
        dataclasses.replace(mask, shape=(32, 16)).verify()
    with pytest.raises(ValueError, match="3 values for 128 kept weights"):
        dataclasses.replace(mask, values=torch.zeros(3)).verify()
    keep, dense = tiled(16, 16, (8, 8))
    mask = LinearMask.from_keep_mask(keep, TILES, dense_tiles=dense)
    with pytest.raises(ValueError, match="grid of 2x2"):
        dataclasses.replace(mask, packed_tiles=None).verify()


def test_applying_a_mask_zeroes_what_is_pruned_and_leaves_the_rest():
    keep = two_four(4, 8)
    weight = torch.randn(4, 8, generator=generator())
    original = weight.clone()
    LinearMask.from_keep_mask(keep, TWO_FOUR).apply_(weight)
    for w, before, kept in zip(weight.flatten(), original.flatten(), keep.flatten(), strict=True):
        assert w.item() == (before.item() if kept else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_new_weights_come_back_bit_for_bit(tmp_path, dtype, pattern):
    keep = two_four(8, 16)
    new = torch.randn(8, 16, generator=generator(1)).to(dtype)
    mask = LinearMask.from_keep_mask(keep, Pattern.parse(pattern), new_weight=new)
    MaskSet({"layer": mask}).save(tmp_path / "masks.safetensors")
    read = MaskSet.load(tmp_path / "masks.safetensors").linears["layer"]
    weight = torch.randn(8, 16, generator=generator(2)).to(dtype)
    read.apply_(weight)
    assert read.values.dtype == dtype
    assert torch.equal(weight, torch.where(keep, new, torch.zeros_like(new)))


# the set


def test_a_set_survives_saving(tmp_path):
    masks = mask_set(layers())
    masks.save(tmp_path / "masks.safetensors")
    read = MaskSet.load(tmp_path / "masks.safetensors")
    assert read.linears.keys() == masks.linears.keys()
    for name, mask in masks.linears.items():
        assert read.linears[name].pattern == mask.pattern
        assert read.linears[name].shape == mask.shape
        assert torch.equal(read.linears[name].keep_mask(), mask.keep_mask())
    assert (read.base_fingerprint, read.recipe) == (masks.base_fingerprint, masks.recipe)


def test_saving_returns_the_checksum_that_the_file_carries_and_repeats(tmp_path):
    masks = mask_set(layers())
    checksum = masks.save(tmp_path / "a.safetensors")
    assert masks.checksum == MaskSet.load(tmp_path / "a.safetensors").checksum == checksum
    assert checksum == mask_set(layers()).save(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as stream:
        assert stream.metadata()["checksum"] == checksum


def test_realised_sparsity_counts_weights_not_layers():
    masks = mask_set(layers())
    pruned = {name: int((~mask.keep_mask()).sum()) for name, mask in masks.linears.items()}
    assert masks.sparsity == pytest.approx(sum(pruned.values()) / (12 * 16 + 20 * 12 + 12 * 16))
    assert masks.linears["blocks.0.down"].sparsity == pytest.approx(pruned["blocks.0.down"] / (20 * 12))


def test_a_2_4_mask_costs_three_quarters_of_a_bit_per_weight(tmp_path):
    mask = LinearMask.from_keep_mask(two_four(256, 512), TWO_FOUR)
    MaskSet({"layer": mask}).save(tmp_path / "masks.safetensors")
    payload = 256 * 512 * 0.75 / 8
    assert mask.packed.numel() == payload
    assert payload < (tmp_path / "masks.safetensors").stat().st_size < payload + 1000


def test_an_inconsistent_set_is_not_written(tmp_path):
    mask = dataclasses.replace(LinearMask.from_keep_mask(two_four(4, 8), TWO_FOUR), shape=(64, 8))
    with pytest.raises(PatchError, match=r"masks\.safetensors: layer some\.layer: .*the mask is not valid"):
        MaskSet({"some.layer": mask}).save(tmp_path / "masks.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(PatchError, match="no such file; run the stage that writes it first"):
        MaskSet.load(tmp_path / "masks.safetensors")


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, -7])
def test_a_truncated_file_is_refused(tmp_path, keep_bytes):
    path = tmp_path / "masks.safetensors"
    mask_set(layers()).save(path)
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(PatchError, match=r"masks\.safetensors: truncated or not a safetensors file"):
        MaskSet.load(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "masks.safetensors"
    mask_set(layers()).save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(PatchError, match="checksum does not match"):
        MaskSet.load(path)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("patch.maskset/999", "written in schema patch.maskset/999, this version reads"),
        ("patch.tokens/1", "not a patch.maskset file"),
    ],
)
def test_foreign_schemas_are_refused(tmp_path, schema, message):
    write_tensors(tmp_path / "other", {"ids": torch.zeros(2)}, schema, {})
    with pytest.raises(PatchError, match=message):
        MaskSet.load(tmp_path / "other")


def test_a_file_without_the_tensors_it_lists_is_refused(tmp_path):
    listed = {"linears": {"layer": {"pattern": "2:4", "shape": [4, 8]}}, "base_fingerprint": None, "recipe": {}}
    write_tensors(tmp_path / "masks", {}, SCHEMA, listed)
    with pytest.raises(PatchError, match=r"masks: .*layer"):
        MaskSet.load(tmp_path / "masks")


# the set on a model


def test_applying_a_set_prunes_the_layers_it_was_made_for():
    linears = layers()
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    masks = mask_set(linears)
    masks.apply_(linears)
    for name, linear in linears.items():
        assert torch.equal(linear.weight, before[name] * masks.linears[name].keep_mask())


def unchanged(linears: dict[str, nn.Linear], seed: int = 0) -> bool:
    return all(
        torch.equal(linears[name].weight, layer.weight) for name, layer in layers(seed).items() if name in linears
    )


def test_a_model_with_other_layer_names_is_refused_untouched():
    linears = layers()
    masks = mask_set(linears)
    renamed = {name.replace("blocks.1", "blocks.2"): linear for name, linear in linears.items()}
    with pytest.raises(
        PatchError, match=r"another model: 1 of its layers.*blocks\.1\.up.*1 of the model's.*blocks\.2\.up"
    ):
        masks.apply_(renamed)
    assert unchanged(linears)


def test_a_model_with_other_shapes_is_refused_untouched():
    linears = layers()
    masks = mask_set(linears)
    linears["blocks.1.up"] = nn.Linear(32, 12)
    with pytest.raises(
        PatchError, match=r"layer blocks\.1\.up: the mask is for shape \(12, 16\), the model has \(12, 32\)"
    ):
        masks.apply_(linears)
    del linears["blocks.1.up"]
    assert unchanged(linears)


def test_a_model_with_other_weights_is_refused_untouched():
    other = layers(seed=1)
    with pytest.raises(PatchError, match="names and shapes agree but the weights differ"):
        mask_set(layers()).apply_(other)
    assert unchanged(other, seed=1)


def test_a_pruned_model_is_not_pruned_again():
    linears = layers()
    masks = mask_set(linears)
    masks.apply_(linears)
    with pytest.raises(PatchError, match="already pruned"):
        masks.apply_(linears)


def test_a_set_of_unknown_origin_applies_to_any_weights():
    masks = mask_set(layers())
    masks.base_fingerprint = None
    linears = layers(seed=1)
    masks.apply_(linears)
    assert (linears["blocks.0.up"].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("shape", [(4, 8), (64, 96), (63, 100)])  # few and many weights per sampled one
def test_the_fingerprint_is_the_same_for_bfloat16_and_its_float32_copy(shape):
    half, full = nn.Linear(*shape).to(torch.bfloat16), nn.Linear(*shape)
    full.weight = nn.Parameter(half.weight.detach().float())
    assert fingerprint({"layer": half}) == fingerprint({"layer": full})


def test_the_fingerprint_does_not_depend_on_the_order_of_layers():
    linears = layers()
    assert fingerprint(linears) == fingerprint(dict(reversed(linears.items())))


def test_the_fingerprint_sees_names_and_weights():
    linears = layers()
    renamed = {name + "x": linear for name, linear in linears.items()}
    assert len({fingerprint(linears), fingerprint(renamed), fingerprint(layers(1))}) == 3
