"""Running pruned models: linear layers with 2:4 tiles become smaller and faster ones, the rest stays as it is.

    model = patch.load("path/or/hub-id", "mask.safetensors", device="cuda")

The result is the same transformers model, and its logits those of the pruned dense one within rounding: `generate`,
CUDA graphs, `torch.compile`, `state_dict` and lm-evaluation-harness work as before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.exporting import MASK_FILE, masks_in
from patch.kernels.hybrid import dispatch
from patch.kernels.hybrid.format import DTYPES, HybridWeight, pack
from patch.kernels.hybrid.fusion import Group, concatenated, groups, install
from patch.kernels.hybrid.linear import HybridLinear, check_state
from patch.models import load_model, prunable_linears
from patch.sparsity.maskset import LinearMask, MaskSet

TOKENS = (1, 16, 64, 2048)
"""Decoding of one and of some sequences, of many, and a prompt."""
log = logging.getLogger(__name__)


def load(
    model: PreTrainedModel | str | Path,
    masks: MaskSet | str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: str = "auto",
    fuse: bool = True,
    tokens: Sequence[int] = TOKENS,
) -> PreTrainedModel:
    """Prune a model and pack its linear layers, in place; returns it.

    model: the unpruned model, or the same already pruned; or whatever `load_model` takes: a directory, a hub id.
    masks: a MaskSet or its file. None for the one beside the weights in an export directory, `mask.safetensors`.
    device: where to pack and run; None for the device that the model is on.
    dtype: of a model that is loaded here; "bfloat16" or "float16" where it was saved in something else.
    fuse: compute query, key and value by one product, and gate and up.
    tokens: on a GPU, a layer that would be slower than dense (by more than 3 %) in a call with any of these numbers of
        tokens stays dense. The default is decoding and prompts; (1, 16) for decoding alone, which packs more layers;
        () packs every layer that gets smaller.

    So in calls with `tokens` no layer is slower than dense by more than 3 %. A time stands for fewer tokens, too, down
    to half as many: by default 9 to 16, 33 to 64 and 1025 to 2048 are covered. Other numbers are not looked at. Times
    are those of `patch.kernels.hybrid.dispatch`, one for each of `tokens`, shape and share of 2:4 tiles (to 5 %): the
    first load on a GPU measures them, later ones read them from a file.

    Layers of a pattern without 2:4 groups of four (unstructured, dense) stay `nn.Linear`s with zeros.
    Raises PatchError where the mask belongs to another model, the weights cannot be packed or no kernel runs on the
    device, naming the layer.
    """
    if masks is None:
        masks = masks_in(model) if isinstance(model, str | Path) else None
        if masks is None:
            name = model if isinstance(model, str | Path) else type(model).__name__
            raise PatchError(f"model {name}: give a mask; only a directory with a {MASK_FILE} needs none.")
    if not isinstance(masks, MaskSet):
        masks = MaskSet.load(masks)
    if not isinstance(model, PreTrainedModel):
        model = load_model(str(model), dtype=dtype)
    if model.dtype not in DTYPES:
        raise PatchError(
            f"model {model.name_or_path or type(model).__name__}: it is {model.dtype}, hybrid weights are bfloat16 or "
            'float16; load it with dtype="bfloat16".'
        )
    _prune(model, masks)
    where = torch.device(device) if device is not None else model.device
    _pack(model, masks, where, fuse, tokens)
    return model.to(where)  # type: ignore[arg-type]


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Give `model` the layers and weights of the `state_dict` of a model that `load` made; in place; returns it.

    model: a dense model of the same architecture, such as `AutoModelForCausalLM.from_config` makes.
    Raises PatchError where they do not belong together.
    """
    linears = prunable_linears(model)
    fused = {f"{group.parent}.{group.name}.linear": group for group in groups(model)}
    for name in [*linears, *fused]:
        if f"{name}.payload" not in state and (name in linears or f"{name}.weight" not in state):
            continue
        members = fused[name].members if name in fused else [name]
        dense = concatenated([linears[member] for member in members])
        packed = f"{name}.payload" in state
        _put(model, fused.get(name), name, _layer_of_state(name, dense, state) if packed else dense)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise PatchError(f"the state does not belong to this model, {type(model).__name__}: {reason}") from None
    return model


