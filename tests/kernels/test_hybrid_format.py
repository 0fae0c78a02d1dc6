"""The hybrid-tile format: nothing is lost, and the bytes are where the tensor cores look for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patch.artefacts import PatchError
from patch.kernels.hybrid import HybridWeight, pack, reference_matmul, unpack
from patch.sparsity.tiles import expand, grid_shape

SHAPES = [(1, 4), (128, 64), (129, 68), (200, 36), (256, 128), (300, 260), (384, 132)]
TILES = [(128, 128), (128, 64), (16, 32), (50, 20), (1000, 1000)]


ROWS_OF_A_KIND = [(True, False, False, True, True), (False, False, True, True, False)]
"""Whether the tiles of a row are all dense; if not, all are 2:4."""


def random_case(shape, tile=(128, 128), share=0.5, dtype=torch.bfloat16, seed=0, dense_tiles=None):
    """Weight, keep mask and dense tiles: 2:4 in a random `share` of the tiles, or in all but `dense_tiles`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    if dense_tiles is None:
        dense_tiles = torch.rand(grid_shape(shape, tile), generator=generator) >= share
    order = torch.rand(shape[0], shape[1] // 4, 4, generator=generator).argsort(-1)
    keep = (order < 2).view(shape) | expand(dense_tiles, shape, tile)
    return weight, keep, dense_tiles


def rows_of_a_kind(dense_rows):
    """The same for [600, 520], whose tiles of 128 x 64 are ragged on both sides."""
    return random_case((600, 520), (128, 64), dense_tiles=torch.tensor(dense_rows)[:, None].expand(5, 9))


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_masked_weight_bit_for_bit(shape, dtype):
    for seed, tile in enumerate(TILES):
        for share in (0, 0.5, 1):
            weight, keep, dense_tiles = random_case(shape, tile, share, dtype, seed)
            hybrid = pack(weight, keep, dense_tiles, tile)
            assert torch.equal(bits(unpack(hybrid)), bits(torch.where(keep, weight, 0)))


@pytest.mark.parametrize("dense_rows", ROWS_OF_A_KIND, ids=str)
def test_rows_of_dense_tiles_beside_rows_of_2_4_ones(dense_rows):
    weight, keep, dense_tiles = rows_of_a_kind(dense_rows)
    hybrid = pack(weight, keep, dense_tiles, (128, 64))
    assert hybrid.sparse_tiles.tolist() == [[not dense] * 9 for dense in dense_rows]
    assert hybrid.payload.numel() == sum(9 * (16384 if dense else 9216) for dense in dense_rows)
    assert torch.equal(bits(unpack(hybrid)), bits(torch.where(keep, weight, 0)))
    x, bias = torch.randn(3, 520).bfloat16(), torch.randn(600).bfloat16()
    expected = x.double() @ torch.where(keep, weight, 0).double().T + bias.double()
    torch.testing.assert_close(reference_matmul(x, hybrid, bias).double(), expected, rtol=0.02, atol=0.2)


def test_signed_zeros_subnormals_and_extremes_survive():
    weight, keep, _ = random_case((128, 64), share=1)
    numbers = torch.tensor([-0.0, 1e-40, -3e38, 3e38], dtype=torch.bfloat16)
    weight = numbers[torch.randint(4, weight.shape, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(bits(unpack(pack(weight, keep))), bits(torch.where(keep, weight, 0)))


def test_tiles_of_any_size_are_regrouped_into_those_of_the_format():
    # a few weights that are kept outside the pattern make the tile around them dense
    _, keep, _ = random_case((256, 256), share=1)
    keep[130:135, 70:90] = True
    hybrid = pack(torch.ones(256, 256).half(), keep)
    assert hybrid.sparse_tiles.tolist() == [[True] * 4, [True, False, True, True]]
    assert hybrid.sparsity == 0.5 * 7 / 8


def test_sparsity_counts_real_weights_not_padding():
    dense_tiles = torch.tensor([[True, False], [False, True]])
    keep = (torch.arange(68) % 4 < 2) | expand(dense_tiles, (130, 68), (128, 64))
    hybrid = pack(torch.ones(130, 68).bfloat16(), keep, dense_tiles, (128, 64))
    assert hybrid.sparsity == pytest.approx(1 - keep.double().mean().item())


@pytest.mark.parametrize(("percent", "ratio"), [(0, 1.0), (25, 0.782), (45, 0.607), (50, 0.563)])
def test_bytes_against_the_dense_weight(percent, ratio):
    shape, tiles = (2560, 1024), 20 * 8
    dense_tiles = (torch.arange(tiles) >= tiles * percent * 2 // 100).view(20, 8)
    keep = (torch.arange(1024) % 4 < 2).expand(shape) | expand(dense_tiles, shape, (128, 128))
    hybrid = pack(torch.randn(shape).bfloat16(), keep, dense_tiles)
    assert hybrid.sparsity == percent / 100
    assert hybrid.nbytes / (2 * shape[0] * shape[1]) == pytest.approx(ratio, abs=1e-3)


# The bytes, by a second reading of the documentation of mma.sp.m16n8k32, wgmma and its swizzles: one value at a time.


def value_at(tile_bytes, row, column, *, row_bytes):
    """What a matrix descriptor with the swizzle of `row_bytes` reads: address bits from 4 on ^= bits from 7 on."""
    address = row * row_bytes + 2 * column
    address ^= (address >> 7 & row_bytes // 16 - 1) << 4
    return tile_bytes[address : address + 2].view(torch.bfloat16).double().item()


def metadata_fields(word):
    """A lane's register -> [(group row 0 or 8, group 0 to 3, first index, second index)]."""
    return [
        (8 * half, g, word >> 16 * half + 4 * g & 3, word >> 16 * half + 4 * g + 2 & 3)
        for half in (0, 1)
        for g in range(4)
    ]


def expand_by_lanes(tile_bytes):
    """[128, 64] double: what wgmma.sp multiplies, from the registers of 32 lanes x 8 slices x 2 steps of 32 columns."""
    words = tile_bytes[8192:].view(torch.int32).long() & 0xFFFFFFFF
    tile = torch.zeros(128, 64, dtype=torch.double)
    for piece in range(8):
        for step in (0, 1):  # the sparsity selector: 0 takes the metadata of lanes 0 and 1 of each four, 1 of 2 and 3
            for quad in range(8):
                for half in (0, 1):  # columns 0 to 15 of the step, or 16 to 31
                    word = words[32 * piece + 4 * quad + 2 * step + half].item()
                    for below, g, first, second in metadata_fields(word):
                        row, group = 16 * piece + quad + below, 8 * step + 4 * half + g
                        assert first < second
                        tile[row, 4 * group + first] = value_at(tile_bytes, row, 2 * group, row_bytes=64)
                        tile[row, 4 * group + second] = value_at(tile_bytes, row, 2 * group + 1, row_bytes=64)
    return tile


def test_registers_and_swizzles_of_the_tensor_cores_yield_the_product():
    weight, keep, dense_tiles = random_case((300, 192), (128, 64), seed=3)
    hybrid = pack(weight, keep, dense_tiles, (128, 64))
    assert 0 < hybrid.sparse_tiles.sum() < hybrid.sparse_tiles.numel()
    x = torch.randn(5, 192, dtype=torch.double)
    y = torch.zeros(5, 384, dtype=torch.double)
    for row in range(3):
        for column in range(3):
            descriptor = hybrid.descriptors[row, column].item()
            start = (descriptor & 0x7FFFFFFF) * 1024
            if descriptor < 0:
                tile = expand_by_lanes(hybrid.payload[start : start + 9216])
            else:
                dense = hybrid.payload[start : start + 16384]
                tile = torch.tensor([[value_at(dense, r, k, row_bytes=128) for k in range(64)] for r in range(128)])
            y[:, 128 * row : 128 * row + 128] += x[:, 64 * column : 64 * column + 64] @ tile.double().T
    torch.testing.assert_close(y[:, :300], x @ torch.where(keep, weight, 0).double().T)
    assert (y[:, 300:] == 0).all()
    torch.testing.assert_close(reference_matmul(x.bfloat16(), hybrid).double(), y[:, :300], rtol=0.02, atol=0.2)


@pytest.mark.parametrize(
    ("pattern", "code"),
    [("1100", 0x4), ("1010", 0x8), ("1001", 0xC), ("0110", 0x9), ("0101", 0xD), ("0011", 0xE)],
)
def test_metadata_codes_are_those_of_the_documentation(pattern, code):
    keep = torch.tensor([bit == "1" for bit in pattern]).repeat(128, 16)
    hybrid = pack(torch.ones(128, 64).bfloat16(), keep)
    assert hybrid.payload[8192:].tolist() == [code * 17] * 1024


def test_payload_goes_down_the_columns_by_pairs_of_tile_rows():
    weight, keep, dense_tiles = random_case((3 * 128, 3 * 64), (128, 64), seed=5)
    starts = pack(weight, keep, dense_tiles, (128, 64)).descriptors & 0x7FFFFFFF
    sizes = torch.where(dense_tiles, 16, 9)
    order = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]
    expected = 0
    for place in order:
        assert starts[place] == expected
        expected += sizes[place].item()


def test_bias_and_leading_dimensions():
    weight, keep, _ = random_case((128, 64))
    x, bias = torch.randn(2, 3, 64).bfloat16(), torch.randn(128).bfloat16()
    y = reference_matmul(x, pack(weight, keep), bias)
    assert torch.equal(y, torch.nn.functional.linear(x, torch.where(keep, weight, 0), bias))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(number):
    weight, keep, _ = random_case((128, 64))
    weight[5, 7] = number
    with pytest.raises(PatchError, match="128x64: it holds NaN or infinite"):
        pack(weight, keep)


def test_refuses_a_mask_that_is_not_2_4_where_it_says_so():
    weight, keep, dense_tiles = random_case((256, 256), share=1)
    keep[200, 130] = ~keep[200, 130]
    with pytest.raises(PatchError, match=r"not 2:4 in tile \(1, 1\) of 128x128"):
        pack(weight, keep, dense_tiles)
    keep[200, 128:132] = False  # fewer than two are no 2:4 either
    with pytest.raises(PatchError, match=r"not 2:4 in tile \(1, 1\)"):
        pack(weight, keep, dense_tiles)


def test_refuses_columns_that_do_not_split_into_fours_unless_all_is_dense():
    weight, keep = torch.ones(8, 6).bfloat16(), torch.ones(8, 6, dtype=torch.bool)
    assert torch.equal(unpack(pack(weight, keep)), weight)
    with pytest.raises(PatchError, match="6 inputs do not split into 4s"):
        pack(weight, keep, torch.zeros(1, 1, dtype=torch.bool))
    keep[0, 0] = False
    with pytest.raises(PatchError, match="6 inputs do not split into 4s"):
        pack(weight, keep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, k, t: (w.float(), k, t), "torch.float32 cannot be packed"),
        (lambda w, k, t: (w[0], k, t), "only matrices"),
        (lambda w, k, t: (w[:0], k[:0], t), "only matrices"),
        (lambda w, k, t: (w, k[:100], t), "must be bool and of the weight's shape"),
        (lambda w, k, t: (w, k.int(), t), "must be bool and of the weight's shape"),
        (lambda w, k, t: (w, k, t[:1]), r"need bool \(2, 2\)"),
    ],
)
def test_refuses_odd_types_and_shapes(change, message):
    with pytest.raises(PatchError, match=message):
        pack(*change(*random_case((256, 256))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this is version 1"),
        ({"dtype": torch.float32}, "torch.float32 cannot be packed"),
        ({"out_features": 300}, r"not int32 \(3, 4\)"),
        ({"payload": torch.zeros(1000, dtype=torch.uint8)}, "not bytes in whole KiB"),
    ],
)
def test_refuses_parts_that_do_not_belong_together(change, message):
    weight, keep, dense_tiles = random_case((256, 256))
    hybrid = pack(weight, keep, dense_tiles)
    assert isinstance(hybrid.to("cpu"), HybridWeight)
    with pytest.raises(PatchError, match=message):
        replace(hybrid, **change)
