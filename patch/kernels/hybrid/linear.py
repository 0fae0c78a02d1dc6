"""`HybridLinear`: an `nn.Linear` for inference whose weight is packed into dense and 2:4 tiles."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patch.artefacts import PatchError
from patch.kernels.hybrid import dispatch
from patch.kernels.hybrid.format import DENSE_BYTES, DTYPES, SPARSE_BYTES, VERSION, HybridWeight, unpack

_WEIGHTS: weakref.WeakValueDictionary[int, HybridWeight] = weakref.WeakValueDictionary()
"""The weights of all layers by the address of their payload, which is theirs as long as they are here. Through it the
operator finds what kernels keep with a weight."""


class HybridLinear(nn.Module):
    """x [..., in] -> x @ weight^T + bias [..., out]; the weight takes 0.56 to 1 of the memory of a dense one.

    State: `payload` and `descriptors` (see `patch.kernels.hybrid.format`), `header` (version, shape, dtype), `bias`.
    Loading a state replaces the weight whatever tiles it has. Frozen: gradients reach the input, not the weight.
    """

    payload: Tensor
    descriptors: Tensor
    header: Tensor
    weight: HybridWeight

    def __init__(self, weight: HybridWeight, bias: Tensor | None = None):
        """bias: [out], of the weight's dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.register_buffer("payload", weight.payload)
        self.register_buffer("descriptors", weight.descriptors)
        self.register_buffer("header", torch.tensor(self.header_of(*weight.shape, weight.dtype)))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._renew_weight()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise PatchError(
                f"HybridLinear {self.in_features} -> {self.out_features}: the input is {x.dtype} {tuple(x.shape)}; it "
                f"must end in {self.in_features} and be {self.dtype}, as which the weight was packed."
            )
        if torch.compiler.is_compiling():
            return torch.ops.patch.hybrid_linear(
                x, self.payload, self.descriptors, self.out_features, self.in_features, self.bias
            )
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, unpack(self.weight), self.bias)
        return _multiply(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        sparse = round(100 * dispatch.sparse_share(self.weight))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{sparse} % of tiles 2:4"
        )

    def _renew_weight(self) -> None:
        """The buffers are other ones now, or hold something else: what kernels keep with the old weight is void."""
        self.weight = HybridWeight(self.out_features, self.in_features, self.dtype, self.payload, self.descriptors)
        if not self.payload.is_meta:
            _WEIGHTS[self.payload.data_ptr()] = self.weight

    def _apply(self, fn: Any, recurse: bool = True) -> HybridLinear:
        super()._apply(fn, recurse)
        self._renew_weight()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and pickles
        super().__setstate__(state)
        self._renew_weight()

    @staticmethod
    def header_of(out_features: int, in_features: int, dtype: torch.dtype) -> list[int]:
        """What identifies a saved weight."""
        return [VERSION, out_features, in_features, DTYPES.index(dtype)]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = ("header", "payload", "descriptors")
        state: dict[str, Tensor] = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if len(state) == len(names):
            try:
                check_state(self.header_of(self.out_features, self.in_features, self.dtype), **state)
            except PatchError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
                return
            if state["payload"].shape != self.payload.shape:
                self.payload = torch.empty_like(state["payload"], device=self.payload.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._renew_weight()


def check_state(expected: list[int], header: Tensor, payload: Tensor, descriptors: Tensor) -> None:
    """Raise PatchError unless a saved weight is of the `expected` header and its tiles fill the payload exactly."""
    if header.tolist() != expected:
        raise PatchError(
            f"the state is of version, shape and dtype {header.tolist()}, the layer of {expected}; "
            "they belong to different models, or to different versions of this package."
        )
    HybridWeight(expected[1], expected[2], DTYPES[expected[3]], payload, descriptors)
    flat = descriptors.flatten().long()
    starts = flat & 0x7FFFFFFF
    sizes = torch.where(flat < 0, SPARSE_BYTES // 1024, DENSE_BYTES // 1024)
    order = starts.argsort()
    ends = sizes[order].cumsum(0)
    if not torch.equal(starts[order], ends - sizes[order]) or int(ends[-1]) * 1024 != payload.numel():
        raise PatchError("the descriptors do not fit the payload; save the state again.")


@torch.library.custom_op(
    "patch::hybrid_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor payload, Tensor descriptors, int out_features, int in_features, Tensor? bias) -> Tensor",
)
def hybrid_linear(
    x: Tensor, payload: Tensor, descriptors: Tensor, out_features: int, in_features: int, bias: Tensor | None
) -> Tensor:
    """The layer as one operator, which `torch.compile` does not look into."""
    weight = _WEIGHTS.get(payload.data_ptr())
    if (
        weight is None
        or weight.payload.shape != payload.shape
        or weight.descriptors.data_ptr() != descriptors.data_ptr()
    ):
        weight = HybridWeight(out_features, in_features, x.dtype, payload, descriptors)
    return _multiply(x, weight, bias)


@hybrid_linear.register_fake
def _shape(
    x: Tensor, payload: Tensor, descriptors: Tensor, out_features: int, in_features: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _multiply(x: Tensor, weight: HybridWeight, bias: Tensor | None) -> Tensor:
    return dispatch.matmul(x.reshape(-1, weight.in_features), weight, bias).view(*x.shape[:-1], weight.out_features)
