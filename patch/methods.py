"""Every method of the paper: its hyper-parameters with their sources, and which of them run today.

Light on purpose (no torch): the grid, the workflow and the pruning code all read it.
Source tags: WANDA = locuslab/wanda, SGPT = IST-DASLab/sparsegpt, SLIM = Paramathic/slim,
PATCH = arXiv 2509.23410.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patch.artefacts import PatchError


class Method(BaseModel):
    """Base of all methods: closed and typed, so that a misspelt hyper-parameter is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    title: ClassVar[str]
    """Name as printed in tables."""
    patterns: ClassVar[tuple[str, ...]] = ()
    """Kinds of pattern it can produce: "n:m", "unstructured", "tiles"."""
    uses_calibration: ClassVar[bool] = True
    runs: ClassVar[bool] = False
    """False for methods of the paper that this version lists but cannot run."""


class Dense(Method):
    """The unpruned model: the first row of every comparison."""

    title = "Dense"
    patterns = ("dense",)
    uses_calibration = False
    runs = True


class Magnitude(Method):
    """Drop the smallest |w|: per group of M, or per layer when unstructured (WANDA `prune_magnitude`)."""

    title = "Magnitude"
    patterns = ("n:m", "unstructured")
    uses_calibration = False
    runs = True


class Wanda(Method):
    """Drop the smallest |w| * ||x||: per group of M, or per output row when unstructured (arXiv 2306.11695)."""

    title = "Wanda"
    patterns = ("n:m", "unstructured")
    runs = True

    shift_zero_metrics: bool = False
    """Add the smallest positive input statistic to all of them, so that weights on dead inputs keep
    their order by magnitude (SLIM `shift_zeros`; off in the paper)."""


class SparseGPT(Method):
    """Optimal-brain-surgeon pruning column by column, with weight updates (arXiv 2301.00774)."""

    title = "SparseGPT"
    patterns = ("n:m", "unstructured")
    runs = True

    block_size: int = Field(128, ge=4, multiple_of=4)
    """Columns whose updates are propagated lazily together (SGPT default 128)."""
    damping: float = Field(0.01, gt=0)
    """Share of the mean Hessian diagonal that is added to the diagonal (SGPT default 0.01)."""


class Thanos(Method):
    """Joint least-squares updates per row (vectozavr/thanos). Listed, not yet runnable."""

    title = "Thanos"
    patterns = ("n:m", "unstructured")


class ProxSparse(Method):
    """Proximal training towards 2:4, masks applied to the original weights. Listed, not yet runnable."""

    title = "ProxSparse"
    patterns = ("n:m",)


class MaskLLM(Method):
    """Learned 2:4 masks (arXiv 2409.17481). Listed, not yet runnable."""

    title = "MaskLLM"
    patterns = ("n:m",)


class PatchJoint(Method):
    """PATCH, tiles and 2:4 patterns learned together. Listed, not yet runnable."""

    title = "PATCH-Joint"
    patterns = ("tiles",)


class PatchTile(Method):
    """PATCH, tiles learned on a frozen 2:4 mask. Listed, not yet runnable."""

    title = "PATCH-Tile"
    patterns = ("tiles",)


METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "thanos": Thanos,
    "proxsparse": ProxSparse,
    "maskllm": MaskLLM,
    "patch_joint": PatchJoint,
    "patch_tile": PatchTile,
}
MethodName = Literal[
    "dense",
    "magnitude",
    "wanda",
    "sparsegpt",
    "thanos",
    "proxsparse",
    "maskllm",
    "patch_joint",
    "patch_tile",
]


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method `name` with its hyper-parameters.

    Raises PatchError for an unknown method, one that this version cannot run, and for wrong options.
    """
    if name not in METHODS:
        raise PatchError(f"method {name!r}: unknown; choose one of {', '.join(runnable_methods())}.")
    if not METHODS[name].runs:
        raise PatchError(
            f"method {name!r}: part of the paper's grid, but this version cannot run it yet; "
            f"it runs {', '.join(runnable_methods())}."
        )
    try:
        return METHODS[name](**options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        known = ", ".join(METHODS[name].model_fields) or "none"
        raise PatchError(f"method {name!r}, option {key!r}: {problem['msg']}; its options are: {known}.") from None


def runnable_methods() -> list[str]:
    return [name for name, method in METHODS.items() if method.runs]
