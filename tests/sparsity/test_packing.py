"""Bit packing against bits spelled out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patch.sparsity.packing import INVALID_CODE, codes_of, pack_bits, pack_codes, patterns_of, unpack_bits, unpack_codes

PAPER_ORDER = ["1100", "1010", "1001", "0110", "0101", "0011"]


def bits(text: str) -> list[bool]:
    return [character == "1" for character in text]


@given(rows=st.integers(1, 7), columns=st.integers(1, 13), seed=st.integers(0, 1000))
def test_bits_survive_packing(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-rows * columns // 8)
    assert torch.equal(unpack_bits(packed, (rows, columns)), mask)


def test_the_first_bit_is_the_lowest():
    assert pack_bits(torch.tensor(bits("1000000001"))).tolist() == [1, 2]


@given(codes=st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_codes_survive_packing(codes):
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8))
    assert packed.dtype == torch.uint8
    assert packed.numel() == 3 * -(-len(codes) // 8)
    assert unpack_codes(packed, len(codes)).tolist() == codes


def test_eight_codes_are_one_little_endian_word_of_24_bits():
    codes = [1, 2, 3, 4, 5, 0, 1, 5]
    word = sum(code << (3 * i) for i, code in enumerate(codes))
    assert bytes(pack_codes(torch.tensor(codes, dtype=torch.uint8)).tolist()) == word.to_bytes(3, "little")


@pytest.mark.parametrize(("code", "pattern"), enumerate(PAPER_ORDER))
def test_each_pattern_has_its_place_in_the_paper_as_code(code, pattern):
    mask = torch.tensor([bits(pattern)])
    assert codes_of(mask).tolist() == [code]
    assert torch.equal(patterns_of(torch.tensor([code], dtype=torch.uint8), (1, 4)), mask)


def test_every_other_group_of_four_is_invalid():
    others = ["".join(p) for p in itertools.product("01", repeat=4) if "".join(p) not in PAPER_ORDER]
    assert len(others) == 10
    assert codes_of(torch.tensor([bits(other) for other in others])).tolist() == [INVALID_CODE] * 10


@given(rows=st.integers(1, 5), groups=st.integers(1, 5), data=st.data())
def test_2_4_masks_survive_coding(rows, groups, data):
    size = rows * groups
    names = data.draw(st.lists(st.sampled_from(PAPER_ORDER), min_size=size, max_size=size))
    mask = torch.tensor([bits(name) for name in names]).reshape(rows, 4 * groups)
    codes = codes_of(mask)
    assert codes.tolist() == [PAPER_ORDER.index(name) for name in names]
    assert torch.equal(patterns_of(unpack_codes(pack_codes(codes), size), (rows, 4 * groups)), mask)
