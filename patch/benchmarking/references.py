"""The reference implementations of pruning and compression, checkouts of repositories, as peers to measure against.

Each becomes a function of one layer's weight and inputs. Their own code accumulates, scores and updates, with the
settings of their own main scripts and one sequence at a time, as their drivers do. Nothing of it is part of this
project.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from patch.artefacts import PatchError, checksum_json
from patch.compression.options import Compression
from patch.kernels import runs_triton
from patch.methods import ProxSparse
from patch.sparsity.patterns import Pattern

Prune = Callable[[Tensor, Tensor, Pattern, float], Tensor]
"""weight [out, in], inputs [sequences, tokens, in], pattern, sparsity (0 to 1) -> new weight [out, in]"""
Compress = Callable[[Tensor, Tensor, Tensor], Tensor]
"""weight [out, in], which of it to keep, inputs [sequences, tokens, in] -> new weight [out, in], adapters included"""

REPOSITORIES = {
    "magnitude": ("wanda", "locuslab/wanda", "lib/prune.py"),
    "wanda": ("wanda", "locuslab/wanda", "lib/prune.py"),
    "sparsegpt": ("sparsegpt", "IST-DASLab/sparsegpt", "sparsegpt.py"),
    "thanos": ("thanos", "vectozavr/thanos", "lib/thanos.py"),
    "proxsparse": ("proxsparse", "amazon-science/ProxSparse", "end-to-end/prox_op.py"),
}
"""By method: the option that takes its checkout, the repository on GitHub, and the file that is used."""
SLIM = ("slim", "Paramathic/slim", "slim/lora.py")


def load_reference(method: str, checkout: Path) -> Prune:
    """The reference of a key of REPOSITORIES. Raises PatchError for another checkout."""
    module = _load(checkout, *REPOSITORIES[method])
    prune: dict[str, Prune] = {
        "magnitude": partial(_drive, module, "prune_magnitude"),
        "wanda": partial(_drive, module, "prune_wanda"),
        "sparsegpt": partial(_sparsegpt, module),
        "thanos": partial(_thanos, module),
        "proxsparse": partial(_proxsparse, module),
    }
    return partial(_quietly, prune[method])


def load_slim(checkout: Path, options: Compression) -> Compress:
    """SLiM, of which `options` choose quantiser, groups and rank. Raises PatchError for another checkout."""
    with _stand_in_for_triton():
        module = _load(checkout, *SLIM)
    statistic = _import(checkout / "slim" / "layerwrapper.py", checkout).WrappedGPT
    return partial(_quietly, partial(_slim, module, statistic, options))


def slim_obstacle(weight: Tensor, options: Compression) -> str:
    """Why SLiM cannot quantise this weight; empty where it can."""
    if options.quantiser != "group_absmax":
        return ""
    if not runs_triton(weight):
        return "its groups are Triton kernels, which need a GPU."
    if any(size % options.group_size for size in weight.shape):
        return f"its groups of {options.group_size} do not divide {weight.shape[0]} x {weight.shape[1]}."
    return ""


def _sparsegpt(module: Any, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    layer = _linear(weight)
    reference = module.SparseGPT(layer)
    for sequence in inputs:
        reference.add_batch(sequence, None)
    reference.fasterprune(sparsity, *_pruned_of(pattern), blocksize=128, percdamp=0.01)
    return layer.weight.data


def _thanos(module: Any, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    layer = _linear(weight)
    reference = module.Thanos(layer)
    for sequence in inputs:
        reference.add_batch(sequence, None)
    reference.snap(sparsity, *_pruned_of(pattern), blocksize=512, v_blocksize=256, perc_outliers=0.0)
    return layer.weight.data


def _proxsparse(module: Any, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    new_weight: Tensor = module.prox_op(weight, ProxSparse().proximal_weight)
    return new_weight


def _slim(module: Any, statistic_of: Any, options: Compression, weight: Tensor, keep: Tensor, inputs: Tensor) -> Tensor:
    """Quantised only, or with the adapters of its `prune_wanda`: of all that quantisation and then the mask lose.

    No input is dead, so the shift of their norms that its scripts ask for is left out.
    """
    groups = options.quantiser == "group_absmax"
    quantiser = module.AutoQuantizer(
        "weight", num_bits=4, slim_quant=options.quantiser == "slim_quant", block_quantization=groups,
        block_dim=options.group_size, column_wise_grouping=options.grouping == "inputs",
    )  # fmt: skip
    layer: Any = _linear(weight)
    if options.adapter_rank == 0:
        quantised: Tensor = quantiser.dequantize_absmax(quantiser.quantize_weight(layer.weight.data))
        return quantised
    statistic = statistic_of(layer)
    for sequence in inputs:
        statistic.add_batch(sequence, None)
    module.add_lora(
        layer, W_mask=~keep, rank_ratio=options.adapter_rank, slim_lora=True, activations=statistic,
        quantizer=quantiser, quantize_first=True,
    )  # fmt: skip
    left, right = (factor.data.float() for factor in (layer.lora_left, layer.lora_right))
    new_weight: Tensor = layer.weight.data.float()
    return new_weight.addmm_(right.T, left.T)


def _drive(module: Any, driver: str, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A driver of WANDA, which has no function for one layer, on a model of one layer.

    The layer's forward pass costs nothing, and its outputs are thrown away.
    """
    layer, block = _linear(weight), nn.Module()
    vars(layer)["forward"] = lambda hidden: hidden
    block.layer = layer
    vars(block)["forward"] = lambda hidden, **_: (layer(hidden),)
    model = SimpleNamespace(
        model=SimpleNamespace(layers=[block]), config=SimpleNamespace(use_cache=False), seqlen=inputs.shape[1],
        hf_device_map={},
    )  # fmt: skip
    arguments = SimpleNamespace(nsamples=len(inputs), seed=0, use_variant=False, sparsity_ratio=sparsity)
    replaced = {
        "get_loaders": lambda *_, **__: (None, None),
        "prepare_calibration_input": lambda *_: (inputs, _Discard(), None, None),
    }
    with mock.patch.dict(vars(module), replaced):
        getattr(module, driver)(arguments, model, None, inputs.device, *_pruned_of(pattern))
    return layer.weight.data


