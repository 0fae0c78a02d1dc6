"""Patterns, and the choice of what to keep, against sorting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patch.artefacts import PatchError
from patch.sparsity import patterns
from patch.sparsity.patterns import Pattern, keep_largest, keep_n_of_column, keep_n_of_m, pruned_count

GROUPS = [(1, 4), (2, 4), (3, 4), (4, 8)]


def naive_keep(group: list[float], keep: int) -> list[bool]:
    """Sort by (score, position): between equal scores the later one is larger."""
    best = sorted(range(len(group)), key=lambda i: (group[i], i))[len(group) - keep :]
    return [i in best for i in range(len(group))]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("dense", Pattern("dense")),
        ("unstructured", Pattern("unstructured")),
        ("2:4", Pattern("n:m", 2, 4)),
        ("1:4", Pattern("n:m", 1, 4)),
        ("4:8", Pattern("n:m", 4, 8)),
        ("tiles:128x128", Pattern("tiles", 2, 4, (128, 128))),
        ("tiles:3x8", Pattern("tiles", 2, 4, (3, 8))),
        ("tiles:128xK", Pattern("tiles", 2, 4, (128, 0))),
    ],
)
def test_patterns_are_read_and_written_alike(text, pattern):
    assert Pattern.parse(text) == pattern
    assert str(pattern) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2:4:8",
        "0:4",
        "4:4",
        "5:4",
        "-1:4",
        "2:4 ",
        "tiles",
        "tiles:128",
        "tiles:0x8",
        "tiles:8x0",
        "tiles:08x8",
        "tiles:8xk",
        "tiles:Kx8",
        "tiles:8x6",
        "tiles:8X8",
        "Dense",
    ],
)
def test_what_is_not_a_pattern_is_refused_by_name(text):
    with pytest.raises(PatchError, match="not one of dense, unstructured, N:M") as error:
        Pattern.parse(text)
    assert repr(text) in str(error.value)


def test_slugs_are_parts_of_file_names():
    texts = ("dense", "unstructured", "2:4", "tiles:128x64", "tiles:128xK")
    slugs = ["dense", "unstructured", "2of4", "tiles128x64", "tiles128xK"]
    assert [Pattern.parse(text).slug for text in texts] == slugs


def test_panels_are_as_wide_as_the_layer():
    assert str(Pattern.parse("tiles:128xK").for_layer(64, 96)) == "tiles:128x96"


@pytest.mark.parametrize("text", ["dense", "unstructured", "2:4", "tiles:128x64"])
def test_other_patterns_are_the_same_in_every_layer(text):
    assert Pattern.parse(text).for_layer(64, 96) == Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "share"), [("tiles:8x8", 0.5), ("tiles:8xK", 0.0), ("unstructured", 0.9), ("1:4", 0.75)]
)
def test_sparsities_that_a_pattern_reaches_pass(text, share):
    Pattern.parse(text).check_sparsity(share)


def test_tiles_prune_at_most_half():
    with pytest.raises(PatchError, match=r"pattern tiles:8x8: its tiles are dense or 2:4, so at most 50 %.*not 55 %"):
        Pattern.parse("tiles:8x8").check_sparsity(0.55)


@pytest.mark.parametrize(
    ("text", "sparsity"), [("dense", 0.0), ("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("4:8", 0.5)]
)
def test_patterns_that_fix_the_sparsity_know_it(text, sparsity):
    assert Pattern.parse(text).fixed_sparsity == sparsity


@pytest.mark.parametrize("text", ["unstructured", "tiles:8x8"])
def test_other_patterns_leave_the_sparsity_open(text):
    assert Pattern.parse(text).fixed_sparsity is None


@pytest.mark.parametrize("text", ["2:4", "tiles:128x128"])
def test_inputs_that_do_not_divide_name_the_layer_and_the_count(text):
    with pytest.raises(PatchError, match=r"layer blocks\.3\.up .*578 inputs do not split into 4s"):
        Pattern.parse(text).check_shape(16, 578, "blocks.3.up")


@pytest.mark.parametrize(("text", "inputs"), [("2:4", 576), ("4:8", 576), ("unstructured", 577), ("dense", 1)])
def test_inputs_that_divide_pass(text, inputs):
    Pattern.parse(text).check_shape(16, inputs, "layer")


@pytest.mark.parametrize(("n", "m"), GROUPS)
@given(data=st.data())
def test_keep_n_of_m_is_a_sort_per_group(n, m, data):
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    size = rows * groups * m
    # few distinct values, so that ties are common
    flat = data.draw(st.lists(st.integers(0, 3).map(float), min_size=size, max_size=size))
    scores = torch.tensor(flat).reshape(rows, groups * m)
    expected = [[kept for group in row.reshape(-1, m).tolist() for kept in naive_keep(group, n)] for row in scores]
    keep = keep_n_of_m(scores, n, m)
    assert keep.dtype == torch.bool
    assert keep.tolist() == expected
    if groups == 1:
        assert torch.equal(keep_n_of_column(scores.T, n), keep.T)


def test_between_equal_scores_the_later_entry_is_kept():
    scores = torch.tensor([[1.0, 1, 1, 1, 0, 2, 0, 0], [3.0, 3, 1, 3, 0, 0, 5, 0]])
    keep = [[False, False, True, True, False, True, False, True], [False, True, False, True, False, False, True, True]]
    assert keep_n_of_m(scores, 2, 4).tolist() == keep


def test_groups_may_have_more_than_256_members():
    scores = torch.arange(260.0).reshape(1, 260)
    assert torch.equal(keep_n_of_m(scores, 10, 260), scores >= 250)


@given(data=st.data())
def test_keep_largest_is_a_sort_per_row(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 17))
    percent = data.draw(st.integers(0, 99))
    flat = data.draw(st.lists(st.integers(0, 3).map(float), min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(flat).reshape(rows, columns)
    drop = columns * percent // 100
    expected = [naive_keep(row, columns - drop) for row in scores.tolist()]
    assert keep_largest(scores, percent / 100).tolist() == expected


def test_keep_largest_is_exact_where_all_scores_are_equal():
    keep = keep_largest(torch.zeros(3, 10), 0.3)
    assert keep.tolist() == [[False] * 3 + [True] * 7] * 3


def test_chunks_of_rows_do_not_show(monkeypatch):
    scores = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    whole = keep_largest(scores, 0.4)
    monkeypatch.setattr(patterns, "SCORES_PER_CHUNK", 25)
    assert torch.equal(keep_largest(scores, 0.4), whole)


def test_keep_largest_keeps_all_at_zero_sparsity():
    assert keep_largest(torch.zeros(2, 5), 0.0).all()


@pytest.mark.parametrize(
    ("total", "sparsity", "count"), [(100, 0.29, 29), (100, 0.57, 57), (96, 0.5, 48), (7, 0.5, 3), (5, 0.0, 0)]
)
def test_the_number_of_pruned_weights_is_not_lost_to_rounding(total, sparsity, count):
    assert pruned_count(total, sparsity) == count


def test_every_percentage_of_a_round_number_is_exact():
    assert [pruned_count(1000, percent / 100) for percent in range(100)] == list(range(0, 1000, 10))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 45, float("nan")])
def test_sparsities_outside_0_to_1_are_refused(sparsity):
    with pytest.raises(PatchError, match=r"0\.45 means that 45 % are pruned"):
        pruned_count(10, sparsity)
