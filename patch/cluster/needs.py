"""What a job needs: memory, time and GPUs, from the model's size, the method and the kind of GPU.

Estimates with room to spare, for a scheduler that kills what exceeds them. They come from measured rates and from the
components of `patch.learning.memory.memory_estimate`, which a test compares; a retry asks for more (`attempt`). Light
on purpose (no torch): the workflow reads it at every start.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from patch.artefacts import PatchError, read_json
from patch.cluster.site import Gpu
from patch.experiments import Cell, ModelSource, Stage
from patch.methods import METHODS, Learned, LearnedPatterns, ProxSparse, Trained, TrainedWeights

FLOPS = {"h200": 2.0e14, "h100": 2.0e14, "a100": 1.0e14, "a6000": 4e13, "l40": 6e13, "v100": 3e13}
"""FLOP per second that learning sustains, by kind of GPU: about a third of what its kernels reach in long runs."""
FLOPS_UNKNOWN_GPU = 3e13
FLOPS_PER_THREAD = 3e10
"""Of one CPU thread in float32: 8 x 135 M x 28 tokens per second (the demo's learning on one core)."""
TASK_TOKENS = 12e6
"""Tokens of the paper's eight tasks without limits."""
TOKENS_PER_QUESTION = 600
"""Of one question with all its answers, where questions are limited."""
START_MINUTES = 10
"""Starting Python, loading a model, compiling."""
LIBRARIES_GIB = 4.0
"""Host memory of Python, PyTorch and CUDA themselves."""
CPUS_PER_GPU = 4
MARGIN = 3.0
"""Times the estimated time."""


@dataclass(frozen=True)
class Needs:
    """Of one job."""

    memory_mb: int
    """Host memory of a node."""
    minutes: int
    gpus: int = 0
    """On every node."""
    nodes: int = 1

    @property
    def cpus(self) -> int:
        """CPUs that go with its GPUs, on a node."""
        return CPUS_PER_GPU * self.gpus


def parameter_count(source: ModelSource, prepared: Path | str) -> float:
    """Parameters of a model: from its `model.json` where it is prepared, else from its name, else a billion."""
    try:
        return float(read_json(prepared, "patch.model/1")["parameters"])
    except (PatchError, KeyError):
        return parameters_in_name(source.source)


def parameters_in_name(name: str) -> float:
    """Such as 7e9 of "llama-2-7b"; a billion where it says nothing."""
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", name.lower())
    return float(found[-1][0]) * {"b": 1e9, "m": 1e6}[found[-1][1]] if found else 1e9


def preparation(parameters: float, attempt: int = 1) -> Needs:
    """Of one of the `prepare` stages: loading the model once, downloading, tokenising."""
    return Needs(_memory_mb(4 * parameters / 2**30, attempt), 60 * attempt)


def generation(parameters: float, tokens: float, gpu: Gpu | None, threads: int, attempt: int = 1) -> Needs:
    """Of sampling training text from the model itself; a token at a time, it reaches a tenth of the usual rate."""
    seconds = 10 * 2 * parameters * tokens / _flops(gpu, threads)
    return Needs(_memory_mb(4 * parameters / 2**30, attempt), _minutes(seconds, attempt), int(gpu is not None))


def benchmark(parameters: float, gpu: Gpu | None, attempt: int = 1) -> Needs:
    """Of one benchmark of a model or a shape: mostly compiling and trying kernels, whatever its size."""
    return Needs(_memory_mb(4 * parameters / 2**30, attempt), _minutes(600, attempt), int(gpu is not None))


def stage(
    cell: Cell, name: Stage, parameters: float, gpu: Gpu | None, threads: int, max_minutes: int, attempt: int = 1
) -> Needs:
    """Of a stage of a cell. gpu: the kind it runs on, None for a CPU. attempt: counts from 1; more asks for more."""
    weights, tokens = weights_gib(cell.source, parameters), tokens_of(cell, name)
    memory, gpus, nodes = 2 * weights, int(gpu is not None), 1
    if name == "learn":
        method = METHODS[cell.method](**cell.options)
        assert isinstance(method, Trained)
        assert cell.training
        if gpu:
            gpus, nodes = learning_gpus(parameters, weights, method, cell.training.length, gpu)
        seconds = 8 * parameters * tokens / (_flops(gpu, threads) * max(1, gpus * nodes))
        memory += saved_gib(parameters, weights, method)  # a state is copied to the host before it is written
        memory += 0 if gpu else learning_gib(parameters, weights, method, cell.training.length)
    elif name == "prune":
        solving = 600 * parameters / 1e9 if cell.method in ("sparsegpt", "thanos") else 0
        seconds = 4 * parameters * tokens / _flops(gpu, threads) + solving * (1 if gpu else 10 / threads)
        memory += 8 * tokens * _width(parameters) / 2**30  # inputs and outputs of the block under way
    elif name == "compress":
        adapters = cell.compression_options is not None and cell.compression_options.adapter_rank > 0
        # Eigenvectors of a matrix as wide as the model in float64, for each layer.
        decomposing = 150 * (parameters / 1e9) * (_width(parameters) / 2048) if adapters else 0
        seconds = 4 * parameters * tokens / _flops(gpu, threads) + decomposing * (1 if gpu else 20 / threads)
        memory += 8 * tokens * _width(parameters) / 2**30 + (0 if gpu else 100 * _width(parameters) ** 2 / 2**30)
    else:
        seconds = 3 * 2 * parameters * tokens / _flops(gpu, threads)  # short questions fill a GPU badly
    return Needs(_memory_mb(memory, attempt), min(_minutes(seconds, attempt), max_minutes), gpus, nodes)


def weights_gib(source: ModelSource, parameters: float) -> float:
    """Of the model in its precision."""
    return parameters * (4 if source.dtype == "float32" else 2) / 2**30


def tokens_of(cell: Cell, name: Stage) -> float:
    """Tokens that a stage of a cell runs through the model."""
    if name == "learn":
        method = METHODS[cell.method](**cell.options)
        assert isinstance(method, Trained)
        assert cell.training
        return method.steps * method.batch_size * cell.training.length
    if name in ("prune", "compress"):
        text = cell.calibration if name == "prune" else cell.compression_calibration
        return text.samples * text.length if text else 0
    texts = cell.evaluation.perplexity.values()
    return sum(text.length * (text.windows or 340_000 / text.length) for text in texts) + _task_tokens(cell)


def learning_gib(parameters: float, weights: float, method: Trained, length: int) -> float:
    """Device memory of training on one device. weights: GiB of the model."""
    width = _width(parameters)
    blocks = max(1.0, parameters / (12 * width**2))
    element = weights / parameters * 2**30
    live = blocks if method.checkpointing == "off" else 1
    activations = method.micro_batch_size * length * width * element * (blocks + 28 * live) / 2**30
    if isinstance(method, Learned):
        effective = 2 * weights / blocks if method.checkpointing == "all" else weights
        return weights + _logits_gib(parameters, method) + effective + activations + 1.5
    assert isinstance(method, TrainedWeights)
    per_weight = sum(method.weight_bytes(round(element))) + (not isinstance(method, ProxSparse))
    return weights + parameters * per_weight / 2**30 + activations + 1.5


def learning_gpus(parameters: float, weights: float, method: Trained, length: int, gpu: Gpu) -> tuple[int, int]:
    """GPUs per node and nodes whose memory together holds a learning job, its weights and logits split over them.

    A batch divides over powers of two. Training weights splits nothing, so it takes one.
    """
    if not isinstance(method, Learned):
        return 1, 1
    whole = learning_gib(parameters, weights, method, length)
    split = weights + _logits_gib(parameters, method)
    room = 0.9 * gpu.memory_gib
    count = 1
    while whole - split + split / count > room and count < 64:
        count *= 2
    return min(count, gpu.per_node), math.ceil(count / gpu.per_node)


def _logits_gib(parameters: float, method: Learned) -> float:
    """Of 2:4 logits with gradients and moments."""
    return 1.5 * parameters * sum(method.logit_bytes) / 2**30 if isinstance(method, LearnedPatterns) else 0.0


def saved_gib(parameters: float, weights: float, method: Trained) -> float:
    """Of a saved state."""
    if isinstance(method, TrainedWeights):
        element = round(weights / parameters * 2**30)
        copy, _, moments = method.weight_bytes(element)
        return parameters * ((copy or element) + moments) / 2**30
    if not isinstance(method, LearnedPatterns):
        return 0.0
    logit, _, state = method.logit_bytes
    return 1.5 * parameters * (logit + state) / 2**30


def _width(parameters: float) -> float:
    """Hidden size of a usual decoder: 900 at 0.5, 2000 at 1.2 and 4100 at 7 billion parameters."""
    return 1900 * (parameters / 1.2e9) ** 0.42


def _task_tokens(cell: Cell) -> float:
    tasks = cell.evaluation.tasks
    if tasks is None:
        return 0.0
    if tasks.limit is None:
        return TASK_TOKENS
    limits = [tasks.limits.get(name, tasks.limit) * (57 if name == "mmlu" else 1) for name in tasks.names]
    return sum(limits) * TOKENS_PER_QUESTION


def _flops(gpu: Gpu | None, threads: int) -> float:
    if gpu is None:
        return threads * FLOPS_PER_THREAD
    kind = (gpu.kind or "").lower()
    return next((rate for name, rate in FLOPS.items() if name in kind), FLOPS_UNKNOWN_GPU)


def _memory_mb(gib: float, attempt: int) -> int:
    """After a job that ran out of memory: half as much again, then twice. Whole GiB, so that jobs share arrays."""
    return 1024 * math.ceil((LIBRARIES_GIB + gib) * (1 + 0.5 * (attempt - 1)))


def _minutes(seconds: float, attempt: int) -> int:
    """In quarters of an hour, so that jobs share arrays."""
    return 15 * math.ceil((START_MINUTES + MARGIN * seconds / 60) * attempt / 15)
