"""The reference implementations of the one-shot methods, checkouts of their repositories, as peers to measure against.

Each becomes a function of one layer's weight and inputs. Their own code accumulates, scores and updates, with the
settings of their own main scripts and one sequence at a time, as their drivers do. Nothing of it is part of this
project.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
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
from patch.sparsity.patterns import Pattern

Prune = Callable[[Tensor, Tensor, Pattern, float], Tensor]
"""weight [out, in], inputs [sequences, tokens, in], pattern, sparsity (0 to 1) -> new weight [out, in]"""

REPOSITORIES = {
    "magnitude": ("wanda", "locuslab/wanda", "lib/prune.py"),
    "wanda": ("wanda", "locuslab/wanda", "lib/prune.py"),
    "sparsegpt": ("sparsegpt", "IST-DASLab/sparsegpt", "sparsegpt.py"),
    "thanos": ("thanos", "vectozavr/thanos", "lib/thanos.py"),
}
"""By method: the option that takes its checkout, the repository on GitHub, and the file that is used."""


def load_reference(method: str, checkout: Path) -> Prune:
    """The reference of a key of REPOSITORIES. Raises PatchError for another checkout."""
    option, repository, file = REPOSITORIES[method]
    if not (checkout / file).is_file():
        raise PatchError(f"{checkout / file}: no such file; --{option} takes a checkout of github.com/{repository}.")
    module = _import(checkout / file)
    prune: dict[str, Prune] = {
        "magnitude": partial(_drive, module, "prune_magnitude"),
        "wanda": partial(_drive, module, "prune_wanda"),
        "sparsegpt": partial(_sparsegpt, module),
        "thanos": partial(_thanos, module),
    }
    return partial(_quietly, prune[method])


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


def _quietly(prune: Prune, *arguments: Any) -> Tensor:
    """Without their prints, and on a CPU without the calls that only a GPU understands."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", torch.Tensor.cpu))
        return prune(*arguments)


@functools.cache
def _import(file: Path) -> Any:
    """A module of a checkout, in a package of its own since both have a `lib`; what it imports may lie beside it."""
    package = types.ModuleType(f"reference_{checksum_json(str(file))[:8]}")
    package.__path__ = [str(file.parent)]
    sys.modules[package.__name__] = package
    with _beside(file.parent):
        return importlib.import_module(f"{package.__name__}.{file.stem}")


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
