"""The Hessian that SparseGPT and Thanos share; how it is damped and inverted is tested with SparseGPT."""

from __future__ import annotations

import logging

import pytest
import torch

from patch.pruning import hessian
from patch.pruning.hessian import Hessian

CPU = torch.device("cpu")


@pytest.fixture
def sequences() -> torch.Tensor:
    return torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(0))


def statistic_of(sequences: torch.Tensor) -> Hessian:
    statistic = Hessian(sequences.shape[-1], CPU)
    for part in sequences.split([1, 2]):
        statistic.add(part)
    return statistic


@pytest.mark.parametrize(("strip", "tokens_at_a_time"), [(8, 7), (10, 20), (24, 60), (100, 100)])
def test_strips_leave_out_only_what_symmetry_gives(strip, tokens_at_a_time, sequences, monkeypatch):
    monkeypatch.setattr(hessian, "STRIP", strip)
    monkeypatch.setattr(hessian, "TOKENS", tokens_at_a_time)
    statistic, tokens = statistic_of(sequences), sequences.flatten(0, 1).double()
    torch.testing.assert_close(statistic.sum.triu(), (tokens.T @ tokens).triu())
    factor = statistic.inverse_factor(0.01).double()
    damped = tokens.T @ tokens * 2 / 3
    damped += 0.01 * damped.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24).double(), rtol=0, atol=1e-4)


def test_sums_are_in_float64_on_a_cpu_up_to_a_width():
    """A sum that float32 would lose: 1 beside 2^24."""
    narrow = Hessian(2, CPU)
    narrow.add(torch.tensor([[[4096.0, 1.0], [1.0, 1.0]]]))
    assert narrow.sum[0, 0] == 4096.0**2 + 1
    assert narrow.inverse_factor(0.01).dtype == narrow.input_norms().dtype == torch.float32
    assert Hessian(hessian.DOUBLE + 1, CPU).sum.dtype == torch.float32


def test_the_factor_is_kept_for_its_damping(sequences):
    statistic = statistic_of(sequences)
    first = statistic.inverse_factor(0.01)
    assert statistic.inverse_factor(0.01) is first
    assert not torch.equal(statistic.inverse_factor(0.1), first)
    assert torch.equal(statistic.inverse_factor(0.01), first)


def test_a_singular_hessian_is_damped_more_and_the_log_says_so(caplog):
    """Two equal inputs, and a damping that rounding swallows even in float64."""
    inputs = torch.tensor([1.0, 1.0, 3.0]).repeat(1, 5, 1)
    statistic = Hessian(3, CPU)
    statistic.add(inputs)
    with caplog.at_level(logging.WARNING, logger="patch"):
        factor = statistic.inverse_factor(1e-17)
    assert caplog.messages
    assert caplog.messages[0] == "Hessian of 3 inputs: not positive definite at damping 1e-17"
    assert factor.isfinite().all()
    again = Hessian(3, CPU)
    again.add(inputs)
    assert torch.equal(factor, again.inverse_factor(1e-17 * 10 ** len(caplog.messages)))


def test_part_of_the_factor_belongs_to_the_hessian_of_the_later_inputs(sequences):
    statistic = statistic_of(sequences)
    tokens = sequences.flatten(0, 1).double()
    damped = tokens.T @ tokens * 2 / 3
    damped += 0.01 * damped.diagonal().mean() * torch.eye(24)
    rest = statistic.inverse_factor(0.01)[10:, 10:].double()
    torch.testing.assert_close(rest.T @ rest, torch.linalg.inv(damped[10:, 10:]), rtol=1e-4, atol=1e-5)


def test_its_diagonal_holds_the_norms_that_wanda_uses(sequences):
    expected = sequences.square().sum(1).mean(0)
    torch.testing.assert_close(statistic_of(sequences).input_norms(), expected)
