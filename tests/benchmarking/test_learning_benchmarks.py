"""What the benchmarks of mask learning compute from their measurements, and the official code as they drive it."""

import math

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.benchmarking.curves import summary
from patch.benchmarking.official import OfficialLearning
from patch.benchmarking.scaling import measure, with_speedup
from patch.benchmarking.shapes import random_tokens, without_priors
from patch.methods import MaskLLM, PatchJoint, PatchTile


def curves(**losses: list[list[float]]) -> pd.DataFrame:
    """`curves(ours=[[seed 0's points], [seed 1's]], official=...)`."""
    return pd.DataFrame(
        {"contender": contender, "seed": seed, "step": 20 * (point + 1), "cross_entropy": loss}
        for contender, runs in losses.items()
        for seed, run in enumerate(runs)
        for point, loss in enumerate(run)
    )


def test_curves_are_apart_by_the_distance_of_their_means() -> None:
    found = summary(curves(ours=[[3.0, 2.0], [3.2, 2.2]], official=[[3.1, 2.4], [3.1, 2.4]]))
    assert found["between"] == pytest.approx((0.0 + 0.3) / 2)
    assert found["ours at the end"] == pytest.approx(2.1)
    assert found["official at the end"] == pytest.approx(2.4)


def test_the_yardstick_is_the_distance_that_seeds_alone_would_make() -> None:
    """Two seeds 0.2 apart have a standard deviation of 0.1 * sqrt(2); the other contender has none."""
    found = summary(curves(ours=[[3.0], [3.2]], official=[[3.1], [3.1]]))
    assert found["within"] == pytest.approx(math.sqrt(0.02 / 2) * math.sqrt(2 / math.pi))


def test_speedups_compare_equal_work_only() -> None:
    rows = pd.DataFrame(
        [
            {"model": "a", "mode": "m", "sequences": 8, "length": 16, "processes": 1, "ms": 100.0},
            {"model": "a", "mode": "m", "sequences": 8, "length": 16, "processes": 2, "ms": 50.0},
            {"model": "a", "mode": "m", "sequences": 4, "length": 16, "processes": 2, "ms": 50.0},
        ]
    )
    assert with_speedup(rows).speedup.fillna(0).tolist() == [1.0, 2.0, 0.0]


def test_a_scaling_row_says_what_was_learned_and_how_fast(tiny_model) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("llama")
    method = without_priors(PatchJoint(steps=10, batch_size=2, micro_batch_size=1))
    row = measure(model, "tiny", method, random_tokens(model, 8), device=model.device, sharded=False)
    assert (row["processes"], row["sequences"], row["length"]) == (1, 2, 8)
    assert row["cross_entropy"] == pytest.approx(math.log(model.config.vocab_size), rel=0.1)
    assert row["ms"] > 0


@pytest.mark.parametrize("method", [MaskLLM(), PatchJoint(), PatchTile()])
def test_without_priors_only_the_priors_are_gone(method) -> None:  # type: ignore[no-untyped-def]
    bare = without_priors(method)
    changed = {name for name, value in bare if value != getattr(method, name)}
    assert changed == {"pattern_prior_strength", "tile_prior_strength"} & set(type(method).model_fields)


def test_a_checkout_of_something_else_is_refused(tiny_model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PatchError, match="takes a checkout of"):
        OfficialLearning(tiny_model("llama"), PatchJoint(), 0.45, (16, 16), tmp_path)
