"""Numbers that are read while their tensor is already being overwritten."""

import pytest
import torch

from patch.learning.readback import Readback


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_read_is_what_was_there_when_it_was_asked_for(device: str) -> None:
    values = torch.tensor([1.0, 2.5], device=device)
    numbers = Readback(values)
    values.zero_()
    assert numbers.tolist() == [1.0, 2.5]
