import torch

from patch.learning.priors import codes_of_mask, pattern_offsets, tile_offsets
from patch.sparsity.maskset import LinearMask
from patch.sparsity.packing import PATTERNS_2_4
from patch.sparsity.patterns import Pattern


def test_pattern_prior_is_the_overlap_with_the_one_shot_pattern() -> None:
    codes = torch.arange(6, dtype=torch.uint8).view(2, 3)
    offsets = pattern_offsets(codes, strength=3.0, std=0.014)
    assert offsets.shape == (6, 2, 3)
    for group, code in enumerate(codes.flatten()):
        for pattern in range(6):
            both = int((PATTERNS_2_4[pattern] & PATTERNS_2_4[int(code)]).sum())
            torch.testing.assert_close(offsets[pattern].flatten()[group], torch.tensor((both - 1) * 0.042))


def test_tile_prior_marks_the_densest_tiles_of_the_reference() -> None:
    keep = torch.zeros(4, 16, dtype=torch.bool)
    keep[:2, 4:8] = True  # 8 of 8
    keep[2:, 8:10] = True  # 4 of 8
    offsets = tile_offsets(keep, (2, 4), sparsity=0.375, strength=3.0, std=0.01)  # a quarter of 8 tiles is dense
    expected = torch.full((2, 4), -0.03)
    expected[0, 1] = expected[1, 2] = 0.03
    torch.testing.assert_close(offsets, expected)


def test_tile_prior_compares_shares_where_edge_tiles_are_smaller() -> None:
    keep = torch.zeros(3, 8, dtype=torch.bool)
    keep[:2, :3] = True  # 6 of 8
    keep[2, 4:] = True  # 4 of 4, in a tile of one row
    offsets = tile_offsets(keep, (2, 4), sparsity=0.375, strength=1.0, std=1.0)
    assert offsets.tolist() == [[-1, -1], [-1, 1]]


def test_tile_prior_at_half_sparsity_has_no_dense_tile() -> None:
    assert (tile_offsets(torch.ones(8, 8, dtype=torch.bool), (4, 4), 0.5, 3.0, 0.014) < 0).all()


def test_codes_of_a_mask_come_back_in_the_shape_of_its_groups() -> None:
    codes = torch.randint(6, (5, 3), generator=torch.Generator().manual_seed(0))
    keep = PATTERNS_2_4[codes].reshape(5, 12)
    assert torch.equal(codes_of_mask(LinearMask.from_keep_mask(keep, Pattern.parse("2:4"))), codes.to(torch.uint8))
