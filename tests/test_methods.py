"""Methods are closed: unknown names and options are told with what there is."""

from __future__ import annotations

from typing import get_args

import pytest

from patch.artefacts import PatchError
from patch.methods import METHODS, FineTune, MethodName, ProxSparse, SparseGPT, Wanda, make_method


def test_defaults_are_the_papers():
    assert make_method("sparsegpt", {}) == SparseGPT(block_size=128, damping=0.01)
    assert make_method("wanda", {}) == Wanda(shift_zero_metrics=False)
    assert make_method("proxsparse", {}) == ProxSparse(
        steps=400, batch_size=1, warmup_steps=40, learning_rate=5e-5, proximal_weight=0.85, rounding="nearest"
    )


def test_fine_tuning_reads_as_many_sequences_as_mask_learning_by_default():
    learned, tuned = make_method("patch_joint", {}), make_method("fine_tune", {})
    assert tuned.steps * tuned.batch_size == learned.steps * learned.batch_size == 512_000
    assert tuned == FineTune(learning_rate=1e-5, weight_decay=0.01)


def test_stochastic_rounding_is_for_our_optimisers_alone():
    with pytest.raises(PatchError, match="rounding stochastic needs optimizer adamw_fused or adamw_8bit"):
        make_method("fine_tune", {"rounding": "stochastic"})
    assert make_method("fine_tune", {"rounding": "stochastic", "optimizer": "adamw_8bit"})


def test_options_override_defaults():
    assert make_method("sparsegpt", {"block_size": 256}).block_size == 256


def test_the_name_type_lists_exactly_the_methods():
    assert get_args(MethodName) == tuple(METHODS)


def test_an_unknown_method_is_told_with_what_runs():
    with pytest.raises(PatchError, match="method 'wand': unknown; choose one of dense, random, magnitude, wanda"):
        make_method("wand", {})


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_told_with_the_known_ones(name):
    known = ", ".join(METHODS[name].model_fields) or "none"
    with pytest.raises(PatchError, match=f"method '{name}', option 'blok_size': .*its options are: {known}"):
        make_method(name, {"blok_size": 64})


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"block_size": 6}, {"block_size": "many"}, {"damping": 0}, {"damping": -1}],
)
def test_an_impossible_value_names_its_option(options):
    with pytest.raises(PatchError, match=f"option '{next(iter(options))}'"):
        make_method("sparsegpt", options)


def test_checkpointing_off_may_be_written_as_yaml_reads_it():
    assert make_method("patch_joint", {"checkpointing": False}).checkpointing == "off"  # type: ignore[attr-defined]
    with pytest.raises(PatchError, match="option 'checkpointing'"):
        make_method("patch_joint", {"checkpointing": True})
