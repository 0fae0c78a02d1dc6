"""The settings of a compression, with their sources. Light on purpose (no torch): the grid reads them.

SLIM = Paramathic/slim, the code behind arXiv 2410.09615 and behind the quantised table of PATCH's authors.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patch.artefacts import PatchError

InputQuantisation = Literal["none", "int8", "float8"]


class Compression(BaseModel):
    """4-bit weights, after a mask or of the dense model, and low-rank adapters beside them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    quantiser: Literal["group_absmax", "absmax", "slim_quant"] = "group_absmax"
    """group_absmax: a scale per group, from its largest weight. absmax: one per matrix. slim_quant: one per matrix,
    with the least expected error of rounding and clipping together."""
    group_size: int = Field(128, gt=0)
    """Weights per group; where it does not divide, the last group of a row or column is shorter."""
    grouping: Literal["outputs", "inputs"] = "outputs"
    """outputs: a group runs over outputs, within one input (the default of SLIM's functions). inputs: over the inputs
    of one output, as inference kernels have it (`--column_wise_grouping` in SLIM)."""
    order: Literal["quantise_first", "prune_first"] = "quantise_first"
    """Whether scales come from all weights or from those that the mask keeps. With adapters, the final weights are
    pruned first in either case, as in SLIM; the order only says what the adapters make up for."""
    adapter_rank: float = Field(0.0, ge=0, le=1)
    """Rank of the adapters as a share of the layer's smaller dimension, rounded down but at least 1; 0 for none. 0.1 in
    the papers."""
    adapter_rank_multiple: int = Field(1, gt=0)
    """Ranks are rounded up to a multiple of this (`--pad_lora` in SLIM: its group size)."""
    adapter_norm: Literal["l2", "mean_abs", "none"] = "l2"
    """How inputs weigh in what adapters make up for. l2: by their norm, as in Wanda (SLIM's code). mean_abs: by the
    mean of their magnitude (SLIM's paper). none: all alike, which needs no calibration."""
    shift_zero_metrics: bool = False
    """Add the smallest positive squared norm to all of them (as the method wanda has it)."""
    adapter_sparsity: Literal["dense", "2:4"] = "dense"
    """2:4: keep the 2 largest of every 4 entries of the left factor, then fit both factors again."""
    adapter_bits: Literal[16, 4] = 16
    """4: adapters are quantised by groups, with the same size and direction as group_absmax."""
    inputs: InputQuantisation = "none"
    """Of the inputs of these layers when the model runs. int8: dynamic, a scale per token. float8: dynamic, a scale per
    tensor, so that scores depend a little on what is scored together (SLIM's 8 bits)."""

    @property
    def uses_calibration(self) -> bool:
        return self.adapter_rank > 0 and self.adapter_norm != "none"


def make_compression(options: dict[str, Any]) -> Compression:
    """The settings by name. Raises PatchError for unknown names and wrong values."""
    try:
        return Compression(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        known = ", ".join(Compression.model_fields)
        raise PatchError(
            f"compression, setting {problem['loc'][0]!r}: {problem['msg']}; the settings are: {known}."
        ) from None
