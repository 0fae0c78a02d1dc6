"""CUDA graphs: small models spend more time launching kernels than running them, and a graph launches once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Eager calls before the capture: compilation, autotuning and library handles must be out of the way."""
log = logging.getLogger(__name__)


class Replayed:
    """Calls a function of tensors that stay where they are; on a GPU by replaying its CUDA graph.

    The function takes its inputs from tensors that its owner fills in place, leaves its side effects in others, and
    returns one tensor, which the next call overwrites.
    """

    def __init__(self, function: Callable[[], Tensor], *, capture: bool):
        self._function = function
        self._left = WARM_UP if capture else -1
        # Eager calls and capture share a stream: autograd's accumulation stays on the one where it first ran.
        self._stream = torch.cuda.Stream() if capture else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.empty(0)

    def __call__(self) -> Tensor:
        if self._left < 0:
            return self._function()
        if self._left > 0:
            self._left -= 1
            return self._on_side_stream()
        if self._graph is None:
            self._capture()
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        """Record the graph, or go on without one where the function does what a graph cannot hold."""
        torch.cuda.empty_cache()  # what the eager calls left behind would lie beside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        try:
            # compiled functions have met every kind of call by now; none may compile for what only a capture changes
            with (
                torch.compiler.set_stance(skip_guard_eval_unsafe=True),
                torch.cuda.graph(graph, stream=self._stream),
            ):
                self._result = self._function()
            self._graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a failed capture raises an error of its own
            log.warning("no CUDA graph for this model, steps will be slower (%s)", str(cause).splitlines()[0])
            self._left = -1
            del cause
        if self._graph is None:
            gc.collect()  # frames of the failed call hold contexts, such as checkpointing's, that must end

    def _on_side_stream(self) -> Tensor:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result
