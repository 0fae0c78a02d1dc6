"""The settings of benchmarks in a grid. Light on purpose (no torch): the workflow reads them.

Each section turns into the options of the command `patch-llm benchmark SECTION`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from patch.methods import MethodName

SHAPE_NAMES = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-2-7b", "llama-3.1-8b")
"""The keys of `patch.benchmarking.shapes.SHAPES`."""
RANDOM = "random"
"""What rows of random tiles say where others name their mask."""
_NAMES = "|".join(SHAPE_NAMES).replace(".", r"\.")

Shape = Annotated[str, Field(pattern=rf"^({_NAMES})$")]
LayerShape = Annotated[str, Field(pattern=rf"^({_NAMES}|[1-9]\d*x[1-9]\d*)$")]
Count = Annotated[int, Field(gt=0)]
Percent = Annotated[float, Field(ge=0, le=50)]


class Benchmark(BaseModel, ABC):
    """A section."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    takes_masks: ClassVar[bool] = False
    shapes: tuple[str, ...]

    @abstractmethod
    def options(self) -> list[str]:
        """Those of the command, but for the shape or the mask."""

    def random_options(self) -> list[str]:
        """Those that only random tiles have."""
        return []


class TilesBenchmark(Benchmark):
    """One of random tiles, or of the mask of a cell."""

    takes_masks: ClassVar[bool] = True
    sparsities: tuple[Percent, ...] = (25, 35, 45)
    """Of random tiles, in percent."""

    def random_options(self) -> list[str]:
        return ["--sparsity", _joined(self.sparsities)]


class LayersBenchmark(TilesBenchmark):
    """Linear layers with 2:4 tiles beside cuBLAS, cuSPARSELt and `torch.compile`."""

    shapes: tuple[LayerShape, ...] = ("llama-2-7b",)
    """Models whose layers are timed with random tiles, or single layers as OUTxIN."""
    tokens: tuple[Count, ...] = (1, 16, 64, 2048)
    """Rows of the input."""
    kernels: tuple[str, ...] = ("auto",)
    """auto, the one that is chosen, or names of kernels."""
    compile: bool = True
    """Time the dense layer by `torch.compile`, too."""

    def options(self) -> list[str]:
        kernels = [item for kernel in self.kernels for item in ("--kernel", kernel)]
        return ["--tokens", _joined(self.tokens), *kernels, *["--compile"] * self.compile]


class GenerationBenchmark(TilesBenchmark):
    """Greedy generation end to end, dense beside hybrid."""

    shapes: tuple[Shape, ...] = ("llama-2-7b",)
    """Models that are timed with random weights and tiles."""
    batches: tuple[Count, ...] = (16,)
    """Sequences at a time."""
    lengths: tuple[Annotated[str, Field(pattern=r"^[1-9]\d*\+([2-9]|[1-9]\d+)$")], ...] = ("128+128",)
    """Tokens of the prompt + tokens to generate."""
    compile: bool = True
    """Both sides by `torch.compile`."""
    fused: Literal["both", "hybrid", "none"] = "both"
    """Which sides compute query, key and value by one product, and gate and up."""

    def options(self) -> list[str]:
        sizes = ["--batch", _joined(self.batches), "--length", ",".join(self.lengths)]
        return [*sizes, "--fused", self.fused, *["--compile"] * self.compile]


class MemoryBenchmark(TilesBenchmark):
    """Size of a model's linear layers, dense and with 2:4 tiles packed."""

    shapes: tuple[Shape, ...] = ("llama-2-7b",)
    """Models whose size is taken with random weights and tiles."""

    def options(self) -> list[str]:
        return []


class PruningBenchmark(Benchmark):
    """One-shot pruning of single layers; the reference implementations are timed by hand, from their checkouts."""

    shapes: tuple[LayerShape, ...] = ("qwen2.5-0.5b", "llama-2-7b")
    """Models whose layers are pruned, or single layers as OUTxIN."""
    methods: tuple[MethodName, ...] = ("wanda", "sparsegpt", "thanos")
    """One-shot methods."""
    patterns: tuple[str, ...] = ("2:4", "unstructured")
    """N:M or unstructured, which is pruned to 50 %."""
    samples: int = Field(128, gt=0)
    """Calibration sequences."""
    length: int = Field(2048, gt=1)
    """Tokens per sequence."""

    def options(self) -> list[str]:
        methods = [item for method in self.methods for item in ("--method", method)]
        patterns = [item for pattern in self.patterns for item in ("--pattern", pattern)]
        return [*methods, *patterns, "--samples", str(self.samples), "--length", str(self.length)]


class LearningBenchmark(Benchmark):
    """Cost of a mask-learning step beside a dense step; the official code is timed by hand, from its checkout."""

    shapes: tuple[Shape, ...] = ("qwen2.5-0.5b", "llama-3.2-1b")
    """Models that are trained from random weights."""
    method: Literal["maskllm", "patch_joint", "patch_tile"] = "patch_joint"
    """What is learned."""
    settings: tuple[Literal["fast", "lean", "default"], ...] = ("fast", "lean")
    """fast keeps activations, lean computes them again."""
    tokens: int = Field(4096, gt=1)
    """Of the one sequence in a step."""

    def options(self) -> list[str]:
        settings = [item for setting in self.settings for item in ("--setting", setting)]
        return ["--mode", self.method, *settings, "--tokens", str(self.tokens)]


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:.10g}" for number in numbers)
