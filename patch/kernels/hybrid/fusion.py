"""One product for linear layers that read the same input: query, key and value; gate and up.

The model's own code stays as it is. It goes on calling `q_proj`, `k_proj` and `v_proj`; the first call on an input
computes all three outputs, the others take theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""By the name that the common layer gets: its members, which lie side by side in a module."""


@dataclass(frozen=True)
class Group:
    """Linear layers of one module that can be fused."""

    parent: str
    name: str
    """A key of FUSED."""

    @property
    def members(self) -> list[str]:
        """Full names, in the order of the outputs."""
        return [f"{self.parent}.{member}" for member in FUSED[self.name]]


def groups(model: nn.Module) -> list[Group]:
    """All groups of `nn.Linear`s with one input size that all have a bias or all have none."""
    found = []
    for parent, module in model.named_modules():
        for name, members in FUSED.items():
            linears = [getattr(module, member, None) for member in members]
            if not all(isinstance(linear, nn.Linear) for linear in linears):
                continue
            if len({(linear.in_features, linear.bias is None) for linear in linears}) == 1:  # type: ignore[union-attr]
                found.append(Group(parent, name))
    return found


class FusedLinear(nn.Module):
    """A linear layer whose outputs belong to several layers of the model."""

    def __init__(self, linear: nn.Module, sizes: Sequence[int]):
        """linear: [..., in] -> [..., sum(sizes)]."""
        super().__init__()
        self.linear = linear
        self.sizes = list(sizes)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def take(self, x: Tensor, index: int) -> Tensor:
        """Output number `index` for x; computed now, unless it waits from a sibling's call on the same tensor."""
        if self._input is not x or index not in self._waiting:
            self._input = x
            self._waiting = dict(enumerate(self.linear(x).split(self.sizes, dim=-1)))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output


class Sibling(nn.Module):
    """Stands for one of the layers that a `FusedLinear` computes; has no state of its own."""

    def __init__(self, whole: FusedLinear, index: int):
        super().__init__()
        self._whole = (whole,)  # in a tuple: it is registered once, at the parent
        self._index = index
        self.in_features = whole.linear.in_features
        self.out_features = whole.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self._whole[0].take(x, self._index)


def install(model: nn.Module, group: Group, linear: nn.Module) -> None:
    """Put `linear`, the members' weights one above the other, in their place."""
    parent = model.get_submodule(group.parent)
    members = FUSED[group.name]
    whole = FusedLinear(linear, [int(getattr(parent, member).out_features) for member in members])
    parent.add_module(group.name, whole)
    for index, member in enumerate(members):
        setattr(parent, member, Sibling(whole, index))


def concatenated(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all."""
    if len(linears) == 1:
        return linears[0]
    weight = torch.cat([linear.weight for linear in linears])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if whole.bias is not None:
        whole.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return whole


def fuse_linears(model: Any) -> None:
    """Fuse all groups of a dense model in place: what a hybrid model's fused layers compare with."""
    for group in groups(model):
        install(model, group, concatenated([model.get_submodule(name) for name in group.members]))
