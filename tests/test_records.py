"""Records: complete or not there."""

from __future__ import annotations

import datetime
import json

import pytest

from patch.artefacts import PatchError
from patch.records import Metric, Record, recording


def test_a_record_survives_a_round_trip(tmp_path):
    record = Record(
        stage="evaluate",
        key="0123456789abcdef",
        arguments={"length": 4096},
        metrics=[Metric("wikitext2", "perplexity", 12.08, 0.05, 71), Metric("model", "sparsity", 0.5)],
        protocol={"wikitext2": {"length": 4096}},
        inputs={"model": "aa"},
        outputs={"masks": "bb"},
        provenance={"commit": None},
        cost={"wall_s": 1.5},
        date="2026-01-01T00:00:00+00:00",
    )
    record.write(tmp_path)
    assert Record.read(tmp_path) == record


def test_recording_writes_what_the_block_filled_in(tmp_path):
    with recording("prune", "abc", {"method": "wanda"}, tmp_path) as record:
        assert not (tmp_path / "record.json").exists()
        record.metrics.append(Metric("model", "sparsity", 0.5))
        record.outputs["masks"] = "cc"
    read = Record.read(tmp_path)
    assert (read.stage, read.key, read.arguments) == ("prune", "abc", {"method": "wanda"})
    assert read.metrics == [Metric("model", "sparsity", 0.5)]
    assert read.outputs == {"masks": "cc"}
    assert read.cost["wall_s"] >= 0
    assert 0.01 < read.cost["peak_memory_gib"] < 1000
    assert {"commit", "dirty", "host", "python", "gpu", "versions"} <= read.provenance.keys()
    assert datetime.datetime.fromisoformat(read.date).utcoffset() == datetime.timedelta(0)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_nothing_is_written_when_the_block_fails(tmp_path, failure):
    with pytest.raises(failure), recording("prune", "abc", {}, tmp_path):
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_record_of_the_last_good_one(tmp_path):
    with recording("prune", "first", {}, tmp_path):
        pass
    with pytest.raises(ValueError, match="boom"), recording("prune", "second", {}, tmp_path):
        raise ValueError("boom")
    assert Record.read(tmp_path).key == "first"


def test_a_metric_that_is_not_a_number_is_told_by_name(tmp_path):
    with pytest.raises(PatchError, match=r"perplexity.*wikitext2|wikitext2.*perplexity"):  # noqa: SIM117
        with recording("evaluate", "abc", {}, tmp_path) as record:
            record.metrics.append(Metric("wikitext2", "perplexity", float("inf")))
    assert list(tmp_path.iterdir()) == []


def edit(directory, **changes):
    content = json.loads((directory / "record.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (directory / "record.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "patch.record/99"}, "written in schema patch.record/99"),
        ({"schema": "patch.model/1"}, "not a patch.record file"),
        ({"metrics": None}, "not a complete record"),
        ({"stage": None}, "not a complete record"),
        ({"surprise": 1}, "not a complete record"),
        ({"metrics": [{"subject": "model"}]}, "not a complete record"),
        ({"metrics": 3}, "not a complete record"),
    ],
)
def test_records_that_are_not_whole_are_refused(tmp_path, changes, message):
    Record("prune", "abc", {}).write(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(PatchError, match=message):
        Record.read(tmp_path)


def test_a_missing_record_says_what_to_do(tmp_path):
    with pytest.raises(PatchError, match=r"record\.json: no such file; run the stage"):
        Record.read(tmp_path)
