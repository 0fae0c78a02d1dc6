"""The order in which training text is read."""

import torch

from patch.learning.order import Shuffled

IDS = torch.arange(20).view(10, 2)


def test_every_epoch_reads_every_sequence_once_in_an_order_of_its_own() -> None:
    text = Shuffled(IDS, seed=0)
    first, second = text[range(10)], text[range(10, 20)]
    assert torch.equal(first.sort(dim=0).values, IDS)
    assert torch.equal(second.sort(dim=0).values, IDS)
    assert not torch.equal(first, second)


def test_a_resumed_run_reads_on_where_it_stopped() -> None:
    whole = Shuffled(IDS, seed=3)[range(25)]
    assert torch.equal(Shuffled(IDS, seed=3)[range(7, 25)], whole[7:])


def test_seeds_read_in_different_orders() -> None:
    assert not torch.equal(Shuffled(IDS, seed=0)[range(10)], Shuffled(IDS, seed=1)[range(10)])
