"""How long stages take, from measured rates: results/reference/rates.csv, or a file of the same columns.

A rate is seconds per parameter and token. Between models of measured sizes it is interpolated (its logarithm over that
of the size), outside it stays that of the nearest. Methods without a measurement near a size take a related one's.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patch.artefacts import PatchError

FILE = Path(__file__).parents[2] / "results" / "reference" / "rates.csv"
CPU = "CPU thread"
ANY = "any"
NEAR = 1.25
"""Models whose sizes differ by no more than this factor have the same rate."""
RELATED = {
    "random": "magnitude",
    "released": "magnitude",
    "thanos": "sparsegpt",
    "maskllm": "patch_joint",
    "patch_tile": "patch_joint",
    "proxsparse": "patch_joint",
    "fine_tune": "patch_joint",
}
"""Whose rate stands in for a method's own: an upper bound, where it computes more."""
Basis = Literal["measured", "scaled", "extrapolated", "assumed"]
"""Measured: the method, near this size. Scaled: between measured sizes, or a related method. Extrapolated: beyond the
measured sizes. Assumed: nobody measured it."""


@dataclass(frozen=True)
class Rate:
    """One measurement."""

    stage: str
    method: str
    device: str
    """A kind of GPU, or one thread of a CPU."""
    parameters: float
    """Of the model."""
    tokens: float
    """That went through it; 0 where none do."""
    seconds: float
    basis: Basis
    source: str

    @property
    def unit(self) -> float:
        """Seconds per parameter and token."""
        return self.seconds / (self.parameters * max(self.tokens, 1))


@dataclass(frozen=True)
class Estimate:
    """Of one job on one device."""

    seconds: float
    basis: Basis


def load_rates(path: Path | str = FILE) -> list[Rate]:
    """Raises PatchError for a file that is missing or of other columns."""
    try:
        with Path(path).open(newline="") as stream:
            return [_rate(row) for row in csv.DictReader(stream)]
    except FileNotFoundError:
        raise PatchError(f"{path}: no such file of rates.") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PatchError(f"{path}: not a file of rates ({error}); its columns are those of {FILE.name}.") from None


def gpu_of(rates: Iterable[Rate]) -> str:
    """The kind of GPU that rates were measured on. Raises PatchError for none or several."""
    kinds = sorted({rate.device for rate in rates} - {CPU})
    if len(kinds) != 1:
        raise PatchError(f"rates of {', '.join(kinds) or 'no GPU'}: an estimate needs those of one kind of GPU.")
    return kinds[0]


def estimate(rates: Iterable[Rate], device: str, stage: str, method: str, parameters: float, tokens: float) -> Estimate:
    """Time of a stage on one device.

    Raises PatchError where nothing is known of the stage.
    """
    known = [rate for rate in rates if (rate.device, rate.stage) == (device, stage)]
    own = [rate for rate in known if rate.method in (method, ANY)]
    others = [rate for rate in known if rate.method == RELATED.get(method)]
    used = sorted(own + [rate for rate in others if not _near(rate, own)], key=lambda rate: rate.parameters)
    if not used:
        raise PatchError(f"no rate for the stage {stage} of {method} on {device}; add one, or give another --rates.")
    below = [rate for rate in used if rate.parameters <= parameters]
    above = [rate for rate in used if rate.parameters >= parameters]
    low, high = (below or above)[-1 if below else 0], (above or below)[0 if above else -1]
    seconds = _between(low, high, parameters) * parameters * max(tokens, 1)
    nearest = min((low, high), key=lambda rate: _ratio(rate.parameters, parameters))
    if nearest.basis == "assumed":
        return Estimate(seconds, "assumed")
    if _ratio(nearest.parameters, parameters) <= NEAR:
        return Estimate(seconds, "measured" if nearest in own else "scaled")
    return Estimate(seconds, "scaled" if below and above else "extrapolated")


def _rate(row: dict[str, str]) -> Rate:
    sizes = {name: float(row[name]) for name in ("parameters", "tokens", "seconds")}
    rate = Rate(**{**row, **sizes})  # type: ignore[arg-type]
    if rate.unit <= 0:
        raise ValueError(f"a rate of {rate.seconds} s")
    return rate


def _near(rate: Rate, others: list[Rate]) -> bool:
    return any(_ratio(rate.parameters, other.parameters) <= NEAR for other in others)


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)


def _between(low: Rate, high: Rate, parameters: float) -> float:
    if low.parameters == high.parameters:
        return low.unit
    share = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
    return math.exp((1 - share) * math.log(low.unit) + share * math.log(high.unit))