class _Discard:
    def __setitem__(self, index: Any, value: Any) -> None:
        pass


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _pruned_of(pattern: Pattern) -> tuple[int, int]:
    """N and M as the references count them, N being the pruned ones; 0 and 0 when unstructured."""
    return pattern.m - pattern.n, pattern.m


def _quietly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Without their prints, and on a CPU without the calls that only a GPU understands."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor))
        return function(*arguments)


def _load(checkout: Path, option: str, repository: str, file: str) -> Any:
    if not (checkout / file).is_file():
        raise PatchError(f"{checkout / file}: no such file; --{option} takes a checkout of github.com/{repository}.")
    return _import(checkout / file, checkout)


@functools.cache
def _import(file: Path, root: Path) -> Any:
    """A module of a checkout, in a package of its own since both have a `lib`; what it imports may lie beside it, or be
    named from the root."""
    package = types.ModuleType(f"reference_{checksum_json(str(file))[:8]}")
    package.__path__ = [str(file.parent)]
    sys.modules[package.__name__] = package
    with _beside(file.parent, root):
        return importlib.import_module(f"{package.__name__}.{file.stem}")


@contextlib.contextmanager
def _beside(*folders: Path) -> Iterator[None]:
    added = [str(folder) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


@contextlib.contextmanager
def _stand_in_for_triton() -> Iterator[None]:
    """Where it is not installed: modules that define kernels can be imported, and do without them what they can."""
    missing = [] if importlib.util.find_spec("triton") else ["triton", "triton.language"]
    sys.modules.update({name: mock.MagicMock() for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
