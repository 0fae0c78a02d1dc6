"""What the linear layers of a model weigh, dense and with the 2:4 tiles of its mask packed, and what packing takes."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedModel

from patch import inference
from patch.benchmarking.options import RANDOM
from patch.benchmarking.replay import synchronize
from patch.models import prunable_linears
from patch.provenance import stamp
from patch.sparsity.maskset import MaskSet


def measure(source: str, model: PreTrainedModel, masks: MaskSet, mask_name: str = RANDOM) -> dict[str, Any]:
    """One row; packs the model in place, on its device. `smallest_ratio` is that of the layer that gains most.

    `pack_s`: seconds of all of `patch.load` but measuring kernels, until the device has finished.
    """
    total = sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
    names = list(prunable_linears(model))
    dense = _sizes(model, names)
    synchronize(model.device)
    begin = time.perf_counter()
    inference.load(model, masks, fuse=False, tokens=())
    synchronize(model.device)
    seconds = time.perf_counter() - begin
    hybrid = _sizes(model, names)
    before, after = sum(dense.values()), sum(hybrid.values())
    return {
        "model": source,
        "sparsity_percent": round(100 * masks.sparsity, 2),
        "hybrid_layers": len(inference.hybrid_linears(model)),
        "linear_layers": len(names),
        "dense_gib": round(before / 2**30, 4),
        "hybrid_gib": round(after / 2**30, 4),
        "ratio": round(after / before, 4),
        "smallest_ratio": round(min(hybrid[name] / dense[name] for name in names), 4),
        "whole_model_dense_gib": round(total / 2**30, 4),
        "whole_model_hybrid_gib": round((total - before + after) / 2**30, 4),
        "pack_s": round(seconds, 3),
        **stamp(),
        "mask": mask_name,
    }


def _sizes(model: PreTrainedModel, names: list[str]) -> dict[str, int]:
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    return {name: int(layer.weight.nbytes) for name, layer in layers.items()}
