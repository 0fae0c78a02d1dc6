"""Methods are closed: unknown names and options are told with what there is."""

from __future__ import annotations

from typing import get_args

import pytest

from patch.artefacts import PatchError
from patch.methods import METHODS, MethodName, SparseGPT, Wanda, make_method, runnable_methods


def test_defaults_are_the_papers():
    assert make_method("sparsegpt", {}) == SparseGPT(block_size=128, damping=0.01)
    assert make_method("wanda", {}) == Wanda(shift_zero_metrics=False)


def test_options_override_defaults():
    assert make_method("sparsegpt", {"block_size": 256}).block_size == 256


def test_the_name_type_lists_exactly_the_methods():
    assert get_args(MethodName) == tuple(METHODS)


def test_an_unknown_method_is_told_with_what_runs():
    with pytest.raises(PatchError, match="method 'wand': unknown; choose one of dense, random, magnitude, wanda"):
        make_method("wand", {})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.runs])
def test_a_listed_method_that_cannot_run_says_so(name):
    with pytest.raises(PatchError, match=f"method '{name}': part of the paper's grid, .* cannot run it yet"):
        make_method(name, {})


@pytest.mark.parametrize("name", runnable_methods())
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
