"""The generator against published vectors, and the noise made of it."""

from __future__ import annotations

import math

import pytest
import torch

from patch.kernels.philox import philox, spacings
from patch.kernels.soft_mask import Sampling, gumbel_of, philox_noise, tabulated_noise

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822
# Random123's kat_vectors: rounds, counter, key, words
KNOWN = [
    (7, (0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
EULER = 0.5772156649015329
NOISES = pytest.mark.parametrize("noise", [tabulated_noise, philox_noise])
ROWS, GROUPS = 200, 500


def draw(noise, seed=1, rank=0, micro_step=0, layer=0, rows=ROWS):
    """Gumbel noise; of what is so up to a shift the shift is drawn here: the sum of six exponentials is independent."""
    sampling = Sampling(seed, rank, "cpu")
    sampling.set(micro_step, scale=1.0, temperature=1.0, accumulate=False)
    gumbel = noise(sampling, layer, GROUPS)(rows)
    if noise is tabulated_noise:
        return gumbel
    generator = torch.Generator().manual_seed(1000 * seed + 100 * rank + 10 * micro_step + layer)
    exponentials = torch.empty(6, rows, GROUPS).exponential_(generator=generator)
    return gumbel - exponentials.sum(0).log()


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN)
def test_known_answers(rounds, counter, key, words):
    assert tuple(int(word) for word in philox(key, counter, rounds)) == words


def test_counters_broadcast():
    words = philox(5, (torch.arange(6).view(2, 3), 1, 2, 3))
    assert [int(word[1, 2]) for word in words] == [int(word) for word in philox(5, (5, 1, 2, 3))]


def test_spacings_are_what_lies_between_five_uniform_numbers():
    words = philox(1, (torch.arange(20000), 0, 0, 0))
    parts = spacings(words)
    assert parts.shape == (6, 20000)
    assert parts.min() >= 2**-23
    assert (parts.double().sum(0) == 1).all()


def test_every_one_of_100_bits_is_fair_and_used_once():
    words = philox(1, (torch.arange(20000), 0, 0, 0))
    places = (spacings(words).double().cumsum(0)[:5] * 2**23).long().T
    integers = (places.gather(1, (places & 7).argsort(dim=1)) >> 3).T  # in the order of their words
    bits = (integers.unsqueeze(-1) >> torch.arange(20) & 1).transpose(1, 2).reshape(100, -1).double()
    assert (bits.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(20000)
    correlation = torch.corrcoef(bits).fill_diagonal_(0).abs().max()
    assert correlation < 5.5 / math.sqrt(20000)


@NOISES
def test_noise_follows_the_gumbel_distribution(noise):
    gumbel = draw(noise).double().flatten()
    count = len(gumbel)
    histogram = torch.histc(torch.exp(-torch.exp(-gumbel)), bins=64, min=0, max=1)
    chi_square = ((histogram - count / 64).square() / (count / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    variance = math.pi**2 / 6
    assert abs(gumbel.mean() - EULER) < 5 * math.sqrt(variance / count)
    assert abs(gumbel.var() - variance) < 5 * variance * math.sqrt(4.4 / count)


@NOISES
@pytest.mark.parametrize("change", [{"seed": 2}, {"rank": 1}, {"micro_step": 1}, {"layer": 1}])
def test_streams_are_independent(noise, change):
    one, other = draw(noise), draw(noise, **change)
    correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(one.numel())


@NOISES
def test_neighbours_are_independent(noise):
    gumbel = draw(noise)
    rows = torch.cat([gumbel[:, :-1, :-1], gumbel[:, 1:, :-1], gumbel[:, :-1, 1:]]).flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 5 / math.sqrt(rows.shape[1])


@NOISES
@pytest.mark.parametrize("groups", [3, 5, 8])
def test_noise_is_the_same_however_many_rows_are_drawn_at_once(noise, groups):
    sampling = Sampling(1, 0, "cpu")
    one, many = noise(sampling, 0, groups), noise(sampling, 0, groups)
    assert torch.equal(torch.cat([one(1), one(2), one(4)], dim=1), many(7))


def test_the_extreme_integers_give_finite_noise():
    extremes = gumbel_of(torch.tensor([0, 2**16 - 1]), bits=16)
    torch.testing.assert_close(extremes, torch.tensor([-2.4668, 11.7835], dtype=torch.float64), rtol=0, atol=1e-3)
    equal = spacings(tuple(torch.tensor([0, ONES]) for _ in range(4)))
    assert (equal > 0).all()
