"""MLflow: one walk through a store, because opening one takes seconds."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.methods import PatchJoint
from patch.reporting.tracking import PARAMETERS, track


def test_track(
    runs: pd.DataFrame,
    learned: tuple[pd.DataFrame, pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    joint = learned[0][(learned[0]["method"] == "patch_joint") & (learned[0]["sparsity"] == 45)]
    curves = learned[1]
    runs = pd.concat([runs[runs["sparsity"].isin([0, 50])], joint], ignore_index=True)
    uri = "sqlite:///results/mlflow.db"
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "accuracy.md").write_text("| a |")
    artifacts = [tmp_path / "tables"]
    mask = tmp_path / "results" / "synthetic" / "qwen" / "sparsegpt" / "50-2of4" / "prune" / "mask.safetensors"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"mask")

    # 2 dense, 3 + 2 pruned, 1 more seed, 1 learned; the missing and the excluded cell are not written
    assert track(runs, curves, uri, artifacts, tmp_path / "results") == {"new": 9, "changed": 0, "unchanged": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "tables"]
    kept = list((tmp_path / "results" / "mlflow-artifacts" / "synthetic").glob("*/artifacts/tables/accuracy.md"))
    assert [path.read_text() for path in kept] == ["| a |"]
    kept = list((tmp_path / "results" / "mlflow-artifacts" / "synthetic").glob("*/artifacts/mask.safetensors"))
    assert [path.read_bytes() for path in kept] == [b"mask"]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("synthetic").experiment_id

    def stored(kind: str) -> dict[str, object]:
        found = client.search_runs([experiment], f"tags.kind = '{kind}'")
        return {run.info.run_name: run for run in found}

    parents, cells = stored("model"), stored("cell")
    assert set(parents) == {"qwen", "tiny_1"}
    assert len(stored("report")) == 1
    run = cells["qwen/sparsegpt/50-2of4"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parents["qwen"].info.run_id
    assert run.data.tags["cell_hash"] == "hash of qwen/sparsegpt/50-2of4"
    assert run.data.tags["commit"] == "0123456789"
    assert "gpu" not in run.data.tags
    assert run.data.params == {
        "model": "qwen", "source": "Qwen/Qwen2.5-0.5B", "method": "sparsegpt", "pattern": "2:4", "sparsity": "50",
        "variant": "default", "compression": "none", "seed": "0",
        "option.layers": "all", "option.calibration_inputs": "pruned", "option.block_size": "128",
        "option.damping": "0.01",
    }  # fmt: skip
    metrics = run.data.metrics
    assert metrics["perplexity.wikitext2"] == pytest.approx(36.0)
    assert metrics["acc.piqa"] == pytest.approx(0.325)
    assert metrics["acc_norm.piqa"] == pytest.approx(0.335)
    assert metrics["acc.mean"] == pytest.approx(0.35)
    assert metrics["acc.mean.stderr"] == pytest.approx(0.01 / 8**0.5)
    assert metrics["sparsity"] == pytest.approx(0.5)
    assert (metrics["prune.wall_s"], metrics["evaluate.wall_s"]) == (12.5, 3.25)
    assert not [name for name in metrics if "layers" in name or "anatomy" in name]
    assert run.info.end_time - run.info.start_time == 15750

    # a learned cell has its curves, step by step, in the time of its first stage
    run = cells["qwen/patch_joint/45-tiles128x128"]
    options = {name: value for name, value in run.data.params.items() if name.startswith("option.")}
    assert set(options) == {f"option.{name}" for name in PatchJoint.model_fields}
    assert (options["option.learning_rate"], options["option.pattern_scale"]) == ("0.001", "[100.0, 500.0]")
    assert options["option.tile_temperature"] == "null"
    assert "compression.bits" not in run.data.params
    own = curves[curves["cell"] == run.info.run_name]
    history = client.get_metric_history(run.info.run_id, "learn.cross_entropy")
    assert [point.step for point in history] == list(range(1, 81))
    assert [point.value for point in history] == pytest.approx(list(own["cross_entropy"]))
    assert history[-1].timestamp - run.info.start_time == pytest.approx(12500, abs=1)
    assert {name for name in run.data.metrics if name.startswith("learn.")} == {
        "learn.wall_s", "learn.loss", "learn.cross_entropy", "learn.density", "learn.density_loss", "learn.norm_ratio",
        "learn.pattern_temperature", "learn.pattern_scale", "learn.tile_temperature", "learn.tile_scale",
        "learn.learning_rate", "learn.gradient_norm", "learn.tokens_per_second",
    }  # fmt: skip

    # nothing changed: nothing is written
    assert track(runs, curves, uri, artifacts, tmp_path / "results") == {"new": 0, "changed": 0, "unchanged": 9}
    assert {name: other.info.run_id for name, other in stored("cell").items()} == {
        name: other.info.run_id for name, other in cells.items()
    }

    # one number, one curve and one table changed: these cells and the report are replaced
    runs, curves = runs.copy(), curves.copy()
    own = (runs["cell"] == "qwen/sparsegpt/50-2of4") & (runs["subject"] == "wikitext2")
    runs.loc[own, "value"] = 35.0
    curves.loc[(curves["cell"] == "qwen/patch_joint/45-tiles128x128") & (curves["step"] == 7), "loss"] = 1.0
    (tmp_path / "tables" / "accuracy.md").write_text("| b |")
    assert track(runs, curves, uri, artifacts, tmp_path / "results") == {"new": 0, "changed": 2, "unchanged": 7}
    again = stored("cell")
    replaced = {name for name, other in again.items() if other.info.run_id != cells[name].info.run_id}
    assert replaced == {"qwen/sparsegpt/50-2of4", "qwen/patch_joint/45-tiles128x128"}
    assert again["qwen/sparsegpt/50-2of4"].data.metrics["perplexity.wikitext2"] == 35.0
    assert len(again) == 9
    assert len(stored("report")) == 1


def test_hyper_parameters_of_a_compressed_cell_are_those_of_both_stages(
    runs: pd.DataFrame, no_curves: pd.DataFrame, tmp_path: Path
) -> None:
    own = runs[(runs["cell"] == "qwen/wanda/50-2of4") & (runs["metric"] != "sparsity")]
    compress = own[own["stage"] == "prune"].assign(stage="compress", options='{"bits": 4, "scale": "slim"}')
    older = runs[runs["cell"] == "qwen/sparsegpt/50-2of4"].assign(options=pd.NA)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert track(pd.concat([own, compress, older], ignore_index=True), no_curves, uri)["new"] == 2

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("synthetic").experiment_id
    found = {run.info.run_name: run.data.params for run in client.search_runs([experiment], "tags.kind = 'cell'")}
    parameters = found["qwen/wanda/50-2of4"]
    assert (parameters["compression.bits"], parameters["compression.scale"]) == ("4", "slim")
    assert parameters["option.shift_zero_metrics"] == "false"
    assert set(found["qwen/sparsegpt/50-2of4"]) == set(PARAMETERS)


def test_missing_artifacts_are_named(runs: pd.DataFrame, no_curves: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"nothing\.md: no such file"):
        track(runs, no_curves, f"sqlite:///{tmp_path}/mlflow.db", [tmp_path / "nothing.md"])