def hybrid_linears(model: nn.Module) -> dict[str, HybridLinear]:
    """All packed layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HybridLinear)}


def _prune(model: PreTrainedModel, masks: MaskSet) -> None:
    linears = prunable_linears(model)
    same_names = linears.keys() == masks.linears.keys()
    if same_names and all(_is_pruned(linear.weight, masks.linears[name]) for name, linear in linears.items()):
        return  # such as an export, whose weights are not those that the mask was made for any more
    masks.apply_(linears)


def _is_pruned(weight: Tensor, mask: LinearMask) -> bool:
    if tuple(weight.shape) != mask.shape:
        return False
    keep = mask.to(weight.device).keep_mask()
    if mask.values is not None and not torch.equal(weight[keep], mask.values.to(weight)):
        return False
    return not bool(weight.masked_fill(keep, 0).any())


def _pack(model: PreTrainedModel, masks: MaskSet, device: torch.device, fuse: bool, tokens: Sequence[int]) -> None:
    """Replace layers one after the other, so that at no time more than one is there twice."""
    before = after = packed = 0
    slow: list[str] = []
    for group, name, members in list(_units(model, fuse)):
        dense = concatenated([model.get_submodule(member) for member in members]).to(device)  # type: ignore[misc]
        size = dense.weight.numel() * dense.weight.element_size()
        weight = _packed(name, dense, [masks.linears[member] for member in members])
        layer: nn.Module = dense
        if weight is not None and (reason := _slower(weight, tokens)):
            slow.append(f"{name} ({reason})")
        elif weight is not None and weight.nbytes < size:
            layer = HybridLinear(weight, dense.bias)
            packed += 1
        _put(model, group, name, layer)
        before, after = before + size, after + (weight.nbytes if isinstance(layer, HybridLinear) and weight else size)
    log.info(
        "%d linear layers hold 2:4 tiles now, and all take %.2f of the memory that they took",
        packed,
        after / before,
    )
    if slow:
        log.info("%d layers stay dense, which is faster here: %s", len(slow), "; ".join(slow))


def _units(model: PreTrainedModel, fuse: bool) -> Iterator[tuple[Group | None, str, list[str]]]:
    """What becomes one layer: its group, its name in the model, and the layers that it is made of."""
    linears = list(prunable_linears(model))
    found = [group for group in groups(model) if group.members[0] in linears] if fuse else []
    fused = {member: group for group in found for member in group.members}
    for name in linears:
        if name not in fused:
            yield None, name, [name]
        elif name == fused[name].members[0]:
            group = fused[name]
            yield group, f"{group.parent}.{group.name}.linear", group.members


def _packed(name: str, dense: nn.Linear, masks: Sequence[LinearMask]) -> HybridWeight | None:
    """The layer's weight with its 2:4 tiles; None where its masks are not made of them."""
    if not all(mask.pattern.kind in ("tiles", "dense") or (mask.pattern.n, mask.pattern.m) == (2, 4) for mask in masks):
        return None
    keep = torch.cat([mask.to(dense.weight.device).keep_mask() for mask in masks])
    if keep.all():
        return None
    try:
        weight = pack(dense.weight, keep)
        dispatch.check(weight)
    except PatchError as error:
        raise PatchError(f"layer {name}: {error}") from None
    return weight


def _slower(weight: HybridWeight, tokens: Sequence[int]) -> str | None:
    """Where the layer would be slower than dense, or None; also where that cannot be measured."""
    for number in tokens:
        choice = dispatch.choose(number, weight)
        if choice.over_dense is not None and choice.over_dense > dispatch.SLOWER:
            return f"{number} tokens: {choice.reason}"
    return None


def _put(model: nn.Module, group: Group | None, name: str, layer: nn.Module) -> None:
    if group is not None:
        install(model, group, layer)
    else:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


def _layer_of_state(name: str, dense: nn.Linear, state: Mapping[str, Tensor]) -> HybridLinear:
    tensors = {part: state.get(f"{name}.{part}") for part in ("header", "payload", "descriptors")}
    expected = HybridLinear.header_of(dense.out_features, dense.in_features, dense.weight.dtype)
    try:
        check_state(expected, **tensors)  # type: ignore[arg-type]
    except PatchError as error:
        raise PatchError(f"layer {name}: {error}") from None
    weight = HybridWeight(
        dense.out_features, dense.in_features, dense.weight.dtype, tensors["payload"], tensors["descriptors"]  # type: ignore[arg-type]
    )  # fmt: skip
    return HybridLinear(weight.to(dense.weight.device), dense.bias)
